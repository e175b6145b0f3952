"""Asks workers to load and unload variants."""

from __future__ import annotations

import grpc

from trireme.errors import ModelNotFound, ServiceUnavailable, TriremeError
from trireme.runtime.fleet import Fleet
from trireme.runtime.tls import open_channel
from trireme.wire.worker.v1 import worker_pb2, worker_pb2_grpc

LOAD_TIMEOUT_S = 600.0


class VariantLoader:
    """The worker's control calls, with a variant's place and limits from fleet.yaml."""

    failures = (grpc.RpcError, TriremeError)
    """What `load`, `unload` and `drain` raise."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def load(self, address: str, variant: str) -> None:
        """Returns when the variant can be asked for at the worker.

        Raises:
            ModelNotFound: fleet.yaml has no such variant.
            grpc.RpcError: the worker could not load it.
        """
        known = [name for model in self._fleet.models.values() for name in model.variants]
        if variant not in known:
            message = f"no variant {variant!r}: fleet.yaml has {', '.join(known)}"
            raise ModelNotFound(message, param="variant")
        wanted = self._fleet.variant(variant)
        request = worker_pb2.LoadVariantRequest(
            variant=variant,
            model=self._fleet.model_of(variant),
            checkpoint=str(wanted.checkpoint),
            dtype=wanted.dtype,
            precision=wanted.precision,
            kv_dtype=wanted.kv_dtype,
            kv_bytes=wanted.kv_mib * 2**20,
            max_sequences=wanted.max_sequences,
            speculate=str(wanted.speculate),
            draft="" if wanted.draft is None else str(wanted.draft),
            draft_beside=wanted.draft_beside,
            draft_branches=wanted.draft_branches,
        )
        async with open_channel(_reachable(address)) as channel:
            await worker_pb2_grpc.WorkerStub(channel).LoadVariant(request, timeout=LOAD_TIMEOUT_S)

    async def unload(self, address: str, variant: str) -> None:
        """Returns when the variant's requests ended and it is freed."""
        request = worker_pb2.UnloadVariantRequest(variant=variant)
        async with open_channel(_reachable(address)) as channel:
            await worker_pb2_grpc.WorkerStub(channel).UnloadVariant(request, timeout=LOAD_TIMEOUT_S)

    async def drain(self, address: str, *, timeout_s: float) -> None:
        """Returns when the worker's requests ended or `timeout_s` passed."""
        request = worker_pb2.DrainRequest(timeout_s=timeout_s)
        async with open_channel(_reachable(address)) as channel:
            await worker_pb2_grpc.WorkerStub(channel).Drain(request, timeout=timeout_s + 5.0)

    @staticmethod
    def explain(error: Exception) -> str:
        """One sentence for one of `failures`."""
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        return str(error)


def _reachable(address: str) -> str:
    if not address:
        raise ServiceUnavailable("the worker has not registered yet: try again")
    return address
