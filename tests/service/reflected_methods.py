"""The RPCs of a running server, as its reflection describes them."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc


async def reflected_methods(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> list[str]:
    """Full names of every RPC of every service."""
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=metadata)

    async def ask(**what: str) -> Any:
        await call.write(reflection_pb2.ServerReflectionRequest(**what))
        return await call.read()

    listed = (await ask(list_services="")).list_services_response.service
    methods = []
    for service in listed:
        answer = await ask(file_containing_symbol=service.name)
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(raw)
            for one in file.service:
                if f"{file.package}.{one.name}" == service.name:
                    methods += [f"/{service.name}/{method.name}" for method in one.method]
    call.cancel()
    return methods
