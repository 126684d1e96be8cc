"""What is left of a decoded token's time when onnxruntime's own is taken off: the loop, the choice, the text.

    python benchmarks/loop.py FOLDER --prompt 128 --new 256 --rounds 5

The time between two tokens of a stream, less the time of `run_with_iobinding` between them: medians of each round, and
of the rounds the median with the lowest and the highest. Greedy, batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import tfinfer
from tfinfer.session.ort import onnxruntime


def timed_runs() -> list[float]:
    """The seconds of every run of onnxruntime from now on, in the order in which they end."""
    seconds: list[float] = []
    kind: Any = onnxruntime().InferenceSession
    run = kind.run_with_iobinding

    def timed(*given: Any) -> None:
        started = time.perf_counter()
        run(*given)
        seconds.append(time.perf_counter() - started)

    kind.run_with_iobinding = timed
    return seconds


def one_round(model: Any, ids: list[int], new: int, runs: list[float]) -> dict[str, float]:
    """Median microseconds of a token, of onnxruntime in it, and of the rest."""
    runs.clear()
    at = []
    for _ in model.stream(ids, max_tokens=new, stop_ids=[], reuse_prefix=False):
        at.append(time.perf_counter())
    tokens = [after - before for before, after in pairwise(at)]
    steps = runs[-len(tokens) :]  # those before read the prompt
    rest = [token - step for token, step in zip(tokens, steps, strict=True)]
    named = (("token", tokens), ("onnxruntime", steps), ("rest", rest))
    return {name: statistics.median(values) * 1e6 for name, values in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    runs = timed_runs()
    with tfinfer.load(a.folder, threads=a.threads) as model:
        ids = [1 + place % 100 for place in range(a.prompt)]
        one_round(model, ids, a.new, runs)
        rounds = [one_round(model, ids, a.new, runs) for _ in range(a.rounds)]
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        print(f"{name:12} {statistics.median(values):8.0f} us ({min(values):.0f} to {max(values):.0f})")
    print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    main()
