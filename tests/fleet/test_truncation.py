"""A conversation outgrows its context in a fleet, and its workers die between its turns."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
import torch

from tests.fleet.conftest import Fleet, running
from tests.unit.test_gateway_truncation import CATALOG, OLDEST, SIZE, submit
from tests.unit.test_worker_truncation import Worker
from trireme.client import Delta, Sampling, Summary, TriremeClient
from trireme.gateway.prefix_blocks import name_blocks
from trireme.gateway.submission import DEFAULT_TENANT
from trireme.kvcache.store_client import StoreClient
from trireme.policies.prefix_index import split_hashes
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, ProcessRecord
from trireme.worker.live_requests import LiveRequest

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

MODEL = CATALOG.find("py")
WINDOW = MODEL.context_tokens
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("cuts")
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("TRIREME_WORKER_STORE_DEADLINE_S", "5")  # so that a busy machine misses no block
        with running(directory, replicas=1, kv_mib=64, max_batch_tokens=256) as found:
            yield found


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    """An engine that has nothing else to do and loses nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Worker(WINDOW)
    torch.set_num_threads(threads)


async def ask(fleet: Fleet, prompt: list[int], max_tokens: int) -> tuple[list[int], Summary]:
    tokens: list[int] = []
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    async with TriremeClient(fleet.grpc) as client:
        async for event in client.generate(
            "py", prompt, sampling, session_id="s", context_overflow="truncate_oldest"
        ):
            if isinstance(event, Delta):
                tokens += event.token_ids
            if isinstance(event, Summary):
                return tokens, event
    raise AssertionError("no summary")


def named(prompt: list[int], max_tokens: int) -> AdmittedRequest:
    """What a gateway says of a prompt's blocks."""
    submission = submit(OLDEST, prompt=prompt, max_tokens=max_tokens, model=MODEL)
    request = AdmittedRequest(prompt_token_ids=submission.prompt_token_ids)
    name_blocks(request, submission.model, submission.cut, fleet="trireme", tenant=DEFAULT_TENANT)
    return request


def answer_alone(worker: Worker, prompt: list[int], max_tokens: int) -> LiveRequest:
    submission = submit(OLDEST, prompt=prompt, max_tokens=max_tokens, model=MODEL)
    submission.sampling.temperature = 0.0
    return worker.answer(submission, DEFAULT_TENANT)


async def until_saved(fleet: Fleet, worker: ProcessRecord, names: list[bytes]) -> None:
    [store] = await fleet.living("kvstore")
    async with StoreClient.open(store.grpc_address) as client, asyncio.timeout(WITHIN_S):
        while client.match_local(worker.worker.variants[0].kv_namespace, names) < len(names):
            await asyncio.sleep(0.05)


async def replaced(fleet: Fleet, worker: ProcessRecord) -> ProcessRecord:
    """Another worker, which has no KV, in place of this one."""
    os.kill(worker.pid, signal.SIGKILL)
    async with asyncio.timeout(WITHIN_S):
        while psutil.pid_exists(worker.pid):
            await asyncio.sleep(0.05)
    [fresh] = await fleet.ready_workers(1)
    return fresh


async def test_a_cut_conversation_goes_on_at_other_workers_as_it_would_have_alone(
    fleet: Fleet, alone: Worker
) -> None:
    """Three turns, each at a worker that knows nothing.

    The first is cut while it is answered, the second finds what lies behind that cut, the third is cut when
    it comes: what stays of it is stored under its names before the cut alone.
    """
    torch.manual_seed(5)
    whole = torch.randint(16, 1000, (WINDOW - 100,)).tolist()
    [worker] = await fleet.ready_workers(1)
    for turn, (max_tokens, more) in enumerate(((200, 24), (800, 100), (30, 0))):
        tokens, summary = await ask(fleet, whole, max_tokens)
        reference = await asyncio.to_thread(answer_alone, alone, whole, max_tokens)
        assert tokens == list(reference.choices[0].token_ids)
        usage = reference.usage()
        assert summary.usage.truncated_tokens == usage.truncated_tokens > 0
        assert summary.usage.cached_prompt_tokens == usage.cached_prompt_tokens
        assert (usage.cached_prompt_tokens > WINDOW // 4) == (turn > 0)
        whole += tokens
        computed = await asyncio.to_thread(named, [*whole, 0], 1)
        names = split_hashes(computed.prefix_hashes)
        await until_saved(fleet, worker, names[: (len(computed.prompt_token_ids) - 2) // SIZE])
        whole += torch.randint(16, 1000, (more,)).tolist()
        if turn < 2:
            worker = await replaced(fleet, worker)
