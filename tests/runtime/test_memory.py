"""Both memories move the same bytes; the CUDA one is run here on a CUDA runtime made of memmove."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from tfinfer.errors import InputError, ProviderError
from tfinfer.session import memory as memories
from tfinfer.session.memory import ELEMENT_TYPES, Buffer, CudaMemory, HostMemory, find_cudart
from tfinfer.session.ort import onnxruntime
from tfinfer.session.probe import addition_graph
from tfinfer.session.providers import listed_providers, open_session
from tfinfer.session.threads import Threads


class FakeCudart:
    """The functions of the CUDA runtime that are used, on host memory, with a list of the calls."""

    def __init__(self, fails=None):
        self.fails, self.calls, self.held = fails, [], []
        self.turn = threading.RLock()

    def _done(self, name):
        self.calls.append(name)
        self.held.append(self.turn._is_owned())
        return 2 if name == self.fails else 0

    def cudaSetDevice(self, number):
        self.device = number
        return self._done("cudaSetDevice")

    def cudaMemcpy(self, dst, src, nbytes, kind):
        assert kind == 4
        ctypes.memmove(dst, src, nbytes)
        return self._done("cudaMemcpy")

    def cudaMemcpy2D(self, dst, dst_pitch, src, src_pitch, width, height, kind):
        assert kind == 4
        for row in range(height):
            ctypes.memmove(dst + row * dst_pitch, src + row * src_pitch, width)
        return self._done("cudaMemcpy2D")

    def cudaMemset(self, pointer, value, nbytes):
        ctypes.memset(pointer, value, nbytes)
        return self._done("cudaMemset")

    def cudaStreamSynchronize(self, stream):
        assert stream == 0
        return self._done("cudaStreamSynchronize")

    def cudaGetErrorString(self, code):
        return b"out of memory"


class Allocation:
    """What an OrtValue is to CudaMemory: memory full of rubbish, and its address."""

    def __init__(self, shape, element_type, device_id):
        self.shape, self.element_type, self.device_id = shape, element_type, device_id
        self.array = np.full(int(np.prod(shape)) * 8, 0xAB, np.uint8)

    def data_ptr(self):
        return self.array.ctypes.data


def fake_cuda(**how):
    return CudaMemory(3, cudart=FakeCudart(**how), allocator=Allocation)


@pytest.fixture(params=[HostMemory, fake_cuda], ids=["host", "cuda"])
def memory(request):
    return request.param()


def fill(buffer, array):
    array = np.ascontiguousarray(array)
    assert array.nbytes == buffer.nbytes
    ctypes.memmove(buffer.pointer, array.ctypes.data, array.nbytes)


@pytest.mark.parametrize("dtype", sorted(ELEMENT_TYPES))
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 4)])
def test_a_new_buffer_is_zeros(memory, shape, dtype):
    buffer = memory.allocate(shape, dtype)
    assert (buffer.shape, buffer.dtype) == (shape, dtype)
    assert buffer.pointer != 0, "bindings refuse a null pointer even for nothing"
    read = memory.read(buffer)
    assert read.shape == shape
    assert read.dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert not read.any()
    stored = 2 if dtype == "bfloat16" else read.itemsize
    assert buffer.nbytes == int(np.prod(shape)) * stored


def test_read_is_a_copy(memory):
    buffer = memory.allocate((3,), "int64")
    fill(buffer, np.array([1, 2, 3]))
    read = memory.read(buffer)
    fill(buffer, np.array([7, 8, 9]))
    assert read.tolist() == [1, 2, 3]


def test_bfloat16_is_read_as_float32(memory):
    buffer = memory.allocate((5,), "bfloat16")
    values = np.array([1.0, -2.5, 0.0, np.inf, 3.0e38], np.float32)
    fill(buffer, (values.view(np.uint32) >> 16).astype(np.uint16))
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert memory.read(buffer).tolist() == expected.tolist()


def test_copy_at_offsets(memory):
    one, other = memory.allocate((4,), "int32"), memory.allocate((6,), "int32")
    fill(one, np.arange(1, 5, dtype=np.int32))
    memory.copy(other, 8, one, 4, 12)
    assert memory.read(other).tolist() == [0, 0, 2, 3, 4, 0]


@pytest.mark.parametrize("dst_offset, src_offset, nbytes", [(0, 0, 17), (4, 0, 16), (0, 13, 4), (-4, 0, 4), (0, 0, -1)])
def test_copies_past_the_end_never_reach_memory(memory, dst_offset, src_offset, nbytes):
    one, other = memory.allocate((4,), "int32"), memory.allocate((4,), "int32")
    with pytest.raises(AssertionError):
        memory.copy(one, dst_offset, other, src_offset, nbytes)


def test_copies_within_one_buffer():
    host = HostMemory()
    buffer = host.allocate((4,), "uint8")
    fill(buffer, np.array([1, 2, 3, 4], np.uint8))
    host.copy(buffer, 1, buffer, 0, 3)
    assert host.read(buffer).tolist() == [1, 1, 2, 3]
    cuda = fake_cuda()
    buffer = cuda.allocate((4,), "uint8")
    with pytest.raises(AssertionError, match="overlap"):
        cuda.copy(buffer, 1, buffer, 0, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_cache_grows_by_one_copy_of_rows(memory, dtype):
    """(slots, heads, capacity, dim): what was kept stays where its slot, head and position say."""
    slots, heads, dim, small, large = 2, 3, 4, 5, 8
    old, new = memory.allocate((slots, heads, small, dim), dtype), memory.allocate((slots, heads, large, dim), dtype)
    size = old.nbytes // (slots * heads * small * dim)
    fill(old, np.random.default_rng(0).integers(1, 100, old.nbytes, np.uint8))
    memory.copy_2d(new.pointer, large * dim * size, old.pointer, small * dim * size, small * dim * size, slots * heads)
    before, after = memory.read(old), memory.read(new)
    np.testing.assert_array_equal(after[:, :, :small], before)
    assert not after[:, :, small:].any()


def test_rows_without_gaps_are_one_copy(memory):
    one, other = memory.allocate((3, 4), "uint8"), memory.allocate((3, 4), "uint8")
    fill(one, np.arange(12, dtype=np.uint8))
    memory.copy_2d(other.pointer, 4, one.pointer, 4, 4, 3)
    assert memory.read(other).tolist() == memory.read(one).tolist()
    with pytest.raises(AssertionError):
        memory.copy_2d(other.pointer, 4, one.pointer, 3, 4, 3)


def test_zero_stays_in_its_range(memory):
    buffer = memory.allocate((6,), "uint8")
    fill(buffer, np.full(6, 9, np.uint8))
    memory.zero(buffer.pointer + 2, 3)
    assert memory.read(buffer).tolist() == [9, 9, 0, 0, 0, 9]


def test_an_unknown_dtype_names_the_choices(memory):
    with pytest.raises(InputError, match=r"bfloat16.*got 'float64'"):
        memory.allocate((1,), "float64")


@pytest.mark.parametrize("shape", [(2**45,), (2**62, 8)])
def test_too_much_memory_is_an_error_of_the_tree(shape):
    with pytest.raises(ProviderError, match="cpu: no memory for"):
        HostMemory().allocate(shape, "float32")


def test_a_buffer_keeps_its_memory_alive():
    buffer = HostMemory().allocate((4,), "float32")
    assert isinstance(buffer.owner, np.ndarray)
    assert "owner" not in repr(buffer)
    assert buffer == Buffer(buffer.pointer, (4,), "float32", 16, None)


def test_the_device_is_asked_by_number():
    memory = fake_cuda()
    buffer = memory.allocate((2,), "bfloat16")
    assert (buffer.owner.shape, buffer.owner.element_type, buffer.owner.device_id) == ((2,), 16, 3)
    assert memory._cudart.device == 3
    assert (memory.device, memory.device_id) == ("cuda", 3)


def test_every_cuda_call_waits_for_its_turn():
    """While another thread records a CUDA graph, a copy or an allocation would spoil it."""
    memory = fake_cuda()
    memory._cudart.turn = memory.turn
    memory._cudart.held.clear()
    taken = []
    memory._allocator = lambda *what: taken.append(memory.turn._is_owned()) or Allocation(*what)
    memory.read(memory.allocate((4,), "uint8"))
    assert taken == [True]
    assert memory._cudart.held
    assert all(memory._cudart.held)


def test_every_cuda_call_waits_for_its_end():
    """onnxruntime's stream does not wait for the default stream: without this a step could read old bytes."""
    memory = fake_cuda()
    one, other = memory.allocate((4,), "uint8"), memory.allocate((4,), "uint8")
    calls = memory._cudart.calls
    calls.clear()
    memory.copy(one, 0, other, 0, 4)
    memory.copy_2d(one.pointer, 2, other.pointer, 2, 2, 2)
    memory.zero(one.pointer, 4)
    memory.read(one)
    names = ["cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaMemcpy"]
    assert calls == [call for name in names for call in ("cudaSetDevice", name, "cudaStreamSynchronize")]


@pytest.mark.parametrize("name", ["cudaSetDevice", "cudaMemset", "cudaStreamSynchronize"])
def test_a_failed_call_is_told_in_cudas_words(name):
    with pytest.raises(ProviderError, match=rf"cuda: {name} on device 3 failed: out of memory \(2\)"):
        fake_cuda(fails=name).allocate((1,), "int8")


def test_a_failed_allocation_is_told_in_one_line():
    def refuse(*_):
        raise RuntimeError("Failed to allocate memory\nat some line")

    memory = CudaMemory(cudart=FakeCudart(), allocator=refuse)
    with pytest.raises(ProviderError, match=r"cuda: no memory for 4 bytes, float32 \(1,\): Failed to allocate memory$"):
        memory.allocate((1,), "float32")


def test_the_loaded_cuda_runtime_is_taken_before_others(monkeypatch, tmp_path):
    """A newer runtime beside onnxruntime's own may be too new for the driver."""
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0 r--p 0 08:01 12 /usr/lib/libc.so.6\n"
        "7f1 r--p 0 08:01 13 /venv/a b/libcudart.so.12\n"
        "7f2 r-xp 0 08:01 13 /venv/a b/libcudart.so.12\n"
        "7f3 r-xp 0 08:01 14 /home/libcudart-notes/other.so\n"
        "7f4 rw-p 0 00:00 0\n"
    )
    tried = []

    def load(name):
        tried.append(name)
        if name != "libcudart.so":
            raise OSError(name)
        functions = ("SetDevice", "Memcpy", "Memcpy2D", "Memset", "StreamSynchronize", "GetErrorString")
        return SimpleNamespace(**{f"cuda{name}": SimpleNamespace() for name in functions})

    monkeypatch.setattr(memories.ctypes, "CDLL", load)
    library = find_cudart(maps)
    assert tried == ["/venv/a b/libcudart.so.12", "libcudart.so.13", "libcudart.so.12", "libcudart.so"]
    assert library.cudaMemcpy.argtypes[2] is ctypes.c_size_t
    assert library.cudaGetErrorString.restype is ctypes.c_char_p


def test_no_cuda_runtime_is_told(tmp_path):
    with pytest.raises(ProviderError, match=r"CUDA runtime is not found.*'tfinfer\[gpu\]'"):
        find_cudart(tmp_path / "none", ("libcudart.so.none",))


@pytest.mark.parametrize("dtype", sorted(ELEMENT_TYPES))
def test_onnxruntime_means_the_same_element_types(dtype):
    value = onnxruntime().OrtValue.ortvalue_from_shape_and_type([2], ELEMENT_TYPES[dtype], "cpu", 0)
    assert value.element_type() == ELEMENT_TYPES[dtype]
    assert value.tensor_size_in_bytes() == HostMemory().allocate((2,), dtype).nbytes


def test_buffers_are_bound_by_pointer():
    memory = HostMemory()
    x, y = memory.allocate((1,), "float32"), memory.allocate((1,), "float32")
    session = open_session(addition_graph(), device="cpu", threads=Threads(1, "")).session
    binding = session.io_binding()
    for bind, name, buffer in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        bind(name, memory.device, memory.device_id, ELEMENT_TYPES[buffer.dtype], buffer.shape, buffer.pointer)
    for value in (1.5, 4.0):
        fill(x, np.float32(value))
        session.run_with_iobinding(binding)
        assert memory.read(y).tolist() == [2 * value]


@pytest.mark.cuda
def test_on_a_device():
    if "CUDAExecutionProvider" not in listed_providers(onnxruntime()):
        pytest.skip("this onnxruntime has no CUDA")
    threads = Threads(1, "1: a test")
    open_session(addition_graph(), device="cuda", threads=threads)  # brings the allocator and the CUDA runtime
    memory, host = CudaMemory(), HostMemory()
    source, old = host.allocate((2, 2, 3, 4), "float32"), memory.allocate((2, 2, 3, 4), "float32")
    fill(source, np.arange(48, dtype=np.float32))
    memory.copy(old, 0, source, 0, source.nbytes)
    new = memory.allocate((2, 2, 5, 4), "float32")
    memory.copy_2d(new.pointer, 80, old.pointer, 48, 48, 4)
    np.testing.assert_array_equal(memory.read(new)[:, :, :3], host.read(source))
    assert not memory.read(new)[:, :, 3:].any()
    memory.zero(new.pointer, 80)
    assert not memory.read(new)[0, 0].any()


PARTS = [((2, 3), "float32"), ((5,), "int8"), ((0, 4), "float16"), ((3, 1), "bfloat16"), ((7,), "int64")]


def test_buffers_made_together_lie_in_one_block_and_apart_from_each_other():
    memory = HostMemory()
    found = memory.allocate_all(PARTS)
    for buffer, (shape, dtype) in zip(found, PARTS, strict=True):
        assert (buffer.shape, buffer.dtype) == (shape, dtype)
        assert buffer.pointer % 64 == 0
        assert buffer.owner.ctypes.data == buffer.pointer or not buffer.nbytes
        assert not memory.read(buffer).any()
    for number, buffer in enumerate(found, 1):
        ctypes.memset(buffer.pointer, number, buffer.nbytes)
    for number, buffer in enumerate(found, 1):
        assert set(ctypes.string_at(buffer.pointer, buffer.nbytes)) <= {number}
    assert found[-1].pointer - found[0].pointer < 64 * len(PARTS)
    assert memory.allocate_all([]) == []


def test_buffers_made_together_are_what_each_would_be_alone(memory):
    for buffer, (shape, dtype) in zip(memory.allocate_all(PARTS), PARTS, strict=True):
        alone = memory.allocate(shape, dtype)
        assert (buffer.shape, buffer.dtype, buffer.nbytes) == (alone.shape, alone.dtype, alone.nbytes)
        assert buffer.pointer != 0
        assert not memory.read(buffer).any()


def test_a_block_that_does_not_fit_is_told():
    with pytest.raises(ProviderError, match="no memory"):
        HostMemory().allocate_all([((1 << 61,), "float32")] * 2)
