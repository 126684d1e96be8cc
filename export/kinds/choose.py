"""Which kind of export a module asks for: what it or its source says, or else what its trace shows."""

from __future__ import annotations

import torch
from torch import fx

from tfinfer.errors import CaptureError, SourceError
from tfinfer.manifest import EncoderRoles

from ..capture import Trace, trace_decoder
from ..capture.modes import inference_mode_of
from ..capture.outputs import named_outputs, vocabulary
from ..capture.trace import Kind, arguments, aten
from ..capture.tracing import TRACED_BATCH, TRACED_SEQ, TRACED_SOURCE
from ..sources import Source
from ..sources.adapters import Adapter, Says
from ..sources.forms import EncoderForm
from ..verify import EncoderReference
from .decoder import DecoderJob
from .encoder import EncoderJob, PlainJob, TranslatedJob
from .encoder_decoder import PairJob
from .given import as_decoder
from .job import Asked, Job

KINDS = ("auto", "decoder", "encoder", "encoder-decoder")
LONGEST_PLAIN = 512  # of an encoder that torch translates, where neither the module nor the user says


def open_job(source: Source, kind: str, asked: Asked) -> Job:
    """Capture a source as the kind that was asked for, or for "auto" as what it is."""
    if asked.inputs:
        longest = asked.max_length or max((n for i in asked.inputs for n in i.shape if isinstance(n, int)), default=1)
        return PlainJob(source.module, asked.inputs, "", EncoderRoles(), longest, asked.max_length)
    wanted = source.says if kind == "auto" else kind
    if wanted == "encoder-decoder" and kind == "auto" and not isinstance(source.module, Adapter):
        wanted = _pair_or_none(source)
    if wanted == "encoder-decoder":
        return PairJob(source.as_pair(), asked)
    if wanted == "encoder":
        return open_encoder(source, asked)
    try:
        module = source.module if isinstance(source.module, Adapter) else as_decoder(source.module)
    except CaptureError:
        if wanted is None and _is_encoder(source):
            return open_encoder(source, asked)
        raise
    captured = trace_decoder(module)
    if wanted is None and gives_hidden_states(captured):
        return open_encoder(source, asked)
    return DecoderJob(module, captured, asked)


def _pair_or_none(source: Source) -> Says | None:
    """What a module with two sides is: with no sides of two lengths, one whose second is no sequence of its own."""
    if _runs_as_pair(source):
        return "encoder-decoder"
    try:
        as_decoder(source.module)
    except CaptureError:
        return "encoder-decoder"  # what is wrong with it is said of what it seems to be
    return None


def _runs_as_pair(source: Source) -> bool:
    try:
        form = source.as_pair()
        with inference_mode_of(form.module):
            form.module(**{a.name: a.sample(2, TRACED_SOURCE if a.source else TRACED_SEQ) for a in form.arguments})
    except Exception:  # whatever the user's code raises
        return False
    return True


def _is_encoder(source: Source) -> bool:
    try:
        return _runs(source.as_encoder())
    except SourceError:
        return False


def open_encoder(source: Source, asked: Asked) -> Job:
    """Follow an encoder; where that cannot be, let torch translate it as it stands."""
    form = _without_padding(_accepted(source.as_encoder()), source.pad_id or 0)
    try:
        return EncoderJob(form, asked, source.pad_id or 0)
    except CaptureError as refusal:
        why, told = str(refusal).splitlines()[0], str(refusal)
    try:
        return TranslatedJob(form, asked.max_length, source.max_length or LONGEST_PLAIN, why, source.pad_id or 0)
    except CaptureError as error:
        also = f"{';' if why == told else chr(10)} nor can torch translate it: {error}"
        raise CaptureError(f"{told}{also}") from error


def _accepted(form: EncoderForm) -> EncoderForm:
    """Without token types where the module has a parameter for them and, built without any, refuses to take them."""
    without = EncoderForm(form.module, tuple(a for a in form.arguments if a.kind is not Kind.TYPES))
    return without if without != form and not _runs(form) and _runs(without) else form


def _without_padding(form: EncoderForm, pad_id: int) -> EncoderForm:
    """Without its mask where a module takes one and its results change with padding all the same."""
    bare = EncoderForm(form.module, tuple(a for a in form.arguments if not a.is_mask))
    if bare == form or not _runs(form) or not EncoderReference(form.module, form.arguments).minds_padding(pad_id):
        return form
    if not _runs(bare):
        raise CaptureError(
            "the module's results for a text change with the padding behind it, though it takes a mask: use the mask "
            "wherever positions are mixed, in pooling as well, or give it a default so that texts run without padding"
        )
    return bare


def _runs(form: EncoderForm) -> bool:
    with inference_mode_of(form.module):
        try:
            form.module(**{a.name: a.sample(TRACED_BATCH, TRACED_SOURCE) for a in form.arguments})
        except Exception:
            return False
    return True


def gives_hidden_states(captured: Trace) -> bool:
    """Whether a module's own result is as wide as its embedding rather than its vocabulary, or no row of numbers."""
    ids = captured.ids()
    words, width = vocabulary(captured, ids), _width(captured, ids)
    if "logits" in named_outputs(captured):
        return False
    widths = [_last(captured, node) for node in _results(captured)]
    return bool(widths) and words not in widths and all(w == width for w in widths)


def _results(captured: Trace) -> list[fx.Node]:
    nodes = captured.output.all_input_nodes
    return [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].is_floating_point()]


def _last(captured: Trace, node: fx.Node) -> object:
    shape = captured.shape(node)
    return shape[-1] if shape else None


def _width(captured: Trace, ids: fx.Node) -> object:
    """How wide the table is that the ids are looked up in."""
    for node in captured.nodes:
        if node.target is aten.embedding.default and arguments(node)[1] is ids:
            return captured.shape(arguments(node)[0])[1]
    return None
