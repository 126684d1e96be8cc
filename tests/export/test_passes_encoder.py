"""The passes for encoders: the same numbers before and after, the operators that are left, how often each fired."""

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

import onnxruntime as ort  # noqa: E402
from torch import nn  # noqa: E402

from tfinfer.export.capture import Argument, Kind, capture, capture_encoder  # noqa: E402
from tfinfer.export.capture.emitter import CONTRIB, ENCODER, Emitter  # noqa: E402
from tfinfer.export.passes import half, mask_branch, pipeline, projection_bias, row_stride  # noqa: E402

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
DIM, HEADS = 16, 2


def weights(*shape, seed=0, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


class Graph:
    """A graph under construction; constants are arrays, `finish` declares its only output."""

    def __init__(self):
        self.emit, self.count = Emitter(ENCODER), 0
        self.x = self.emit.input("x", FLOAT, ("batch", "seq", DIM))

    def op(self, op_type, *inputs, **attributes):
        return self.emit.op(
            op_type, *(self.weight(v) if isinstance(v, np.ndarray) else v for v in inputs), **attributes
        )

    def weight(self, array):
        self.count += 1
        return self.emit.weight(torch.from_numpy(array), f"w{self.count}")

    def dense(self, x, width, *, seed, bias=True, into=DIM):
        product = self.op("MatMul", x, weights(into, width, seed=seed))
        return self.op("Add", product, weights(width, seed=seed + 50)) if bias else product

    def attend(self, q, k, v, keys=None, bias=None, own=None):
        options = {"num_heads": HEADS, "scale": 0.4, "mask_filter_value": float(np.finfo(np.float32).min)}
        return self.op("MultiHeadAttention", q, k, v, own, keys, bias, domain=CONTRIB, **options)

    def keys(self):
        return self.emit.cast(self.emit.given("attention_mask"), torch.int32)

    def cleared(self, value, keys):
        most = self.op("ReduceMax", keys, self.emit.constant([1]), keepdims=1)
        shown = self.emit.cast(self.op("Unsqueeze", most, self.emit.constant([2])), torch.bool)
        return self.op("Where", shown, value, self.emit.constant(0.0, np.float32))

    def finish(self, value, width=DIM):
        self.emit.output(value, "y", FLOAT, ("batch", "seq", width))
        return self.emit.model("test", 21)


def operators(model):
    return Counter(node.op_type for node in model.graph)


def results(model, masks=(None,)):
    """The outputs, a row of `masks` for each call: lengths of its rows, or None for a graph without a mask."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    found = []
    for lengths in masks:
        rows, longest = (2, 5) if lengths is None else (len(lengths), max(lengths))
        feeds = {"x": weights(rows, longest, DIM, seed=9, scale=1.0)}
        if lengths is not None:
            feeds["attention_mask"] = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
        found += session.run(None, feeds)
    return found


def unchanged(apply, model, fired, masks=(None,)):
    """Apply a pass: it fires that often and the numbers stay; returns how many operators are left of each type."""
    before = results(model, masks)
    assert apply(model) == fired
    pipeline.PASSES["dead_nodes"](model)
    onnx.checker.check_model(ir.to_proto(model))
    for expected, found in zip(before, results(model, masks)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    return operators(model)


# -- the biases of projections --------------------------------------------------------------------------------------
@pytest.mark.parametrize("biased", [(True, True, True), (True, False, True), (False, False, True)])
def test_biases_of_query_key_and_value_go_into_attention(biased):
    g = Graph()
    model = g.finish(g.attend(*(g.dense(g.x, DIM, seed=i, bias=b) for i, b in enumerate(biased))))
    assert unchanged(projection_bias.run, model, 1) == {"MatMul": 3, "MultiHeadAttention": 1}
    (node,) = (n for n in model.graph if n.op_type == "MultiHeadAttention")
    assert node.inputs[3].const_value.shape == (3 * DIM,)
    assert projection_bias.run(model) == 0


def test_values_may_be_wider_than_keys():
    g = Graph()
    parts = [g.dense(g.x, width, seed=i) for i, width in enumerate((DIM, DIM, 2 * DIM))]
    assert unchanged(projection_bias.run, g.finish(g.attend(*parts), 2 * DIM), 1)["Add"] == 0


def test_the_order_of_an_addition_does_not_matter():
    g = Graph()
    parts = [g.op("Add", weights(DIM, seed=i), g.dense(g.x, DIM, seed=i, bias=False)) for i in range(3)]
    assert unchanged(projection_bias.run, g.finish(g.attend(*parts)), 1)["Add"] == 0


def keys_read_twice(g, q, k, v):
    return g.op("Add", g.attend(q, k, v), k)


def keys_turned(g, q, k, v):
    return g.attend(q, g.op("Neg", k), v)


def shared_projection(g, q, k, v):
    return g.op("Add", g.attend(q, q, v), k)


def has_a_bias(g, q, k, v):
    return g.attend(q, k, v, own=g.weight(weights(3 * DIM)))


def bias_is_a_number(g, q, k, v):
    return g.op("Add", g.attend(g.op("Add", g.dense(g.x, DIM, seed=7, bias=False), weights(1)), k, v), q)


@pytest.mark.parametrize("make", [keys_read_twice, keys_turned, shared_projection, has_a_bias, bias_is_a_number])
def test_other_additions_stay(make):
    g = Graph()
    model = g.finish(make(g, *(g.dense(g.x, DIM, seed=i) for i in range(3))))
    before = operators(model)
    assert unchanged(projection_bias.run, model, 0) == before


def test_without_any_bias_there_is_nothing_to_do():
    g = Graph()
    model = g.finish(g.attend(*(g.dense(g.x, DIM, seed=i, bias=False) for i in range(3))))
    assert projection_bias.run(model) == 0


# -- the mask -------------------------------------------------------------------------------------------------------
MASKS = ([4, 4], [5], [5, 2, 1], [3, 0])  # the last has a row that sees nothing


def masked(g, layers=2, *, cleared=True):
    x = g.x
    for layer in range(layers):
        keys = g.keys()
        x = g.attend(*(g.dense(x, DIM, seed=10 * layer + i) for i in range(3)), keys)
        x = g.cleared(x, keys) if cleared else x
    return x


@pytest.mark.parametrize("cleared", [True, False])
def test_a_batch_without_padding_takes_the_branch_without_a_mask(cleared):
    g = Graph()
    model = g.finish(masked(g, cleared=cleared))
    left = unchanged(mask_branch.run, model, 2, MASKS if cleared else MASKS[:3])
    assert (left["If"], left["MultiHeadAttention"], left["Where"]) == (2, 0, 0)
    choices = [node for node in model.graph if node.op_type == "If"]
    assert len({node.inputs[0] for node in choices}) == left["ReduceMin"] == left["Less"] == 1
    for node in choices:
        there, none = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
        assert [n.op_type for n in there] == ["MultiHeadAttention", "Where"][: 1 + cleared]
        assert [len(n.inputs) for n in none] == [3]
    assert mask_branch.run(model) == 0


def test_the_bias_of_projections_is_kept_in_both_branches():
    g = Graph()
    model = g.finish(masked(g, 1))
    unchanged(lambda m: projection_bias.run(m) + mask_branch.run(m), model, 2, MASKS)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    for attribute in choice.attributes.values():
        assert next(iter(attribute.as_graph())).inputs[3].const_value.shape == (3 * DIM,)


def test_a_row_that_something_else_clears_is_cleared_after_the_choice():
    g = Graph()
    keys = g.keys()
    attended = g.attend(g.x, g.x, g.x, keys)
    shown = g.op("Greater", g.x, g.emit.constant(0.0, np.float32))
    model = g.finish(g.op("Where", shown, attended, g.emit.constant(0.0, np.float32)))
    assert unchanged(mask_branch.run, model, 1, MASKS[:3])["Where"] == 1


def biased_scores(g):
    bias = g.op("Unsqueeze", g.op("MatMul", g.x, weights(DIM, 5)), g.emit.constant([1]))
    return g.attend(g.x, g.x, g.x, g.keys(), bias)


def keys_of_its_own(g):
    return g.attend(g.x, g.x, g.x, g.op("Mul", g.keys(), g.emit.constant(1, np.int32)))


def no_mask(g):
    g.emit.given("attention_mask")
    return g.attend(g.x, g.x, g.x)


@pytest.mark.parametrize("make", [biased_scores, keys_of_its_own, no_mask])
def test_attention_that_gains_nothing_has_no_branch(make):
    g = Graph()
    model = g.finish(make(g))
    before = operators(model)
    assert unchanged(mask_branch.run, model, 0, [[5, 5], [5, 3]]) == before


def test_both_branches_are_narrowed():
    g = Graph()
    model = g.finish(g.dense(masked(g, 1), DIM, seed=40))
    pipeline.run(model)
    half.run(model, HALF)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    for attribute in choice.attributes.values():
        branch = attribute.as_graph()
        assert branch.outputs[0].dtype is HALF
        constants = [v for n in branch for v in n.inputs if v is not None and v.const_value is not None]
        assert {v.const_value.dtype for v in constants} == {HALF}
    assert {v.dtype for v in model.graph.initializers.values()} <= {HALF, ir.DataType.INT64}
    assert operators(model)["Cast"] == 2  # of the mask: nothing is cast on the way


# -- rows a page apart ----------------------------------------------------------------------------------------------
def feed_forward(g, width, activation="Gelu", x=None):
    inner = g.op(activation, g.dense(g.x if x is None else x, width, seed=1))
    return g.dense(inner, DIM, seed=2, into=width)


def shapes(model):
    return {tuple(v.shape) for v in model.graph.initializers.values() if v.dtype is FLOAT}


@pytest.mark.parametrize("width", [1024, 3072])
@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Sigmoid", "Softplus"])
def test_an_inner_width_of_pages_gets_a_line_more(activation, width):
    g = Graph()
    model = g.finish(feed_forward(g, width, activation))
    assert unchanged(row_stride.run, model, 1) == {"MatMul": 2, "Add": 2, activation: 1}
    assert shapes(model) == {(DIM, width + 16), (width + 16,), (width + 16, DIM), (DIM,)}
    assert row_stride.run(model) == 0


def test_a_gated_block_is_widened_on_both_sides():
    g = Graph()
    gate = g.op("Mul", g.op("Sigmoid", g.dense(g.x, 1024, seed=1)), g.emit.constant(2.0, np.float32))
    inner = g.op("Mul", gate, g.dense(g.x, 1024, seed=3, bias=False))
    model = g.finish(g.dense(inner, DIM, seed=2, into=1024))
    unchanged(row_stride.run, model, 1)
    assert not {size for shape in shapes(model) for size in shape} & {1024}


def test_a_weight_of_several_layers_is_widened_once():
    g = Graph()
    up, down = g.weight(weights(DIM, 1024)), g.weight(weights(1024, DIM, seed=1))
    x = g.x
    for _ in range(3):
        x = g.op("MatMul", g.op("Relu", g.op("MatMul", x, up)), down)
    model = g.finish(x)
    unchanged(row_stride.run, model, 3)
    assert shapes(model) == {(DIM, 1040), (1040, DIM)}


def other_width(g):
    return feed_forward(g, 1536)


def read_elsewhere(g):
    inner = g.op("Relu", g.dense(g.x, 1024, seed=1))
    total = g.op("ReduceSum", inner, g.emit.constant([2]), keepdims=1)
    return g.op("Add", g.dense(inner, DIM, seed=2, into=1024), total)


def columns_together(g):
    return g.dense(g.op("Softmax", g.dense(g.x, 1024, seed=1), axis=-1), DIM, seed=2, into=1024)


def divided(g):
    inner = g.op("Div", g.dense(g.x, 1024, seed=1), weights(1024, seed=4))
    return g.dense(inner, DIM, seed=2, into=1024)


@pytest.mark.parametrize("make", [other_width, read_elsewhere, columns_together, divided])
def test_other_blocks_stay(make):
    g = Graph()
    model = g.finish(make(g))
    before = shapes(model)
    unchanged(row_stride.run, model, 0)
    assert shapes(model) == before


# -- the exporter's own graphs --------------------------------------------------------------------------------------
class Layer(nn.Module):
    """Attention and a feed-forward block as people write them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(24, 1024), nn.Linear(1024, 24), nn.LayerNorm(24)

    def forward(self, x, **mask):
        q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, **mask)
        x = self.norm(x + self.o(attended.transpose(1, 2).flatten(2)))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """Two layers; an encoder where a mask is given, or else a decoder."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layers, self.head = nn.Embedding(20, 24), nn.ModuleList([Layer(), Layer()]), nn.Linear(24, 20)

    def forward(self, ids, mask=None):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, is_causal=True) if mask is None else layer(x, attn_mask=mask[:, None, None].bool())
        return self.head(x) if mask is None else x


def test_an_encoder_gets_every_pass_and_still_computes_what_its_module_does():
    module = Model().eval()
    captured = capture_encoder(module, [Argument("ids", source=True), Argument("mask", Kind.MASK, True)], max_length=20)
    counts = pipeline.run(captured.model)
    assert {name: n for name, n in counts.items() if n and name != "dead_nodes"} == {
        "projection_bias": 2, "mask_branch": 2, "row_stride": 2
    }  # fmt: skip
    session = ort.InferenceSession(ir.to_proto(captured.model).SerializeToString())
    for lengths in ([6], [4, 4], [6, 3, 1]):
        ids = torch.randint(20, (len(lengths), max(lengths)))
        there = np.arange(max(lengths)) < np.array(lengths)[:, None]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": there.astype(np.int64)})
        with torch.no_grad():
            expected = module(ids, torch.from_numpy(there)).numpy()
        np.testing.assert_allclose(found[there], expected[there], rtol=1e-4, atol=1e-5)


def test_a_decoder_is_widened_and_has_no_branch():
    model = capture(Model(), max_length=20).model
    counts = pipeline.run(model)
    assert (counts["projection_bias"], counts["mask_branch"], counts["row_stride"]) == (0, 0, 2)
    half.run(model, HALF)
    assert {v.dtype for v in model.graph.initializers.values()} <= {HALF, ir.DataType.INT64, ir.DataType.INT32}
