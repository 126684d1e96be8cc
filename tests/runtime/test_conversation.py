"""A conversation is its ids: whatever happens between turns, the next answer is the one that follows them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remembering import KINDS, LONGEST, greedy

import tfinfer
from tfinfer.errors import ClosedError, InputError, LengthError, NonFiniteLogitsError

HERE = Path(__file__).parent
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def said(kind, chat, new, count):
    """A turn, and what it must be."""
    expected = greedy(kind, chat.ids + new, count)
    before = chat.ids
    got = chat.generate(new, max_tokens=count, stop_ids=[])
    assert got.token_ids == expected
    assert chat.ids == [*before, *new, *expected]
    assert chat.length == len(chat.ids) == got.usage.prompt_tokens + count
    return got


# -- turns ----------------------------------------------------------------------------------------------------------
def test_only_what_is_new_is_run(remembering, kind):
    model = remembering(kind)
    with model.conversation() as chat:
        assert said(kind, chat, [1, 2, 0] * 20, 6).usage.reused_tokens == 0
        before = model.decoder.ran
        assert said(kind, chat, [2, 2], 4).usage.reused_tokens == 65  # the last token was never run
        assert model.decoder.ran - before == 1 + 2 + 3
        assert said(kind, chat, [], 4).usage.reused_tokens == 71


moves = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.lists(st.integers(0, 2), max_size=30), st.integers(1, 8)),
        st.tuples(st.just("leave"), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 8)),
        st.tuples(st.just("rewind"), st.floats(0, 1), st.none()),
        st.tuples(st.sampled_from(["fork", "save", "cancel", "fail"]), st.integers(0, 5), st.none()),
    ),
    max_size=8,
)


@pytest.mark.parametrize("kind", KINDS)
@many
@given(moves=moves, start=st.integers(1, 150))
def test_any_moves_leave_a_conversation_that_goes_on_from_its_ids(remembering, tmp_path, kind, moves, start):
    model = remembering(kind)
    chat = model.conversation()
    others = []
    said(kind, chat, ([0, 1, 2, 1] * 40)[:start], 1)
    for move, what, count in moves:
        ids = chat.ids
        if move == "say" and ids + what:
            said(kind, chat, what, count)
        elif move == "leave":
            stream = chat.stream(what, max_tokens=count + 1, stop_ids=[])
            got = [next(stream).token_ids[0] for _ in range(count)]
            stream.close()
            assert chat.ids == [*ids, *what, *got]
        elif move == "rewind":
            chat.rewind(int(what * len(ids)))
            assert chat.ids == ids[: int(what * len(ids))]
        elif move == "fork":
            others.append((chat, chat.ids))
            chat = chat.fork()
        elif move == "save":
            chat.save(tmp_path / "chat")
            chat = model.conversation(tmp_path / "chat")
            assert chat.ids == ids
        elif move == "cancel":
            cancel = threading.Event()
            cancel.set()
            assert chat.generate([1], max_tokens=3, cancel=cancel).token_ids == ()
            assert chat.ids == [*ids, 1]
        elif move == "fail":
            model.decoder.fails = model.decoder.ran + what
            with pytest.raises(RuntimeError, match="broken"):
                chat.generate([2, 1, 0], max_tokens=6, stop_ids=[])
            model.decoder.fails = None
            assert chat.ids == ids
    said(kind, chat, [1], 3)
    for other, ids in others:
        assert other.ids == ids
        said(kind, other, [0], 3)


def test_forks_go_their_own_ways(remembering, kind):
    model = remembering(kind)
    chat = model.conversation()
    said(kind, chat, [1, 2, 0] * 20, 6)
    other = chat.fork()
    said(kind, chat, [1], 5)
    before = model.decoder.ran
    assert said(kind, other, [2], 5).usage.reused_tokens == 65
    assert model.decoder.ran - before == 2 + 4
    chat.close()
    said(kind, other, [0], 2)


def test_a_rewind_runs_again_no_more_than_it_must(remembering, kind):
    model = remembering(kind)
    chat = model.conversation()
    said(kind, chat, [1, 2, 0], 6)
    said(kind, chat, [2, 2], 6)
    chat.rewind(11)  # the end of the second prompt, where states were kept; its last id gives the logits
    assert said(kind, chat, [0], 2).usage.reused_tokens == 11
    chat.rewind(10)
    assert said(kind, chat, [0], 2).usage.reused_tokens == (8 if model.decoder.states else 10)  # before that prompt
    chat.rewind(0)
    assert said(kind, chat, [1], 1).usage.reused_tokens == 0


def test_a_window_that_moved_on_is_run_again(remembering):
    chat = remembering("window").conversation()
    said("window", chat, [1, 2, 0] * 70, 3)
    chat.rewind(20)
    assert said("window", chat, [1], 3).usage.reused_tokens == 0
    assert said("window", chat, [1], 3).usage.reused_tokens == 23


def test_a_stop_id_is_not_among_the_ids_but_what_stands_before_a_stop_string_is(model):
    chat = model.conversation()
    bias = {0: 100.0}
    assert chat.generate([5, 6], max_tokens=4, logit_bias=bias).finish_reason == "stop"
    assert chat.ids == [5, 6]
    whole = model.generate([5, 6], max_tokens=20, stop_ids=[])
    cut = chat.generate(max_tokens=20, stop=whole.text[3:6], stop_ids=[])
    assert cut.finish_reason == "stop"
    assert chat.ids == [5, 6, *cut.token_ids]


# -- real graphs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["tiny", "tiny_states", "tiny_cache8"])
def test_turns_give_what_the_whole_gives(folder):
    with tfinfer.load(HERE / folder, threads=1) as model:
        chat, ids = model.conversation(), []
        for turn in range(4):
            new = [1 + (turn + i) % 9 for i in range(1 + 2 * turn)]
            expected = model.generate([*ids, *new], max_tokens=6, stop_ids=[], reuse_prefix=False, logprobs=3)
            got = chat.generate(new, max_tokens=6, stop_ids=[], logprobs=3)
            assert got.token_ids == expected.token_ids
            assert got.usage.reused_tokens == max(0, len(ids) - 1)
            for one, other in zip(got.logprobs, expected.logprobs):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            ids += [*new, *got.token_ids]
        assert chat.ids == ids


def test_texts_follow_each_other(model):
    chat = model.conversation()
    one = chat.generate("the cat", max_tokens=4, stop_ids=[])
    two = chat.generate(" sat on", max_tokens=4, stop_ids=[])
    ids = model.tokenize("the cat") + list(one.token_ids) + model.tokenize(" sat on", add_special_tokens=False)
    assert chat.ids == ids + list(two.token_ids)
    alone = model.generate(ids, max_tokens=4, stop_ids=[], reuse_prefix=False)
    assert (two.token_ids, two.text) == (alone.token_ids, alone.text)


def test_only_the_first_text_gets_special_tokens(model, monkeypatch):
    def tokenize(text, *, add_special_tokens=True):
        return [7, 8] if add_special_tokens else [8]

    monkeypatch.setattr(model, "tokenize", tokenize)
    chat = model.conversation()
    first = chat.generate("one", max_tokens=2, stop_ids=[]).token_ids
    second = chat.generate("two", max_tokens=2, stop_ids=[]).token_ids
    assert chat.ids == [7, 8, *first, 8, *second]


def test_messages_are_rendered_whole_and_only_what_differs_is_run(model):
    messages = [{"role": "user", "content": "the cat"}]
    chat = model.conversation()
    first = chat.generate(messages, max_tokens=4, stop_ids=[])
    rendered = model.tokenizer.encode(model.render_chat(messages), add_special_tokens=False)
    assert chat.ids == rendered + list(first.token_ids)
    for answer in ("sat on the mat", "ran"):  # not what was said, so that the answer is computed anew
        told = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "and the dog"}]
        whole = model.tokenizer.encode(model.render_chat(told), add_special_tokens=False)
        second = chat.generate(told, max_tokens=4, stop_ids=[])
        assert second.token_ids == model.generate(told, max_tokens=4, stop_ids=[], reuse_prefix=False).token_ids
        assert chat.ids == whole + list(second.token_ids)
        assert len(rendered) <= second.usage.reused_tokens < len(whole)


def test_conversations_of_one_model_run_in_threads(model):
    def talk(n):
        with model.conversation() as chat:
            for turn in range(3):
                chat.generate([1 + n, 2 + turn], max_tokens=4, stop_ids=[])
            return chat.ids

    expected = [talk(n) for n in range(6)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(talk, range(6))) == expected


# -- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "how", "error", "words"),
    [
        ([], {}, InputError, "none yet to go on from"),
        ("", {}, InputError, "none yet to go on from"),
        ([1, 99999], {}, InputError, "got 99999"),
        (["a", "b"], {}, InputError, "one prompt at a time"),
        ([[1], [2]], {}, InputError, "one prompt at a time"),
        ([1], {"num_beams": 2}, InputError, "one answer: expected num_beams=1"),
        ([1] * 97, {}, LengthError, "a conversation of 97 tokens"),
        ([1] * 90, {"max_tokens": 7}, LengthError, "at most 6"),
        ([1], {"warmth": 2}, InputError, "warmth"),
    ],
)
def test_a_wrong_turn_is_refused_and_the_next_good_one_works(model, prompt, how, error, words):
    chat = model.conversation()
    with pytest.raises(error, match=words):
        chat.generate(prompt, **{"max_tokens": 3, **how})
    assert chat.ids == []
    expected = model.generate([5, 6], max_tokens=3).token_ids
    assert chat.generate([5, 6], max_tokens=3).token_ids == expected


def test_a_conversation_that_is_full_says_so_and_can_be_rewound(remembering):
    chat = remembering("positions").conversation()
    said("positions", chat, [1] * (LONGEST - 4), 4)
    with pytest.raises(LengthError, match=f"a conversation of {LONGEST + 1} tokens is longer"):
        chat.generate([1], max_tokens=1)
    assert chat.length == LONGEST
    chat.rewind(LONGEST - 4)
    said("positions", chat, [], 4)


@pytest.mark.parametrize("length", [-1, 6, 2.0, True, None])
def test_a_rewind_to_no_length_is_refused(model, length):
    chat = model.conversation()
    chat.generate([1, 2, 3], max_tokens=2, stop_ids=[])
    with pytest.raises(InputError, match="a length from 0 to 5"):
        chat.rewind(length)
    assert chat.length == 5


def test_nothing_else_goes_on_while_a_turn_does(model, tmp_path):
    chat = model.conversation()
    stream = chat.stream([1, 2, 3], max_tokens=9, stop_ids=[])
    chat.generate([5], max_tokens=1, stop_ids=[])  # a stream that was not begun is no turn yet
    next(stream)
    for call in (
        lambda: chat.generate([1], max_tokens=1),
        lambda: chat.rewind(0),
        chat.fork,
        lambda: chat.save(tmp_path / "chat"),
    ):
        with pytest.raises(InputError, match="a turn of this conversation is running"):
            call()
    assert len(list(stream)) == 8
    assert chat.length == 2 + 3 + 9
    assert not list(tmp_path.iterdir())


def test_a_closed_conversation_says_so_and_lets_its_cache_go(model, tmp_path):
    with model.conversation() as chat:
        chat.generate([1, 2], max_tokens=2)
        cache = chat._cache
    assert cache.closed
    for call in (
        lambda: chat.generate([1], max_tokens=1),
        lambda: chat.rewind(0),
        chat.fork,
        lambda: chat.save(tmp_path / "chat"),
    ):
        with pytest.raises(ClosedError, match="begin another"):
            call()
    chat.close()


def test_closing_lets_a_running_turn_end(model):
    chat = model.conversation()
    expected = model.generate([1, 2, 3], max_tokens=9, stop_ids=[]).token_ids
    stream = chat.stream([1, 2, 3], max_tokens=9, stop_ids=[])
    got = list(next(stream).token_ids)
    cache = chat._cache
    chat.close()
    assert not cache.closed
    assert (*got, *(i for chunk in stream for i in chunk.token_ids)) == expected
    assert cache.closed


def test_a_turn_that_is_not_finite_is_undone(model, monkeypatch):
    import numpy as np

    chat = model.conversation()
    chat.generate([1, 2], max_tokens=4, stop_ids=[])
    ids = chat.ids

    def broken(cache, slots, ids):
        return np.full((len(slots), model.manifest.num_logits), np.nan, np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "step", broken)
        with pytest.raises(NonFiniteLogitsError):
            chat.generate([3], max_tokens=4, stop_ids=[])
    assert chat.ids == ids
    got = chat.generate([3], max_tokens=4, stop_ids=[])
    assert got.usage.reused_tokens == 0  # what the cache held may not be finite either
    assert got.token_ids == model.generate([*ids, 3], max_tokens=4, stop_ids=[]).token_ids


def test_what_cannot_hold_a_conversation_says_so(tiny):
    with tfinfer.load(HERE / "tiny_seq2seq") as pair, pytest.raises(InputError, match="belongs to one source"):
        pair.conversation()
    with tfinfer.load(HERE / "tiny_encoder") as encoder, pytest.raises(InputError, match="it is an encoder"):
        encoder.conversation()
    with tfinfer.load(tiny) as model:
        chat = model.conversation()
    with pytest.raises(ClosedError, match="load it again"):
        model.conversation()
    with pytest.raises(ClosedError, match="load it again"):
        chat.generate([1], max_tokens=1)
    assert chat.ids == []
