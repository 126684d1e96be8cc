"""Whether the machine was doing other work, which then is in every figure."""

from __future__ import annotations

import os

BUSY = 0.5  # load average per processor from which other work is likely to be in the figures


def load_average() -> tuple[float, float, float] | None:
    """Of the last minute, five and fifteen; None where the system does not say."""
    try:
        return os.getloadavg()
    except (AttributeError, OSError):
        return None


def busy_warnings(load: tuple[float, float, float] | None) -> list[str]:
    """What to tell of the load before a measurement began: nothing where it was low or is not known."""
    cores = os.cpu_count() or 1
    if load is None or load[0] <= BUSY * cores:
        return []
    return [f"the load average was {load[0]:.2f} on {cores} processors before it began: other work is in these figures"]
