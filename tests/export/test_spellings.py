"""What people write around a decoder that no tracing sees through, and masks that are made of the ids."""

import builtins
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tfinfer
from tfinfer.export import export_model
from tfinfer.export.capture.spellings import traceable


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor


@dataclasses.dataclass
class Wrapped:
    scores: Scores
    loss: torch.Tensor | None = None


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(31, 16), nn.Embedding(40, 16), nn.Linear(16, 31)

    def attend(self, x):
        return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def forward(self, ids):
        return self.head(self.attend(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))))


class Length(Small):
    """Positions first, and `len` of them."""

    def forward(self, ids):
        turned = ids.t()
        x = self.tokens(turned) + self.places(torch.arange(len(turned)))[:, None]
        return self.head(self.attend(x.transpose(0, 1)))


class InDataclass(Small):
    def forward(self, ids):
        return Scores(super().forward(ids))


class KeyBias(Small):
    """A bias for each key computed from the token that stands there, as a data-dependent decay has it."""

    def attend(self, x):
        T = x.shape[1]
        scores = x @ x.mT + x.sum(-1)[:, None, :]
        return x + scores.masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf).softmax(-1) @ x


class Padding(Small):
    """Token 0 is hidden from everybody but itself."""

    def forward(self, ids):
        T = ids.shape[1]
        visible = (ids != 0)[:, None, :] & torch.ones(T, T, dtype=torch.bool).tril() | torch.eye(T, dtype=torch.bool)
        x = self.tokens(ids) + self.places(torch.arange(T))
        weights = (x @ x.mT / 4).masked_fill(~visible, -1e9).softmax(-1)
        return self.head(x + weights @ x)


class RowsBehind(Small):
    """A gate of the queries' tokens spread over a table of all pairs."""

    def attend(self, x):
        T = x.shape[1]
        gate = torch.sigmoid(x.sum(-1))[:, :, None] * torch.ones(T, T).tril()
        return x + (x @ x.mT * gate / (1 + torch.arange(T))[:, None]) @ x


@pytest.mark.parametrize("module", [Length, InDataclass, KeyBias, Padding, RowsBehind])
def test_a_spelling_is_exported_and_gives_pytorchs_tokens(module, tmp_path):
    decoder = module().eval()
    report = export_model(decoder, tmp_path / "out", max_length=40, kind="decoder", attention=False)
    assert report.verdicts[0].greedy.identical == report.verdicts[0].greedy.compared
    prompts = [[0, 3, 0], [5], [1, 2, 0, 4, 0, 0, 7]]
    with tfinfer.load(tmp_path / "out") as model:
        together = [c.token_ids for c in model.generate(prompts, max_tokens=8)]
    for prompt, tokens in zip(prompts, together):
        ids = list(prompt)
        for token in tokens:
            with torch.no_grad():
                out = decoder(torch.tensor([ids]))
            assert int((out.logits if isinstance(out, Scores) else out)[0, -1].argmax()) == token
            ids.append(token)


def test_len_and_the_module_are_as_they_were_when_tracing_is_over():
    module, length = InDataclass(), builtins.len
    with traceable(module):
        assert len(torch.zeros(3, 2)) == 3
        assert len([1, 2]) == 2
        assert set(module(torch.zeros(1, 2, dtype=torch.int64))) == {"logits"}
        with pytest.raises(TypeError, match="has no len"):
            len(5)
    assert builtins.len is length
    assert isinstance(module(torch.zeros(1, 2, dtype=torch.int64)), Scores)


def test_a_dataclass_in_a_dataclass_is_a_dict_in_a_dict():
    class Nested(Small):
        def forward(self, ids):
            return [Wrapped(Scores(super().forward(ids)))]

    module = Nested()
    with traceable(module):
        (result,) = module(torch.zeros(1, 2, dtype=torch.int64))
    assert result["loss"] is None
    assert np.shape(result["scores"]["logits"].detach()) == (1, 2, 31)
