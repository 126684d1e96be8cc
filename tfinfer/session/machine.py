"""What of a machine decides how fast it computes: the processor's name, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from tfinfer.session.threads import thread_count


@dataclass(frozen=True)
class Machine:
    """One kind of processor and the part of it that this process may use."""

    cpu: str
    cores: int  # as `thread_count` counts them: affinity and quota seen
    hardware_threads: int

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} of its cores ({self.hardware_threads} hardware threads)"


def this_machine(root: Path = Path("/")) -> Machine:
    """The machine that this process runs on.

    Args:
        root: where `proc` and `sys` are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpu_model(root), thread_count(root=root).count, allowed)


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
