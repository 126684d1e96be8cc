"""Turns the sizes and choices of a transformer into one frozen, checked config.

It knows no torch. What a single setting may be is in `checks.py`; what must fit together is here.
"""

from dataclasses import dataclass

from tfinfer.errors import InputError

from .checks import (
    Activation,
    AttentionPattern,
    KernelForm,
    Norm,
    NormPosition,
    Position,
    Similarity,
    check_buckets,
    check_choice,
    check_dropout,
    check_even,
    check_pattern,
    check_positive,
    check_similarity,
    check_size,
    check_switch,
    resolve_heads,
)

_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length")
_OPTIONAL_SIZES = ("value_dim", "num_decoder_layers")
_SWITCHES = ("attention_bias", "ffn_bias", "embedding_norm", "tie_embeddings")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Say everything about a transformer but its weights; a combination that cannot be built raises `InputError`.

    Without `num_kv_heads` every query head has its own key/value head; without `head_dim` the heads divide
    `hidden_size` among them. Both are numbers once the config is made, so `dataclasses.replace` keeps them: pass
    `num_kv_heads=None` or `head_dim=None` with it to have them chosen anew.

    `value_dim` is the size of a head's values, `head_dim` when None. `attention_scale` is what scores are multiplied
    by, the similarity's own factor when None. `window`, `block_size`, `num_global_tokens` and `segment_size` belong to
    their attention patterns, `relative_buckets` and `relative_max_distance` to relative positions. An encoder-decoder
    has `num_decoder_layers` on the target's side, `num_layers` when None, and ignores source tokens equal to `pad_id`.
    With `num_token_types` an encoder also knows which part of its input a token belongs to.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_decoder_layers: int | None = None
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # a number after __post_init__
    head_dim: int = None  # type: ignore[assignment]  # a number after __post_init__
    value_dim: int | None = None
    intermediate_size: int
    activation: Activation = "gelu"
    norm: Norm = "layer_norm"
    norm_position: NormPosition = "pre"
    norm_eps: float = 1e-5
    embedding_norm: bool = False
    position: Position = "learned"
    rope_theta: float = 10000.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_length: int
    similarity: Similarity = "scaled_dot"
    kernel_form: KernelForm = "quadratic"
    attention_scale: float | None = None
    attention_bias: bool = True
    attention_pattern: AttentionPattern = "full"
    window: int | None = None
    block_size: int | None = None
    num_global_tokens: int | None = None
    segment_size: int | None = None
    ffn_bias: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    num_token_types: int = 0
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_size(name, getattr(self, name))
        for name in _OPTIONAL_SIZES:
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        num_kv_heads, head_dim = resolve_heads(self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim)
        object.__setattr__(self, "num_kv_heads", num_kv_heads)
        object.__setattr__(self, "head_dim", head_dim)

        check_choice("activation", self.activation, Activation)
        check_choice("norm", self.norm, Norm)
        check_choice("norm_position", self.norm_position, NormPosition)
        check_positive("norm_eps", self.norm_eps)
        check_dropout(self.dropout)
        for name in _SWITCHES:
            check_switch(name, getattr(self, name))
        self._check_positions()
        self._check_attention()
        self._check_tokens()

    def _check_positions(self) -> None:
        check_choice("position", self.position, Position)
        check_positive("rope_theta", self.rope_theta)
        check_buckets(self.relative_buckets, self.relative_max_distance)
        if self.position == "rotary":
            check_even("head_dim", self.head_dim, "rotary positions turn its two halves together")
        if self.position == "sinusoidal":
            check_even("hidden_size", self.hidden_size, "sinusoidal positions pair a sine with a cosine")

    def _check_attention(self) -> None:
        check_similarity(self.similarity, self.kernel_form, self.attention_scale)
        check_pattern(
            self.attention_pattern,
            window=self.window,
            block_size=self.block_size,
            num_global_tokens=self.num_global_tokens,
            segment_size=self.segment_size,
        )
        if self.kernel_form == "linear" and self.attention_pattern != "full":
            raise InputError(
                f"kernel_form 'linear' keeps one sum over all earlier positions and cannot leave some out, got "
                f"attention_pattern {self.attention_pattern!r}; use kernel_form='quadratic' or attention_pattern='full'"
            )
        if self.similarity == "kernel" and self.position in ("alibi", "relative"):
            raise InputError(
                f"position {self.position!r} is added to the scores of a softmax and similarity 'kernel' has none; "
                f"use position 'sinusoidal', 'learned', 'rotary' or 'none', or another similarity"
            )

    def _check_tokens(self) -> None:
        if self.num_token_types != 0:
            check_size("num_token_types", self.num_token_types)
        if self.pad_id is not None and (isinstance(self.pad_id, bool) or self.pad_id not in range(self.vocab_size)):
            raise InputError(
                f"pad_id must be a token id from 0 to {self.vocab_size - 1}, got {self.pad_id!r}; "
                f"give the id the source is padded with, or None"
            )
