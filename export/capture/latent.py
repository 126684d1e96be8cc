"""Latent attention: keys and values that are linear maps of a few numbers per token, which alone are cached.

With K_h = U_h c + a_h and V_h = W_h c + b_h of a latent c per token, scores are (U_h^T q_h) c up to what is the same
for all keys, and the result is W_h (sum of weights times c) + b_h: attention of all heads to one, whose key and value
is c.
Source: DeepSeek-V2, section 2.1. The maps are not looked for in the graph: it is run on unit vectors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .axes import Atom, Axes, Role, flat
from .follow import Follower
from .lower import Side, attend
from .place import initializer
from .scores import IDENTITIES, VIEWS, Pattern
from .tables import close
from .tensor import Tensor, laid_out
from .trace import EMPTY, aten, call, mapped, read_for_values

LINEAR = IDENTITIES | VIEWS | {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.einsum.default,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
    aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default, aten.repeat_interleave.self_int,
    aten.copy.default, aten.slice_scatter.default, aten.repeat.default, aten.squeeze.default, aten.squeeze.dims,
}  # fmt: skip
# A latent is worth its while where it is this much smaller than keys and values, at this much more multiplications.
SMALLER, DEARER = 4, 4
MULTIPLE = 8  # of which head sizes are

Placed = tuple[fx.Node, tuple[int, int]]  # keys or values, the axes of their positions and features


@dataclass(frozen=True)
class Latent:
    """Nodes whose features, joined, are the latent; maps (heads, dim, latent) and shifts (heads, dim) to both sides."""

    nodes: tuple[fx.Node, ...]
    up_k: torch.Tensor
    up_v: torch.Tensor
    shift_k: torch.Tensor
    shift_v: torch.Tensor


def find_latent(f: Follower, k: Placed, v: Placed) -> Latent | None:
    """The latent behind keys and values, where there is one that is worth its while."""
    cut = _narrowest(f, [k[0], v[0]])
    if cut is None:
        return None
    width = sum(_width(f, node) or 0 for node in cut)
    run = _Maps(f, cut, width, (k, v))
    made = [run.sides(torch.zeros(width, width)), run.sides(torch.eye(width))]
    (shift_k, shift_v), (unit_k, unit_v) = made
    maps = [(unit - shift[:1]).permute(1, 2, 0) for unit, shift in ((unit_k, shift_k), (unit_v, shift_v))]
    latent = Latent(tuple(cut), maps[0], maps[1], shift_k[0], shift_v[0])
    probe = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    for side, up, shift in zip(run.sides(probe), (latent.up_k, latent.up_v), (latent.shift_k, latent.shift_v)):
        if not close(side / 10, (torch.einsum("hdw,nw->nhd", up, probe) + shift) / 10):
            return None
    return latent


def _width(f: Follower, node: fx.Node) -> int | None:
    """Numbers per token; None of a node that is no tensor with one axis of positions."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    shape = f.trace.shape(node)
    sizes = [size for size in shape if size not in (f.trace.seq, f.trace.batch)]
    fits = shape.count(f.trace.seq) == shape.count(f.trace.batch) == 1 and all(isinstance(n, int) for n in sizes)
    return math.prod(sizes) if fits else None


def _narrowest(f: Follower, sides: Sequence[fx.Node]) -> list[fx.Node] | None:
    """Going back from both sides through linear maps of each token: the cut with the fewest numbers per token."""
    whole = [_width(f, node) for node in sides]
    if None in whole:
        return None
    least, best = sum(n or 0 for n in whole) / SMALLER, None
    cut = set(sides)
    while True:
        open_ = [n for n in cut if _is_linear(f, n)]
        if not open_:
            return best
        node = max(open_, key=lambda n: f.trace.place[n])
        cut = cut - {node} | {i for i in read_for_values(node) if i in f.trace.data}
        widths = [_width(f, n) for n in cut]
        if None not in widths and (total := sum(n or 0 for n in widths)) <= least:
            least, best = total, sorted(cut, key=lambda n: f.trace.place[n])


def _is_linear(f: Follower, node: fx.Node) -> bool:
    if node.target not in LINEAR:
        return False
    rest = [n for n in read_for_values(node) if n not in f.trace.data]
    return all(not isinstance(n.meta.get("val"), torch.Tensor) or f.is_constant(n) or n.target in EMPTY for n in rest)


class _Maps:
    """Runs the nodes between a cut and both sides on made-up latents, one for each of as many tokens."""

    def __init__(self, f: Follower, cut: Sequence[fx.Node], tokens: int, sides: tuple[Placed, Placed]) -> None:
        self.f, self.cut, self.tokens, self.targets = f, cut, tokens, sides
        todo, between = [node for node, _ in sides], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in cut or node in between or node not in f.trace.data:
                continue
            between.add(node)
            todo += read_for_values(node)
        self.between = sorted(between, key=lambda n: f.trace.place[n])

    def sides(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """(tokens, heads, dim) of keys and of values from (tokens, width)."""
        known, at = dict[fx.Node, Any](), 0
        for node in self.cut:
            shape = self.f.trace.shape(node)
            sizes = [n for n in shape if n not in (self.f.trace.seq, self.f.trace.batch)]
            width = math.prod(sizes)
            value = latents[:, at : at + width].reshape(1, self.tokens, *sizes)
            at += width
            order = [shape.index(self.f.trace.batch), shape.index(self.f.trace.seq)]
            order += [i for i in range(len(shape)) if i not in order]
            known[node] = value.permute([order.index(i) for i in range(len(shape))])
        for node in self.between:
            args, kwargs = mapped(node, lambda n: known[n] if n in known else self._constant(n))
            known[node] = call(node, args, kwargs)
        made = []
        for node, (position, feature) in self.targets:
            value = known[node]
            moved = value.movedim((position % value.dim(), feature % value.dim()), (0, -1))
            made.append(moved.reshape(self.tokens, -1, moved.shape[-1]))
        return made

    def _constant(self, node: fx.Node) -> Any:
        if node in self.f.trace.data and isinstance(
            node.meta["val"], torch.Tensor
        ):  # its type and shape alone are read
            known = {self.f.trace.batch: 1, self.f.trace.seq: self.tokens}
            shape = [n if isinstance(n, int) else int(n.subs(known)) for n in self.f.trace.shape(node)]
            return torch.empty(1, dtype=node.meta["val"].dtype).expand(shape)
        return self.f.positional.value(node, self.tokens)


def attend_latent(f: Follower, q: Side, latent: Latent, pattern: Pattern, result: Axes) -> Tensor | None:
    """Attention of the queries' heads to the latent alone; None where heads do not fit, or a shift would be seen."""
    heads = f.size(q.heads)
    up_k, up_v, shift_k, shift_v = (
        side.repeat_interleave(heads // side.shape[0], 0)
        for side in (latent.up_k, latent.up_v, latent.shift_k, latent.shift_v)
    )
    unequal = up_k.shape[0] != heads or up_v.shape[0] != heads
    filled = up_k.shape[2] + -up_k.shape[2] % MULTIPLE
    dearer = 2 * filled > DEARER * (up_k.shape[1] + up_v.shape[1])
    seen = shift_k.any() if pattern.sinks or pattern.softcap else False
    if unequal or dearer or seen or (pattern.sinks and shift_v.any()) or f.size(q.dim) != up_k.shape[1]:
        return None
    rows = _rows(f, latent.nodes)
    width = f.size(rows.axes[-1])
    up_k, up_v = (torch.nn.functional.pad(up, (0, width - up.shape[2])) for up in (up_k, up_v))
    asked = _times(f, q.tensor, q, up_k, rows.axes[-1])
    own = Side(rows, (), rows.axes[-1])
    words = f", of a latent of {latent.up_k.shape[2]}"
    read = attend(
        f, Side(asked, q.heads, rows.axes[-1]), own, own, pattern, (*asked.axes[:-1], rows.axes[-1]), of=words
    )
    dim = tuple(a for a in flat(result) if a.role is None and a not in q.heads)
    made = _times(f, read, Side(read, q.heads, rows.axes[-1]), up_v.transpose(1, 2), dim)
    value = made.value
    if shift_v.any():
        value = f.emit.op("Add", value, initializer(f.emit, shift_v[:, None, :], "shift"))
    atoms = flat(result)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    return Tensor(value, ((batch,), q.heads, (query,), dim), result, made.dtype)


def _rows(f: Follower, nodes: Sequence[fx.Node]) -> Tensor:
    """(batch, seq, latent): the features of the nodes joined, filled up with zeros to a multiple of 8."""
    parts: list[ir.Value] = []
    batch, query, width = Atom(Role.BATCH), Atom(Role.QUERY), 0
    dtype = torch.float32
    for node in nodes:
        tensor = f.value_of(node)
        assert isinstance(tensor, Tensor)
        atoms = flat(tensor.axes)
        batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
        features = tuple(a for a in atoms if a.role is None)
        parts.append(laid_out(f.emit, tensor, ((batch,), (query,), features)))
        width, dtype = width + f.size(features), tensor.dtype
    joined = parts[0] if len(parts) == 1 else f.emit.op("Concat", *parts, axis=-1)
    if missing := -width % MULTIPLE:
        joined = f.emit.op("Pad", joined, f.emit.constant([0, 0, 0, 0, 0, missing]))
    return Tensor.of(joined, ((batch,), (query,), (Atom(size=width + missing),)), dtype)


def _times(f: Follower, tensor: Tensor, side: Side, matrix: torch.Tensor, out: tuple[Atom, ...]) -> Tensor:
    """Each head's rows times a matrix of its own, (heads, dim, out): (batch, heads, seq, out)."""
    atoms = flat(tensor.axes)
    batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
    lies: Axes = ((batch,), side.heads, (query,), side.dim)
    weight = initializer(f.emit, matrix.to(tensor.dtype), "latent")
    value = f.emit.op("MatMul", laid_out(f.emit, tensor, lies), weight)
    axes: Axes = (*lies[:-1], out)
    return Tensor.of(value, axes, tensor.dtype)
