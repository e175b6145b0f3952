"""Under mTLS a service may call what is written for it, and nothing else.

The methods come from the server's reflection and its services from all generated code, so that a new
RPC is refused to everyone until somebody writes down who may call it.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
import trustme

from tests.service.reflected_methods import reflected_methods
from trireme.runtime.health import HealthReporter
from trireme.runtime.service_rights import CALLERS, OPERATOR, RIGHTS, WORKER, certificate_names
from trireme.runtime.serving import Register, grpc_server
from trireme.wire.bus.v1 import facts_pb2

FLEET = "boats"
OF_CLIENTS = ("Inference", "GRPCInferenceService")
"""The gateway's services, which ask for API keys."""
AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)


def inner_services() -> tuple[list[Register], list[str]]:
    """Every generated service that no client calls, without any code behind it."""
    registrations: list[Register] = []
    names: list[str] = []
    root = Path(facts_pb2.__file__).parents[2]
    for path in sorted(Path(root).rglob("*_pb2.py")):
        module = ".".join(("trireme.wire", *path.relative_to(root).with_suffix("").parts))
        messages = importlib.import_module(module)
        generated = importlib.import_module(f"{module}_grpc")
        for service in messages.DESCRIPTOR.services_by_name.values():
            if service.name not in OF_CLIENTS:
                servicer = getattr(generated, f"{service.name}Servicer")()
                add = getattr(generated, f"add_{service.name}Servicer_to_server")
                registrations.append(partial(add, servicer))
                names.append(service.full_name)
    return registrations, names


@asynccontextmanager
async def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    own = AUTHORITY.issue_cert(FLEET, key_type=trustme.KeyType.ECDSA)
    AUTHORITY.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "cert.pem").write_bytes(own.cert_chain_pems[0].bytes())
    (folder / "key.pem").write_bytes(own.private_key_pem.bytes())
    for name in ("cert", "key", "ca"):
        monkeypatch.setenv(f"TRIREME_TLS_{name.upper()}", str(folder / f"{name}.pem"))
    monkeypatch.setenv("TRIREME_TLS_NAME", FLEET)
    registrations, names = inner_services()
    health = HealthReporter({})
    async with grpc_server(
        "127.0.0.1:0", registrations, service_names=names, health=health, drain_s=0.0
    ) as address:
        yield address


def channel_of(address: str, *names: str) -> grpc.aio.Channel:
    """A channel that shows a certificate of these names."""
    own = AUTHORITY.issue_cert(*names, key_type=trustme.KeyType.ECDSA)
    ca = AUTHORITY.cert_pem.bytes()
    key, chain = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    options = [("grpc.ssl_target_name_override", FLEET)]
    return grpc.aio.secure_channel(address, credentials, options)


async def refusal(channel: grpc.aio.Channel, method: str) -> str | None:
    """Why the caller may not call the method; None: it may."""
    call = channel.unary_stream(method)(b"", timeout=60.0)
    try:
        answered = await call.read()
    except grpc.aio.AioRpcError as error:
        return error.details() if error.code() is grpc.StatusCode.PERMISSION_DENIED else None
    finally:
        call.cancel()
    assert answered is not None
    return None


async def test_each_service_may_call_what_is_written_for_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(served(tmp_path, monkeypatch))
        callers = {
            service: await stack.enter_async_context(channel_of(address, *certificate_names(FLEET, service)))
            for service in CALLERS
        }
        nobody = await stack.enter_async_context(
            channel_of(address, FLEET, "*.boats", "worker.trireme", "gateway")
        )
        methods = await reflected_methods(callers[OPERATOR])
        assert set(methods) == set(RIGHTS)
        for method in methods:
            may = RIGHTS[method]
            for service, channel in callers.items():
                said = await refusal(channel, method)
                assert (said is None) == (may is None or service in may), (service, method, said)
            said = await refusal(nobody, method)
            assert (said is None) == (may is None), method
            if said is not None:
                assert method in said and "names no service" in said
                assert all(f"{service}.{FLEET}" in said for service in may or ())


async def test_a_certificate_of_several_services_has_the_rights_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        served(tmp_path, monkeypatch) as address,
        channel_of(address, *certificate_names(FLEET)) as everyone,
    ):
        assert [method for method in RIGHTS if await refusal(everyone, method) is not None] == []


async def test_an_rpc_that_nobody_wrote_down_is_refused_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "/trireme.wire.worker.v1.Worker/Drain"
    monkeypatch.delitem(RIGHTS, method)  # type: ignore[arg-type]
    async with (
        served(tmp_path, monkeypatch) as address,
        channel_of(address, *certificate_names(FLEET)) as everyone,
    ):
        said = await refusal(everyone, method)
        assert said is not None and "nobody may call it" in said


def test_every_caller_has_some_right() -> None:
    named = set().union(*(may or () for may in RIGHTS.values()))
    assert named <= set(CALLERS)
    assert {WORKER, OPERATOR} <= named
