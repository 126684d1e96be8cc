"""tfinfer and its peers on the same random weights, in one run, in turns: time to the first token, time per token.

    python benchmarks/peers.py --shape smollm2-135m --bits 32 --prompt 128 1024 --json out/peers.json
    python benchmarks/peers.py --device cuda --shape qwen3-0.6b --bits 16 4 --prompt 128 1024

Every system runs in a process of its own and is asked for one round after the other, in an order that changes, while
the rest wait. A round is a prompt and some new tokens, greedy. What does not open is told and left out. All are opened
anew several times, for where the pages of a process happen to lie makes up to a tenth of its speed. For every system:
the median over the rounds and, against tfinfer in the same round, the ratio with its lowest and highest value. Decode:
the median time between tokens of a round, or of each of its `--turns`, which read the prompt once. The share of the
read limit: what a token must read (every matrix once, keys and values of the context) times the tokens per second,
against the read bandwidth measured in the same run. The share of the GEMM rate: what a prompt must compute (2 x the
weights of the layers' matrices x tokens, 4 x heads x head_dim x tokens^2 / 2 for causal attention in each layer, and 2
x the head's weights, for one row) in the time to the first token, against the rate of a matrix product measured in the
same run. That one is of float32 on the CPU and of float16 on CUDA: weights of a few bits, whose products are of whole
numbers, may go beyond it. Both are empty for shapes whose sizes are not known. In 4 bits all have a head of 8; systems
with "4-bit head" in their names have one of 4.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import roofline
from checkpoints import LONGEST, SHAPES, checkpoint
from in_turns import System, joined, measure, open_all
from peers_table import OURS, bytes_per_token, flop_of_prompt, lines, shares, summary, write_csv

from tfinfer.session.machine import cpu_model
from tfinfer.session.threads import thread_count

BOTH = ("cpu", "cuda")
NARROW_HEAD = "4-bit head"
SYSTEMS = {
    OURS: System("tfinfer_folder", "tfinfer", devices=BOTH),
    "tfinfer bf16": System("tfinfer_folder", "tfinfer", "bf16", devices=("cuda",)),
    "tfinfer graph": System("tfinfer_folder", "tfinfer", "graph", devices=("cuda",)),
    "tfinfer tuned": System("tfinfer_folder", "tfinfer", "tuned"),
    "tfinfer int8 cache": System("tfinfer_folder", "tfinfer", "int8 cache"),
    "tfinfer per channel": System("tfinfer_folder", "tfinfer", "per channel"),
    "tfinfer 4-bit head": System("tfinfer_folder", "tfinfer", NARROW_HEAD),
    "ruler": System("ruler_graph", "onnxruntime"),
    "transformers": System("torch_eager", "transformers", devices=BOTH),
    "torch.compile": System("torch_eager", "transformers", "compile", devices=BOTH),
    "onnxruntime-genai": System("genai_builder", "onnxruntime-genai", devices=BOTH),
    "onnxruntime-genai default": System("genai_builder", "onnxruntime-genai", "default"),
    "onnxruntime-genai int8 cache": System("genai_builder", "onnxruntime-genai", "int8 cache"),
    "onnxruntime-genai 4-bit head": System("genai_builder", "onnxruntime-genai", NARROW_HEAD),
    "llama.cpp": System("llama_cpp_gguf", "llama-cpp-python"),
    "llama.cpp default": System("llama_cpp_gguf", "llama-cpp-python", "default"),
    "llama.cpp flash": System("llama_cpp_gguf", "llama-cpp-python", "flash"),
    "llama.cpp flash f16 cache": System("llama_cpp_gguf", "llama-cpp-python", "flash f16"),
    "llama.cpp flash q8 cache": System("llama_cpp_gguf", "llama-cpp-python", "flash q8"),
    "OpenVINO GenAI": System("openvino_ir", "openvino-genai"),
    "OpenVINO GenAI default": System("openvino_ir", "openvino-genai", "default"),
    "CTranslate2": System("ctranslate2_model", "ctranslate2"),
    "optimum-onnx": System("optimum_onnx", "optimum-onnx"),
}


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Where and with what this was measured."""
    packages = {"card": roofline.card()} if device == "cuda" else {}
    for package in (
        "torch",
        "onnxruntime",
        "onnxruntime-gpu",
        *sorted({system.package for system in SYSTEMS.values()}),
    ):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = "not installed here"
    return {
        "processor": cpu_model(),
        "threads": threads,
        "load": Path("/proc/loadavg").read_text().split()[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **packages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "t5-small"], default="smollm2-135m")
    parser.add_argument("--bits", type=int, choices=(32, 16, 8, 4), nargs="+", default=[32])
    parser.add_argument("--device", choices=BOTH, default="cpu")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=1, help="take a round's new tokens in so many turns")
    parser.add_argument("--openings", type=int, default=2, help="how often every system is opened anew")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", help="names of systems, separated by commas")
    own = [name for name in SYSTEMS if name.startswith(OURS)]
    parser.add_argument("--ours", default=OURS, choices=own, help="what the ratios are of")
    parser.add_argument("--python", action="append", default=[], help="NAME=interpreter that has its packages")
    parser.add_argument("--cache", type=Path, default=Path("out/bench"), help="checkpoints and what was made of them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    fitting = [name for name, system in SYSTEMS.items() if a.device in system.devices]
    names = [name.strip() for name in a.only.split(",")] if a.only else fitting
    if unknown := sorted(set(names) - set(SYSTEMS)):
        parser.error(f"unknown system {', '.join(unknown)}: there are {', '.join(SYSTEMS)}")
    if not 1 <= a.turns <= a.new // 2:
        parser.error(f"--turns takes 1 to {a.new // 2}: two of the {a.new} new tokens at least for each")
    threads = thread_count(a.threads).count
    folder = checkpoint(a.shape, a.cache).resolve()
    records: list[dict[str, Any]] = []
    limits = roofline.measure_cuda() if a.device == "cuda" else roofline.measure(threads)
    print(f"roofline of {a.device}: {limits}")
    for bits in a.bits:
        records += _run_bits(a, names, bits, threads, folder, limits)
    report = {"environment": environment(threads, a.device), "roofline": limits, "records": records}
    if a.json:
        a.json.write_text(json.dumps(report, indent=1))
    if a.csv:
        write_csv(records, a.csv)
    if a.picture:
        from peers_picture import draw

        draw(records, a.picture)
    print(json.dumps(report["environment"]))


def _run_bits(
    a: argparse.Namespace, names: list[str], bits: int, threads: int, folder: Path, limits: dict[str, float]
) -> list[dict[str, Any]]:
    given = {
        "shape": a.shape, "checkpoint": str(folder), "cache": str(folder.parent), "bits": bits, "threads": threads,
        "longest": min(LONGEST, max(a.prompt) + a.new + 64), "device": a.device,
    }  # fmt: skip
    found: dict[int, list[dict[str, list[dict[str, Any]]]]] = {prompt: [] for prompt in a.prompt}
    why: dict[str, str] = {}
    for _ in range(a.openings):
        why |= _open_and_measure(a, names, given, found)
    records = []
    for prompt, every in found.items():
        result = summary(joined(every), prompt, a.ours)
        context, flop = prompt + a.new // 2, flop_of_prompt(a.shape, prompt)
        for name, row in result.items():
            read = bytes_per_token(a.shape, bits, context, 4 if SYSTEMS[name].setting == NARROW_HEAD else 8)
            row |= shares(row, read, flop, limits)
        needed = bytes_per_token(a.shape, bits, context)
        limit = {"bytes_per_token": needed, "tokens_per_s": limits["read_gb_per_s"] * 1e9 / needed if needed else 0}
        print(
            f"\n{a.shape}, {bits} bits on {a.device}, prompt {prompt}, {a.new} new tokens, {threads} threads, "
            f"opened {a.openings} times for {a.rounds} rounds{f' of {a.turns} turns' if a.turns > 1 else ''}"
        )
        print("\n".join(lines(result, a.ours)), flush=True)
        asked = {"shape": a.shape, "device": a.device, "bits": bits, "prompt": prompt, "new": a.new}
        records.append({**asked, "limit": limit, "failed": why, "systems": result})
    return records


def _open_and_measure(
    a: argparse.Namespace, names: list[str], given: dict[str, Any], found: dict[int, list[dict[str, Any]]]
) -> dict[str, str]:
    """Add the rounds of one opening to what was `found` by prompt; returns why systems are not there."""
    pythons = dict(pair.split("=", 1) for pair in a.python)
    workers, failed = open_all({name: SYSTEMS[name] for name in names}, pythons, given)
    for name, why in failed.items():
        print(f"{name}: not there: {why}")
    try:
        for prompt, every in found.items():
            ids = np.random.default_rng(0).integers(3, SHAPES[a.shape][1].get("vocab_size", 50257), prompt).tolist()
            every.append(measure(workers, ids, a.new, a.rounds, a.turns))
    finally:
        for worker in workers:
            worker.close()
    return failed


if __name__ == "__main__":
    main()
