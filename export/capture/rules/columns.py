"""Columns beside the keys of attention scores, as sinks are: joined before the softmax and cut off behind it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ..axes import Atom, Axis, Role, position
from ..follow import Follower, followed
from ..tensor import Tensor, from_working, working
from ..trace import refuse


def is_keys(x: Any, dim: int) -> bool:
    """Whether an axis lists keys, beside others that hold positions, as those of scores do."""
    if not isinstance(x, Tensor) or len(x.axes[dim]) != 1 or x.axes[dim][0].role is not Role.KEY:
        return False
    return any(position(axis) for i, axis in enumerate(x.axes) if i != dim)


def joined_to_keys(f: Follower, node: fx.Node, tensors: Sequence[Any], dim: int) -> Axis | None:
    """The axis of keys with the columns that a cat joins to them; None where it joins something else."""
    found = [i for i, t in enumerate(tensors) if is_keys(t, dim)]
    if len(found) != 1:
        return None
    widths = [f.trace.sizes(t.meta["val"])[dim] if isinstance(t, fx.Node) else _width(f, t, dim) for t in tensors]
    keys = tensors[found[0]].axes[dim][0]
    before, after = widths[: found[0]], widths[found[0] + 1 :]
    if not all(isinstance(width, int) for width in (*before, *after)):
        raise refuse(node, "joins keys to keys", "attend to all positions of one sequence")
    return (Atom(Role.KEY, before=keys.before + sum(before), after=keys.after + sum(after)),)


def _width(f: Follower, x: Tensor, dim: int) -> Any:
    size = f.symbols.product(x.axes[dim])
    return int(size) if sympy.sympify(size).is_Integer else size


def cut_columns(f: Follower, node: fx.Node, x: Tensor, dim: int, start: Any, before: Any, after: Any) -> Tensor:
    """x[start : start + after] along keys and columns, `before` in all: some columns less."""
    keys = x.axes[dim][0]
    dropped = sympy.sympify(before - after - start) if isinstance(start, int) else None
    if dropped is None or not dropped.is_Integer or not (0 <= start <= keys.before and 0 <= dropped <= keys.after):
        raise refuse(node, "takes a part of the keys", "a mask would work")
    value, order = working(f.emit, x)
    bounds = [f.emit.constant([int(b)]) for b in (start, -dropped if dropped else sys.maxsize)]
    value = f.emit.op("Slice", value, *bounds, f.emit.constant([order.index(dim)]))
    axis = (Atom(Role.KEY, before=keys.before - start, after=keys.after - int(dropped)),)
    axes = tuple(axis if i == dim else own for i, own in enumerate(followed(x.axes)))
    result = from_working(value, axes, order, x.dtype)
    made = x.value.producer()
    queries = [i for i, own in enumerate(axes) if i != dim and position(own)]
    if f.observed is not None and made is not None and made.op_type == "Softmax" and len(queries) == 1:
        f.observed.append((node, result, queries[0], dim))
    return result
