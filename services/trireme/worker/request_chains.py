"""Which blocks a request's prompt and answer come to, as the engine names them, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.kvcache.block_identity import HashChain, Supply
from trireme.policies.prefix_index import split_hashes
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.worker.live_requests import LiveRequest

MAX_REMEMBERED = 100_000
"""Blocks whose owner is known; those that were named longest ago are forgotten first."""


def prompt_hashes(request: AdmittedRequest, block_tokens: int) -> list[bytes]:
    """Hashes of the full blocks of a request's prompt."""
    if request.prefix_hashes:
        return split_hashes(request.prefix_hashes)
    return chain_of(request).extend((), request.prompt_token_ids, block_tokens)


def chain_of(request: AdmittedRequest) -> HashChain:
    """How the hashes of a request's blocks hang together, until it is cut while it is answered: then the
    engine says what they are (`RequestChains.cut`)."""
    return HashChain(request.kv_salt, tuple([(joint.block, joint.parent) for joint in request.kv_joints]))


def supplies_of(request: AdmittedRequest) -> tuple[Supply, ...]:
    """What the blocks of a prompt that was cut were called before, latest cut first."""
    return tuple(
        [
            Supply(tuple(split_hashes(supply.block_hashes)), supply.shift_tokens)
            for supply in request.truncation.supplies
        ]
    )


def reusable_blocks(request: AdmittedRequest, block_tokens: int) -> int:
    """Leading blocks of the prompt that may be found instead of computed: its last token never is, and none
    where log-probabilities of the prompt are wanted."""
    if request.sampling.HasField("prompt_logprobs"):
        return 0
    return max(0, len(request.prompt_token_ids) - 1) // block_tokens


@dataclass(slots=True)
class _Chain:
    """One choice's blocks, as far as its tokens are known."""

    prompt: list[bytes]
    answer: list[bytes] = field(default_factory=list)
    is_cut: bool = False
    """Its tokens do not say it any more: the engine does."""

    def extend(self, live: LiveRequest, number: int, block_tokens: int) -> list[bytes]:
        """The hashes of blocks that have become full."""
        if self.is_cut:
            return []
        request, choice = live.assignment.request, live.choices[number]
        known = len(self.prompt) + len(self.answer)
        # The newest token was not computed on, so what it completes is not a block yet.
        total = len(request.prompt_token_ids) + choice.first_index + len(choice.token_ids) - 1
        if total // block_tokens <= known:
            return []
        tokens = _tokens_from(live, number, known * block_tokens)[:-1]
        fresh = chain_of(request).extend([*self.prompt, *self.answer], tokens, block_tokens)
        self.answer += fresh
        return fresh


@dataclass(slots=True)
class _Followed:
    live: LiveRequest
    block_tokens: int
    chains: list[_Chain]


class RequestChains:
    """The chains of the requests that are here. A block is its request's tenant's."""

    def __init__(self) -> None:
        self._followed: dict[LiveRequest, _Followed] = {}
        self._owners: dict[bytes, str] = {}

    def follow(self, live: LiveRequest, hashes: Sequence[bytes], block_tokens: int) -> None:
        """A request begins whose prompt has these blocks."""
        chains = [_Chain(list(hashes)) for _ in live.choices]
        self._followed[live] = _Followed(live, block_tokens, chains)
        self._own(hashes, live.assignment.request.tenant)

    def cut(self, live: LiveRequest, number: int, hashes: Sequence[bytes]) -> None:
        """A choice was cut while it was answered: the engine says which complete blocks it has now."""
        followed = self._followed.get(live)
        if followed is not None:
            followed.chains[number] = _Chain(list(hashes), is_cut=True)
            self._own(hashes, live.assignment.request.tenant)

    def owner(self, block_hash: bytes) -> str | None:
        """The tenant who computed a block; None where that is not known (any more)."""
        found = self._owners.get(block_hash)
        if found is None:
            self._catch_up()
            found = self._owners.get(block_hash)
        return found

    def end(self, live: LiveRequest) -> list[list[bytes]]:
        """The request is over: the whole chain of each of its choices; none where it was not followed."""
        followed = self._followed.pop(live, None)
        if followed is None:
            return []
        self._extend(followed)
        return [chain.prompt + chain.answer for chain in followed.chains]

    def _catch_up(self) -> None:
        for followed in list(self._followed.values()):
            self._extend(followed)
            if followed.live.ended_s is not None:
                del self._followed[followed.live]  # it was stopped

    def _extend(self, followed: _Followed) -> None:
        tenant = followed.live.assignment.request.tenant
        for number, chain in enumerate(followed.chains):
            self._own(chain.extend(followed.live, number, followed.block_tokens), tenant)

    def _own(self, hashes: Sequence[bytes], tenant: str) -> None:
        self._owners.update(dict.fromkeys(hashes, tenant))
        while len(self._owners) > MAX_REMEMBERED:
            del self._owners[next(iter(self._owners))]


def _tokens_from(live: LiveRequest, number: int, start: int) -> list[int]:
    """A choice's tokens, prompt and answer, from a position on."""
    request, choice = live.assignment.request, live.choices[number]
    prompt = request.prompt_token_ids
    delivered = request.delivered[number].ids if number < len(request.delivered) else ()
    tokens = list(prompt[start:])
    past = max(0, start - len(prompt))
    tokens += delivered[past:]
    tokens += choice.token_ids[max(0, past - len(delivered)) :]
    return tokens
