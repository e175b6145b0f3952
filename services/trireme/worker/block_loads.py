"""From the KV store to the engine: which prefixes are loaded, when, and how much of each.

A request goes to the engine at once and keeps its place there. Whether its prefix is stored is read in
shared memory; only where it is, and where loading is faster than computing, the sequence awaits it. When
its turn is near the store is asked to keep the blocks in place, and the engine process reads them there.
What fails or is late is computed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trireme.errors import ContextLengthExceeded
from trireme.kvcache.block_identity import Supply
from trireme.kvcache.direct_copies import HeldChain
from trireme.kvcache.store_client import StoreClient
from trireme.kvcache.supplied_blocks import CountLeading, supplied_blocks
from trireme.policies.kv_load import is_worth_asking, tokens_to_recompute
from trireme.policies.kv_truncation import TruncationRule
from trireme.policies.routing import UNMEASURED_PREFILL_TOKENS_PER_S
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.worker.awaited_prefixes import NEAR
from trireme.worker.engine_messages import Awaited, Command, LetGo, Offer, StoredChain
from trireme.worker.live_requests import LiveRequest
from trireme.worker.request_chains import reusable_blocks, supplies_of
from trireme.worker.variants import LoadedVariant, VariantTable

log = logging.getLogger(__name__)

LEASE_S = 10.0
SMOOTHING = 0.2
"""Weight of the newest measurement."""
REMOTE_GAIN = 10
"""Another node is asked only where computing takes so many times as long as asking does."""


@dataclass(slots=True, eq=False)
class Expected:
    """A request whose sequences await stored blocks."""

    live: LiveRequest
    hashes: list[bytes]
    """Of its prompt's reusable blocks."""
    rule: TruncationRule | None = None
    """How it was cut, if its blocks behind the cut may come from before it."""
    supplies: tuple[Supply, ...] = ()
    """What those were called."""
    is_begun: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load of a prompt now."""

    hashes: list[bytes]
    tokens: int
    """Leading tokens that are resident or will be loaded."""
    num_on_disk: int
    ask_others: bool


@dataclass(slots=True)
class Speeds:
    """Measured, newest first."""

    ask_s: float = 0.002
    """Until the store keeps blocks that are in DRAM in place."""
    remote_s: float = 0.02
    """Until stores of other nodes were asked."""
    disk_bytes_per_s: float = math.inf

    def note(self, plan: Plan, num_bytes: int, seconds: float) -> None:
        """Blocks were held, some of which had to be brought first."""
        if plan.ask_others:
            self.remote_s += SMOOTHING * (seconds - self.remote_s)
        elif plan.num_on_disk and num_bytes:
            rate = num_bytes / seconds
            known = self.disk_bytes_per_s
            self.disk_bytes_per_s = rate if known == math.inf else known + SMOOTHING * (rate - known)
        elif not plan.num_on_disk:
            self.ask_s += SMOOTHING * (seconds - self.ask_s)


class BlockLoads:
    """One store, all variants of a worker; without a store nothing is awaited.

    Args:
        send: has the engine process do something.
        deadline_s: for the store to keep blocks in place.
        always: load what is stored also where computing it is as fast.
    """

    def __init__(
        self,
        store: StoreClient | None,
        variants: VariantTable,
        send: Callable[[Command], None],
        *,
        deadline_s: float,
        always: bool = False,
    ) -> None:
        self._always = always
        self._store = store
        self._variants = variants
        self._send = send
        self._deadline_s = deadline_s
        self._expected: dict[int, Expected] = {}
        self._order: dict[str, list[tuple[Expected, float]]] = {}
        self._held: dict[int, HeldChain] = {}
        self._leases = itertools.count(1)
        self._running: set[asyncio.Task[None]] = set()
        self.speeds = Speeds()
        self.offered_blocks = 0

    def expect(self, live: LiveRequest, loaded: LoadedVariant, hashes: Sequence[bytes]) -> int:
        """A request is about to be added: how many leading tokens its sequences shall await; 0: none.

        Microseconds; nobody is asked yet.
        """
        request = live.assignment.request
        expected = Expected(live, list(hashes[: reusable_blocks(request, loaded.block_tokens)]))
        if request.truncation.supplies and loaded.loaded.turns_keys:
            expected.rule = _rule_of(request, loaded)
            expected.supplies = supplies_of(request)
        plan = self._plan(loaded, expected)
        if plan is None:
            return 0
        is_near = loaded.stats.waiting < NEAR and len(self._expected) < NEAR
        self._expected.update(dict.fromkeys(live.handles, expected))
        if is_near:
            self._begin(expected)
        return plan.tokens

    def on_awaited(self, news: Awaited) -> None:
        """The engine's queue, as far as it awaits blocks: the next ones are loaded."""
        order: dict[Expected, float] = {}
        for handle, use_s in news.order:
            expected = self._expected.get(handle)
            if expected is not None:
                order.setdefault(expected, use_s)
        self._order[news.variant] = list(order.items())
        for expected, _ in self._order[news.variant][:NEAR]:
            if not expected.is_begun:
                self._begin(expected)

    def on_let_go(self, what: LetGo) -> None:
        """A chain was read, or is not wanted."""
        held = self._held.pop(what.lease, None)
        if held is None or self._store is None:
            return
        for place in what.corrupt:
            held.fault(place)
        self._store.let_go(held)

    def upcoming(self) -> Iterator[tuple[Expected, LoadedVariant, float]]:
        """Who awaits blocks, next first within each variant, and in how many seconds it is to run."""
        for variant, order in self._order.items():
            loaded = self._variants.find(variant)
            for expected, use_s in order if loaded is not None else ():
                if self._expected.get(expected.live.handles[0]) is expected:
                    assert loaded is not None
                    yield expected, loaded, use_s

    def forget_ended(self, is_here: Callable[[LiveRequest], bool]) -> None:
        """Requests that ended before their turn came await nothing any more."""
        for expected in {*self._expected.values()}:
            if expected.live.ended_s is not None or not is_here(expected.live):
                self._forget(expected)

    def _begin(self, expected: Expected) -> None:
        expected.is_begun = True
        task = asyncio.create_task(self._load(expected))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _load(self, expected: Expected) -> None:
        chain = None
        live, begun_unix_s = expected.live, time.time()
        try:
            async with asyncio.timeout(self._deadline_s):
                chain = await self._hold(expected)
        except TimeoutError:
            log.info("kv_not_held_in_time", extra={"request_id": expected.live.request_id})
        except Exception:  # What cannot be loaded is computed.
            log.exception("kv_load_failed", extra={"request_id": expected.live.request_id})
        live.kv_load = (begun_unix_s, time.time())
        live.kv_loaded_blocks = len(chain.hashes) if chain is not None else 0
        self._forget(expected)
        self._send(Offer(expected.live.variant, expected.live.handles, chain))

    async def _hold(self, expected: Expected) -> StoredChain | None:
        loaded = self._variants.find(expected.live.variant)
        plan = self._plan(loaded, expected) if loaded is not None else None
        if loaded is None or plan is None or self._store is None:
            return None
        started_s = time.monotonic()
        held = await self._store.hold(
            loaded.kv_namespace,
            plan.hashes,
            deadline_s=self._deadline_s,
            lease_s=LEASE_S,
            allow_remote=plan.ask_others,
        )
        num_bytes = loaded.loaded.block_bytes * (len(held) if held is not None else 0)
        self.speeds.note(plan, num_bytes, time.monotonic() - started_s)
        names = plan.hashes
        if plan.ask_others and expected.rule is not None:
            held, names = await self._hold_older(loaded, expected, plan, held)
        if held is None:
            return None
        lease = next(self._leases)
        self._held[lease] = held
        self.offered_blocks += len(held)
        places = [held.place(index) for index in range(len(held))]
        return StoredChain(
            lease=lease,
            arena=held.arena,
            hashes=tuple(names[: len(held)]),
            blocks=tuple([(p.offset, p.payload_bytes, p.checksum, p.generation) for p in places]),
        )

    async def _hold_older(
        self, loaded: LoadedVariant, expected: Expected, plan: Plan, held: HeldChain | None
    ) -> tuple[HeldChain | None, list[bytes]]:
        """What other nodes have of a prompt that was cut, under its names or under those before the cut."""
        here = len(expected.hashes) - len(plan.hashes)
        num_held = len(held) if held is not None else 0
        names = _names_behind_cut(expected, here + num_held, len)[here:]
        if self._store is None or names == plan.hashes:
            return held, plan.hashes
        older = await self._store.hold(
            loaded.kv_namespace, names, deadline_s=self._deadline_s, lease_s=LEASE_S, allow_remote=True
        )
        if older is None or len(older) <= num_held:
            worse, better = older, (held, plan.hashes)
        else:
            worse, better = held, (older, names)
        if worse is not None:
            self._store.let_go(worse)
        return better

    def _plan(self, loaded: LoadedVariant, expected: Expected) -> Plan | None:
        """What to load as things are now; None: nothing, computing is as fast or nothing is stored."""
        size, rate = loaded.block_tokens, loaded.prefill_tokens_per_s
        if self._store is None or not loaded.loaded.block_bytes:
            return None
        hashes = self._names(loaded, expected)
        here = next((i for i, block in enumerate(hashes) if block not in loaded.resident), len(hashes))
        missing = hashes[here:]
        if not missing:
            return None
        available, in_dram = self._store.match_local_tiers(loaded.kv_namespace, missing)
        new_tokens = len(expected.live.assignment.request.prompt_token_ids) - (here + available) * size
        if available < len(missing) and self._store.has_peers:
            missing_s = (len(missing) - available) * size / (rate or UNMEASURED_PREFILL_TOKENS_PER_S)
            if self._always or missing_s > REMOTE_GAIN * self.speeds.remote_s:
                return Plan(missing, len(hashes) * size, available - in_dram, True)
        if not available:
            return None
        kept = available
        # Keys from before a cut are not what computing them anew would give: all of them are loaded.
        cuts = expected.live.assignment.request.truncation.cuts
        if rate > 0 and not (cuts or self._always):
            prefill_s = _prefill_s(rate)
            load_s = self._load_s(loaded, in_dram)
            history = available * size
            ask_s = self.speeds.ask_s
            if not is_worth_asking(
                history, new_tokens, load_s=load_s, prefill_s=prefill_s, round_trip_s=ask_s, step_tokens=size
            ):
                return None
            again = tokens_to_recompute(
                history, new_tokens, load_s=load_s, prefill_s=prefill_s, step_tokens=size
            )
            kept = available - again // size
        return Plan(missing[:kept], (here + kept) * size, max(0, kept - in_dram), False)

    def _names(self, loaded: LoadedVariant, expected: Expected) -> list[bytes]:
        """What the prompt's blocks are called: behind a cut as before it, where only that is here."""
        if expected.rule is None:
            return expected.hashes
        num_own = self._count_leading(loaded, expected.hashes)
        return _names_behind_cut(expected, num_own, lambda names: self._count_leading(loaded, names))

    def _count_leading(self, loaded: LoadedVariant, hashes: Sequence[bytes]) -> int:
        """How many of the first of these blocks the engine or the node's store has."""
        assert self._store is not None
        count = 0
        while count < len(hashes):
            if hashes[count] in loaded.resident:
                count += 1
                continue
            stored = self._store.match_local(loaded.kv_namespace, hashes[count:])
            if not stored:
                break
            count += stored
        return count

    def _load_s(self, loaded: LoadedVariant, in_dram: int) -> Callable[[int], float]:
        """Seconds to load so many leading tokens, of which some are on disk."""
        link, size = loaded.stats.host_in_bytes_per_s or math.inf, loaded.block_tokens
        block_bytes, disk = loaded.loaded.block_bytes, self.speeds.disk_bytes_per_s

        def load_s(tokens: int) -> float:
            blocks = tokens / size
            return blocks * block_bytes / link + max(0.0, blocks - in_dram) * block_bytes / disk

        return load_s

    def _forget(self, expected: Expected) -> None:
        for handle in expected.live.handles:
            if self._expected.get(handle) is expected:
                del self._expected[handle]


def _names_behind_cut(expected: Expected, num_own: int, count_leading: CountLeading) -> list[bytes]:
    """The prompt's blocks, those behind the first `num_own` as they were called before the cut, if any are
    there."""
    own, rule = expected.hashes, expected.rule
    if rule is None or num_own == len(own):
        return own
    supplied = supplied_blocks(
        expected.supplies,
        rule,
        expected.live.assignment.request.truncation.cuts,
        num_own=num_own,
        most=len(own) - num_own,
        count_leading=count_leading,
    )
    return own[:num_own] + supplied.hashes if supplied.hashes else own


def _rule_of(request: AdmittedRequest, loaded: LoadedVariant) -> TruncationRule | None:
    """How a prompt was cut; None: not as the engine here would, which is to say why."""
    try:
        return TruncationRule(
            window=loaded.loaded.context_tokens,
            block_size=loaded.block_tokens,
            pinned_tokens=request.truncation.head_tokens,
        )
    except ContextLengthExceeded:
        return None


def _prefill_s(tokens_per_s: float) -> Callable[[int, int], float]:
    return lambda new_tokens, cached_tokens: new_tokens / tokens_per_s
