"""What the worker asks of its engine process, and what that answers; a step's news is in `step_news`.

Both processes import this, so nothing here needs torch. Messages are pickled: the link is private to a
parent and its child.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme.worker.variant_plan import VariantPlan


@dataclass(frozen=True, slots=True)
class Load:
    """Build an engine. Answered with `Loaded`, or with the error."""

    plan: VariantPlan


@dataclass(frozen=True, slots=True)
class Unload:
    """Free a variant's engine if it has no work. Answered with whether it is gone."""

    variant: str


@dataclass(frozen=True, slots=True)
class Add:
    """Let sequences of a request wait for their turn. Answered with `Refused` or `Gone`, or by tokens."""

    variant: str
    request: bytes
    """A serialized AdmittedRequest."""
    sequences: tuple[tuple[int, int], ...]
    """(choice, handle): what this link calls that choice in all that follows."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop sequences before the next step; not answered."""

    variant: str
    handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImportBlocks:
    """Make KV blocks resident from the transfer area. Answered with how many are."""

    variant: str
    blocks: tuple[tuple[bytes, int, int], ...]
    """(hash, offset, length), oldest prefix first."""


@dataclass(frozen=True, slots=True)
class ExportBlocks:
    """Copy resident KV blocks to the transfer area. Answered with each one's length; 0: not resident."""

    variant: str
    blocks: tuple[tuple[bytes, int], ...]
    """(hash, offset)."""
    room_bytes: int
    """From each offset on."""


Question = Load | Unload | ImportBlocks | ExportBlocks
Command = Add | Cancel


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with the number that its answer repeats."""

    call_id: int
    question: Question


@dataclass(frozen=True, slots=True)
class Answer:
    """What a question's description promises, or the error that it met."""

    call_id: int
    value: object = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The process takes commands."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine does not take a request; none of its sequences will run."""

    handles: tuple[int, ...]
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Gone:
    """There is no such variant any more: the request is another worker's."""

    handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that serves."""

    kv_namespace: str
    """Of its blocks in a KV store: weights and layout."""
    context_tokens: int
    vocabulary_size: int
    block_bytes: int
    """Of an exported block; 0: blocks hold nothing."""
    num_blocks: int
