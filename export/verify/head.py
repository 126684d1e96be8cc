"""Only the wanted rows of a long pass reach a module's last layer: all of them would be gigabytes of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def find_head(module: nn.Module, run: Any, width: int) -> nn.Linear | None:
    """The linear layer that makes the logits: the last one of a pass, `run()`, whose output is `width` wide."""
    last: list[nn.Linear] = []

    def note(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        last[:] = [layer]

    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return last[0] if last else None


@contextmanager
def only_rows(head: nn.Linear, rows: Sequence[int], length: int) -> Iterator[None]:
    """Within, `head` takes the `rows` of an input (batch, length, hidden) alone."""

    def cut(layer: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        return (x[:, list(rows)], *args[1:]) if x.dim() == 3 and x.shape[1] == length else None

    handle = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
