"""Where the time of a start goes, and what keeping onnxruntime's optimised model on disk would save.

    python benchmarks/start.py FOLDER --rounds 7

Every way opens the decoder in a new process, all in turns. Kept is the optimised graph with its weights packed for the
processor, as onnxruntime writes it. Printed: medians of wall and processor time from the first hash to the open session
(lowest to highest), and the ratio of the wall times to opening the folder as it is in the same round. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tfinfer.integrity import sha256
from tfinfer.manifest import load_manifest
from tfinfer.session import providers
from tfinfer.session.ort import onnxruntime
from tfinfer.session.threads import thread_count

GRAPH, WEIGHTS = "kept.onnx", "kept.bin"
WAYS = {
    "as it is, unchecked": (),
    "as it is": ("folder",),
    "kept, both checked": ("folder", "kept"),
    "kept, it alone checked": ("kept",),
    "kept, unchecked": (),
}


def options() -> Any:
    return providers._options(onnxruntime(), thread_count(), "cpu")


def keep(folder: Path, place: Path) -> None:
    """Let onnxruntime write what it makes of the decoder."""
    chosen = options()
    chosen.optimized_model_filepath = str(place / GRAPH)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        chosen.add_session_config_entry(name, value)
    graph = folder / load_manifest(folder).graphs["decoder"].file
    onnxruntime().InferenceSession(str(graph), chosen, providers=["CPUExecutionProvider"])


def one(way: str, folder: Path, place: Path) -> None:
    """Open once in this process and print how long it took."""
    ort, manifest = onnxruntime(), load_manifest(folder)
    chosen, graph = options(), folder / manifest.graphs["decoder"].file
    if way.startswith("kept"):
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph = place / GRAPH
    files = {"folder": [folder / name for name in manifest.files], "kept": [place / GRAPH, place / WEIGHTS]}
    wall, processor = time.perf_counter(), time.process_time()
    for which in WAYS[way]:
        for path in files[which]:
            sha256(path)
    ort.InferenceSession(str(graph), chosen, providers=["CPUExecutionProvider"])
    print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(a.one, a.folder, a.place)
        return
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        keep(a.folder, Path(place))
        for number in range(a.rounds + 1):
            for way in WAYS:
                call = [sys.executable, __file__, str(a.folder), "--one", way, "--place", place]
                done = subprocess.run(call, capture_output=True, text=True, check=True)
                if number:
                    found[way].append(json.loads(done.stdout))
        kept = sum(path.stat().st_size for path in Path(place).iterdir())
    base = [wall for wall, _ in found["as it is"]]
    for way, measured in found.items():
        ratios = [wall / first for (wall, _), first in zip(measured, base)]
        times = (spread([pair[side] for pair in measured]) for side in (0, 1))
        print(f"{way:<24} wall {next(times)} s, processor {next(times)} s, {spread(ratios)} x")
    print(json.dumps({"folder": str(a.folder), "kept_bytes": kept, "seconds": found}))


if __name__ == "__main__":
    main()
