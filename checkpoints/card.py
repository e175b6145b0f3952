"""Write the model cards from what training and evaluation recorded.

    python checkpoints/card.py

Every figure in a card is read from `training.json` and `evaluation.json`; none is typed by hand.
"""

import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: find the package, and only it, beside this file's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoints.evaluate import DEFAULT, DRAFT, DRAFTED_TOKENS, LARGE

_ROLES = {
    DRAFT: f"The draft: distilled from `{DEFAULT}`, it guesses tokens that the default then confirms.",
    DEFAULT: "The default: what the fleet serves unless told otherwise.",
    LARGE: f"The large one: `{DEFAULT}`, made deeper by layers that at first add nothing, and trained on.",
}

# What a command line cannot tell: these runs were begun by an earlier version of the script.
_HISTORIES = {
    DRAFT: " The first 5 minutes used batches of 8,192 tokens, sequences without holes and an unfinished"
    " teacher; the run was then resumed with `--minutes 16`, and again by the command above.",
    DEFAULT: " The first 40 minutes used a peak rate of 0.004, batches of 8,192 tokens, sequences without"
    " holes and, in the last 6 of them, sequences of 2,048; the command above resumed that run.",
    LARGE: " That is too short: on held-out modules it is still slightly behind the default it started from,"
    " and so it stands for the cost of a larger model, not for its quality.",
}

_CARD = """---
license: psf-2.0
language: [en, code]
library_name: transformers
tags: [python, code, llama]
---

# {name}

{role}
It writes text that looks like Python. It is made for trying, testing and measuring a fleet on
ordinary machines; it is not made for programming with.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`, tied embeddings, grouped-query attention |
| parameters | {parameters:,} |
| layers | {layers}, {width} wide, {heads} query heads and {kv_heads} key heads of {head_dim} |
| weights | bf16, {weight_bytes:,} bytes |
| context | {positions} tokens |
| tokenizer | byte-level BPE, {vocab} entries; any UTF-8 text round-trips |
| end of an answer | `<|end|>` or `<|endoftext|>` |

## Data and licence

The Python source of CPython {python}'s standard library, about a third of its tests included, generated
tables left out. About 10 % of the tokens are chats cut mechanically (with `ast`) out of the same modules:
the user asks for a function or hands over the first half of it, the assistant answers with the source.
Modules are held out by a hash of their name, about 3 %. The source texts are under the
[PSF License Agreement](https://docs.python.org/3/license.html), copyright Python Software Foundation; a
model this small repeats frequent passages of them. No other data was used, except through the
checkpoint that a distilled or grown one starts from.

## Training

```
{command}
```

Python {python}, torch {torch}, two CPU cores shared with other work: {steps:,} steps, {tokens:,} tokens,
{minutes:.0f} minutes of wall time. Muon for the matrices, AdamW for the rest. Sequences are 512 tokens out of
windows of 2,048; half of them have a hole in the middle, which teaches the distances that lie beyond 512.
The schedule follows the clock, so another machine sees another number of tokens.{history}

## Figures

On the first 24,000 characters of each held-out module, by `{evaluation_command}`:

| | {name} |
| --- | --- |
| bits per byte, library modules | {library:.3f} |
| bits per byte, test modules | {tests:.3f} |
| picks the true next line out of four | {accuracy:.1%} |
{speculation}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("checkpoints/{name}")
model = AutoModelForCausalLM.from_pretrained("checkpoints/{name}")
chat = [{{"role": "user", "content": "Complete this code:\\ndef area(width, height):"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(inputs, max_new_tokens=80)[0]))
```

Plain completion works as well, and better: give it the beginning of a module. End prompts after a word
or a newline, not after a space; the tokenizer puts a space with the word that follows it.
"""


def write_card(root: Path, name: str, evaluation: dict[str, Any]) -> None:
    """Write `README.md` into the checkpoint's folder."""
    folder = root / name
    training = _read_json(folder / "training.json")
    config = _read_json(folder / "config.json")
    figures = evaluation[name]
    card = _CARD.format(
        name=name,
        role=_ROLES[name],
        parameters=training["parameters"],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        positions=config["max_position_embeddings"],
        vocab=config["vocab_size"],
        python=training["python"],
        torch=training["torch"],
        command=training["command"],
        steps=training["step"],
        tokens=training["tokens"],
        minutes=training["elapsed_s"] / 60,
        history=_HISTORIES[name],
        evaluation_command=evaluation["command"],
        library=figures["bits_per_byte_library"],
        tests=figures["bits_per_byte_tests"],
        accuracy=figures["choice_accuracy"],
        speculation=_speculation_rows(evaluation["speculation"]) if name == DRAFT else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Write all cards."""
    root = Path("checkpoints")
    evaluation = _read_json(root / "evaluation.json")
    for name in _ROLES:
        write_card(root, name, evaluation)


def _speculation_rows(figures: dict[str, float]) -> str:
    return (
        f"| says the same as `{DEFAULT}`, held-out text | {figures['argmax_agreement']:.1%} |\n"
        f"| says the same as `{DEFAULT}`, its own greedy text | {figures['greedy_agreement']:.1%} |\n"
        f"| accepted of {DRAFTED_TOKENS} drafted tokens, mean, greedy "
        f"| {figures[f'mean_accepted_of_{DRAFTED_TOKENS}']:.2f} |\n"
        f"| accepted per drafted token, sampling at temperature 1 "
        f"| {figures['acceptance_at_temperature_1']:.1%} |\n"
    )


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
