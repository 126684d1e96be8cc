"""What a recorded step needs of a graph, the CPU in the place of the device: whole buffers, nothing copied back."""

import handwritten
import numpy as np
import onnx_ir as ir
import pytest

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.session.device_step import PLAIN_STEPS, DeviceStep
from tfinfer.session.recorded import Recording, cannot_record


@pytest.fixture(scope="module", params=["Learned", "Alibi", "Window", "Rotary", "SoftCap"])
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "out"
    export_model(handwritten.MODULES[request.param](), out, dtype="fp16", max_length=96)
    return out


def test_a_step_over_whole_buffers_is_the_step(folder):
    """Biases, windows and positions see the length of each row, not that of the buffers, past a growth of them."""
    with tfinfer.load(folder, threads=1) as plain, tfinfer.load(folder, threads=1) as whole:
        assert cannot_record(whole.manifest) == ""
        whole.decoder.step_kind = DeviceStep
        whole.decoder.recording = Recording(whole.decoder._session, True)
        caches = [model.decoder.open_cache(2, 8) for model in (plain, whole)]
        slots = [[cache.acquire(), cache.acquire()] for cache in caches]
        for model, cache, (first, second) in zip((plain, whole), caches, slots):
            model.decoder.prefill(cache, first, [1, 2, 3, 4, 5])
            model.decoder.prefill(cache, second, [6])
        for number in range(70 + PLAIN_STEPS):
            ids = np.array([number, 2 * number + 1]) % 20
            expected = plain.decoder.step(caches[0], slots[0], ids)
            found = whole.decoder.step(caches[1], slots[1], ids)
            np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=f"step {number}")


def test_rows_that_dropped_what_lies_behind_a_window_do_so_in_place(tmp_path):
    config = TransformerConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32,
        position="rotary", attention_pattern="sliding_window", window=16, max_length=300,
    )  # fmt: skip
    export_model(Decoder(config).eval(), tmp_path / "out", dtype="fp16", max_length=300)
    with tfinfer.load(tmp_path / "out", threads=1) as plain, tfinfer.load(tmp_path / "out", threads=1) as whole:
        whole.decoder.step_kind = DeviceStep
        whole.decoder.recording = Recording(whole.decoder._session, True)
        caches = [model.decoder.open_cache(2, 8) for model in (plain, whole)]
        others, slots = ([cache.acquire() for cache in caches] for _ in range(2))  # behind one that never drops any
        for model, cache, other, slot in zip((plain, whole), caches, others, slots):
            model.decoder.prefill(cache, other, [4])
            model.decoder.prefill(cache, slot, [1, 2, 3])
        for number in range(200):
            expected = plain.decoder.step(caches[0], [slots[0]], [number % 40])
            found = whole.decoder.step(caches[1], [slots[1]], [number % 40])
            np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=f"step {number}")
        assert caches[1].dropped.tolist()[0] == 0 < caches[1].dropped[1]
        assert whole.decoder.recording._last <= 2


def test_which_rows_are_wanted_is_never_reckoned_on_the_device(folder):
    """A node of inputs alone would run there, and its result be copied to the host in the middle of a run."""
    graph = ir.load(folder / "decoder.onnx").graph
    (keep,) = [value for value in graph.inputs if value.name == "logits_to_keep"]
    (reader,) = {use.node for use in keep.uses()}
    assert [reader.op_type, reader.inputs[0].producer().op_type] == ["Sub", "Shape"]


@pytest.mark.parametrize("keep, rows", [(1, 1), (3, 3), (5, 5), (7, 5), (2**31 - 1, 5)])
def test_wanted_rows_are_the_last_ones(folder, keep, rows):
    """More than there are, as the graph's own default has it, are all of them."""
    with tfinfer.load(folder, threads=1) as model:
        decoder = model.decoder
        cache = decoder.open_cache(1, 8)
        every = decoder.prefill(cache, cache.acquire(), [1, 2, 3, 4, 5], keep=5)
        session, manifest = decoder._session, model.manifest
        fed = {
            "input_ids": np.array([[1, 2, 3, 4, 5]]),
            "attention_mask": np.ones((1, 5), np.int64),
            "position_ids": np.arange(5)[None],
            "logits_to_keep": np.array([keep]),
        }
        names = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        past = {e.past: np.zeros((1, e.num_kv_heads, 8, e.head_dim), np.float16) for e in manifest.cache}
        (logits,) = session.run(["logits"], {name: fed[name] for name in fed if name in names} | past)
        np.testing.assert_allclose(logits[0], every[5 - rows :], atol=1e-3)
