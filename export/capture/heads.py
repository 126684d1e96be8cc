"""What of queries, keys and values are heads, told by the atoms of their axes."""

from __future__ import annotations

from .axes import Atom, Axis, Role, flat
from .follow import Follower, followed
from .lower import Side
from .tensor import Tensor, laid_out

Placed = tuple[Tensor, int, int]  # a factor, the axis of its positions and the axis of its features


def sides_of(f: Follower, q: Placed, k: Placed, v: Placed, grouped: bool) -> tuple[Side, Side, Side]:
    """What of queries, keys and values are heads. Keys and values are cached before their heads are repeated.

    grouped: fewer key heads than query heads stand for repeated ones (`enable_gqa`).
    """
    queries = query_side(f, q)
    q, sides = (queries.tensor, q[1], q[2]), [queries]
    for tensor, at, dim in (k, v):
        seen = tensor if grouped else _broadcast(q, (tensor, at, dim))
        atoms = _head_atoms((seen, at, dim))
        kept = tuple(a for a in atoms if not a.repeat)
        if atoms[: len(kept)] != kept or any(a.repeat for a in seen.axes[dim]):  # repeats that are no group of heads
            seen = _solid(f, seen)
            atoms = _head_atoms((seen, at, dim))
        sides.append(Side(seen, atoms, seen.axes[dim]))
    return sides[0], *_alike(f, sides[1], sides[2])


def query_side(f: Follower, q: Placed) -> Side:
    """The queries' heads and features; repeats among them are made."""
    tensor = _solid(f, q[0]) if any(a.repeat for a in flat(q[0].axes)) else q[0]
    return Side(tensor, _head_atoms((tensor, q[1], q[2])), tensor.axes[q[2]])


def _alike(f: Follower, k: Side, v: Side) -> tuple[Side, Side]:
    """Keys and values of equally many heads before they are repeated: of the fewer ones some repeats are made."""
    count = max(f.size(tuple(a for a in side.heads if not a.repeat)) for side in (k, v))
    k, v = (_with_heads(f, side, count) for side in (k, v))
    return k, v


def _with_heads(f: Follower, side: Side, count: int) -> Side:
    """A side whose first repeats are made until it has `count` heads, if that can be, without the others."""
    made: list[Atom] = []
    solid = {a: Atom(size=a.size) for a in side.heads if a.repeat}
    while f.size(tuple(made)) < count and len(made) < len(side.heads):
        made.append(side.heads[len(made)])
    if not any(a.repeat for a in made) or f.size(tuple(made)) != count:
        kept = tuple(a for a in side.heads if not a.repeat)
        return Side(_without_repeats(side.tensor), kept, side.dim)
    swapped = tuple(tuple(solid[a] if a in made and a.repeat else a for a in axis) for axis in side.tensor.axes)
    lies = tuple(tuple(a for a in axis if not a.repeat or a in made) for axis in side.tensor.axes)
    base = tuple(tuple(solid.get(a, a) for a in axis) for axis in lies)
    tensor = Tensor(laid_out(f.emit, side.tensor, lies), base, swapped, side.tensor.dtype)
    return Side(_without_repeats(tensor), tuple(solid.get(a, a) for a in made), side.dim)


def _head_atoms(side: Placed) -> Axis:
    tensor, at, dim = side
    rest = [axis for i, axis in enumerate(tensor.axes) if i not in (at % tensor.rank, dim % tensor.rank)]
    return tuple(a for axis in rest for a in axis if a.role is not Role.BATCH)


def _broadcast(q: Placed, side: Placed) -> Tensor:
    """Keys or values with a repeat wherever they have one head beside several of the queries'."""
    tensor, *places = side
    own = [i for i in range(tensor.rank) if i not in [p % tensor.rank for p in places]]
    theirs = [i for i in range(q[0].rank) if i not in [p % q[0].rank for p in q[1:]]]
    axes = list(tensor.axes)
    for i, j in zip(own, theirs):
        if not axes[i]:
            axes[i] = tuple(Atom(size=a.size, repeat=True) for a in q[0].axes[j] if a.role is None)
    return tensor.seen_as(tuple(axes))


def _solid(f: Follower, tensor: Tensor) -> Tensor:
    """The tensor with its repeats made."""
    return Tensor.of(laid_out(f.emit, tensor), followed(tensor.axes), tensor.dtype)


def _without_repeats(tensor: Tensor) -> Tensor:
    return tensor.seen_as(tuple(tuple(a for a in axis if not a.repeat) for axis in tensor.axes))


def full_sides(f: Follower, q: Placed, k: Placed, v: Placed, grouped: bool) -> tuple[Side, Side, Side] | None:
    """As `sides_of`, with keys and values repeated to as many heads as the queries have; None where they do not fit."""
    sides = [Side(q[0], _head_atoms(q), q[0].axes[q[2]])]
    for tensor, at, dim in (k, v):
        seen = _grouped(f, q, (tensor, at, dim)) if grouped else _broadcast(q, (tensor, at, dim))
        sides.append(Side(seen, _head_atoms((seen, at, dim)), seen.axes[dim]))
    if len({f.size(side.heads) for side in sides}) > 1:
        return None
    return sides[0], sides[1], sides[2]


def _grouped(f: Follower, q: Placed, side: Placed) -> Tensor:
    """Keys or values whose heads are each repeated for the queries' heads that share them."""
    tensor = side[0]
    count = f.size(_head_atoms(q)) // f.size(_head_atoms(side))
    heads = next(i for i in range(tensor.rank) if tensor.axes[i] and set(tensor.axes[i]) & set(_head_atoms(side)))
    axes = list(tensor.axes)
    axes[heads] = (*axes[heads], Atom(size=count, repeat=True)) if count > 1 else axes[heads]
    return tensor.seen_as(tuple(axes))
