"""Callers in different threads share every step of one model: prompts join and leave while others go on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from tfinfer.closing import Closing
from tfinfer.completion import Chunk, Growing, telling
from tfinfer.errors import ClosedError, InputError, TfinferError
from tfinfer.request import Options, Request
from tfinfer.session.prefix import seat_beside
from tfinfer.tokens.continuous import Continuous, Row
from tfinfer.tokens.generate import Token

if TYPE_CHECKING:
    from tfinfer.generating import GeneratingModel
    from tfinfer.model import Messages, Prompt

Mail = tuple[Row, Token | TfinferError, float]  # of which prompt, a token, and when it came
Mailbox = queue.SimpleQueue[Mail]
AT_ONCE = 8  # tokens of a prompt that a graph takes one by one
PATIENCE = 0.05  # seconds between looks at a caller's `cancel`


class Batcher(Closing):
    """Up to `slots` prompts in one cache, continued together. Make one with `model.batcher()`.

    Any number of threads may call `generate` and `stream`; each gets what `model.generate` would give it (up to how
    sums of other sizes are rounded), and a step reads the weights once for all. Who finds no slot waits for one, in the
    order of calls. A prompt that joins is read in pieces, with a step of all others after each. What slots hold of a
    prompt's beginning, live ones too, is not computed again. A thread of its own runs the model; `close` ends it.
    """

    def __init__(self, model: GeneratingModel, slots: int, capacity: int, piece: int, reuse_prefix: bool) -> None:
        for name, value in (("slots", slots), ("capacity", capacity), ("piece", piece)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"expected {name} to be a whole number of at least one, got {value!r}")
        if model.manifest.kind != "decoder":
            raise InputError("a batcher is of a decoder: of an encoder-decoder, use generate with a list of sources")
        self._model, self._slots, self._capacity = model, slots, min(capacity, model.manifest.max_length)
        self._piece = min(piece, AT_ONCE) if model.manifest.appends_one else piece
        self._reuses = reuse_prefix and not model.manifest.appends_one
        self._changed = threading.Condition()
        self._asked: list[Row] = []  # these two are for the thread to take
        self._ended: list[Row] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(self._opened(),), name="tfinfer-batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and let the cache go. Who still waits gets a ClosedError, as do later calls."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- callers ------------------------------------------------------------------------------------------------
    def generate(self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]) -> Any:
        """As `model.generate`, without beams and drafts."""
        request, single = self._request(prompt, options)
        growing = [Growing() for _ in request.prompts]
        for chunk in self._chunks(request):
            growing[chunk.index].add(chunk)
        found = [one.completion(self._model.tokenizer is not None) for one in growing]
        return found[0] if single else found

    def stream(self, prompt: Prompt | Sequence[Prompt] | Messages, **options: Unpack[Options]) -> Iterator[Chunk]:
        """As `model.stream`, without drafts. Leaving the loop, or closing the iterator, frees the slots."""
        return self._chunks(self._request(prompt, options)[0])

    def _request(self, prompt: Any, options: Options) -> tuple[Request, bool]:
        request, single = self._model._request(prompt, options)
        if request.settings.searches or request.settings.speculates:
            raise InputError("a batcher takes no num_beams, lookup or draft: call the model's own generate")
        if not request.settings.reuse_prefix:
            raise InputError("reuse_prefix is of a batcher, not of a call: give it to model.batcher")
        return request, single

    def _chunks(self, request: Request) -> Iterator[Chunk]:
        mailbox: Mailbox = queue.SimpleQueue()
        settings = request.settings
        tellings = telling(self._model.tokenizer, request, time.perf_counter())
        rows = [Row(i, prompt, settings.params, settings.limits, mailbox) for i, prompt in enumerate(request.prompts)]
        going = dict(enumerate(tellings))
        self._tell(self._asked, rows)
        try:
            while going:
                mail = self._next(mailbox, settings.cancel)
                if mail is None:
                    now = time.perf_counter()
                    yield from (t.chunk(Token(i, None, "cancelled"), now, rows[i].reused) for i, t in going.items())
                    return
                row, token, now = mail
                if isinstance(token, TfinferError):
                    raise token
                if row.index not in going:  # it came before its prompt could be ended
                    continue
                chunk = going[row.index].chunk(token, now, row.reused)
                if chunk.finish_reason is not None:
                    del going[row.index]
                    self._tell(self._ended, [row])
                yield chunk
        finally:
            self._tell(self._ended, [rows[index] for index in going])

    def _tell(self, box: list[Row], rows: Sequence[Row]) -> None:
        """Hand rows to the thread."""
        with self._changed:
            if self._closed and box is self._asked:
                raise ClosedError("the batcher was closed: make another one")
            box += rows
            self._changed.notify()

    @staticmethod
    def _next(mailbox: Mailbox, cancel: threading.Event | None) -> Mail | None:
        """The next token; None when the caller cancels."""
        while cancel is None or not cancel.is_set():
            try:
                return mailbox.get(timeout=None if cancel is None else PATIENCE)
            except queue.Empty:
                continue
        return None

    # -- the thread ---------------------------------------------------------------------------------------------
    def _work(self, loop: Continuous) -> None:
        why = "the batcher was closed: make another one"
        while self._take(loop):
            try:
                for row, outcome in loop.advance():
                    row.to.put((row, outcome, time.perf_counter()))
            except Exception as error:  # of any kind: nobody may wait for ever
                self._refuse([*loop.rows, *loop.waiting], error)
                loop.cache.close()  # what it holds may be half written, or not finite
                try:
                    loop = self._opened()
                except Exception as failure:
                    why = f"the batcher ended, for its cache does not open again: {failure!r}: make another one"
                    break
        self._leave([*loop.rows, *loop.waiting], ClosedError(why))
        loop.cache.close()

    def _leave(self, rows: Sequence[Row], why: ClosedError) -> None:
        with self._changed:
            self._closed, asked = True, self._asked
        self._refuse([*rows, *asked], why)

    def _take(self, loop: Continuous) -> bool:
        """Hand new and ended prompts to the loop, wait where there is nothing to do; false when it is over."""
        with self._changed:
            while not (self._closed or self._asked or self._ended) and loop.idle:
                self._changed.wait()
            asked, ended = self._asked, self._ended
            self._asked, self._ended = [], []
        for row in asked:
            loop.add(row)
        for row in ended:
            loop.finish(row)
        return not self._closed

    @staticmethod
    def _refuse(rows: Sequence[Row], error: Exception) -> None:
        told = error if isinstance(error, TfinferError) else TfinferError(f"a step failed: {error}")
        for row in rows:
            row.to.put((row, told, time.perf_counter()))

    def _opened(self) -> Continuous:
        decoder, vocab_size = self._model.decoder, self._model.manifest.num_logits
        cache = decoder.open_cache(self._slots, self._capacity)
        seat = seat_beside if self._reuses else lambda cache, prompt: cache.acquire()
        return Continuous(decoder, cache, vocab_size, self._piece, seat)
