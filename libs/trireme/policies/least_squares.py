"""Least squares with no coefficient below zero, for a handful of coefficients, without numpy."""

from __future__ import annotations

from collections.abc import Sequence


def non_negative_solution(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Coefficients w >= 0 that bring rows * w close to `wanted`.

    Args:
        rows: (samples, coefficients); columns of comparable size.
        wanted: (samples,).
    """
    size = len(rows[0])
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
    moments = [sum(row[i] * value for row, value in zip(rows, wanted, strict=True)) for i in range(size)]
    return solve_non_negative(gram, moments)


def solve_non_negative(gram: Sequence[Sequence[float]], moments: Sequence[float]) -> list[float]:
    """The same from normal equations: `gram` (k, k) is the sum of row^T row, `moments` (k,) of row^T value.

    What comes out negative is left out, most negative first: not the exact optimum, but one that depends
    on the data alone and ends after k solutions. Columns that say the same share the weight.
    """
    size = len(moments)
    kept = [index for index in range(size) if gram[index][index] > 0.0]
    while kept:
        found = _solve([[gram[i][j] for j in kept] for i in kept], [moments[i] for i in kept])
        worst = min(range(len(kept)), key=found.__getitem__)
        if found[worst] >= 0.0:
            weights = [0.0] * size
            for index, weight in zip(kept, found, strict=True):
                weights[index] = weight
            return weights
        del kept[worst]
    return [0.0] * size


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots; a trace of ridge keeps it solvable where columns depend on each other."""
    size = len(right)
    ridge = 1e-10 * max(matrix[i][i] for i in range(size))
    rows = [[*matrix[i], right[i]] for i in range(size)]
    for i in range(size):
        rows[i][i] += ridge
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(column + 1, size):
            factor = rows[row][column] / rows[column][column]
            for index in range(column, size + 1):
                rows[row][index] -= factor * rows[column][index]
    found = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(rows[row][index] * found[index] for index in range(row + 1, size))
        found[row] = (rows[row][size] - rest) / rows[row][row]
    return found
