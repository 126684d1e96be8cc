"""What Python writes that no tracing sees through: `len(tensor)`, and results in a dataclass of the user's own."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """While it lasts `len` of a tensor is a size like any other, and dataclasses that torch does not know are dicts."""
    length = builtins.len

    def symbolic(value: Any, /) -> Any:
        """`len` itself must give a number, which would be the traced one."""
        return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else length(value)

    hook = module.register_forward_hook(lambda module, args, output: _as_dicts(output))
    try:
        with mock.patch.object(builtins, "len", symbolic):
            yield
    finally:
        hook.remove()


def _as_dicts(output: Any) -> Any:
    """Every unknown dataclass among results as a dict of its fields."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        if type(output) in _pytree.SUPPORTED_NODES:
            return output
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return {name: _as_dicts(value) for name, value in fields.items()}
    if type(output) in (tuple, list):
        return type(output)(_as_dicts(value) for value in output)
    if type(output) is dict:
        return {name: _as_dicts(value) for name, value in output.items()}
    return output
