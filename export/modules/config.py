"""Turns the sizes and choices of a transformer into one frozen, checked config, and holds the checks.

It knows no torch. The modules beside it call the same checks, so that each of them can also be built alone.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tfinfer.errors import InputError

Activation = Literal["relu", "gelu", "gelu_tanh", "swiglu"]
Norm = Literal["layer_norm", "rms_norm"]
NormPosition = Literal["pre", "post"]
Position = Literal["sinusoidal", "learned", "rotary", "none"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Say everything about a transformer but its weights; a combination that cannot be built raises `InputError`.

    Without `num_kv_heads` every query head has its own key/value head; without `head_dim` the heads divide
    `hidden_size` among them. Both are numbers once the config is made, so `dataclasses.replace` keeps them: pass
    `num_kv_heads=None` or `head_dim=None` with it to have them chosen anew.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # a number after __post_init__
    head_dim: int = None  # type: ignore[assignment]  # a number after __post_init__
    intermediate_size: int
    activation: Activation = "gelu"
    norm: Norm = "layer_norm"
    norm_position: NormPosition = "pre"
    norm_eps: float = 1e-5
    position: Position = "learned"
    rope_theta: float = 10000.0
    max_length: int
    attention_bias: bool = True
    ffn_bias: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length"):
            check_size(name, getattr(self, name))
        num_kv_heads, head_dim = resolve_heads(self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim)
        object.__setattr__(self, "num_kv_heads", num_kv_heads)
        object.__setattr__(self, "head_dim", head_dim)

        check_choice("activation", self.activation, Activation)
        check_choice("norm", self.norm, Norm)
        check_choice("norm_position", self.norm_position, NormPosition)
        check_choice("position", self.position, Position)
        if self.position == "rotary":
            check_even("head_dim", head_dim, "rotary positions turn its two halves together")
        if self.position == "sinusoidal":
            check_even("hidden_size", self.hidden_size, "sinusoidal positions pair a sine with a cosine")

        check_positive("norm_eps", self.norm_eps)
        check_positive("rope_theta", self.rope_theta)
        check_dropout(self.dropout)
        for name in ("attention_bias", "ffn_bias", "tie_embeddings"):
            check_switch(name, getattr(self, name))


def resolve_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[int, int]:
    """Return `(num_kv_heads, head_dim)` with their defaults filled in; raise where the heads do not fit together."""
    check_size("hidden_size", hidden_size)
    check_size("num_heads", num_heads)
    if head_dim is None:
        if hidden_size % num_heads:
            raise InputError(
                f"hidden_size must be a multiple of num_heads when head_dim is not given, "
                f"got hidden_size={hidden_size} and num_heads={num_heads}; change one of them or give head_dim"
            )
        head_dim = hidden_size // num_heads
    check_size("head_dim", head_dim)
    if num_kv_heads is None:
        num_kv_heads = num_heads
    check_size("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        fitting = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise InputError(
            f"num_heads must be a multiple of num_kv_heads, got num_heads={num_heads} and num_kv_heads={num_kv_heads}; "
            f"set num_kv_heads to one of {fitting}"
        )
    return num_kv_heads, head_dim


def check_size(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}; give a positive int")


def check_even(name: str, value: int, reason: str) -> None:
    """Raise unless `value` is even."""
    if value % 2:
        raise InputError(f"{name} must be even because {reason}, got {value}; use {value - 1 or 2} or {value + 1}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless `value` is one of the names in the `Literal` type `choices`."""
    known = get_args(choices)
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}; set it to one of these names")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise InputError(f"{name} must be a finite number above 0, got {value!r}; give a positive float")


def check_dropout(value: Any) -> None:
    """Raise unless `value` is the probability of an element to be dropped, below 1 so that something is left."""
    if not _is_number(value) or not 0 <= value < 1:
        raise InputError(f"dropout must be at least 0 and below 1, got {value!r}; use 0.0 for none")


def check_switch(name: str, value: Any) -> None:
    """Raise unless `value` is a bool: a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}; give a bool")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
