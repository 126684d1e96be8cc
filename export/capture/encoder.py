"""Capture an encoder: every position is there at once, so nothing is cached and positions may be mixed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx, nn

from tfinfer.errors import CaptureError

from . import rules  # noqa: F401  (registers the allow-list)
from .axes import Role
from .capture import DEFAULT_MAX_LENGTH
from .emitter import DTYPES, ENCODER, Emitter
from .follow import AttentionReport, Follower
from .outputs import name_outputs, vocabulary
from .positional import Positional, longest_length, read_by_data
from .tensor import Tensor, laid_out
from .trace import Argument, Trace
from .tracing import trace
from .walk import follow_all

# What modules call hidden states and a vector of the whole text, and the axes in front of their features.
HIDDEN = ("last_hidden_state", "hidden_states"), ("batch", "seq")
POOLED = ("pooler_output", "pooled", "embedding"), ("batch",)


@dataclass
class CapturedEncoder:
    """A graph from ids to whatever the module returns, and what the manifest says of it."""

    trace: Trace
    model: ir.Model
    attention: list[AttentionReport]
    vocab_size: int
    max_length: int
    module_length: int | None
    hidden_states: str | None  # the output (batch, seq, hidden), where there is one
    pooled: str | None  # the output (batch, hidden)


def capture_encoder(
    module: nn.Module, arguments: list[Argument], *, max_length: int | None = None, flavor: str = "ort"
) -> CapturedEncoder:
    """Turn `module(*arguments)` into one graph; its outputs keep their names, or get them by their shapes.

    Raises CaptureError with the module path, the source line and the operation where it cannot be followed.
    """
    captured = trace(module, arguments)
    follower = follow_source(captured, max_length, flavor)
    follow_all(follower, captured.data)
    emit = follower.emit
    emit.given("input_ids")
    shapes = {name: declare(follower, name, node) for name, node in name_outputs(captured).items()}
    hidden, pooled = parts_of(shapes)
    return CapturedEncoder(
        trace=captured,
        model=emit.model("encoder", 24 if emit.needs_opset_24 else 21),
        attention=follower.attention,
        vocab_size=vocabulary(captured, captured.ids(source=True)) or 0,
        max_length=follower.max_length,
        module_length=captured.limits.get(captured.source),
        hidden_states=hidden,
        pooled=pooled,
    )


def follow_source(
    captured: Trace,
    max_length: int | None,
    flavor: str,
    emit: Emitter | None = None,
    observed: list[tuple[fx.Node, Tensor, int, int]] | None = None,
) -> Follower:
    """A follower of what depends on the source alone, or of all there is of an encoder."""
    positional = Positional(captured, captured.source)
    nodes = read_by_data(captured, captured.source)
    length = longest_length(positional, nodes, max_length, DEFAULT_MAX_LENGTH)
    emit = emit or Emitter(ENCODER)
    return Follower(captured, positional, length, flavor, role=Role.SOURCE, emit=emit, observed=observed)


def declare(f: Follower, name: str, node: fx.Node) -> tuple[int | str, ...]:
    """Make a node an output of the graph, as float32 where it is of another float; returns its shape."""
    if node not in f.trace.data and node not in f.trace.masks:
        raise CaptureError(f"the output {name!r} does not depend on the ids: do not return it")
    value = f.value_of(node)
    if not isinstance(value, Tensor):
        raise CaptureError(f"the output {name!r} is no tensor of real numbers")
    names = {Role.BATCH: "batch", Role.SOURCE: "seq"}
    if any(len(axis) > 1 and any(atom.role for atom in axis) for axis in value.axes):
        raise CaptureError(
            f"the output {name!r} has an axis that holds more than positions or rows: {list(value.axes)}"
        )
    shape = tuple(names[axis[0].role] if axis and axis[0].role else f.size(axis) for axis in value.axes)
    result = laid_out(f.emit, value)
    dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
    result = result if dtype == value.dtype else f.emit.cast(result, dtype)
    f.emit.output(result, name, DTYPES[dtype], shape)
    return shape


def parts_of(shapes: dict[str, tuple[int | str, ...]]) -> tuple[str | None, str | None]:
    """The outputs that are hidden states and a vector of the whole text: by name, or by shape where they have none."""
    found = []
    for known, lead in HIDDEN, POOLED:
        fitting = [n for n, s in shapes.items() if s[:-1] == lead and isinstance(s[-1], int)]
        found.append(next((n for n in known if n in fitting), _only(n for n in fitting if n.startswith("output"))))
    return found[0], found[1]


def _only(names: Iterable[str]) -> str | None:
    found = list(names)
    return found[0] if len(found) == 1 else None
