"""Speculative decoding beside the plain loop: prompt lookup and a draft model, on text that copies and on random text.

    OMP_NUM_THREADS=1 python benchmarks/speculate.py --rounds 5 --threads 1

The shipped example copies little, so it is first trained for a minute to write once more what it has just read: the
copier (kept in out/copier). The deep one is the copier with 28 more layers of small random weights, which stands in for
a larger model, with the copier as its draft. Copy-heavy prompts are pieces of the standard library that training did
not see, with their own first line after them. Random text: random ids in, sampled at temperature 1.

All in one process, in turns; printed are the median of the rounds, and how many times the plain loop's tokens per
second in the same round with its spread; by processor time too, which other processes disturb less (with one thread).
Only decoding is timed, not the prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.sources.source import from_module

ZOO = Path(__file__).parents[1] / "tests" / "zoo"
sys.path.insert(0, str(ZOO))
from python_writer import Block, PythonWriter, build  # noqa: E402
from train_python_writer import sources  # noqa: E402

PIECE = 160  # tokens that are read and written again
TOKENIZER = ZOO / "python_writer" / "tokenizer.json"


def texts(tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the standard library's files: to train with, and held out."""
    ids = [entry.ids for entry in tokenizer.encode_batch(sources()) if len(entry.ids) > 2 * PIECE]
    return [one for place, one in enumerate(ids) if place % 50], ids[::50]


def train(model: PythonWriter, rows: list[list[int]], steps: int) -> None:
    """Rows of a piece and the same piece again, of which the second is learnt."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        pieces = []
        for row in rng.integers(0, len(rows), 8):
            start = rng.integers(0, len(rows[row]) - PIECE)
            pieces.append(rows[row][start : start + PIECE] * 2)
        x = torch.tensor(pieces)
        logits = model(x[:, :-1])[:, PIECE:]
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, PIECE + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"training: step {step}, loss {loss.item():.3f}", file=sys.stderr, flush=True)


def deep(model: PythonWriter, layers: int, noise: float) -> PythonWriter:
    """The model with so many more layers, which change little."""
    torch.manual_seed(1)
    blocks = [Block(192, 6, 2, 512) for _ in range(layers)]
    for block in blocks:
        for matrix in (block.attention.out.weight, block.down.weight):
            torch.nn.init.normal_(matrix, std=noise)
    found = build()
    found.load_state_dict(model.state_dict())
    found.blocks.extend(blocks)
    return found


def folders(out: Path, steps: int, noise: float) -> tuple[Path, Path]:
    """The copier and the deep one, made where they are not there yet."""
    copier, larger = out / "copier", out / "copier_deep"
    if not (copier / "tfinfer.json").exists() or not (larger / "tfinfer.json").exists():
        model = build()
        model.load_state_dict(load_file(ZOO / "python_writer" / "model.safetensors"), strict=False)
        train(model, texts(Tokenizer.from_file(str(TOKENIZER)))[0], steps)
        for module, folder in ((model, copier), (deep(model, 28, noise), larger)):
            export_model(from_module(module.eval()), folder, overwrite=True)
    return copier, larger


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Three that are copied, three of random ids."""
    held_out = texts(Tokenizer.from_file(str(TOKENIZER)))[1]
    pieces = [ids[:PIECE] for ids in held_out[:3]]
    rng = np.random.default_rng(0)
    return [[*piece, *piece[:8]] for piece in pieces], [rng.integers(0, 2048, PIECE).tolist() for _ in range(3)]


def decode(model: Any, ids: list[int], options: dict[str, Any]) -> tuple[float, float, list[int], Any]:
    """Seconds by the clock and of the processor from the first token on, the tokens, and what was drafted."""
    tokens, started, processor = [], 0.0, 0.0
    for chunk in model.stream(ids, **options):
        if not tokens:
            started, processor = time.perf_counter(), time.process_time()
        tokens += chunk.token_ids
    return time.perf_counter() - started, time.process_time() - processor, tokens, chunk.usage


def ratios(plain: list[float], seconds: list[float]) -> list[float]:
    """Median, lowest and highest of the ratios of a round."""
    found = [one / other for one, other in zip(plain, seconds)]
    return [round(f(found), 2) for f in (statistics.median, min, max)]


def compare(model: Any, ids: list[int], a: argparse.Namespace, ways: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Every way in turn, after one round that does not count."""
    taken: dict[str, list[Any]] = {name: [] for name in ways}
    for number in range(a.rounds + 1):
        for name, way in ways.items():
            found = decode(model, ids, {"max_tokens": a.new, "stop_ids": [], **options, **way})
            if number:
                taken[name].append(found)
    wall, processor, tokens, _ = zip(*taken["plain"])
    result = {}
    for name, rounds in taken.items():
        seconds, busy, generated, usage = zip(*rounds)
        result[name] = {
            "tokens_per_s": round((a.new - 1) / statistics.median(seconds), 1),
            "ratio": ratios(wall, seconds),
            "processor_ratio": ratios(processor, busy),
            "proposed": sum(one.proposed_tokens for one in usage),
            "accepted": sum(one.accepted_tokens for one in usage),
            "same_tokens": generated == tokens,
        }
    return result


def report(name: str, text: str, found: dict[str, Any]) -> None:
    for way, one in found.items():
        (median, low, high), (of_busy, *_) = one["ratio"], one["processor_ratio"]
        print(
            f"{name:7s} {text:18s} {way:7s} {one['tokens_per_s']:8.1f} tok/s  {median:.2f} x ({low:.2f} to {high:.2f})"
            f", by processor time {of_busy:.2f} x, {one['accepted']} of {one['proposed']} right, "
            f"{'same' if one['same_tokens'] else 'other'} tokens",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=160, help="of training")
    parser.add_argument("--noise", type=float, default=0.006, help="of the deep one's further layers")
    parser.add_argument("--out", type=Path, default=Path("out"))
    a = parser.parse_args()
    results = []
    with_copies, random = prompts()
    small, large = folders(a.out, a.steps, a.noise)
    with tfinfer.load(small, threads=a.threads) as copier, tfinfer.load(large, threads=a.threads) as larger:
        for name, model, draft in (("copier", copier, None), ("deep", larger, copier)):
            ways: dict[str, Any] = {"plain": {}, "lookup": {"lookup": True}}
            texts: list[tuple[str, list[list[int]], dict[str, Any]]] = [
                ("copy", with_copies, {}),
                ("random", random, {"temperature": 1.0, "seed": 1}),
            ]
            if draft:
                ways["draft"] = {"draft": draft}
                texts.append(("unseeded", random, {"temperature": 1.0}))
            for kind, rows, options in texts:
                for number, ids in enumerate(rows):
                    found = compare(model, ids, a, ways, **options)
                    results.append({"model": name, "text": f"{kind} {number + 1}", **found})
                    report(name, f"{kind} {number + 1}", found)
    print(json.dumps({**{k: str(v) for k, v in vars(a).items()}, "results": results}))


if __name__ == "__main__":
    main()
