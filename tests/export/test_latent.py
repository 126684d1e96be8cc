"""Latent attention: the few numbers per token that keys and values are made of are cached instead of them."""

import pytest
import torch
from one_attention import INF, VOCAB, export_and_generate, future
from torch import nn

DIM, HEADS, RANK, NOPE, ROPE, VALUE = 64, 4, 16, 16, 8, 16


def rotated(x):
    """x: (..., length, ROPE), turned by halves."""
    at = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    cos, sin = at.cos().repeat(1, 2), at.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., ROPE // 2 :], x[..., : ROPE // 2]], -1) * sin


class Latent(nn.Module):
    """As DeepSeek-V2 has it: a normed latent and a rotary key that all heads share."""

    def __init__(self, rope=True, norm=True, bias=False, value=VALUE, sdpa=False, heads=HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.rope, self.value, self.sdpa, self.heads = ROPE if rope else 0, value, sdpa, heads
        self.q = nn.Linear(DIM, heads * (NOPE + self.rope))
        self.down = nn.Linear(DIM, RANK + self.rope, bias=False)
        self.norm = nn.RMSNorm(RANK) if norm else nn.Identity()
        self.up = nn.Linear(RANK, heads * (NOPE + value), bias=bias)
        self.out = nn.Linear(heads * value, DIM)

    def forward(self, ids):
        x = self.tokens(ids)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        latent, turned = self.down(x).split([RANK, self.rope], -1)
        k, v = self.up(self.norm(latent)).view(b, t, self.heads, -1).transpose(1, 2).split([NOPE, self.value], -1)
        if self.rope:
            q = torch.cat([q[..., :NOPE], rotated(q[..., NOPE:])], -1)
            k = torch.cat([k, rotated(turned[:, None]).expand(-1, self.heads, -1, -1)], -1)
        if self.sdpa:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = self.weights(q @ k.transpose(-1, -2) / 3, t) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))

    def weights(self, scores, t):
        return scores.masked_fill(future(t), -INF).softmax(-1)


OPTIONS = [
    {},
    {"sdpa": True},
    {"rope": False},
    {"norm": False},
    {"bias": True},
    {"value": 24},
    {"value": 9, "sdpa": True},
]


def width(module):
    return RANK + module.rope


@pytest.mark.parametrize("flavor, operator", [("ort", "GroupQueryAttention"), ("standard", "Attention")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_latent_alone_is_cached(options, flavor, operator, tmp_path):
    module = Latent(**options)
    report = export_and_generate(module, tmp_path, flavor=flavor)
    (entry,) = report.manifest.cache
    assert (entry.num_kv_heads, entry.head_dim) == (1, width(module))
    (attention,) = report.manifest.attention
    assert (attention.operator, attention.pattern) == (operator, f"causal, of a latent of {width(module)}")


def test_a_latent_of_an_odd_size_is_filled_up(tmp_path):
    class Odd(Latent):
        def __init__(self):
            super().__init__(rope=False)
            self.down, self.norm = nn.Linear(DIM, 13), nn.RMSNorm(13)
            self.up = nn.Linear(13, HEADS * (NOPE + VALUE))

        def forward(self, ids):
            x = self.tokens(ids)
            b, t, _ = x.shape
            q = self.q(x).view(b, t, HEADS, -1).transpose(1, 2)
            k, v = self.up(self.norm(self.down(x))).view(b, t, HEADS, -1).transpose(1, 2).chunk(2, -1)
            y = self.weights(q @ k.mT / 3, t) @ v
            return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))

    report = export_and_generate(Odd(), tmp_path)
    assert [(e.num_kv_heads, e.head_dim) for e in report.manifest.cache] == [(1, 16)]


class Capped(Latent):
    def weights(self, scores, t):
        return (3 * torch.tanh(scores / 3)).masked_fill(future(t), -INF).softmax(-1)


class Sunk(Latent):
    def weights(self, scores, t):
        column = torch.ones(scores.shape[0], HEADS, t, 1)
        return torch.cat([scores.masked_fill(future(t), -INF), column], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("kind", [Capped, Sunk])
@pytest.mark.parametrize("bias, entries", [(False, 1), (True, 2)])
def test_a_shift_that_a_cap_or_a_sink_would_show_is_not_left_out(kind, bias, entries, tmp_path):
    report = export_and_generate(kind(bias=bias, value=NOPE + ROPE), tmp_path)
    assert len(report.manifest.cache) == entries


@pytest.mark.parametrize("rank, dim, heads", [(64, 64, 4), (32, 64, 2)], ids=["as wide", "not much smaller"])
def test_usual_keys_and_values_are_cached_themselves(rank, dim, heads, tmp_path):
    """Keys and values of any attention are linear in its input: caching that would cost more than it spares."""

    class Usual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.head = nn.Embedding(VOCAB, rank), nn.Linear(dim, VOCAB)
            self.sides = nn.ModuleList(nn.Linear(rank, dim // 2) for _ in range(3))
            self.out = nn.Linear(dim // 2, dim)

        def forward(self, ids):
            x = self.tokens(ids)
            q, k, v = (side(x).unflatten(-1, (heads, -1)).transpose(1, 2) for side in self.sides)
            y = (q @ k.mT).masked_fill(future(ids.shape[1]), -INF).softmax(-1) @ v
            return self.head(self.out(y.transpose(1, 2).flatten(2)))

    report = export_and_generate(Usual(), tmp_path)
    assert len(report.manifest.cache) == 2
    assert [a.pattern for a in report.manifest.attention] == ["causal"]


def test_keys_normed_behind_the_latent_are_cached_themselves(tmp_path):
    class Normed(Latent):
        def forward(self, ids):
            x = self.tokens(ids)
            b, t, _ = x.shape
            q = self.q(x).view(b, t, HEADS, -1).transpose(1, 2)[..., :NOPE]
            k, v = self.up(self.down(x)[..., :RANK]).view(b, t, HEADS, -1).transpose(1, 2).chunk(2, -1)
            y = self.weights(q @ nn.functional.normalize(k, dim=-1).mT, t) @ v
            return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))

    report = export_and_generate(Normed(), tmp_path)
    assert len(report.manifest.cache) == 2


class Filled(Latent):
    """Keys are written into an empty tensor piece by piece, as transformers does."""

    def forward(self, ids):
        x = self.tokens(ids)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, -1).transpose(1, 2)
        q = torch.cat([q[..., :NOPE], rotated(q[..., NOPE:])], -1)
        latent, turned = self.down(x).split([RANK, self.rope], -1)
        own, v = self.up(self.norm(latent)).view(b, t, HEADS, -1).transpose(1, 2).split([NOPE, self.value], -1)
        k = x.new_empty(b, HEADS, t, NOPE + self.rope)
        k[..., :NOPE] = own
        k[..., NOPE:] = rotated(turned[:, None])
        return self.head(x + self.out((self.weights(q @ k.mT / 3, t) @ v).transpose(1, 2).reshape(b, t, -1)))


def test_keys_filled_piece_by_piece_are_latent_too(tmp_path):
    report = export_and_generate(Filled(), tmp_path)
    assert [(e.num_kv_heads, e.head_dim) for e in report.manifest.cache] == [(1, RANK + ROPE)]


def test_what_is_filled_in_part_keeps_the_rest(tmp_path):
    class Partly(Latent):
        def forward(self, ids):
            x = self.tokens(ids)
            y = torch.zeros_like(x)
            y[..., 8:24] = x[..., 8:24]
            z = x * 2
            z[..., :8] = y[..., 20:28]
            z[..., 60:] = y[..., :4] + 1
            q = self.q(y + z).view(*ids.shape, HEADS, -1).transpose(1, 2)
            y = self.weights(q @ q.mT / 3, ids.shape[1]) @ q
            return self.head(z + y.transpose(1, 2).flatten(2)[..., :DIM])

    export_and_generate(Partly(), tmp_path)
