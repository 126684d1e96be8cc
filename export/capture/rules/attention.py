"""Recognise attention: its mask and bias by their values, its heads by the atoms of its axes.

What is recognised becomes one operator (`lower.py`); the rest stays the module's own operators over the same cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, flat, has
from ..follow import Follower, followed, rule
from ..lower import Side, attend
from ..regions import Region, operands
from ..scores import VIEWS, Chain, NotCausal, Pattern, Scores, Unreadable, read_pattern
from ..tables import NotStable, TooLarge
from ..tensor import Tensor, laid_out, sizes
from ..trace import arguments, aten, refuse

Placed = tuple[Tensor, int, int]  # a factor, the axis of its positions and the axis of its features


@rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    f: Follower,
    node: fx.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Source: torch.nn.functional.scaled_dot_product_attention."""
    if not (has(q.axes[-2], Role.QUERY) and has(k.axes[-2], Role.QUERY)):
        raise refuse(node, "attends over something else than the sequence")
    if dropout:
        raise refuse(node, "drops at random in evaluation too", "pass dropout_p only in training")
    if isinstance(mask, Tensor):
        raise refuse(node, "its mask is computed from the ids", "a mask that is a function of the length would work")
    if mask is None and not causal:
        raise refuse(
            node, "not causal: every token attends to the ones behind it", "pass is_causal=True or a causal attn_mask"
        )
    scale = options.get("scale")
    scale = float(f.symbols.product(q.axes[-1])) ** -0.5 if scale is None else float(scale)
    scores_axes: Axes = (*followed(q.axes[:-1]), (Atom(Role.KEY),))
    chain = Chain([], node, scores_axes, f.positional, f.symbols)

    def scores(score: float, rows: torch.Tensor, length: int) -> torch.Tensor:
        value = torch.full(sizes(scores_axes, 1, len(rows), length), score * scale, dtype=torch.float64)
        if causal:
            value = value.masked_fill(torch.arange(length) > rows[:, None], -torch.inf)
        if mask is not None:
            given = chain.aligned(mask, scores_axes, rows, length)
            value = value.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else value + given
        return chain.canonical(value, scores_axes, len(rows), length)

    pattern = read(f, node, scores, ("sdpa", mask, causal, scale, str(scores_axes)))
    if pattern is None:
        raise refuse(node, "its mask hides a position from itself", "let every token see at least itself")
    sides = _sides(f, (q, -2, -1), (k, -2, -1), (v, -2, -1), bool(options.get("enable_gqa")))
    return attend(f, *sides, pattern, (*sides[0].tensor.axes[:-1], sides[2].dim))


def read(f: Follower, node: fx.Node, scores: Scores, key: Any) -> Pattern | None:
    """The pattern behind `scores`; attention with the same mask is read once."""
    if key not in f.patterns:
        try:
            f.patterns[key] = read_pattern(scores, f.max_length)
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
    q, k, v = (f.values[n] for n in (*operands(region.product), operands(region.final)[1]))
    places, final_places = _places(region.product), _places(region.final)
    if places is None or final_places is None:
        return None
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    (q_at, k_at), (_, v_at) = places, final_places
    if any(a.repeat for a in flat(q.axes)) or not (
        has(q.axes[q_at[0]], Role.QUERY) and has(k.axes[k_at[0]], Role.QUERY) and has(v.axes[v_at[0]], Role.QUERY)
    ):
        return None
    axes = _scores_axes(region.product, q, k)
    chain = Chain(list(region.chain), region.product, axes, f.positional, f.symbols)
    pattern = read(f, region.softmax, chain, ("chain", chain.signature(), str(axes)))
    if pattern is None or pattern.scale <= 0:
        return None
    for node in (*region.chain, *region.after):
        if node.target in VIEWS:
            grouped = f.symbols.regroup(axes, f.trace.shape(node))
            if grouped is None or grouped[1]:
                return None
            axes = grouped[0]
    sides = _sides(f, (q, *q_at), (k, *k_at), (v, *v_at), grouped=False)
    if f.size(sides[0].heads) % f.size(sides[1].heads) or f.size(sides[1].heads) != f.size(sides[2].heads):
        return None
    return attend(f, *sides, pattern, _result_axes(region.final, axes, v))


def _letters(node: fx.Node) -> tuple[str, str, str]:
    inputs, out = str(arguments(node)[0]).replace(" ", "").split("->")
    left, right = inputs.split(",")
    return left, right, out


def _places(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """For both factors of a product: which axis holds its positions and which its features."""
    if node.target is not aten.einsum.default:
        return ((-2, -1), (-1, -2)) if _lists_keys(node) else ((-2, -1), (-2, -1))
    left, right, out = _letters(node)
    summed = [c for c in left if c in right and c not in out]
    own_left, own_right = (
        [c for c in side if c in out and c not in other] for side, other in ((left, right), (right, left))
    )
    if len(summed) != 1 or len(own_left) != 1 or len(own_right) != 1:
        return None
    if _lists_keys(node):  # scores: both sides give positions, features are summed
        return (left.index(own_left[0]), left.index(summed[0])), (right.index(own_right[0]), right.index(summed[0]))
    return (left.index(own_left[0]), left.index(summed[0])), (right.index(summed[0]), right.index(own_right[0]))


def _lists_keys(node: fx.Node) -> bool:
    """Whether a product's result has two axes of positions, as scores have."""
    symbols = [d.node.expr for d in node.meta["val"].shape if isinstance(d, torch.SymInt)]
    ids = next(n for n in node.graph.nodes if n.op == "placeholder")
    return symbols.count(ids.meta["val"].shape[1].node.expr) == 2


def _scores_axes(node: fx.Node, q: Tensor, k: Tensor) -> Axes:
    key: Axis = (Atom(Role.KEY),)
    if node.target is not aten.einsum.default:
        lead = tuple(a or b for a, b in zip(q.axes[:-2], k.axes[:-2]))
        return followed((*lead, q.axes[-2], key))
    left, right, out = _letters(node)
    known = {**dict(zip(right, k.axes)), **{c: a for c, a in zip(left, q.axes) if a}}
    return followed(tuple(key if c not in left and has(known[c], Role.QUERY) else known[c] for c in out))


def _result_axes(node: fx.Node, weights: Axes, v: Tensor) -> Axes:
    if node.target is not aten.einsum.default:
        return (*weights[:-1], v.axes[-1])
    left, right, out = _letters(node)
    known = {**dict(zip(right, v.axes)), **{c: a for c, a in zip(left, weights) if a}}
    return tuple(known[c] for c in out)


def _sides(f: Follower, q: Placed, k: Placed, v: Placed, grouped: bool) -> tuple[Side, Side, Side]:
    """What of queries, keys and values are heads. Keys and values are cached before their heads are repeated.

    grouped: fewer key heads than query heads stand for repeated ones (`enable_gqa`).
    """
    q_tensor = _solid(f, q[0]) if any(a.repeat for a in flat(q[0].axes)) else q[0]
    q = (q_tensor, q[1], q[2])
    sides = [Side(q_tensor, _head_atoms(q), q_tensor.axes[q[2]])]
    for tensor, at, dim in (k, v):
        seen = tensor if grouped else _broadcast(q, (tensor, at, dim))
        atoms = _head_atoms((seen, at, dim))
        kept = tuple(a for a in atoms if not a.repeat)
        if atoms[: len(kept)] != kept or any(a.repeat for a in seen.axes[dim]):  # repeats that are no group of heads
            seen = _solid(f, seen)
            kept = _head_atoms((seen, at, dim))
        sides.append(Side(_without_repeats(seen), kept, seen.axes[dim]))
    return sides[0], sides[1], sides[2]


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
