"""Everything in a module that cannot be followed, told at once: following goes on behind what was refused.

A refused value is replaced by a guess where its shape leaves no doubt about its axes. Where it does leave doubt the
value is `LOST`, and so is silently all that reads it, until a shape is plain again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tfinfer.errors import CaptureError

from .axes import Atom, Axes, Axis, Role, fixed
from .emitter import DTYPES
from .tensor import Tensor
from .trace import Refused

if TYPE_CHECKING:
    from .follow import Follower

LISTED = 20  # refusals that are told one by one
NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Lost:
    """The value of a node that was refused, or that reads one."""


LOST = Lost()


def is_lost(value: Any) -> bool:
    """Whether an argument of a rule is lost, or holds something that is."""
    if isinstance(value, (list, tuple)):
        return any(map(is_lost, value))
    return isinstance(value, Lost)


def guess(f: Follower, node: fx.Node) -> Tensor | Lost:
    """What a node's value must be by its shape alone: rows, positions and fixed sizes, one of a kind in an axis."""
    traced = node.meta.get("val")
    if not isinstance(traced, torch.Tensor) or traced.dtype not in DTYPES:
        return LOST
    plain: dict[Any, Role] = {f.trace.batch: Role.BATCH, f.positional.symbol: f.role}
    axes: list[Axis] = []
    for size in f.trace.shape(node):
        if isinstance(size, int) or getattr(size, "is_Integer", False):
            axes.append(fixed(int(size)))
        elif size in plain:
            axes.append((Atom(plain.pop(size)),))  # a second axis of positions may be one of queries or of keys
        else:
            return LOST
    if Role.BATCH in plain.values():
        return LOST
    found: Axes = tuple(axes)
    return Tensor.of(f.emit.op("Identity", f.emit.given("input_ids"), lost=node.name), found, traced.dtype)


def told_together(refusals: Sequence[CaptureError]) -> CaptureError:
    """One error for all of them; the same in repeated layers is said once. A single one stays as it is."""
    groups: dict[Any, list[CaptureError]] = {}
    for refusal in refusals:
        groups.setdefault(_kind(refusal), []).append(refusal)
    told = [_told(group) for group in groups.values()]
    first, *others = told
    if not others:
        return CaptureError(first)
    lines = [f"  {i + 2}. {text}" for i, text in enumerate(others[: LISTED - 1])]
    more = [f"  and {len(told) - LISTED} more"] if len(told) > LISTED else []
    return CaptureError("\n".join([f"{first}; refused as well, {len(others)} more:", *lines, *more]))


def _kind(refusal: CaptureError) -> Any:
    """What refusals of repeated layers have in common: all but the numbers in the layers' names."""
    if not isinstance(refusal, Refused):
        return str(refusal)
    return refusal.operation, refusal.why, NUMBERS.sub("#", refusal.path), refusal.place, refusal.instead


def _told(group: Sequence[CaptureError]) -> str:
    first = group[0]
    if not isinstance(first, Refused):
        return str(first)
    paths = {refusal.path for refusal in group if isinstance(refusal, Refused)}
    more = len(paths) - 1
    return first.told(f" and {more} more like it" if more else "")
