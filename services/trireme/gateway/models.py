"""The names that clients may ask for, each with its tokenizer, chat template and context."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from trireme.models.config_parsing import parse_config
from trireme.runtime.fleet import Fleet, PublicPrefix

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation; templates put roles next to their control tokens."""
INLINE_CHARACTERS = 4096
"""Longer texts are tokenised in a thread, so that other requests' tokens go on flowing."""

MOST_NAMED = 32
"""Classes that an error names."""


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
    block_tokens: int = 16
    """Tokens per KV block."""
    public_prefixes: tuple[tuple[int, ...], ...] = ()
    """Beginnings of prompts that the operator declared public."""
    checkpoint: Path | None = None
    """Where its tokenizer is."""
    generates: bool = True
    """False: an encoder, which embeds and classifies."""
    labels: tuple[str, ...] = ()
    """Of an encoder with a head that classifies: its classes, in order."""

    def check_generates(self) -> None:
        """Raise InvalidRequest for an encoder."""
        if not self.generates:
            raise InvalidRequest(
                f"{self.name} embeds and classifies; it does not generate text", param="model"
            )

    def classes_of(self, labels: Sequence[str]) -> list[int]:
        """The classes of an encoder that are called so.

        Raises:
            InvalidRequest: it has no such class, or none at all.
        """
        known = {label: number for number, label in enumerate(self.labels)}
        if not known:
            raise InvalidRequest(
                f"{self.name} has no head that classifies: ask for embeddings", param="labels"
            )
        foreign = next((label for label in labels if label not in known), None)
        if foreign is not None:
            named = ", ".join(map(repr, self.labels[:MOST_NAMED]))
            more = "" if len(self.labels) <= MOST_NAMED else f" and {len(self.labels) - MOST_NAMED} more"
            raise InvalidRequest(
                f"{self.name} has no class {foreign[:80]!r}; it has {named}{more}", param="labels"
            )
        return [known[label] for label in labels]

    async def tokenize(
        self,
        text: str,
        *,
        special_tokens: bool = True,
        param: str = "prompt",
        most_tokens: int | None = None,
    ) -> list[int]:
        """The ids of a text; `special_tokens` lets the tokenizer add its own, as for plain prompts.

        Args:
            most_tokens: what is surely longer is refused at once; None: the context.

        Raises:
            InvalidRequest: the text is not valid Unicode (a lone surrogate).
            ContextLengthExceeded: it is so long that it need not be tokenised to say so.
        """
        fewest = self.vocabulary.fewest_tokens(text)
        most = self.context_tokens if most_tokens is None else most_tokens
        if fewest > most:
            raise ContextLengthExceeded(
                f"the prompt has at least {fewest} tokens; {self.name} takes at most {most} here "
                f"(its context is {self.context_tokens})",
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

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        most_tokens: int | None = None,
    ) -> list[int]:
        """The ids of a conversation up to where the answer starts; `tools` are functions it may call.

        Raises:
            InvalidRequest: the checkpoint has no chat template, it refuses the messages, or a role
                is none of `ROLES`.
            ContextLengthExceeded: the conversation is far too long.
        """
        template, said, seam = self.disarmed_chat(messages, tools)
        ids: list[int] = []
        for piece in template.render(said).split(seam):
            ids += await self.tokenize(piece, special_tokens=False, param="messages", most_tokens=most_tokens)
        return ids

    def disarmed_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[ChatTemplate, list[dict[str, Any]], str]:
        """The template, the messages without control tokens, and the seam that stands in their place.

        Control tokens come from the template alone: what a message says is text, also where it
        spells a special token, so nobody can end their own turn and speak as another role. What is
        rendered is tokenised piece by piece between the seams.

        Raises:
            InvalidRequest: the checkpoint has no chat template, or a role is none of `ROLES`.
        """
        self.check_generates()
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
        said = [self._disarmed(message, seam) for message in messages]
        return self.chat_template.with_tools([self._disarmed(tool, seam) for tool in tools]), said, seam

    def _disarmed(self, value: Any, seam: str) -> Any:
        """A part of a conversation without control tokens, however deep they stand."""
        if isinstance(value, str):
            return self.vocabulary.disarmed(value, seam)
        if isinstance(value, Mapping):
            return {self._disarmed(key, seam): self._disarmed(part, seam) for key, part in value.items()}
        if isinstance(value, list):
            return [self._disarmed(part, seam) for part in value]
        return value

    def encode_rendered(self, text: str, seam: str) -> list[int]:
        """The ids of a rendered conversation, or of a part of one that begins where a message does."""
        encode = self.vocabulary.tokenizer.encode
        return [i for piece in text.split(seam) for i in encode(piece, add_special_tokens=False).ids]


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
            key: _load_variant(key, name, variant.checkpoint, vocabularies, fleet.block_tokens)
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
            if (variant.generates, variant.labels) != (speaker.generates, speaker.labels):
                raise InvalidConfiguration(
                    f"variants {speaker.name!r} and {key!r} of model {name!r} differ in whether they "
                    "generate text, or in their classes, so one cannot answer for the other",
                    param=f"models.{name}.variants",
                )
        public = tuple(_public_prefix(speaker, prefix) for prefix in model.public_prefixes)
        named = [variant for key, variant in variants.items() if key != name]
        served += [replace(variant, public_prefixes=public) for variant in named]
        served.append(
            replace(
                speaker,
                name=name,
                variant_of="",
                context_tokens=min(variant.context_tokens for variant in variants.values()),
                vocabulary_size=min(variant.vocabulary_size for variant in variants.values()),
                public_prefixes=public,
            )
        )
    names = [model.name for model in served]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InvalidConfiguration(f"names stand for two models: {doubled}", param="models")
    return ModelCatalog(served)


def _public_prefix(model: ServedModel, declared: PublicPrefix) -> tuple[int, ...]:
    """The tokens that every prompt with this beginning has in common."""
    try:
        if declared.text is not None:
            return tuple(model.vocabulary.tokenizer.encode(declared.text).ids)
        beginnings = []
        for question in ("a", "b"):
            said: list[dict[str, Any]] = [
                {"role": "system", "content": declared.system},
                {"role": "user", "content": question},
            ]
            template, disarmed, seam = model.disarmed_chat(said)
            beginnings.append(model.encode_rendered(template.render(disarmed), seam))
    except InvalidRequest as error:
        raise InvalidConfiguration(
            f"a public prefix of {model.name!r} cannot be a system prompt: {error.message}",
            param="public_prefixes",
        ) from error
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*beginnings, strict=False))
    return tuple(token_id for token_id, _ in same)


def _load_variant(
    name: str, model: str, checkpoint: Path, vocabularies: dict[str, Vocabulary], block_tokens: int
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
    shape = parse_config(read_json(checkpoint / "config.json"), source=str(checkpoint / "config.json"))
    generation = read_json(checkpoint / "generation_config.json")
    eos = generation.get("eos_token_id", list(shape.eos_token_ids))
    return ServedModel(
        name=name,
        variant_of=model,
        vocabulary=vocabularies[digest],
        chat_template=load_chat_template(checkpoint),
        context_tokens=shape.max_positions,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        vocabulary_size=shape.vocab_size,
        created_unix_s=created_unix_s,
        block_tokens=block_tokens,
        checkpoint=checkpoint,
        generates=shape.encoder is None,
        labels=() if shape.encoder is None else shape.encoder.labels,
    )
