"""All that keeps a module from being followed is told at once, once each, and nothing that is only a consequence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.capture import Argument, capture, capture_encoder, capture_encoder_decoder

VOCAB, WIDTH = 31, 16


class Layer(nn.Module):
    """Causal attention; `wrong` says what else it does."""

    def __init__(self, *wrong):
        super().__init__()
        self.wrong = wrong
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        if "flip" in self.wrong:
            x = x + x.flip(1)
        if "mean" in self.wrong:
            x = x - x.mean(1, keepdim=True)
        if "open" in self.wrong:
            x = x + (x @ x.transpose(1, 2)).softmax(-1) @ x
        if "median" in self.wrong:
            x = x + x.median(-1, keepdim=True).values
        return x


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def told(module, call=capture):
    with pytest.raises(CaptureError) as caught:
        call(module)
    return str(caught.value)


def test_two_mistakes_are_told_together_each_with_its_line():
    message = told(Stack(Layer("flip"), Layer("mean")))
    first, second = message.splitlines()
    assert "flip" in first
    assert "layers.0" in first
    assert "1 more" in first
    assert "mean" in second
    assert "layers.1" in second
    assert "x.mean(1, keepdim=True)" in second
    assert "masked matmul" in second


def test_the_same_mistake_in_every_layer_is_said_once_with_a_count():
    message = told(Stack(*(Layer("flip") for _ in range(12))))
    assert len(message.splitlines()) == 1
    assert "in layers.0 and 11 more like it" in message


def test_two_mistakes_in_every_layer_are_two_lines():
    message = told(Stack(*(Layer("flip", "mean") for _ in range(5))))
    assert len(message.splitlines()) == 2
    assert message.count("in layers.0 and 4 more like it") == 2


def test_attention_that_is_not_causal_hides_nothing_behind_it():
    message = told(Stack(Layer("open"), Layer("open"), Layer("mean")))
    first, second = message.splitlines()
    assert "position 0 attends to position 1" in first
    assert "in layers.0 and 1 more like it" in first
    assert "mean" in second


def test_an_operation_without_a_rule_hides_nothing_behind_it():
    first, second = told(Stack(Layer("median"), Layer("mean"))).splitlines()
    assert "median" in first
    assert "mean" in second


class Halves(nn.Module):
    """One mistake, whose result is read in many ways."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layer = Layer()

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.layer(x + x.flip(1))
        a, b = x.view(*x.shape[:2], 2, -1).transpose(1, 2).unbind(1)
        x = torch.cat([a * b.sigmoid(), x.cumsum(-1)[..., :8]], -1)
        y = x.reshape(-1, WIDTH).reshape(x.shape)
        return self.head(F.layer_norm(self.layer(y), (WIDTH,)))


def test_what_reads_a_refused_value_is_not_refused_for_it():
    message = told(Halves())
    assert "flip" in message.splitlines()[0]
    assert len(message.splitlines()) == 1


class Unneeded(nn.Module):
    """Keeps a mistake for itself."""

    def __init__(self):
        super().__init__()
        self.inner = Stack(Layer())

    def forward(self, ids):
        logits = self.inner(ids)
        return {"logits": logits, "average": self.inner.tokens(ids).mean(1)}


def test_what_the_logits_do_not_need_is_not_refused():
    capture(Unneeded())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head, self.layer = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), Layer("flip")

    def forward(self, source, ids):
        memory = self.tokens(source)
        memory = memory + memory.median(-1, keepdim=True).values
        x = self.layer(self.tokens(ids))
        return self.head(x + F.scaled_dot_product_attention(x[:, None], memory[:, None], memory[:, None])[:, 0])


def test_both_sides_of_an_encoder_decoder_are_told_together():
    arguments = [Argument("source", source=True), Argument("ids")]
    message = told(Pair(), lambda module: capture_encoder_decoder(module, arguments))
    assert "median" in message.splitlines()[0]
    assert "flip" in message.splitlines()[1]


class Moves(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids):
        x = self.tokens(ids)
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return x + x.flip(1) + F.pad(x, (0, 0, 1, 0))[:, :-1]


def test_an_encoder_that_is_refused_is_translated_all_the_same(tmp_path):
    message = told(Moves(), lambda module: capture_encoder(module, [Argument("ids", source=True)]))
    assert len(message.splitlines()) == 2
    report = export_model(Moves(), tmp_path / "out", kind="encoder", max_length=32)
    assert all("\n" not in note for note in report.notes)
