"""The file of a tuning: used where all of its key matches, ignored elsewhere, refused when it is damaged."""

import dataclasses
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import CorruptModelError, MissingDependencyError, TargetError, UnsafeModelError
from tfinfer.session import machine, tuned
from tfinfer.session.probe import addition_graph
from tfinfer.session.providers import open_session
from tfinfer.session.settings import OnCpu, Settings
from tfinfer.session.threads import Threads, thread_count

ODD = Settings(allow_spinning=False, dynamic_block_base=4, memory_pattern=True, denormal_as_zero=True)


def put(copy, /, settings=ODD, threads=1, **key):
    entry = tuned.Entry(dataclasses.replace(tuned.key_of(copy), **key), threads, settings, "2026-11-21", {})
    tuned.put(entry, copy)
    return entry


def damage(folder, change):
    path = folder / tuned.TUNE_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_tuning_is_used_and_said(copied):
    put(copied)
    with tfinfer.load(copied) as model:
        assert model.decoder.settings == ODD
        assert model.threads == Threads(1, "1: tuned for this machine, 2026-11-21")
        options = model.decoder._session.get_session_options()
        assert options.enable_mem_pattern is True
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.get_session_config_entry("session.dynamic_block_base") == "4"
        assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
        tokens = model.generate([1, 2, 3], max_tokens=8, stop_ids=[]).token_ids
    with tfinfer.load(copied, threads=1) as model:
        assert model.decoder.settings == Settings()
        assert model.generate([1, 2, 3], max_tokens=8, stop_ids=[]).token_ids == tokens


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_seq2seq"])
def test_every_kind_of_folder_uses_its_tuning(kind, tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny.parent / kind, tmp_path / "model")
    put(folder)
    with tfinfer.load(folder) as model:
        sessions = [model.encoder] if kind == "tiny_encoder" else [model.decoder, model.decoder.encoder]
        assert [session.settings for session in sessions] == [ODD] * len(sessions)


def test_threads_that_are_asked_for_win_even_over_a_damaged_file(copied):
    (copied / tuned.TUNE_FILE).write_text("{")
    with tfinfer.load(copied, threads=1) as model:
        assert model.threads.reason == "1: asked for"


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Z80"}, {"cores": 999}, {"onnxruntime": "0.1"}, {"device": "cuda"}, {"folder": "0" * 64}],
    ids=lambda other: next(iter(other)),
)
def test_a_tuning_of_another_key_is_ignored_and_inspect_says_why(copied, other):
    put(copied, **other)
    with tfinfer.load(copied) as model:
        assert model.decoder.settings == Settings()
        assert model.threads == thread_count()
    assert f"does not apply: measured with another {next(iter(other))}" in tuned.state(copied)


def test_a_folder_that_is_exported_again_loses_its_tuning(copied):
    put(copied)
    path = copied / "tfinfer.json"
    path.write_text(path.read_text() + "\n")
    assert tuned.find(copied) is None


def test_tunings_of_other_machines_stay_and_those_of_older_folders_go(copied):
    put(copied, folder="0" * 64)
    put(copied, cpu="Z80")
    put(copied)
    mine = put(copied, threads=1, settings=Settings())
    assert tuned.find(copied) == mine
    assert [entry.key.cpu == "Z80" for entry in tuned.read(copied)] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(extra=1),
        lambda d: d.update(schema="1"),
        lambda d: d.update(tunings={}),
        lambda d: d.update(tunings=d["tunings"] * 99),
        lambda d: d["tunings"][0].update(session="a.so"),
        lambda d: d["tunings"][0]["settings"].update(optimized_model_filepath="/etc/passwd"),
        lambda d: d["tunings"][0]["settings"].update(allow_spinning="0"),
        lambda d: d["tunings"][0]["settings"].update(dynamic_block_base=10**9),
        lambda d: d["tunings"][0]["settings"].update(dynamic_block_base=-1),
        lambda d: d["tunings"][0].update(threads=0),
        lambda d: d["tunings"][0].update(threads=d["tunings"][0]["key"]["hardware_threads"] + 1),
        lambda d: (d["tunings"][0]["key"].update(hardware_threads=10**6), d["tunings"][0].update(threads=10**5)),
        lambda d: d["tunings"][0].update(threads=True),
        lambda d: d["tunings"][0].pop("key"),
    ],
)
def test_what_is_no_tuning_is_refused_with_what_to_do(copied, change):
    put(copied)
    damage(copied, change)
    with pytest.raises(
        CorruptModelError, match=r"tfinfer\.tune\.json: is no tuning: .*delete it, or run `tfinfer tune`"
    ):
        tfinfer.load(copied)
    (copied / tuned.TUNE_FILE).unlink()
    tfinfer.load(copied).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (tuned.MAX_BYTES + 1)])
def test_what_is_no_json_object_is_refused(copied, content):
    (copied / tuned.TUNE_FILE).write_bytes(content)
    with pytest.raises(CorruptModelError, match="is no tuning"):
        tfinfer.load(copied)
    put(copied)  # the new file is what mends it
    assert tuned.find(copied) is not None


def test_a_newer_schema_is_ignored(copied):
    put(copied)
    damage(copied, lambda data: data.update(schema=99, whatever=1))
    tfinfer.load(copied).close()
    assert "newer" in tuned.state(copied)


def test_a_link_is_refused_wherever_it_leads(copied):
    put(copied)
    (copied / tuned.TUNE_FILE).rename(copied.parent / "elsewhere.json")
    (copied / tuned.TUNE_FILE).symlink_to(copied.parent / "elsewhere.json")
    for refuses in (tfinfer.load, tuned.check_writable):
        with pytest.raises(UnsafeModelError, match="found a link"):
            refuses(copied)
    (copied / tuned.TUNE_FILE).unlink()
    os.mkfifo(copied / tuned.TUNE_FILE)  # reading it would wait for ever
    with pytest.raises(UnsafeModelError):
        tuned.read(copied)


def test_a_folder_that_cannot_be_written_says_what_to_do(copied, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    entry = put(copied)
    names = sorted(os.listdir(copied))
    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(TargetError, match=r"Read-only file system: tune a copy"):
        tuned.check_writable(copied)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(TargetError, match=r"Read-only file system: tune a copy"):
        tuned.put(dataclasses.replace(entry, threads=2), copied)
    assert sorted(os.listdir(copied)) == names
    assert tuned.find(copied) == entry


def test_denormals_of_the_caller_stay(copied):
    """In a process whose first session would have switched them off in the thread that opens it."""
    import subprocess
    import sys

    put(copied)
    script = (
        "import sys, tfinfer, numpy as np\n"
        "model = tfinfer.load(sys.argv[1])\n"
        "assert model.decoder.settings.denormal_as_zero\n"
        "print(float(np.array([1e-40], np.float32)[0] * np.float32(1)) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(copied)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_switches_are_of_the_cpu_alone():
    opened = open_session(addition_graph(), device="cpu", threads=Threads(2, ""), on_cpu=OnCpu(Threads(1, "x"), ODD))
    assert (opened.threads, opened.settings) == (Threads(1, "x"), ODD)
    (total,) = opened.session.run(None, {"x": np.array([2.0], np.float32)})
    assert total.tolist() == [4.0]
    assert tuned.on_cpu("/nowhere", "cuda", None) is None


def test_the_machine_is_read_from_proc(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 1 GHz\nmodel name\t: other\n")
    assert machine.cpu_model(tmp_path) == "Some CPU @ 1 GHz"
    assert machine.cpu_model(tmp_path / "none")
    assert machine.this_machine().hardware_threads >= 1


# -- what the commands say ----------------------------------------------------------------------------------------
def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer")


def test_inspect_and_doctor_tell_whether_it_applies(copied):
    assert "none; tfinfer tune makes one" in run("inspect", copied).stdout
    put(copied)
    for command in ("inspect", "doctor"):
        assert "applies here: threads 1, allow_spinning false" in run(command, copied).stdout
        assert "applies here" in json.loads(run(command, copied, "--json").stdout)["tuning"]
    assert run("inspect", copied, "--check").exit_code == 0
    assert run("verify", copied).exit_code == 0
    assert "tuning" not in json.loads(run("doctor", "--json").stdout)


def test_a_damaged_one_is_shown_by_inspect_and_refused_by_the_others(copied):
    (copied / tuned.TUNE_FILE).write_text("{")
    shown = run("inspect", copied)
    assert shown.exit_code == 0
    assert "cannot be used" in shown.stdout
    for arguments in (["inspect", copied, "--check"], ["doctor", copied], ["verify", copied], ["bench", copied]):
        result = run(*arguments)
        assert result.exit_code == 3, arguments
        assert result.stderr.count("\n") == 1
    assert run("doctor", copied / "nowhere").exit_code == 3


def test_without_onnxruntime_inspect_still_shows_the_folder(copied, monkeypatch):
    put(copied)

    def missing():
        raise MissingDependencyError("onnxruntime is not installed")

    monkeypatch.setattr(tuned, "onnxruntime", missing)
    assert "does not apply: onnxruntime is not installed" in run("inspect", copied).stdout
