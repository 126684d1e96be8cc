"""A module into one functional graph of its operators, and what is known of every node. Knows no architecture.

Every node of the graph either depends on ids (*data*), on a padding mask alone, or on lengths and constants alone
(*positional*). Data that depends on an encoder-decoder's source alone is *source* data: no decoder step changes it.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import sympy
import torch
from torch import fx, nn
from torch.export import Dim
from torch.nn.modules import transformer
from torch.utils._sympy.functions import FloorDiv

from tfinfer.errors import CaptureError

from .choices import ASKED_OF_VALUES
from .decompose import decomposed
from .equations import normalise_einsums
from .program import INSTEAD, Draw, functional, without_assertions
from .recurrent import operators_for_recurrent_layers
from .spellings import traceable

aten = torch.ops.aten
TORCH = str(Path(torch.__file__).parent)

# Sizes above 1 and different from each other: torch.export pins sizes 0 and 1, and equal sizes look related.
TRACED_BATCH, TRACED_SEQ, TRACED_SOURCE = 2, 11, 13
PINNED = "specialized it to be a constant"  # in what torch.export says of an axis that a module needs as a number
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
        sizes = node.meta["val"].shape
        return [_simplified(dim.node.expr) if isinstance(dim, torch.SymInt) else int(dim) for dim in sizes]

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


@contextlib.contextmanager
def inference_mode_of(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without what nn.TransformerEncoder does on the side; restored afterwards.

    Its fused fast path would hide its attention. Its hint that a mask is causal is read from the mask's values, which
    no tracing can do; without the hint it uses the mask itself. What autocast would narrow stays as wide as
    the weights, around the call and inside it; gradients stay off.
    """
    training = {part: part.training for part in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    unhinted = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: E731
    hint = mock.patch.object(transformer, "_detect_is_causal_mask", unhinted)
    try:
        off = torch.autocast("cpu", enabled=False)
        with torch.no_grad(), off, hint, traceable(module), _switched_off():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, mode in training.items():
            part.training = mode


@contextlib.contextmanager
def _switched_off() -> Iterator[None]:
    """Autocast and gradients that a module itself asks for, where they are asked for."""
    enter = torch.autocast.__enter__

    def narrow_nothing(self: torch.autocast) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = wanted

    def nothing(self: torch.enable_grad, *error: object) -> None: ...

    def off(self: torch.set_grad_enabled, mode: bool) -> None:
        set_mode(self, False)

    set_mode = torch.set_grad_enabled.__init__
    with (
        mock.patch.object(torch.autocast, "__enter__", narrow_nothing),
        mock.patch.object(torch.enable_grad, "__enter__", nothing),
        mock.patch.object(torch.enable_grad, "__exit__", nothing),
        mock.patch.object(torch.set_grad_enabled, "__init__", off),
    ):
        yield


def trace(module: nn.Module, arguments: Sequence[Argument] = (Argument("input_ids"),)) -> Trace:
    """Capture `module(*arguments)` with symbolic batch and sequence axes.

    Raises CaptureError where torch.export meets control flow on data, an axis that is pinned to the traced size, or
    a module that does not take these arguments.
    """
    lengths = {False: TRACED_SEQ, True: TRACED_SOURCE}
    samples = tuple(argument.sample(TRACED_BATCH, lengths[argument.source]) for argument in arguments)
    dynamic: Any = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in arguments)
    called = module
    if len(arguments) > 1:
        called, dynamic = _Together(module, arguments), (dynamic,)
    loops: list[Any] = []
    try:
        with inference_mode_of(module):
            program = _exported(called, samples, dynamic, partial(_two_tokens, arguments))
    except CaptureError:
        raise
    except Exception as error:
        if len(arguments) > 1 or arguments[0].source or PINNED not in str(error):
            raise CaptureError(f"torch.export cannot capture the module: {explain(error)}") from error
        program, loops = _rerolled(module, arguments[0], error)
    graph_module = without_assertions(program)
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    inputs = dict(zip(placeholders, arguments))
    batch, sizes = _symbols(inputs)
    normalise_einsums(graph_module.graph, list(sizes.values()))
    nodes = list(graph_module.graph.nodes)
    limits = {}
    for symbol in sizes.values():
        upper = program.range_constraints[symbol].upper
        if upper.is_Integer:
            limits[symbol] = int(upper)
    return Trace(graph_module, nodes, inputs, nodes[-1], batch, sizes.get(False), sizes.get(True), limits, loops=loops)


def _exported(
    module: nn.Module, samples: tuple[torch.Tensor, ...], dynamic: Any, draw: Draw | None = None
) -> torch.export.ExportedProgram:
    with operators_for_recurrent_layers(), _quiet():
        return decomposed(functional(module, samples, dynamic, draw), read_for_values)


def _two_tokens(arguments: Sequence[Argument], below: int, generator: torch.Generator) -> list[torch.Tensor]:
    """One row of two tokens for each argument."""
    given = [argument.sample(1, 2) for argument in arguments]
    for argument, tensor in zip(arguments, given):
        if argument.kind is Kind.IDS:
            tensor.random_(0, below, generator=generator)
    return given


def _rerolled(module: nn.Module, ids: Argument, error: Exception) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """Another try for a module that needs the number of positions as a number: it may loop over them."""
    from .reroll import reroll  # it is made of traces itself
    from .unrolled import NotALoop

    def export(length: int) -> torch.export.ExportedProgram:
        return _exported(module, (ids.sample(TRACED_BATCH, length),), ({0: Dim.DYNAMIC},))

    try:
        with inference_mode_of(module):
            rolled, loops = reroll(export)
            sample = (ids.sample(TRACED_BATCH, TRACED_SEQ),)
            return _exported(rolled, sample, ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)), loops
    except NotALoop as why:
        raise CaptureError(
            f"the module needs the number of positions as a number, and {why}: a loop over positions, each step of "
            f"which does the same with its own position and what the step before left, would work; {explain(error)}"
        ) from error
    except CaptureError:
        raise
    except Exception as other:
        raise CaptureError(f"torch.export cannot capture the module: {explain(error)}") from other


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what torch prints and warns of: whole graphs beside some of its errors, which say what is needed."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every size that data decides
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class _Together(nn.Module):
    """Calls a module with several arguments by name, whose batches, and lengths on each side, are the same."""

    def __init__(self, module: nn.Module, arguments: Sequence[Argument]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, *inputs: torch.Tensor) -> Any:
        firsts: dict[bool, torch.Tensor] = {}
        for argument, tensor in zip(self.arguments, inputs):
            torch._check(tensor.shape[0] == inputs[0].shape[0])
            torch._check(tensor.shape[1] == firsts.setdefault(argument.source, tensor).shape[1])
        return self.module(**dict(zip((a.name for a in self.arguments), inputs)))


def _symbols(inputs: dict[fx.Node, Argument]) -> tuple[Any, dict[bool, Any]]:
    """The symbols of the batch, and of the target's (False) and the source's (True) length."""
    batch, sizes = None, {}
    both = len({argument.source for argument in inputs.values()}) > 1
    for node, argument in inputs.items():
        found = node.meta["val"].shape
        side = "" if not both else "source's " if argument.source else "target's "
        for size, name in zip(found, ("batch", f"{side}sequence")):
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"the {name} axis is pinned to {size}: the module computes with it as a number")
        batch = found[0].node.expr
        sizes[argument.source] = found[1].node.expr
    if both and sizes[True] == sizes[False]:
        raise CaptureError("the module takes source and target of one length only: their axes must be free")
    return batch, sizes


def explain(error: Exception) -> str:
    """The lines of a torch.export error that help its reader, in one line."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    source = [line for line in lines if line.startswith("File ") and TORCH not in line]
    kept = [*lines[:2], *source[-1:]]
    advice = f"; {INSTEAD}" if isinstance(error, ASKED_OF_VALUES) else ""
    return f"{type(error).__name__}: {' '.join(kept)}"[:600] + advice
