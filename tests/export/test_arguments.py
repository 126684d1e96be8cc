"""Decoders that are handed positions or masks, or return more than logits: each exported as a user would call it."""

import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tfinfer
from tfinfer.errors import CaptureError
from tfinfer.export import export_model
from tfinfer.export.kinds.given import as_decoder

VOCAB, WIDTH, HEADS = 29, 24, 3


class Base(nn.Module):
    """Embeddings, one attention with two heads, a head; `attend` gets a mask as its kind takes it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)

    def split(self, x):
        return (p.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))

    def finish(self, x, y):
        return self.head(x + y.transpose(1, 2).flatten(2))

    def sdpa(self, x, mask=None):
        return self.finish(x, F.scaled_dot_product_attention(*self.split(x), attn_mask=mask, is_causal=mask is None))

    def scored(self, x, change):
        q, k, v = self.split(x)
        return self.finish(x, change(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v)

    def embed(self, ids, positions=None):
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1]) if positions is None else positions)


class Positions(Base):
    def forward(self, ids, positions):
        assert positions.shape == ids.shape
        return self.sdpa(self.embed(ids, positions))


class FlatPositions(Base):
    def forward(self, ids, cache_position):
        (length,) = cache_position.shape
        assert length == ids.shape[1]
        return self.sdpa(self.embed(ids, cache_position))


class PositionsOfAnyName(Base):
    def forward(self, x, p):
        return self.sdpa(self.embed(x, p))


class PositionsFirst(Base):
    def forward(self, pos, ids):
        return self.sdpa(self.embed(ids, pos))


class MayLook(Base):
    def forward(self, ids, mask):
        return self.sdpa(self.embed(ids), mask)


class OnlyMask(Base):
    """Without a mask it is not causal, and does not run."""

    def forward(self, ids, mask):
        return self.scored(self.embed(ids), lambda s: s.masked_fill(mask == 0, float("-inf")))


class MayNotLook(Base):
    def forward(self, src, src_mask):
        return self.scored(self.embed(src), lambda s: s.masked_fill(src_mask, -1e9))


class Added(Base):
    def forward(self, ids, attn_mask):
        return self.scored(self.embed(ids), lambda s: s + attn_mask)


class OneMinus(Base):
    def forward(self, ids, mask):
        return self.scored(self.embed(ids), lambda s: s + (1.0 - mask) * -1e4)


class ByRow(Base):
    def forward(self, ids, mask):
        batch, one, length, _ = mask.shape
        assert (batch, one, length) == (ids.shape[0], 1, ids.shape[1])
        return self.scored(self.embed(ids), lambda s: s.masked_fill(~mask, float("-inf")))


class Padding(Base):
    """Causal by itself, and takes what is padding."""

    def forward(self, input_ids, attention_mask, position_ids):
        T = input_ids.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        return self.sdpa(self.embed(input_ids, position_ids), seen)


class TorchPadding(Base):
    def forward(self, ids, key_padding_mask):
        T = ids.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril() & ~key_padding_mask[:, None, None]
        return self.sdpa(self.embed(ids), seen)


class TorchEncoder(Base):
    """nn.TransformerEncoder under a mask from outside, as torch's own tutorial writes it."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, src, src_mask):
        return self.head(self.encoder(self.embed(src), src_mask))


class Offset(Base):
    """The published Llama's way to say where it stands, and a cache that is asked for."""

    def forward(self, tokens, start_pos: int, past, use_cache=True):
        logits = self.sdpa(self.embed(tokens, torch.arange(start_pos, start_pos + tokens.shape[1])))
        return (logits, {"past": Strange()}) if use_cache else logits


class Strange:
    """Something that torch.export has never heard of."""


MODULES = [
    Positions, FlatPositions, PositionsOfAnyName, PositionsFirst, MayLook, OnlyMask, MayNotLook, Added, OneMinus, ByRow,
    Padding, TorchPadding, TorchEncoder, Offset,
]  # fmt: skip


def reference(module, ids):
    """The same weights with positions and masks as their writer means them, written out once more."""
    T = len(ids)
    row, at = torch.tensor([ids]), torch.arange(T)
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    calls = {
        Positions: lambda: module(row, at[None]),
        FlatPositions: lambda: module(row, at),
        PositionsOfAnyName: lambda: module(row, at[None]),
        PositionsFirst: lambda: module(at[None], row),
        MayLook: lambda: module(row, lower),
        OnlyMask: lambda: module(row, lower),
        MayNotLook: lambda: module(row, ~lower),
        Added: lambda: module(row, torch.zeros(T, T).masked_fill(~lower, float("-inf"))),
        OneMinus: lambda: module(row, lower.float()),
        ByRow: lambda: module(row, lower[None, None]),
        Padding: lambda: module(row, torch.ones(1, T), at[None]),
        TorchPadding: lambda: module(row, torch.zeros(1, T, dtype=torch.bool)),
        TorchEncoder: lambda: module(row, ~lower),
        Offset: lambda: module(row, 0, None)[0],
    }
    with torch.no_grad():
        return calls[type(module)]()[0]


def greedy(module, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(reference(module, ids)[-1].argmax()))
    return tuple(ids[-count:])


@pytest.mark.parametrize("kind", MODULES)
def test_what_is_a_function_of_the_length_is_made_inside(kind, tmp_path):
    module = kind().eval()
    report = export_model(module, tmp_path / "out", max_length=64)
    assert report.manifest.kind == "decoder"
    prompts = [np.random.default_rng(0).integers(0, VOCAB, n).tolist() for n in (1, 9, 4)]
    with tfinfer.load(tmp_path / "out") as model:
        got = [c.token_ids for c in model.generate(prompts, max_tokens=16)]
    assert got == [greedy(module, p, 16) for p in prompts]


@pytest.mark.parametrize("kind", [MayLook, OnlyMask, MayNotLook, Added, OneMinus, Padding, Positions])
def test_attention_under_a_mask_from_outside_is_recognised_all_the_same(kind, tmp_path):
    manifest = export_model(kind(), tmp_path / "out", max_length=64).manifest
    assert [(a.operator, a.pattern) for a in manifest.attention] == [("GroupQueryAttention", "causal")]


class Features(Base):
    def forward(self, ids, features: torch.Tensor):
        return self.sdpa(self.embed(ids) + self.places(features.new_zeros(1).long()) * features.view(3, 5, 7))


class NeverCausal(Base):
    def forward(self, ids, mask):
        return self.scored(self.embed(ids), lambda s: s) + 0 * mask.sum()


class Ambiguous(Base):
    def forward(self, ids, extra):
        return self.sdpa(self.embed(ids)) * (1 + extra.float().mean())


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (Features, ["features: torch.Tensor", "default", "class Wrapped(nn.Module)", "self.module(ids, features=...)"]),
        (NeverCausal, ["needs mask", "not causal", "changing token"]),
        (Ambiguous, ["needs extra", "to another result", "positions or mask"]),
    ],
)
def test_what_nothing_satisfies_is_refused_with_its_name_and_a_wrapper(kind, parts, tmp_path):
    with pytest.raises(CaptureError) as caught:
        export_model(kind(), tmp_path / "out", kind="decoder")
    for part in parts:
        assert part in str(caught.value)


def test_an_encoder_that_needs_its_mask_is_an_encoder_without_being_told(tmp_path):
    class Encodes(Base):
        def forward(self, ids, attention_mask):
            seen = attention_mask[:, None, None].bool()
            return {"hidden_states": self.scored(self.embed(ids), lambda s: s.masked_fill(~seen, float("-inf")))}

    report = export_model(Encodes(), tmp_path / "out", max_length=64)
    assert report.manifest.kind == "encoder"


def test_a_module_of_ids_alone_is_taken_as_it_is():
    module = Base()
    module.forward = lambda ids: module.sdpa(module.embed(ids))
    assert as_decoder(module) is module


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor
    cache: object = None


Pair = namedtuple("Pair", "hidden logits")
RETURNS = {
    "tuple": lambda x, logits: (logits, x),
    "hidden states first": lambda x, logits: (x, logits),
    "dict": lambda x, logits: {"hidden": x, "logits": logits},
    "dict of another name": lambda x, logits: {"out": logits},
    "dataclass": lambda x, logits: Output(None, logits),
    "dataclass with a cache": lambda x, logits: Output(None, logits, Strange()),
    "namedtuple": lambda x, logits: Pair(x, logits),
    "tuple with a cache": lambda x, logits: (logits, Strange()),
    "a list and None": lambda x, logits: [logits, None],
    "with the loss": lambda x, logits: (x.mean() * 0, logits),
}


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
def test_logits_are_found_in_whatever_is_returned(returns, tmp_path):
    class Returns(Base):
        def forward(self, ids):
            x = self.embed(ids)
            return returns(x, self.sdpa(x))

    module = Returns().eval()
    report = export_model(module, tmp_path / "out", max_length=64, kind="decoder")
    assert report.manifest.num_logits == VOCAB
    ids = [3, 1, 4]
    with torch.no_grad():
        expected = module.sdpa(module.embed(torch.tensor([ids])))[0, -1].argmax()
    with tfinfer.load(tmp_path / "out") as model:
        assert model.generate(ids, max_tokens=1).token_ids == (int(expected),)
