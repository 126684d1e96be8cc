"""The switches of onnxruntime on the CPU whose best value depends on machine and model, and what they are by default.

None of them is set by hand: `tfinfer tune` measures them. Knows nothing of graphs and files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tfinfer.session.threads import Threads


@dataclass(frozen=True)
class Settings:
    """What a session on the CPU is opened with, beside its threads."""

    allow_spinning: bool = True  # threads that wait for work spin for a moment: quicker, and they burn a core
    dynamic_block_base: int = 0  # work is cut into ever smaller blocks, this many per thread; 0 cuts it evenly
    memory_pattern: bool = False  # keyed by shapes and never evicted: it only grows where lengths vary
    denormal_as_zero: bool = False  # of the session's own threads; the caller's keep their float mode

    def put_into(self, options: Any) -> None:
        """Set them on onnxruntime's SessionOptions."""
        options.enable_mem_pattern = self.memory_pattern
        if not self.allow_spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.dynamic_block_base:
            options.add_session_config_entry("session.dynamic_block_base", str(self.dynamic_block_base))
        if self.denormal_as_zero:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")

    def __str__(self) -> str:
        changed = [
            f"{field.name} {str(value).lower()}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join(changed) or "default switches"


DEFAULTS = Settings()


@dataclass(frozen=True)
class OnCpu:
    """How a session is opened where it computes on the CPU."""

    threads: Threads
    settings: Settings = DEFAULTS
