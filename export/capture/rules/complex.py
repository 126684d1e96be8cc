"""Complex numbers, as rotary positions are often written: pairs of real values, multiplied out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..allowed import COMPLEX_RULES, RULES
from ..axes import fixed
from ..follow import Complex, Follower, followed, rule
from ..tensor import Tensor, from_working, working
from ..trace import aten
from .elementwise import elementwise, identity, named
from .indexing import taken
from .views import expand, permute, squeeze, transpose, unsqueeze, view

WIDTHS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


@rule(aten.view_as_complex.default)
def view_as_complex(f: Follower, node: fx.Node, x: Tensor) -> Complex:
    return Complex(taken(f, x, x.rank - 1, 0), taken(f, x, x.rank - 1, 1))


def view_as_real(f: Follower, node: fx.Node, x: Complex) -> Tensor:
    pair = [part.seen_as((*part.axes, ())) for part in (x.real, x.imag)]
    _, order = working(f.emit, pair[0])
    value = f.emit.op("Concat", *(working(f.emit, part, order)[0] for part in pair), axis=order.index(x.real.rank))
    return from_working(value, (*followed(x.real.axes), fixed(2)), order, x.real.dtype)


def multiply(f: Follower, node: fx.Node, x: Any, y: Any) -> Complex:
    (a, b), (c, d) = (_parts(f, operand) for operand in (x, y))
    return Complex(
        _sum(f, node, "Sub", (a, c), (b, d)),
        _sum(f, node, "Add", (a, d), (b, c)),
    )


def _sum(f: Follower, node: fx.Node, op_type: str, one: tuple[Any, Any], other: tuple[Any, Any]) -> Tensor:
    dtype = WIDTHS[node.meta["val"].dtype]
    products = [elementwise(f, node, pair, named("Mul"), dtype=dtype) for pair in (one, other)]
    return elementwise(f, node, products, named(op_type), dtype=dtype)


def _parts(f: Follower, operand: Any) -> tuple[Any, Any]:
    """Real and imaginary part of an operand; those of a table become positional nodes of their own."""
    if isinstance(operand, Complex):
        return operand.real, operand.imag
    if isinstance(operand, fx.Node):
        return f.derived(operand, torch.real), f.derived(operand, torch.imag)
    return (operand.real, operand.imag) if isinstance(operand, complex) else (operand, 0.0)


def _on_both(f: Follower, node: fx.Node, x: Complex, *args: Any, **kwargs: Any) -> Complex:
    parts: list[Any] = [RULES[node.target](f, node, part, *args, **kwargs) for part in (x.real, x.imag)]
    return Complex(*parts)


COMPLEX_RULES[aten.mul.Tensor] = multiply
COMPLEX_RULES[aten.view_as_real.default] = view_as_real
COMPLEX_RULES.update(
    {t: _on_both for t, r in RULES.items() if r in (view, unsqueeze, squeeze, transpose, permute, expand, identity)}
)
