"""Rotary positions in front of attention are read by their values: what goes into the operator, what into a node."""

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from gqa_graph import HEADS, LONGEST, SIZE, Graph, attentions, operators, tables, unchanged  # noqa: E402

from tfinfer.export.passes import half, rotary  # noqa: E402


def turned(g, spell, *, dims=SIZE, size=SIZE, scale=1.0, **options):
    """One attention whose queries and keys are turned as `spell` writes it."""
    q, k, v = g.sides(size=size)
    cos, sin = tables(dims, scale=scale)
    q, k = (getattr(g, spell)(side, cos, sin, dims, size) for side in (q, k))
    return g.finish(g.attend(q, k, v, size=size, **options), HEADS * size)


def folded(model):
    return [node.attributes["do_rotary"].as_int() for node in attentions(model) if "do_rotary" in node.attributes]


@pytest.mark.parametrize("scale", [1.0, 1.3])  # as yarn scales them
@pytest.mark.parametrize(("spell", "interleaved"), [("halves", 0), ("pairs", 1)])
def test_a_rotation_goes_into_attention_however_it_is_written(spell, interleaved, scale):
    g = Graph()
    model = turned(g, spell, scale=scale)
    left = unchanged(rotary.run, model, 1)
    assert (left["MatMul"], left["Mul"], left["Slice"], left["Concat"], left["Gather"]) == (3, 0, 0, 0, 0)
    (node,) = attentions(model)
    assert (folded(model), node.attributes["rotary_interleaved"].as_int()) == ([1], interleaved)
    cos, sin = tables(SIZE, scale=scale)
    for value, table in zip(node.inputs[7:9], (cos, sin)):
        np.testing.assert_allclose(value.const_value.numpy(), table, atol=1e-6)
    assert len(node.inputs) == 9  # it derives the positions itself
    assert rotary.run(model) == 0


@pytest.mark.parametrize("spell", ["halves", "pairs"])
def test_a_head_may_turn_in_part(spell):
    model = turned(Graph(), spell, dims=16, size=32)
    assert unchanged(rotary.run, model, 1)["RotaryEmbedding"] == 0
    (node,) = attentions(model)
    assert node.inputs[7].const_value.shape == (LONGEST, 8)


def test_pairs_that_are_too_few_for_attention_get_others_that_stand_still():
    model = turned(Graph(), "pairs", dims=4)
    assert unchanged(rotary.run, model, 1)["RotaryEmbedding"] == 0
    (node,) = attentions(model)
    np.testing.assert_array_equal(node.inputs[7].const_value.numpy()[:, 2:], 1)
    np.testing.assert_array_equal(node.inputs[8].const_value.numpy()[:, 2:], 0)


@pytest.mark.parametrize(("dims", "size"), [(4, 16), (24, 24), (8, 8)])
def test_sizes_that_attention_does_not_turn_are_turned_by_one_node(dims, size):
    model = turned(Graph(), "halves", dims=dims, size=size)
    left = unchanged(rotary.run, model, 1)
    assert (left["RotaryEmbedding"], left["Slice"], left["Mul"]) == (2, 0, 0)
    assert folded(model) == []


def test_queries_and_keys_with_tables_of_their_own_are_turned_apart():
    g = Graph()
    q, k, v = g.sides()
    q, k = g.halves(q, *tables(SIZE)), g.halves(k, *tables(SIZE, theta=50.0))
    model = g.finish(g.attend(q, k, v))
    assert unchanged(rotary.run, model, 1)["RotaryEmbedding"] == 2
    assert folded(model) == []


def test_queries_alone_are_turned_by_a_node():
    g = Graph()
    q, k, v = g.sides()
    model = g.finish(g.attend(g.halves(q, *tables(SIZE)), k, v))
    assert unchanged(rotary.run, model, 1)["RotaryEmbedding"] == 1


def test_a_cache_with_a_window_may_forget_so_its_attention_is_given_the_positions():
    model = turned(Graph(), "halves", local_window_size=4)
    unchanged(rotary.run, model, 1)
    assert attentions(model)[0].inputs[9].name == "position_ids"


def test_layers_share_the_tables():
    g = Graph()
    total = None
    for layer in range(2):
        q, k, v = g.sides(seed=10 * layer)
        q, k = (g.halves(side, *tables(SIZE)) for side in (q, k))
        out = g.attend(q, k, v, layer=layer)
        total = out if total is None else g.op("Add", total, out)
    model = g.finish(total)
    unchanged(rotary.run, model, 2)
    assert len({node.inputs[i] for node in attentions(model) for i in (7, 8)}) == 2
    half.run(model, ir.DataType.FLOAT16)
    assert {v.dtype for node in attentions(model) for v in node.inputs[7:9]} == {ir.DataType.FLOAT16}


def keys_read_twice(g, q, k, v):
    q, k = (g.halves(side, *tables(SIZE)) for side in (q, k))
    return g.op("Add", g.attend(q, k, v), g.op("ReduceSum", k, np.array([2]), keepdims=1))


def stretched(g, q, k, v):
    """Features 0 to 7 grow as others turn: their lengths change."""
    cos, sin = tables(SIZE)
    q, k = (g.halves(side, cos, np.abs(sin)) for side in (q, k))
    grown = [g.rows(g.op("Mul", g.split(side), g.at_positions(np.concatenate([cos, sin], -1)))) for side in (q, k)]
    return g.attend(*grown, v)


def bent(g, q, k, v):
    q, k = (g.op("Tanh", g.halves(side, *tables(SIZE))) for side in (q, k))
    return g.attend(q, k, v)


def moved(g, q, k, v):
    """Positions added, not turned."""
    q, k = (g.rows(g.op("Add", g.split(side), g.at_positions(np.tile(tables(SIZE)[0], 2)))) for side in (q, k))
    return g.attend(q, k, v)


def plain(g, q, k, v):
    return g.attend(q, k, v)


@pytest.mark.parametrize("make", [stretched, bent, moved, plain])
def test_what_is_no_rotation_stays(make):
    g = Graph()
    model = g.finish(make(g, *g.sides()))
    before = operators(model)
    assert unchanged(rotary.run, model, 0) == before


def test_keys_that_something_else_reads_are_turned_as_before():
    g = Graph()
    model = g.finish(keys_read_twice(g, *g.sides()))
    assert unchanged(rotary.run, model, 1)["RotaryEmbedding"] == 1  # the queries
    assert folded(model) == []
