"""Rows of like length share a batch, every row once, within rows and tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfinfer.errors import InputError
from tfinfer.tokens.batching import batches, pad

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 200), st.booleans())
def test_every_row_is_in_one_batch_that_keeps_its_limits(lengths, most, budget, ragged):
    made = list(batches(lengths, most, ragged=ragged, budget=budget))
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[row] for row in batch)
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert ragged or {lengths[row] for row in batch} == {longest}


@given(LENGTHS, st.integers(1, 9))
def test_the_longest_rows_come_first_and_equal_ones_in_their_order(lengths, most):
    order = [row for batch in batches(lengths, most, ragged=True, budget=8192) for row in batch]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def test_a_batch_is_as_large_as_its_limits_allow():
    assert list(batches([5, 9, 5, 1], 3, ragged=True, budget=99)) == [[1, 0, 2], [3]]
    assert list(batches([5, 9, 5, 1], 9, ragged=True, budget=18)) == [[1, 0], [2, 3]]
    assert list(batches([5, 9, 5, 1], 9, ragged=False, budget=99)) == [[1], [0, 2], [3]]
    assert list(batches([50], 9, ragged=True, budget=10)) == [[0]]
    assert list(batches([], 9, ragged=True, budget=9)) == []


@pytest.mark.parametrize("most, budget", [(0, 9), (9, 0)])
def test_limits_must_be_positive(most, budget):
    with pytest.raises(InputError, match="at least one"):
        list(batches([1], most, ragged=True, budget=budget))


def test_padding_is_to_the_right_and_masked():
    ids, mask = pad([np.array([4, 5]), np.array([6]), np.array([7, 8, 9])], -1)
    assert ids.tolist() == [[4, 5, -1], [6, -1, -1], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == np.int64
