"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import attention, complex, elementwise, indexing, linear, reductions, views

__all__ = ["attention", "complex", "elementwise", "indexing", "linear", "reductions", "views"]
