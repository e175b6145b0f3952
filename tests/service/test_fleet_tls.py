"""A fleet that trusts nobody: mTLS between services, TLS to clients, Redis with TLS and passwords."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import trustme
import yaml
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from tests.conftest import free_port
from tests.service.gateway_fleet import CHECKPOINT
from tests.service.processes import service
from tests.service.reflected_methods import reflected_methods
from trireme.bus.connection import Keys, open_redis
from trireme.bus.registry import Registry
from trireme.client import ClientTls, Sampling, Summary, TriremeClient
from trireme.errors import TriremeError
from trireme.runtime.service_rights import RIGHTS, certificate_names
from trireme.runtime.tenant_keys import key_digest, new_key
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.placement.v1.placement_pb2 import DrainRequest
from trireme.wire.placement.v1.placement_pb2_grpc import PlacementStub
from trireme.wire.power.v1.power_pb2 import GetLedgerRequest
from trireme.wire.power.v1.power_pb2_grpc import PowerStub

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(400)]

WITHIN_S = 240.0
NAME = "trireme"
SERVICES = ("scheduler", "worker", "kvstore", "gateway", "power", "placement")
INNER = tuple(name for name in SERVICES if name != "gateway")
USERS = (*SERVICES, "tester")
RULES = (
    "resetkeys ~test:* resetchannels -@all "
    "+@read +@write +@scripting +@connection +@transaction +time -@dangerous"
)
"""As docs/security.md gives them."""


@dataclass(frozen=True)
class Secrets:
    """Files of one fleet's certificates."""

    folder: Path
    authority: trustme.CA

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def files(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(self, name: str, *identities: str) -> None:
        """Write a new certificate over the one there may be."""
        self.authority.cert_pem.write_to_path(str(self.ca))
        made = self.authority.issue_cert(*identities)
        cert, key = self.files(name)
        staged = cert.with_suffix(".new"), key.with_suffix(".newkey")
        staged[0].write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        staged[1].write_bytes(made.private_key_pem.bytes())
        staged[1].replace(key)
        staged[0].replace(cert)


def fleet_environ(secrets: Secrets, name: str) -> dict[str, str]:
    cert, key = secrets.files(name)
    return {
        "TRIREME_TLS_CERT": str(cert),
        "TRIREME_TLS_KEY": str(key),
        "TRIREME_TLS_CA": str(secrets.ca),
        "TRIREME_TLS_NAME": NAME,
    }


@asynccontextmanager
async def tls_in_front(secrets: Secrets, port: int, behind: int) -> AsyncIterator[None]:
    """Redis' own build here has no TLS: this ends it, and asks for the client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*secrets.files("redis"))
    context.load_verify_locations(secrets.ca)
    context.verify_mode = ssl.CERT_REQUIRED

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
    try:
        yield
    finally:
        server.close()


class World:
    """The six services, each with a certificate, a Redis user and a password of its own."""

    def __init__(self, folder: Path, secrets: Secrets, redis_port: int) -> None:
        self.folder, self.secrets, self.redis_port = folder, secrets, redis_port
        self.key = new_key()
        self.records: dict[str, ProcessRecord] = {}
        self.gateway_ports = free_port(3)

    def redis_url(self, name: str) -> str:
        cert, key = self.secrets.files(name)
        query = f"ssl_ca_certs={self.secrets.ca}&ssl_certfile={cert}&ssl_keyfile={key}"
        password = f"password_file={self.folder / f'{name}.password'}"
        return f"rediss://{name}@127.0.0.1:{self.redis_port}/0?{query}&{password}"

    def start(self, stack: ExitStack, name: str, **settings: object) -> None:
        log = self.folder / f"{name}.log"
        environ = fleet_environ(self.secrets, name)
        url = self.redis_url(name)
        stack.enter_context(service(name, log, environ, redis_url=url, bus_prefix="test", **settings))

    async def ready(self) -> None:
        """Until every service has registered and the gateway can answer."""
        async with asyncio.timeout(WITHIN_S), open_redis(self.redis_url("tester")) as redis:
            registry = Registry(redis, Keys("test"))
            while len(self.records) < len(SERVICES) or not self.records["gateway"].healthy:
                self.records = {record.service: record for record in await registry.living()}
                await asyncio.sleep(0.1)

    @property
    def client_tls(self) -> ClientTls:
        return ClientTls(ca=self.secrets.ca)

    def client(self, **more: Any) -> TriremeClient:
        address = f"localhost:{self.gateway_ports}"
        usual = {"api_key": self.key, "tls": self.client_tls, "retry_s": 60.0}
        return TriremeClient([address], **usual | more)

    async def ask(self) -> Summary:
        """A prompt long enough for whole blocks to be kept."""
        async with self.client() as client:
            prompt = [index % 1000 for index in range(200)]
            sampling = Sampling(max_tokens=4, temperature=0.0)
            async for event in client.generate("py", prompt, sampling):
                if isinstance(event, Summary):
                    return event
        raise AssertionError("no summary")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("tls")


@pytest.fixture
async def world(redis_url: str, folder: Path) -> AsyncIterator[World]:
    secrets = Secrets(folder, trustme.CA())
    for name in SERVICES:
        secrets.issue(name, *certificate_names(NAME, name))
    secrets.issue("operator", *certificate_names(NAME, "operator"))
    secrets.issue("tester", NAME)
    for name in USERS:
        (folder / f"{name}.password").write_text(f"of-{name}\n")
    secrets.issue("redis", "127.0.0.1")
    secrets.issue("front", "localhost")
    behind = int(re.findall(r":(\d+)/", redis_url)[0])
    made = World(folder, secrets, free_port())
    (folder / "fleet.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "test",
                "models": {"py": {"variants": {"py-1m": {"checkpoint": str(CHECKPOINT)}}}},
                "workers": [{"name": "worker", "kv_mib": 16, "max_sequences": 4}],
            }
        )
    )
    keys = {"tenants": {"acme": {"keys": [{"id": "one", "sha256": key_digest(made.key)}]}}}
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    fleet = folder / "fleet.yaml"
    front_cert, front_key = secrets.files("front")
    async with tls_in_front(secrets, made.redis_port, behind), Redis.from_url(redis_url) as admin:
        for name in USERS:
            await admin.execute_command("ACL", "SETUSER", name, "on", f">of-{name}", *RULES.split())
        await admin.execute_command("ACL", "SETUSER", "default", "resetpass", "off")
        with ExitStack() as stack:
            where = {"directory": folder / "ssd", "arena_directory": folder, "dram_mib": 16, "ssd_mib": 0}
            made.start(stack, "scheduler")
            made.start(stack, "kvstore", fleet=fleet, **where)
            made.start(stack, "worker", fleet=fleet, index=0)
            made.start(stack, "power", fleet=fleet)
            made.start(stack, "placement", fleet=fleet, run_dir=folder, supervise=False)
            made.start(
                stack,
                "gateway",
                fleet=fleet,
                keys=folder / "keys.yaml",
                tls_cert=front_cert,
                tls_key=front_key,
                grpc_listen=f"localhost:{made.gateway_ports}",
                http_listen=f"localhost:{made.gateway_ports + 1}",
                metrics_listen=f"127.0.0.1:{made.gateway_ports + 2}",
            )
            await made.ready()
            yield made


async def health(channel: grpc.aio.Channel) -> int:
    async with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=60.0)).status)


def channel_with(address: str, ca: bytes, pair: tuple[bytes, bytes] | None) -> grpc.aio.Channel:
    cert, key = pair if pair is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(address, credentials, [("grpc.ssl_target_name_override", NAME)])


def serial_shown(address: str, secrets: Secrets) -> int:
    """Of the certificate that a service shows in a new handshake."""
    context = ssl.create_default_context(cafile=str(secrets.ca))
    context.load_cert_chain(*secrets.files("tester"))
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=60) as raw,
        context.wrap_socket(raw, server_hostname=NAME) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


async def test_services_and_clients_meet_under_tls_alone(world: World) -> None:
    summary = await world.ask()
    assert summary.worker_id == world.records["worker"].id

    # The worker reached its store: what is measured there came over the inner RPCs.
    async with asyncio.timeout(WITHIN_S):
        while not (await asyncio.to_thread(metric, world.records["kvstore"], "trireme_kv_committed_total")):
            await asyncio.sleep(0.2)

    # Health and measurements have a port of their own, in plaintext.
    for path in ("livez", "readyz", "metrics"):
        url = f"http://127.0.0.1:{world.gateway_ports + 2}/{path}"
        assert await asyncio.to_thread(status_of, url) == 200

    own = tuple(path.read_bytes() for path in world.secrets.files("tester"))
    foreign = trustme.CA()
    stranger = foreign.issue_cert(NAME)
    theirs = (stranger.cert_chain_pems[0].bytes(), stranger.private_key_pem.bytes())
    ca = world.secrets.ca.read_bytes()
    for name in INNER:
        address = world.records[name].grpc_address
        assert await health(channel_with(address, ca, own)) == health_pb2.HealthCheckResponse.SERVING
        for refused in (
            channel_with(address, ca, None),
            channel_with(address, ca, theirs),
            channel_with(address, foreign.cert_pem.bytes(), own),
            grpc.aio.insecure_channel(address),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await health(refused)
            assert failure.value.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )

    # The front: TLS without a client's certificate, and a key.
    context = ssl.create_default_context(cafile=str(world.secrets.ca))
    url = f"https://localhost:{world.gateway_ports + 1}/v1/models"
    async with aiohttp.ClientSession() as http:
        async with http.get(url, ssl=context, headers={"Authorization": f"Bearer {world.key}"}) as response:
            assert response.status == 200
        async with http.get(url, ssl=context) as response:
            assert response.status == 401
        with pytest.raises(aiohttp.ClientError):
            await http.get(url.replace("https", "http"))
    with pytest.raises(TriremeError):
        async with world.client(tls=ClientTls(enabled=False), retry_s=0.5) as client:
            await client.list_models()

    # Redis: no user, no way in; and none to other fleets' keys.
    async with open_redis(world.redis_url("tester")) as redis:
        with pytest.raises(Exception, match=r"(?i)permission"):
            await redis.get("other:requests")
        with pytest.raises(Exception, match=r"(?i)permission"):
            await redis.flushall()

    # New certificates are shown without a restart, also where clients come in, and calls go on.
    inner = {name: world.records[name].grpc_address for name in ("worker", "kvstore")}
    before = {name: serial_shown(address, world.secrets) for name, address in inner.items()}
    for name in SERVICES:
        world.secrets.issue(name, *certificate_names(NAME, name))
    world.secrets.issue("front", "localhost")
    for name, serial in before.items():
        shown = await asyncio.to_thread(serial_shown, inner[name], world.secrets)
        assert shown != serial
    assert (await world.ask()).usage.completion_tokens == 4
    async with aiohttp.ClientSession() as http, http.get(url, ssl=context) as response:
        assert response.status == 401

    await each_service_has_its_own_rights(world)
    for name in SERVICES:  # The rules of Redis' users suffice for all that was asked above.
        assert "NOPERM" not in (world.folder / f"{name}.log").read_text(), name


async def each_service_has_its_own_rights(world: World) -> None:
    """By the certificates of the running fleet; ends with the worker drained through placement."""

    def channel(caller: str, to: str) -> grpc.aio.Channel:
        own = tuple(path.read_bytes() for path in world.secrets.files(caller))
        return channel_with(world.records[to].grpc_address, world.secrets.ca.read_bytes(), own)

    async def code(caller: str, to: str, method: str) -> grpc.StatusCode:
        async with channel(caller, to) as opened:
            call = opened.unary_stream(method)(b"", timeout=WITHIN_S)
            with suppress(grpc.aio.AioRpcError):
                await call.read()
                call.cancel()
            return await call.code()

    for to in INNER:
        async with channel("operator", to) as opened:
            methods = await reflected_methods(opened)
        for method in set(methods) - {name for name, may in RIGHTS.items() if may is None}:
            assert method in RIGHTS, "nobody may call it: write down who may"
            assert await code("tester", to, method) is grpc.StatusCode.PERMISSION_DENIED, method

    worker, scheduler = "/trireme.wire.worker.v1.Worker/", "/trireme.wire.scheduler.v1.Scheduler/"
    kvstore = "/trireme.wire.kvstore.v1.KvStore/"
    for caller, to, method in (
        ("worker", "scheduler", f"{scheduler}Explain"),
        ("worker", "worker", f"{worker}Drain"),
        ("kvstore", "worker", f"{worker}Connect"),
        ("kvstore", "kvstore", f"{kvstore}Reserve"),
        ("gateway", "kvstore", f"{kvstore}Acquire"),
        ("power", "worker", f"{worker}UnloadVariant"),
    ):
        assert await code(caller, to, method) is grpc.StatusCode.PERMISSION_DENIED, (caller, method)
    assert (
        await code("operator", "scheduler", f"{scheduler}GetQueue") is not grpc.StatusCode.PERMISSION_DENIED
    )

    async with channel("operator", "power") as opened, asyncio.timeout(WITHIN_S):
        while not (await PowerStub(opened).GetLedger(GetLedgerRequest())).devices:
            await asyncio.sleep(0.2)
    worker_id = world.records["worker"].id
    async with channel("operator", "placement") as opened:
        await PlacementStub(opened).Drain(DrainRequest(worker_id=worker_id), timeout=WITHIN_S)
    async with asyncio.timeout(WITHIN_S), open_redis(world.redis_url("tester")) as redis:
        registry = Registry(redis, Keys("test"))
        while any(
            record.id == worker_id and not record.worker.draining for record in await registry.living()
        ):
            await asyncio.sleep(0.1)


def metric(record: ProcessRecord, name: str) -> float:
    with urllib.request.urlopen(f"http://{record.http_address}/metrics", timeout=60) as response:
        found = re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def status_of(url: str) -> int:
    with urllib.request.urlopen(url, timeout=60) as response:
        return int(response.status)
