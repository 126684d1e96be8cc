"""What a module asks of the values of its tensors while it is traced, answered as if every expert had tokens.

`if mask.any()`, `if len(tokens) == 0: continue`, `for expert in hit.nonzero()`, `for expert in ids.unique()` leave out
experts that no token goes to: a saving that changes no result. A graph has no such choices, so none is left out; an
expert without tokens then adds nothing. Where leaving out does change results, `program.py` refuses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

ASKED_OF_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

# Operations by their names, since functions and methods of one name do the same.
MOVES = {
    "view", "reshape", "flatten", "ravel", "squeeze", "unsqueeze", "t", "transpose", "permute", "contiguous", "clone",
    "detach", "to", "long", "int", "cpu", "__getitem__", "select", "expand",
}  # fmt: skip
PICKS = {"nonzero", "argwhere", "where"}
COUNTS = {"any", "bincount", "histc"}
SUMS = {"sum", "count_nonzero"}  # of truths
COMPARED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "greater": operator.gt,
    "less": operator.lt,
    "lt": operator.lt,
    "le": operator.le,
}
MANY = 2**20  # stands for how many tokens there are, in a comparison with a small number


@dataclass(frozen=True)
class Known:
    """What is known of a tensor's values without having them.

    below: all are indices of as many experts. lists: its rows are to be read as each of `below` once. some: they say
    whether, or how many, tokens go somewhere, and are to be read as if many did. classes: of its entries for each
    expert, or more, only so many can be other than 0.
    """

    below: int | None = None
    lists: bool = False
    some: bool = False
    truth: bool = True  # of a `some`: what it says of itself
    classes: int | None = None


class AllExperts(TorchFunctionMode):
    """Answers these questions while it is entered; all else goes through unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, Known]] = {}  # the tensor keeps its id from being given again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is None or name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        known = self._of(x)
        if known.lists and name in ("unbind", "tolist"):
            return _each(x, known.below or 0, as_numbers=name == "tolist")
        if known.some and name in ("__bool__", "item"):
            return known.truth
        if name == "__len__" and not isinstance(x.shape[0], int):
            return MANY
        result = func(*args, **kwargs)
        if name in PICKS and len(args) == 1:
            return self._picked(x, result)
        for output, fact in self._learned(name, x, known, result, args, kwargs):
            self._known[id(output)] = (output, fact)
        return result

    def _of(self, x: torch.Tensor) -> Known:
        return self._known[id(x)][1] if id(x) in self._known else Known()

    def _picked(self, x: torch.Tensor, result: Any) -> Any:
        """Indices of what is true: there are some; of a row of experts each of them."""
        for indices in result if isinstance(result, (tuple, list)) else [result]:
            torch._check(indices.shape[0] >= 1)
            if x.dim() == 1 and isinstance(x.shape[0], int):
                count = min(x.shape[0], self._of(x).classes or x.shape[0])
                self._known[id(indices)] = (indices, Known(below=count, lists=True))
        return result

    @staticmethod
    def _learned(
        name: str, x: torch.Tensor, known: Known, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterable[tuple[torch.Tensor, Known]]:
        """What is known of the results of an operation."""
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        if name in MOVES and known != Known():
            return [(part, known) for part in parts if isinstance(part, torch.Tensor)]
        if (name in ("topk", "sort", "max", "min") and len(parts) == 2) or name in ("argmax", "argmin", "argsort"):
            at = {"topk": 2}.get(name, 1)
            dim = kwargs.get("dim", args[at] if len(args) > at else -1)
            size = x.shape[dim] if isinstance(dim, int) else None
            return [(parts[-1], Known(below=size))] if isinstance(size, int) else []
        if name == "one_hot" and known.below:
            return [(parts[0], Known(classes=known.below))]
        if name == "unique" and known.below and len(parts) == 1:
            return [(parts[0], Known(below=known.below, lists=True))]
        if len(parts) == 1 and (name in COUNTS or (name in SUMS and x.dtype in (torch.bool, torch.int64))):
            return [(parts[0], Known(some=True, classes=known.classes))]
        compare = COMPARED.get(name.strip("_"))
        if compare and known.some and len(args) == 2 and isinstance(args[1], (bool, int)):
            value = known.truth if isinstance(args[1], bool) or x.dtype == torch.bool else MANY
            return [(parts[0], replace(known, truth=bool(compare(value, args[1]))))]
        if name in ("logical_not", "bitwise_not", "__invert__") and known.some:
            return [(parts[0], replace(known, truth=not known.truth))]
        return []


def _each(x: torch.Tensor, count: int, as_numbers: bool) -> list[Any]:
    """Every expert once, each as a row of `x` would be."""
    rows: list[Any] = [i if x.dim() == 1 else [i] for i in range(count)]
    return rows if as_numbers else [torch.tensor(row) for row in rows]
