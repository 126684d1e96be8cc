"""Recurrent layers: the ONNX operators that nn.LSTM and nn.GRU become, beside PyTorch eager.

    OMP_NUM_THREADS=2 python benchmarks/recurrent.py --threads 2 --rounds 7

Interleaved round by round in one process, on the same weights and input. Printed: the median milliseconds of a call,
and how many times PyTorch's speed the graph has in the same round, with its spread. The last line is JSON.

Only figures of idle cores mean anything: PyTorch's threads meet at every step, and wait where another process has one
of their cores, a hundredfold at worst. So each line says how often a second the two were interrupted: a wide spread and
several hundred interruptions say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from tfinfer.export.capture.plain import InputSpec, translate

KINDS: dict[str, Callable[[int], nn.Module]] = {
    "LSTM": lambda size: nn.LSTM(size, size, num_layers=2, batch_first=True),
    "LSTM both ways": lambda size: nn.LSTM(size, size, num_layers=2, batch_first=True, bidirectional=True),
    "GRU": lambda size: nn.GRU(size, size, num_layers=2, batch_first=True),
    "GRU both ways": lambda size: nn.GRU(size, size, num_layers=2, batch_first=True, bidirectional=True),
}


def session(module: nn.Module, size: int, threads: int) -> Any:
    model = translate(module, [InputSpec("x", torch.float32, ("batch", "length", size))])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def seconds(run: Callable[[], Any], least: float) -> float:
    """The mean of as many calls as `least` seconds hold."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least:
        run()
        count += 1
    return passed / count


def compare(module: nn.Module, graph: Any, x: torch.Tensor, rounds: int, least: float) -> dict[str, Any]:
    """Both in turn, after one round that does not count, and how far apart their outputs are."""
    feed = {"x": x.numpy()}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    with torch.inference_mode():
        error = float((module(x)[0] - torch.from_numpy(graph.run(None, feed)[0])).abs().max())
        found = [
            (seconds(lambda: module(x), least), seconds(lambda: graph.run(None, feed), least))
            for _ in range(rounds + 1)
        ][1:]
    interrupted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    ratios = [eager / ours for eager, ours in found]
    return {
        "torch_ms": round(1e3 * statistics.median(eager for eager, _ in found), 3),
        "onnx_ms": round(1e3 * statistics.median(ours for _, ours in found), 3),
        "ratio": [round(f(ratios), 2) for f in (statistics.median, min, max)],
        "interrupted_per_s": round(interrupted / (time.perf_counter() - start), 1),
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--least", type=float, default=0.3, help="seconds of each measurement")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512])
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    results = []
    for kind, size in itertools.product(a.kinds, a.sizes):
        module = KINDS[kind](size).eval()
        graph = session(module, size, a.threads)
        for batch, length in itertools.product((1, 8), (20, 100)):
            row = compare(module, graph, torch.randn(batch, length, size), a.rounds, a.least)
            results.append({"kind": kind, "size": size, "batch": batch, "length": length, **row})
            median, low, high = row["ratio"]
            print(
                f"{kind:15s} {size} batch {batch} length {length:3d}: torch {row['torch_ms']:8.2f} ms, "
                f"ours {row['onnx_ms']:8.2f} ms, {median:.2f} x ({low:.2f} to {high:.2f}), "
                f"interrupted {row['interrupted_per_s']:.0f}/s",
                flush=True,
            )
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "threads": a.threads}
    print(json.dumps({"rounds": a.rounds, **versions, "results": results}))


if __name__ == "__main__":
    main()
