"""How torch runs a module while it is traced or asked for the truth: no dropout, no gradients, nothing narrowed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules import transformer

from .spellings import traceable


@contextlib.contextmanager
def inference_mode_of(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without what nn.TransformerEncoder does on the side; restored afterwards.

    Its fused fast path would hide its attention. Its hint that a mask is causal is read from the mask's values, which
    no tracing can do; without the hint it uses the mask itself. What autocast would narrow stays as wide as
    the weights, around the call and inside it; gradients stay off.
    """
    training = {part: part.training for part in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    unhinted = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: E731
    hint = mock.patch.object(transformer, "_detect_is_causal_mask", unhinted)
    try:
        off = torch.autocast("cpu", enabled=False)
        with torch.no_grad(), off, hint, traceable(module), _switched_off():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, mode in training.items():
            part.training = mode


@contextlib.contextmanager
def _switched_off() -> Iterator[None]:
    """Autocast and gradients that a module itself asks for, where they are asked for."""
    enter = torch.autocast.__enter__

    def narrow_nothing(self: torch.autocast) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = wanted

    def nothing(self: torch.enable_grad, *error: object) -> None: ...

    def off(self: torch.set_grad_enabled, mode: bool) -> None:
        set_mode(self, False)

    set_mode = torch.set_grad_enabled.__init__
    with (
        mock.patch.object(torch.autocast, "__enter__", narrow_nothing),
        mock.patch.object(torch.enable_grad, "__enter__", nothing),
        mock.patch.object(torch.enable_grad, "__exit__", nothing),
        mock.patch.object(torch.set_grad_enabled, "__init__", off),
    ):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what torch prints and warns of: whole graphs beside some of its errors, which say what is needed."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every size that data decides
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
