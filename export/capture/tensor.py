"""A value of the ONNX graph whose views, transposes and repeats are still to be made.

`base` is how the value lies in memory, `axes` how the module sees it: the same atoms in another arrangement. An
operation that does not care for the order of axes works in the base's order, so a transpose before attention and its
inverse behind it never reach the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from .axes import Atom, Axes, Axis, Role, flat, substitute
from .emitter import DTYPES, Emitter


@dataclass(frozen=True)
class Tensor:
    """`value` lies as `base`; the module sees `axes`, which may hold repeats that `base` has not.

    home: the graph that the value is made in, where that is another one than the one that asks for it.
    """

    value: ir.Value
    base: Axes
    axes: Axes
    dtype: torch.dtype
    home: Emitter | None = None

    @classmethod
    def of(cls, value: ir.Value, axes: Axes, dtype: torch.dtype) -> Tensor:
        return cls(value, axes, axes, dtype)

    @property
    def rank(self) -> int:
        return len(self.axes)

    def seen_as(self, axes: Axes, splits: dict[Atom, tuple[Atom, Atom]] | None = None) -> Tensor:
        """The same value under other axes; `splits` are the atoms that were divided on the way."""
        base = self.base
        for atom, halves in (splits or {}).items():
            base = substitute(base, atom, halves)
        return replace(self, base=base, axes=axes)

    def order(self) -> list[int]:
        """The logical axes in the order in which the base holds them, empty axes where the module has them.

        Falls back to the module's own order where the base does not hold the axes one by one.
        """
        place = {atom: i for i, atom in enumerate(flat(self.base))}
        starts = []
        for axis in self.axes:
            kept = [atom for atom in axis if not atom.repeat]
            places = [place[atom] for atom in kept]
            if len(kept) != len(axis) or places != list(range(places[0], places[0] + len(places)) if places else []):
                return list(range(self.rank))
            starts.append(places[0] if places else None)
        filled = [s for s in starts if s is not None]
        if filled == sorted(filled):
            return list(range(self.rank))
        order = sorted((i for i, s in enumerate(starts) if s is not None), key=lambda i: starts[i] or 0)
        for i, start in enumerate(starts):  # a size-1 axis goes before the axis that follows it in the module's order
            if start is None:
                after = [j for j in range(i + 1, self.rank) if starts[j] is not None]
                order.insert(order.index(after[0]) if after else len(order), i)
        return order


def shape_vector(emitter: Emitter, axes: Sequence[Axis], lies: Sequence[Axis]) -> ir.Value:
    """The shape operand that turns a value lying as `lies` into one lying as `axes`."""
    dims: list[int | None] = []
    for i, axis in enumerate(axes):
        if all(atom.role is None for atom in axis):
            dims.append(int(np.prod([atom.size for atom in axis])) if axis else 1)
        elif i < len(lies) and axis == lies[i]:
            dims.append(0)  # Reshape: copied from the operand
        else:
            dims.append(None)
    if dims.count(None) <= 1:
        return emitter.constant([-1 if d is None else d for d in dims], np.int64)
    parts = [_product(emitter, axis) if d is None else emitter.constant([d], np.int64) for d, axis in zip(dims, axes)]
    return emitter.op("Concat", *parts, axis=0)


def _product(emitter: Emitter, axis: Axis) -> ir.Value:
    size: ir.Value | None = None
    for atom in axis:
        factor = _size(emitter, atom)
        size = factor if size is None else emitter.op("Mul", size, factor)
    assert size is not None
    return size


def _size(emitter: Emitter, atom: Atom) -> ir.Value:
    if atom.role is Role.STRETCH:
        seq = emitter.size(Role.QUERY if Role.QUERY in emitter.interface.sizes else Role.KEY)
        return emitter.op("Add", seq, emitter.constant([atom.before]))
    return emitter.size(atom.role) if atom.role else emitter.constant([atom.size], np.int64)


def size_vector(emitter: Emitter, axes: Sequence[Axis]) -> ir.Value:
    """The sizes of `axes`, none of them copied or inferred: what Expand wants."""
    parts = [_product(emitter, axis) if axis else emitter.constant([1], np.int64) for axis in axes]
    if all(atom.role is None for axis in axes for atom in axis):
        return emitter.constant([int(np.prod([a.size for a in axis], initial=1)) for axis in axes], np.int64)
    return emitter.op("Concat", *parts, axis=0)


def laid_out(emitter: Emitter, tensor: Tensor, axes: Axes | None = None) -> ir.Value:
    """The tensor's value lying as `axes` (its own by default): at most a Reshape, a Transpose, an Expand, a Reshape."""
    axes = tensor.axes if axes is None else axes
    if tensor.home is not None:
        return _carried(emitter, tensor, axes)
    wanted = flat(axes)
    kept = [atom for atom in wanted if not atom.repeat]
    value, lies = tensor.value, tensor.base
    if kept != flat(lies):
        runs = _runs(flat(lies), kept)
        value, lies = reshaped(emitter, value, lies, tuple(runs)), tuple(runs)
        permutation = [lies.index(run) for run in _runs(kept, flat(lies))]
        value = emitter.op("Transpose", value, perm=permutation)
        lies = tuple(lies[i] for i in permutation)
    if len(kept) != len(wanted):
        single: list[Axis] = [() if atom.repeat else (atom,) for atom in wanted]
        value = reshaped(emitter, value, lies, tuple(single))
        lies = tuple((atom,) for atom in wanted)
        value = emitter.op("Expand", value, size_vector(emitter, lies))
    return reshaped(emitter, value, lies, axes)


def _carried(emitter: Emitter, tensor: Tensor, axes: Axes) -> ir.Value:
    """A value of the encoder's graph as an input of the decoder's, laid out there where it is made once."""
    assert tensor.home is not None
    solid = tuple(tuple(atom for atom in axis if not atom.repeat) for axis in axes)
    parts = refined(solid)  # repeats are made where they are wanted
    made = laid_out(tensor.home, replace(tensor, home=None, axes=parts), parts)
    names = {Role.BATCH: "batch", Role.SOURCE: "source"}
    shape = [names[axis[0].role] if axis and axis[0].role else math.prod(a.size for a in axis) for axis in parts]
    value = emitter.carried(tensor.home, made, DTYPES[tensor.dtype], shape)
    return laid_out(emitter, Tensor(value, parts, axes, tensor.dtype), axes)


def refined(axes: Axes) -> Axes:
    """Axes that hold a batch or positions beside something else, taken apart."""
    return tuple(
        part
        for axis in axes
        for part in ([(atom,) for atom in axis] if len(axis) > 1 and any(a.role for a in axis) else [axis])
    )


def reshaped(emitter: Emitter, value: ir.Value, lies: Axes, axes: Axes) -> ir.Value:
    return value if lies == axes else emitter.op("Reshape", value, shape_vector(emitter, axes, lies))


def _runs(atoms: list[Atom], other: list[Atom]) -> list[Axis]:
    """`atoms` cut into the longest pieces that stand in `other` too."""
    place = {atom: i for i, atom in enumerate(other)}
    runs: list[list[Atom]] = []
    for atom in atoms:
        if runs and place[atom] == place[runs[-1][-1]] + 1:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return [tuple(run) for run in runs]


def working(emitter: Emitter, tensor: Tensor, order: Sequence[int] | None = None) -> tuple[ir.Value, list[int]]:
    """The value with one dimension per logical axis, in `order`; the base's own, by default, costs no Transpose."""
    order = tensor.order() if order is None else list(order)
    return laid_out(emitter, tensor, tuple(tensor.axes[i] for i in order)), order


def from_working(value: ir.Value, axes: Axes, order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose value has the dimensions `axes` in `order`."""
    return Tensor(value, tuple(axes[i] for i in order), axes, dtype)


def sizes(axes: Axes, batch: int, query: int, key: int) -> list[int]:
    """Concrete sizes of axes, for evaluation at export time."""
    of = {Role.BATCH: batch, Role.QUERY: query, Role.KEY: key, Role.SOURCE: key}
    return [int(np.prod([of[a.role] if a.role else a.size for a in axis], initial=1)) for axis in axes]
