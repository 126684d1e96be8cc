"""What the module itself computes, for the proof: the one place that imports both sides."""

from .attention import observe
from .encoder import EncoderReference, expected_runs, runs_of_ids
from .reference import Reference

__all__ = ["EncoderReference", "Reference", "expected_runs", "observe", "runs_of_ids"]
