"""Attentions that share keys or values share what the cache holds of them."""

import pytest
import torch
from one_attention import DIM, HEADS, INF, VOCAB, export_and_generate, future
from torch import nn


class Layers(nn.Module):
    """Attentions over keys and values that `sides(module, x)` makes: a list of (layer, k, v) in their order."""

    def __init__(self, attentions, windows=()):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3)) for _ in range(3))
        self.attentions, self.windows = attentions, windows

    def split(self, x):
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def forward(self, ids):
        x, made = self.tokens(ids), {}
        t = ids.shape[1]
        at = torch.arange(t)
        for layer, (key, value) in enumerate(self.attentions):
            for name, side in ((key, self.k), (value, self.v)):
                if name not in made:
                    made[name] = self.split(side[layer](x))
            hidden = future(t)
            if self.windows and self.windows[layer]:
                hidden = hidden | (at[:, None] - at >= self.windows[layer])
            scores = (self.split(self.q[layer](x)) @ made[key].mT).masked_fill(hidden, -INF)
            x = x + (scores.softmax(-1) @ made[value]).transpose(1, 2).reshape(x.shape)
        return self.head(x)


SHARED = {
    "a layer attends to the first one's keys and values": ([("k0", "v0"), ("k0", "v0")], 2),
    "three layers, the last shares with the first": ([("k0", "v0"), ("k1", "v1"), ("k0", "v0")], 4),
    "keys alone are shared": ([("k0", "v0"), ("k0", "v1")], 3),
    "values alone are shared": ([("k0", "v0"), ("k1", "v0")], 3),
    "one tensor is key and value": ([("both", "both")], 1),
    "one tensor is key and value of two layers": ([("both", "both"), ("both", "both")], 1),
    "a value becomes a key": ([("k0", "v0"), ("v0", "k0")], 2),
}


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize("attentions, entries", SHARED.values(), ids=SHARED)
def test_what_is_shared_is_held_once(attentions, entries, flavor, tmp_path):
    report = export_and_generate(Layers(attentions), tmp_path, flavor=flavor)
    assert len(report.manifest.cache) == entries
    operator = {"ort": "GroupQueryAttention", "standard": "Attention"}[flavor]
    assert [(a.operator, a.count) for a in report.manifest.attention] == [(operator, len(attentions))]
    # GroupQueryAttention that only reads its cache ends older runtimes: the manifest keeps them away.
    assert report.manifest.requires["onnxruntime"] == {"ort": "1.31", "standard": "1.28"}[flavor]


@pytest.mark.parametrize("windows, held", [((5, 9), 9), ((9, 5), 9), ((5, None), None), ((None, 5), None)], ids=str)
def test_a_shared_entry_holds_the_wider_window(windows, held, tmp_path):
    report = export_and_generate(Layers([("k0", "v0"), ("k0", "v0")], windows), tmp_path)
    assert [entry.window for entry in report.manifest.cache] == [held, held]
    assert report.manifest.keeps_window == held


def test_plain_operators_share_what_an_operator_holds(tmp_path):
    """The second attention bends its scores, which no operator does."""

    class Bent(Layers):
        def forward(self, ids):
            x, t = self.tokens(ids), ids.shape[1]
            k, v = self.split(self.k[0](x)), self.split(self.v[0](x))
            first = (self.split(self.q[0](x)) @ k.mT).masked_fill(future(t), -INF).softmax(-1) @ v
            second = (self.split(self.q[1](x)) @ k.mT).abs().masked_fill(future(t), -INF).softmax(-1) @ v
            return self.head(x + (first - second).transpose(1, 2).reshape(x.shape))

    report = export_and_generate(Bent([]), tmp_path)
    assert len(report.manifest.cache) == 2
    assert sorted(a.operator for a in report.manifest.attention) == [
        "GroupQueryAttention",
        "the module's own operators",
    ]


def test_values_of_fewer_heads_than_keys_are_repeated_to_as_many(tmp_path):
    """They made a graph whose entry of values had another size than its operator gave."""

    class Differential(Layers):
        def forward(self, ids):
            x, t = self.tokens(ids), ids.shape[1]
            q, k, v = (self.split(sides[0](x)) for sides in (self.q, self.k, self.v))
            weights = (q @ k.mT).masked_fill(future(t), -INF).softmax(-1)
            first, second = (side.repeat(1, HEADS, 1, 1) for side in v.chunk(HEADS, dim=1))
            y = weights @ first - 0.5 * (weights.clone() @ second)
            return self.head(x + y.transpose(1, 2).reshape(x.shape))

    class Grouped(Layers):
        def forward(self, ids):
            x = self.tokens(ids)
            q, k, v = (self.split(sides[0](x)) for sides in (self.q, self.k, self.v))
            attend = nn.functional.scaled_dot_product_attention
            y = attend(q, k, v[:, :1].repeat(1, HEADS, 1, 1), is_causal=True)
            return self.head(x + y.transpose(1, 2).reshape(x.shape))

    for module, folder in ((Differential([]), "differential"), (Grouped([]), "grouped")):
        report = export_and_generate(module, tmp_path / folder)
        assert {a.operator for a in report.manifest.attention} <= {"GroupQueryAttention", "the module's own operators"}
