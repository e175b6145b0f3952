"""What the worker asks of its engine process, and what that answers; a step's news is in `step_news`.

Both processes import this, so nothing here needs torch. Messages are pickled: the link is private to a
parent and its child.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme.kvcache.arena import ArenaRef
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
    awaited_tokens: int = 0
    """Leading tokens whose blocks an `Offer` is to bring: until it comes the sequences do not run. Their
    turn is told of by `Awaited`."""
    initial_queue: int = 1
    """Where the scheduler lets it join; 0 is served first, 1 is what a standard request gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChain:
    """Blocks of the KV store's arena that a lease keeps in place."""

    lease: int
    """The worker's name for it, for `LetGo`."""
    arena: ArenaRef
    hashes: tuple[bytes, ...]
    blocks: tuple[tuple[int, int, int, int], ...]
    """(offset in the arena's file, bytes, checksum, generation) of each."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The stored blocks that sequences of one prompt await, or None: they do not come. Not answered, but
    for the chain's `LetGo`."""

    variant: str
    handles: tuple[int, ...]
    chain: StoredChain | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop sequences before the next step; not answered."""

    variant: str
    handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveBlocks:
    """Copy resident blocks to room in the KV store's arena, beside the steps. Answered, when all are copied,
    with each one's checksum, or None where it was not written."""

    variant: str
    arena: ArenaRef
    rooms: tuple[tuple[bytes, int, int, int], ...]
    """(hash, offset in the arena's file, bytes, generation)."""


Question = Load | Unload | SaveBlocks
Command = Add | Cancel | Offer


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
class LetGo:
    """Nothing reads a chain any more."""

    lease: int
    corrupt: tuple[int, ...]
    """Which of its blocks had other bytes than they should have."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """The sequences that await stored blocks, in the order in which they are to run."""

    variant: str
    order: tuple[tuple[int, float], ...]
    """(handle, seconds until it is expected to run)."""


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
    step_bytes: int = 0
    """Of weights that a step of one token reads."""
    read_bytes_per_s: float = 0.0
    """At which the engine's cores read memory; 0: not measured."""
    turns_keys: bool = False
    """Keys can be turned to other positions: blocks from before a cut serve behind it."""
