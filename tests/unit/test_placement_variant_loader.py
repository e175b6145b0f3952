"""What placement asks a worker to load is what fleet.yaml says of the variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from trireme.placement.variant_loader import VariantLoader
from trireme.runtime.fleet import load_fleet
from trireme.wire.worker.v1 import worker_pb2, worker_pb2_grpc
from trireme.worker.variant_plan import plan_from_request, plans_of

FLEET = """
models:
  m:
    variants:
      v: {checkpoint: here, precision: int4_g32_zeros, dtype: bfloat16, kv_dtype: fp8, kv_mib: 3}
workers: [{variants: [v]}]
"""
FIELDS = ("variant", "model", "checkpoint", "precision", "dtype", "kv_dtype", "kv_bytes", "max_sequences")


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
    try:
        await VariantLoader(fleet).load(f"127.0.0.1:{port}", "v")
    finally:
        await server.stop(None)
    [group] = fleet.workers
    [request] = asked
    [at_start] = plans_of(fleet, group)
    later = plan_from_request(request, group, block_tokens=fleet.block_tokens)
    assert {name: getattr(later, name) for name in FIELDS} == {
        name: getattr(at_start, name) for name in FIELDS
    }
    assert (later.precision, later.dtype, later.kv_dtype) == ("int4_g32_zeros", "bfloat16", "fp8")
