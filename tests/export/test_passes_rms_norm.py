"""Spelled-out norms: every spelling becomes one node with the same numbers, what only looks like one stays."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from small_graph import DIM, Graph, unchanged, weights

from tfinfer.export.passes import rms_norm

LAST = np.array([-1])
SQUARES = {"product": lambda g, x: g.Mul(x, x), "power": lambda g, x: g.Pow(x, 2.0)}
DIVISIONS = {
    "reciprocal": lambda g, x, s: g.Mul(x, g.Reciprocal(g.Sqrt(s))),
    "reciprocal first": lambda g, x, s: g.Mul(g.Reciprocal(g.Sqrt(s)), x),
    "one over": lambda g, x, s: g.Mul(x, g.Div(1.0, g.Sqrt(s))),
    "division": lambda g, x, s: g.Div(x, g.Sqrt(s)),
    "power": lambda g, x, s: g.Mul(x, g.Pow(s, -0.5)),
    "division by power": lambda g, x, s: g.Div(x, g.Pow(s, 0.5)),
}


def norm(g, x, square="product", division="division", axes=LAST, epsilon=1e-3):
    mean = g.ReduceMean(SQUARES[square](g, x), axes, keepdims=1)
    return DIVISIONS[division](g, x, g.Add(mean, epsilon))


def centred(g, x):
    return g.Sub(x, g.ReduceMean(x, LAST, keepdims=1))


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_spelling_becomes_one_node(square, division):
    g = Graph()
    model = g.model(g.Mul(norm(g, g.rows("x"), square, division), weights(DIM)))
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"SimplifiedLayerNormalization": 1}
    assert rms_norm.run(model) == 0


def test_the_weight_may_stand_first_and_the_axis_may_be_counted_from_the_front():
    g = Graph()
    model = g.model(g.Mul(weights(DIM), norm(g, g.rows("x"), axes=np.array([2]))))
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"SimplifiedLayerNormalization": 1}


def test_the_epsilon_may_stand_first():
    g = Graph()
    x = g.rows("x")
    mean = g.ReduceMean(g.Mul(x, x), LAST, keepdims=1)
    model = g.model(g.Div(x, g.Sqrt(g.Add(0.5, mean))))
    assert unchanged(rms_norm.run, model, 1, g.feeds)["SimplifiedLayerNormalization"] == 1


def test_a_norm_without_a_weight_gets_one_of_ones_that_all_share():
    g = Graph()
    model = g.model(norm(g, norm(g, g.rows("x"))))
    assert unchanged(rms_norm.run, model, 2, g.feeds) == {"SimplifiedLayerNormalization": 2}
    assert list(model.graph.initializers) == [f"ones.{DIM}"]


def test_a_vector_that_two_read_keeps_both_weights():
    g = Graph()
    normed = norm(g, g.rows("x"))
    model = g.model(g.Mul(normed, weights(DIM)), g.Mul(normed, weights(DIM, seed=1)))
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"SimplifiedLayerNormalization": 1, "Mul": 2}


@pytest.mark.parametrize("before", [False, True])
def test_heads_are_normalised_each_by_itself_squared_before_or_after_they_are_parted(before):
    g = Graph()
    x, parted = g.rows("x"), np.array([0, 0, 4, 4])
    heads = g.Reshape(x, parted)
    squares = g.Reshape(g.Mul(x, x), parted) if before else g.Mul(heads, heads)
    mean = g.ReduceMean(squares, np.array([3]), keepdims=1)
    normed = g.Mul(g.Div(heads, g.Sqrt(g.Add(mean, 1e-6))), weights(4))
    model = g.model(g.Reshape(normed, np.array([0, 0, DIM])))
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"Reshape": 2, "SimplifiedLayerNormalization": 1}


@pytest.mark.parametrize("bias", [False, True])
def test_of_a_difference_to_the_mean_it_is_a_layer_norm(bias):
    g = Graph()
    normed = g.Mul(norm(g, centred(g, g.rows("x"))), weights(DIM))
    model = g.model(g.Add(normed, weights(DIM, seed=1)) if bias else normed)
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"LayerNormalization": 1}


def test_a_difference_that_somebody_reads_stays():
    g = Graph()
    away = centred(g, g.rows("x"))
    left = unchanged(rms_norm.run, g.model(norm(g, away), away), 1, g.feeds)
    assert left == {"ReduceMean": 1, "Sub": 1, "SimplifiedLayerNormalization": 1}


# -- what is none ---------------------------------------------------------------------------------------------------
def other_axis(g, x):
    return [norm(g, x, axes=np.array([1]))]


def two_axes(g, x):
    return [norm(g, x, axes=np.array([1, 2]))]


def moving_epsilon(g, x):
    return [norm(g, x, epsilon=g.Abs(g.input("e", 1)))]


def epsilons(g, x):
    return [norm(g, x, epsilon=np.abs(weights(3, 1)))]


def squares_of_another(g, x):
    mean = g.ReduceMean(g.Mul(g.rows("z"), x), LAST, keepdims=1)
    return [g.Div(x, g.Sqrt(g.Add(g.Abs(mean), 1.0)))]


def scales_another(g, x):
    mean = g.ReduceMean(g.Mul(x, x), LAST, keepdims=1)
    return [g.Div(g.rows("z"), g.Sqrt(g.Add(mean, 1.0)))]


def mean_is_read(g, x):
    mean = g.ReduceMean(g.Mul(x, x), LAST, keepdims=1)
    return [g.Div(x, g.Sqrt(g.Add(mean, 1.0))), g.Neg(mean)]


def root_is_an_output(g, x):
    root = g.Sqrt(g.Add(g.ReduceMean(g.Mul(x, x), LAST, keepdims=1), 1.0))
    return [g.Div(x, root), root]


def another_power(g, x):
    return [g.Div(x, g.Sqrt(g.Add(g.ReduceMean(g.Pow(x, 4.0), LAST, keepdims=1), 1.0)))]


@pytest.mark.parametrize(
    "make",
    [other_axis, two_axes, moving_epsilon, epsilons, squares_of_another, scales_another, mean_is_read,
     root_is_an_output, another_power],
)  # fmt: skip
def test_what_only_looks_like_a_norm_stays(make):
    g = Graph()
    model = g.model(*make(g, g.rows("x")))
    left = unchanged(rms_norm.run, model, 0, g.feeds)
    assert not {name for name in left if name.endswith("Normalization")}


def test_where_the_width_is_not_known_nothing_fires():
    g = Graph()
    x = g.input("x", 2, 3, 5, names=("batch", "seq", "width"))
    assert unchanged(rms_norm.run, g.model(norm(g, x)), 0, g.feeds)["ReduceMean"] == 1


def test_a_weight_with_more_than_the_vectors_axis_stays_outside():
    g = Graph()
    model = g.model(g.Mul(norm(g, g.rows("x")), weights(3, DIM)))
    assert unchanged(rms_norm.run, model, 1, g.feeds) == {"SimplifiedLayerNormalization": 1, "Mul": 1}


# -- with ONNX operators alone --------------------------------------------------------------------------------------
@pytest.mark.parametrize("opset, left", [(23, "RMSNormalization"), (21, "ReduceMean")])
def test_onnx_has_the_operator_from_opset_23_on(opset, left):
    g = Graph()
    model = g.model(norm(g, g.rows("x")), opset=opset)
    assert unchanged(rms_norm.run_standard, model, int(opset == 23), g.feeds)[left] == 1


def test_layer_norm_is_an_onnx_operator():
    g = Graph()
    model = g.model(norm(g, centred(g, g.rows("x"))))
    assert unchanged(rms_norm.run_standard, model, 1, g.feeds) == {"LayerNormalization": 1}
