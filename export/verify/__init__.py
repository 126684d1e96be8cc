"""What the module itself computes, for the proof: the one place that imports both sides."""

from .attention import check_observed, observe
from .causality import Leak, find_leak
from .encoder import EncoderReference, expected_runs, runs_of_ids
from .reference import Reference

__all__ = [
    "EncoderReference",
    "Leak",
    "Reference",
    "check_observed",
    "expected_runs",
    "find_leak",
    "observe",
    "runs_of_ids",
]
