"""Decode and prefill of a Llama-shaped model: the exported folder beside PyTorch eager and a hand-made graph.

    python benchmarks/decode.py --shape smollm2-135m --prompt 128 --new 64 --rounds 5

All run in one process, interleaved round by round, on the same random weights (the hand-made graph on its own of the
same sizes). Printed: medians, and the ratio to PyTorch eager of each round with its spread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruler import SHAPES, Ruler, Shape
from transformers import LlamaConfig, LlamaForCausalLM

import tfinfer
from tfinfer.export import export_model
from tfinfer.session.machine import cpu_model
from tfinfer.session.threads import thread_count

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Run = Callable[[], tuple[float, float]]  # seconds of the prefill and of one decode step


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


def llama(s: Shape) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def eager(model: Any, ids: Any, new: int, device: str) -> tuple[float, float]:
    """transformers' own cache, one token after the other, the head on the last row only."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        wait()
        first = time.perf_counter()
        for _ in range(new - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        wait()
        return first - start, (time.perf_counter() - first) / (new - 1)


def ours(model: tfinfer.Model, ids: list[int], new: int) -> tuple[float, float]:
    completion = model.generate(ids, max_tokens=new, stop_ids=[], reuse_prefix=False)
    return completion.timings.first_token_seconds, completion.timings.decode_seconds / (new - 1)


def interleave(runs: dict[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Every system once per round, after one round that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            measured = run()
            if number:
                found[name].append(measured)
    return found


def summary(found: dict[str, list[tuple[float, float]]], prompt: int, base: str) -> dict[str, Any]:
    """Tokens per second, and how often the base's in the same round."""
    result: dict[str, Any] = {}
    for name, measured in found.items():
        result[name] = {
            "prefill_tokens_per_s": round(prompt / statistics.median(p for p, _ in measured), 1),
            "decode_tokens_per_s": round(1 / statistics.median(d for _, d in measured), 2),
        }
        for kind, column in (("prefill", 0), ("decode", 1)):
            ratios = [b[column] / m[column] for b, m in zip(found[base], measured)]
            result[name][f"{kind}_ratio"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    return result


def environment(threads: int, device: str) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "tfinfer")}
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    runtime = __import__("onnxruntime").__version__
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {
        "cpu": cpu_model(),
        "gpu": gpu,
        "threads": threads,
        "python": platform.python_version(),
        "onnxruntime": runtime,
        **packages,
        "date": now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on cpu, bf16 on cuda")
    a = parser.parse_args()
    dtype = a.dtype or ("fp32" if a.device == "cpu" else "bf16")
    threads, shape = thread_count(a.threads).count, SHAPES[a.shape]
    torch.set_num_threads(threads)
    ids = np.random.default_rng(0).integers(0, shape.vocab, a.prompt).tolist()
    torch_model = llama(shape)
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(Logits(torch_model), Path(folder) / "out", max_length=1024, dtype=dtype)
        print("export:", {k: round(v, 1) for k, v in report.seconds.items()})
        torch_model = torch_model.to(a.device, DTYPES[dtype])
        torch_ids = torch.tensor([ids], device=a.device)
        with tfinfer.load(report.folder, device=a.device, threads=threads) as model:
            runs: dict[str, Run] = {
                "torch eager": lambda: eager(torch_model, torch_ids, a.new, a.device),
                "tfinfer": lambda: ours(model, ids, a.new),
            }
            if a.device == "cpu":
                runs["ruler"] = Ruler(shape, a.prompt, a.new, threads).run
            result = summary(interleave(runs, a.rounds), a.prompt, "torch eager")
    for name, row in result.items():
        columns = []
        for kind in ("decode", "prefill"):
            median, low, high = row[f"{kind}_ratio"]
            columns.append(f"{kind} {row[f'{kind}_tokens_per_s']:8.2f} tok/s, {median:.2f} x ({low:.2f} to {high:.2f})")
        print(f"{name:12s} {'   '.join(columns)}")
    asked = {"shape": a.shape, "prompt": a.prompt, "new": a.new, "rounds": a.rounds, "device": a.device, "dtype": dtype}
    print(json.dumps({**asked, "environment": environment(threads, a.device), "results": result}))


if __name__ == "__main__":
    main()
