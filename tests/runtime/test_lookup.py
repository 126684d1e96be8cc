"""Prompt lookup: what is guessed from the text so far."""

from tfinfer.tokens.lookup import Lookup
from tfinfer.tokens.speculate import Draft


def guess(ids, count):
    drafter = Lookup(ids)
    return (kind := drafter.kind()) and (kind, drafter.propose(count).ids)


def test_a_lookup_takes_what_followed_the_longest_match_the_latest_of_equals():
    assert guess([], 2) is guess([1], 2) is guess([1, 1], 2) is guess([1, 2, 3, 4], 2) is None
    assert guess([1, 2, 3, 4, 1, 2], 2) == (2, [3, 4])
    assert guess([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 1) == (2, [3])  # three tokens stood before the first
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], 1) == (2, [4])
    assert guess([*range(20), *range(12)], 3) == (4, [12, 13, 14])
    assert guess([*range(80), *range(70)], 1) == (6, [70])
    assert guess([5, 6, 7, 8, 1, 5, 6, 7, 8], 1) == (3, [1])


def test_a_lookup_goes_on_with_itself_where_the_text_ends():
    assert guess([7, 7, 7], 4) == (2, [7, 7, 7, 7])
    assert guess([1, 2, 3, 1, 2], 7) == (2, [3, 1, 2, 3, 1, 2, 3])


def test_what_is_added_is_looked_up():
    drafter = Lookup([1, 2, 3])
    for token in (9, 1, 2):
        drafter.add(token)
    assert drafter.kind() == 2
    assert drafter.propose(2) == Draft([3, 9])
