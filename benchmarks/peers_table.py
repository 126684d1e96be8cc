"""What came of a comparison, as medians and ratios, as a table for people and as lines of CSV."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import SHAPES

OURS = "tfinfer"


def summary(found: dict[str, list[dict[str, Any]]], prompt: int) -> dict[str, dict[str, Any]]:
    """Medians, and the ratios to tfinfer: above 1 where tfinfer is faster."""
    result = {}
    for name, rounds in found.items():
        first = [r["seconds"][0] for r in rounds]
        between = [statistics.median(r["seconds"][1:]) for r in rounds]
        every = sorted(s for r in rounds for s in r["seconds"][1:])
        row = {
            "prefill_tokens_per_s": round(prompt / statistics.median(first), 1),
            "ttft_ms": round(1e3 * statistics.median(first), 2),
            "decode_tokens_per_s": round(1 / statistics.median(between), 2),
            "between_tokens_ms": {f"p{q}": round(1e3 * float(np.percentile(every, q)), 3) for q in (50, 90, 95, 99)},
            "memory_mib": max(r["memory"] for r in rounds),
            "tokens": rounds[0]["tokens"],
            "first_tokens_as_ours": agreeing(rounds, found.get(OURS, rounds)),
        }
        if OURS in found:
            own = found[OURS]
            row["prefill_ratio"] = spread([a / b["seconds"][0] for a, b in zip(first, own)])
            row["decode_ratio"] = spread([a / statistics.median(b["seconds"][1:]) for a, b in zip(between, own)])
        result[name] = row
    return result


def agreeing(rounds: list[dict[str, Any]], own: list[dict[str, Any]]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = list(zip(rounds[0]["tokens"], own[0]["tokens"]))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))


def spread(ratios: list[float]) -> list[float]:
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


def bytes_per_token(shape: str, bits: int, context: int) -> int:
    """What one token must read at least: every matrix once, head included, and keys and values of the context."""
    s = SHAPES[shape][1]
    if "num_key_value_heads" not in s:
        return 0
    size, hidden = s["head_dim"], s["hidden_size"]
    rows = s["num_attention_heads"] + 2 * s["num_key_value_heads"]
    layer = hidden * size * (rows + s["num_attention_heads"]) + 3 * hidden * s["intermediate_size"]
    head_bits = max(bits, 8)
    cache = 2 * s["num_key_value_heads"] * size * context * (2 if bits == 16 else 4)
    return s["num_hidden_layers"] * (layer * bits // 8 + cache) + s["vocab_size"] * hidden * head_bits // 8


def lines(result: dict[str, dict[str, Any]], limit: dict[str, Any]) -> list[str]:
    """The result as a table for people."""
    out = [
        "| system | decode | tfinfer is | prefill | tfinfer is | of the read limit | memory | same tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in sorted(result.items(), key=lambda item: -item[1]["decode_tokens_per_s"]):
        share = row["decode_tokens_per_s"] / limit["tokens_per_s"] if limit["tokens_per_s"] else 0
        cells = [name]
        for kind in ("decode", "prefill"):
            ratio = row.get(f"{kind}_ratio")
            cells.append(f"{row[f'{kind}_tokens_per_s']:.1f} tok/s")
            cells.append("{:.2f} x ({:.2f} to {:.2f})".format(*ratio) if ratio and name != OURS else "")
        cells += [f"{share:.2f}" if share else "", f"{row['memory_mib']} MiB", str(row["first_tokens_as_ours"])]
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
