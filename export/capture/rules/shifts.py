"""Positions moved along the sequence: what stands before the new ones comes from a state, what comes behind is refused.

A pad in front, a slice, a cat behind constants all leave an axis of the new positions and `before` more, the last of
the calls before; a module that is causal cuts it back to the sequence's own length in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch import fx

from ..axes import Atom, Axes, Axis, Role, flat, has
from ..emitter import DTYPES
from ..follow import STRETCHABLE, Follower, followed, rule
from ..tensor import Tensor, laid_out, refined, size_vector
from ..trace import arguments, aten, refuse

AHEAD = "a token would see the ones behind it"
STRETCHABLE.update({
    aten.slice.Tensor, aten.cat.default, aten.pad.default, aten.constant_pad_nd.default, aten.linear.default,
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default, aten.view.default,
    aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.type_as.default, aten.detach.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unfold.default,
    aten.slice_scatter.default, aten.copy.default,
})  # fmt: skip


def is_sequence(f: Follower, x: Tensor, dim: int) -> bool:
    """Whether an axis holds the positions of a decoder and nothing else."""
    axis = x.axes[dim]
    return len(axis) == 1 and axis[0].role in (f.role, Role.STRETCH) and f.role is not Role.SOURCE


def stretched(f: Follower, node: fx.Node, x: Tensor, dim: int, left: Any, right: Any, fill: Any = 0) -> Tensor:
    """`left` more positions in front and `right` more behind along `dim`; fewer where these are below 0.

    fill: what stands before the first token: a number, or a tensor (1, ..., left, ...) of the module's own layout.
    """
    if not is_sequence(f, x, dim):
        raise refuse(node, "adds to or cuts off positions of an axis that holds more than those of a decoder")
    left, right = (int(n) if sympy.sympify(n).is_Integer else n for n in (left, right))
    if not isinstance(left, int) or not isinstance(right, int):
        why = f"adds {right if isinstance(left, int) else left} positions, which changes with the length"
        raise refuse(node, f"{why}: cuts the sequence in chunks", "a window or a state of fixed size would work")
    atom = x.axes[dim][0]
    if atom.before + left < 0:
        raise refuse(
            node, f"takes positions that come {-atom.before - left} later: {AHEAD}", "shift to the right alone"
        )
    if left:
        x = _continued(f, x, dim, left, fill) if left > 0 else _without(f, x, dim, -left, 0)
    return settled(f, x, dim, atom.before + left, atom.after + right)


def settled(f: Follower, x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """A value that has `before` positions more than the new ones, as the module's axis with `after` more behind.

    Where the axis is as long as the sequence, each place is a new position again.
    """
    if before + after == 0:
        x, atom = _without(f, x, dim, 0, before), Atom(f.role)
    else:
        atom = Atom(Role.STRETCH, before=before, after=after)
    old = x.axes[dim][0]
    base, axes = (tuple(tuple(atom if a is old else a for a in axis) for axis in side) for side in (x.base, x.axes))
    return Tensor(x.value, base, axes, x.dtype)


def _without(f: Follower, x: Tensor, dim: int, first: int, last: int) -> Tensor:
    """All but the `first` and `last` positions of the value; its axes are to be settled."""
    if not first and not last:
        return x
    x = _solid(f, x)
    lies = _positions_last(x, dim)
    ends = f.emit.constant([-last if last else np.iinfo(np.int64).max])
    value = f.emit.op("Slice", laid_out(f.emit, x, lies), f.emit.constant([first]), ends, f.emit.constant([-1]))
    return Tensor(value, lies, x.axes, x.dtype)


def newest(f: Follower, x: Tensor, dim: int) -> Tensor:
    """The new positions alone, without those before them."""
    made = x.value.producer()
    atom = x.axes[dim][0]
    if made is not None and made.op_type == "Concat" and atom.before and flat(x.base)[-1] is atom:
        value = made.inputs[-1]  # what `_continued` put a state in front of
        assert value is not None
        x = replace(x, value=value)
    elif atom.before:
        x = _without(f, x, dim, atom.before, 0)
    new = Atom(f.role)
    base, axes = (tuple(tuple(new if a is atom else a for a in axis) for axis in side) for side in (x.base, x.axes))
    return Tensor(x.value, base, axes, x.dtype)


def _positions_last(x: Tensor, dim: int) -> Axes:
    """(batch, ..., positions), with the batch alone in front."""
    parts = refined((*x.axes[:dim], *x.axes[dim + 1 :]))
    rows = [part for part in parts if has(part, Role.BATCH)]
    return (*rows, *(part for part in parts if part not in rows), x.axes[dim])


def _continued(f: Follower, x: Tensor, dim: int, count: int, fill: Any) -> Tensor:
    """`count` positions before those of the value, kept from call to call in a state, (batch, ..., count)."""
    x = _solid(f, x)
    lies = _positions_last(x, dim)
    value = laid_out(f.emit, x, lies)
    places: Axis = (Atom(size=count),)
    first = _initial(f, x, dim, lies, places, fill)
    if f.is_whole:
        first = f.emit.op("Expand", first, size_vector(f.emit, (*lies[:-1], places)))
        return Tensor(f.emit.op("Concat", first, value, axis=-1), lies, x.axes, x.dtype)
    past, entry = f.state(x.dtype, [f.size(axis) for axis in (*lies[1:-1], places)])
    joined = f.emit.op("Concat", begun(f, past, first, len(lies), fill), value, axis=-1)
    seq = f.emit.size(Role.QUERY)
    end = f.emit.op("Add", seq, f.emit.constant([count]))
    last = f.emit.op("Slice", joined, seq, end, f.emit.constant([-1]))
    f.emit.output(last, entry.present, DTYPES[x.dtype], ("batch", *entry.shape))
    return Tensor(joined, lies, x.axes, x.dtype)


def _solid(f: Follower, x: Tensor) -> Tensor:
    """The tensor with every repeat made."""
    if not any(atom.repeat for axis in x.axes for atom in axis):
        return x
    return Tensor.of(laid_out(f.emit, x), followed(x.axes), x.dtype)


def _initial(f: Follower, x: Tensor, dim: int, lies: Axes, places: Axis, fill: Any) -> ir.Value:
    """What stands before the first token, to be broadcast with (batch, ..., count)."""
    if not isinstance(fill, torch.Tensor):
        return f.emit.constant(torch.tensor(fill, dtype=x.dtype).numpy())
    table = Tensor.of(f.emit.shared(("fill", id(fill)), fill.to(x.dtype), "fill"), (), x.dtype)
    axes = tuple(places if i == dim else () if has(axis, Role.BATCH) else axis for i, axis in enumerate(x.axes))
    want = tuple(() if has(axis, Role.BATCH) else axis for axis in lies[:-1])
    return laid_out(f.emit, Tensor(table.value, axes, axes, x.dtype), (*want, places))


def begun(f: Follower, past: ir.Value, first: ir.Value, rank: int, fill: Any = None) -> ir.Value:
    """A state, (batch, ...) of `rank` axes, that is `first` before the first token; a state is 0 there by itself."""
    if isinstance(fill, (int, float)) and fill == 0:
        return past
    start = f.emit.op("Equal", f.emit.write_indices(), f.emit.constant(0))
    start = f.emit.op("Unsqueeze", start, f.emit.constant(list(range(1, rank)), np.int64))
    return f.emit.op("Where", start, first, past)


# -- what modules write ---------------------------------------------------------------------------------------------
def cut(f: Follower, node: fx.Node, x: Tensor, dim: int, start: Any, before: Any, after: Any, step: int) -> Tensor:
    """x[start : start + after] along positions, of which the module sees `before`."""
    if isinstance(start, fx.Node):
        start = start.meta["val"].node.expr if isinstance(start.meta["val"], torch.SymInt) else start.meta["val"]
    dropped = sympy.sympify(before - after - start)
    if step != 1 or not sympy.sympify(start).is_Integer or start < 0 or not dropped.is_Integer:
        raise refuse(node, "takes a part of the positions or rows", "only all or the last position can be taken")
    return stretched(f, node, x, dim, -int(start), -int(dropped))


def put_in_front(f: Follower, node: fx.Node, tensors: Sequence[Any], x: Tensor, dim: int) -> Tensor:
    """Constants before the positions, and any behind them."""
    at = next(i for i, t in enumerate(tensors) if t is x)
    others = [t for i, t in enumerate(tensors) if i != at]
    if not all(f.is_constant(t) for t in others):
        raise refuse(node, "joins along the positions or rows", "only constants may stand before the first token")
    right = sum(int(f.trace.shape(t)[dim]) for t in tensors[at + 1 :])
    front = [f.constant(t) for t in tensors[:at]]
    if not front:
        return stretched(f, node, x, dim, 0, right)
    fill = torch.cat(front, dim)
    rows = next((i for i, axis in enumerate(x.axes) if has(axis, Role.BATCH)), None)
    if rows is None or fill.shape[rows] != 1:
        raise refuse(node, "joins along the positions or rows", "what stands in front must be the same for every row")
    left = fill.shape[dim]
    same = bool((fill == fill.reshape(-1)[0]).all())
    return stretched(f, node, x, dim, left, right, fill.reshape(-1)[0].item() if same else fill)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(
    f: Follower, node: fx.Node, x: Tensor, widths: list[Any], mode: Any = "constant", value: float | None = None
) -> Tensor:
    fill = (value if isinstance(mode, str) else mode) or 0
    if isinstance(mode, str) and mode != "constant":
        raise refuse(node, f"pads with {mode} values", "pad with zeros")
    sizes = [w.meta["val"].node.expr if isinstance(w, fx.Node) else w for w in widths]
    inner = [0] * (2 * x.rank)
    for i in range(len(sizes) // 2):
        dim = x.rank - 1 - i
        left, right = sizes[2 * i], sizes[2 * i + 1]
        if (left, right) == (0, 0):
            continue
        if any(a.role for a in x.axes[dim]):
            x = stretched(f, node, x, dim, left, right, fill)
        else:
            inner[dim], inner[x.rank + dim] = left, right
    return _padded(f, node, x, inner, fill) if any(inner) else x


def _padded(f: Follower, node: fx.Node, x: Tensor, widths: list[int], fill: float) -> Tensor:
    """Axes of fixed size, made longer or shorter."""
    value = laid_out(f.emit, x)
    number = f.emit.constant(torch.tensor(fill, dtype=x.dtype).numpy())
    value = f.emit.op("Pad", value, f.emit.constant(widths, np.int64), number)
    shape, axes = f.trace.shape(node), followed(x.axes)
    changed = [bool(widths[i] or widths[x.rank + i]) for i in range(x.rank)]
    return Tensor.of(value, tuple(_sized(int(shape[i])) if new else axes[i] for i, new in enumerate(changed)), x.dtype)


def _sized(size: int) -> Axis:
    return () if size == 1 else (Atom(size=size),)


@rule(aten.unfold.default)
def unfold(f: Follower, node: fx.Node, x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """(..., size) windows of `size` positions; each belongs to the last position that it holds."""
    dim %= x.rank
    if not is_sequence(f, x, dim) or step != 1:
        raise refuse(node, "is followed for windows of positions, one for each of them")
    atom = x.axes[dim][0]
    if atom.before < size - 1:
        raise refuse(node, f"a window of {size} positions, of which {atom.before} come before: {AHEAD}",
                     f"pad with {size - 1} on the left alone")  # fmt: skip
    parts = []
    for i in range(size):
        part = settled(f, _without(f, x, dim, i, size - 1 - i), dim, atom.before - size + 1, atom.after)
        parts.append(f.emit.op("Unsqueeze", laid_out(f.emit, part), f.emit.constant([-1])))
    value = f.emit.op("Concat", *parts, axis=-1)
    return Tensor.of(value, (*followed(part.axes), _sized(size)), x.dtype)


def written_into(
    f: Follower, node: fx.Node, onto: Any, x: Tensor, dim: int, start: Any = None, step: int = 1
) -> Tensor:
    """Positions written into a table of one value: that value is what stands before them."""
    whole, part = f.trace.shape(node)[dim], f.trace.shape(arguments(node)[1])[dim]
    if whole == part:
        return x
    if not isinstance(onto, fx.Node) or onto in f.trace.masks or not isinstance(start, int) or start < 0 or step != 1:
        raise refuse(node, "is followed for positions that are written into a tensor of one value")
    table = f.positional.value(onto, 7)
    number = table.reshape(-1)[0]
    if not bool((table == number).all()) or not bool((f.positional.value(onto, 9) == number).all()):
        raise refuse(node, "is followed for positions that are written into a tensor of one value")
    return stretched(f, node, x, dim, start, whole - part - start, number.item())
