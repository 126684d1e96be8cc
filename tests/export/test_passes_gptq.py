"""Rounding for inputs: less is lost of the products where inputs say something, and nothing more where they do not."""

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import Graph, weights

from tfinfer.export.calibration import rounding
from tfinfer.export.calibration.hessians import Inputs
from tfinfer.export.passes import quantise
from tfinfer.export.passes.blocks import quantised
from tfinfer.export.passes.gptq import rounded
from tfinfer.export.passes.quantise import Recipe, narrow

K, N = 96, 40


def correlated(rows, seed=0):
    """Inputs of a few directions with some noise, as those of a trained model are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, 12)) @ np.random.default_rng(9).normal(size=(12, K))
    return (mixed + 0.3 * rng.normal(size=(rows, K))).astype(np.float32)


def lost(blocks, matrix, inputs):
    """What of the products is lost, as a share of them."""
    return np.linalg.norm(inputs @ (blocks.dense() - matrix)) / np.linalg.norm(inputs @ matrix)


def by_gptq(matrix, inputs, bits=4, block_size=32, symmetric=True):
    x = torch.from_numpy(inputs)
    return rounded(matrix, x.T @ x, len(x), bits, block_size, symmetric=symmetric)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("block_size", "symmetric"), [(32, True), (64, False), (128, True)])
def test_products_of_correlated_inputs_lose_less_on_inputs_that_were_not_seen(bits, block_size, symmetric):
    """Blocks of 64 and 128 reach over the matrix's end."""
    matrix, unseen = weights(K, N), correlated(500, seed=1)
    nearest = quantised(matrix, bits, block_size, symmetric=symmetric)
    found = by_gptq(matrix, correlated(4000), bits, block_size, symmetric)
    assert found.data.shape == nearest.data.shape
    assert lost(found, matrix, unseen) < 0.75 * lost(nearest, matrix, unseen)


def by_the_book(matrix, hessian, damping, bits, block_size, symmetric):
    """Row after row, each time with the inverse of what is left: slow, and nothing of it is shared with the pass."""
    order = np.argsort(-hessian.diagonal(), kind="stable")
    damped = (hessian + damping * hessian.diagonal().mean() * np.eye(len(hessian)))[np.ix_(order, order)]
    inverses = [np.linalg.inv(damped[i:, i:]) for i in range(len(order))]
    importance = np.empty(len(order), np.float32)
    importance[order] = [1 / inverse[0, 0] for inverse in inverses]
    start = quantised(matrix, bits, block_size, symmetric=symmetric, importance=importance)
    left, found = matrix.astype(np.float64), np.empty(matrix.shape)
    for i, row in enumerate(order):
        scale, zero = start.scales[:, row // block_size], start.middles()[:, row // block_size]
        numbers = np.clip(np.rint(left[row] / scale) + zero, 0, 2**bits - 1)
        found[row] = (numbers - zero) * scale
        error = (left[row] - found[row]) / inverses[i][0, 0]
        left[order[i + 1 :]] -= inverses[i][0, 1:, None] * error
    return found


@pytest.mark.parametrize("count", [1000, 10**6])  # in the second, ever so little damping
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_it_is_what_the_paper_describes(bits, symmetric, count):
    """Of more rows than learn of their errors at once, in no order of their importance."""
    rng = np.random.default_rng(2)
    inputs = (rng.normal(size=(600, 30)) @ rng.normal(size=(30, 150)) + rng.normal(size=(600, 150))).astype(np.float32)
    inputs *= rng.uniform(0.2, 3, 150).astype(np.float32)
    matrix, hessian = weights(150, 8), inputs.T @ inputs
    found = rounded(matrix, torch.from_numpy(hessian), count, bits, 32, symmetric=symmetric).dense()
    expected = by_the_book(matrix, hessian.astype(np.float64), max(0.01, 150 / count), bits, 32, symmetric)
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-6).mean() > 0.99  # a tie may fall to either side


def test_of_white_inputs_each_number_is_rounded_to_the_nearest():
    matrix = weights(K, N)
    white = rounded(matrix, torch.eye(K), 1000, 4, 32)
    nearest = quantised(matrix, 4, 32)
    np.testing.assert_array_equal(white.data, nearest.data)
    np.testing.assert_array_equal(white.scales, nearest.scales)


@pytest.mark.parametrize("rows", [1, 8, 30, 100])
def test_few_inputs_do_no_harm(rows):
    matrix, unseen = weights(K, N), correlated(500, seed=1)
    loss = lost(by_gptq(matrix, correlated(rows)), matrix, unseen)
    assert loss < 1.03 * lost(quantised(matrix, 4, 32), matrix, unseen)


def test_an_input_that_never_comes_does_no_harm():
    matrix, inputs, unseen = weights(K, N), correlated(4000), correlated(500, seed=1)
    dead = [0, 5, 40, 95]
    inputs[:, dead] = unseen[:, dead] = 0
    found, nearest = by_gptq(matrix, inputs), quantised(matrix, 4, 32)
    assert lost(found, matrix, unseen) < 0.75 * lost(nearest, matrix, unseen)
    away = found.dense()[dead] - matrix[dead]  # should it come after all, its numbers are those of its weights
    assert np.linalg.norm(away) < 0.2 * np.linalg.norm(matrix[dead])


@pytest.mark.parametrize("hessian", [torch.zeros(K, K), torch.full((K, K), torch.nan)])
def test_where_no_inputs_came_or_they_are_no_numbers_the_nearest_is_taken(hessian):
    matrix = weights(K, N)
    for symmetric in (True, False):
        found, nearest = (
            f(4, 32, symmetric=symmetric) for f in (partial(rounded, matrix, hessian, 0), partial(quantised, matrix))
        )
        np.testing.assert_array_equal(found.data, nearest.data)


def test_blocks_of_zeros_stay_zeros():
    matrix = weights(K, N)
    matrix[:32] = 0
    for symmetric in (True, False):
        assert not by_gptq(np.zeros_like(matrix), correlated(200), symmetric=symmetric).dense().any()
        assert not by_gptq(matrix, correlated(200), symmetric=symmetric).dense()[:32, :].all()


def test_numbers_are_packed_as_a_matrix_with_them_is():
    blocks = quantised(weights(70, 5), 4, 32, symmetric=False)
    numbers = np.rint(blocks.dense() / blocks.scales.repeat(32, axis=1)[:, :70].T)
    numbers += blocks.middles().repeat(32, axis=1)[:, :70].T
    np.testing.assert_array_equal(blocks.with_numbers(numbers.astype(np.uint8)).dense(), blocks.dense())


# -- which matrices, of which inputs ----------------------------------------------------------------------------------
def graph():
    g = Graph()
    x, y = g.rows("x", 64), g.rows("y", 64)
    shared, other = (g.emit.weight(torch.from_numpy(weights(64, 64, seed=i)), f"layers.{i}.up") for i in (0, 1))
    return g.model(g.MatMul(x, shared), g.MatMul(y, shared), g.MatMul(y, other))


def test_a_matrix_of_two_products_knows_both_their_inputs():
    model = graph()
    found = {tuple(m.inputs) for m in narrow(model, Recipe(4, 8, 32))}
    assert found == {("x", "y"), ("y",)}


def test_matrices_that_are_kept_or_wider_are_not_among_them():
    assert [m.inputs for m in narrow(graph(), Recipe(4, 8, 32, keep=("layers.0.*",)))] == [("y",)]
    assert not narrow(graph(), Recipe(4, 8, 32, wider=("layers.*",)))


def test_a_matrix_is_rounded_for_all_its_inputs_when_the_last_of_them_is_known(monkeypatch):
    x, y = (correlated(rows, seed=rows)[:, :64] for rows in (30, 500))  # few of one: then how many come counts, too
    known = {"x": Inputs(torch.from_numpy(x.T @ x), len(x)), "y": Inputs(torch.from_numpy(y.T @ y), len(y))}
    monkeypatch.setattr(rounding, "inputs_of", lambda *given: ({name: known[name]} for name in "xy"))
    model, recipe = graph(), Recipe(4, 8, 32, symmetric=False)
    made = rounding.round_for_inputs(None, None, model, recipe, [])
    matrices = narrow(model, recipe)
    assert made.keys() == {matrix.key for matrix in matrices}
    for matrix in matrices:
        both = np.concatenate([{"x": x, "y": y}[name] for name in matrix.inputs])
        expected = by_gptq(matrix.matrix(), both, symmetric=False)
        np.testing.assert_allclose(made[matrix.key].dense(), expected.dense(), atol=1e-6)


def test_what_was_made_of_a_matrix_before_is_what_the_graph_gets():
    model = graph()
    (matrix, *_) = narrow(model, Recipe(4, 8, 32))
    blocks = by_gptq(matrix.matrix(), correlated(300)[:, :64])
    quantise.run(model, Recipe(4, 8, 32), {matrix.key: blocks})
    data = {name: value.const_value for name, value in model.graph.initializers.items()}
    tensor = data["layers.0.up.int4.data"]
    assert isinstance(tensor, ir.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), blocks.data)
