"""Carries out what a decision moves: blocks between the device and the host, over one link each way.

A copy's source stays `draining` until the copy has ended; a sequence that is being copied is nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simpy import Environment

from trireme.policies.iteration import IterationDecision, Location
from trireme.simulator.events import Link
from trireme.simulator.result import Counters
from trireme.simulator.sequences import Pools, Sequence


class BlockMoves:
    """The copies of one engine.

    Args:
        pools: what it takes blocks from and gives them back to.
        counters: of the engine.
        on_moved: called when a copy has ended.
    """

    def __init__(
        self,
        env: Environment,
        pools: Pools,
        counters: Counters,
        *,
        block_tokens: int,
        block_bytes: int,
        link_bytes_per_s: float,
        on_moved: Callable[[], None],
    ) -> None:
        self.in_flight = 0
        """Copies, and sequences that wait for KV from below."""
        self._env = env
        self._pools = pools
        self._counters = counters
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._on_moved = on_moved
        self._out, self._in = Link(env, link_bytes_per_s), Link(env, link_bytes_per_s)

    def carry_out(self, decision: IterationDecision, sequences: Mapping[str, Sequence]) -> None:
        """Drop and copy what the decision names."""
        self._counters.paused += len(decision.paused)
        for sequence_id, _ in decision.evicted:
            self._evict(sequences[sequence_id])
        for sequence_id, _ in decision.swap_out:
            self._swap_out(sequences[sequence_id])
        for sequence_id in decision.swap_in:
            self._swap_in(sequences[sequence_id])

    def draining_s(self) -> float:
        """Wait for copies that still read blocks which were given out already."""
        pools = self._pools
        if pools.device_free >= 0:
            return 0.0
        assert pools.device_free + pools.device_draining >= 0, "the scheduler gave out more blocks than exist"
        return self._out.free_s - self._env.now

    def copying_s(self) -> float:
        """Wait for all copies."""
        return max(self._in.free_s, self._out.free_s) - self._env.now

    def await_kv(self, sequence: Sequence) -> None:
        """It holds its blocks while its KV comes from below."""
        sequence.location = Location.MOVING
        sequence.blocks = self._blocks_for(sequence.target)
        self._pools.device_free -= sequence.blocks
        self.in_flight += 1

    def arrived(self, sequence: Sequence) -> None:
        """What it waited for is on the device."""
        self.in_flight -= 1
        sequence.location = Location.DEVICE
        self._on_moved()

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _evict(self, sequence: Sequence) -> None:
        self._counters.evicted += 1
        if sequence.location is Location.HOST:
            self._pools.host_free += sequence.blocks
        else:
            self._pools.device_free += sequence.blocks
        sequence.preemptions += 1
        sequence.blocks = 0
        sequence.computed = 0
        sequence.location = Location.NONE

    def _swap_out(self, sequence: Sequence) -> None:
        blocks, pools = sequence.blocks, self._pools
        assert sequence.location is Location.DEVICE and pools.host_free >= blocks
        self._counters.swapped_out += 1
        pools.device_draining += blocks
        pools.host_free -= blocks
        sequence.preemptions += 1
        sequence.location = Location.MOVING
        self.in_flight += 1
        self._out.copy(blocks * self._block_bytes, lambda: self._swapped_out(sequence, blocks))

    def _swapped_out(self, sequence: Sequence, blocks: int) -> None:
        self.in_flight -= 1
        self._pools.device_draining -= blocks
        self._pools.device_free += blocks
        sequence.location = Location.HOST
        self._on_moved()

    def _swap_in(self, sequence: Sequence) -> None:
        blocks = sequence.blocks
        assert sequence.location is Location.HOST
        self._counters.swapped_in += 1
        sequence.blocks = self._blocks_for(sequence.target)
        self._pools.device_free -= sequence.blocks
        sequence.location = Location.MOVING
        self.in_flight += 1
        self._in.copy(
            blocks * self._block_bytes,
            lambda: self._swapped_in(sequence, blocks),
            not_before_s=self._env.now + self.draining_s(),
        )

    def _swapped_in(self, sequence: Sequence, host_blocks: int) -> None:
        self._pools.host_free += host_blocks
        self.arrived(sequence)
