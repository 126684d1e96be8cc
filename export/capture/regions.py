"""Find attention in the captured graph: scores, what is done to them, a softmax over the keys, and the weighted sum.

Only the shape of the graph is looked at here; what is done to the scores is read by its values in `scores.py`, and what
makes weights of them in `weights.py`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from .scores import IDENTITIES, VIEWS
from .trace import Trace, arguments, aten, is_pointwise, read_for_values

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
SOFTMAXES = {aten.softmax.int, aten._softmax.default}


# What a softmax, and the things that people write around one, are made of, beside element-wise operations.
AROUND = SOFTMAXES | IDENTITIES | {
    aten.amax.default, aten.max.dim, aten.sum.dim_IntList, aten.logsumexp.default, operator.getitem,
    aten.cat.default, aten.slice.Tensor, aten.constant_pad_nd.default, aten.pad.default,
}  # fmt: skip
MOST = 24  # nodes between scores and weights; more is something else


@dataclass(frozen=True)
class Region:
    """`product` is q k^T, `chain` what is done to it, `tail` makes weights of that, one softmax mostly.

    `after` leads from the weights to `final`, the sum over the values.
    """

    product: fx.Node
    chain: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    final: fx.Node

    @property
    def inside(self) -> set[fx.Node]:
        """The nodes that vanish when the region becomes one operator; `final` is its result."""
        return {self.product, *self.chain, *self.tail, *self.after}

    @property
    def softmax(self) -> fx.Node:
        """The softmax among the tail, or its last node where it is written by hand."""
        return next((node for node in self.tail if node.target in SOFTMAXES), self.tail[-1])

    @property
    def scores(self) -> fx.Node:
        """The node whose values the tail makes weights of."""
        return self.chain[-1] if self.chain else self.product


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a product."""
    if node.target is aten.einsum.default:
        return arguments(node)[1][0], arguments(node)[1][-1]
    return arguments(node)[-2], arguments(node)[-1]


def is_product(trace: Trace, node: fx.Node) -> bool:
    if node.target is aten.einsum.default and len(arguments(node)[1]) != 2:
        return False
    return node.target in PRODUCTS and all(o in trace.data for o in operands(node))


def find_region(trace: Trace, product: fx.Node) -> Region | None:
    """The attention that begins with a product of data with data, or None where the graph goes on otherwise."""
    chain: list[fx.Node] = []
    node = product
    while (user := _only_user(trace, node)) is not None and _is_on_scores(trace, user):
        chain.append(user)
        node = user
    found = _between(trace, node)
    if found is None:
        return None
    inner, final = found
    after: list[fx.Node] = []
    while inner and inner[-1].target in IDENTITIES | VIEWS and len(trace.users(inner[-1])) == 1:
        after.insert(0, inner.pop())
    if not any(n.target in SOFTMAXES or n.target is aten.exp.default for n in inner):
        return None
    return Region(product, tuple(chain), tuple(inner), tuple(after), final)


def _between(trace: Trace, scores: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
    """All that is made of scores alone, in order, and the product that takes the last of it; None if there is more."""
    known, inner, todo = {scores}, list[fx.Node](), {*trace.users(scores)}
    while todo:
        node = min(todo, key=lambda n: trace.place[n])
        todo.remove(node)
        if is_product(trace, node):
            left, right = operands(node)
            fits = not todo and left is (inner or [scores])[-1] and right not in known
            return (inner, node) if fits and node.target is not aten.baddbmm.default else None
        known_to = node.target in AROUND | VIEWS or is_pointwise(node.target)
        data = [i for i in read_for_values(node) if i in trace.data]
        if node.op != "call_function" or not known_to or not set(data) <= known or len(inner) == MOST:
            return None
        known.add(node)
        inner.append(node)
        todo |= {*trace.users(node)}
    return None


def _only_user(trace: Trace, node: fx.Node) -> fx.Node | None:
    users = trace.users(node)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _is_on_scores(trace: Trace, node: fx.Node) -> bool:
    """Whether a node changes each score by constants and positions alone, before anything is made of them all."""
    alone = is_pointwise(node.target) or node.target in IDENTITIES | VIEWS
    if not alone or node.target is aten.exp.default:
        return False
    return sum(operand in trace.data for operand in read_for_values(node)) == 1
