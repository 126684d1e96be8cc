"""Half width for a folder's graphs: first how large values become in float32, then what may be narrow is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from tfinfer.errors import InputError
from tfinfer.manifest import Manifest
from tfinfer.precision import RangeSpec

from .calibration import Magnitudes, magnitudes
from .passes import half

MOST = 65504.0  # what float16 holds
MARGIN = 4.0  # other text than what was looked at may make larger values
WIDTHS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def half_width(graphs: Mapping[str, ir.Model], dtype: str, manifest: Manifest, folder: Path) -> RangeSpec | None:
    """Convert a decoder's graph in place, which lies in the folder in float32; None where nothing can overflow.

    Raises InputError where the cache or its attention would: these have one width.
    """
    model = graphs["decoder"]
    if dtype != "fp16":
        half.run(model, WIDTHS[dtype])
        return None
    found = magnitudes(manifest, folder, model.graph)
    check_cache(model.graph, found)
    limit = MOST / MARGIN
    large = {name for name, size in found.largest.items() if size > limit}
    converted = half.convert(model, WIDTHS[dtype], large)
    largest = max(found.largest.values(), default=0.0)
    return RangeSpec(float(f"{largest:.4g}"), limit, converted.kept, found.tokens, found.origin)


def check_cache(graph: ir.Graph, found: Magnitudes) -> None:
    """Raises InputError where what has to be half width becomes larger than float16 holds."""
    for node in graph:
        worst = max(map(found.of, (*node.inputs, *node.outputs)), default=0.0)
        if half.stays(node) and worst > MOST:
            raise InputError(
                f"fp16 holds numbers up to {MOST:,.0f}, and attention ({node.name or node.op_type}) meets "
                f"{worst:,.0f}, which no cache of fp16 holds: export with --dtype bf16"
            )
