"""What lower tiers give a request: the face that the fleet asks, one without any, and one over `kv_tiers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from trireme.policies.kv_load import stall_s
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.kv_tiers import KvTiers, Part
from trireme.simulator.kv_turns import Turn, as_turns
from trireme.simulator.requests import Request


class Reuse(NamedTuple):
    """Leading prompt tokens that need not be computed."""

    tokens: int
    stall_s: float
    """Wait for their keys and values that computing the rest, layer by layer, does not hide."""
    is_ready: bool = True
    """Nothing has to come from SSD first."""


class KvReuse(Protocol):
    """Remembers what the tiers hold. Times never go back."""

    def arrived(self, request: Request, *, now_s: float) -> Reuse:
        """The request waits: what it will find, by what is known now."""

    def started(self, request: Request, *, now_s: float) -> Reuse:
        """Its first iteration begins: what it finds. If that is not ready, `advance` will say when it is."""

    def ended(self, request: Request, *, now_s: float) -> None:
        """It has its answer: what it computed can be found from now on."""

    def advance(self, now_s: float) -> Sequence[str]:
        """Ids of started requests whose keys and values have come by now; each once."""

    def next_event_s(self) -> float:
        """When `advance` must be called at the latest; infinity: not at all."""

    def levels(self) -> dict[str, int]:
        """Bytes by tier, for plots."""


class TierReuse:
    """DRAM and SSD behind all workers. What they keep is found again by whoever is asked next.

    Args:
        requests: the trace that will be played, with prefix blocks.
        tiers: empty at the start.
        model: prices loading over the link beside computing.
    """

    def __init__(self, requests: Sequence[Request], tiers: KvTiers, model: EngineModel) -> None:
        trace = as_turns(requests)
        self._turns: dict[str, Turn] = {turn.request.request_id: turn for turn in trace.turns}
        self._item_tokens = trace.item_tokens
        self._tiers = tiers
        self._model = model
        self._ready: list[str] = []

    def arrived(self, request: Request, *, now_s: float) -> Reuse:
        """What the index holds of its chain now; its queue entry makes the planner fetch ahead."""
        self._advance(now_s)
        chain = self._turns[request.request_id].chain
        tokens = 0
        for item in chain:
            if self._tiers.index.get(item) is None:
                break
            tokens += self._item_tokens[item]
        self._tiers.enqueue(request.request_id, self._parts(chain), use_s=now_s, now_s=now_s)
        return self._loading(request, tokens, is_ready=True)

    def started(self, request: Request, *, now_s: float) -> Reuse:
        """Take the leading items that are there; those on SSD are read first."""
        self._advance(now_s)
        chain = self._parts(self._turns[request.request_id].chain)
        found = self._tiers.start(request.request_id, chain, now_s=now_s)
        tokens = (found.dram_bytes + found.ssd_bytes) // self._model.kv_bytes_per_token
        if found.is_ready:
            self._tiers.release(request.request_id, now_s=now_s)
        return self._loading(request, tokens, is_ready=found.is_ready)

    def ended(self, request: Request, *, now_s: float) -> None:
        """Store its blocks, as far as there is room."""
        self._advance(now_s)
        saves = self._parts(self._turns[request.request_id].saves)
        self._tiers.finish(request.request_id, saves, now_s=now_s)

    def advance(self, now_s: float) -> Sequence[str]:
        """End the disk's transfers that are due."""
        self._advance(now_s)
        ready, self._ready = self._ready, []
        return ready

    def next_event_s(self) -> float:
        """When the next transfer ends."""
        return self._tiers.next_event_s()

    def levels(self) -> dict[str, int]:
        """Bytes in DRAM and on SSD."""
        return {"DRAM": self._tiers.index.dram_bytes, "SSD": self._tiers.index.ssd_bytes}

    def _advance(self, now_s: float) -> None:
        for request_id in self._tiers.advance(now_s):
            self._tiers.release(request_id, now_s=now_s)
            self._ready.append(request_id)

    def _parts(self, items: Sequence[int]) -> list[Part]:
        size = self._model.kv_bytes_per_token
        return [(item, self._item_tokens[item] * size) for item in items]

    def _loading(self, request: Request, tokens: int, *, is_ready: bool) -> Reuse:
        model = self._model
        # The last prompt token is always computed: the answer begins with its scores.
        tokens = min(tokens, request.prompt_tokens - 1)
        load_s = tokens * model.kv_bytes_per_token / model.link_bytes_per_s / model.layers
        compute_s = model.prefill_s(request.prompt_tokens - tokens, tokens) / model.layers
        return Reuse(tokens, stall_s(load_s, compute_s, model.layers), is_ready)
