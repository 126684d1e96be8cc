"""A reference, or a live module, into a Source: the one thing that the exporter takes.

Decides which kind of source it is and puts together what the other files of this folder read.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tfinfer.errors import SourceError
from tfinfer.manifest import PoolingSpec

from .adapters import Adapter, Says, adapt
from .forms import EncoderForm, PairForm, encoder_form, is_pair, pair_form
from .generation import Generation, read_generation
from .huggingface import is_checkpoint, load_checkpoint
from .lora import merge_adapter
from .python import FORMS, build_module
from .text import TextSide, read_text_side
from .weights import load_weights
from .wrappers import unwrap


@dataclass(frozen=True)
class Source:
    """A module in evaluation mode, float32 and on the CPU, and everything that came with it."""

    module: nn.Module  # of a decoder, forward(input_ids (batch, seq)) -> logits (batch, seq, vocab)
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
    says: Says | None = None  # what the source itself says it is; None: to be found out
    pooling: PoolingSpec | None = None  # of an encoder, where its folder says so
    decoder_start: tuple[int, ...] = ()  # of an encoder-decoder, as in TokenIds
    forced_eos: int | None = None
    suppressed: tuple[int, ...] = ()
    max_source_length: int | None = None

    def as_encoder(self) -> EncoderForm:
        """Return how to call the module as an encoder. Raises SourceError where it takes more than that."""
        return encoder_form(self.module)

    def as_pair(self) -> PairForm:
        """Return how to call the module as an encoder-decoder. Raises SourceError where it takes less, or more."""
        return pair_form(self.module)


def load_source(
    reference: str,
    *,
    weights: Path | None = None,
    tokenizer: Path | None = None,
    adapters: Sequence[Path] = (),
) -> Source:
    """Load what a user names.

    Args:
        reference: a checkpoint folder, `file.py:factory` or `package.module:factory`.
        weights: for a factory, the file whose tensors its module takes.
        tokenizer: a tokenizer.json or a folder that has one; for a folder as reference, instead of its own.
        adapters: folders of PEFT adapters, merged into the weights one after the other.
    """
    reference = fspath(reference)
    if reference and Path(reference).is_dir():
        return _with_adapters(_from_folder(Path(reference), weights, tokenizer), adapters)
    if ":" not in reference:
        raise SourceError(f"{reference!r}: expected {FORMS}; {_what_it_is(reference)}")
    module = _in_float32(build_module(reference), owned=True)
    if weights is not None:
        load_weights(module, weights)
    text = read_text_side(tokenizer) if tokenizer is not None else TextSide()
    target, _, name = reference.rpartition(":")
    shown = f"{Path(target).name}:{name}" if target.endswith(".py") else reference
    return _with_adapters(_with_text(module, "python", shown, text), adapters)


def _with_adapters(source: Source, adapters: Sequence[Path]) -> Source:
    """The source with adapters merged into its module, which is ours."""
    for folder in adapters:
        merge_adapter(source.module, folder)
    names = [source.reference, *(folder.resolve().name for folder in adapters)]
    return replace(source, reference=" + ".join(names))


def from_module(module: nn.Module, tokenizer: Path | None = None, adapters: Sequence[Path] = ()) -> Source:
    """Return a live module as a source; the module itself stays as it is.

    It is copied if its parameters are not in float32 or not on the CPU. One in training mode is copied without its
    tensors, which both then share.
    """
    if not isinstance(module, nn.Module):
        raise SourceError(f"expected a torch.nn.Module; got an object of type {type(module).__name__}")
    text = read_text_side(tokenizer) if tokenizer is not None else TextSide()
    name = type(unwrap(module)).__name__
    own = _in_float32(module, owned=False)
    if adapters:
        own = _copy(own, shared=[*own.parameters(), *own.buffers()])  # merging replaces tensors and changes none
    return _with_adapters(_with_text(own, "module", name, text), adapters)


def _from_folder(folder: Path, weights: Path | None, tokenizer: Path | None) -> Source:
    if not is_checkpoint(folder):
        raise SourceError(f"{folder}: expected {FORMS}; the folder has no config.json")
    if weights is not None:
        raise SourceError(f"{folder}: a checkpoint folder has its own weights; got {weights} as well")
    checkpoint = load_checkpoint(folder, tokenizer)
    return Source(
        module=checkpoint.module,
        kind="huggingface",
        reference=folder.resolve().name,
        generation_config=checkpoint.generation_config,
        versions=_versions() | {"transformers": checkpoint.transformers_version},
        says=checkpoint.module.says,
        pooling=checkpoint.pooling,
        **_fields(checkpoint.text, checkpoint.generation),
    )


def _with_text(module: nn.Module, kind: Literal["python", "module"], reference: str, text: TextSide) -> Source:
    says = module.says if isinstance(module, Adapter) else "encoder-decoder" if is_pair(module) else None
    if isinstance(module, Adapter) and says == "encoder-decoder":
        generation = read_generation(module, text)  # it cannot be run without the id that its target begins with
    else:
        generation = _of_tokenizer(text, says)
    return Source(module, kind, reference, versions=_versions(), says=says, **_fields(text, generation))


def _of_tokenizer(text: TextSide, says: Says | None) -> Generation:
    bos, eos, pad = (text.special_ids.get(name) for name in ("bos_token", "eos_token", "pad_token"))
    start = (bos,) if bos is not None and says == "encoder-decoder" else ()
    return Generation(bos, () if eos is None else (eos,), pad, start)


def _fields(text: TextSide, generation: Generation) -> dict[str, Any]:
    """What a Source has of them, by the same names."""
    own = {name: getattr(text, name) for name in ("tokenizer", "chat_template", "special_tokens")}
    return own | vars(generation)


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__)}


def _what_it_is(reference: str) -> str:
    path = Path(reference)
    if not reference or not path.exists():
        return "there is no such file or folder"
    return f"name the factory too: {path.name}:build" if path.suffix == ".py" else "it is a file"


def _in_float32(module: nn.Module, *, owned: bool) -> nn.Module:
    """Return the module in evaluation mode, float32 and on the CPU; one that is not ours is not changed."""
    module = adapt(unwrap(module))
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
