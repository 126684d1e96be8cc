"""Large pages for the weights that a session packed: a step reads all of them, and finding as many small pages costs.

Packed weights lie in the process's own memory, which Linux fills with pages of 4 KiB. Moved onto pages of 2 MiB once,
135 M parameters took a step 1.09 times as fast in float32, whichever pages they had lain on before, and 1.06 times in 8
and in 4 bits; 600 M in 4 bits 1.03 times (processes of their own, in turns). Moving takes 1 to 1.5 ms/MiB.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

LARGE = 2 << 20  # bytes
LEAST = 16 << 20  # bytes of a folder: less lies in the processor's caches, or nearly
COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, https://man7.org/linux/man-pages/man2/madvise.2.html

Range = tuple[int, int]  # addresses: the first, and the one behind the last


def own_memory(root: Path = Path("/")) -> list[Range]:
    """Where the process's own memory lies, in the order of addresses; nothing where the system has no large pages.

    Args:
        root: where `proc` and `sys` are.
    """
    try:
        if "[never]" in (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return []
        lines = (root / "proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return [_addresses(line) for line in lines if _is_own(line.split())]


def enlarge(before: Iterable[Range], after: Iterable[Range]) -> int:
    """Move what is in `after` and was not in `before` onto large pages; returns how many bytes were offered.

    What the system refuses, for it has no such page left or no such call, stays as it is.
    """
    offered = 0
    for start, end in grown(list(before), after):
        first, last = -(-start // LARGE) * LARGE, end // LARGE * LARGE
        if first < last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), COLLAPSE)
            offered += last - first
    return offered


def enlarge_meanwhile(before: Iterable[Range], after: Iterable[Range]) -> threading.Thread:
    """`enlarge` in a thread of its own, as it takes a tenth of a start: the first token does not wait for it."""
    thread = threading.Thread(target=enlarge, args=(before, after), name="tfinfer-pages", daemon=True)
    thread.start()
    return thread


def grown(before: list[Range], after: Iterable[Range]) -> Iterator[Range]:
    """The parts of `after` that are not in `before`, whose ranges are in order and apart."""
    for start, end in after:
        for known_start, known_end in before:
            if known_end <= start:
                continue
            if known_start >= end:
                break
            if start < known_start:
                yield start, known_start
            start = known_end
        if start < end:
            yield start, end


def _addresses(line: str) -> Range:
    first, _, last = line.partition(" ")[0].partition("-")
    return int(first, 16), int(last, 16)


def _is_own(fields: list[str]) -> bool:
    """Of no file, read and written by this process alone: `addresses rw-p offset device inode [name]`."""
    name = fields[5] if len(fields) > 5 else ""
    return fields[1] == "rw-p" and name in ("", "[heap]")
