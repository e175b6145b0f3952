"""Measure the checkpoints on modules they were not trained on.

    python checkpoints/evaluate.py --out checkpoints/evaluation.json

For each checkpoint: bits per byte, and how often it picks the true next line out of four. For the
draft also how well it guesses what the default will say, which is what speculation lives on.
"""

import argparse
import json
import math
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

if not __package__:  # started as a script: find the package, and only it, beside this file's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoints.corpus import Module, is_test_module, read_corpus
from checkpoints.layout import load_checkpoint
from checkpoints.model import CausalLm, count_parameters
from checkpoints.tokenizer import END_OF_TEXT_ID

DRAFT, DEFAULT, LARGE = "trireme-py-1m", "trireme-py-6m", "trireme-py-16m"

WINDOW_TOKENS = 1024
TEXT_LIMIT_CHARS = 24_000
"""Read of each module: a few giants would otherwise decide the figures, and take most of the time."""
CHOICE_QUESTIONS = 200
CHOICE_CONTEXT_LINES = 24
CANDIDATES = 4
DRAFTED_TOKENS = 4

GREEDY_PROMPTS = 32
GREEDY_PROMPT_TOKENS = 192
GREEDY_NEW_TOKENS = 48


LanguageModel = Callable[[Tensor], Tensor]
"""Tokens of one sequence (1, length) to the logits behind each, (1, length, vocabulary)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which line comes next?"""

    context: str
    """Ends without a newline."""
    candidates: tuple[str, ...]
    """Lines of the same module, all indented like the true one."""
    answer: int
    """Index of the true line."""


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Bits the model needs for each UTF-8 byte; every window starts without what came before it."""
    nats, num_bytes = 0.0, 0
    for text in texts:
        token_ids = tokenizer.encode(text).ids
        for first in range(0, len(token_ids), WINDOW_TOKENS):
            window = token_ids[first : first + WINDOW_TOKENS]
            # The token before the window is context, as the start of the text is for the first one.
            before = token_ids[first - 1] if first else END_OF_TEXT_ID
            nats += float(_nats(model, [before, *window]).sum())
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


def make_questions(modules: Sequence[Module], *, count: int, seed: int) -> tuple[Question, ...]:
    """Draw questions evenly over the modules; equal arguments give equal questions."""
    rng = random.Random(seed)
    per_module = [_questions_of(module, rng) for module in modules]
    questions: list[Question] = []
    while len(questions) < count and per_module:
        for source in per_module.copy():
            question = next(source, None)
            if question is None:
                per_module.remove(source)
            elif len(questions) < count:
                questions.append(question)
    return tuple(questions)


@torch.inference_mode()
def choice_accuracy(model: LanguageModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> float:
    """Share of questions where the true line has the highest log-likelihood per token."""
    correct = 0
    for question in questions:
        context = [END_OF_TEXT_ID, *tokenizer.encode(question.context).ids][-WINDOW_TOKENS // 2 :]
        scores = []
        for candidate in question.candidates:
            line = tokenizer.encode("\n" + candidate).ids
            nats = _nats(model, [*context, *line])[-len(line) :].sum()
            scores.append(float(nats) / len(line))
        correct += scores.index(min(scores)) == question.answer
    return correct / len(questions)


@torch.inference_mode()
def agreement(
    draft: CausalLm, default: CausalLm, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, float]:
    """How alike the two are at every position of the texts, whoever wrote the text."""
    equal, overlap, positions = 0, 0.0, 0
    for text in texts:
        token_ids = [END_OF_TEXT_ID, *tokenizer.encode(text).ids]
        for first in range(0, len(token_ids), WINDOW_TOKENS):
            window = torch.tensor([token_ids[first : first + WINDOW_TOKENS]])
            drafted, wanted = _logits(draft, window), _logits(default, window)
            equal += int((drafted.argmax(-1) == wanted.argmax(-1)).sum())
            overlap += float(torch.minimum(drafted.softmax(-1), wanted.softmax(-1)).sum())
            positions += len(drafted)
    return {"argmax_agreement": equal / positions, "acceptance_at_temperature_1": overlap / positions}


def accepted_lengths(agrees: Sequence[bool], *, drafted_tokens: int) -> Iterator[int]:
    """Tokens accepted in each round of greedy speculation along one text of the default's.

    `agrees[i]` says whether the draft's guess at position i is what the default says there. A round
    accepts guesses up to the first wrong one and then takes one token from the default itself.
    """
    position = 0
    while position + drafted_tokens <= len(agrees):
        guesses = agrees[position : position + drafted_tokens]
        accepted = guesses.index(False) if False in guesses else drafted_tokens
        yield accepted
        position += accepted + 1


@torch.inference_mode()
def greedy_acceptance(
    draft: CausalLm, default: CausalLm, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, float]:
    """Let the default write on from prompts out of `texts`, and count what the draft guesses right."""
    prompts = _prompts(tokenizer, texts)
    written = _write_on(default, prompts)
    equal, positions, lengths = 0, 0, list[int]()
    for row in written:
        guesses = _logits(draft, row[None, :-1]).argmax(-1)[GREEDY_PROMPT_TOKENS - 1 :]
        agrees = (guesses == row[GREEDY_PROMPT_TOKENS:]).tolist()
        equal += sum(agrees)
        positions += len(agrees)
        lengths.extend(accepted_lengths(agrees, drafted_tokens=DRAFTED_TOKENS))
    return {
        "greedy_agreement": equal / positions,
        f"mean_accepted_of_{DRAFTED_TOKENS}": sum(lengths) / len(lengths),
    }


def evaluate_family(root: Path) -> dict[str, object]:
    """Every figure of every checkpoint under `root`."""
    held_out = read_corpus().held_out
    library = [m.text[:TEXT_LIMIT_CHARS] for m in held_out if not is_test_module(m.name)]
    tests = [m.text[:TEXT_LIMIT_CHARS] for m in held_out if is_test_module(m.name)]
    questions = make_questions(
        [module for module in held_out if not is_test_module(module.name)], count=CHOICE_QUESTIONS, seed=0
    )
    figures: dict[str, object] = {
        "command": "python checkpoints/evaluate.py --out checkpoints/evaluation.json",
        "python": platform.python_version(),
        "held_out_modules": [module.name for module in held_out],
        "held_out_bytes": sum(len(text.encode()) for text in (*library, *tests)),
        "choice_questions": len(questions),
    }
    models: dict[str, CausalLm] = {}
    for name in (DRAFT, DEFAULT, LARGE):
        model, tokenizer = load_checkpoint(root / name)
        models[name] = model.eval()
        of_model: dict[str, float] = {
            "parameters": count_parameters(model),
            "bits_per_byte_library": bits_per_byte(model, tokenizer, library),
            "bits_per_byte_tests": bits_per_byte(model, tokenizer, tests),
            "choice_accuracy": choice_accuracy(model, tokenizer, questions),
        }
        if name == DEFAULT:
            pair = models[DRAFT], model, tokenizer, library
            figures["speculation"] = _rounded(agreement(*pair) | greedy_acceptance(*pair))
        figures[name] = _rounded(of_model)
        print(name, figures[name], flush=True)
    print("speculation", figures["speculation"], flush=True)
    return figures


def main() -> None:
    """Parse the command line, measure, and write the figures."""
    parser = argparse.ArgumentParser(description="Measure the checkpoints on held-out modules.")
    parser.add_argument("--root", type=Path, default=Path("checkpoints"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/evaluation.json"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = evaluate_family(arguments.root)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _logits(model: LanguageModel, token_ids: Tensor) -> Tensor:
    """Of one sequence: (1, length) in, (length, vocab) out."""
    logits: Tensor = model(token_ids)
    return logits[0]


def _nats(model: LanguageModel, token_ids: Sequence[int]) -> Tensor:
    """Cost of each token but the first, given those before it."""
    sequence = torch.tensor([token_ids])
    return functional.cross_entropy(_logits(model, sequence[:, :-1]), sequence[0, 1:], reduction="none")


def _questions_of(module: Module, rng: random.Random) -> Iterator[Question]:
    lines = [line.rstrip() for line in module.text.split("\n")]
    usable = [index for index, line in enumerate(lines) if len(line.strip()) >= 8]
    order = [index for index in usable if index >= CHOICE_CONTEXT_LINES and lines[index - 1]]
    rng.shuffle(order)
    for index in order:
        true_line = lines[index]
        indentation = true_line[: len(true_line) - len(true_line.lstrip())]
        others = sorted({lines[other].strip() for other in usable} - {true_line.strip()})
        if len(others) < CANDIDATES - 1:
            return
        candidates = [indentation + line for line in rng.sample(others, CANDIDATES - 1)]
        answer = rng.randrange(CANDIDATES)
        candidates.insert(answer, true_line)
        yield Question(
            context="\n".join(lines[index - CHOICE_CONTEXT_LINES : index]),
            candidates=tuple(candidates),
            answer=answer,
        )


def _prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Pieces of the texts, evenly spread: (prompts, prompt_tokens)."""
    pieces = [
        token_ids[first : first + GREEDY_PROMPT_TOKENS]
        for token_ids in (tokenizer.encode(text).ids for text in texts)
        for first in range(0, len(token_ids) - GREEDY_PROMPT_TOKENS, GREEDY_PROMPT_TOKENS)
    ]
    stride = max(len(pieces) // GREEDY_PROMPTS, 1)
    return torch.tensor(pieces[::stride][:GREEDY_PROMPTS])


def _write_on(model: CausalLm, prompts: Tensor) -> Tensor:
    """Continue each prompt greedily; without a cache, which a few thousand tokens do not need."""
    written = prompts
    for _ in range(GREEDY_NEW_TOKENS):
        hidden = model.model(written)[:, -1]
        following = functional.linear(hidden, model.model.embed_tokens.weight).argmax(-1, keepdim=True)
        written = torch.cat((written, following), dim=1)
    return written


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
