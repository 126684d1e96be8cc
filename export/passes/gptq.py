"""Rounding that knows the inputs: what one number loses, those that are rounded after it make up for (GPTQ).

Frantar et al., 2022. Rows are rounded in the order of how large their inputs are. Every block's scale is chosen before,
so that blocks stay as they lie and the operator needs no index of groups.
"""

from __future__ import annotations

import numpy as np
import torch

from .blocks import Blocks, Bytes, Floats, quantised

# Of the mean of the diagonal, added to it: 1 % as in the paper, more where fewer inputs than a hundred for each row of
# the matrix came: their products then say as much of chance as of the model, and believed they do more harm than good.
DAMPING = 0.01
AT_ONCE = 64  # rows after which the rest of a matrix learns of their errors


def rounded(
    matrix: Floats, hessian: torch.Tensor, count: int, bits: int, block_size: int, *, symmetric: bool = True
) -> Blocks:
    """The matrix (k, n) in `bits` by blocks along k, for `count` inputs whose products summed up are `hessian`, (k, k).

    Where that says nothing, for no inputs came or some were not finite, each number is rounded to the nearest.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all() or not diagonal.any():
        return quantised(matrix, bits, block_size, symmetric=symmetric)
    order = diagonal.argsort(descending=True, stable=True)
    factor = _factor(hessian.double()[order][:, order], max(DAMPING, len(order) / count))
    importance = torch.empty_like(factor[0])
    importance[order] = factor.diagonal() ** -2  # what is lost by an error that no later row makes up for
    start = quantised(matrix, bits, block_size, symmetric=symmetric, importance=importance.float().numpy())
    at = order.numpy()
    block = at // block_size
    rows = np.ascontiguousarray(matrix[at], np.float32)
    numbers = np.empty(matrix.shape, np.uint8)
    numbers[at] = _numbers(
        rows, factor.float().numpy(), start.scales.T[block], start.middles().T[block], (1 << bits) - 1
    )
    return start.with_numbers(numbers)


def _factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper triangle whose transpose times itself is the inverse: from the triangle of the matrix turned around."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    damped = hessian + identity * (damping * hessian.diagonal().mean())
    turned = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(turned, identity, upper=True)


def _numbers(rows: Floats, factor: Floats, scales: Floats, zeros: Floats, most: int) -> Bytes:
    """(k, n): rows rounded one after the other; `rows` is changed. scales, zeros: of each row, (k, n).

    In numpy, for threads that meet after every row take many times as long where others use the cores as well.
    """
    steps = np.where(scales == 0, np.float32(1), scales)
    numbers = np.empty(rows.shape, np.uint8)
    for first in range(0, len(rows), AT_ONCE):
        end = min(len(rows), first + AT_ONCE)
        errors = np.empty_like(rows[first:end])
        for i in range(first, end):
            found = np.clip(np.rint(rows[i] / steps[i]) + zeros[i], 0, most)
            numbers[i] = found
            errors[i - first] = (rows[i] - (found - zeros[i]) * scales[i]) / factor[i, i]
            rows[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - first]
        rows[end:] -= factor[first:end, end:].T @ errors
    return numbers
