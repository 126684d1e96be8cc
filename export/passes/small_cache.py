"""A cache of 8 bits: what attention keeps of keys and values is rounded as it is written, by a scale for each feature.

com.microsoft.GroupQueryAttention does it (ContribOperators.md): the scales are constants of the graph, symmetric, and
past and present are int8. It attends to what it has rounded, in a prompt as in a step. What other operators fill or
read, and what a second attention reads, stays as wide as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .matching import CONTRIB, attribute, readers

Scales = npt.NDArray[np.float32]

KEY, PAST, PRESENT, COS, SCALE = 1, (3, 4), (1, 2), 7, (12, 13)  # of the operator: each key first, then value
LARGEST = 127  # the operator also writes -128


@dataclass(frozen=True)
class Entry:
    """One entry of a cache that can be 8 bits wide: pairs are the features of a head that turn together."""

    past: str
    present: str
    pairs: tuple[tuple[int, int], ...] = ()


def entries(graph: ir.Graph) -> list[Entry]:
    """The entries that can be rounded, in the order of the graph: a key and a value for each attention that can."""
    found = []
    for node in _attentions(graph):
        pairs = _turned(node)
        for past, present, turned in zip(PAST, PRESENT, (pairs, ())):
            value = node.inputs[past]
            assert value is not None
            found.append(Entry(str(value.name), str(node.outputs[present].name), turned))
    return found


def run(model: ir.Model, scales: Mapping[str, Scales]) -> int:
    """Round the entries whose past has scales, (num_kv_heads, head_dim) each, in place; fires for each attention."""
    fired = 0
    for node in _attentions(model.graph):
        names = [str(value.name) for i in PAST if (value := node.inputs[i]) is not None]
        if all(name in scales for name in names):
            _round(node, [scales[name] for name in names])
            fired += 1
    return fired


def _attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Those that alone fill, and alone read, a key and a value of the cache."""
    for node in graph:
        if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB or len(node.outputs) < 3:
            continue
        pasts, presents = [node.inputs[i] for i in PAST], [node.outputs[i] for i in PRESENT]
        own = all(v is not None and v.is_graph_input() and readers(v) == {node} for v in pasts)
        if own and all(v.is_graph_output() and not v.uses() for v in presents):
            yield node


def _round(node: ir.Node, scales: list[Scales]) -> None:
    graph = node.graph
    assert graph is not None
    node.resize_inputs(max(len(node.inputs), SCALE[-1] + 1))
    for past, present, place, array in zip(PAST, PRESENT, SCALE, scales):
        value = node.inputs[past]
        assert value is not None
        value.dtype = node.outputs[present].dtype = ir.DataType.INT8
        node.replace_input_with(place, _initializer(graph, f"{value.name}.scale", array))
    for side in "kv":
        node.attributes[f"{side}_quant_type"] = ir.AttrString(f"{side}_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)


def _initializer(graph: ir.Graph, name: str, array: Scales) -> ir.Value:
    """(1, num_kv_heads, 1, head_dim), as the present is laid out."""
    tensor = ir.Tensor(np.ascontiguousarray(array[None, :, None], np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
    graph.initializers[name] = value
    return value


def _turned(node: ir.Node) -> tuple[tuple[int, int], ...]:
    """The features of a key that a rotation mixes, done by the operator itself or right before it."""
    past, key = node.inputs[PAST[0]], node.inputs[KEY]
    assert past is not None
    assert past.shape is not None
    size = past.shape[3]
    assert isinstance(size, int)
    if attribute(node, "do_rotary", 0):
        return _pairs(node.inputs[COS], size, bool(attribute(node, "rotary_interleaved", 0)))
    before: Any = key.producer() if key is not None else None
    while before is not None and before.op_type in ("Reshape", "Transpose"):
        before = before.inputs[0].producer()
    if before is not None and before.op_type == "RotaryEmbedding" and before.domain == CONTRIB:
        return _pairs(before.inputs[2], size, bool(attribute(before, "interleaved", 0)))
    return ()


def _pairs(cos: ir.Value | None, size: int, interleaved: bool) -> tuple[tuple[int, int], ...]:
    half = cos.shape[1] if cos is not None and cos.shape is not None else 0
    if not isinstance(half, int) or 2 * half > size:
        return ()
    return tuple((2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half))


def scales_of(range_: npt.NDArray[Any]) -> Scales:
    """From the largest magnitude of each feature; what was never anything keeps 1."""
    return (np.where(range_ > 0, range_, LARGEST) / LARGEST).astype(np.float32)
