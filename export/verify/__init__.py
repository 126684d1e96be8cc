"""Prove a folder against the module it came from. The one place that imports both sides."""

from .reference import Reference

__all__ = ["Reference"]
