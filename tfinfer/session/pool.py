"""The caches of a model between its calls: lent to one call at a time, with what they still hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from tfinfer.errors import ClosedError
from tfinfer.session.prefix import matches

MOST = 2  # caches that are kept between calls


class CachePool:
    """Lends caches under a lock, each to one call at a time.

    open_cache: from slots and capacity to a new one.
    """

    def __init__(self, open_cache: Callable[[int, int], Any]) -> None:
        self._open, self._lock, self._closed = open_cache, threading.Lock(), False
        self.caches: list[Any] = []  # that nobody has, the one that was used last at the end

    def lend(self, slots: int, capacity: int, prompts: Sequence[Sequence[int]] = ()) -> Any:
        """A cache of `slots` or more, that holds as much as there is of the beginnings of `prompts`.

        A cache that holds nothing of them is lent where it has just these sizes. Raises ClosedError.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the model was closed: load it again")
            cache = self._best(slots, capacity, prompts)
            if cache is not None:
                self.caches.remove(cache)
        if cache is None:
            return self._open(slots, capacity)
        if not cache.has_room(capacity):
            cache.grow(capacity)
        return cache

    def _best(self, slots: int, capacity: int, prompts: Sequence[Sequence[int]]) -> Any:
        """The cache to lend, None where another one must be opened."""
        best, most = None, (0, False)
        for cache in self.caches:
            same, room = cache.slots == slots, cache.has_room(capacity)
            # One with more slots is never widened for the sake of a few tokens: every slot of it would grow.
            if not same and not (cache.slots > slots and room):
                continue
            held = sum(held for _, held in matches(cache, prompts).values())
            worth = (held, same and room)
            if worth > most:
                best, most = cache, worth
        return best

    def give_back(self, cache: Any) -> None:
        """Take a cache that was lent. Its slots are released; what they held is found by the next call."""
        cache.reset()
        with self._lock:
            if self._closed:
                cache.close()
                return
            self.caches.append(cache)
            if len(self.caches) > MOST:
                self.caches.pop(0).close()

    def close(self) -> None:
        """Let all caches go; later calls raise ClosedError."""
        with self._lock:
            self._closed = True
            for cache in self.caches:
                cache.close()
            self.caches.clear()
