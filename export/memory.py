"""Freed memory given back to the system: a pass over thousands of tokens leaves the allocator holding it."""

from __future__ import annotations

import ctypes
import gc

from torch import nn

# Looking for garbage takes a third of a second once torch and transformers are loaded: too long for a toy's few pages.
WORTH_IT = 64 << 20  # bytes of weights


def give_back(module: nn.Module) -> None:
    """Return what was freed to the system, for modules that are large enough to matter.

    Does so where the C library can (glibc's malloc_trim); elsewhere nothing but a collection.
    """
    if sum(p.nbytes for p in module.parameters()) < WORTH_IT:
        return
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none of this kind
        return
    trim(0)
