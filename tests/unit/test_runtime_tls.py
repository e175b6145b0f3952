"""Certificates are followed while their files are right, and plaintext is only where nothing is said."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import trustme

from trireme.errors import InvalidConfiguration
from trireme.runtime.health import HealthReporter
from trireme.runtime.serving import grpc_server
from trireme.runtime.tls import Certificates, TlsFiles, fleet_certificates, open_channel

AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)


def issue(folder: Path, *, key: bool = True, cert: bool = True) -> TlsFiles:
    files = TlsFiles(cert=folder / "cert.pem", key=folder / "key.pem", ca=folder / "ca.pem")
    assert files.ca is not None
    made = AUTHORITY.issue_cert("trireme", key_type=trustme.KeyType.ECDSA)
    AUTHORITY.cert_pem.write_to_path(str(files.ca))
    if key:
        files.key.write_bytes(made.private_key_pem.bytes())
    if cert:
        files.cert.write_bytes(made.cert_chain_pems[0].bytes())
    return files


def test_a_pair_that_does_not_match_keeps_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = issue(tmp_path)
    followed = Certificates(files)
    first = followed.pems()
    issue(tmp_path, cert=False)  # The key of another certificate: half of a change.
    assert followed.pems() is first and followed.pems() is first
    assert [record.message for record in caplog.records] == ["certificates_not_reloaded"]
    issue(tmp_path)
    newest = followed.pems()
    assert newest.cert == files.cert.read_bytes() != first.cert
    files.cert.unlink()
    assert followed.pems() is newest


def test_files_that_are_not_right_are_refused_at_the_start(tmp_path: Path) -> None:
    files = issue(tmp_path)
    for broken in (
        TlsFiles(cert=files.cert, key=tmp_path / "none", ca=files.ca),
        TlsFiles(cert=files.key, key=files.key, ca=files.ca),
        TlsFiles(cert=files.cert, key=files.key, ca=files.key),
    ):
        with pytest.raises(InvalidConfiguration):
            Certificates(broken)


def test_the_environment_says_it_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fleet_certificates() is None
    files = issue(tmp_path)
    monkeypatch.setenv("TRIREME_TLS_CERT", str(files.cert))
    with pytest.raises(InvalidConfiguration, match="TRIREME_TLS_KEY is required"):
        fleet_certificates()
    monkeypatch.setenv("TRIREME_TLS_KEY", str(files.key))
    with pytest.raises(InvalidConfiguration, match="TRIREME_TLS_CA"):
        open_channel("127.0.0.1:1")
    monkeypatch.setenv("TRIREME_TLS_SERIAL", "1")
    with pytest.raises(InvalidConfiguration, match="not a setting"):
        fleet_certificates()


async def test_a_server_for_clients_does_not_show_the_fleets_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = issue(tmp_path)
    for name in ("cert", "key", "ca"):
        monkeypatch.setenv(f"TRIREME_TLS_{name.upper()}", str(getattr(files, name)))
    for for_clients in (True, False):
        reporter = HealthReporter({})
        async with (
            grpc_server(
                "127.0.0.1:0",
                [],
                service_names=[],
                health=reporter,
                drain_s=0.0,
                for_clients=for_clients,
            ) as address,
            grpc.aio.insecure_channel(address) as plain,
            open_channel(address) as secure,
        ):
            for channel, opens in ((plain, for_clients), (secure, not for_clients)):
                call = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20)
                if opens:
                    await call
                else:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call
