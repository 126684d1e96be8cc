"""Query, key and value of GroupQueryAttention by one product instead of three: their weights become one matrix.

What stands between the products and the operator may take columns from anywhere: which ones is read by running it on
numbered columns. So one projection for all three, whatever order its columns have, is no other case.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .joined import Columns, joined
from .stretch import Array, Stretch, Walk

SIDES = (0, 1, 2)  # query, key and value among the inputs of com.microsoft.GroupQueryAttention
PAST_KEY = 3


@dataclass(frozen=True)
class Product:
    """x W, or x W + b."""

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    factor: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def width(self) -> int:
        assert self.weight.const_value is not None
        return int(self.weight.const_value.shape.numpy()[1])


@dataclass(frozen=True)
class Side:
    """Columns of a product, and the stretch that takes them."""

    product: Product
    columns: Array
    stretch: Stretch | None


def run(model: ir.Model) -> int:
    """Fires for each attention whose three sides are columns of products of one value that nobody else reads."""
    graph, made = model.graph, dict[Any, ir.Value]()
    walk = Walk(graph)
    return sum(_pack(graph, walk, node, made) for node in list(graph) if node.op_type == "GroupQueryAttention")


def _pack(graph: ir.Graph, walk: Walk, node: ir.Node, made: dict[Any, ir.Value]) -> bool:
    given = [node.inputs[i] for i in SIDES]
    past = node.inputs[PAST_KEY]
    if None in given or past is None or past.producer() is not None:  # it only reads what another attention wrote
        return False
    sides = [side for value in given if value is not None and (side := side_of(walk, value)) is not None]
    if len(sides) < len(SIDES) or len({side.product.factor for side in sides}) > 1 or not is_closed({node}, sides):
        return False
    packed = joined_product(graph, node, sides, made)
    node.replace_input_with(0, packed)
    for i in SIDES[1:]:
        node.replace_input_with(i, None)
    remove(graph, walk, sides)
    return True


def remove(graph: ir.Graph, walk: Walk, sides: Sequence[Side]) -> None:
    """Remove what nobody reads any more of the products and what stands behind them."""
    for side in sides:
        if side.stretch is not None:
            side.stretch.remove()
    for old in sorted({n for side in sides for n in side.product.nodes}, key=walk.at.__getitem__, reverse=True):
        if not old.outputs[0].uses():
            graph.remove(old, safe=True)


def joined_product(graph: ir.Graph, node: ir.Node, sides: Sequence[Side], made: dict[Any, ir.Value]) -> ir.Value:
    """(batch, seq, all widths): one product before `node`; the only one itself where it is so already."""
    first = sides[0].product
    if all(side.product is first or side.product.value is first.value for side in sides):
        every = np.concatenate([side.columns for side in sides])
        if np.array_equal(every, np.arange(first.width)):
            return first.value
    name = f"{node.name}.packed"
    weight = joined(graph, f"{name}.weight", [_of(s.product.weight, s.columns) for s in sides], made)
    product = ir.node("MatMul", [first.factor, weight], name=name)
    nodes = [product]
    if any(side.product.bias is not None for side in sides):
        bias = joined(graph, f"{name}.bias", [_of(s.product.bias, s.columns) for s in sides], made)
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{name}.biased"))
    for new in nodes:
        new.outputs[0].name = new.name
    graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]


def _of(value: ir.Value | None, columns: Array) -> Columns:
    return Columns(value, tuple(columns.tolist()))


def side_of(walk: Walk, value: ir.Value) -> Side | None:
    """What columns of which product a value (batch, seq, width) is, and nothing else."""
    if (product := product_of(value)) is not None:
        return Side(product, np.arange(product.width), None)
    for stretch in walk.back(value):
        if stretch.is_positional:
            return None
        if (product := product_of(stretch.source)) is not None:
            columns = _columns(stretch, product.width)
            return None if columns is None else Side(product, columns, stretch)
    return None


def product_of(value: ir.Value) -> Product | None:
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMul":
        factor, weight = node.inputs
        is_matrix = weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
        known = factor is not None and factor.const_value is None and is_matrix
        return Product(value, (node,), factor, weight, None) if known else None  # type: ignore[arg-type]
    if node.op_type != "Add":
        return None
    for term, bias in (node.inputs, node.inputs[::-1]):
        plain = product_of(term) if term is not None else None
        tensor = bias.const_value if bias is not None else None
        if plain is None or plain.bias is not None or tensor is None:
            continue
        if list(tensor.shape.numpy()) == [plain.width]:
            return Product(value, (*plain.nodes, node), plain.factor, plain.weight, bias)
    return None


def _columns(stretch: Stretch, width: int) -> Array | None:
    """Which columns of its source a stretch takes for each of its own, in every row; None where it does more."""
    numbered = np.broadcast_to(np.arange(width, dtype=np.float32), (2, 3, width))
    at = np.zeros((2, 3), np.int64)
    found = stretch.run(np.ascontiguousarray(numbered), at)
    if found is None or found.ndim != 3:
        return None
    columns = found[0, 0].astype(np.int64)
    if not ((columns >= 0) & (columns < width)).all():
        return None
    anything = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    taken = stretch.run(anything, at)
    return columns if taken is not None and np.array_equal(taken, anything[..., columns]) else None


def is_closed(readers: Collection[ir.Node], sides: Sequence[Side]) -> bool:
    """Whether nobody but `readers` reads the products, nor anything on the way."""
    inner = {n for s in sides for n in (*s.product.nodes, *(s.stretch.nodes if s.stretch else ()))}
    values = [value for n in inner for value in n.outputs]
    found = (use.node for value in values for use in value.uses())
    return all(reader in readers or reader in inner for reader in found) and not any(
        v.is_graph_output() for v in values
    )
