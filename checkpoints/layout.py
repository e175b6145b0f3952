"""Checkpoints on disk, in the layout that `transformers.AutoModelForCausalLM` reads."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from checkpoints.model import CausalLm, Shape, huggingface_config
from checkpoints.tokenizer import END_ID, END_OF_TEXT_ID, save_tokenizer

WEIGHTS = "model.safetensors"


def save_checkpoint(model: CausalLm, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bf16), configuration and tokenizer; the folder then loads by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    # A reader beside us sees the old file or the new one, never half of one.
    unfinished = folder / f"{WEIGHTS}.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors leaves it to its owner; a server may run as another user
    unfinished.replace(folder / WEIGHTS)
    _write_json(folder / "config.json", huggingface_config(model.shape))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": END_OF_TEXT_ID,
            "eos_token_id": [END_OF_TEXT_ID, END_ID],
            "pad_token_id": END_OF_TEXT_ID,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
        },
    )
    save_tokenizer(tokenizer, folder)


def load_checkpoint(folder: Path) -> tuple[CausalLm, Tokenizer]:
    """The model in fp32, holding the values stored in bf16, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(**{field.name: config[field.name] for field in fields(Shape)})
    model = CausalLm(shape)
    tensors = load_file(folder / WEIGHTS)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
