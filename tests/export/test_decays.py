"""Linear recurrences in their parallel and chunked forms: sums with decaying weights become states of fixed size."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.capture.chunks import chunks_of_one

WIDTH, HEADS, DIM, WORDS = 32, 2, 8, 43


class Mixer(nn.Module):
    """Gates, keys, values and queries of a linear recurrence; `mixed` says how it is written."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM, bias=False) for _ in range(3))
        self.gate, self.out, self.head = nn.Linear(WIDTH, HEADS), nn.Linear(HEADS * DIM, WIDTH), nn.Linear(WIDTH, WORDS)
        for layer in (self.q, self.k, self.v, self.out):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, ids):
        x = self.words(ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, DIM)) for p in (self.q, self.k, self.v))  # (b, t, h, d)
        return self.head(x + self.out(self.mixed(q, k, v, F.logsigmoid(self.gate(h))).flatten(2)))


def segment_sum(x):
    """(..., t) -> (..., t, t): sums between two positions, -inf where the second comes later."""
    t = x.shape[-1]
    square = x[..., None].expand(*x.shape, t)
    square = square.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(-1), 0).cumsum(-2)
    return square.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)


class BySegments(Mixer):
    def mixed(self, q, k, v, log_gate):
        decay = segment_sum(log_gate.transpose(1, 2)).exp()  # (b, h, t, t)
        states = torch.einsum("bhts,bshde->bthde", decay, torch.einsum("bshd,bshe->bshde", k, v))
        return torch.einsum("bthd,bthde->bthe", q, states)


class ByDifferences(Mixer):
    def mixed(self, q, k, v, log_gate):
        total = log_gate.transpose(1, 2).cumsum(-1)
        hidden = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool).triu(1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -torch.inf).exp()
        outer = (k[..., None] * v[..., None, :]).permute(0, 2, 1, 3, 4)  # (b, h, t, d, e)
        states = (decay @ outer.flatten(3)).unflatten(-1, (DIM, DIM))
        return torch.einsum("bthd,bhtde->bthe", q, states)


class Chunked(Mixer):
    """As state-space models are published: within chunks by a square, between chunks by another one."""

    def __init__(self, chunk_size=8):
        super().__init__()
        self.chunk_size = chunk_size

    def mixed(self, q, k, v, log_gate):
        length = q.shape[1]
        pad = (self.chunk_size - length % self.chunk_size) % self.chunk_size
        q, k, v = (F.pad(p, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, self.chunk_size)) for p in (q, k, v))
        a = F.pad(log_gate, (0, 0, 0, pad)).unflatten(1, (-1, self.chunk_size)).permute(0, 3, 1, 2)  # (b, h, c, l)
        total = a.cumsum(-1)
        inner = torch.einsum("bclhd,bcshd->bchls", q, k) * segment_sum(a).exp().transpose(1, 2)
        near = torch.einsum("bchls,bcshe->bclhe", inner, v)
        left = (total[..., -1:] - total).exp().permute(0, 2, 3, 1)[..., None]  # (b, c, l, h, 1)
        states = torch.einsum("bclhd,bclhe->bchde", k * left, v)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        decay = segment_sum(F.pad(total[..., -1], (1, 0))).exp()
        before = torch.einsum("bhzc,bchde->bzhde", decay, states)[:, :-1]
        far = torch.einsum("bclhd,bchde->bclhe", q, before) * total.exp().permute(0, 2, 3, 1)[..., None]
        return (near + far).flatten(1, 2)[:, :length]


def greedy(module, ids, count):
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, module(ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("build", [BySegments, ByDifferences, Chunked, lambda: Chunked(64)])
def test_a_sum_with_decaying_weights_becomes_a_state(build, tmp_path):
    module = build().eval()
    report = export_model(module, tmp_path / "out", max_length=90)
    assert [math.prod(state.shape) for state in report.manifest.states] == [HEADS * DIM * DIM]
    assert not report.manifest.cache
    ids = torch.tensor([[3, 14, 15, 9, 2, 6]])
    with tfinfer.load(tmp_path / "out") as model:
        got = list(model.generate(ids[0].tolist(), max_tokens=64, stop_ids=[]).token_ids)
    assert got == greedy(module, ids, 64)[0, 6:].tolist()


def test_all_forms_compute_the_same():
    """So that none of them is followed for being empty."""
    ids = torch.randint(0, WORDS, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, *others = (build().eval()(ids) for build in (BySegments, ByDifferences, Chunked))
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)


def test_a_size_of_chunks_is_one_within_and_itself_again_behind():
    module = Chunked(8).eval()
    with chunks_of_one(module):
        assert module.chunk_size == 1
    assert module.chunk_size == 8


class AttendsInChunks(Mixer):
    """Its `chunk_size` is no way of computing: tokens see their own chunk alone."""

    chunk = 4

    def __init__(self):
        super().__init__()
        self.chunk_size = self.chunk

    def mixed(self, q, k, v, log_gate):
        at = torch.arange(q.shape[1])
        seen = (at[:, None] >= at) & (at[:, None] // self.chunk_size == at // self.chunk_size)
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def test_a_size_that_changes_the_numbers_is_left_as_it_is(tmp_path):
    module = AttendsInChunks().eval()
    with chunks_of_one(module):
        assert module.chunk_size == 4
    export_model(module, tmp_path / "out", max_length=50)


class Forgetful(Mixer):
    """A square that is no product of gates: the decay depends on the later position alone."""

    def mixed(self, q, k, v, log_gate):
        t = q.shape[1]
        gates = log_gate.transpose(1, 2)[..., None].expand(-1, -1, -1, t).exp() * torch.ones(t, t).tril()
        outer = torch.einsum("bshd,bshe->bshde", k, v)
        return torch.einsum("bthd,bthde->bthe", q, torch.einsum("bhts,bshde->bthde", gates, outer))


def test_a_square_that_is_no_decay_is_not_taken_for_one(tmp_path):
    from tfinfer.export.capture.capture import trace_decoder
    from tfinfer.export.capture.decays import find_decays
    from tfinfer.export.capture.positional import Positional

    for build, count in ((Forgetful, 0), (BySegments, 1)):
        captured = trace_decoder(build().eval())
        assert len(find_decays(captured, Positional(captured, captured.seq), captured.target)) == count
