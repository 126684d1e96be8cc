"""Run the cases of a proof on a decoder and compare. Used when a folder is made, and by `tfinfer verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import CorruptModelError, InputError
from tfinfer.manifest import ADOPTED, Manifest, ProofCase
from tfinfer.proof.cases import Case, open_cache, run
from tfinfer.proof.compare import Difference, tie
from tfinfer.proof.golden import Golden, Vectors, load
from tfinfer.proof.runs import Run, prove_runs
from tfinfer.proof.runs import load as load_runs

Ids = npt.NDArray[np.int64]
GREEDY_TOKENS = 64
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Greedy:
    """How many greedy tokens are PyTorch's; `ties` were so close that either choice is right."""

    compared: int
    identical: int
    ties: int

    @property
    def passed(self) -> bool:
        return self.compared > 0 and self.identical + self.ties == self.compared


@dataclass(frozen=True)
class Verdict:
    """What a proof measured on one device."""

    device: str
    dtype: str
    cases: tuple[Difference, ...]
    greedy: Greedy | None  # None for an encoder, which generates nothing
    reference: str = "PyTorch"  # whose tokens are expected

    @property
    def passed(self) -> bool:
        greedy = self.greedy is None or self.greedy.passed or self.dtype != "float32"
        return all(case.passed for case in self.cases) and greedy

    @property
    def agreement(self) -> float:
        """Share of all rows whose first choice is that of PyTorch."""
        return sum(case.agreeing for case in self.cases) / max(1, sum(case.rows for case in self.cases))

    def measured(self) -> tuple[ProofCase, ...]:
        return tuple(ProofCase(c.name, c.worst, c.allowed, c.measure) for c in self.cases)

    def lines(self) -> list[str]:
        """One line for each case, for people."""
        g = self.greedy
        if g is None:
            return list(map(str, self.cases))
        ties = f" ({g.ties} ties)" if g.ties else ""
        verdict = "ok" if g.passed else "FAILED" if self.dtype == "float32" else "reported"
        return [
            *map(str, self.cases),
            f"greedy: {g.identical} of {g.compared} tokens are {self.reference}'s{ties}: {verdict}",
        ]


def compare_case(decoder: Any, case: Case, expected: Vectors, dtype: str, all_rows: bool) -> Difference:
    """Run one case; every expected row must come."""
    difference = Difference(dtype, case.name)
    for row, logits in run(decoder, case, all_rows):
        if row in expected:
            difference.add(expected[row], logits, f"position {row.position} of sequence {row.sequence}")
    return difference


def compare_greedy(decoder: Any, prompt: Ids, tokens: Ids, source: Ids | None = None) -> Greedy:
    """Continue `prompt` greedily along PyTorch's `tokens`, each choice compared with the same past behind it."""
    cache = open_cache(decoder, 1, len(prompt) + len(tokens), [] if source is None else [source])
    try:
        slot = cache.acquire()
        if source is not None:
            decoder.encode(cache, slot, source)
        logits = decoder.prefill(cache, slot, prompt)[-1]
        identical = ties = 0
        for at, token in enumerate(tokens.tolist()):
            choice = int(logits.argmax())
            identical += choice == token
            ties += choice != token and tie(logits, choice, token)
            if at + 1 < len(tokens):
                logits = decoder.step(cache, [slot], [token])[0]
        return Greedy(len(tokens), identical, ties)
    finally:
        cache.close()


def prove(decoder: Any, dtype: str, golden: Golden, progress: Progress = lambda name: None) -> Verdict:
    """Run every case on `decoder`, an open `Decoder`, and compare."""
    all_rows = decoder.manifest.all_rows
    differences = []
    for case, vectors in zip(golden.cases, golden.expected):
        progress(case.name)
        differences.append(compare_case(decoder, case, vectors, dtype, all_rows))
    differences += prove_prompts(decoder, dtype, golden.brief(), progress)
    progress("greedy tokens")
    greedy = compare_greedy(decoder, golden.prompt, golden.tokens, golden.source)
    return Verdict(decoder.device, dtype, tuple(differences), greedy, reference_of(decoder.manifest))


def prove_prompts(decoder: Any, dtype: str, golden: Golden, progress: Progress) -> list[Difference]:
    """The cases once more with every prompt read by the graph that is there for long ones, if there is one."""
    if decoder.prompts is None:
        return []
    differences = []
    with decoder.prompts.always():
        if decoder.prompts.session is None:
            raise CorruptModelError(f"the graph that reads prompts does not open: {decoder.prompts.why_not}")
        for case, vectors in zip(golden.cases, golden.expected):
            if not any(call.op == "prefill" and len(call.ids) > 1 for call in case.calls):
                continue
            named = replace(case, name=f"{case.name}, products in float32")
            progress(named.name)
            differences.append(compare_case(decoder, named, vectors, dtype, all_rows=False))
    return differences


def reference_of(manifest: Manifest) -> str:
    """Whose results a folder is compared with: an adopted one's are its own graph's, in a pass without a cache."""
    return "the whole pass" if manifest.source.kind == ADOPTED else "PyTorch"


def compared_as(manifest: Manifest) -> str:
    """The dtype by whose measure a folder is proved: that of its weights or its cache where these are of a few bits."""
    if manifest.weights is not None:
        return f"int{manifest.weights.bits}"
    if manifest.small_cache is not None:
        return f"int{manifest.small_cache.bits} cache"
    return manifest.dtype if manifest.proof.strict or manifest.dtype != "float32" else "float16"


def prove_encoder(encoder: Any, dtype: str, runs: Sequence[Run], progress: Progress = lambda name: None) -> Verdict:
    """Make every run on `encoder`, an open `Encoder`, and compare."""
    return Verdict(encoder.device, dtype, prove_runs(encoder, dtype, runs, progress), None)


def open_session(
    manifest: Manifest,
    folder: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    cuda_graph: bool | None = False,
) -> Any:
    """What the proof of a folder runs on: a Decoder, an EncoderDecoder or an Encoder."""
    if manifest.kind == "encoder":
        if cuda_graph:
            raise InputError("cuda_graph is for the steps of a decoder, this folder is an encoder: leave it out")
        from tfinfer.session.encoder import Encoder

        return Encoder(manifest, folder, device=device, threads=threads)
    from tfinfer.session.choose import open_decoder

    return open_decoder(manifest, folder, device=device, threads=threads, cuda_graph=cuda_graph)


def verify_folder(session: Any, folder: Path, progress: Progress = lambda name: None) -> Verdict:
    """Prove a folder again from its golden file, without torch. Raises CorruptModelError where it has none."""
    manifest = session.manifest
    if manifest.proof.golden is None:
        raise CorruptModelError(f"{folder}: has no golden file, so it cannot prove itself: export it again")
    golden = folder / manifest.proof.golden
    if manifest.kind == "encoder":
        return prove_encoder(session, compared_as(manifest), load_runs(golden), progress)
    return prove(session, compared_as(manifest), load(golden), progress)
