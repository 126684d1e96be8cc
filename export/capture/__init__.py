"""A module into a cached ONNX graph, by following the sequence axis. No line here knows an architecture."""

from .capture import Captured, capture
from .follow import AttentionReport, CacheEntry

__all__ = ["AttentionReport", "CacheEntry", "Captured", "capture"]
