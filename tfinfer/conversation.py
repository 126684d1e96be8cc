"""A conversation: what was said stays in a cache of its own, and every turn computes only what is new."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tfinfer.closing import Closing
from tfinfer.completion import Chunk, Completion, Growing
from tfinfer.errors import ClosedError, InputError
from tfinfer.request import Options, Request, Settings
from tfinfer.session.contents import Contents
from tfinfer.session.prefix import Seats, common
from tfinfer.session.snapshots import NOTHING, read_snapshot, write_snapshot
from tfinfer.tokens.generate import check_lengths

if TYPE_CHECKING:
    from tfinfer.generating import GeneratingModel
    from tfinfer.model import Messages, Prompt


class Conversation(Closing):
    """Ids that grow turn by turn, and a cache that holds them. Make one with `model.conversation()`.

    Prompts and answers stay. The last token of an answer, which no step has run yet, is run with the next turn. The
    cache is compared with the ids at every turn, so whatever became of it, the next answer follows exactly these. One
    thread at a time; different conversations of one model may run in different threads.
    """

    def __init__(self, model: GeneratingModel, ids: list[int] | None = None, contents: Contents = NOTHING) -> None:
        self._model = model
        self._ids = list(ids or ())
        self._lock = threading.Lock()
        self._closed = False
        self._cache: Any = None
        self._slot = -1
        if contents.ids:
            self._cache = model.decoder.open_cache(1, max(1, len(self._ids)))
            self._slot = self._cache.put(contents)

    def __repr__(self) -> str:
        return f"<tfinfer conversation of {self.length} tokens with {self._model.manifest.source.reference}>"

    # -- what there is ------------------------------------------------------------------------------------------
    @property
    def ids(self) -> list[int]:
        """All tokens so far, prompts and answers. A stop id, which is no part of an answer, is not among them."""
        return list(self._ids)

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return len(self._ids)

    # -- turns --------------------------------------------------------------------------------------------------
    def generate(self, prompt: Prompt | Messages = (), **options: Unpack[Options]) -> Completion:
        """Append a prompt and the answer to it, which is returned.

        Args:
            prompt: a text or ids, which follow what there is (only the first text gets the tokenizer's special tokens);
                nothing, to go on; or messages with `role` and `content`, each time the whole conversation: what the
                chat template makes of them takes the place of what there is, and only what differs is computed.
            options: as `model.generate`, without beams.

        Usage counts the whole conversation as the prompt, and `reused_tokens` what was not computed again. A turn that
        fails leaves `ids` as they were. Raises InputError or LengthError.
        """
        growing = Growing()
        for chunk in self.stream(prompt, **options):
            growing.add(chunk)
        return growing.completion(self._model.tokenizer is not None)

    def stream(self, prompt: Prompt | Messages = (), **options: Unpack[Options]) -> Iterator[Chunk]:
        """As `generate`, token by token. Leaving the loop ends the turn there: what was said so far stays.

        The arguments are checked at once, before the first chunk is asked for.
        """
        self._check_open()
        settings = self._model._settings(options)
        if settings.searches:
            raise InputError("a conversation goes on with one answer: expected num_beams=1")
        ids, whole = self._read(prompt)
        self._request(settings, ids if whole else self._ids + ids)
        return self._turn(settings, ids, whole)

    def _read(self, prompt: Any) -> tuple[list[int], bool]:
        """The ids of a prompt, and whether they are the whole conversation."""
        model = self._model
        if isinstance(prompt, str):
            ids = model.tokenize(prompt, add_special_tokens=not self._ids)
            return (model._checked(ids) if ids else []), False
        items = list(prompt)
        if not items:
            return [], False
        given, single = model._given(items)
        if not single:
            raise InputError("a conversation takes one prompt at a time: a text, a list of ids, or messages")
        return given[0], isinstance(items[0], Mapping)

    def _request(self, settings: Settings, prompt: list[int]) -> Request:
        if not prompt:
            raise InputError("expected a prompt of at least one token: the conversation has none yet to go on from")
        longest = self._model.manifest.max_length
        capacity = check_lengths([prompt], settings.limits.max_tokens, longest, "a conversation")
        return Request(settings, [prompt], [], capacity)

    def _turn(self, settings: Settings, ids: list[int], whole: bool) -> Iterator[Chunk]:
        with self._alone():
            before = self._ids
            request = self._request(settings, ids if whole else before + ids)
            try:
                cache, seats = self._seated(request)
                self._ids = list(request.prompts[0])
                yield from self._said(request, cache, seats)
            except GeneratorExit:  # left on the way: what was said stays
                raise
            except BaseException:
                self._ids = before
                self._drop()  # what it holds may be half written, or not finite
                raise

    def _said(self, request: Request, cache: Any, seats: Seats) -> Generator[Chunk]:
        """The answer, which is added to the ids as it comes."""
        try:
            with contextlib.closing(self._model._run(request, cache, seats)) as chunks:
                for chunk in chunks:
                    self._ids += chunk.token_ids
                    yield chunk
        finally:  # the loop gives its slot back
            if cache.left:
                self._slot = cache.revive(cache.left[0], len(cache.ids[cache.left[0]]))
            else:
                self._drop()

    def _seated(self, request: Request) -> tuple[Any, Seats]:
        """The cache, whose slot holds as much of the prompt as it can, but not its last token, which gives logits."""
        (prompt,) = request.prompts
        if self._cache is None:
            self._cache = self._model.decoder.open_cache(1, request.capacity)
            self._slot = self._cache.acquire()
        cache, slot = self._cache, self._slot
        held = cache.reachable(slot, min(common(cache.ids[slot], prompt), len(prompt) - 1))
        cache.rewind(slot, held)
        cache.keep(slot)
        return cache, Seats([slot], [held], [held])

    # -- the past -----------------------------------------------------------------------------------------------
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Where the cache cannot go back so far, of a model with states or a window, the next turn computes again what is
        missing: states are kept at the beginning and at the prompt's end of the last turns. Raises InputError.
        """
        with self._alone():
            if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(self._ids):
                raise InputError(f"expected a length from 0 to {len(self._ids)}, which there are, got {length!r}")
            self._ids = self._ids[:length]

    def fork(self) -> Conversation:
        """Another conversation with the same past and a cache of its own."""
        with self._alone():
            return Conversation(self._model, self._ids, self._contents())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, cache included, to a file that `model.conversation(path)` goes on from.

        It is written whole or not at all. What was said can be read from it. Raises SnapshotError.
        """
        with self._alone():
            write_snapshot(Path(path), self._model.manifest, self._ids, self._contents())

    def _contents(self) -> Contents:
        """What the cache holds of the ids."""
        cache, slot = self._cache, self._slot
        if cache is None:
            return NOTHING
        cache.rewind(slot, cache.reachable(slot, common(cache.ids[slot], self._ids)))
        contents: Contents = cache.contents(slot)
        return contents

    # -- life ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Let the cache go; later calls raise ClosedError. A turn that is running ends first."""
        self._closed = True
        if self._lock.acquire(blocking=False):
            self._drop()
            self._lock.release()

    def _drop(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the conversation was closed: begin another one")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing else may go on with the cache meanwhile."""
        self._check_open()
        if not self._lock.acquire(blocking=False):
            raise InputError("a turn of this conversation is running: read its stream to the end, or close it, first")
        try:
            yield
        finally:
            if self._closed:
                self._drop()
            self._lock.release()


def open_conversation(model: GeneratingModel, path: str | os.PathLike[str] | None) -> Conversation:
    """A new conversation, or the one that `save` wrote. Raises SnapshotError."""
    if path is None:
        return Conversation(model)
    return Conversation(model, *read_snapshot(Path(path), model.manifest))
