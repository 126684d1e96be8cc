"""A conversation on disk: the ids, and what a slot holds of them, so that nothing has to be computed again.

One file: a mark, the length of a header, the header in JSON, the bytes of the cache, and the SHA-256 of all of it. What
sizes there are follows from the manifest, so a file says nothing that could not be checked before it is read. It is
written beside its place and renamed into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfinfer.errors import SnapshotError
from tfinfer.integrity import fingerprint
from tfinfer.manifest import Manifest
from tfinfer.session.contents import Contents
from tfinfer.session.fixed import Bytes
from tfinfer.session.memory import stored

MARK = b"tfinfer conversation 1\n"
LENGTH, DIGEST = 8, 32  # bytes of the header's length and of the SHA-256
MOST_ABOUT, MOST_PER_ID = 1 << 16, 16  # bytes of a header beside its ids, and of one id
NOTHING = Contents((), 0, (), ())


def write_snapshot(path: Path, manifest: Manifest, ids: Sequence[int], contents: Contents) -> None:
    """Write a conversation whole or not at all.

    ids: all of them, of which `contents` holds the first. Raises SnapshotError where the file cannot be written.
    """
    head = {
        "model": fingerprint(manifest),
        "reference": manifest.source.reference,
        "ids": list(ids),
        "held": len(contents.ids),
        "dropped": contents.dropped,
    }
    header = json.dumps(head).encode()
    digest = hashlib.sha256()
    made = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    arrays = (*contents.positions, *contents.states) if contents.ids else ()
    try:
        with made.open("xb") as file:
            for part in (MARK, len(header).to_bytes(LENGTH, "little"), header, *(a.tobytes() for a in arrays)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            made.unlink()


def read_snapshot(path: Path, manifest: Manifest) -> tuple[list[int], Contents]:
    """The ids of a conversation, and what was held of them. Raises SnapshotError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(MARK) + LENGTH)
            if not start.startswith(MARK) or len(start) < len(MARK) + LENGTH:
                raise SnapshotError(
                    f"{path}: expected a conversation that `save` wrote; it is none, or of another version"
                )
            length = int.from_bytes(start[len(MARK) :], "little")
            if length > min(size, MOST_ABOUT + MOST_PER_ID * manifest.max_length):
                raise SnapshotError(
                    f"{path}: was cut, or is another model's: its header alone would have {length} bytes"
                )
            header = file.read(length)
            ids, held, dropped = _head(path, header, manifest)
            sizes = _sizes(manifest, held, dropped)
            expected = len(start) + length + sum(map(math.prod, sizes)) + DIGEST
            if size != expected:
                raise SnapshotError(f"{path}: expected {expected} bytes, found {size}; it was cut or changed")
            data = file.read(size)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error}") from error
    digest = hashlib.sha256(start + header)
    digest.update(memoryview(data)[:-DIGEST])
    if digest.digest() != data[-DIGEST:]:
        raise SnapshotError(f"{path}: was changed since it was written: its SHA-256 is another")
    arrays = _arrays(data, sizes)
    entries = len(manifest.cache)
    return ids, Contents(tuple(ids[:held]), dropped, tuple(arrays[:entries]), tuple(arrays[entries:]))


def _head(path: Path, header: bytes, manifest: Manifest) -> tuple[list[int], int, int]:
    """The ids, how many of them are held, and how many of these are dropped, all checked."""
    try:
        head = json.loads(header)
        model, reference, ids = head["model"], head["reference"], head["ids"]
        held, dropped = head["held"], head["dropped"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{path}: its header cannot be read: {error!r}") from error
    if model != fingerprint(manifest):
        raise SnapshotError(
            f"{path}: is of {str(reference)[:200]!r}, whose graph, weights or cache are not those of this folder, "
            f"{manifest.source.reference!r}: load the folder that it was saved with, or begin anew"
        )
    if not _is_list_of_ids(ids, manifest):
        raise SnapshotError(
            f"{path}: expected at most {manifest.max_length} ids from 0 to {manifest.vocab_size - 1}, got others"
        )
    if not _fit(manifest, len(ids), held, dropped):
        raise SnapshotError(
            f"{path}: lengths that do not fit: {len(ids)} ids, {held!r} positions, of them {dropped!r} dropped"
        )
    return ids, held, dropped


def _is_list_of_ids(ids: Any, manifest: Manifest) -> bool:
    return (
        isinstance(ids, list)
        and len(ids) <= manifest.max_length
        and all(type(i) is int and 0 <= i < manifest.vocab_size for i in ids)
    )


def _fit(manifest: Manifest, ids: int, held: Any, dropped: Any) -> bool:
    """Whether a cache of the model can hold so many positions, of which so many are gone."""
    if type(held) is not int or type(dropped) is not int or not 0 <= dropped <= held <= ids:
        return False
    window = manifest.keeps_window
    return dropped == 0 if window is None else dropped <= max(0, held - window + 1)


def _sizes(manifest: Manifest, held: int, dropped: int) -> list[tuple[int, int]]:
    """(rows, bytes of each) of every cache entry and every state; nothing where nothing is held."""
    if not held:
        return []
    there = held - dropped
    sizes = [(e.num_kv_heads, there * e.head_dim * stored(e.dtype).itemsize) for e in manifest.cache]
    return sizes + [(1, math.prod(state.shape) * stored(state.dtype).itemsize) for state in manifest.states]


def _arrays(data: bytes, sizes: Sequence[tuple[int, int]]) -> list[Bytes]:
    arrays, at = [], 0
    for rows, width in sizes:
        arrays.append(np.frombuffer(data, np.uint8, rows * width, at).reshape(rows, width))
        at += rows * width
    return arrays
