"""Opens a graph on the device that was asked for, or says why it does not open.

onnxruntime logs a line and computes on the CPU where CUDA does not open; here that is an error, unless the caller said
`auto`. Knows nothing of what the graph computes, of caches or of tokens. Native code of third parties (custom
operators) is never loaded: a model folder must not be able to run code.
"""

import contextlib
import ctypes
import io
import re
import sys
import textwrap
import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tfinfer.errors import (
    CorruptModelError,
    CudaGraphError,
    IncompatibleModelError,
    InputError,
    ProviderError,
    TfinferError,
    UnsafeModelError,
)
from tfinfer.session.ort import INSTALL_GPU, installed_wheels, onnxruntime, reinstall
from tfinfer.session.settings import DEFAULTS, OnCpu, Settings
from tfinfer.session.threads import Threads

DEVICES = ("cpu", "cuda", "auto")
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What onnxruntime fuses at load on the CPU into kernels that are slower than the operators by themselves: at 1 x 128
# tokens of BERT-base 24 SkipLayerNormalization took 12.3 ms, the norms and all additions without it 3.9.
SLOWER_FUSED = "SkipLayerNormFusion;BiasGeluFusion"

# What onnxruntime writes when a graph is whole but made for another version of it; its classes do not tell.
_OTHER_VERSION = (
    "under development",
    "Unsupported model IR version",
    "is not a registered function/op",
    "No Op registered",
    "Unrecognized attribute",
    "has input size",
)
_OUTSIDE = ("escapes", "Absolute path not allowed")
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc")
# What onnxruntime raises when a session that is to record CUDA graphs has nodes elsewhere.
_NO_RECORDING = ("capture feature", "CUDA Graph feature")
_NO_CUDA = ("CUDA", "CUBLAS", "CUDNN", "plugin EP")


@dataclass(frozen=True)
class Opened:
    """An open session, where it computes, and one line that says why there."""

    session: Any
    device: Literal["cpu", "cuda"]
    threads: Threads
    reason: str
    settings: Settings = DEFAULTS


def open_session(
    model: str | PathLike[str] | bytes,
    *,
    device: str,
    threads: Threads,
    on_cpu: OnCpu | None = None,
    device_id: int = 0,
    tf32: bool = False,
    cuda_graph: bool = False,
) -> Opened:
    """Open a graph.

    Args:
        model: path of the ONNX file, or its bytes where the weights are inside.
        device: `cpu`; `cuda`, which raises where CUDA does not really open; or `auto`, which then takes the CPU.
        threads: how many compute on the CPU.
        on_cpu: threads and switches that take their place where it opens on the CPU: what was measured there.
        device_id: number of the CUDA device.
        tf32: let CUDA round the inputs of fp32 products to 10 bits: faster, and no longer what PyTorch computes.
        cuda_graph: record runs that have a `gpu_graph_id`, and replay them; one thread at a time may then run it.

    Raises:
        InputError: no such device.
        ProviderError: the device does not open. CudaGraphError: it does, but cannot record this graph.
        CorruptModelError, IncompatibleModelError, UnsafeModelError: the graph does not open.
    """
    if device not in DEVICES:
        raise InputError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    ort, on_cpu = onnxruntime(), on_cpu or OnCpu(threads)
    if device == "cpu":
        return _open_cpu(ort, model, on_cpu, "cpu: asked for")
    chosen = {"device_id": device_id, "use_tf32": int(tf32)} | ({"enable_cuda_graph": 1} if cuda_graph else {})
    try:
        session = _open_cuda(ort, model, threads, chosen)
    except (ProviderError, IncompatibleModelError) as refusal:
        if device == "cuda" or isinstance(refusal, CudaGraphError):
            raise
        reason = f"cpu: {refusal}"
    else:
        why = "asked for" if device == "cuda" else "it opened"
        return Opened(session, "cuda", threads, f"cuda: {why}")
    return _open_cpu(ort, model, on_cpu, reason)


def _open_cpu(ort: ModuleType, model: str | PathLike[str] | bytes, how: OnCpu, reason: str) -> Opened:
    if how.settings.denormal_as_zero:
        _keep_float_mode(ort)
    session = _open(ort, model, how.threads, [_CPU], "cpu", how.settings)
    return Opened(session, "cpu", how.threads, reason, how.settings)


def _keep_float_mode(ort: ModuleType) -> None:
    """The first session of a process decides whether denormals are zero in its caller's thread, for numpy too.

    So one that keeps them comes first; the next ones change their own threads alone.
    """
    from tfinfer.session.probe import addition_graph

    ort.InferenceSession(addition_graph(), providers=[_CPU])


def _open_cuda(ort: ModuleType, model: str | PathLike[str] | bytes, threads: Threads, chosen: dict[str, int]) -> Any:
    notes = _preload(ort)
    if _CUDA not in listed_providers(ort):
        raise ProviderError(_closed(f"{_CUDA} is not in this onnxruntime", notes))
    # Without the strategy the arena doubles itself at each growth.
    options = {"arena_extend_strategy": "kSameAsRequested", **chosen}
    try:
        session = _open(ort, model, threads, [(_CUDA, options), _CPU], "cuda")
    except CudaGraphError:
        raise
    except ProviderError as refusal:
        raise ProviderError(_closed(str(refusal), notes)) from refusal
    if (active := session.get_providers()[0]) != _CUDA:
        notes += _missing_libraries(Path(str(ort.__file__)).parent / "capi")
        raise ProviderError(_closed(f"{_CUDA} did not open, onnxruntime fell back to {active}", notes))
    return session


def listed_providers(ort: ModuleType) -> tuple[str, ...]:
    """The providers that onnxruntime names; whether one opens is another question."""
    names = list(ort.get_available_providers())
    if hasattr(ort, "get_ep_devices"):  # providers registered as plug-ins while onnxruntime loads
        names += [device.ep_name for device in ort.get_ep_devices()]
    return tuple(dict.fromkeys(names))


def _open(
    ort: ModuleType,
    model: str | PathLike[str] | bytes,
    threads: Threads,
    providers: list[Any],
    device: str,
    settings: Settings = DEFAULTS,
) -> Any:
    try:
        # Fallback off: it would print to stdout and go on without the provider.
        return ort.InferenceSession(
            model if isinstance(model, bytes) else fspath(model),
            sess_options=_options(ort, threads, device, settings),
            providers=providers,
            enable_fallback=0,
        )
    except Exception as cause:  # onnxruntime's classes have no common root
        name = "the graph" if isinstance(model, bytes) else fspath(model)
        if (error := _translate(cause, name, device)) is None:
            raise
        raise error from cause


def _options(ort: ModuleType, threads: Threads, device: str, settings: Settings = DEFAULTS) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # everything logged as an error is raised as well; 3 would print it a second time
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not what the file's name ends in
    if device == "cpu":
        options.add_session_config_entry("optimization.disable_specified_optimizers", SLOWER_FUSED)
    settings.put_into(options)
    return options


def _translate(cause: Exception, name: str, device: str) -> TfinferError | None:
    """The error of the tree for what onnxruntime raised; None for what is none of its business."""
    said, kind = _brief(cause), type(cause).__name__

    def has(marks: tuple[str, ...]) -> bool:
        return any(mark in said.replace(name, "") for mark in marks)  # a folder may be called CUDA

    if has(_NO_RECORDING):
        mend = "load it with cuda_graph=False (without --cuda-graph), or export it again with this tfinfer"
        return CudaGraphError(f"{name}: its steps cannot be recorded as CUDA graphs: {said}; {mend}")
    if kind == "NotImplemented":
        mend = "open it on another device or export it in another dtype"
        return IncompatibleModelError(f"{name}: onnxruntime has no kernel for it on {device}: {said}; {mend}")
    if has(_OTHER_VERSION):
        wheels = " ".join(sorted(installed_wheels())) or "onnxruntime"
        return IncompatibleModelError(f"{name}: needs another onnxruntime: {said}; update it: pip install -U {wheels}")
    if has(("External data",)) and has(_OUTSIDE):
        return UnsafeModelError(f"{name}: its weights lie outside its folder: {said}")
    if kind == "EPFail" or isinstance(cause, MemoryError) or has(_NO_MEMORY) or (device == "cuda" and has(_NO_CUDA)):
        return ProviderError(f"{device} does not open: {said}")
    if type(cause).__module__.startswith("onnxruntime"):
        return CorruptModelError(f"{name}: expected a whole ONNX graph: {said}")
    if isinstance(cause, (RuntimeError, ValueError)):  # how providers and their options are refused
        return ProviderError(f"{device} does not open: {said}")
    return None


def _brief(cause: Exception) -> str:
    """The first line of onnxruntime's message without its code, source file and C++ signature."""
    line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", line)
    line = re.sub(r"/\S+\.(cc|h|cpp):\d+ .*?\) (?=\S)", "", line)
    return textwrap.shorten(line, 240, placeholder=" ...")


def _preload(ort: ModuleType) -> list[str]:
    """Load CUDA and cuDNN from their wheels; returns the complaints, which onnxruntime prints to stdout."""
    if not hasattr(ort, "preload_dlls"):
        return []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            ort.preload_dlls()
        except Exception as cause:
            printed.write(f"{cause}\n")
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("Failed")]
    return lines + [str(warning.message).splitlines()[0] for warning in warned]


def _missing_libraries(folder: Path) -> list[str]:
    """What the loader says about the driver and the provider's library: onnxruntime only logs it."""
    found: list[str] = []
    if not sys.platform.startswith("linux"):
        return found
    for name in ("libcuda.so.1", str(folder / "libonnxruntime_providers_cuda.so")):
        try:
            ctypes.CDLL(name)
        except OSError as cause:
            found.append(str(cause))
    return found


def _closed(what: str, notes: list[str]) -> str:
    """The whole message: what happened, what was seen, what is installed, what to do."""
    wheels = installed_wheels()
    seen = f" ({'; '.join(dict.fromkeys(notes))})" if notes else ""
    names = ", ".join(f"{name} {number}" for name, number in sorted(wheels.items())) or "no known wheel"
    if any("gpu" in name for name in wheels) and len(wheels) == 1:
        mend = f"check the NVIDIA driver (nvidia-smi), then CUDA and cuDNN: {INSTALL_GPU}"
    else:
        mend = f"for CUDA: {reinstall(wheels, INSTALL_GPU)}"
    return f"{what}{seen}; installed: {names}; {mend}"
