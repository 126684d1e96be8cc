"""Einsums in one form: two operands, every axis by a letter, the queries' side first. Knows no ONNX.

`einsum` may be written with any number of operands, with an ellipsis, without a result and with its operands in any
order. The graph is rewritten before anything is read in it, so that everybody else knows one spelling.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def normalise_einsums(graph: fx.Graph, lengths: Sequence[Any]) -> None:
    """Rewrite every einsum of a graph; `lengths` are the symbols of the sequences' lengths.

    Equations that this does not know (a letter twice in one operand) stay as they are.
    """
    depends: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or any(operand in depends for operand in node.all_input_nodes):
            depends.add(node)
        if node.target is aten.einsum.default and node in depends:
            _normalise(graph, node, depends, lengths)


def letters_of(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result, an ellipsis spelled out; None where one takes a diagonal."""
    equation = equation.replace(" ", "")
    given, arrow, out = equation.partition("->")
    inputs = given.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    widths = [rank - len(side.replace("...", "")) if "..." in side else 0 for side, rank in zip(inputs, ranks)]
    shared = "".join(spare[: max(widths, default=0)])
    inputs = [side.replace("...", shared[len(shared) - width :]) for side, width in zip(inputs, widths)]
    if not arrow:
        counts = "".join(inputs)
        out = "..." + "".join(c for c in sorted(set(counts)) if counts.count(c) == 1 and c not in shared)
    out = out.replace("...", shared)
    if any(len(set(side)) < len(side) for side in inputs):
        return None
    return inputs, out


def _normalise(graph: fx.Graph, node: fx.Node, depends: set[fx.Node], lengths: Sequence[Any]) -> None:
    equation, operands = _arguments(node)
    found = letters_of(str(equation), [o.meta["val"].dim() for o in operands])
    if found is None:
        return
    inputs, out = found
    todo = list(zip(inputs, operands))
    while len(todo) > 2:
        i, j = _next_pair(todo, depends)
        (left, a), (right, b) = todo[i], todo[j]
        later = set(out).union(*(side for k, (side, _) in enumerate(todo) if k not in (i, j)))
        kept = "".join(dict.fromkeys(c for c in left + right if c in later))
        with graph.inserting_before(node):
            made = graph.call_function(aten.einsum.default, (f"{left},{right}->{kept}", [a, b]))
        sizes = dict(zip(left + right, (*a.meta["val"].shape, *b.meta["val"].shape)))
        made.meta = {**node.meta, "val": node.meta["val"].new_empty([sizes[c] for c in kept])}
        depends.update({made} if {a, b} & depends else set())
        _order(made, (left, right, kept), (a, b), depends, lengths)
        todo[i] = (kept, made)
        del todo[j]
    if len(todo) == 1:
        node.args = (f"{todo[0][0]}->{out}", [todo[0][1]])
    else:
        _order(node, (todo[0][0], todo[1][0], out), (todo[0][1], todo[1][1]), depends, lengths)


def _next_pair(todo: list[tuple[str, fx.Node]], depends: set[fx.Node]) -> tuple[int, int]:
    """Two operands to multiply first: such as share a letter that is summed up, tables before data."""

    def cost(pair: tuple[int, int]) -> tuple[int, int, int]:
        (left, a), (right, b) = (todo[i] for i in pair)
        size = len(set(left) | set(right)) - max(len(left), len(right))
        return size, len({a, b} & depends), pair[0]

    return min(((i, j) for j in range(len(todo)) for i in range(j)), key=cost)


def _order(
    node: fx.Node,
    letters: tuple[str, str, str],
    operands: tuple[fx.Node, fx.Node],
    depends: set[fx.Node],
    lengths: Sequence[Any],
) -> None:
    """Give a product its operands, queries or weights of attention first."""
    left, right, out = letters
    if {*operands} <= depends:
        theirs = [_positions(side, o, lengths) for side, o in zip((left, right), operands)]
        weights_behind = len(theirs[1]) > len(theirs[0])
        first, second = ([c for c in side if c in out] for side in theirs)
        listed = len(theirs[0]) == len(theirs[1]) == 1 and first and second and first != second
        keys_in_front = bool(listed) and out.index(first[0]) > out.index(second[0])
        if weights_behind or keys_in_front:
            left, right, operands = right, left, operands[::-1]
    node.args = (f"{left},{right}->{out}", list(operands))


def _positions(side: str, operand: fx.Node, lengths: Sequence[Any]) -> list[str]:
    """The letters of an operand that stand for positions."""
    sizes = operand.meta["val"].shape
    return [c for c, size in zip(side, sizes) if isinstance(size, torch.SymInt) and size.node.expr in lengths]


def _arguments(node: fx.Node) -> Any:
    return node.args[:2]
