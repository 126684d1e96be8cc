"""An encoder-decoder of T5-small's shape: tfinfer and its peers on the same random weights, greedy and by beams.

    python benchmarks/seq2seq.py --bits 32 8 --beams 1 4 --source 128 --new 64 --rounds 5

Every system runs in a process of its own and is asked for one source after the other, in turns that change; each
decodes exactly `--new` tokens. Times are of whole requests, the encoder included. Printed: the median, and the ratio to
tfinfer in the same round (lowest to highest; above 1 tfinfer is faster), and how many tokens are as tfinfer's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import SHAPES, checkpoint
from in_turns import System, measure, open_all
from peers import environment
from peers_table import OURS, agreeing, spread

from tfinfer.session.threads import thread_count

SHAPE = "t5-small"
SYSTEMS = {
    OURS: System("seq2seq_tfinfer", "tfinfer"),
    "transformers": System("seq2seq_transformers", "transformers"),
    "optimum-onnx": System("seq2seq_transformers", "optimum-onnx", "optimum"),
    "CTranslate2": System("seq2seq_ctranslate2", "ctranslate2"),
}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Seconds of a request, and how many times as long as tfinfer's in the same round."""
    seconds = {name: [sum(r["seconds"]) for r in rounds] for name, rounds in found.items()}
    return {
        name: {
            "ms": round(1e3 * statistics.median(taken), 1),
            "ratio": spread([a / b for a, b in zip(taken, seconds[OURS])]),
            "first_tokens_as_ours": agreeing(found[name], found[OURS]),
        }
        for name, taken in seconds.items()
    }


def lines(result: dict[str, dict[str, Any]]) -> list[str]:
    """The result as a table for people."""
    out = ["| system | request | tfinfer is | same tokens |", "|---|--:|--:|--:|"]
    for name, row in sorted(result.items(), key=lambda item: item[1]["ms"]):
        ratio = "" if name == OURS else "{:.2f} x ({:.2f} to {:.2f})".format(*row["ratio"])
        out.append(f"| {name} | {row['ms']} ms | {ratio} | {row['first_tokens_as_ours']} |")
    return out


def run(a: argparse.Namespace, bits: int, beams: int, threads: int, folder: Path) -> dict[str, Any]:
    """Open every system, measure it and close it."""
    given = {
        "checkpoint": str(folder), "cache": str(folder.parent), "bits": bits, "beams": beams, "threads": threads,
        "longest": 512,
    }  # fmt: skip
    workers, failed = open_all(SYSTEMS, dict(pair.split("=", 1) for pair in a.python), given)
    for name, why in failed.items():
        print(f"{name}: not there: {why}")
    try:
        ids = np.random.default_rng(0).integers(3, SHAPES[SHAPE][1]["vocab_size"], a.source).tolist()
        result = summary(measure(workers, ids, a.new, a.rounds))
    finally:
        for worker in workers:
            worker.close()
    print(f"\n{SHAPE}, {bits} bits, source of {a.source}, {a.new} new tokens, {beams} beams, {threads} threads")
    print("\n".join(lines(result)), flush=True)
    return {"bits": bits, "beams": beams, "source": a.source, "new": a.new, "failed": failed, "systems": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(32, 8), nargs="+", default=[32])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--python", action="append", default=[], help="NAME=interpreter that has its packages")
    parser.add_argument("--cache", type=Path, default=Path("out/bench"), help="checkpoints and what was made of them")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    threads, folder = thread_count(a.threads).count, checkpoint(SHAPE, a.cache).resolve()
    records = [run(a, bits, beams, threads, folder) for bits in a.bits for beams in a.beams]
    report = {"environment": environment(threads), "records": records}
    if a.json:
        a.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report["environment"]))


if __name__ == "__main__":
    main()
