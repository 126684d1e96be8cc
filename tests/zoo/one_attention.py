"""A module of one hand-written attention, and what every test of such a module asks of its export."""

import torch
from torch import nn

import tfinfer
from tfinfer.export import export_model

DIM, HEADS, VOCAB = 32, 2, 23
INF = float("inf")


def future(t):
    return torch.ones(t, t, dtype=torch.bool).triu(1)


class Attention(nn.Module):
    """One attention over an embedding; `weigh(module, q, k, length)` gives the weights."""

    def __init__(self, weigh, dim=DIM, heads=HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.sinks = nn.Parameter(torch.linspace(-1, 2, heads))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1))
        self.weigh, self.heads = weigh, heads
        with torch.no_grad():
            for matrix in (self.q.weight, self.k.weight):
                matrix.mul_(4)

    def forward(self, ids):
        x = self.tokens(ids)
        b, t, width = x.shape
        q, k, v = (side(x).view(b, t, self.heads, -1).transpose(1, 2) for side in (self.q, self.k, self.v))
        y = self.weigh(self, q, k, t) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, width)))


def export_and_generate(module, folder, flavor="ort", max_length=80, count=40, vocabulary=VOCAB):
    """Export, which proves the graph, and compare greedy tokens with the module's own; the report."""
    module.eval()
    report = export_model(module, folder / "out", max_length=max_length, flavor=flavor)
    assert all(verdict.passed for verdict in report.verdicts)
    ids = torch.randint(0, vocabulary, (1, 7), generator=torch.Generator().manual_seed(1))[0].tolist()
    with tfinfer.load(report.folder, threads=1) as model:
        found = list(model.generate(ids, max_tokens=count, stop_ids=[]).token_ids)
    wanted = list(ids)
    with torch.no_grad():
        for _ in range(count):
            wanted.append(int(module(torch.tensor([wanted]))[0, -1].argmax()))
    assert found == wanted[len(ids) :]
    return report
