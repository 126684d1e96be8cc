"""A module into ONNX graphs, cached where it generates, by following the sequence axis. Knows no architecture."""

from .capture import DEFAULT_MAX_LENGTH, Captured, capture, capture_decoder, trace_decoder
from .encoder import CapturedEncoder, capture_encoder
from .encoder_decoder import CapturedPair, capture_encoder_decoder
from .follow import AttentionReport, CacheEntry, StateEntry
from .observe import Observed, capture_attention
from .trace import Argument, Kind, Trace
from .tracing import trace

__all__ = [
    "DEFAULT_MAX_LENGTH",
    "Argument",
    "AttentionReport",
    "CacheEntry",
    "Captured",
    "CapturedEncoder",
    "CapturedPair",
    "Kind",
    "Observed",
    "StateEntry",
    "Trace",
    "capture",
    "capture_attention",
    "capture_decoder",
    "capture_encoder",
    "capture_encoder_decoder",
    "trace",
    "trace_decoder",
]
