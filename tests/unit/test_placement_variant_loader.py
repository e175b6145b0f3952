"""What placement asks a worker to load is what fleet.yaml says of the variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from trireme.errors import InvalidConfiguration, InvalidRequest
from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.fleet import WorkerGroup, load_fleet
from trireme.wire.worker.v1 import worker_pb2, worker_pb2_grpc
from trireme.worker.variant_plan import plan_from_request, plans_of

FLEET = """
models:
  m:
    variants:
      few_bits: {checkpoint: here, precision: int4_g32_zeros, dtype: bfloat16, kv_dtype: fp8, kv_mib: 3}
      drafting: {checkpoint: here, speculate: auto, draft: small, draft_beside: true, max_sequences: 5}
      repeating: {checkpoint: here, speculate: 4, draft_branches: 3}
      plain: {checkpoint: here}
workers:
  - variants: [few_bits, drafting, repeating, plain]
    policy: mlfq
    mlfq_levels: demand
    swap_mib: 7
    decode_graphs: false
"""


async def test_a_variant_that_is_loaded_later_is_the_one_of_the_start(tmp_path: Path) -> None:
    asked: list[worker_pb2.LoadVariantRequest] = []

    class Worker(worker_pb2_grpc.WorkerServicer):
        async def LoadVariant(self, request: Any, context: Any) -> Any:
            asked.append(request)
            return worker_pb2.LoadVariantResponse()

    (tmp_path / "fleet.yaml").write_text(FLEET)
    fleet = load_fleet(tmp_path / "fleet.yaml")
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Worker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    [group] = fleet.workers
    at_start = plans_of(fleet, group)
    try:
        for plan in at_start:
            await VariantLoader(fleet).load(f"127.0.0.1:{port}", plan.variant)
    finally:
        await server.stop(None)
    later = [plan_from_request(request, group, block_tokens=fleet.block_tokens) for request in asked]
    assert later == at_start
    few_bits, drafting, repeating, plain = later
    assert (few_bits.precision, few_bits.dtype, few_bits.kv_dtype) == ("int4_g32_zeros", "bfloat16", "fp8")
    assert few_bits.kv_bytes == 3 * 2**20
    assert (drafting.speculate, drafting.draft, drafting.draft_beside) == ("auto", tmp_path / "small", True)
    assert drafting.max_sequences == 5
    assert (repeating.speculate, repeating.draft, repeating.draft_branches) == (4, None, 3)
    assert (plain.speculate, plain.draft, plain.draft_beside) == ("off", None, False)
    assert not plain.decode_graphs


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "fp7"},
        {"dtype": "float64"},
        {"kv_dtype": "int4"},
        {"precision": "bf16", "dtype": "float32"},
        {"speculate": "maybe"},
        {"speculate": "0"},
        {"speculate": "65"},
        {"draft": "small"},
        {"draft_branches": 2},
        {"speculate": "auto", "draft_branches": 9},
        {"speculate": "auto", "draft_beside": True},
        {"max_sequences": 1025},
    ],
)
def test_what_the_file_may_not_say_may_not_be_asked_for(values: dict[str, Any], tmp_path: Path) -> None:
    variant = {"checkpoint": "here", **values}
    document = {"models": {"m": {"variants": {"v": variant}}}}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidConfiguration) as in_the_file:
        load_fleet(tmp_path / "fleet.yaml")
    with pytest.raises(InvalidRequest) as asked:
        plan_from_request(
            worker_pb2.LoadVariantRequest(variant="v", **variant), WorkerGroup(), block_tokens=16
        )
    key, _, problem = asked.value.message.partition(": ")
    assert key == asked.value.param
    assert in_the_file.value.message.endswith(problem) and len(problem) > 10


def test_a_request_without_a_name_or_a_place_is_refused() -> None:
    for request in (
        worker_pb2.LoadVariantRequest(checkpoint="here"),
        worker_pb2.LoadVariantRequest(variant="v"),
    ):
        with pytest.raises(InvalidRequest, match="are required"):
            plan_from_request(request, WorkerGroup(), block_tokens=16)
