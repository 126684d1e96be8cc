"""The stages of capture in order: trace, measure the longest length, follow every node, declare inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from tfinfer.errors import CaptureError

from . import rules  # noqa: F401  (registers the allow-list)
from .axes import Axes, Role, axis_of, has
from .emitter import Emitter
from .follow import AttentionReport, CacheEntry, Follower
from .positional import Positional, longest_length, read_by_data
from .regions import Region, find_region, is_product
from .rules.attention import lower_region
from .tensor import Tensor, laid_out
from .trace import Trace, arguments, aten, trace

# The longest length of a module that names none, or a very long one: the proof runs at it, so it is not free.
DEFAULT_MAX_LENGTH = 4096
ROWWISE = {"MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Cast", "Tanh", "LayerNormalization"}


@dataclass
class Captured:
    """A cached graph and what the manifest says of it."""

    model: ir.Model
    entries: list[CacheEntry]
    attention: list[AttentionReport]
    vocab_size: int  # of the ids that go in
    num_logits: int
    max_length: int
    module_length: int | None  # what the module itself says, where it does
    all_rows: bool  # whether every new position has logits, or the last alone


def capture(module: nn.Module, *, max_length: int | None = None, flavor: str = "ort") -> Captured:
    """Turn `module(input_ids) -> logits` into one graph for prefill and decode.

    input_ids: (batch, seq); logits: (batch, seq or 1, vocab), alone or first in a tuple, or as `logits` of a dict.
    Raises CaptureError with the module path, the source line and the operation where it cannot be followed.
    """
    captured = trace(module)
    positional = Positional(captured)
    length = longest_length(positional, read_by_data(captured), max_length, DEFAULT_MAX_LENGTH)
    follower = Follower(captured, positional, length, flavor)
    _follow_all(follower)
    logits = _logits(captured, follower)
    emit = follower.emit
    emit.attention_mask()
    value, all_rows = _declare_logits(follower, logits)
    if not follower.entries:
        raise CaptureError("the module has no attention over its sequence: there is nothing to cache, run it as it is")
    emit.outputs.insert(0, emit.outputs.pop(emit.outputs.index(value)))
    model = emit.model("decoder", 24 if emit.needs_opset_24 else 21)
    return Captured(
        model=model,
        entries=follower.entries,
        attention=follower.attention,
        vocab_size=_vocab_size(captured, follower),
        num_logits=follower.size(logits.axes[-1]),
        max_length=length,
        module_length=captured.longest,
        all_rows=all_rows,
    )


def _follow_all(f: Follower) -> None:
    """Follow every data node that the output needs; attention that one operator expresses is followed as a whole."""
    needed = _needed(f.trace)
    pending: dict[fx.Node, Region] = {}
    inside: set[fx.Node] = set()
    for node in f.trace.nodes:
        if node not in f.trace.data or node not in needed:
            continue
        if node not in inside and is_product(f.trace, node) and (region := find_region(f.trace, node)):
            pending[region.final] = region
            inside |= region.inside
        if node in inside:
            continue
        if node in pending and (result := lower_region(f, pending[node])):
            f.values[node] = result
            continue
        if node in pending:  # it stays as it is written
            for part in f.trace.nodes:
                if part in pending[node].inside:
                    f.follow(part)
        f.follow(node)


def _needed(captured: Trace) -> set[fx.Node]:
    needed, todo = set(), list(captured.output.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    return needed


def _logits(captured: Trace, f: Follower) -> Tensor:
    """The output that is named logits, or else the first one that has a row of numbers for each position."""
    found = [n for n in captured.output.all_input_nodes if n in captured.data]
    named = _named_outputs(captured)
    candidates = [named["logits"]] if "logits" in named else found
    for node in candidates:
        value = f.values.get(node)
        if isinstance(value, Tensor) and _looks_like_logits(value):
            return value
    shapes = [captured.shape(n) for n in found] or "nothing that depends on the ids"
    raise CaptureError(f"the module returns {shapes}; expected logits of (batch, seq, vocab)")


def _looks_like_logits(value: Tensor) -> bool:
    if not value.dtype.is_floating_point or value.rank not in (2, 3) or not has(value.axes[0], Role.BATCH):
        return False
    return bool(value.axes[-1]) and not any(atom.role for atom in value.axes[-1])


def _named_outputs(captured: Trace) -> dict[str, fx.Node]:
    """The outputs of a module that returns a dict or a dataclass, by name."""
    spec = getattr(captured.module, "_out_spec", None)
    leaves = captured.output.args[0]
    if spec is None or not isinstance(leaves, (tuple, list)):
        return {}
    tree = torch.utils._pytree.tree_unflatten(list(leaves), spec)
    items = tree.items() if hasattr(tree, "items") else []
    return {str(k): v for k, v in items if isinstance(v, fx.Node)}


def _vocab_size(captured: Trace, f: Follower) -> int:
    """How many different ids every table that they are looked up in has."""
    tables = []
    for node in captured.nodes:
        if node.target is aten.embedding.default and arguments(node)[1] is captured.input_ids:
            tables.append(captured.shape(arguments(node)[0])[0])
    return int(min(tables)) if tables else int(f.symbols.product(_logits(captured, f).axes[-1]))


def _declare_logits(f: Follower, logits: Tensor) -> tuple[ir.Value, bool]:
    """The logits as (batch, kept, vocab) float32; whether `logits_to_keep` chooses how many rows."""
    emit, axes = f.emit, logits.axes
    positions = axis_of(axes, Role.QUERY)
    batch = axes[0]
    wanted: Axes = (batch, axes[1] if positions is not None else (), axes[-1])
    if positions not in (None, 1) or len(batch) != 1:
        raise CaptureError(f"the module returns logits of axes {list(axes)}; expected (batch, seq, vocab)")
    value = laid_out(emit, logits, wanted)
    value = value if logits.dtype == torch.float32 else emit.cast(value, torch.float32)
    if positions is not None:
        value = keep_last_rows(emit, value)
    shape = ("batch", "kept", int(f.symbols.product(axes[-1])))
    emit.output(value, "logits", ir.DataType.FLOAT, shape)
    return emit.outputs[-1], positions is not None


def keep_last_rows(emit: Emitter, value: ir.Value) -> ir.Value:
    """Let only the last `logits_to_keep` rows reach the operations that lead to `value` (batch, seq, vocab)."""
    keep = ir.tensor([2**31 - 1], dtype=ir.DataType.INT64, name="logits_to_keep")
    wanted = emit.input("logits_to_keep", ir.DataType.INT64, (1,))  # an initializer of the same name is its default
    wanted.const_value = keep
    emit.initializers["logits_to_keep"] = wanted
    at, reader = value, None
    while (step := _only_operand(emit, at)) is not None:
        reader, at = at.producer(), step
    start = emit.op("Neg", wanted)
    rows = emit.op("Slice", at, start, emit.constant([2**62]), emit.constant([1]))
    if reader is None:
        return rows
    for i, operand in enumerate(reader.inputs):
        if operand is at:
            reader.replace_input_with(i, rows)
    later = [n for n in emit.nodes if n in _downstream(reader, value)]
    for node in later:
        emit.nodes.remove(node)
    emit.nodes += later
    return value


def _only_operand(emit: Emitter, value: ir.Value) -> ir.Value | None:
    """The one operand through which `value` depends on the ids, if its node works row by row and reads it alone."""
    node = value.producer()
    if node is None or node.op_type not in ROWWISE:
        return None
    moving = {i for i in node.inputs if i is not None and i.const_value is None}
    if len(moving) != 1:
        return None
    operand = next(iter(moving))
    return operand if len({u for u, _ in operand.uses()}) == 1 and operand.producer() is not None else None


def _downstream(first: ir.Node, last: ir.Value) -> set[Any]:
    """The nodes from `first` to the one that makes `last`, along a chain."""
    nodes, node = set(), last.producer()
    while node is not None:
        nodes.add(node)
        if node is first:
            break
        node = next(i.producer() for i in node.inputs if i is not None and i.producer() is not None)
    return nodes
