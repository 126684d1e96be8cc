"""Causality by numbers: what it finds, what it says of it, and what it must not refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.verify import find_leak

VOCAB, WIDTH = 23, 8


class Causal(nn.Module):
    """Causal attention in two layers; `change` gets ids, embeddings and the result of the first layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def change(self, ids, x):
        return x

    def attend(self, x):
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.attend(self.change(ids, x)))


class OneAhead(Causal):
    def change(self, ids, x):
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:]


class CountsLaterPadding(Causal):
    """Positions by the padding that is still to come."""

    def change(self, ids, x):
        behind = (ids == 0).flip(1).long().cumsum(1).flip(1)
        return x + self.places(behind)


class Average(Causal):
    def change(self, ids, x):
        return x - x.mean(1, keepdim=True)


class OverTheBatch(Causal):
    def change(self, ids, x):
        return x - x.mean(0, keepdim=True)


class EvenOnly(Causal):
    """Right at odd lengths."""

    def change(self, ids, x):
        return x if x.shape[1] % 2 else x + x.flip(1)


class Beyond16(Causal):
    """Right up to its chunk of 16."""

    def change(self, ids, x):
        return x if x.shape[1] <= 16 else x + x.mean(1, keepdim=True)


def leak_of(module):
    with torch.no_grad():
        return find_leak(lambda ids: module.eval()(ids), VOCAB)


def test_one_position_ahead_is_named_with_the_change_that_showed_it():
    leak = leak_of(OneAhead())
    assert (leak.row, leak.token - leak.position, leak.reaches) == (0, 1, 1)
    assert leak.moved > 1e-3
    message = str(leak)
    assert f"changing token {leak.token} of 7 moved position {leak.position}" in message
    assert "sees 1 position ahead" in message


@pytest.mark.parametrize("module", [Average, EvenOnly, Beyond16, CountsLaterPadding])
def test_what_comes_later_is_seen_at_some_length_and_some_token(module):
    leak = leak_of(module())
    assert leak is not None
    assert leak.row == 0
    assert leak.position < leak.token


def test_a_sum_over_all_positions_is_told_from_a_short_look_ahead():
    assert "6 of the 6 positions before it moved" in str(leak_of(Average()))


def test_rows_that_depend_on_each_other_are_found():
    leak = leak_of(OverTheBatch())
    assert leak.row == 1
    assert "rows of a batch" in str(leak)


class SpreadsNoise(Causal):
    """A causal convolution through a Fourier transform: rounding reaches every position."""

    def change(self, ids, x):
        n = x.shape[1]
        kernel = torch.fft.rfft(0.9 ** torch.arange(n).float(), 2 * n)
        return 30 * torch.fft.irfft(torch.fft.rfft(x, 2 * n, dim=1) * kernel[:, None], 2 * n, dim=1)[:, :n]


class Centred(Causal):
    """The largest of all exponents is taken away, and cancels but for rounding."""

    def change(self, ids, x):
        e = (x - x.amax((1, 2), keepdim=True)).exp()
        return e.cumsum(1) / e.cumsum(1).sum(-1, keepdim=True)


class Random(Causal):
    def change(self, ids, x):
        return F.dropout(x, 0.5, training=True)


class LastAlone(Causal):
    def forward(self, ids):
        return super().forward(ids)[:, -1]


class NothingForZero(Causal):
    """Rows of padding become NaN, as they do without a key to attend to."""

    def forward(self, ids):
        return super().forward(ids).masked_fill((ids == 0)[..., None], float("nan"))


class Impossible(Causal):
    def forward(self, ids):
        logits = super().forward(ids)
        return torch.where(torch.arange(VOCAB) < 3, float("-inf"), logits)


@pytest.mark.parametrize("module", [Causal, SpreadsNoise, Centred, Random, LastAlone, NothingForZero, Impossible])
def test_what_is_causal_up_to_rounding_is_not_refused(module):
    assert leak_of(module()) is None


def test_short_models_are_checked_at_their_own_length():
    with torch.no_grad():
        module = EvenOnly().eval()
        assert find_leak(module, VOCAB, longest=6) is not None
        assert find_leak(module, VOCAB, longest=3) is None


class UnmaskedByHand(Causal):
    """No rule reads these scores as attention, so none misses a mask."""

    def attend(self, x):
        return ((x @ x.transpose(1, 2)).softmax(-1) * 1.5) @ x


def test_what_no_rule_sees_is_refused_by_its_numbers_before_the_proof(tmp_path):
    stages = []
    with pytest.raises(CaptureError, match="positions before it moved, as without a causal mask"):
        export_model(UnmaskedByHand(), tmp_path / "out", kind="decoder", progress=stages.append)
    assert stages == ["capture"]
    assert not (tmp_path / "out").exists()


def test_a_refusal_by_a_rule_keeps_its_place_and_the_numbers_say_how_much(tmp_path):
    with pytest.raises(CaptureError) as caught:
        export_model(Average(), tmp_path / "out", kind="decoder")
    message = str(caught.value)
    assert message.startswith("aten.mean.dim: mixes positions")
    assert "test_causality.py" in message
    assert "by the numbers it is not causal: changing token" in message
