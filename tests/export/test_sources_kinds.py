"""Encoders and encoder-decoders as sources: how each kind of module is called, and what its checkpoint says of it."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tfinfer.errors import SourceError  # noqa: E402
from tfinfer.export.capture import Argument, Kind  # noqa: E402
from tfinfer.export.sources.source import from_module  # noqa: E402

IDS = torch.tensor([[3, 1, 4, 1, 5]])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)


class Plain(Base):
    def forward(self, x, scale=1.0, *, flag=False):
        return self.table(x)


class Masked(Base):
    def forward(self, ids, attention_mask, src_key_padding_mask=None, token_type_ids=None, mask=None): ...


class Segmented(Base):
    def forward(self, ids, *, segment_ids, key_padding_mask): ...


class Greedy(Base):
    def forward(self, ids, lengths, depth): ...


class TwoSided(Base):
    def forward(self, src, tgt, dropout=0.0):
        return self.table(tgt) + self.table(src).mean(1, keepdim=True)


class MaskedPair(Base):
    def forward(self, src, tgt, src_mask, tgt_mask): ...


class Three(Base):
    def forward(self, a, b, c): ...


class Methods(Base):
    def encode(self, ids, scale=2.0):
        return {"states": self.table(ids), "scale": scale}

    def decode(self, target, states):
        return self.table(target) + states["scale"] * states["states"].mean(1, keepdim=True)


class TupleMemoryFirst(Base):
    def encode(self, ids):
        return self.table(ids), ids

    def decode(self, memory, target, temperature=1.0):
        states, ids = memory
        return self.table(target) + states.mean(1, keepdim=True) + ids.sum()


class Both(TwoSided, Methods):
    """Its forward and its methods compute different things."""


class ForText(Plain):
    """A decoder that brings its tokenizer along."""

    def encode(self, text): ...

    def decode(self, ids, skip_special=True): ...


class HungryEncode(Methods):
    def encode(self, ids, mask): ...


class HungryDecode(Methods):
    def decode(self, target, memory, *, mask): ...


class ShortDecode(Methods):
    def decode(self, target): ...


class Submodules(Base):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = Plain(), TwoSided()


class Nameless(Base):
    def forward(self, *ids): ...


class ByPosition(Base):
    def forward(self, src, tgt, /): ...


@pytest.mark.parametrize(
    "kind, others",
    [
        (Plain, {}),
        (Masked, {"attention_mask": Kind.MASK, "src_key_padding_mask": Kind.PADDING, "token_type_ids": Kind.TYPES}),
        (Segmented, {"segment_ids": Kind.TYPES, "key_padding_mask": Kind.PADDING}),
    ],
)
def test_an_encoder_takes_ids_and_what_has_a_known_name(kind, others):
    source = from_module(kind().eval())
    form = source.as_encoder()
    assert source.says is None
    assert form.module is source.module
    assert form.arguments[0] == Argument("x" if kind is Plain else "ids", Kind.IDS, source=True)
    assert form.arguments[1:] == tuple(Argument(name, kind, source=True) for name, kind in others.items())


def refused(call, *parts):
    with pytest.raises(SourceError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, parts",
    [
        (Greedy, ["Greedy", "needs lengths, depth", "default", "inputs="]),
        (TwoSided, ["needs tgt"]),
        (Nameless, ["names no parameters", "forward(input_ids)"]),
        (ByPosition, ["src, tgt by position only", "remove the /"]),
    ],
)
def test_what_an_encoder_cannot_be_given_is_named(kind, parts):
    refused(from_module(kind().eval()).as_encoder, *parts)


def test_a_forward_of_two_sides_is_called_by_name():
    source = from_module(TwoSided().eval())
    form = source.as_pair()
    assert source.says == "encoder-decoder"
    assert form.module is source.module
    assert form.arguments == (Argument("src", source=True), Argument("tgt"))


@pytest.mark.parametrize("kind", [Methods, TupleMemoryFirst, Submodules])
def test_methods_become_a_function_of_both_sides(kind):
    module = kind().eval()
    source = from_module(module)
    form = source.as_pair()
    assert source.says == "encoder-decoder"
    assert source.module is module
    assert form.arguments == (Argument("source_ids", source=True), Argument("input_ids"))
    assert not form.module.training
    if kind is not Submodules:
        first = kind is TupleMemoryFirst
        args = (module.encode(IDS), IDS[:, :2]) if first else (IDS[:, :2], module.encode(IDS))
        torch.testing.assert_close(form.module(source_ids=IDS, input_ids=IDS[:, :2]), module.decode(*args))


def test_forward_is_believed_before_methods():
    module = Both().eval()
    form = from_module(module).as_pair()
    assert form.module is module


@pytest.mark.parametrize(
    "kind, says, parts",
    [
        (Plain, None, ["encode(source_ids)", "forward needs x", "write one of the two"]),
        (MaskedPair, "encoder-decoder", ["give src_mask, tgt_mask a default"]),
        (Three, None, ["forward needs a, b, c", "give c a default"]),
        (HungryEncode, "encoder-decoder", ["encode also needs mask", "default"]),
        (HungryDecode, "encoder-decoder", ["decode also needs mask", "part of the memory"]),
        (ShortDecode, None, ["takes target alone"]),
        (Nameless, None, ["forward needs nothing"]),
        (Masked, None, ["forward needs ids, attention_mask", "give attention_mask a default"]),
    ],
)
def test_what_is_no_pair_is_told_why(kind, says, parts):
    source = from_module(kind().eval())
    assert source.says == says
    refused(source.as_pair, *parts)


def test_methods_for_text_make_no_pair():
    source = from_module(ForText().eval())
    assert source.says is None
    assert source.as_encoder().arguments == (Argument("x", source=True),)


def test_a_pair_of_another_precision_or_mode_is_copied_before_it_is_wrapped():
    module = Methods().half()
    form = from_module(module).as_pair()
    assert module.table.weight.dtype == torch.float16
    assert {p.dtype for p in form.module.parameters()} == {torch.float32}
    assert not any(part.training for part in form.module.modules())
    assert module.training


def test_torchs_own_transformer_is_a_pair():
    assert from_module(nn.Transformer(8, 2, 1, 1, 8).eval()).says == "encoder-decoder"


def test_the_target_begins_with_the_tokenizers_own_beginning(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert from_module(TwoSided().eval(), tmp_path).decoder_start == (1,)
    assert from_module(Plain().eval(), tmp_path).decoder_start == ()
