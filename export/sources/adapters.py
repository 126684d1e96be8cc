"""Models of transformers as functions of ids, each with the signature from which `forms` reads how to call it.

What a model is, its own config and signature say. No architecture is named here.
"""

import contextlib
import inspect
import sys
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal
from unittest import mock

import torch
from torch import nn

from tfinfer.errors import SourceError

Says = Literal["decoder", "encoder", "encoder-decoder"]
Tensors = dict[str, torch.Tensor]


class Adapter(nn.Module):
    """A model of transformers; never in another mode than the model itself."""

    says: ClassVar[Says]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model


class CausalLM(Adapter):
    """A causal language model as a function of the ids alone."""

    says = "decoder"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, seq, vocab) of `input_ids` (batch, seq)."""
        with experts_as_written():
            return self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits


class Seq2SeqLM(Adapter):
    """An encoder-decoder as a function of both sides' ids alone."""

    says = "encoder-decoder"

    def forward(self, source_ids: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, seq, vocab) of `input_ids` (batch, seq), given `source_ids` (batch, source)."""
        given = {"input_ids": source_ids, "decoder_input_ids": input_ids}
        with experts_as_written():
            return self.model(**given, use_cache=False, return_dict=True).logits


class Encoder(Adapter):
    """Any other model, whose outputs keep their names; those in `without` are left out."""

    says = "encoder"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.without: Collection[str] = ()
        # Some encoders are decoders without a head.
        self.options = {"use_cache": False} if "use_cache" in _takes(model) else {}

    def outputs(self, **given: torch.Tensor | None) -> Tensors:
        """Return the outputs that are tensors, by name."""
        with experts_as_written():
            found = self.model(**given, **self.options, return_dict=True).items()
        return {name: value for name, value in found if torch.is_tensor(value) and name not in self.without}


class PlainEncoder(Encoder):
    """An encoder that takes ids alone."""

    def forward(self, input_ids: torch.Tensor) -> Tensors:
        """Return the outputs for `input_ids` (batch, seq)."""
        return self.outputs(input_ids=input_ids)


class MaskedEncoder(Encoder):
    """An encoder that can be told what is padding."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Tensors:
        """Return the outputs for `input_ids` (batch, seq); `attention_mask`, of the same shape, is 1 at tokens."""
        return self.outputs(input_ids=input_ids, attention_mask=attention_mask)


class TypedEncoder(Encoder):
    """An encoder that also takes which of two sentences a token belongs to."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Tensors:
        """Return the outputs for `input_ids` (batch, seq) and the rest of the same shape."""
        return self.outputs(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


@contextlib.contextmanager
def experts_as_written() -> Iterator[None]:
    """While a model is captured its mixtures of experts run as their own definitions say.

    transformers replaces these by kernels of the same result, which no graph can follow.
    """
    moe = sys.modules.get("transformers.integrations.moe")
    interface = getattr(moe, "ExpertsInterface", None)
    if interface is None or not torch.compiler.is_exporting():
        yield
        return
    with mock.patch.object(interface, "get_interface", lambda self, name, default: default):
        yield


def adapt(module: nn.Module) -> nn.Module:
    """Return a live model of transformers as a function of ids, any other module as it is."""
    transformers = sys.modules.get("transformers")  # where it was never imported, nothing can be of it
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return module
    return adapted(module)


def adapted(model: Any) -> Adapter:
    """Return a model of transformers as what it says it is.

    Raises SourceError for one that takes no ids, and for an encoder-decoder that predicts no tokens.
    """
    takes, name = _takes(model), type(model).__name__
    generates = model.can_generate()
    pair = model.config.is_encoder_decoder and "decoder_input_ids" in takes  # its encoder alone has the same config
    if generates and not pair:
        return CausalLM(model)
    if "input_ids" not in takes:
        raise SourceError(f"{name}: expected a model of token ids (input_ids); it takes {', '.join(takes)}")
    if not pair:
        return _encoder(takes, model.config)(model)
    if not generates:
        raise SourceError(
            f"{name}: expected, of an encoder-decoder, logits of the next token; it predicts none: name the class with "
            "such a head in config.json's architectures, or export its encoder alone, model.get_encoder()"
        )
    return Seq2SeqLM(model)


def _encoder(takes: Collection[str], config: Any) -> type[Encoder]:
    if "attention_mask" not in takes:
        return PlainEncoder
    # Where the config counts no types, their ids mean something else, and leaving them out is not the same as zeros.
    types = getattr(config, "type_vocab_size", None) or 0
    return TypedEncoder if "token_type_ids" in takes and types > 1 else MaskedEncoder


def _takes(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)
