"""`adopt`: a folder of another exporter becomes one of ours: read, run, proved against itself, given a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfinfer.adopt.decoder import PROVED as PROVED_TOKENS
from tfinfer.adopt.decoder import decoder_fields, prove_decoder
from tfinfer.adopt.description import Description, describe
from tfinfer.adopt.encoder import PROVED, encoder_fields, prove_encoder_folder
from tfinfer.adopt.layout import GraphFile, choose_graph, read_graph_file
from tfinfer.adopt.signature import Signature
from tfinfer.errors import IncompatibleModelError, InputError, ManifestError, TargetError
from tfinfer.integrity import check_graph, sha256
from tfinfer.manifest import (
    ADOPTED,
    FILE_NAME,
    FORMAT_VERSION,
    AttentionSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    ProofSpec,
    SourceSpec,
    load_manifest,
)  # fmt: skip
from tfinfer.proof import golden
from tfinfer.proof.prove import Verdict
from tfinfer.session.ort import onnxruntime
from tfinfer.session.providers import open_session
from tfinfer.session.threads import thread_count
from tfinfer.version import __version__

# Operators that round activations to a few bits, which turns a difference in the last digit into one of a whole step.
ROUNDING = {"MatMulNBits", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention",
            "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QuantizeLinear", "QMoE"}  # fmt: skip
ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Adopted:
    """What came of it: the manifest that was written, and what its proof measured (None: asked for without one)."""

    folder: Path
    manifest: Manifest
    verdict: Verdict | None


def adopt(
    folder: str | os.PathLike[str],
    *,
    file: str | None = None,
    max_length: int | None = None,
    proof: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda stage: None,
) -> Adopted:
    """Make a manifest for a folder of the onnxruntime-genai model builder, of optimum, or in transformers.js' layout.

    `tfinfer.json`, `golden.npz` and, where the chat template lies inside another file, `chat_template.jinja` are
    written into the folder, the manifest last; nothing else there is changed. Afterwards `tfinfer.load` opens it.

    Args:
        file: which graph is meant, where there are several: its name, or its path inside the folder.
        max_length: the longest sequence; by default what genai_config.json or config.json says.
        proof: compare cached with uncached passes (a decoder), padded batches with single texts (an encoder).
        overwrite: adopt a folder again.

    Raises IncompatibleModelError for a graph that cannot be served, with a list of the inputs in question, or whose
    proof fails; InputError for what has to be said; UnsafeModelError, CorruptModelError, ManifestError for its files;
    TargetError where the folder cannot be written. Then nothing is.
    """
    path = Path(folder)
    _check_folder(path, overwrite)
    if max_length is not None and (isinstance(max_length, bool) or max_length < 2):
        raise InputError(f"expected max_length to be a whole number of at least 2, got {max_length!r}")
    progress("read the files")
    graph = read_graph_file(path, choose_graph(path, file))
    said = describe(path)
    progress("open the graph")
    with _written(path) as made:
        for name, content in said.extra.items():
            (made / name).write_text(content, encoding="utf-8")
        files = _hashed(path, graph, said, made)
        draft = _draft(path, graph, said, files, max_length)
        manifest, verdict = draft, None
        if proof:
            prove = prove_decoder if draft.kind == "decoder" else prove_encoder_folder
            manifest, verdict = prove(draft, path, made / golden.FILE_NAME, progress)
            _insist(verdict)
            files[golden.FILE_NAME] = _file(made / golden.FILE_NAME)
        manifest = _sealed(manifest, files, verdict)
        (made / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Adopted(path, manifest, verdict)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise ManifestError(f"{folder}: expected a folder that another exporter made; there is no such folder")
    if not (folder / FILE_NAME).is_file():
        return
    if load_manifest(folder).source.kind != ADOPTED:
        raise InputError(f"{folder}: has a {FILE_NAME} of an export already, so it needs no adoption: load it as it is")
    if not overwrite:
        raise InputError(f"{folder}: was adopted already: load it, or give --overwrite to adopt it again")


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files move into `folder` when the block ends, and vanish when it fails."""
    made = folder / f".tfinfer-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        made.mkdir()
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written: {error.strerror or error}; adopt a copy of it") from error
    try:
        yield made
        (folder / FILE_NAME).unlink(missing_ok=True)  # a folder with a manifest is whole
        for path in sorted(made.iterdir(), key=lambda path: path.name == FILE_NAME):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise (
            error if isinstance(error, TargetError) else TargetError(f"{folder}: cannot be written: {error}")
        ) from error
    finally:
        for path in made.iterdir():
            path.unlink()
        made.rmdir()


def _file(path: Path) -> FileSpec:
    return FileSpec(sha256(path), path.stat().st_size)


def _hashed(folder: Path, graph: GraphFile, said: Description, made: Path) -> dict[str, FileSpec]:
    """Every file that the manifest names, as it is now."""
    text = (said.text.tokenizer, said.text.chat_template, said.text.generation_config)
    names = dict.fromkeys([graph.name, *graph.weights, *(name for name in text if name and name not in said.extra)])
    return {name: _file(folder / name) for name in names} | {name: _file(made / name) for name in said.extra}


def _draft(
    folder: Path, graph: GraphFile, said: Description, files: dict[str, FileSpec], asked: int | None
) -> Manifest:
    """The manifest before its proof."""
    check_graph((folder / graph.name).read_bytes(), graph.name, files)
    session = open_session(folder / graph.name, device="cpu", threads=thread_count(None)).session
    signature = Signature.of(session)
    read = decoder_fields if signature.caches else encoder_fields
    fields: dict[str, Any] = read(session, signature, said)
    outputs = fields.pop("outputs", tuple(signature.outputs.values()))
    longest = asked or said.max_length
    if longest is None:
        raise InputError(f"{folder}: no file says the longest length: give --max-length N")
    if asked is not None and said.max_length is not None and asked > said.max_length:
        raise InputError(f"max_length {asked} is longer than the model's own longest length, {said.max_length}")
    versions = {"tfinfer": __version__, "onnxruntime": str(onnxruntime().__version__)}
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = "decoder" if fields["kind"] == "decoder" else "encoder"
    return Manifest(
        format_version=FORMAT_VERSION,
        graphs={name: GraphSpec(graph.name, graph.opset, tuple(signature.inputs.values()), outputs)},
        max_length=longest,
        flavor=ADOPTED,
        attention=tuple(AttentionSpec(op, "as written", 1) for op in ATTENTION if op in graph.operators),
        token_ids=said.token_ids,
        text=said.text,
        requires={"onnxruntime": "1.24"},
        source=SourceSpec(ADOPTED, folder.resolve().name, versions, created),
        files={**files, golden.FILE_NAME: FileSpec("", 0)},
        proof=ProofSpec("cpu", (), 0, strict=not graph.operators & ROUNDING),
        **fields,
    )


def _insist(verdict: Verdict) -> None:
    if not verdict.passed:
        told = "\n".join(verdict.lines())
        raise IncompatibleModelError(
            "the graph does not give the same with its cache as without, or in a batch as alone; nothing was written "
            f"(--unproved adopts it nevertheless)\n{told}"
        )


def _sealed(manifest: Manifest, files: dict[str, FileSpec], verdict: Verdict | None) -> Manifest:
    """The manifest with its files and with what its proof measured."""
    strict, limit = manifest.proof.strict, PROVED_TOKENS if manifest.kind == "decoder" else PROVED
    if verdict is None:
        proof = ProofSpec("cpu", (), 0, None, "not proved: adopted without a proof, as asked for", strict)
    else:
        longer = f"lengths above {limit} were not run" if manifest.max_length > limit else ""
        greedy = verdict.greedy.identical if verdict.greedy else 0
        proof = ProofSpec(verdict.device, verdict.measured(), greedy, golden.FILE_NAME, longer, strict)
    return dataclasses.replace(manifest, files=dict(sorted(files.items())), proof=proof)
