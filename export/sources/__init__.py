"""What a user names as a model, into a module with everything that belongs to it. Knows no ONNX and no architecture."""

from .source import Source, load_source

__all__ = ["Source", "load_source"]
