"""Turns queries, keys and values into what each query gathers; knows no cache, all positions are there at once.

Shapes: B batch, S positions, Q query positions, T key positions, H heads, K key/value heads, D size of a head.
"""

import math

import torch
from torch import Tensor, nn

from .config import resolve_heads
from .positions import RotaryPositions


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, equation 1 of "Attention Is All You Need" (Vaswani et al. 2017, 3.2.1).

    Args:
        q: (..., queries, head_dim).
        k: (..., keys, head_dim).
        v: (..., keys, value_dim).
        mask: boolean, broadcast to (..., queries, keys); True where a query may attend to a key. Every query needs
            at least one such key: the softmax over none is not defined.
        scale: what the scores are multiplied by; 1 / sqrt(head_dim) when None.

    Returns:
        (..., queries, value_dim).
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1) * scale  # (..., Q, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)  # (..., Q, T), each row sums to 1
    return weights @ v  # (..., Q, value_dim)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Make the mask under which a position attends to itself and to what stands before it: (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class MultiHeadAttention(nn.Module):
    """Let every position gather from the others in several subspaces at once (Vaswani et al. 2017, 3.2.2).

    With fewer key/value heads than query heads, neighbouring query heads share one: "GQA: Training Generalized
    Multi-Query Transformer Models" (Ainslie et al. 2023); with a single one, "Fast Transformer Decoding: One
    Write-Head is All You Need" (Shazeer 2019).

    Args:
        hidden_size: size of what comes in and of what goes out.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`; `num_heads` when None.
        head_dim: size of a head; `hidden_size // num_heads` when None.
        bias: whether the four projections have a bias.
        causal: whether a position sees only itself and what stands before it.
        rotary: turns queries and keys by their positions; may be shared by many layers.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        rotary: RotaryPositions | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = resolve_heads(hidden_size, num_heads, num_kv_heads, head_dim)
        self.causal = causal
        self.rotary = rotary
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what each position of `x` gathers: (batch, seq, hidden) -> (batch, seq, hidden).

        `mask` is boolean, True where a query may attend, and broadcast to (batch, heads, seq, seq); a causal module
        allows what both the mask and the order of positions allow.
        """
        batch, seq, _ = x.shape
        q = self.q_proj(x).view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(x).view(batch, seq, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, D)
        v = self.v_proj(x).view(batch, seq, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, S, D)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if self.num_kv_heads != self.num_heads:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)  # (B, H, S, D)
        if self.causal:
            earlier = causal_mask(seq, x.device)  # (S, S)
            mask = earlier if mask is None else earlier & mask
        heads = scaled_dot_product_attention(q, k, v, mask)  # (B, H, S, D)
        joined = heads.transpose(1, 2).reshape(batch, seq, self.num_heads * self.head_dim)  # (B, S, H * D)
        output: Tensor = self.o_proj(joined)  # (B, S, hidden)
        return output
