"""How long a draft is, from given figures: no clock runs here."""

import pytest

from tfinfer.tokens.pace import LENGTHS, Pace


def measured(pace, cost, times=2):
    """Passes of n tokens take cost(n) seconds."""
    for n in (1, *(k + 1 for k in LENGTHS)):
        for _ in range(times):
            pace.passed(n, cost(n))
    pace._tried, pace._made, pace._spent = 0, 0.0, 0.0  # those were no drafts
    return pace


def outcomes(pace, kind, right, count=60, made=False):
    for place in range(count):
        pace.judged(kind, place % 100 < 100 * right, made=made)
    return pace


def flat(n):
    """A pass that costs little more with more tokens."""
    return 1 + 0.05 * (n - 1)


def test_nothing_is_drafted_before_a_step_was_measured_twice():
    pace = outcomes(Pace(free=True), 2, 1.0)
    for expected in (False, False, True):
        assert (pace.length(2, 99) > 0) == expected
        pace.passed(1, 1.0)


def test_a_free_guess_is_drafted_when_one_was_right_a_dear_one_at_once():
    free, dear = Pace(free=True), Pace(free=False)
    for pace in (free, dear, free, dear):
        pace.passed(1, 1.0)
    assert (free.length(2, 99), dear.length(0, 99) > 0) == (0, True)
    free.judged(2, True, made=False)
    assert free.length(2, 99) > 0


def test_drafts_that_are_right_are_long_and_wrong_ones_are_not_made():
    assert outcomes(measured(Pace(free=True), flat), 2, 1.0).length(2, 99) == 16
    assert outcomes(measured(Pace(free=True), flat), 2, 0.0).length(2, 99) == 0


def test_the_gain_is_what_the_formula_says():
    pace = outcomes(measured(Pace(free=True), flat), 2, 1.0, 6)
    a = pace.acceptance(2)
    assert pace.gain(2, 4, 1.0) == pytest.approx((1 + a + a**2 + a**3 + a**4) / 1.2)
    again = outcomes(measured(Pace(free=True, redo=True), flat), 2, 1.0, 6)
    assert again.gain(2, 4, 1.0) == pytest.approx((1 + a + a**2 + a**3 + a**4) / (1.2 + (1 - a**4) * 0.2))


def test_what_a_draft_costs_counts():
    cheap, dear = (outcomes(measured(Pace(free=False), flat), 0, 1.0) for _ in range(2))
    for k in LENGTHS:
        for _ in range(2):
            cheap.drafted(k, 0.1 * k)
            dear.drafted(k, 1.0 * k)
    assert cheap.length(0, 99) == 16
    assert dear.length(0, 99) == 0


def test_passes_that_cost_as_much_as_their_steps_are_not_made():
    pace = outcomes(measured(Pace(free=True), lambda n: n), 2, 1.0)
    assert pace.length(2, 99) == 0


def test_kinds_are_judged_apart():
    pace = measured(Pace(free=True), flat)
    outcomes(pace, 2, 0.0)
    outcomes(pace, 4, 1.0)
    assert (pace.length(2, 99), pace.length(4, 99)) == (0, 16)


def test_a_kind_that_was_not_judged_begins_as_good_as_the_one_below():
    pace = outcomes(measured(Pace(free=True), flat), 3, 1.0)
    assert pace.acceptance(3) == pace.acceptance(5) > 0.9
    assert pace.acceptance(2) == 0.2
    pace.judged(5, False)
    assert pace.acceptance(5) < pace.acceptance(3)


def test_no_more_than_there_is_room_for():
    pace = outcomes(measured(Pace(free=True), flat), 2, 1.0)
    assert [pace.length(2, most) for most in (0, 1, 3, 8, 15)] == [0, 1, 2, 8, 8]


def test_free_guesses_begin_again_as_soon_as_they_would_pay():
    pace = measured(Pace(free=True), flat)
    outcomes(pace, 2, 0.0)
    assert pace.length(2, 99) == 0
    outcomes(pace, 2, 1.0, 12)
    assert pace.length(2, 99) > 0


def test_guesses_that_cost_pause_twice_as_long_each_time_until_they_pay():
    pace, pauses = measured(Pace(free=False), flat), []
    for _ in range(4):
        outcomes(pace, 0, 0.0, 12)
        assert pace.length(0, 99) == 0
        pauses.append(1)
        while pace.length(0, 99) == 0:
            pauses[-1] += 1
    assert pauses == [17, 33, 65, 129]
    for _ in range(4):
        pace.passed(3, 1.1)
        outcomes(pace, 0, 1.0, 2, made=True)
    assert pace.length(0, 99) > 0
    outcomes(pace, 0, 0.0, 40)
    assert [pace.length(0, 99) > 0 for _ in range(18)].index(True) == 17


def test_drafts_that_promise_more_than_they_make_pause():
    """Right ones that come in clusters look better than they are: three tokens here in the time of four."""
    pace = outcomes(measured(Pace(free=True), lambda n: 1 + 3 / 16 * (n - 1)), 2, 0.9)
    for _ in range(8):
        pace.passed(17, 4.0)
        outcomes(pace, 2, 1.0, 2, made=True)
    assert pace.gain(2, 16, 1.0) > 1.5
    assert [pace.length(2, 99) > 0 for _ in range(18)].index(True) == 17
    for pause in (32, 64, 64):
        for _ in range(4):
            assert pace.length(2, 99) > 0
            pace.passed(17, 4.0)
        assert [pace.length(2, 99) > 0 for _ in range(pause + 2)].index(True) == pause + 1


def test_one_slow_pass_does_no_lasting_harm():
    """The first of a length is not believed, and a bad measurement is forgotten."""
    pace = outcomes(Pace(free=True), 2, 1.0)
    for _ in range(2):
        pace.passed(1, 1.0)
    longest = pace.length(2, 99)
    pace.passed(longest + 1, 99.0)
    assert pace.length(2, 99) == longest
    pace.passed(longest + 1, 99.0)
    assert pace.length(2, 99) != longest
    for _ in range(2 * 96):
        pace.passed(1, 1.0)
    assert pace.length(2, 99) == longest
