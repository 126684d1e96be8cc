"""Three products for query, key and value become one; another graph takes the parts out of the joined weight."""

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

import onnxruntime as ort  # noqa: E402
from gqa_graph import FLOAT, HEADS, KV_HEADS, SIZE, WIDTH, Graph, attentions, operators, unchanged, weights  # noqa: E402

from tfinfer.export.passes import half, joined, packed_qkv, shapes  # noqa: E402

ALL = (HEADS + 2 * KV_HEADS) * SIZE


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
def test_three_products_become_one(bias):
    g = Graph()
    model = g.finish(g.attend(*g.sides(bias=bias)))
    left = unchanged(packed_qkv.run, model, 1)
    assert (left["MatMul"], left["Add"]) == (1, int(any(bias)))
    (node,) = attentions(model)
    assert node.inputs[1] is None
    assert node.inputs[2] is None
    (product,) = (n for n in model.graph if n.op_type == "MatMul")
    assert product.inputs[1].const_value.shape == (WIDTH, ALL)
    assert packed_qkv.run(model) == 0


def three_parts(g):
    """Queries, keys and values behind one another in one product."""
    product = g.dense(ALL, seed=3, bias=True)
    ends = [0, HEADS * SIZE, (HEADS + KV_HEADS) * SIZE, ALL]
    return [g.op("Slice", product, *(np.array([n]) for n in (a, b, 2, 1))) for a, b in pairwise(ends)]


def by_group(g):
    """Of each key head: its queries, itself, its values, as GPT-NeoX mixes them."""
    product = g.op("Reshape", g.dense(ALL, seed=3, bias=True), np.array([0, 0, KV_HEADS, -1, SIZE]))
    shared = HEADS // KV_HEADS
    ends = [0, shared, shared + 1, shared + 2]
    return [g.rows(g.op("Slice", product, *(np.array([n]) for n in (a, b, 3, 1)))) for a, b in pairwise(ends)]


@pytest.mark.parametrize("make", [three_parts, by_group])
def test_one_product_for_all_goes_in_whole_with_its_columns_in_order(make):
    g = Graph()
    model = g.finish(g.attend(*make(g)))
    left = unchanged(packed_qkv.run, model, 1)
    assert (left["MatMul"], left["Add"], left["Slice"], left["Reshape"]) == (1, 1, 0, 0)


def test_a_weight_in_order_is_not_copied():
    g = Graph()
    model = g.finish(g.attend(*three_parts(g)))
    before = set(model.graph.initializers)
    packed_qkv.run(model)
    assert set(model.graph.initializers) <= before


def test_weights_of_several_layers_are_joined_once():
    g = Graph()
    held = [g.held(weights(WIDTH, n * SIZE, seed=n)) for n in (HEADS, KV_HEADS, KV_HEADS)]
    first = g.attend(*(g.op("MatMul", g.x, w) for w in held))
    other = g.op("MatMul", first, weights(HEADS * SIZE, WIDTH, seed=7))
    model = g.finish(g.attend(*(g.op("MatMul", other, w) for w in held), layer=1))
    assert unchanged(packed_qkv.run, model, 2)["MatMul"] == 3
    shapes = [tuple(v.shape) for v in model.graph.initializers.values() if v.dtype is FLOAT]
    assert sorted(shapes) == [(WIDTH, ALL), (HEADS * SIZE, WIDTH)]


def keys_read_elsewhere(g):
    q, k, v = g.sides()
    return g.op("Add", g.attend(q, k, v), g.op("ReduceSum", k, np.array([2]), keepdims=1))


def another_input(g):
    size = KV_HEADS * SIZE
    q, k = g.dense(HEADS * SIZE, seed=0), g.dense(size, seed=1)
    return g.attend(q, k, g.dense(size, seed=2, x=g.op("Neg", g.x)))


def scaled(g):
    q, k, v = g.sides()
    return g.attend(q, g.op("Mul", k, np.array(0.5, np.float32)), v)


def normed(g):
    q, k, v = g.sides()
    ones = np.ones(SIZE, np.float32)
    return g.attend(q, g.rows(g.op("LayerNormalization", g.split(k), ones, axis=-1)), v)


def by_position(g):
    q, k, v = g.sides()
    table = np.ones((40, SIZE), np.float32)
    return g.attend(g.rows(g.op("Mul", g.split(q), g.at_positions(table))), k, v)


@pytest.mark.parametrize("make", [keys_read_elsewhere, another_input, scaled, normed, by_position])
def test_other_projections_stay(make):
    g = Graph()
    model = g.finish(make(g))
    before = operators(model)
    assert unchanged(packed_qkv.run, model, 0) == before


def test_projections_that_come_out_of_the_graph_stay():
    g = Graph()
    q, k, v = g.sides()
    out = g.attend(q, k, v)
    g.emit.output(k, "keys", FLOAT, ("batch", "seq", KV_HEADS * SIZE))
    assert packed_qkv.run(g.finish(out)) == 0


def test_the_shape_behind_a_packed_attention_is_known():
    g = Graph()
    model = g.finish(g.attend(*g.sides()))
    packed_qkv.run(model)
    (node,) = attentions(model)
    node.outputs[0].shape = None
    assert shapes.infer(model.graph)[node.outputs[0]] == ("batch", "seq", HEADS * SIZE)


def test_a_packed_graph_is_narrowed():
    g = Graph()
    model = g.finish(g.attend(*g.sides(bias=(True, True, True))))
    packed_qkv.run(model)
    half.run(model, ir.DataType.FLOAT16)
    kept = [v for v in model.graph.initializers.values() if v.uses()]
    assert {v.const_value.numpy().dtype for v in kept if v.dtype is not ir.DataType.INT64} == {np.dtype(np.float16)}


def test_another_graph_takes_its_parts_out_of_the_joined_weight():
    g, other = Graph(), Graph()
    arrays = [weights(WIDTH, n * SIZE, seed=i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    model = g.finish(g.attend(*(g.op("MatMul", g.x, w) for w in arrays)))
    product = other.op("MatMul", other.x, arrays[1])
    other.emit.output(product, "y", FLOAT, ("batch", "seq", KV_HEADS * SIZE))
    apart = other.emit.model("apart", 21)
    packed_qkv.run(model)
    x = weights(2, 3, WIDTH, seed=5)

    def run():
        return ort.InferenceSession(ir.to_proto(apart).SerializeToString()).run(None, {"x": x})[0]

    before = run()
    assert joined.take_parts(apart, [model]) == 1
    np.testing.assert_array_equal(run(), before)
    (whole,) = (v for v in model.graph.initializers.values() if joined.PARTS in v.meta)
    assert whole.meta[joined.SHARED] in {v.meta.get(joined.SHARED) for v in apart.graph.initializers.values()}
    assert joined.take_parts(apart, [model]) == 0
