"""What generation returns: plain frozen records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tfinfer.tokens.generate import FinishReason
from tfinfer.tokens.sampling import TokenLogprobs


@dataclass(frozen=True)
class Usage:
    """How many tokens went in and came out, and how many were drafted and how many of these were right."""

    prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds until the first token (prefill and all that waits before it), and from there to the last."""

    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Chunk:
    """One token of one prompt of a stream; the last one of a prompt has the finish reason, usage and timings.

    `text` may be empty while a character or a stop string is not yet decided; it is None without a tokenizer.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt. A stop id is not part of `token_ids`, a stop string not of `text`.

    score: of a beam search, the log-probability over length ** length_penalty. `timings` has its whole time as the
    time to the first token, for none is known before the end.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
