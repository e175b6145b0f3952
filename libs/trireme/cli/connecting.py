"""Where the fleet's gateways are and how to speak to them: as told, or as the run directory knows."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from trireme.cli.fleet_processes import local_address
from trireme.cli.run_directory import FleetState, RunDirectory
from trireme.cli.tls_directory import speak_as_fleet
from trireme.errors import InvalidConfiguration, ServiceUnavailable

USUAL = "127.0.0.1:9000"
USUAL_BASE_URL = "http://127.0.0.1:8000/v1"
CONNECT_TIMEOUT_S = 2.0


def gateway_addresses(told: Sequence[str], run_dir: Path) -> list[str]:
    """host:port of each gateway's gRPC server, at least one of which listens.

    Raises:
        InvalidConfiguration: an address is malformed.
        ServiceUnavailable: nothing listens there.
    """
    addresses = list(told)
    if not addresses:
        state = _running(run_dir)
        addresses = list(state.grpc) if state is not None else [USUAL]
    if not any(_listens(address) for address in addresses):
        raise ServiceUnavailable(
            f"nothing listens on {', '.join(addresses)}: start a fleet with `trireme up`, "
            "or name a gateway with --address"
        )
    return addresses


def openai_base_url(told: Sequence[str], run_dir: Path) -> str:
    """The base URL of OpenAI's API at a gateway; ends in /v1.

    Raises:
        InvalidConfiguration: the state file is not one of ours.
    """
    if told:
        return told[0].rstrip("/")
    state = _running(run_dir)
    return f"{state.http_scheme}://{local_address(state.http[0])}/v1" if state is not None else USUAL_BASE_URL


def _running(run_dir: Path) -> FleetState | None:
    """The fleet that runs there, if one does; from now on this process speaks TLS as it wants it."""
    state = RunDirectory.at(run_dir).read()
    if state is None or not state.supervisor_lives:
        return None
    speak_as_fleet(state.tls)
    return state


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidConfiguration(f"{address!r} is not host:port", param="address")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
