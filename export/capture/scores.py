"""What a module does to its attention scores before the softmax, read by its values.

The chain of operations between q k^T and the softmax is run on made-up scores at a few lengths. If it is `scale * score
+ bias`, or `cap * tanh(scale * score / cap) + bias`, wherever a key is visible, the attention is a scale, a soft cap, a
mask and a bias, however they were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .axes import Atom, Axes, Role, Symbols, flat, has
from .positional import Positional
from .tables import ByDistance, NotStable, PerKey, Square, close, read_structure, sampled_rows, whole_square
from .tensor import sizes
from .trace import arguments, aten, call, is_computed, is_pointwise, mapped

# What modules add to hide a key: -inf, the least float, -1e10, -1e9, -1e4, perhaps scaled afterwards; after the softmax
# all of them are 0.
HIDDEN = -1.2e3
# The made-up scores beside 0: small ones that a soft cap bends, large ones that only a limit would stop.
PROBES = (50.0, -150.0, 3e4, -9e4)
FAR = 1e15  # a score that any soft cap has made its own
# Scores in units of where a soft cap begins to bend, and a small one that it leaves as it is.
BENDS = (0.1, -0.4, 0.8, -1.5, 3.0)
SMALL = 1e-4

IDENTITIES = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.dropout.default,
    aten.type_as.default,
}
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
}
# made-up score(s), rows, length -> (heads, rows, length) in float64
Scores = Callable[[float, torch.Tensor, int], torch.Tensor]


class Unreadable(Exception):
    """An operation on the scores that is neither element-wise nor a view, or a mask that does more than to hide."""


class NotCausal(Exception):
    """A position sees its future; holds the query and key."""


@dataclass(frozen=True)
class Pattern:
    """Causal attention with a scale, perhaps a window, perhaps a bias per (head or 1, query, key); -inf hides a key.

    softcap: scores become softcap * tanh(scores / softcap) before the bias. sinks: for each head a score that takes
    part in the softmax and weighs nothing. head_scales: a factor of each head's scores beside `scale`.
    """

    scale: float = 1.0
    window: int | None = None
    bias: PerKey | ByDistance | Square | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] = ()
    head_scales: tuple[float, ...] = ()

    def __str__(self) -> str:
        names = {PerKey: "a bias per key", ByDistance: "a bias by distance", Square: "a table"}
        parts = [
            "causal",
            "" if self.window is None else f"window {self.window}",
            "" if self.softcap is None else f"soft cap {self.softcap:.6g}",
            "a scale per head" if self.head_scales else "",
            "" if self.bias is None else names[type(self.bias)],
            "sinks" if self.sinks else "",
        ]
        return ", ".join(part for part in parts if part)


def read_pattern(scores: Scores, length: int) -> Pattern | None:
    """The pattern that `scores` follow up to `length`, or None where they are no scale, mask and bias.

    Raises NotCausal, and TooLarge or NotStable from the table that an unusual bias needs.
    """
    rows = sampled_rows(length)
    at_zero = scores(0.0, rows, length)
    visible = at_zero > HIDDEN
    columns = torch.arange(length)
    future = visible & (columns > rows[:, None])
    if future.any():
        _, row, key = (int(i) for i in future.nonzero()[0])
        raise NotCausal(int(rows[row]), key)
    if not visible[:, torch.arange(len(rows)), rows].all():  # a position that does not see itself
        return None
    fit = _fit(scores, at_zero, visible, rows, length)
    if fit is None:
        return None

    def bias(rows: torch.Tensor, length: int) -> torch.Tensor:
        """(heads or 1, rows, length): what is added; NaN in the future, where anything would do."""
        value = scores(0.0, rows, length)
        value = torch.where(value > HIDDEN, value, -torch.inf)
        value = torch.where(torch.arange(length) > rows[:, None], torch.nan, value)
        return value[:1] if close(value, value[:1].expand_as(value)) else value

    pattern = Pattern(scale=fit.scale, softcap=fit.softcap, head_scales=fit.heads)
    window = int(visible[0, -1].sum())  # of the last row
    if torch.equal(visible, ((columns <= rows[:, None]) & (columns > rows[:, None] - window)).expand_as(visible)):
        pattern = replace(pattern, window=window if window < length else None)
        flat_bias = at_zero[visible]
        if close(flat_bias, torch.zeros_like(flat_bias)):
            return pattern
        if window < length:  # the window is the operator's own; the bias need not repeat it
            return replace(
                pattern,
                bias=_read_bias(
                    lambda r, n: bias(r, n).masked_fill(torch.arange(n) <= r[:, None] - window, torch.nan), length
                ),
            )
    return replace(pattern, bias=_read_bias(bias, length))


@dataclass(frozen=True)
class OpenPattern:
    """Attention in both directions: a scale, perhaps a bias per (head or 1, query, key), where -inf hides a key.

    hidden: what the score of a key becomes where the padding mask hides it; None where there is no such mask.
    """

    scale: float = 1.0
    bias: PerKey | ByDistance | Square | None = None
    hidden: float | None = None

    def __str__(self) -> str:
        names = {PerKey: ", a bias per key", ByDistance: ", a bias by distance", Square: ", a table"}
        return f"full{', padding masked' if self.hidden is not None else ''}{names.get(type(self.bias), '')}"


def read_open(scores: Scores, positional: Positional, length: int) -> OpenPattern | None:
    """The pattern of attention that need not be causal, or None where it is no scale, mask and bias.

    Raises TooLarge or NotStable from the table that an unusual bias needs.
    """
    rows = sampled_rows(length)
    at_zero = scores(0.0, rows, length)
    visible = at_zero > HIDDEN
    fit = _fit(scores, at_zero, visible, rows, length) if visible.any() else None
    if fit is None or fit.softcap is not None or fit.heads:
        return None

    def bias(rows: torch.Tensor, length: int) -> torch.Tensor:
        value = scores(0.0, rows, length)
        value = torch.where(value > HIDDEN, value, -torch.inf)
        return value[:1] if close(value, value[:1].expand_as(value)) else value

    read: PerKey | ByDistance | Square | None = None
    if not visible.all() or not close(at_zero, torch.zeros_like(at_zero)):
        read = read_structure(bias, length) or whole_square(bias, length)
        read = type(read)(read.table.float())
    try:
        return OpenPattern(fit.scale, read, _read_mask(scores, positional))
    except Unreadable:
        return None


def _read_mask(scores: Scores, positional: Positional) -> float | None:
    """What the padding mask makes of a hidden score; None where no score depends on it.

    Raises Unreadable where it does something else than to hide keys from the tokens that are there.
    """
    trace = positional.trace
    if positional.symbol != trace.source or not any(argument.is_mask for argument in trace.inputs.values()):
        return None
    length = 12
    rows = torch.arange(length)
    full = scores(0.0, rows, length)
    found: float | None = None
    for mask in (rows < 12, rows < 5, rows < 1, rows % 3 != 1):
        with positional.given(mask=mask):
            got = scores(0.0, rows, length)[..., mask, :]  # of the tokens that are there
        expected = full[..., mask, :]
        if torch.equal(got, expected) and not mask.all():
            continue
        wanted = (expected > HIDDEN) & mask
        if not torch.equal(got > HIDDEN, wanted) or not close(got[wanted], expected[wanted]):
            raise Unreadable
        if not mask.all():
            found = float(got[..., ~mask].max())
    return found


@dataclass(frozen=True)
class Fit:
    """What becomes of a score without its bias: scale * score, perhaps times a factor of its head, perhaps capped."""

    scale: float
    heads: tuple[float, ...] = ()
    softcap: float | None = None


def _fit(scores: Scores, at_zero: torch.Tensor, visible: torch.Tensor, rows: torch.Tensor, length: int) -> Fit | None:
    """The scale of all visible scores, whatever their size, and what bends them; None where it is something else."""
    heads = at_zero.shape[0]
    if not visible.flatten(1).any(1).all():
        return None

    def change(probe: float) -> torch.Tensor:
        return scores(probe, rows, length) - at_zero

    def first(value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value[h][visible[h]][0] for h in range(heads)])  # (heads,)

    def agrees(probe: float, expected: torch.Tensor, unit: torch.Tensor) -> bool:
        """expected, unit: (heads,)"""
        away = (change(probe) - expected[:, None, None]) / unit[:, None, None]
        return close(away[visible], torch.zeros_like(away[visible]))

    scales = first(change(PROBES[0])) / PROBES[0]
    if scales.all() and all(agrees(p, scales * p, (scales * p).abs()) for p in PROBES):
        return _of_heads(scales, None)
    cap = float(first(change(FAR)).abs()[0])
    if not 0 < cap < FAR / 1e6:
        return None
    roughly = first(change(SMALL)) / SMALL
    if not roughly.all():
        return None
    bend = cap / float(roughly.abs().max())  # the score at which the cap begins to bend
    scales = cap * torch.atanh((first(change(bend / 2)) / cap).clamp(-1, 1)) / (bend / 2)
    probes = (*PROBES, FAR, -FAR, *(bend * factor for factor in BENDS))
    capped = scales.isfinite().all() and all(
        agrees(p, cap * torch.tanh(scales * p / cap), torch.full_like(scales, cap)) for p in probes
    )
    return _of_heads(scales, cap) if capped else None


def _of_heads(scales: torch.Tensor, softcap: float | None) -> Fit:
    if close(scales / scales[0], torch.ones_like(scales)):
        return Fit(float(scales[0]), (), softcap)
    return Fit(1.0, tuple(scales.tolist()), softcap)


def _read_bias(bias: Callable[[torch.Tensor, int], torch.Tensor], length: int) -> PerKey | ByDistance | Square | None:
    """Read a bias up to a constant per row, which no softmax sees."""

    def from_self(rows: torch.Tensor, length: int) -> torch.Tensor:
        value = bias(rows, length)
        return value - value.gather(-1, rows[None, :, None].expand(value.shape[0], -1, 1))

    read: PerKey | ByDistance | Square | None = None
    with contextlib.suppress(NotStable):
        read = read_structure(bias, length)
    if not isinstance(read, PerKey):
        read = read_structure(from_self, length) or whole_square(from_self, length)
    table = torch.nan_to_num(read.table, nan=0.0, neginf=-torch.inf)
    if not table.any():
        return None
    return type(read)(table.float())


class Chain:
    """The operations between q k^T (or the score that a mask is added to) and the softmax, ready to be run."""

    def __init__(
        self, nodes: list[fx.Node], source: fx.Node, axes: Axes, positional: Positional, symbols: Symbols
    ) -> None:
        self.nodes, self.source, self.axes = nodes, source, axes
        self.positional, self.symbols = positional, symbols
        self.crosses = symbols.size(Atom(Role.KEY)) != positional.symbol  # the keys are those of the other sequence

    def sizes(self, axes: Axes, rows: int, length: int) -> list[int]:
        return sizes(axes, 1, rows, self.positional.other if self.crosses else length)

    def result_axes(self) -> Axes:
        """The axes of what the chain leads to."""
        axes = self.axes
        for node in self.nodes:
            if node.target in VIEWS:
                grouped = self.symbols.regroup(axes, self.positional.trace.shape(node))
                if grouped is None:
                    raise Unreadable(node)
                axes = grouped[0]
        return axes

    def __call__(self, score: float, rows: torch.Tensor, length: int) -> torch.Tensor:
        """(heads, rows, length) in float64; raises Unreadable for an operation that no reader follows."""
        axes = self.axes
        value = torch.full(self.sizes(axes, len(rows), length), score, dtype=torch.float64)
        if self.source.target is aten.baddbmm.default:  # the product adds a bias itself
            value = self._baddbmm(value, axes, rows, length)
        for node in self.nodes:
            if node.target in IDENTITIES:
                continue
            if node.target in VIEWS:
                grouped = self.symbols.regroup(axes, self.positional.trace.shape(node))
                if grouped is None:
                    raise Unreadable(node)
                axes = grouped[0]
                value = value.reshape(self.sizes(axes, len(rows), length))
            elif is_pointwise(node.target):
                value = self._pointwise(node, value, axes, rows, length)
            else:
                raise Unreadable(node)
        return self.canonical(value, axes, len(rows), length)

    def _pointwise(
        self, node: fx.Node, value: torch.Tensor, axes: Axes, rows: torch.Tensor, length: int
    ) -> torch.Tensor:
        def operand(n: fx.Node) -> Any:
            if n in self.positional.trace.data:
                return value
            return self.aligned(n, axes, rows, length)

        args, kwargs = mapped(node, operand)
        return call(node, args, kwargs)

    def _baddbmm(self, value: torch.Tensor, axes: Axes, rows: torch.Tensor, length: int) -> torch.Tensor:
        options: Any = self.source.kwargs
        if options.get("beta", 1) == 0:  # what is weighed by 0 is not read, and may hold anything
            return options.get("alpha", 1) * value
        base = self.aligned(arguments(self.source)[0], axes, rows, length)
        return options.get("beta", 1) * base + options.get("alpha", 1) * value

    def aligned(self, node: fx.Node, axes: Axes, rows: torch.Tensor, length: int) -> Any:
        """A positional operand beside scores of `axes`: only `rows` of the axis that meets the query positions."""
        if not is_computed(node) or not isinstance(node.meta["val"], torch.Tensor):
            return self.positional.value(node, length)
        missing = len(axes) - node.meta["val"].dim()
        shape = self.positional.trace.shape(node)
        for i, size in enumerate(shape):
            if size == self.positional.symbol and has(axes[i + missing], Role.QUERY):
                return self.positional.rows(node, i, rows, length)
        return self.positional.value(node, length)

    def signature(self) -> tuple[object, ...]:
        """Equal for chains that do the same to their scores with the same positional nodes."""

        def named(operand: Any) -> Any:
            return "data" if isinstance(operand, fx.Node) and operand in self.positional.trace.data else operand

        return tuple(
            str((n.target, fx.node.map_aggregate((n.args, tuple(n.kwargs.items())), named)))
            for n in self._nodes_and_base()
        )

    def _nodes_and_base(self) -> list[fx.Node]:
        return [*([self.source] if self.source.target is aten.baddbmm.default else []), *self.nodes]

    def canonical(self, value: torch.Tensor, axes: Axes, rows: int, length: int) -> torch.Tensor:
        """Scores of any layout as (heads, rows, length)."""
        atoms = flat(axes)
        roles = [atom.role for atom in atoms]
        query, key, batch = roles.index(Role.QUERY), roles.index(Role.KEY), roles.index(Role.BATCH)
        heads = [i for i in range(len(atoms)) if i not in (query, key, batch)]
        apart = value.reshape(self.sizes(tuple((atom,) for atom in atoms), rows, length))
        return apart.permute(batch, *heads, query, key).flatten(0, -3)
