"""What a fleet tells of itself: traces at a collector, aliases that others' tools ask for."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterator
from urllib.request import urlopen

import openai
import pytest
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.conftest import VARIANT, Fleet, running
from tests.fleet.otlp_collector import Collector, Received, collecting

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

SECRET = "mulberry"
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
        with running(tmp_path_factory.mktemp("telemetry"), max_sequences=32, kv_mib=64) as found:
            yield found


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
    await fleet.ready_workers(2)
    tokens = 0
    async for _ in await complete(fleet, parent, max_tokens=400, ignore_eos=True):
        tokens += 1
        if tokens == 1:
            os.kill((await fleet.busiest_worker()).pid, signal.SIGKILL)
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
    after = await samples()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["vllm:request_success_total length"] == 3
    assert grown["vllm:time_to_first_token_seconds_count"] == 3
    assert grown["vllm:request_generation_tokens_sum"] == 24
    # The first token is the prefill's; each later one is an iteration's.
    assert grown["vllm:inter_token_latency_seconds_count"] == 3 * (8 - 1)
    assert grown["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(
        grown["vllm:request_queue_time_seconds_sum"] + grown["vllm:request_inference_time_seconds_sum"],
        abs=1e-3,
    )
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == after["vllm:gpu_cache_usage_perc"]
