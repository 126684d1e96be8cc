"""Finds onnxruntime and imports it with its telemetry off: the only place of the runtime that imports it.

Knows nothing of graphs, devices or caches. Two wheels or more own the module `onnxruntime` and overwrite each other's
files, so what is installed is read from the wheels' metadata, which a broken module cannot hide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from tfinfer.errors import MissingDependencyError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

INSTALL_CPU = "pip install 'tfinfer[cpu]'"
INSTALL_GPU = "pip install 'tfinfer[gpu]'"
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> ModuleType:
    """Import onnxruntime with telemetry off; every user of it in the runtime comes through here.

    Telemetry is always off: the variable is overwritten even where the caller's environment says otherwise, and since
    it is read while the module loads, it is set before the import. Where somebody else imported onnxruntime first,
    the call after the import still switches events off.

    Raises:
        MissingDependencyError: no wheel is installed, or the one that is there does not load.
    """
    os.environ[TELEMETRY_VARIABLE] = "1"
    try:
        import onnxruntime as module
    except Exception as cause:  # a native part that does not load raises what it likes
        raise _missing(cause) from cause
    if not hasattr(module, "InferenceSession"):  # uninstalling one of two wheels leaves an empty folder behind
        raise _missing(None)
    if hasattr(module, "disable_telemetry_events"):
        module.disable_telemetry_events()
    found: ModuleType = module
    return found


def version() -> tuple[int, ...]:
    """The version of the installed onnxruntime, such as (1, 31, 1); what follows the numbers is left out."""
    numbers = re.match(r"\d+(\.\d+)*", str(onnxruntime().__version__))
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def installed_wheels(path: list[str] | None = None) -> dict[str, str]:
    """Name and version of every installed wheel that owns the module `onnxruntime`, read without importing it.

    Args:
        path: folders to search instead of `sys.path`.
    """
    from importlib.metadata import distributions  # as slow to import as a fifth of numpy, for what is asked rarely

    found = distributions(path=path) if path is not None else distributions()
    names = ((_name(wheel), wheel) for wheel in found)
    return {name: wheel.version for name, wheel in names if name.startswith(("onnxruntime", "ort-")) and _owns(wheel)}


def wheel_problem(wheels: Mapping[str, str]) -> str | None:
    """Say what is wrong with the wheels that `installed_wheels` found, and the command that mends it."""
    if len(wheels) == 1:
        return None
    if not wheels:
        return f"onnxruntime is not installed: {INSTALL_CPU} or {INSTALL_GPU}"
    both = " and ".join(f"{name} {number}" for name, number in sorted(wheels.items()))
    return f"{both} overwrite each other's files: {reinstall(wheels)}"


def reinstall(wheels: Mapping[str, str], install: str = f"{INSTALL_CPU} (or {INSTALL_GPU})") -> str:
    """The command that replaces all `wheels` by one."""
    if not wheels:
        return install
    return f"pip uninstall -y {' '.join(sorted(wheels))}, then {install}"


def _missing(cause: BaseException | None) -> MissingDependencyError:
    wheels = installed_wheels()
    absent = cause is None or (isinstance(cause, ModuleNotFoundError) and cause.name == "onnxruntime")
    if absent and not wheels:
        return MissingDependencyError(f"onnxruntime is not installed: {INSTALL_CPU} or {INSTALL_GPU}")
    names = ", ".join(f"{name} {number}" for name, number in sorted(wheels.items())) or "by no known wheel"
    lines = str(cause).strip().splitlines() if cause is not None else ["the module has no InferenceSession"]
    said = lines[0] if lines else type(cause).__name__
    return MissingDependencyError(f"onnxruntime is installed ({names}) but broken: {said}; mend: {reinstall(wheels)}")


def _name(wheel: Distribution) -> str:
    # metadata without a name exists: what an interrupted uninstall leaves behind
    return re.sub(r"[-_.]+", "-", str(wheel.metadata["Name"] or "")).lower()


def _owns(wheel: Distribution) -> bool:
    if top := wheel.read_text("top_level.txt"):
        return "onnxruntime" in top.split()
    return any(file.parts[:1] == ("onnxruntime",) for file in wheel.files or ())
