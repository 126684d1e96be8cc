"""tfinfer: the checkpoint exported once, then streamed.

setting "tuned": as `tfinfer tune` finds best here. "int8 cache": with --cache int8. "graph": steps recorded as CUDA
graphs. "bf16": that width for fp16. "4-bit head": with --head-bits 4, in place of 8. "per channel": with --per-channel,
which in 4 bits is the head's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DTYPES = {32: "fp32", 16: "fp16", 8: "int8", 4: "int4"}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens; nothing is reused from one call to the next."""
    import tfinfer

    folder = exported(given)
    if given["setting"] == "tuned":
        folder = _tuned(folder)
    model = tfinfer.load(
        folder,
        device=given.get("device", "cpu"),
        threads=None if given["setting"] == "tuned" else given["threads"],
        cuda_graph=given["setting"] == "graph",
    )

    def generate(ids: list[int], new: int) -> Iterator[int]:
        for chunk in model.stream(ids, max_tokens=new, stop_ids=[], reuse_prefix=False):
            yield from chunk.token_ids

    return generate


def exported(given: dict[str, Any]) -> Path:
    """The folder of the checkpoint exported, long enough for what is asked."""
    dtype = DTYPES[given["bits"]]
    if given.get("setting") == "bf16":
        if given["bits"] != 16:
            raise ValueError("bf16 has 16 bits")
        dtype = "bf16"
    name, more = f"tfinfer-{dtype}", []
    if given.get("device") == "cuda" and given["bits"] < 16:
        name, more = f"{name}-fp16", ["--activations", "fp16"]
    if given.get("setting") == "int8 cache":
        name, more = f"{name}-int8-cache", ["--cache", "int8"]
    if given.get("setting") == "4-bit head":
        if given["bits"] != 4:
            raise ValueError("a 4-bit head goes with 4 bits only")
        name, more = f"{name}-head4", ["--head-bits", "4"]
    if given.get("setting") == "per channel":
        if given["bits"] not in (4, 8):
            raise ValueError("scales by channel go with 8 bits, of all products or of the head")
        name, more = f"{name}-channel", ["--per-channel"]
    folder = Path(given["cache"]) / f"{name}-{given['longest']}"
    if not (folder / "tfinfer.json").exists():
        _run("export", given["checkpoint"], "-o", folder, "--dtype", dtype, "--no-attention",
             "--max-length", given["longest"], *more)  # fmt: skip
    return folder


def _tuned(folder: Path) -> Path:
    tuned = folder.with_name(f"{folder.name}-tuned")
    if not (tuned / "tfinfer.tune.json").exists():
        shutil.rmtree(tuned, ignore_errors=True)
        shutil.copytree(folder, tuned, copy_function=os.link)
        _run("tune", tuned)
    return tuned


def _run(*arguments: object) -> None:
    """In a process of its own: this one never imports torch."""
    subprocess.run([sys.executable, "-m", "tfinfer", *map(str, arguments)], check=True)
