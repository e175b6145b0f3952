"""Look-ahead against LRU, FIFO, Belady and recomputation: KV tiers in simulation, on real conversations.

    .venv/bin/python -m benchmarks.kv_policies [--quick] [--only NAME ...] [--output PATH]

Replays conversations against a modelled pool of servers with one queue and a store of DRAM and SSD, whose
moves are those of `policies/kv_tiering.plan`, as the kvstore service runs it. SSD holds 25 % of all KV of
the trace unless the workload's name says otherwise, DRAM a tenth of that. The load is swept: a queue is what
looking ahead lives on. Hit rates are shares of what a store without limits would have held. All times are
simulated, so the figures do not depend on this machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from trireme.policies.kv_tiering import Capacity
from trireme.simulator import traces
from trireme.simulator.kv_replay import LLAMA_13B_A100, Foresight, Machine, Replay, Replayed, Served
from trireme.simulator.kv_tiers import FIFO, LOOK_AHEAD, LRU, UNGUARDED, KvTiers, TierPolicy, TierSpec
from trireme.simulator.kv_turns import TurnTrace, as_turns, linked, sharegpt_like
from trireme.simulator.requests import rescaled

RESULTS = Path(__file__).resolve().parent / "results" / "kv_policies.json"
DISK_BYTES_S: Final = 5e9
"""Read, and write, per server: the paper's testbed has under 5 GB/s."""
WRITE_BUFFER_BYTES: Final = 8 << 30
"""Device memory per server for KV that DRAM has no room for yet."""
POLICIES: Final[dict[str, TierPolicy | None]] = {
    "recompute": None,
    "fifo": FIFO,
    "lru": LRU,
    "look-ahead": LOOK_AHEAD,
    "unguarded": UNGUARDED,
    "belady": LOOK_AHEAD,
}
POOL: Final = replace(LLAMA_13B_A100, servers=16, kv_bytes_per_token=327_680)
"""Sixteen of them with grouped-query attention's smaller KV, for prompts of tens of thousands of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Conversations at several loads."""

    name: str
    machine: Machine
    loads: tuple[float, ...]
    """Requests or sessions per second."""
    trace: Callable[[float], TurnTrace]
    ssd_share: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One replay."""

    workload: str
    load_per_s: float
    policy: str
    turns: int
    mean_queue: float
    """Jobs in the queue that an arriving turn finds."""
    token_hit_rate: float
    turn_hit_rate: float
    """Of returning turns, those that had at least 90 % of what could be reused."""
    dram_hit_rate: float
    """Tokens found in DRAM when the job starts."""
    ssd_read_gb: float
    ssd_written_gb: float
    unsaved_gb: float
    """Not stored for want of room."""
    ssd_read_per_hit: float
    """Bytes read for a byte used."""
    prefill_tokens: int
    prefill_unit_busy_s: float
    stalled_s: float
    ttft_mean_s: float
    """Of returning turns, from their arrival."""
    ttft_p50_s: float
    service_ttft_p50_s: float
    """Of returning turns, from their start, so without the queue."""
    dram_service_ttft_p50_s: float
    """The same of those that found all in DRAM; for recomputation, of all that could be reused."""


def mooncake(load: float, *, is_linked: bool, limit: int | None) -> TurnTrace:
    """The conversation trace at a rate; linked: a turn waits for the answer before it."""
    requests = traces.read(traces.DATA / "mooncake_conversation_40min.jsonl.gz", limit=limit)
    requests = rescaled(requests, rate_rps=load)
    return as_turns(linked(requests) if is_linked else requests)


def agentic(load: float, *, sessions: int) -> TurnTrace:
    """The first agent sessions, each closed, starting at a rate."""
    path = traces.DATA / "agentic_sessions.jsonl.gz"
    requests = traces.read(path, sessions_per_s=load, closed=True, seed=1)
    kept = {f"s{number}" for number in range(sessions)}
    return as_turns([request for request in requests if request.session_id in kept])


def workloads(*, is_quick: bool) -> list[Workload]:
    """What is replayed."""
    sessions, requests = (300, 1500) if is_quick else (800, None)
    found = [
        Workload(
            name=f"sharegpt-like, think {think_s:.0f} s, batch {slots}",
            machine=replace(LLAMA_13B_A100, slots=slots),
            loads=loads[:2] if is_quick else loads,
            trace=partial(_sharegpt, sessions=sessions, think_s=think_s),
        )
        for think_s, slots, loads in (
            (30.0, 24, (0.5, 1.0, 1.5, 3.0)),
            (300.0, 24, (0.5, 1.0, 1.5, 3.0)),
            (30.0, 64, (1.0, 2.0, 4.0)),
        )
    ]
    open_loads = (5.0, 8.0) if is_quick else (3.3, 5.0, 8.0, 14.0)
    for name, is_linked, share in (
        ("mooncake", False, 0.25),
        ("mooncake, turns wait for answers", True, 0.25),
        ("mooncake, SSD 5 %", False, 0.05),
    ):
        trace = partial(mooncake, is_linked=is_linked, limit=requests)
        found.append(Workload(name=name, machine=POOL, loads=open_loads, trace=trace, ssd_share=share))
    found.append(
        Workload(
            name="agentic",
            machine=replace(POOL, servers=2),
            loads=(0.2,) if is_quick else (0.02, 0.2),
            trace=partial(agentic, sessions=8 if is_quick else 40),
        )
    )
    return found


def _sharegpt(load: float, *, sessions: int, think_s: float) -> TurnTrace:
    return sharegpt_like(sessions=sessions, sessions_per_s=load, think_s=think_s, seed=1)


def replays(workload: Workload) -> Iterator[Row]:
    """All policies at all loads, on the same turns."""
    for load in workload.loads:
        trace = workload.trace(load)
        machine = workload.machine
        ssd_bytes = int(workload.ssd_share * trace.total_tokens * machine.kv_bytes_per_token)
        spec = TierSpec(
            capacity=Capacity(dram_bytes=ssd_bytes // 10, ssd_bytes=ssd_bytes),
            disk_read_bytes_s=machine.servers * DISK_BYTES_S,
            disk_write_bytes_s=machine.servers * DISK_BYTES_S,
            write_buffer_bytes=machine.servers * WRITE_BUFFER_BYTES,
        )
        for name, policy in POLICIES.items():
            foresight = Foresight(trace) if name == "belady" else None
            predict = foresight.return_s if foresight else None
            tiers = KvTiers(spec, policy, return_s=predict) if policy else None
            replayed = Replay(trace, machine, tiers, foresight=foresight).run()
            yield _row(workload, load, name, replayed)


def _row(workload: Workload, load: float, policy: str, replayed: Replayed) -> Row:
    turns = replayed.turns
    returning = [turn for turn in turns if turn.reusable_tokens] or turns
    reusable = max(1, sum(turn.reusable_tokens for turn in turns))
    hit = sum(turn.hit_tokens for turn in turns)
    counters = replayed.tiers.counters if replayed.tiers else None
    read_bytes = counters.demand_read_bytes + counters.ahead_read_bytes if counters else 0
    in_dram = [turn for turn in returning if turn.dram_tokens == turn.reusable_tokens] or returning
    return Row(
        workload=workload.name,
        load_per_s=load,
        policy=policy,
        turns=len(turns),
        mean_queue=round(statistics.fmean(turn.depth for turn in turns), 1),
        token_hit_rate=round(hit / reusable, 4),
        turn_hit_rate=round(statistics.fmean(_has_hit(turn) for turn in returning), 4),
        dram_hit_rate=round(sum(turn.dram_tokens for turn in turns) / reusable, 4),
        ssd_read_gb=round(read_bytes / 1e9, 1),
        ssd_written_gb=round(counters.written_bytes / 1e9, 1) if counters else 0.0,
        unsaved_gb=round(counters.unsaved_bytes / 1e9, 1) if counters else 0.0,
        ssd_read_per_hit=round(read_bytes / max(1, hit * workload.machine.kv_bytes_per_token), 3),
        prefill_tokens=replayed.prefill_tokens,
        prefill_unit_busy_s=round(replayed.busy_s, 1),
        stalled_s=round(replayed.stalled_s, 1),
        ttft_mean_s=round(statistics.fmean(turn.first_token_s - turn.arrival_s for turn in returning), 3),
        ttft_p50_s=round(statistics.median(turn.first_token_s - turn.arrival_s for turn in returning), 3),
        service_ttft_p50_s=round(
            statistics.median(turn.first_token_s - turn.start_s for turn in returning), 3
        ),
        dram_service_ttft_p50_s=round(
            statistics.median(turn.first_token_s - turn.start_s for turn in in_dram), 3
        ),
    )


def _has_hit(turn: Served) -> bool:
    return turn.hit_tokens >= 0.9 * turn.reusable_tokens


def against_lru(rows: Sequence[Row]) -> list[dict[str, float | str]]:
    """Per workload and load, look-ahead beside LRU, and beside recomputation."""
    by_key = {(row.workload, row.load_per_s, row.policy): row for row in rows}
    found: list[dict[str, float | str]] = []
    for row in rows:
        if row.policy != "look-ahead":
            continue
        lru = by_key[row.workload, row.load_per_s, "lru"]
        recompute = by_key[row.workload, row.load_per_s, "recompute"]
        found.append(
            {
                "workload": row.workload,
                "load_per_s": row.load_per_s,
                "mean_queue": row.mean_queue,
                "token_hit_ratio": _ratio(row.token_hit_rate, lru.token_hit_rate),
                "turn_hit_ratio": _ratio(row.turn_hit_rate, lru.turn_hit_rate),
                "dram_hit_ratio": _ratio(row.dram_hit_rate, lru.dram_hit_rate),
                "ssd_read_ratio": _ratio(row.ssd_read_gb, lru.ssd_read_gb),
                "ssd_read_per_hit_ratio": _ratio(row.ssd_read_per_hit, lru.ssd_read_per_hit),
                "ttft_mean_against_recompute": _ratio(row.ttft_mean_s, recompute.ttft_mean_s),
                "service_ttft_against_recompute": _ratio(
                    row.service_ttft_p50_s, recompute.service_ttft_p50_s
                ),
                "dram_service_ttft_against_recompute": _ratio(
                    row.dram_service_ttft_p50_s, recompute.service_ttft_p50_s
                ),
                "prefill_busy_against_recompute": _ratio(
                    row.prefill_unit_busy_s, recompute.prefill_unit_busy_s
                ),
            }
        )
    return found


def _ratio(value: float, base: float) -> float:
    return round(value / base, 4) if base else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller traces and fewer loads")
    parser.add_argument("--only", nargs="*", default=[], help="workloads whose name begins so")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = []
    print(
        f"{'workload':36}{'load/s':>7} {'policy':11}{'queue':>8}{'tokens':>8}{'turns':>8}{'DRAM':>8}"
        f"{'read GB':>10}{'written':>10}{'unsaved':>8}{'TTFT s':>9}{'served':>8}"
    )
    for workload in workloads(is_quick=options.quick):
        if options.only and not workload.name.startswith(tuple(options.only)):
            continue
        for row in replays(workload):
            rows.append(row)
            print(
                f"{row.workload:36}{row.load_per_s:7.3g} {row.policy:11}{row.mean_queue:8.1f}"
                f"{row.token_hit_rate:8.4f}{row.turn_hit_rate:8.4f}{row.dram_hit_rate:8.4f}"
                f"{row.ssd_read_gb:10.0f}{row.ssd_written_gb:10.0f}{row.unsaved_gb:8.0f}{row.ttft_mean_s:9.2f}"
                f"{row.service_ttft_p50_s:8.3f}",
                flush=True,
            )
    report = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.kv_policies " + " ".join(sys.argv[1:]),
        "python": platform.python_version(),
        "look_ahead_against": against_lru(rows),
        "rows": [asdict(row) for row in rows],
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in against_lru(rows):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
