"""Any one process may die under 32 streams: nothing fails, no token comes twice, none is missing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil
import pytest

from tests.fleet.background import check_that_a_response_outlives_its_gateway
from tests.fleet.conftest import Fleet, engine_pid
from trireme.client import Accepted, Delta, Paused, Sampling, Summary, TriremeClient

STREAMS = 32
TOKENS = 160
SOON = STREAMS // 8
"""Of a worker's streams most have hardly begun when so many have, however late their clients hear of it."""
PROMPTS = [list(range(100 + index, 140 + index)) for index in range(STREAMS)]

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]


@dataclass
class Answer:
    """One stream as its client saw it."""

    token_ids: list[int] = field(default_factory=list)
    pauses: int = 0
    attempts: int = 0
    paused_s: float = 0.0


async def ask(client: TriremeClient, prompt: list[int], answer: Answer, *, tokens: int = TOKENS) -> None:
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for event in client.generate("py", prompt, sampling):
        match event:
            case Delta():
                assert event.first_index == len(answer.token_ids), "each index once and in order"
                answer.token_ids.extend(event.token_ids)
            case Paused():
                answer.pauses += 1
            case Summary():
                answer.attempts = event.attempts
                answer.paused_s = event.paused_s
            case Accepted():
                assert event.prompt_tokens == len(prompt)


async def under_load(
    fleet: Fleet,
    fault: Callable[[], Awaitable[None]] | None,
    *,
    begun: int = STREAMS // 2,
    addresses: list[str] | None = None,
    tokens: int = TOKENS,
) -> list[Answer]:
    """32 streams; the fault comes when so many of them have begun."""
    answers = [Answer() for _ in range(STREAMS)]
    async with TriremeClient(addresses or fleet.grpc) as client, asyncio.TaskGroup() as tasks:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            tasks.create_task(ask(client, prompt, answer, tokens=tokens))
        if fault is not None:
            while sum(len(answer.token_ids) > 4 for answer in answers) < begun:
                await asyncio.sleep(0.005)
            await fault()
    return answers


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> list[list[int]]:
    """What the 32 streams get when nothing happens."""
    answers = asyncio.run(under_load(fleet, None))
    assert all(len(answer.token_ids) == TOKENS for answer in answers)
    return [answer.token_ids for answer in answers]


def check(answers: list[Answer], undisturbed: list[list[int]]) -> None:
    assert [len(answer.token_ids) for answer in answers] == [TOKENS] * STREAMS
    assert [answer.token_ids for answer in answers] == undisturbed


@pytest.mark.parametrize(
    "name", ["scheduler-0", "kvstore", "power", "placement", "gateway-0", "gateway-1", "redis"]
)
async def test_kill_9_of_a_service(fleet: Fleet, undisturbed: list[list[int]], name: str) -> None:
    old_pid = fleet.pid_of(name)

    async def fault() -> None:
        fleet.kill(name)

    answers = await under_load(fleet, fault)
    check(answers, undisturbed)
    await fleet.until_restarted(name, old_pid)
    await fleet.ready_workers(2)
    check(await under_load(fleet, None), undisturbed)


async def test_kill_9_of_the_gateway_that_drives_a_background_response(fleet: Fleet) -> None:
    await fleet.ready_workers(2)
    await check_that_a_response_outlives_its_gateway(fleet)


async def test_kill_9_of_one_of_two_workers(fleet: Fleet, undisturbed: list[list[int]]) -> None:
    workers = await fleet.ready_workers(2)

    async def fault() -> None:
        async with fleet.held(workers) as victim:
            os.kill(victim.pid, signal.SIGKILL)

    answers = await under_load(fleet, fault, begun=SOON)
    check(answers, undisturbed)
    moved = [answer for answer in answers if answer.attempts > 1]
    assert moved, "the victim held some of the streams"
    assert all(answer.pauses for answer in moved), "a pause is reported"
    await fleet.ready_workers(2)


async def test_kill_9_of_an_engine_process(fleet: Fleet, undisturbed: list[list[int]]) -> None:
    workers = await fleet.ready_workers(2)
    victim_pid = 0

    async def fault() -> None:
        nonlocal victim_pid
        async with fleet.held(workers) as victim:
            victim_pid = victim.pid
            os.kill(engine_pid(victim_pid), signal.SIGKILL)

    answers = await under_load(fleet, fault, begun=SOON)
    check(answers, undisturbed)
    assert any(answer.attempts > 1 and answer.pauses for answer in answers)
    async with asyncio.timeout(60):  # A worker without its engine is none.
        while psutil.pid_exists(victim_pid):
            await asyncio.sleep(0.1)
    await fleet.ready_workers(2)


@pytest.mark.parametrize("pid_of", [lambda worker_pid: worker_pid, engine_pid], ids=["worker", "engine"])
async def test_a_paused_workers_requests_finish_elsewhere(
    fleet: Fleet, undisturbed: list[list[int]], pid_of: Callable[[int], int]
) -> None:
    workers = await fleet.ready_workers(2)

    async def fault() -> None:
        async with fleet.held(workers) as victim:
            pass
        os.kill(pid_of(victim.pid), signal.SIGSTOP)
        async with asyncio.timeout(60):
            while victim.id in {record.id for record in await fleet.living("worker")}:
                await asyncio.sleep(0.1)

    answers = await under_load(fleet, fault, begun=SOON)
    check(answers, undisturbed)
    assert any(answer.attempts > 1 for answer in answers)
    await fleet.ready_workers(2)


async def test_sigterm_drains_a_worker(fleet: Fleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready_workers(2)

    async def fault() -> None:
        os.kill((await fleet.busiest_worker()).pid, signal.SIGTERM)

    answers = await under_load(fleet, fault)
    check(answers, undisturbed)
    assert not any(answer.pauses for answer in answers), "what runs there ends there"
    await fleet.ready_workers(2)
