"""The graphs of a folder as ONNX files with one file of weights: a tensor that two of them read is written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .capture.emitter import SHARED

WEIGHTS = "weights.bin"
SMALL = 1024  # bytes: what is smaller stays in the graph's own file


def save(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write `name.onnx` for each model and their weights, which then are read from the file."""
    places = [(model, value) for model in models.values() for value in _large(model)]
    tensors: dict[Any, ir.TensorProtocol] = {}
    for _, value in places:
        assert value.const_value is not None
        tensors.setdefault(_key(value), value.const_value)
    written = dict(zip(tensors, ir.external_data.convert_tensors_to_external(list(tensors.values()), folder, WEIGHTS)))
    before = [(value, value.const_value) for _, value in places]
    try:
        for _, value in places:
            value.const_value = _named(written[_key(value)], value)
        for name, model in models.items():
            ir.save(model, folder / f"{name}.onnx")
    finally:
        for value, tensor in before:
            value.const_value = tensor


def _large(model: ir.Model) -> list[ir.Value]:
    values = model.graph.initializers.values()
    return [v for v in values if v.const_value is not None and v.const_value.nbytes >= SMALL]


def _key(value: ir.Value) -> Any:
    """Equal for equal contents: what the emitter knew them by, or else the initializer itself."""
    return value.meta.get(SHARED, id(value)), value.dtype


def _named(tensor: ir.TensorProtocol, value: ir.Value) -> ir.ExternalTensor:
    """What was written, under the name and in the shape that an initializer has."""
    assert isinstance(tensor, ir.ExternalTensor)
    assert value.const_value is not None
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, tensor.dtype,
        shape=ir.Shape(value.const_value.shape.numpy()), name=str(value.name), base_dir=tensor.base_dir,
    )  # fmt: skip
