"""The cut of the wanted rows moves up as far as rows are computed one by one, and no further."""

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from small_graph import DIM, Graph, run, unchanged, weights  # noqa: E402

from tfinfer.export.passes import wanted_rows  # noqa: E402

INT64 = ir.DataType.INT64


def cut(g, x, axis=1, name="logits_to_keep"):
    g.feeds[name] = np.array([2])
    start = g.Neg(g.emit.input(name, INT64, (1,)))
    return g.Slice(x, start, np.array([2**62]), np.array([axis]))


def dense(g, x, *shape, seed=0):
    return g.MatMul(x, weights(*shape, seed=seed, scale=0.3))


def cuts(model):
    """What is cut, by name."""
    return {node.inputs[0].name for node in model.graph if node.op_type in ("Slice", "Gather")}


def test_a_last_block_is_computed_for_the_wanted_rows_alone():
    g = Graph()
    attended, x = g.rows("attended"), g.rows("x")
    x = g.Add(x, g.Add(dense(g, attended, DIM, DIM), weights(DIM)))
    normed = g.LayerNormalization(x, weights(DIM), weights(DIM), axis=-1)
    gate, up = g.emit.multi("Split", dense(g, normed, DIM, 8), outputs=2, axis=-1, num_outputs=2)
    wide = g.Mul(g.Mul(gate, g.Sigmoid(gate)), up)
    x = g.Add(x, dense(g, wide, 4, DIM))
    mean = g.ReduceMean(g.Mul(x, x), np.array([-1]), keepdims=1)
    model = g.model(dense(g, cut(g, g.Div(x, g.Sqrt(g.Add(mean, 1e-6)))), DIM, 5))
    assert unchanged(wanted_rows.run, model, 1, g.feeds)["Slice"] == 2
    assert cuts(model) == {"attended", "x"}
    assert wanted_rows.run(model) == 0


@pytest.mark.parametrize("keep", [1, 2, 3, 2**31 - 1])
def test_any_number_of_rows_may_be_wanted(keep):
    g = Graph()
    model = g.model(g.Softmax(cut(g, g.Add(dense(g, g.rows("x"), DIM, 5), weights(5))), axis=-1))
    g.feeds["logits_to_keep"] = np.array([keep])
    assert unchanged(wanted_rows.run, model, 1, g.feeds)["Slice"] == 1
    assert cuts(model) == {"x"}
    assert run(model, g.feeds)[0].shape == (2, min(keep, 3), 5)


def test_rows_that_are_always_the_same_are_picked_as_early():
    g = Graph()
    model = g.model(g.Gather(g.Tanh(dense(g, g.rows("x"), DIM, 5)), np.array([-1]), axis=1))
    assert unchanged(wanted_rows.run, model, 1, g.feeds) == {"Gather": 1, "MatMul": 1, "Tanh": 1}
    assert cuts(model) == {"x"}


def test_the_cut_may_be_an_output():
    g = Graph()
    model = g.model(cut(g, g.Tanh(g.rows("x"))))
    assert unchanged(wanted_rows.run, model, 1, g.feeds) == {"Neg": 1, "Slice": 1, "Tanh": 1}


def test_what_is_equal_for_all_rows_is_not_cut():
    g = Graph()
    x = g.Add(g.Mul(g.rows("x"), g.input("one", 2, 1, DIM, names=("batch",))), g.input("vector", DIM))
    assert unchanged(wanted_rows.run, g.model(cut(g, x)), 1, g.feeds)["Slice"] == 1


def test_another_reader_of_a_value_stops_the_cut_there():
    g = Graph()
    inner = g.Tanh(g.rows("x"))
    model = g.model(cut(g, g.Neg(inner)), inner)
    assert unchanged(wanted_rows.run, model, 1, g.feeds)["Slice"] == 1
    assert cuts(model) == {"y1"}


# -- what stays -----------------------------------------------------------------------------------------------------
def rows_together(g, x):
    return g.Softmax(x, axis=1)


def over_rows(g, x):
    return g.CumSum(x, np.array(1))


def product_of_two(g, x):
    return g.MatMul(x, g.input("z", 2, DIM, 4, names=("batch",)))


def rows_moved(g, x):
    return g.Transpose(x, perm=[1, 0, 2])


def rows_along_another_axis(g, x):
    return g.Add(x, g.input("z", 3, DIM, names=("seq",)))


def reduced(g, x):
    return g.ReduceMax(x, np.array([0]), keepdims=1)


def unknown(g, x):
    return g.Einsum(x, equation="abc->abc")


def output(g, x):
    inner = g.Tanh(x)
    g.emit.output(inner, "inner", ir.DataType.FLOAT, ("batch", "seq", DIM))
    return inner


@pytest.mark.parametrize(
    "make", [rows_together, over_rows, product_of_two, rows_moved, rows_along_another_axis, reduced, unknown, output]
)
def test_the_cut_stays_behind_what_is_not_computed_row_by_row(make):
    g = Graph()
    value = make(g, g.rows("x"))
    assert unchanged(wanted_rows.run, g.model(cut(g, value)), 0, g.feeds)["Slice"] == 1


def test_the_features_are_no_rows():
    g = Graph()
    assert unchanged(wanted_rows.run, g.model(cut(g, g.Softmax(g.rows("x"), axis=-1), axis=2)), 0, g.feeds)


def test_a_cut_for_another_reason_stays():
    g = Graph()
    assert unchanged(wanted_rows.run, g.model(cut(g, g.Tanh(g.rows("x")), name="other")), 0, g.feeds)


def test_one_cut_does_not_become_many():
    g = Graph()
    total = g.rows("x0")
    for i in range(1, 6):
        total = g.Add(total, g.rows(f"x{i}"))
    assert unchanged(wanted_rows.run, g.model(cut(g, total)), 0, g.feeds)["Slice"] == 1
