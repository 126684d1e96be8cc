"""An exported decoder with several prompts at once: tokens per second by how many, and what a prompt that joins costs.

    python benchmarks/batch.py model/ --rows 1 2 4 8 --rounds 5

Prompts are random ids of different lengths, up to `--prompt`; every row makes `--new` tokens. Rate: that of the steps
in which all rows go on, by the median time between two of them; the ratio is to the first of `--rows` in the same
round (lowest to highest). Joining: while all rows but one go on in a batcher, a prompt of `--joins` tokens comes; given
is the longest time between two tokens of the others then, beside the median without, and the time of its prefill
alone. Sizes take turns in one process. The last line is JSON, which `--json` keeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import tfinfer


def ragged(model: Any, rows: int, longest: int) -> list[list[int]]:
    """Prompts of a half to the whole of `longest` ids."""
    rng = np.random.default_rng(rows)
    lengths = np.linspace(longest, longest // 2, rows).astype(int).tolist()
    return [rng.integers(3, model.manifest.vocab_size, n).tolist() for n in lengths]


def step_seconds(model: Any, prompts: list[list[int]], new: int) -> float:
    """Median seconds from one token of the first row to its next, which is one step of all rows."""
    times = []
    for chunk in model.stream(prompts, max_tokens=new, stop_ids=[], reuse_prefix=False):
        if chunk.index == 0:
            times.append(time.perf_counter())
    return statistics.median(np.diff(times))


def joining(model: Any, rows: int, a: argparse.Namespace) -> dict[str, float]:
    """Milliseconds: between tokens before, the longest while a prompt of `--joins` tokens comes, its prefill alone."""
    alone = next(
        iter(model.stream(prompt := ragged(model, 1, a.joins)[0], max_tokens=1, stop_ids=[], reuse_prefix=False))
    )
    times: list[list[float]] = [[] for _ in range(rows - 1)]
    with model.batcher(rows, capacity=max(a.prompt, a.joins) + a.new * 4, piece=a.piece, reuse_prefix=False) as batcher:

        def follow(index: int, given: list[int]) -> None:
            for _ in batcher.stream(given, max_tokens=a.new * 4, stop_ids=[]):
                times[index].append(time.perf_counter())

        threads = [
            threading.Thread(target=follow, args=(i, p)) for i, p in enumerate(ragged(model, rows - 1, a.prompt))
        ]
        for thread in threads:
            thread.start()
        while min(map(len, times)) < a.new:
            time.sleep(0.001)
        came = time.perf_counter()
        batcher.generate(prompt, max_tokens=1, stop_ids=[])
        left = time.perf_counter()
        for thread in threads:
            thread.join()
    gaps = [(end, end - start) for row in times for start, end in itertools.pairwise(row)]
    return {
        "before": 1e3 * statistics.median(gap for end, gap in gaps if end < came),
        "longest": 1e3 * max(gap for end, gap in gaps if came <= end <= left),
        "prefill": 1e3 * alone.timings.first_token_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--joins", type=int, default=512)
    parser.add_argument("--piece", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with tfinfer.load(a.folder, threads=a.threads) as model:
        seconds: dict[int, list[float]] = {rows: [] for rows in a.rows}
        for number in range(a.rounds + 1):
            for rows in a.rows:
                taken = step_seconds(model, ragged(model, rows, a.prompt), a.new)
                if number:
                    seconds[rows].append(taken)
        rates = {}
        for rows, taken in seconds.items():
            ratios = [rows * one / many for one, many in zip(seconds[a.rows[0]], taken)]
            spread = [round(f(ratios), 2) for f in (statistics.median, min, max)]
            rates[rows] = {"tokens_per_s": round(rows / statistics.median(taken), 1), "ratio": spread}
            print(f"{rows} rows: {rates[rows]['tokens_per_s']} tok/s, {spread[0]} x ({spread[1]} to {spread[2]})")
        found = [joining(model, max(a.rows), a) for _ in range(a.rounds)]
    joined = {name: round(statistics.median(one[name] for one in found), 1) for name in found[0]}
    print(f"a prompt of {a.joins} joins {max(a.rows) - 1}, in pieces of {a.piece}, ms: {joined}")
    report = json.dumps({**vars(a), "json": str(a.json), "rates": rates, "joining": joined})
    if a.json:
        a.json.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
