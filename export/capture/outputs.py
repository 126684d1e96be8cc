"""Which outputs of a module are what: its logits by name or by shape, the names of all others."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from tfinfer.errors import CaptureError

from .axes import Axes, Role, axis_of, has
from .emitter import Emitter
from .follow import Follower
from .tensor import Tensor, laid_out
from .trace import Trace, arguments, aten

ROWWISE = {"MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Cast", "Tanh", "LayerNormalization"}


def logits_node(captured: Trace) -> fx.Node:
    """The output that is named logits, or else the first with a row of numbers for each position, as many as ids.

    Hidden states may stand before the logits: where an output is as wide as the table of ids, it is that one.
    """
    found = [n for n in captured.output.all_input_nodes if n in captured.data]
    named = named_outputs(captured)
    candidates = [n for n in ([named["logits"]] if "logits" in named else found) if _looks_like_logits(captured, n)]
    words = vocabulary(captured, captured.ids())
    wide = [n for n in candidates if captured.shape(n)[-1] == words]
    if candidates:
        return (wide or candidates)[0]
    shapes = [captured.shape(n) for n in found] or "nothing that depends on the ids"
    raise CaptureError(f"the module returns {shapes}; expected logits of (batch, seq, vocab)")


def _looks_like_logits(captured: Trace, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
        return False
    first, *_, last = captured.shape(node)
    return first == captured.batch and isinstance(last, int)


def find_logits(captured: Trace, f: Follower) -> Tensor:
    """The value of the logits, once everything was followed."""
    node = logits_node(captured)
    value = f.values.get(node)
    if isinstance(value, Tensor) and has(value.axes[0], Role.BATCH):
        return value
    raise CaptureError(f"the module returns logits of {captured.shape(node)}; expected (batch, seq, vocab)")


def named_outputs(captured: Trace) -> dict[str, fx.Node]:
    """The outputs of a module that returns a dict or a dataclass, by name."""
    spec = getattr(captured.module, "_out_spec", None)
    leaves = captured.output.args[0]
    if spec is None or not isinstance(leaves, (tuple, list)):
        return {}
    tree = torch.utils._pytree.tree_unflatten(list(leaves), spec)
    fields: dict[str, Any] = getattr(tree, "_asdict", dict)()  # of a namedtuple
    items = tree.items() if hasattr(tree, "items") else fields.items()
    return {str(k): v for k, v in items if isinstance(v, fx.Node)}


def name_outputs(captured: Trace) -> dict[str, fx.Node]:
    """Every output by its name in a dict or dataclass, or else by what its shape says it is."""
    found = [n for n in captured.output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not found:
        raise CaptureError("the module returns no tensor")
    if named := named_outputs(captured):
        return named
    names: dict[str, fx.Node] = {}
    for node in found:
        shape = captured.shape(node)
        kind = "hidden_states" if len(shape) == 3 and shape[:2] == [captured.batch, captured.source] else "output"
        kind = "pooled" if len(shape) == 2 and shape[0] == captured.batch and isinstance(shape[1], int) else kind
        names[kind if kind not in names else f"output_{len(names)}"] = node
    return names


def vocabulary(captured: Trace, ids: fx.Node) -> int | None:
    """How many different ids every table that they are looked up in has; None where they are looked up in none."""
    tables = []
    for node in captured.nodes:
        if node.target is aten.embedding.default and arguments(node)[1] is ids:
            tables.append(captured.shape(arguments(node)[0])[0])
    return int(min(tables)) if tables else None


def declare_logits(f: Follower, logits: Tensor) -> tuple[ir.Value, bool]:
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


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """What a module returned as tensors by name, in the order in which a trace of it lists them."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    items = output.items() if hasattr(output, "items") else None
    if items is not None:
        return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}
    leaves = torch.utils._pytree.tree_leaves(output)
    return {f"output_{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
