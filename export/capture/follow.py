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

from tfinfer.errors import CaptureError

from . import tables
from .allowed import COMPLEX_RULES, RULES
from .axes import Atom, Axes, Axis, Role, Symbols, flat
from .emitter import DTYPES, Emitter
from .positional import Positional
from .refusals import Lost, guess, is_lost
from .tensor import Tensor, laid_out
from .trace import Kind, Trace, aten, is_computed, is_pointwise, mapped, refuse

Rule = Callable[..., "Tensor | list[Tensor] | Complex"]
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
    (node, weights, axis of the queries, axis of the keys) each, which then stays as it is written.
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
        observed: list[tuple[fx.Node, Tensor, int, int]] | None = None,
    ) -> None:
        self.trace, self.positional, self.max_length, self.flavor = trace, positional, max_length, flavor
        self.role, self.source, self.observed = role, source, observed
        self.emit = emit or Emitter()
        self.symbols = Symbols(trace.batch, trace.seq, trace.source)
        self.values: dict[fx.Node, Tensor | list[Tensor] | Complex | Lost] = {}
        self.refusals: list[CaptureError] = []
        self.guessed: set[fx.Node] = set()  # nodes whose value rests on what was refused
        self.entries: list[CacheEntry] = []
        self.states: list[StateEntry] = []
        self.patterns: dict[Any, Any] = {}
        self.attention: list[AttentionReport] = []
        self.by_key = False  # whether anything depends on where in the cache a key stands
        self.indexes: dict[ir.Value, Axis] = {}  # of which axis the numbers in a value are the indices
        self.columns: dict[ir.Value, Axes] = {}  # the same of each column of a value of several
        self._sides = {"key": 0, "value": 0, "data": 0}
        self._held: dict[Any, tuple[CacheEntry, ir.Value]] = {}
        self._derived: dict[Any, fx.Node] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all positions are there at once, so that they may be mixed."""
        return self.role is not Role.QUERY

    # -- nodes --------------------------------------------------------------------------------------------------
    def follow(self, node: fx.Node) -> None:
        """Give a data node its value, by the rule of its operation; what is refused is noted, and followed on."""
        try:
            self._follow(node)
        except CaptureError as refusal:
            self.lose(node, refusal)
        except Exception:
            if not self._is_guessed(node):
                raise
            self.values[node] = guess(self, node)  # what a guess leads to says nothing of the module
        if self._is_guessed(node):
            self.guessed.add(node)

    def _is_guessed(self, node: fx.Node) -> bool:
        return bool(self.refusals) and any(operand in self.guessed for operand in node.all_input_nodes)

    def lose(self, node: fx.Node, refusal: CaptureError) -> None:
        """Note a refusal and go on with what the node's shape says, so that all refusals are found at once."""
        self.refusals.append(refusal)
        self.guessed.add(node)
        self.values[node] = guess(self, node)

    def _follow(self, node: fx.Node) -> None:
        if node in self.trace.inputs:
            self.values[node] = self._input(node)
            return
        reads_masks = node.target in READS_MASKS
        args, kwargs = mapped(node, lambda n: n if reads_masks and n in self.trace.masks else self._operand(n))
        if is_lost((args, *kwargs.values())):
            self.values[node] = guess(self, node)
            return
        followed_by = self._rule(node, args)
        if node.target not in STRETCHABLE and not is_pointwise(node.target):
            _refuse_stretched(node, args)
        try:
            result = followed_by(self, node, *args, **kwargs)
        except (AttributeError, TypeError) as error:  # a table where the rule knows data, or the other way round
            if self._is_guessed(node):
                raise
            raise refuse(node, "this operation is not followed with these operands") from error
        self.values[node] = result
        if isinstance(result, Tensor) and not self._is_guessed(node):
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

    def value_of(self, node: fx.Node) -> Tensor | list[Tensor] | Complex | Lost:
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
        symbols = {symbol for size in self.trace.shape(node) for symbol in getattr(size, "free_symbols", ())}
        return symbols <= {self.trace.batch}

    def size(self, axis: Axis) -> int:
        """The size of an axis without positions or rows."""
        return int(self.symbols.product(axis))

    def number(self, node: fx.Node, value: Any) -> Any:
        """A scalar operand; one that is computed from the length is refused."""
        if isinstance(value, fx.Node):
            raise refuse(node, "computes with the length of the whole sequence, which a cache cannot follow")
        return value

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

    def held(self, rows: ir.Value, heads: int, window: int | None = None) -> ir.Value | None:
        """What another attention holds in the cache of the same new rows, if one does, under the wider window.

        rows: (batch, seq, heads * dim)
        """
        if (found := self._held.get((rows, heads))) is None:
            return None
        entry, present = found
        place = next(i for i, other in enumerate(self.entries) if other.past == entry.past)
        known = self.entries[place].window
        wider = None if window is None or known is None else max(window, known)
        self.entries[place] = replace(self.entries[place], window=wider)
        return present

    def hold(self, rows: ir.Value, heads: int, entry: CacheEntry, present: ir.Value) -> None:
        """Declare what the cache becomes of new rows, for every attention that wants the same ones."""
        self._held[rows, heads] = entry, present
        self.present(entry, present)

    def state(self, dtype: torch.dtype, shape: Sequence[int]) -> tuple[ir.Value, StateEntry]:
        """A new past input of fixed size, (batch, *shape), zeros at the beginning, and its entry."""
        number = len(self.states)
        entry = StateEntry(f"past_states.{number}", f"present_states.{number}", tuple(shape), dtype)
        self.states.append(entry)
        return self.emit.input(entry.past, DTYPES[dtype], ("batch", *shape)), entry

    def whole(self, tensor: Tensor, side: str) -> Tensor:
        """The tensor over all positions: its new rows written into a cache entry where each row stands.

        side: "key" or "value" of an attention, "data" of anything else. Whole numbers and truth values are held as
        float32, which has room for the ids of any vocabulary.
        """
        if not tensor.dtype.is_floating_point:
            floats = replace(tensor, value=self.emit.cast(tensor.value, torch.float32), dtype=torch.float32)
            held = self.whole(floats, side)
            return replace(held, value=self.emit.cast(held.value, tensor.dtype), dtype=tensor.dtype)
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
        rows = laid_out(self.emit, tensor.seen_as(entry_axes), ((batch,), (query,), (*heads, *dim)))
        present = self.held(rows, self.size(heads))
        if present is None:
            past, entry = self.entry(side, self.size(heads), self.size(dim), tensor.dtype)
            present = scatter(self.emit, past, laid_out(self.emit, tensor, entry_axes))
            self.hold(rows, self.size(heads), entry, present)
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
    """Axes as a computed value has them: without repeats, and every atom once: k times v has a head's size twice."""
    seen: set[Atom] = set()
    made = []
    for axis in axes:
        fresh = tuple(replace(a, repeat=False) if a.repeat or a in seen else a for a in axis)
        seen.update(fresh)
        made.append(fresh)
    return tuple(made)
