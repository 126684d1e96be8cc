"""Turns attention, feed-forward and norms into one block, the layer that a transformer repeats.

A block knows neither tokens nor how many blocks there are. Shapes: B batch, S positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import MultiHeadAttention
from .config import Activation, Norm, TransformerConfig, check_choice, check_size
from .positions import RotaryPositions


class FeedForward(nn.Module):
    """Widen each position alone, bend it, and narrow it again (Vaswani et al. 2017, 3.3).

    relu: down(max(0, up(x))). gelu and gelu_tanh: down(gelu(up(x))), exact or in its tanh form, from "Gaussian Error
    Linear Units" (Hendrycks and Gimpel 2016). swiglu: down(silu(gate(x)) * up(x)), from "GLU Variants Improve
    Transformer" (Shazeer 2020).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: Activation = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("intermediate_size", intermediate_size)
        check_choice("activation", activation, Activation)
        self.activation = activation
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sub-layer's output: (batch, seq, hidden) -> (batch, seq, hidden)."""
        wide = self.up(x)  # (B, S, intermediate)
        if self.gate is not None:
            wide = F.silu(self.gate(x)) * wide  # (B, S, intermediate)
        elif self.activation == "relu":
            wide = F.relu(wide)
        else:
            wide = F.gelu(wide, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        output: Tensor = self.down(wide)  # (B, S, hidden)
        return output


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale: "Root Mean Square Layer Normalization" (Zhang and
    Sennrich 2019).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight: (..., hidden) -> (..., hidden)."""
        exact = x.float()  # in half precision the squares would overflow
        mean_square = exact.pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return (exact * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


def build_norm(norm: Norm, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """Make a norm over the last axis: "Layer Normalization" (Ba, Kiros and Hinton 2016) or `RMSNorm`."""
    check_choice("norm", norm, Norm)
    if norm == "rms_norm":
        return RMSNorm(hidden_size, eps)
    return nn.LayerNorm(hidden_size, eps=eps)


class Block(nn.Module):
    """Apply attention, then feed-forward, each with a residual around it, a norm, and dropout on what is added.

    Post-norm is the paper's: norm(x + sublayer(x)) (Vaswani et al. 2017, 3.1 and 5.4). Pre-norm is x +
    sublayer(norm(x)), which trains without warm-up: "On Layer Normalization in the Transformer Architecture" (Xiong et
    al. 2020).
    """

    def __init__(self, config: TransformerConfig, *, causal: bool, rotary: RotaryPositions | None = None) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = MultiHeadAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            causal=causal,
            rotary=rotary,
        )
        self.attention_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(
            config.hidden_size, config.intermediate_size, activation=config.activation, bias=config.ffn_bias
        )
        self.feed_forward_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output: (batch, seq, hidden) -> (batch, seq, hidden)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x)))  # (B, S, hidden)
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # (B, S, hidden)
        else:
            x = self.attention_norm(x + self.dropout(self.attention(x)))  # (B, S, hidden)
            x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))  # (B, S, hidden)
        return x
