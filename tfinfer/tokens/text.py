"""The text of one prompt's tokens as they come: whole characters only, and cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tfinfer.tokens.generate import FinishReason
from tfinfer.tokens.stop import StopMatcher
from tfinfer.tokens.tokenizer import StreamDecoder, Tokenizer


class RowText:
    """Turns tokens into pieces of text; without a tokenizer there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.decoder = StreamDecoder(tokenizer, prompt_ids=prompt_ids) if tokenizer else None
        self.matcher = StopMatcher(tuple(stop)) if stop else None
        self.stopped = False

    def push(self, token_id: int | None, reason: FinishReason | None) -> tuple[str | None, FinishReason | None]:
        """The text that is now sure, and why the prompt ends if it does."""
        if self.decoder is None:
            return None, reason
        piece = self.decoder.push(token_id) if token_id is not None else ""
        if reason is not None:
            piece += self.decoder.flush()
        if self.matcher is None:
            return piece, reason
        text = self.matcher.push(piece)
        if self.matcher.matched is not None:
            self.stopped = True
            return text, "stop"
        return text + (self.matcher.flush() if reason is not None else ""), reason
