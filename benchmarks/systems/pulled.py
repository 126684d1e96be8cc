"""Tokens that a library hands to a callback, as an iterator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

Put = Callable[[int], None]


def pulled(run: Callable[[Put], object]) -> Iterator[int]:
    """Yield what `run`, in a thread of its own, puts; raises what it raises."""
    made: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run(made.put)
        except BaseException as error:  # told in the thread that asked
            raised.append(error)
        finally:
            made.put(None)

    thread = threading.Thread(target=work)
    thread.start()
    while (token := made.get()) is not None:
        yield token
    thread.join()
    if raised:
        raise raised[0]
