"""On a CUDA device: fp16 and bf16 exports proved there, the cache staying where it is. `make cuda` runs these."""

import handwritten
import numpy as np
import pytest
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.proof.prove import verify_folder
from tfinfer.session.memory import CudaMemory
from tfinfer.session.ort import onnxruntime

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime().get_available_providers(), reason="no onnxruntime-gpu"
    ),
]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["Learned", "Rotary", "Alibi", "Window", "OddHeads", "SoftCap", "ComplexRotary"])
def test_a_module_is_proved_and_generates_on_the_device(name, dtype, tmp_path):
    report = export_model(handwritten.MODULES[name](), tmp_path / "out", dtype=dtype, max_length=96)
    assert report.verdicts[-1].device == "cuda"
    assert not report.manifest.proof.not_run
    with tfinfer.load(tmp_path / "out", device="cuda") as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed
        prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
        together = model.generate(prompts, max_tokens=16)
        assert [c.usage.completion_tokens for c in together] == [16, 16, 16]


def test_float32_with_standard_operators_is_pytorch_within_the_strict_bound(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", flavor="standard", max_length=96)
    with tfinfer.load(tmp_path / "out", device="cuda") as model:
        verdict = verify_folder(model.decoder, tmp_path / "out")
        assert verdict.passed, verdict.lines()


def test_the_cache_stays_on_the_device_and_is_written_in_place(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", max_length=96)
    with tfinfer.load(tmp_path / "out", device="cuda") as model:
        decoder = model.decoder
        assert isinstance(decoder.memory, CudaMemory)
        cache = decoder.open_cache(2, 64)
        slots = [cache.acquire(), cache.acquire()]
        for slot in slots:
            decoder.prefill(cache, slot, [1, 2, 3])
        pointers = cache.pointers(0)
        before = decoder.memory.read(cache.buffers[0]).copy()
        decoder.step(cache, slots, [4, 5])
        after = decoder.memory.read(cache.buffers[0])
        assert cache.pointers(0) == pointers
        assert np.array_equal(before[:, :, :3], after[:, :, :3])
        assert np.abs(after[:, :, 3]).sum() > 0
        assert not np.abs(after[:, :, 4:]).sum()


def test_forking_growing_and_moving_happen_on_the_device(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", max_length=200)
    with tfinfer.load(tmp_path / "out", device="cuda") as model:
        decoder = model.decoder
        cache = decoder.open_cache(3, 64)
        first = cache.acquire()
        decoder.prefill(cache, first, list(range(1, 40)))
        twin = cache.fork(first)
        cache.grow(150)
        expected = decoder.step(cache, [first], [7]).copy()
        np.testing.assert_allclose(decoder.step(cache, [twin], [7]), expected, atol=1e-2)
        cache.release(first)
        other = cache.acquire()
        decoder.prefill(cache, other, [5])
        logits = decoder.step(cache, [twin, other], [8, 9]).copy()
        assert np.isfinite(logits).all()
