"""Turns distances between positions into what is added to the scores of attention: ALiBi and T5's buckets.

One bias serves all layers of a stack. Shapes: B batch, S positions, H heads; a bias is (H, S, S), query by key.
"""

import math

import torch
from torch import Tensor, nn

from .checks import check_buckets, check_size
from .config import TransformerConfig


def alibi_slopes(num_heads: int) -> Tensor:
    """Make the slope of each head, (num_heads,): "Train Short, Test Long" (Press et al. 2021, 3).

    For n heads, n a power of 2, they are 2^(-8/n), 2^(-16/n) and so on. For another number they are those of the power
    of 2 below it, then every second one of the power above it, as in the authors' code.
    """
    check_size("num_heads", num_heads)
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * below)) for i in range(num_heads - below)]
    return torch.tensor(slopes)


class AlibiBias(nn.Module):
    """Lower a score in proportion to the distance, each head by its own slope: ALiBi (Press et al. 2021).

    The distance is |query - key|: under a causal mask that is the paper's, without one it is symmetric.
    """

    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return -slope * |query - key| for the positions of `x`: (batch, seq, hidden) -> (heads, seq, seq)."""
        position = torch.arange(x.shape[1], device=x.device)  # (S,)
        distance = (position[:, None] - position[None, :]).abs()  # (S, S)
        return -self.slopes[:, None, None] * distance  # (H, 1, 1) * (S, S)


def relative_bucket(offset: Tensor, num_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """Number the bucket of each offset key - query: "Exploring the Limits of Transfer Learning" (Raffel et al. 2020).

    Half of a side's buckets hold one distance each, the other half ranges that grow with its logarithm; from
    `max_distance` on everything is in the last. Causal buckets are all for keys before the query; otherwise each side
    has half of them.
    """
    if causal:
        side, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
    else:
        num_buckets = num_buckets // 2
        side, distance = (offset > 0).long() * num_buckets, offset.abs()
    exact = num_buckets // 2
    steps = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (steps * (num_buckets - exact)).long()
    return side + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class RelativeBias(nn.Module):
    """Add to a score one learned number for the bucket of its distance and its head, as T5 does (Raffel et al.)."""

    def __init__(self, num_heads: int, *, causal: bool, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        check_size("num_heads", num_heads)
        check_buckets(num_buckets, max_distance)
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias of every pair of positions of `x`: (batch, seq, hidden) -> (heads, seq, seq)."""
        position = torch.arange(x.shape[1], device=x.device)  # (S,)
        offset = position[None, :] - position[:, None]  # (S, S), key - query
        bucket = relative_bucket(offset, self.num_buckets, self.max_distance, causal=self.causal)  # (S, S)
        bias: Tensor = self.embedding(bucket).permute(2, 0, 1)  # (H, S, S)
        return bias


def build_position_bias(config: TransformerConfig, *, causal: bool) -> nn.Module | None:
    """Make what a stack adds to the scores of all its layers, or None where its positions do not act there."""
    if config.position == "alibi":
        return AlibiBias(config.num_heads)
    if config.position == "relative":
        return RelativeBias(
            config.num_heads,
            causal=causal,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
        )
    return None
