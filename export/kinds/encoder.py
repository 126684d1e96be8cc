"""An encoder: ids, or whatever else a module takes, into hidden states and every other output by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn

from tfinfer.manifest import EncoderRoles, Manifest
from tfinfer.proof import runs
from tfinfer.proof.prove import Verdict, open_session, prove_encoder
from tfinfer.proof.runs import Run

from ..capture import AttentionReport, Kind, Observed, capture_encoder
from ..capture.encoder import parts_of
from ..capture.plain import InputSpec, translate
from ..verify import EncoderReference, expected_runs, observe, runs_of_ids
from .job import Asked, Progress

if TYPE_CHECKING:
    from ..sources.forms import EncoderForm

NAMES = {
    Kind.IDS: "input_ids",
    Kind.MASK: "attention_mask",
    Kind.PADDING: "attention_mask",
    Kind.TYPES: "token_type_ids",
}


class EncoderJob:
    """An export of an encoder over ids, every position of which may see every other."""

    def __init__(self, form: EncoderForm, asked: Asked, pad_id: int) -> None:
        self.form, self.pad_id = form, pad_id
        arguments = list(form.arguments)
        self.captured = capture_encoder(form.module, arguments, max_length=asked.max_length, flavor=asked.flavor)
        self.graphs: Mapping[str, ir.Model] = {"encoder": self.captured.model}
        self.attention, self.module_length = self.captured.attention, self.captured.module_length

    @property
    def inputs(self) -> set[str]:
        return {str(value.name) for value in self.captured.model.graph.inputs}

    def fields(self, dtype: str) -> dict[str, Any]:
        taken = {name: name if name in self.inputs else None for name in ("attention_mask", "token_type_ids")}
        roles = EncoderRoles(
            input_ids="input_ids",
            hidden_states=self.captured.hidden_states,
            pooled=self.captured.pooled,
            **taken,
        )
        lengths = {"vocab_size": self.captured.vocab_size, "max_length": self.captured.max_length}
        return {"kind": "encoder", "encoder": roles, **lengths, **NOTHING_CACHED}

    def expect(self, progress: Progress) -> list[Run]:
        reference = EncoderReference(self.form.module, self.form.arguments)
        outputs = [str(value.name) for value in self.captured.model.graph.outputs]
        sizes = (self.captured.vocab_size, self.captured.max_length, self.pad_id)
        return runs_of_ids(reference, outputs, self.inputs, *sizes, progress)

    def save(self, path: Path, expected: list[Run]) -> None:
        runs.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress
    ) -> Verdict:
        return encoder_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        return observe(self.captured.trace, self.captured.max_length)


class _ByName(nn.Module):
    """An encoder over ids under the names that every graph of ours has."""

    def __init__(self, form: EncoderForm) -> None:
        super().__init__()
        self.module, self.arguments = form.module, form.arguments

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        named = {argument.name: given[NAMES[argument.kind]] for argument in self.arguments}
        for argument in self.arguments:
            if argument.kind is Kind.PADDING:
                named[argument.name] = attention_mask == 0
        return self.module(**named)


def plain_form(form: EncoderForm) -> tuple[nn.Module, list[InputSpec], EncoderRoles]:
    """An encoder as a module whose inputs have our names, those inputs, and their roles."""
    names = list(dict.fromkeys(NAMES[argument.kind] for argument in form.arguments))
    inputs = [InputSpec(name, torch.int64, ("batch", "seq")) for name in names]
    taken = {name: name if name in names else None for name in ("attention_mask", "token_type_ids")}
    return _ByName(form), inputs, EncoderRoles(input_ids="input_ids", **taken)


class PlainJob:
    """An export of a module as torch translates it, for what takes no ids or has an operation that is not followed."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[InputSpec], why: str, roles: EncoderRoles, longest: int
    ) -> None:
        self.module, self.inputs, self.longest = module, tuple(inputs), longest
        self.model = translate(module, inputs)
        self.roles = replace(roles, **_parts_by_shape(self.model)) if roles.input_ids else roles
        self.graphs: Mapping[str, ir.Model] = {"encoder": self.model}
        self.attention = [AttentionReport("torch's own translation", "as written", why)] if why else []
        self.module_length: int | None = None

    def fields(self, dtype: str) -> dict[str, Any]:
        lengths = {"vocab_size": 0, "max_length": self.longest}
        return {"kind": "encoder", "encoder": self.roles, **lengths, **NOTHING_CACHED}

    def expect(self, progress: Progress) -> list[Run]:
        return expected_runs(self.module, self.inputs, self.model, progress)

    def save(self, path: Path, expected: list[Run]) -> None:
        runs.save(path, expected)

    def verdict(
        self, manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress
    ) -> Verdict:
        return encoder_verdict(manifest, folder, expected, device, progress)

    def observe(self) -> Observed | None:
        return None


def _parts_by_shape(model: ir.Model) -> dict[str, str | None]:
    """The outputs of a translated encoder that are hidden states, and a vector of the whole text."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.outputs:
        assert value.shape is not None
        shapes[str(value.name)] = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    hidden, pooled = parts_of(shapes)
    return {"hidden_states": hidden, "pooled": pooled}


NOTHING_CACHED: dict[str, Any] = {"roles": None, "cache": (), "num_logits": 0, "all_rows": True}


def encoder_verdict(manifest: Manifest, folder: Path, expected: list[Run], device: str, progress: Progress) -> Verdict:
    session = open_session(manifest, folder, device=device)
    try:
        return prove_encoder(session, manifest.dtype, expected, lambda run: progress(f"proof: {run}"))
    finally:
        session.close()
