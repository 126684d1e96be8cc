"""`tfinfer encode`: texts into vectors, as lines of JSON or as one .npy file."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, many, remark, say_json
from tfinfer.errors import InputError

if TYPE_CHECKING:
    from tfinfer.encoding import EncodingModel
    from tfinfer.manifest import PoolingSpec

BATCH_SIZE = 32


@click.command("encode")
@options.folder
@click.argument("texts", nargs=-1, metavar="[TEXTS]...")
@click.option("--ids", type=options.IdList(), multiple=True, metavar="1,2,3", help="Ids instead of a text; repeatable.")
@click.option("--pooling", metavar="mean|cls|last|none|pooled", help="Default: the folder's own, or mean.")
@click.option("--normalize/--no-normalize", default=None, help="Scale vectors to length 1; default: the folder's own.")
@click.option("--truncate", is_flag=True, help="Cut texts that are too long instead of refusing them.")
@click.option("--batch-size", type=int, default=BATCH_SIZE, show_default=True, metavar="N", help="Texts at once.")
@click.option(
    "-o", "--output", metavar="OUT.npy", type=click.Path(path_type=Path), help="Write one array, (n, hidden)."
)
@options.compute
@options.common
def command(folder: Path, texts: tuple[str, ...], device: str, threads: int | None, **given: Any) -> None:
    """Turn texts into vectors.

    Without TEXTS, or for -, every line of stdin is JSON: "a text", {"text": "a"}, {"text": "a", "pair": "b"} or
    {"ids": [1, 2]}. Prints {"index": 0, "vector": [...]} for each text, or with --pooling none {"index", "vectors"}.
    """
    output: Path | None = given["output"]
    source = _source(texts, given["ids"])
    if output is not None:
        _check_output(output, given["pooling"])
    from tfinfer.encoding import TruncationWarning
    from tfinfer.model import load

    with load(folder, device=device, threads=threads) as model, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TruncationWarning)
        if device == "auto" and not given["as_json"]:
            remark(model.reason)
        _encode(model, source, given)
    for warning in caught:
        if issubclass(warning.category, TruncationWarning):
            remark(f"warning: {warning.message}")


def _source(texts: tuple[str, ...], ids: tuple[list[int], ...]) -> Iterable[Any]:
    """The texts or ids that were asked for, those of stdin as they are read."""
    if texts and ids:
        raise click.UsageError("expected either TEXTS or --ids 1,2,3")
    if ids or (texts and "-" not in texts):
        return texts or ids
    if len(texts) > 1:
        raise click.UsageError("- reads every text from stdin, so no other goes with it")
    if not texts and sys.stdin.isatty():
        raise click.UsageError("expected TEXTS, --ids 1,2,3, or lines of JSON on stdin")
    return _lines(sys.stdin.buffer)


def _lines(stream: BinaryIO) -> Iterator[Any]:
    """The text, pair or ids of every line."""
    wanted = 'expected "a text", {"text": "a"}, {"text": "a", "pair": "b"} or {"ids": [1, 2]}'
    for number, line in enumerate(stream, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(f"stdin, line {number}: {wanted}; got no JSON: {error}") from error
        match value:
            case str():
                yield value
            case {"text": _, "ids": _}:
                raise InputError(f"stdin, line {number}: {wanted}; got both a text and ids")
            case {"text": str(text), "pair": str(pair)}:
                yield text, pair
            case {"text": str(text)} if value.get("pair") is None:
                yield text
            case {"ids": [*ids]} if all(type(item) is int for item in ids):
                yield ids
            case _:
                raise InputError(f"stdin, line {number}: {wanted}; got {line.decode(errors='replace').strip()[:80]!r}")


def _check_output(output: Path, pooling: str | None) -> None:
    """What can be known to fail before a model is loaded does so."""
    if output.suffix != ".npy":
        raise click.UsageError(f"-o: expected a name that ends in .npy; got {str(output)!r}")
    if pooling == "none":
        raise click.UsageError("--pooling none gives arrays of different lengths, which no .npy holds: leave -o out")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"{output}: expected a file to write in a folder that exists")


def _encode(model: Any, source: Iterable[Any], given: dict[str, Any]) -> None:
    """Encode and write in the form that was asked for."""
    chosen = {name: given[name] for name in ("pooling", "normalize")}
    batches = model.encode_iter(source, batch_size=given["batch_size"], truncate=given["truncate"], **chosen)
    pooling: PoolingSpec = model.pooling(**chosen)
    if given["output"] is not None:
        _to_file(model, batches, pooling, given["output"], given["as_json"])
        return
    key = "vectors" if pooling.mode == "none" else "vector"
    entries = ({"index": i, key: array.tolist()} for i, array in enumerate(array for b in batches for array in b))
    if given["as_json"]:
        say_json({"results": list(entries), **_about(model, pooling)})
        return
    for entry in entries:
        say_json(entry)


def _to_file(model: Any, batches: Iterator[Any], pooling: PoolingSpec, output: Path, as_json: bool) -> None:
    if pooling.mode == "none":
        raise InputError(
            f"{output}: this folder's pooling is none, which no .npy holds: choose another or leave -o out"
        )
    width = model.encode([], pooling=pooling.mode).shape[1]
    with Status() as status, NpyWriter(output, width) as writer:
        for vectors in batches:
            writer.add(vectors)
            status(many(writer.rows, "text"))
    if as_json:
        say_json({"output": str(output), "rows": writer.rows, "hidden": width, **_about(model, pooling)})
    else:
        scaled = ", normalized" if pooling.normalize else ""
        remark(f"{output}: {writer.rows} x {width} float32, pooling {pooling.mode}{scaled}")


def _about(model: EncodingModel, pooling: PoolingSpec) -> dict[str, Any]:
    return {
        "pooling": pooling.mode,
        "normalize": pooling.normalize,
        "model": {
            "reference": model.manifest.source.reference,
            "dtype": model.manifest.dtype,
            "device": model.device,
            "reason": model.reason,
            "threads": dataclasses.asdict(model.threads),
        },
    }


class NpyWriter:
    """Rows as they come into an .npy that takes the place of `path` once it is whole; a context manager.

    Raises:
        InputError: the file cannot be written; what was at `path` before stays.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width, self.rows = path, width, 0
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> NpyWriter:
        try:
            self._file = self._part.open("wb")
            self._start = self._header()
        except OSError as error:
            raise self._refused(error) from error
        return self

    def _header(self) -> int:
        """Write the header; its length, which does not depend on the rows: numpy leaves room for their number."""
        import numpy as np

        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self._file, shape)
        return self._file.tell()

    def add(self, vectors: Any) -> None:
        """Write rows, (n, width) float32."""
        try:
            self._file.write(vectors.astype("<f4").tobytes())
        except OSError as error:
            raise self._refused(error) from error
        self.rows += len(vectors)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.seek(0)
                    assert self._header() == self._start, "numpy made a header of another length"
            if kind is None:
                os.replace(self._part, self.path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            with suppress(OSError):
                self._part.unlink()

    def _refused(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: expected a file that can be written: {error.strerror or error}")
