"""Certificates of this process, from files that are read again when they change.

Between services every server asks for a certificate of the fleet's own authority, and every
channel shows one: TRIREME_TLS_CERT, _KEY, _CA and _NAME say where they are, for all services
alike. Without them the fleet speaks plaintext. New handshakes use what the files say then; a
pair that does not match keeps the last one in force.
"""

from __future__ import annotations

import functools
import logging
import os
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from trireme.errors import InvalidConfiguration
from trireme.runtime.settings import load

log = logging.getLogger(__name__)

PREFIX = "TRIREME_TLS_"
ChannelOptions = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files."""

    cert: Path
    """This process's certificate, then those between it and its authority."""
    key: Path
    ca: Path | None = None
    """Authorities whose certificates the other side must show; None: it need show none."""
    name: str = "trireme"
    """DNS name that every certificate of the fleet bears, since addresses of pods come and go."""


@dataclass(frozen=True, slots=True)
class _Pems:
    cert: bytes
    key: bytes
    ca: bytes | None


class Certificates:
    """What the files say, followed. May be used by several threads."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises InvalidConfiguration: a file is absent, or key and certificate do not match."""
        self.files = files
        self._lock = threading.Lock()
        self._looked_at = self.stamp()
        self._pems = _read(files)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes with the files."""
        found = []
        for path in (self.files.cert, self.files.key, self.files.ca):
            try:
                status = os.stat(path) if path is not None else None
            except OSError:
                status = None
            found.append((status.st_mtime_ns, status.st_ino, status.st_size) if status else (0, 0, 0))
        return tuple(found)

    def pems(self) -> _Pems:
        """The newest that are right."""
        with self._lock:
            stamp = self.stamp()
            if stamp == self._looked_at:
                return self._pems
            try:
                found = _read(self.files)
            except InvalidConfiguration as error:
                log.error("certificates_not_reloaded", extra={"error": error.message})
            else:
                if self.stamp() != stamp:
                    return self._pems  # They are being changed: the next handshake looks again.
                self._pems = found
                log.info("certificates_reloaded", extra={"cert": str(self.files.cert)})
            self._looked_at = stamp
            return self._pems

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; asks for certificates where there is an authority to check them by."""
        given = self.pems()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            newest = self.pems()
            if newest is given:
                return None
            given = newest
            return _configuration(newest)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            fetch,  # type: ignore[arg-type]  # None says that nothing is new; the stubs miss it.
            require_client_authentication=given.ca is not None,
        )

    def server_context(self) -> ssl.SSLContext:
        """For an HTTP server; each handshake takes the newest pair."""
        made = self._context()
        given = self.pems()

        def choose(connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
            nonlocal made, given
            newest = self.pems()
            if newest is not given:
                try:
                    made, given = self._context(), newest
                except (OSError, ssl.SSLError) as error:
                    log.error("certificates_not_reloaded", extra={"error": str(error)})
            connection.context = made

        door = self._context()
        door.sni_callback = choose
        return door

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.files.cert, self.files.key)
        if self.files.ca is not None:
            context.load_verify_locations(self.files.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _configuration(pems: _Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.ca)


def _read(files: TlsFiles) -> _Pems:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key)
        if files.ca is not None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.ca)
        return _Pems(
            files.cert.read_bytes(),
            files.key.read_bytes(),
            files.ca.read_bytes() if files.ca is not None else None,
        )
    except ssl.SSLError as error:
        raise InvalidConfiguration(
            f"{files.cert} and {files.key} are no matching pair in PEM, "
            f"or {files.ca} holds no authority: {error}",
            param=str(files.cert),
        ) from error
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {error.filename or f'{files.cert}, {files.key} or {files.ca}'}: {error.strerror}",
            param=str(files.cert),
        ) from error


@functools.cache
def _certificates(files: TlsFiles) -> Certificates:
    return Certificates(files)


def fleet_certificates() -> Certificates | None:
    """This process's certificates within the fleet, by its environment; None: plaintext.

    Raises:
        InvalidConfiguration: the variables or the files are not right.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and value}
    if not variables:
        return None
    files = load(TlsFiles, variables, prefix=PREFIX)
    if files.ca is None:
        raise InvalidConfiguration("TRIREME_TLS_CA is required: services check each other", param="ca")
    return _certificates(files)


def fleet_stamp() -> object:
    """Changes with the files that `open_channel` reads: long-lived channels are opened anew then."""
    certificates = fleet_certificates()
    return certificates.stamp() if certificates is not None else None


def open_channel(address: str, options: ChannelOptions = ()) -> grpc.aio.Channel:
    """A channel to another service of the fleet."""
    certificates = fleet_certificates()
    if certificates is None:
        return grpc.aio.insecure_channel(address, options=list(options))
    pems = certificates.pems()
    credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)
    named = [*options, ("grpc.ssl_target_name_override", certificates.files.name)]
    return grpc.aio.secure_channel(address, credentials, options=named)
