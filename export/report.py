"""What an export did, for people and programs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfinfer.manifest import AttentionSpec, Manifest
from tfinfer.proof.prove import Verdict

from .capture import AttentionReport

COSTS = {
    "GroupQueryAttention": "",
    "Attention": "the valid part of the cache is copied each step, and its scores are computed without blocks",
    "MultiHeadAttention": "",
    "torch's own translation": "nothing of it was fused",
    "the module's own operators": "the valid part of the cache is copied each step, and every mask is made anew",
}


@dataclass(frozen=True)
class ExportReport:
    """The folder that was made, its manifest, and what the proof measured."""

    folder: Path
    manifest: Manifest
    verdicts: tuple[Verdict, ...]
    seconds: dict[str, float]
    own_length: int | None = None  # what the module or its source allows, where they say

    @property
    def notes(self) -> list[str]:
        """One line for what a user should know: what was not lowered and what it costs, what was not proved."""
        lines = [
            f"{spec.count} x {spec.operator} ({spec.pattern}): {spec.reason}; {COSTS[spec.operator]}"
            for spec in self.manifest.attention
            if spec.reason
        ]
        found = self.manifest.range
        if found is not None and found.kept:
            lines.append(
                f"{found.kept} operators stay float32: values of up to {found.largest:,.4g} were met in {found.tokens} "
                f"tokens of {found.origin}, and fp16 holds 65,504: --dtype bf16 holds them all"
            )
        small = self.manifest.small_cache
        if small is not None and small.kept:
            lines.append(
                f"{small.kept} of {small.kept + small.entries} cache entries stay float32, where nothing rounds them"
            )
        length = self.manifest.max_length
        if self.own_length is not None and self.own_length > length:
            lines.append(
                f"up to {length} of the model's own {self.own_length} tokens: --max-length takes more, and proves it"
            )
        return lines + ([self.manifest.proof.not_run] if self.manifest.proof.not_run else [])

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "seconds": self.seconds,
            "notes": self.notes,
            "manifest": dataclasses.asdict(self.manifest),
        }


def summarise_attention(reports: list[AttentionReport]) -> tuple[AttentionSpec, ...]:
    """Equal attentions counted together, in the order of the module."""
    counted = Counter(reports)
    return tuple(AttentionSpec(r.operator, r.pattern, count, r.reason) for r, count in counted.items())
