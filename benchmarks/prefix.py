"""What reusing beginnings spares: the time to the first token, all ways in one process, in turns.

    python benchmarks/prefix.py model/

The ids are random: a beginning of --past tokens and --new ones after it, other ones in every round, so that nothing but
what a line says is reused. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import tfinfer


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_round(model: Any, a: argparse.Namespace, rng: np.random.Generator) -> dict[str, float]:
    """Seconds to the first token of a prompt that follows another, and of a batch that shares a beginning."""

    def ids(count: int) -> list[int]:
        return rng.integers(3, model.manifest.vocab_size, count).tolist()

    def first(prompt: Any, reuse: bool = True) -> Callable[[], Any]:
        return lambda: model.generate(prompt, max_tokens=1, stop_ids=[], reuse_prefix=reuse)

    past, new = ids(a.past), ids(a.new)
    batch = [past + ids(a.new) for _ in range(a.batch)]
    first(ids(a.past))()
    pair = [("anew", first(past + new, False)), ("nothing to reuse", first(ids(a.past + a.new)))]
    found = dict.fromkeys(("anew", "nothing to reuse"), 0.0)
    found |= {pair[place][0]: timed(pair[place][1]) for place in rng.permutation(2)}
    first(past)()
    found["reused"] = timed(first(past + new))
    with model.conversation() as chat:
        chat.generate(past, max_tokens=1, stop_ids=[])
        chat.rewind(a.past)  # the answer is no part of what follows
        found["conversation"] = timed(lambda: chat.generate(new, max_tokens=1, stop_ids=[]))
    found["batch, anew"] = timed(first(batch, False))
    # the pool holds `past` already: another beginning, so that it is the batch itself that shares
    other = ids(a.past)
    found["batch, shared"] = timed(first([other + row[a.past :] for row in batch]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    with tfinfer.load(a.folder, threads=a.threads) as model:
        rounds = [one_round(model, a, rng) for _ in range(a.rounds + 1)][1:]
    result = {}
    for name in rounds[0]:
        base = "batch, anew" if name.startswith("batch") else "anew"
        ratios = [row[base] / row[name] for row in rounds]
        median = statistics.median(row[name] for row in rounds)
        result[name] = {"seconds": median, "ratio": [f(ratios) for f in (statistics.median, min, max)]}
        low, high = min(ratios), max(ratios)
        print(f"{name:20s} {1e3 * median:9.1f} ms   {statistics.median(ratios):6.2f} x ({low:.2f} to {high:.2f})")
    print(json.dumps({**vars(a), "result": result}))


if __name__ == "__main__":
    main()
