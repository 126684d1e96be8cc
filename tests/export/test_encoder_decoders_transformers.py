"""Encoder-decoders of toy size, of transformers and by hand: greedy and beam search say what PyTorch says.

And no step of decoding makes or copies the keys and values of the source again.
"""

import itertools
import json
import random
from collections import Counter

import numpy as np
import onnx
import pytest
from torch import nn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import tfinfer  # noqa: E402
from tfinfer.errors import InputError  # noqa: E402
from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.sources import load_source  # noqa: E402
from tfinfer.proof.prove import verify_folder  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

WORDS, LONGEST, NEW, LAYERS = 60, 40, 24, 2
T5 = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": LONGEST, "tie_word_embeddings": False,
}  # fmt: skip
PAD = WORDS - 1
# A name for the test: the class, what its config says, and what its generation config says beside it.
PAIRS = {
    "t5": ("T5ForConditionalGeneration", T5, {}),
    "t5-gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, {}),
    "mt5": ("MT5ForConditionalGeneration", T5, {}),
    "bart": ("BartForConditionalGeneration", BART, {}),
    "marian": (
        "MarianMTModel",
        {**BART, "pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": 0, "forced_eos_token_id": 0},
        {"bad_words_ids": [[PAD]]},
    ),
    "mbart": ("MBartForConditionalGeneration", BART, {"forced_bos_token_id": 7}),
    "pegasus": ("PegasusForConditionalGeneration", BART, {}),
    "m2m100": ("M2M100ForConditionalGeneration", BART, {"forced_bos_token_id": 9}),
}
# What a target begins with, what ends it at the last place, and what is never chosen.
SAID = {
    "t5": ((0,), None, ()), "t5-gated": ((0,), None, ()), "mt5": ((0,), None, ()), "bart": ((2,), 2, ()),
    "marian": ((PAD,), 0, (PAD,)),
    "mbart": ((0, 7), 2, ()), "pegasus": ((0,), 1, ()), "m2m100": ((2, 9), None, ()),
}  # fmt: skip
BEAMS = {"num_beams": 4, "length_penalty": 1.0}
SOURCES = [random.Random(n).choices(range(3, PAD), k=n) for n in (9, 3, 17, 1)]


def make(name, folder):
    """A random model and its checkpoint; its weights are such that no mistake hides in noise or in one word."""
    class_name, sizes, generation = PAIRS[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()
    with torch.no_grad():
        if "t5" in name:
            model.shared.weight.mul_(0.1)
            model.decoder.final_layer_norm.weight.mul_(40)
        else:
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.requires_grad:
                    parameter.mul_(4)
        if name == "marian":
            model.final_logits_bias[0, PAD] = 50  # it would say nothing else
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    if name == "t5-gated":  # as T5 1.1: a head of its own, which transformers makes for a checkpoint that has one
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        weights["lm_head.weight"] = torch.randn(WORDS, 32) / 20
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config.pop("scale_decoder_outputs")
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        model = kind.from_pretrained(folder).eval()
        assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    return model


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """The name, the model in torch, and its folder opened."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pair")
    model = make(request.param, folder / "checkpoint")
    options = {"max_length": LONGEST, "max_source_length": LONGEST, "attention": False}
    export_model(load_source(str(folder / "checkpoint")), folder / "out", **options)
    with tfinfer.load(folder / "out", threads=1) as loaded:
        yield request.param, model, loaded


def expected(model, source, starts, ends, **options):
    """What transformers makes of one source: for each sequence its ids behind the beginning, and its score."""
    given = torch.tensor([source])
    found = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW + starts - 1,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    rows = [row[starts:] for row in found.sequences.tolist()]
    rows = [tuple(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
    return list(zip(rows, found.sequences_scores.tolist() if options["num_beams"] > 1 else itertools.repeat(None)))


def assert_as_transformers(pair, **options):
    """Every source alone, and all of them together."""
    _, theirs, ours = pair
    ids = ours.manifest.token_ids
    wanted = [expected(theirs, source, len(ids.decoder_start), ids.eos, **options) for source in SOURCES]
    for found in (
        ours.generate(SOURCES, max_tokens=NEW, **options),
        [ours.generate(source, max_tokens=NEW, **options) for source in SOURCES],
    ):
        found = [one if isinstance(one, list) else [one] for one in found]
        assert [[c.token_ids for c in one] for one in found] == [[row for row, _ in one] for one in wanted]
        if options["num_beams"] > 1:
            scores = [[completion.score for completion in one] for one in found]
            np.testing.assert_allclose(scores, [[s for _, s in one] for one in wanted], rtol=1e-4, atol=1e-4)
    return wanted


def test_it_proves_itself_and_says_what_its_files_say(pair):
    name, _, ours = pair
    ids = ours.manifest.token_ids
    assert (ids.decoder_start, ids.forced_eos, ids.suppressed) == SAID[name]
    assert {a.operator for a in ours.manifest.attention} == {"MultiHeadAttention", "GroupQueryAttention"}
    assert verify_folder(ours.decoder, ours.folder).passed


def test_greedy_tokens_are_those_of_transformers(pair):
    wanted = assert_as_transformers(pair, num_beams=1)
    assert len({row for one in wanted for row, _ in one}) > 1  # the source matters


def test_beams_are_those_of_transformers(pair):
    greedy = assert_as_transformers(pair, num_beams=1)
    assert [rows[0][0] for rows in assert_as_transformers(pair, **BEAMS)] != [rows[0][0] for rows in greedy]


@pytest.mark.parametrize("early_stopping", [True, "never"])
def test_several_beams_of_each(pair, early_stopping):
    options = {"num_beams": 3, "early_stopping": early_stopping, "num_return_sequences": 2}
    assert_as_transformers(pair, **options, length_penalty=0.6)


def test_what_is_forced_and_what_is_never_chosen(pair):
    name, theirs, ours = pair
    start, forced, suppressed = SAID[name]
    source = torch.tensor(SOURCES[:1])
    bare = theirs.generate(source, max_new_tokens=NEW, do_sample=False, forced_eos_token_id=None, bad_words_ids=None)
    completion = ours.generate(SOURCES[0], max_tokens=NEW)
    if suppressed:
        assert set(bare[0].tolist()) == {PAD}
        assert PAD not in completion.token_ids
    if forced is not None:
        short = ours.generate(SOURCES[0], max_tokens=3).token_ids
        assert short == completion.token_ids[:2]
    if len(start) > 1:
        loose = theirs.generate(source, max_new_tokens=1, do_sample=False, forced_bos_token_id=None)
        assert loose[0, 1] != start[1]


# by hand


class Translator(nn.Module):
    """nn.Transformer, positions in front, with the methods that are called to translate."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.words, self.places = nn.Embedding(WORDS, 24), nn.Embedding(LONGEST, 24)
        self.transformer = nn.Transformer(24, 3, LAYERS, LAYERS, 32, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(24, WORDS)

    def embed(self, ids):
        x = self.words(ids) * 3 + self.places(torch.arange(ids.shape[1], device=ids.device))
        return x if self.batch_first else x.transpose(0, 1)

    def encode(self, src):
        return self.transformer.encoder(self.embed(src))

    def decode(self, tgt, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.head(self.transformer.decoder(self.embed(tgt), memory, tgt_mask=mask))

    def forward(self, src, tgt):
        return self.decode(tgt, self.encode(src))


class OfMethods(Translator):
    """Its forward is for training, and takes more than ids."""

    def forward(self, src, tgt, labels, weights):
        raise NotImplementedError


class Padded(Translator):
    """Sequence first; 0 is padding in a source."""

    def __init__(self):
        super().__init__(batch_first=False)

    def forward(self, src, tgt):
        mask, padding = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1]), src == 0
        given = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.head(self.transformer(self.embed(src), self.embed(tgt), **given)).transpose(0, 1)


def greedy(module, source):
    """What a module says by full passes, from 1 on."""
    ids, call = [1], Translator.forward if isinstance(module, OfMethods) else type(module).forward
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(call(module, torch.tensor([source]), torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[1:])


@pytest.mark.parametrize("kind", [Translator, OfMethods, Padded])
def test_a_translator_by_hand(kind, tmp_path):
    torch.manual_seed(0)
    module = kind().eval()
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.mul_(1.5)
    report = export_model(module, tmp_path / "out", start_ids=[1], attention=False)
    assert report.manifest.kind == "encoder-decoder"
    assert (report.manifest.max_length, report.manifest.max_source_length) == (LONGEST, LONGEST)
    padded = [*SOURCES[0], 0, 0, 0]
    with tfinfer.load(tmp_path / "out", threads=1) as loaded:
        wanted = [greedy(module, source) for source in (*SOURCES, padded)]
        assert len(set(wanted)) > 2
        assert (wanted[0] == wanted[-1]) == (kind is Padded)
        got = loaded.generate([*SOURCES, padded], max_tokens=NEW, stop_ids=[])
        assert [completion.token_ids for completion in got] == wanted
        assert [loaded.generate(s, max_tokens=NEW, stop_ids=[]).token_ids for s in SOURCES] == wanted[:-1]
    products = (2 + 2 + 2) * LAYERS + 1  # nn.MultiheadAttention makes queries, keys and values of its own at once
    assert_nothing_of_the_source_is_made_again(tmp_path / "out", report.manifest, products)


# the graph of a step


def assert_nothing_of_the_source_is_made_again(folder, manifest, products):
    """Keys and values of the source go from the encoder's graph straight into the attentions of the decoder's.

    products: the matrix products of a step: of its own attention two (query, key and value joined; output), to the
    source two (query and output), two or three of the feed-forward layer, and the head, which may be tied.
    """
    graph, made = (
        onnx.load(folder / f"{name}.onnx", load_external_data=False).graph for name in ("decoder", "encoder")
    )
    crossing = {spec.name for spec in manifest.cross}
    assert crossing == {value.name for value in made.output}
    assert crossing <= {value.name for value in graph.input}
    kept = {entry.present for entry in (*manifest.cache, *manifest.states)}
    assert {value.name for value in graph.output} == {"logits"} | kept  # none of them comes out of a step
    states = {spec.name for spec in manifest.cross if 1 not in spec.shape}  # the others are masks
    assert len(states) == 2 * LAYERS
    readers = [node for node in graph.node if states & set(node.input)]
    assert [node.op_type for node in readers] == ["MultiHeadAttention"] * LAYERS  # has no weights; nothing in between
    assert sorted(itertools.chain(*(node.input[1:3] for node in readers))) == sorted(states)
    found = Counter(node.op_type for node in graph.node)
    assert found["MatMul"] + found["FusedMatMul"] == products
    assert found["FusedMatMul"] <= 1
    assert not found.keys() & {"Gemm", "Einsum", "Conv"}


def test_nothing_of_the_source_is_made_again(pair):
    _, _, ours = pair
    feed_forward = 2  # products, of gated ones too, whose gate and up are one
    assert_nothing_of_the_source_is_made_again(ours.folder, ours.manifest, (2 + 2 + feed_forward) * LAYERS + 1)


def test_a_source_longer_than_the_module_takes_is_refused_with_the_length_that_works(tmp_path):
    """Positions that are counted by the ids are no guard of the trace: they fail when the module runs."""
    torch.manual_seed(0)

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = torch.nn.Embedding(23, 16), torch.nn.Embedding(41, 16)
            self.head = torch.nn.Linear(16, 23)

        def forward(self, source_ids, input_ids):
            at = source_ids.ne(0).long().cumsum(1)  # a padding id counts for nothing
            memory = self.words(source_ids) + self.places(at)
            x = self.words(input_ids)[:, None]
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
            return self.head(x + torch.nn.functional.scaled_dot_product_attention(x, memory, memory))

    with pytest.raises(InputError, match=r"fails beyond 40 tokens.*give --max-source-length 40 or less"):
        export_model(Pair(), tmp_path / "out", start_ids=[1], max_length=50, max_source_length=60)
    assert not (tmp_path / "out").exists()
    export_model(Pair(), tmp_path / "out", start_ids=[1], max_length=50, max_source_length=40)
