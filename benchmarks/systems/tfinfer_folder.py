"""tfinfer: the checkpoint exported once, then streamed. setting "tuned": as `tfinfer tune` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DTYPES = {32: "fp32", 8: "int8", 4: "int4"}


def load(given: dict[str, Any]) -> Callable[[list[int], int], Iterator[int]]:
    """Return a function that yields tokens."""
    import tfinfer

    folder = Path(given["cache"]) / f"tfinfer-{given['bits']}"
    if not (folder / "tfinfer.json").exists():
        _export(given, folder)
    model = tfinfer.load(folder, threads=given["threads"])

    def generate(ids: list[int], new: int) -> Iterator[int]:
        for chunk in model.stream(ids, max_tokens=new, stop_ids=[], reuse_prefix=False):
            yield from chunk.token_ids

    return generate


def _export(given: dict[str, Any], folder: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "tfinfer", "export", given["checkpoint"], "-o", str(folder)]
    command += ["--dtype", DTYPES[given["bits"]], "--max-length", str(given["longest"]), "--no-attention"]
    subprocess.run(command, check=True)  # in a process of its own: this one never imports torch
