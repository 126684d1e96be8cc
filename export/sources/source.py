"""A reference, or a live module, into a Source: the one thing that the exporter takes.

Decides which kind of source it is and puts together what the other files of this folder read.
"""

import copy
import itertools
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tfinfer.errors import SourceError

from .huggingface import from_ids_alone, load_checkpoint
from .python import FORMS, build_module
from .text import TextSide, read_text_side
from .weights import load_weights


@dataclass(frozen=True)
class Source:
    """A module in evaluation mode, float32 and on the CPU, and everything that came with it."""

    module: nn.Module  # forward(input_ids (batch, seq)) -> logits (batch, seq, vocab)
    kind: Literal["python", "huggingface", "module"]
    reference: str  # what the user named, without the machine's folders
    tokenizer: bytes | None = None  # the content of a tokenizer.json
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, pad_token, unk_token
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    generation_config: dict[str, Any] | None = None
    max_length: int | None = None  # what the source itself says
    versions: dict[str, str] = field(default_factory=dict)


def load_source(reference: str, *, weights: Path | None = None, tokenizer: Path | None = None) -> Source:
    """Load what a user names.

    Args:
        reference: a checkpoint folder, `file.py:factory` or `package.module:factory`.
        weights: for a factory, the file whose tensors its module takes.
        tokenizer: a tokenizer.json or a folder that has one; for a folder as reference, instead of its own.
    """
    reference = fspath(reference)
    if reference and Path(reference).is_dir():
        return _from_folder(Path(reference), weights, tokenizer)
    if ":" not in reference:
        raise SourceError(f"{reference!r}: expected {FORMS}; {_what_it_is(reference)}")
    module = _in_float32(build_module(reference), owned=True)
    if weights is not None:
        load_weights(module, weights)
    text = read_text_side(tokenizer) if tokenizer is not None else TextSide()
    target, _, name = reference.rpartition(":")
    shown = f"{Path(target).name}:{name}" if target.endswith(".py") else reference
    return _with_text(module, "python", shown, text)


def from_module(module: nn.Module, tokenizer: Path | None = None) -> Source:
    """Return a live module as a source; the module itself stays as it is.

    It is copied if its parameters are not in float32 or not on the CPU. One in training mode is copied without its
    tensors, which both then share.
    """
    if not isinstance(module, nn.Module):
        raise SourceError(f"expected a torch.nn.Module; got an object of type {type(module).__name__}")
    text = read_text_side(tokenizer) if tokenizer is not None else TextSide()
    name = type(_uncompiled(module)).__name__
    return _with_text(_in_float32(module, owned=False), "module", name, text)


def _from_folder(folder: Path, weights: Path | None, tokenizer: Path | None) -> Source:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: expected {FORMS}; the folder has no config.json")
    if weights is not None:
        raise SourceError(f"{folder}: a checkpoint folder has its own weights; got {weights} as well")
    checkpoint = load_checkpoint(folder, tokenizer)
    return Source(
        module=checkpoint.module,
        kind="huggingface",
        reference=folder.resolve().name,
        tokenizer=checkpoint.text.tokenizer,
        chat_template=checkpoint.text.chat_template,
        special_tokens=checkpoint.text.special_tokens,
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        pad_id=checkpoint.pad_id,
        generation_config=checkpoint.generation_config,
        max_length=checkpoint.max_length,
        versions=_versions() | {"transformers": checkpoint.transformers_version},
    )


def _with_text(module: nn.Module, kind: Literal["python", "module"], reference: str, text: TextSide) -> Source:
    eos = text.special_ids.get("eos_token")
    return Source(
        module=module,
        kind=kind,
        reference=reference,
        tokenizer=text.tokenizer,
        chat_template=text.chat_template,
        special_tokens=text.special_tokens,
        bos_id=text.special_ids.get("bos_token"),
        eos_ids=() if eos is None else (eos,),
        pad_id=text.special_ids.get("pad_token"),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def _what_it_is(reference: str) -> str:
    path = Path(reference)
    if not reference or not path.exists():
        return "there is no such file or folder"
    return f"name the factory too: {path.name}:build" if path.suffix == ".py" else "it is a file"


def _uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _in_float32(module: nn.Module, *, owned: bool) -> nn.Module:
    """Return the module in evaluation mode, float32 and on the CPU; one that is not ours is not changed."""
    module = from_ids_alone(_uncompiled(module))
    tensors = list(itertools.chain(module.parameters(), module.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise SourceError(f"{type(module).__name__}: expected parameters with values; some are on the meta device")
    if any(tensor.device.type != "cpu" for tensor in tensors) or any(map(_is_other_float, tensors)):
        return _convert(module if owned else _copy(module, shared=[])).eval()
    if owned:
        return module.eval()
    return _copy(module, shared=tensors).eval() if any(part.training for part in module.modules()) else module


def _is_other_float(tensor: torch.Tensor) -> bool:
    # Buffers in double precision are meant so: they hold what float32 would round away, as angles of late positions.
    exact = (torch.float32,) if isinstance(tensor, nn.Parameter) else (torch.float32, torch.float64)
    return tensor.is_floating_point() and tensor.dtype not in exact


def _copy(module: nn.Module, shared: list[torch.Tensor]) -> nn.Module:
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    except Exception as error:  # an attribute of any type may refuse
        raise SourceError(
            f"{type(module).__name__}: cannot be copied ({error}); call .eval().float().cpu() on it yourself"
        ) from error


def _convert(module: nn.Module) -> nn.Module:
    module = module.cpu()
    for parameter in module.parameters():
        if _is_other_float(parameter):
            parameter.data = parameter.data.float()
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if _is_other_float(buffer):
                setattr(part, name, buffer.float())
    return module
