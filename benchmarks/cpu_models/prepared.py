"""The files that the contestants read: one set of weights in each one's format, kept on demand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu_models.random_weights import SHAPES, write_random_checkpoint
from benchmarks.fleet import CHECKPOINTS, REPOSITORY
from trireme.models.checkpoint import Checkpoint
from trireme.quant.format_choice import nearest_format
from trireme.quant.precisions import candidate_formats
from trireme.quant.writing import quantize_checkpoint

LLAMA_CPP = REPOSITORY / ".tools" / "llama_cpp" / "bin" / "python"
OPENVINO = REPOSITORY / ".tools" / "openvino" / "bin" / "python"
BYTES_PER_PARAMETER = 16
"""Of all files of a model together, about."""
_SEED = 20261121


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contestant with a file of its own."""

    name: str
    """`llama.cpp Q4_0`: who, and what the weights are."""
    module: str
    """In this package."""
    form: str
    """What the file is in: see `prepare`."""
    dtype: str = ""


def _ours(form: str) -> Entry:
    return Entry(name=f"trireme {form}", module="ours", form=form)


def _llama_cpp(form: str) -> Entry:
    return Entry(name=f"llama.cpp {form}", module="llama_cpp_peer", form=form)


def _openvino(bits: int) -> Entry:
    return Entry(name=f"openvino {bits}-bit", module="openvino_peer", form=f"openvino-{bits}")


ENTRIES = {
    "bf16": (_ours("bf16"), _llama_cpp("F16"), _llama_cpp("BF16"), _openvino(16)),
    "int8": (_ours("int8"), _llama_cpp("Q8_0"), _openvino(8)),
    "int4": (_ours("int4"), _llama_cpp("Q4_0"), _openvino(4)),
    "fp6": (_ours("fp6"), _ours("bf16"), _llama_cpp("Q6_K")),
}
"""Who takes turns for a format; ours first."""


def transformers(dtype: str) -> Entry:
    """PyTorch, beside the formats of 16 bits."""
    return Entry(name=f"transformers {dtype}", module="transformers_peer", form="bf16", dtype=dtype)


def python_of(entry: Entry) -> Path:
    """The interpreter of the environment that an entry runs in; it may not be there."""
    return {"llama_cpp_peer": LLAMA_CPP, "openvino_peer": OPENVINO}.get(entry.module, Path(sys.executable))


def source_checkpoint(model: str, work: Path) -> Path:
    """The bfloat16 checkpoint: random weights written now, or one of the trained family."""
    if model not in SHAPES:
        return CHECKPOINTS / model
    directory = work / model / "bf16"
    if not (directory / "model.safetensors").exists():
        shape = SHAPES[model]
        needed = shape.parameters * BYTES_PER_PARAMETER
        work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work).free
        if free < needed:
            raise SystemExit(f"{model} needs {needed >> 30} GiB in {work}, where {free >> 30} are free")
        write_random_checkpoint(shape, directory, seed=_SEED)
    return directory


def prepare(model: str, entry: Entry, work: Path, log: Path) -> Path:
    """The file or directory that an entry reads; written if it is not there.

    Head and embedding are in the entry's format like everything else.

    Raises:
        CalledProcessError: a peer's own tool failed; what it said is in `log`.
    """
    source = source_checkpoint(model, work)
    form = entry.form
    if form == "bf16":
        return source
    if entry.module == "ours":
        out = work / model / form
        if not out.exists():
            _quantize(source, out, form)
        return out
    if entry.module == "llama_cpp_peer":
        out = work / model / f"{form}.gguf"
        _run(LLAMA_CPP, "gguf_writing", [source, out, form], out, log)
        return out
    out = work / model / form
    _run(OPENVINO, "openvino_export", [source, out, form.removeprefix("openvino-")], out, log)
    return out


def remove(model: str, work: Path) -> None:
    """Delete what was prepared of a model."""
    shutil.rmtree(work / model, ignore_errors=True)


def _quantize(source: Path, out: Path, precision: str) -> None:
    with Checkpoint(source) as checkpoint:
        is_tied = checkpoint.config.tie_embeddings
    form = nearest_format(source, candidate_formats(precision))
    quantize_checkpoint(source, out, form, also=("embed_tokens",) if is_tied else ("lm_head",))


def _run(python: Path, module: str, words: list[object], out: Path, log: Path) -> None:
    """Let a peer's tool write `out`; it appears when it is complete."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}")
    command = [python, "-m", f"benchmarks.cpu_models.{module}", words[0], unfinished, *words[2:]]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as output:
        subprocess.run(
            [str(word) for word in command],
            cwd=REPOSITORY,
            env=environ,
            check=True,
            stdout=output,
            stderr=output,
        )
    unfinished.rename(out)
