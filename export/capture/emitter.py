"""An ONNX graph under construction: nodes, constants and the sizes of the current call. Knows no torch graph.

Equal nodes are made once. Weights are not copied: an initializer points at the module's own memory until the file is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from .axes import Atom, Role

CONTRIB = "com.microsoft"
SHARED = "shared"  # in an initializer's meta: equal in two graphs of a folder for equal contents
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


def _lazy(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A tensor as an initializer; a view that lies otherwise is only copied while it is written."""
    if tensor.is_contiguous():
        return TorchTensor(tensor, name=name)
    shape = ir.Shape(tuple(tensor.shape))
    return ir.LazyTensor(lambda: TorchTensor(tensor.contiguous()), dtype=DTYPES[tensor.dtype], shape=shape, name=name)


@dataclass(frozen=True)
class Interface:
    """What a graph may take, int64 all of it, and where the sizes of a call are read."""

    inputs: dict[str, tuple[str, str]]
    sizes: dict[Role, tuple[str, int]]


DECODER = Interface(
    {
        "input_ids": ("batch", "seq"),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "seq"),
        "source_mask": ("batch", "source"),
    },
    {
        Role.BATCH: ("input_ids", 0),
        Role.QUERY: ("input_ids", 1),
        Role.KEY: ("attention_mask", 1),
        Role.SOURCE: ("source_mask", 1),
    },
)
ENCODER = Interface(
    dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("batch", "seq")),
    {Role.BATCH: ("input_ids", 0), Role.SOURCE: ("input_ids", 1)},
)
# The whole sequences at once, for the weights of attention: of a decoder, and of an encoder-decoder.
WHOLE = Interface({"input_ids": ("batch", "seq")}, {Role.BATCH: ("input_ids", 0), Role.KEY: ("input_ids", 1)})
BOTH_WHOLE = Interface(
    {"source_ids": ("batch", "source"), **WHOLE.inputs}, {**WHOLE.sizes, Role.SOURCE: ("source_ids", 1)}
)


class Emitter:
    """Collects the inputs, nodes and initializers of one graph."""

    def __init__(self, interface: Interface = DECODER) -> None:
        self.interface = interface
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._made: dict[Any, tuple[ir.Value, ...]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._counts: dict[str, int] = {}
        self._carried: dict[ir.Value, ir.Value] = {}
        self._picked: dict[Any, ir.Value] = {}
        self.needs_opset_24 = False

    # -- inputs and constants -----------------------------------------------------------------------------------
    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        if name not in self.inputs:
            self.inputs[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return self.inputs[name]

    def constant(self, value: Any, dtype: np.dtype[Any] | type | None = None) -> ir.Value:
        """A small constant, shared with every equal one."""
        array = np.ascontiguousarray(np.asarray(value, dtype))
        array = array.reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(self._fresh("constant"), ir.Tensor(array), array.shape)
        return self._constants[key]

    def weight(self, tensor: torch.Tensor, name: str) -> ir.Value:
        """A parameter by reference; one initializer for one view of one piece of memory."""
        return self.shared((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()), tensor, name)

    def shared(self, key: Any, tensor: torch.Tensor, name: str) -> ir.Value:
        """The initializer made before under `key`, or a new one with a name like `name`."""
        if key not in self._constants:
            name = self._fresh(name) if name in self.initializers or name == "table" else name
            self._constants[key] = self._initializer(name, _lazy(tensor, name), tensor.shape)
            self._constants[key].meta[SHARED] = key
        return self._constants[key]

    def _initializer(self, name: str, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
        self.initializers[name] = value
        return value

    def _fresh(self, stem: str) -> str:
        self._counts[stem] = self._counts.get(stem, -1) + 1
        return f"{stem}_{self._counts[stem]}"

    # -- nodes --------------------------------------------------------------------------------------------------
    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.multi(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def multi(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        version: int = 21,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """The outputs of a node; an equal node made before is taken again."""
        while inputs and inputs[-1] is None:  # onnxruntime crashes on a LayerNormalization whose bias is named ""
            inputs = inputs[:-1]
        key = (domain, op_type, tuple(map(id, inputs)), outputs, repr(sorted(attributes.items())))
        if key not in self._made:
            self.needs_opset_24 |= not domain and version > 21
            name = self._fresh(op_type)
            values = [ir.Value(name=f"{name}.{i}" if outputs > 1 else name) for i in range(outputs)]
            node = ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
            self.nodes.append(node)
            self._made[key] = tuple(node.outputs)
        return self._made[key]

    def graph_node(self, op_type: str, inputs: Sequence[ir.Value], outputs: int, **attributes: Any) -> list[ir.Value]:
        """The outputs of a node that has graphs among its attributes, and so is never taken for another."""
        name = self._fresh(op_type)
        values = [ir.Value(name=f"{name}.{i}") for i in range(outputs)]
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=values, name=name))
        return values

    def copied(self, value: ir.Value) -> ir.Value:
        """The same value under a name of its own."""
        name = self._fresh("Identity")
        self.nodes.append(ir.node("Identity", [value], outputs=[ir.Value(name=name)], name=name))
        return self.nodes[-1].outputs[0]

    def inner(self) -> Emitter:
        """An emitter for a graph inside of this one, which may read what this one has made so far."""
        inner = Emitter(self.interface)
        inner.inputs, inner.initializers, inner._constants = self.inputs, self.initializers, self._constants
        inner._counts, inner._made = self._counts, dict(self._made)
        return inner

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self.op("Cast", value, to=int(DTYPES[dtype]))

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a graph output; a value that already has another public name is passed through Identity."""
        if value in self.outputs or value in self.inputs.values() or value in self.initializers.values():
            value = self.op("Identity", value)
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def carried(self, home: Emitter, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A value of another graph, which becomes its output and an input of this one, once for each value."""
        if value not in self._carried:
            name = f"cross.{len(self._carried)}"
            home.output(value, name, dtype, ["seq" if size == "source" else size for size in shape])
            self._carried[value] = self.input(name, dtype, shape)
        return self._carried[value]

    # -- the sizes of the current call --------------------------------------------------------------------------
    def given(self, name: str) -> ir.Value:
        """One of the inputs that the graph's interface allows; it is the graph's own once it was asked for."""
        return self.input(name, ir.DataType.INT64, self.interface.inputs[name])

    def size(self, role: Role) -> ir.Value:
        """(1,) int64: the batch size, or the number of positions of a role."""
        name, axis = self.interface.sizes[role]
        return self.op("Shape", self.given(name), start=axis, end=axis + 1)

    def size_of(self, atom: Atom) -> ir.Value:
        """(1,) int64: the size of an atom."""
        if atom.role is None:
            return self.constant([atom.size], np.int64)
        if atom.role is Role.STRETCH:
            seq = self.size(Role.QUERY if Role.QUERY in self.interface.sizes else Role.KEY)
            return self.op("Add", seq, self.constant([atom.before]))
        if atom.role is Role.KEY and (columns := atom.before + atom.after):
            return self.op("Add", self.size(Role.KEY), self.constant([columns]))
        return self._picked[atom.size] if atom.role is Role.PICKED else self.size(atom.role)

    def count_picked(self, size: Any, indices: ir.Value, axis: int = 0) -> None:
        """Remember that as many entries as `indices` has along `axis` are what `size` stands for."""
        self._picked.setdefault(size, self.op("Shape", indices, start=axis, end=axis + 1))

    def seqlens_k(self) -> ir.Value:
        """(batch,) int32: the index of each row's last valid position, as GroupQueryAttention wants it."""
        lengths = self.op("ReduceSum", self.given("attention_mask"), self.constant([1]), keepdims=0)
        return self.cast(self.op("Sub", lengths, self.constant([1])), torch.int32)

    def total_length(self) -> ir.Value:
        """() int32: the length of the longest row."""
        return self.op("Squeeze", self.cast(self.size(Role.KEY), torch.int32))

    def write_indices(self) -> ir.Value:
        """(batch,) int64: where each row's new positions begin in the cache."""
        return self.op("Gather", self.given("position_ids"), self.constant(0), axis=1)

    # -- the whole ----------------------------------------------------------------------------------------------
    def model(self, name: str, opset: int) -> ir.Model:
        order = ("source_ids", *DECODER.inputs, "token_type_ids")
        inputs = sorted(self.inputs.values(), key=lambda v: order.index(v.name) if v.name in order else len(order))
        kept = [v for v in self.initializers.values() if v.uses() or v.name in self.inputs]
        imports = {"": opset}
        if any(node.domain == CONTRIB for node in self.nodes):
            imports[CONTRIB] = 1
        graph = ir.Graph(inputs, self.outputs, nodes=self.nodes, initializers=kept, opset_imports=imports, name=name)
        return ir.Model(graph, ir_version=10, producer_name="tfinfer")
