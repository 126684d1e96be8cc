"""A module into a cached ONNX graph, by following the sequence axis. No line here knows an architecture."""

from .capture import DEFAULT_MAX_LENGTH, Captured, capture
from .follow import AttentionReport, CacheEntry

__all__ = ["DEFAULT_MAX_LENGTH", "AttentionReport", "CacheEntry", "Captured", "capture"]
