"""What makes weights of attention of its scores, read by its values: a softmax over the keys, perhaps with sinks.

A sink is a score of each head that takes part in the softmax and weighs nothing: a column joined before the softmax and
cut off behind it, or a term more in the denominator. However it is written, on made-up scores it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .axes import Axes, Role, flat, has
from .regions import SOFTMAXES
from .scores import IDENTITIES, Chain, Unreadable
from .tables import close
from .trace import arguments, call, mapped

LENGTHS = (1, 2, 5, 16)
# What all scores are lowered by, to see a sink that is far below them.
SHIFTS = (0.0, 20.0, 60.0, 200.0, 600.0)


def read_weights(tail: Sequence[fx.Node], chain: Chain, length: int) -> tuple[float, ...]:
    """The sink of each head, none for a plain softmax over the keys.

    chain: leads to the scores that the tail begins with. Raises Unreadable where the tail is something else.
    """
    axes = chain.result_axes()
    key = next(i for i, axis in enumerate(axes) if has(axis, Role.KEY))
    if len(tail) == 1 and tail[0].target in SOFTMAXES:
        if arguments(tail[0])[1] % len(axes) != key:
            raise Unreadable(tail[0])
        return ()
    tables = _tables(tail, chain, length)

    def weights(scores: torch.Tensor, length: int) -> torch.Tensor:
        """(heads, rows, keys) of scores of the same shape."""
        value = _of_axes(chain, scores, axes, length)
        return chain.canonical(_run(tail, chain, value, tables, length), axes, length, length)

    sinks = _sinks(weights, chain, axes)
    generator = torch.Generator().manual_seed(0)
    for n in LENGTHS:
        shape = chain.canonical(torch.zeros(chain.sizes(axes, n, n)), axes, n, n).shape
        for shift, spread in ((0.0, 1.0), (-30.0, 8.0), (25.0, 8.0), (0.0, 100.0)):
            scores = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + shift
            hidden = torch.arange(shape[-1]) > torch.arange(n)[:, None]
            for made in (scores, scores.masked_fill(hidden, -torch.inf), scores.masked_fill(hidden, -1e9)):
                got = weights(made, n)
                if not got.isfinite().all() or not close(got, softmax_with_sinks(made, sinks)):
                    raise Unreadable
    return tuple(sinks.tolist()) if len(sinks) else ()


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """scores: (heads, rows, keys); sinks: (heads,) or none."""
    if not len(sinks):
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _sinks(weights: Any, chain: Chain, axes: Axes) -> torch.Tensor:
    """(heads,): what stands in the denominator beside the scores; empty where there is nothing."""
    length = 2
    shape = chain.canonical(torch.zeros(chain.sizes(axes, length, length)), axes, length, length).shape
    for shift in SHIFTS:
        share = weights(torch.full(shape, -shift, dtype=torch.float64), length)  # 1 / (keys + exp(sink + shift))
        rest = share.reciprocal() - shape[-1]
        if not rest.isfinite().all():
            raise Unreadable
        if (rest > 1e-3).all():
            sink = rest.log() - shift
            if not close(sink, sink[:, :1, :1].expand_as(sink)):
                raise Unreadable
            return sink[:, 0, 0]
    return torch.empty(0, dtype=torch.float64)


def _of_axes(chain: Chain, scores: torch.Tensor, axes: Axes, length: int) -> torch.Tensor:
    """(heads, rows, keys) as the tail's own layout, for a batch of one."""
    atoms = [atom for atom in flat(axes) if atom.role is not Role.BATCH]
    heads = [atom for atom in atoms if atom.role is None]
    lies = [*heads, *(next(a for a in atoms if a.role is role) for role in (Role.QUERY, Role.KEY))]
    apart = scores.reshape(chain.sizes(tuple((atom,) for atom in lies), length, length))
    return apart.permute([lies.index(atom) for atom in atoms]).reshape(chain.sizes(axes, length, length))


def _tables(tail: Sequence[fx.Node], chain: Chain, length: int) -> list[fx.Node]:
    """The positional operands of a tail. Raises Unreadable where one changes from position to position."""
    positional = chain.positional
    trace = positional.trace
    found = [n for node in tail for n in node.all_input_nodes if n not in trace.data]
    for node in found:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        along = [i for i, size in enumerate(trace.shape(node)) if trace.lengths_in([size])]
        if len(along) > 1:
            raise Unreadable(node)
        for axis in along:
            value = positional.value(node, length)
            if not torch.equal(value, value.narrow(axis, 0, 1).expand_as(value)):
                raise Unreadable(node)
    return found


def _run(
    tail: Sequence[fx.Node], chain: Chain, scores: torch.Tensor, tables: Sequence[fx.Node], length: int
) -> torch.Tensor:
    """The tail on made-up scores, in float64 whatever it casts to."""
    given: dict[fx.Node, Any] = {node: chain.positional.value(node, length) for node in tables}
    first = next(n for n in tail[0].all_input_nodes if n in chain.positional.trace.data)
    given[first] = scores
    for node in tail:
        if node.target in IDENTITIES:
            given[node] = given[node.all_input_nodes[0]]
            continue
        args, kwargs = mapped(node, given.__getitem__)
        if node.target in SOFTMAXES:  # without the type that it computes in
            args, kwargs = args[:2], {}
            given[node] = torch.softmax(*args)
            continue
        given[node] = call(node, args, {name: value for name, value in kwargs.items() if name != "dtype"})
    return torch.as_tensor(given[tail[-1]])
