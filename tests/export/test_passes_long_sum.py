"""A bias and a residual are added by one Sum: which sums, and who else may read them."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from small_graph import DIM, Graph, unchanged, weights

from tfinfer.export.passes import long_sum


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bias_first", [False, True])
def test_a_bias_and_a_residual_are_one_sum(first, bias_first):
    g = Graph()
    x, bias = g.Neg(g.rows("x")), weights(DIM)
    branch = g.Add(bias, x) if bias_first else g.Add(x, bias)
    model = g.model(g.Add(branch, g.rows("z")) if first else g.Add(g.rows("z"), branch))
    assert unchanged(long_sum.run, model, 1, g.feeds) == {"Neg": 1, "Sum": 1}


def test_a_chain_of_blocks_is_joined_whole():
    g = Graph()
    x = g.rows("x")
    for i in range(3):
        x = g.Add(x, g.Add(g.MatMul(x, weights(DIM, DIM, seed=i, scale=0.3)), weights(DIM, seed=i)))
    assert unchanged(long_sum.run, g.model(x), 3, g.feeds) == {"MatMul": 3, "Sum": 3}


def biased_and_read(g):
    branch = g.Add(g.rows("x"), weights(DIM))
    return g.Mul(g.Add(g.rows("z"), branch), branch)


def of_another_shape(g):
    return g.Add(g.input("z", 1, 3, DIM, names=(1, "seq")), g.Add(g.rows("x"), weights(DIM)))


def of_one_number(g):
    return g.Add(g.rows("z"), g.Add(g.rows("x"), 1.0))


def constant(g):
    return g.Add(weights(2, 3, DIM), g.Add(g.input("x", 2, 3, DIM), weights(DIM)))


def difference(g):
    return g.Sub(g.rows("z"), g.Add(g.rows("x"), weights(DIM)))


@pytest.mark.parametrize("make", [biased_and_read, of_another_shape, of_one_number, constant, difference])
def test_other_sums_stay(make):
    g = Graph()
    assert unchanged(long_sum.run, g.model(make(g)), 0, g.feeds)["Sum"] == 0
