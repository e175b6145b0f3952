"""A draft model from its checkpoint, if its tokens are the target's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.loading.whole import load_model
from trireme.models.model import Model


def load_draft(directory: Path, target: Path, *, device: torch.device | str, dtype: torch.dtype) -> Model:
    """Load the model that drafts for the checkpoint in `target`.

    Raises:
        InvalidConfiguration: a token of the one is another token, or none, of the other.
        InvalidCheckpoint: the files are missing or malformed.
    """
    own, wanted = _tokens(directory), _tokens(target)
    if own != wanted:
        differing = sorted(name for name, token in (own.items() ^ wanted.items()))
        raise InvalidConfiguration(
            f"the draft model {directory.name} has other tokens than {target.name}, such as "
            f"{differing[0]!r}: a draft model must have the same tokenizer",
            param="draft",
        )
    return load_model(directory, device=device, dtype=dtype)


def _tokens(directory: Path) -> dict[str, int]:
    """Ids by text."""
    path = directory / "tokenizer.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # of (text, score), in order of id
            vocabulary = {text: token for token, (text, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in document.get("added_tokens", ())}
        return {**vocabulary, **added}
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path.name} of {directory.name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{path.name} of {directory.name} is malformed: {error!r}") from error
