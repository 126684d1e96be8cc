"""A bias goes into the product of few bits before it: which readers give theirs, and in which graphs it stays."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from small_graph import Graph, unchanged, weights

from tfinfer.export.passes import long_sum, quantise, small_bias
from tfinfer.export.passes.blocks import quantised

WIDTH = 32


def product(g, x, seed=0, symmetric=True, n=WIDTH):
    blocks = quantised(weights(WIDTH, n, seed=seed, scale=0.1), 8, 32, symmetric=symmetric)
    operands = [blocks.data, blocks.scales, *([] if blocks.zeros is None else [blocks.zeros])]
    sizes = {"K": blocks.k, "N": n, "bits": 8, "block_size": 32}
    return g.emit.op("MatMulNBits", x, *(g.emit.constant(o) for o in operands), domain="com.microsoft", **sizes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias_first", [True, False])
def test_the_bias_of_an_add_goes_in(symmetric, bias_first):
    g = Graph()
    y, bias = product(g, g.rows("x", WIDTH), symmetric=symmetric), weights(WIDTH, seed=1)
    model = g.model(g.Add(bias, y) if bias_first else g.Add(y, bias))
    assert unchanged(small_bias.run, model, 1, g.feeds) == {"MatMulNBits": 1}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_bias_of_a_sum_goes_in_and_an_add_stays(order):
    g = Graph()
    operands = [product(g, g.rows("x", WIDTH)), g.rows("z", WIDTH), g.value(weights(WIDTH, seed=1))]
    model = g.model(g.Neg(g.Sum(*(operands[i] for i in order))))
    assert unchanged(small_bias.run, model, 1, g.feeds) == {"MatMulNBits": 1, "Add": 1, "Neg": 1}


def test_a_sum_of_two_products_gives_each_a_bias():
    g = Graph()
    x = g.rows("x", WIDTH)
    total = g.Sum(product(g, x), weights(WIDTH, seed=1), product(g, x, 1), weights(WIDTH, seed=2))
    assert unchanged(small_bias.run, g.model(total), 2, g.feeds) == {"MatMulNBits": 2, "Add": 1}


def read_twice(g, y):
    return g.Mul(g.Add(y, weights(WIDTH)), y)


def of_rows(g, y):
    return g.Add(y, g.rows("z", WIDTH))


def of_one_number(g, y):
    return g.Add(y, 1.0)


def taken_off(g, y):
    return g.Sub(y, weights(WIDTH))


def of_two(g, y):
    return g.Sum(y, g.rows("z", WIDTH))


def of_itself_twice(g, y):
    return g.Sum(y, y, weights(WIDTH))


@pytest.mark.parametrize("make", [of_itself_twice, read_twice, of_rows, of_one_number, taken_off, of_two])
def test_other_readers_keep_what_they_add(make):
    g = Graph()
    before = make(g, product(g, g.rows("x", WIDTH)))
    assert unchanged(small_bias.run, g.model(before), 0, g.feeds)["MatMulNBits"] == 1


def test_a_product_that_has_a_bias_takes_no_other():
    g = Graph()
    y = g.Add(g.Add(product(g, g.rows("x", WIDTH)), weights(WIDTH, seed=1)), weights(WIDTH, seed=2))
    model = g.model(y)
    assert unchanged(small_bias.run, model, 1, g.feeds) == {"MatMulNBits": 1, "Add": 1}
    assert small_bias.run(model) == 0


def test_a_block_with_biases_and_a_residual_has_none_left_once_it_is_quantised():
    g = Graph()
    x = g.rows("x", WIDTH)
    up = g.Relu(g.Add(g.MatMul(x, weights(WIDTH, 64, seed=1, scale=0.1)), weights(64, seed=2)))
    y = g.Add(x, g.Add(g.MatMul(up, weights(64, WIDTH, seed=3, scale=0.1)), weights(WIDTH, seed=4)))
    model = g.model(y)
    assert long_sum.run(model) == 1
    assert quantise.run(model, quantise.Recipe(8, 8, 32)) == 2
    assert Counter(node.op_type for node in model.graph) == {"MatMulNBits": 2, "Relu": 1, "Add": 1}
    biases = [node.inputs[5].const_value.numpy() for node in model.graph if node.op_type == "MatMulNBits"]
    np.testing.assert_array_equal(biases[0], weights(64, seed=2))
    np.testing.assert_array_equal(biases[1], weights(WIDTH, seed=4))
