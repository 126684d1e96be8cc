"""The oldest onnxruntime that computes a graph right is that of the operator which needs the newest."""

import onnx_ir as ir
import pytest

from tfinfer.export.runtimes import least_runtime

CONTRIB = "com.microsoft"


def value(name, node=None):
    return ir.Value(node, name=name) if node is None else node.outputs[0]


def attention(past=None, **attributes):
    """past: the node that fills what it reads; None: an input of the graph does."""
    inputs = [value(name) for name in "qkv"] + [value("past", past), value("past_value", past)]
    return ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB)


def skip_norm(op_type="SkipLayerNormalization", dtype=ir.DataType.FLOAT16):
    weight = ir.Value(name="weight", type=ir.TensorType(dtype))
    return ir.node(op_type, [value("x"), value("residual"), weight], domain=CONTRIB)


def small_product(*bias):
    given = [value(name) for name in ("x", "weights", "scales")]
    biases = [ir.Value(name="bias", type=ir.TensorType(dtype)) for dtype in bias]
    return ir.node("MatMulNBits", [*given, *([None, None, *biases] if bias else [])], domain=CONTRIB)


def graph(*nodes):
    return ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": 21, CONTRIB: 1}), ir_version=10)


def plain(op_type):
    return ir.node(op_type, [value("x")])


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: [plain("MatMul")], "1.24"),
        (lambda: [attention()], "1.24"),
        (lambda: [skip_norm(dtype=ir.DataType.FLOAT)], "1.24"),
        (lambda: [skip_norm(dtype=ir.DataType.BFLOAT16)], "1.30"),
        (lambda: [small_product(), small_product(ir.DataType.FLOAT)], "1.24"),
        (lambda: [small_product(ir.DataType.FLOAT16)], "1.28"),
        (lambda: [small_product(ir.DataType.BFLOAT16)], "1.28"),
        (lambda: [plain("TensorScatter"), attention()], "1.25"),
        (lambda: [attention(kv_cache_bit_width=8)], "1.28"),
        (lambda: [plain("TensorScatter"), plain("Attention")], "1.28"),
        (lambda: [plain("Attention"), skip_norm()], "1.30"),
        (lambda: [skip_norm("SkipSimplifiedLayerNormalization"), attention(kv_cache_bit_width=8)], "1.30"),
        (lambda: [first := plain("Identity"), attention(first), skip_norm()], "1.31"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_the_newest_that_is_needed(make, least):
    nodes = make()
    assert least_runtime([graph(*nodes)]) == least
    assert least_runtime([graph(plain("Add")), graph(*make())]) == least  # whichever of a folder's graphs has it


def test_an_operator_within_a_branch_counts():
    branch = ir.Graph([], [], nodes=[plain("Attention")])
    choice = ir.node("If", [value("which")], {"then_branch": branch, "else_branch": ir.Graph([], [], nodes=[])})
    assert least_runtime([graph(choice)]) == "1.28"
