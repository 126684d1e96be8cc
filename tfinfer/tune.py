"""Measures what is fastest for a folder on this machine, and writes it beside the model.

Two sessions at a time serve the same request in turns, so that what else the machine does hits both. The default stays
unless another way is clearly faster, makes no phase clearly slower and gives the same result; what was found by trying
many is measured once more against the default before it is believed.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfinfer.integrity import check_files
from tfinfer.manifest import Manifest, load_manifest
from tfinfer.measure.busy import busy_warnings, load_average
from tfinfer.measure.ranks import sign_test
from tfinfer.measure.runs import Progress, no_garbage_collection
from tfinfer.measure.trial import Trial, Work, open_for, request, same_result, work_for
from tfinfer.session import tuned
from tfinfer.session.machine import Machine, this_machine
from tfinfer.session.settings import OnCpu, Settings
from tfinfer.session.threads import Threads, thread_count

OBJECTIVE = "the time of one request: its prefill and its steps; no phase may become clearly slower"
ROUNDS, QUICK_ROUNDS = 9, 5  # at least: noise hits short requests harder, so they go on for the seconds below
SECONDS, QUICK_SECONDS, MOST_ROUNDS = 4.0, 1.0, 101
NEW_TOKENS, QUICK_NEW_TOKENS = 32, 16
GAIN = 0.03  # below this a difference is not worth a setting
CHANCE = 0.05
# Each alone on top of the best so far. They say how work is spread over threads, so one thread has no use for three.
SWITCHES: tuple[dict[str, Any], ...] = (
    {"allow_spinning": False},
    {"dynamic_block_base": 4},
    {"denormal_as_zero": True},
    {"memory_pattern": True},
)
FOR_ONE_THREAD = ("memory_pattern",)


@dataclass(frozen=True)
class Duel:
    """Two ways of opening a session, round by round: how long `candidate` takes for each second of `against`."""

    candidate: OnCpu
    against: OnCpu
    request: tuple[float, ...]
    phases: dict[str, tuple[float, ...]]
    same_result: bool
    seconds: tuple[float, float]  # medians of the request: candidate, against

    @property
    def ratio(self) -> float:
        return statistics.median(self.request)

    @property
    def won(self) -> bool:
        return self.same_result and clearly_faster(self.request) and not any(map(clearly_slower, self.phases.values()))

    @property
    def verdict(self) -> str:
        if self.won:
            return "faster"
        if not self.same_result:
            return "another result: not taken"
        if clearly_faster(self.request):
            slower = [name for name, ratios in self.phases.items() if clearly_slower(ratios)]
            return f"slower in {', '.join(slower)}: not taken"
        return "slower" if clearly_slower(self.request) else "no clear difference"

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidate": describe(self.candidate),
            "against": describe(self.against),
            "rounds": len(self.request),
            "ratio": self.ratio,
            "lowest": min(self.request),
            "highest": max(self.request),
            "phases": {name: statistics.median(ratios) for name, ratios in self.phases.items()},
            "same_result": self.same_result,
            "verdict": self.verdict,
        }


def clearly_faster(ratios: tuple[float, ...]) -> bool:
    """Whether the gain is worth it, and came in more rounds than chance would give."""
    wins = sum(ratio < 1 for ratio in ratios)
    return statistics.median(ratios) <= 1 - GAIN and sign_test(wins, len(ratios)) <= CHANCE


def clearly_slower(ratios: tuple[float, ...]) -> bool:
    return clearly_faster(tuple(1 / ratio for ratio in ratios))


def describe(how: OnCpu) -> str:
    count = how.threads.count
    return f"{count} thread{'' if count == 1 else 's'}, {how.settings}"


@dataclass(frozen=True)
class Report:
    """Every duel in the order in which it was fought, and what stays."""

    machine: str
    work: str
    duels: tuple[Duel, ...]
    chosen: OnCpu
    default: OnCpu
    file: Path
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "machine": self.machine,
            "objective": OBJECTIVE,
            "workload": self.work,
            "duels": [duel.to_dict() for duel in self.duels],
            "chosen": {"threads": self.chosen.threads.count, **dataclasses.asdict(self.chosen.settings)},
            "is_default": self.chosen == self.default,
            "file": str(self.file),
            "warnings": list(self.warnings),
        }


def tune(
    folder: str | os.PathLike[str],
    *,
    prompt_length: int | None = None,
    new_tokens: int | None = None,
    quick: bool = False,
    progress: Progress = lambda stage: None,
) -> Report:
    """Measure and write `tfinfer.tune.json` into the folder.

    Raises as `tfinfer.load`, InputError or LengthError for a request that does not fit, and TargetError where the
    folder cannot be written, before anything is measured.
    """
    path = Path(folder)
    manifest = load_manifest(path)
    check_files(path, manifest)
    work = work_for(manifest, prompt_length, new_tokens, QUICK_NEW_TOKENS if quick else NEW_TOKENS)
    machine, default, busy = this_machine(), OnCpu(thread_count()), load_average()
    tuned.check_writable(path)
    arena = Arena(manifest, path, work, quick, progress)
    chosen, file = choose(arena, default, machine), path / tuned.TUNE_FILE
    warnings = tuple(busy_warnings(busy))
    report = Report(str(machine), str(work), tuple(arena.duels), chosen, default, file, warnings)
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    measured = {name: value for name, value in report.to_dict().items() if name not in ("machine", "file")}
    tuned.put(tuned.Entry(tuned.key_of(path), chosen.threads.count, chosen.settings, created, measured), path)
    return report


class Arena:
    """Where duels are fought, and the list of those that were."""

    def __init__(self, manifest: Manifest, folder: Path, work: Work, quick: bool, progress: Progress) -> None:
        self.manifest, self.folder, self.work, self.progress = manifest, folder, work, progress
        self.rounds = QUICK_ROUNDS if quick else ROUNDS
        self.seconds = QUICK_SECONDS if quick else SECONDS
        self.duels: list[Duel] = []

    def duel(self, candidate: OnCpu, against: OnCpu) -> Duel:
        """Both serve the request in turns, the one that begins changing, after a round that does not count."""
        self.progress(f"{describe(candidate)} against {describe(against)}")
        sides = (candidate, against)
        sessions = [open_for(self.manifest, self.folder, how) for how in sides]
        trials: list[list[Trial]] = [[], []]
        try:
            with no_garbage_collection():
                began = time.perf_counter()
                while self._goes_on(len(trials[0]) - 1, time.perf_counter() - began):
                    for side in (0, 1) if len(trials[0]) % 2 else (1, 0):
                        trials[side].append(request(sessions[side], self.work))
        finally:
            for session in sessions:
                session.close()
        found = compared(self.manifest, candidate, against, *trials)
        self.duels.append(found)
        return found

    def _goes_on(self, rounds: int, seconds: float) -> bool:
        """Whether another round follows: what was measured has no say in it."""
        return rounds < self.rounds or (rounds < MOST_ROUNDS and seconds < self.seconds)


def compared(manifest: Manifest, candidate: OnCpu, against: OnCpu, ours: list[Trial], theirs: list[Trial]) -> Duel:
    """The duel of two lists of trials; the first of each warmed up and does not count, its result does."""
    same = all(same_result(manifest, base, trial) for base, trial in zip(theirs, ours))
    pairs = list(zip(ours[1:], theirs[1:]))
    phases = {name: tuple(a.phases[name] / b.phases[name] for a, b in pairs) for name in ours[0].phases}
    seconds = (statistics.median(a.request for a, _ in pairs), statistics.median(b.request for _, b in pairs))
    return Duel(candidate, against, tuple(a.request / b.request for a, b in pairs), phases, same, seconds)


def choose(arena: Arena, default: OnCpu, machine: Machine) -> OnCpu:
    """Thread counts first, then each switch on top of the best so far; the winner must beat the default once more."""
    duels = [arena.duel(OnCpu(threads), default) for threads in counts(default.threads.count, machine)]
    best = min((duel for duel in duels if duel.won), key=lambda duel: duel.ratio, default=None)
    chosen = best.candidate if best else default
    for change in SWITCHES:
        if chosen.threads.count == 1 and not set(change) <= set(FOR_ONE_THREAD):
            continue
        settings: Settings = replace(chosen.settings, **change)
        if (duel := arena.duel(replace(chosen, settings=settings), chosen)).won:
            chosen = duel.candidate
    if chosen == default:
        return default
    return chosen if arena.duel(chosen, default).won else default


def counts(default: int, machine: Machine) -> list[Threads]:
    """The thread counts that are worth a try: one, parts of the cores, all but one, all hardware threads."""
    cores = machine.cores
    some = {1, cores // 4, cores // 2, cores - 1, cores, machine.hardware_threads} - {0, default}
    return [Threads(count, f"{count}: tried") for count in sorted(some)]
