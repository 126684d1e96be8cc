"""One system in a process of its own: opened once, then asked for rounds over standard input and output.

    python benchmarks/systems/worker.py NAME '{"checkpoint": ..., "cache": ..., "bits": 32, "threads": 2, ...}'

A system's module has `load(given) -> generate`, and `generate(ids, new)` yields after each new token. Commands are
lines of JSON, `{"ids": [...], "new": 64}`; the answer is `{"seconds": [...], "tokens": [...]}`: the time from the call
to the first token, then that between tokens.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MARK = "ANSWER "


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of packages
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the systems print themselves is no answer

    def answer(value: Any) -> None:
        out.write(MARK + json.dumps(value) + "\n")
        out.flush()

    try:
        started = time.perf_counter()
        generate = importlib.import_module(f"systems.{name}").load(given)
        answer({"ready": round(time.perf_counter() - started, 2), "memory": _resident()})
    except Exception as error:  # of any kind: a peer that does not open is a row of the table
        answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(_timed(generate, command["ids"], command["new"]))
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _timed(generate: Any, ids: list[int], new: int) -> dict[str, Any]:
    gc.collect()
    tokens, seconds, last = [], [], time.perf_counter()
    with contextlib.closing(generate(ids, new)) as stream:
        for token in stream:
            now = time.perf_counter()
            seconds.append(now - last)
            tokens.append(int(token))
            last = now
    return {"seconds": seconds, "tokens": tokens, "memory": _resident()}


def _resident() -> int:
    """MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()
