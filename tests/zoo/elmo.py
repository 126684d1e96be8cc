"""ELMo (Peters et al., 2018, https://arxiv.org/abs/1802.05365): from characters to mixed layers."""

import torch
import torch.nn.functional as F
from torch import nn

CHARS = 16  # characters of a word, padded with 0


class CharacterEncoder(nn.Module):
    """Words from their characters: convolutions of several widths, each at its maximum, highways, a projection."""

    def __init__(self, characters=262, embed=16, filters=((1, 32), (2, 32), (3, 64)), highways=2, width=64):
        super().__init__()
        self.embed = nn.Embedding(characters, embed, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(embed, count, kernel) for kernel, count in filters)
        total = sum(count for _, count in filters)
        self.highways = nn.ModuleList(nn.Linear(total, 2 * total) for _ in range(highways))
        self.project = nn.Linear(total, width)

    def forward(self, characters):
        B, W, C = characters.shape
        x = self.embed(characters.view(B * W, C)).transpose(1, 2)  # (B * W, embed, C)
        x = torch.cat([F.relu(convolution(x).max(dim=-1).values) for convolution in self.convolutions], dim=-1)
        for highway in self.highways:
            new, gate = highway(x).chunk(2, dim=-1)
            gate = torch.sigmoid(gate)
            x = gate * x + (1 - gate) * F.relu(new)
        return self.project(x).view(B, W, -1)


class Direction(nn.Module):
    """The language model of one direction: LSTMs with projections, a residual between them; every layer is returned."""

    def __init__(self, width, hidden, layers, backward):
        super().__init__()
        self.backward = backward
        self.lstms = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(hidden, width) for _ in range(layers))

    def forward(self, x):
        x = x.flip(1) if self.backward else x
        layers = []
        for number, (lstm, project) in enumerate(zip(self.lstms, self.projections)):
            y = project(lstm(x)[0])
            x = x + y if number else y
            layers.append(x.flip(1) if self.backward else x)
        return layers


class ScalarMix(nn.Module):
    """A weighted sum of layers, times gamma; the weights are a softmax."""

    def __init__(self, layers):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers):
        return self.gamma * torch.tensordot(self.weights.softmax(0), layers, dims=1)


class Elmo(nn.Module):
    """Characters (B, W, 16) -> embeddings (B, W, 2 * width), and the layers mixed in them (1 + layers, B, W, ...)."""

    def __init__(self, width=64, hidden=96, layers=2):
        super().__init__()
        self.words = CharacterEncoder(width=width)
        self.forwards = Direction(width, hidden, layers, backward=False)
        self.backwards = Direction(width, hidden, layers, backward=True)
        self.mix = ScalarMix(1 + layers)

    def forward(self, characters):
        words = self.words(characters)  # (B, W, width)
        both = [torch.cat(pair, dim=-1) for pair in zip(self.forwards(words), self.backwards(words))]
        layers = torch.stack([torch.cat([words, words], dim=-1), *both])
        return {"embeddings": self.mix(layers), "layers": layers}
