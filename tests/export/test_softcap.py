"""A soft cap is read by its values, lowered to the operator's own attribute, and computes what PyTorch does."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from one_attention import INF, Attention, export_and_generate, future  # noqa: E402

from tfinfer.errors import CaptureError  # noqa: E402
from tfinfer.export.capture import capture  # noqa: E402
from tfinfer.export.capture.scores import read_pattern  # noqa: E402
from tfinfer.export.capture.tables import ByDistance  # noqa: E402


def made(change, heads=1):
    def scores(score, rows, length):
        value = torch.full((heads, len(rows), length), score, dtype=torch.float64)
        value = change(value, rows[:, None], torch.arange(length))
        return value.masked_fill(torch.arange(length) > rows[:, None], -INF)

    return scores


@pytest.mark.parametrize("length", [3, 40, 200])
@pytest.mark.parametrize("cap, scale", [(50.0, 0.125), (30.0, 1.0), (5.0, 3.0), (1.0, 1e-3), (1000.0, 0.088)])
def test_scale_and_cap_are_read_back(cap, scale, length):
    pattern = read_pattern(made(lambda v, i, j: cap * torch.tanh(v * scale / cap)), length)
    assert pattern.softcap == pytest.approx(cap, rel=1e-12)
    assert pattern.scale == pytest.approx(scale, rel=1e-9)
    assert pattern.bias is None
    assert str(pattern) == f"causal, soft cap {cap:g}"


def test_a_window_and_a_bias_stand_beside_a_cap():
    def change(v, i, j):
        return (20 * torch.tanh(v / 80) + torch.cos((i - j).double())).masked_fill(j <= i - 7, -INF)

    pattern = read_pattern(made(change), 100)
    assert (pattern.window, type(pattern.bias)) == (7, ByDistance)
    assert (pattern.softcap, pattern.scale) == (pytest.approx(20), pytest.approx(0.25))


@pytest.mark.parametrize(
    "change",
    [
        lambda v, i, j: 20 * torch.tanh(v / 20 + 0.1),
        lambda v, i, j: 20 * torch.tanh((v + j) / 20),
        lambda v, i, j: 20 * torch.tanh(v / 20) + 0.01 * v.clamp(-30, 30),
        lambda v, i, j: 20 * (v / 20).atan(),
        lambda v, i, j: (10 + j) * torch.tanh(v / (10 + j)),
        lambda v, i, j: (20 * torch.tanh(v / 20)).relu(),
    ],
    ids=["shifted", "a bias within", "beside another", "atan", "a cap per key", "one side"],
)
def test_what_only_looks_like_a_cap_is_none(change):
    assert read_pattern(made(change), 60) is None


def capped(scores, t, cap=3.0):
    return cap * torch.tanh(scores / cap)


def causal_cap(m, q, k, t):
    return capped(q @ k.mT / math.sqrt(q.shape[-1]), t).masked_fill(future(t), -1e9).softmax(-1)


def windowed_cap(m, q, k, t):
    at = torch.arange(t)
    behind = at[:, None] - at >= 6
    return capped(q @ k.mT, t).masked_fill(future(t) | behind, -INF).softmax(-1)


def cap_and_bias(m, q, k, t):
    at = torch.arange(t)
    bias = (at[None] - at[:, None]) * m.slopes[:, None, None]
    return (capped(q @ k.mT, t) + bias).masked_fill(future(t), -INF).softmax(-1)


def all_at_once(m, q, k, t):
    at = torch.arange(t)
    bias = torch.cos((at[:, None] - at).float()) * m.slopes[:, None, None]
    hidden = future(t) | (at[:, None] - at >= 6)
    return (capped(q @ k.mT * m.slopes[:, None, None], t) + bias).masked_fill(hidden, -INF).softmax(-1)


@pytest.mark.parametrize("flavor, operator", [("ort", "GroupQueryAttention"), ("standard", "Attention")])
@pytest.mark.parametrize(
    "weigh, words",
    [
        (causal_cap, "causal, soft cap 3"),
        (windowed_cap, "causal, window 6, soft cap 3"),
        (cap_and_bias, "causal, soft cap 3, a bias by distance"),
        (all_at_once, "causal, window 6, soft cap 3, a scale per head, a bias by distance"),
    ],
)
def test_a_capped_module_is_lowered_and_generates_what_pytorch_does(weigh, words, flavor, operator, tmp_path):
    report = export_and_generate(Attention(weigh), tmp_path, flavor=flavor)
    assert [(a.operator, a.pattern) for a in report.manifest.attention] == [(operator, words)]


def test_a_bias_within_the_cap_stays_as_it_is_written(tmp_path):
    def biased_before(m, q, k, t):
        return capped(q @ k.mT + torch.arange(t) * 0.1, t).masked_fill(future(t), -INF).softmax(-1)

    report = export_and_generate(Attention(biased_before), tmp_path)
    assert [a.operator for a in report.manifest.attention] == ["the module's own operators"]


def test_a_cap_over_the_mask_lets_a_position_see_its_future():
    """tanh makes of -inf a score of -cap, which weighs something."""

    def masked_before(m, q, k, t):
        return capped((q @ k.mT).masked_fill(future(t), -INF), t).softmax(-1)

    with pytest.raises(CaptureError, match="position 0 attends to position 1"):
        capture(Attention(masked_before), max_length=60)
