"""The captured graph of a module, and what is known of every node. Knows no architecture.

Every node of the graph either depends on ids (*data*), on a padding mask alone, or on lengths and constants alone
(*positional*). Data that depends on an encoder-decoder's source alone is *source* data: no decoder step changes it.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch import fx, nn
from torch.utils._sympy.functions import FloorDiv

from tfinfer.errors import CaptureError

aten = torch.ops.aten
TORCH = str(Path(torch.__file__).parent)

CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}
# Operations that take no more from their first input than its type, and shape.
LIKE = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip
# Operations whose values nobody reads before they are written.
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_permuted.default,
         aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}  # fmt: skip
# Element-wise operations that torch does not tag as such.
UNTAGGED = {
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar, aten.__xor__.Tensor,
    aten.masked_fill.Tensor, aten.hardswish.default,
}  # fmt: skip


class Kind(enum.Enum):
    """What an argument of a module holds."""

    IDS = "ids"  # (batch, seq) int64
    TYPES = "types"  # (batch, seq) int64: which of two sentences a token belongs to
    MASK = "mask"  # (batch, seq) int64, 1 where there is a token
    PADDING = "padding"  # (batch, seq) bool, True where there is none, as torch's own modules take it


@dataclass(frozen=True)
class Argument:
    """One argument of a module; `source` marks those of an encoder's sequence, or of the only one of an encoder."""

    name: str
    kind: Kind = Kind.IDS
    source: bool = False

    @property
    def is_mask(self) -> bool:
        return self.kind in (Kind.MASK, Kind.PADDING)

    def sample(self, batch: int, length: int) -> torch.Tensor:
        if self.kind is Kind.PADDING:
            return torch.zeros(batch, length, dtype=torch.bool)
        return torch.full((batch, length), int(self.kind is Kind.MASK), dtype=torch.int64)


@dataclass(eq=False)
class Trace:
    """The captured graph of a module.

    data: nodes that depend on ids. target: those of them that depend on the ids that are followed by a cache, or on the
    only ones of a decoder. masks: nodes that depend on a padding mask, and on no ids. place: a node's number in
    their order.
    """

    module: nn.Module
    nodes: list[fx.Node]
    inputs: dict[fx.Node, Argument]
    output: fx.Node
    batch: Any  # the symbol of the batch size
    seq: Any  # the symbol of the target's length; None for an encoder alone
    source: Any  # the symbol of the source's length; None for a decoder alone
    limits: dict[Any, int]  # the longest lengths that the module's own guards allow, by symbol, where they say
    data: set[fx.Node] = field(default_factory=set)
    target: set[fx.Node] = field(default_factory=set)
    masks: set[fx.Node] = field(default_factory=set)
    loops: list[Any] = field(default_factory=list)  # `reroll.Rolled`, in the order of their numbers
    place: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {node: i for i, node in enumerate(self.nodes)}
        for node, argument in self.inputs.items():
            (self.masks if argument.is_mask else self.data).add(node)
            if not argument.source:
                self.target.add(node)
        for node in self.nodes:
            if not is_computed(node):
                continue
            read = read_for_values(node)
            for group in (self.target, self.data):
                if any(i in group for i in read):
                    group.add(node)
            if node not in self.data and any(i in self.masks for i in read):
                self.masks.add(node)

    def ids(self, source: bool = False) -> fx.Node:
        """The input that holds the ids of one side."""
        return next(n for n, a in self.inputs.items() if a.kind is Kind.IDS and a.source is source)

    def shape(self, node: fx.Node) -> list[Any]:
        """The sizes of a tensor node: ints, or expressions in `batch`, `seq` and `source`."""
        return self.sizes(node.meta["val"])

    @staticmethod
    def sizes(value: torch.Tensor) -> list[Any]:
        """The sizes of a traced tensor, as those of a node."""
        return [_simplified(dim.node.expr) if isinstance(dim, torch.SymInt) else int(dim) for dim in value.shape]

    def lengths_in(self, shape: Sequence[Any]) -> list[Any]:
        """The sizes of a shape that are a length, or computed from one."""
        lengths = {symbol for symbol in (self.seq, self.source) if symbol is not None}
        return [size for size in shape if lengths & getattr(size, "free_symbols", set())]

    def is_counted(self, shape: Sequence[Any]) -> bool:
        """Whether a size of a shape is the number of entries that data picked."""
        known = {self.batch, self.seq, self.source}
        return not {symbol for size in shape for symbol in getattr(size, "free_symbols", ())} <= known

    def constant(self, node: fx.Node) -> torch.Tensor:
        """The parameter or buffer behind a `get_attr` node."""
        value = operator.attrgetter(str(node.target))(self.module)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read the values of a node, not its type or shape alone."""
        others = CHECKS | {aten.sym_size.int}
        return [user for user in node.users if user.target not in others and node in read_for_values(user)]


def _simplified(size: Any) -> Any:
    """A size without floor divisions that come out even: what einsum makes of a length is (length**2) // length."""
    if not size.has(FloorDiv):
        return size

    def divided(whole: Any, part: Any) -> Any:
        quotient = sympy.cancel(whole / part)
        return quotient if quotient.is_polynomial() and quotient.is_integer else FloorDiv(whole, part)

    return size.replace(FloorDiv, divided)


def is_computed(node: fx.Node) -> bool:
    """Whether a node is an operation on tensors rather than a size, an input, a constant or a check."""
    sizes = (int, bool, float, torch.SymInt, torch.SymBool, torch.SymFloat)
    return node.op == "call_function" and node.target not in CHECKS and not isinstance(node.meta.get("val"), sizes)


def arguments(node: fx.Node) -> Any:
    """A node's positional arguments; fx types them too widely to work with."""
    return node.args


def mapped(node: fx.Node, replace: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with every node among them replaced."""
    return cast(Any, fx.node.map_arg((node.args, node.kwargs), replace))


def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a node's operation."""
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def read_for_values(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values matter to a node: `mask.type_as(x)` and `zeros_like(x)` read but the type of x."""
    if node.target in LIKE:
        return []
    if node.target is aten.copy.default:
        return [arguments(node)[1]]
    return [arguments(node)[0]] if node.target is aten.type_as.default else node.all_input_nodes


def is_pointwise(target: Any) -> bool:
    """Whether an operation treats each element alone, as torch says of most of those that do."""
    return torch.Tag.pointwise in getattr(target, "tags", ()) or target in UNTAGGED


class Refused(CaptureError):
    """The error for a node that cannot be followed: operation, what is wrong, where it stands, what to do."""

    def __init__(self, operation: str, why: str, path: str, place: str, instead: str) -> None:
        self.operation, self.why, self.path, self.place, self.instead = operation, why, path, place, instead
        super().__init__(self.told())

    def told(self, others: str = "") -> str:
        """The message; `others` says where else the same was refused."""
        advice = f"; {self.instead}" if self.instead else ""
        return f"{self.operation}: {self.why}, in {self.path}{others}{self.place}{advice}"


def where(node: fx.Node) -> tuple[str, str]:
    """The module path and the source line that made a node, for error messages."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if isinstance(entry, tuple)), "")
    path = path.replace("L['self'].", "").removeprefix("L['self']")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    own = [i for i in frames if TORCH not in lines[i]]  # the innermost line that is not torch's
    place = ""
    for i in (own or frames)[-1:]:
        code = lines[i + 1] if i + 1 < len(lines) else ""
        place = f" at {lines[i].removeprefix('File ')}: {code}"
    return path or "the module itself", place


def refuse(node: fx.Node, why: str, instead: str = "") -> Refused:
    """The error for a node that cannot be followed: operation, what is wrong, where it stands, what to do."""
    return Refused(str(node.target), why, *where(node), instead)
