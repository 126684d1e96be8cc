"""The examination tells what is there and what to do, also where nothing works."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from tfinfer import doctor
from tfinfer.doctor import examine
from tfinfer.errors import MissingDependencyError
from tfinfer.session.ort import TELEMETRY_VARIABLE, onnxruntime, version
from tfinfer.session.providers import listed_providers

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def report():
    return examine()


def test_it_is_plain_values(report):
    again = json.loads(json.dumps(report.to_dict()))
    assert again["threads"]["count"] == report.threads.count
    assert [device["name"] for device in again["devices"]] == ["cpu", "cuda"]


def test_it_tells_what_is_here(report):
    assert report.onnxruntime == onnxruntime().__version__
    assert report.wheels
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert all(report.packages.values())
    assert set(report.optional) == {"torch", "onnx", "transformers"}
    assert report.telemetry.startswith("off")
    assert "CPUExecutionProvider" in report.providers


def test_the_cpu_really_computes(report):
    cpu = report.devices[0]
    assert (cpu.name, cpu.listed, cpu.opens) == ("cpu", True, True)


def test_no_cuda_is_no_problem_without_a_driver(tmp_path):
    if CUDA in listed_providers(onnxruntime()):
        pytest.skip("this onnxruntime has CUDA")
    report = examine(tmp_path)
    assert not report.devices[1].opens
    assert report.problems == ()
    assert report.cpu_flags == {}


def test_a_driver_that_is_not_used_is_a_problem(tmp_path, monkeypatch):
    if CUDA in listed_providers(onnxruntime()):
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(doctor, "installed_wheels", lambda: {"onnxruntime": "1.31.1"})
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM")
    (problem,) = examine(tmp_path).problems
    assert "pip uninstall -y onnxruntime, then pip install 'tfinfer[gpu]'" in problem


def test_cpu_flags_are_read(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx avx2 avx512_vnni\n\nflags\t: other\n")
    flags = {"avx2": True, "avx512f": False, "avx512_vnni": True, "avx_vnni": False}
    assert examine(tmp_path).cpu_flags == flags


def test_nothing_installed_is_a_report_too(monkeypatch):
    def missing():
        raise MissingDependencyError("onnxruntime is not installed: pip install 'tfinfer[cpu]'")

    monkeypatch.setattr(doctor, "onnxruntime", missing)
    monkeypatch.setattr(doctor, "installed_wheels", dict)
    report = examine()
    assert (report.onnxruntime, report.providers) == (None, ())
    assert report.problems == ("onnxruntime is not installed: pip install 'tfinfer[cpu]'",)
    assert not any(device.opens for device in report.devices)


def test_two_wheels_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "installed_wheels", lambda: {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    assert any("overwrite each other" in problem for problem in examine().problems)


def test_a_device_that_is_listed_but_does_not_open_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "listed_providers", lambda ort: ("CPUExecutionProvider", CUDA))
    monkeypatch.setattr(doctor, "probe", lambda name: f"{name} is sad; check the NVIDIA driver")
    cpu, cuda = examine().problems
    assert "cpu does not compute: cpu is sad" in cpu
    assert "pip install 'tfinfer[cpu]'" in cpu
    assert "cuda is in this onnxruntime but does not open: cuda is sad; check the NVIDIA driver" in cuda


def test_an_old_onnxruntime_and_a_missing_package_are_problems(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda: (1, 20, 1))
    monkeypatch.setattr(doctor, "_version_of", lambda name: None if name == "tokenizers" else "1.0")
    problems = "\n".join(examine().problems)
    assert "onnxruntime 1.20.1 is older than 1.24: pip install -U onnxruntime" in problems
    assert "tokenizers is not installed: pip install tokenizers" in problems
    assert version() >= doctor.LEAST_ORT


def test_telemetry_of_an_earlier_import_is_told(monkeypatch):
    onnxruntime()
    monkeypatch.setitem(os.environ, TELEMETRY_VARIABLE, "0")
    assert "was imported before" in examine().telemetry
    assert os.environ[TELEMETRY_VARIABLE] == "1"


def test_optional_packages_are_found_without_importing_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(__spec__=None))
    optional = examine().optional
    assert (optional["torch"], optional["onnx"]) == (False, True)
