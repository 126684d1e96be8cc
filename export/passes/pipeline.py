"""The passes of an export, in order. To add one, write its file beside this and name it here."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from . import (
    activations,
    bias_gelu,
    common,
    dead_nodes,
    device_rows,
    long_sum,
    mask_branch,
    needless,
    packed_gate_up,
    packed_qkv,
    projection_bias,
    qk_norm,
    rms_norm,
    rotary,
    row_stride,
    skip_norm,
    tied_head,
    wanted_rows,
)

Pass = Callable[[ir.Model], int]

PASSES: dict[str, Pass] = {
    "needless": needless.run,
    "common": common.run,
    "wanted_rows": wanted_rows.run,
    "rms_norm": rms_norm.run,
    "activations": activations.run,
    "skip_norm": skip_norm.run,
    "bias_gelu": bias_gelu.run,
    "long_sum": long_sum.run,
    "rotary": rotary.run,
    "packed_qkv": packed_qkv.run,
    "packed_gate_up": packed_gate_up.run,
    "qk_norm": qk_norm.run,
    "projection_bias": projection_bias.run,
    "mask_branch": mask_branch.run,
    "row_stride": row_stride.run,
    "tied_head": tied_head.run,
    "device_rows": device_rows.run,
    "dead_nodes": dead_nodes.run,
}
# Onnxruntime's kernel for the first is slower on a CPU than the operators by themselves, and float32 is for a CPU;
# where rows are reckoned matters on a device alone.
NARROW = {"bias_gelu", "device_rows"}
# A norm's weight by head, which only the CPU's kernel is known to take; what skip_norm does better in half width.
WIDE = {"qk_norm", "long_sum"}
FLOAT32: dict[str, Pass] = {"skip_norm": skip_norm.run_rms}
# In float32 for graphs that run a token at a time, where each launch counts. A T5 encoder of 6 layers of 512 with
# skip_norm took 1 x 16, 1 x 128 and 8 x 128 tokens 0.98 to 0.99 times as fast, with packed_gate_up 0.95 to 0.99 times
# (CPU time of one thread, medians of 12 to 60 runs in turns).
STEPS = {"skip_norm", "long_sum", "packed_gate_up"}
# With the operators of ONNX alone; None leaves a pass out.
STANDARD: dict[str, Pass | None] = {
    "rms_norm": rms_norm.run_standard,
    "activations": activations.run_standard,
    "skip_norm": None,
    "bias_gelu": None,
}


def run(model: ir.Model, flavor: str = "ort", narrow: bool = False) -> dict[str, int]:
    """Apply every pass of a flavour in place; returns how often each fired. narrow: float16 or bfloat16 will follow."""
    changed = ({} if narrow else FLOAT32) | (STANDARD if flavor == "standard" else {})
    passes = {name: changed.get(name, apply) for name, apply in PASSES.items()}
    left_out = WIDE if narrow else NARROW if _steps(model) else NARROW | STEPS
    return {name: apply(model) for name, apply in passes.items() if apply and name not in left_out}


def _steps(model: ir.Model) -> bool:
    """Whether a graph goes on from what it computed before, a cache or states."""
    return any(str(value.name).startswith("past") for value in model.graph.inputs)
