"""Walk the captured graph once and write its continuation from a cache: the sequence axis decides everything.

An operation that treats positions one by one runs on the new positions as it is. Where positions are mixed the key
operand is needed whole: it becomes a cache entry, written where each row stands. Of positional nodes the rows at
`position_ids` are taken where they meet a query axis. Anything else is refused with the module's source line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from . import tables
from .axes import Atom, Axes, Axis, Role, Symbols, axis_of, flat, position
from .emitter import DTYPES, Emitter
from .place import Placed, gather_by_distance, gather_rows, gather_square, slice_positions
from .positional import Positional
from .tables import ByDistance, NotStable, PerKey, Square, TooLarge
from .tensor import Tensor, laid_out
from .trace import Kind, Trace, aten, is_computed, is_pointwise, mapped, refuse

Rule = Callable[..., "Tensor | list[Tensor] | Complex"]
RULES: dict[Any, Rule] = {}
COMPLEX_RULES: dict[Any, Rule] = {}
# Operations that are right for positions and some before them, beside those on each element alone.
STRETCHABLE: set[Any] = set()
# Operations that read a mask made of a padding mask by its values.
READS_MASKS = {aten.scaled_dot_product_attention.default}


@dataclass(frozen=True)
class Complex:
    """A complex value as two real ones: ONNX has no complex numbers."""

    real: Tensor
    imag: Tensor


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Put a function on the allow-list as the meaning of `targets`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@dataclass(frozen=True)
class CacheEntry:
    """One past -> present pair of the graph: (batch, num_kv_heads, capacity, head_dim)."""

    past: str
    present: str
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None


@dataclass(frozen=True)
class StateEntry:
    """One past -> present pair of fixed size, (batch, *shape)."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionReport:
    """How one attention of the module is written: its operator, what was read, and why not the one asked for."""

    operator: str
    pattern: str
    reason: str = ""


class Follower:
    """Holds what is known of the nodes met so far; the rules ask it for operands and cache entries.

    role: what the positions of its inputs are. QUERY, new ones, to be continued from a cache; SOURCE or KEY, all there
    are at once. source: the follower of an encoder-decoder's encoder. observed: collects the weights of attention,
    (weights, axis of the queries, axis of the keys) each, which then stays as it is written.
    """

    def __init__(
        self,
        trace: Trace,
        positional: Positional,
        max_length: int,
        flavor: str,
        *,
        role: Role = Role.QUERY,
        emit: Emitter | None = None,
        source: Follower | None = None,
        observed: list[tuple[Tensor, int, int]] | None = None,
    ) -> None:
        self.trace, self.positional, self.max_length, self.flavor = trace, positional, max_length, flavor
        self.role, self.source, self.observed = role, source, observed
        self.emit = emit or Emitter()
        self.symbols = Symbols(trace.batch, trace.seq, trace.source)
        self.values: dict[fx.Node, Tensor | list[Tensor] | Complex] = {}
        self.entries: list[CacheEntry] = []
        self.states: list[StateEntry] = []
        self.patterns: dict[Any, Any] = {}
        self.attention: list[AttentionReport] = []
        self.by_key = False  # whether anything depends on where in the cache a key stands
        self._sides = {"key": 0, "value": 0}
        self._derived: dict[Any, fx.Node] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all positions are there at once, so that they may be mixed."""
        return self.role is not Role.QUERY

    # -- nodes --------------------------------------------------------------------------------------------------
    def follow(self, node: fx.Node) -> None:
        """Give a data node its value, by the rule of its operation."""
        if node in self.trace.inputs:
            self.values[node] = self._input(node)
            return
        reads_masks = node.target in READS_MASKS
        args, kwargs = mapped(node, lambda n: n if reads_masks and n in self.trace.masks else self._operand(n))
        followed_by = self._rule(node, args)
        if node.target not in STRETCHABLE and not is_pointwise(node.target):
            _refuse_stretched(node, args)
        try:
            result = followed_by(self, node, *args, **kwargs)
        except (AttributeError, TypeError) as error:  # a table where the rule knows data, or the other way round
            raise refuse(node, "this operation is not followed with these operands") from error
        self.values[node] = result
        if isinstance(result, Tensor):
            self._check(node, result)

    def _input(self, node: fx.Node) -> Tensor:
        argument = self.trace.inputs[node]
        axes: Axes = ((Atom(Role.BATCH),), (Atom(self.role),))
        names = {Kind.TYPES: "token_type_ids", Kind.MASK: "attention_mask", Kind.PADDING: "attention_mask"}
        name = names.get(argument.kind, "input_ids")
        if name == "input_ids" and self.role is Role.SOURCE and "source_ids" in self.emit.interface.inputs:
            name = "source_ids"
        value = self.emit.given(name)
        if argument.kind is Kind.PADDING:
            return Tensor.of(self.emit.op("Equal", value, self.emit.constant(0)), axes, torch.bool)
        return Tensor.of(value, axes, torch.int64)

    def _operand(self, node: fx.Node) -> Any:
        """What a rule gets for a node: the value of one that holds data, any other node itself."""
        if node in self.trace.data or (node in self.trace.masks and self.observed is None):
            return self.value_of(node)
        return node

    def value_of(self, node: fx.Node) -> Tensor | list[Tensor] | Complex:
        """The value of a data node, followed now if nobody asked before; of source data, that of the other graph."""
        if node in self.values:
            return self.values[node]
        if self.source is None or node in self.trace.target:
            self.follow(node)
            return self.values[node]
        value = self.source.value_of(node)
        if self.source.emit is self.emit:
            return value
        return [self._away(v) for v in value] if isinstance(value, list) else self._away(value)

    def _away(self, value: Any) -> Any:
        return replace(value, home=self.source.emit) if isinstance(value, Tensor) and self.source else value

    @staticmethod
    def _rule(node: fx.Node, args: Sequence[Any]) -> Rule:
        """The rule of a node's operation; for complex numbers, of its operation on pairs."""
        known, kind = (
            (COMPLEX_RULES, " for complex numbers") if any(isinstance(a, Complex) for a in args) else (RULES, "")
        )
        if node.target not in known:
            advice = "only operations whose effect on every axis is known are followed"
            raise refuse(node, f"this operation has no rule{kind}", advice)
        return known[node.target]

    def _check(self, node: fx.Node, result: Tensor) -> None:
        """The followed axes must be as large as the traced ones; a new or last position may stand for one."""
        if not isinstance(node.meta["val"], torch.Tensor):
            return
        expected, found = self.trace.shape(node), [self.symbols.product(axis) for axis in result.axes]
        if len(expected) != len(found) or any(e != f for e, f in zip(expected, found)):
            raise refuse(node, f"its axes are {found} where {expected} were traced")

    def report_attention(self, operator: str, pattern: str, reason: str = "") -> None:
        self.attention.append(AttentionReport(operator, pattern, reason))

    # -- operands -----------------------------------------------------------------------------------------------
    def constant(self, node: fx.Node) -> torch.Tensor:
        """The value of a positional node that has no sequence axis and does not change with the length."""
        value = self.positional.value(node, self.max_length)
        if is_computed(node):
            with self.positional.given(other=9):
                if not tables.close(value, self.positional.value(node, 7)):
                    raise refuse(node, "depends on the length of the whole sequence, which a cache cannot follow")
        return value

    def parameter(self, node: fx.Node, transposed: bool = False) -> ir.Value:
        """A positional node without a sequence axis as an initializer; the module's own tensors by reference."""
        if not self.is_constant(node):
            raise refuse(node, "weights that depend on the sequence length are not followed")
        value = self.constant(node)
        name = str(node.target) if node.op == "get_attr" else node.name
        return self.emit.weight(value.t() if transposed else value, name)

    def derived(self, node: fx.Node, function: Callable[[torch.Tensor], torch.Tensor]) -> fx.Node:
        """A new positional node: `function` of another."""
        if (node, function) not in self._derived:
            made = node.graph.call_function(function, (node,))
            made.meta = {**node.meta, "val": function(node.meta["val"])}
            self._derived[node, function] = made
        return self._derived[node, function]

    def is_constant(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or node in self.trace.data or node in self.trace.masks:
            return False
        return not self.trace.lengths_in(self.trace.shape(node))

    def size(self, axis: Axis) -> int:
        """The size of an axis without positions or rows."""
        return int(self.symbols.product(axis))

    def number(self, node: fx.Node, value: Any) -> Any:
        """A scalar operand; one that is computed from the length is refused."""
        if isinstance(value, fx.Node):
            raise refuse(node, "computes with the length of the whole sequence, which a cache cannot follow")
        return value

    def beside(
        self, operand: fx.Node, axes: Axes, order: Sequence[int], dtype: torch.dtype, asker: fx.Node
    ) -> ir.Value:
        """A positional operand, laid out to be broadcast with data of `axes` whose dimensions stand in `order`.

        Every axis in `axes` is a single atom, a fixed size or empty, so that each dimension has one meaning.
        """
        shape = self.trace.shape(operand)
        missing = len(axes) - len(shape)
        along = [i + missing for i, size in enumerate(shape) if size in (self.trace.seq, self.trace.source)]
        along = [i for i in along if axes[i]]
        if len(self.trace.lengths_in(shape)) != len(along):
            raise refuse(operand, f"its shape {shape} cuts the sequence in pieces")
        roles = [position(axes[i]) for i in along]
        if Role.SOURCE in roles and len(set(roles)) > 1:  # between two sequences
            return self._flat(operand, axes, order, dtype, asker)
        allowed = {self.role} if self.is_whole else {Role.QUERY, Role.KEY}
        if not set(roles) <= allowed or (not self.is_whole and len(set(roles)) < len(roles)):
            raise refuse(asker, "a table over positions meets an axis that is not one of positions")
        if roles == [Role.KEY, Role.QUERY]:
            along.reverse()
        try:
            placed = self._placed(operand, missing, along, axes, dtype)
        except NotStable:
            why = "its value at a position depends on the length of the whole sequence"
            raise refuse(operand, why, "a table by absolute position would work") from None
        except TooLarge as size:
            why = f"a table of {size.args[0] / 2**20:.0f} MiB would be needed"
            raise refuse(operand, why, "give a smaller --max-length") from None
        return placed.arranged(self.emit, order, axis_of(axes, Role.BATCH))

    def _flat(self, operand: fx.Node, axes: Axes, order: Sequence[int], dtype: torch.dtype, asker: fx.Node) -> ir.Value:
        """A table between source and target positions that holds one value for all of them, as an empty bias does."""
        values = []
        for length, other in ((7, 5), (self.max_length, 9)):
            with self.positional.given(other=other):
                value = self.positional.value(operand, length)
            for i, size in enumerate(self.trace.shape(operand)):
                first = value.narrow(i, 0, 1)
                if size in (self.trace.seq, self.trace.source):
                    if not tables.close(value, first.expand_as(value)):
                        raise refuse(asker, "a table between source and target positions is not followed")
                    value = first
            values.append(value)
        table = values[0].reshape([1] * (len(axes) - values[0].dim()) + list(values[0].shape))
        if not tables.close(*values):
            raise refuse(asker, "a table between source and target positions changes with their lengths")
        return Placed.constant(self.emit, table.to(dtype), "table").arranged(self.emit, order, None)

    def _placed(self, operand: fx.Node, missing: int, along: list[int], axes: Axes, dtype: torch.dtype) -> Placed:
        """along: the axes of positions, that of the queries before that of the keys."""
        length = self.max_length

        def full_rank(value: torch.Tensor) -> torch.Tensor:
            return value.reshape([1] * missing + list(value.shape))

        if not along:
            name = str(operand.target) if operand.op == "get_attr" else "table"
            return Placed.constant(self.emit, full_rank(self.constant(operand)).to(dtype), name)
        if len(along) == 1:
            table = tables.read_rows(lambda n: full_rank(self.positional.value(operand, n)), along[0], length)
            role = position(axes[along[0]])
            if role is Role.QUERY:
                return gather_rows(self.emit, table.to(dtype), along[0])
            self.by_key |= role is Role.KEY and not table.eq(table.narrow(along[0], 0, 1)).all()
            return slice_positions(self.emit, table.to(dtype), along[0], role or Role.KEY)
        query, key = along
        rest = [i for i in range(len(axes)) if i not in along]

        def rows(r: torch.Tensor, n: int) -> torch.Tensor:
            value = full_rank(self.positional.rows(operand, query - missing, r, n))
            return value.permute(*rest, query, key)

        return self.place_square(tables.read_square(rows, length), rest, query, key, dtype)

    def place_square(
        self, read: PerKey | ByDistance | Square, rest: list[int], query: int, key: int, dtype: torch.dtype
    ) -> Placed:
        """A value over (query, key) as dimensions `rest`, `query` and `key` of a tensor."""
        table, whole = read.table.to(dtype), self.role if self.is_whole else None
        self.by_key = True
        if isinstance(read, PerKey):
            placed = slice_positions(self.emit, table, table.dim() - 1, whole or Role.KEY)
            return Placed(placed.value, tuple((*rest, key)[i] for i in placed.dims))
        if isinstance(read, ByDistance):
            return gather_by_distance(self.emit, table, self.max_length, rest, query, key, whole)
        return gather_square(self.emit, table, rest, query, key, whole)

    # -- the cache ----------------------------------------------------------------------------------------------
    def entry(
        self, side: str, heads: int, dim: int, dtype: torch.dtype, window: int | None = None
    ) -> tuple[ir.Value, CacheEntry]:
        """A new past input of the graph, (batch, heads, length, dim), and its entry."""
        layer = self._sides[side]
        self._sides[side] += 1
        entry = CacheEntry(f"past_key_values.{layer}.{side}", f"present.{layer}.{side}", heads, dim, dtype, window)
        self.entries.append(entry)
        return self.emit.input(entry.past, DTYPES[dtype], ("batch", heads, "length", dim)), entry

    def present(self, entry: CacheEntry, value: ir.Value) -> None:
        self.emit.output(
            value, entry.present, DTYPES[entry.dtype], ("batch", entry.num_kv_heads, "length", entry.head_dim)
        )

    def state(self, dtype: torch.dtype, shape: Sequence[int]) -> tuple[ir.Value, StateEntry]:
        """A new past input of fixed size, (batch, *shape), zeros at the beginning, and its entry."""
        number = len(self.states)
        entry = StateEntry(f"past_states.{number}", f"present_states.{number}", tuple(shape), dtype)
        self.states.append(entry)
        return self.emit.input(entry.past, DTYPES[dtype], ("batch", *shape)), entry

    def whole(self, tensor: Tensor, side: str) -> Tensor:
        """The tensor over all positions: its new rows written into a cache entry where each row stands."""
        if side == "key":  # one for each attention that stays as it is written
            reason = "not a softmax of scores under a scale, a mask and a bias alone"
            self.report_attention("the module's own operators", "as written", reason)
        atoms = [a for a in flat(tensor.axes) if not a.repeat]
        batch, query = (next(a for a in atoms if a.role is role) for role in (Role.BATCH, Role.QUERY))
        features = [a for a in atoms if a.role is None]
        heads, dim = tuple(features[:1]), tuple(features[1:])
        if len(features) == 1:
            heads, dim = (), (features[0],)
        entry_axes: Axes = ((batch,), heads, (query,), dim)
        new = laid_out(self.emit, tensor, entry_axes)
        past, entry = self.entry(side, self.size(heads), self.size(dim), tensor.dtype)
        present = scatter(self.emit, past, new)
        self.present(entry, present)
        key = Atom(Role.KEY)
        swapped = tuple(tuple(key if a is query else a for a in axis) for axis in entry_axes)
        axes = tuple(tuple(key if a is query else a for a in axis) for axis in tensor.axes)
        return Tensor(self.valid(present), swapped, axes, tensor.dtype)

    def valid(self, present: ir.Value) -> ir.Value:
        """(batch, heads, total, dim): the part of a cache entry that holds any row's positions."""
        return self.emit.op(
            "Slice", present, self.emit.constant([0]), self.emit.size(Role.KEY), self.emit.constant([2])
        )


def _refuse_stretched(node: fx.Node, args: Any) -> None:
    """An operation that knows positions alone would take those before them for new ones."""
    operands = [o for a in args for o in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(o, Tensor)]
    if any(atom.role is Role.STRETCH for o in operands for atom in flat(o.axes)):
        why = "takes positions to which some were added, or of which some were cut off"
        raise refuse(node, why, "cut the sequence back to its own length first, as with [:, :length]")


def scatter(emit: Emitter, past: ir.Value, new: ir.Value) -> ir.Value:
    """Write `new` (batch, heads, seq, dim) into `past` where each row stands."""
    return emit.multi("TensorScatter", past, new, emit.write_indices(), outputs=1, version=24, axis=2)[0]


def followed(axes: Axes) -> Axes:
    """Axes without repeats: what a computed value has."""
    return tuple(tuple(Atom(a.role, a.size) if a.repeat else a for a in axis) for axis in axes)
