"""Sinks: a score of each head that takes part in the softmax and weighs nothing, however it is written."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from one_attention import DIM, INF, Attention, export_and_generate, future  # noqa: E402

from tfinfer.export.capture import capture  # noqa: E402


def masked(q, k, t):
    return (q @ k.mT / 4).masked_fill(future(t), -INF)


def joined_behind(m, q, k, t):
    """As gpt-oss has it."""
    scores = masked(q, k, t)
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, t, -1)
    combined = torch.cat([scores, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return torch.softmax(combined, dim=-1, dtype=torch.float32)[..., :-1].to(q.dtype)


def joined_in_front(m, q, k, t):
    sinks = m.sinks[None, :, None, None].repeat(q.shape[0], 1, t, 1)
    return torch.cat([sinks, masked(q, k, t)], dim=-1).softmax(-1)[..., 1:]


def by_hand(m, q, k, t):
    scores = masked(q, k, t)
    sinks = m.sinks[:, None, None]
    largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    exps = torch.exp(scores - largest)
    return exps / (exps.sum(-1, keepdim=True) + torch.exp(sinks - largest))


def one_more(m, q, k, t):
    """softmax1, or off by one: 1 in the denominator."""
    scores = masked(q, k, t)
    largest = scores.max(-1, keepdim=True).values.clamp(min=0)
    exps = (scores - largest).exp()
    return exps / (exps.sum(-1, keepdim=True) + (-largest).exp())


def padded(m, q, k, t):
    return torch.nn.functional.pad(masked(q, k, t), (0, 1)).softmax(-1)[..., :-1]


def windowed_and_capped(m, q, k, t):
    at = torch.arange(t)
    scores = (5 * torch.tanh(q @ k.mT / 5)).masked_fill(future(t) | (at[:, None] - at >= 6), -1e9)
    sinks = m.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, t, 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[:, :, :, :t]


WAYS = [joined_behind, joined_in_front, by_hand, one_more, padded]


@pytest.mark.parametrize("weigh", WAYS)
def test_sinks_are_lowered_and_generate_what_pytorch_does(weigh, tmp_path):
    report = export_and_generate(Attention(weigh), tmp_path)
    assert [(a.operator, a.pattern) for a in report.manifest.attention] == [("GroupQueryAttention", "causal, sinks")]


def test_a_window_and_a_cap_stand_beside_sinks(tmp_path):
    report = export_and_generate(Attention(windowed_and_capped), tmp_path)
    assert [a.pattern for a in report.manifest.attention] == ["causal, window 6, soft cap 5, sinks"]


@pytest.mark.parametrize("options", [{"flavor": "standard"}, {"dim": 12}], ids=["standard", "heads of 6"])
@pytest.mark.parametrize("weigh", [joined_behind, one_more, windowed_and_capped])
def test_without_an_operator_for_sinks_they_are_plain_operators(weigh, options, tmp_path):
    module = Attention(weigh, dim=options.get("dim", DIM))
    report = export_and_generate(module, tmp_path, flavor=options.get("flavor", "ort"))
    assert [a.operator for a in report.manifest.attention] == ["the module's own operators"]


def softmax_by_hand(m, q, k, t):
    scores = masked(q, k, t)
    exps = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    return exps / exps.sum(-1, keepdim=True)


def shifted(m, q, k, t):
    scores = masked(q, k, t)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)


def by_logsumexp(m, q, k, t):
    scores = masked(q, k, t)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp()


@pytest.mark.parametrize("weigh", [softmax_by_hand, shifted, by_logsumexp])
def test_a_softmax_by_hand_is_a_softmax(weigh, tmp_path):
    report = export_and_generate(Attention(weigh), tmp_path)
    assert [(a.operator, a.pattern) for a in report.manifest.attention] == [("GroupQueryAttention", "causal")]


def masked_behind_exp(m, q, k, t):
    exps = torch.exp((q @ k.mT / 4).clamp(max=30)) * ~future(t)
    return exps / exps.sum(-1, keepdim=True)


def without_the_largest(m, q, k, t):
    """No softmax: what remains is not of sum 1, nor with one score more in the denominator."""
    exps = torch.exp(masked(q, k, t))
    return exps / exps.sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("weigh", [masked_behind_exp, without_the_largest])
def test_other_weights_by_hand_stay_as_they_are_written(weigh, tmp_path):
    report = export_and_generate(Attention(weigh), tmp_path)
    assert [a.operator for a in report.manifest.attention] == ["the module's own operators"]


def test_a_sink_that_changes_from_position_to_position_is_none():
    def drifting(m, q, k, t):
        sinks = (m.sinks[:, None] * torch.arange(t))[None, :, :, None].expand(q.shape[0], -1, -1, 1)
        scores = masked(q, k, t)
        largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        exps = torch.exp(scores - largest)
        return exps / (exps.sum(-1, keepdim=True) + torch.exp(sinks - largest))

    captured = capture(Attention(drifting), max_length=60)
    assert [r.operator for r in captured.attention] == ["the module's own operators"]


def test_weights_beside_sinks_can_be_shown(tmp_path):
    """The proof of an export compares them with the module's."""
    report = export_and_generate(Attention(joined_behind), tmp_path)
    (shown,) = report.manifest.maps
    assert (shown.name, len(shown.outputs)) == ("self", 1)
