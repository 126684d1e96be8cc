"""The passes of an export, in order. To add one, write its file beside this and name it here."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from . import dead_nodes, mask_branch, packed_qkv, projection_bias, rotary, row_stride, tied_head

Pass = Callable[[ir.Model], int]

PASSES: dict[str, Pass] = {
    "rotary": rotary.run,
    "packed_qkv": packed_qkv.run,
    "projection_bias": projection_bias.run,
    "mask_branch": mask_branch.run,
    "row_stride": row_stride.run,
    "tied_head": tied_head.run,
    "dead_nodes": dead_nodes.run,
}


def run(model: ir.Model) -> dict[str, int]:
    """Apply every pass in place; returns how often each fired."""
    return {name: apply(model) for name, apply in PASSES.items()}
