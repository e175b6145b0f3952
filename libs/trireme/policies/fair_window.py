"""The requests that wait for a worker, ready to be taken in fair order.

Pure bookkeeping around `fair_sharing.order_key`. Requests of one (tenant, urgency, model)
form a lane, sorted by priority and age; only the heads of lanes compete, so taking the next
one costs the number of lanes, not of requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from trireme.policies.fair_sharing import Waiting, order_key

K = TypeVar("K", bound=Hashable)

Lane = tuple[str, int, str]


class FairWindow(Generic[K]):
    """Waiting requests by key."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, list[tuple[int, float, str, K]]] = {}
        self._held: dict[K, tuple[Lane, Waiting]] = {}
        self._by_tenant: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: K) -> bool:
        return key in self._held

    @property
    def waiting_by_tenant(self) -> Mapping[str, int]:
        """Requests held, by tenant; absent tenants hold none."""
        return self._by_tenant

    def oldest_admitted_s(self) -> float | None:
        """When the oldest held request was admitted."""
        return min((waiting.admitted_s for _, waiting in self._held.values()), default=None)

    def add(self, key: K, waiting: Waiting, *, model: str) -> None:
        """Hold a request; holding a key twice changes nothing."""
        if key in self._held:
            return
        lane = (waiting.tenant, waiting.urgency, model)
        self._held[key] = (lane, waiting)
        self._by_tenant[waiting.tenant] = self._by_tenant.get(waiting.tenant, 0) + 1
        rank = (-waiting.priority, waiting.admitted_s, waiting.request_id, key)
        heapq.heappush(self._lanes.setdefault(lane, []), rank)

    def discard(self, key: K) -> None:
        """Let go of a request."""
        found = self._held.pop(key, None)
        if found is None:
            return
        tenant = found[1].tenant
        self._by_tenant[tenant] -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        self._drop_gone(found[0])

    def next(
        self,
        *,
        counters: Mapping[str, float],
        now_s: float,
        without_models: Container[str] = (),
        without: Container[tuple[str, str]] = (),
    ) -> tuple[K, Waiting] | None:
        """Who goes next among the models that have room, and not among (tenant, model) `without`.

        None if nobody can.
        """
        best: tuple[tuple[int, float, int, float, str], K, Waiting] | None = None
        for lane, heap in self._lanes.items():
            if lane[2] in without_models or (lane[0], lane[2]) in without:
                continue
            key = heap[0][3]
            waiting = self._held[key][1]
            rank = order_key(waiting, counters=counters, now_s=now_s)
            if best is None or rank < best[0]:
                best = (rank, key, waiting)
        return None if best is None else (best[1], best[2])

    def upcoming(
        self, *, counters: Mapping[str, float], now_s: float, cost_of: Callable[[K], float]
    ) -> Iterator[K]:
        """Who will go, in order, if nobody else comes: as `next` would name them one after another.

        Each is charged `cost_of` to its tenant before the next one is named. Lazy: k of them cost
        O(k log n), and nothing is changed. Not to be used further after the window was.
        """
        charged = dict(counters)
        seen: set[K] = set()
        heads: list[tuple[tuple[int, float, int, float, str], int, K, Iterator[K]]] = []

        def enter(number: int, lane: Iterator[K]) -> None:
            key = next((key for key in lane if key in self._held and key not in seen), None)
            if key is not None:
                rank = order_key(self._held[key][1], counters=charged, now_s=now_s)
                heapq.heappush(heads, (rank, number, key, lane))

        for number, heap in enumerate(self._lanes.values()):
            enter(number, _ascending(heap))
        while heads:
            rank, number, key, lane = heads[0]
            waiting = self._held[key][1]
            present = order_key(waiting, counters=charged, now_s=now_s)
            if present != rank:
                # The tenant was charged since: counters only grow, so no other rank is too large.
                heapq.heapreplace(heads, (present, number, key, lane))
                continue
            heapq.heappop(heads)
            seen.add(key)
            yield key
            charged[waiting.tenant] = charged.get(waiting.tenant, 0.0) + cost_of(key)
            enter(number, lane)

    def _drop_gone(self, lane: Lane) -> None:
        heap = self._lanes[lane]
        while heap and heap[0][3] not in self._held:
            heapq.heappop(heap)
        if not heap:
            del self._lanes[lane]


def _ascending(heap: Sequence[tuple[int, float, str, K]]) -> Iterator[K]:
    """The keys of a binary heap in order, without changing it; k of them cost O(k log k)."""
    frontier = [(heap[0], 0)] if heap else []
    while frontier:
        entry, index = heapq.heappop(frontier)
        yield entry[3]
        for child in (2 * index + 1, 2 * index + 2):
            if child < len(heap):
                heapq.heappush(frontier, (heap[child], child))
