"""A decoder of another exporter: its part of the manifest, and the proof that cached and uncached are the same.

What is expected of a case comes from the graph itself, in one pass over an empty cache: no past plays a part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.adopt.description import Description
from tfinfer.adopt.probing import Found, probe
from tfinfer.adopt.signature import Signature, decoder_parts
from tfinfer.manifest import DecoderRoles, Manifest
from tfinfer.proof import golden
from tfinfer.proof.cases import Case, grid
from tfinfer.proof.prove import GREEDY_TOKENS, Verdict, compared_as, prove
from tfinfer.session.choose import open_decoder

PROVED = 256  # the longest sequence of the proof: one pass over it is the whole pass (see PREFILL_CHUNK)
Progress = Callable[[str], None]


def decoder_fields(session: Any, signature: Signature, said: Description) -> dict[str, Any]:
    """What the manifest says of a decoder's graph, by its signature and by running it."""
    parts = decoder_parts(signature, said.names)
    found: Found = probe(session, parts, said)
    return {
        "kind": "decoder",
        "roles": DecoderRoles(
            parts.input_ids, parts.attention_mask, parts.logits, parts.position_ids, parts.logits_to_keep,
            use_cache_branch=parts.use_cache_branch,
        ),
        "cache": found.cache,
        "cache_mode": found.cache_mode,
        "vocab_size": said.vocab_size or found.num_logits,
        "num_logits": found.num_logits,
        "all_rows": found.all_rows,
        "dtype": found.cache[0].dtype,
    }  # fmt: skip


def prove_decoder(draft: Manifest, folder: Path, made: Path, progress: Progress) -> tuple[Manifest, Verdict]:
    """Prove a draft; the golden file is written to `made`. Returns the manifest that holds, and its verdict.

    A graph whose cache takes no several positions at once behind others is proved as one that takes one at a time.
    """
    decoder = open_decoder(draft, folder)
    try:
        expected = _expected(decoder, progress)
        golden.save(made, expected)
        verdict = prove(decoder, compared_as(draft), expected, progress)
        if not verdict.passed and not draft.appends_one:
            slower = dataclasses.replace(draft, appends_one=True)
            decoder.manifest = slower
            again = prove(decoder, compared_as(draft), expected, progress)
            if again.passed:
                return slower, again
        return draft, verdict
    finally:
        decoder.close()


def _expected(decoder: Any, progress: Progress) -> golden.Golden:
    manifest = decoder.manifest
    vocabulary = min(manifest.vocab_size, manifest.num_logits)
    cases = grid(vocabulary, min(manifest.max_length, PROVED))
    vectors = []
    for case in cases:
        progress(f"the whole pass: {case.name}")
        vectors.append(_rows(decoder, case))
    prompt = np.random.default_rng(1).integers(0, vocabulary, min(12, max(1, manifest.max_length // 4)))
    progress("the whole pass: greedy tokens")
    tokens: list[int] = []
    for _ in range(min(GREEDY_TOKENS, manifest.max_length - len(prompt))):
        tokens.append(int(whole(decoder, np.concatenate([prompt, np.array(tokens, np.int64)]), 1)[-1].argmax()))
    return golden.Golden(cases, vectors, prompt, np.array(tokens, np.int64))


def _rows(decoder: Any, case: Case) -> golden.Vectors:
    """The logits of a case's rows. A graph that gives the last row alone needs a pass for each, so only what comes."""
    if not decoder.manifest.all_rows:
        last = {row.call: row for row in case.rows if case.calls[row.call].op == "prefill"}
        wanted = [row for row in case.rows if case.calls[row.call].op == "step" or last[row.call] == row]
        return {row: whole(decoder, case.sequences[row.sequence][: row.position + 1], 1)[-1] for row in wanted}
    used = {row.sequence for row in case.rows}
    logits = {number: whole(decoder, case.sequences[number], len(case.sequences[number])) for number in used}
    return {row: logits[row.sequence][row.position] for row in case.rows}


def whole(decoder: Any, ids: Any, keep: int) -> Any:
    """The logits of the last `keep` ids, (keep, num_logits), in one pass over an empty cache."""
    cache = decoder.open_cache(1, len(ids))
    try:
        return decoder.prefill(cache, cache.acquire(), ids, keep=keep)
    finally:
        cache.close()
