"""The oldest onnxruntime that computes a graph right."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from .passes.small_bias import BIAS

# Of each operator, by running folders on 1.20 to 1.31: before 1.28 a ragged step of Attention is wrong, before 1.25
# TensorScatter has no kernel, before 1.24 GroupQueryAttention's window is one off.
# Before 1.31 attention over entries that another layer fills is refused or kills the process, by running 1.24 to 1.31.
# Before 1.28 a ragged step over a cache of 8 bits is wrong, before 1.27 there is none, by running 1.26 to 1.31.
READS_ONLY, SMALL_CACHE = "GroupQueryAttention that only reads", "GroupQueryAttention over 8 bits"
BIASED = "MatMulNBits with a bias of half width"
# Before 1.28 a product of few bits takes no bias on a GPU, where activations have half width.
# Norms with a skip sum squares of half width in half width on a GPU, and overflow, until long after 1.24: 1.30 is known
# not to. Of float32 they are right in every version that runs the rest.
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
LEAST_RUNTIME = {
    READS_ONLY: "1.31",
    **dict.fromkeys(SKIP_NORMS, "1.30"),
    "Attention": "1.28",
    SMALL_CACHE: "1.28",
    BIASED: "1.28",
    "TensorScatter": "1.25",
    "": "1.24",
}


def least_runtime(models: Iterable[ir.Model]) -> str:
    """The version that all operators of some graphs need."""
    operators = {_operator(node) for model in models for node in model.graph.all_nodes()}
    return next(version for operator, version in LEAST_RUNTIME.items() if operator in operators or not operator)


def _operator(node: ir.Node) -> str:
    """The operator of a node, as LEAST_RUNTIME knows it."""
    if "kv_cache_bit_width" in node.attributes:
        return SMALL_CACHE
    if node.op_type in SKIP_NORMS:
        weight = node.inputs[2]
        return "" if weight is not None and weight.dtype is ir.DataType.FLOAT else node.op_type
    if node.op_type == "MatMulNBits":
        bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        return BIASED if bias is not None and bias.dtype is not ir.DataType.FLOAT else node.op_type
    past = node.inputs[3] if node.op_type == "GroupQueryAttention" else None
    return READS_ONLY if past is not None and past.producer() is not None else node.op_type
