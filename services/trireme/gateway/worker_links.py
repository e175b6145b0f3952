"""One stream to each living worker: token batches in, confirmations and stops out.

A worker is lost when its stream breaks and one immediate reconnect fails, or when its lease ended
and its stream is broken or silent. It left in order if its last record said that it was draining.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.gateway.metrics import Metrics
from trireme.runtime.serving import MAX_MESSAGE_BYTES
from trireme.runtime.shutdown import end_tasks
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.worker.v1.worker_pb2 import Attach, Confirm, GatewayMessage, Hello, Stop, TokenBatch
from trireme.wire.worker.v1.worker_pb2_grpc import WorkerStub

log = logging.getLogger(__name__)

SCAN_S = 0.5
"""Between two looks at the registry."""
CONNECT_S = 1.0
"""A worker that does not take a connection for so long is taken for broken."""
SILENCE_S = 1.0
"""A worker whose lease ended and whose stream said nothing for so long is lost."""
RETRY_S = 0.5
MAX_OUTGOING = 16384
"""Messages that wait for a worker's stream; what is beyond is lost, as it is where the stream is broken."""


class LinkListener(Protocol):
    """Who hears from the workers. Called on the event loop; must not block."""

    def on_batch(self, worker_id: str, batch: TokenBatch) -> None:
        """News of one engine iteration."""
        ...

    def on_connected(self, worker_id: str) -> None:
        """The stream is new: what came in between may be missing."""
        ...

    def on_lost(self, worker_id: str, *, in_order: bool) -> None:
        """Its requests must be served elsewhere."""
        ...


class WorkerLink:
    """The stream to one worker, kept up until it is closed."""

    def __init__(self, record: ProcessRecord, gateway_id: str, listener: LinkListener) -> None:
        self.worker_id = record.id
        self.record = record
        self.connected = False
        self.heard_s = time.monotonic()
        """When the worker last said something."""
        self.gone_since_s: float | None = None
        """When the registry first lacked it."""
        self._address = record.grpc_address
        self._gateway_id = gateway_id
        self._listener = listener
        self._outgoing: asyncio.Queue[GatewayMessage] = asyncio.Queue(MAX_OUTGOING)
        self._told_lost = False
        self.task = asyncio.create_task(self._run())

    def send(self, message: GatewayMessage) -> None:
        """Put a message on the stream; lost if the stream is broken, or takes nothing for long."""
        if self.connected and not self._outgoing.full():
            self._outgoing.put_nowait(message)

    async def close(self) -> None:
        """End the stream."""
        await end_tasks([self.task])

    def lost(self) -> None:
        """Tell the listener, once per break."""
        if not self._told_lost:
            self._told_lost = True
            self._listener.on_lost(self.worker_id, in_order=self.record.worker.draining)

    async def _run(self) -> None:
        failures = 0
        while True:
            started_s = time.monotonic()
            error = "closed"
            try:
                await self._serve()
            except (grpc.aio.AioRpcError, ConnectionError, TimeoutError) as broken:
                error = broken.details() or "" if isinstance(broken, grpc.aio.AioRpcError) else str(broken)
            finally:
                was_connected, self.connected = self.connected, False
            lasted_s = time.monotonic() - started_s
            failures = 0 if was_connected and lasted_s > RETRY_S else failures + 1
            log.info(
                "worker_stream_broke",
                extra={"worker_id": self.worker_id, "failures": failures, "error": error},
            )
            if failures:
                self.lost()
                await asyncio.sleep(RETRY_S)

    async def _serve(self) -> None:
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        async with open_channel(self._address, options) as channel:
            await _connect(channel)
            self._outgoing = asyncio.Queue(MAX_OUTGOING)
            self._outgoing.put_nowait(GatewayMessage(hello=Hello(gateway_id=self._gateway_id)))
            stub = WorkerStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            call = stub.Connect(self._messages(self._outgoing))
            self.connected = True
            self._told_lost = False
            self.heard_s = time.monotonic()
            log.info("worker_stream_open", extra={"worker_id": self.worker_id})
            self._listener.on_connected(self.worker_id)
            on_batch, worker_id = self._listener.on_batch, self.worker_id
            async for batch in call:
                self.heard_s = time.monotonic()
                on_batch(worker_id, batch)

    @staticmethod
    async def _messages(outgoing: asyncio.Queue[GatewayMessage]) -> AsyncIterator[GatewayMessage]:
        while True:
            yield await outgoing.get()


async def _connect(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is ready; a refused connection is an error at once."""
    async with asyncio.timeout(CONNECT_S):
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                raise ConnectionError("the connection was refused")


class WorkerLinks:
    """The links to all living workers, and what the registry says of the fleet."""

    def __init__(self, registry: Registry, *, gateway_id: str, metrics: Metrics) -> None:
        self._registry = registry
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._links: dict[str, WorkerLink] = {}
        self._records: dict[str, ProcessRecord] = {}
        self._listener: LinkListener | None = None
        self.scanned_s: float | None = None
        """When the registry last answered (monotonic)."""

    def listen(self, listener: LinkListener) -> None:
        """Name who hears from the workers; before `run`."""
        self._listener = listener

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        try:
            while True:
                try:
                    await self.scan()
                except AWAY as error:
                    log.warning("registry_away", extra={"error": str(error)})
                await asyncio.sleep(SCAN_S)
        finally:
            await asyncio.gather(*(link.close() for link in self._links.values()))

    async def scan(self) -> None:
        """Look at the registry now: open links to new workers, give up those that are gone."""
        assert self._listener is not None, "listen() comes before run()"
        records = {record.id: record for record in await self._registry.living()}
        now_s = time.monotonic()
        self.scanned_s = now_s
        self._records = records
        for worker_id, record in records.items():
            if record.service != "worker":
                continue
            link = self._links.get(worker_id)
            if link is None:
                self._links[worker_id] = WorkerLink(record, self._gateway_id, self._listener)
            else:
                link.record = record
                link.gone_since_s = None
        for worker_id, link in list(self._links.items()):
            if worker_id in records:
                continue
            if link.gone_since_s is None:
                link.gone_since_s = now_s
            silent_s = now_s - max(link.heard_s, link.gone_since_s)
            if not link.connected or silent_s >= SILENCE_S:
                del self._links[worker_id]
                link.lost()
                await link.close()
        self._metrics.links.set(sum(link.connected for link in self._links.values()))

    def living(self, service: str) -> list[ProcessRecord]:
        """Processes of a service, as of the last look."""
        return [record for record in self._records.values() if record.service == service]

    def is_registered(self, process_id: str) -> bool:
        """Whether its lease held at the last look."""
        return process_id in self._records

    def is_connected(self, worker_id: str) -> bool:
        """Whether its stream is open."""
        link = self._links.get(worker_id)
        return link is not None and link.connected

    def served_variants(self) -> set[str]:
        """Variants that some worker serves now."""
        return {
            status.variant
            for record in self.living("worker")
            for status in record.worker.variants
            if status.ready and not record.worker.draining
        }

    def attach(self, worker_id: str, request_id: str) -> None:
        """Ask a worker for a request's output from its first token."""
        self._send(worker_id, GatewayMessage(attach=Attach(request_id=request_id)))

    def confirm(self, worker_id: str, request_id: str, received: list[int]) -> None:
        """Tell a worker that it may forget a request."""
        confirm = Confirm(request_id=request_id, received=received, complete=True)
        self._send(worker_id, GatewayMessage(confirm=confirm))

    def stop(self, worker_id: str, request_id: str, *, reason: str, choice: int | None = None) -> None:
        """Stop a request, or one choice; an empty `worker_id` tells every worker."""
        message = GatewayMessage(stop=Stop(request_id=request_id, choice=choice, reason=reason))
        for name in [worker_id] if worker_id else list(self._links):
            self._send(name, message)

    def _send(self, worker_id: str, message: GatewayMessage) -> None:
        link = self._links.get(worker_id)
        if link is not None:
            link.send(message)
