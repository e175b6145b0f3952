"""The fleet as clients and operators meet it: APIs, health, explanations, energy, the README's examples."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fleet.conftest import REPOSITORY, VARIANT, Fleet, running
from tests.unit.encoder_support import (
    LABELS,
    expected_logits,
    expected_vector,
    reference_encoder,
    write_pooling,
    write_tokenizer,
)
from tests.unit.engine_support import save
from trireme.bus.connection import Keys, open_redis
from trireme.bus.streams import Stream
from trireme.client import Accepted, Delta, Paused, Sampling, Summary, SyncTriremeClient, TriremeClient
from trireme.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, RequestQuarantined
from trireme.wire.bus.v1.facts_pb2 import Event
from trireme.wire.inference.v1.inference_pb2 import FINISH_REASON_CANCELLED
from trireme.wire.power.v1 import power_pb2, power_pb2_grpc
from trireme.wire.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

CHECKPOINT = REPOSITORY / "checkpoints" / VARIANT
SERVICES = ("gateway", "scheduler", "worker", "kvstore", "power", "placement")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT that classifies, whose vectors are its first hidden states."""
    directory = save(reference_encoder("bert"), tmp_path_factory.mktemp("encoder"))
    write_tokenizer(directory)
    write_pooling(directory, "cls", normalises=True)
    return directory


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Iterator[Fleet]:
    with running(
        tmp_path_factory.mktemp("fleet"), encoders={"mood": encoder}, max_sequences=32, kv_mib=64
    ) as found:
        yield found


@pytest.mark.parametrize("service", SERVICES)
async def test_every_service_tells_its_health_and_its_contract(fleet: Fleet, service: str) -> None:
    for record in await fleet.living(service):
        async with grpc.aio.insecure_channel(record.grpc_address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
            watching = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == 1
            watching.cancel()
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            async for answer in reflection.ServerReflectionInfo(iter([request])):
                names = {found.name for found in answer.list_services_response.service}
                break
            assert any(name.startswith("trireme.wire.") for name in names)
            assert "grpc.health.v1.Health" in names


async def test_a_draining_worker_says_so_to_those_who_watch(fleet: Fleet) -> None:
    worker = (await fleet.ready_workers(2))[0]
    async with grpc.aio.insecure_channel(worker.grpc_address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(worker.pid, signal.SIGTERM)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await fleet.ready_workers(2)


async def test_a_request_that_is_there_at_two_crashes_is_quarantined(fleet: Fleet) -> None:
    await fleet.ready_workers(2)
    killed: set[str] = set()
    moved = True
    async with TriremeClient(fleet.grpc) as client:
        with pytest.raises(RequestQuarantined):
            prompt = list(range(200, 240))
            # Several choices, so that it is not done before its workers are.
            sampling = Sampling(max_tokens=1900, temperature=0.0, ignore_eos=True, n=8)
            async for event in client.generate("py", prompt, sampling, request_id="poison"):
                # One crash may be told as more than one pause.
                moved = moved or isinstance(event, Paused)
                if not (isinstance(event, Delta) and moved):
                    continue
                server = await _server_of(fleet, "poison")
                if server not in killed:
                    killed.add(server)
                    pids = {record.id: record.pid for record in await fleet.living("worker")}
                    os.kill(pids[server], signal.SIGKILL)
                    moved = False
    assert len(killed) == 2
    await fleet.ready_workers(2)


async def _server_of(fleet: Fleet, request_id: str) -> str:
    for record in await fleet.living("scheduler"):
        async with grpc.aio.insecure_channel(record.grpc_address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            explained = await stub.Explain(scheduler_pb2.ExplainRequest(request_id=request_id))
            worker_id: str = explained.decisions[-1].worker_id
            return worker_id
    raise AssertionError("no scheduler lives")


@pytest.mark.parametrize("after_tokens", [0, 5])
async def test_a_client_that_goes_away_stops_the_engine(fleet: Fleet, after_tokens: int) -> None:
    await fleet.ready_workers(2)
    request_id = f"gone-{after_tokens}"
    async with TriremeClient(fleet.grpc) as client:
        sampling = Sampling(max_tokens=1900, temperature=0.0, ignore_eos=True)
        stream = client.generate("py", list(range(300, 350)), sampling, request_id=request_id)
        tokens = 0
        async for event in stream:
            tokens += len(event.token_ids) if isinstance(event, Delta) else 0
            if (isinstance(event, Accepted) and after_tokens == 0) or tokens > after_tokens:
                break
        await stream.aclose()
    async with open_redis(str(fleet.state["redis_url"])) as redis:
        events = Stream(redis, Keys(str(fleet.state["bus_prefix"])).events, Event)
        for _ in range(1200):
            ended = [
                entry.fact.finished
                for entry in await events.everything()
                if entry.fact.finished.request_id == request_id
            ]
            idle = all(
                variant.running == 0
                for record in await fleet.living("worker")
                for variant in record.worker.variants
            )
            if idle and (ended or after_tokens == 0):
                break
            await asyncio.sleep(0.05)
    assert idle, "no engine goes on with it"
    assert all(end.reason == FINISH_REASON_CANCELLED for end in ended)
    assert all(end.usage.completion_tokens < 1900 for end in ended)


async def test_scores_and_vectors_equal_the_reference(fleet: Fleet) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text, labels = "import os\nimport ", ["sys", "re", "zebra"]
    expected = {}
    for label in labels:
        prompt, continuation = tokenizer.encode(text).ids, tokenizer.encode(label).ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        expected[label] = sum(
            logits[row, token].item() for row, token in zip(rows, continuation, strict=True)
        )
    async with TriremeClient(fleet.grpc) as client:
        found = await client.classify("py", text, labels)
        embedded = await client.embed("py", [text, text, "def f():"])
    assert {score.label: score.logprob for score in found.scores} == pytest.approx(expected, abs=1e-3)
    assert [score.label for score in found.scores] == sorted(labels, key=expected.__getitem__, reverse=True)
    assert sum(score.probability for score in found.scores) == pytest.approx(1.0)
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.encode(text).ids])
        hidden = model.model(ids).last_hidden_state[0].mean(0)
    vector = (hidden / hidden.norm()).tolist()
    assert embedded.vectors[0] == pytest.approx(vector, abs=1e-4)
    assert embedded.vectors[1] == pytest.approx(vector, abs=1e-4)
    assert embedded.vectors[2] != pytest.approx(vector, abs=1e-2)


async def test_a_prompt_is_scored_as_evaluation_harnesses_ask(fleet: Fleet) -> None:
    """`echo` with `logprobs`, which sends the prompt's own back: each request is asked for twice, so that
    the second one finds its prompt cached, and prompts are longer than a chunk."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    source = (REPOSITORY / "libs" / "trireme" / "errors.py").read_text(encoding="utf-8")
    prompts = [tokenizer.encode(source).ids[:900], tokenizer.encode("import os\nimport sys\n").ids, [7]]
    tables = []
    with torch.inference_mode():
        for prompt in prompts:
            tables.append(model(torch.tensor([prompt])).logits[0].log_softmax(-1))

    def check(prompt: list[int], table: torch.Tensor, logprobs: Any, *, answer_tokens: int) -> None:
        assert len(logprobs.tokens) == len(prompt) + answer_tokens
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        chosen = table[range(len(prompt) - 1), prompt[1:]].tolist()
        assert logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(chosen, abs=2e-3)
        best = table[:-1].max(-1).values.tolist()
        tops = [max(top.values()) for top in logprobs.top_logprobs[1 : len(prompt)]]
        assert tops == pytest.approx(best, abs=2e-3)
        assert logprobs.text_offset == sorted(logprobs.text_offset)
        assert len(logprobs.text_offset) == len(logprobs.tokens)

    asked: Any = {"model": "py", "prompt": prompts, "echo": True, "logprobs": 2, "temperature": 0, "seed": 1}
    client = openai.AsyncOpenAI(base_url=f"http://{fleet.http[0]}/v1", api_key="none")
    for max_tokens in (1, 0, 1):
        whole = await client.completions.create(**asked, max_tokens=max_tokens)
        for choice, prompt, table in zip(whole.choices, prompts, tables, strict=True):
            check(prompt, table, choice.logprobs, answer_tokens=max_tokens)
            assert choice.finish_reason == "length"
            assert choice.text.startswith(tokenizer.decode(prompt))
            if max_tokens:
                assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
                top = table[-1].max().item()
                assert choice.logprobs.token_logprobs[-1] == pytest.approx(top, abs=2e-3)
            else:
                assert choice.text == tokenizer.decode(prompt)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == max_tokens * len(prompts)
        assert whole.usage.prompt_tokens_details is None or not (
            whole.usage.prompt_tokens_details.cached_tokens
        )
    for number, prompt in enumerate(prompts):
        columns, text = SimpleNamespace(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]), ""
        stream = await client.completions.create(
            **{**asked, "prompt": prompt, "max_tokens": 2 * (number != 1)}, stream=True
        )
        async for chunk in stream:
            (choice_part,) = chunk.choices
            text += choice_part.text
            for name in vars(columns) if choice_part.logprobs is not None else ():
                getattr(columns, name).extend(getattr(choice_part.logprobs, name))
        check(prompt, tables[number], columns, answer_tokens=2 * (number != 1))
        assert text.startswith(tokenizer.decode(prompt))
    await client.close()

    async with TriremeClient(fleet.grpc) as own:
        sampling = Sampling(max_tokens=0, prompt_logprobs=1)
        events = [event async for event in own.generate("py", prompts[0], sampling)]
        more = Sampling(max_tokens=3, prompt_logprobs=0, n=2, ignore_eos=True)
        answered = [event async for event in own.generate("py", prompts[1], more)]
    for choice_number in range(2):
        told = [e for e in answered if isinstance(e, Delta) and e.choice == choice_number]
        assert sum(len(each.token_ids) for each in told) == 3
        rows = [[p.chosen.token_id for p in each.prompt_logprobs] for each in told]
        assert rows[0] == prompts[1][1:] and not any(rows[1:])
    (delta,) = [event for event in events if isinstance(event, Delta)]
    assert delta.token_ids == () and [p.chosen.token_id for p in delta.prompt_logprobs] == prompts[0][1:]
    found = [position.chosen.logprob for position in delta.prompt_logprobs]
    assert found == pytest.approx(tables[0][range(len(prompts[0]) - 1), prompts[0][1:]].tolist(), abs=2e-3)


async def test_an_encoder_embeds_and_classifies_and_says_that_it_does_not_generate(
    fleet: Fleet, encoder: Path
) -> None:
    from tokenizers import Tokenizer

    reference = reference_encoder("bert")
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    texts = ["A ship with three banks of oars!", "is a ship fast?", "oars"]
    async with TriremeClient(fleet.grpc) as client:
        embedded = await client.embed("mood", texts)
        found = await client.classify("mood", texts[0], list(LABELS))
        with pytest.raises(InvalidRequest, match="no class 'sad'; it has 'calm', 'glad', 'cross'"):
            await client.classify("mood", texts[0], ["calm", "sad"])
        with pytest.raises(InvalidRequest, match="does not generate"):
            async for _ in client.generate("mood", texts[0], Sampling(max_tokens=4)):
                pass
        whole = " ".join(["ship"] * 62)  # with [CLS] and [SEP] as many tokens as there are positions
        assert len((await client.embed("mood", [whole])).vectors[0]) == 32
        with pytest.raises(ContextLengthExceeded, match="at most 64"):
            await client.embed("mood", [whole + " fast"])
    for text, vector in zip(texts, embedded.vectors, strict=True):
        expected = expected_vector(reference, tokenizer.encode(text).ids, "cls", normalises=True)
        assert list(vector) == pytest.approx(expected.tolist(), abs=1e-4)
    shares = expected_logits(reference, tokenizer.encode(texts[0]).ids).softmax(-1).tolist()
    assert {score.label: score.probability for score in found.scores} == pytest.approx(
        dict(zip(LABELS, shares, strict=True)), abs=1e-4
    )
    assert embedded.usage.joules > 0
    async with openai.AsyncOpenAI(
        base_url=f"http://{fleet.http[0]}/v1", api_key="none", max_retries=0
    ) as openai_client:
        answer = await openai_client.embeddings.create(model="mood", input=texts)
        assert list(answer.data[1].embedding) == pytest.approx(list(embedded.vectors[1]), abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="does not generate"):
            await openai_client.completions.create(model="mood", prompt="a ship", max_tokens=4)
        with pytest.raises(openai.BadRequestError, match="does not generate"):
            said = [{"role": "user", "content": "a ship"}]
            await openai_client.chat.completions.create(model="mood", messages=said, max_tokens=4)


async def test_a_second_turn_finds_the_first_ones_blocks(fleet: Fleet) -> None:
    await fleet.ready_workers(2)
    async with TriremeClient(fleet.grpc) as client:

        async def ask(text: str) -> Summary:
            events = client.generate("py", text, Sampling(max_tokens=8, temperature=0.0))
            [summary] = [event async for event in events if isinstance(event, Summary)]
            return summary

        # The other scheduler hears a moment later of what a worker holds.
        for wait_s in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
            history = f"def first_{wait_s * 2:.0f}(items):\n    return items[0]\n\n" * 12
            first = await ask(history)
            await asyncio.sleep(wait_s)
            second = await ask(history + "def second(items):\n")
            if second.usage.cached_prompt_tokens >= first.usage.prompt_tokens - 16:
                break
    assert second.usage.cached_prompt_tokens >= first.usage.prompt_tokens - 16
    assert "tokens cached" in second.decision


async def test_the_books_of_energy_balance(fleet: Fleet) -> None:
    async with TriremeClient(fleet.grpc) as client:
        async for event in client.generate("py", "x = ", Sampling(max_tokens=200, ignore_eos=True, seed=1)):
            if isinstance(event, Summary):
                usage = event.usage
    assert usage.joules > 0 and usage.grams_co2e > 0 and usage.engine_s > 0
    [power] = await fleet.living("power")
    async with grpc.aio.insecure_channel(power.grpc_address) as channel:
        stub = power_pb2_grpc.PowerStub(channel)
        for _ in range(1200):  # a worker tells of its second when it is over
            ledger = await stub.GetLedger(power_pb2.GetLedgerRequest())
            [device] = ledger.devices
            books = device.total
            if books.billed_joules > 0:
                break
            await asyncio.sleep(0.05)
    assert books.billed_joules > 0
    balance = books.billed_joules + books.idle_joules + books.unattributed_joules
    assert balance == pytest.approx(books.metered_joules, rel=1e-9)


async def test_the_openai_sdk_streams_and_its_errors_are_typed(fleet: Fleet) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"http://{fleet.http[0]}/v1", api_key="none", max_retries=0
    ) as client:
        names = {model.id async for model in client.models.list()}
        assert {"py", VARIANT} <= names
        stream = await client.chat.completions.create(
            model="py",
            messages=[{"role": "user", "content": "Complete this code:\ndef main():\n"}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].usage is not None and chunks[-1].choices == []
        whole = await client.chat.completions.create(
            model="py",
            messages=[{"role": "user", "content": "Complete this code:\ndef main():\n"}],
            max_tokens=24,
            temperature=0,
        )
        assert whole.choices[0].message.content == text
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nobody", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="py", prompt="x", temperature=-1)


def test_an_unknown_model_is_a_typed_error(fleet: Fleet) -> None:
    with SyncTriremeClient(fleet.grpc) as client, pytest.raises(ModelNotFound):
        list(client.generate("nobody", "x"))


def readme_blocks() -> list[tuple[str, str]]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```(sh|python)\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("language, code", readme_blocks())
def test_the_readmes_examples_run(fleet: Fleet, language: str, code: str, tmp_path: Path) -> None:
    code = code.replace("127.0.0.1:8000", fleet.http[0]).replace("127.0.0.1:9000", fleet.grpc[0])
    code = code.replace('"trireme-py"', '"py"')
    code = code.replace(".venv/bin/trireme", f"{sys.executable} -m trireme.cli")
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    words = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
