"""What a user names as a model, into a module with everything that belongs to it. Knows no ONNX and no architecture."""

from .forms import EncoderForm, PairForm
from .source import Source, load_source

__all__ = ["EncoderForm", "PairForm", "Source", "load_source"]
