"""Write a folder whole or not at all: made beside its place, synced, then renamed into it.

A killed or failed export leaves the target as it was; what it left beside the target is removed by the next one.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfinfer.errors import TargetError
from tfinfer.manifest import FILE_NAME

RENAME_EXCHANGE = 2


def check_target(target: Path, overwrite: bool) -> None:
    """Raises TargetError unless `target` may be written: absent, an empty folder, or an export to be overwritten."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: expected a folder to write, found a file or link there")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / FILE_NAME).is_file():
        raise TargetError(f"{target}: is not empty and no exported folder, so it is left alone: choose another place")
    if not overwrite:
        raise TargetError(f"{target}: exists already: give --overwrite to replace it")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends, and vanishes when the block fails."""
    target = target.absolute()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_litter(target)
        check_target(target, overwrite)  # an old folder may have come back
        made = target.parent / f".{target.name}.tfinfer-{os.getpid()}-{secrets.token_hex(4)}"
        made.mkdir()
    except OSError as error:
        raise _cannot(target, error) from error
    try:
        yield made
        _sync(made)
        check_target(target, overwrite)  # somebody else may have written it meanwhile
        _put(made, target)
    except OSError as error:
        raise _cannot(target, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _cannot(target: Path, error: OSError) -> TargetError:
    return error if isinstance(error, TargetError) else TargetError(f"{target}: cannot be written: {error}")


def _put(made: Path, target: Path) -> None:
    """Rename into place; an old folder is exchanged in one step and then removed with the temporary one."""
    if target.exists() and any(target.iterdir()):
        _exchange(made, target)
    else:
        os.replace(made, target)
    _sync_folder(target.parent)


def _exchange(made: Path, target: Path) -> None:
    """Swap two folders. Linux does it in one step; elsewhere the old one steps aside for a moment."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(-100, os.fsencode(made), -100, os.fsencode(target), RENAME_EXCHANGE) == 0:
        return
    aside = made.with_name(made.name + "-old")
    os.rename(target, aside)
    try:
        os.rename(made, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_litter(target: Path) -> None:
    """Remove what exports that were killed left beside `target`; a running one's folder stays."""
    prefix = f".{target.name}.tfinfer-"
    for path in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        parts = path.name.removeprefix(f".{target.name}.tfinfer-").split("-")
        if not parts[0].isdigit() or _is_running(int(parts[0])):
            continue
        if parts[-1] == "old" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
