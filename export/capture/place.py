"""Put the tables of positional values into the graph: rows at `position_ids`, keys up to the total length.

A table is made at export time for the longest length; at run time it is only read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from .axes import Role
from .emitter import Emitter

BATCH = -1  # in `dims`: the batch that gathering rows puts in front


@dataclass(frozen=True)
class Placed:
    """A value whose dimensions are the axes `dims` of the data that it meets; all other axes are of size 1."""

    value: ir.Value
    dims: tuple[int, ...]

    @classmethod
    def constant(cls, emit: Emitter, table: torch.Tensor, name: str) -> Placed:
        dims = tuple(i for i, size in enumerate(table.shape) if size != 1)
        return cls(initializer(emit, table.squeeze(), name), dims)

    def arranged(self, emit: Emitter, order: Sequence[int], batch: int | None) -> ir.Value:
        """The value with one dimension for every axis, in `order`, leading ones of size 1 left out."""
        dims = [batch if d == BATCH else d for d in self.dims]
        want = [i for i in order if i in dims]
        value = self.value
        if want != dims:
            value = emit.op("Transpose", value, perm=[dims.index(i) for i in want])
        if not want:
            return value
        shown = list(order)[list(order).index(want[0]) :]
        missing = [i for i, axis in enumerate(shown) if axis not in want]
        return emit.op("Unsqueeze", value, emit.constant(missing, np.int64)) if missing else value


def initializer(emit: Emitter, table: torch.Tensor, name: str = "table") -> ir.Value:
    """An initializer, shared with every table of the same values."""
    table = table.contiguous()
    digest = hashlib.sha256(table.reshape(-1).view(torch.uint8).numpy().tobytes())
    return emit.shared((table.dtype, tuple(table.shape), digest.hexdigest()), table, name)


def _squeezed(table: torch.Tensor, front: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """`front` axes first, then the others that are not of size 1; and which those are."""
    rest = tuple(i for i in range(table.dim()) if i not in front and table.shape[i] != 1)
    dropped = [i for i in range(table.dim()) if i not in front and table.shape[i] == 1]
    moved = table.permute(*front, *rest, *dropped)
    return moved.reshape(moved.shape[: len(front) + len(rest)]), rest


def gather_rows(emit: Emitter, table: torch.Tensor, axis: int) -> Placed:
    """The rows of `axis` at each row's new positions: (batch, seq, ...)."""
    rows, rest = _squeezed(table, [axis])
    return Placed(emit.op("Gather", initializer(emit, rows), emit.given("position_ids"), axis=0), (BATCH, axis, *rest))


def slice_positions(emit: Emitter, table: torch.Tensor, axis: int, role: Role) -> Placed:
    """The first rows of `axis`, as many as there are positions of `role`."""
    rows, rest = _squeezed(table, [axis])
    value = emit.op("Slice", initializer(emit, rows), emit.constant([0]), emit.size(role), emit.constant([0]))
    return Placed(value, (axis, *rest))


def _positions(emit: Emitter, role: Role) -> ir.Value:
    """(n,) int64: 0 to the number of positions of `role`."""
    end = emit.op("Squeeze", emit.size(role))
    return emit.op("Range", emit.constant(0), end, emit.constant(1))


def _squares(rest: Sequence[int], query: int, key: int, kept: Sequence[int], whole: bool) -> tuple[int, ...]:
    """The dimensions of a table over pairs of positions; new positions bring their batch along."""
    front = (query, key) if whole else (BATCH, query, key)
    return (*front, *(rest[i] for i in kept))


def gather_by_distance(
    emit: Emitter, table: torch.Tensor, length: int, rest: Sequence[int], query: int, key: int, whole: Role | None
) -> Placed:
    """table: (..., 2 * length - 1): its entries at query position - key position.

    Gives (batch, seq, total, ...); where the positions are all there, those of the role `whole`, (n, n, ...).
    """
    rows, kept = _squeezed(table, [table.dim() - 1])
    if whole is None:
        position = emit.op("Unsqueeze", emit.given("position_ids"), emit.constant([2]))  # (batch, seq, 1)
    else:
        position = emit.op("Unsqueeze", _positions(emit, whole), emit.constant([1]))  # (n, 1)
    keys = _positions(emit, whole or Role.KEY)
    distance = emit.op("Sub", emit.op("Add", position, emit.constant(length - 1)), keys)
    value = emit.op("Gather", initializer(emit, rows), distance, axis=0)
    return Placed(value, _squares(rest, query, key, kept, whole is not None))


def gather_square(
    emit: Emitter, table: torch.Tensor, rest: Sequence[int], query: int, key: int, whole: Role | None
) -> Placed:
    """table: (..., length, length): its rows at the new positions, or all there are; columns up to the total length."""
    rank = table.dim()
    rows, kept = _squeezed(table, [rank - 2, rank - 1])
    if whole is None:
        gathered = emit.op("Gather", initializer(emit, rows), emit.given("position_ids"), axis=0)
        value = emit.op("Slice", gathered, emit.constant([0]), emit.size(Role.KEY), emit.constant([2]))
    else:
        size = emit.size(whole)
        ends = emit.op("Concat", size, size, axis=0)
        value = emit.op("Slice", initializer(emit, rows), emit.constant([0, 0]), ends, emit.constant([0, 1]))
    return Placed(value, _squares(rest, query, key, kept, whole is not None))
