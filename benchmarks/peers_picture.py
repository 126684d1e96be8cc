"""A picture of comparisons: bars with the machine's limit, the time of a token against the context, rates of batches.

python benchmarks/peers_picture.py out/peers.json [more.json ...] --batch out/batch.json -o out/peers.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, LIMIT = "#c0392b", "#2c3e50"
OTHERS = "#95a5a6"
# One for every other system, in the order of names; after these they begin again.
COLOURS = ("#2980b9", "#27ae60", "#8e44ad", "#d68910", "#16a085", "#34495e", "#7d6608", "#c2609e", "#5dade2", "#566573")


def draw(records: Sequence[dict[str, Any]], file: Path, rates: Mapping[str, Any] | None = None) -> None:
    """Draw bars for every shape and width of weights, and a line for each system over the contexts.

    rates: by rows of a batch, as `batch.py` writes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["shape"], record["bits"]), []).append(record)
    rows = len(groups) + 1
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.9 * rows), squeeze=False)
    free = list(axes[-1])
    for (left, right), group in zip(axes, groups.values()):
        _bars(left, min(group, key=lambda record: record["prompt"]))
        if len(group) > 1:
            _contexts(right, group)
        else:
            free.insert(0, right)
    if rates is not None:
        _batches(free.pop(0), rates)
    for axis in free:
        axis.remove()
    figure.tight_layout()
    figure.savefig(file, dpi=80, bbox_inches="tight")  # without the rows that stay empty
    plt.close(figure)


def _bars(axis: Any, record: dict[str, Any]) -> None:
    rows = sorted(record["systems"].items(), key=lambda item: item[1]["decode_tokens_per_s"])
    names, speeds = [name for name, _ in rows], [row["decode_tokens_per_s"] for _, row in rows]
    axis.barh(names, speeds, color=[OURS if name.startswith("tfinfer") else OTHERS for name in names])
    for place, speed in enumerate(speeds):
        axis.text(speed, place, f" {speed:.0f}", va="center", fontsize=8)
    if limit := record["limit"]["tokens_per_s"]:
        axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        axis.text(limit, 0, "memory's limit ", ha="right", va="center", fontsize=8, color=LIMIT)
    axis.set_title(f"{record['shape']}, {record['bits']} bits, prompt {record['prompt']}: decoded tokens/s", fontsize=9)


def _contexts(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    for place, name in enumerate(sorted({name for record in records for name in record["systems"]})):
        points = [
            (r["prompt"], r["systems"][name]["between_tokens_ms"]["p50"]) for r in records if name in r["systems"]
        ]
        ours = name.startswith("tfinfer")
        style = {"color": OURS, "linewidth": 2.5} if ours else {"color": COLOURS[place % len(COLOURS)], "linewidth": 1}
        dashes = "--" if ours and name != "tfinfer" else "-"
        axis.plot(*zip(*sorted(points)), marker="o", label=name, linestyle=dashes, **style)
    axis.set_xlabel("tokens of prompt")
    axis.set_ylabel("ms between tokens")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))


def _batches(axis: Any, rates: Mapping[str, Any]) -> None:
    rows = [int(number) for number in rates]
    speeds = [rate["tokens_per_s"] for rate in rates.values()]
    axis.plot(rows, speeds, marker="o", color=OURS, linewidth=2.5, label="tfinfer")
    axis.plot(
        rows, [speeds[0] * number / rows[0] for number in rows], color=LIMIT, linestyle="--", label="one, times rows"
    )
    axis.set_xlabel("rows of a batch, of different lengths")
    axis.set_ylabel("decoded tokens/s")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--batch", type=Path)
    parser.add_argument("-o", dest="picture", type=Path, required=True)
    given = parser.parse_args()
    every = [record for file in given.json for record in json.loads(file.read_text())["records"]]
    draw(every, given.picture, json.loads(given.batch.read_text())["rates"] if given.batch else None)
