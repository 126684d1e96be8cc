"""Trace a module whose loop over positions pins the length: at two fixed lengths, and put both traces together again.

Nodes of the two match one to one but for the unrolled loops, each of which becomes one operation over all positions.
Numbers that differ are linear in the length. What comes out is a module that can be traced with any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.fx import traceback
from torch.onnx import ops

from .program import without_assertions
from .trace import Argument, Trace, aten, call, is_computed, read_for_values
from .unrolled import Loop, NotALoop, find_loops, simplify, taken_apart

LENGTHS = 5, 6  # of the two traces
KIND = "tfinfer::Positions"  # the operation that a loop becomes in a trace; `number` says which


@dataclass(frozen=True)
class Linear:
    """A number that grows with the length."""

    each: int
    rest: int


@dataclass(eq=False)
class Rolled:
    """A loop, and a trace of one of its iterations, in which its slices and carried values are the data."""

    loop: Loop
    trace: Trace


class Rerolled(nn.Module):
    """Runs the nodes of a trace at fixed length as those of any: `numbers` has what is to be put for an argument."""

    def __init__(self, module: fx.GraphModule, loops: list[Loop], numbers: dict[fx.Node, Any], batch: Any) -> None:
        super().__init__()
        self.inner, self.numbers, self.batch = module, numbers, batch
        self.loops = {next(n for n in loop.bodies[0] if n is not None): loop for loop in loops}
        self.skipped = {node for loop in loops for node in loop.inside()}
        self.skipped |= {output.node for loop in loops for output in loop.outputs} | taken_apart(loops)
        self.order = list(self.loops.values())

    def forward(self, ids: torch.Tensor) -> Any:
        with traceback.preserve_node_meta():  # refusals name the module's own lines
            return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in self.inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = ids
            elif node.op == "get_attr":
                values[node] = _attribute(self.inner, str(node.target))
            elif node in self.loops:
                self._run(self.loops[node], values, ids)
            elif node.op == "output":
                spec: Any = self.inner._out_spec
                return torch.utils._pytree.tree_unflatten(list(_filled(node.args[0], values, ids)), spec)
            elif node.op == "call_function" and node not in self.skipped:
                args, kwargs = _filled(self.numbers[node], values, ids)
                with traceback.set_current_meta(node):
                    values[node] = call(node, args, kwargs)
        raise AssertionError("a graph without an output")

    def _run(self, loop: Loop, values: dict[fx.Node, Any], ids: torch.Tensor) -> None:
        sources = [values[part.source] for part in loop.slices.values()]
        made = [loop.bodies[1][output.place] for output in loop.outputs]
        shapes, dtypes = [], []
        for node, output in zip(made, loop.outputs):
            shape = self._shape(node, ids)
            if output.keep:
                shape.pop(output.dim)
            shapes.append([*shape[: output.dim], ids.shape[1], *shape[output.dim :]])
            dtypes.append(node.meta["val"].dtype)  # type: ignore[union-attr]
        lasts = [loop.bodies[1][place] for place in loop.lasts.values()]
        shapes += [self._shape(node, ids) for node in lasts]
        dtypes += [node.meta["val"].dtype for node in lasts]  # type: ignore[union-attr]
        with traceback.set_current_meta(loop.body[0]):
            results = ops.symbolic_multi_out(
                KIND, sources, {"number": self.order.index(loop)}, dtypes=dtypes, shapes=shapes
            )
        values.update(zip([*(output.node for output in loop.outputs), *loop.lasts], results))

    def _shape(self, node: Any, ids: torch.Tensor) -> list[Any]:
        """The sizes of one iteration's value, of which those of the batch are the batch's."""
        sizes = []
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                each = sympy.cancel(size.node.expr / self.batch)
                if not each.is_Integer:
                    raise NotALoop(f"its iterations make {size} rows")
                size = ids.shape[0] * int(each)
            sizes.append(size)
        return sizes


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _filled(template: Any, values: dict[fx.Node, Any], ids: torch.Tensor) -> Any:
    if isinstance(template, fx.Node):
        return values[template]
    if isinstance(template, Linear):
        return template.each * ids.shape[1] + template.rest
    if isinstance(template, (tuple, list)):
        return type(template)(_filled(part, values, ids) for part in template)
    if isinstance(template, dict):
        return {key: _filled(part, values, ids) for key, part in template.items()}
    return template


# -- two traces -----------------------------------------------------------------------------------------------------
def reroll(export: Callable[[int], torch.export.ExportedProgram]) -> tuple[Rerolled, list[Rolled]]:
    """The module that `export(length)` traces at a fixed length, for every length; raises NotALoop where it cannot.

    The loops come in the order of the numbers that they have in a trace of it.
    """
    modules, loops = [], []
    for length in LENGTHS:
        module = without_assertions(export(length))
        for node in [n for n in module.graph.nodes if n.op == "call_module"]:  # checks of the inputs' sizes
            module.graph.erase_node(node)
        simplify(module.graph)
        modules.append(module)
        loops.append(find_loops(module.graph, length))
    if not loops[0]:
        raise NotALoop("no loop over its positions was found, of which each step does the same")
    numbers = _Match(modules, loops).numbers()
    ids = next(node for node in modules[0].graph.nodes if node.op == "placeholder")
    batch = ids.meta["val"].shape[0].node.expr
    return Rerolled(modules[0], loops[0], numbers, batch), [_rolled(modules[0], loop, batch) for loop in loops[0]]


def _rolled(module: fx.GraphModule, loop: Loop, batch: Any) -> Rolled:
    inputs = {node: Argument(node.name) for node in loop.slices}
    inputs |= {node: Argument(node.name) for i in loop.carried if (node := loop.bodies[0][i]) is not None}
    output = next(node for node in module.graph.nodes if node.op == "output")
    trace = Trace(module, loop.body, inputs, output, batch, None, None, {})
    trace.data |= _depends_on_ids(module.graph)
    return Rolled(loop, trace)


def _depends_on_ids(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (is_computed(node) and any(i in found for i in read_for_values(node))):
            found.add(node)
    return found


class _Match:
    """Puts the nodes of two traces side by side."""

    def __init__(self, modules: Sequence[fx.GraphModule], loops: Sequence[list[Loop]]) -> None:
        self.modules, self.loops = modules, loops
        self.other: dict[fx.Node, fx.Node] = {}

    def numbers(self) -> dict[fx.Node, Any]:
        if len(self.loops[0]) != len(self.loops[1]):
            raise NotALoop("it takes other ways at other lengths")
        for one, two in zip(*self.loops):
            if len(one.bodies[0]) != len(two.bodies[0]) or list(one.carried) != list(two.carried):
                raise NotALoop("its iterations do something else at another length")
            for k in range(2):
                self.other |= dict(zip(one.bodies[k], two.bodies[k]))  # type: ignore[arg-type]
            self.other |= dict(zip(one.slices, two.slices))
            self.other |= {a.node: b.node for a, b in zip(one.outputs, two.outputs)} | dict(zip(one.lasts, two.lasts))
        outer = [self._outer(module, loops) for module, loops in zip(self.modules, self.loops)]
        if [n.target for n in outer[0]] != [n.target for n in outer[1]]:
            raise NotALoop("it does something else at another length, as where it cuts the sequence in chunks")
        self.other |= dict(zip(*outer))
        for one in outer[0]:
            if one.op == "get_attr" and not _equal(*(_attribute(m, str(one.target)) for m in self.modules)):
                raise NotALoop("it has constants that change with the length")
        found = {node: self._unified((node.args, node.kwargs), (self.other[node].args, self.other[node].kwargs))
                 for node in outer[0] if node.op in ("call_function", "output")}  # fmt: skip
        for loop in self.loops[0]:
            self._check_body(loop, found)
        return found

    @staticmethod
    def _outer(module: fx.GraphModule, loops: list[Loop]) -> list[fx.Node]:
        gone = {node for loop in loops for node in loop.inside()}
        gone |= {output.node for loop in loops for output in loop.outputs} | taken_apart(loops)
        nodes = [node for node in module.graph.nodes if node not in gone and node.target is not None]
        return [n for n in nodes if n.op != "get_attr" or any(user not in gone for user in n.users)] + [
            n for n in nodes if n.op == "get_attr" and all(user in gone for user in n.users)
        ]

    def _unified(self, one: Any, two: Any) -> Any:
        if isinstance(one, fx.Node):
            if self.other.get(one) is not two:
                raise NotALoop("it reads other tensors at another length")
            return one
        if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)) and len(one) == len(two):
            return type(one)(self._unified(a, b) for a, b in zip(one, two))
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            return {key: self._unified(one[key], two[key]) for key in one}
        if isinstance(one, int) and isinstance(two, int) and one != two and not isinstance(one, bool):
            each = Fraction(two - one, LENGTHS[1] - LENGTHS[0])
            if each.denominator == 1:
                return Linear(int(each), int(one - each * LENGTHS[0]))
        if one is not two and one != two:
            raise NotALoop("it computes with numbers that change with the length")
        return one

    def _check_body(self, loop: Loop, numbers: dict[fx.Node, Any]) -> None:
        """No iteration, and nothing that is the same for all of them, may depend on how many there are."""
        same = list(loop.carried.values())
        for node in loop.body:
            if node in loop.slices:
                continue
            same += [i for i in node.all_input_nodes if i in numbers]
            if node.target is aten.select_scatter.default:
                continue
            other = self.other[node]
            if _changes(self._unified((node.args, node.kwargs), (other.args, other.kwargs))):
                raise NotALoop("its iterations compute with the length")
        data, seen = _depends_on_ids(self.modules[0].graph), set[fx.Node]()
        while same:
            node = same.pop()
            if node in seen or node in data or node not in numbers or node.target is aten.sym_size.int:
                continue
            seen.add(node)
            if _changes(numbers[node]):
                raise NotALoop("its iterations read something that changes with the length")
            same += node.all_input_nodes


def _equal(one: Any, two: Any) -> bool:
    return one is two or (isinstance(one, torch.Tensor) and torch.equal(one, two))


def _changes(template: Any) -> bool:
    if isinstance(template, Linear):
        return True
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, (tuple, list)) else ()
    return any(_changes(part) for part in parts)
