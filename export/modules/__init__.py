"""The textbook's transformer in plain PyTorch: attention, feed-forward, norms, positions, and models made of them.

They are plain modules and know neither caches nor ONNX nor sessions. Nothing in the exporter imports them: to it they
are a user's modules like any other.
"""

from .attention import MultiHeadAttention
from .biases import AlibiBias, RelativeBias, alibi_slopes, build_position_bias, relative_bucket
from .blocks import Block, FeedForward
from .checks import Activation, AttentionPattern, KernelForm, Norm, NormPosition, Position, Similarity
from .config import TransformerConfig
from .encoder import Encoder, EncoderDecoder
from .norms import BatchNorm, RMSNorm, build_norm
from .patterns import causal_mask, pattern_mask
from .pooling import AttentionPooling, AverageOfWords, HierarchicalEncoder, masked_mean
from .positions import LearnedPositions, RotaryPositions, SinusoidalPositions, build_positions, sinusoidal_table
from .presets import MaskedLanguageModel, bert_config, gpt_config
from .self_attention import ParameterFreeAttention, SelfAttention
from .similarity import attend, elu_feature_map, kernel_attention, linear_attention, scaled_dot_product_attention
from .stack import Stack
from .transformer import Decoder
from .word_vectors import VectorFormat, WordVectors, embed_words, load_word_vectors

__all__ = [
    "Activation",
    "AlibiBias",
    "AttentionPattern",
    "AttentionPooling",
    "AverageOfWords",
    "BatchNorm",
    "Block",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "HierarchicalEncoder",
    "KernelForm",
    "LearnedPositions",
    "MaskedLanguageModel",
    "MultiHeadAttention",
    "Norm",
    "NormPosition",
    "ParameterFreeAttention",
    "Position",
    "RMSNorm",
    "RelativeBias",
    "RotaryPositions",
    "SelfAttention",
    "Similarity",
    "SinusoidalPositions",
    "Stack",
    "TransformerConfig",
    "VectorFormat",
    "WordVectors",
    "alibi_slopes",
    "attend",
    "bert_config",
    "build_norm",
    "build_position_bias",
    "build_positions",
    "causal_mask",
    "elu_feature_map",
    "embed_words",
    "gpt_config",
    "kernel_attention",
    "linear_attention",
    "load_word_vectors",
    "masked_mean",
    "pattern_mask",
    "relative_bucket",
    "scaled_dot_product_attention",
    "sinusoidal_table",
]
