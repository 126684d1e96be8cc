"""Attention as one operator over a cache: recognised by its values, lowered to what the runtime has.

`ort`: com.microsoft.GroupQueryAttention, past and present bound to one buffer. `standard`: TensorScatter and Attention
of opset 24 over the same buffer. What neither expresses stays the module's own operators over the same buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, flat, has
from ..emitter import CONTRIB
from ..follow import Follower, followed, rule, scatter
from ..regions import Region
from ..scores import VIEWS, Chain, NotCausal, Pattern, Scores, Unreadable, read_pattern
from ..tables import ByDistance, NotStable, PerKey, TooLarge
from ..tensor import Tensor, laid_out, sizes
from ..trace import aten, refuse

HIDDEN_SCORE = -1e9  # finite: an operator that works in blocks makes NaN of a block of -inf


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values with each atom's meaning known."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_heads: Axis
    q_dim: Axis
    k_dim: Axis
    v_dim: Axis
    kv_heads: Axis  # of keys and values, repeats taken out
    num_heads: int
    num_kv_heads: int


@rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    f: Follower, node: fx.Node, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0, causal: bool = False, **options: Any
) -> Tensor:
    """Source: torch.nn.functional.scaled_dot_product_attention."""
    if not (has(q.axes[-2], Role.QUERY) and has(k.axes[-2], Role.QUERY)):
        raise refuse(node, "attends over something else than the sequence")
    if isinstance(mask, Tensor):
        raise refuse(node, "its mask is computed from the ids", "a mask that is a function of the length would work")
    if mask is None and not causal:
        raise refuse(node, "not causal: every token attends to the ones behind it", "pass is_causal=True or a causal attn_mask")
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
            value = value.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else value + given  # type: ignore[attr-defined, operator]
        return chain.canonical(value, scores_axes, len(rows), length)

    pattern = read(f, node, scores, ("sdpa", mask, causal, scale, str(scores_axes)))
    heads = _heads(f, (q, -2, -1), (k, -2, -1), (v, -2, -1), bool(options.get("enable_gqa")))
    if pattern is None or heads is None:
        raise refuse(node, "its mask is no function of the distance, the key or the pair of positions")
    return attend(f, node, heads, pattern, (*followed(q.axes[:-1]), v.axes[-1]))


def read(f: Follower, node: fx.Node, scores: Scores, key: Any) -> Pattern | None:
    """The pattern behind `scores`; attention with the same mask is read once."""
    if key not in f.patterns:
        try:
            f.patterns[key] = read_pattern(scores, f.max_length)
        except NotCausal as seen:
            row, column = seen.args
            raise refuse(node, f"not causal: position {row} attends to position {column}", "mask what lies behind each token") from None
        except NotStable:
            raise refuse(node, "its mask or bias changes with the length of the whole sequence") from None
        except TooLarge as size:
            raise refuse(node, f"its mask needs a table of {size.args[0] / 2**20:.0f} MiB", "give a smaller --max-length") from None
        except Unreadable:
            f.patterns[key] = None
    return f.patterns[key]


def lower_region(f: Follower, region: Region) -> Tensor | None:
    """A written-out attention as one operator, or None where it has to stay as it is written."""
    q, k = (f.values[n] for n in _factors(region.product))
    v = f.values[_factors(region.final)[1]]
    places = _places(region.product), _places(region.final)
    if None in places or not all(isinstance(t, Tensor) for t in (q, k, v)):
        return None
    (q_at, k_at), (_, v_at) = places  # type: ignore[misc]
    if not (has(q.axes[q_at[0]], Role.QUERY) and has(k.axes[k_at[0]], Role.QUERY) and has(v.axes[v_at[0]], Role.QUERY)):
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
    heads = _heads(f, (q, *q_at), (k, *k_at), (v, *v_at), False)
    if heads is None:
        return None
    return attend(f, region.final, heads, pattern, _result_axes(region.final, axes, v))


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    if node.target is aten.einsum.default:
        return node.args[1][0], node.args[1][1]  # type: ignore[index, return-value]
    return node.args[-2], node.args[-1]  # type: ignore[return-value]


def _letters(node: fx.Node) -> tuple[str, str, str]:
    inputs, out = str(node.args[0]).replace(" ", "").split("->")
    left, right = inputs.split(",")
    return left, right, out


def _places(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """For both factors of a product: which axis holds its positions and which its features."""
    if node.target is not aten.einsum.default:
        is_scores = node.meta["val"].shape[-1] == node.args[-1].meta["val"].shape[-1] and _lists_keys(node)  # type: ignore[union-attr]
        return ((-2, -1), (-1, -2)) if is_scores else ((-2, -1), (-2, -1))
    left, right, out = _letters(node)
    summed = [c for c in left if c in right and c not in out]
    own_left, own_right = ([c for c in side if c in out and c not in other] for side, other in ((left, right), (right, left)))
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


def _heads(f: Follower, q: tuple[Tensor, int, int], k: tuple[Tensor, int, int], v: tuple[Tensor, int, int], gqa: bool) -> Heads | None:
    """Which atoms are heads, which of them only repeat; None where keys and values are grouped otherwise than in a row."""
    q_dim, k_dim, v_dim = (t.axes[d] for t, _, d in (q, k, v))
    q_heads = tuple(a for a in _head_atoms(q) if a.role is None)
    groups = []
    for side in (k, v):
        atoms = _aligned_heads(q, side) if not gqa else _head_atoms(side)
        repeats = [i for i, a in enumerate(atoms) if a.repeat]
        groups.append(tuple(a for a in atoms if not a.repeat) if repeats == list(range(len(atoms) - len(repeats), len(atoms))) else atoms)
    count, kv, vv = (int(f.symbols.product(atoms)) for atoms in (q_heads, *groups))
    if kv != vv or count % kv or any(a.repeat for a in q_heads) or any(a.repeat for side in groups for a in side):
        return None
    k_tensor, v_tensor = (_without_repeats(t) for t in (k[0], v[0]))
    return Heads(q[0], k_tensor, v_tensor, q_heads, q_dim, k_dim, v_dim, groups[0], count, kv)


def _head_atoms(side: tuple[Tensor, int, int]) -> Axis:
    tensor, at, dim = side
    rest = [axis for i, axis in enumerate(tensor.axes) if i not in (at % tensor.rank, dim % tensor.rank)]
    return tuple(a for axis in rest for a in axis if a.role is not Role.BATCH)


def _aligned_heads(q: tuple[Tensor, int, int], side: tuple[Tensor, int, int]) -> Axis:
    """The head atoms of keys or values; where theirs is of size 1 beside the queries' heads, it repeats."""
    def rest(t: Tensor, *gone: int) -> list[Axis]:
        return [axis for i, axis in enumerate(t.axes) if i not in [g % t.rank for g in gone]]

    mine, theirs = rest(*q), rest(*side)
    atoms: list[Atom] = []
    for own, other in zip(mine, theirs):
        if own and not other:
            atoms += [Atom(size=a.size, repeat=True) for a in own if a.role is None]
        else:
            atoms += [a for a in other if a.role is not Role.BATCH]
    return tuple(atoms)


def _without_repeats(tensor: Tensor) -> Tensor:
    return tensor.seen_as(tuple(tuple(a for a in axis if not a.repeat) for axis in tensor.axes))


def attend(f: Follower, node: fx.Node, heads: Heads, pattern: Pattern, result: Axes) -> Tensor:
    """Write attention in the flavor asked for, or in the next that can express it, and report which."""
    dim, v_dim = (int(f.symbols.product(axis)) for axis in (heads.q_dim, heads.v_dim))
    name, why = "GroupQueryAttention", ""
    if f.flavor == "standard":
        name = "Attention"
    elif dim % 8 or dim != v_dim:
        name = "Attention"
        why = f"head size {dim} is not a multiple of 8" if dim % 8 else f"keys of size {dim}, values of size {v_dim}"
    f.report_attention(name, str(pattern), why)
    value = _group_query(f, heads, pattern, dim) if name == "GroupQueryAttention" else _standard(f, heads, pattern, dim, v_dim)
    atoms = flat(result)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    base: Axes = ((batch,), (query,), tuple(a for a in atoms if a.role is None))
    return Tensor(value, base, result, heads.q.dtype)


def _rows_of(f: Follower, tensor: Tensor, heads: Axis, dim: Axis, four: bool) -> ir.Value:
    """A side of attention as (batch, seq, heads * dim), or as (batch, heads, seq, dim)."""
    atoms = flat(tensor.axes)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    axes: Axes = ((batch,), heads, (query,), dim) if four else ((batch,), (query,), (*heads, *dim))
    return laid_out(f.emit, tensor, axes)


def _v_heads(heads: Heads) -> Axis:
    return tuple(a for a in flat(heads.v.axes) if a.role is None and a not in heads.v_dim)


def _k_heads(heads: Heads) -> Axis:
    return tuple(a for a in flat(heads.k.axes) if a.role is None and a not in heads.k_dim)


def _bias(f: Follower, pattern: Pattern, window_too: bool) -> ir.Value | None:
    """(batch or 1, heads or 1, seq, total): what is added to the scores."""
    read = pattern.bias
    if window_too and pattern.window is not None:
        read = _with_window(f, pattern)
    if read is None:
        return None
    table = read.table.clamp(min=HIDDEN_SCORE)
    placed = f.place_square(type(read)(table), [1], 2, 3, torch.float32)
    value = placed.arranged(f.emit, range(4), 0)
    if 0 not in (0 if d == -1 else d for d in placed.dims):  # arranged() leaves leading axes of size 1 out
        first = min(placed.dims)
        value = f.emit.op("Unsqueeze", value, f.emit.constant(list(range(first))))
    if isinstance(read, PerKey):  # the operators want every query row
        parts = [f.emit.constant([1, table.shape[0]]), f.emit.size(Role.QUERY), f.emit.size(Role.KEY)]
        value = f.emit.op("Expand", value, f.emit.op("Concat", *parts, axis=0))
    return value


def _with_window(f: Follower, pattern: Pattern) -> Any:
    length, window = f.max_length, pattern.window or 0
    distance = torch.arange(-(length - 1), length)
    hidden = torch.where(distance < window, 0.0, -torch.inf)
    if pattern.bias is None:
        return ByDistance(hidden[None])
    if isinstance(pattern.bias, ByDistance):
        return ByDistance(pattern.bias.table + hidden)
    square = torch.arange(length)[:, None] - torch.arange(length)
    table = pattern.bias.table if not isinstance(pattern.bias, PerKey) else pattern.bias.table[..., None, :]
    return type(pattern.bias)(table) if square.numel() == 0 else _square(table, square < window)


def _square(table: torch.Tensor, visible: torch.Tensor) -> Any:
    from ..tables import Square

    return Square(table.masked_fill(~visible, -torch.inf))


def _group_query(f: Follower, heads: Heads, pattern: Pattern, dim: int) -> ir.Value:
    """Source: com.microsoft.GroupQueryAttention, ContribOperators.md."""
    q = _rows_of(f, heads.q, heads.q_heads, heads.q_dim, False)
    k = _rows_of(f, heads.k, _k_heads(heads), heads.k_dim, False)
    v = _rows_of(f, heads.v, _v_heads(heads), heads.v_dim, False)
    past_key, key = f.entry("key", heads.num_kv_heads, dim, heads.k.dtype, pattern.window)
    past_value, value = f.entry("value", heads.num_kv_heads, dim, heads.v.dtype, pattern.window)
    bias = _bias(f, pattern, window_too=False)
    optional = () if bias is None else (None, None, None, bias)  # cos_cache, sin_cache, position_ids
    inputs = (q, k, v, past_key, past_value, f.emit.seqlens_k(), f.emit.total_length(), *optional)
    window = {} if pattern.window is None else {"local_window_size": pattern.window}
    out, present_key, present_value = f.emit.multi(
        "GroupQueryAttention", *inputs, outputs=3, domain=CONTRIB,
        num_heads=heads.num_heads, kv_num_heads=heads.num_kv_heads, scale=pattern.scale, **window,
    )  # fmt: skip
    f.present(key, present_key)
    f.present(value, present_value)
    return out


def _standard(f: Follower, heads: Heads, pattern: Pattern, dim: int, v_dim: int) -> ir.Value:
    """Source: ai.onnx Attention-24 and TensorScatter-24; nonpad_kv_seqlen makes is_causal right for each row."""
    q = _rows_of(f, heads.q, heads.q_heads, heads.q_dim, True)  # (batch, heads, seq, dim)
    sides = []
    for side, tensor, own_heads, own_dim, width in (
        ("key", heads.k, _k_heads(heads), heads.k_dim, dim),
        ("value", heads.v, _v_heads(heads), heads.v_dim, v_dim),
    ):
        past, entry = f.entry(side, heads.num_kv_heads, width, tensor.dtype, pattern.window)
        present = scatter(f.emit, past, _rows_of(f, tensor, own_heads, own_dim, True))
        f.present(entry, present)
        sides.append(f.valid(present))
    lengths = f.emit.op("ReduceSum", f.emit.attention_mask(), f.emit.constant([1]), keepdims=0)
    inputs = (q, *sides, _bias(f, pattern, window_too=True), None, None, lengths)  # past_key, past_value
    out = f.emit.multi("Attention", *inputs, outputs=1, version=24, scale=pattern.scale, is_causal=1)[0]  # (batch, heads, seq, v_dim)
    moved = f.emit.op("Transpose", out, perm=[0, 2, 1, 3])
    return f.emit.op("Reshape", moved, f.emit.constant([0, 0, -1]))
