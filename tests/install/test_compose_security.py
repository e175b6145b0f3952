"""The compose files for keys and TLS, laid over docker-compose.yml: what each container is told and reads."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import REPOSITORY
from tests.install.compose import compose, laid_over, read
from tests.install.service_settings import settings_class
from tests.install.test_compose import OURS
from trireme.cli.certificates import make
from trireme.cli.key_files import add_key
from trireme.errors import InvalidConfiguration
from trireme.gateway.identity import gate_of
from trireme.runtime.settings import load
from trireme.runtime.tls import PREFIX, Certificates, TlsFiles

OVERLAYS = REPOSITORY / "services" / "compose"
GIVEN = {"TRIREME_USER": "1000:0", "TRIREME_KEYS": "/home/me/keys", "TRIREME_TLS": "/home/me/tls"}


def overlay(name: str, **more: str) -> dict[str, Any]:
    return read(OVERLAYS / f"{name}.yaml", {**GIVEN, **more})


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Directories in the container that are the machine's, by where they come from; read-only."""
    found = (volume.split(":") for volume in service["volumes"])
    return {parts[0]: parts[1] for parts in found if parts[0].startswith("/") and parts[2:] == ["ro"]}


@pytest.mark.parametrize("names", [["keys"], ["tls"], ["keys", "tls"]], ids="+".join)
def test_the_files_are_what_the_specification_allows(names: list[str]) -> None:
    text = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    schema = json.loads(text)
    validator = jsonschema.validators.validator_for(schema)(schema)
    whole = compose()
    for name in names:
        validator.validate(overlay(name))
        whole = laid_over(whole, overlay(name))
    validator.validate(whole)
    for container in OURS:
        assert whole["services"][container]["read_only"] is True
    for name in names:
        with pytest.raises(AssertionError, match="TRIREME_USER was not given"):
            read(OVERLAYS / f"{name}.yaml", {k: v for k, v in GIVEN.items() if k != "TRIREME_USER"})


def test_with_keys_the_gateway_lets_nobody_else_in(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.yaml", "acme", None)
    service = laid_over(compose(), overlay("keys"))["services"]["gateway"]
    assert service["user"] == "1000:0", "who can read the file"
    inside = mounted(service)["/home/me/keys"]
    environment = {k: v.replace(inside, str(tmp_path)) for k, v in service["environment"].items()}
    gate = gate_of(load(settings_class("gateway"), environment, prefix="TRIREME_GATEWAY_"))
    assert gate.identify({"x-api-key": key}).tenant == "acme"
    assert gate.book is not None


@pytest.mark.parametrize("client_ca", ["", "/etc/trireme/tls/ca.crt"])
def test_with_tls_each_container_has_its_certificates(tmp_path: Path, client_ca: str) -> None:
    make(tmp_path, [], days=1)
    whole = laid_over(compose(), overlay("tls", TRIREME_CLIENT_CA=client_ca))
    for container in OURS:
        service = whole["services"][container]
        assert service["user"] == "1000:0", "who can read the keys"
        inside = mounted(service)["/home/me/tls"]
        told = {k: str(v).replace(inside, str(tmp_path)) for k, v in service["environment"].items()}
        own = load(TlsFiles, {k: v for k, v in told.items() if k.startswith(PREFIX)}, prefix=PREFIX)
        assert own.name == "trireme" and own.ca is not None
        Certificates(own)
        if container == "gateway":
            settings = load(settings_class("gateway"), told, prefix="TRIREME_GATEWAY_")
            shown = settings.certificates()
            assert shown is not None and (shown.files.ca is not None) == bool(client_ca)
            assert settings.metrics_listen, "probes and Prometheus speak no TLS"
    (tmp_path / "services.key").unlink()
    with pytest.raises(InvalidConfiguration):
        Certificates(own)


def test_no_container_of_ours_is_forgotten() -> None:
    assert overlay("tls")["services"].keys() == OURS.keys()
