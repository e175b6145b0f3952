"""The stores of other nodes: who they are, what they have, and their blocks.

Nobody keeps a list of what others hold. A store that lacks a chain asks, briefly and in parallel, a
few peers, those that helped last first; the answer is remembered for a moment, so that the fetch that
follows goes to the right one. So peers cost nothing while nobody misses, at any number of blocks.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import grpc

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.kvcache.block_codec import HASH_BYTES, BlockKey, block_keys
from trireme.kvcache.stored_blocks import Run
from trireme.kvcache.tiered_store import TieredStore
from trireme.kvstore.block_streams import Receiver, TransferCounters, send_block
from trireme.runtime.tls import fleet_stamp, open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb
from trireme.wire.kvstore.v1 import kvstore_pb2_grpc as rpc

log = logging.getLogger(__name__)

ASK_S = 0.05
"""A peer that does not answer sooner has nothing."""
MAX_ASKED = 8
_REMEMBER_S = 1.0
_REMEMBERED = 4096
_REFRESH_S = 1.0
_PAUSE_S = 5.0
"""A peer that failed is not asked for so long."""
_CLOSING_S = 30.0
"""A peer whose lease lapsed may only have been slow: what it sends or takes now may end."""
_OPTIONS = (("grpc.max_receive_message_length", 4 * 2**20), ("grpc.use_local_subchannel_pool", 1))


class Peer:
    """The store of another node."""

    def __init__(self, process_id: str, node: str, address: str) -> None:
        self.process_id = process_id
        self.node = node
        self.address = address
        self.stamp = fleet_stamp()
        self.channel = open_channel(address, _OPTIONS)
        self.stub: rpc.KvStoreAsyncStub = rpc.KvStoreStub(self.channel)
        self.paused_until_s = 0.0
        self.helped_s = 0.0


@dataclass(frozen=True, slots=True)
class _Answer:
    peer: Peer
    blocks: int
    until_s: float


class Peers:
    """The other stores of the fleet, as the registry names them."""

    def __init__(self, store: TieredStore, *, process_id: str, fleet: str) -> None:
        self._store = store
        self._process_id = process_id
        self._fleet = fleet
        self._peers: dict[str, Peer] = {}
        self._answers: dict[bytes, _Answer] = {}
        self._pulls: dict[asyncio.Task[int], frozenset[BlockKey]] = {}
        """Those under way, and what they want."""
        self._random = random.Random(process_id)
        self._closing: set[asyncio.Task[None]] = set()
        self.counters = TransferCounters()
        """What went to and fro."""

    async def follow(self, registry: Registry) -> None:
        """Know who is there, for ever."""
        try:
            while True:
                try:
                    self.know(await registry.living("kvstore"))
                except AWAY:
                    pass
                await asyncio.sleep(_REFRESH_S)
        finally:
            self.know([])

    def know(self, records: Sequence[ProcessRecord]) -> None:
        """These stores are there now, maybe with this one among them."""
        others = {
            record.id: record
            for record in records
            if record.id != self._process_id and record.fleet == self._fleet and record.grpc_address
        }
        stamp = fleet_stamp()
        outdated = {process_id for process_id, peer in self._peers.items() if peer.stamp != stamp}
        for process_id in (self._peers.keys() - others.keys()) | outdated:
            gone = self._peers.pop(process_id)
            self._answers = {key: each for key, each in self._answers.items() if each.peer is not gone}
            self._close(gone)
        for process_id, record in others.items():
            if process_id not in self._peers:
                self._peers[process_id] = Peer(process_id, record.node, record.grpc_address)
        self._store.peers = len(self._peers)

    async def match(self, namespace: str, block_hashes: bytes) -> int:
        """How many leading blocks of a chain some peer has; asks for at most `ASK_S`."""
        answer = await self._ask(namespace, block_hashes)
        return answer.blocks if answer is not None else 0

    async def pull(self, namespace: str, block_hashes: bytes, *, deadline_s: float) -> int:
        """Fetch the leading blocks of a chain from the peer that has most; returns how many are here now.

        What has not come by the deadline goes on coming, for the next reader.
        """
        end_s = time.monotonic() + deadline_s
        keys = block_keys(namespace, block_hashes)
        here = 0
        # What another pull is receiving is neither here yet nor to be had a second time.
        while under_way := [task for task, wanted in self._pulls.items() if not wanted.isdisjoint(keys)]:
            is_next_asked = any(keys[here] in self._pulls[task] for task in under_way)
            await asyncio.wait(under_way, timeout=max(0.0, end_s - time.monotonic()))
            before, here = here, len(self._store.leading(keys))
            is_in_vain = is_next_asked and here == before
            if is_in_vain or here == len(keys) or time.monotonic() >= end_s:
                return here
        left_s = end_s - time.monotonic()
        rest = block_hashes[here * HASH_BYTES :]
        task = asyncio.create_task(self._pull(namespace, rest, deadline_s=max(1.0, left_s)))
        self._pulls[task] = frozenset(keys[here:])
        task.add_done_callback(self._pulls.pop)
        await asyncio.wait({task}, timeout=left_s)
        return here + (task.result() if task.done() and not task.cancelled() else 0)

    async def push(self, runs: Sequence[Run], *, deadline_s: float) -> int:
        """Give runs in DRAM to a peer; returns how many blocks it has then."""
        peer = next(iter(self._best_first()), None)
        if peer is None:
            return 0
        lease = self._store.dram.open_lease(expires_s=self._store.now_s() + deadline_s)
        blocks = [block for run in runs for block in run.blocks]
        self._store.fetches.pin(lease, blocks)

        async def parts() -> AsyncIterator[pb.BlockPart]:
            for block in lease.blocks.values():
                async for part in send_block(self._store, block):
                    yield part
                self.counters.to_peers += 1

        try:
            return (await peer.stub.Push(parts(), timeout=deadline_s)).stored
        except grpc.aio.AioRpcError as error:
            self._note_failure(peer, error)
            return 0
        finally:
            self._store.release(lease.lease_id)

    async def _pull(self, namespace: str, block_hashes: bytes, *, deadline_s: float) -> int:
        answer = await self._ask(namespace, block_hashes, within_s=max(ASK_S, deadline_s / 5))
        if answer is None:
            return 0
        wanted = block_hashes[: answer.blocks * HASH_BYTES]
        request = pb.FetchRequest(namespace=namespace, block_hashes=wanted, deadline_s=deadline_s)
        receiver = Receiver(self._store, self.counters)
        receiver.wanted = frozenset(block_keys(namespace, wanted))
        try:
            async for part in answer.peer.stub.Fetch(request, timeout=deadline_s):
                await receiver.take(part)
        except grpc.aio.AioRpcError as error:
            self._note_failure(answer.peer, error)
        finally:
            receiver.finish()
        if receiver.stored < answer.blocks:
            what = {"node": answer.peer.node, "blocks": answer.blocks, "stored": receiver.stored}
            log.info("kv_pull_incomplete", extra=what)
        if receiver.stored:
            answer.peer.helped_s = time.monotonic()
        else:
            self._forget(namespace, block_hashes)
        return receiver.stored

    async def _ask(self, namespace: str, block_hashes: bytes, *, within_s: float = ASK_S) -> _Answer | None:
        key: BlockKey = block_keys(namespace, block_hashes[:HASH_BYTES])[0]
        now_s = time.monotonic()
        known = self._answers.get(key)
        if known is not None and known.until_s > now_s:
            blocks = min(known.blocks, len(block_hashes) // HASH_BYTES)
            return replace(known, blocks=blocks) if blocks else None
        asked = self._best_first()[:MAX_ASKED]
        if not asked:
            return None
        request = pb.MatchRequest(namespace=namespace, block_hashes=block_hashes)
        counts = await asyncio.gather(*(self._ask_one(peer, request, within_s) for peer in asked))
        blocks, peer = max(zip(counts, asked, strict=True), key=lambda each: each[0])
        answer = _Answer(peer, blocks, now_s + _REMEMBER_S)
        while len(self._answers) >= _REMEMBERED:
            del self._answers[next(iter(self._answers))]
        self._answers[key] = answer
        return answer if blocks else None

    async def _ask_one(self, peer: Peer, request: pb.MatchRequest, within_s: float) -> int:
        try:
            return (await peer.stub.Match(request, timeout=within_s)).available
        except grpc.aio.AioRpcError as error:
            self._note_failure(peer, error)
            return 0

    def _best_first(self) -> list[Peer]:
        now_s = time.monotonic()
        awake = [peer for peer in self._peers.values() if peer.paused_until_s <= now_s]
        self._random.shuffle(awake)
        return sorted(awake, key=lambda peer: -peer.helped_s)

    def _note_failure(self, peer: Peer, error: grpc.aio.AioRpcError) -> None:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            peer.paused_until_s = time.monotonic() + _PAUSE_S
        log.info("kv_peer_failed", extra={"node": peer.node, "code": error.code().name})

    def _forget(self, namespace: str, block_hashes: bytes) -> None:
        self._answers.pop(block_keys(namespace, block_hashes[:HASH_BYTES])[0], None)

    def _close(self, peer: Peer) -> None:
        task = asyncio.create_task(peer.channel.close(_CLOSING_S))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
