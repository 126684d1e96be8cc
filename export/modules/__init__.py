"""The textbook's transformer in plain PyTorch: attention, feed-forward, norms, positions, and a decoder made of them.

They are plain modules and know neither caches nor ONNX nor sessions. Nothing in the exporter imports them: to it they
are a user's modules like any other.
"""

from .attention import MultiHeadAttention, causal_mask, scaled_dot_product_attention
from .blocks import Block, FeedForward, RMSNorm, build_norm
from .config import Activation, Norm, NormPosition, Position, TransformerConfig
from .positions import LearnedPositions, RotaryPositions, SinusoidalPositions, build_positions, sinusoidal_table
from .transformer import Decoder

__all__ = [
    "Activation",
    "Block",
    "Decoder",
    "FeedForward",
    "LearnedPositions",
    "MultiHeadAttention",
    "Norm",
    "NormPosition",
    "Position",
    "RMSNorm",
    "RotaryPositions",
    "SinusoidalPositions",
    "TransformerConfig",
    "build_norm",
    "build_positions",
    "causal_mask",
    "scaled_dot_product_attention",
    "sinusoidal_table",
]
