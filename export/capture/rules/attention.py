"""Recognise written-out attention: its mask and bias by their values, its heads by the atoms of its axes.

What is recognised becomes one operator (`lower.py`, `lower_full.py`); the rest stays the module's own operators over
the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from ..axes import Atom, Axes, Axis, Role, flat, position
from ..follow import Follower, followed
from ..heads import full_sides, sides_of
from ..lower import attend
from ..lower_full import attend_fully
from ..regions import Region, operands
from ..scores import VIEWS, Chain, NotCausal, OpenPattern, Pattern, Scores, Unreadable, read_open, read_pattern
from ..tables import NotStable, TooLarge
from ..tensor import Tensor
from ..trace import arguments, aten, refuse


def read(f: Follower, node: fx.Node, scores: Scores, key: Any) -> Pattern | None:
    """The pattern behind causal `scores`; attention with the same mask is read once."""
    found = _read_once(f, node, ("causal", key), lambda: read_pattern(scores, f.max_length))
    return found if isinstance(found, Pattern) else None


def read_full(f: Follower, node: fx.Node, scores: Scores, key: Any) -> OpenPattern | None:
    """The pattern behind `scores` of attention that need not be causal."""
    found = _read_once(f, node, ("open", key), lambda: read_open(scores, f.positional, f.max_length))
    return found if isinstance(found, OpenPattern) else None


def _read_once(f: Follower, node: fx.Node, key: Any, reading: Callable[[], Any]) -> Any:
    if key not in f.patterns:
        try:
            f.patterns[key] = reading()
        except NotCausal as seen:
            row, column = seen.args
            raise refuse(
                node, f"not causal: position {row} attends to position {column}", "mask what lies behind each token"
            ) from None
        except NotStable:
            raise refuse(node, "its mask or bias changes with the length of the whole sequence") from None
        except TooLarge as size:
            raise refuse(
                node, f"its mask needs a table of {size.args[0] / 2**20:.0f} MiB", "give a smaller --max-length"
            ) from None
        except Unreadable:
            f.patterns[key] = None
    return f.patterns[key]


def lower_region(f: Follower, region: Region) -> Tensor | None:
    """A written-out attention as one operator, or None where it has to stay as it is written."""
    q, k, v = (f.value_of(n) for n in (*operands(region.product), operands(region.final)[1]))
    places, final_places = _places(f, region.product), _places(f, region.final)
    if places is None or final_places is None:
        return None
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    (q_at, k_at), (_, v_at) = places, final_places
    roles = [position(t.axes[i]) for t, i in ((q, q_at[0]), (k, k_at[0]), (v, v_at[0]))]
    fully = roles[1:] == [Role.SOURCE] * 2 and roles[0] is not None
    if any(a.repeat for a in flat(q.axes)) or not (fully or roles == [Role.QUERY] * 3):
        return None
    axes = _scores_axes(region.product, q, k, Role.SOURCE if fully else Role.KEY)
    pattern = _pattern(f, region, axes, fully)
    if pattern is None or pattern.scale <= 0:
        return None
    after = _after_views(f, region, axes)
    if after is None:
        return None
    result = _result_axes(region.final, after, v)
    if isinstance(pattern, OpenPattern):
        full = full_sides(f, (q, *q_at), (k, *k_at), (v, *v_at), grouped=False)
        if full is None or not can_attend_fully(f, pattern, full[1].dim, full[2].dim, roles[0] is Role.QUERY):
            return None
        return attend_fully(f, full, pattern, None, result)
    sides = sides_of(f, (q, *q_at), (k, *k_at), (v, *v_at), grouped=False)
    if f.size(sides[0].heads) % f.size(sides[1].heads) or f.size(sides[1].heads) != f.size(sides[2].heads):
        return None
    return attend(f, *sides, pattern, result)


def can_attend_fully(f: Follower, pattern: OpenPattern, dim: Axis, v_dim: Axis, crosses: bool) -> bool:
    """MultiHeadAttention takes keys and values that lie heads first of one size only, and no table from us there."""
    return not crosses or (f.size(dim) == f.size(v_dim) and pattern.bias is None)


def _pattern(f: Follower, region: Region, axes: Axes, fully: bool) -> Pattern | OpenPattern | None:
    *_, keys = (atom for axis in axes for atom in axis if atom.role not in (None, Role.BATCH))
    of_chain = tuple(tuple(_in_chain(atom, keys) for atom in axis) for axis in axes)
    symbols = replace(f.symbols, seq=f.positional.symbol, key=f.symbols.size(keys))
    chain = Chain(list(region.chain), region.product, of_chain, f.positional, symbols)
    key = (chain.signature(), str(axes))
    return (read_full if fully else read)(f, region.softmax, chain, key)


def _in_chain(atom: Atom, keys: Atom) -> Atom:
    """In a chain of scores the rows are queries and the columns keys, whatever their positions are elsewhere."""
    if atom.role in (None, Role.BATCH):
        return atom
    return Atom(Role.KEY if atom is keys else Role.QUERY)


def _after_views(f: Follower, region: Region, axes: Axes) -> Axes | None:
    for node in (*region.chain, *region.after):
        if node.target in VIEWS:
            grouped = f.symbols.regroup(axes, f.trace.shape(node))
            if grouped is None or grouped[1]:
                return None
            axes = grouped[0]
    return axes


def _letters(node: fx.Node) -> tuple[str, str, str]:
    inputs, out = str(arguments(node)[0]).replace(" ", "").split("->")
    left, right = inputs.split(",")
    return left, right, out


def _places(f: Follower, node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """For both factors of a product: which axis holds its positions and which its features."""
    if node.target is not aten.einsum.default:
        return ((-2, -1), (-1, -2)) if _lists_keys(f, node) else ((-2, -1), (-2, -1))
    left, right, out = _letters(node)
    summed = [c for c in left if c in right and c not in out]
    own_left, own_right = (
        [c for c in side if c in out and c not in other] for side, other in ((left, right), (right, left))
    )
    if len(summed) != 1 or len(own_left) != 1 or len(own_right) != 1:
        return None
    if _lists_keys(f, node):  # scores: both sides give positions, features are summed
        return (left.index(own_left[0]), left.index(summed[0])), (right.index(own_right[0]), right.index(summed[0]))
    return (left.index(own_left[0]), left.index(summed[0])), (right.index(summed[0]), right.index(own_right[0]))


def _lists_keys(f: Follower, node: fx.Node) -> bool:
    """Whether a product's result has two axes of positions, as scores have."""
    return len(f.trace.lengths_in(f.trace.shape(node))) == 2


def _scores_axes(node: fx.Node, q: Tensor, k: Tensor, role: Role) -> Axes:
    """The axes of q k^T; `role` is that of the keys, whose atom comes last of all positions."""
    key: Axis = (Atom(role),)
    if node.target is not aten.einsum.default:
        lead = tuple(a or b for a, b in zip(q.axes[:-2], k.axes[:-2]))
        return followed((*lead, q.axes[-2], key))
    left, right, out = _letters(node)
    known = {**dict(zip(right, k.axes)), **{c: a for c, a in zip(left, q.axes) if a}}
    return followed(tuple(key if c not in left and position(known[c]) else known[c] for c in out))


def _result_axes(node: fx.Node, weights: Axes, v: Tensor) -> Axes:
    if node.target is not aten.einsum.default:
        return (*weights[:-1], v.axes[-1])
    left, right, out = _letters(node)
    known = {**dict(zip(right, v.axes)), **{c: a for c, a in zip(left, weights) if a}}
    return tuple(known[c] for c in out)
