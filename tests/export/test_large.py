"""A module of more than 2 GiB, which no protobuf holds: 2.2 GB of weights, nearly all of them zeros. make test-slow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tfinfer
from tfinfer.export import export_model
from tfinfer.proof.prove import verify_folder

pytestmark = pytest.mark.slow
WIDTH, WORDS, INNER, LAYERS = 1024, 300_000, 30_000, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (8, -1)).transpose(1, 2) for p in self.qkv(F.layer_norm(x, (WIDTH,))).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, _weight=torch.zeros(WORDS, WIDTH))
        with torch.device("meta"):
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.layers.to_empty(device="cpu")
        self.head = nn.Linear(WIDTH, 211)
        for parameter in self.layers.parameters():
            parameter.data = torch.zeros_like(parameter)
        self.scatter(torch.Generator().manual_seed(0))

    def scatter(self, generator):
        """Some random numbers in every weight: in rows and columns that meet each other."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "head" not in name:
                some = [torch.randint(0, n, (min(n, 256),), generator=generator) for n in parameter.shape]
                values = torch.randn(len(some[0]), len(some[1]), generator=generator)
                parameter.data[some[0][:, None], some[1]] = values * 0.2
        self.tokens.weight.data[:512] = torch.randn(512, WIDTH, generator=generator)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.layer_norm(x, (WIDTH,)))


def test_a_module_above_two_gigabytes_exports_verifies_and_generates_what_pytorch_does(tmp_path):
    module = Large().eval().requires_grad_(False)
    assert sum(p.nbytes for p in module.parameters()) > 2.2e9
    export_model(module, tmp_path / "out", max_length=100)
    ids = torch.randint(0, 512, (1, 9), generator=torch.Generator().manual_seed(1))
    wanted = ids
    for _ in range(16):
        wanted = torch.cat([wanted, module(wanted)[:, -1:].argmax(-1)], 1)
    with tfinfer.load(tmp_path / "out") as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed
        assert list(model.generate(ids[0].tolist(), max_tokens=16, stop_ids=[]).token_ids) == wanted[0, 9:].tolist()
