"""What is computed twice is computed once, what changes nothing goes, and outputs keep their names."""

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from small_graph import DIM, FLOAT, Graph, unchanged, weights  # noqa: E402

from tfinfer.export.passes import common, needless  # noqa: E402


def forget(g):
    """What is emitted from here on is made anew; an emitter makes equal nodes once by itself."""
    g.emit._made.clear()
    g.emit._constants.clear()


def twice(g, make):
    first = make()
    forget(g)
    return first, make()


# -- equal nodes and constants --------------------------------------------------------------------------------------
def test_equal_nodes_become_one_and_those_that_read_them_too():
    g = Graph()
    x = g.rows("x")
    model = g.model(g.Add(*twice(g, lambda: g.Softmax(g.Tanh(x), axis=-1))))
    assert unchanged(common.run, model, 2, g.feeds) == {"Tanh": 1, "Softmax": 1, "Add": 1}
    assert common.run(model) == 0


def test_equal_small_constants_become_one_and_what_reads_them_is_equal_then():
    g = Graph()
    x = g.rows("x")
    model = g.model(g.Add(*twice(g, lambda: g.Mul(x, 2.0))))
    assert unchanged(common.run, model, 2, g.feeds) == {"Mul": 1, "Add": 1}
    assert len(model.graph.initializers) == 1


def test_the_second_may_be_an_output_and_keeps_its_name():
    g = Graph()
    x = g.rows("x")
    first, second = twice(g, lambda: g.Tanh(x))
    assert unchanged(common.run, g.model(g.Neg(first), second), 1, g.feeds) == {"Tanh": 1, "Neg": 1}


def test_two_outputs_stay_two():
    g = Graph()
    x = g.rows("x")
    assert unchanged(common.run, g.model(*twice(g, lambda: g.Tanh(x))), 0, g.feeds) == {"Tanh": 2}


def test_all_outputs_of_a_node_are_taken_over():
    g = Graph()
    x = g.rows("x")
    first, second = twice(g, lambda: g.emit.multi("Split", x, outputs=2, axis=-1, num_outputs=2))
    model = g.model(g.Mul(first[0], second[1]))
    assert unchanged(common.run, model, 1, g.feeds) == {"Split": 1, "Mul": 1}


def other_attribute(g, x):
    return [g.Softmax(x, axis=-1), g.Softmax(x, axis=1)]


def other_order(g, x):
    z = g.rows("z")
    return [g.Sub(x, z), g.Sub(z, x)]


def other_numbers(g, x):
    return [g.Mul(x, 2.0), g.Mul(x, 3.0)]


def other_shape(g, x):
    return [g.Mul(x, 2.0), g.Mul(x, np.full((1, 1, 1, 1), 2.0))]


@pytest.mark.parametrize("make", [other_attribute, other_order, other_numbers, other_shape])
def test_what_differs_stays(make):
    g = Graph()
    unchanged(common.run, g.model(*(g.Neg(value) for value in make(g, g.rows("x")))), 0, g.feeds)


def test_zeros_of_different_signs_stay_two():
    g = Graph()
    infinities = [g.Reciprocal(g.Mul(g.Abs(g.rows("x")), zero)) for zero in (0.0, -0.0)]
    assert unchanged(common.run, g.model(*infinities), 0, g.feeds)["Mul"] == 2


def test_equal_weights_keep_their_names():
    g = Graph()
    x = g.rows("x", 32)
    model = g.model(g.Add(*twice(g, lambda: g.Mul(x, weights(32)))))
    assert unchanged(common.run, model, 0, g.feeds) == {"Mul": 2, "Add": 1}
    assert len(model.graph.initializers) == 2


def test_random_numbers_are_drawn_as_often_as_before():
    g = Graph()
    x = g.rows("x")
    model = g.model(g.Sub(*twice(g, lambda: g.RandomNormalLike(x))))
    assert common.run(model) == 0


# -- what changes nothing -------------------------------------------------------------------------------------------
def test_casts_to_the_type_that_is_there_go_and_others_stay():
    g = Graph()
    whole = g.Cast(g.Cast(g.rows("x"), to=int(FLOAT)), to=int(ir.DataType.INT64))
    again = g.Cast(g.Neg(whole), to=int(ir.DataType.INT64))
    model = g.model(g.Neg(g.Cast(again, to=int(FLOAT))))
    assert unchanged(needless.run, model, 2, g.feeds) == {"Cast": 2, "Neg": 2}


def test_the_last_of_two_reshapes_does_both():
    g = Graph()
    parted = g.Reshape(g.Tanh(g.rows("x")), np.array([0, 0, 4, 4]))
    model = g.model(g.Neg(g.Reshape(parted, np.array([0, -1, 8]))))
    assert unchanged(needless.run, model, 1, g.feeds) == {"Tanh": 1, "Reshape": 1, "Neg": 1}


def test_reshapes_that_cancel_go_both():
    g = Graph()
    parted = g.Reshape(g.Tanh(g.rows("x")), np.array([0, 0, 4, -1]))
    model = g.model(g.Neg(g.Reshape(parted, np.array([0, 0, DIM]))))
    assert unchanged(needless.run, model, 2, g.feeds) == {"Tanh": 1, "Neg": 1}


def test_a_zero_that_means_another_size_keeps_both_reshapes():
    g = Graph()
    moved = g.Reshape(g.Tanh(g.rows("x")), np.array([-1, DIM]))
    model = g.model(g.Neg(g.Reshape(moved, np.array([0, 4, 4]))))
    assert unchanged(needless.run, model, 0, g.feeds)["Reshape"] == 2


def test_a_reshape_that_somebody_else_reads_stays():
    g = Graph()
    parted = g.Reshape(g.Tanh(g.rows("x")), np.array([0, 0, 4, 4]))
    model = g.model(g.Neg(g.Reshape(parted, np.array([0, -1, 8]))), g.Exp(parted))
    assert unchanged(needless.run, model, 0, g.feeds)["Reshape"] == 2


@pytest.mark.parametrize("second, fired, left", [([0, 2, 1, 3], 2, 0), ([0, 2, 3, 1], 1, 1)])
def test_transposes_in_a_row_are_one_or_none(second, fired, left):
    g = Graph()
    x = g.Transpose(g.Tanh(g.input("x", 2, 3, 4, 5)), perm=[0, 2, 1, 3])
    model = g.model(g.Neg(g.Transpose(x, perm=second)))
    assert unchanged(needless.run, model, fired, g.feeds)["Transpose"] == left


def test_a_product_with_one_goes_unless_it_widens():
    g = Graph()
    x = g.Mul(g.Tanh(g.rows("x")), 1.0)
    model = g.model(g.Neg(g.Div(g.Mul(x, np.ones((1, 1, 1, 1), np.float32)), 1.0)))
    assert unchanged(needless.run, model, 2, g.feeds)["Mul"] == 1


def test_identities_go_unless_they_make_an_output():
    g = Graph()
    x = g.emit.copied(g.rows("x"))
    model = g.model(g.emit.copied(g.Tanh(x)), g.emit.copied(x))
    assert unchanged(needless.run, model, 1, g.feeds) == {"Tanh": 1, "Identity": 2}
