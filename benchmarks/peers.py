"""tfinfer and its peers on the same random weights, in one run, in turns: time to the first token, time per token.

    python benchmarks/peers.py --shape smollm2-135m --bits 32 --prompt 128 1024 --rounds 5 --json out/peers.json
    python benchmarks/peers.py --device cuda --shape qwen3-0.6b --bits 16 4 --prompt 128 1024

Every system runs in a process of its own and is asked for one round after the other, while the rest wait. A round is
a prompt and some new tokens, greedy. What does not open is told and left out. For every system: the median over the
rounds and, against tfinfer in the same round, the ratio with its lowest and highest value. Decode: the median time
between tokens of a round. The share of the read limit: what a token must read (every matrix once, keys and values of
the context) times the tokens per second, against the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import roofline
from checkpoints import LONGEST, SHAPES, checkpoint
from peers_table import OURS, bytes_per_token, lines, summary, write_csv

from tfinfer.session.machine import cpu_model
from tfinfer.session.threads import thread_count

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class System:
    """A file of `systems/`, and the setting it is opened with; `package` is what must be installed."""

    module: str
    package: str
    setting: str = ""
    peer: bool = True
    devices: tuple[str, ...] = ("cpu",)


BOTH = ("cpu", "cuda")
SYSTEMS = {
    OURS: System("tfinfer_folder", "tfinfer", peer=False, devices=BOTH),
    "tfinfer bf16": System("tfinfer_folder", "tfinfer", "bf16", peer=False, devices=("cuda",)),
    "tfinfer graph": System("tfinfer_folder", "tfinfer", "graph", peer=False, devices=("cuda",)),
    "tfinfer tuned": System("tfinfer_folder", "tfinfer", "tuned", peer=False),
    "ruler": System("ruler_graph", "onnxruntime", peer=False),
    "transformers": System("torch_eager", "transformers", devices=BOTH),
    "torch.compile": System("torch_eager", "transformers", "compile", devices=BOTH),
    "onnxruntime-genai": System("genai_builder", "onnxruntime-genai", devices=BOTH),
    "llama.cpp": System("llama_cpp_gguf", "llama-cpp-python"),
    "llama.cpp flash": System("llama_cpp_gguf", "llama-cpp-python", "flash"),
    "OpenVINO GenAI": System("openvino_gguf", "openvino-genai"),
    "CTranslate2": System("ctranslate2_model", "ctranslate2"),
    "optimum-onnx": System("optimum_onnx", "optimum-onnx"),
}


@dataclass
class Worker:
    """A system that is open in its process."""

    name: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, python: str, given: dict[str, Any]) -> Worker:
        system = SYSTEMS[name]
        command = [
            python,
            str(HERE / "systems" / "worker.py"),
            system.module,
            json.dumps({**given, "setting": system.setting}),
        ]
        log = (Path(given["cache"]) / f"{name.replace(' ', '-')}-{given['bits']}.log").open("w")
        pipe = subprocess.PIPE
        worker = cls(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True))
        worker.ready = worker._answer()
        return worker

    def ask(self, ids: list[int], new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": "its process ended"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        return {"failed": f"its process ended with exit code {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def open_all(names: list[str], pythons: dict[str, str], given: dict[str, Any]) -> tuple[list[Worker], dict[str, str]]:
    """Those that open, and why the others do not."""
    workers, failed = [], {}
    for name in names:
        worker = Worker.open(name, pythons.get(name, sys.executable), given)
        if "failed" in worker.ready:
            failed[name] = worker.ready["failed"]
            worker.close()
            continue
        print(f"{name}: open after {worker.ready['ready']} s, {worker.ready['memory']} MiB", flush=True)
        workers.append(worker)
    return workers, failed


def measure(workers: list[Worker], ids: list[int], new: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every system once per round, after a round that does not count; one that fails is left out from then on."""
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for number in range(rounds + 1):
        for worker in workers:
            if worker.name not in found:
                continue
            answer = worker.ask(ids, new)
            if "failed" in answer:
                print(f"{worker.name}: {answer['failed']}")
                del found[worker.name]
            elif number:
                found[worker.name].append(answer)
    return found


def environment(threads: int, device: str) -> dict[str, Any]:
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", help="names of systems, separated by commas")
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
    pythons = dict(pair.split("=", 1) for pair in a.python)
    workers, failed = open_all(names, pythons, given)
    for name, why in failed.items():
        print(f"{name}: not there: {why}")
    records = []
    try:
        for prompt in a.prompt:
            ids = np.random.default_rng(0).integers(3, SHAPES[a.shape][1].get("vocab_size", 50257), prompt).tolist()
            result = summary(measure(workers, ids, a.new, a.rounds), prompt)
            needed = bytes_per_token(a.shape, bits, prompt + a.new // 2)
            limit = {"bytes_per_token": needed, "tokens_per_s": limits["read_gb_per_s"] * 1e9 / needed if needed else 0}
            print(
                f"\n{a.shape}, {bits} bits on {a.device}, prompt {prompt}, {a.new} new tokens, {threads} threads, "
                f"{a.rounds} rounds"
            )
            print("\n".join(lines(result, limit)), flush=True)
            asked = {"shape": a.shape, "device": a.device, "bits": bits, "prompt": prompt, "new": a.new}
            records.append({**asked, "limit": limit, "failed": failed, "systems": result})
    finally:
        for worker in workers:
            worker.close()
    return records


if __name__ == "__main__":
    main()
