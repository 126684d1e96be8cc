"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import complex, convolutions, elementwise, indexing, linear, reductions, running, sdpa, shifts, views

__all__ = [
    "complex",
    "convolutions",
    "elementwise",
    "indexing",
    "linear",
    "reductions",
    "running",
    "sdpa",
    "shifts",
    "views",
]
