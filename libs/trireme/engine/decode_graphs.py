"""Steps that only decode, replayed from graphs: one launch for all layers instead of some for each.

`policies.decode_graphs` says which graph a step takes. A graph is used from the step on that has shown that
its replay gives what a run without it gives. If one cannot be captured, or does not, there are none from
then on, and steps run as they do without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from trireme.engine.graph_capture import Capturer, Graph
from trireme.engine.kv_cache import KvCache
from trireme.kernels.static_decodes import StaticDecodes
from trireme.models.model import Model
from trireme.policies.decode_graphs import Captured, GraphLimits, buckets_up_to, plan

_TOLERANCE: Final = 0.01
"""Hidden states of a replay and of a run without it differ by at most so much of the largest: libraries may
choose other kernels for the same product."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Bucket:
    batch: StaticDecodes
    graph: Graph


class DecodeGraphs:
    """The graphs of one engine.

    Args:
        cache: with spare blocks for the padding of `max_rows` rows.
        max_rows: sequences of a step.
        max_tokens: of a sequence.
    """

    def __init__(
        self, model: Model, cache: KvCache, capturer: Capturer, *, max_rows: int, max_tokens: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._capturer: Capturer | None = capturer
        self._limits = GraphLimits(buckets=buckets_up_to(max_rows), most_width=cache.blocks_for(max_tokens))
        self.steps = 0
        """That were replayed."""
        self._captured = Captured()
        self._buckets: dict[int, _Bucket] = {}

    def run(self, tokens: list[int], positions: list[int], table_rows: list[int]) -> Tensor | None:
        """A token for each of some sequences.

        Args:
            positions: in their sequences.
            table_rows: of the cache's block tables.

        Returns:
            (sequences, hidden): final hidden states, until the next call; None: without a graph, please.
        """
        capturer = self._capturer
        if capturer is None:
            return None
        cache, count = self._cache, len(tokens)
        width = cache.blocks_for(max(positions) + 1)
        chosen = plan(self._captured, self._limits, rows=count, width=width)
        if chosen.bucket is None:
            return None
        tables = cache.tables(table_rows, width)
        if chosen.drops:
            self._buckets.clear()
            capturer.clear()
        if not chosen.captures:
            bucket = self._buckets[chosen.bucket]
            bucket.batch.fill(tokens, positions, tables)
            bucket.graph.replay()
        else:
            batch = self._batch(chosen.bucket, chosen.after.width)
            batch.fill(tokens, positions, tables)
            found = self._capture(capturer, batch, count, chosen.reason)
            if found is None:
                self._capturer = None
                self._buckets.clear()
                return None
            bucket = self._buckets[chosen.bucket] = _Bucket(batch, found)
            self._captured = chosen.after
        self.steps += 1
        return bucket.graph.output[:count]

    def _batch(self, rows: int, width: int) -> StaticDecodes:
        cache = self._cache
        return StaticDecodes(
            rows=rows,
            width=width,
            block_size=cache.block_size,
            spare_block=cache.pool.num_blocks,
            device=self._model.device,
            dtype=self._model.dtype,
        )

    def _capture(self, capturer: Capturer, batch: StaticDecodes, count: int, reason: str) -> Graph | None:
        """A graph that has replayed the step that the batch holds; None: there will be none."""
        try:
            graph, expected = capturer.capture(self._runner(batch))
            graph.replay()
            difference = _difference(graph.output[:count], expected[:count])
        except Exception as error:
            log.warning("decode_graphs_off", extra={"reason": f"not captured: {error!r}"})
            return None
        if not difference <= _TOLERANCE:
            why = f"a replay's hidden states differ by {difference:.3g} of the largest"
            log.error("decode_graphs_off", extra={"reason": why})
            return None
        fields = {"rows": batch.num_tokens, "blocks": batch.width, "reason": reason}
        log.info("decode_graph_captured", extra=fields)
        return graph

    def _runner(self, batch: StaticDecodes) -> Callable[[], Tensor]:
        model, layers = self._model, self._cache.memory.layers
        return lambda: model.forward(batch.tokens, batch.positions, layers, batch)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest value. Waits for the device. Values that are no numbers are
    alike if both are none."""
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    largest = expected.abs().max().clamp(min=1e-30)
    return float((found - expected).abs().max() / largest)
