"""One-token steps as CUDA graphs: onnxruntime records what a step launches and launches all of it at once from then on.

A recording holds addresses and shapes. So it is made for one set of buffers, and whatever changes from step to step
lies on the device: only values, and what is computed from them there. Lengths of the host are fixed when a step is
recorded, `total_sequence_length` of GroupQueryAttention among them; it is the capacity of the buffers then, and how
long each row is the operator reads on the device, from what the attention mask says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfinfer.errors import CudaGraphError, InputError
from tfinfer.manifest import Manifest
from tfinfer.session.ort import onnxruntime
from tfinfer.session.providers import Opened

LEAVE_OUT = "load it with cuda_graph=False (without --cuda-graph)"
PLAIN = -1  # the id of runs that are neither recorded nor taken from a recording


class Recording:
    """The recordings of one session, by number, and the options of runs that use them."""

    def __init__(self, session: Any, must: bool) -> None:
        self.session, self.must = session, must
        self.plain = options(PLAIN)
        self.off = ""  # why no step is recorded any more
        self._last = 0

    def new(self) -> int:
        """A number for a step over buffers that no other has."""
        self._last += 1
        return self._last

    def release(self, number: int) -> None:
        """Let a recording go, where this onnxruntime can; the session's end lets go of all."""
        if hasattr(self.session, "release_captured_graph"):
            self.session.release_captured_graph(number)

    def refuse(self, why: str) -> None:
        """Record nothing any more. Raises CudaGraphError where recordings were insisted on."""
        self.off = why
        if self.must:
            raise CudaGraphError(f"{why}: {LEAVE_OUT}")


def options(number: int) -> Any:
    """RunOptions for a recording; onnxruntime makes it when it sees a number for the first time."""
    made = onnxruntime().RunOptions()
    made.add_run_config_entry("gpu_graph_id", str(number))
    return made


def cannot_record(manifest: Manifest) -> str:
    """Why steps of a folder cannot be recorded; empty where nothing speaks against it."""
    others = sorted({spec.operator for spec in manifest.attention} - {"GroupQueryAttention"})
    if manifest.kind != "decoder":
        return f"it is an {manifest.kind}"
    if manifest.states:
        return "it has running states, which the runs that record a step would move on several times"
    if manifest.cache_mode == "concatenated":
        return "its cache is made anew in each step"
    if others or not manifest.attention:
        return f"its attention is {', '.join(others) or 'unknown'}, not GroupQueryAttention alone"
    return ""


def open_recording(
    opens: Callable[[bool], Opened], manifest: Manifest, asked: bool | None
) -> tuple[Opened, Recording | None, str]:
    """Open a session that records steps, if asked to (True) or where it can (None); and why it does not.

    opens: what opens it, given whether it is to record. Raises CudaGraphError or InputError where it must and cannot.
    """
    if asked not in (True, False, None):
        raise InputError(f"cuda_graph: expected True, False or None, got {asked!r}")
    if asked is False:
        return opens(False), None, "not asked for"
    why = cannot_record(manifest)
    if not why:
        try:
            opened = opens(True)
        except CudaGraphError as refusal:
            if asked:
                raise
            return opens(False), None, str(refusal)
        if opened.device == "cuda":
            return opened, Recording(opened.session, bool(asked)), ""
        why = f"only CUDA records, and it computes on the CPU ({opened.reason})"
        if not asked:
            return opened, None, why
    if asked:
        raise CudaGraphError(f"the steps of this folder cannot be recorded as CUDA graphs: {why}: {LEAVE_OUT}")
    return opens(False), None, why
