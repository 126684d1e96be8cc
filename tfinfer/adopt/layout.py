"""Which files of a folder that another exporter made are meant, and what its graph file refers to. Opens no graph.

The folder is untrusted: a file is a plain file inside it, never a link, and JSON is read up to a size.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tfinfer.errors import CorruptModelError, InputError, ManifestError, UnsafeModelError
from tfinfer.integrity import NESTED, check_parents, external_data, fields
from tfinfer.manifest import is_inner_path, is_plain_name

GENAI_CONFIG = "genai_config.json"
PREFERRED = ("model.onnx", "decoder_model_merged.onnx")  # what is meant where a folder has several and nobody says
MOST_JSON = 64 << 20


@dataclass(frozen=True)
class GraphFile:
    """What the file of a graph says: operators, opsets by domain, and the files beside it with its weights."""

    name: str
    operators: frozenset[str]
    opset: dict[str, int]
    weights: tuple[str, ...]


def inner_file(folder: Path, name: str) -> Path:
    """The path of a file inside the folder. Raises UnsafeModelError for a link or a name that leads elsewhere."""
    if not is_inner_path(name):
        raise UnsafeModelError(f"{folder}: refers to {name!r}, which is no file of this folder")
    check_parents(folder, name)
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise ManifestError(f"{path}: is missing") from error
    if not stat.S_ISREG(mode):
        raise UnsafeModelError(
            f"{path}: expected a plain file inside the folder, found a link or something else: copy the folder with "
            "what its links stand for (cp -rL) and adopt the copy"
        )
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object of a JSON file, empty where there is no such file. Raises ManifestError for anything else in it."""
    if not (folder / name).is_symlink() and not (folder / name).exists():
        return {}
    path = inner_file(folder, name)
    if path.stat().st_size > MOST_JSON:
        raise ManifestError(f"{path}: larger than {MOST_JSON} bytes, which no such file is")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path}: expected an object, got {type(data).__name__}")
    return data


def choose_graph(folder: Path, asked: str | None) -> str:
    """The graph that is meant, relative to the folder. Raises InputError where that is not clear."""
    there = sorted(p.relative_to(folder).as_posix() for p in (*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")))
    if asked is not None:
        fitting = [n for n in there if n == asked] or [n for n in there if PurePosixPath(n).name == asked]
        if len(fitting) != 1:
            raise InputError(f"{folder}: expected --file to name one of {_listed(there)}; got {asked!r}")
        return fitting[0]
    decoder = _part(_part(read_json(folder, GENAI_CONFIG), "model"), "decoder")
    if isinstance(named := decoder.get("filename"), str):
        inner_file(folder, named)
        return named
    names = {PurePosixPath(name).name for name in there}
    if any(name.startswith("encoder_model") for name in names) and any(n.startswith("decoder_") for n in names):
        raise InputError(
            f"{folder}: {_listed(there)} are the halves of an encoder-decoder, which cannot be adopted: export its "
            "checkpoint with `tfinfer export`"
        )
    fitting = next(
        ([n for n in there if PurePosixPath(n).name == known] for known in PREFERRED if known in names), there
    )
    if len(fitting) != 1:
        raise InputError(f"{folder}: expected one graph, found {_listed(there)}: choose one with --file")
    return fitting[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no .onnx file in it or in its folder onnx"


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}


def read_graph_file(folder: Path, name: str) -> GraphFile:
    """What a graph file says. Raises CorruptModelError or UnsafeModelError; the files it names are looked at too."""
    data = memoryview(inner_file(folder, name).read_bytes())
    try:
        opset = dict(map(_opset, (v for n, v in fields(data) if n == 8 and not isinstance(v, int))))
        operators = frozenset(_operators(data))
        locations = dict.fromkeys(location for location, _, _ in external_data(data))
    except (IndexError, ValueError, RecursionError) as error:
        raise CorruptModelError(f"{folder / name}: is no ONNX model: {error}") from error
    beside = PurePosixPath(name).parent
    for location in locations:
        if not is_plain_name(location):
            raise UnsafeModelError(f"{folder / name}: refers to {location!r}, which is no file beside it")
        inner_file(folder, str(beside / location))
    return GraphFile(name, operators, opset, tuple(str(beside / location) for location in locations))


def _opset(entry: memoryview) -> tuple[str, int]:
    found = dict(fields(entry))
    domain, version = found.get(1, memoryview(b"")), found.get(2, 0)
    return (bytes(domain).decode() if isinstance(domain, memoryview) else ""), (
        version if isinstance(version, int) else 0
    )


def _operators(data: memoryview, kind: str = "model") -> Iterator[str]:
    """The type of every node, wherever it is nested."""
    for number, value in fields(data):
        if isinstance(value, int):
            continue
        if kind == "node" and number == 4:
            yield bytes(value).decode()
        inner = NESTED.get(kind, {}).get(number)
        if inner in ("graph", "function", "node", "attribute"):
            yield from _operators(value, inner)
