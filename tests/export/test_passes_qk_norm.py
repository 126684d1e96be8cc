"""Queries and keys normalised by head: three products become one, two norms become one, and who is left alone."""

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from gqa_graph import HEADS, KV_HEADS, SIZE, Graph, attentions, operators, unchanged, weights  # noqa: E402

from tfinfer.export.passes import dead_nodes, packed_qkv, pipeline, qk_norm  # noqa: E402


def normed(g, value, *, seed, epsilon=1e-6, axis=-1, size=SIZE):
    """Each head by itself, with a weight that all of them share."""
    gain = 1 + weights(size, seed=seed)
    norm = g.op("SimplifiedLayerNormalization", g.split(value, size), gain, axis=axis, epsilon=epsilon, stash_type=1)
    return g.rows(norm)


def decoder(bias=(False, False, False), **changes):
    g = Graph()
    q, k, v = g.sides(bias=bias)
    return g, normed(g, q, seed=11), normed(g, k, seed=12, **changes), v


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, False)])
def test_one_product_and_one_norm_are_left(bias):
    g, q, k, v = decoder(bias)
    model = g.finish(g.attend(q, k, v))
    left = unchanged(qk_norm.run, model, 1)
    found = {name: left[name] for name in ("MatMul", "SimplifiedLayerNormalization", "Reshape", "Split", "Add")}
    expected = {"MatMul": 1, "SimplifiedLayerNormalization": 1, "Reshape": 2, "Split": 2, "Add": int(any(bias))}
    assert found == expected
    (norm,) = (n for n in model.graph if n.op_type == "SimplifiedLayerNormalization")
    assert norm.inputs[1].const_value.shape == (HEADS + KV_HEADS, SIZE)
    assert (qk_norm.run(model), packed_qkv.run(model)) == (0, 0)


def test_two_layers_each_have_their_own():
    g, *sides = decoder()
    first = g.attend(*sides)
    g.x = g.op("MatMul", first, weights(HEADS * SIZE, 24, seed=7))
    q, k, v = g.sides(seed=20)
    model = g.finish(g.attend(normed(g, q, seed=13), normed(g, k, seed=14), v, layer=1))
    assert unchanged(qk_norm.run, model, 2)["SimplifiedLayerNormalization"] == 2
    assert len({n.name for n in model.graph}) == len(list(model.graph))


def test_queries_and_keys_of_one_product_already():
    g = Graph()
    both = g.dense((HEADS + KV_HEADS) * SIZE, seed=3)
    ends = (0, HEADS * SIZE, (HEADS + KV_HEADS) * SIZE)
    q, k = (g.op("Slice", both, *(np.array([n]) for n in (a, b, 2, 1))) for a, b in pairwise(ends))
    v = g.dense(KV_HEADS * SIZE, seed=4)
    model = g.finish(g.attend(normed(g, q, seed=11), normed(g, k, seed=12), v))
    left = unchanged(qk_norm.run, model, 1)
    assert (left["MatMul"], left["Slice"]) == (1, 0)


def test_the_norm_is_what_both_were():
    g = Graph()
    q, k, v = g.sides()
    model = g.finish(g.attend(normed(g, q, seed=11, epsilon=0.3), normed(g, k, seed=12, epsilon=0.3), v))
    unchanged(qk_norm.run, model, 1)


def test_what_was_replaced_is_gone_at_once():
    """Passes behind this one ask who reads a value; a dead reader would be one."""
    g, q, k, v = decoder()
    model = g.finish(g.attend(q, k, v))
    qk_norm.run(model)
    left = operators(model)
    assert (left["MatMul"], left["SimplifiedLayerNormalization"], left["Reshape"]) == (1, 1, 2)


def test_half_width_leaves_the_norms_apart():
    """It is for a GPU, whose kernel is not known to take a weight by head."""
    for narrow, fired in ((False, 1), (True, None)):
        g, q, k, v = decoder()
        assert pipeline.run(g.finish(g.attend(q, k, v)), narrow=narrow).get("qk_norm") == fired


def other_epsilon():
    g, q, k, v = decoder(epsilon=1e-2)
    return g, g.attend(q, k, v)


def keys_as_they_are():
    g = Graph()
    q, k, v = g.sides()
    return g, g.attend(normed(g, q, seed=11), k, v)


def norm_read_elsewhere():
    g, q, k, v = decoder()
    return g, g.op("Add", g.attend(q, k, v), g.op("ReduceSum", k, np.array([2]), keepdims=1))


def over_more_than_a_head():
    g = Graph()
    q, k, v = g.sides()
    wide = g.op("Reshape", k, np.array([0, 0, -1, KV_HEADS * SIZE]))
    gain = 1 + weights(KV_HEADS * SIZE, seed=12)
    k = g.rows(g.op("SimplifiedLayerNormalization", wide, gain, axis=-1, epsilon=1e-6, stash_type=1))
    return g, g.attend(normed(g, q, seed=11), k, v)


def over_all_heads():
    g = Graph()
    q, k, v = g.sides()
    return g, g.attend(normed(g, q, seed=11, axis=2), normed(g, k, seed=12, axis=2), v)


def by_a_weight_that_is_no_vector():
    g = Graph()
    q, k, v = g.sides()

    def norm(value, seed):
        gain = 1 + weights(1, SIZE, seed=seed)
        settings = {"axis": -1, "epsilon": 1e-6, "stash_type": 1}
        return g.rows(g.op("SimplifiedLayerNormalization", g.split(value), gain, **settings))

    return g, g.attend(norm(q, 11), norm(k, 12), v)


def deviation_read_too():
    g = Graph()
    q, k, v = g.sides()
    gain = g.held(1 + weights(SIZE, seed=12))
    settings = {"axis": -1, "epsilon": 1e-6, "stash_type": 1}
    norm, deviation = g.emit.multi("SimplifiedLayerNormalization", g.split(k), gain, outputs=2, **settings)
    y = g.attend(normed(g, q, seed=11), g.rows(norm), v)
    return g, g.op("Add", y, g.op("ReduceSum", g.op("Squeeze", deviation, np.array([3])), np.array([2]), keepdims=1))


def product_read_elsewhere():
    g = Graph()
    q, k, v = g.sides()
    y = g.attend(normed(g, q, seed=11), normed(g, k, seed=12), v)
    return g, g.op("Add", y, g.op("ReduceSum", k, np.array([2]), keepdims=1))


def values_are_no_product():
    g, q, k, v = decoder()
    return g, g.attend(q, k, g.op("Neg", v))


def of_another_value():
    g, q, k, _ = decoder()
    v = g.dense(KV_HEADS * SIZE, seed=5, x=g.op("Neg", g.x))
    return g, g.attend(q, k, v)


@pytest.mark.parametrize(
    "make",
    [
        other_epsilon, keys_as_they_are, norm_read_elsewhere, over_more_than_a_head, over_all_heads,
        by_a_weight_that_is_no_vector, deviation_read_too, product_read_elsewhere, values_are_no_product,
        of_another_value,
    ],
)  # fmt: skip
def test_what_is_left_alone(make):
    g, value = make()
    model = g.finish(value)
    dead_nodes.run(model)
    before = [n.op_type for n in model.graph]
    unchanged(qk_norm.run, model, 0)
    assert [n.op_type for n in model.graph] == before
    assert len(attentions(model)) == 1
