"""Half width: what leaves float16's range stays float32, types agree everywhere, and no weight is stored twice."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

import onnxruntime as ort  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from torch import nn  # noqa: E402

from tfinfer.export.capture import capture  # noqa: E402
from tfinfer.export.capture.emitter import Emitter  # noqa: E402
from tfinfer.export.passes import dead_nodes, half, pipeline  # noqa: E402

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
WIDTHS = [HALF, BRAIN]
DIM, VOCAB, SEQ = 16, 11, 5


def weights(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


class Graph:
    """A graph under construction; `finish` declares what it gives as logits."""

    def __init__(self):
        self.emit = Emitter()

    def __getattr__(self, op_type):
        return lambda *inputs, **attributes: self.emit.op(op_type, *map(self.value, inputs), **attributes)

    def value(self, value):
        if value is None or isinstance(value, ir.Value):
            return value
        array = np.asarray(value)
        return self.emit.constant(array.astype(np.float32) if array.dtype == np.float64 else array)

    def weight(self, name, array):
        return self.emit.weight(torch.from_numpy(array), name)

    def input(self, name, shape, dtype=FLOAT):
        return self.emit.input(name, dtype, shape)

    def finish(self, logits, shape=("rows", "columns")):
        self.emit.output(logits, "logits", FLOAT, shape)
        return self.emit.model("test", 21)


def block():
    """Embedding, RMS norm, masked attention with a softmax and a residual, a LayerNorm and a head."""
    g = Graph()
    ids = g.input("ids", ("batch", SEQ), ir.DataType.INT64)
    mask = g.input("mask", (SEQ, SEQ), ir.DataType.BOOL)
    past = g.input("past", ("batch", SEQ, DIM))
    x = g.Gather(g.weight("tokens", weights(VOCAB, DIM)), ids, axis=0)
    mean = g.ReduceMean(g.Mul(x, x), np.array([-1]), keepdims=1)
    normed = g.Mul(
        g.Mul(x, g.Reciprocal(g.Sqrt(g.Add(mean, np.float32(1e-6))))), g.weight("norm", weights(DIM, seed=1))
    )
    q, k, v = (g.MatMul(normed, g.weight(n, weights(DIM, DIM, seed=s, scale=0.3))) for s, n in enumerate("qkv", 2))
    k = g.Add(k, past)
    scores = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 2, 1])), np.float32(0.25))
    chosen = g.Softmax(g.Where(mask, scores, np.float32(-1e9)), axis=-1)
    x = g.Add(x, g.MatMul(chosen, v))
    x = g.LayerNormalization(
        x, g.weight("scale", weights(DIM, seed=6)), g.weight("shift", weights(DIM, seed=7)), axis=-1
    )
    x = g.MatMul(x, g.weight("head", weights(DIM, VOCAB, seed=8)))
    logits = g.Add(x, g.weight("bias", weights(VOCAB, seed=9)))
    model = g.finish(logits, ("batch", SEQ, VOCAB))
    k.name, k.type, k.shape = "present", ir.TensorType(FLOAT), ir.Shape(("batch", SEQ, DIM))
    model.graph.outputs.append(k)
    return model


def feeds(dtype=np.float32):
    return {
        "ids": np.random.default_rng(0).integers(0, VOCAB, (2, SEQ)),
        "mask": np.tril(np.ones((SEQ, SEQ), bool)),
        "past": weights(2, SEQ, DIM, seed=10).astype(dtype),
    }


def run(model, fed, reference=False):
    proto = ir.to_proto(model)
    if reference:  # every node in its own width; onnxruntime may leave out a narrowing and the widening after it
        return ReferenceEvaluator(proto).run(None, fed)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, fed)


def stored(model, dtype):
    return {name for name, value in model.graph.initializers.items() if value.dtype == dtype}


def types_of(model):
    """Every value's type as ONNX itself infers it; raises where two types disagree."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    return {**found, **{i.name: i.data_type for i in inferred.initializer}}


def inputs_of(model, op_type):
    """The types that a kind of node reads, and those it writes."""
    types = types_of(model)
    proto = ir.to_proto(model)
    nodes = [n for n in proto.graph.node if n.op_type == op_type]
    assert nodes, op_type
    read = {types[i] for n in nodes for i in n.input if i}
    return read, {types[o] for n in nodes for o in n.output}


# -- the block ------------------------------------------------------------------------------------------------------
def test_half_width_computes_what_float32_computes():
    expected, present = run(block(), feeds())
    narrow = block()
    assert half.run(narrow, HALF) == 10
    for reference in (False, True):
        logits, narrow_present = run(narrow, feeds(np.float16), reference)
        assert logits.dtype == np.float32
        assert narrow_present.dtype == np.float16
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05)
        np.testing.assert_allclose(narrow_present.astype(np.float32), present, rtol=0, atol=0.01)
        assert not np.array_equal(logits, expected)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_inputs_outputs_and_weights_are_narrow_and_logits_are_not(dtype):
    model = block()
    half.run(model, dtype)
    types = types_of(model)
    assert types["past"] == types["present"] == dtype
    assert types["logits"] == FLOAT
    assert types["ids"] == ir.DataType.INT64
    assert types["mask"] == ir.DataType.BOOL
    assert [v.dtype for v in model.graph.outputs] == [FLOAT, dtype]
    assert [o.name for o in model.graph.outputs] == ["logits", "present"]
    named = {name.removesuffix(f"_{dtype.name.lower()}") for name in stored(model, dtype)}
    assert {"tokens", "q", "k", "v", "scale", "shift", "head", "bias"} <= named


@pytest.mark.parametrize("dtype", WIDTHS)
def test_norms_and_softmax_are_computed_in_float32(dtype):
    model = block()
    half.run(model, dtype)
    for op_type in ("ReduceMean", "Sqrt", "Reciprocal", "Softmax"):
        read, written = inputs_of(model, op_type)
        assert read - {ir.DataType.INT64} == {FLOAT}, op_type
        assert written == {FLOAT}, op_type
    for op_type in ("MatMul", "Where", "Transpose", "Gather", "LayerNormalization"):
        read, written = inputs_of(model, op_type)
        assert read - {ir.DataType.INT64, ir.DataType.BOOL} == {dtype}, op_type
        assert written == {dtype}, op_type


@pytest.mark.parametrize("dtype", WIDTHS)
def test_no_float32_weight_stays_that_only_narrow_nodes_read(dtype):
    model = block()
    half.run(model, dtype)
    types = types_of(model)
    readers = {}
    for node in ir.to_proto(model).graph.node:
        for name in node.input:
            readers.setdefault(name, []).append({types[o] for o in node.output})
    wide = stored(model, FLOAT)
    assert "norm" in wide  # the norm's own weight and epsilon
    assert len(wide) == 2
    for name in wide:
        assert readers[name], name
        assert all(FLOAT in written for written in readers[name]), name
    assert all(readers.get(name) for name in stored(model, dtype))


def test_a_weight_of_a_norm_and_of_a_product_is_stored_in_both_widths():
    g = Graph()
    x = g.input("x", (2, DIM))
    weight = g.weight("shared", weights(DIM))
    wide = g.Mul(g.Sqrt(g.Abs(x)), weight)
    model = g.finish(g.Add(g.Mul(x, weight), wide))
    half.run(model, HALF)
    assert "shared" in stored(model, FLOAT)
    assert "shared_float16" in stored(model, HALF)
    types_of(model)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_value_is_cast_once_however_many_read_it(dtype):
    g = Graph()
    x = g.input("x", (2, DIM))
    model = g.finish(g.Add(g.Add(g.Sqrt(x), g.Exp(x)), g.Add(g.Log(x), g.Neg(x))))
    half.run(model, dtype)
    widened = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0].name == "x"]
    assert len(widened) == 1
    types_of(model)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_saved_model_is_valid_with_its_weights_beside_it(dtype, tmp_path):
    model = block()
    half.run(model, dtype)
    ir.save(model, tmp_path / "decoder.onnx", external_data="weights.bin")
    onnx.checker.check_model(tmp_path / "decoder.onnx", full_check=True)
    read = onnx.load(tmp_path / "decoder.onnx")
    onnx.shape_inference.infer_shapes(read, check_type=True, strict_mode=True)
    sizes = {i.name: len(onnx.numpy_helper.to_array(i).tobytes()) for i in read.graph.initializer}
    assert sizes[f"head_{dtype.name.lower()}"] == 2 * DIM * VOCAB


# -- numbers out of range -------------------------------------------------------------------------------------------
def test_what_float16_cannot_hold_is_clipped_and_minus_infinity_stays():
    array = np.array([1e9, -1e9, 65504, -65504, 70000, -np.inf, np.inf, np.nan, 1e-9, 0.1, -3.4028235e38], np.float32)
    made = half.narrowing(ir.Tensor(array), HALF)().numpy()
    assert made.dtype == np.float16
    largest = 65504.0
    wanted = [largest, -largest, largest, -largest, largest, -np.inf, np.inf, np.nan, 0.0, np.float16(0.1), -largest]
    np.testing.assert_array_equal(made, np.array(wanted, np.float16))


def test_bfloat16_holds_what_float32_holds():
    array = np.array([1e9, -3e38, -np.inf, 70000, 0.1], np.float32)
    made = half.narrowing(ir.Tensor(array), BRAIN)().numpy().astype(np.float32)
    assert np.isfinite(made[[0, 1, 3, 4]]).all()
    assert made[2] == -np.inf
    np.testing.assert_allclose(made[[0, 1, 3, 4]], array[[0, 1, 3, 4]], rtol=2**-8)


@pytest.mark.parametrize("hidden", [-1e4, -1e9, -1e10, float(np.finfo(np.float32).min), -np.inf])
def test_a_mask_hides_as_much_in_half_width(hidden):
    g = Graph()
    x = g.input("x", (2, VOCAB))
    mask = np.arange(VOCAB) < 4
    shown = g.Where(g.emit.constant(mask), x, np.float32(hidden))
    added = g.Add(x, np.where(mask, 0, hidden).astype(np.float32))
    model = g.finish(g.Add(g.Softmax(shown, axis=-1), g.Softmax(added, axis=-1)))
    half.run(model, HALF)
    for reference in (False, True):
        (out,) = run(model, {"x": weights(2, VOCAB).astype(np.float16)}, reference)
        assert np.isfinite(out).all()
        assert (out[:, 4:] == 0).all()
        np.testing.assert_allclose(out.sum(-1), 2, rtol=1e-3)


def normed(kind, g, x):
    """A norm of x, as people write it."""
    if kind == "rms":
        mean = g.ReduceMean(g.Mul(x, x), np.array([-1]), keepdims=1)
        return g.Div(x, g.Sqrt(g.Add(mean, np.float32(1e-6))))
    if kind == "rms by pow":
        mean = g.ReduceMean(g.Pow(x, np.float32(2)), np.array([-1]), keepdims=1)
        return g.Mul(x, g.Reciprocal(g.Sqrt(g.Add(mean, np.float32(1e-6)))))
    mean = g.ReduceMean(x, np.array([-1]), keepdims=1)
    if kind == "centred":
        away = g.Sub(x, mean)
        variance = g.ReduceMean(g.Mul(away, away), np.array([-1]), keepdims=1)
        return g.Div(away, g.Sqrt(g.Add(variance, np.float32(1e-5))))
    squares = g.ReduceMean(g.Mul(x, x), np.array([-1]), keepdims=1)  # mean of squares less square of mean
    variance = g.Sub(squares, g.Mul(mean, mean))
    return g.Div(g.Sub(x, mean), g.Sqrt(g.Add(variance, np.float32(1e-5))))


@pytest.mark.parametrize(
    "kind, size",
    [(kind, size) for kind in ("rms", "rms by pow", "centred") for size in (1.0, 500.0)]
    + [("difference of means", 1.0), pytest.param("difference of means", 500.0)],
)
def test_norms_of_large_values_do_not_leave_the_range(kind, size):
    def made():
        g = Graph()
        x = g.input("x", (3, DIM))
        return g.finish(g.MatMul(normed(kind, g, x), g.weight("head", weights(DIM, VOCAB))))

    x = (weights(3, DIM, seed=3) * size).astype(np.float16)
    (expected,) = run(made(), {"x": x.astype(np.float32)})
    narrow = made()
    half.run(narrow, HALF)
    types_of(narrow)
    (out,) = run(narrow, {"x": x}, reference=True)
    np.testing.assert_allclose(out, expected, rtol=0, atol=0.05)


def test_a_vector_of_zeros_is_normalised_to_zeros():
    g = Graph()
    x = g.input("x", (2, DIM))
    length = g.Sqrt(g.ReduceSum(g.Mul(x, x), np.array([-1]), keepdims=1))
    model = g.finish(g.Div(x, g.Max(length, np.float32(1e-12))))
    half.run(model, HALF)
    with np.errstate(all="ignore"):
        (out,) = run(model, {"x": np.zeros((2, DIM), np.float16)}, reference=True)
    assert (out == 0).all()


# -- types ----------------------------------------------------------------------------------------------------------
UNARY = "Neg Abs Exp Log Sqrt Reciprocal Tanh Sigmoid Relu Mish HardSwish Erf Sin Cos Floor Ceil Round Sign Softplus"


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("op_type", [*UNARY.split(), "Gelu", "Elu", "LeakyRelu", "Softmax", "LogSoftmax", "Identity"])
def test_every_operator_of_one_operand_is_valid_in_half_width(op_type, dtype):
    g = Graph()
    x = g.input("x", (2, VOCAB))
    model = g.finish(g.Neg(getattr(g, op_type)(x)))
    half.run(model, dtype)
    assert types_of(model)["x"] == dtype


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"])
@pytest.mark.parametrize("other", ["a constant", "another", "itself", "a wide one"])
def test_every_operator_of_two_operands_is_valid_in_half_width(op_type, other, dtype):
    g = Graph()
    x, y = g.input("x", (2, VOCAB)), g.input("y", (2, VOCAB))
    operand = {"a constant": np.float32(2), "another": y, "itself": x, "a wide one": g.Exp(y)}[other]
    model = g.finish(g.Neg(getattr(g, op_type)(x, operand)))
    half.run(model, dtype)
    types_of(model)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_products_comparisons_and_moves_are_valid_in_half_width(dtype):
    g = Graph()
    x, y = g.input("x", (2, VOCAB)), g.input("y", (2, VOCAB))
    product = g.Einsum(x, y, equation="ab,cb->ac")
    shape = g.Shape(product)
    spread = g.Expand(np.float32(0.5), shape)
    truth = g.And(g.Less(x, y), g.Not(g.IsNaN(x)))
    left, right = g.emit.multi(
        "Split", g.Concat(x, g.Exp(y), axis=1), g.value(np.array([VOCAB, VOCAB])), outputs=2, axis=1
    )
    both = g.Where(truth, left, g.Clip(right, np.float32(-1e9), np.float32(1e9)))
    as_number = g.Cast(truth, to=int(FLOAT))
    row = g.Slice(g.ReduceMax(both, np.array([1]), keepdims=1), np.array([0]), np.array([1]), np.array([0]))
    total = g.Add(g.Mul(both, as_number), g.Unsqueeze(g.Squeeze(row, np.array([0])), np.array([0])))
    model = g.finish(g.Add(total, g.ReduceSum(g.Add(product, spread), np.array([1]), keepdims=1)))
    half.run(model, dtype)
    types_of(model)


def test_a_cast_to_float32_becomes_one_to_the_half_width_and_others_stay():
    g = Graph()
    x = g.input("x", (2, VOCAB), ir.DataType.INT64)
    wide = g.Cast(x, to=int(FLOAT))
    again = g.Cast(g.Cast(wide, to=int(ir.DataType.INT32)), to=int(FLOAT))
    model = g.finish(g.Add(wide, again))
    half.run(model, HALF)
    targets = [n.attributes["to"].as_int() for n in model.graph if n.op_type == "Cast"]
    assert targets == [HALF, ir.DataType.INT32, HALF, FLOAT]
    types_of(model)


def test_logits_that_are_wide_already_are_not_cast():
    g = Graph()
    model = g.finish(g.LogSoftmax(g.input("x", (2, VOCAB)), axis=-1))
    half.run(model, HALF)
    assert [n.op_type for n in model.graph] == ["Cast", "LogSoftmax"]
    assert types_of(model)["logits"] == FLOAT


def test_integers_are_left_alone():
    g = Graph()
    x = g.input("x", (2, VOCAB), ir.DataType.INT64)
    total = g.ReduceSum(g.Mul(x, x), np.array([1]), keepdims=1)
    model = g.finish(g.Cast(g.Add(g.Pow(total, np.array([2])), x), to=int(FLOAT)))
    half.run(model, HALF)
    types = types_of(model)
    assert {types[n.outputs[0].name] for n in model.graph if n.op_type in ("ReduceSum", "Mul", "Pow", "Add")} == {
        ir.DataType.INT64
    }


# -- with the exporter's own graphs ---------------------------------------------------------------------------------
class Small(nn.Module):
    """One attention whose scores are bent, so that it stays the module's own operators."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head, self.norm = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB), nn.RMSNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, ids):
        x = self.norm(self.tokens(ids))
        t = ids.shape[1]
        scores = 5 * torch.tanh(torch.einsum("bqd,bkd->bqk", self.q(x), self.k(x)) / 5)
        scores = scores.masked_fill(torch.ones(t, t).triu(1) == 1, float("-inf"))
        return self.head(x + nn.functional.softplus(scores.softmax(-1) @ self.v(x)))


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_captured_module_is_valid_in_half_width(dtype):
    model = capture(Small(), max_length=20).model
    half.run(model, dtype)
    pipeline.run(model)
    types = types_of(model)
    assert types["logits"] == FLOAT
    assert types["past_key_values.0.key"] == types["present.0.key"] == dtype
    assert types["logits_to_keep"] == ir.DataType.INT64


# -- dead nodes -----------------------------------------------------------------------------------------------------
def test_nodes_that_nobody_reads_go_and_their_weights_with_them():
    g = Graph()
    x = g.input("x", (2, DIM))
    dead = g.Exp(g.MatMul(x, g.weight("dead", weights(DIM, 3))))
    model = g.finish(g.MatMul(x, g.weight("head", weights(DIM, VOCAB))))
    assert dead.producer() in list(model.graph)
    assert dead_nodes.run(model) == 3
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert set(model.graph.initializers) == {"head"}
    assert dead_nodes.run(model) == 0


def test_an_input_with_a_default_stays_though_nobody_reads_it():
    model = capture(Small(), max_length=20).model
    dead_nodes.run(model)
    assert "logits_to_keep" in model.graph.initializers
    assert "logits_to_keep" in {v.name for v in model.graph.inputs}
