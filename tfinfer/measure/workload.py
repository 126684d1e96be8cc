"""What is measured and how often, made to fit the model. Knows nothing of how it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from tfinfer.errors import InputError, LengthError

PROMPT_LENGTH, NEW_TOKENS = 128, 64
LEAST_NEW = 2  # the first one comes from prefill: a step needs a second


@dataclass(frozen=True)
class Workload:
    """What is measured, and how often."""

    prompt_length: int
    new_tokens: int
    batch: int
    repeats: int
    warmup: int


def plan(
    max_length: int,
    *,
    prompt_length: int | None = None,
    new_tokens: int | None = None,
    batch: int = 1,
    repeats: int = 5,
    warmup: int = 1,
) -> Workload:
    """The workload that fits; None is a length that may shrink. Raises InputError or LengthError for what was asked."""
    for name, value, least in (
        ("prompt_length", prompt_length, 1),
        ("new_tokens", new_tokens, LEAST_NEW),
        ("batch", batch, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if new_tokens is None:
        room = max_length - (prompt_length or min(PROMPT_LENGTH, 2 * max_length // 3))
        new_tokens = max(LEAST_NEW, min(NEW_TOKENS, room))
    if prompt_length is None:
        prompt_length = max(1, min(PROMPT_LENGTH, max_length - new_tokens))
    if prompt_length + new_tokens > max_length:
        both = f"a prompt of {prompt_length} tokens and {new_tokens} new ones"
        raise LengthError(f"{both} would pass the model's longest length, {max_length}")
    return Workload(prompt_length, new_tokens, batch, repeats, warmup)
