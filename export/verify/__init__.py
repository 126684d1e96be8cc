"""What the module itself computes, for the proof: the one place that imports both sides."""

from .attention import check_observed, observe
from .encoder import EncoderReference, expected_runs, runs_of_ids
from .reference import Reference

__all__ = ["EncoderReference", "Reference", "check_observed", "expected_runs", "observe", "runs_of_ids"]
