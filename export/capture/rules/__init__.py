"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import (
    complex,
    convolutions,
    copies,
    elementwise,
    features,
    indexing,
    integers,
    linear,
    picking,
    pointwise,
    recurrent,
    reductions,
    routing,
    running,
    scattering,
    sdpa,
    shifts,
    views,
)  # fmt: skip

__all__ = [
    "complex", "convolutions", "copies", "elementwise", "features", "indexing", "integers", "linear", "picking",
    "pointwise", "recurrent", "reductions", "routing", "running", "scattering", "sdpa", "shifts", "views",
]  # fmt: skip
