"""Find attention in the captured graph: scores, what is done to them, a softmax over the keys, and the weighted sum.

Only the shape of the graph is looked at here; what is done to the scores is read by its values in `scores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .scores import IDENTITIES, VIEWS
from .trace import Trace, arguments, aten, read_for_values

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
SOFTMAXES = {aten.softmax.int, aten._softmax.default}


@dataclass(frozen=True)
class Region:
    """`product` is q k^T, `chain` leads to `softmax`, `after` from there to `final`, the sum over the values."""

    product: fx.Node
    chain: tuple[fx.Node, ...]
    softmax: fx.Node
    after: tuple[fx.Node, ...]
    final: fx.Node

    @property
    def inside(self) -> set[fx.Node]:
        """The nodes that vanish when the region becomes one operator; `final` is its result."""
        return {self.product, *self.chain, self.softmax, *self.after}


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
    while (user := _only_user(trace, node)) is not None and user.target not in SOFTMAXES:
        if not _is_on_scores(trace, user):
            return None
        chain.append(user)
        node = user
    if user is None or arguments(user)[1] not in (-1, user.meta["val"].dim() - 1):
        return None
    softmax, after, node = user, [], user
    while (user := _only_user(trace, node)) is not None and not is_product(trace, user):
        if user.target not in IDENTITIES | VIEWS:
            return None
        after.append(user)
        node = user
    if user is None or operands(user)[0] is not node or user.target is aten.baddbmm.default:
        return None
    return Region(product, tuple(chain), softmax, tuple(after), user)


def _only_user(trace: Trace, node: fx.Node) -> fx.Node | None:
    users = trace.users(node)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _is_on_scores(trace: Trace, node: fx.Node) -> bool:
    """Whether a node changes scores by constants and positions alone."""
    return sum(operand in trace.data for operand in read_for_values(node)) == 1
