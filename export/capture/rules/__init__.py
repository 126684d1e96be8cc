"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import complex, elementwise, features, indexing, linear, pointwise, reductions, running, sdpa, views

__all__ = [
    "complex",
    "elementwise",
    "features",
    "indexing",
    "linear",
    "pointwise",
    "reductions",
    "running",
    "sdpa",
    "views",
]
