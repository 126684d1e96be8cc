"""What generation returns: plain frozen records, and how they are made of tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tfinfer.request import Request
from tfinfer.tokens.generate import FinishReason, Token
from tfinfer.tokens.sampling import TokenLogprobs
from tfinfer.tokens.text import RowText
from tfinfer.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Usage:
    """How many tokens went in and came out.

    reused_tokens: of the prompt, how many were not computed for it: a cache held them, or another prompt of the batch
    has them too. proposed_tokens, accepted_tokens: how many were drafted, and how many of these were right.
    """

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0
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


class Telling:
    """Makes the chunks of one prompt of its tokens. prompt_tokens: how many the caller gave; started: when."""

    def __init__(self, index: int, text: RowText, prompt_tokens: int, started: float) -> None:
        self.index, self.text, self.prompt_tokens, self.started = index, text, prompt_tokens, started
        self.first: float | None = None  # when its first token came
        self.count = 0

    def chunk(self, token: Token, now: float, reused: int, drafted: tuple[int, ...] = ()) -> Chunk:
        """What a token that came at `now` tells. reused, drafted: as in Usage, for the last one."""
        self.first = now if self.first is None else self.first
        self.count += token.token_id is not None
        text, reason = self.text.push(token.token_id, token.finish_reason)
        ids = () if token.token_id is None else (token.token_id,)
        if reason is None:
            return Chunk(self.index, text, ids, None, token.logprobs)
        usage = Usage(self.prompt_tokens, self.count, reused, *drafted)
        timings = Timings(self.first - self.started, now - self.first)
        return Chunk(self.index, text, ids, reason, token.logprobs, usage, timings)


class Growing:
    """Collects the chunks of one prompt."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def completion(self, has_text: bool) -> Completion:
        last = self.chunks[-1]
        assert last.finish_reason
        assert last.usage
        assert last.timings
        logprobs = tuple(c.logprobs for c in self.chunks if c.logprobs is not None)
        return Completion(
            text="".join(c.text for c in self.chunks if c.text) if has_text else None,
            token_ids=tuple(i for c in self.chunks for i in c.token_ids),
            finish_reason=last.finish_reason, usage=last.usage, timings=last.timings, logprobs=logprobs or None,
        )  # fmt: skip


def telling(tokenizer: Tokenizer | None, request: Request, started: float) -> list[Telling]:
    """Who makes the chunks of each prompt of a request."""
    stop = request.settings.stop
    return [
        Telling(index, RowText(tokenizer, shown, stop), len(given), started)
        for index, (shown, given) in enumerate(zip(request.shown, request.given))
    ]
