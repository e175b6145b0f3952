"""A fleet's certificates in one directory: which file is whose, and the settings that name them.

Two authorities: the services' certificate, which they share, may call every inner RPC, so what clients
see and show comes from another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trireme.client.credentials import TLS_PREFIX as CLIENT_PREFIX
from trireme.errors import InvalidConfiguration
from trireme.runtime.tls import PREFIX as SERVICES_PREFIX
from trireme.runtime.tls import Certificates, TlsFiles

SERVICES_NAME = "trireme"
"""DNS name that every service's certificate bears, beside the names of the services that show it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path

    @classmethod
    def at(cls, directory: Path, name: str) -> Pair:
        return cls(directory / f"{name}.crt", directory / f"{name}.key")


@dataclass(frozen=True, slots=True)
class TlsDirectory:
    """The files below `path`."""

    path: Path

    @property
    def authority(self) -> Pair:
        """Of gateways and clients; clients believe its certificate."""
        return Pair.at(self.path, "ca")

    @property
    def services_authority(self) -> Pair:
        """Of the services among themselves."""
        return Pair.at(self.path, "services-ca")

    @property
    def gateway(self) -> Pair:
        """What clients are shown."""
        return Pair.at(self.path, "gateway")

    @property
    def client(self) -> Pair:
        """What a client shows, where gateways ask."""
        return Pair.at(self.path, "client")

    @property
    def services(self) -> Pair:
        """What services show each other."""
        return Pair.at(self.path, "services")

    def check(self) -> None:
        """Look at what a fleet needs of it; the authorities' keys may be elsewhere.

        Raises:
            InvalidConfiguration: a file is absent, or a key is not its certificate's.
        """
        for pair, authority in (
            (self.services, self.services_authority),
            (self.gateway, self.authority),
        ):
            Certificates(TlsFiles(cert=pair.cert, key=pair.key, ca=authority.cert))

    def service_variables(self) -> dict[str, str]:
        """The environment of each process that calls services or is one."""
        return {
            f"{SERVICES_PREFIX}CERT": str(self.services.cert),
            f"{SERVICES_PREFIX}KEY": str(self.services.key),
            f"{SERVICES_PREFIX}CA": str(self.services_authority.cert),
            f"{SERVICES_PREFIX}NAME": SERVICES_NAME,
        }

    def gateway_settings(self, *, client_certificates: bool) -> dict[str, str]:
        """What a gateway is told beside, by field."""
        own = {"TLS_CERT": str(self.gateway.cert), "TLS_KEY": str(self.gateway.key)}
        return own | ({"TLS_CLIENT_CA": str(self.authority.cert)} if client_certificates else {})

    def client_variables(self) -> dict[str, str]:
        """The environment of a client on this machine."""
        found = {f"{CLIENT_PREFIX}CA": str(self.authority.cert)}
        if self.client.cert.is_file() and os.access(self.client.key, os.R_OK):
            found |= {
                f"{CLIENT_PREFIX}CERT": str(self.client.cert),
                f"{CLIENT_PREFIX}KEY": str(self.client.key),
            }
        return found


def check_tls(directory: Path, path: Path) -> None:
    """Fail early where a fleet could not show its certificates.

    Raises:
        InvalidConfiguration: a file is absent or not right; names the key in the fleet file `path`.
    """
    try:
        TlsDirectory(directory).check()
    except InvalidConfiguration as error:
        raise InvalidConfiguration(
            f"{path}: tls.directory: {error.message}; `trireme tls new {directory}` makes certificates",
            param="tls.directory",
        ) from error


def speak_as_fleet(directory: str, *, over_environment: bool = False) -> None:
    """From now on this process speaks TLS as the fleet whose certificates are there; empty: as before.

    What the environment says already about one of the two edges holds, unless `over_environment`.
    """
    if not directory:
        return
    found = TlsDirectory(Path(directory))
    for prefix, variables in (
        (SERVICES_PREFIX, found.service_variables()),
        (CLIENT_PREFIX, found.client_variables()),
    ):
        said = [name for name, value in os.environ.items() if name.startswith(prefix) and value]
        if said and not over_environment:
            continue
        for name in said:
            del os.environ[name]
        os.environ.update(variables)
