"""onnxruntime is imported in one place, late, and with its telemetry off."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tfinfer.session import ort
from tfinfer.session.ort import installed_wheels, onnxruntime, version, wheel_problem


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def add_wheel(folder, name, number, top):
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    if top is not None:
        (info / "top_level.txt").write_text(top)
    else:
        (info / "RECORD").write_text("onnxruntime/__init__.py,,\n")


@pytest.mark.parametrize("before", ["", "0", "1"])
def test_telemetry_is_off_before_the_import_begins(before):
    """onnxruntime reads the variable while it loads: set later, or only by default, it would be too late or be 0."""
    code = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("importing with", os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
from tfinfer.session.ort import onnxruntime
assert "onnxruntime" not in sys.modules
onnxruntime()
assert "onnxruntime" in sys.modules
"""
    done = run(code, ORT_DISABLE_TELEMETRY=before)
    assert (done.returncode, done.stdout) == (0, "importing with 1\n"), done.stderr


def test_importing_the_modules_does_not_import_onnxruntime():
    code = """
import sys
import tfinfer.session.ort, tfinfer.session.providers, tfinfer.session.threads
import tfinfer.session.memory, tfinfer.session.probe, tfinfer.doctor
late = {"onnxruntime", "torch", "onnx", "transformers"} & set(sys.modules)
assert not late, late
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_events_are_switched_off_after_the_import(monkeypatch):
    calls = []
    fake = SimpleNamespace(InferenceSession=None, disable_telemetry_events=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert onnxruntime() is fake
    assert calls == [1]


def refusal(folder, wheels):
    """What `onnxruntime()` raises where `folder` comes first; in a process of its own, since a module loads once."""
    code = f"""
import sys
from tfinfer.errors import MissingDependencyError
from tfinfer.session import ort
ort.installed_wheels = lambda: {wheels!r}
sys.path.insert(0, {str(folder)!r})
try:
    ort.onnxruntime()
except MissingDependencyError as caught:
    print(caught)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def test_nothing_installed_names_both_commands(tmp_path):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text("raise ModuleNotFoundError('gone', name='onnxruntime')")
    line = refusal(tmp_path, {})
    assert line == "onnxruntime is not installed: pip install 'tfinfer[cpu]' or pip install 'tfinfer[gpu]'"


@pytest.mark.parametrize(
    "source, said",
    [
        ("raise ImportError('libfoo.so: cannot open shared object file')", "libfoo.so: cannot open"),
        ("raise OSError('[WinError 126] a DLL\\nand more')", "a DLL"),
        ("import a_dependency_that_is_missing", "a_dependency_that_is_missing"),
        ("", "no InferenceSession"),
    ],
)
def test_a_broken_wheel_is_told_with_its_cause(tmp_path, source, said):
    (tmp_path / "onnxruntime.py").write_text(source)
    line = refusal(tmp_path, {"onnxruntime": "1.30.0"})
    assert said in line
    assert "onnxruntime 1.30.0" in line
    assert "pip uninstall -y onnxruntime, then pip install 'tfinfer[cpu]'" in line


@pytest.mark.parametrize(
    "text, numbers", [("1.31.1", (1, 31, 1)), ("1.32.0.dev20260801", (1, 32, 0)), ("1.24+cu12", (1, 24)), ("?", ())]
)
def test_version_is_numbers(monkeypatch, text, numbers):
    monkeypatch.setattr(ort, "onnxruntime", lambda: SimpleNamespace(__version__=text))
    assert version() == numbers


def test_the_installed_wheel_is_found():
    (name,) = installed_wheels()
    assert name.startswith("onnxruntime")
    assert wheel_problem(installed_wheels()) is None


def test_only_owners_of_the_module_count(tmp_path):
    add_wheel(tmp_path, "onnxruntime", "1.31.1", "onnxruntime\n")
    add_wheel(tmp_path, "onnxruntime_gpu", "1.30.0", "onnxruntime\n")
    add_wheel(tmp_path, "onnxruntime-openvino", "1.24.0", None)
    add_wheel(tmp_path, "onnxruntime-genai", "0.18.0", "onnxruntime_genai\n")
    add_wheel(tmp_path, "numpy", "2.0", "numpy\n")
    found = installed_wheels([str(tmp_path)])
    assert found == {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0", "onnxruntime-openvino": "1.24.0"}


def test_two_wheels_are_a_problem_with_a_remedy():
    problem = wheel_problem({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    assert "overwrite each other" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tfinfer[cpu]'" in problem
    assert "'tfinfer[gpu]'" in wheel_problem({})
