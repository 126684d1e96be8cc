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
    mask_branch,
    needless,
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
    "rotary": rotary.run,
    "packed_qkv": packed_qkv.run,
    "qk_norm": qk_norm.run,
    "projection_bias": projection_bias.run,
    "mask_branch": mask_branch.run,
    "row_stride": row_stride.run,
    "tied_head": tied_head.run,
    "device_rows": device_rows.run,
    "dead_nodes": dead_nodes.run,
}
# Onnxruntime's kernels for these are slower on a CPU than the operators by themselves, and float32 is for a CPU; where
# rows are reckoned matters on a device alone.
NARROW = {"skip_norm", "bias_gelu", "device_rows"}
WIDE = {"qk_norm"}  # a norm's weight by head, which only the CPU's kernel is known to take
# With the operators of ONNX alone; None leaves a pass out.
STANDARD: dict[str, Pass | None] = {
    "rms_norm": rms_norm.run_standard,
    "activations": activations.run_standard,
    "skip_norm": None,
    "bias_gelu": None,
}


def run(model: ir.Model, flavor: str = "ort", narrow: bool = False) -> dict[str, int]:
    """Apply every pass of a flavour in place; returns how often each fired. narrow: float16 or bfloat16 will follow."""
    passes = {name: STANDARD.get(name, apply) if flavor == "standard" else apply for name, apply in PASSES.items()}
    left_out = WIDE if narrow else NARROW
    return {name: apply(model) for name, apply in passes.items() if apply and name not in left_out}
