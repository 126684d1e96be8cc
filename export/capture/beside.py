"""Tables beside data: positional values laid out to be broadcast with what was followed, the rows at `position_ids`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import fx

from . import tables
from .axes import Axes, Role, axis_of, position
from .filled import fill_value
from .place import Placed, gather_by_distance, gather_rows, gather_square, slice_positions
from .tables import ByDistance, NotStable, PerKey, Square, TooLarge
from .trace import refuse

if TYPE_CHECKING:
    from .follow import Follower


def beside(
    f: Follower, operand: fx.Node, axes: Axes, order: Sequence[int], dtype: torch.dtype, asker: fx.Node
) -> ir.Value:
    """A positional operand, laid out to be broadcast with data of `axes` whose dimensions stand in `order`.

    Every axis in `axes` is a single atom, a fixed size or empty, so that each dimension has one meaning.
    """
    shape = f.trace.shape(operand)
    missing = len(axes) - len(shape)
    along = [i + missing for i, size in enumerate(shape) if size in (f.trace.seq, f.trace.source)]
    along = [i for i in along if axes[i]]
    if len(f.trace.lengths_in(shape)) != len(along) or f.trace.is_counted(shape):
        if (number := fill_value(f.trace, operand)) is not None:
            return f.emit.constant(torch.tensor(number, dtype=dtype).numpy())
        raise refuse(operand, f"its shape {shape} cuts the sequence in pieces")
    roles = [position(axes[i]) for i in along]
    if Role.SOURCE in roles and len(set(roles)) > 1:  # between two sequences
        return _flat(f, operand, axes, order, dtype, asker)
    allowed = {f.role} if f.is_whole else {Role.QUERY, Role.KEY}
    if not set(roles) <= allowed or (not f.is_whole and len(set(roles)) < len(roles)):
        raise refuse(asker, "a table over positions meets an axis that is not one of positions")
    if roles == [Role.KEY, Role.QUERY]:
        along.reverse()
    try:
        placed = _placed(f, operand, missing, along, axes, dtype)
    except NotStable:
        why = "its value at a position depends on the length of the whole sequence"
        raise refuse(operand, why, "a table by absolute position would work") from None
    except TooLarge as size:
        why = f"a table of {size.args[0] / 2**20:.0f} MiB would be needed"
        raise refuse(operand, why, "give a smaller --max-length") from None
    return placed.arranged(f.emit, order, axis_of(axes, Role.BATCH))


def _flat(
    f: Follower, operand: fx.Node, axes: Axes, order: Sequence[int], dtype: torch.dtype, asker: fx.Node
) -> ir.Value:
    """A table between source and target positions that holds one value for all of them, as an empty bias does."""
    values = []
    for length, other in ((7, 5), (f.max_length, 9)):
        with f.positional.given(other=other):
            value = f.positional.value(operand, length)
        for i, size in enumerate(f.trace.shape(operand)):
            first = value.narrow(i, 0, 1)
            if size in (f.trace.seq, f.trace.source):
                if not tables.close(value, first.expand_as(value)):
                    raise refuse(asker, "a table between source and target positions is not followed")
                value = first
        values.append(value)
    table = values[0].reshape([1] * (len(axes) - values[0].dim()) + list(values[0].shape))
    if not tables.close(*values):
        raise refuse(asker, "a table between source and target positions changes with their lengths")
    return Placed.constant(f.emit, table.to(dtype), "table").arranged(f.emit, order, None)


def _placed(f: Follower, operand: fx.Node, missing: int, along: list[int], axes: Axes, dtype: torch.dtype) -> Placed:
    """along: the axes of positions, that of the queries before that of the keys."""
    length = f.max_length

    def full_rank(value: torch.Tensor) -> torch.Tensor:
        return value.reshape([1] * missing + list(value.shape))

    if not along:
        name = str(operand.target) if operand.op == "get_attr" else "table"
        return Placed.constant(f.emit, full_rank(f.constant(operand)).to(dtype), name)
    if len(along) == 1:
        table = tables.read_rows(lambda n: full_rank(f.positional.value(operand, n)), along[0], length)
        role = position(axes[along[0]])
        if role is Role.QUERY:
            return gather_rows(f.emit, table.to(dtype), along[0])
        f.by_key |= role is Role.KEY and not table.eq(table.narrow(along[0], 0, 1)).all()
        return slice_positions(f.emit, table.to(dtype), along[0], role or Role.KEY)
    query, key = along
    rest = [i for i in range(len(axes)) if i not in along]

    def rows(r: torch.Tensor, n: int) -> torch.Tensor:
        value = full_rank(f.positional.rows(operand, query - missing, r, n))
        return value.permute(*rest, query, key)

    return place_square(f, tables.read_square(rows, length), rest, query, key, dtype)


def place_square(
    f: Follower, read: PerKey | ByDistance | Square, rest: list[int], query: int, key: int, dtype: torch.dtype
) -> Placed:
    """A value over (query, key) as dimensions `rest`, `query` and `key` of a tensor."""
    table, whole = read.table.to(dtype), f.role if f.is_whole else None
    f.by_key = True
    if isinstance(read, PerKey):
        placed = slice_positions(f.emit, table, table.dim() - 1, whole or Role.KEY)
        return Placed(placed.value, tuple((*rest, key)[i] for i in placed.dims))
    if isinstance(read, ByDistance):
        return gather_by_distance(f.emit, table, f.max_length, rest, query, key, whole)
    return gather_square(f.emit, table, rest, query, key, whole)
