"""What the axes of a tensor are made of, so that views, transposes and repeats cost nothing until someone computes.

An axis is a row of *atoms*: the batch, new positions (QUERY), all positions (KEY), an encoder's positions (SOURCE), the
new positions and a few before them (STRETCH), entries that data picked out of another axis (PICKED), a fixed size, or a
repeat. An axis of size 1 has none. `view`,
`transpose`, `expand` only regroup atoms; see `tensor.py` for how that becomes ONNX.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy


class Role(enum.Enum):
    """What the positions along an atom stand for."""

    BATCH = "batch"
    QUERY = "query"  # the new positions
    KEY = "key"  # all positions, past and new
    SOURCE = "source"  # the positions of an encoder, which are all there at once
    STRETCH = "stretch"  # the positions of QUERY and those `before`; the module sees `after` more of them, or fewer
    PICKED = "picked"  # those entries of another axis, in any order, that data picked: as many as `size` says


@dataclass(eq=False, frozen=True)
class Atom:
    """One indivisible part of an axis; told apart by identity, so that a transpose and its inverse cancel."""

    role: Role | None = None
    size: Any = 0  # of a fixed atom; of picked entries the symbol of their number
    repeat: bool = False  # the same values `size` times
    # Of STRETCH: the value has so many positions more than the new ones, all in front; of KEY: so many columns more.
    before: int = 0
    # Of STRETCH: the module has so many behind the last one, which the value has not; of KEY: so many columns behind.
    after: int = 0

    def __repr__(self) -> str:
        return self.role.value if self.role else f"{'x' if self.repeat else ''}{self.size}"

    def matches(self, other: Atom) -> bool:
        return self.kind == other.kind

    @property
    def kind(self) -> tuple[Role | None, int, int, int]:
        """What two atoms must have in common to meet."""
        return self.role, self.size, self.before, self.after


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def fixed(size: int) -> Axis:
    return () if size == 1 else (Atom(size=size),)


def flat(axes: Axes) -> list[Atom]:
    return [atom for axis in axes for atom in axis]


def has(axis: Axis, role: Role) -> bool:
    return any(atom.role is role for atom in axis)


def position(axis: Axis) -> Role | None:
    """The role of the positions along an axis, if it has any."""
    return next((atom.role for atom in axis if atom.role not in (None, Role.BATCH)), None)


def axis_of(axes: Axes, role: Role) -> int | None:
    """The index of the axis that holds `role`, if one does."""
    return next((i for i, axis in enumerate(axes) if has(axis, role)), None)


def same(left: Axis, right: Axis) -> bool:
    return len(left) == len(right) and all(a.matches(b) for a, b in zip(left, right))


def renewed(axes: Axes) -> Axes:
    """Axes of new atoms, so that they may stand beside the old ones in one tensor."""
    return tuple(tuple(replace(atom) for atom in axis) for axis in axes)


def substitute(axes: Axes, old: Atom, new: Sequence[Atom]) -> Axes:
    return tuple(tuple(part for atom in axis for part in (new if atom is old else (atom,))) for axis in axes)


def distinct(axes: Axes) -> Axes:
    """The axes of a computed value, in which a tensor may have met itself along another axis: no atom stands twice."""
    seen: set[Atom] = set()
    own = []
    for axis in axes:
        own.append(tuple(replace(a) if a in seen else a for a in axis))
        seen |= set(axis)
    return tuple(own)


def with_role(axes: Axes, old: Role, new: Role) -> Axes:
    return tuple(tuple(Atom(new) if atom.role is old else atom for atom in axis) for axis in axes)


@dataclass(frozen=True)
class Symbols:
    """The symbols of a trace: how large an atom is, as an expression in them."""

    batch: Any
    seq: Any
    source: Any = None
    key: Any = None  # where the keys are not those of the queries' own sequence

    def size(self, atom: Atom) -> Any:
        if atom.role in (None, Role.PICKED):
            return atom.size
        if atom.role is Role.STRETCH:
            return self.seq + atom.before + atom.after
        if atom.role is Role.KEY:
            return (self.key or self.seq) + atom.before + atom.after
        return {Role.BATCH: self.batch, Role.SOURCE: self.source}.get(atom.role, self.seq)

    def product(self, axis: Axis) -> Any:
        return math.prod((self.size(atom) for atom in axis), start=1)

    def regroup(self, axes: Axes, shape: Sequence[Any]) -> tuple[Axes, dict[Atom, tuple[Atom, Atom]]] | None:
        """The atoms of `axes`, in their order, as axes of `shape`; fixed atoms are split where an axis ends inside one.

        Returns the new axes and the splits made, in order, or None where a position or batch axis would be cut.
        """
        rest, splits, grouped = flat(axes), {}, []
        for wanted in shape:
            axis: list[Atom] = []
            while (missing := self._missing(wanted, axis)) != 1:
                if not rest:
                    return None
                atom = rest.pop(0)
                if atom.role is None and isinstance(missing, int) and missing != atom.size and missing < atom.size:
                    if atom.size % missing:
                        return None
                    halves = (
                        Atom(size=missing, repeat=atom.repeat),
                        Atom(size=atom.size // missing, repeat=atom.repeat),
                    )
                    splits[atom] = halves
                    atom, remainder = halves
                    rest.insert(0, remainder)
                if not self._divides(self.size(atom), missing):
                    return None
                axis.append(atom)
            grouped.append(tuple(axis))
        return None if rest else (tuple(grouped), splits)

    @staticmethod
    def _divides(size: Any, missing: Any) -> bool:
        return sympy.fraction(sympy.cancel(sympy.sympify(missing) / size))[1] == 1

    def _missing(self, wanted: Any, axis: list[Atom]) -> Any:
        quotient = sympy.cancel(sympy.sympify(wanted) / self.product(tuple(axis)))
        return int(quotient) if quotient.is_Integer else quotient
