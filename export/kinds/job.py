"""What the exporter asks of every kind of export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from tfinfer.manifest import Manifest
from tfinfer.proof.prove import Verdict

from ..capture import AttentionReport, Observed
from ..capture.plain import InputSpec

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a user asked for that matters to capture."""

    flavor: str = "ort"
    max_length: int | None = None
    max_source_length: int | None = None
    inputs: tuple[InputSpec, ...] = ()
    start_ids: tuple[int, ...] = ()


class Job(Protocol):
    """One module captured, with everything that only its kind knows."""

    graphs: Mapping[str, ir.Model]
    attention: list[AttentionReport]
    module_length: int | None  # the longest length that the module itself allows, where it says

    def fields(self, dtype: str) -> dict[str, Any]:
        """The manifest's fields that depend on the kind, for activations of `dtype`."""

    def expect(self, progress: Progress) -> Any:
        """What the module itself computes for the cases of the proof."""

    def save(self, path: Path, expected: Any) -> None:
        """Write the golden file."""

    def verdict(self, manifest: Manifest, folder: Path, expected: Any, device: str, progress: Progress) -> Verdict:
        """Run the cases on the folder's graphs and compare."""

    def observe(self) -> Observed | None:
        """The graph of the weights of attention, to be checked once it is written; None where it has none to show."""
