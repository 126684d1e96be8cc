"""One request on an open session, timed phase by phase, and what it computed. What `tfinfer tune` compares."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import Manifest
from tfinfer.measure.workload import PROMPT_LENGTH, plan
from tfinfer.proof.cases import open_cache
from tfinfer.proof.compare import Difference
from tfinfer.proof.prove import compared_as
from tfinfer.session.choose import open_decoder
from tfinfer.session.encoder import Encoder
from tfinfer.session.settings import OnCpu

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """The request: a prompt of random ids (of an encoder-decoder the source), and how many tokens to make."""

    ids: Ids
    tokens: int  # 0 for an encoder

    def __str__(self) -> str:
        made = f", {self.tokens} new" if self.tokens else ""
        return f"{len(self.ids)} tokens of prompt{made}"


@dataclass(frozen=True)
class Trial:
    """Seconds of each phase, of the whole request, and the result: tokens, or vectors of an encoder."""

    phases: dict[str, float]
    request: float
    result: Any


def work_for(manifest: Manifest, prompt_length: int | None, new_tokens: int | None, most_tokens: int) -> Work:
    """The request that fits; None is a length that may shrink. Raises InputError or LengthError for what was asked."""
    if manifest.kind == "encoder":
        if new_tokens is not None:
            raise InputError("tokens: an encoder makes none, so leave this out")
        return Work(_random(_fitting(prompt_length, manifest.max_length), manifest.vocab_size), 0)
    if manifest.kind == "encoder-decoder":
        start = len(manifest.token_ids.decoder_start)
        made = plan(manifest.max_length, prompt_length=start, new_tokens=new_tokens)
        ids = _random(_fitting(prompt_length, manifest.max_source_length), manifest.source_vocab_size)
    else:
        made = plan(manifest.max_length, prompt_length=prompt_length, new_tokens=new_tokens)
        ids = _random(made.prompt_length, min(manifest.vocab_size, manifest.num_logits))
    return Work(ids, min(made.new_tokens, most_tokens) if new_tokens is None else new_tokens)


def _fitting(asked: int | None, longest: int) -> int:
    if asked is None:
        return min(PROMPT_LENGTH, longest)
    if asked < 1:
        raise InputError(f"prompt: expected a whole number of at least 1, got {asked}")
    if asked > longest:
        raise LengthError(f"a prompt of {asked} tokens would pass the model's longest length, {longest}")
    return asked


def _random(length: int, vocabulary: int) -> Ids:
    return np.random.default_rng(0).integers(0, vocabulary, length)


def open_for(manifest: Manifest, folder: Path, how: OnCpu) -> Any:
    """The session of a folder, opened on the CPU in one way. Raises InputError for an encoder that takes no texts."""
    if manifest.kind != "encoder":
        return open_decoder(manifest, folder, how=how)
    encoder = Encoder(manifest, folder, how=how)
    encoder.check_takes_texts()
    return encoder


def request(session: Any, work: Work) -> Trial:
    """Serve the request once."""
    return _encode(session, work) if isinstance(session, Encoder) else _generate(session, work)


def _encode(encoder: Encoder, work: Work) -> Trial:
    output = encoder.roles.hidden_states or encoder.roles.pooled or encoder.graph.outputs[0].name
    ids = work.ids[None]
    started = time.perf_counter()
    found = encoder.encode(ids, output=output)
    seconds = time.perf_counter() - started
    return Trial({"encode": seconds}, seconds, found)


def _generate(decoder: Any, work: Work) -> Trial:
    """Greedily; the request is the prefill and as many median steps as tokens are left to make."""
    has_source = decoder.manifest.kind == "encoder-decoder"
    prompt = np.array(decoder.manifest.token_ids.decoder_start) if has_source else work.ids
    cache = open_cache(decoder, 1, len(prompt) + work.tokens, [work.ids] if has_source else [])
    try:
        slot = cache.acquire()
        started = time.perf_counter()
        if has_source:
            decoder.encode(cache, slot, work.ids)
        logits = decoder.prefill(cache, slot, prompt)[-1]
        prefill = time.perf_counter() - started
        tokens, steps = [int(logits.argmax())], []
        while len(tokens) < work.tokens:
            started = time.perf_counter()
            logits = decoder.step(cache, [slot], tokens[-1:])[0]
            steps.append(time.perf_counter() - started)
            tokens.append(int(logits.argmax()))
    finally:
        cache.close()
    step = float(np.median(steps))
    return Trial({"prefill": prefill, "step": step}, prefill + step * len(steps), tuple(tokens))


def same_result(manifest: Manifest, one: Trial, other: Trial) -> bool:
    """Whether both made the same tokens; of an encoder, vectors as close as its proof wants them."""
    if manifest.kind != "encoder":
        return bool(one.result == other.result)
    difference = Difference(compared_as(manifest), "vectors")
    width = one.result.shape[-1]
    for row, (expected, got) in enumerate(zip(one.result.reshape(-1, width), other.result.reshape(-1, width))):
        difference.add(expected.astype(np.float32), got.astype(np.float32), f"row {row}")
    return difference.passed
