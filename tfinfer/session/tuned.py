"""The file that `tfinfer tune` leaves in a folder: how sessions are opened on the machines it was measured on.

It is as untrusted as the rest of the folder: only known keys and sane values are taken, and none of them changes what
is computed. Nothing but a whole match of machine, onnxruntime and folder lets it apply.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfinfer.errors import CorruptModelError, ManifestError, MissingDependencyError, TargetError, UnsafeModelError
from tfinfer.integrity import sha256
from tfinfer.manifest import FILE_NAME, GraphSpec, read_as
from tfinfer.session.machine import this_machine
from tfinfer.session.ort import onnxruntime
from tfinfer.session.providers import Opened, open_session
from tfinfer.session.settings import OnCpu, Settings
from tfinfer.session.threads import Threads, thread_count

TUNE_FILE = "tfinfer.tune.json"
SCHEMA = 1
MAX_BYTES = 1 << 18
MOST_ENTRIES = 64  # machines that one folder may be tuned for
MOST_BLOCKS = 64


@dataclass(frozen=True)
class Key:
    """What must be the same for a tuning to apply."""

    cpu: str
    cores: int
    hardware_threads: int
    onnxruntime: str
    device: str
    folder: str  # SHA-256 of the manifest, which names the hash of every other file


@dataclass(frozen=True)
class Entry:
    """What was fastest under one key, when it was measured, and what the measurement said."""

    key: Key
    threads: int
    settings: Settings
    created: str
    measured: dict[str, Any]

    @property
    def on_cpu(self) -> OnCpu:
        return OnCpu(Threads(self.threads, f"{self.threads}: tuned for this machine, {self.created}"), self.settings)


def key_of(folder: Path) -> Key:
    """The key of a folder here and now."""
    machine = this_machine()
    return Key(
        machine.cpu, machine.cores, machine.hardware_threads, str(onnxruntime().__version__), "cpu",
        sha256(folder / FILE_NAME),
    )  # fmt: skip


def open_graph(
    folder: Path, graph: GraphSpec, device: str, threads: int | None, how: OnCpu | None, cuda_graph: bool = False
) -> Opened:
    """Open a graph of a folder. how: as to do it on the CPU; None: as the folder's tuning, or else `threads`, says."""
    chosen = on_cpu(folder, device, threads) if how is None else how
    return open_session(
        folder / graph.file, device=device, threads=thread_count(threads), on_cpu=chosen, cuda_graph=cuda_graph
    )


def on_cpu(folder: Path, device: str, threads: int | None) -> OnCpu | None:
    """How to open sessions of a folder on the CPU by its tuning; None without one that applies.

    What is asked for wins: with `threads` given, or for CUDA, the file is not even read. Raises as `read`.
    """
    if threads is not None or device == "cuda" or not os.path.lexists(folder / TUNE_FILE):
        return None
    entry = find(folder)
    return entry.on_cpu if entry else None


def find(folder: Path) -> Entry | None:
    """The tuning that applies here, of those in the folder. Raises as `read`."""
    entries = read(folder)
    return next((entry for entry in entries if entry.key == key_of(folder)), None) if entries else None


def read(folder: Path) -> list[Entry]:
    """All tunings of a folder; none where there is no file, or one of a newer tfinfer.

    Raises CorruptModelError for what is no such file, and UnsafeModelError for a link.
    """
    path = folder / TUNE_FILE
    try:
        status = path.lstat()
    except OSError:
        return []
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeModelError(f"{path}: expected a plain file inside the folder, found a link or something else")
    try:
        if status.st_size > MAX_BYTES:
            raise ManifestError(f"larger than {MAX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise ManifestError("expected an object with a schema")
        return _entries(data) if data["schema"] <= SCHEMA else []
    except (OSError, ValueError, RecursionError) as error:  # ManifestError is a ValueError
        mend = "delete it, or run `tfinfer tune` again"
        raise CorruptModelError(f"{path}: is no tuning: {error}; {mend}") from error


def _entries(data: dict[str, Any]) -> list[Entry]:
    if unknown := set(data) - {"schema", "tunings"}:
        raise ManifestError(f"unknown keys {', '.join(sorted(unknown))}")
    entries: list[Entry] = read_as(tuple[Entry, ...], data.get("tunings"), "tunings")
    if len(entries) > MOST_ENTRIES:
        raise ManifestError(f"more than {MOST_ENTRIES} tunings")
    for entry in entries:
        # More threads than the machine has can only slow it down, and very many can end the process.
        most = max(entry.key.hardware_threads, 1)
        if not 1 <= entry.threads <= min(most, 1024):
            raise ManifestError(f"threads: expected 1 to {most}, got {entry.threads}")
        if not 0 <= entry.settings.dynamic_block_base <= MOST_BLOCKS:
            raise ManifestError(f"dynamic_block_base: expected 0 to {MOST_BLOCKS}")
    return list(entries)


def state(folder: Path) -> str:
    """One line for people: whether a tuning applies here, and if not, why. Raises as `read`."""
    if not os.path.lexists(folder / TUNE_FILE):
        return "none; tfinfer tune makes one"
    entries = read(folder)
    try:
        here = key_of(folder)
    except MissingDependencyError:
        return "does not apply: onnxruntime is not installed, or broken"
    for entry in entries:
        if entry.key == here:
            return f"applies here: threads {entry.threads}, {entry.settings}, measured {entry.created}"
    if not entries:
        return "does not apply: of a newer tfinfer, or empty; tune again"
    differing = {
        field.name for field in dataclasses.fields(Key)
        if all(getattr(entry.key, field.name) != getattr(here, field.name) for entry in entries)
    }  # fmt: skip
    what = ", ".join(sorted(differing)) or "machine"
    return f"does not apply: measured with another {what}; tune again"


# -- writing ------------------------------------------------------------------------------------------------------
def check_writable(folder: Path) -> None:
    """Raises TargetError where no tuning can be written, UnsafeModelError for a link: nothing is measured in vain."""
    with contextlib.suppress(CorruptModelError):  # it is replaced
        read(folder)
    made = _beside(folder)
    try:
        made.touch(exist_ok=False)
        made.unlink()
    except OSError as error:
        raise _cannot(folder, error) from error


def put(entry: Entry, folder: Path) -> None:
    """Write an entry, whole or not at all, beside those of the same folder on other machines. Raises TargetError."""
    try:
        others = read(folder)
    except CorruptModelError:  # the new file is what mends it
        others = []
    kept = [other for other in others if other.key != entry.key and other.key.folder == entry.key.folder]
    data = {"schema": SCHEMA, "tunings": [dataclasses.asdict(one) for one in [entry, *kept][:MOST_ENTRIES]]}
    text, made = json.dumps(data, indent=1, allow_nan=False) + "\n", _beside(folder)
    try:
        with made.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, folder / TUNE_FILE)
    except OSError as error:
        raise _cannot(folder, error) from error
    finally:
        made.unlink(missing_ok=True)


def _beside(folder: Path) -> Path:
    return folder / f".{TUNE_FILE}-{secrets.token_hex(4)}"


def _cannot(folder: Path, error: OSError) -> TargetError:
    why = error.strerror or str(error)
    return TargetError(f"{folder / TUNE_FILE}: cannot be written: {why}: tune a copy of the folder where it can be")
