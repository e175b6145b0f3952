"""Authorities and certificates for a fleet on one machine or one network, where there are none yet.

ECDSA over P-256. Keys are readable by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trireme.cli.tls_directory import SERVICES_NAME, Pair, TlsDirectory
from trireme.errors import InvalidConfiguration
from trireme.runtime.service_rights import certificate_names

AUTHORITY_DAYS = 3650
LONGEST_DAYS = 825
"""Some clients believe no certificate of a server that is valid for longer."""
USUAL_HOSTS = ("localhost", "127.0.0.1", "::1", "gateway")
"""This machine's own names, and the gateway's in the compose file."""
MAX_HOSTS = 64
_SKEW = datetime.timedelta(minutes=5)
_Key = ec.EllipticCurvePrivateKey
_Authority = tuple[x509.Certificate, _Key]


def make(path: Path, hosts: Sequence[str], *, days: int) -> None:
    """Write new authorities, and certificates of theirs for gateways, services and clients.

    Args:
        path: directory; made if absent.
        hosts: names and addresses under which clients reach gateways, beside this machine's own.
        days: how long the certificates are valid; the authorities are for ten years.

    Raises:
        InvalidConfiguration: there are authorities, a host is malformed, or it cannot be written.
    """
    directory, names = TlsDirectory(path), _names(hosts)
    for authority in (directory.authority, directory.services_authority):
        if authority.cert.exists() or authority.key.exists():
            raise InvalidConfiguration(
                f"{path} has authorities: `trireme tls renew {path}` makes new certificates of theirs, "
                "or name another directory",
                param="DIRECTORY",
            )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfiguration(f"cannot make {path}: {error.strerror}", param="DIRECTORY") from error
    clients = _new_authority(directory.authority, "Trireme authority for gateways and clients")
    services = _new_authority(directory.services_authority, "Trireme authority for services")
    _issue_all(directory, clients, services, names, days=days)


def renew(path: Path, hosts: Sequence[str], *, days: int) -> None:
    """Write new certificates of the authorities in `path`; who runs shows them from the next handshake on.

    Without `hosts` gateways' names stay as they are.

    Raises:
        InvalidConfiguration: an authority is absent or not right, a host is malformed, or a file cannot be
            written.
    """
    directory = TlsDirectory(path)
    clients, services = _read(directory.authority), _read(directory.services_authority)
    names = _names(hosts) if hosts else _names_of(directory.gateway.cert)
    _issue_all(directory, clients, services, names, days=days)


def _issue_all(
    directory: TlsDirectory,
    clients: _Authority,
    services: _Authority,
    names: Sequence[x509.GeneralName],
    *,
    days: int,
) -> None:
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    _issue(directory.gateway, clients, "Trireme gateway", names, both[:1], days=days)
    _issue(directory.client, clients, "Trireme client", [], both[1:], days=days)
    # One pair for all services of the machine, and for its operators: it may do what each of them may.
    own = [x509.DNSName(name) for name in certificate_names(SERVICES_NAME)]
    _issue(directory.services, services, "Trireme services", own, both, days=days)


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    wanted = dict.fromkeys((*USUAL_HOSTS, *hosts))
    if len(wanted) > MAX_HOSTS:
        raise InvalidConfiguration(f"{len(wanted)} hosts: at most {MAX_HOSTS}", param="--host")
    return [_name(host) for host in wanted]


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    plain = all(
        label.isascii() and label.replace("-", "").isalnum() and label.strip("-") == label and len(label) < 64
        for label in labels
    )
    if not plain or len(host) > 253:
        raise InvalidConfiguration(
            f"{host!r} is neither an address nor a host's name: write, say, gpu7.example.com", param="--host"
        )
    return x509.DNSName(host)


def _names_of(cert: Path) -> list[x509.GeneralName]:
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        return list(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (OSError, ValueError, x509.ExtensionNotFound):
        return _names(())


def _new_authority(pair: Pair, title: str) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = (
        _begun(name, name, key, days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    certificate = builder.sign(key, hashes.SHA256())
    _write(pair, certificate, key)
    return certificate, key


def _issue(
    pair: Pair,
    authority: _Authority,
    title: str,
    names: Sequence[x509.GeneralName],
    purposes: Sequence[x509.ObjectIdentifier],
    *,
    days: int,
) -> None:
    issuer, issuer_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = (
        _begun(subject, issuer.subject, key, days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(identifier, critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    _write(pair, builder.sign(issuer_key, hashes.SHA256()), key)


def _begun(subject: x509.Name, issuer: x509.Name, key: _Key, *, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read(pair: Pair) -> _Authority:
    try:
        certificate = x509.load_pem_x509_certificate(pair.cert.read_bytes())
        key = serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {error.filename}: {error.strerror}; `trireme tls new` makes authorities",
            param="DIRECTORY",
        ) from error
    except (ValueError, TypeError) as error:
        raise InvalidConfiguration(
            f"{pair.cert} and {pair.key} are no authority in PEM: {error}", param="DIRECTORY"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InvalidConfiguration(
            f"{pair.key} is not the key of {pair.cert}, or none over an elliptic curve", param="DIRECTORY"
        )
    return certificate, key


def _write(pair: Pair, certificate: x509.Certificate, key: _Key) -> None:
    """Key first, each file at once: in between the pair does not match, and the last one stays in force."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        _replace(pair.key, private, mode=0o600)
        _replace(pair.cert, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    except OSError as error:
        raise InvalidConfiguration(f"cannot write {pair.key}: {error.strerror}", param="DIRECTORY") from error


def _replace(path: Path, body: bytes, *, mode: int) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(body)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
