"""A decoder whose every layer looks back a window keeps no more than that, however long it goes on."""

import numpy as np
import pytest
import torch

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig

WINDOW, STEPS, LONGEST = 16, 4096, 4160


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32,
        position="rotary", attention_pattern="sliding_window", window=WINDOW, max_length=LONGEST,
    )  # fmt: skip
    module = Decoder(config).eval()
    out = tmp_path_factory.mktemp("windowed") / "out"
    report = export_model(module, out, max_length=LONGEST, attention=False)
    assert report.manifest.keeps_window == WINDOW
    with tfinfer.load(out, threads=1) as model:
        yield module, model


def full(module, ids):
    with torch.no_grad():
        return module(torch.tensor([ids]))[0].numpy()


def test_the_cache_of_a_windowed_decoder_stays_flat_over_4096_steps(windowed):
    module, model = windowed
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, 20 + STEPS).tolist()
    expected = full(module, ids)
    cache = model.decoder.open_cache(1, LONGEST)
    size, pointers = cache.nbytes, cache.pointers(0)
    assert cache.capacity < WINDOW + 128  # not the longest length that was asked for
    slot = cache.acquire()
    np.testing.assert_allclose(model.decoder.prefill(cache, slot, ids[:20])[-1], expected[19], atol=1e-4)
    for at in range(20, 20 + STEPS):
        logits = model.decoder.step(cache, [slot], [ids[at]])[0]
        if at % 64 < 2 or at > STEPS:
            np.testing.assert_allclose(logits, expected[at], atol=1e-4)
    assert (cache.nbytes, cache.pointers(0)) == (size, pointers)
    assert cache.length(slot) == 20 + STEPS


def test_rows_that_dropped_different_positions_go_on_together(windowed):
    module, model = windowed
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 40, n).tolist() for n in (300, 5, 131)]
    expected = [full(module, row) for row in rows]
    cache = model.decoder.open_cache(3, 64)
    slots = [cache.acquire() for _ in rows]
    at = [len(row) - 4 for row in rows]
    for slot, row, n in zip(slots, rows, at):
        model.decoder.prefill(cache, slot, row[:n])
    for _ in range(4):
        logits = model.decoder.step(cache, slots, np.array([row[n] for row, n in zip(rows, at)]))
        for i, n in enumerate(at):
            np.testing.assert_allclose(logits[i], expected[i][n], atol=1e-4)
        at = [n + 1 for n in at]


def test_a_fork_and_a_beam_search_take_the_window_along(windowed):
    module, model = windowed
    ids = np.random.default_rng(2).integers(0, 40, 290).tolist()
    expected = full(module, ids)
    cache = model.decoder.open_cache(2, 64)
    first = cache.acquire()
    model.decoder.prefill(cache, first, ids[:280])
    second = cache.fork(first)
    for at in range(280, 290):
        logits = model.decoder.step(cache, [first, second], [ids[at]] * 2)
        np.testing.assert_allclose(logits[0], expected[at], atol=1e-4)
        np.testing.assert_allclose(logits[1], expected[at], atol=1e-4)
    best = model.generate(ids, max_tokens=100, num_beams=3)
    told = torch.tensor(full(module, [*ids, *best.token_ids])).log_softmax(-1)
    summed = sum(float(told[289 + i, token]) for i, token in enumerate(best.token_ids))
    assert len(best.token_ids) == 100
    assert best.score == pytest.approx(summed / 100, abs=1e-4)


def test_a_rewind_behind_what_was_dropped_is_refused_and_the_next_call_works(windowed):
    module, model = windowed
    ids = np.random.default_rng(3).integers(0, 40, 300).tolist()
    cache = model.decoder.open_cache(1, 64)
    slot = cache.acquire()
    model.decoder.prefill(cache, slot, ids)
    with pytest.raises(tfinfer.errors.InputError, match="behind its window"):
        cache.rewind(slot, 100)
    cache.rewind(slot, 299)
    logits = model.decoder.step(cache, [slot], [ids[299]])[0]
    np.testing.assert_allclose(logits, full(module, ids)[299], atol=1e-4)
    cache.rewind(slot, 0)
    logits = model.decoder.prefill(cache, slot, ids[:7])[-1]
    np.testing.assert_allclose(logits, full(module, ids[:7])[-1], atol=1e-4)


def test_a_conversation_goes_on_where_its_beginning_was_dropped(windowed, tmp_path):
    module, model = windowed
    ids = np.random.default_rng(4).integers(0, 40, 600).tolist()
    chat = model.conversation()
    for at in (290, 310):  # the second turn goes on behind positions that are gone
        answer = chat.generate(ids[chat.length : at], max_tokens=5, stop_ids=[])
        assert list(answer.token_ids) == said(module, chat.ids[:-5], 5)
        assert answer.usage.reused_tokens == (290 if at == 310 else 0)
        chat.rewind(at)
    chat.save(tmp_path / "chat")
    assert (tmp_path / "chat").stat().st_size < 2 * model.decoder.open_cache(1, 64).nbytes
    for other in (chat.fork(), model.conversation(tmp_path / "chat")):
        answer = other.generate(ids[310:320], max_tokens=5, stop_ids=[])
        assert answer.usage.reused_tokens == 310
        assert list(answer.token_ids) == said(module, [*chat.ids, *ids[310:320]], 5)
    chat.rewind(40)  # behind what there is: all of it is run again
    answer = chat.generate(max_tokens=5, stop_ids=[])
    assert (list(answer.token_ids), answer.usage.reused_tokens) == (said(module, ids[:40], 5), 0)


def test_a_prompt_that_goes_on_behind_the_window_reuses_and_another_does_not(windowed):
    module, model = windowed
    ids = np.random.default_rng(5).integers(0, 40, 300).tolist()
    for prompt, reused in ((ids[:290], 0), (ids, 290), (ids[:100], 0)):
        got = model.generate(prompt, max_tokens=1, stop_ids=[])
        assert got.usage.reused_tokens == reused
        assert list(got.token_ids) == said(module, prompt, 1)


def said(module, ids, count):
    """The greedy tokens that follow, by full passes."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(full(module, ids)[-1].argmax()))
    return ids[len(ids) - count :]
