"""What a fleet tells of itself: traces at a collector, aliases that others' tools ask for."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import openai
import pytest
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from tests.fleet import marked_requests
from tests.fleet.conftest import REPOSITORY, VARIANT, Fleet, command, running, stopped
from tests.fleet.otlp_collector import Collector, Received, collecting
from trireme.wire.placement.v1 import placement_pb2 as placement_pb
from trireme.wire.placement.v1.placement_pb2_grpc import PlacementStub

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]

SECRET = "mulberry"
AUDIT = "audit.jsonl"
PLANTED = "planted-secret-8f2a"
PHASES = ["receive", "queue", "engine_queue", "prefill", "decode", "deliver"]
OF_WORKER = ("trireme.worker.wait", "trireme.worker.prefill", "trireme.worker.decode")
CLOCK_ERROR_NS = 1_000_000
"""Times travel as seconds in a double: they lose less than this."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Fleet]:
    wanted = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            patch.setenv(name, value)
        patch.setenv("TRIREME_TEST_API_KEY", PLANTED)
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer {PLANTED}")
        directory = tmp_path_factory.mktemp("telemetry")
        for service in ("gateway", "scheduler", "worker", "kvstore", "power", "placement"):
            patch.setenv(f"TRIREME_{service.upper()}_LOG_LEVEL", "debug")
        patch.setenv("TRIREME_GATEWAY_AUDIT_LOG", str(directory / AUDIT))
        broken = {"broken": {"checkpoint": str(broken_checkpoint(directory))}}
        with running(directory, more_variants=broken, max_sequences=32, kv_mib=64) as found:
            yield found


def broken_checkpoint(directory: Path) -> Path:
    """A checkpoint whose weights are cut off in the middle."""
    broken = directory / "broken"
    shutil.copytree(REPOSITORY / "checkpoints" / VARIANT, broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return broken


def traceparent(number: int, *, sampled: bool = True) -> tuple[str, str]:
    trace_id = f"{number:032x}"
    return trace_id, f"00-{trace_id}-{number:016x}-0{int(sampled)}"


def phases_of(spans: list[Received], root: Received) -> list[Received]:
    """Spans right below the root, in order of time."""
    return sorted((s for s in spans if s.parent_id == root.span_id), key=lambda s: (s.start_ns, s.end_ns))


def check_they_sum(root: Received, phases: list[Received]) -> None:
    assert phases[0].start_ns == pytest.approx(root.start_ns, abs=CLOCK_ERROR_NS)
    assert phases[-1].end_ns == pytest.approx(root.end_ns, abs=CLOCK_ERROR_NS)
    for before, after in itertools.pairwise(phases):
        assert after.start_ns == pytest.approx(before.end_ns, abs=CLOCK_ERROR_NS)
    assert sum(phase.ns for phase in phases) == pytest.approx(root.ns, abs=CLOCK_ERROR_NS)


def test_a_chat_is_one_trace_whose_phases_sum_to_its_time(fleet: Fleet, collector: Collector) -> None:
    trace_id, parent = traceparent(0xA1)
    client = openai.OpenAI(base_url=f"http://{fleet.http[0]}/v1", api_key="none", max_retries=0)
    sent_ns = time.time_ns()
    answer = client.chat.completions.create(
        model="py",
        messages=[{"role": "user", "content": f"def {SECRET}(x):"}],
        max_tokens=24,
        temperature=0.0,
        extra_headers={"traceparent": parent},
    )
    had_ns = time.time_ns()
    spans = collector.trace(trace_id, "chat py", "trireme.scheduler.assign", *OF_WORKER)
    (root,) = [span for span in spans if span.name == "chat py"]
    phases = phases_of(spans, root)
    assert [phase.name for phase in phases] == [f"trireme.{name}" for name in PHASES]
    check_they_sum(root, phases)
    assert sent_ns <= root.start_ns and root.end_ns <= had_ns

    assert (root.service, root.kind, root.parent_id) == ("trireme-gateway", 2, f"{0xA1:016x}")
    said = root.attributes
    usage = answer.usage
    assert usage is not None
    assert said["gen_ai.operation.name"] == "chat" and said["gen_ai.provider.name"] == "trireme"
    assert said["gen_ai.request.model"] == "py" and said["gen_ai.response.model"] == VARIANT
    assert said["gen_ai.request.max_tokens"] == 24
    assert said["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert said["gen_ai.usage.output_tokens"] == usage.completion_tokens
    assert said["gen_ai.response.finish_reasons"] == [answer.choices[0].finish_reason]
    by_name = {phase.name: phase for phase in phases}
    assert said["gen_ai.latency.time_in_model_decode"] * 1e9 == pytest.approx(
        by_name["trireme.decode"].ns, abs=CLOCK_ERROR_NS
    )
    # Each process hangs what it did below the phase it did it in.
    parents = {
        "trireme.scheduler.assign": ("trireme-scheduler", "trireme.queue"),
        "trireme.worker.wait": ("trireme-worker", "trireme.engine_queue"),
        "trireme.worker.prefill": ("trireme-worker", "trireme.prefill"),
        "trireme.worker.decode": ("trireme-worker", "trireme.decode"),
    }
    for name, (service, phase) in parents.items():
        (child,) = [span for span in spans if span.name == name]
        assert (child.service, child.parent_id) == (service, by_name[phase].span_id)
    for name in ("prefill", "decode"):
        (child,) = [span for span in spans if span.name == f"trireme.worker.{name}"]
        phase = by_name[f"trireme.{name}"]
        assert child.start_ns == pytest.approx(phase.start_ns, abs=CLOCK_ERROR_NS)
        assert child.end_ns == pytest.approx(phase.end_ns, abs=CLOCK_ERROR_NS)
    # No text travels, neither the prompt's nor the answer's.
    text = answer.choices[0].message.content or ""
    for span in spans:
        assert SECRET.encode() not in span.raw
        assert not text.strip() or text.strip().encode() not in span.raw


async def test_no_text_is_in_any_log_or_trace(fleet: Fleet, collector: Collector) -> None:
    """Of any front end, of right and of wrong calls, at the level that tells most."""
    await fleet.ready_workers(2)
    await marked_requests.ask_all(fleet.http[0], fleet.grpc[0])
    # Behind it, and so in the collector after it: what was asked before has been told by then.
    trace_id, parent = traceparent(0xB7)
    async for _ in await complete(fleet, parent, max_tokens=2):
        pass
    collector.trace(trace_id, "text_completion py", "trireme.scheduler.assign", *OF_WORKER)
    spans = collector.spans()
    names = {span.name for span in spans}
    assert {"chat py", "embeddings py"} <= names, names
    assert [span.name for span in spans if marked_requests.shows_a_text(span.raw)] == []
    papers = [*(fleet.run_dir / "logs").rglob("*.log"), fleet.run_dir.parent / AUDIT]
    services = {path.name.split("-")[0].removesuffix(".log") for path in papers}
    assert {"gateway", "scheduler", "worker", "kvstore", "power", "placement"} <= services
    lines = [line for path in papers for line in path.read_bytes().splitlines()]
    assert any(b'"level": "debug"' in line for line in lines), "nobody spoke at this level"
    assert any(b"POST /v1/batches" in line for line in lines), "the audit log tells of calls"
    assert [line for line in lines if marked_requests.shows_a_text(line)] == []


async def complete(
    fleet: Fleet, context: str, *, max_tokens: int, ignore_eos: bool = False
) -> openai.AsyncStream[Completion]:
    client = openai.AsyncOpenAI(base_url=f"http://{fleet.http[0]}/v1", api_key="none", max_retries=0)
    return await client.completions.create(
        model="py",
        prompt="class A:\n",
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        extra_headers={"traceparent": context},
        extra_body={"ignore_eos": ignore_eos},
    )


async def test_what_the_client_does_not_sample_is_not_sent(fleet: Fleet, collector: Collector) -> None:
    unwanted, parent = traceparent(0xB1, sampled=False)
    wanted, later = traceparent(0xB2)
    for context in (parent, later):
        async for _ in await complete(fleet, context, max_tokens=4):
            pass
    collector.trace(wanted, "text_completion py", *OF_WORKER)
    assert unwanted not in collector.traces()


async def test_a_request_that_outlives_its_worker_is_still_one_trace(
    fleet: Fleet, collector: Collector
) -> None:
    trace_id, parent = traceparent(0xC1)
    workers = await fleet.ready_workers(2)
    tokens = 0
    async for _ in await complete(fleet, parent, max_tokens=400, ignore_eos=True):
        tokens += 1
        if tokens == 1:
            async with fleet.held(workers) as victim:
                os.kill(victim.pid, signal.SIGKILL)
    spans = collector.trace(trace_id, "text_completion py", "trireme.worker.decode")
    (root,) = [span for span in spans if span.name == "text_completion py"]
    phases = phases_of(spans, root)
    check_they_sum(root, phases)
    assert {"paused", "attempt", "resumed"} <= set(root.events)
    assert root.attributes["trireme.attempts"] == 2
    assert root.attributes["gen_ai.usage.output_tokens"] == 400
    decode = next(phase for phase in phases if phase.name == "trireme.decode")
    second = [s for s in spans if s.service == "trireme-worker" and s.attributes["trireme.attempt"] == 2]
    assert second and all(span.parent_id == decode.span_id for span in second)
    await fleet.ready_workers(2)


async def test_a_worker_counts_under_vllms_names_what_was_asked_of_it(fleet: Fleet) -> None:
    async def samples() -> dict[str, float]:
        found: dict[str, float] = {}
        for worker in await fleet.ready_workers(2):
            page = await asyncio.to_thread(urlopen, f"http://{worker.http_address}/metrics", timeout=30)
            for family in text_string_to_metric_families(page.read().decode()):
                for sample in family.samples:
                    if sample.labels.get("model_name", "py") == "py" and "le" not in sample.labels:
                        reason = sample.labels.get("finished_reason", "")
                        key = f"{sample.name} {reason}".strip()
                        found[key] = found.get(key, 0.0) + sample.value
        return found

    before = await samples()
    for number in range(3):
        async for _ in await complete(fleet, traceparent(0xD0 + number)[1], max_tokens=8, ignore_eos=True):
            pass
    deadline_s = time.monotonic() + 60
    while True:  # A worker counts a request once its answer is on its way.
        after = await samples()
        grown = {name: after[name] - before[name] for name in before}
        running = after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"]
        if grown["vllm:request_success_total length"] >= 3 and not running:
            break
        assert time.monotonic() < deadline_s, grown
        await asyncio.sleep(0.1)
    assert grown["vllm:request_success_total length"] == 3
    assert grown["vllm:time_to_first_token_seconds_count"] == 3
    assert grown["vllm:request_generation_tokens_sum"] == 24
    # The first token is the prefill's; each later one is an iteration's.
    assert grown["vllm:inter_token_latency_seconds_count"] == 3 * (8 - 1)
    assert grown["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(
        grown["vllm:request_queue_time_seconds_sum"] + grown["vllm:request_inference_time_seconds_sum"],
        abs=1e-3,
    )
    assert after["vllm:kv_cache_usage_perc"] == after["vllm:gpu_cache_usage_perc"]


# The doctor's patients are made sick for real, one after the other; each test heals the fleet at its end.


def visit(fleet: Fleet, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """The doctor's exit status and findings."""
    found = command(fleet.run_dir, "doctor", "--json", *words)
    assert found.returncode in (0, 1), found.stderr
    return found.returncode, json.loads(found.stdout)


def until_well(fleet: Fleet, *, within_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + within_s
    while (found := visit(fleet))[0] != 0:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.5)


def test_the_bundle_of_a_well_fleet_tells_much_and_no_secret(fleet: Fleet, tmp_path: Path) -> None:
    until_well(fleet)
    password = str(fleet.state["redis_url"]).split(":")[2].partition("@")[0]
    file = tmp_path / "fleet.tar.gz"
    shown = command(fleet.run_dir, "doctor", "--bundle", str(file))
    assert shown.returncode == 0 and "Nothing is wrong" in shown.stdout, shown.stdout + shown.stderr
    assert file.stat().st_mode & 0o077 == 0
    papers: dict[str, str] = {}
    with tarfile.open(file) as bundle:
        for member in bundle.getmembers():
            content = bundle.extractfile(member)
            assert content is not None
            papers[member.name.removeprefix("fleet/")] = content.read().decode()
    facts = json.loads(papers["facts.json"])
    services = {process["service"] for process in facts["processes"]}
    assert services == {"redis", "placement", "kvstore", "power", "scheduler", "gateway", "worker"}
    gateway = next(p for p in facts["processes"] if p["name"] == "gateway-0")
    assert gateway["health"] == "SERVING" and gateway["version"]
    assert gateway["settings"]["TRIREME_TEST_API_KEY"] == "[redacted]"
    assert gateway["settings"]["TRIREME_GATEWAY_REDIS_URL"].startswith("redis://[redacted]@127.0.0.1:")
    assert any("trireme_gateway_requests_total" in text for text in papers.values())
    assert any('"event": "serving"' in papers[name] for name in papers if name.startswith("logs/gateway"))
    assert VARIANT in papers["fleet.yaml"]
    for secret in (PLANTED, password, SECRET):
        assert not [name for name, text in papers.items() if secret in text], secret
    again = command(fleet.run_dir, "doctor", "--bundle", str(file))
    assert again.returncode == 2 and "exists" in again.stderr


def test_a_hung_redis_is_named_first(fleet: Fleet) -> None:
    with stopped(int(fleet.state["supervisor_pid"]), fleet.pid_of("redis")):  # type: ignore[call-overload]
        status, found = visit(fleet)
    assert status == 1 and found[0]["code"] == "bus_away"
    until_well(fleet)


def test_a_redis_that_refuses_writes_is_named_first(fleet: Fleet) -> None:
    with Redis.from_url(str(fleet.state["redis_url"])) as redis:
        redis.config_set("min-replicas-to-write", 1)
        try:
            status, found = visit(fleet)
        finally:
            redis.config_set("min-replicas-to-write", 0)
    assert status == 1 and found[0]["code"] == "bus_refuses_writes"
    assert "min-replicas-to-write" in found[0]["advice"]
    until_well(fleet)


async def test_a_variant_whose_checkpoint_is_broken_is_named(fleet: Fleet) -> None:
    placement = (await fleet.living("placement"))[0]
    async with grpc.aio.insecure_channel(placement.grpc_address) as channel:
        stub = PlacementStub(channel)
        await stub.LoadVariant(placement_pb.LoadVariantRequest(variant="broken", group="worker"))
        deadline_s = time.monotonic() + 60
        while True:
            status, found = await asyncio.to_thread(visit, fleet)
            codes = [finding["code"] for finding in found]
            if codes[:1] == ["variant_did_not_load"]:
                break
            assert time.monotonic() < deadline_s, found
            await asyncio.sleep(0.3)
        await stub.UnloadVariant(placement_pb.UnloadVariantRequest(variant="broken", group="worker"))
    assert status == 1 and codes[0] == "variant_did_not_load"
    assert found[0]["severity"] == "degraded"  # the other variant is still served
    assert "safetensors" in found[0]["what"]
    await asyncio.to_thread(until_well, fleet)


async def test_dead_workers_that_nobody_starts_are_named_first(fleet: Fleet) -> None:
    workers = await fleet.ready_workers(2)
    supervisor = int(fleet.state["supervisor_pid"])  # type: ignore[call-overload]
    with stopped(supervisor, fleet.pid_of("placement")):
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 60
        while await fleet.living("worker"):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.2)
        status, found = await asyncio.to_thread(visit, fleet)
    assert status == 1 and found[0]["code"] == "no_worker"
    assert "placement" in found[0]["what"]


def test_where_no_fleet_runs_the_doctor_says_so(tmp_path: Path) -> None:
    status, found = visit(Fleet(tmp_path / "nowhere"))
    assert status == 1 and [finding["code"] for finding in found] == ["no_fleet"]
