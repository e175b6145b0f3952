"""What an engine has done and how it stands, from the parts that know."""

from __future__ import annotations

from trireme.engine.kv_cache import KvCache
from trireme.engine.outputs import EngineStats
from trireme.engine.roster import Roster
from trireme.engine.tally import Tally


def stats_of(cache: KvCache, roster: Roster, tally: Tally) -> EngineStats:
    """Gauges now, and counters since the engine was built."""
    pool, host, copies = cache.pool, cache.host, cache.copies
    moved = cache.counters
    return EngineStats(
        waiting=roster.num_waiting,
        running=len(roster.running),
        kv_blocks_used=pool.num_held,
        kv_blocks_total=pool.num_blocks,
        kv_blocks_cached=pool.num_resident_hashes,
        prefix_query_tokens=tally.prefix_query_tokens,
        prefix_hit_tokens=tally.prefix_hit_tokens,
        prefill_tokens=tally.prefill_tokens,
        decode_tokens=tally.decode_tokens,
        output_tokens=tally.output_tokens,
        finished=tally.finished,
        errors=tally.errors,
        preemptions=tally.preemptions,
        recomputed_tokens=tally.recomputed_tokens,
        steps=tally.steps,
        busy_s=tally.busy_s,
        paused=roster.num_paused,
        swapped=roster.num_swapped,
        evictions=tally.evictions,
        demotions=tally.demotions,
        promotions=tally.promotions,
        kv_blocks_draining=pool.num_draining,
        host_blocks_used=host.pool.num_held + host.pool.num_draining if host is not None else 0,
        host_blocks_total=host.pool.num_blocks if host is not None else 0,
        swapped_out_blocks=moved.swapped_out_blocks,
        swapped_in_blocks=moved.swapped_in_blocks,
        swap_out_bytes=moved.swap_out_bytes,
        swap_in_bytes=moved.swap_in_bytes,
        swap_out_s=moved.swap_out_s,
        swap_in_s=moved.swap_in_s,
        lost_sequences=moved.lost_sequences,
        context_cuts=moved.context_cuts,
        rerotated_blocks=moved.rerotated_blocks,
        preload_blocks=moved.preload_blocks,
        preload_corrupt=moved.preload_corrupt,
        stall_s=copies.stall_s,
        host_in_bytes_per_s=copies.in_bytes_per_s,
        host_out_bytes_per_s=copies.out_bytes_per_s,
        drafted_tokens=tally.drafted_tokens,
        accepted_tokens=tally.accepted_tokens,
        graph_steps=tally.graph_steps,
    )
