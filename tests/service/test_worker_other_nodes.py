"""A conversation goes on at a worker of another node: its KV comes from the store of the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.test_kvstore_peers import until_peers
from tests.service.test_worker import FakeGateway
from tests.service.test_worker_blocks import ANSWER, BLOCK, WITHIN_S, node_of, until_stored
from trireme.kvcache.store_client import StoreClient

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-16m"
HISTORY = 1904


async def test_a_conversation_moves_to_another_node_with_its_kv(tmp_path: Path, redis_url: str) -> None:
    async with node_of(redis_url, tmp_path, CHECKPOINT, kv_mib=64, max_sequences=4) as node:
        stores = [await node.living("kvstore", node.start_store(node=name, dram_mib=128)) for name in "ab"]
        first_process = node.start_worker(0, node="a")
        first = await node.living("worker", first_process)
        prompt = node.tokens(HISTORY)
        async with (
            StoreClient.open(stores[0].grpc_address) as store,
            FakeGateway(first.grpc_address, confirms=True) as node.gateway,
        ):
            answer, _ = await node.ask(prompt, tenant="t", session="s")
            await until_stored(store, first.worker.variants[0].kv_namespace, prompt, "t")
            await node.until_ended("r0")
        first_process.kill()
        first_process.wait()

        # Where computing is as fast it is computed, and so is what comes too late: not here.
        second_process = node.start_worker(1, node="b", store_deadline_s=WITHIN_S, kv_load_always=True)
        second = await node.living("worker", second_process)
        assert second.worker.variants[0].kv_namespace == first.worker.variants[0].kv_namespace
        turn = [*prompt, *answer, *node.tokens(24)]
        async with (
            StoreClient.open(stores[1].grpc_address) as store,
            FakeGateway(second.grpc_address, confirms=True) as node.gateway,
        ):
            await until_peers(store)
            tokens, found = await node.ask(turn, tenant="t", session="s")
            assert found >= HISTORY
            assert node.is_right(turn, tokens) and len(tokens) == ANSWER
            stats = await store.stats(deadline_s=WITHIN_S)
            assert stats is not None and stats.from_peers >= HISTORY // BLOCK
            stranger, found = await node.ask(turn, tenant="another")
            assert stranger == tokens and found == 0
