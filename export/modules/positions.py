"""Turns vectors into vectors that know where they stand: sinusoidal, learned, rotary, or not at all.

Position 0 is the first of the sequence. Shapes: B batch, S positions, H heads, D size of a head.
"""

import math

import torch
from torch import Tensor, nn

from .checks import check_even, check_positive, check_size
from .config import TransformerConfig


def sinusoidal_table(length: int, size: int) -> Tensor:
    """Make the table (length, size) of "Attention Is All You Need" (Vaswani et al. 2017, 3.5).

    table[pos, 2i] = sin(pos / 10000^(2i / size)) and table[pos, 2i + 1] = cos(pos / 10000^(2i / size)).
    """
    check_size("length", length)
    check_size("size", size)
    check_even("size", size, "sinusoidal positions pair a sine with a cosine")
    angle = _angles(length, size, 10000.0)  # (length, size / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, size).float()


def _angles(length: int, size: int, theta: float) -> Tensor:
    """Return pos / theta^(2i / size) as (length, size / 2), in double: single loses the angles of late positions."""
    position = torch.arange(length, dtype=torch.float64)  # (length,)
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)  # (size / 2,)
    return torch.outer(position, frequency)


class SinusoidalPositions(nn.Module):
    """Add the sinusoidal table to the embeddings times sqrt(hidden) (Vaswani et al. 2017, 3.4 and 3.5).

    The factor brings embeddings of length about 1, fit for a tied head, to the scale of the sines and cosines.
    """

    table: Tensor

    def __init__(self, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.scale = math.sqrt(hidden_size)
        self.register_buffer("table", sinusoidal_table(max_length, hidden_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x * sqrt(hidden) + table: (batch, seq, hidden) -> (batch, seq, hidden)."""
        return x * self.scale + self.table[: x.shape[1]]  # (B, S, hidden) + (S, hidden)


class LearnedPositions(nn.Module):
    """Add one learned vector per position, as in GPT-2 (Radford et al. 2019), after Gehring et al. 2017."""

    def __init__(self, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_length, hidden_size)
        nn.init.normal_(self.embedding.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus its positions' vectors: (batch, seq, hidden) -> (batch, seq, hidden)."""
        position = torch.arange(x.shape[1], device=x.device)  # (S,)
        return x + self.embedding(position)  # (B, S, hidden) + (S, hidden)


class RotaryPositions(nn.Module):
    """Turn queries and keys by angles that grow with the position: "RoFormer" (Su et al. 2021, 3.4.2).

    The product of a turned query and a turned key depends on the distance of their positions alone. Dimension i turns
    together with dimension i + head_dim / 2 (the layout of GPT-NeoX and Llama); the paper pairs 2i with 2i + 1, which
    is the same up to the order of the dimensions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int, theta: float = 10000.0) -> None:
        super().__init__()
        check_size("head_dim", head_dim)
        check_size("max_length", max_length)
        check_even("head_dim", head_dim, "rotary positions turn its two halves together")
        check_positive("theta", theta)
        angle = _angles(max_length, head_dim, theta).repeat(1, 2)  # (max_length, D)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each position turned: (batch, heads, seq, head_dim) -> the same shape."""
        seq = x.shape[2]
        first, second = x.chunk(2, dim=-1)  # (B, H, S, D / 2) each
        quarter_turn = torch.cat((-second, first), dim=-1)  # (B, H, S, D)
        return x * self.cos[:seq] + quarter_turn * self.sin[:seq]  # (B, H, S, D) * (S, D)


def build_positions(config: TransformerConfig) -> nn.Module:
    """Make what is applied to the embeddings; for what acts inside attention, and for "none", it changes nothing.

    A decoder without any still tells positions apart, by how many each one sees: "Transformer Language Models without
    Positional Encodings Still Learn Positional Information" (Haviv et al. 2022).
    """
    if config.position == "sinusoidal":
        return SinusoidalPositions(config.hidden_size, config.max_length)
    if config.position == "learned":
        return LearnedPositions(config.hidden_size, config.max_length)
    return nn.Identity()
