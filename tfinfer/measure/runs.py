"""Timed calls of an open decoder: prefill and steps on a cache, and the public loop over both."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tfinfer.generating import GeneratingModel
from tfinfer.measure.workload import Workload

Progress = Callable[[str], None]


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection would fall into one of the steps."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure_decoder(
    model: GeneratingModel, prompts: Any, work: Workload, progress: Progress
) -> tuple[list[float], list[float], int]:
    """Seconds of every prefill and of every step, and the bytes of the cache."""
    decoder = model.decoder
    cache = decoder.open_cache(work.batch, work.prompt_length + work.new_tokens)
    ids = np.ascontiguousarray(prompts[:, 0])
    prefill: list[float] = []
    steps: list[float] = []
    try:
        for turn in range(work.warmup + work.repeats):
            progress(f"prefill and decode: round {turn + 1} of {work.warmup + work.repeats}")
            slots = [cache.acquire() for _ in range(work.batch)]
            times = [timed(lambda: [decoder.prefill(cache, slot, row) for slot, row in zip(slots, prompts)])]  # noqa: B023
            times += [timed(lambda: decoder.step(cache, slots, ids)) for _ in range(work.new_tokens - 1)]  # noqa: B023
            if turn >= work.warmup:
                prefill.append(times[0])
                steps += times[1:]
            cache.reset()
        return prefill, steps, cache.nbytes
    finally:
        cache.close()


def measure_stream(
    model: GeneratingModel, prompts: Any, work: Workload, progress: Progress
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every whole run of the public loop, to the first token in each, and between tokens of one prompt."""
    rows = [row.tolist() for row in prompts]
    whole: list[float] = []
    firsts: list[float] = []
    gaps: list[float] = []
    for turn in range(work.warmup + work.repeats):
        progress(f"end to end: round {turn + 1} of {work.warmup + work.repeats}")
        started = time.perf_counter()
        came = [
            time.perf_counter()
            for chunk in model.stream(rows, max_tokens=work.new_tokens, stop_ids=[], reuse_prefix=False)
            if chunk.index == 0
        ]
        ended = time.perf_counter()
        if turn >= work.warmup:
            whole.append(ended - started)
            firsts.append(came[0] - started)
            gaps += np.diff(came[: work.new_tokens]).tolist()
    return whole, firsts, gaps
