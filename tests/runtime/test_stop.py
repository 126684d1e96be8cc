"""Stop strings: found whatever the pieces are, and nothing of them is ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfinfer.errors import InputError
from tfinfer.tokens.stop import StopMatcher


def run(stop, pieces):
    matcher = StopMatcher(stop)
    shown = [matcher.push(piece) for piece in pieces]
    return shown + [matcher.flush()], matcher.matched


def reference(stops, text):
    """The text up to the first place where a stop string is complete, character by character."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_any_cut_into_pieces_shows_the_same(stops, pieces):
    shown, matched = run(stops, pieces)
    assert ("".join(shown), matched) == reference(stops, "".join(pieces))


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.text("abc", max_size=20))
def test_held_text_is_as_short_as_can_be(stops, text):
    """Holding more than a beginning of a stop string makes streams stutter."""
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(char) for char in text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_across_three_pieces():
    assert run("<end>", ["a<", "en", "d>b"]) == (["a", "", "", ""], "<end>")


def test_a_beginning_that_goes_on_differently_is_released():
    assert run("<end>", ["a<e", "x"]) == (["a", "<ex", ""], None)


def test_a_beginning_at_the_end_is_flushed():
    assert run("<end>", ["a<en"]) == (["a", "<en"], None)


def test_a_restart_within_the_stop_string_is_found():
    """A matcher that drops all it held on a mismatch misses the second a."""
    assert run("aab", ["a", "a", "a", "b"]) == (["", "", "a", "", ""], "aab")


def test_the_stop_that_is_complete_first_wins():
    assert run(["world", "lo"], ["hello world"]) == (["hel", ""], "lo")
    assert run(["abcd", "bc"], ["ab", "cd"]) == (["", "a", ""], "bc")


def test_of_two_that_end_together_the_longer_is_dropped():
    assert run(["bc", "abc"], ["xab", "c"]) == (["x", "", ""], "abc")


def test_nothing_comes_after_a_match():
    assert run("x", ["axb", "more"]) == (["a", "", ""], "x")


@pytest.mark.parametrize("stop", [None, [], ()])
def test_without_stops_text_passes(stop):
    assert run(stop, ["a", "b"]) == (["a", "b", ""], None)


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], 3, {"a": 1}, ["a", None]], ids=repr)
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(InputError, match=r"stop: expected .*got"):
        StopMatcher(stop)
