"""The tests on ranks and signs against values of other implementations and of tables."""

import numpy as np
import pytest

from tfinfer.measure.ranks import mann_whitney, ratio_of_medians, sign_test

# From scipy.stats.mannwhitneyu(second, first): method "exact" where there are no ties, else "asymptotic".
KNOWN = [
    ([1.1, 2.2, 3.3], [4.4, 5.5, 6.6], 9.0, 0.1),
    ([19, 22, 16, 29, 24], [20, 11, 17, 12], 3.0, 0.1111111111111111),
    ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 25.0, 0.007936507936507936),
    ([1.5], [2.5], 1.0, 1.0),
    ([1, 1, 2, 3], [2, 3, 3, 4, 5], 17.5, 0.07854585095119067),
    ([0.1 * i for i in range(30)], [0.1 * i + 0.55 for i in range(25)], 450.0, 0.20792927248164417),
    ([5, 5, 5], [5, 5, 5], 4.5, 1.0),
]


@pytest.mark.parametrize("first, second, u, p", KNOWN)
def test_known_values(first, second, u, p):
    found = mann_whitney(first, second)
    assert found == pytest.approx((u, p), abs=1e-12)
    back = mann_whitney(second, first)
    assert back == pytest.approx((len(first) * len(second) - u, p), abs=1e-12)


def test_the_exact_p_is_right_as_often_as_it_says():
    """Of all orders of three and four numbers, at most a share p has a p so small."""
    from itertools import combinations

    places = [np.array(chosen) for chosen in combinations(range(7), 3)]
    found = [mann_whitney(np.delete(np.arange(7), chosen), chosen)[1] for chosen in places]
    for p in set(found):
        assert sum(other <= p + 1e-12 for other in found) / len(found) == pytest.approx(p)


def test_the_sign_test_counts_coins():
    assert sign_test(5, 5) == 1 / 32
    assert sign_test(8, 9) == 10 / 512
    assert sign_test(0, 4) == 1.0


def test_a_ratio_lies_in_its_interval_and_is_the_same_every_time():
    rng = np.random.default_rng(1)
    first, second = rng.normal(1, 0.05, 40), rng.normal(1.2, 0.05, 40)
    ratio, low, high = ratio_of_medians(first, second)
    assert low < ratio < high
    assert low > 1.1
    assert high < 1.3
    assert ratio_of_medians(first, second) == (ratio, low, high)
    assert ratio_of_medians([2.0], [3.0]) == (1.5, 1.5, 1.5)
