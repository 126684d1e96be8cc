"""Counts the threads that this process may really use, and says why.

onnxruntime's own default counts the machine's cores and does not see the quota of a container, where the surplus
threads then spin against each other. Knows nothing of onnxruntime. Reads /proc and /sys; where there are none, it
takes what Python reports.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tfinfer.errors import InputError

_MOST = 1024  # a count above this is a slip, and creating that many threads can kill the process


@dataclass(frozen=True)
class Threads:
    """A thread count and one line that says where it comes from."""

    count: int
    reason: str


def thread_count(
    asked: int | None = None, *, root: Path = Path("/"), affinity: frozenset[int] | None = None
) -> Threads:
    """Take the count that was asked for, or else as many as affinity, physical cores and cgroup quota allow.

    Args:
        asked: at least 1, or None for the count that suits this process.
        root: where `proc` and `sys` are.
        affinity: numbers of the processors this process may run on; None asks the system.

    Raises:
        InputError: `asked` is not an integer from 1 to 1024.
    """
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= _MOST:
            raise InputError(f"threads: expected an integer from 1 to {_MOST} or None, got {asked!r}")
        return Threads(asked, f"{asked}: asked for")
    everyone = os.cpu_count() or 1
    if affinity is None:
        if not hasattr(os, "sched_getaffinity"):
            return Threads(everyone, f"{everyone}: the system reports {_many(everyone, 'processor')}")
        affinity = frozenset(os.sched_getaffinity(0))
    cores = _physical_cores(affinity, root)
    quota = _quota(root)
    if quota is not None and math.ceil(quota) < cores:
        count = max(1, math.ceil(quota))
        return Threads(count, f"{count}: the cgroup quota allows {_many(quota, 'processor')}")
    who = "cpu affinity allows" if len(affinity) < everyone else "the machine has"
    shared = f" ({len(affinity)} hardware threads)" if len(affinity) > cores else ""
    return Threads(cores, f"{cores}: {who} {_many(cores, 'core')}{shared}")


def _many(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _physical_cores(affinity: frozenset[int], root: Path) -> int:
    """Hardware threads of one core name the same siblings, so distinct lists are cores."""
    folder = root / "sys/devices/system/cpu"
    siblings = {_read(folder / f"cpu{n}/topology/thread_siblings_list") or f"alone {n}" for n in affinity}
    return max(1, len(siblings))


def _quota(root: Path) -> float | None:
    """The least processor quota of this process's control groups and all their parents, in processors."""
    groups = _groups(root)
    limits: list[float] = []
    for kind, mounted, folder in _mounts(root):
        if (group := groups.get(kind)) is None:
            continue
        # A mount may show only a part of the tree; a group outside that part is seen as the part's top.
        inside = Path(group).relative_to(mounted) if Path(group).is_relative_to(mounted) else Path()
        steps = [] if ".." in inside.parts else inside.parts
        for depth in range(len(steps) + 1):
            limit = (_limit_v2 if kind == "cgroup2" else _limit_v1)(folder.joinpath(*steps[:depth]))
            if limit is not None:
                limits.append(limit)
    return min(limits, default=None)


def _groups(root: Path) -> dict[str, str]:
    """This process's group in the tree of each kind; lines are `number:controllers:path`, v2 has no controllers."""
    found = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            found["cgroup"] = path
    return found


def _mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(kind, the group that is shown as its top, folder) of every mounted tree that limits processors."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        place, source = left.split(), right.split()
        if len(place) < 5 or len(source) < 3:
            continue
        kind, controllers = source[0], source[2].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in controllers):
            yield kind, place[3], root / place[4].lstrip("/")


def _limit_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _limit_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """`max` and -1 stand for no limit."""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0 or int(quota) == 0:
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
