"""One system in a process of its own: opened once, then asked for rounds over standard input and output.

    python benchmarks/systems/worker.py NAME '{"checkpoint": ..., "cache": ..., "bits": 32, "threads": 2, ...}'

A system's module has `load(given) -> generate`, and `generate(ids, new)` yields after each new token. Commands are
lines of JSON: `{"ids": [...], "new": 64, "take": 16}` begins and takes so many of the new tokens, `{"take": 16}` goes
on. The answer is `{"seconds": [...], "tokens": [...]}`: the time from the command to its first token, then that between
tokens.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
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
    stream: Any = (token for token in ())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "ids" in command:
                stream.close()
                stream = generate(command["ids"], command["new"])
            answer(_timed(stream, command["take"]))
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _timed(stream: Iterator[int], take: int) -> dict[str, Any]:
    gc.collect()
    tokens, seconds, last = [], [], time.perf_counter()
    for token in itertools.islice(stream, take):
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
