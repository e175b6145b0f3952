"""What a client shows of itself, and whom it believes to be a gateway."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from trireme.errors import InvalidConfiguration
from trireme.runtime.settings import load

API_KEY_VARIABLE = "TRIREME_API_KEY"
TLS_PREFIX = "TRIREME_CLIENT_TLS_"


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that each call brings. None: the key in TRIREME_API_KEY; empty: no key."""
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    return (("authorization", f"Bearer {key}"),) if key else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """How to speak TLS to gateways; in the environment: TRIREME_CLIENT_TLS_<FIELD>."""

    enabled: bool = True
    ca: Path | None = None
    """PEM file of the authorities that gateways' certificates come from; None: the system's."""
    cert: Path | None = None
    """This client's own certificate, where gateways ask for one; with its key."""
    key: Path | None = None
    name: str = ""
    """DNS name that the gateway's certificate bears, where that is not its address."""


def client_tls() -> ClientTls | None:
    """What the environment says; None: plaintext.

    Raises:
        InvalidConfiguration: a variable is unknown or malformed.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(TLS_PREFIX) and value}
    return load(ClientTls, variables, prefix=TLS_PREFIX) if variables else None


def client_ssl_context(tls: ClientTls | None) -> ssl.SSLContext | None:
    """For HTTP clients. None: as the environment says; None comes back where that is plaintext.

    Raises:
        InvalidConfiguration: a file is absent or not right, or a variable is.
    """
    tls = tls or client_tls()
    if tls is None or not tls.enabled:
        return None
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:  # ssl's own errors among them.
        raise InvalidConfiguration(
            f"{tls.ca or 'the system'}, {tls.cert} and {tls.key} are no authority and pair in PEM: {error}",
            param=TLS_PREFIX,
        ) from error
    return context


def open_gateway(address: str, options: Any, tls: ClientTls | None) -> grpc.aio.Channel:
    """A channel to a gateway. None: as the environment says."""
    tls = tls or client_tls()
    if tls is None or not tls.enabled:
        return grpc.aio.insecure_channel(address, options=list(options))
    return grpc.aio.secure_channel(address, _credentials(tls), options=[*options, *_named(tls)])


def open_gateway_sync(address: str, options: Any, tls: ClientTls | None) -> grpc.Channel:
    """As `open_gateway`, without an event loop."""
    tls = tls or client_tls()
    if tls is None or not tls.enabled:
        return grpc.insecure_channel(address, options=list(options))
    return grpc.secure_channel(address, _credentials(tls), options=[*options, *_named(tls)])


def _credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    def read(path: Path | None) -> bytes | None:
        return path.read_bytes() if path is not None else None

    try:
        return grpc.ssl_channel_credentials(read(tls.ca), read(tls.key), read(tls.cert))
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {error.filename}: {error.strerror}", param=TLS_PREFIX
        ) from error


def _named(tls: ClientTls) -> list[tuple[str, str]]:
    return [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
