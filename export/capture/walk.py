"""Walk a trace in its order; attention that one operator expresses is followed as a whole."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from tfinfer.errors import CaptureError

from .decays import Decay, find_decays
from .follow import Follower
from .refusals import told_together
from .regions import Region, find_region, is_product
from .rules.attention import follow_weights, lower_region
from .rules.decay import lower_decay
from .trace import read_for_values


def follow_all(f: Follower, nodes: Collection[fx.Node], wanted: fx.Node | None = None) -> None:
    """Follow every data node of `nodes` that the output, or `wanted` among it, needs, in the order of the trace.

    Raises CaptureError with everything that cannot be followed, of an encoder-decoder's source as well.
    """
    needed = _needed(f.trace.output if wanted is None else wanted)
    pending: dict[fx.Node, Region] = {}
    decays = find_decays(f.trace, f.positional, nodes)
    inside: set[fx.Node] = {n for decay in decays.values() for n in decay.inside}
    for node in f.trace.nodes:
        if node not in nodes or node not in needed:
            continue
        if node not in inside and is_product(f.trace, node) and (region := find_region(f.trace, node)):
            pending[region.final] = region
            inside |= region.inside
        if node in inside:
            continue
        if node in decays and _state(f, decays[node]):
            continue
        if node in pending and f.observed is None and _lower(f, pending[node]):
            continue
        if node in pending:
            _follow_as_written(f, pending[node])
        f.follow(node)
    if refusals := [*(f.source.refusals if f.source else ()), *f.refusals]:
        raise told_together(refusals) from refusals[0]


def _lower(f: Follower, region: Region) -> bool:
    """Whether a region became one operator, or was refused as a whole."""
    try:
        result = lower_region(f, region)
    except CaptureError as refusal:
        f.lose(region.final, refusal)
        return True
    if result is not None:
        f.values[region.final] = result
    return result is not None


def _state(f: Follower, decay: Decay) -> bool:
    """Whether a sum with decaying weights became a state."""
    result = lower_decay(f, decay)
    if result is not None:
        f.values[decay.product] = result
    return result is not None


def _follow_as_written(f: Follower, region: Region) -> None:
    """The nodes before the sum over the values; a softmax with sinks, or one by hand, has operators of its own."""
    for part in (region.product, *region.chain):
        f.follow(part)
    if len(region.tail) == 1 or not _weights(f, region):
        for part in region.tail:
            f.follow(part)
    for part in region.after:
        f.follow(part)


def _weights(f: Follower, region: Region) -> bool:
    try:
        return follow_weights(f, region)
    except CaptureError as refusal:
        f.lose(region.tail[-1], refusal)
        return True


def _needed(wanted: fx.Node) -> set[fx.Node]:
    needed, todo = {wanted}, list(wanted.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += read_for_values(node) if node.op == "call_function" else node.all_input_nodes
    return needed
