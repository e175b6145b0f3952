"""Certificates that `trireme tls` makes: who is believed by whom, what renewal keeps, what is refused."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner, Result

from trireme.cli.__main__ import app
from trireme.cli.fleet_processes import check_credentials, plan_processes
from trireme.cli.run_directory import RunDirectory
from trireme.cli.tls_directory import Pair, TlsDirectory, speak_as_fleet
from trireme.client.credentials import client_ssl_context, client_tls
from trireme.errors import InvalidConfiguration
from trireme.gateway.settings import Settings as GatewaySettings
from trireme.runtime.fleet import load_fleet
from trireme.runtime.service_rights import certificate_names
from trireme.runtime.settings import load
from trireme.runtime.tls import fleet_certificates


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["tls", *words])


def make(path: Path, *words: str) -> TlsDirectory:
    made = run("new", str(path), *words)
    assert made.exit_code == 0, made.output
    return TlsDirectory(path)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TLS in the environment, also after the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("TRIREME_TLS_", "TRIREME_CLIENT_TLS_")):
            monkeypatch.delenv(name)
    yield
    os.environ.clear()
    os.environ.update(before)


def shake_hands(
    server: Pair, asks: Path | None, client: Pair | None, believes: Path, name: str
) -> x509.Certificate:
    """A handshake in memory; returns the server's certificate, or raises what either side found wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.cert, server.key)
    if asks is not None:
        context.load_verify_locations(asks)
        context.verify_mode = ssl.CERT_REQUIRED
    other = ssl.create_default_context(cafile=believes)
    if client is not None:
        other.load_cert_chain(client.cert, client.key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    inside = context.wrap_bio(up, down, server_side=True)
    outside = other.wrap_bio(down, up, server_hostname=name)
    left = [outside, inside]
    for _ in range(8):
        for end in list(left):
            try:
                end.do_handshake()
                left.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not left
    shown = outside.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)


def test_each_edge_believes_its_own_authority_alone(tmp_path: Path) -> None:
    made = make(tmp_path / "tls", "--host", "gpu7.example.com", "--host", "10.0.0.5")
    outer, inner = made.authority.cert, made.services_authority.cert
    for name in ("localhost", "127.0.0.1", "::1", "gateway", "gpu7.example.com", "10.0.0.5"):
        shake_hands(made.gateway, None, None, outer, name)
    shake_hands(made.gateway, outer, made.client, outer, "localhost")
    shake_hands(made.services, inner, made.services, inner, "trireme")
    for name in certificate_names("trireme"):  # It has the rights of all services, which share it.
        shake_hands(made.services, inner, made.services, inner, name)
    for refused in (
        (made.gateway, None, None, outer, "elsewhere.example.com"),
        (made.gateway, None, None, inner, "localhost"),
        (made.gateway, outer, None, outer, "localhost"),
        (made.gateway, outer, made.gateway, outer, "localhost"),  # It is for servers.
        (made.services, inner, made.client, inner, "trireme"),  # A client is no service.
        (made.services, inner, made.gateway, inner, "trireme"),
    ):
        with pytest.raises(ssl.SSLError):
            shake_hands(*refused)


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make(tmp_path / "tls")
    keys = sorted((tmp_path / "tls").glob("*.key"))
    assert [key.name for key in keys] == [
        f"{name}.key" for name in ("ca", "client", "gateway", "services-ca", "services")
    ]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert len({key.read_bytes() for key in keys}) == len(keys)


def test_renewal_keeps_authorities_and_names(tmp_path: Path) -> None:
    made = make(tmp_path / "tls", "--host", "gpu7.example.com")
    authorities = [pair.cert.read_bytes() for pair in (made.authority, made.services_authority)]
    before = shake_hands(made.gateway, None, None, made.authority.cert, "gpu7.example.com")
    assert run("renew", str(tmp_path / "tls"), "--days", "30").exit_code == 0
    after = shake_hands(made.gateway, None, None, made.authority.cert, "gpu7.example.com")
    assert after.serial_number != before.serial_number
    assert (after.not_valid_after_utc - after.not_valid_before_utc).days == 30
    assert authorities == [pair.cert.read_bytes() for pair in (made.authority, made.services_authority)]
    assert run("renew", str(tmp_path / "tls"), "--host", "other.example.com").exit_code == 0
    shake_hands(made.gateway, None, None, made.authority.cert, "other.example.com")
    with pytest.raises(ssl.SSLError):
        shake_hands(made.gateway, None, None, made.authority.cert, "gpu7.example.com")


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x:9000", "-x", "a..b", "x" * 64, "ü.example"])
def test_a_host_that_is_none_is_named(tmp_path: Path, host: str) -> None:
    found = run("new", str(tmp_path / "tls"), "--host", host)
    assert found.exit_code == 2 and not (tmp_path / "tls").exists()


def test_authorities_are_not_written_over(tmp_path: Path) -> None:
    made = make(tmp_path / "tls")
    before = made.authority.key.read_bytes()
    assert run("new", str(tmp_path / "tls")).exit_code == 2
    assert made.authority.key.read_bytes() == before
    for words in (["renew", str(tmp_path / "none")], ["new", str(tmp_path), "--days", "826"]):
        assert run(*words).exit_code == 2
    made.authority.key.write_bytes(made.services_authority.key.read_bytes())
    assert run("renew", str(tmp_path / "tls")).exit_code == 2


FLEET = """
models: {m: {variants: {v: {checkpoint: a}}}}
gateway: {keys: keys.yaml}
tls: {directory: tls, client_certificates: true}
"""


def test_the_fleet_file_turns_both_edges_on(tmp_path: Path, environ: None) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    fleet = load_fleet(path)
    with pytest.raises(InvalidConfiguration, match=r"gateway\.keys.*trireme keys new"):
        check_credentials(fleet, path)
    (tmp_path / "keys.yaml").write_text("{}")
    with pytest.raises(InvalidConfiguration, match=r"tls\.directory.*trireme tls new"):
        check_credentials(fleet, path)
    made = make(tmp_path / "tls")
    check_credentials(fleet, path)
    specs = plan_processes(fleet, path, RunDirectory(tmp_path), run_id="r", redis=None).specs
    for spec in specs:
        os.environ.update({k: v for k, v in spec.environ.items() if k.startswith("TRIREME_TLS_")})
        certificates = fleet_certificates()
        assert certificates is not None and certificates.files.ca == made.services_authority.cert
        if spec.service == "gateway":
            settings = load(GatewaySettings, spec.environ, prefix="TRIREME_GATEWAY_")
            assert (settings.tls_cert, settings.tls_key) == (made.gateway.cert, made.gateway.key)
            assert settings.tls_client_ca == made.authority.cert
    made.gateway.key.write_bytes(made.client.key.read_bytes())
    with pytest.raises(InvalidConfiguration, match=r"tls\.directory"):
        check_credentials(fleet, path)


def test_a_command_speaks_as_the_fleet_unless_the_environment_says_otherwise(
    tmp_path: Path, environ: None
) -> None:
    speak_as_fleet("")
    assert client_tls() is None and client_ssl_context(None) is None and fleet_certificates() is None
    made = make(tmp_path / "tls")
    other = make(tmp_path / "other")
    os.environ["TRIREME_CLIENT_TLS_CA"] = str(other.authority.cert)
    speak_as_fleet(str(tmp_path / "tls"))
    found = client_tls()
    assert found is not None and found.ca == other.authority.cert and found.cert is None
    certificates = fleet_certificates()
    assert certificates is not None and certificates.files.cert == made.services.cert
    speak_as_fleet(str(tmp_path / "tls"), over_environment=True)
    found = client_tls()
    assert found is not None and (found.ca, found.cert) == (made.authority.cert, made.client.cert)
    assert client_ssl_context(None) is not None
    made.client.key.write_text("no key")
    with pytest.raises(InvalidConfiguration):
        client_ssl_context(None)
