"""A cache of 8 bits beside one in float32: the time of a step behind so many positions, and of a prompt's.

    python benchmarks/small_cache.py WIDE SMALL --contexts 128,1024,4096 --rounds 9

WIDE and SMALL are folders of one module, exported without and with --cache int8. All in one process, in turns; printed
are the medians of the rounds and the ratio to the float32 cache in the same round, with its spread, by the clock and
by processor time, which other processes disturb less (with --threads 1). What the cache holds before a step is noise of
its own range: no step's time depends on it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import tfinfer

STEPS = 8  # of a round
Took = tuple[float, float]  # seconds by the clock and of the processor


class Side:
    """One folder, with a cache of one slot for each context."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.model: Any = tfinfer.load(folder, threads=threads)
        self.decoder = self.model.decoder
        self.longest = self.model.manifest.max_length

    def filled(self, context: int) -> tuple[Any, int]:
        """A cache with a slot that holds all but a round's steps of a context."""
        cache = self.decoder.open_cache(1, context)
        slot, rng = cache.acquire(), np.random.default_rng(0)
        for buffer in cache.buffers:
            whole = buffer.owner.dtype.kind == "i"
            buffer.owner[:] = rng.integers(-127, 128, buffer.shape) if whole else rng.normal(size=buffer.shape)
        cache.lengths[cache.row(slot)] = context - STEPS
        cache.ids[slot] = [0] * (context - STEPS)
        return cache, slot

    def steps(self, cache: Any, slot: int) -> Took:
        """What a step takes."""
        before = cache.length(slot)
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            self.decoder.step(cache, [slot], [1])
        took = (time.perf_counter() - clock) / STEPS, (time.process_time() - processor) / STEPS
        cache.rewind(slot, before)
        return took

    def prompt(self, tokens: int) -> Took:
        """What a prompt of so many ids takes."""
        cache = self.decoder.open_cache(1, tokens)
        ids = np.random.default_rng(0).integers(0, self.model.manifest.vocab_size, tokens)
        clock, processor = time.perf_counter(), time.process_time()
        self.decoder.prefill(cache, cache.acquire(), ids)
        took = time.perf_counter() - clock, time.process_time() - processor
        cache.close()
        return took


def row(name: str, wide: list[Took], small: list[Took]) -> dict[str, Any]:
    found: dict[str, Any] = {"what": name}
    told = ""
    for i, by in enumerate(("clock", "processor")):
        ratios = [one[i] / other[i] for one, other in zip(small, wide)]
        found[by] = {
            "float32_ms": round(1e3 * statistics.median(one[i] for one in wide), 2),
            "int8_ms": round(1e3 * statistics.median(one[i] for one in small), 2),
            "ratio": [round(f(ratios), 3) for f in (statistics.median, min, max)],
        }
        middle, low, high = found[by]["ratio"]
        told += f"{found[by]['float32_ms']:10.2f}{found[by]['int8_ms']:10.2f}  {middle:.2f} ({low:.2f} to {high:.2f})"
    print(f"{name:>20}{told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wide", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--prompts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    sides = [Side(folder, given.threads) for folder in (given.wide, given.small)]
    print(f"{'ms':>20}" + "".join(f"{'float32':>10}{'int8':>10}  by {by:<16}" for by in ("clock", "processor")))
    rows = []
    for context in map(int, given.contexts.split(",")):
        held = [side.filled(context) for side in sides]
        sizes = [cache.nbytes for cache, _ in held]
        took: list[list[Took]] = [[], []]
        for turn in range(given.rounds + 1):  # the first warms up
            for i in (0, 1) if turn % 2 else (1, 0):
                seconds = sides[i].steps(*held[i])
                took[i] += [seconds] if turn else []
        for cache, _ in held:
            cache.close()
        rows.append({**row(f"step behind {context}", *took), "cache_bytes": sizes})
    for tokens in map(int, given.prompts.split(",")):
        took = [[], []]
        for turn in range(max(3, given.rounds // 3) + 1):
            for i in (0, 1) if turn % 2 else (1, 0):
                seconds = sides[i].prompt(tokens)
                took[i] += [seconds] if turn else []
        rows.append(row(f"prompt of {tokens}", *took))
    print(json.dumps({"rows": rows, "rounds": given.rounds, "threads": sides[0].model.decoder.threads.count}))


if __name__ == "__main__":
    main()
