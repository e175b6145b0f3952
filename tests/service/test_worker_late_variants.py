"""A variant that a running worker is asked to load is served as one of its fleet's file."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import yaml

from tests.service.processes import REPOSITORY
from tests.service.test_worker import Bench, FakeGateway, bench, checkpoint
from trireme.engine import EngineSettings, SamplingParams, SequenceRequest, build
from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.fleet import load_fleet

__all__ = ("bench", "checkpoint")  # fixtures

TARGET = REPOSITORY / "checkpoints" / "trireme-py-1m"
NEW_TOKENS = 24
PROMPT = [40 + number % 11 for number in range(40)]


def alone() -> list[int]:
    """What the target says when nothing drafts for it."""
    engine = build(TARGET, settings=EngineSettings(num_blocks=64))
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    engine.add(SequenceRequest(sequence_id="alone", prompt_token_ids=PROMPT, sampling=sampling))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [output.token_id for output in engine.step().outputs if output.token_id is not None]
    return tokens


def drafted_tokens(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = re.search(
        r'^trireme_engine_drafted_tokens_total\{[^}]*variant="drafting"[^}]*\} (\S+)', text, re.M
    )
    return float(found.group(1)) if found else 0.0


async def test_a_variant_that_is_loaded_later_speculates_as_the_file_says(
    bench: Bench, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(TARGET, other)
    (other / "tokenizer.json").write_text("{}")
    target = {"checkpoint": str(TARGET), "speculate": 3}
    document = yaml.safe_load(bench.fleet.read_text())
    document["models"]["code"] = {
        "variants": {
            "drafting": {**target, "draft": str(TARGET), "kv_dtype": "auto"},
            "broken": {**target, "draft": str(other)},
        }
    }
    document["workers"][0]["variants"] = ["small-v"]
    bench.fleet.write_text(yaml.safe_dump(document))
    bench.start_worker()
    [record] = await bench.workers()
    loader = VariantLoader(load_fleet(bench.fleet))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await loader.load(record.grpc_address, "broken")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "tokenizer" in (refused.value.details() or "")

    await loader.load(record.grpc_address, "drafting")
    deadline_s = time.monotonic() + 60
    while "drafting" not in {variant.variant for variant in record.worker.variants}:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)
        [record] = await bench.workers()
    async with FakeGateway(record.grpc_address) as gateway:
        await bench.admit("r", model="code", prompt=PROMPT, max_tokens=NEW_TOKENS, ignore_eos=True)
        await gateway.until(lambda: ("r", 0) in gateway.finished)
    assert gateway.tokens["r", 0] == alone()
    # The draft model is the target itself, so three are drafted in every step but the last.
    assert drafted_tokens(record.http_address) >= NEW_TOKENS / 4 * 3 - 3
