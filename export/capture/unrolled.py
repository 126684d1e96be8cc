"""Find the loops over positions that tracing at a fixed length has unrolled: runs of equal operations.

An iteration reads the same places of its own position, what the iteration before made, and what no iteration changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .trace import CHECKS, arguments, aten, is_computed

Token = tuple[Any, str, str]


@dataclass(eq=False)
class Slice:
    """One position of `source` along `dim`; `keep` where the axis stays, with a size of 1."""

    source: fx.Node
    dim: int
    keep: bool


@dataclass(eq=False)
class Output:
    """What all iterations make, side by side along `dim` of `node`; `keep` where each has that axis already."""

    node: fx.Node
    place: int
    dim: int
    keep: bool


@dataclass(eq=False)
class Loop:
    """A loop of `len(bodies)` iterations over equal operations, of which the last may lack some that nobody reads.

    slices: what the second iteration reads of its own position. carried: what it reads of the first, by the place
    there, and what stood in its stead before.
    """

    bodies: list[list[fx.Node | None]]
    slices: dict[fx.Node, Slice] = field(default_factory=dict)
    carried: dict[int, fx.Node] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    lasts: dict[fx.Node, int] = field(default_factory=dict)  # nodes of the last iteration that are read afterwards

    @property
    def body(self) -> list[fx.Node]:
        """The operations of the second iteration, which reads the first as every later one reads the one before."""
        return [node for node in self.bodies[1] if node is not None]

    def inside(self) -> set[fx.Node]:
        return {node for body in self.bodies for node in body if node is not None}


class NotALoop(Exception):
    """A run of equal operations that cannot be one operation over the positions; says why."""


def simplify(graph: fx.Graph) -> None:
    """Take out what only moves: slices of everything, and values written over a place that are then read whole."""
    for node in [n for n in graph.nodes if n.target in CHECKS]:  # they read iterations one by one
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[1] if node.target in (aten.copy.default, aten.slice_scatter.default) else node.args[0]
        whole = node.target in (aten.copy.default, aten.slice_scatter.default, aten.slice.Tensor, aten.alias.default)
        if whole and isinstance(source, fx.Node) and _alike(node, source):
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and list(a.shape) == list(b.shape)


def find_loops(graph: fx.Graph, length: int) -> list[Loop]:
    """The loops of `length` iterations, in the order of the graph. Raises NotALoop for one that is none after all."""
    nodes = [node for node in graph.nodes if is_computed(node) and not _taken_before(node)]
    tokens = [_token(node) for node in nodes]
    loops, at, why_not = list[Loop](), 0, list[NotALoop]()
    while at < len(nodes):
        begin = at
        if found := _run(tokens, at, length):
            period, last = found
            bodies: list[list[fx.Node | None]] = [
                list(nodes[at + k * period : at + (k + 1) * period]) for k in range(length - 1)
            ]
            at += period * (length - 1)
            bodies.append([None if i is None else nodes[at + i] for i in last])
            at += sum(i is not None for i in last)
            try:
                loops.append(_understood(Loop(bodies)))
            except NotALoop as why:
                why_not.append(why)
                at = begin + 1
        else:
            at += 1
    if why_not and not loops:
        raise why_not[0]
    return loops


def _token(node: fx.Node) -> Token:
    """An operation with its place in the source and in the module, the same for each iteration of a loop."""
    stack = node.meta.get("nn_module_stack") or {}
    path = "/".join(str(entry[0]) for entry in stack.values() if isinstance(entry, tuple))
    return node.target, str(node.meta.get("stack_trace") or ""), re.sub(r"@\d+", "", path)  # @: of a second call


def _taken_before(node: fx.Node) -> bool:
    """Whether a node is one of many that take a tensor apart, as `unbind` does before a loop begins."""
    return getattr(node.target, "__name__", "") == "getitem" and _position(node) is not None


def taken_apart(loops: list[Loop]) -> set[fx.Node]:
    """What only takes tensors apart for the loops."""
    inside = {node for loop in loops for node in loop.inside()}
    sources = {part.source for loop in loops for part in loop.slices.values()}
    parts = {part for loop in loops for part in loop.slices if part not in inside}
    makers = {arguments(part)[0] for part in parts} - sources
    return makers | {user for maker in makers for user in maker.users}


def _run(tokens: list[Token], at: int, length: int) -> tuple[int, list[int | None]] | None:
    """The period of `length` repeats that begin at `at`, and the places of the last, which may lack some."""
    for period in range(1, (len(tokens) - at) // (length - 1) + 1):
        body = tokens[at : at + period]
        if tokens[at + period] != body[0] if at + period < len(tokens) else True:
            continue
        end = at + period * (length - 1)
        if any(tokens[at + k * period : at + (k + 1) * period] != body for k in range(1, length - 1)):
            continue
        last, used = list[int | None](), 0
        for token in body:
            here = end + used < len(tokens) and tokens[end + used] == token
            last.append(used if here else None)
            used += here
        again = tokens[end + used : end + used + period] == body
        return None if again or not used else (period, last)
    return None


def _understood(loop: Loop) -> Loop:
    """Say of everything that the second iteration reads what it is, and check that the others read the same."""
    places = [{node: i for i, node in enumerate(body) if node is not None} for body in loop.bodies]
    _outputs(loop, places)
    written = {output.node for output in loop.outputs}
    for i, node in enumerate(loop.bodies[1]):
        assert node is not None
        chain = [body[i] for body in loop.bodies]
        if _sliced(loop, chain):
            continue
        if chain[-1] in written:
            continue
        for k in range(1, len(chain)):
            other = chain[k]
            if other is not None:
                _compare(loop, places, (node.args, node.kwargs), (other.args, other.kwargs), k)
        first = chain[0]
        assert first is not None
        _compare_first(loop, places, (node.args, node.kwargs), (first.args, first.kwargs))
    return loop


def _sliced(loop: Loop, chain: list[fx.Node | None]) -> bool:
    """Whether the nodes of one place read one position each of the same tensor; noted if so."""
    found = [None if node is None else _position(node) for node in chain]
    if any(f is None for f, node in zip(found, chain) if node is not None):
        return False
    first = found[0]
    assert first is not None
    if any(
        f is not None and (f[0], f[1], f[2], f[3]) != (first[0], first[1], k, first[3]) for k, f in enumerate(found)
    ):
        return False
    assert chain[1] is not None
    loop.slices[chain[1]] = Slice(first[0], first[1], first[3])
    return True


def _position(node: fx.Node) -> tuple[fx.Node, int, int, bool] | None:
    """(source, dim, position, whether the axis stays) of a node that reads one position."""
    args = arguments(node)
    if node.target is aten.select.int and isinstance(args[2], int):
        return args[0], args[1] % args[0].meta["val"].dim(), args[2], False
    if node.target is aten.slice.Tensor and len(args) == 4 and isinstance(args[2], int) and args[3] == args[2] + 1:
        return args[0], args[1] % args[0].meta["val"].dim(), args[2], True
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(args[0], fx.Node):
        maker, of = args[0], arguments(args[0])
        if maker.target is aten.unbind.int:
            return of[0], (of[1] if len(of) > 1 else 0) % of[0].meta["val"].dim(), args[1], False
        if maker.target in (aten.split.Tensor, aten.chunk.default) and _ones(maker, of):
            return of[0], (of[2] if len(of) > 2 else 0) % of[0].meta["val"].dim(), args[1], True
    return None


def _ones(maker: fx.Node, of: Any) -> bool:
    dim = of[2] if len(of) > 2 else 0
    return all(part.shape[dim] == 1 for part in maker.meta["val"])


def _compare(loop: Loop, places: list[dict[fx.Node, int]], ours: Any, theirs: Any, k: int) -> None:
    """What the second iteration reads beside what iteration `k` does."""
    for a, b in _pairs(ours, theirs):
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            if a != b:
                raise NotALoop("its iterations compute with the number of the position")
        elif a in places[1] or a in places[0]:
            back = 0 if a in places[1] else 1
            if places[k - back].get(b) != places[1 - back][a]:
                raise NotALoop("its iterations read each other in different ways")
        elif a is not b and not _sliced_outside(loop, a, b, k):
            raise NotALoop("its iterations read different tensors")


def _sliced_outside(loop: Loop, a: fx.Node, b: fx.Node, k: int) -> bool:
    """Positions that were all taken before the loop began, as by `unbind`."""
    one, other = _position(a), _position(b)
    if one is None or other is None or one[2] != 1 or other != (one[0], one[1], k, one[3]):
        return False
    loop.slices[a] = Slice(one[0], one[1], one[3])
    return True


def _compare_first(loop: Loop, places: list[dict[fx.Node, int]], ours: Any, first: Any) -> None:
    for a, b in _pairs(ours, first):
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            if a != b:
                raise NotALoop("its iterations compute with the number of the position")
        elif a in places[0]:
            if b in places[0] or loop.carried.setdefault(places[0][a], b) is not b:
                raise NotALoop("its first iteration starts otherwise than the others go on")
        elif a in places[1]:
            if places[0].get(b) != places[1][a]:
                raise NotALoop("its first iteration is another than the others")
        elif a is not b and not _sliced_outside(loop, a, b, 0):
            raise NotALoop("its iterations read different tensors")


def _pairs(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)) and len(ours) == len(theirs):
        for a, b in zip(ours, theirs):
            yield from _pairs(a, b)
    elif isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _pairs(ours[key], theirs[key])
    else:
        yield ours, theirs


def _outputs(loop: Loop, places: list[dict[fx.Node, int]]) -> None:
    """Who reads an iteration from outside: a join of all of them in order, or what the last one leaves."""
    inside = loop.inside()
    _written(loop, places)
    written = {output.node for output in loop.outputs}
    for k, body in enumerate(loop.bodies):
        for i, node in enumerate(body):
            for user in [] if node is None or node in written else node.users:
                if user in inside or user in {output.node for output in loop.outputs}:
                    continue
                if user.target in (aten.stack.default, aten.cat.default) and _joined(loop, user, i):
                    continue
                if k < len(loop.bodies) - 1 or node is None:
                    raise NotALoop("one of its iterations is read by itself")
                loop.lasts[node] = i


def _joined(loop: Loop, user: fx.Node, place: int) -> bool:
    parts, *rest = arguments(user)
    if list(parts) != [body[place] for body in loop.bodies]:
        return False
    keep = user.target is aten.cat.default
    dim = (rest[0] if rest else 0) % user.meta["val"].dim()
    if keep and parts[0].meta["val"].shape[dim] != 1:
        return False
    loop.outputs.append(Output(user, place, dim, keep))
    return True


def _written(loop: Loop, places: list[dict[fx.Node, int]]) -> None:
    """Values that each iteration writes at its own position of one tensor: as good as joined."""
    for i in range(len(loop.bodies[0])):
        chain = [node for body in loop.bodies if (node := body[i]) is not None]
        if len(chain) < len(loop.bodies) or any(node.target is not aten.select_scatter.default for node in chain):
            continue
        for k, node in enumerate(chain):
            onto, value, dim, position = arguments(node)
            if position != k or value not in places[k] or (k and onto is not chain[k - 1]):
                break
            if k < len(chain) - 1 and list(node.users) != [chain[k + 1]]:
                break
        else:
            last = chain[-1]
            dim = arguments(last)[2] % last.meta["val"].dim()
            loop.outputs.append(Output(last, places[-1][arguments(last)[1]], dim, False))
