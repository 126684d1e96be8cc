"""Sums over the past whose weights decay from position to position: y_i = sum over j <= i of (g_j+1 ... g_i) s_j.

Parallel forms of linear recurrences write the decays out as a square. Whether a square is one is read by its values;
then the sum is a state: h_i = g_i h_i-1 + s_i.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from .positional import Positional
from .scores import VIEWS
from .trace import Trace, arguments, aten, call, is_computed, mapped, read_for_values

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}
CLIMBED = VIEWS | {aten.transpose.int, aten.permute.default, aten.clone.default, aten._to_copy.default}
GATES = {"exp": torch.exp, "as it is": lambda x: x}
LENGTHS = (4, 7)


@dataclass(frozen=True)
class Decay:
    """A product with a square of decays: `equation` of the square, named first, and the values that it sums up.

    source: one gate for each position, as `gate` makes it; sources: the letter of each of its axes in the equation.
    """

    product: fx.Node
    source: fx.Node
    gate: str
    sources: str
    values: fx.Node
    equation: str
    row: str
    summed: str
    inside: frozenset[fx.Node]


def find_decays(trace: Trace, positional: Positional, nodes: Collection[fx.Node]) -> dict[fx.Node, Decay]:
    """Every product among `nodes` that is such a sum, by its node."""
    found = {}
    for node in trace.nodes:
        if node in nodes and node.target in PRODUCTS and (decay := _find(trace, positional, node)):
            found[node] = decay
    return found


def _find(trace: Trace, positional: Positional, product: fx.Node) -> Decay | None:
    for square, values, letters in _written(trace, product):
        if not (square in trace.data and values in trace.data):
            continue
        of_square, of_values, out = letters
        sizes = dict(zip(of_square, trace.shape(square)))
        along = [c for c in of_square if trace.lengths_in([sizes[c]])]
        summed = [c for c in along if c in of_values and c not in out]
        if len(along) != 2 or len(summed) != 1 or sizes[along[0]] != sizes[along[1]]:
            continue
        row = along[1 - along.index(summed[0])]
        rest = [c for c in of_square if c not in along]
        if row in of_values or not set(rest) <= set(of_values) or (inside := _square(trace, square)) is None:
            continue
        nodes, source = inside
        for start in (source, *_summed(trace, source)):
            read = _read(trace, positional, square, start, of_square, row, summed[0])
            if read is not None:
                gate, sources = read
                equation = f"{of_square},{of_values}->{out}"
                return Decay(product, start, gate, sources, values, equation, row, summed[0], frozenset(nodes))
    return None


def _written(trace: Trace, node: fx.Node) -> list[tuple[fx.Node, fx.Node, tuple[str, str, str]]]:
    """Both readings of a product: (square, values, letters of square, values and result)."""
    if node.target is aten.einsum.default:
        equation, operands = str(arguments(node)[0]).replace(" ", ""), arguments(node)[1]
        if "->" not in equation or "." in equation or len(operands) != 2:
            return []
        (one, two), out = equation.split("->")[0].split(","), equation.split("->")[1]
        if any(len(set(letters)) < len(letters) for letters in (one, two)):
            return []
    else:
        operands = arguments(node)[:2]
        ranks = [len(trace.shape(o)) for o in operands]
        if ranks[0] != ranks[1]:
            return []
        lead = "abcdefgh"[: ranks[0] - 2]
        one, two, out = f"{lead}ij", f"{lead}jk", f"{lead}ik"
    return [(operands[0], operands[1], (one, two, out)), (operands[1], operands[0], (two, one, out))]


def _square(trace: Trace, square: fx.Node) -> tuple[set[fx.Node], fx.Node] | None:
    """The data nodes with two axes of positions that lead to `square`, and the one node with one that all come from."""
    inside: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    todo = [square]
    while todo:
        node = todo.pop()
        if node in inside or node not in trace.data:
            continue
        if not isinstance(node.meta.get("val"), torch.Tensor):  # one of several results
            return None
        if len(trace.lengths_in(trace.shape(node))) < 2:
            sources.add(_climbed(trace, node))
        elif is_computed(node) and node not in trace.inputs and node.target not in PRODUCTS:
            inside.add(node)
            todo += read_for_values(node)
        else:
            return None
    return (inside, sources.pop()) if len(sources) == 1 else None


def _climbed(trace: Trace, node: fx.Node) -> fx.Node:
    """The node that a row of views begins with."""
    while node.target in CLIMBED | {aten.slice.Tensor} and arguments(node)[0] in trace.data:
        above = arguments(node)[0]
        if node.target is aten.slice.Tensor and trace.shape(above) != trace.shape(node):
            break
        node = above
    return node


def _summed(trace: Trace, source: fx.Node) -> list[fx.Node]:
    """What a source is the running sum of: differences of running sums are sums between."""
    if source.target is not aten.cumsum.default:
        return []
    return [_climbed(trace, arguments(source)[0])]


def _read(
    trace: Trace, positional: Positional, square: fx.Node, source: fx.Node, letters: str, row: str, summed: str
) -> tuple[str, str] | None:
    """How the gates come from `source`, and the letters of its axes; None where the square holds no decays."""
    sizes, own = dict(zip(letters, trace.shape(square))), trace.shape(source)
    along = [i for i, n in enumerate(own) if trace.lengths_in([n])]
    if len(along) != 1 or not source.meta["val"].is_floating_point():
        return None
    answers: set[tuple[str, str]] | None = None
    for length in LENGTHS:
        known = positional.sizes_at(length)
        shape = [n if isinstance(n, int) else int(n.subs(known)) for n in own]
        x = torch.rand(shape, generator=torch.Generator().manual_seed(length), dtype=torch.float64) + 0.1
        try:
            value = _run(trace, positional, square, {source: x}, length)
        except (RuntimeError, TypeError, IndexError):
            return None
        found = set(_gates_of(value, x, along[0], letters, row, summed))
        answers = found if answers is None else answers & found
    meet = [a for a in sorted(answers or ()) if all(c == " " or sizes[c] == n for c, n in zip(a[1], own))]
    return meet[0] if meet else None


def _run(
    trace: Trace, positional: Positional, node: fx.Node, known: dict[fx.Node, torch.Tensor], length: int
) -> torch.Tensor:
    if node not in known:
        read = [n for n in read_for_values(node) if n in trace.data]
        args, kwargs = mapped(
            node,
            lambda n: _run(trace, positional, n, known, length) if n in read else positional.value(n, length),
        )
        known[node] = call(node, args, kwargs)
    return known[node]


def _gates_of(
    value: torch.Tensor, x: torch.Tensor, along: int, letters: str, row: str, summed: str
) -> list[tuple[str, str]]:
    """All (gate, letters of x) for which the square `value` is made of products of the gates between two positions."""
    rest = [c for c in letters if c not in (row, summed)]
    square = value.double().permute(*(letters.index(c) for c in (*rest, row, summed)))  # (..., row, summed)
    size = square.shape[-1]
    step = torch.diagonal(square, -1, -2, -1)  # (..., size - 1): from each position to the next
    wanted = torch.zeros_like(square)
    for i, j in itertools.product(range(size), range(size)):
        if j <= i:
            wanted[..., i, j] = step[..., j:i].prod(-1)
    if not torch.allclose(square, wanted, rtol=1e-5, atol=1e-9):
        return []
    others = [i for i in range(x.dim()) if i != along]
    found = []
    for name, gate in GATES.items():
        for order in itertools.permutations(others, len(rest)):
            moved = gate(x).permute(*order, *(i for i in others if i not in order), along)
            moved = moved.reshape(*moved.shape[: len(rest)], -1, moved.shape[-1])
            same = moved.shape[len(rest)] == 1 and moved[..., 0, 1:].shape == step.shape
            if same and torch.allclose(moved[..., 0, 1:], step, rtol=1e-5):
                named = {along: summed, **dict(zip(order, rest))}
                found.append((name, "".join(named.get(i, " ") for i in range(x.dim()))))
    return found
