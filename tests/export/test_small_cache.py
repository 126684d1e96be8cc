"""A cache of 8 bits: which entries can have it, the ranges of their features, what it costs and does not go with."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from gqa_graph import KV_HEADS, LONGEST, SIZE, Graph, tables, weights
from make_tiny_cache import Mixed
from make_tiny_states import Linear
from tokenizers import Tokenizer, models, pre_tokenizers

import tfinfer
from tfinfer.errors import InputError, ProofError
from tfinfer.export import export_model, small_cache
from tfinfer.export.calibration import cache_ranges, random_ids, watch
from tfinfer.export.modules import Decoder, Encoder, EncoderDecoder, TransformerConfig
from tfinfer.export.passes import rotary
from tfinfer.export.passes import small_cache as rounding
from tfinfer.manifest import load_manifest
from tfinfer.session.decoder import Decoder as Session

WINDOW = 16


def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 48}
    return Decoder(TransformerConfig(**(sizes | kinds | changes))).eval()


def windowed():
    return decoder(attention_pattern="sliding_window", window=WINDOW, max_length=400)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    out = tmp_path_factory.mktemp("wide") / "out"
    export_model(decoder(), out, attention=False)
    return out


# -- which entries --------------------------------------------------------------------------------------------------
def turned(write, dims=SIZE):
    """The graph of one attention behind a rotation, written as `write` has it, after the pass that reads it."""
    g = Graph()
    q, k, v = g.sides()
    cos, sin = tables(dims)
    model = g.finish(g.attend(write(g, q, cos, sin, dims), write(g, k, cos, sin, dims), v))
    assert rotary.run(model) == 1
    return model


@pytest.mark.parametrize(
    ("write", "dims", "pairs"),
    [
        (Graph.halves, 16, [(i, i + 8) for i in range(8)]),
        (Graph.pairs, 16, [(2 * i, 2 * i + 1) for i in range(8)]),
        (Graph.halves, 8, [(i, i + 4) for i in range(4)]),  # the operator takes no 8: turned right before it
    ],
)
def test_features_that_turn_together_are_known_for_keys_alone(write, dims, pairs):
    key, value = rounding.entries(turned(write, dims).graph)
    assert (key.past, key.present, list(key.pairs)) == ("past.0.key", "present.0.key", pairs)
    assert (value.past, value.present, value.pairs) == ("past.0.value", "present.0.value", ())


@pytest.mark.parametrize("interleaved", [0, 1])
def test_a_key_that_is_laid_out_anew_behind_its_turn_is_known_too(interleaved):
    g = Graph()
    q, k, v = g.sides()
    given = (g.emit.given("position_ids"), *map(g.held, tables(8)))
    heads_first = g.op("Transpose", g.split(k), perm=[0, 2, 1, 3])
    key = g.op("RotaryEmbedding", heads_first, *given, domain="com.microsoft", interleaved=interleaved)
    model = g.finish(g.attend(q, g.rows(g.op("Transpose", key, perm=[0, 2, 1, 3])), v))
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    assert [list(entry.pairs) for entry in rounding.entries(model.graph)] == [pairs, []]


def test_a_key_that_nothing_turns_has_no_pairs():
    g = Graph()
    model = g.finish(g.attend(*g.sides()))
    assert [entry.pairs for entry in rounding.entries(model.graph)] == [(), ()]


def test_what_a_second_attention_reads_stays_as_it_is():
    g = Graph()
    q, k, v = g.sides()
    first = g.attend(q, k, v)
    (node,) = [node for node in g.emit.nodes if node.op_type == "GroupQueryAttention"]
    none = g.op("Slice", k, *(np.array([n]) for n in (0, 0, 1)))
    lengths = g.emit.seqlens_k(), g.emit.total_length()
    sizes = {"num_heads": 4, "kv_num_heads": KV_HEADS, "scale": 0.25}
    inputs = (q, none, none, *node.outputs[1:], *lengths)
    second = g.emit.multi("GroupQueryAttention", *inputs, outputs=1, domain="com.microsoft", **sizes)[0]
    other = g.attend(q, v, k, layer=1)
    model = g.finish(g.op("Add", g.op("Add", first, second), other))
    assert [entry.past for entry in rounding.entries(model.graph)] == ["past.1.key", "past.1.value"]


def past_read_too(g, q, k, v):
    y = g.attend(q, k, v)
    return g.op("Add", y, g.op("ReduceSum", g.emit.inputs["past.0.key"], np.array([0, 1, 2, 3]), keepdims=0))


def past_computed(g, q, k, v):
    y = g.attend(q, k, v)
    (node,) = [node for node in g.emit.nodes if node.op_type == "GroupQueryAttention"]
    turned = g.op("Neg", node.inputs[3])
    g.emit.nodes.insert(0, g.emit.nodes.pop())
    node.replace_input_with(3, turned)
    return y


@pytest.mark.parametrize("make", [past_read_too, past_computed])
def test_a_past_that_is_not_the_attentions_own_stays_as_it_is(make):
    g = Graph()
    model = g.finish(make(g, *g.sides()))
    assert rounding.entries(model.graph) == []


def test_a_key_without_scales_keeps_its_value_wide_too():
    g = Graph()
    model = g.finish(g.attend(*g.sides()))
    assert rounding.run(model, {"past.0.value": np.ones((KV_HEADS, SIZE), np.float32)}) == 0
    assert {value.dtype for value in model.graph.inputs if value.name.startswith("past")} == {ir.DataType.FLOAT}


# -- the operator ---------------------------------------------------------------------------------------------------
def run(model, dtype, past, held, new):
    """y and both presents, of one row that holds so many positions."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {
        "x": weights(1, new, 24, seed=3, scale=1.0),
        "attention_mask": np.ones((1, held + new), np.int64),
        "position_ids": np.arange(held, held + new)[None],
        "past.0.key": past[0].astype(dtype),
        "past.0.value": past[1].astype(dtype),
    }
    feeds = {given.name: feeds[given.name] for given in session.get_inputs()}
    return session.run(["y", "present.0.key", "present.0.value"], feeds)


@pytest.mark.parametrize(("held", "new"), [(0, 9), (7, 1), (7, 5)])
@pytest.mark.parametrize("step", [0.06, 0.01])  # with the second, most numbers are beyond the range and cut
def test_what_is_written_is_rounded_by_the_feature_and_attended_to(held, new, step):
    model, small = turned(Graph.halves), turned(Graph.halves)
    rng = np.random.default_rng(0)
    scales = rng.uniform(step, 1.5 * step, (2, KV_HEADS, SIZE)).astype(np.float32)
    steps = scales[:, None, :, None]  # over (side, batch, heads, positions, features)
    assert rounding.run(small, {"past.0.key": scales[0], "past.0.value": scales[1]}) == 1
    whole = np.zeros((2, 1, KV_HEADS, LONGEST, SIZE), np.int8)
    whole[..., :held, :] = rng.integers(-120, 120, (2, 1, KV_HEADS, held, SIZE))
    y, *written = run(small, np.int8, whole, held, new)
    expected, *presents = run(model, np.float32, whole * steps, held, new)
    end = held + new
    for found, present, one in zip(written, presents, steps):
        assert found.dtype == np.int8
        away = found[:, :, :end] - np.clip(np.rint(present[:, :, :end] / one), -128, 127)
        assert np.abs(away).max() <= 1  # a tie may fall to either side
        assert (away == 0).mean() > 0.99
    assert np.allclose(y, expected, atol=0.15) == (step > 0.01)


def test_a_feature_that_is_always_zero_has_a_scale_all_the_same():
    assert rounding.scales_of(np.array([[0.0, 127.0, 12.7]])).tolist() == [[1.0, 1.0, np.float32(0.1)]]


# -- ranges ---------------------------------------------------------------------------------------------------------
def ranges(folder, pieces, pairs):
    session = Session(load_manifest(folder), folder)
    try:
        return cache_ranges(session, pieces, pairs)
    finally:
        session.close()


def test_a_range_is_the_largest_that_the_cache_ever_held(wide):
    """Beside the values that the graph itself gives, read in another way."""
    manifest, pieces = load_manifest(wide), random_ids(120, 3, 40).pieces
    found = ranges(wide, pieces, {entry.past: () for entry in manifest.cache})
    seen = {}

    def take(name, array):
        seen.setdefault(name, []).append(np.abs(array[0]).max(1))

    watch(manifest, wide, [entry.present for entry in manifest.cache], pieces, take)
    for entry in manifest.cache:
        np.testing.assert_allclose(found[entry.past], np.max(seen[entry.present], 0), rtol=1e-4)


def test_the_length_of_a_pair_is_its_range_at_every_position(wide):
    """The first layer's keys are those of their ids, turned: at other positions they leave what they were, not that."""
    (entry, *_) = rounding.entries(ir.load(wide / "decoder.onnx").graph)
    assert entry.pairs
    early, late = np.arange(8)[None], np.append(np.zeros(40, np.int64), np.arange(8))[None]
    for pairs, holds in ((entry.pairs, True), ((), False)):
        first, second = (ranges(wide, [ids], {entry.past: pairs})[entry.past] for ids in (early, late))
        assert (second <= first * (1 + 1e-4)).all() == holds


def test_positions_that_a_window_has_forgotten_are_counted_too(tmp_path):
    export_model(windowed(), tmp_path / "out", attention=False)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.keeps_window == WINDOW
    ids = np.random.default_rng(0).integers(0, 119, 300)
    ids[3] = 119  # a token of its own, long forgotten at the end
    past = manifest.cache[0].past
    pairs = [(i, i + 8) for i in range(8)]
    of_all, of_end, alone = (
        ranges(tmp_path / "out", [part], {past: pairs})[past] for part in (ids[None], ids[None, 4:], ids[None, 3:4])
    )
    assert (alone > 1.01 * of_end).any()
    np.testing.assert_allclose(of_all, np.maximum(of_end, alone), rtol=1e-3)


# -- folders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("build", "entries", "kept"),
    [
        (decoder, 4, 0),
        (lambda: decoder(position="learned", num_kv_heads=2), 4, 0),
        (lambda: decoder(position="alibi"), 4, 0),
        (windowed, 4, 0),
        (lambda: Mixed().eval(), 2, 2),
    ],
    ids=["rotary", "learned", "alibi", "windowed", "mixed"],
)
def test_a_decoder_with_a_small_cache_says_what_it_costs_and_goes_on(build, entries, kept, tmp_path):
    torch.manual_seed(0)
    report = export_model(build(), tmp_path / "out", cache="int8", max_length=48, attention=False)
    told = report.manifest.small_cache
    assert (told.bits, told.entries, told.kept, told.calibration) == (8, entries, kept, "its own text")
    assert told.agreement > 0.95
    assert [verdict.dtype for verdict in report.verdicts] == ["float32", "int8 cache"]
    assert all(verdict.passed for verdict in report.verdicts)
    assert report.manifest.requires == {"onnxruntime": "1.28"}
    assert [entry.dtype for entry in report.manifest.cache].count("int8") == entries
    assert any("cache entries stay float32" in note for note in report.notes) == bool(kept)
    assert load_manifest(tmp_path / "out") == report.manifest
    with tfinfer.load(tmp_path / "out") as model:
        assert len(model.generate([1, 2, 3], max_tokens=40, stop_ids=[]).token_ids) == 40


def test_scales_leave_room_for_more_than_was_seen_and_keys_may_turn_to_any_position(wide, tmp_path):
    """Random ids are among what ranges are of, all positions of them, whatever text there is."""
    export_model(decoder(), tmp_path / "out", cache="int8", attention=False)
    graph = ir.load(tmp_path / "out" / "decoder.onnx").graph
    found = rounding.entries(ir.load(wide / "decoder.onnx").graph)
    seen = ranges(wide, random_ids(120, 1, 48).pieces, {entry.past: entry.pairs for entry in found})
    assert len(seen) == 4
    for past, largest in seen.items():
        scale = graph.initializers[f"{past}.scale"].const_value.numpy()[0, :, 0]
        assert (scale * 127 / largest).min() >= 1.05
        half = scale.shape[1] // 2
        assert np.array_equal(scale[:, :half], scale[:, half:]) == past.endswith("key")


def test_small_weights_and_a_small_cache_go_together(tmp_path):
    asked = {"dtype": "int4", "cache": "int8", "keep_agreement": 0.8}
    made = export_model(decoder(), tmp_path / "out", attention=False, **asked)
    assert [verdict.dtype for verdict in made.verdicts] == ["float32", "int8 cache", "int4"]
    assert made.manifest.small_cache.agreement == round(made.verdicts[1].agreement, 4)  # before the weights
    assert made.manifest.weights.agreement == round(made.verdicts[2].agreement, 4) >= 0.8
    assert {entry.dtype for entry in made.manifest.cache} == {"int8"}
    with tfinfer.load(tmp_path / "out") as model:
        assert len(model.generate([1, 2, 3], max_tokens=20, stop_ids=[]).token_ids) == 20


def test_an_agreement_that_the_cache_alone_does_not_hold_is_refused():
    small_cache.check_agreement(0.98, None)
    small_cache.check_agreement(0.98, 0.98)
    with pytest.raises(InputError, match=r"0\.9800 of the proof's first choices .* keep_agreement asks for 0\.99"):
        small_cache.check_agreement(0.98, 0.99)


@pytest.mark.parametrize("factor", [0.1, 20.0])
def test_scales_that_are_wrong_fail_the_proof(factor, tmp_path, monkeypatch):
    right = rounding.scales_of
    monkeypatch.setattr(rounding, "scales_of", lambda found: factor * right(found))
    with pytest.raises(ProofError, match=r"1 - cosine .* FAILED at position"):
        export_model(decoder(), tmp_path / "out", cache="int8", attention=False)
    assert not (tmp_path / "out").exists()


def test_ranges_are_of_a_users_own_text(tmp_path):
    vocabulary = {"?": 0} | {f"w{i}": i + 1 for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"w{i % 100}" for i in range(400)), encoding="utf-8")
    given = {"cache": "int8", "calibration": text, "attention": False}
    report = export_model(decoder(), tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", **given)
    assert report.manifest.small_cache.calibration == "prose.txt"
    both = export_model(decoder(), tmp_path / "both", tokenizer=tmp_path / "tokenizer.json", dtype="int4", **given)
    assert (both.manifest.weights.calibration, both.manifest.small_cache.calibration) == ("prose.txt", "prose.txt")
    stages = []
    with pytest.raises(InputError, match="needs a tokenizer"):
        export_model(decoder(), tmp_path / "none", progress=stages.append, **given)
    assert "proof" not in stages
    assert not (tmp_path / "none").exists()


# -- what it does not go with ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "int4"}, "unknown cache 'int4': expected one of float32, int8"),
        ({"cache": "int8", "flavor": "standard"}, "leave the flavor at 'ort'"),
        ({"cache": "int8", "dtype": "fp16"}, "no activations in fp16"),
        ({"cache": "int8", "dtype": "bf16"}, "no activations in bf16"),
        ({"cache": "int8", "dtype": "int4", "activations": "fp16"}, "no activations in fp16"),
        ({"cache": "int8", "also": ["genai"]}, "genai makes the cache itself"),
        ({"calibration": "x.txt"}, "for an int8 cache: give the dtype int4 or the cache int8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_captured(options, words, tmp_path):
    stages = []
    with pytest.raises(InputError, match=words):
        export_model(decoder(), tmp_path / "out", progress=stages.append, **options)
    assert (stages, (tmp_path / "out").exists()) == ([], False)


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda: decoder(hidden_size=40), {}, r"this module has Attention \(causal\): leave the cache at float32"),
        (lambda: Only().eval(), {}, "this module has states of fixed size"),
        (lambda: Encoder(config()).eval(), {}, "this is an encoder"),
        (lambda: EncoderDecoder(config()).eval(), {"start_ids": [1]}, "this is an encoder-decoder"),
    ],
    ids=["head size", "states", "encoder", "encoder-decoder"],
)
def test_a_module_without_such_a_cache_is_told_why_before_the_proof(build, options, words, tmp_path):
    stages = []
    with pytest.raises(InputError, match=words):
        export_model(build(), tmp_path / "out", cache="int8", attention=False, progress=stages.append, **options)
    assert "proof" not in stages
    assert not (tmp_path / "out").exists()


def config():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    return TransformerConfig(**sizes, max_length=24)


class Only(Linear):
    """Linear attention alone: states, and no positions."""

    def forward(self, ids):
        q, k, v = self.linear(self.norm(self.words(ids))).chunk(3, dim=-1)
        return self.head(q.exp() * torch.cumsum(k * v, dim=1))


def test_the_command_asks_for_it(asked_by_command):
    asked = asked_by_command("--cache", "int8", "--calibration", "prose.txt")
    assert (asked["cache"], asked["calibration"]) == ("int8", Path("prose.txt"))
