"""What onnxruntime raises while it computes, as errors of the tree. Knows nothing of caches or tokens."""

from __future__ import annotations

import textwrap
from typing import Any

from tfinfer.errors import CudaGraphError, InputError, ProviderError, TfinferError

_NO_RECORDING = ("stream is capturing", "capture", "CUDAGraph")
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory")


def run_bound(session: Any, binding: Any, what: str, device: str, options: Any = None) -> None:
    """Run a session on what is bound. Raises ProviderError where memory or the device fails, InputError otherwise."""
    try:
        session.run_with_iobinding(binding, *(() if options is None else (options,)))
        if device != "cpu":
            binding.synchronize_outputs()
    except Exception as cause:  # onnxruntime's classes have no common root
        if (error := translated(cause, what, device)) is None:
            raise
        raise error from cause


def translated(cause: Exception, what: str, device: str) -> TfinferError | None:
    """The error of the tree for what onnxruntime raised while computing; None for what is none of its business."""
    said = textwrap.shorten(str(cause).strip() or type(cause).__name__, 240, placeholder=" ...")
    if isinstance(cause, MemoryError) or any(mark in said for mark in _NO_MEMORY):
        return ProviderError(f"{device} has no memory for {what}: use a smaller batch or shorter texts; {said}")
    if device == "cuda" and any(mark in said for mark in _NO_RECORDING):
        mend = "load it with cuda_graph=False (without --cuda-graph)"
        return CudaGraphError(f"cuda cannot record {what} as a CUDA graph: {said}: {mend}")
    if device == "cuda" and "CUDA" in said:
        return ProviderError(f"cuda failed while computing {what}: {said}")
    if type(cause).__module__.startswith("onnxruntime") or isinstance(cause, RuntimeError):
        return InputError(f"the graph cannot compute {what}: {said}")
    return None
