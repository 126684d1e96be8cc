"""Vectors of texts from vectors of tokens, padding left out, and which way is taken when."""

import numpy as np
import pytest

from tfinfer.errors import InputError
from tfinfer.manifest import EncoderRoles, PoolingSpec
from tfinfer.tokens.pooling import choose, normalized, pool

LENGTHS = [3, 1, 5]
BOTH = EncoderRoles("ids", hidden_states="h", pooled="p")
HIDDEN = EncoderRoles("ids", hidden_states="h")
POOLED = EncoderRoles("ids", pooled="p")
OWN = PoolingSpec("cls", True)


@pytest.fixture
def hidden() -> np.ndarray:
    """(3, 5, 4), NaN wherever there is padding."""
    found = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    for row, length in zip(found, LENGTHS):
        row[length:] = np.nan
    return found


def test_the_mean_is_of_tokens_alone(hidden):
    wide = [row[:length].astype(np.float64).mean(0) for row, length in zip(hidden, LENGTHS)]
    np.testing.assert_allclose(pool(hidden, LENGTHS, "mean"), wide, atol=1e-6)


def test_cls_is_the_first_token_and_last_the_last(hidden):
    assert (pool(hidden, LENGTHS, "cls") == hidden[:, 0]).all()
    assert (pool(hidden, LENGTHS, "last") == [hidden[0, 2], hidden[1, 0], hidden[2, 4]]).all()


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_half_precision_is_summed_in_float32(mode):
    found = pool(np.full((2, 600, 3), 300, np.float16), [600, 2], mode)
    assert found.dtype == np.float32
    assert (found == 300).all()


def test_an_unknown_mode_is_refused(hidden):
    with pytest.raises(InputError, match="mean, cls or last"):
        pool(hidden, LENGTHS, "none")


def test_normalized_vectors_have_length_1_and_zeros_stay():
    vectors = np.array([[3, 4], [0, 0], [3e30, 4e30], [3e-30, 4e-30]], np.float32)
    found = normalized(vectors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    assert vectors[0, 0] == 3


@pytest.mark.parametrize(
    "asked, normalize, own, roles, expected",
    [
        (None, None, None, HIDDEN, ("mean", False)),
        (None, None, None, BOTH, ("mean", False)),
        (None, None, None, POOLED, ("pooled", False)),
        (None, None, OWN, BOTH, ("cls", True)),
        (None, None, OWN, POOLED, ("pooled", True)),
        ("last", None, OWN, BOTH, ("last", True)),
        ("last", False, OWN, BOTH, ("last", False)),
        ("pooled", True, None, BOTH, ("pooled", True)),
        ("none", None, OWN, HIDDEN, ("none", False)),
        ("none", True, OWN, HIDDEN, ("none", True)),
    ],
)
def test_what_is_asked_goes_before_the_folders_own(asked, normalize, own, roles, expected):
    assert choose(asked, normalize, own, roles, ["h", "p"]) == PoolingSpec(*expected)


@pytest.mark.parametrize(
    "asked, normalize, roles, said",
    [
        ("max", None, BOTH, "mean, cls, last, none, pooled"),
        (None, 1, BOTH, "True, False or None"),
        ("mean", None, POOLED, "pools by itself"),
        ("pooled", None, HIDDEN, "does not pool by itself"),
        (None, None, EncoderRoles("ids"), "gives logits, boxes.*use run"),
    ],
)
def test_what_does_not_fit_is_refused(asked, normalize, roles, said):
    with pytest.raises(InputError, match=said):
        choose(asked, normalize, None, roles, ["logits", "boxes"])
