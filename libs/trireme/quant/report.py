"""What quantization did to a checkpoint, by kind of weight and as JSON."""

from __future__ import annotations

from typing import Any, Final

from trireme.quant.weight_error import WeightError, pooled
from trireme.quant.writing import QuantizationReport

ALL: Final = "all"
"""The row of all kinds together, the last one."""


def errors_by_kind(report: QuantizationReport) -> dict[str, tuple[int, WeightError]]:
    """The number of matrices of each kind and their pooled error; kinds in order of appearance."""
    kinds = dict.fromkeys(weight.kind for weight in report.weights)
    found = {kind: tuple(weight.error for weight in report.weights if weight.kind == kind) for kind in kinds}
    found[ALL] = tuple(weight.error for weight in report.weights)
    return {kind: (len(errors), pooled(errors)) for kind, errors in found.items()}


def bits_per_weight(report: QuantizationReport) -> float:
    """Of the quantized weights, with their scales and zero points."""
    return 8 * report.quantized_bytes / sum(weight.error.elements for weight in report.weights)


def report_fields(report: QuantizationReport) -> dict[str, Any]:
    """The report, ready for JSON; sizes in bytes, absolute errors in the weights' own unit."""
    return {
        "format": report.form.name,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "bits_per_quantized_weight": bits_per_weight(report),
        "kinds": {
            kind: {"matrices": count, **_error_fields(error)}
            for kind, (count, error) in errors_by_kind(report).items()
        },
        "weights": {
            weight.name: {"shape": list(weight.stored.shape), **_error_fields(weight.error)}
            for weight in report.weights
        },
    }


def _error_fields(error: WeightError) -> dict[str, float]:
    return {
        "elements": error.elements,
        "max_abs_error": error.max_abs,
        "relative_frobenius_error": error.relative_frobenius,
    }
