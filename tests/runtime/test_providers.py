"""A session opens where it was asked to, or an error says why not."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from tfinfer.errors import (
    CorruptModelError,
    CudaGraphError,
    IncompatibleModelError,
    InputError,
    ProviderError,
    UnsafeModelError,
)
from tfinfer.session import providers
from tfinfer.session.onnx_bytes import field
from tfinfer.session.ort import onnxruntime
from tfinfer.session.probe import addition_graph, probe
from tfinfer.session.providers import open_session
from tfinfer.session.threads import Threads

ONE = Threads(1, "1: a test")
CUDA = "CUDAExecutionProvider"


@pytest.fixture
def no_cuda():
    if CUDA in providers.listed_providers(onnxruntime()):
        pytest.skip("this onnxruntime has CUDA")


class FakeOrt(SimpleNamespace):
    """An onnxruntime whose CUDA does as the test says."""

    def __init__(self, tmp_path, active=CUDA, refusal=None, listed=(CUDA, "CPUExecutionProvider"), complaint=None):
        super().__init__(__file__=str(tmp_path / "__init__.py"), SessionOptions=onnxruntime().SessionOptions)
        self.active, self.refusal, self.listed, self.complaint, self.asked = active, refusal, listed, complaint, []

    def get_available_providers(self):
        return list(self.listed)

    def preload_dlls(self):
        if self.complaint:
            print(f"Failed to load {self.complaint}\nPlease follow https://example.org")

    def InferenceSession(self, model, sess_options, providers, enable_fallback):
        self.asked.append((providers, enable_fallback))
        cuda = isinstance(providers[0], tuple)
        if cuda and self.refusal:
            raise self.refusal
        active = self.active if cuda else "CPUExecutionProvider"
        return SimpleNamespace(get_providers=lambda: [active])


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def make(**how):
        ort = FakeOrt(tmp_path, **how)
        monkeypatch.setattr(providers, "onnxruntime", lambda: ort)
        return ort

    return make


def external(location, length=4):
    """y = x + w, where the one float of w lies in another file."""
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"Add")
    where = {b"location": location.encode(), b"length": str(length).encode()}
    entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in where.items())
    weight = field(1, 1) + field(2, 1) + field(8, b"w") + entries + field(14, 1)
    shape = field(1, field(1, 1) + field(2, field(1, field(1, 1))))
    values = [field(number, field(1, name) + field(2, shape)) for number, name in ((11, b"x"), (12, b"y"))]
    graph = field(1, node) + field(2, b"g") + field(5, weight) + b"".join(values)
    return field(1, 8) + field(7, graph) + field(8, field(2, 17))


def test_cpu_opens_from_bytes_and_from_a_path(tmp_path):
    (tmp_path / "a.onnx").write_bytes(addition_graph())
    for model in (addition_graph(), tmp_path / "a.onnx", str(tmp_path / "a.onnx")):
        opened = open_session(model, device="cpu", threads=ONE)
        assert (opened.device, opened.threads, opened.reason) == ("cpu", ONE, "cpu: asked for")
        (total,) = opened.session.run(None, {"x": np.array([2.0], np.float32)})
        assert total.tolist() == [4.0]


def test_the_options_that_matter_are_set():
    options = open_session(addition_graph(), device="cpu", threads=Threads(3, "")).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.enable_mem_pattern is False


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "cuda:0", None, 0])
def test_an_unknown_device_names_the_choices(device):
    with pytest.raises(InputError, match="device: expected one of cpu, cuda, auto, got"):
        open_session(addition_graph(), device=device, threads=ONE)


@pytest.mark.usefixtures("no_cuda")
def test_cuda_on_a_machine_without_it_raises_and_says_what_to_do():
    with pytest.raises(ProviderError) as caught:
        open_session(addition_graph(), device="cuda", threads=ONE)
    assert CUDA in str(caught.value)
    assert "pip uninstall -y onnxruntime, then pip install 'tfinfer[gpu]'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_cuda")
def test_auto_says_what_it_took_and_why(capfd):
    opened = open_session(addition_graph(), device="auto", threads=ONE)
    assert opened.device == "cpu"
    assert opened.reason.startswith(f"cpu: {CUDA} is not in this onnxruntime")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize(
    "model",
    [b"no protobuf at all" * 9, b"", addition_graph()[:-3], addition_graph()[:30]],
    ids=["text", "empty", "end cut off", "cut in the middle"],
)
def test_garbage_is_a_corrupt_model(model, device, tmp_path, capfd):
    """Also in a folder whose name looks like a complaint about CUDA."""
    folder = tmp_path / "CUDA under development"
    folder.mkdir()
    (folder / "a.onnx").write_bytes(model)
    for given in (model, folder / "a.onnx"):
        with pytest.raises(CorruptModelError) as caught:
            open_session(given, device=device, threads=ONE)
        assert "\n" not in str(caught.value)
        assert "ONNXRuntimeError" not in str(caught.value)
    assert str(folder / "a.onnx") in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_a_corrupt_model(tmp_path):
    with pytest.raises(CorruptModelError, match=r"gone\.onnx"):
        open_session(tmp_path / "gone.onnx", device="cpu", threads=ONE)


@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
def test_a_newer_opset_is_incompatible(suffix, tmp_path, capfd):
    (tmp_path / f"a{suffix}").write_bytes(addition_graph(opset=99))
    for model in (addition_graph(opset=99), tmp_path / f"a{suffix}"):
        with pytest.raises(IncompatibleModelError) as caught:
            open_session(model, device="cpu", threads=ONE)
        assert "99" in str(caught.value)
        assert "onnxruntime_src" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("old, new", [(b"\x08\x08", b"\x08\x63"), (b"Add", b"Odd")], ids=["format", "operator"])
def test_a_newer_format_or_operator_is_incompatible(old, new):
    model = addition_graph().replace(old, new, 1)
    with pytest.raises(IncompatibleModelError, match="update it: pip install -U onnxruntime"):
        open_session(model, device="cpu", threads=ONE)


def test_a_dtype_without_a_kernel_is_incompatible():
    bfloat16 = addition_graph().replace(b"\x0a\x08\x08\x01", b"\x0a\x08\x08\x10")
    with pytest.raises(IncompatibleModelError, match=r"no kernel for it on cpu.*another dtype"):
        open_session(bfloat16, device="cpu", threads=ONE)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname"])
def test_weights_outside_of_the_folder_are_unsafe(location, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(4))
    (tmp_path / "in/a.onnx").write_bytes(external(location))
    with pytest.raises(UnsafeModelError, match="outside its folder"):
        open_session(tmp_path / "in/a.onnx", device="cpu", threads=ONE)


def test_weights_that_are_missing_or_short_are_corrupt(tmp_path, capfd):
    (tmp_path / "a.onnx").write_bytes(external("w.bin"))
    with pytest.raises(CorruptModelError, match=r"w\.bin"):
        open_session(tmp_path / "a.onnx", device="cpu", threads=ONE)
    (tmp_path / "w.bin").write_bytes(b"\x00")
    with pytest.raises(CorruptModelError):
        open_session(tmp_path / "a.onnx", device="cpu", threads=ONE)
    (tmp_path / "w.bin").write_bytes(np.float32(1).tobytes())
    session = open_session(tmp_path / "a.onnx", device="cpu", threads=ONE).session
    assert session.run(None, {"x": np.array([1], np.float32)})[0].tolist() == [2]
    assert capfd.readouterr() == ("", "")


def test_our_own_mistakes_stay_visible(fake):
    fake(refusal=KeyError("a bug"))
    with pytest.raises(KeyError):
        open_session(b"", device="cuda", threads=ONE)


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_cuda_that_opens_is_taken(fake, device):
    ort = fake()
    opened = open_session(b"", device=device, threads=ONE, device_id=2)
    assert opened.device == "cuda"
    assert opened.reason == {"cuda": "cuda: asked for", "auto": "cuda: it opened"}[device]
    ((asked, fallback),) = ort.asked
    assert fallback == 0
    assert asked[0] == (CUDA, {"arena_extend_strategy": "kSameAsRequested", "device_id": 2, "use_tf32": 0})


def test_cuda_graphs_are_asked_for_and_nothing_else_changes(fake):
    ort = fake()
    assert open_session(b"", device="cuda", threads=ONE, cuda_graph=True).device == "cuda"
    assert ort.asked[0][0][0][1]["enable_cuda_graph"] == 1


@pytest.mark.parametrize("device", ["cuda", "auto"])
@pytest.mark.parametrize("feature", ["graph capture feature", "CUDA Graph feature"])
def test_a_graph_that_cannot_be_recorded_is_refused_and_not_put_on_the_cpu(fake, device, feature):
    said = f"This session cannot use the {feature} as requested by the user as all compute graph nodes have not ..."
    fake(refusal=RuntimeError(said))
    with pytest.raises(CudaGraphError, match=r"cannot be recorded.*without --cuda-graph"):
        open_session(b"", device=device, threads=ONE, cuda_graph=True)


def test_cuda_that_registers_as_a_plug_in_is_listed(fake):
    ort = fake(listed=("CPUExecutionProvider",))
    ort.get_ep_devices = lambda: [SimpleNamespace(ep_name=CUDA), SimpleNamespace(ep_name="CPUExecutionProvider")]
    assert open_session(b"", device="cuda", threads=ONE).device == "cuda"


@pytest.mark.parametrize(
    "how, said",
    [
        ({"active": "CPUExecutionProvider"}, "fell back to CPUExecutionProvider"),
        ({"refusal": RuntimeError("CUDA failure 100: no CUDA-capable device is detected")}, "CUDA failure 100"),
        ({"refusal": ValueError("unknown option")}, "unknown option"),
        ({"refusal": MemoryError("std::bad_alloc")}, "bad_alloc"),
    ],
)
def test_cuda_that_does_not_open_is_never_silent(fake, how, said, capfd):
    """onnxruntime itself would log a line and compute on the CPU."""
    fake(**how, complaint="libcudnn.so.9: not there")
    with pytest.raises(ProviderError, match=said) as caught:
        open_session(b"", device="cuda", threads=ONE)
    assert "Failed to load libcudnn.so.9: not there" in str(caught.value)
    opened = open_session(b"", device="auto", threads=ONE)
    assert opened.device == "cpu"
    assert said in opened.reason
    assert "\n" not in opened.reason
    assert capfd.readouterr().out == ""


def test_the_loaders_complaint_about_the_providers_library_is_told(fake, tmp_path):
    if os.name != "posix" or os.uname().sysname != "Linux":
        pytest.skip("the libraries are looked at on Linux only")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    fake(active="CPUExecutionProvider")
    with pytest.raises(ProviderError, match=r"libonnxruntime_providers_cuda\.so: file too short"):
        open_session(b"", device="cuda", threads=ONE)


def test_the_remedy_with_the_right_wheel_is_the_driver(fake, monkeypatch):
    monkeypatch.setattr(providers, "installed_wheels", lambda: {"onnxruntime-gpu": "1.31.1"})
    fake(active="CPUExecutionProvider")
    with pytest.raises(ProviderError, match=r"installed: onnxruntime-gpu 1\.31\.1; check the NVIDIA driver"):
        open_session(b"", device="cuda", threads=ONE)


def test_the_probe_computes():
    assert probe("cpu") is None


@pytest.mark.usefixtures("no_cuda")
def test_the_probe_says_why_not():
    assert CUDA in probe("cuda")


def test_the_probe_tells_a_failing_run_and_a_wrong_sum(monkeypatch):
    def opens(answer):
        def run(names, feeds):
            if isinstance(answer, Exception):
                raise answer
            return [np.array([answer])]

        session = SimpleNamespace(session=SimpleNamespace(run=run))
        monkeypatch.setattr("tfinfer.session.probe.open_session", lambda *_, **__: session)

    opens(RuntimeError("CUDA failure\nat line 3"))
    assert probe("cuda") == "CUDA failure"
    opens(4.0)
    assert probe("cuda") == "cuda: 1.5 + 1.5 came out as [4.0]"


@pytest.mark.cuda
def test_the_probe_computes_on_cuda():
    if CUDA not in providers.listed_providers(onnxruntime()):
        pytest.skip("this onnxruntime has no CUDA")
    assert probe("cuda") is None
