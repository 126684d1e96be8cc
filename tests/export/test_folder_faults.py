"""A folder is written whole or not at all: whatever fails, and whenever the process is killed."""

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from tfinfer.errors import TargetError
from tfinfer.export import folder as folder_module
from tfinfer.export.folder import check_target, new_folder
from tfinfer.manifest import FILE_NAME

FILES = ("decoder.onnx", "weights.bin", FILE_NAME)  # the manifest last


def write(folder: Path, mark: str) -> None:
    for name in FILES:
        (folder / name).write_text(mark)


def export(target: Path, mark: str, overwrite: bool = False) -> None:
    with new_folder(target, overwrite) as made:
        write(made, mark)


def export_by(work: Callable[[Path], None], target: Path, overwrite: bool = True) -> None:
    with new_folder(target, overwrite) as made:
        work(made)


def state(target: Path) -> str | None:
    """The mark of a complete folder, or None where nothing stands; anything between fails."""
    if not target.exists():
        return None
    assert sorted(p.name for p in target.iterdir()) == sorted(FILES)
    (mark,) = {(target / name).read_text() for name in FILES}
    return mark


def litter(target: Path) -> list[str]:
    return [p.name for p in target.parent.iterdir() if p.name != target.name]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def target(tmp_path):
    (tmp_path / "room").mkdir()
    return tmp_path / "room" / "out"


@pytest.fixture(params=["one step", "stepping aside"])
def exchange(request, monkeypatch):
    """Linux exchanges two folders in one step; other systems have no such call."""
    if request.param == "one step" and not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system has no renameat2")
    if request.param == "stepping aside":
        monkeypatch.setattr(folder_module.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    return request.param


# -- every call fails once ------------------------------------------------------------------------------------------
class Failing:
    """Counts the calls that touch the disk and makes one of them fail."""

    def __init__(self, monkeypatch):
        self.at, self.count, self.failed, self.on = 0, 0, "", False
        for owner, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (os, "open"),
            (Path, "mkdir"),
            (Path, "open"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name), f"{owner.__name__}.{name}"))

    def counted(self, real, name):
        def call(*args, **kwargs):
            if self.on and "dir_fd" not in kwargs:  # which is how a tree is removed
                self.count += 1
                if self.count == self.at:
                    self.failed = name
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    def run(self, at, what) -> bool:
        """Whether `what` met the failure; it must then say so as one error."""
        self.at, self.count, self.failed, self.on = at, 0, "", True
        said = None
        try:
            what()
        except TargetError as error:
            said = str(error)
        finally:
            self.on = False
        assert (said is None) == (not self.failed), said
        assert said is None or os.strerror(errno.ENOSPC) in said
        return said is not None


def export_with_failing_calls(failing, target, mark):
    """Only the library's own calls may fail: the files are written by their makers."""
    with new_folder(target, overwrite=True) as made:
        failing.on = False
        write(made, mark)
        failing.on = True


@pytest.mark.parametrize("before", [None, "empty", "old"])
def test_whatever_call_fails_the_target_is_absent_or_old_or_new(target, before, exchange, monkeypatch):
    failing, met = Failing(monkeypatch), set()
    for at in range(1, 50):
        if before is not None and not target.exists():
            target.mkdir()
        if before == "old":
            write(target, "old")
        found = failing.run(at, lambda: export_with_failing_calls(failing, target, "new"))
        if not found:
            break
        met.add(failing.failed)
        if target.exists() and not any(target.iterdir()):
            assert before == "empty"
        else:
            assert state(target) in (before if before != "empty" else None, "new")
        assert litter(target) == []
        if before != "old" and target.exists():
            for path in [*target.iterdir()]:
                path.unlink()
            target.rmdir()
    assert state(target) == "new"
    assert litter(target) == []
    assert {"Path.mkdir", "Path.open", "os.fsync", "os.open"} <= met
    if before != "old":
        assert "os.replace" in met
    elif exchange == "stepping aside":
        assert "os.rename" in met


def test_an_old_folder_that_stepped_aside_comes_back_when_the_new_one_cannot_take_its_place(target, monkeypatch):
    monkeypatch.setattr(folder_module.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    export(target, "old")
    real, calls = os.rename, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "no room")
        return real(*args)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(TargetError, match="no room"):
        export(target, "new", overwrite=True)
    assert len(calls) == 3
    assert state(target) == "old"
    assert litter(target) == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_export_that_fails_leaves_nothing_and_changes_nothing(target, error, before):
    if before:
        export(target, before)

    def fails(made):
        write(made, "new")
        raise error

    with pytest.raises(TargetError if isinstance(error, OSError) else type(error)):
        export_by(fails, target)
    assert state(target) == before
    assert litter(target) == []


def test_the_folders_above_the_target_are_made(tmp_path):
    export(tmp_path / "a" / "b" / "out", "new")
    assert state(tmp_path / "a" / "b" / "out") == "new"


def test_every_file_is_on_the_disk_before_the_folder_takes_its_place(target, monkeypatch):
    done = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    export(target, "new")
    names = [Path(path).name for path in done]
    assert set(names[: len(FILES)]) == set(FILES)
    assert names[len(FILES)].startswith(".out.tfinfer-")
    assert done[-1] == str(target.parent)


# -- what is refused ------------------------------------------------------------------------------------------------
def refused(target, match, overwrite=True):
    for what in (lambda: check_target(target, overwrite), lambda: export(target, "new", overwrite)):
        with pytest.raises(TargetError, match=match):
            what()


def test_an_export_is_not_replaced_without_being_told_to(target):
    export(target, "old")
    refused(target, "exists already.*--overwrite", overwrite=False)
    assert state(target) == "old"
    export(target, "new", overwrite=True)
    assert state(target) == "new"


def test_a_folder_that_is_no_export_is_never_replaced(target):
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    refused(target, "no exported folder")
    assert (target / "thesis.tex").read_text() == "years of work"


def test_a_folder_named_like_the_manifest_makes_no_export(target):
    (target / FILE_NAME).mkdir(parents=True)
    refused(target, "no exported folder")


def test_a_file_is_never_replaced(target):
    target.write_text("mine")
    refused(target, "expected a folder to write")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("to", ["an export", "nothing"])
def test_a_link_is_never_followed_or_replaced(target, to):
    if to == "an export":
        export(target.with_name("real"), "old")
    target.symlink_to(target.with_name("real"))
    refused(target, "file or link")
    assert target.is_symlink()
    assert state(target.with_name("real")) == ("old" if to == "an export" else None)


def test_an_empty_folder_is_taken_without_being_told_to(target):
    target.mkdir()
    export(target, "new")
    assert state(target) == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_put_there_meanwhile_is_not_overwritten(target, overwrite):
    def meanwhile(made):
        write(made, "new")
        target.mkdir()
        (target / "other").write_text("others")

    with pytest.raises(TargetError, match="no exported folder"):
        export_by(meanwhile, target, overwrite)
    assert (target / "other").read_text() == "others"
    assert litter(target) == []


def test_a_parent_that_is_a_file_is_one_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TargetError):
        export(tmp_path / "file" / "out", "new")


# -- what was left behind -------------------------------------------------------------------------------------------
def test_what_a_killed_export_left_is_removed_by_the_next(target):
    left = target.with_name(f".out.tfinfer-{dead_process()}-0a1b2c3d")
    left.mkdir()
    write(left, "half")
    export(target, "new")
    assert litter(target) == []


def test_what_a_running_export_is_making_is_left_alone(target):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        others = target.with_name(f".out.tfinfer-{process.pid}-0a1b2c3d")
        others.mkdir()
        write(others, "half")
        export(target, "new")
        export(target, "newer", overwrite=True)
        assert state(others) == "half"
        process.communicate(b"\n")
    export(target, "newest", overwrite=True)
    assert litter(target) == []


def test_two_exports_of_one_process_do_not_remove_each_other(target):
    with new_folder(target, overwrite=True) as first:
        write(first, "first")
        export(target, "second")
        assert state(target) == "second"
        assert state(first) == "first"
    assert state(target) == "first"
    assert litter(target) == []


def test_of_two_exports_to_one_place_the_later_is_refused_unless_told_to_replace(target):
    with pytest.raises(TargetError, match="exists already"):
        export_by(lambda made: export(target, "second"), target, overwrite=False)
    assert state(target) == "second"
    assert litter(target) == []


def test_an_old_folder_that_stepped_aside_when_its_export_was_killed_comes_back(target):
    pid = dead_process()
    aside, made = (target.with_name(f".out.tfinfer-{pid}-0a1b2c3d{end}") for end in ("-old", ""))
    for path, mark in ((aside, "old"), (made, "new")):
        path.mkdir()
        write(path, mark)

    def interrupted(made):
        assert state(target) == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_by(interrupted, target)
    assert state(target) == "old"
    assert litter(target) == []


def test_an_old_folder_that_comes_back_is_refused_before_the_work_not_after(target):
    aside = target.with_name(f".out.tfinfer-{dead_process()}-0a1b2c3d-old")
    aside.mkdir()
    write(aside, "old")
    worked = False
    with pytest.raises(TargetError, match="exists already"), new_folder(target):
        worked = True
    assert state(target) == "old"
    assert not worked


def test_an_old_folder_that_was_replaced_already_does_not_come_back(target):
    export(target, "new")
    aside = target.with_name(f".out.tfinfer-{dead_process()}-0a1b2c3d-old")
    aside.mkdir()
    write(aside, "old")
    export(target, "newer", overwrite=True)
    assert state(target) == "newer"
    assert litter(target) == []


@pytest.mark.parametrize(
    "name", [".outer.tfinfer-1-a", ".out.tfinfer-x-a", ".out.tfinfer", "out.tfinfer-99999999-a", "o"]
)
def test_what_is_named_otherwise_is_nobodys_litter(target, name):
    target.with_name(name).mkdir()
    export(target, "new")
    assert litter(target) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with space",
        "-dash-1-2",
        "mödel",
        ".hidden",
        "v[1]",
        "a*",
    ],
)
def test_litter_is_found_whatever_the_target_is_called(tmp_path, name):
    left = tmp_path / f".{name}.tfinfer-{dead_process()}-0a1b2c3d"
    left.mkdir()
    write(left, "half")
    export(tmp_path / name, "new")
    assert litter(tmp_path / name) == []


# -- killed ---------------------------------------------------------------------------------------------------------
# A process that forks exporters, each of which overwrites the target for ever. It loads the library once.
LOOP = """
    import os, sys
    from pathlib import Path
    from tfinfer.export.folder import new_folder

    target, names = Path(sys.argv[1]), sys.argv[2:]
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            number = int(line)
            while True:
                number += 1
                with new_folder(target, overwrite=True) as made:
                    for name in names:
                        (made / name).write_text(str(number))
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("dead", flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_folder(target):
    draw = random.Random(0)
    code = textwrap.dedent(LOOP)
    command = [sys.executable, "-W", "ignore", "-c", code, str(target), *FILES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        last, kills_with_litter = 0, 0
        for _ in range(15):
            parent.stdin.write(f"{last}\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline())
            while last == 0 and state_while_running(target) is None:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.005, 0.08))
            os.kill(pid, signal.SIGKILL)
            assert parent.stdout.readline() == "dead\n"
            mark = state(target)
            assert mark is not None
            assert int(mark) >= last
            last = int(mark)
            kills_with_litter += bool(litter(target))
        parent.stdin.close()
        parent.wait()
    assert kills_with_litter  # otherwise the kills came between exports and said nothing
    assert last > 15
    export(target, "good", overwrite=True)
    assert state(target) == "good"
    assert litter(target) == []


def state_while_running(target):
    """Whether the first export is done; the folder may be exchanged while it is looked at."""
    return True if (target / FILE_NAME).exists() else None
