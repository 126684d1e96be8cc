"""A graph that gives the weights of attention, of all positions at once, for whoever wants to look inside."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tfinfer.errors import CaptureError

from .axes import Atom, Axes, Role, position
from .emitter import BOTH_WHOLE, ENCODER, WHOLE, Emitter
from .encoder import follow_source
from .follow import Follower
from .positional import Positional
from .tensor import Tensor, laid_out
from .trace import Trace
from .walk import follow_all


@dataclass
class Observed:
    """The graph of a trace, and for each stack its outputs, (batch, heads, query, key), in the order of its layers."""

    trace: Trace
    model: ir.Model
    maps: dict[str, list[str]]


def capture_attention(captured: Trace, max_length: int, max_source_length: int | None = None) -> Observed:
    """The weights of every softmax over positions: each row sums to 1. Padding masks are taken as full.

    Raises CaptureError where the module cannot be followed, or has no such softmax.
    """
    observed: list[tuple[Tensor, int, int]] = []
    both = captured.seq is not None and captured.source is not None
    emit = Emitter(BOTH_WHOLE if both else ENCODER if captured.seq is None else WHOLE)
    source = None
    if captured.source is not None:
        length = max_source_length if both else max_length
        source = follow_source(captured, length, "ort", emit, observed)
        follow_all(source, captured.data - captured.target)
    if captured.seq is not None:
        positional = Positional(captured, captured.seq)
        target = Follower(
            captured, positional, max_length, "ort", role=Role.KEY, emit=emit, source=source, observed=observed
        )
        follow_all(target, captured.target)
    if not observed:
        raise CaptureError("the module has no softmax over positions whose weights could be shown")
    maps: dict[str, list[str]] = {}
    for weights, query, key in observed:
        _declare(emit, maps, _stack(weights, query, key, both), weights, query, key)
    return Observed(captured, emit.model("attention", 24 if emit.needs_opset_24 else 21), maps)


def _stack(weights: Tensor, query: int, key: int, both: bool) -> str:
    if not both:
        return "self"
    roles = position(weights.axes[query]), position(weights.axes[key])
    return "cross" if roles[0] is not roles[1] else "encoder" if roles[0] is Role.SOURCE else "decoder"


def _declare(emit: Emitter, maps: dict[str, list[str]], name: str, weights: Tensor, query: int, key: int) -> None:
    rest = [atom for i, axis in enumerate(weights.axes) if i not in (query, key) for atom in axis]
    heads: tuple[Atom, ...] = tuple(atom for atom in rest if atom.role is None)
    batch = tuple(atom for atom in rest if atom.role is Role.BATCH)
    if any(len(weights.axes[i]) > 1 for i in (query, key)) or len(batch) != 1:
        raise CaptureError("the weights of an attention have no axis of queries, keys or rows of their own")
    axes: Axes = (batch, heads, weights.axes[query], weights.axes[key])
    outputs = maps.setdefault(name, [])
    outputs.append(f"{name}.{len(outputs)}")
    count = 1
    for atom in heads:
        count *= atom.size
    names = {Role.SOURCE: "source", Role.KEY: "seq"}
    shape: tuple[int | str, ...] = (
        "batch",
        count,
        *(names[position(weights.axes[i]) or Role.KEY] for i in (query, key)),
    )
    emit.output(laid_out(emit, weights, axes), outputs[-1], ir.DataType.FLOAT, shape)
