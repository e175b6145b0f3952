"""The names that clients may ask for, each with its tokenizer, chat template and context."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trireme.errors import (
    ContextLengthExceeded,
    InvalidCheckpoint,
    InvalidConfiguration,
    InvalidRequest,
    ModelNotFound,
)
from trireme.gateway.chat_template import ChatTemplate, load_chat_template, read_json
from trireme.gateway.detokenizer import Vocabulary
from trireme.runtime.fleet import Fleet

ROLES = ("system", "user", "assistant")
"""Who may speak in a conversation; templates put roles next to their control tokens."""
INLINE_CHARACTERS = 4096
"""Longer texts are tokenised in a thread, so that other requests' tokens go on flowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model or a variant."""

    name: str
    variant_of: str
    """The model that this is a variant of; empty for a model."""
    vocabulary: Vocabulary
    chat_template: ChatTemplate | None
    context_tokens: int
    """The least context over the variants that may answer."""
    eos_token_ids: frozenset[int]
    vocabulary_size: int
    """Rows of the embedding: token ids from 0 up to here are valid."""
    created_unix_s: int

    async def tokenize(
        self, text: str, *, special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """The ids of a text; `special_tokens` lets the tokenizer add its own, as for plain prompts.

        Raises:
            InvalidRequest: the text is not valid Unicode (a lone surrogate).
            ContextLengthExceeded: it is so long that it need not be tokenised to say so.
        """
        fewest = self.vocabulary.fewest_tokens(text)
        if fewest > self.context_tokens:
            raise ContextLengthExceeded(
                f"the prompt has at least {fewest} tokens; {self.name}'s context is {self.context_tokens}",
                param=param,
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"the text has a lone surrogate at character {error.start}", param=param
                ) from error
        encode = self.vocabulary.tokenizer.encode
        if len(text) > INLINE_CHARACTERS:
            encoding = await asyncio.to_thread(encode, text, add_special_tokens=special_tokens)
        else:
            encoding = encode(text, add_special_tokens=special_tokens)
        return list(encoding.ids)

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation up to where the answer starts.

        Control tokens come from the template alone: what a message says is text, also where it
        spells a special token, so nobody can end their own turn and speak as another role.

        Raises:
            InvalidRequest: the checkpoint has no chat template, it refuses the messages, or a role
                is none of `ROLES`.
            ContextLengthExceeded: the conversation is far too long.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                f"{self.name} has no chat template: ask with a plain prompt (/v1/completions)",
                param="messages",
            )
        for number, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise InvalidRequest(
                    f"messages[{number}]: the role must be one of {', '.join(ROLES)}", param="messages"
                )
        # The seam is drawn, so that no message can have it. Letters would not outlive every template.
        seam = f"\ue000{secrets.randbits(64)}\ue000"
        said = [
            {**message, "content": self.vocabulary.disarmed(message["content"], seam)} for message in messages
        ]
        ids: list[int] = []
        for piece in self.chat_template.render(said).split(seam):
            ids += await self.tokenize(piece, special_tokens=False, param="messages")
        return ids


class ModelCatalog:
    """All names of a fleet."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def find(self, name: str) -> ServedModel:
        """The model or variant of that name.

        Raises:
            ModelNotFound: there is none; names those there are.
        """
        model = self._models.get(name)
        if model is None:
            known = ", ".join(repr(known) for known in sorted(self._models))
            raise ModelNotFound(f"no model {name[:80]!r} here; there are {known}", param="model")
        return model

    def all(self) -> list[ServedModel]:
        """Sorted by name."""
        return sorted(self._models.values(), key=lambda model: model.name)


def load_catalog(fleet: Fleet) -> ModelCatalog:
    """Read the tokenizers and configurations of every variant in the fleet file.

    Raises:
        InvalidCheckpoint: a file is missing or malformed.
        InvalidConfiguration: the variants of one model differ in their tokenizers, or a model
            and a variant of another model share a name.
    """
    vocabularies: dict[str, Vocabulary] = {}
    served: list[ServedModel] = []
    for name, model in fleet.models.items():
        variants = {
            key: _load_variant(key, name, variant.checkpoint, vocabularies)
            for key, variant in model.variants.items()
        }
        speaker = variants[model.default_variant]
        for key, variant in variants.items():
            if variant.vocabulary is not speaker.vocabulary:
                raise InvalidConfiguration(
                    f"variants {speaker.name!r} and {key!r} of model {name!r} have different tokenizers, so "
                    "one cannot answer for the other",
                    param=f"models.{name}.variants",
                )
        served += [variant for key, variant in variants.items() if key != name]
        served.append(
            ServedModel(
                name=name,
                variant_of="",
                vocabulary=speaker.vocabulary,
                chat_template=speaker.chat_template,
                context_tokens=min(variant.context_tokens for variant in variants.values()),
                eos_token_ids=speaker.eos_token_ids,
                vocabulary_size=min(variant.vocabulary_size for variant in variants.values()),
                created_unix_s=speaker.created_unix_s,
            )
        )
    names = [model.name for model in served]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InvalidConfiguration(f"names stand for two models: {doubled}", param="models")
    return ModelCatalog(served)


def _load_variant(
    name: str, model: str, checkpoint: Path, vocabularies: dict[str, Vocabulary]
) -> ServedModel:
    file = checkpoint / "tokenizer.json"
    try:
        raw = file.read_bytes()
        digest = hashlib.blake2b(raw).hexdigest()
        if digest not in vocabularies:
            tokenizer = Tokenizer.from_buffer(raw)
            tokenizer.no_truncation()  # A file may say to cut long texts, which would go unnoticed.
            tokenizer.no_padding()
            vocabularies[digest] = Vocabulary(tokenizer)
        created_unix_s = int(os.stat(file).st_mtime)
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise InvalidCheckpoint(f"{file} is not a tokenizer: {error}") from error
    config = read_json(checkpoint / "config.json")
    generation = read_json(checkpoint / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ServedModel(
        name=name,
        variant_of=model,
        vocabulary=vocabularies[digest],
        chat_template=load_chat_template(checkpoint),
        context_tokens=_positive(config, "max_position_embeddings", checkpoint),
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        vocabulary_size=_positive(config, "vocab_size", checkpoint),
        created_unix_s=created_unix_s,
    )


def _positive(config: Mapping[str, Any], key: str, checkpoint: Path) -> int:
    value = config.get(key, config.get("n_positions") if key == "max_position_embeddings" else None)
    if not isinstance(value, int) or value <= 0:
        file = checkpoint / "config.json"
        raise InvalidCheckpoint(f"{file}: {key} must be a positive integer, not {value!r}")
    return value
