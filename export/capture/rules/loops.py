"""Loops over the positions: each step goes on from what the one before left, which a cache keeps as a state."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import fx

from ..axes import Atom, Axes, Role, fixed
from ..emitter import DTYPES
from ..follow import Follower
from ..positional import Positional
from ..reroll import Rolled
from ..tensor import Tensor, laid_out
from ..trace import read_for_values, refuse
from .shifts import begun


def loop(f: Follower, node: fx.Node, sources: list[Any], number: int) -> list[Tensor]:
    """One ONNX Scan over the new positions. Source: ONNX Scan 21."""
    rolled = f.trace.loops[number]
    if f.role is Role.SOURCE:
        raise refuse(node, "a loop over the positions of an encoder, where rows of a batch have lengths of their own")
    slices = list(rolled.loop.slices.values())
    for x, part in zip(sources, slices):
        if not isinstance(x, Tensor):
            raise refuse(node, "a loop reads a table at its position", "compute with the table before the loop")
        if [a.role for a in x.axes[part.dim]] != [f.role]:
            raise refuse(node, "a loop over an axis that holds more than the positions")
    return _Scan(f, node, rolled).run(sources)


class _Scan:
    """Writes a loop: its iteration into a graph of its own, which ONNX runs for each new position."""

    def __init__(self, f: Follower, node: fx.Node, rolled: Rolled) -> None:
        self.f, self.node, self.rolled, self.loop = f, node, rolled, rolled.loop
        self.emit = f.emit.inner()
        positional = Positional(rolled.trace, sympy.Symbol("no length"))
        self.body = Follower(rolled.trace, positional, f.max_length, f.flavor, role=f.role, emit=self.emit)
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def run(self, sources: list[Tensor]) -> list[Tensor]:
        loop, f = self.loop, self.f
        carried = [loop.bodies[0][place] for place in loop.carried]
        states = [self._input(node) for node in carried]
        for node, part in zip(loop.slices, loop.slices.values()):
            self._slice(node, part.dim if part.keep else None)
        for node in loop.body:
            if node in self.rolled.trace.data and node not in self.body.values and not self._only_written(node):
                self._check_reads(node)
                self.body.follow(node)
        if self.body.states or self.body.entries:
            raise refuse(self.node, "a loop over positions inside of which positions are mixed")
        outputs = [self._made(place, state.axes) for place, state in zip(loop.carried, states)]
        outputs += [self._made(o.place, None, o.dim if o.keep else None) for o in loop.outputs]
        if len(loop.lasts) and not set(loop.lasts.values()) <= set(loop.carried):
            raise refuse(self.node, "what its last step makes is read, and is not what the next one would go on from")
        graph = ir.Graph(self.inputs, outputs, nodes=self.emit.nodes, name=self.node.name)
        firsts = [self._first(node, state) for node, state in zip(loop.carried.values(), states)]
        made = f.emit.graph_node(
            "Scan", [*(value for value, _ in firsts), *(laid_out(f.emit, x) for x in sources)], len(outputs),
            body=graph, num_scan_inputs=len(sources),
            scan_input_axes=[part.dim for part in loop.slices.values()],
            scan_output_axes=[output.dim for output in loop.outputs],
        )  # fmt: skip
        for value, (_, entry) in zip(made, firsts):
            if entry is not None:
                f.emit.output(f.emit.op("Identity", value), entry.present, DTYPES[entry.dtype], ("batch", *entry.shape))
        stacked = [self._stacked(v, o) for v, o in zip(made[len(firsts) :], loop.outputs)]
        at = list(loop.carried)
        lasts = [Tensor.of(made[at.index(p)], states[at.index(p)].axes, states[at.index(p)].dtype)
                 for p in loop.lasts.values()]  # fmt: skip
        return [*stacked, *lasts]

    def _check_reads(self, node: fx.Node) -> None:
        for read in read_for_values(node):
            if read in self.rolled.trace.data and read not in self.body.values:
                why = "each step of a loop over positions reads all of them"
                raise refuse(node, why, "attention over keys and values of all positions at once would work")

    def _axes(self, node: fx.Node) -> Axes:
        """The axes of a value of one position: rows of the batch, and fixed sizes."""
        axes: list[tuple[Atom, ...]] = []
        for size in self.rolled.trace.shape(node):
            if size == self.rolled.trace.batch:
                axes.append((Atom(Role.BATCH),))
            elif isinstance(size, int):
                axes.append(fixed(size))
            else:
                raise refuse(node, "a loop over positions whose rows are folded with heads")
        return tuple(axes)

    def _value(self, node: fx.Node, shape: list[int | str]) -> ir.Value:
        dtype = DTYPES[node.meta["val"].dtype]
        value = ir.Value(name=f"{self.node.name}.{node.name}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def _sizes(self, axes: Axes) -> list[int | str]:
        return ["batch" if axis and axis[0].role else self.body.size(axis) for axis in axes]

    def _input(self, node: Any) -> Tensor:
        axes = self._axes(node)
        tensor = Tensor.of(self._value(node, self._sizes(axes)), axes, node.meta["val"].dtype)
        self.body.values[node] = tensor
        return tensor

    def _slice(self, node: fx.Node, kept: int | None) -> None:
        axes = self._axes(node)
        lies = axes if kept is None else (*axes[:kept], *axes[kept + 1 :])
        value = self._value(node, self._sizes(lies))
        self.body.values[node] = Tensor.of(value, lies, node.meta["val"].dtype).seen_as(axes)

    def _only_written(self, node: fx.Node) -> bool:
        places = {self.loop.bodies[-1].index(o.node) for o in self.loop.outputs if o.node in self.loop.bodies[-1]}
        return self.loop.bodies[1].index(node) in places

    def _made(self, place: int, axes: Axes | None, kept: int | None = None) -> ir.Value:
        """What the iteration leaves, as a value that its own graph makes."""
        node = self.loop.bodies[1][place]
        made = self.body.values.get(node)  # type: ignore[arg-type]
        if not isinstance(made, Tensor):
            raise refuse(self.node, "what a step of a loop leaves does not depend on the ids")
        if kept is not None:
            made = made.seen_as((*made.axes[:kept], *made.axes[kept + 1 :]))
        value = laid_out(self.emit, made)
        if value.producer() is None or value.producer() not in self.emit.nodes or value in self.outputs:
            value = self.emit.copied(value)
        self.outputs.append(value)
        return value

    def _first(self, node: fx.Node, state: Tensor) -> tuple[ir.Value, Any]:
        """What the first new position goes on from, laid out as the state; and the state's entry."""
        f, trace = self.f, self.rolled.trace
        if node in self.rolled.trace.data:
            raise refuse(self.node, "its first value depends on the ids")
        value: torch.Tensor = self.body.positional.value(node, 1)
        rows = next((i for i, axis in enumerate(state.axes) if axis and axis[0].role), None)
        if rows is None or value.shape[rows] != 1:
            raise refuse(self.node, "its state has no axis of the rows of a batch")
        first = f.emit.shared(("initial", trace, node), value.contiguous(), "initial")
        if f.is_whole:
            sizes = [f.emit.size(Role.BATCH) if i == rows else f.emit.constant([n]) for i, n in enumerate(value.shape)]
            return f.emit.op("Expand", first, f.emit.op("Concat", *sizes, axis=0)), None
        if rows:
            raise refuse(self.node, "its state has other axes before that of the rows of a batch")
        past, entry = f.state(state.dtype, [int(n) for n in value.shape[1:]])
        return begun(f, past, first, value.dim()), entry

    def _stacked(self, value: ir.Value, output: Any) -> Tensor:
        node = self.loop.bodies[1][output.place]
        assert node is not None
        axes = self._axes(node)
        behind = output.dim + 1 if output.keep else output.dim
        axes = (*axes[: output.dim], (Atom(self.f.role),), *axes[behind:])
        return Tensor.of(value, axes, node.meta["val"].dtype)
