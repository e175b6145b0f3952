"""The keys file and the command that changes it."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trireme.cli.__main__ import app
from trireme.errors import InvalidConfiguration
from trireme.runtime.tenant_keys import MAX_FILE_BYTES, KeyBook, Role, load_keys, new_key

RUN = CliRunner()


def test_a_key_is_shown_once_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = RUN.invoke(app, ["keys", "new", "--tenant", "acme", "--id", "laptop", "--file", str(file)])
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert key.startswith("trk_") and len(key) >= 4 + 43
    kept = file.read_text()
    assert key not in kept and key[4:] not in kept
    assert yaml.safe_load(kept) == {
        "tenants": {"acme": {"keys": [{"id": "laptop", "sha256": hashlib.sha256(key.encode()).hexdigest()}]}}
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    owner = KeyBook(file).find(key)
    assert owner is not None and (owner.tenant, owner.key_id) == ("acme", "laptop")
    assert owner.limits.roles == {Role.INFERENCE}


def test_two_keys_of_a_tenant_are_valid_until_one_is_withdrawn(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("tenants: {acme: {keys: [], requests_per_minute: 7}}")
    new = ["keys", "new", "--tenant", "acme", "--file", str(file), "--id"]
    first, second = (RUN.invoke(app, [*new, name]).stdout.strip() for name in ("a", "b"))
    assert RUN.invoke(app, [*new, "a"]).exit_code == 2
    book = KeyBook(file)
    assert book.find(first) and book.find(second) and not book.find(new_key())
    gone = RUN.invoke(app, ["keys", "withdraw", "a", "--tenant", "acme", "--file", str(file)])
    assert gone.exit_code == 0, gone.output
    assert book.refresh()
    assert not book.find(first)
    found = book.find(second)
    assert found is not None and found.limits.requests_per_minute == 7
    assert RUN.invoke(app, ["keys", "withdraw", "a", "--tenant", "acme", "--file", str(file)]).exit_code == 2


def test_without_a_file_the_entry_is_printed_beside_the_key() -> None:
    made = RUN.invoke(app, ["keys", "new", "--tenant", "acme"])
    (entry,) = yaml.safe_load(made.stderr)["tenants"]["acme"]["keys"]
    assert entry["sha256"] == hashlib.sha256(made.stdout.strip().encode()).hexdigest()
    assert RUN.invoke(app, ["keys", "new", "--tenant", "no/pe"]).exit_code == 2


SHA = "0" * 64


@pytest.mark.parametrize(
    "text, said",
    [
        ("tenants: {a: {keys: [{id: k, sha256: abc}]}}", "sha256"),
        (f"tenants: {{a: {{keys: [{{id: k, sha256: {SHA}x}}]}}}}", "sha256"),
        (
            f"tenants: {{a: &same {{keys: [{{id: k, sha256: '{SHA}'}}]}}, b: *same}}",
            "twice",
        ),
        ("tenants: {a: {role: admin}}", "role"),
        ("tenants: {a: {roles: [root]}}", "roles"),
        ("tenants: {'a@b': {}}", "tenants"),
        ("tenants: {a: {requests_per_minute: -1}}", "requests_per_minute"),
        ("[1, 2", "YAML"),
        ("x" * (MAX_FILE_BYTES + 1), "larger"),
    ],
)
def test_a_file_that_is_not_right_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfiguration, match=said):
        load_keys(file)


def test_a_broken_or_absent_file_keeps_the_keys_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    key = RUN.invoke(app, ["keys", "new", "--tenant", "acme", "--file", str(file)]).stdout.strip()
    good = file.read_text()
    book = KeyBook(file)
    for spoil in (lambda: file.write_text("tenants: 7"), file.unlink):
        spoil()
        assert not book.refresh() and not book.refresh()
        assert book.find(key)
    assert [record.message for record in caplog.records].count("keys_not_reloaded") == 2
    file.write_text(good)
    assert book.refresh() and book.find(key)
