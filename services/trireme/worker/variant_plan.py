"""What a variant needs to be loaded, from the fleet's file or from placement's request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trireme.errors import InvalidConfiguration, InvalidRequest
from trireme.quant.precisions import AUTO, FLOATS
from trireme.runtime.fleet import Fleet, Variant, WorkerGroup, checked_variant
from trireme.wire.worker.v1 import worker_pb2 as pb

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantPlan:
    """What to load."""

    variant: str
    model: str
    checkpoint: Path
    device: str
    """cpu, cuda:N, or null for the model that answers without computing."""
    dtype: str
    """One of `DTYPES`: what is computed in."""
    kv_bytes: int
    """KV cache to reserve."""
    block_tokens: int
    max_sequences: int
    max_batch_tokens: int
    policy: str
    """The engine's iteration policy."""
    learns_quanta: bool = False
    """Of mlfq: its levels follow the demand."""
    swap_bytes: int = 0
    """Host memory for the KV of preempted sequences."""
    precision: str = AUTO
    """Of the linear layers' weights: one of `quant.precisions`."""
    speculate: Literal["off", "auto"] | int = "off"
    """Tokens drafted per sequence and step."""
    draft: Path | None = None
    """Checkpoint of the model that drafts."""
    draft_beside: bool = False
    """It runs beside the target."""
    draft_branches: int = 1
    """Continuations of one token that are drafted."""
    kv_dtype: str = AUTO
    """What keys and values are stored as: one of `KV_DTYPES`."""
    decode_graphs: bool = True
    """Steps that only decode are replayed from CUDA graphs."""

    @property
    def queue_limit(self) -> int:
        """Requests that this variant's engine should hold beyond its batch.

        Where whoever came first runs first, a few keep it from idling, and all others wait in the
        scheduler's fair order: in front of a batch of eight, one is an eighth of a request's time that a
        tenant under its share waits behind a flood. mlfq can put short ones first only among those that it
        knows, and one that has not started costs no KV. The price is fairness between tenants: so many
        requests are taken out of the fair order when they are handed over, so a tenant that floods an idle
        fleet gets that much work ahead of the others, once; what follows is handed over by fair shares again.
        """
        if self.policy == "mlfq":
            return max(64, 8 * self.max_sequences)
        return min(4, max(1, self.max_sequences // 8))


def dtype_of(dtype: str, precision: str) -> str:
    """The type that is computed in: one of `DTYPES`. Weights that are not quantized say it themselves."""
    return FLOATS.get(precision, dtype) if dtype == AUTO else dtype


def plans_of(fleet: Fleet, group: WorkerGroup) -> list[VariantPlan]:
    """What a worker of the group loads at start."""
    return [
        _plan(name, fleet.model_of(name), fleet.variant(name), group, block_tokens=fleet.block_tokens)
        for name in fleet.served_by(group)
    ]


def plan_from_request(
    request: pb.LoadVariantRequest, group: WorkerGroup, *, block_tokens: int
) -> VariantPlan:
    """What placement asks this worker to load: what fleet.yaml may say of a variant, under the same rules.

    Raises:
        InvalidRequest: a field is missing or malformed, or two do not fit together.
    """
    if not request.variant or not request.checkpoint:
        raise InvalidRequest("variant and checkpoint are required", param="variant")
    try:
        variant = checked_variant(
            {
                "checkpoint": request.checkpoint,
                "precision": request.precision or AUTO,
                "dtype": request.dtype or AUTO,
                "kv_dtype": request.kv_dtype or AUTO,
                "max_sequences": request.max_sequences,
                "speculate": request.speculate or "off",
                "draft": request.draft or None,
                "draft_beside": request.draft_beside,
                "draft_branches": request.draft_branches or 1,
            }
        )
    except InvalidConfiguration as error:
        raise InvalidRequest(error.message, param=error.param) from error
    plan = _plan(request.variant, request.model or request.variant, variant, group, block_tokens=block_tokens)
    return replace(plan, kv_bytes=request.kv_bytes) if request.kv_bytes else plan


def _plan(name: str, model: str, variant: Variant, group: WorkerGroup, *, block_tokens: int) -> VariantPlan:
    sequences = variant.max_sequences or group.max_sequences
    return VariantPlan(
        variant=name,
        model=model,
        checkpoint=variant.checkpoint,
        device=group.device,
        dtype=dtype_of(variant.dtype, variant.precision),
        precision=variant.precision,
        kv_dtype=variant.kv_dtype,
        speculate=variant.speculate,
        draft=variant.draft,
        draft_beside=variant.draft_beside,
        draft_branches=variant.draft_branches,
        kv_bytes=(variant.kv_mib or group.kv_mib) * 2**20,
        block_tokens=block_tokens,
        max_sequences=sequences,
        max_batch_tokens=max(group.max_batch_tokens, sequences),
        policy=group.policy,
        learns_quanta=group.mlfq_levels == "demand",
        swap_bytes=group.swap_mib * 2**20,
        decode_graphs=group.decode_graphs,
    )
