"""An encoder of BERT-base's shape: the exported folder beside PyTorch eager and other ways to run it on a CPU.

    python benchmarks/encode.py --rounds 9
    python benchmarks/encode.py --layers 2 --rounds 3 --workloads 1x16,ragged --sorted

Each system makes mean-pooled vectors of the same rows of ids, with the same random weights in float32. The workload
BxN is B rows of N ids; "ragged" is 256 rows of 8 to 256 ids, in batches of 32: padded in the order given by the others,
through `model.encode` by tfinfer; with --sorted the others sort the rows by length first, as their callers may. All run
in one process and take turns; PyTorch is transformers' BertModel with sdpa; OpenVINO and onnxruntime with a plain
`torch.onnx.export` run where they are installed, optimum-onnx's graph where --optimum names the interpreter of an
environment that has it. Printed: the median, and the ratio of PyTorch's time in the same round to it (lowest to
highest). The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import environment
from transformers import BertConfig, BertModel

import tfinfer
from tfinfer.export import export_model
from tfinfer.session.threads import thread_count

Array = Any
Rows = Sequence[Sequence[int]]
Encode = Callable[[Rows], Array]  # vectors (rows, hidden) of rows of ids
BATCH, VOCAB, PAUSE = 32, 30522, 0.05  # seconds, until the threads of the one before sleep
TOLERANCE = 1e-3
NAMES = ("input_ids", "attention_mask")


class Hidden(torch.nn.Module):
    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert(layers: int) -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, num_hidden_layers=layers, attn_implementation="sdpa")
    return BertModel(config, add_pooling_layer=False).eval()


def padded(rows: Rows) -> tuple[Array, Array]:
    """ids and mask (rows, longest) int64"""
    mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([np.asarray(row) for row in rows])
    return ids, mask.astype(np.int64)


def by_length(encode: Encode) -> Encode:
    """The same vectors, of rows that were sorted by their lengths first."""

    def encode_sorted(rows: Rows) -> Array:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        vectors = encode([rows[i] for i in order])
        return vectors[np.argsort(order)]

    return encode_sorted


def in_batches(hidden: Callable[[Array, Array], Array]) -> Encode:
    """Vectors by batches of 32 in the order given, from hidden states (rows, longest, hidden) of ids and mask."""

    def encode(rows: Rows) -> Array:
        found = []
        for start in range(0, len(rows), BATCH):
            ids, mask = padded(rows[start : start + BATCH])
            states = np.asarray(hidden(ids, mask))
            found.append((states * mask[:, :, None].astype(np.float32)).sum(1) / mask.sum(1, keepdims=True))
        return np.concatenate(found)

    return encode


# -- the systems ----------------------------------------------------------------------------------------------------
def eager(module: Any, folder: Path, threads: int) -> Encode:
    torch.set_num_threads(threads)

    def hidden(ids: Array, mask: Array) -> Array:
        with torch.no_grad():
            return module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return in_batches(hidden)


def ours(module: Any, folder: Path, threads: int) -> Encode:
    report = export_model(module, folder / "tfinfer", kind="encoder", max_length=512)
    print("export:", {k: round(v, 1) for k, v in report.seconds.items()})
    model = tfinfer.load(report.folder, device="cpu", threads=threads)
    return lambda rows: model.encode(rows, batch_size=BATCH, pooling="mean")


def openvino(module: Any, folder: Path, threads: int) -> Encode:
    """Converted from the module itself; float32, as on some processors it would compute in bfloat16 unasked."""
    import openvino as ov

    example = dict(zip(NAMES, map(torch.from_numpy, padded([[1] * 16] * 2))))
    converted = ov.convert_model(module, example_input=example)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()
    return in_batches(lambda ids, mask: request.infer(dict(zip(NAMES, (ids, mask))), share_outputs=True)[0])


def plain(module: Any, folder: Path, threads: int) -> Encode:
    import onnxruntime as ort

    path = str(folder / "plain.onnx")
    example = tuple(map(torch.from_numpy, padded([[1] * 16] * 2)))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    options = {"input_names": list(NAMES), "dynamic_shapes": (axes, axes), "dynamo": True, "verbose": False}
    torch.onnx.export(module, example, path, **options)
    return in_batches(run_of(ort.InferenceSession(path, session_options(threads))))


def optimum(module: Any, folder: Path, threads: int, python: str) -> Encode:
    """The graph made by optimum in its own environment, which `python` is of, run by the onnxruntime of this one."""
    import onnxruntime as ort

    module.bert.save_pretrained(folder / "checkpoint")
    script = Path(__file__).resolve().parent / "systems" / "optimum_encoder.py"
    subprocess.run([python, str(script), str(folder / "checkpoint"), str(folder / "optimum")], check=True)
    path = str(folder / "optimum" / "model_optimized.onnx")
    return in_batches(run_of(ort.InferenceSession(path, session_options(threads))))


def session_options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return options


def run_of(session: Any) -> Callable[[Array, Array], Array]:
    taken = {value.name for value in session.get_inputs()}

    def hidden(ids: Array, mask: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return session.run(None, {name: array for name, array in feeds.items() if name in taken})[0]

    return hidden


BASE = "torch eager"
SYSTEMS: dict[str, tuple[Callable[[Any, Path, int], Encode], str]] = {
    BASE: (eager, "torch"),
    "tfinfer": (ours, "tfinfer"),
    "openvino": (openvino, "openvino"),
    "plain onnx": (plain, "onnxscript"),
}
OPTIMUM = "optimum-onnx"
PACKAGES = ("transformers", "onnxruntime", "openvino", "onnxscript")


# -- the measurement ------------------------------------------------------------------------------------------------
def workload(name: str) -> Rows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 257, 256) if name == "ragged" else [int(name.split("x")[1])] * int(name.split("x")[0])
    return [rng.integers(1000, VOCAB, n).tolist() for n in lengths]


def measure(systems: dict[str, Encode], rows: Rows, rounds: int, timed: set[str]) -> dict[str, list[float]]:
    """Seconds of each `timed` system by round, after one that only compares what all compute; every other goes back."""
    expected = systems[BASE](rows)
    for name, encode in systems.items():
        worst = float(np.abs(encode(rows) - expected).max())
        if not worst < TOLERANCE:
            raise SystemExit(f"{name} computes something else than PyTorch: {worst:.2g} away")
    calls = max(1, 256 // sum(map(len, rows)))  # a short one is repeated
    found: dict[str, list[float]] = {name: [] for name in systems if name in timed}
    for number in range(rounds):
        for name in list(found)[:: -1 if number % 2 else 1]:
            gc.collect()
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(calls):
                systems[name](rows)
            found[name].append((time.perf_counter() - start) / calls)
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, seconds in found.items():
        result[name] = {"ms": round(1000 * statistics.median(seconds), 2)}
        for base in (BASE, "openvino"):
            ratios = [b / s for b, s in zip(found.get(base, ()), seconds)]
            if ratios:
                result[name][f"over {base}"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    return result


def table(name: str, rows: dict[str, Any]) -> Iterable[str]:
    for system, row in rows.items():
        columns = []
        for base in (BASE, "openvino"):
            if f"over {base}" in row:
                median, low, high = row[f"over {base}"]
                columns.append(f"{median:5.2f} x {base} ({low:.2f} to {high:.2f})")
        yield f"{name:8s} {system:13s} {row['ms']:9.2f} ms   {'   '.join(columns)}"


def installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workloads", default="1x16,1x128,8x128,ragged")
    parser.add_argument("--only", default=",".join([*SYSTEMS, OPTIMUM]), help="those to time, separated by commas")
    parser.add_argument("--sorted", action="store_true", help="the others sort rows by length")
    parser.add_argument("--optimum", metavar="PYTHON", help="the interpreter of an environment with optimum-onnx")
    a = parser.parse_args()
    threads, module = thread_count(a.threads).count, Hidden(bert(a.layers)).eval()
    timed = set(a.only.split(","))
    asked = timed | {BASE}  # what all are compared with
    there = {name: make for name, (make, package) in SYSTEMS.items() if name in asked and find_spec(package)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        systems = {name: make(module, Path(folder), threads) for name, make in there.items()}
        if a.optimum and OPTIMUM in asked:
            systems[OPTIMUM] = optimum(module, Path(folder), threads, a.optimum)
        if a.sorted:
            systems = {name: encode if name == "tfinfer" else by_length(encode) for name, encode in systems.items()}
        for name in a.workloads.split(","):
            results[name] = summary(measure(systems, workload(name), a.rounds, timed))
            print("\n".join(table(name, results[name])), flush=True)
    about = {**environment(threads, "cpu"), **installed(PACKAGES)}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        json.dumps(
            {"layers": a.layers, "rounds": a.rounds, "sorted": a.sorted, "environment": about, "results": results}
        )
    )


if __name__ == "__main__":
    main()
