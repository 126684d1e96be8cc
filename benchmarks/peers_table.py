"""What came of a comparison, as medians and ratios, as a table for people and as lines of CSV."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import SHAPES

OURS = "tfinfer"


def summary(found: dict[str, list[dict[str, Any]]], prompt: int, ours: str = OURS) -> dict[str, dict[str, Any]]:
    """Medians, and the ratios to `ours`: above 1 where that is faster."""
    result = {}
    for name, rounds in found.items():
        first = [r["seconds"][0] for r in rounds]
        between = turns_of(rounds)
        every = sorted(s for r in rounds for s in r["seconds"][1:])
        row = {
            "prefill_tokens_per_s": round(prompt / statistics.median(first), 1),
            "ttft_ms": round(1e3 * statistics.median(first), 2),
            "decode_tokens_per_s": round(1 / statistics.median(between), 2),
            "between_tokens_ms": {f"p{q}": round(1e3 * float(np.percentile(every, q)), 3) for q in (50, 90, 95, 99)},
            "memory_mib": max(r["memory"] for r in rounds),
            "tokens": rounds[0]["tokens"],
            "first_tokens_as_ours": agreeing(rounds, found.get(ours, rounds)),
        }
        if ours in found:
            own = found[ours]
            row["prefill_ratio"] = spread([a / b["seconds"][0] for a, b in zip(first, own)])
            row["decode_ratio"] = spread([a / b for a, b in zip(between, turns_of(own))])
        result[name] = row
    return result


def turns_of(rounds: list[dict[str, Any]]) -> list[float]:
    """The median time between tokens of each turn."""
    return [statistics.median(turn) for r in rounds for turn in r["turns"]]


def agreeing(rounds: list[dict[str, Any]], own: list[dict[str, Any]]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = list(zip(rounds[0]["tokens"], own[0]["tokens"]))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))


def spread(ratios: list[float]) -> list[float]:
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


@dataclass(frozen=True)
class Sizes:
    """What a decoder reads and computes with; `matrices`: how many weights a layer's products have."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    matrices: int
    table: int  # numbers of the head, which the embedding shares


def sizes_of(shape: str) -> Sizes | None:
    """None for shapes that are neither Llama's kind nor GPT-2's."""
    class_name, s = SHAPES[shape]
    if class_name == "GPT2LMHeadModel":
        s = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, **s}
        hidden, heads = s["n_embd"], s["n_head"]
        return Sizes(s["n_layer"], heads, heads, hidden // heads, 12 * hidden**2, s["vocab_size"] * hidden)
    if "num_key_value_heads" not in s:
        return None
    size, hidden, heads = s["head_dim"], s["hidden_size"], s["num_attention_heads"]
    rows = 2 * heads + 2 * s["num_key_value_heads"]  # of queries, keys, values and the output
    matrices = hidden * size * rows + 3 * hidden * s["intermediate_size"]
    return Sizes(s["num_hidden_layers"], heads, s["num_key_value_heads"], size, matrices, s["vocab_size"] * hidden)


def bytes_per_token(shape: str, bits: int, context: int, head_bits: int = 8) -> int:
    """What one token must read at least: every matrix once, head included, and keys and values of the context.

    head_bits: of the head where `bits` are fewer. 0 for a shape that is not known.
    """
    if (s := sizes_of(shape)) is None:
        return 0
    cache = 2 * s.kv_heads * s.head_dim * context * (2 if bits == 16 else 4)
    return s.layers * (s.matrices * bits // 8 + cache) + s.table * max(bits, head_bits) // 8


def flop_of_prompt(shape: str, tokens: int) -> int:
    """What a prompt must compute at least: the layers' products, causal attention, and the head for one row.

    Two for each weight and token, and four for each feature of each head and each of the pairs of tokens, of which
    causal attention needs half. 0 for a shape that is not known.
    """
    if (s := sizes_of(shape)) is None:
        return 0
    attention = 4 * s.heads * s.head_dim * tokens**2 // 2
    return s.layers * (2 * s.matrices * tokens + attention) + 2 * s.table


def shares(row: dict[str, Any], read: int, flop: int, limits: dict[str, float]) -> dict[str, float]:
    """How much of the machine's measured rates a system reached: reading `read` bytes for a token of decode, computing
    `flop` until the first token."""
    of_reads = read * row["decode_tokens_per_s"] / (limits["read_gb_per_s"] * 1e9)
    of_products = flop / (row["ttft_ms"] / 1e3) / (limits["gemm_gflop_per_s"] * 1e9)
    return {"of_read_limit": round(of_reads, 3), "of_gemm_rate": round(of_products, 3)}


def lines(result: dict[str, dict[str, Any]], ours: str = OURS) -> list[str]:
    """The result as a table for people."""
    out = [
        f"| system | decode | {ours} is | of the read limit | prefill | {ours} is | of the GEMM rate | memory "
        "| same tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in sorted(result.items(), key=lambda item: -item[1]["decode_tokens_per_s"]):
        cells = [name]
        for kind, share in (("decode", row["of_read_limit"]), ("prefill", row["of_gemm_rate"])):
            ratio = row.get(f"{kind}_ratio")
            cells.append(f"{row[f'{kind}_tokens_per_s']:.1f} tok/s")
            cells.append("{:.2f} x ({:.2f} to {:.2f})".format(*ratio) if ratio and name != ours else "")
            cells.append(f"{share:.2f}" if share else "")
        cells += [f"{row['memory_mib']} MiB", str(row["first_tokens_as_ours"])]
        out.append(f"| {' | '.join(cells)} |")
    return out


def write_csv(records: list[dict[str, Any]], file: Path) -> None:
    """One line per system and workload."""
    columns = [
        "shape",
        "device",
        "bits",
        "prompt",
        "new",
        "system",
        "ttft_ms",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "memory_mib",
    ]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore")
        writer.writeheader()
        for record in records:
            for name, row in record["systems"].items():
                writer.writerow({**record, **row, "system": name})
