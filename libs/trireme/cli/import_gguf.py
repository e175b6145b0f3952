"""`trireme import-gguf`: a checkpoint of llama.cpp in the layout that variants are read from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trireme.cli.failing import failing_clearly


class WeightType(StrEnum):
    """What weights are written as."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@failing_clearly
def import_gguf(
    file: Annotated[Path, typer.Argument(help="A GGUF file of a Llama, Mistral, Qwen2 or Qwen3.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: Annotated[
        WeightType,
        typer.Option(
            help="auto loses nothing: Q4_0 keeps its codes, float16 and bfloat16 stay, the rest is float32."
        ),
    ] = WeightType.AUTO,
) -> None:
    """Write a GGUF file as a checkpoint directory: weights, tokenizer, chat template and end tokens.

    trireme import-gguf model-q8_0.gguf checkpoints/model
    trireme import-gguf model-q6_k.gguf checkpoints/model --dtype bfloat16
    """
    from trireme.gguf_import.importing import import_gguf as write_checkpoint

    report = write_checkpoint(file, out, dtype=dtype.value)
    types = ", ".join(f"{count} of {form}" for form, count in sorted(report.forms.items()))
    typer.echo(f"{report.model_type} with tensors of {types}; {report.coded} keep their codes as int4_g32")
    typer.echo(
        f"{report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after, "
        f"written to {out}"
    )
