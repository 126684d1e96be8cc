"""Names what a setting may be, and turns a wrong one into an `InputError`; knows no torch and no module.

The config and the modules call the same checks, so that each of them can also be built alone.
"""

import math
from typing import Any, Literal, get_args

from tfinfer.errors import InputError

Activation = Literal["relu", "gelu", "gelu_tanh", "swiglu"]
AttentionPattern = Literal["full", "sliding_window", "block_local_global", "segmented", "hierarchical"]
KernelForm = Literal["quadratic", "linear"]
Norm = Literal["layer_norm", "rms_norm", "batch_norm"]
NormPosition = Literal["pre", "post"]
Position = Literal["sinusoidal", "learned", "rotary", "alibi", "relative", "none"]
Similarity = Literal["dot", "scaled_dot", "general", "kernel"]

# The settings that each pattern needs; with another pattern they must be left out.
PATTERN_SETTINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "sliding_window": ("window",),
    "block_local_global": ("block_size", "num_global_tokens"),
    "segmented": ("segment_size",),
    "hierarchical": ("segment_size",),
}


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


def check_pattern(pattern: AttentionPattern, **settings: int | None) -> None:
    """Raise unless `settings` holds a size for what the pattern needs and None for everything else."""
    check_choice("attention_pattern", pattern, AttentionPattern)
    for name, value in settings.items():
        if name in PATTERN_SETTINGS[pattern]:
            check_size(name, value)
        elif value is not None:
            users = " or ".join(repr(user) for user, needed in PATTERN_SETTINGS.items() if name in needed)
            raise InputError(
                f"{name} is a setting of attention_pattern {users}, got {name}={value!r} with {pattern!r}; "
                f"leave {name} out or change the pattern"
            )


def check_similarity(similarity: Similarity, kernel_form: KernelForm, scale: float | None) -> None:
    """Raise unless the form and the scale are ones that this similarity has."""
    check_choice("similarity", similarity, Similarity)
    check_choice("kernel_form", kernel_form, KernelForm)
    if scale is not None:
        check_positive("scale", scale)
    if similarity == "kernel" and scale is not None:
        raise InputError(
            f"scale is for the scores of a softmax and similarity 'kernel' has none, got scale={scale}; leave it out"
        )
    if similarity != "kernel" and kernel_form == "linear":
        raise InputError(
            f"kernel_form 'linear' needs similarity 'kernel' because a softmax cannot be summed up as it goes, "
            f"got {similarity!r}; use kernel_form='quadratic' or similarity='kernel'"
        )


def check_buckets(num_buckets: int, max_distance: int) -> None:
    """Raise unless both halves of the buckets, those of one distance and those of a range, have something to hold."""
    check_size("num_buckets", num_buckets)
    check_size("max_distance", max_distance)
    if num_buckets < 4 or max_distance <= num_buckets // 2:
        raise InputError(
            f"relative positions need num_buckets of at least 4 and max_distance above half of them, got "
            f"num_buckets={num_buckets} and max_distance={max_distance}; T5 has 32 and 128"
        )


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
