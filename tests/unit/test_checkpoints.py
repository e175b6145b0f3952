"""The small model family: tokenizer, chat template, corpus, training and the committed weights."""

import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

# `checkpoints` is a package beside `tests`, not an installed one.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from checkpoints.batches import SEQUENCE_TOKENS, WINDOW_TOKENS, Batch, TrainingText, batches
from checkpoints.corpus import Message, Module, chats_of, is_held_out, read_corpus
from checkpoints.evaluate import accepted_lengths, bits_per_byte, choice_accuracy, make_questions
from checkpoints.layout import load_checkpoint, save_checkpoint
from checkpoints.model import SHAPES, CausalLm, Shape
from checkpoints.tokenizer import END_ID, END_OF_TEXT_ID, SPECIAL_TOKENS, render_chat, train_tokenizer
from checkpoints.train import grow, learning_rate_factor, make_loss, make_optimizers, train_step

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("trireme-py-1m", "trireme-py-6m", "trireme-py-16m")
HAS_WEIGHTS = all((ROOT / "checkpoints" / name / "model.safetensors").exists() for name in NAMES)
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="the checkpoints are not in this checkout")

TINY = Shape(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)

# Our own text, so in no checkpoint's training data.
SNIPPET = '''\
import os
import sys


class LineCounter:
    """Count the lines of files."""

    def __init__(self, encoding="utf-8"):
        self.encoding = encoding
        self.total = 0

    def count(self, path):
        """Return the number of lines in the file."""
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        with open(path, encoding=self.encoding) as f:
            lines = len(f.readlines())
        self.total += lines
        return lines


def main():
    counter = LineCounter()
    for name in sys.argv[1:]:
        print(name, counter.count(name))


if __name__ == '__main__':
    main()
'''

MODULE = Module(
    name="shapes",
    text=textwrap.dedent(
        '''
        class Square:
            """A square, given by its side."""

            def __init__(self, side):
                self.side = side
                self.scale = 1

            def area(self):
                """Return the area of the square."""
                side = self.side * self.scale
                return side * side
        '''
    ),
)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SNIPPET, MODULE.text])


@pytest.fixture(scope="module")
def committed_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "checkpoints" / "trireme-py-6m" / "tokenizer.json"))


@needs_weights
@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_survives_the_tokenizer(committed_tokenizer: Tokenizer, text: str) -> None:
    token_ids = committed_tokenizer.encode(text).ids
    assert committed_tokenizer.decode(token_ids, skip_special_tokens=False) == text


@needs_weights
@pytest.mark.parametrize("name", NAMES)
def test_all_checkpoints_carry_the_same_tokenizer(name: str, committed_tokenizer: Tokenizer) -> None:
    own = Tokenizer.from_file(str(ROOT / "checkpoints" / name / "tokenizer.json"))
    assert own.to_str() == committed_tokenizer.to_str()
    assert [own.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(5))


def test_training_the_tokenizer_twice_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([SNIPPET, MODULE.text]).to_str() == tokenizer.to_str()


def test_chat_template_renders_what_training_showed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_checkpoint(CausalLm(TINY), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        Message(role="system", content="You write Python."),
        Message(role="user", content="Add two numbers."),
        Message(role="assistant", content="def add(a, b):\n    return a + b"),
        Message(role="user", content="  Thanks\n"),
    ]
    as_dicts = [{"role": message.role, "content": message.content} for message in messages]

    rendered = loaded.apply_chat_template(as_dicts, tokenize=False)
    prompted = loaded.apply_chat_template(as_dicts, tokenize=False, add_generation_prompt=True)

    assert rendered == render_chat(messages)
    assert prompted == rendered + "<|assistant|>\n"
    assert rendered.startswith("<|system|>\nYou write Python.<|end|>\n<|user|>\nAdd two numbers.<|end|>\n")
    with pytest.raises(Exception, match="Unknown role: tool"):
        loaded.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_split_is_disjoint_and_depends_on_names_only() -> None:
    corpus = read_corpus()
    training = {module.name for module in corpus.training}
    held_out = {module.name for module in corpus.held_out}

    assert not training & held_out
    assert 0.01 < len(held_out) / len(training) < 0.08
    assert not {module.text for module in corpus.training} & {module.text for module in corpus.held_out}
    # Pinned: a different split would turn the published figures into figures on training data.
    known = ("bisect", "functools", "gzip", "json", "os", "pprint")
    assert [name for name in known if is_held_out(name)] == ["bisect", "functools", "gzip", "pprint"]


def test_corpus_leaves_out_tables_and_duplicates(tmp_path: Path) -> None:
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "cp1.py").write_text(SNIPPET)
    (tmp_path / "table.py").write_text("numbers = [" + "0x1234, " * 200 + "]\n")
    (tmp_path / "abacus.py").write_text(SNIPPET)
    (tmp_path / "copied.py").write_text(SNIPPET + "\n\n")

    corpus = read_corpus(tmp_path)

    assert [module.name for module in (*corpus.training, *corpus.held_out)] == ["abacus"]


def test_chats_answer_with_source_of_the_module() -> None:
    chats = [chat for seed in range(20) for chat in chats_of(MODULE, rng=random.Random(seed))]
    assert chats
    module_lines = {line.strip() for line in MODULE.text.split("\n")}
    for chat in chats:
        assert [message.role for message in chat if message.role != "system"] == ["user", "assistant"] * (
            len(chat) // 2
        )
        answers = [message.content for message in chat if message.role == "assistant"]
        for line in "\n".join(answers).split("\n"):
            assert line.strip() in module_lines


def test_epochs_repeat_exactly_and_differ_from_one_another(tokenizer: Tokenizer) -> None:
    text = TrainingText([MODULE] * 100, tokenizer, seed=0)
    again = TrainingText([MODULE] * 100, tokenizer, seed=0)
    assert torch.equal(text.epoch(0), again.epoch(0))
    assert not torch.equal(text.epoch(0)[0], text.epoch(1)[0])


def test_batches_use_every_token_once_at_its_own_position() -> None:
    windows = torch.arange(3 * (WINDOW_TOKENS + 1)).view(3, WINDOW_TOKENS + 1)
    read = list(batches(windows, batch_tokens=2 * SEQUENCE_TOKENS, seed=0))

    inputs = torch.cat([batch.inputs for batch in read])
    assert inputs.shape == (3 * WINDOW_TOKENS // SEQUENCE_TOKENS, SEQUENCE_TOKENS)
    assert torch.equal(inputs.flatten().sort().values, windows[:, :-1].flatten())
    for batch in read:
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert torch.equal(batch.inputs % (WINDOW_TOKENS + 1), batch.positions)
        assert (batch.positions.diff(dim=1) >= 1).all()


def test_a_few_steps_reduce_the_loss(tokenizer: Tokenizer) -> None:
    model = CausalLm(TINY)
    text = TrainingText([MODULE] * 100, tokenizer, seed=0)
    batch = next(batches(text.epoch(0), batch_tokens=2 * SEQUENCE_TOKENS, seed=0))
    loss_of = make_loss(model, None, teacher_weight=0.0)
    optimizers = make_optimizers(model)
    losses = [train_step(model, loss_of, optimizers, batch, learning_rate=1e-2) for _ in range(30)]
    assert losses[0] == pytest.approx(8.3, abs=0.3)  # ln 4096: at first every token is as likely
    assert losses[-1] < losses[0] / 2


def test_distillation_moves_the_student_toward_its_teacher(tokenizer: Tokenizer) -> None:
    student, teacher = CausalLm(TINY), CausalLm(TINY)
    teacher.requires_grad_(False)
    for parameter in teacher.parameters():  # an opinionated teacher
        parameter.mul_(4.0)
    inputs = torch.randint(0, 4096, (4, 32))
    batch = Batch(inputs=inputs, targets=inputs, positions=torch.arange(32).repeat(4, 1))
    loss_of = make_loss(student, teacher, teacher_weight=1.0)
    optimizers = make_optimizers(student)
    losses = [train_step(student, loss_of, optimizers, batch, learning_rate=1e-2) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_grown_model_starts_as_the_same_function() -> None:
    deeper = Shape(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    shallow, deep = CausalLm(TINY), CausalLm(deeper)
    grow(shallow, deep)
    token_ids = torch.randint(0, 4096, (2, 24))
    torch.testing.assert_close(deep(token_ids), shallow(token_ids))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    assert learning_rate_factor(0.0) < 0.05
    assert learning_rate_factor(0.02) == pytest.approx(1.0)
    assert learning_rate_factor(0.5) > learning_rate_factor(0.9) > 0
    assert learning_rate_factor(1.0) == learning_rate_factor(1.2) == pytest.approx(0.0)


def test_accepted_lengths_follow_greedy_speculation() -> None:
    yes, no = True, False
    # Two right then one wrong; then four right; then one wrong at once, with too few left to draft.
    agrees = [yes, yes, no, yes, yes, yes, yes, yes, no, yes, yes]
    assert list(accepted_lengths(agrees, drafted_tokens=4)) == [2, 4]
    assert list(accepted_lengths([no] * 8, drafted_tokens=4)) == [0, 0, 0, 0, 0]


def test_saved_checkpoint_computes_the_same_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_checkpoint(CausalLm(TINY), tokenizer, tmp_path)
    ours, _ = load_checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.randint(0, 4096, (2, 48))
    with torch.inference_mode():
        torch.testing.assert_close(ours(token_ids), theirs(token_ids).logits, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id == [END_OF_TEXT_ID, END_ID]


@needs_weights
@pytest.mark.parametrize(("name", "variant", "bound"), list(zip(NAMES, SHAPES, (2.0, 1.7, 1.7), strict=True)))
def test_committed_checkpoint_knows_some_python(name: str, variant: str, bound: float) -> None:
    from transformers import AutoModelForCausalLM

    folder = ROOT / "checkpoints" / name
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, tokenizer = load_checkpoint(folder)
    assert ours.shape == SHAPES[variant]
    token_ids = torch.tensor([tokenizer.encode(SNIPPET).ids])
    with torch.inference_mode():
        torch.testing.assert_close(ours(token_ids), theirs(token_ids).logits, rtol=1e-3, atol=1e-3)
    assert bits_per_byte(ours, tokenizer, [SNIPPET]) < bound


@needs_weights
def test_default_prefers_the_true_next_line() -> None:
    model, tokenizer = load_checkpoint(ROOT / "checkpoints" / "trireme-py-6m")
    held_out = [module for module in read_corpus().held_out if module.name in ("bisect", "gzip", "sched")]
    questions = make_questions(held_out, count=20, seed=0)
    assert all(len(set(question.candidates)) == 4 for question in questions)
    assert choice_accuracy(model, tokenizer, questions) > 0.4
