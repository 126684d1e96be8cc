"""Turns attention, feed-forward and norms into one block, the layer that a transformer repeats.

A block knows neither tokens nor how many blocks there are. Shapes: B batch, S positions.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from tfinfer.errors import InputError

from .attention import MultiHeadAttention
from .checks import Activation, check_choice, check_size
from .config import TransformerConfig
from .norms import build_norm
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


class Block(nn.Module):
    """Apply attention, then feed-forward, each with a residual around it, a norm, and dropout on what is added.

    Post-norm is the paper's: norm(x + sublayer(x)) (Vaswani et al. 2017, 3.1 and 5.4). Pre-norm is x +
    sublayer(norm(x)), which trains without warm-up: "On Layer Normalization in the Transformer Architecture" (Xiong et
    al. 2020). The encoder's block is one that is not causal; the decoder's has cross-attention between the two.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool,
        rotary: RotaryPositions | None = None,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = _build_attention(config, causal=causal, rotary=rotary)
        self.attention_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.cross_attention: MultiHeadAttention | None = None
        if cross_attention:
            self.cross_attention = _build_attention(config, causal=False, rotary=None)
            self.cross_attention_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(
            config.hidden_size, config.intermediate_size, activation=config.activation, bias=config.ffn_bias
        )
        self.feed_forward_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output: (batch, seq, hidden) -> (batch, seq, hidden).

        `mask` and `position_bias` are those of `MultiHeadAttention` among the positions of `x`; `memory`, (batch, keys,
        hidden), is what cross-attention gathers from, under a `memory_mask` that broadcasts to (batch, heads, seq,
        keys). A memory without cross-attention, or the other way round, raises `InputError`.
        """
        if (memory is None) != (self.cross_attention is None):
            raise InputError(
                f"a memory and cross-attention belong together, got memory={'none' if memory is None else 'a tensor'} "
                f"and cross_attention={self.cross_attention is not None}; give both or neither"
            )
        x = self._add(x, self.attention_norm, lambda y: self.attention(y, mask, position_bias=position_bias))
        if self.cross_attention is not None:
            gather = self.cross_attention
            x = self._add(x, self.cross_attention_norm, lambda y: gather(y, memory_mask, memory))
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x` with what the sub-layer makes of it added: (batch, seq, hidden) -> (batch, seq, hidden)."""
        if self.pre_norm:
            return x + self.dropout(sublayer(norm(x)))  # (B, S, hidden)
        output: Tensor = norm(x + self.dropout(sublayer(x)))  # (B, S, hidden)
        return output


def _build_attention(config: TransformerConfig, *, causal: bool, rotary: RotaryPositions | None) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.hidden_size,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_dim=config.value_dim,
        bias=config.attention_bias,
        causal=causal,
        rotary=rotary,
        similarity=config.similarity,
        kernel_form=config.kernel_form,
        scale=config.attention_scale,
    )
