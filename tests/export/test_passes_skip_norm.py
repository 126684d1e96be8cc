"""A sum and its norm in one node: which sums, which biases, and who else may read them."""

import numpy as np
import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from small_graph import DIM, Graph, unchanged, weights  # noqa: E402

from tfinfer.export.passes import half, pipeline, skip_norm  # noqa: E402

NORMS = {"SimplifiedLayerNormalization": 3, "LayerNormalization": 4}  # with the place of the bias
BOTH = pytest.mark.parametrize("op_type", NORMS)


def norm(g, x, op_type, **attributes):
    shift = [weights(DIM, seed=6)] if op_type == "LayerNormalization" else []
    return getattr(g, op_type)(x, weights(DIM, seed=5), *shift, **{"axis": -1, "epsilon": 1e-3} | attributes)


def the_node(model):
    (node,) = (n for n in model.graph if n.op_type.startswith("Skip"))
    return node


@BOTH
@pytest.mark.parametrize("read", [False, True])
def test_a_sum_and_its_norm_are_one_node_which_gives_the_sum_where_it_is_read(op_type, read):
    g = Graph()
    total = g.Add(g.rows("x"), g.rows("z"))
    normed = norm(g, total, op_type)
    model = g.model(g.Add(total, g.Neg(normed)) if read else normed)
    left = unchanged(skip_norm.run, model, 1, g.feeds)
    assert left == ({f"Skip{op_type}": 1, "Add": 1, "Neg": 1} if read else {f"Skip{op_type}": 1})
    assert len(the_node(model).outputs) == (4 if read else 1)
    assert model.graph.opset_imports["com.microsoft"] == 1


@BOTH
def test_a_sum_that_is_an_output_keeps_its_name(op_type):
    g = Graph()
    total = g.Add(g.rows("x"), g.rows("z"))
    assert unchanged(skip_norm.run, g.model(norm(g, total, op_type), total), 1, g.feeds) == {f"Skip{op_type}": 1}


@BOTH
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_bias_goes_in_as_well(op_type, first, read):
    g = Graph()
    branch = g.Add(g.Neg(g.rows("x")), weights(DIM, seed=2))
    total = g.Add(branch, g.rows("z")) if first else g.Add(g.rows("z"), branch)
    normed = norm(g, total, op_type)
    model = g.model(g.Mul(total, normed) if read else normed)
    assert unchanged(skip_norm.run, model, 1, g.feeds)["Add"] == 0
    assert the_node(model).inputs[NORMS[op_type]].const_value.shape == (DIM,)


def test_a_norm_without_a_shift_takes_a_bias_behind_the_shift_that_is_missing():
    g = Graph()
    total = g.Add(g.rows("z"), g.Add(g.rows("x"), weights(DIM)))
    model = g.model(g.LayerNormalization(total, weights(DIM, seed=1), axis=-1))
    unchanged(skip_norm.run, model, 1, g.feeds)
    assert [value is None for value in the_node(model).inputs] == [False, False, False, True, False]


def test_a_chain_of_blocks_with_the_norm_behind_them_is_fused_whole():
    g = Graph()
    x = g.rows("x")
    for i in range(3):
        x = norm(g, g.Add(x, g.MatMul(x, weights(DIM, DIM, seed=i, scale=0.3))), "LayerNormalization")
    assert unchanged(skip_norm.run, g.model(x), 3, g.feeds) == {"MatMul": 3, "SkipLayerNormalization": 3}


def test_a_bias_that_somebody_reads_with_its_vector_stays():
    g = Graph()
    branch = g.Add(g.rows("x"), weights(DIM))
    model = g.model(norm(g, g.Add(g.rows("z"), branch), "LayerNormalization"), branch)
    assert unchanged(skip_norm.run, model, 1, g.feeds)["Add"] == 1
    assert len(the_node(model).inputs) == 4


# -- what stays -----------------------------------------------------------------------------------------------------
def broadcast(g, op_type):
    return norm(g, g.Add(g.rows("x"), g.input("z", 1, 3, DIM, names=(1, "seq"))), op_type)


def fewer_axes(g, op_type):
    return norm(g, g.Add(g.rows("x"), g.input("z", 3, DIM, names=("seq",))), op_type)


def a_constant(g, op_type):
    return norm(g, g.Add(g.rows("x"), weights(DIM)), op_type)


def four_axes(g, op_type):
    x, z = (g.Reshape(g.rows(name, 2 * DIM), np.array([0, 0, 2, DIM])) for name in "xz")
    return g.Reshape(norm(g, g.Add(x, z), op_type), np.array([0, 0, -1]))


def difference(g, op_type):
    return norm(g, g.Sub(g.rows("x"), g.rows("z")), op_type)


def moving_weight(g, op_type):
    shift = [weights(DIM)] if op_type == "LayerNormalization" else []
    total = g.Add(g.rows("x"), g.rows("z"))
    return getattr(g, op_type)(total, g.Neg(g.input("w", DIM)), *shift, axis=-1, epsilon=1e-3)


@BOTH
@pytest.mark.parametrize("make", [broadcast, fewer_axes, a_constant, four_axes, difference, moving_weight])
def test_other_sums_stay(op_type, make):
    g = Graph()
    assert unchanged(skip_norm.run, g.model(make(g, op_type)), 0, g.feeds)[op_type] == 1


def test_a_norm_over_two_axes_stays():
    g = Graph()
    x, z = (g.input(name, 2, 3, DIM, names=("batch",)) for name in "xz")
    model = g.model(g.LayerNormalization(g.Add(x, z), weights(3, DIM), axis=-2))
    assert unchanged(skip_norm.run, model, 0, g.feeds)["Add"] == 1


# -- when -----------------------------------------------------------------------------------------------------------
def block(steps=False):
    """A residual block with spelled-out norms, a bias and a GELU; `steps`: its input is what came before."""
    g = Graph()
    x = g.rows("past" if steps else "x")
    for i in range(2):
        mean = g.ReduceMean(g.Mul(x, x), np.array([-1]), keepdims=1)
        normed = g.Mul(g.Div(x, g.Sqrt(g.Add(mean, 1e-6))), weights(DIM, seed=i))
        wide = g.Gelu(g.Add(g.MatMul(normed, weights(DIM, 32, seed=i, scale=0.3)), weights(32)))
        x = g.Add(x, g.Add(g.MatMul(wide, weights(32, DIM, seed=i, scale=0.3)), weights(DIM)))
    return g.model(g.LayerNormalization(x, weights(DIM), axis=-1)), g.feeds


def test_half_width_has_norms_of_both_kinds_with_a_skip():
    model, feeds = block()
    left = unchanged(lambda m: pipeline.run(m, narrow=True)["skip_norm"], model, 2, feeds)
    assert left == {
        "SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 1, "SkipLayerNormalization": 1,
        "BiasGelu": 2, "MatMul": 4,
    }  # fmt: skip


def test_float32_has_those_without_the_mean_where_a_graph_goes_on_from_its_past():
    model, feeds = block(steps=True)
    left = unchanged(lambda m: pipeline.run(m)["skip_norm"], model, 1, feeds)
    assert left == {
        "SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 1, "LayerNormalization": 1, "Sum": 1,
        "Add": 2, "Gelu": 2, "MatMul": 4,
    }  # fmt: skip


def test_float32_that_sees_all_positions_at_once_has_neither():
    model, feeds = block()
    left = unchanged(lambda m: pipeline.run(m)["rms_norm"], model, 2, feeds)
    assert left == {"SimplifiedLayerNormalization": 2, "LayerNormalization": 1, "Add": 6, "Gelu": 2, "MatMul": 4}


@pytest.mark.parametrize("narrow", [False, True])
def test_the_standard_flavour_has_no_operator_of_onnxruntime(narrow):
    model, feeds = block()
    left = unchanged(lambda m: pipeline.run(m, "standard", narrow)["rms_norm"], model, 0, feeds)
    assert (left["ReduceMean"], left["LayerNormalization"]) == (2, 1)
    assert {node.domain for node in model.graph} == {""}


def test_fused_norms_are_half_width_throughout_and_compute_the_same():
    """The squares of values up to 2000 are out of float16's range; the operators compute them in float32."""
    import onnxruntime as ort

    model, feeds = block()
    feeds = {"x": feeds["x"] * 500}
    expected = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    pipeline.run(model, narrow=True)
    half.run(model, ir.DataType.FLOAT16)
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert not [node for node in model.graph if node.op_type == "Cast"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": feeds["x"].astype(np.float16)})
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
