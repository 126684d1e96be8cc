"""Freed memory given back to the system: a pass over thousands of tokens leaves the allocator holding it."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Return what was freed to the system, where the C library can (glibc's malloc_trim); elsewhere do nothing."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none of this kind
        return
    trim(0)
