"""How long a new process takes from nothing to its first token, with the folder's files in memory and without.

A start is measured in a process of its own, for a second one in the same process finds everything warm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CHILD = "import sys; from tfinfer.measure.starts import child; child(*sys.argv[1:])"
_LONGEST = 600  # seconds


class StartFailedError(Exception):
    """A new process did not come to its first token; the message is what it said last."""


def measure(folder: Path, files: Iterable[str], device: str, threads: int | None, starts: int) -> dict[str, Any]:
    """Cold starts, then warm ones: seconds of each, and what a cold one read from the disk.

    Raises StartFailedError.
    """
    names = list(files)
    cold = []
    if hasattr(os, "posix_fadvise"):
        for _ in range(starts):
            forget([folder / name for name in names])
            cold.append(_start(folder, device, threads))
    warm = [_start(folder, device, threads) for _ in range(starts)]
    return {"cold": cold, "warm": warm}


def forget(paths: Iterable[Path]) -> None:
    """Ask the system to drop files from its cache; what another process has mapped stays there."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _start(folder: Path, device: str, threads: int | None) -> dict[str, Any]:
    arguments = [sys.executable, "-c", _CHILD, str(folder), device, str(threads or "")]
    started = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - started
            _, said = process.communicate(timeout=_LONGEST)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise StartFailedError((said.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return {"seconds": seconds, **json.loads(line)}


def child(folder: str, device: str, threads: str) -> None:
    """What the new process does: load, make one token, say how long each took."""
    began = time.perf_counter()
    import tfinfer

    model = tfinfer.load(folder, device=device, threads=int(threads) if threads else None)
    loaded = time.perf_counter()
    model.generate([0], max_tokens=1, stop_ids=[])
    done = time.perf_counter()
    print(json.dumps({"load": loaded - began, "first_token": done - loaded, "read_bytes": _read_bytes()}), flush=True)


def _read_bytes() -> int | None:
    """What this process had read from the disk; None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
