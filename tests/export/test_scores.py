"""Attention scores read by their values: what is no scale, mask and bias must never be taken for one."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from torch import nn  # noqa: E402

from tfinfer.errors import CaptureError  # noqa: E402
from tfinfer.export.capture import capture, tables  # noqa: E402
from tfinfer.export.capture.regions import find_region, is_product  # noqa: E402
from tfinfer.export.capture.rules import attention as attention_rules  # noqa: E402
from tfinfer.export.capture.scores import NotCausal, Pattern, read_pattern  # noqa: E402
from tfinfer.export.capture.tables import ByDistance, NotStable, PerKey, Square, TooLarge  # noqa: E402
from tfinfer.export.capture.tracing import trace  # noqa: E402

INF = float("inf")
LENGTHS = [3, 40, 200]  # within the short probe, and beyond every row being read


def made(change, heads=1, scale=0.25):
    """Scores `change(scaled score, rows, columns)`, broadcast to (heads, rows, length)."""

    def scores(score, rows, length):
        value = torch.full((heads, len(rows), length), score * scale, dtype=torch.float64)
        return change(value, rows[:, None], torch.arange(length)).expand(heads, len(rows), length)

    return scores


def causal(value, i, j):
    return value.masked_fill(j > i, -INF)


# -- masks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("hidden", [-INF, -1e4, -1e9, -1e10, torch.finfo(torch.float32).min])
def test_whatever_hides_the_future_the_pattern_is_causal(hidden, length):
    for change in (
        lambda v, i, j: v.masked_fill(j > i, hidden),
        lambda v, i, j: v + torch.where(j > i, hidden, 0.0),
        lambda v, i, j: torch.where(j > i, hidden, v),
    ):
        assert read_pattern(made(change), length) == Pattern(scale=0.25)


def test_hiding_twice_is_hiding():
    least = torch.finfo(torch.float32).min
    assert read_pattern(made(lambda v, i, j: causal(v, i, j) + torch.where(j > i, least, 0.0)), 60) == Pattern(0.25)


@pytest.mark.parametrize("scale", [1.0, 0.125, 1 / math.sqrt(80), 3.0, -0.5])
def test_the_scale_is_read_back(scale):
    assert read_pattern(made(causal, scale=scale), 100).scale == pytest.approx(scale, rel=1e-12)


# Of a short sequence every row is read; 48 is what the two lengths have in common.
@pytest.mark.parametrize(
    "window, length",
    [(1, 40), (2, 40), (5, 40), (39, 40), (5, 200), (47, 200), (48, 200), (49, 200), (60, 200), (128, 200), (199, 200)],
)
def test_a_window_is_read_also_where_it_is_longer_than_the_short_probe(window, length):
    scores = made(lambda v, i, j: v.masked_fill((j > i) | (j <= i - window), -INF))
    assert read_pattern(scores, length) == Pattern(scale=0.25, window=window)


@pytest.mark.parametrize("window", [40, 41, 1000])
def test_a_window_that_holds_every_position_is_none(window):
    scores = made(lambda v, i, j: v.masked_fill((j > i) | (j <= i - window), -INF))
    assert read_pattern(scores, 40) == Pattern(scale=0.25)


@pytest.mark.parametrize("length", [97, 200])
def test_chunks_are_a_table_of_what_is_hidden(length):
    pattern = read_pattern(made(lambda v, i, j: v.masked_fill((j > i) | (i // 8 != j // 8), -INF)), length)
    assert isinstance(pattern.bias, Square)
    assert pattern.window is None
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = (j <= i) & (i // 8 == j // 8)
    assert (pattern.bias.table[0][visible] == 0).all()
    assert (pattern.bias.table[0][(j <= i) & ~visible] == -INF).all()


def test_a_table_of_chunks_that_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "SQUARE_BYTES", 1000)
    with pytest.raises(TooLarge):
        read_pattern(made(lambda v, i, j: v.masked_fill((j > i) | (i // 8 != j // 8), -INF)), 97)


def test_heads_with_windows_of_their_own_hide_by_distance():
    windows = torch.tensor([3, 7])[:, None, None]
    pattern = read_pattern(made(lambda v, i, j: v.masked_fill((j > i) | (j <= i - windows), -INF), heads=2), 50)
    assert pattern.window is None
    assert isinstance(pattern.bias, ByDistance)
    behind = pattern.bias.table[:, 49:]  # distances from 0
    assert behind[0].tolist() == [0.0] * 3 + [-INF] * 47
    assert behind[1].tolist() == [0.0] * 7 + [-INF] * 43


def test_keys_that_no_later_position_sees_are_hidden_and_not_a_window():
    """Every third key is hidden from all but itself."""
    pattern = read_pattern(made(lambda v, i, j: v.masked_fill((j > i) | ((j % 3 == 0) & (j != i)), -INF)), 60)
    assert isinstance(pattern.bias, Square)
    assert pattern.bias.table[0, 10, [0, 1, 9, 10]].tolist() == [-INF, 0, -INF, 0]


# -- biases ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", LENGTHS)
def test_a_bias_per_key(length):
    pattern = read_pattern(made(lambda v, i, j: causal(v + torch.sin(j).double(), i, j)), length)
    assert isinstance(pattern.bias, PerKey)
    torch.testing.assert_close(pattern.bias.table, torch.sin(torch.arange(length))[None])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_bias_by_distance_for_each_head(length):
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)[:, None, None]
    wave = made(lambda v, i, j: causal(v + torch.cos((i - j).double()) * slopes, i, j), heads=3)
    pattern = read_pattern(wave, length)
    assert isinstance(pattern.bias, ByDistance)
    at = torch.arange(length, dtype=torch.float64)
    wanted = torch.cos(at) * slopes[:, 0]
    got = pattern.bias.table[:, length - 1 :].double()
    torch.testing.assert_close(got - got[:, :1], wanted - wanted[:, :1], rtol=0, atol=1e-6)


def test_equal_biases_of_all_heads_are_stored_once():
    pattern = read_pattern(made(lambda v, i, j: causal(v - (i - j).double().sqrt().nan_to_num(), i, j), heads=4), 60)
    assert pattern.bias.table.shape == (1, 2 * 60 - 1)


def test_a_slope_by_distance_is_a_bias_per_key_up_to_what_softmax_forgets():
    """j - i and j differ by a constant for each row: either table is right."""
    pattern = read_pattern(made(lambda v, i, j: causal(v + 0.5 * (j - i), i, j)), 60)
    at = torch.arange(60)
    table = pattern.bias.table
    by_row = table[0][at[:, None] - at + 59] if isinstance(pattern.bias, ByDistance) else table[0].expand(60, 60)
    by_row = by_row - by_row.diagonal()[:, None]
    wanted = 0.5 * (at - at[:, None]).float()
    assert torch.allclose(by_row.tril(), wanted.tril())


def test_what_is_the_same_for_a_whole_row_is_no_bias():
    """-(length) or a function of the query adds the same to every key: softmax does not see it."""
    pattern = read_pattern(made(lambda v, i, j: causal(v + torch.sin(i.double()), i, j)), 60)
    assert pattern == Pattern(scale=0.25)


def test_a_bias_by_distance_beside_one_by_row_needs_no_table_of_pairs(monkeypatch):
    monkeypatch.setattr(tables, "SQUARE_BYTES", 1000)
    scores = made(lambda v, i, j: causal(v + torch.sin(i.double()) + torch.cos((i - j).double()), i, j))
    assert isinstance(read_pattern(scores, 100).bias, ByDistance)


def test_a_bias_that_grows_with_the_whole_length_is_read_relative_to_the_token_itself():
    """j - (length - 1), as BLOOM's own ALiBi has it, is not stable, but its differences are."""
    pattern = read_pattern(made(lambda v, i, j: causal(v + 0.5 * (j - (len(j) - 1)), i, j)), 60)
    assert isinstance(pattern.bias, ByDistance)
    torch.testing.assert_close(pattern.bias.table[0, 59:], -0.5 * torch.arange(60.0))


def test_a_bias_that_really_changes_with_the_length_is_refused():
    with pytest.raises(NotStable):
        read_pattern(made(lambda v, i, j: causal(v + torch.sin(j.double() * len(j)), i, j)), 60)


def test_a_bias_by_pairs_is_a_table():
    bias = torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def change(v, i, j):
        return causal(v + bias[:, i, j], i, j)

    pattern = read_pattern(made(change, heads=2), 80)
    assert isinstance(pattern.bias, Square)
    wanted = (bias - bias.diagonal(dim1=1, dim2=2)[:, :, None]).tril()
    got = (pattern.bias.table.double() - pattern.bias.table.double().diagonal(dim1=1, dim2=2)[:, :, None]).tril()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def windowed(bias, window=5):
    return made(lambda v, i, j: (v + bias(i, j)).masked_fill((j > i) | (j <= i - window), -INF))


def test_a_bias_by_distance_within_a_window_leaves_the_window_to_the_operator():
    pattern = read_pattern(windowed(lambda i, j: torch.cos((i - j).double())), 60)
    assert pattern.window == 5
    assert isinstance(pattern.bias, ByDistance)
    got = pattern.bias.table[0, 59:64].double()
    wanted = torch.cos(torch.arange(5.0, dtype=torch.float64))
    torch.testing.assert_close(got - got[0], wanted - wanted[0], rtol=0, atol=1e-6)
    assert pattern.bias.table.isfinite().all()


@pytest.mark.parametrize("length", [40, 200])
def test_a_bias_per_key_within_a_window_is_kept_for_every_key_not_for_the_last_few(length):
    pattern = read_pattern(windowed(lambda i, j: torch.sin(j.double())), length)
    assert seen_bias_error(pattern, lambda i, j: torch.sin(j.double()), 5, length) < 1e-6


@pytest.mark.parametrize("length", [40, 200])
def test_a_bias_by_chunks_of_rows_within_a_window_is_not_taken_for_one_per_key(length):
    def bias(i, j):
        return torch.sin(j.double()) * (1 + i // 8)

    pattern = read_pattern(windowed(bias), length)
    assert seen_bias_error(pattern, bias, 5, length) < 1e-5


def seen_bias_error(pattern, bias, window, length):
    """How far the bias that was read is from `bias`, relative to each row's own token, where a key is visible."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    table = pattern.bias.table.double()[0]
    if isinstance(pattern.bias, PerKey):
        table = table.expand(length, length)
    if isinstance(pattern.bias, ByDistance):
        table = table[i - j + length - 1]
    wanted = bias(i, j).expand(length, length)
    visible = (j <= i) & (j > i - window)
    difference = (table - table.diagonal()[:, None]) - (wanted - wanted.diagonal()[:, None])
    return float(difference[visible].abs().max())


# -- what is no pattern ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [
        lambda v, i, j: causal(30 * torch.erf(v / 30), i, j),
        lambda v, i, j: causal(v.clamp(-20, 20), i, j),
        lambda v, i, j: causal(v.clamp(max=10), i, j),
        lambda v, i, j: causal(v**2, i, j),
        lambda v, i, j: causal(v.abs(), i, j),
        lambda v, i, j: causal(v.relu(), i, j),
        lambda v, i, j: causal(v * (1 + (i - j) / 8), i, j),
        lambda v, i, j: causal(v / (i + 1), i, j),
        lambda v, i, j: causal(0 * v, i, j),
    ],
    ids=[
        "another soft cap",
        "clamp",
        "ceiling",
        "square",
        "abs",
        "relu",
        "scale by distance",
        "scale by row",
        "nothing",
    ],
)
def test_scores_that_are_bent_are_no_scale(change):
    assert read_pattern(made(change), 60) is None


@pytest.mark.parametrize("limit, scale", [(40.0, 0.25), (20.0, 128**-0.5), (50.0, 128**-0.5)])
def test_a_limit_that_only_large_scores_reach_is_no_scale(limit, scale):
    assert read_pattern(made(lambda v, i, j: causal(v.clamp(-limit, limit), i, j), scale=scale), 60) is None


def test_heads_of_different_scale_have_a_scale_each():
    scales = torch.tensor([1.0, -2.0])[:, None, None]
    pattern = read_pattern(made(lambda v, i, j: causal(v * scales, i, j), heads=2), 60)
    assert pattern == Pattern(scale=1.0, head_scales=(0.25, -0.5))
    assert str(pattern) == "causal, a scale per head"


def test_a_head_that_weighs_all_keys_alike_is_no_scale():
    scales = torch.tensor([1.0, 0.0])[:, None, None]
    assert read_pattern(made(lambda v, i, j: causal(v * scales, i, j), heads=2), 60) is None


@pytest.mark.parametrize("length", LENGTHS)
def test_a_token_that_does_not_see_itself_is_no_pattern(length):
    assert read_pattern(made(lambda v, i, j: v.masked_fill(j >= i, -INF)), length) is None
    assert read_pattern(made(lambda v, i, j: causal(v, i, j).masked_fill((i == j) & (i == 2), -INF)), length) is None


@pytest.mark.parametrize(
    "change, seen",
    [
        (lambda v, i, j: v, (0, 1)),
        (lambda v, i, j: v.masked_fill(j > i + 1, -INF), (0, 1)),
        (lambda v, i, j: v.masked_fill((j > i) & ((i < 5) | (j > 6)), -INF), (5, 6)),
        (lambda v, i, j: v.masked_fill((j > i) & (j > 3), -INF), (0, 1)),
        (lambda v, i, j: v.masked_fill((j > i) & ~((i == 2) & (j == 7)), -INF), (2, 7)),
        (lambda v, i, j: v + torch.where(j > i, -1000.0, 0.0), (0, 1)),
    ],
    ids=["no mask", "one ahead", "one pair", "a prefix", "one key of one row", "a penalty that softmax may overrule"],
)
@pytest.mark.parametrize("length", [40, 200])
def test_a_position_that_sees_its_future_is_named(change, seen, length):
    with pytest.raises(NotCausal) as error:
        read_pattern(made(change), length)
    assert error.value.args == seen


def test_one_head_that_sees_its_future_is_enough():
    heads = torch.tensor([False, True])[:, None, None]
    with pytest.raises(NotCausal):
        read_pattern(made(lambda v, i, j: v.masked_fill((j > i) & ~(heads & (i == 4)), -INF), heads=2), 40)


# -- as modules write it --------------------------------------------------------------------------------------------
DIM, HEADS, VOCAB = 16, 2, 11


class Attention(nn.Module):
    """One attention over an embedding; `weigh(module, q, k, length)` gives the weights."""

    def __init__(self, weigh):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))
        self.weigh = weigh

    def forward(self, ids):
        x = self.tokens(ids)
        b, t, _ = x.shape
        q, k, v = (side(x).view(b, t, HEADS, -1).transpose(1, 2) for side in (self.q, self.k, self.v))
        y = self.weigh(self, q, k, t) @ v
        return self.head(y.reshape(b, HEADS, t, -1).transpose(1, 2).reshape(b, t, DIM))


def future(t):
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def plain(m, q, k, t):
    return (q @ k.mT * 0.5).masked_fill(future(t), -INF).softmax(-1)


def sloped(m, q, k, t):
    at = torch.arange(t)
    scores = q @ k.mT / 2 + (at[None] - at[:, None]).abs().neg() * m.slopes[:, None, None]
    return scores.masked_fill(future(t), torch.finfo(torch.float32).min).softmax(-1)


def windowed_module(m, q, k, t):
    at = torch.arange(t)
    distance = at[:, None] - at
    return (q @ k.mT / 2).masked_fill((distance < 0) | (distance >= 6), -1e4).softmax(-1)


def baddbmm(m, q, k, t):
    """BLOOM's way: the product adds a bias of one value per head and key, and both are scaled."""
    b = q.shape[0]
    q, k = (side.reshape(b * HEADS, t, -1) for side in (q, k))
    bias = (m.slopes[:, None] * torch.arange(t))[None].expand(b, HEADS, t).reshape(b * HEADS, 1, t)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25).view(b, HEADS, t, t)
    return scores.masked_fill(future(t), -INF).softmax(-1)


def scaled_after_the_mask(m, q, k, t):
    return ((q @ k.mT + torch.full((t, t), -1e9).triu(1)) * 0.125).softmax(-1)


def in_another_order(m, q, k, t):
    """The mask made by `lt` on positions, four axes wide, and scores that pass through views."""
    at = torch.arange(t)
    mask = (at[None, None, None, :] <= at[None, None, :, None]).logical_not()
    scores = (q / 2) @ k.transpose(-1, -2)
    return scores.unsqueeze(2).squeeze(2).masked_fill(mask, -INF).float().softmax(dim=3)


@pytest.fixture
def patterns(monkeypatch):
    """What is read of the attentions that are captured."""
    found = []

    def spy(scores, length):
        found.append(read_pattern(scores, length))
        return found[-1]

    monkeypatch.setattr(attention_rules, "read_pattern", spy)
    return found


def chosen_by_where(m, q, k, t):
    return torch.where(future(t), -INF, q @ k.mT * 0.5).softmax(-1)


def chosen_by_where_not(m, q, k, t):
    return torch.where(~future(t), q @ k.mT * 0.5, -1e9).softmax(-1)


@pytest.mark.parametrize(
    "weigh, scale, window",
    [
        (plain, 0.5, None),
        (scaled_after_the_mask, 0.125, None),
        (in_another_order, 1.0, None),
        (windowed_module, 0.5, 6),
    ],
)
def test_a_module_is_read_as_the_pattern_it_means(patterns, weigh, scale, window):
    captured = capture(Attention(weigh), max_length=120)
    assert patterns == [Pattern(scale, window)]
    assert [r.operator for r in captured.attention] == ["GroupQueryAttention"]


@pytest.mark.parametrize("weigh", [chosen_by_where, chosen_by_where_not])
def test_where_with_a_number_is_read_as_the_mask_it_is(patterns, weigh):
    captured = capture(Attention(weigh), max_length=60)
    assert patterns == [Pattern(0.5)]
    assert [r.operator for r in captured.attention] == ["GroupQueryAttention"]


def test_slopes_of_a_module_are_a_bias_by_distance_per_head(patterns):
    capture(Attention(sloped), max_length=120)
    (pattern,) = patterns
    assert isinstance(pattern.bias, ByDistance)
    wanted = -torch.arange(120.0) * (2.0 ** -torch.arange(1, HEADS + 1))[:, None]
    torch.testing.assert_close(pattern.bias.table[:, 119:], wanted)


def test_baddbmm_scales_its_bias_by_beta_and_its_product_by_alpha(patterns):
    capture(Attention(baddbmm), max_length=120)
    (pattern,) = patterns
    assert pattern.scale == pytest.approx(0.25)
    assert isinstance(pattern.bias, PerKey)
    wanted = 0.5 * torch.arange(120.0) * (2.0 ** -torch.arange(1, HEADS + 1))[:, None]
    torch.testing.assert_close(pattern.bias.table, wanted)


def test_a_module_that_sees_its_future_is_refused_with_the_positions():
    def ahead(m, q, k, t):
        return (q @ k.mT).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(3), -INF).softmax(-1)

    with pytest.raises(CaptureError, match=r"position 0 attends to position 1\b.*mask"):
        capture(Attention(ahead), max_length=60)


def test_attention_is_found_only_where_its_weights_are_summed_over_values():
    def regions(weigh):
        captured = trace(Attention(weigh))
        return [find_region(captured, n) for n in captured.nodes if n.op == "call_function" and is_product(captured, n)]

    first, *rest = regions(plain)
    assert first is not None
    assert rest == [None]
    assert regions(lambda m, q, k, t: (q @ k.mT).masked_fill(future(t), 0.0)) == [None, None]


def test_a_softmax_over_the_queries_is_refused():
    def over_queries(m, q, k, t):
        return (q @ k.mT).masked_fill(future(t), -INF).softmax(-2)

    with pytest.raises(CaptureError, match="mixes positions"):
        capture(Attention(over_queries), max_length=60)


def test_weights_that_are_no_softmax_stay_as_they_are_written():
    def gated(m, q, k, t):
        weights = (q @ k.mT).masked_fill(future(t), -INF).softmax(-1)
        return weights * weights

    captured = capture(Attention(gated), max_length=60)
    assert [r.operator for r in captured.attention] == ["the module's own operators"]
