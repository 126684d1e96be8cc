"""Activations as people spell them: one operator each, with the same numbers."""

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from small_graph import DIM, Graph, unchanged, weights

from tfinfer.export.passes import activations, bias_gelu

ROOT = math.sqrt(2 / math.pi)


# -- x * sigmoid(x) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("alpha", [None, 1.702])
def test_a_product_with_the_own_sigmoid_is_one_operator(order, alpha):
    g = Graph()
    x = g.rows("x")
    gate = g.Sigmoid(x if alpha is None else g.Mul(x, alpha))
    model = g.model(g.Mul(*(x, gate)[::order]))
    assert unchanged(activations.run, model, 1, g.feeds) == {"QuickGelu": 1}
    assert next(iter(model.graph)).attributes["alpha"].as_float() == pytest.approx(alpha or 1)


def sigmoid_of_another(g, x):
    return [g.Mul(x, g.Sigmoid(g.rows("z")))]


def gate_is_read(g, x):
    gate = g.Sigmoid(x)
    return [g.Mul(x, gate), g.Neg(gate)]


def gate_is_an_output(g, x):
    gate = g.Sigmoid(x)
    return [g.Mul(x, gate), gate]


def squared_gate(g, x):
    gate = g.Sigmoid(x)
    return [g.Mul(gate, gate)]


def alphas(g, x):
    return [g.Mul(x, g.Sigmoid(g.Mul(x, weights(DIM))))]


@pytest.mark.parametrize("make", [sigmoid_of_another, gate_is_read, gate_is_an_output, squared_gate, alphas])
def test_other_gates_stay(make):
    g = Graph()
    assert unchanged(activations.run, g.model(*make(g, g.rows("x"))), 0, g.feeds)["Sigmoid"] == 1


# -- 0.5 x (1 + f(x)) -----------------------------------------------------------------------------------------------
INSIDE = {
    "erf": lambda g, x: g.Erf(g.Div(x, math.sqrt(2))),
    "erf by a factor": lambda g, x: g.Erf(g.Mul(x, math.sqrt(0.5))),
    "tanh of a power": lambda g, x: g.Tanh(g.Mul(ROOT, g.Add(x, g.Mul(0.044715, g.Pow(x, 3.0))))),
    "tanh of products": lambda g, x: g.Tanh(g.Mul(g.Add(x, g.Mul(g.Mul(g.Mul(0.044715, x), x), x)), ROOT)),
    "tanh factored out": lambda g, x: g.Tanh(g.Mul(g.Mul(x, 0.7978845608), g.Add(1.0, g.Mul(g.Mul(0.044715, x), x)))),
}
OUTSIDE = {
    "half of x": lambda g, x, f: g.Mul(g.Mul(0.5, x), g.Add(1.0, f)),
    "x by two": lambda g, x, f: g.Mul(g.Div(x, 2.0), g.Add(f, 1.0)),
    "half of the rest": lambda g, x, f: g.Mul(x, g.Mul(g.Add(f, 1.0), 0.5)),
    "half at last": lambda g, x, f: g.Mul(g.Mul(x, g.Add(f, 1.0)), 0.5),
    "by two at last": lambda g, x, f: g.Div(g.Mul(g.Add(f, 1.0), x), 2.0),
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("inside", INSIDE)
def test_every_spelling_of_gelu_is_one_operator(inside, outside):
    g = Graph()
    x = g.Neg(g.rows("x"))
    model = g.model(g.Neg(OUTSIDE[outside](g, x, INSIDE[inside](g, x))))
    assert unchanged(activations.run_standard, model, 1, g.feeds) == {"Neg": 2, "Gelu": 1}
    (node,) = (n for n in model.graph if n.op_type == "Gelu")
    assert node.attributes["approximate"].as_string() == ("none" if inside.startswith("erf") else "tanh")


def other_factor(g, x):
    return [g.Mul(g.Mul(0.4, x), g.Add(1.0, g.Erf(g.Div(x, math.sqrt(2)))))]


def other_inside(g, x):
    return [g.Mul(g.Mul(0.5, x), g.Add(1.0, g.Erf(x)))]


def other_x(g, x):
    return [g.Mul(g.Mul(0.5, g.rows("z")), g.Add(1.0, g.Erf(g.Div(x, math.sqrt(2)))))]


def other_cube(g, x):
    return [g.Mul(g.Mul(0.5, x), g.Add(1.0, g.Tanh(g.Mul(ROOT, g.Add(x, g.Mul(0.05, g.Pow(x, 3.0)))))))]


def inner_is_read(g, x):
    inner = g.Erf(g.Div(x, math.sqrt(2)))
    return [g.Mul(g.Mul(0.5, x), g.Add(1.0, inner)), g.Neg(inner)]


def half_is_an_output(g, x):
    half = g.Mul(0.5, x)
    return [g.Mul(half, g.Add(1.0, g.Erf(g.Div(x, math.sqrt(2))))), half]


@pytest.mark.parametrize("make", [other_factor, other_inside, other_x, other_cube, inner_is_read, half_is_an_output])
def test_what_only_looks_like_gelu_stays(make):
    g = Graph()
    assert unchanged(activations.run, g.model(*make(g, g.rows("x"))), 0, g.feeds)["Gelu"] == 0


def test_an_old_opset_has_no_gelu():
    g = Graph()
    x = g.rows("x")
    model = g.model(OUTSIDE["half of x"](g, x, INSIDE["erf"](g, x)), opset=18)
    assert unchanged(activations.run_standard, model, 0, g.feeds)["Erf"] == 1


# -- a bias before it -----------------------------------------------------------------------------------------------
TAKING = [("tanh", activations.run, "FastGelu"), ("none", bias_gelu.run, "BiasGelu")]


@pytest.mark.parametrize("approximate, apply, operator", TAKING)
@pytest.mark.parametrize("order", [1, -1])
def test_a_bias_goes_into_the_operator(approximate, apply, operator, order):
    g = Graph()
    model = g.model(g.Gelu(g.Add(*(g.rows("x"), weights(DIM))[::order]), approximate=approximate))
    assert unchanged(apply, model, 1, g.feeds) == {operator: 1}


@pytest.mark.parametrize("approximate, apply, operator", TAKING)
@pytest.mark.parametrize("bias", [weights(3, DIM), weights(1), None])
def test_other_additions_stay(approximate, apply, operator, bias):
    g = Graph()
    total = g.Add(g.rows("x"), g.rows("z") if bias is None else bias)
    assert unchanged(apply, g.model(g.Gelu(total, approximate=approximate)), 0, g.feeds) == {"Add": 1, "Gelu": 1}


@pytest.mark.parametrize("approximate, apply, operator", TAKING)
def test_a_sum_that_is_read_elsewhere_stays(approximate, apply, operator):
    g = Graph()
    total = g.Add(g.rows("x"), weights(DIM))
    model = g.model(g.Mul(total, g.Gelu(total, approximate=approximate)))
    assert unchanged(apply, model, 0, g.feeds)["Gelu"] == 1


def test_each_kind_of_gelu_has_its_own_operator():
    g = Graph()
    model = g.model(g.Gelu(g.Add(g.rows("x"), weights(DIM)), approximate="tanh"))
    assert unchanged(bias_gelu.run, model, 0, g.feeds)["Gelu"] == 1
