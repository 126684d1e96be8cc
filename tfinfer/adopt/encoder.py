"""An encoder of another exporter: its part of the manifest, and the proof that padding and neighbours change nothing.

What is expected of a text comes from the graph itself, from a pass over that text alone, without padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.adopt.description import Description
from tfinfer.adopt.signature import Signature, listed
from tfinfer.errors import IncompatibleModelError, InputError, TfinferError
from tfinfer.manifest import EncoderRoles, Manifest, TensorSpec
from tfinfer.proof import runs
from tfinfer.proof.prove import Verdict, compared_as, prove_encoder
from tfinfer.proof.runs import Run
from tfinfer.session.encoder import Encoder

KNOWN = ("input_ids", "attention_mask", "token_type_ids")
HIDDEN = ("last_hidden_state", "hidden_states", "token_embeddings")
POOLED = ("sentence_embedding", "pooler_output", "pooled")
NEW = 5  # ids of a trial
PROVED = 512  # the longest text of the proof
PLACES = 4  # some models count places that hold nothing in front of the first
RAGGED = ((7, 3), (1, 12, 29), (16, 16))
Progress = Callable[[str], None]


def encoder_fields(session: Any, signature: Signature, said: Description) -> dict[str, Any]:
    """What the manifest says of an encoder's graph. Raises IncompatibleModelError that lists other inputs."""
    known = [s for s in signature.inputs.values() if s.name in KNOWN and s.dtype == "int64" and len(s.shape) == 2]
    if len(known) != len(signature.inputs) or "input_ids" not in signature.inputs:
        odd = [listed(spec) for spec in signature.inputs.values() if spec not in known]
        raise IncompatibleModelError(
            f"the graph takes no past, and as an encoder it has inputs that no part is known for: "
            f"{', '.join(odd) or 'no input_ids'}; expected {', '.join(KNOWN)} as int64 (batch, seq)"
        )
    if said.vocab_size is None:
        raise InputError("neither a config.json nor a genai_config.json beside the graph says its vocab_size")
    outputs = _sized(session, signature, known)
    hidden = _part(outputs, HIDDEN, ("batch", "seq"))
    taken = {name: name if name in signature.inputs else None for name in KNOWN}
    narrow = {spec.dtype for spec in outputs} - {"float32"}
    return {
        "kind": "encoder",
        "encoder": EncoderRoles(**taken, hidden_states=hidden, pooled=_part(outputs, POOLED, ("batch",))),
        "outputs": tuple(outputs),
        "roles": None,
        "cache": (),
        "vocab_size": said.vocab_size,
        "num_logits": 0,
        "all_rows": True,
        "dtype": "float16" if "float16" in narrow else "float32",
        "pooling": said.pooling,
    }


def _sized(session: Any, signature: Signature, known: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The outputs with their axes as running shows them."""
    shapes = []
    for batch, length in ((2, NEW), (3, NEW + 2)):
        fillers = {"attention_mask": 1}
        feeds = {s.name: np.full((batch, length), fillers.get(s.name, 0), np.int64) for s in known}
        try:
            shapes.append([array.shape for array in session.run(list(signature.outputs), feeds)])
        except Exception as error:  # onnxruntime's classes have no common root
            raise IncompatibleModelError(f"the graph does not run on {batch} x {length} ids: {error}") from error
    found = []
    for spec, one, other in zip(signature.outputs.values(), *shapes):
        named = {(2, 3): "batch", (NEW, NEW + 2): "seq"}
        axes = tuple(a if a == b else named.get((a, b), f"axis_{i}") for i, (a, b) in enumerate(zip(one, other)))
        found.append(dataclasses.replace(spec, shape=axes))
    return found


def _part(outputs: Sequence[TensorSpec], known: Sequence[str], lead: tuple[str, ...]) -> str | None:
    """The output of a known name with the right axes; of hidden states, else the only one that has them."""
    fitting = [s.name for s in outputs if s.shape[:-1] == lead and isinstance(s.shape[-1], int)]
    named = next((name for name in known if name in fitting), None)
    return named or (fitting[0] if len(lead) == 2 and len(fitting) == 1 else None)


def prove_encoder_folder(draft: Manifest, folder: Path, made: Path, progress: Progress) -> tuple[Manifest, Verdict]:
    """Prove a draft; the golden file is written to `made`. Returns the manifest with the longest length that runs."""
    encoder = Encoder(draft, folder)
    try:
        progress("the longest text")
        longest = _longest(encoder, draft.max_length)
        manifest = dataclasses.replace(draft, max_length=longest)
        expected = _runs(encoder, manifest, progress)
        runs.save(made, expected)
        return manifest, prove_encoder(encoder, compared_as(draft), expected, progress)
    finally:
        encoder.close()


def _longest(encoder: Encoder, said: int) -> int:
    """The longest text that runs, at most a few places shorter than what the files say; not tried where it is long."""
    if said > PROVED + PLACES:
        return said
    for length in range(said, max(0, said - PLACES - 1), -1):
        try:
            encoder.run({"input_ids": np.zeros((1, length), np.int64)})
            return length
        except TfinferError:
            continue
    raise IncompatibleModelError(
        f"the graph does not run on {said} ids, nor on up to {PLACES} fewer: give --max-length"
    )


def _runs(encoder: Encoder, manifest: Manifest, progress: Progress) -> list[Run]:
    """Batches of texts of different lengths, each expected as it is alone."""
    rng, longest = np.random.default_rng(0), min(manifest.max_length, PROVED)
    made = []
    for lengths in (*RAGGED, (longest, max(1, longest // 3))):
        cut = [min(length, longest) for length in lengths]
        if manifest.encoder is not None and manifest.encoder.attention_mask is None:
            cut = [cut[0]] * len(cut)  # without a mask only texts of one length run together
        name = f"texts of {', '.join(map(str, cut))} tokens, each as alone"
        progress(f"alone: {name}")
        made.append(_run(encoder, name, [rng.integers(0, manifest.vocab_size, n) for n in cut]))
    return made


def _run(encoder: Encoder, name: str, texts: Sequence[Any]) -> Run:
    widest = max(map(len, texts))
    ids, mask = np.zeros((len(texts), widest), np.int64), np.zeros((len(texts), widest), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    alone = [encoder.run({"input_ids": text[None]}) for text in texts]
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if encoder.roles.attention_mask else {})
    return Run(name, inputs, {spec.name: _stacked(spec, alone, widest) for spec in encoder.graph.outputs})


def _stacked(spec: TensorSpec, alone: Sequence[Any], widest: int) -> Any:
    """What each text gives alone, as rows of one array, with NaN where the others have padding."""
    rows = []
    for outputs in alone:
        array = np.asarray(outputs[spec.name][0], np.float32)
        padding = [(0, widest - size if axis == "seq" else 0) for axis, size in zip(spec.shape[1:], array.shape)]
        rows.append(np.pad(array, padding, constant_values=np.nan))
    return np.stack(rows)
