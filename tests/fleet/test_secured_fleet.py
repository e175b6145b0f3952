"""A fleet whose file turns on keys and certificates, and the commands that its operator runs on it."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from tests.conftest import free_port
from tests.fleet.conftest import REPOSITORY, Fleet, running
from trireme.cli.__main__ import app
from trireme.cli.fleet_processes import local_address
from trireme.cli.tls_directory import Pair, TlsDirectory

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class Secured:
    """The fleet, and what opens it."""

    fleet: Fleet
    tls: TlsDirectory
    keys: dict[str, str]
    """By tenant."""

    def run(self, tenant: str, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """A command on this fleet, with the tenant's key and nothing else to help it."""
        environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
        environ |= {"TRIREME_API_KEY": self.keys[tenant]} if tenant else {}
        arguments = [sys.executable, "-m", "trireme.cli", *words, "--run-dir", str(self.fleet.run_dir)]
        return subprocess.run(
            arguments, env=environ, capture_output=True, text=True, timeout=170, input=given
        )

    def seen_well(self) -> dict[str, Any]:
        """What `trireme status` shows once all services answer: one that is late is not waited for."""
        deadline_s = time.monotonic() + 60
        while True:
            seen: dict[str, Any] = json.loads(self.run("", "status", "--json").stdout)
            if {service["health"] for service in seen["services"]} == {"SERVING", "up"}:
                return seen
            assert time.monotonic() < deadline_s, seen
            time.sleep(0.5)


def trireme(*words: str) -> str:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    keys_file, tls = directory / "keys.yaml", directory / "tls"
    keys = {
        tenant: trireme("keys", "new", "--tenant", tenant, "--file", str(keys_file)).strip()
        for tenant in ("acme", "operator")
    }
    document = yaml.safe_load(keys_file.read_text())
    document["tenants"]["operator"]["roles"] = ["admin"]
    keys_file.write_text(yaml.safe_dump(document))
    trireme("tls", "new", str(tls))
    changes = {
        "gateway": {
            "replicas": 1,
            "keys": "keys.yaml",
            "operator": f"127.0.0.1:{free_port()}",
            "http": f"0.0.0.0:{free_port()}",  # As where other machines are clients.
        },
        "scheduler": {"replicas": 1},
        "tls": {"directory": "tls", "client_certificates": True},
    }
    with running(directory, replicas=1, kv_mib=32, changes=changes) as fleet:
        yield Secured(fleet, TlsDirectory(tls), keys)


def test_the_operators_commands_need_no_more_than_a_key(secured: Secured, tmp_path: Path) -> None:
    seen = secured.seen_well()
    assert seen["http_scheme"] == "https" and seen["groups"][0]["ready"] == 1

    refused = secured.run("", "generate", "import os", "--model", "py", "--max-tokens", "4")
    assert refused.returncode == 1 and "API key" in refused.stderr
    told = secured.run("acme", "generate", "import os", "--model", "py", "--max-tokens", "4")
    assert told.returncode == 0 and "4 new" in told.stderr, told.stderr
    talk = secured.run("acme", "chat", "--model", "py", "--max-tokens", "4", given="hello\n")
    assert talk.returncode == 0 and "4 new" in talk.stderr, talk.stderr

    for api in ("grpc", "openai"):
        figures = tmp_path / f"{api}.json"
        load = ["--api", api, "--model", "py", "--requests", "4", "--answer-tokens", "4"]
        run = secured.run("acme", "bench", *load, "--output", str(figures))
        assert run.returncode == 0, run.stderr
        assert json.loads(figures.read_text())["failed"] == 0


def test_the_doctor_reads_metrics_over_tls(secured: Secured, tmp_path: Path) -> None:
    bundle = tmp_path / "fleet.tar.gz"
    shown = secured.run("operator", "doctor", "--json", "--bundle", str(bundle))
    codes = {finding["code"] for finding in json.loads(shown.stdout)}
    assert not codes & {"metrics_hidden", "does_not_answer", "gateway_gone"}, shown.stdout
    with tarfile.open(bundle) as papers:
        page = papers.extractfile("fleet/metrics/gateway-0.txt")
        assert page is not None and b"trireme_gateway_requests_total" in page.read()
    shown = secured.run("acme", "doctor", "--json")
    (hidden,) = [f for f in json.loads(shown.stdout) if f["code"] == "metrics_hidden"]
    assert "gateway-0: it wants a key with the role metrics" in hidden["seen"][0]


def channel(address: str, believes: Path, pair: Pair | None, name: str) -> grpc.aio.Channel:
    own = (pair.key.read_bytes(), pair.cert.read_bytes()) if pair is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(believes.read_bytes(), *own)
    return grpc.aio.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])


async def test_strangers_reach_neither_edge(secured: Secured) -> None:
    outer, inner = secured.tls.authority.cert, secured.tls.services_authority.cert
    address = secured.fleet.grpc[0]
    (worker,) = await secured.fleet.ready_workers(1)

    async def status(opened: grpc.aio.Channel) -> int:
        async with opened as used:
            stub = health_pb2_grpc.HealthStub(used)
            return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status)

    serving = health_pb2.HealthCheckResponse.SERVING
    assert await status(channel(address, outer, secured.tls.client, "localhost")) == serving
    services = secured.tls.services
    assert await status(channel(worker.grpc_address, inner, services, "trireme")) == serving
    for stranger in (
        channel(address, outer, None, "localhost"),
        grpc.aio.insecure_channel(address),
        channel(worker.grpc_address, inner, secured.tls.client, "trireme"),
        channel(worker.grpc_address, inner, None, "trireme"),
        grpc.aio.insecure_channel(worker.grpc_address),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await status(stranger)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

    context = ssl.create_default_context(cafile=outer)
    context.load_cert_chain(secured.tls.client.cert, secured.tls.client.key)
    http = local_address(secured.fleet.http[0])
    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {secured.keys['acme']}"}
        async with session.get(f"https://{http}/v1/models", ssl=context, headers=headers) as answer:
            assert answer.status == 200
        async with session.get(f"https://{http}/v1/models", ssl=context) as answer:
            assert answer.status == 401
        page = secured.fleet.state["operator"]
        async with session.get(f"https://{page}/", ssl=context) as answer:
            assert answer.status == 401
        for url in (f"http://{http}/v1/models", f"http://{page}/"):
            with pytest.raises(aiohttp.ClientError):
                await session.get(url)
        with pytest.raises(aiohttp.ClientError):  # No certificate: with TLS 1.3 the first read tells.
            await session.get(f"https://{http}/v1/models", ssl=ssl.create_default_context(cafile=outer))


async def test_renewed_certificates_are_taken_up_while_it_runs(secured: Secured) -> None:
    before = await asyncio.to_thread(shown_by, secured)
    await asyncio.to_thread(trireme, "tls", "renew", str(secured.tls.path))
    assert await asyncio.to_thread(shown_by, secured) != before
    told = await asyncio.to_thread(
        secured.run, "acme", "generate", "import os", "--model", "py", "--max-tokens", "4"
    )
    assert told.returncode == 0, told.stderr
    await asyncio.to_thread(secured.seen_well)


def shown_by(secured: Secured) -> str:
    """The certificate that the gateway shows in a new handshake."""
    host, _, port = local_address(secured.fleet.http[0]).rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=60)
