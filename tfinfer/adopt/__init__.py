"""Folders of other exporters: read once, run, compared with themselves, and given a manifest of ours."""

from tfinfer.adopt.adopt import Adopted, adopt

__all__ = ["Adopted", "adopt"]
