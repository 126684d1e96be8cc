"""Threads that share steps get what they would get alone; what is refused, ended, cancelled, broken and closed."""

import dataclasses
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from remembering import greedy

import tfinfer
from tfinfer.errors import ClosedError, InputError, LengthError, TfinferError

HERE = Path(__file__).parent


def some_prompts(model, count, longest=20):
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.manifest.vocab_size, n).tolist() for n in rng.integers(1, longest, count)]


@pytest.fixture
def batcher(model):
    with model.batcher(3, piece=4) as opened:
        yield opened


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5, "top_k": 9, "logprobs": 2}])
def test_threads_get_what_they_would_get_alone(model, batcher, options):
    prompts = some_prompts(model, 12)
    alone = [model.generate(p, max_tokens=6, stop_ids=[], **options).token_ids for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: batcher.generate(p, max_tokens=6, stop_ids=[], **options), prompts))
    assert [one.token_ids for one in found] == alone
    assert all(one.usage.completion_tokens == 6 and one.finish_reason == "length" for one in found)


def test_a_list_gives_a_list_and_a_stream_gives_chunks_by_index(model, batcher):
    prompts = some_prompts(model, 5)
    found = batcher.generate(prompts, max_tokens=4, stop_ids=[])
    streamed = [[] for _ in prompts]
    for chunk in batcher.stream(prompts, max_tokens=4, stop_ids=[]):
        streamed[chunk.index] += chunk.token_ids
    assert [tuple(ids) for ids in streamed] == [one.token_ids for one in found]


def test_models_with_states(tmp_path):
    with tfinfer.load(HERE / "tiny_states", threads=1) as model, model.batcher(2) as batcher:
        prompts = some_prompts(model, 5)
        alone = [model.generate(p, max_tokens=5, stop_ids=[]).token_ids for p in prompts]
        assert [one.token_ids for one in batcher.generate(prompts, max_tokens=5, stop_ids=[])] == alone


def test_what_another_call_left_is_not_computed_again_unless_told(model):
    prompt = [1, 2, 3, 4, 5] * 4
    for reuse, expected in ((True, len(prompt) - 1), (False, 0)):
        with model.batcher(2, reuse_prefix=reuse) as batcher:
            for _ in range(2):
                last = batcher.generate(prompt, max_tokens=2, stop_ids=[])
            assert last.usage.reused_tokens == expected


class Slow:
    """Steps of a decoder that take their time, counted."""

    def __init__(self, model):
        self.count, self._step = 0, model.decoder.step
        model.decoder.step = self

    def __call__(self, *given):
        self.count += 1
        time.sleep(0.01)
        return self._step(*given)


@pytest.fixture
def slow():
    with tfinfer.load(HERE / "tiny", threads=1) as model:
        yield model, Slow(model)


def test_leaving_a_stream_frees_its_slot(slow):
    model, steps = slow
    with model.batcher(1) as batcher:
        stream = batcher.stream([1, 2], max_tokens=90, stop_ids=[])
        next(stream)
        stream.close()
        assert len(batcher.generate([3], max_tokens=2, stop_ids=[]).token_ids) == 2
    assert steps.count < 45


def test_cancel_ends_a_call_that_waits_for_a_slot(model):
    cancel = threading.Event()
    with model.batcher(1) as batcher:
        holding = batcher.stream([1, 2], max_tokens=90, stop_ids=[])
        next(holding)
        cancel.set()
        found = batcher.generate([3], max_tokens=5, cancel=cancel)
        assert (found.finish_reason, found.token_ids) == ("cancelled", ())
        holding.close()


def test_a_stop_string_ends_its_prompt_alone_and_at_once(slow):
    model, steps = slow
    whole = model.generate([5, 6], max_tokens=12, stop_ids=[])
    stop = whole.text[len(whole.text) // 2]
    steps.count = 0
    with model.batcher(1) as batcher:
        stopped = batcher.generate([5, 6], max_tokens=90, stop_ids=[], stop=stop)
        assert batcher.generate([7], max_tokens=2, stop_ids=[]).usage.completion_tokens == 2
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text.split(stop)[0])
    assert steps.count < 45


def test_tokens_that_came_after_a_stop_string_are_nobodys(model, batcher):
    texts = {n: model.generate([n], max_tokens=40, stop_ids=[]).text for n in range(5, 30)}
    stopped, other, stop = next(
        (one, two, stop)
        for one, two in itertools.permutations(texts, 2)
        for stop in texts[one][3:10]
        if stop not in texts[two]
    )
    found = ["", ""]
    for chunk in batcher.stream([[stopped], [other]], max_tokens=40, stop_ids=[], stop=stop):
        found[chunk.index] += chunk.text
        time.sleep(0.005)  # meanwhile the thread goes on
    assert found == [texts[stopped].split(stop)[0], texts[other]]


REFUSED = [({"num_beams": 2}, "num_beams"), ({"lookup": True}, "lookup"), ({"reuse_prefix": False}, "model.batcher")]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_options_that_a_batcher_does_not_take(batcher, options, told):
    with pytest.raises(InputError, match=told):
        batcher.generate([1], max_tokens=2, **options)


def test_bad_requests_are_refused_at_once_and_the_next_works(batcher):
    with pytest.raises(InputError):
        batcher.stream([], max_tokens=2)
    with pytest.raises(LengthError):
        batcher.stream([1], max_tokens=10**6)
    assert batcher.generate([1], max_tokens=2, stop_ids=[]).usage.completion_tokens == 2


@pytest.mark.parametrize("bad", [{"slots": 0}, {"slots": True}, {"capacity": 0}, {"piece": 1.5}])
def test_sizes_that_are_none(model, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        model.batcher(**bad)


def test_an_encoder_decoder_has_none():
    with tfinfer.load(HERE / "tiny_seq2seq", threads=1) as model, pytest.raises(InputError, match="encoder-decoder"):
        model.batcher()


def test_a_step_that_fails_is_told_to_all_and_the_next_call_works(remembering):
    model = remembering("positions")
    with model.batcher(2) as batcher:
        model.decoder.fails = 4
        with pytest.raises(TfinferError, match="broken"):
            batcher.generate([[1], [2]], max_tokens=9, stop_ids=[])
        model.decoder.fails = None
        assert batcher.generate([1], max_tokens=3, stop_ids=[]).token_ids == greedy("positions", [1], 3)


def test_who_is_done_before_a_step_fails_gets_what_it_asked_for(remembering):
    model = remembering("positions")
    prefill, step, broken = model.decoder.prefill, model.decoder.step, []

    def prefills(cache, slot, ids, *, keep):
        broken.extend([True] * (list(ids) == [2]))  # the very next step, in which this prompt takes no part
        return prefill(cache, slot, ids, keep=keep)

    def steps(cache, slots, ids):
        if broken:
            raise RuntimeError("broken")
        return step(cache, slots, ids)

    model.decoder.prefill, model.decoder.step = prefills, steps
    with model.batcher(2) as batcher:
        stream = batcher.stream([1], max_tokens=300, stop_ids=[])
        next(stream)
        assert batcher.generate([2], max_tokens=1, stop_ids=[]).token_ids == greedy("positions", [2], 1)
        with pytest.raises(TfinferError, match="broken"):
            list(stream)


def test_a_cache_that_cannot_be_opened_again_ends_the_batcher_for_all(remembering):
    model = remembering("positions")
    batcher, told = model.batcher(1), []

    def late():
        with pytest.raises(ClosedError):
            batcher.generate([2], max_tokens=2)
        told.append(True)

    thread, started = threading.Thread(target=late), threading.Event()

    def no_memory(*_):
        thread.start()
        started.set()
        while not batcher._asked:
            time.sleep(0.001)
        raise MemoryError

    model.decoder.fails, model.decoder.open_cache = 2, no_memory
    with pytest.raises(TfinferError, match="broken"):
        batcher.generate([1], max_tokens=9, stop_ids=[])
    assert started.wait(10)
    thread.join(10)
    assert told
    batcher.close()


def test_a_graph_that_takes_one_token_at_a_time_gets_short_pieces(remembering):
    model = remembering("positions")
    model.manifest = dataclasses.replace(model.manifest, appends_one=True)
    prefill, lengths = model.decoder.prefill, []
    model.decoder.prefill = lambda cache, slot, ids, *, keep: (lengths.append(len(ids)), prefill(cache, slot, ids))[1]
    with model.batcher(1, piece=64) as batcher:
        batcher.generate([1] * 20, max_tokens=2, stop_ids=[])
    assert lengths == [8, 8, 4]


def test_closing_tells_those_who_wait_and_those_who_come_later(remembering):
    model = remembering("positions")
    step = model.decoder.step
    model.decoder.step = lambda *given: (time.sleep(0.01), step(*given))[1]
    batcher = model.batcher(1)
    stream = batcher.stream([1], max_tokens=300, stop_ids=[])
    next(stream)
    told = []

    def waiting():
        try:
            batcher.generate([2], max_tokens=2)
        except ClosedError as error:
            told.append(error)

    thread = threading.Thread(target=waiting)
    thread.start()
    time.sleep(0.05)
    batcher.close()
    thread.join(10)
    assert told
    with pytest.raises(ClosedError):
        list(stream)
    with pytest.raises(ClosedError):
        batcher.generate([1], max_tokens=2)
    batcher.close()


def test_a_closed_model_has_no_batcher_and_ends_those_it_had():
    loaded = tfinfer.load(HERE / "tiny", threads=1)
    batcher = loaded.batcher()
    loaded.close()
    with pytest.raises(ClosedError):
        loaded.batcher()
    with pytest.raises(ClosedError):
        batcher.generate([1], max_tokens=2)
    batcher.close()
