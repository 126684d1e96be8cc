"""Where new positions meet all positions element by element: what was looked along as keys is needed whole.

A mask made of the ids themselves (`(ids != 0)[:, None, None]`) says of each key whether it may be seen: it becomes a
cache entry of one number for each position.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, has, position
from ..follow import Follower
from ..tensor import Tensor, laid_out, refined
from ..trace import refuse


def met(f: Follower, node: fx.Node, operands: Sequence[Any]) -> tuple[list[Any], dict[int, Axis]]:
    """The operands with those over all positions that have to be, and the axes that only tables have."""
    rank = node.meta["val"].dim()
    spread: dict[int, Axis] = {}
    if f.is_whole or not any(isinstance(o, Tensor) and _places(o, rank) for o in operands):
        return list(operands), spread
    query, key = _roles(f, operands, rank)
    made = []
    for operand in operands:
        places = _places(operand, rank) if isinstance(operand, Tensor) else {}
        wrong = key is not None and places.get(key) is Role.QUERY and (query != key)
        made.append(whole_rows(f, node, operand) if wrong and len(places) == 1 else operand)
    for axis, role in ((query, Role.QUERY), (key, Role.KEY)):
        held = any(isinstance(o, Tensor) and axis in _places(o, rank) for o in made)
        if axis is not None and not held:
            spread[axis] = (Atom(role),)
    return made, spread


def _places(tensor: Tensor, rank: int) -> dict[int, Role]:
    """The axes of the result along which a tensor has positions."""
    found = ((i + rank - tensor.rank, position(axis)) for i, axis in enumerate(tensor.axes))
    return {i: role for i, role in found if role in (Role.QUERY, Role.KEY)}


def _roles(f: Follower, operands: Sequence[Any], rank: int) -> tuple[int | None, int | None]:
    """The axes of the result that hold new and all positions, the earlier those of the queries."""
    along: dict[int, set[Role | None]] = {}
    for operand in operands:
        if isinstance(operand, Tensor):
            for i, role in _places(operand, rank).items():
                along.setdefault(i, set()).add(role)
        elif isinstance(operand, fx.Node) and isinstance(operand.meta.get("val"), torch.Tensor):
            shape = f.trace.shape(operand)
            for i, size in enumerate(shape):
                if size == f.trace.seq:
                    along.setdefault(i + rank - len(shape), set())
    if len(along) != 2:
        return None, None
    keys = [i for i, roles in along.items() if Role.KEY in roles]
    key = keys[0] if len(keys) == 1 else max(along)
    return next(i for i in along if i != key), key


def whole_rows(f: Follower, node: fx.Node, tensor: Tensor) -> Tensor:
    """A tensor over all positions; truth values are kept as numbers, which every cache can hold."""
    if any(has(axis, Role.QUERY) and len(axis) > 1 for axis in tensor.axes):
        raise refuse(node, "compares positions along an axis that holds more than positions")
    return f.whole(tensor, "data")


def apart(f: Follower, operand: Any, axes: Axes) -> Any:
    """A table with as many axes as `axes` taken apart have, where it has size 1 along one that is."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return operand
    shape = f.trace.shape(operand)
    pieces = [len(refined((axis,))) for axis in axes[len(axes) - len(shape) :]]
    for i in range(len(shape) - 1, 0, -1):  # more in front of the first change nothing
        for _ in range(pieces[i] - 1 if shape[i] == 1 else 0):
            operand = f.derived(operand, _unsqueezed(i))
    return operand


@functools.cache
def _unsqueezed(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def unsqueezed(table: torch.Tensor) -> torch.Tensor:
        return table.unsqueeze(dim)

    return unsqueezed


def alike(f: Follower, operands: Sequence[Any]) -> list[Any]:
    """Operands that meet along axes of the same pieces: features beside positions in one axis may be cut in two."""

    def pieces(tensor: Tensor) -> list[list[Any]]:
        return [[(a.role, a.size) for a in axis] for axis in tensor.axes if has(axis, Role.BATCH) and len(axis) > 1]

    folded = [o for o in operands if isinstance(o, Tensor) and pieces(o)]
    if len(folded) < 2 or all(pieces(o) == pieces(folded[0]) for o in folded):
        return list(operands)
    return [_uncut(f, o) if isinstance(o, Tensor) and pieces(o) else o for o in operands]


def _uncut(f: Follower, tensor: Tensor) -> Tensor:
    """The tensor with what is cut in pieces beside positions in one piece again."""
    axes = []
    for axis in tensor.axes:
        features = [a for a in axis if a.role is None]
        whole = (Atom(size=math.prod(a.size for a in features)),) if len(features) > 1 else tuple(features)
        axes.append((*(a for a in axis if a.role), *whole) if has(axis, Role.BATCH) else axis)
    if any(a.role for axis in tensor.axes for a in axis[len([b for b in axis if b.role]) :]):
        return tensor  # features before positions
    lies = tuple(part for axis in tensor.axes for part in _parts(axis))
    new = tuple(part for axis in axes for part in _parts(axis))
    return Tensor(laid_out(f.emit, tensor, lies), new, tuple(axes), tensor.dtype)


def _parts(axis: Axis) -> list[Axis]:
    """Each position or batch of an axis by itself, its features together."""
    features = tuple(a for a in axis if a.role is None)
    return [*((a,) for a in axis if a.role), *([features] if features or not axis else [])]
