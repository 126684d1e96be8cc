"""A real folder, loaded and generated from, where torch was never installed."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import tfinfer
from tfinfer.errors import ClosedError, InputError, LengthError
from tfinfer.manifest import load_manifest
from tfinfer.precision import WeightsSpec
from tfinfer.proof.prove import verify_folder
from tfinfer.session.bound_step import AHEAD
from tfinfer.session.decoder import without_cuda

PROMPTS = ["a", "the cat sat on the mat and", "def main():"]


def test_the_folder_proves_itself(model, tiny):
    verdict = verify_folder(model.decoder, tiny)
    assert verdict.passed
    assert verdict.greedy.identical == verdict.greedy.compared == 64


def test_a_batch_of_different_lengths_is_each_prompt_alone(model):
    together = model.generate(PROMPTS, max_tokens=24, stop_ids=[])
    alone = [model.generate(p, max_tokens=24, stop_ids=[]) for p in PROMPTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


def test_the_same_seed_gives_the_same_text_alone_or_in_a_batch(model):
    options = {"max_tokens": 16, "temperature": 1.1, "top_p": 0.9, "seed": 4, "stop_ids": []}
    together = model.generate(PROMPTS, **options)
    assert [c.token_ids for c in together] == [model.generate(p, **options).token_ids for p in PROMPTS]
    assert model.generate(PROMPTS[0], **{**options, "seed": 5}).token_ids != together[0].token_ids


def test_a_stream_is_the_completion_in_pieces(model):
    whole = model.generate(PROMPTS[1], max_tokens=20)
    chunks = list(model.stream(PROMPTS[1], max_tokens=20))
    assert "".join(c.text for c in chunks) == whole.text
    assert tuple(i for c in chunks for i in c.token_ids) == whole.token_ids
    assert chunks[-1].finish_reason == whole.finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_greedy_is_the_full_pass_again_and_again(model):
    """The cached loop against prefilling the whole sequence anew for every token."""
    ids = model.tokenize(PROMPTS[1])
    cache = model.decoder.open_cache(1, 64)
    for token in model.generate(PROMPTS[1], max_tokens=12, stop_ids=[]).token_ids:
        slot = cache.acquire()
        assert int(model.decoder.prefill(cache, slot, ids)[-1].argmax()) == token
        cache.release(slot)
        ids.append(token)


def test_no_step_moves_or_allocates_the_cache(model):
    decoder = model.decoder
    cache = decoder.open_cache(2, 64)
    slots = [cache.acquire(), cache.acquire()]
    for slot in slots:
        decoder.prefill(cache, slot, [1, 2, 3])
    pointers = cache.pointers(0)
    first = decoder.step(cache, slots, [4, 5])
    bound = cache.bound
    for _ in range(20):
        again = decoder.step(cache, slots, [4, 5])
        assert again.ctypes.data == first.ctypes.data
        assert cache.bound is bound
    assert cache.pointers(0) == pointers
    assert cache.lengths.tolist() == [24, 24]


def test_the_graph_writes_into_the_bound_buffers_and_nowhere_else(model):
    cache = model.decoder.open_cache(2, 64)
    slot, other = cache.acquire(), cache.acquire()
    model.decoder.prefill(cache, slot, [7, 8, 9])
    for buffer in cache.buffers:
        written = np.abs(buffer.owner[cache.row(slot)]).sum((0, 2)) > 0
        assert written.tolist() == [True] * 3 + [False] * (cache.capacity - 3)
        assert not buffer.owner[cache.row(other)].any()


def test_a_step_takes_one_id_for_each_slot(model):
    cache = model.decoder.open_cache(2, 64)
    slots = [cache.acquire(), cache.acquire()]
    for slot in slots:
        model.decoder.prefill(cache, slot, [3, 4])
    for ids in ([5], [5, 6, 7]):
        with pytest.raises(InputError, match="an id for each of 2 slots"):
            model.decoder.step(cache, slots, ids)
    assert [cache.length(slot) for slot in slots] == [2, 2]
    assert model.decoder.step(cache, slots, [5, 6]).shape == (2, model.manifest.num_logits)


def test_rows_of_different_lengths_step_past_the_masks_that_were_made_at_once(model):
    """A mask is shaped for its length ahead of time, and says of each row how much it holds when it is used."""
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    together = model.generate(prompts, max_tokens=AHEAD + 4, stop_ids=[])
    alone = [model.generate(prompt, max_tokens=AHEAD + 4, stop_ids=[]) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_a_prompt_may_come_in_any_pieces(model):
    ids = list(range(1, 31))
    cache = model.decoder.open_cache(2, 64)
    whole, pieces = cache.acquire(), cache.acquire()
    expected = model.decoder.prefill(cache, whole, ids, keep=30)
    got = []
    for start, end in itertools.pairwise((0, 1, 5, 6, 20, 30)):
        got.append(model.decoder.prefill(cache, pieces, ids[start:end], keep=end - start))
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-5)


def test_a_prompt_longer_than_a_chunk_keeps_the_rows_asked_for(model, monkeypatch):
    """Rows that lie in several chunks must come back in order."""
    ids = list(range(1, 31))
    cache = model.decoder.open_cache(2, 64)
    expected = model.decoder.prefill(cache, cache.acquire(), ids, keep=13)
    monkeypatch.setattr("tfinfer.session.decoder.PREFILL_CHUNK", 7)
    got = model.decoder.prefill(cache, cache.acquire(), ids, keep=13)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_stop_strings_end_the_text_and_are_not_in_it(model):
    whole = model.generate(PROMPTS[1], max_tokens=20, stop_ids=[])
    stop = whole.text[3:6]
    cut = model.generate(PROMPTS[1], max_tokens=20, stop=stop, stop_ids=[])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_the_models_own_stop_ids_are_the_default_and_an_empty_list_is_none(model):
    assert model.manifest.token_ids.eos == (0,)
    bias = {0: 100.0}
    assert model.generate("a", max_tokens=5, logit_bias=bias).finish_reason == "stop"
    assert model.generate("a", max_tokens=5, logit_bias=bias, stop_ids=[]).token_ids == (0,) * 5


def test_a_conversation_goes_through_the_chat_template(model):
    messages = [{"role": "user", "content": "the cat"}]
    assert model.render_chat(messages) == "<|user|>the cat<|assistant|>"
    ids = model.tokenizer.encode("<|user|>the cat<|assistant|>", add_special_tokens=False)
    assert model.generate(messages, max_tokens=5).token_ids == model.generate(ids, max_tokens=5).token_ids


def test_ids_may_be_an_array(model):
    assert (
        model.generate(np.array([3, 4, 5]), max_tokens=3).token_ids == model.generate([3, 4, 5], max_tokens=3).token_ids
    )


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, InputError, "at least one id"),
        ("", {}, InputError, "no tokens"),
        ([1, -2], {}, InputError, "got -2"),
        ([1, 99999], {}, InputError, "got 99999"),
        ([1.5], {}, InputError, "whole numbers"),
        ([[1], []], {}, InputError, "at least one id"),
        ([1] * 97, {}, LengthError, "longer than"),
        ([1] * 90, {"max_tokens": 7}, LengthError, "at most 6"),
        ([1], {"max_tokens": 0}, InputError, "max_tokens"),
        ([1], {"temperature": float("nan")}, InputError, "temperature"),
        ([1], {"top_p": 2}, InputError, "top_p"),
        ([1], {"top_k": -1}, InputError, "top_k"),
        ([1], {"stop": ""}, InputError, "stop"),
        ([1], {"warmth": 2}, InputError, "warmth"),
        ([1], {"logit_bias": {99999: 1.0}}, InputError, "99999"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_good_one_works(model, prompt, options, error, words):
    before = model.generate([5, 6], max_tokens=3).token_ids
    with pytest.raises(error, match=words):
        model.generate(prompt, **{"max_tokens": 3, **options})
    assert model.generate([5, 6], max_tokens=3).token_ids == before


def test_max_tokens_is_required(model):
    with pytest.raises(InputError, match="max_tokens is required"):
        model.generate([1])


def test_leaving_a_stream_gives_its_cache_back(model):
    stream = model.stream([1, 2, 3], max_tokens=40)
    next(stream)
    stream.close()
    cache = model._pool.caches[-1]
    assert cache.live == []
    assert model.generate([1, 2, 3], max_tokens=3).token_ids == model.generate([1, 2, 3], max_tokens=3).token_ids


def test_cancelling_from_another_thread_ends_with_its_reason(model):
    cancel = threading.Event()
    stream = model.stream([1, 2, 3], max_tokens=60, stop_ids=[], cancel=cancel)
    next(stream)
    threading.Thread(target=cancel.set).start()
    rest = list(stream)
    assert rest[-1].finish_reason in ("cancelled", "length")
    cancel.set()
    assert model.generate([1], max_tokens=9, cancel=cancel).finish_reason == "cancelled"


def test_many_threads_get_what_each_would_get_alone(model):
    prompts = [[1 + i % 50, 2 + i % 7, 3] * (1 + i % 4) for i in range(32)]
    expected = [model.generate(p, max_tokens=10, stop_ids=[]).token_ids for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: model.generate(p, max_tokens=10, stop_ids=[]).token_ids, prompts))
    assert found == expected


def test_logits_that_are_not_finite_are_an_error_and_the_cache_is_not_used_again(model, monkeypatch):
    def broken(cache, slots, ids):
        return np.full((len(slots), model.manifest.num_logits), np.nan, np.float32)

    expected = model.generate([1, 2], max_tokens=4).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "step", broken)
        with pytest.raises(tfinfer.errors.NonFiniteLogitsError):
            model.generate([1, 2], max_tokens=4)
    assert all(cache.buffers for cache in model._pool.caches)
    assert model.generate([1, 2], max_tokens=4).token_ids == expected


def test_a_closed_model_says_so(tiny):
    with tfinfer.load(tiny) as model:
        model.generate([1], max_tokens=2)
    with pytest.raises(ClosedError, match="load it again"):
        model.generate([1], max_tokens=2)


def test_a_folder_without_a_tokenizer_works_with_ids(copied):
    for name in ("tokenizer.json", "chat_template.jinja"):
        (copied / name).unlink()
    text = (copied / "tfinfer.json").read_text()
    import json

    data = json.loads(text)
    data["text"].update(tokenizer=None, chat_template=None)
    for name in ("tokenizer.json", "chat_template.jinja"):
        del data["files"][name]
    (copied / "tfinfer.json").write_text(json.dumps(data))
    with tfinfer.load(copied) as model:
        completion = model.generate([1, 2, 3], max_tokens=4)
        assert completion.text is None
        assert len(completion.token_ids) == 4
        assert [c.text for c in model.stream([1], max_tokens=2)] == [None, None]
        for prompt, options in (("text", {}), ([1], {"stop": "x"}), ([{"role": "user", "content": "x"}], {})):
            with pytest.raises(InputError, match=r"no (tokenizer|chat template)"):
                model.generate(prompt, max_tokens=2, **options)
        assert model.generate([1, 2, 3], max_tokens=4).token_ids == completion.token_ids


def test_a_graph_that_cuda_would_leave_to_the_cpu_is_refused_there(tiny, monkeypatch):
    """onnxruntime has no float32 GroupQueryAttention for CUDA and would run it on the CPU without a word."""
    monkeypatch.setattr("tfinfer.session.decoder.listed_providers", lambda ort: ("CUDAExecutionProvider",))
    with tfinfer.load(tiny, device="auto") as model:
        assert model.device == "cpu"
        assert "no float32 kernel" in model.reason
    with pytest.raises(tfinfer.errors.ProviderError, match="--dtype fp16"):
        tfinfer.load(tiny, device="cuda")


def test_small_weights_with_wide_activations_are_refused_on_cuda_and_say_what_to_export(tiny, monkeypatch):
    monkeypatch.setattr("tfinfer.session.decoder.listed_providers", lambda ort: ("CUDAExecutionProvider",))
    manifest = replace(load_manifest(tiny), weights=WeightsSpec(4, 8, 64, True, 9))
    with pytest.raises(tfinfer.errors.ProviderError, match="--activations fp16 or bf16"):
        without_cuda(manifest, "cuda")


def test_what_device_and_threads_were_taken_is_said(tiny):
    with tfinfer.load(tiny, device="auto", threads=1) as model:
        assert model.device == "cpu"
        assert "cuda" in model.reason.lower()
        assert model.threads.count == 1
