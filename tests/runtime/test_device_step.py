"""A step on a device, and its recording, with the CPU in the device's place.

A CUDA graph is imitated: what a recorded run is given is what was bound when it was recorded, whatever is bound later.
"""

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import tfinfer
from tfinfer.errors import CudaGraphError, InputError, NonFiniteLogitsError
from tfinfer.manifest import AttentionSpec
from tfinfer.session import recorded, select
from tfinfer.session.device_step import CHECKED, PLAIN_STEPS, DeviceStep
from tfinfer.session.providers import Opened
from tfinfer.session.recorded import PLAIN, Recording, cannot_record, open_recording
from tfinfer.session.select import Selecting
from tfinfer.session.threads import Threads

ONE = Threads(1, "1: a test")


class Binding:
    """A binding that counts what is bound, and refuses to change once it was recorded."""

    def __init__(self, inner):
        self.inner, self.frozen = inner, False

    def __getattr__(self, name):
        if name.startswith("bind_") and self.frozen:
            raise AssertionError(f"{name} after it was recorded")
        return getattr(self.inner, name)


class Records:
    """An onnxruntime session that records runs with a number, as CUDA would."""

    def __init__(self, session, wrong=0.0):
        self.session, self.wrong = session, wrong
        self.numbers, self.recordings, self.released = [], {}, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def io_binding(self):
        return Binding(self.session.io_binding())

    def release_captured_graph(self, number):
        self.released.append(number)

    def run_with_iobinding(self, binding, options=None):
        number = int(options.get_run_config_entry("gpu_graph_id")) if options is not None else 0
        self.numbers.append(number)
        if number != PLAIN:
            binding.frozen = True
            binding = self.recordings.setdefault(number, binding)
        self.session.run_with_iobinding(binding.inner)
        if number != PLAIN and self.wrong:
            value = next(v for v in binding.inner.get_outputs() if v.data_type() == "tensor(float)")
            value.numpy()[:] += self.wrong


@pytest.fixture
def on_device(tiny):
    """The tiny model with steps as on a device; `recorded` with CUDA graphs, as above."""
    with tfinfer.load(tiny, threads=1) as model:

        def opened(records=False, must=False, wrong=0.0):
            decoder = model.decoder
            decoder.step_kind = DeviceStep
            decoder.selecting = Selecting(model.manifest.num_logits, "float32", "cpu", ONE)
            if records:
                decoder._session = Records(decoder._session, wrong)
                decoder.recording = Recording(decoder._session, must)
            return model

        yield opened


def ragged(decoder, cache):
    slots = [cache.acquire() for _ in range(3)]
    for slot, ids in zip(slots, ([1, 2, 3, 4, 5], [6], [7, 8])):
        decoder.prefill(cache, slot, ids)
    return slots


@pytest.mark.parametrize("records", [False, True])
def test_steps_are_those_of_the_cpu(model, on_device, records):
    """Rows of different lengths, past a growth of the buffers, and past the first recorded step."""
    device = on_device(records).decoder
    caches = [decoder.open_cache(3, 8) for decoder in (model.decoder, device)]
    slots = [ragged(decoder, cache) for decoder, cache in zip((model.decoder, device), caches)]
    rng = np.random.default_rng(0)
    for number in range(PLAIN_STEPS + 60):
        ids = rng.integers(0, 297, 3)
        expected = model.decoder.step(caches[0], slots[0], ids)
        found = device.step(caches[1], slots[1], ids)
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=f"step {number}")
    assert caches[1].capacity > 64
    assert isinstance(caches[1].bound, DeviceStep)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 20, "seed": 4}, {"temperature": 0.9, "seed": 4}, {"logprobs": 2}]
)
@pytest.mark.parametrize("records", [False, True])
def test_generation_gives_the_same_tokens(model, on_device, options, records):
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    expected = model.generate(prompts, max_tokens=30, stop_ids=[], **options)
    found = on_device(records).generate(prompts, max_tokens=30, stop_ids=[], **options)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("folder", ["tiny_states", "tiny_seq2seq"])
def test_states_and_sources_take_steps_on_a_device_too(tiny, folder):
    """Without recordings; what a state or a source is bound to is the cache's own."""
    with tfinfer.load(tiny.parent / folder, threads=1) as model:
        prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
        expected = [c.token_ids for c in model.generate(prompts, max_tokens=12, stop_ids=[], reuse_prefix=False)]
        model.decoder.step_kind = DeviceStep
        found = [c.token_ids for c in model.generate(prompts, max_tokens=12, stop_ids=[], reuse_prefix=False)]
        assert found == expected


def test_all_logits_come_where_the_best_cannot_be_told(on_device, monkeypatch):
    monkeypatch.setattr("tfinfer.session.select.Selection.run", lambda self: None)
    decoder = on_device().decoder
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    logits, ids = decoder.step_best(cache, [slot], [3], 1)
    assert (logits.shape, ids) == ((1, 297), None)
    assert cache.ids[slot] == [1, 2, 3]


def test_as_many_of_the_best_come_as_each_step_asks_for(on_device):
    """More than are looked for at once are all of them."""
    decoder = on_device().decoder
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    shapes = []
    for count in (1, 3, 290, 1):
        logits, ids = decoder.step_best(cache, [slot], [3], count)
        shapes.append((logits.shape, None if ids is None else ids.shape))
    assert shapes == [((1, 1), (1, 1)), ((1, 3), (1, 3)), ((1, 297), None), ((1, 1), (1, 1))]


@pytest.mark.parametrize("records", [False, True])
def test_a_step_of_other_rows_is_bound_to_those(model, on_device, records):
    """As many rows as the step before, of the same buffers."""
    device = on_device(records).decoder
    caches = [decoder.open_cache(3, 64) for decoder in (model.decoder, device)]
    slots = [ragged(decoder, cache) for decoder, cache in zip((model.decoder, device), caches)]
    for number in (2, 0, 1, 2, 2, 0):
        expected = model.decoder.step(caches[0], [slots[0][number]], [9])
        found = device.step(caches[1], [slots[1][number]], [9])
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=f"row {number}")
    assert [caches[1].length(slot) for slot in slots[1]] == [5 + 2, 1 + 1, 2 + 3]


def test_logits_that_are_not_finite_are_told_as_ever(on_device, monkeypatch):
    monkeypatch.setattr(DeviceStep, "_run", lambda self: self.logits.owner.fill(np.nan))
    with pytest.raises(NonFiniteLogitsError, match="expected finite logits"):
        on_device().generate([1, 2, 3], max_tokens=4)


def test_prefills_are_never_recorded_and_each_set_of_buffers_has_a_number_of_its_own(on_device):
    decoder = on_device(True).decoder
    cache = decoder.open_cache(2, 8)
    slots = [cache.acquire(), cache.acquire()]
    for slot in slots:
        decoder.prefill(cache, slot, [1, 2])
    session = decoder._session
    assert set(session.numbers) == {PLAIN}
    for _ in range(PLAIN_STEPS + CHECKED + 2):
        decoder.step(cache, slots, [3, 4])
    compared = [1, PLAIN] * CHECKED  # the first ones are computed both ways
    assert session.numbers[2:] == [PLAIN] * PLAIN_STEPS + compared + [1, 1]
    cache.grow(96)
    for _ in range(PLAIN_STEPS + CHECKED + 1):
        decoder.step(cache, slots, [3, 4])
    assert session.numbers[-1] == 2
    gc.collect()
    assert session.released == [1]


def test_an_onnxruntime_that_cannot_let_a_recording_go_keeps_it():
    Recording(object(), False).release(1)


@pytest.mark.parametrize("records", [False, True])
def test_only_a_model_that_records_runs_one_call_at_a_time(on_device, records):
    decoder, held = on_device(records).decoder, []
    decoder.memory.turn = threading.RLock()
    session, run = decoder._session, decoder._session.run_with_iobinding

    class Watched:
        def __getattr__(self, name):
            return getattr(session, name)

        def run_with_iobinding(self, *given):
            held.append(decoder.memory.turn._is_owned())
            run(*given)

    decoder._session = Watched()
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    for _ in range(PLAIN_STEPS + CHECKED + 1):
        decoder.step(cache, [slot], [3])
    assert set(held) == {records}


@pytest.mark.parametrize("best", [False, True])
def test_what_a_step_copies_and_selects_is_part_of_its_turn(on_device, monkeypatch, best):
    """Another thread that records meanwhile would be spoiled by it."""
    decoder, held = on_device(True).decoder, []
    decoder.memory.turn = threading.RLock()

    def watched(call):
        return lambda *given: held.append(decoder.memory.turn._is_owned()) or call(*given)

    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    monkeypatch.setattr(decoder.memory, "copy", watched(decoder.memory.copy))
    monkeypatch.setattr(decoder.memory, "read", watched(decoder.memory.read))
    monkeypatch.setattr("tfinfer.session.select.run_bound", watched(select.run_bound))
    if best:
        decoder.step_best(cache, [slot], [3], 1)
    else:
        decoder.step(cache, [slot], [3])
    assert held == [True, True]


def test_another_thread_makes_a_recording_of_its_own(on_device):
    """onnxruntime keeps them by thread."""
    decoder = on_device(True).decoder
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])

    def steps():
        for _ in range(PLAIN_STEPS + 2):
            decoder.step(cache, [slot], [3])

    steps()
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    assert (
        decoder._session.numbers[1:] == [PLAIN] * PLAIN_STEPS + [1, PLAIN] * 2 + [PLAIN] * PLAIN_STEPS + [2, PLAIN] * 2
    )


@pytest.mark.parametrize("must", [False, True])
def test_a_recording_that_computes_something_else_is_found(on_device, model, must):
    """Without insisting, the plain step's logits are what comes, and all later steps are plain."""
    decoder = on_device(True, must, wrong=5.0).decoder
    cache, plain = decoder.open_cache(1, 64), model.decoder.open_cache(1, 64)
    slots = cache.acquire(), plain.acquire()
    decoder.prefill(cache, slots[0], [1, 2])
    model.decoder.prefill(plain, slots[1], [1, 2])
    for _ in range(PLAIN_STEPS):
        decoder.step(cache, slots[:1], [3])
        model.decoder.step(plain, slots[1:], [3])
    if must:
        with pytest.raises(CudaGraphError, match=r"differ from a plain one's by 5.*without --cuda-graph"):
            decoder.step(cache, slots[:1], [3])
    for _ in range(3):
        expected = model.decoder.step(plain, slots[1:], [3])
        np.testing.assert_allclose(decoder.step(cache, slots[:1], [3]), expected, atol=2e-5)
    assert decoder._session.numbers[-1] == PLAIN


@pytest.mark.parametrize("share, refused", [(0.008, False), (0.013, True)])
def test_how_far_a_recording_may_be_off_is_a_share_of_the_largest_logit(on_device, share, refused):
    decoder = on_device(True).decoder
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    largest = float(np.abs(decoder.prefill(cache, slot, [1, 2, 3])).max())
    assert largest > 1.3, "a bound that is no share would do the same"
    decoder._session.wrong = share * largest
    for _ in range(PLAIN_STEPS + 1):
        cache.rewind(slot, 2)
        decoder.step(cache, [slot], [3])
    assert bool(decoder.recording.off) is refused


def test_logits_that_are_no_numbers_say_nothing_against_a_recording(on_device, monkeypatch):
    """They are told as such, by whoever reads them."""
    decoder = on_device(True, True).decoder
    cache = decoder.open_cache(1, 64)
    slot = cache.acquire()
    decoder.prefill(cache, slot, [1, 2])
    monkeypatch.setattr(decoder.memory, "read", lambda buffer: np.full(buffer.shape, np.nan, np.float32))
    for _ in range(PLAIN_STEPS + CHECKED):
        assert np.isnan(decoder.step(cache, [slot], [3])).all()
    assert decoder.recording.off == ""


def opens(device="cuda", refusal=None):
    asked = []

    def open_(records):
        asked.append(records)
        if records and refusal:
            raise refusal
        return Opened(object(), device, ONE, f"{device}: a test")

    return open_, asked


@pytest.mark.parametrize("asked, records", [(True, True), (None, True), (False, False)])
def test_a_device_that_records_does_so_when_asked(model, asked, records, monkeypatch):
    monkeypatch.setattr(recorded, "options", lambda number: number)
    open_, tried = opens()
    opened, recording, why = open_recording(open_, model.manifest, asked)
    assert tried == [records]
    assert (recording is not None) is records
    assert why == ("" if records else "not asked for")
    if records:
        assert (recording.session, recording.must) == (opened.session, bool(asked))


@pytest.mark.parametrize(
    "how, said",
    [({"device": "cpu"}, "it computes on the CPU"), ({"refusal": CudaGraphError("not all nodes")}, "not all nodes")],
)
def test_a_device_that_does_not_record_is_told(model, how, said):
    open_, tried = opens(**how)
    opened, recording, why = open_recording(open_, model.manifest, None)
    assert recording is None
    assert len(tried) == (2 if how.get("refusal") else 1)  # weights are read no more often than they must be
    assert said in why
    assert opened.session is not None
    with pytest.raises(CudaGraphError, match=said):
        open_recording(opens(**how)[0], model.manifest, True)


def test_folders_whose_steps_cannot_be_recorded_are_not_tried(model):
    manifest = model.manifest
    assert cannot_record(manifest) == ""

    def but(**fields):
        return SimpleNamespace(**{**vars(manifest), **fields})

    others = {
        "encoder-decoder": but(kind="encoder-decoder"),
        "running states": but(states=(object(),)),
        "made anew": but(cache_mode="concatenated"),
        "its attention is Attention": but(attention=(*manifest.attention, AttentionSpec("Attention", "causal", 1))),
        "unknown": but(attention=()),
    }
    for said, other in others.items():
        assert said in cannot_record(other)
        open_, tried = opens()
        _, recording, why = open_recording(open_, other, None)
        assert (recording, tried) == (None, [False])
        assert said in why
        with pytest.raises(CudaGraphError, match="cuda_graph=False"):
            open_recording(opens()[0], other, True)


def test_the_knob_is_checked_and_off_where_nobody_turns_it(tiny):
    with pytest.raises(InputError, match="cuda_graph: expected True, False or None, got 'yes'"):
        tfinfer.load(tiny, cuda_graph="yes")
    with pytest.raises(CudaGraphError, match=r"it computes on the CPU .cpu: asked for"):
        tfinfer.load(tiny, cuda_graph=True)
    with tfinfer.load(tiny) as model:
        assert (model.decoder.recording, model.decoder.not_recorded) == (None, "not asked for")
    with tfinfer.load(tiny, cuda_graph=None) as model:
        assert "it computes on the CPU" in model.decoder.not_recorded
    with pytest.raises(InputError, match="this folder is an encoder"):
        tfinfer.load(tiny.parent / "tiny_encoder", cuda_graph=True)
