"""The allow-list: what each operation does to the axes, and how it is written in ONNX. One small file per group."""

from . import complex, copies, elementwise, indexing, linear, reductions, running, sdpa, views

__all__ = ["complex", "copies", "elementwise", "indexing", "linear", "reductions", "running", "sdpa", "views"]
