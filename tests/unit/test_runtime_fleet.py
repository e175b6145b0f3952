"""fleet.yaml: paths start at the file, names must fit, and a mistake is named by its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trireme.errors import InvalidConfiguration
from trireme.runtime.fleet import load_fleet

TWO = """
models:
  chat: {default: big, variants: {small: {checkpoint: a}, big: {checkpoint: /abs/b}}}
  embed: {variants: {tiny: {checkpoint: ../c}}}
workers: [{name: one}, {name: two, variants: [small]}]
kvstore: {directory: blocks}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", TWO)
    monkeypatch.chdir(tmp_path)
    fleet = load_fleet(Path("deep/fleet.yaml"))
    assert fleet.variant("small").checkpoint == tmp_path / "deep" / "a"
    assert fleet.variant("big").checkpoint == Path("/abs/b")
    assert fleet.variant("tiny").checkpoint == tmp_path / "c"
    assert fleet.kvstore.directory == tmp_path / "deep" / "blocks"
    assert fleet.power.carbon.csv is None


def test_who_serves_what(tmp_path: Path) -> None:
    fleet = load_fleet(written(tmp_path, TWO))
    one, two = fleet.workers
    assert fleet.served_by(one) == ("big", "tiny"), "every model's default"
    assert fleet.served_by(two) == ("small",)
    assert fleet.model_of("small") == "chat"
    assert fleet.models["embed"].default_variant == "tiny"


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("", "(top level)", ""),
        ("models: {}", "models", ""),
        ("models: {m: {variants: {}}}", "models.m.variants", ""),
        ("models: {m: {variants: {v: {}}}}", "models.m.variants.v.checkpoint", ""),
        ("models: {m: {default: w, variants: {v: {checkpoint: a}}}}", "models.m", "'w'"),
        ("models: {m: {variants: {v: {checkpoint: a, dtype: int7}}}}", "models.m.variants.v.dtype", ""),
        ("models: {m: {variants: {v: {checkpoint: a}}}}\nmodelz: 1", "modelz", ""),
        ("models: {m: {variants: {v: {checkpoint: a}}}}\nworkers: []", "workers", ""),
        ("models: {m: {variants: {v: {checkpoint: a}}}}\nworkers: [{device: tpu}]", "workers.0.device", ""),
        (
            "models: {m: {variants: {v: {checkpoint: a}}}}\nworkers: [{variants: [w]}]",
            "(top level)",
            "unknown variants ['w']",
        ),
        (
            "models: {m: {variants: {v: {checkpoint: a}}}, n: {variants: {v: {checkpoint: a}}}}",
            "(top level)",
            "unique",
        ),
        ("models: {m: {variants: {v: {checkpoint: a}}}}\nworkers: [{}, {}]", "(top level)", "unique"),
        (
            "models: {m: {variants: {v: {checkpoint: a}}}}\npower: {carbon: {speedup: .nan}}",
            "power.carbon.speedup",
            "",
        ),
        ("models: {'../m': {variants: {v: {checkpoint: a}}}}", "models.../m.[key]", ""),
        (
            "models: {m: {variants: {v: {checkpoint: a}}, public_prefixes: [{system: a, text: b}]}}",
            "models.m.public_prefixes.0",
            "either",
        ),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, key: str, says: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load_fleet(written(tmp_path, text))
    assert caught.value.param == key
    assert key in caught.value.message and says in caught.value.message


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    for content in (b"models: [", b"\xff\xfe\x00", b"a: b: c"):
        path = tmp_path / "fleet.yaml"
        path.write_bytes(content)
        with pytest.raises(InvalidConfiguration, match=r"fleet\.yaml"):
            load_fleet(path)
    with pytest.raises(InvalidConfiguration, match="cannot read"):
        load_fleet(tmp_path / "absent.yaml")
    with pytest.raises(InvalidConfiguration, match="cannot read"):
        load_fleet(tmp_path)


def test_the_readmes_fleets_are_fleets(tmp_path: Path) -> None:
    readme = Path(__file__).resolve().parents[2] / "README.md"
    blocks = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    fleets = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"fleet-{number}.yaml"
        path.write_text(block, encoding="utf-8")
        fleets.append(load_fleet(path))
    swapping, few_bits = fleets
    assert [(group.policy, group.replicas, group.swap_mib) for group in swapping.workers] == [
        ("mlfq", 2, 256)
    ]
    assert swapping.kvstore.ssd_mib == 4096
    (variant,) = few_bits.models["code"].variants.values()
    assert (variant.precision, variant.kv_dtype, variant.speculate) == ("int8", "bf16", "auto")
