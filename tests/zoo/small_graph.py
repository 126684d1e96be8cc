"""Graphs of a few nodes, for the tests of passes: built, run before and after, compared."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tfinfer.export.capture.emitter import Emitter
from tfinfer.export.passes import dead_nodes

FLOAT, DIM = ir.DataType.FLOAT, 16


def weights(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


class Graph:
    """A graph under construction, `g.Add(a, b)` for every operator; arrays and numbers are constants."""

    def __init__(self):
        self.emit, self.feeds = Emitter(), {}

    def __getattr__(self, op_type):
        return lambda *inputs, **attributes: self.emit.op(op_type, *map(self.value, inputs), **attributes)

    def value(self, value):
        if value is None or isinstance(value, ir.Value):
            return value
        array = np.asarray(value)
        return self.emit.constant(array.astype(np.float32) if array.dtype == np.float64 else array)

    def input(self, name, *shape, names=(), scale=1.0):
        """A float32 input that is fed numbers; `names` are its axes' names, from the first on."""
        declared = [*names, *shape[len(names) :]]
        self.feeds[name] = weights(*shape, seed=len(self.feeds) + 20, scale=scale)
        return self.emit.input(name, FLOAT, declared)

    def rows(self, name, width=DIM):
        return self.input(name, 2, 3, width, names=("batch", "seq"))

    def model(self, *outputs, opset=21):
        for i, value in enumerate(outputs):
            self.emit.output(value, f"y{i}", FLOAT, [f"y{i}_{axis}" for axis in range(3)])
        return self.emit.model("test", opset)


def run(model, feeds):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)


def unchanged(apply, model, fired, feeds):
    """Apply a pass: it fires that often, numbers and names stay; returns how many operators are left of each type."""
    before, names = run(model, feeds), [value.name for value in model.graph.outputs]
    count = apply(model)
    assert count == fired
    dead_nodes.run(model)
    assert [value.name for value in model.graph.outputs] == names
    for expected, found in zip(before, run(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return Counter(node.op_type for node in model.graph)
