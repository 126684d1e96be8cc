"""Walk a trace in its order; attention that one operator expresses is followed as a whole."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .follow import Follower
from .regions import Region, find_region, is_product
from .rules.attention import follow_weights, lower_region
from .trace import Trace


def follow_all(f: Follower, nodes: Collection[fx.Node]) -> None:
    """Follow every data node of `nodes` that the output needs, in the order of the trace."""
    needed = _needed(f.trace)
    pending: dict[fx.Node, Region] = {}
    inside: set[fx.Node] = set()
    for node in f.trace.nodes:
        if node not in nodes or node not in needed:
            continue
        if node not in inside and is_product(f.trace, node) and (region := find_region(f.trace, node)):
            pending[region.final] = region
            inside |= region.inside
        if node in inside:
            continue
        if node in pending:
            region = pending[node]
            result = None if f.observed is not None else lower_region(f, region)
            if result is not None:
                f.values[node] = result
                continue
            _follow_as_written(f, region)
        f.follow(node)


def _follow_as_written(f: Follower, region: Region) -> None:
    """The nodes before the sum over the values; a softmax with sinks, or one by hand, has operators of its own."""
    for part in (region.product, *region.chain):
        f.follow(part)
    if len(region.tail) == 1 or not follow_weights(f, region):
        for part in region.tail:
            f.follow(part)
    for part in region.after:
        f.follow(part)


def _needed(captured: Trace) -> set[fx.Node]:
    needed, todo = set(), list(captured.output.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    return needed
