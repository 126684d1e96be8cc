"""Beam search on an exported folder: what a step moves in the cache, and how fast it is beside greedy.

    tfinfer export tests/zoo/python_writer.py:build --weights tests/zoo/python_writer/model.safetensors \\
        --tokenizer tests/zoo/python_writer/tokenizer.json -o out/demo
    python benchmarks/beams.py out/demo --beams 4 --prompt 128 --new 64

The prompt is the beginning of this file. "whole rows" is the same search with every row copied after every step, as
`index_select` over a whole cache does; "held positions" is what that would move if it left the rows' empty ends out.
Times are of whole calls, prompt included, interleaved round by round; printed are medians, and the ratio to greedy in
the same round with its spread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tfinfer
from tfinfer.tokens import beams
from tfinfer.tokens.generate import Limits
from tfinfer.tokens.hypotheses import BeamParams

KIB = 1024


class WholeRows(beams.BeamSlots):
    """Every new beam's row is gathered from its parent's, all of them whole; host memory only."""

    def follow(self, parents: Any) -> list[int]:
        cache = self.cache
        rows = np.array([cache.row(slot) for slot in self.slots])
        for buffer in cache.buffers:
            buffer.owner[rows[: len(parents)]] = buffer.owner[rows[parents]]
        cache.moved += cache.nbytes // cache.slots * len(parents)
        return self.slots[: len(parents)]


class Watched:
    """A decoder that notes, at every step, what the cache has moved so far and how long its rows are."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.moved, self.held = decoder, [], []

    def prefill(self, cache: Any, slot: int, ids: Any) -> Any:
        return self.decoder.prefill(cache, slot, ids)

    def step(self, cache: Any, slots: Any, ids: Any) -> Any:
        self.moved.append(cache.moved)
        self.held.append(sum(cache.length(slot) for slot in slots))
        return self.decoder.step(cache, slots, ids)


class Search:
    """One way to search, run again and again with the same cache."""

    def __init__(self, model: Any, ids: list[int], a: argparse.Namespace, kind: type[beams.BeamSlots]) -> None:
        self.model, self.ids, self.kind = model, ids, kind
        self.params, self.limits = BeamParams(a.beams, early_stopping="never"), Limits(a.new)
        self.cache = model.decoder.open_cache(a.beams, len(ids) + a.new)

    def run(self, decoder: Any = None) -> Any:
        before, beams.BeamSlots = beams.BeamSlots, self.kind  # type: ignore[misc]
        try:
            return beams.beam_search(
                decoder or self.model.decoder, self.cache, [self.ids], self.params, self.limits,
                self.model.manifest.num_logits,
            )  # fmt: skip
        finally:
            beams.BeamSlots = before  # type: ignore[misc]

    def traffic(self) -> tuple[dict[str, float], Any]:
        """Bytes per step, those of the forks apart, and what was found."""
        self.cache.moved = 0
        watched = Watched(self.model.decoder)
        found = self.run(watched)
        steps = np.diff(watched.moved)
        position = self.cache.nbytes / self.cache.slots / self.cache.capacity
        moved = {
            "before_the_first_step": int(watched.moved[0]),
            "per_step": float(steps.mean()),
            "most_in_a_step": int(steps.max()),
            "steps_that_move_nothing": float((steps == 0).mean()),
            "held_positions": float(np.mean(watched.held[1:]) * position),
        }
        return moved, found


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of every run in every round, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:
                found[name].append(taken)
    return found


def summary(taken: dict[str, list[float]], new: int) -> dict[str, dict[str, Any]]:
    """Tokens per second, and how often greedy's in the same round: median, lowest, highest."""
    result = {}
    for name, values in taken.items():
        ratios = [greedy / value for greedy, value in zip(taken["greedy"], values)]
        spread = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        result[name] = {"tokens_per_s": round(new / statistics.median(values), 1), "ratio": spread}
    return result


def report(a: argparse.Namespace, ours: dict[str, float], naive: dict[str, float], speed: dict[str, Any]) -> None:
    print("moved in the cache, KiB per step")
    print(f"  whole rows                   {naive['per_step'] / KIB:10.1f}")
    print(f"  held positions of all rows   {ours['held_positions'] / KIB:10.1f}")
    nothing = f"(nothing in {ours['steps_that_move_nothing']:.0%} of steps, at most {ours['most_in_a_step'] / KIB:.1f})"
    print(f"  this search                  {ours['per_step'] / KIB:10.1f}   {nothing}")
    print(f"forks of the prompt, KiB once  {ours['before_the_first_step'] / KIB:10.1f}\n")
    for name, row in speed.items():
        median, low, high = row["ratio"]
        print(f"{name:24s} {row['tokens_per_s']:8.1f} tok/s   {median:.2f} x greedy ({low:.2f} to {high:.2f})")
    print(json.dumps({**vars(a), "bytes": {"whole_rows": naive, "tfinfer": ours}, "speed": speed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    with tfinfer.load(a.folder, threads=a.threads) as model:
        assert model.tokenizer, "the prompt is a text: export with --tokenizer"
        ids = model.tokenizer.encode(Path(__file__).read_text())[: a.prompt]
        ours, naive = Search(model, ids, a, beams.BeamSlots), Search(model, ids, a, WholeRows)
        (traffic, found), (naive_traffic, naive_found) = ours.traffic(), naive.traffic()
        assert [h.token_ids for h in found[0]] == [h.token_ids for h in naive_found[0]], "the two found different ones"
        taken = interleave(
            {
                "greedy": lambda: model.generate(ids, max_tokens=a.new, stop_ids=[], reuse_prefix=False),
                f"greedy, {a.beams} rows": lambda: model.generate(
                    [ids] * a.beams, max_tokens=a.new, stop_ids=[], reuse_prefix=False
                ),
                f"{a.beams} beams": ours.run,
                f"{a.beams} beams, whole rows": naive.run,
            },
            a.rounds,
        )
    print(f"{len(ids)} tokens in, {a.new} out, {a.beams} beams, capacity {ours.cache.capacity}, {a.threads} threads")
    report(a, traffic, naive_traffic, summary(taken, a.new))


if __name__ == "__main__":
    main()
