"""Tiers behind the simulated workers: what is found is not computed, what is on SSD comes first."""

from __future__ import annotations

import pytest

from trireme.errors import InvalidConfiguration
from trireme.simulator import scenario
from trireme.simulator.engine_config import EngineConfig
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.fleet import FleetConfig
from trireme.simulator.requests import Request
from trireme.simulator.result import Result
from trireme.simulator.reuse import KvReuse

MODEL = EngineModel(
    name="a second per 1,000 tokens",
    knot_tokens=(1, 1000),
    knot_s=(0.01, 1.0),
    kv_bytes_per_token=1000,
    link_bytes_per_s=1e9,
    layers=10,
)
FLEET = FleetConfig(workers=1, engine=EngineConfig(max_sequences=4, token_budget=2000))


def chain(name: str, at_s: float, blocks: int, *, first: int = 0, answer: int = 2) -> Request:
    """A prompt of so many blocks of 100 tokens and 50 tokens more."""
    runs = ((first, blocks),)
    return Request(name, at_s, 100 * blocks + 50, answer, block_runs=runs, block_tokens=100)


def play(requests: list[Request], reuse: KvReuse | None, policy: str = "fcfs") -> Result:
    return scenario.simulate(requests, FLEET, MODEL, policy, reuse=reuse)


def tiers(requests: list[Request], *, dram_mb: float, ssd_mb: float = 0.0) -> KvReuse | None:
    return scenario.tiers_of(requests, MODEL, dram_gb=dram_mb / 1e3, ssd_gb=ssd_mb / 1e3, disk_gb_per_s=1e-3)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_a_stored_prefix_is_loaded_instead_of_computed(policy: str) -> None:
    requests = [chain("a", 0.0, 8), chain("b", 10.0, 9)]
    bare, stored = (play(requests, reuse, policy) for reuse in (None, tiers(requests, dram_mb=10)))
    assert stored.cached_tokens.tolist() == [0, 800]
    assert stored.ttft_s[0] == bare.ttft_s[0]
    # 150 tokens are left; loading 800 tokens over the link hides behind computing them but for a layer.
    expected_s = MODEL.prefill_s(150, 800) + 800 * 1000 / 1e9 / 10
    assert stored.ttft_s[1] == pytest.approx(expected_s, rel=1e-6)
    assert bare.ttft_s[1] == pytest.approx(MODEL.prefill_s(950), rel=1e-6)


def test_a_prompt_that_is_stored_whole_still_computes_its_last_token() -> None:
    requests = [chain("a", 0.0, 8), chain("b", 10.0, 8)._replace(prompt_tokens=800)]
    assert play(requests, tiers(requests, dram_mb=10)).cached_tokens.tolist() == [0, 799]


def test_others_run_while_one_waits_for_the_ssd() -> None:
    """The first prompt's 800 kB are moved to SSD to keep DRAM free; the disk reads 1 MB/s."""
    requests = [
        chain("first", 0.0, 8),
        chain("second", 20.0, 8, first=100),
        chain("again", 40.0, 9),
        chain("short", 40.0, 1, first=500, answer=5),
    ]
    result = play(requests, tiers(requests, dram_mb=0.85, ssd_mb=10.0))
    assert result.cached_tokens[2] == 800
    assert 0.5 < result.ttft_s[2] < 1.5
    assert result.jct_s[3] < 0.5
    levels = result.timeline[-1].tiers
    assert levels["DRAM"] <= 0.85e6 and levels["SSD"] > 0


def test_equal_tiers_give_equal_results() -> None:
    requests = [chain(f"{i}", i / 4, 3 + i % 5, first=100 * (i % 3)) for i in range(40)]
    one, other = (play(requests, tiers(requests, dram_mb=1.2, ssd_mb=5), "mlfq") for _ in range(2))
    assert one.finish_s.tolist() == other.finish_s.tolist()
    assert one.cached_tokens.sum() > 0
    assert (one.cached_tokens < one.prompt_tokens).all()


def test_tiers_need_blocks_and_a_disk() -> None:
    plain = [Request("a", 0.0, 10, 10)]
    assert tiers(plain, dram_mb=0) is None
    with pytest.raises(InvalidConfiguration, match="mooncake"):
        tiers(plain, dram_mb=5)
    with pytest.raises(InvalidConfiguration, match="speed"):
        scenario.tiers_of(plain, MODEL, dram_gb=1, ssd_gb=0, disk_gb_per_s=0)
