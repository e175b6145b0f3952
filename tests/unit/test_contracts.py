"""The contracts: every name has a comment, units are in names, paths equal packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2] / "proto"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.proto"))

FOREIGN = {Path("trireme/wire/oip/v2/oip.proto"): "inference"}
"""Contracts whose package and names others chose; ours are the path and the comments."""
OWN = [path for path in FILES if path not in FOREIGN]


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    out = tmp_path_factory.mktemp("descriptors") / "all.pb"
    arguments = ["protoc", f"-I{ROOT}", "--include_source_info", f"--descriptor_set_out={out}"]
    assert protoc.main([*arguments, *map(str, FILES)]) == 0
    files = FileDescriptorSet.FromString(out.read_bytes()).file
    return {file.name: file for file in files}


def commented(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    for location in file.source_code_info.location:
        yield tuple(location.path), location.leading_comments.strip()


def named_places(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    for i, message in enumerate(file.message_type):
        yield from places_of_message(message, (4, i), message.name)
    for i, enum in enumerate(file.enum_type):
        yield (5, i), enum.name
        for j, value in enumerate(enum.value):
            yield (5, i, 2, j), value.name
    for i, service in enumerate(file.service):
        yield (6, i), service.name
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), f"{service.name}.{method.name}"


def places_of_message(
    message: DescriptorProto, place: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield place, name
    for j, member in enumerate(message.field):
        yield (*place, 2, j), f"{name}.{member.name}"
    for j, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from places_of_message(inner, (*place, 3, j), f"{name}.{inner.name}")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_path_is_the_package(path: Path, descriptors: dict[str, FileDescriptorProto]) -> None:
    file = descriptors[str(path)]
    folder = ".".join(path.parent.parts)
    assert file.package == FOREIGN.get(path, folder)
    assert re.fullmatch(r"trireme\.wire\.[a-z]+\.v\d+", folder)
    assert file.syntax == "proto3"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_name_has_a_comment(path: Path, descriptors: dict[str, FileDescriptorProto]) -> None:
    comments = dict(commented(descriptors[str(path)]))
    bare = [name for place, name in named_places(descriptors[str(path)]) if not comments.get(place)]
    assert not bare


@pytest.mark.parametrize("path", OWN, ids=str)
def test_names_follow_one_style(path: Path, descriptors: dict[str, FileDescriptorProto]) -> None:
    file = descriptors[str(path)]
    for message in file.message_type:
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name), message.name
        for member in message.field:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", member.name), member.name
    for enum in file.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert all(value.name.startswith(prefix) for value in enum.value), enum.name
        assert enum.value[0].name == prefix + "UNSPECIFIED" and enum.value[0].number == 0


UNIT = re.compile(
    r"_(s|ms|us|unix_s|tokens|bytes|joules|w|g|per_s|per_kwh|per_engine_s)$|^(joules|timeout_s)$"
)
MEASURE = re.compile(r"(time|duration|latency|energy|memory|size|_age|delay)")


@pytest.mark.parametrize("path", OWN, ids=str)
def test_measured_fields_carry_their_unit(path: Path, descriptors: dict[str, FileDescriptorProto]) -> None:
    for message in descriptors[str(path)].message_type:
        for member in message.field:
            is_number = member.type in (1, 2, 3, 4, 5, 13)
            if is_number and MEASURE.search(member.name) and member.name not in ("vocabulary_size",):
                assert UNIT.search(member.name), f"{message.name}.{member.name} has no unit"
