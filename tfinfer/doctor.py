"""Examines the installation: what is there, what really opens, and what to do about what does not.

Of a model folder it asks alone whether its tuning applies. Packages of the export half are looked for without being
imported.
"""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tfinfer.errors import MissingDependencyError
from tfinfer.session.ort import (
    INSTALL_GPU,
    TELEMETRY_VARIABLE,
    installed_wheels,
    onnxruntime,
    reinstall,
    version,
    wheel_problem,
)
from tfinfer.session.probe import probe
from tfinfer.session.providers import listed_providers
from tfinfer.session.threads import Threads, thread_count
from tfinfer.version import __version__

LEAST_ORT = (1, 24)  # as the extras of the package say
_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BASE = ("numpy", "tokenizers")
_OPTIONAL = ("torch", "onnx", "transformers")
# What onnxruntime's kernels choose by: wide registers, and the dot product of 8-bit integers.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni")


@dataclass(frozen=True)
class Device:
    """Whether onnxruntime names a device's provider, and whether an addition came out right on it."""

    name: str
    listed: bool
    opens: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What the examination found; `problems` is empty on a machine that needs nothing."""

    tfinfer: str
    python: str
    platform: str
    packages: dict[str, str | None]  # of the base installation, None where missing
    optional: dict[str, bool]  # of the extras: is it there
    onnxruntime: str | None
    wheels: dict[str, str]
    providers: tuple[str, ...]
    devices: tuple[Device, ...]
    threads: Threads
    telemetry: str
    cpu_flags: dict[str, bool]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)


def examine(root: Path = Path("/")) -> Report:
    """Examine this installation and machine; never raises because something is missing or broken.

    Args:
        root: where `proc` and `sys` are.
    """
    wheels = installed_wheels()
    telemetry = _telemetry()
    try:
        ort, broken = onnxruntime(), None
    except MissingDependencyError as cause:
        ort, broken = None, str(cause)
    providers = listed_providers(ort) if ort else ()
    devices = tuple(_device(name, providers, broken) for name in _NAMES)
    packages = {name: _version_of(name) for name in _BASE}
    problems: list[str | None] = []
    problems += [f"{name} is not installed: pip install {name}" for name, number in packages.items() if number is None]
    problems += [broken, wheel_problem(wheels) if wheels else None, _too_old(wheels) if ort else None]
    problems += [_device_problem(device, wheels, root) for device in devices if ort]
    return Report(
        tfinfer=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        optional={name: _is_there(name) for name in _OPTIONAL},
        onnxruntime=str(ort.__version__) if ort else None,
        wheels=wheels,
        providers=providers,
        devices=devices,
        threads=thread_count(root=root),
        telemetry=telemetry if ort else "off: onnxruntime is not loaded",
        cpu_flags=_cpu_flags(root),
        problems=tuple(problem for problem in problems if problem),
    )


def tuning(folder: Path) -> str:
    """Whether what `tfinfer tune` measured for a folder applies here. Raises ModelError for what is no such folder."""
    from tfinfer.manifest import load_manifest
    from tfinfer.session import tuned

    load_manifest(folder)
    return tuned.state(folder)


def _telemetry() -> str:
    """Must be asked before `onnxruntime()`, which sets the variable."""
    if "onnxruntime" in sys.modules and os.environ.get(TELEMETRY_VARIABLE) != "1":
        return f"off, but onnxruntime was imported before tfinfer could set {TELEMETRY_VARIABLE}=1"
    return f"off: {TELEMETRY_VARIABLE}=1 was set before onnxruntime was imported"


def _device(name: str, providers: tuple[str, ...], broken: str | None) -> Device:
    listed = _NAMES[name] in providers
    # CUDA is tried even where it is not listed: its libraries are looked for only then
    refusal = broken or probe(name)
    return Device(name, listed, refusal is None, refusal or "one addition came out right")


def _device_problem(device: Device, wheels: dict[str, str], root: Path) -> str | None:
    if device.opens:
        return None
    if device.name == "cpu":
        return f"cpu does not compute: {device.detail}: {reinstall(wheels)}"
    if device.listed:
        return f"{device.name} is in this onnxruntime but does not open: {device.detail}"
    if (root / "proc/driver/nvidia/version").exists():
        return f"an NVIDIA driver is loaded, but this onnxruntime cannot use it: {reinstall(wheels, INSTALL_GPU)}"
    return None


def _too_old(wheels: dict[str, str]) -> str | None:
    if version() >= LEAST_ORT:
        return None
    least, have = ".".join(map(str, LEAST_ORT)), ".".join(map(str, version()))
    return f"onnxruntime {have} is older than {least}: pip install -U {' '.join(sorted(wheels)) or 'onnxruntime'}"


def _version_of(name: str) -> str | None:
    try:
        return package_version(name)
    except PackageNotFoundError:
        return None


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module that somebody made by hand has no spec
        return True


def _cpu_flags(root: Path) -> dict[str, bool]:
    """Whether the processor has each flag; empty where it is not an x86 with a /proc."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    return {flag: flag in flags for flag in _FLAGS} if flags is not None else {}
