"""`trireme quantize`: a checkpoint with its weights in few bits, and how far they are from the old ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trireme.cli.failing import failing_clearly

if TYPE_CHECKING:
    from trireme.quant.formats import WeightFormat
    from trireme.quant.writing import QuantizationReport

REPORT = "quantization_report.json"


class FormatChoice(StrEnum):
    """Formats by the short names of the command line."""

    FP6 = "fp6"
    FP6_E2M3 = "fp6_e2m3"
    FP6_E3M2 = "fp6_e3m2"
    FP5 = "fp5"
    INT4 = "int4"
    INT8 = "int8"


@failing_clearly
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint in Hugging Face layout.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    precision: Annotated[
        FormatChoice,
        typer.Option("--format", help="fp6 is the nearer of its two kinds; int4 has a scale per group."),
    ] = FormatChoice.FP6,
    group_size: Annotated[int, typer.Option(help="Input channels per scale of int4: 32, 64 or 128.")] = 64,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="A zero point per group of int4, for lopsided weights.")
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Quantize embed_tokens, lm_head or wte too; repeatable. Default: they are kept."),
    ] = None,
) -> None:
    """Quantize the weights of a checkpoint's linear layers; embedding, head and norms stay as they are.

    Writes codes, scales and quantization_report.json to a new directory, and prints the error of each kind
    of weight: the largest difference of one weight, and the norm of all differences over that of the weights.

        trireme quantize checkpoints/trireme-py-6m --format fp6 --out quantized/trireme-py-6m-fp6
        trireme quantize checkpoints/trireme-py-6m --format int4 --group-size 32 --zero-points --out int4
    """
    import json

    from trireme.quant.format_choice import nearest_format
    from trireme.quant.report import report_fields
    from trireme.quant.writing import check_source, quantize_checkpoint

    candidates = _candidates(precision, group_size, zero_points)
    check_source(checkpoint)
    form = nearest_format(checkpoint, candidates)
    if len(candidates) > 1:
        others = ", ".join(other.name for other in candidates if other != form)
        typer.echo(f"{form.name} is nearer to these weights than {others}")
    report = quantize_checkpoint(checkpoint, out, form, also=tuple(also or ()))
    (out / REPORT).write_text(json.dumps(report_fields(report), indent=2) + "\n", encoding="utf-8")
    _show(report)
    typer.echo(f"written to {out}")


def _candidates(precision: FormatChoice, group_size: int, zero_points: bool) -> tuple[WeightFormat, ...]:
    from trireme.errors import InvalidConfiguration
    from trireme.quant.formats import GROUP_SIZES, weight_format
    from trireme.quant.precisions import candidate_formats

    if precision is FormatChoice.INT4:
        if group_size not in GROUP_SIZES:
            allowed = ", ".join(str(size) for size in GROUP_SIZES)
            raise InvalidConfiguration(f"--group-size is {group_size}; use one of {allowed}")
        return (weight_format(f"int4_g{group_size}" + ("_zeros" if zero_points else "")),)
    if zero_points:
        raise InvalidConfiguration(f"--zero-points is for int4, not for {precision.value}")
    return candidate_formats(precision.value)


def _show(report: QuantizationReport) -> None:
    from trireme.cli.showing import table, wide_console
    from trireme.quant.report import bits_per_weight, errors_by_kind

    shown = table("kind", "matrices", "weights", "max abs error", "relative error")
    for kind, (count, error) in errors_by_kind(report).items():
        shown.add_row(
            kind, str(count), f"{error.elements:,}", f"{error.max_abs:.3g}", f"{error.relative_frobenius:.3%}"
        )
    console = wide_console()
    console.print(shown)
    bits = bits_per_weight(report)
    console.print(
        f"{report.form.name}: {bits:.2f} bits per quantized weight, scales included; "
        f"{report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after"
    )
