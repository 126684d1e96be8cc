"""Pictures of a comparison: bars with the limit of the machine drawn in, and the time of a token against the context.

python benchmarks/peers_picture.py out/peers.json out/peers.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS, LIMIT = "#c0392b", "#2c3e50"
OTHERS = "#95a5a6"


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw one row of bars for every width of the weights, and a line for each system over the contexts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shortest = min(record["prompt"] for record in records)
    bars = [record for record in records if record["prompt"] == shortest]
    has_contexts = len({record["prompt"] for record in records}) > 1
    figure, axes = plt.subplots(
        len(bars), 1 + has_contexts, figsize=(6 * (1 + has_contexts), 2.8 * len(bars)), squeeze=False
    )
    for (left, *right), record in zip(axes, bars):
        _bars(left, record)
        for axis in right:
            _contexts(axis, [r for r in records if (r["shape"], r["bits"]) == (record["shape"], record["bits"])])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _bars(axis: Any, record: dict[str, Any]) -> None:
    rows = sorted(record["systems"].items(), key=lambda item: item[1]["decode_tokens_per_s"])
    names, speeds = [name for name, _ in rows], [row["decode_tokens_per_s"] for _, row in rows]
    axis.barh(names, speeds, color=[OURS if name.startswith("tfinfer") else OTHERS for name in names])
    for place, speed in enumerate(speeds):
        axis.text(speed, place, f" {speed:.0f}", va="center", fontsize=8)
    if limit := record["limit"]["tokens_per_s"]:
        axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        axis.text(limit, -0.9, "memory's limit ", ha="right", fontsize=8, color=LIMIT)
    axis.set_title(f"{record['shape']}, {record['bits']} bits, prompt {record['prompt']}: decoded tokens/s", fontsize=9)


def _contexts(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    for name in sorted({name for record in records for name in record["systems"]}):
        points = [
            (r["prompt"], r["systems"][name]["between_tokens_ms"]["p50"]) for r in records if name in r["systems"]
        ]
        ours = name.startswith("tfinfer")
        axis.plot(
            *zip(*sorted(points)), marker="o", label=name, linewidth=2.5 if ours else 1, color=OURS if ours else None
        )
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("ms between tokens")
    axis.legend(fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.json.read_text())["records"], given.picture)
