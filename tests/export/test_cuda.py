"""On a CUDA device: fp16 and bf16 exports proved there, the cache staying where it is, steps recorded as CUDA graphs.

`make cuda` runs these.
"""

import threading

import handwritten
import numpy as np
import pytest
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.proof.prove import verify_folder
from tfinfer.session.device_step import PLAIN_STEPS, DeviceStep
from tfinfer.session.memory import CudaMemory, HostMemory
from tfinfer.session.ort import onnxruntime
from tfinfer.session.select import Selecting
from tfinfer.session.threads import Threads

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


@pytest.mark.parametrize("dtype, activations", [("int4", "fp16"), ("int8", "fp16"), ("int4", "bf16")])
def test_weights_of_few_bits_run_on_the_device(dtype, activations, tmp_path):
    report = export_model(handwritten.Rotary(), tmp_path / "out", dtype=dtype, activations=activations, max_length=96)
    assert report.verdicts[-1].device == "cuda"
    with tfinfer.load(tmp_path / "out", device="cuda", cuda_graph=True) as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed


def test_values_that_float16_does_not_hold_are_finite_on_the_device(tmp_path):
    module = handwritten.Learned().eval()
    with torch.no_grad():
        module.ffn[0][0].weight *= 3e5
        module.ffn[0][2].weight /= 3e5
    report = export_model(module, tmp_path / "out", dtype="fp16", max_length=96)
    assert report.manifest.range.kept
    assert report.verdicts[-1].device == "cuda"


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


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["Learned", "Rotary", "Alibi", "Window", "SoftCap", "OneKeyHead"])
def test_recorded_steps_are_proved_and_give_the_same_tokens(name, dtype, tmp_path):
    export_model(handwritten.MODULES[name](), tmp_path / "out", dtype=dtype, max_length=200)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    with tfinfer.load(tmp_path / "out", device="cuda") as plain:
        expected = [c.token_ids for c in plain.generate(prompts, max_tokens=100, stop_ids=[])]
    with tfinfer.load(tmp_path / "out", device="cuda", cuda_graph=True) as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed
        found = [c.token_ids for c in model.generate(prompts, max_tokens=100, stop_ids=[])]
        assert model.decoder.recording.off == ""
    assert found == expected


def test_recorded_steps_see_new_lengths_buffers_and_rows(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", max_length=200)
    with (
        tfinfer.load(tmp_path / "out", device="cuda") as plain,
        tfinfer.load(tmp_path / "out", device="cuda", cuda_graph=True) as recorded,
    ):
        decoders = plain.decoder, recorded.decoder
        caches = [decoder.open_cache(2, 64) for decoder in decoders]
        slots = [[cache.acquire(), cache.acquire()] for cache in caches]
        for decoder, cache, those in zip(decoders, caches, slots):
            decoder.prefill(cache, those[0], [1, 2, 3])
            decoder.prefill(cache, those[1], [4])
        for number in range(120):  # past a growth at 64 positions; then one row alone
            rows = 2 if number < 100 else 1
            ids = np.array([number, 3 * number + 1][:rows]) % 61
            expected = plain.decoder.step(caches[0], slots[0][:rows], ids).copy()
            found = recorded.decoder.step(caches[1], slots[1][:rows], ids)
            np.testing.assert_allclose(found, expected, atol=1e-2, err_msg=f"step {number}")
        assert isinstance(caches[1].bound, DeviceStep)
        assert recorded.decoder.recording._last == 3


def test_steps_that_cannot_be_recorded_run_without(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", flavor="standard", max_length=96)
    with tfinfer.load(tmp_path / "out", device="cuda", cuda_graph=None) as model:
        assert "its attention is Attention" in model.decoder.not_recorded
        assert len(model.generate([1, 2, 3], max_tokens=16, stop_ids=[]).token_ids) == 16


def test_two_threads_share_a_model_that_records(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", max_length=96)
    with tfinfer.load(tmp_path / "out", device="cuda", cuda_graph=True) as model:
        expected = model.generate([1, 2, 3], max_tokens=60, stop_ids=[]).token_ids
        found = []
        threads = [
            threading.Thread(
                target=lambda: found.append(model.generate([1, 2, 3], max_tokens=60, stop_ids=[]).token_ids)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 3
        assert PLAIN_STEPS < 60


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}])
def test_tokens_chosen_on_the_device_are_those_chosen_here(options, tmp_path, monkeypatch):
    monkeypatch.setattr("tfinfer.session.decoder.WORTH", 1)
    export_model(handwritten.Rotary(), tmp_path / "out", dtype="fp16", max_length=96)
    with tfinfer.load(tmp_path / "out", device="cuda") as model:
        decoder = model.decoder
        assert decoder.selects
        found = model.generate([1, 2, 3], max_tokens=60, stop_ids=[], **options).token_ids
        decoder.selecting = None
        assert model.generate([1, 2, 3], max_tokens=60, stop_ids=[], **options).token_ids == found


@pytest.mark.parametrize("num_logits, count", [(61, 1), (4096, 40), (50257, 1), (151936, 50), (128256, 240)])
def test_the_best_are_found_on_the_device(num_logits, count):
    selecting, memory, host = Selecting(num_logits, "float32", "cuda", Threads(1, "")), CudaMemory(), HostMemory()
    logits, source = memory.allocate((2, 1, num_logits), "float32"), host.allocate((2, 1, num_logits), "float32")
    source.owner[:] = np.random.default_rng(0).normal(size=source.shape)
    memory.copy(logits, 0, source, 0, source.nbytes)
    values, ids = selecting.bind(logits, count).run()
    expected = np.argsort(-source.owner[:, 0], axis=1, kind="stable")[:, :count]
    assert np.array_equal(ids, expected)
    assert np.array_equal(values, np.take_along_axis(source.owner[:, 0], expected, axis=1))
    source.owner[1, 0, 7] = np.nan
    memory.copy(logits, 0, source, 0, source.nbytes)
    assert selecting.bind(logits, count).run() is None
