"""Recognise written-out attention: its mask and bias by their values, its heads by the atoms of its axes.

What is recognised becomes one operator (`lower.py`, `lower_full.py`); the rest stays the module's own operators over
the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from ..axes import Atom, Axes, Axis, Role, flat, has, position
from ..follow import Follower, followed
from ..heads import full_sides, query_side, sides_of
from ..latent import attend_latent, find_latent
from ..lower import attend, can_attend
from ..lower_full import attend_fully
from ..regions import Region, operands
from ..scores import VIEWS, Chain, NotCausal, OpenPattern, Pattern, Scores, Unreadable, read_open, read_pattern
from ..tables import NotStable, TooLarge
from ..tensor import Tensor
from ..trace import arguments, aten, refuse
from ..weights import read_weights
from .padding import write_weights


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
    chain = chain_of(f, region)
    v = f.value_of(operands(region.final)[1])
    if chain is None or not isinstance(v, Tensor):
        return None
    (q, q_at), (k, k_at) = chain.factors
    final_places = _places(f, region.final)
    if final_places is None:
        return None
    v_at = final_places[1]
    roles = [position(t.axes[i]) for t, i in ((q, q_at[0]), (k, k_at[0]), (v, v_at[0]))]
    fully = roles[1:] == [Role.SOURCE] * 2 and roles[0] is not None
    if any(a.repeat for a in flat(q.axes)) or not (fully or roles == [Role.QUERY] * 3):
        return None
    sinks = sinks_of(f, region, chain)
    pattern = None if sinks is None else _pattern(f, region, chain, fully)
    if pattern is None or pattern.scale <= 0 or sinks is None:
        return None
    after = _after_views(f, region, chain.made)
    if after is None:
        return None
    result = _result_axes(region.final, after, v)
    if isinstance(pattern, OpenPattern):
        full = full_sides(f, (q, *q_at), (k, *k_at), (v, *v_at), grouped=False)
        crosses = roles[0] is Role.QUERY
        if sinks or full is None or not can_attend_fully(f, pattern, full[1].dim, full[2].dim, crosses):
            return None
        return attend_fully(f, full, pattern, None, result)
    pattern = replace(pattern, sinks=sinks)
    keys, values = operands(region.product)[1], operands(region.final)[1]
    if latent := find_latent(f, (keys, k_at), (values, v_at)):
        attended = attend_latent(f, query_side(f, (q, *q_at)), latent, pattern, result)
        if attended is not None:
            return attended
    sides = sides_of(f, (q, *q_at), (k, *k_at), (v, *v_at), grouped=False)
    if f.size(sides[0].heads) % f.size(sides[1].heads) or f.size(sides[1].heads) != f.size(sides[2].heads):
        return None
    return attend(f, *sides, pattern, result) if can_attend(f, *sides, pattern) else None


def follow_weights(f: Follower, region: Region) -> bool:
    """Give a region's weights their value where its scores have one; False where they are no softmax with sinks."""
    chain, scores = chain_of(f, region), f.values[region.scores]
    sinks = None if chain is None else sinks_of(f, region, chain)
    if chain is None or sinks is None or not isinstance(scores, Tensor):
        return False
    where = next(i for i, axis in enumerate(chain.result_axes()) if has(axis, Role.KEY))
    weights = write_weights(f, scores, where, sinks)
    f.values[region.tail[-1]] = weights
    queries = [i for i, own in enumerate(scores.axes) if i != where and position(own)]
    if f.observed is not None:
        f.observed.append((region.tail[-1], weights, queries[0], where))
    return True


def can_attend_fully(f: Follower, pattern: OpenPattern, dim: Axis, v_dim: Axis, crosses: bool) -> bool:
    """MultiHeadAttention takes keys and values that lie heads first of one size only, and no table from us there."""
    return not crosses or (f.size(dim) == f.size(v_dim) and pattern.bias is None)


Factor = tuple[Tensor, tuple[int, int]]  # with the axes of its positions and features


class Scored(Chain):
    """The chain of a region, with the queries and keys that its scores are made of, and the axes that these have."""

    factors: tuple[Factor, Factor]
    made: Axes


def chain_of(f: Follower, region: Region) -> Scored | None:
    """What is done to a region's scores, ready to be run; None where its product is none of queries and keys."""
    q, k = (f.value_of(n) for n in operands(region.product))
    places = _places(f, region.product)
    if places is None or not (isinstance(q, Tensor) and isinstance(k, Tensor)):
        return None
    own, other = (position(t.axes[at[0]]) for t, at in ((q, places[0]), (k, places[1])))
    if own is None or other is None:
        return None
    axes = _scores_axes(region.product, q, k, Role.SOURCE if other is Role.SOURCE else Role.KEY)
    *_, keys = (atom for axis in axes for atom in axis if atom.role not in (None, Role.BATCH))
    of_chain = tuple(tuple(_in_chain(atom, keys) for atom in axis) for axis in axes)
    symbols = replace(f.symbols, seq=f.positional.symbol, key=f.symbols.size(keys))
    chain = Scored(list(region.chain), region.product, of_chain, f.positional, symbols)
    chain.factors, chain.made = ((q, places[0]), (k, places[1])), axes
    return chain


def sinks_of(f: Follower, region: Region, chain: Chain) -> tuple[float, ...] | None:
    """The sinks in a region's softmax, none for a plain one; None where its weights are made in another way."""
    try:
        return read_weights(region.tail, chain, f.max_length)
    except (Unreadable, RuntimeError, StopIteration):  # an operation on other sizes than those of weights
        return None


def _pattern(f: Follower, region: Region, chain: Chain, fully: bool) -> Pattern | OpenPattern | None:
    key = (chain.signature(), str(chain.axes))
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
