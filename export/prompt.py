"""The graph that reads prompts of a decoder whose weights have few bits: the caches alone, by products in float32.

A step multiplies such weights by activations rounded to 8 bits, which reads least. Over many positions at once that is
the slower way where a processor has no instruction that sums products of bytes. The logits, and what only they need,
are left to a step over the last position, so the head is never widened for one row.
"""

from __future__ import annotations

import uuid

import onnx_ir as ir

from .capture.emitter import SHARED
from .passes import dead_nodes

FLOAT_PRODUCTS = 0  # accuracy_level of MatMulNBits: weights are widened, a panel or a matrix at a time


def prompt_graph(decoder: ir.Model, logits: str = "logits") -> ir.Model | None:
    """A decoder's graph without its logits, over the same weights; None where no product has few bits."""
    for value in decoder.graph.initializers.values():
        value.meta.setdefault(SHARED, uuid.uuid4().bytes)  # what both graphs read is written once
    model = decoder.clone()
    graph = model.graph
    graph.outputs.remove(next(value for value in graph.outputs if value.name == logits))
    dead_nodes.run(model)
    for value in [value for value in graph.inputs if value.is_initializer() and not value.uses()]:
        graph.inputs.remove(value)  # how many logits are wanted, which has a default
        del graph.initializers[str(value.name)]
    small = [node for node in graph.all_nodes() if node.op_type == "MatMulNBits"]
    for node in small:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT_PRODUCTS)
    return model if small else None
