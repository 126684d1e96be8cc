"""Buffers that live longer than a step: allocated once, then copied and zeroed in place by pointer.

`HostMemory` and `CudaMemory` have the same methods, so that a cache does not know where it lies. Neither knows what
the bytes mean, nor of graphs and slots. Everything here is finished when it returns: no call leaves work in flight.
"""

import contextlib
import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfinfer.errors import InputError, ProviderError
from tfinfer.session.ort import onnxruntime

# Name to the number that ONNX gives the element type; what bindings take where numpy has no such type.
ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "bfloat16": 16,
}

Part = tuple[tuple[int, ...], str]  # a shape and a dtype
LINE = 64  # bytes that are read at once; where a buffer begins
_CUDART = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll")
_ANY_TO_ANY = 4  # cudaMemcpyDefault: the pointers say where they lie, so host buffers can be copied in and out


@dataclass(frozen=True)
class Buffer:
    """Contiguous memory of one shape; the pointer is good for as long as the buffer is held."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    owner: object = field(repr=False, compare=False)


class HostMemory:
    """Numpy arrays; bfloat16, which numpy lacks, lies in uint16."""

    device = "cpu"
    device_id = 0
    turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()  # see CudaMemory

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Make a buffer of zeros."""
        nbytes = math.prod(shape) * stored(dtype).itemsize
        try:
            owner = np.zeros(shape, stored(dtype))
        except (MemoryError, ValueError) as cause:  # ValueError: more bytes than addresses
            raise ProviderError(f"cpu: no memory for {nbytes} bytes, {dtype} {shape}") from cause
        return Buffer(owner.ctypes.data, tuple(shape), dtype, nbytes, owner)

    def allocate_all(self, parts: Sequence[Part]) -> list[Buffer]:
        """Make buffers of zeros next to each other, which together are large enough for the system's large pages.

        A step reads all of a cache, and finding as many small pages costs it: behind 1,024 positions steps are 1.05
        times as fast (1.01 to 1.13), behind 4,096 1.08 times (0.91 to 1.16), 4-bit weights of 135 M parameters.
        """
        sizes = [math.prod(shape) * stored(dtype).itemsize for shape, dtype in parts]
        ends = list(itertools.accumulate(-(-size // LINE) * LINE for size in sizes))
        block = self.allocate((LINE + (ends[-1] if ends else 0),), "uint8")
        first, found = -block.pointer % LINE, []
        for (shape, dtype), size, start in zip(parts, sizes, (0, *ends)):
            owner = np.asarray(block.owner)[first + start :][:size].view(stored(dtype)).reshape(shape)
            found.append(Buffer(block.pointer + first + start, tuple(shape), dtype, size, owner))
        return found

    def copy(self, dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        """Copy `nbytes` bytes; the two places may overlap."""
        _check_range(dst, dst_offset, nbytes)
        _check_range(src, src_offset, nbytes)
        ctypes.memmove(dst.pointer + dst_offset, src.pointer + src_offset, nbytes)

    def copy_2d(
        self, dst_pointer: int, dst_pitch: int, src_pointer: int, src_pitch: int, width: int, height: int
    ) -> None:
        """Copy `height` rows of `width` bytes that begin every `pitch` bytes."""
        assert height <= 1 or width <= min(dst_pitch, src_pitch), (width, dst_pitch, src_pitch)
        if dst_pitch == src_pitch == width:
            ctypes.memmove(dst_pointer, src_pointer, width * height)
            return
        for row in range(height):
            ctypes.memmove(dst_pointer + row * dst_pitch, src_pointer + row * src_pitch, width)

    def zero(self, pointer: int, nbytes: int) -> None:
        """Set `nbytes` bytes to zero."""
        ctypes.memset(pointer, 0, nbytes)

    def read(self, buffer: Buffer) -> npt.NDArray[Any]:
        """Return a copy; bfloat16 comes back as float32."""
        array = np.empty(buffer.shape, stored(buffer.dtype))
        ctypes.memmove(array.ctypes.data, buffer.pointer, buffer.nbytes)
        return _widen(array, buffer.dtype)


class CudaMemory:
    """Memory of a CUDA device from onnxruntime's allocator, moved by the CUDA runtime.

    onnxruntime computes on a stream of its own that does not wait for the default stream, on which these copies run;
    hence each waits for its end. onnxruntime's `run` waits for its own end.
    """

    device = "cuda"

    def __init__(
        self,
        device_id: int = 0,
        *,
        cudart: Any = None,
        allocator: Callable[[tuple[int, ...], int, int], Any] | None = None,
    ) -> None:
        """Open the memory of one device.

        Args:
            device_id: number of the device.
            cudart: the CUDA runtime library; None finds it.
            allocator: from (shape, element type, device_id) to what has `data_ptr()`; None takes onnxruntime's.
        """
        self.device_id = device_id
        # While one thread records a CUDA graph no other may allocate or copy: who records holds this.
        self.turn = threading.RLock()
        self._cudart = find_cudart() if cudart is None else cudart
        self._allocator = allocator or _ort_value

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Make a buffer of zeros."""
        nbytes = math.prod(shape) * stored(dtype).itemsize
        # bindings refuse the null pointer that an allocation of nothing may give
        asked = tuple(shape) if nbytes else (1,)
        try:
            with self.turn:
                owner = self._allocator(asked, ELEMENT_TYPES[dtype], self.device_id)
        except Exception as cause:  # onnxruntime's classes have no common root
            said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ProviderError(f"cuda: no memory for {nbytes} bytes, {dtype} {shape}: {said}") from cause
        buffer = Buffer(int(owner.data_ptr()), tuple(shape), dtype, nbytes, owner)
        self.zero(buffer.pointer, nbytes)
        return buffer

    def allocate_all(self, parts: Sequence[Part]) -> list[Buffer]:
        """Make buffers of zeros."""
        return [self.allocate(shape, dtype) for shape, dtype in parts]

    def copy(self, dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        """Copy `nbytes` bytes between places that do not overlap; one of the two buffers may lie on the host."""
        _check_range(dst, dst_offset, nbytes)
        _check_range(src, src_offset, nbytes)
        to, start = dst.pointer + dst_offset, src.pointer + src_offset
        assert nbytes == 0 or abs(to - start) >= nbytes, "overlapping copies are undefined on the device"
        self._call("cudaMemcpy", to, start, nbytes, _ANY_TO_ANY)

    def copy_2d(
        self, dst_pointer: int, dst_pitch: int, src_pointer: int, src_pitch: int, width: int, height: int
    ) -> None:
        """Copy `height` rows of `width` bytes that begin every `pitch` bytes."""
        assert height <= 1 or width <= min(dst_pitch, src_pitch), (width, dst_pitch, src_pitch)
        self._call("cudaMemcpy2D", dst_pointer, dst_pitch, src_pointer, src_pitch, width, height, _ANY_TO_ANY)

    def zero(self, pointer: int, nbytes: int) -> None:
        """Set `nbytes` bytes to zero."""
        self._call("cudaMemset", pointer, 0, nbytes)

    def read(self, buffer: Buffer) -> npt.NDArray[Any]:
        """Return a copy on the host; bfloat16 comes back as float32."""
        array = np.empty(buffer.shape, stored(buffer.dtype))
        self._call("cudaMemcpy", array.ctypes.data, buffer.pointer, buffer.nbytes, _ANY_TO_ANY)
        return _widen(array, buffer.dtype)

    def _call(self, name: str, *arguments: int) -> None:
        with self.turn:
            # the current device belongs to the calling thread, and threads come and go
            self._checked("cudaSetDevice", self.device_id)
            self._checked(name, *arguments)
            self._checked("cudaStreamSynchronize", 0)

    def _checked(self, name: str, *arguments: int) -> None:
        if code := getattr(self._cudart, name)(*arguments):
            text = self._cudart.cudaGetErrorString(code)
            raise ProviderError(f"cuda: {name} on device {self.device_id} failed: {text.decode()} ({code})")


def find_cudart(maps: Path = Path("/proc/self/maps"), names: tuple[str, ...] = _CUDART) -> Any:
    """Load the CUDA runtime: the one that this process has loaded already, else one by its names.

    The loaded one comes first since it is onnxruntime's own and so suits the driver; a newer one lying about may not.

    Raises:
        ProviderError: there is none.
    """
    for name in (*_loaded(maps), *names):
        with contextlib.suppress(OSError):
            return _declare(ctypes.CDLL(name))
    raise ProviderError(f"cuda: the CUDA runtime is not found (tried {', '.join(names)}): pip install 'tfinfer[gpu]'")


def _loaded(maps: Path) -> list[str]:
    """Paths of the CUDA runtimes mapped into this process, each once."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in lines if "libcudart" in line)
    return list(dict.fromkeys(path for path in paths if Path(path).name.startswith("libcudart.so")))


def _declare(library: Any) -> Any:
    """Say what the functions take: ctypes would pass pointers and sizes as 32 bits."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.cudaSetDevice.argtypes = [number]
    library.cudaMemcpy.argtypes = [pointer, pointer, size, number]
    library.cudaMemcpy2D.argtypes = [pointer, size, pointer, size, size, size, number]
    library.cudaMemset.argtypes = [pointer, number, size]
    library.cudaStreamSynchronize.argtypes = [pointer]
    library.cudaGetErrorString.argtypes = [number]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _ort_value(shape: tuple[int, ...], element_type: int, device_id: int) -> Any:
    return onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, "cuda", device_id)


def stored(dtype: str) -> np.dtype[Any]:
    """The numpy type that holds `dtype`."""
    if dtype not in ELEMENT_TYPES:
        raise InputError(f"dtype: expected one of {', '.join(sorted(ELEMENT_TYPES))}, got {dtype!r}")
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _widen(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """bfloat16 is the upper half of float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def _check_range(buffer: Buffer, offset: int, nbytes: int) -> None:
    assert min(offset, nbytes) >= 0, (offset, nbytes)
    assert offset + nbytes <= buffer.nbytes, (offset, nbytes, buffer)
