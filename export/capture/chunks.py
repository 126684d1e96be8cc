"""Chunked scans in chunks of one token: a recurrence that is written by chunks is exact for every size of them.

A module pads its sequence to whole chunks, which no cache can continue in between. With chunks of one token nothing is
padded, and what goes from chunk to chunk is the state that a cache keeps. Sizes are found by what they are called, and
taken only where the module then computes the same numbers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .modes import inference_mode_of

NAMES = ("chunk_size", "block_size")
PROBES = (5, 19)  # lengths at which both sizes must agree
CLOSE = 1e-4  # relative to the largest value: the sums are made in another order


@contextmanager
def chunks_of_one(module: nn.Module) -> Iterator[None]:
    """Within, every chunked scan of the module works in chunks of one token, if it computes the same so."""
    parts = [(p, n) for p in module.modules() for n in NAMES if _is_size(p.__dict__.get(n))]
    functions = _functions(module) if parts or len(list(module.children())) else []
    with ExitStack() as changed:
        if parts or functions:
            own = _results(module)
            for part, name in parts:
                changed.callback(setattr, part, name, part.__dict__[name])
                setattr(part, name, 1)
            for function in functions:
                _set_default(function, changed.callback)
            if own is None or not _same(own, _results(module)):
                changed.close()
        yield


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _functions(module: nn.Module) -> list[FunctionType]:
    """The functions beside the classes of a module's parts that have a size of chunks as a default."""
    files = {type(part).__module__ for part in module.modules()}
    found: dict[int, FunctionType] = {}
    for file in files:
        if file in sys.modules and file.partition(".")[0] != "torch":
            for value in list(vars(sys.modules[file]).values()):
                function = inspect.unwrap(value) if callable(value) else None
                if isinstance(function, FunctionType) and any(_is_size(size) for size in _defaults(function).values()):
                    found[id(function)] = function
    return list(found.values())


def _defaults(function: FunctionType) -> dict[str, Any]:
    """The defaults of a function's sizes of chunks."""
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(given) :]
    every = {**dict(zip(names, given)), **(function.__kwdefaults__ or {})}
    return {name: value for name, value in every.items() if name in NAMES}


def _set_default(function: FunctionType, undo: Callable[..., Any]) -> None:
    """Make 1 of a function's sizes of chunks."""
    code, given, named = function.__code__, function.__defaults__, function.__kwdefaults__
    undo(partial(setattr, function, "__defaults__", given))
    undo(partial(setattr, function, "__kwdefaults__", named))
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(given or ()) :]
    if given:
        function.__defaults__ = tuple(1 if n in NAMES and _is_size(v) else v for n, v in zip(names, given))
    if named:
        function.__kwdefaults__ = {n: 1 if n in NAMES and _is_size(v) else v for n, v in named.items()}


def _results(module: nn.Module) -> list[list[torch.Tensor]] | None:
    """What the module computes for some ids; None where it fails, as a size may mean something else."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in PROBES:
        ids = torch.randint(0, 2, (2, length), generator=generator)
        try:
            with inference_mode_of(module):
                leaves = torch.utils._pytree.tree_leaves(module(ids))
        except Exception:
            return None
        found.append([t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()][:1])
    return found


def _same(own: list[list[torch.Tensor]], other: list[list[torch.Tensor]] | None) -> bool:
    if other is None or [len(o) for o in own] != [len(o) for o in other]:
        return False
    pairs = [(a, b) for mine, theirs in zip(own, other) for a, b in zip(mine, theirs)]
    return all(a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * a.abs().max()) for a, b in pairs)
