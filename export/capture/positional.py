"""The values of nodes that depend on lengths and constants alone, read by running them. Knows nothing of ONNX.

Nobody's way of writing a mask or a table matters: the node is evaluated at a length, whole or at some rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from tfinfer.errors import CaptureError

from .trace import Kind, Trace, arguments, aten, call, is_computed, is_pointwise, mapped, read_for_values, refuse

MOVES_ONLY = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
}
FACTORIES = {aten.ones.default, aten.zeros.default, aten.full.default, aten.empty.memory_format}
# Above this many elements a square is computed row by row instead of whole.
SQUARE_LIMIT = 2**22


OTHER_LENGTH = 5  # of the other sequence of an encoder-decoder, while nobody says otherwise


class Positional:
    """Evaluates positional nodes at a sequence length and batch 1, each node once for a length.

    symbol: the length that is meant, the target's or the source's. A padding mask, on which nodes may depend as well,
    is full unless `given` says otherwise.
    """

    def __init__(self, trace: Trace, symbol: Any) -> None:
        self.trace, self.symbol = trace, symbol
        self.length, self.other = 0, OTHER_LENGTH
        self.mask: torch.Tensor | None = None  # (source length,) bool
        self._values: dict[fx.Node, Any] = {}
        self._of_length: dict[Any, dict[fx.Node, Any]] = {}
        self._rules: dict[Any, Callable[..., torch.Tensor | None]] = {
            aten.arange.default: self._arange,
            aten.arange.start: self._arange,
            aten.arange.start_step: self._arange,
            aten.unsqueeze.default: self._unsqueeze,
            aten.transpose.int: self._transpose,
            aten.permute.default: self._permute,
            aten.slice.Tensor: self._slice,
            aten.expand.default: self._sized,
            aten.tril.default: self._triangle,
            aten.triu.default: self._triangle,
            aten.index.Tensor: self._index,
            **dict.fromkeys(FACTORIES, self._factory),
        }

    def value(self, node: fx.Node, length: int) -> Any:
        """The node's value at a sequence of `length`."""
        self._turn_to(length)
        return self._whole(node)

    def rows(self, node: fx.Node, axis: int, rows: torch.Tensor, length: int) -> torch.Tensor:
        """The node's value at `rows` of its sequence axis `axis`, without computing the others where that can be."""
        self._turn_to(length)
        return self._cut(node, axis, rows)

    @contextmanager
    def given(self, mask: torch.Tensor | None = None, other: int | None = None) -> Iterator[None]:
        """Another padding mask, (source length,) bool, or another length of the other sequence."""
        before = self.mask, self.other
        self.mask, self.other = mask, self.other if other is None else other
        try:
            yield
        finally:
            self.mask, self.other = before

    def _turn_to(self, length: int) -> None:
        key = (length, self.other, None if self.mask is None else tuple(self.mask.tolist()))
        self.length, self._values = length, self._of_length.setdefault(key, {})

    def sizes_at(self, length: int) -> dict[Any, int]:
        """The sizes that the symbols stand for in a sequence of `length`."""
        self._turn_to(length)
        return self._known()

    def _known(self) -> dict[Any, int]:
        """The sizes that the symbols stand for."""
        other = {symbol: self.other for symbol in (self.trace.seq, self.trace.source) if symbol is not None}
        return {self.trace.batch: 1, **other, self.symbol: self.length}

    def _padding_mask(self, node: fx.Node) -> torch.Tensor:
        length = self.length if self.symbol == self.trace.source else self.other
        mask = torch.ones(1, length, dtype=torch.bool) if self.mask is None else self.mask[None]
        return ~mask if self.trace.inputs[node].kind is Kind.PADDING else mask.long()

    # -- whole --------------------------------------------------------------------------------------------------
    def _whole(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.trace.constant(node)
        if node in self.trace.masks and node in self.trace.inputs:
            return self._padding_mask(node)
        if node in self.trace.data:
            raise refuse(node, "a length or mask is computed from the values of the ids")
        if node.target is aten.sym_size.int and arguments(node)[0] in self.trace.data:
            size = node.meta["val"]
            return int(size.node.expr.subs(self._known())) if isinstance(size, torch.SymInt) else size
        read = read_for_values(node)
        args, kwargs = mapped(
            node, lambda n: self._stand_in(n) if n in self.trace.data and n not in read else self._whole(n)
        )
        return call(node, args, kwargs)

    def _stand_in(self, node: fx.Node) -> torch.Tensor:
        """Something of the type and shape of a data node, for an operation that does not read its values."""
        known = self._known()
        shape = [size if isinstance(size, int) else int(size.subs(known)) for size in self.trace.shape(node)]
        return torch.empty(1, dtype=node.meta["val"].dtype).expand(shape)

    # -- some rows ----------------------------------------------------------------------------------------------
    def _is_seq(self, node: Any, axis: int) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not 0 <= axis < value.dim():
            return False
        return self.trace.shape(node)[axis] == self.symbol

    def _cut(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        square = math.prod(self.length if self._is_seq(node, i) else 1 for i in range(node.meta["val"].dim()))
        if node.op == "get_attr" or node in self._values or square <= SQUARE_LIMIT:
            return self._whole(node).index_select(axis, rows)
        if node.target in MOVES_ONLY or is_pointwise(node.target):
            return self._pointwise(node, axis, rows)
        rule = self._rules.get(node.target)
        cut = rule(node, axis, rows) if rule else None
        return self._whole(node).index_select(axis, rows) if cut is None else cut

    def _operand(self, operand: Any, axis: int, rows: torch.Tensor) -> Any:
        """An operand of which only `rows` of `axis` are wanted, where it has that axis."""
        if self._is_seq(operand, axis):
            return self._cut(operand, axis, rows)
        return self._whole(operand) if isinstance(operand, fx.Node) else operand

    def _pointwise(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        rank = node.meta["val"].dim()

        def aligned(operand: fx.Node) -> Any:
            value = operand.meta.get("val")
            missing = rank - value.dim() if isinstance(value, torch.Tensor) else 0
            return self._operand(operand, axis - missing, rows)

        args, kwargs = mapped(node, aligned)
        return call(node, args, kwargs)

    def _arange(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        return self._whole(node).index_select(0, rows)

    def _unsqueeze(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        dim = arguments(node)[1] % node.meta["val"].dim()
        return self._operand(arguments(node)[0], axis - (dim < axis), rows).unsqueeze(dim)

    def _transpose(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        rank = node.meta["val"].dim()
        i, j = (dim % rank for dim in arguments(node)[1:3])
        return self._operand(arguments(node)[0], {i: j, j: i}.get(axis, axis), rows).transpose(i, j)

    def _permute(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        order = [dim % node.meta["val"].dim() for dim in arguments(node)[1]]
        return self._operand(arguments(node)[0], order[axis], rows).permute(order)

    def _slice(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor | None:
        source, dim, *bounds = arguments(node)
        dim = int(dim) % node.meta["val"].dim()
        start, end, step = (*(self._whole(b) if isinstance(b, fx.Node) else b for b in bounds), *(None, None, None))[:3]
        if dim == axis:  # rows of a longer table, or of the sequence itself
            if (start or 0) != 0 or (step or 1) != 1:
                return None
            cut = self._cut(source, axis, rows) if self._is_seq(source, axis) else None
            return self._whole(source).index_select(axis, rows) if cut is None else cut
        cut = self._operand(source, axis, rows) if self._is_seq(source, axis) else None
        return None if cut is None else aten.slice.Tensor(cut, dim, start, end, step or 1)

    def _sized(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        source, wanted = arguments(node)[:2]
        missing = node.meta["val"].dim() - source.meta["val"].dim()
        shape = [
            len(rows) if i == axis else self._whole(s) if isinstance(s, fx.Node) else s for i, s in enumerate(wanted)
        ]
        return self._operand(source, axis - missing, rows).expand(shape)

    def _factory(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor:
        args, kwargs = mapped(node, self._whole)
        shape = [len(rows) if i == axis else size for i, size in enumerate(args[0])]
        return call(node, (shape, *args[1:]), kwargs)

    def _triangle(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor | None:
        source, diagonal = arguments(node)[0], arguments(node)[1] if len(arguments(node)) > 1 else 0
        rank = node.meta["val"].dim()
        if axis != rank - 2 or not self._is_seq(source, axis):
            return None
        value = self._cut(source, axis, rows)
        columns = torch.arange(value.shape[-1])
        below = (
            columns <= rows[:, None] + diagonal
            if node.target is aten.tril.default
            else columns >= rows[:, None] + diagonal
        )
        return torch.where(below, value, torch.zeros((), dtype=value.dtype))

    def _index(self, node: fx.Node, axis: int, rows: torch.Tensor) -> torch.Tensor | None:
        source, indices = arguments(node)
        if any(i is None for i in indices) or source.meta["val"].dim() != len(indices):
            return None
        rank = node.meta["val"].dim()
        cut = [self._operand(i, axis - (rank - i.meta["val"].dim()), rows) for i in indices]
        return aten.index.Tensor(self._whole(source), cut)


def longest_length(positional: Positional, nodes: Sequence[fx.Node], wanted: int | None, default: int) -> int:
    """The longest sequence that every positional node allows: `wanted`, or else the module's own, at most `default`.

    A module says its longest length by a guard (a buffer that is sliced) or by failing beyond it (a table that is
    indexed). Raises CaptureError where `wanted` is more than the module allows.
    """
    limit = positional.trace.limits.get(positional.symbol)
    ceiling = min(wanted or default, limit or default if wanted is None else limit or wanted)

    def allowed(length: int) -> bool:
        row = torch.tensor([length - 1])
        try:
            for node in nodes:
                positional.rows(node, _sequence_axis(positional, node), row, length)
        except (IndexError, RuntimeError):
            return False
        return True

    low, high = 2, ceiling
    if not allowed(low):
        raise CaptureError("the module's positions cannot be computed even for two tokens")
    if not allowed(high):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if allowed(middle) else (low, middle)
        high = low
    if wanted is not None and high < wanted:
        raise CaptureError(
            f"the module allows at most {high} tokens, {wanted} were asked for: give --max-length {high} or less"
        )
    return high


def _sequence_axis(positional: Positional, node: fx.Node) -> int:
    return next(i for i, size in enumerate(positional.trace.shape(node)) if size == positional.symbol)


def read_by_data(trace: Trace, symbol: Any) -> list[fx.Node]:
    """The positional nodes with a sequence axis of length `symbol` that data nodes read."""
    found: dict[fx.Node, None] = {}
    for node in trace.nodes:
        if node in trace.data and node not in trace.inputs:
            for operand in node.all_input_nodes:
                if operand not in trace.data and is_computed(operand) and _has_axis(trace, operand, symbol):
                    found[operand] = None
    return list(found)


def _has_axis(trace: Trace, node: fx.Node, symbol: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and symbol in trace.shape(node)
