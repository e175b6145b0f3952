"""Which processes `trireme up` runs, with what environment, and in which order they stop."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trireme.cli.redis_server import RedisServer
from trireme.cli.run_directory import MARK, RunDirectory
from trireme.cli.tls_directory import TlsDirectory, check_tls
from trireme.errors import InvalidConfiguration
from trireme.runtime.fleet import Fleet
from trireme.runtime.tenant_keys import load_keys

STOP_RANKS: Mapping[str, tuple[int, float]] = {
    "gateway": (0, 40.0),
    "scheduler": (1, 10.0),
    "placement": (2, 45.0),
    "power": (3, 15.0),
    "kvstore": (3, 15.0),
    "redis": (4, 15.0),
}
"""Service -> (rank, seconds to end in order): clients go first, the bus goes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to keep running."""

    name: str
    service: str
    command: list[str]
    environ: dict[str, str] = field(repr=False)
    grpc_address: str = ""
    """host:port where its health is asked; empty: its lease in the registry is enough."""
    registers: bool = True
    """Whether it keeps a lease in the registry."""

    @property
    def stop_rank(self) -> int:
        return STOP_RANKS.get(self.service, (3, 15.0))[0]

    @property
    def stop_timeout_s(self) -> float:
        return STOP_RANKS.get(self.service, (3, 15.0))[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Everything the supervisor runs."""

    fleet: Fleet
    run_id: str
    bus_prefix: str
    redis_url: str
    specs: list[ProcessSpec]
    """Redis first where it is ours."""


def plan_processes(
    fleet: Fleet, path: Path, run_directory: RunDirectory, *, run_id: str, redis: RedisServer | None
) -> FleetPlan:
    """The processes of `fleet`, read from `path`; `redis` is None where fleet.yaml names a server."""
    redis_url = redis.url if redis is not None else fleet.redis.url or ""
    certificates = TlsDirectory(fleet.tls.directory) if fleet.tls is not None else None
    inner_tls = certificates.service_variables() if certificates is not None else {}
    marked = {**os.environ, **inner_tls, MARK: str(run_directory.path), "PYTHONUNBUFFERED": "1"}
    base = {"REDIS_URL": redis_url, "BUS_PREFIX": fleet.name, "FLEET": str(path), "NODE": fleet.node}
    inner = {"LISTEN": "127.0.0.1:0", "METRICS_LISTEN": "127.0.0.1:0"}

    def service(kind: str, name: str, own: Mapping[str, str], grpc_address: str = "") -> ProcessSpec:
        prefix = f"TRIREME_{kind.upper()}_"
        settings = {prefix + key: value for key, value in {**base, **own}.items()}
        command = [sys.executable, "-m", f"trireme.{kind}"]
        environ = {**marked, **settings}
        return ProcessSpec(
            name=name, service=kind, command=command, environ=environ, grpc_address=grpc_address
        )

    specs = []
    if redis is not None:
        specs.append(
            ProcessSpec(name="redis", service="redis", command=redis.command, environ=marked, registers=False)
        )
    placement = {"RUN_DIR": str(run_directory.path), "RUN_ID": run_id}
    specs.append(service("placement", "placement", {**inner, **placement}))
    if fleet.kvstore.enabled:
        specs.append(service("kvstore", "kvstore", {**inner, **_kvstore_settings(fleet, run_directory)}))
    specs.append(service("power", "power", inner))
    specs += [service("scheduler", f"scheduler-{i}", inner) for i in range(fleet.scheduler.replicas)]
    for index in range(fleet.gateway.replicas):
        http, grpc = replica_address(fleet.gateway.http, index), replica_address(fleet.gateway.grpc, index)
        listen = {"HTTP_LISTEN": http, "GRPC_LISTEN": grpc}
        listen["MAX_WAITING"] = str(fleet.gateway.max_queue_requests)
        listen["MAX_PROMPT_TOKENS"] = str(fleet.gateway.max_request_tokens)
        if fleet.gateway.keys is not None:
            listen["KEYS"] = str(fleet.gateway.keys)
        if fleet.tls is not None and certificates is not None:
            asks = fleet.tls.client_certificates
            listen |= certificates.gateway_settings(client_certificates=asks)
        if fleet.gateway.operator is not None and index == 0:
            listen["OPERATOR_LISTEN"] = fleet.gateway.operator
        if fleet.gateway.allow_anonymous:
            listen["ALLOW_ANONYMOUS"] = "true"
        specs.append(service("gateway", f"gateway-{index}", listen, grpc_address=local_address(grpc)))
    return FleetPlan(fleet=fleet, run_id=run_id, bus_prefix=fleet.name, redis_url=redis_url, specs=specs)


def _kvstore_settings(fleet: Fleet, run_directory: RunDirectory) -> dict[str, str]:
    return {"DIRECTORY": str(fleet.kvstore.directory or run_directory.path / "kv")}


def replica_address(address: str, index: int) -> str:
    """The address of a gateway replica: consecutive ports."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + index}"


def local_address(address: str) -> str:
    """How a process of this machine reaches a server that listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("", "0.0.0.0", "[::]", "::", "*") else address


def check_ports(fleet: Fleet, path: Path) -> None:
    """Fail early where a gateway could not listen.

    Raises:
        InvalidConfiguration: a port is taken or an address is malformed; names the key in fleet.yaml.
    """
    replicas = fleet.gateway.replicas
    for key, address in (("gateway.http", fleet.gateway.http), ("gateway.grpc", fleet.gateway.grpc)):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) <= 65535 - replicas:
            raise InvalidConfiguration(f"{path}: {key}: {address!r} is not host:port", param=key)
        for index in range(replicas):
            _check_port(host.strip("[]"), int(port) + index, key, path)
    if fleet.gateway.operator is not None:
        host, _, port = fleet.gateway.operator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) <= 65535:
            raise InvalidConfiguration(
                f"{path}: gateway.operator: {fleet.gateway.operator!r} is not host:port",
                param="gateway.operator",
            )
        _check_port(host.strip("[]"), int(port), "gateway.operator", path)
    spans = [int(a.rpartition(":")[2]) for a in (fleet.gateway.http, fleet.gateway.grpc)]
    if abs(spans[0] - spans[1]) < replicas:
        raise InvalidConfiguration(
            f"{path}: gateway.http and gateway.grpc overlap: {replicas} replicas use consecutive ports",
            param="gateway.grpc",
        )


def _check_port(host: str, port: int, key: str, path: Path) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        # As the servers do: a port whose last connections still linger is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is in use" if taken else f"cannot be listened on ({error.strerror})"
            raise InvalidConfiguration(f"{host}:{port} {why}: change {key} in {path}", param=key) from error


def check_credentials(fleet: Fleet, path: Path) -> None:
    """Fail early where keys or certificates could not be read.

    Raises:
        InvalidConfiguration: a file is absent or not right; names the key in fleet.yaml.
    """
    if fleet.gateway.keys is not None:
        try:
            load_keys(fleet.gateway.keys)
        except InvalidConfiguration as error:
            raise InvalidConfiguration(
                f"{path}: gateway.keys: {error.message}; `trireme keys new` makes keys", param="gateway.keys"
            ) from error
    if fleet.tls is not None:
        check_tls(fleet.tls.directory, path)


def check_checkpoints(fleet: Fleet, path: Path) -> None:
    """Fail early where a model that is to be served has no checkpoint.

    Raises:
        InvalidConfiguration: a directory has no config.json; names the key in fleet.yaml.
    """
    real = [group for group in fleet.workers if group.device != "null" and group.replicas > 0]
    served = {name for group in real for name in fleet.served_by(group)}
    for name in sorted(served):
        checkpoint = fleet.variant(name).checkpoint
        if not (checkpoint / "config.json").is_file():
            key = f"models.{fleet.model_of(name)}.variants.{name}.checkpoint"
            raise InvalidConfiguration(
                f"{path}: {key}: {checkpoint} holds no checkpoint (no config.json there)", param=key
            )
