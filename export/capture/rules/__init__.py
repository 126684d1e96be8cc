"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import complex, elementwise, indexing, integers, linear, picking, reductions, routing, running, sdpa, views

__all__ = [
    "complex",
    "elementwise",
    "indexing",
    "integers",
    "linear",
    "picking",
    "reductions",
    "routing",
    "running",
    "sdpa",
    "views",
]
