"""What torch and its neighbours put around a module or its weights: taken off, or refused by name."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tfinfer.errors import SourceError

# Packages whose layers hold integers in the place of weights.
QUANTISES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao", "bitsandbytes")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, nn.DataParallel and DistributedDataParallel.

    Raises SourceError for what hides the module itself or its float weights: TorchScript, FSDP, quantised layers.
    """
    while True:
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            break
    for name, part in module.named_modules():
        _check(name or type(module).__name__, part)
    return module


def _check(name: str, part: nn.Module) -> None:
    home = f"{type(part).__module__}."
    if isinstance(part, torch.jit.ScriptModule):
        raise SourceError(
            f"{name}: is TorchScript (torch.jit.script or trace), which keeps no Python module to follow: export the "
            "module that was scripted"
        )
    if any(f"{base.__module__}.".startswith("torch.distributed.fsdp.") for base in type(part).__mro__):
        raise SourceError(
            f"{name}: its weights are shared out by FSDP: save a full state dict, load it into the plain module and "
            "export that"
        )
    if kind := next((package for package in QUANTISES if home.startswith(f"{package}.")), None):
        raise SourceError(
            f"{name}: {type(part).__name__} of {kind} is quantised, and its float weights are gone: export the "
            "module from before"
        )
    for own, tensor in itertools.chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)):
        if is_traceable_wrapper_subclass(tensor) or type(tensor).__module__.startswith("bitsandbytes."):
            raise SourceError(
                f"{name}.{own}: is a {type(tensor).__name__} of {type(tensor).__module__}, not a plain tensor: export "
                "the module before it is quantised or shared out"
            )
