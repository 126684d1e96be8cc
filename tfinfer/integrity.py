"""Whether the files of a folder are the ones that were exported, and reach nowhere else. Parses what it must itself.

A model folder is untrusted data: it may make loading fail, never reach outside itself. onnxruntime is no sandbox,
so the graph's references to other files are read here, before it sees the graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tfinfer.errors import CorruptModelError, UnsafeModelError
from tfinfer.manifest import FileSpec, Manifest, is_plain_name

DOMAINS = {"", "ai.onnx", "com.microsoft"}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(manifest: Manifest) -> str:
    """The same for folders whose decoders compute the same and whose caches hold the same: a SHA-256.

    Of the layout of the cache, and of every file but those that turn text into ids, prove, or are other graphs.
    """
    text = manifest.text
    others = {text.tokenizer, text.chat_template, text.generation_config, manifest.proof.golden}
    others |= {graph.file for name, graph in manifest.graphs.items() if name != "decoder"}
    files = sorted((name, file.sha256) for name, file in manifest.files.items() if name not in others)
    layout = [[dataclasses.asdict(spec) for spec in specs] for specs in (manifest.cache, manifest.states)]
    told = json.dumps([files, layout, manifest.keeps_window, manifest.cache_mode])
    return hashlib.sha256(told.encode()).hexdigest()


def check_files(folder: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Every file is there, of its size and hash, and no link. Raises CorruptModelError or UnsafeModelError."""
    for name, expected in manifest.files.items():
        check_parents(folder, name)
        _check_file(folder / name, expected, hashes)
    for graph in manifest.graphs.values():
        check_graph((folder / graph.file).read_bytes(), graph.file, manifest.files)


def check_parents(folder: Path, name: str) -> None:
    """A file's own folders inside `folder` are folders. Raises UnsafeModelError for a link, which leads elsewhere."""
    for inner in PurePosixPath(name).parents:
        if inner != PurePosixPath(".") and (folder / inner).is_symlink():
            raise UnsafeModelError(f"{folder / inner}: expected a folder inside the folder, found a link")


def _check_file(path: Path, expected: FileSpec, hashes: bool) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise CorruptModelError(f"{path}: is missing; export the folder again") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeModelError(f"{path}: expected a plain file inside the folder, found a link or something else")
    if status.st_size != expected.bytes:
        raise CorruptModelError(
            f"{path}: expected {expected.bytes} bytes, found {status.st_size}; it was cut or changed"
        )
    if hashes and (found := sha256(path)) != expected.sha256:
        raise CorruptModelError(f"{path}: expected SHA-256 {expected.sha256}, found {found}; it was changed")


def check_graph(model: bytes, name: str, files: dict[str, FileSpec]) -> None:
    """The graph names no file that is not the folder's own, and no operators but ONNX's and onnxruntime's."""
    try:
        for location, offset, length in external_data(memoryview(model)):
            place = str(PurePosixPath(name).parent / location)  # beside the graph
            if not is_plain_name(location) or place not in files:
                raise UnsafeModelError(f"{name}: refers to {location!r}, which is no file of this folder")
            if offset < 0 or length < 0 or offset + length > files[place].bytes:
                raise CorruptModelError(
                    f"{name}: refers to bytes {offset} to {offset + length} of {location}, which has fewer"
                )
    except (IndexError, ValueError, RecursionError) as error:
        raise CorruptModelError(f"{name}: is no ONNX model: {error}") from error


# -- as much of the ONNX protobuf as is needed (onnx.proto3) -----------------------------------------------------
Field = tuple[int, memoryview | int]


def fields(data: memoryview) -> Iterator[Field]:
    """(number, value) of each field of a message: bytes of the length-delimited ones, ints of the others."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than the file")
            yield key >> 3, data[at : at + size]
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


# which fields of a message hold which messages
NESTED = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def external_data(data: memoryview, kind: str = "model") -> Iterator[tuple[str, int, int]]:
    """(location, offset, length) of every tensor that is stored outside the graph, wherever it is nested."""
    entries: dict[str, str] = {}
    for number, value in fields(data):
        if isinstance(value, int):
            continue
        if kind == "tensor" and number == 13:
            entry = {n: bytes(v).decode() for n, v in fields(value) if not isinstance(v, int)}
            entries[entry.get(1, "")] = entry.get(2, "")
        elif kind == "node" and number == 7 and bytes(value).decode() not in DOMAINS:
            raise UnsafeModelError(f"the graph uses operators of the unknown domain {bytes(value).decode()!r}")
        elif (inner := NESTED.get(kind, {}).get(number)) is not None:
            yield from external_data(value, inner)
    if entries:
        yield entries.get("location", ""), int(entries.get("offset", 0)), int(entries.get("length", 0))
