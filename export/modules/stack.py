"""Turns embedded vectors into hidden states with positions and a stack of blocks; knows no vocabulary and no head.

Shapes: B batch, S positions, T positions of a memory, H heads.
"""

from torch import Tensor, nn

from tfinfer.errors import InputError

from .biases import build_position_bias
from .blocks import Block
from .config import TransformerConfig
from .norms import build_norm
from .patterns import pattern_mask
from .positions import RotaryPositions, build_positions


class Stack(nn.Module):
    """Give vectors their positions and run them through `config.num_layers` blocks; encoders and decoders are one.

    All blocks share one rotary table, one bias of positions and one attention pattern. With pre-norm a last norm closes
    the stack.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool, cross_attention: bool = False) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.positions = build_positions(config)
        self.embedding_norm: nn.Module = nn.Identity()
        if config.embedding_norm:
            self.embedding_norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.position_bias = build_position_bias(config, causal=causal)
        rotary = None
        if config.position == "rotary":
            rotary = RotaryPositions(config.head_dim, config.max_length, config.rope_theta)
        self.blocks = nn.ModuleList(
            Block(config, causal=causal, rotary=rotary, cross_attention=cross_attention)
            for _ in range(config.num_layers)
        )
        self.norm: nn.Module = nn.Identity()
        if config.norm_position == "pre":
            self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)

    def place(self, x: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Return embeddings with their positions, and with the vectors of their types: (batch, seq, hidden)."""
        x = self.positions(x)  # (B, S, hidden)
        if token_types is not None:
            x = x + token_types  # (B, S, hidden)
        placed: Tensor = self.dropout(self.embedding_norm(x))  # (B, S, hidden)
        return placed

    def run(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states of placed vectors: (batch, seq, hidden) -> (batch, seq, hidden).

        `attention_mask`, (batch, seq), and `memory_mask`, (batch, keys), are 1 or True where there is a token; a row
        needs at least one. `memory` is (batch, keys, hidden).
        """
        mask = self._mask(x, attention_mask)
        bias = None if self.position_bias is None else self.position_bias(x)  # (H, S, S)
        for block in self.blocks:
            x = block(x, mask, bias, memory, _hide_padding(memory_mask))  # (B, S, hidden)
        hidden_states: Tensor = self.norm(x)  # (B, S, hidden)
        return hidden_states

    def _mask(self, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Join the attention pattern, (S, S), with the mask of the padding, (B, 1, 1, S)."""
        padding = _hide_padding(attention_mask)
        config = self.config
        if config.attention_pattern == "full":
            return padding
        pattern = pattern_mask(
            x.shape[1],
            config.attention_pattern,
            causal=self.causal,
            window=config.window,
            block_size=config.block_size,
            num_global_tokens=config.num_global_tokens,
            segment_size=config.segment_size,
            device=x.device,
        )  # (S, S)
        return pattern if padding is None else pattern & padding  # (B, 1, S, S)


def _hide_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Make of (batch, keys) a mask (batch, 1, 1, keys) that is the same for all heads and queries."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise InputError(
            f"an attention mask is (batch, seq) with 1 where there is a token, got {attention_mask.dim()} axes; "
            f"give one number per token"
        )
    return (attention_mask != 0)[:, None, None, :]


def build_embedding(vocab_size: int, hidden_size: int) -> nn.Embedding:
    """Make an embedding whose vectors have a length of about 1, so that logits of a tied head are near unit scale."""
    embedding = nn.Embedding(vocab_size, hidden_size)
    nn.init.normal_(embedding.weight, std=hidden_size**-0.5)
    return embedding
