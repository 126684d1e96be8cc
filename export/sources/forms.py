"""How to call a module as an encoder or as an encoder-decoder, read from its signatures, never from its class.

Knows neither transformers nor files.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tfinfer.errors import SourceError

from ..capture.trace import Argument, Kind

KINDS = {"attention_mask": Kind.MASK, "token_type_ids": Kind.TYPES, "segment_ids": Kind.TYPES}
PADDING = "key_padding_mask"  # how the names of torch's own padding masks end
# What a decode() calls the encoder's result where it takes that first.
MEMORY = {
    "memory", "encoded", "enc_out", "enc_output", "enc_outputs", "encoder_out", "encoder_output", "encoder_outputs",
    "encoder_hidden_states", "encoder_states",
}  # fmt: skip


@dataclass(frozen=True)
class EncoderForm:
    """A module and the arguments that it takes as an encoder, the ids first."""

    module: nn.Module
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class PairForm:
    """A module and the two arguments that it takes as an encoder-decoder: the source's ids and the target's."""

    module: nn.Module
    arguments: tuple[Argument, Argument]


class EncodeDecode(nn.Module):
    """A module with `encode` and `decode` as a function of both sides' ids; what is encoded is passed on as it is."""

    def __init__(self, module: nn.Module, memory_first: bool) -> None:
        super().__init__()
        self.training = module.training
        self.module, self.memory_first = module, memory_first

    def forward(self, source_ids: torch.Tensor, input_ids: torch.Tensor) -> Any:
        """Return what `decode` makes of `input_ids` (batch, seq) and the encoded `source_ids` (batch, source)."""
        module: Any = self.module
        memory = module.encode(source_ids)
        return module.decode(memory, input_ids) if self.memory_first else module.decode(input_ids, memory)


def encoder_form(module: nn.Module) -> EncoderForm:
    """Return how to call a module as an encoder: forward's first parameter is the ids.

    Parameters with other names are left alone if they have a default. Raises SourceError for those that have none.
    """
    first, *others = _parameters(module, "forward")
    known = [Argument(p.name, kind, source=True) for p in others if (kind := _kind(p.name)) is not None]
    if needed := [p.name for p in others if _is_required(p) and _kind(p.name) is None]:
        raise SourceError(
            f"{_name(module)}: expected an encoder's forward to take ids, and then at most {', '.join(KINDS)} and "
            f"names that end in {PADDING}; it also needs {', '.join(needed)}: give each a default, or name what the "
            "module takes with inputs="
        )
    return EncoderForm(module, (Argument(first.name, source=True), *known))


def pair_form(module: nn.Module) -> PairForm:
    """Return how to call a module as an encoder-decoder: forward(source, target), else `encode` and `decode`.

    A forward with exactly two required parameters is taken first: it is what the module says that it computes. Raises
    SourceError where there is neither, naming what else is required.
    """
    required = _required(module, "forward")
    if len(required) == 2 and not any(map(_is_mask, required)):
        source, target = required
        return PairForm(module, (Argument(source, source=True), Argument(target)))
    if _decodes(module):
        return _of_methods(module)
    also = [name for name in required if _is_mask(name)] or required[2:]
    advice = f"give {', '.join(also)} a default, or write these methods" if also else "write one of the two"
    raise SourceError(
        f"{_name(module)}: expected an encoder-decoder's forward(source_ids, target_ids), or its methods "
        f"encode(source_ids) and decode(target_ids, memory); it has no such methods, and forward needs "
        f"{', '.join(required) or 'nothing'}: {advice}"
    )


def is_pair(module: nn.Module) -> bool:
    """Whether a module can only be called with two sequences of ids, or decodes what it encoded."""
    if sum(not _is_mask(name) for name in _required(module, "forward")) == 2:
        return True
    if not _decodes(module):
        return False
    # Decoders may have methods of these names too, for text: they take one thing each.
    return len([name for name in _required(module, "decode") if not _is_mask(name)]) >= 2


def _of_methods(module: nn.Module) -> PairForm:
    encoding, decoding = _parameters(module, "encode"), _parameters(module, "decode")
    if len(decoding) < 2:
        raise SourceError(
            f"{_name(module)}: expected decode(target_ids, memory); it takes {decoding[0].name} alone: let it take "
            "what encode returns, too"
        )
    for method, others in (("encode", encoding[1:]), ("decode", decoding[2:])):
        if needed := [p.name for p in others if _is_required(p)]:
            raise SourceError(
                f"{_name(module)}: expected encode(source_ids) and decode(target_ids, memory); {method} also needs "
                f"{', '.join(needed)}: give each a default, or let encode return it as a part of the memory"
            )
    pair = EncodeDecode(module, memory_first=decoding[0].name in MEMORY)
    return PairForm(pair, (Argument("source_ids", source=True), Argument("input_ids")))


def _parameters(module: nn.Module, method: str) -> list[inspect.Parameter]:
    """The parameters of a method that can be given by name, at least one; of `encode` and `decode` by position too."""
    call: Any = getattr(module, method)
    try:
        found = inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters.values()
    except (TypeError, ValueError) as error:
        raise SourceError(f"{_name(module)}: {method} has no signature to read: write it in Python") from error
    named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        raise SourceError(f"{_name(module)}: {method} names no parameters: name the ids, as in {method}(input_ids)")
    if nameless := [p.name for p in named if p.kind is p.POSITIONAL_ONLY]:
        raise SourceError(
            f"{_name(module)}: {method} takes {', '.join(nameless)} by position only: remove the / behind it"
        )
    return named


def _required(module: nn.Module, method: str) -> list[str]:
    """The names of the parameters without a default; none where the signature says nothing."""
    try:
        return [p.name for p in _parameters(module, method) if _is_required(p)]
    except SourceError:
        return []


def _decodes(module: nn.Module) -> bool:
    return all(callable(getattr(module, method, None)) for method in ("encode", "decode"))


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _kind(name: str) -> Kind | None:
    """What a parameter beside the ids holds, as far as its name is a convention."""
    return Kind.PADDING if name.endswith(PADDING) else KINDS.get(name)


def _is_mask(name: str) -> bool:
    """Whether a parameter cannot be ids: it has a known meaning, or is called a mask or positions."""
    return _kind(name) is not None or "mask" in name or "pos" in name


def _name(module: nn.Module) -> str:
    return type(module).__name__
