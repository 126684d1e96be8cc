"""Weights of products and of embeddings in 8 or 4 bits by blocks: MatMulNBits and GatherBlockQuantized.

onnxruntime multiplies such weights as they are, activations rounded to 8 bits by block (accuracy_level 4): a decoder's
step reads a quarter or an eighth of the bytes. Without accuracy_level 8-bit weights are made float32 anew in each call.
Or by channel, for products of whole numbers: see per_channel.py.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import common, dead_nodes, per_channel, small_bias
from .blocks import Blocks, quantised
from .joined import PARTS
from .matching import CONTRIB, SHARED, replace

ROUNDED = 4  # accuracy_level: activations in 8 bits
LEAST_WIDTH = 32  # of a matrix worth it; also the smallest block


@dataclass(frozen=True)
class Recipe:
    """How weights become small.

    bits: of products. head_bits: of the last product and of the embedding. block_size: numbers that share a scale; of
    the last product and the embedding fewer where that fills their rows, as `filling` has it. per_channel: products of
    8 bits have a scale for each channel in place of blocks, but not the embedding, which is another matrix then;
    symmetric. wider: patterns of names of weights that get 8 bits by blocks. keep: of those that stay as they are. The
    name of a weight is the module's own; one that was joined of several goes by all of theirs.
    """

    bits: int
    head_bits: int
    block_size: int
    symmetric: bool = True
    search: bool = True
    per_channel: bool = False
    wider: tuple[str, ...] = field(default=())
    keep: tuple[str, ...] = field(default=())

    def of_product(self, k: int) -> tuple[int, int]:
        """Of a matrix (k, n) that is not to be wider: its bits, and how many of its numbers share a scale."""
        return (per_channel.BITS, k) if self.goes_by_channel(self.bits) else (self.bits, self.block_size)

    def goes_by_channel(self, bits: int) -> bool:
        return self.per_channel and bits == 8


Key = tuple[int, bool, int, int, bool]
Made = dict[Key, Blocks]  # what weights became, by which tensor and how


@dataclass(frozen=True)
class Narrow:
    """A matrix of products that gets the recipe's few bits, and all the values that it is multiplied with."""

    key: Key  # what `Made` knows it by
    tensor: ir.TensorProtocol
    transposed: bool  # whether it lies (n, k)
    inputs: tuple[str, ...]

    @property
    def k(self) -> int:
        return int(self.tensor.shape.numpy()[self.transposed])

    def matrix(self) -> npt.NDArray[np.float32]:
        """(k, n)"""
        return self.tensor.numpy().T if self.transposed else self.tensor.numpy()


def run(model: ir.Model, recipe: Recipe, made: Made | None = None) -> int:
    """Replace in place; returns how many products and embeddings became small.

    made: what earlier calls made of the same tensors, in this model or a clone, and what this one makes.
    """
    fired = _Quantising(model.graph, recipe, {} if made is None else made).run()
    small_bias.run(model)
    if recipe.per_channel:
        common.run(model)  # rows that several products multiply are rounded once
    dead_nodes.run(model)  # the weights as they were
    return fired


def weights_of(model: ir.Model) -> list[tuple[str, ...]]:
    """The names of each matrix that would become small, in the order of the graph: its own, and those of its parts."""
    read = (_weight(node) for node in model.graph)
    return list(dict.fromkeys(_names(weight) for weight in read if weight is not None))


def narrow(model: ir.Model, recipe: Recipe) -> list[Narrow]:
    """The matrices that `recipe` gives its few bits, in the order of the graph; not the head, nor the embedding."""
    heads, found = set(_heads(model.graph)), dict[Key, Narrow]()
    for node in model.graph:
        weight = _weight(node)
        if weight is None or _is_embedding(node) or node in heads or _is_named(weight, (*recipe.keep, *recipe.wider)):
            continue
        tensor, x = weight.const_value, node.inputs[0]
        assert tensor is not None
        assert x is not None
        transposed = node.op_type == "FusedMatMul"
        key = _key(tensor, transposed, *recipe.of_product(_k(weight, transposed)), recipe)
        inputs = found[key].inputs if key in found else ()
        found[key] = Narrow(key, tensor, transposed, tuple(dict.fromkeys((*inputs, str(x.name)))))
    return list(found.values())


def filling(k: int, block_size: int) -> int:
    """The size of blocks that fill rows of `k` numbers, `block_size` at most; that itself where none does.

    A table whose rows end within a block is no head's at the same time, and what fills the block up is read as well.
    """
    sizes = (block_size >> halved for halved in range(block_size.bit_length()))
    return next((size for size in sizes if size >= LEAST_WIDTH and k % size == 0), block_size)


def _key(tensor: ir.TensorProtocol, transposed: bool, bits: int, block_size: int, recipe: Recipe) -> Key:
    return id(tensor), transposed, bits, block_size, recipe.symmetric


def _k(weight: ir.Value, transposed: bool) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.shape.numpy()[transposed])


def _names(weight: ir.Value) -> tuple[str, ...]:
    parts = (part.value for part in weight.meta.get(PARTS, ()))
    return tuple(dict.fromkeys(str(value.name) for value in (weight, *parts) if value is not None))


def _is_named(weight: ir.Value, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in _names(weight) for pattern in patterns)


class _Quantising:
    def __init__(self, graph: ir.Graph, recipe: Recipe, made: Made) -> None:
        self.graph, self.recipe = graph, recipe
        self.made = made  # a weight that several nodes read is quantised once

    def run(self) -> int:
        heads = set(_heads(self.graph))
        fired = 0
        for node in list(self.graph):
            weight = _weight(node)
            if weight is None or _is_named(weight, self.recipe.keep):
                continue
            if _is_embedding(node):
                self._embedding(node, weight)
            else:
                self._product(node, weight, node in heads)
            fired += 1
        return fired

    def _blocks(self, weight: ir.Value, transposed: bool, bits: int, fills: bool) -> Blocks:
        """transposed: whether the weight lies (columns, k) already, as an embedding does."""
        size = self.recipe.block_size
        return self._rounded(weight, transposed, bits, filling(_k(weight, transposed), size) if fills else size)

    def _rounded(self, weight: ir.Value, transposed: bool, bits: int, size: int) -> Blocks:
        tensor, recipe = weight.const_value, self.recipe
        assert tensor is not None
        key = _key(tensor, transposed, bits, size, recipe)
        if key not in self.made:
            matrix = tensor.numpy().T if transposed else tensor.numpy()
            search = recipe.search and bits < 8  # 8 bits leave nothing to gain
            self.made[key] = quantised(matrix, bits, size, symmetric=recipe.symmetric, search=search)
        return self.made[key]

    def _bits(self, weight: ir.Value, bits: int) -> int:
        """`bits`, unless it is to be wider: an embedding as well, or one that is tied to its head would not stay so."""
        return 8 if _is_named(weight, self.recipe.wider) else bits

    def _product(self, node: ir.Node, weight: ir.Value, is_head: bool) -> None:
        bits = self.recipe.head_bits if is_head else self.recipe.bits
        if self.recipe.goes_by_channel(bits) and not _is_named(weight, self.recipe.wider):
            self._per_channel(node, weight)
        else:
            self._by_blocks(node, weight, self._bits(weight, bits), is_head)

    def _per_channel(self, node: ir.Node, weight: ir.Value) -> None:
        transposed = node.op_type == "FusedMatMul"
        blocks = self._rounded(weight, transposed, per_channel.BITS, _k(weight, transposed))
        data, scales = per_channel.operands(blocks)
        constants: dict[str, np.ndarray] = {
            "step": np.array(1 / per_channel.LEVELS, np.float32), "middle": np.array(128, np.uint8),
            "last": np.array([-1], np.int64),
        }  # fmt: skip
        per_channel.put(
            self.graph, node, self._initializer(f"{weight.name}.channels.data", data),
            self._initializer(f"{weight.name}.channels.scales", scales),
            {name: self._initializer(f"channels.{name}", array) for name, array in constants.items()},
        )  # fmt: skip

    def _by_blocks(self, node: ir.Node, weight: ir.Value, bits: int, is_head: bool) -> None:
        blocks = self._blocks(weight, node.op_type == "FusedMatMul", bits, is_head)
        attributes = {
            "K": blocks.k, "N": len(blocks.data), "bits": bits, "block_size": blocks.block_size,
            "accuracy_level": ROUNDED,
        }  # fmt: skip
        name = f"{weight.name}.int{bits}"
        operands = [self._initializer(f"{name}.data", blocks.data), self._initializer(f"{name}.scales", blocks.scales)]
        if blocks.zeros is not None:
            operands.append(self._initializer(f"{name}.zeros", blocks.zeros))
        self._instead(node, ir.node("MatMulNBits", [node.inputs[0], *operands], attributes, domain=CONTRIB))

    def _embedding(self, node: ir.Node, weight: ir.Value) -> None:
        bits = self._bits(weight, self.recipe.head_bits)
        blocks = self._blocks(weight, True, bits, True)
        attributes = {"bits": bits, "block_size": blocks.block_size, "gather_axis": 0, "quantize_axis": 1}
        name = f"{weight.name}.rows{bits}"
        width = -(-blocks.k * bits // 8)  # bytes of a row, without what fills the last block
        rows = blocks.data.reshape(len(blocks.data), -1)[:, :width]
        operands = [self._initializer(f"{name}.data", rows), self._initializer(f"{name}.scales", blocks.scales)]
        if blocks.zeros is not None:
            operands.append(self._initializer(f"{name}.zeros", blocks.zeros))
        inputs = [operands[0], node.inputs[1], *operands[1:]]
        gathered = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB)
        self._instead(node, self._without_last(node, gathered, name, blocks.k) if blocks.k * bits % 8 else gathered)

    def _without_last(self, old: ir.Node, gathered: ir.Node, name: str, k: int) -> ir.Node:
        """The first `k` columns: where two numbers share a byte, rows of an odd number have one too many."""
        gathered.outputs[0].type = old.outputs[0].type
        self.graph.insert_before(old, gathered)
        self.graph.opset_imports.setdefault(CONTRIB, 1)
        bounds = {"first": 0, "last": k, "axis": -1}
        ends = [self._initializer(f"{name}.{part}", np.array([at], np.int64)) for part, at in bounds.items()]
        return ir.node("Slice", [gathered.outputs[0], *ends])

    @staticmethod
    def _instead(old: ir.Node, new: ir.Node) -> None:
        new.name = old.name
        replace([old], new, {old.outputs[0]: new.outputs[0]}, old)

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        array = np.ascontiguousarray(array)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        # The rows of an embedding are the columns of the head that is tied to it, byte for byte.
        value.meta[SHARED] = hashlib.sha256(array.tobytes()).digest()
        self.graph.initializers[name] = value
        return value


def _heads(graph: ir.Graph) -> Iterator[ir.Node]:
    """The products that the logits come from, with no other product between."""
    todo = [value for value in graph.outputs if value.name == "logits"]
    seen: set[ir.Value] = set()
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if _is_product(node):
            yield node
        else:
            todo += [operand for operand in node.inputs if operand is not None]


def _weight(node: ir.Node) -> ir.Value | None:
    """The matrix of a product or of an embedding."""
    if _is_product(node):
        return node.inputs[1]
    return node.inputs[0] if _is_embedding(node) else None


def _is_product(node: ir.Node) -> bool:
    """With a constant matrix, which a fused product reads transposed."""
    if node.op_type not in ("MatMul", "FusedMatMul") or not _is_matrix(node.inputs[1]):
        return False
    flags = {name: a.value for name, a in node.attributes.items()}
    return node.op_type == "MatMul" or flags == {"transB": 1}


def _is_embedding(node: ir.Node) -> bool:
    """Rows of a table by the ids themselves; tables over positions stay as they are."""
    if node.op_type != "Gather" or not _is_matrix(node.inputs[0]):
        return False
    axis = node.attributes.get("axis")
    return (axis is None or axis.as_int() == 0) and node.inputs[1] is not None and node.inputs[1].name == "input_ids"


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    return min(int(n) for n in tensor.shape.numpy()) >= LEAST_WIDTH
