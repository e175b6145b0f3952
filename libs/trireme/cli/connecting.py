"""Where the fleet's gateways are: as told, or as the run directory knows, or the usual port."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from trireme.cli.run_directory import RunDirectory
from trireme.errors import InvalidConfiguration, ServiceUnavailable

USUAL = "127.0.0.1:9000"
CONNECT_TIMEOUT_S = 2.0


def gateway_addresses(told: Sequence[str], run_dir: Path) -> list[str]:
    """host:port of each gateway's gRPC server, at least one of which listens.

    Raises:
        InvalidConfiguration: an address is malformed.
        ServiceUnavailable: nothing listens there.
    """
    addresses = list(told)
    if not addresses:
        state = RunDirectory.at(run_dir).read()
        running = state is not None and state.supervisor_lives
        addresses = list(state.grpc) if state is not None and running else [USUAL]
    if not any(_listens(address) for address in addresses):
        raise ServiceUnavailable(
            f"nothing listens on {', '.join(addresses)}: start a fleet with `trireme up`, "
            "or name a gateway with --address"
        )
    return addresses


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidConfiguration(f"{address!r} is not host:port", param="address")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
