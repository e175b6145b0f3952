"""The asynchronous client."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from trireme.client.channels import CHANNEL_OPTIONS, Addresses
from trireme.client.credentials import ClientTls, call_metadata, open_gateway
from trireme.client.events import Event, Paused
from trireme.client.requests import Prompt, Sampling, generate_request, slo_class
from trireme.client.results import (
    Classification,
    Embeddings,
    ModelInfo,
    classification_from,
    embeddings_from,
    models_from,
)
from trireme.client.resumption import ResumableAnswer
from trireme.client.status_errors import cut_off, told
from trireme.wire.inference.v1 import inference_pb2 as pb
from trireme.wire.inference.v1.inference_pb2_grpc import InferenceStub

R = TypeVar("R")


class TriremeClient:
    """Calls any of several gateways; what one loses, another goes on with.

    Args:
        addresses: host:port of each gateway's gRPC server.
        retry_s: how long an answer may be without a gateway before its call fails.
        timeout_s: deadline of the calls that are not streams.
        api_key: who calls; None: what TRIREME_API_KEY says.
        tls: how to speak TLS; None: as TRIREME_CLIENT_TLS_* say, or plaintext.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        retry_s: float = 30.0,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._metadata = call_metadata(api_key)
        self._tls = tls
        self._addresses = Addresses(addresses)
        self._retry_s = retry_s
        self._unary_options = {"timeout": timeout_s, "metadata": self._metadata}
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close(None) for channel in channels.values()))

    async def generate(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        session_id: str = "",
        slo: str = "",
        priority: int = 0,
        context_overflow: str = "",
        pinned_tokens: int | None = None,
    ) -> AsyncIterator[Event]:
        """The answer's events as they come. Stop iterating (and close) to cancel the request.

        Args:
            context_overflow: error (as if empty), truncate_oldest or truncate_pinned: what happens
                where prompt and answer outgrow the model's context.
            pinned_tokens: for truncate_pinned: first tokens that stay; None: a chat's system prompt.

        Raises:
            TriremeError: as the fleet said; ServiceUnavailable when no gateway was there for `retry_s`.
        """
        answer = ResumableAnswer(
            generate_request(
                request_id=request_id or f"req-{secrets.token_hex(12)}",
                model=model,
                prompt=prompt,
                sampling=sampling or Sampling(),
                session_id=session_id,
                slo=slo,
                priority=priority,
                context_overflow=context_overflow,
                pinned_tokens=pinned_tokens,
            )
        )
        broken_s: float | None = None
        while not answer.done:
            address = self._addresses.current
            call = self._stub(address).Generate(answer.next_call(), metadata=self._metadata)
            try:
                async for response in call:
                    broken_s = None
                    self._addresses.answered(address)
                    event = answer.take(response)
                    if event is not None:
                        yield event
                if answer.done:
                    return
                error, resumable = cut_off(), True
            except grpc.aio.AioRpcError as failure:
                error, resumable = told(failure)
            finally:
                call.cancel()
            now_s = time.monotonic()
            first = broken_s is None
            broken_s = now_s if broken_s is None else broken_s
            if not (resumable or answer.outlasts(error)) or now_s - broken_s >= self._retry_s:
                raise error
            if first:
                yield Paused(f"the gateway {address} was lost; another one goes on")
            await asyncio.sleep(self._addresses.advance(address))

    async def classify(
        self, model: str, text: str, labels: Sequence[str], *, normalise_length: bool = False, slo: str = ""
    ) -> Classification:
        """Which label continues the text best.

        Raises:
            TriremeError: as the fleet said.
        """
        request = pb.ClassifyRequest(
            model=model,
            text=text,
            labels=labels,
            normalise_length=normalise_length,
            slo_class=slo_class(slo),
        )
        return classification_from(
            await self._unary(lambda stub: stub.Classify(request, **self._unary_options))
        )

    async def embed(self, model: str, texts: Sequence[str], *, slo: str = "") -> Embeddings:
        """One vector per text.

        Raises:
            TriremeError: as the fleet said.
        """
        request = pb.EmbedRequest(model=model, texts=texts, slo_class=slo_class(slo))
        return embeddings_from(await self._unary(lambda stub: stub.Embed(request, **self._unary_options)))

    async def list_models(self) -> list[ModelInfo]:
        """The names that can be asked for, sorted.

        Raises:
            TriremeError: as the fleet said.
        """
        request = pb.ListModelsRequest()
        return models_from(await self._unary(lambda stub: stub.ListModels(request, **self._unary_options)))

    async def cancel(self, request_id: str) -> bool:
        """Stop a request; False where it had ended or was never known.

        Raises:
            TriremeError: as the fleet said.
        """
        request = pb.CancelRequest(request_id=request_id)
        response = await self._unary(lambda stub: stub.Cancel(request, **self._unary_options))
        return bool(response.cancelled)

    async def _unary(self, call: Callable[[Any], Awaitable[R]]) -> R:
        """Call one gateway after the other until one answers or `retry_s` is over."""
        deadline_s = time.monotonic() + self._retry_s
        while True:
            address = self._addresses.current
            try:
                response = await call(self._stub(address))
            except grpc.aio.AioRpcError as failure:
                error, resumable = told(failure)
                if not resumable or time.monotonic() >= deadline_s:
                    raise error from failure
                await asyncio.sleep(self._addresses.advance(address))
            else:
                self._addresses.answered(address)
                return response

    def _stub(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            channel = open_gateway(address, CHANNEL_OPTIONS, self._tls)
            self._channels[address] = channel
        return InferenceStub(channel)
