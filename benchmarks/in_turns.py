"""Systems in processes of their own that are asked for one round after the other, while the rest wait."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAUSE = 0.2  # seconds
WARM = 128  # tokens of a prompt that only warms a system up


@dataclass(frozen=True)
class System:
    """A file of `systems/`, and the setting it is opened with; `package` is what must be installed."""

    module: str
    package: str
    setting: str = ""
    devices: tuple[str, ...] = ("cpu",)


@dataclass
class Worker:
    """A system that is open in its process."""

    name: str
    process: subprocess.Popen[str]
    ready: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, system: System, python: str, given: dict[str, Any]) -> Worker:
        settings = json.dumps({**given, "setting": system.setting})
        command = [python, str(HERE / "systems" / "worker.py"), system.module, settings]
        log = (Path(given["cache"]) / f"{name.replace(' ', '-')}-{given['bits']}.log").open("w")
        pipe = subprocess.PIPE
        worker = cls(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True))
        worker.ready = worker._answer()
        return worker

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
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


def open_all(
    systems: Mapping[str, System], pythons: Mapping[str, str], given: dict[str, Any]
) -> tuple[list[Worker], dict[str, str]]:
    """Those that open, and why the others do not. pythons: by name, an interpreter that has a system's packages."""
    workers, failed = [], {}
    for name, system in systems.items():
        worker = Worker.open(name, system, pythons.get(name, sys.executable), given)
        if "failed" in worker.ready:
            failed[name] = worker.ready["failed"]
            worker.close()
            continue
        print(f"{name}: open after {worker.ready['ready']} s, {worker.ready['memory']} MiB", flush=True)
        workers.append(worker)
    return workers, failed


def measure(
    workers: Sequence[Worker], ids: list[int], new: int, rounds: int, turns: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Every system once per round, after a round that does not count; one that fails is left out from then on.

    The order changes from turn to turn, and each waits until the threads of the one before sleep: who follows a
    system whose threads spin on would be slower for it. turns: each round's new tokens are taken in so many turns,
    while the others' requests stand still: for prompts that take minutes. The round that does not count is then one
    turn behind a short prompt.
    """
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    shuffled = random.Random(0)
    parts = [new // turns + (i < new % turns) for i in range(turns)]
    _round(workers, found, ids[:WARM] if turns > 1 else ids, [new], shuffled)
    for _ in range(rounds):
        for name, answers in _round(workers, found, ids, parts, shuffled).items():
            found[name].append(_together(answers))
    return found


def _round(
    workers: Sequence[Worker], found: dict[str, Any], ids: list[int], parts: Sequence[int], shuffled: random.Random
) -> dict[str, list[dict[str, Any]]]:
    """The answers to one prompt, by system, one for each part of the new tokens; who fails is taken out of `found`."""
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers if worker.name in found}
    order = list(workers)
    for number, take in enumerate(parts):
        begin = {} if number else {"ids": ids, "new": sum(parts)}
        shuffled.shuffle(order)
        for worker in order:
            if worker.name not in found:
                continue
            time.sleep(PAUSE)
            answer = worker.ask({**begin, "take": take})
            if "failed" in answer:
                print(f"{worker.name}: {answer['failed']}")
                del found[worker.name], answers[worker.name]
            else:
                answers[worker.name].append(answer)
    return answers


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One round: the times of all its tokens, and by turn those between tokens alone."""
    every = [answer["seconds"] for answer in answers]
    return {
        "seconds": [second for seconds in every for second in seconds],
        "turns": [every[0][1:], *every[1:]],
        "tokens": [token for answer in answers for token in answer["tokens"]],
        "memory": max(answer["memory"] for answer in answers),
    }


def joined(found: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """The rounds of several openings behind one another, of the systems that were there in all of them."""
    lasting = [name for name in found[0] if all(name in rounds for rounds in found)]
    return {name: [one for rounds in found for one in rounds[name]] for name in lasting}
