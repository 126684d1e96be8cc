"""Modules that no cache can continue: each refused by name, with its place, and the next good export works."""

import handwritten
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.capture import capture


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(31, 16), nn.Linear(16, 16), nn.Linear(16, 31)

    def forward(self, ids):
        return self.head(self.block(self.tokens(ids)))

    def causal(self, x):
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]


class SeesAll(Small):
    def block(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class WrongTriangle(Small):
    def block(self, x):
        T = x.shape[1]
        scores = x @ x.transpose(1, 2)
        return scores.masked_fill(torch.ones(T, T).tril() == 1, float("-inf")).softmax(-1) @ x


class OneAhead(Small):
    """The off-by-one that trains beautifully."""

    def block(self, x):
        T = x.shape[1]
        return (x @ x.transpose(1, 2) + torch.full((T, T), float("-inf")).triu(2)).softmax(-1) @ x


class Averages(Small):
    def block(self, x):
        return self.causal(x) + x.mean(1, keepdim=True)


class Flips(Small):
    def block(self, x):
        return self.causal(x) + x.flip(1)


class ShiftsLeft(Small):
    def block(self, x):
        return self.causal(x) + F.pad(x, (0, 0, 0, 1))[:, 1:]


class ShiftsLeftByCat(Small):
    def block(self, x):
        return self.causal(x) + torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


class AttendsToShifted(Small):
    """A position more than the queries have: the rules of attention know nothing of it."""

    def block(self, x):
        k = F.pad(x, (0, 0, 1, 0))
        return F.scaled_dot_product_attention(x, k, k)


class MeetsAnotherShift(Small):
    """As long, and yet not the same positions."""

    def block(self, x):
        return self.causal((F.pad(x, (0, 0, 1, 0)) + F.pad(x, (0, 0, 0, 1)))[:, :-1])


class Strides(Small):
    def block(self, x):
        y = F.conv1d(F.pad(x.transpose(1, 2), (1, 0)), self.mix.weight[:, :, None].expand(-1, -1, 2), stride=2)
        return self.causal(x) + y.repeat_interleave(2, 2)[..., : x.shape[1]].transpose(1, 2)


class Chunks(Small):
    def block(self, x):
        y = F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
        return self.causal(x) + y.cumsum(2).flatten(1, 2)[:, : x.shape[1]]


class Convolves(Small):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)

    def block(self, x):
        return self.causal(x) + self.convolution(x.transpose(1, 2)).transpose(1, 2)


class BothDirections(Small):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(16, 8, batch_first=True, bidirectional=True)

    def block(self, x):
        return self.causal(x) + self.layer(x)[0]


class HiddenFromIds(Small):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(16, 16, batch_first=True)

    def block(self, x):
        return self.causal(x) + self.layer(x, x[:, -1:].transpose(0, 1))[0]


class NormalisesOverTime(Small):
    def block(self, x):
        return self.causal(x.softmax(1))


class DependsOnLength(Small):
    def block(self, x):
        return self.causal(x) / x.shape[1]


class BiasFromTheEnd(Small):
    """A bias that counts from the last token: with each new one, all that was computed would change."""

    def block(self, x):
        T = x.shape[1]
        at = torch.arange(T)
        return self.causal(x + (T - at)[:, None] * 0.1)


class DropsAlways(Small):
    def block(self, x):
        return self.causal(F.dropout(x, 0.5))


class AttentionDropsAlways(Small):
    def block(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.5)


class Branches(Small):
    def block(self, x):
        return self.causal(x) if x.sum() > 0 else self.causal(-x)


class NoAttention(Small):
    def block(self, x):
        return self.mix(x).relu()


class NoLogits(Small):
    def forward(self, ids):
        return ids + 1


class MixesRows(Small):
    def block(self, x):
        return self.causal(x) + x.mean(0, keepdim=True)


REFUSED = [
    (SeesAll, "scaled_dot_product_attention", "not causal"),
    (WrongTriangle, "softmax", "position 0 attends to position 1"),
    (OneAhead, "softmax", "position 0 attends to position 1"),
    (Averages, "mean", "mixes positions"),
    (Flips, "flip", "moves positions"),
    (ShiftsLeft, "slice", "positions that come 1 later"),
    (ShiftsLeftByCat, "slice", "positions that come 1 later"),
    (AttendsToShifted, "scaled_dot_product_attention", "positions to which some were added"),
    (MeetsAnotherShift, "add", "others that were cut off elsewhere"),
    (Convolves, "conv1d", "reads 1 positions ahead"),
    (BothDirections, "_symbolic_multi_out", "reads the sequence from its end"),
    (HiddenFromIds, "_symbolic_multi_out", "first hidden values depend on the ids"),
    (Strides, "conv1d", "stride of 2"),
    (Chunks, "pad", "cuts the sequence in chunks"),
    (NormalisesOverTime, "softmax", "mixes positions"),
    (DependsOnLength, "div", "length of the whole sequence"),
    (BiasFromTheEnd, "mul", "depends on the length of the whole sequence"),
    (DropsAlways, "dropout", "in evaluation too"),
    (AttentionDropsAlways, "scaled_dot_product_attention", "in evaluation too"),
    (MixesRows, "mean", "rows of a batch"),
]


@pytest.mark.parametrize(("module", "operation", "why"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_a_refusal_names_operation_reason_and_source_line(module, operation, why):
    with pytest.raises(CaptureError) as caught:
        capture(module())
    message = str(caught.value)
    assert operation in message
    assert why in message
    assert "test_refusals.py" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("module", "why"),
    [(Branches, "torch.export cannot capture"), (NoAttention, "nothing to cache"), (NoLogits, "expected logits")],
)
def test_a_module_that_is_no_decoder_says_what_was_expected(module, why):
    with pytest.raises(CaptureError, match=why):
        capture(module())


def test_a_longer_length_than_the_module_allows_says_what_it_allows():
    with pytest.raises(CaptureError, match="at most 96 tokens, 97 were asked for"):
        capture(handwritten.Learned(), max_length=97)
    with pytest.raises(CaptureError, match="at most 96"):
        capture(handwritten.Tril(), max_length=5000)


def test_a_mask_that_needs_too_large_a_table_says_what_would_help(monkeypatch):
    monkeypatch.setattr("tfinfer.export.capture.tables.SQUARE_BYTES", 1000)
    with pytest.raises(CaptureError, match="smaller --max-length"):
        capture(handwritten.Chunked())


def test_nothing_is_written_by_a_refusal_and_the_next_export_works(tmp_path):
    with pytest.raises(CaptureError):
        export_model(SeesAll(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_model(handwritten.Learned(), tmp_path / "out")
    assert (tmp_path / "out" / "tfinfer.json").is_file()
