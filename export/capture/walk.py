"""Walk a trace in its order; attention that one operator expresses is followed as a whole."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .follow import Follower
from .regions import Region, find_region, is_product
from .rules.attention import lower_region
from .trace import Trace, read_for_values


def follow_all(f: Follower, nodes: Collection[fx.Node]) -> None:
    """Follow every data node of `nodes` that the output needs, in the order of the trace."""
    needed = _needed(f.trace)
    pending: dict[fx.Node, Region] = {}
    inside: set[fx.Node] = set()
    for node in f.trace.nodes:
        if node not in nodes or node not in needed:
            continue
        recognise = f.observed is None and node not in inside and is_product(f.trace, node)
        if recognise and (region := find_region(f.trace, node)):
            pending[region.final] = region
            inside |= region.inside
        if node in inside:
            continue
        if node in pending and (result := lower_region(f, pending[node])):
            f.values[node] = result
            continue
        if node in pending:  # it stays as it is written
            for part in f.trace.nodes:
                if part in pending[node].inside:
                    f.follow(part)
        f.follow(node)


def _needed(captured: Trace) -> set[fx.Node]:
    needed, todo = set(), list(captured.output.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += read_for_values(node) if node.op == "call_function" else node.all_input_nodes
    return needed
