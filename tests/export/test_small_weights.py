"""What may be asked of weights of a few bits: blocks, zero points, weights that stay, and an agreement that is held."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError
from tfinfer.export import export_model, graph_files
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.export.passes.blocks import quantised
from tfinfer.export.passes.quantise import Recipe
from tfinfer.export.small import narrowest
from tfinfer.manifest import load_manifest


@dataclass
class Found:
    agreement: float
    cases: tuple = ()


class Judge:
    """Each weight costs so much agreement in 4 bits, a tenth of it in 8, and nothing in float32."""

    def __init__(self, costs):
        self.costs, self.tried = costs, []

    def __call__(self, recipe, brief):
        self.tried.append((recipe, brief))
        lost = 0.0
        for name, cost in self.costs.items():
            lost += 0 if name in recipe.keep else cost / 10 if name in recipe.wider else cost
        return Found(1 - lost)


COSTS = {"a": 0.01, "b": 0.20, "c": 0.02, "d": 0.10}


@pytest.mark.parametrize(
    ("wanted", "wider", "keep"),
    [
        (0.6, (), ()),
        (0.8, ("b",), ()),
        (0.93, ("b", "d"), ()),
        (0.967, ("b", "d", "c", "a"), ()),
        (0.98, ("b", "d", "c", "a"), ("b",)),
        (1.0, ("b", "d", "c", "a"), ("b", "d", "c", "a")),
    ],
)
def test_what_does_most_damage_is_widened_first_and_no_more_than_needed(wanted, wider, keep):
    judge = Judge(COSTS)
    found = narrowest(Recipe(4, 8, 64), list(COSTS), wanted, judge)
    assert (found.wider, found.keep) == (wider, keep)


def test_eight_bits_are_widened_to_float32():
    judge = Judge(COSTS)
    found = narrowest(Recipe(8, 8, 128), list(COSTS), 0.85, judge)
    assert (found.wider, found.keep) == ((), ("b",))
    assert sorted(recipe.keep for recipe, brief in judge.tried if brief) == [("a",), ("b",), ("c",), ("d",)]


def test_what_a_user_keeps_or_widens_stays_so():
    given = Recipe(4, 8, 64, keep=("b",), wider=("a",))
    found = narrowest(given, list(COSTS), 0.95, Judge(COSTS))
    assert (found.wider, found.keep) == (("a", "d"), ("b",))


def test_of_equal_gains_in_first_choices_the_one_that_comes_closest_is_first():
    def judge(recipe, brief):
        off = 0.1 if "c" in recipe.wider else 0.5
        return Found(0.9 if brief or not recipe.wider else 1.0, (SimpleNamespace(worst=off),))

    assert narrowest(Recipe(4, 8, 64), list(COSTS), 0.95, judge).wider == ("c",)


def test_neighbours_are_judged_together_and_all_cases_are_run_seldom():
    costs = {f"w{i}": 0.001 * (i % 7) for i in range(200)}
    judge = Judge(costs)
    narrowest(Recipe(4, 8, 64), list(costs), 0.95, judge)
    assert sum(brief for _, brief in judge.tried) == 24
    assert sum(not brief for _, brief in judge.tried) <= 7


# -- real folders ---------------------------------------------------------------------------------------------------
def decoder(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 48}
    return Decoder(TransformerConfig(**(sizes | kinds | changes))).eval()


def bits_of(folder):
    """By weight of a product: its bits, the size of its blocks, whether it has zero points."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            found[node.input[1].partition(".int")[0]] = (
                attributes["bits"],
                attributes["block_size"],
                any(node.input[3:4]),
            )
        elif node.op_type in ("MatMul", "FusedMatMul"):
            found[node.input[1]] = (32, 0, False)
    return found


def test_blocks_and_zero_points_are_those_asked_for(tmp_path):
    report = export_model(decoder(), tmp_path / "out", dtype="int4", block_size=32, symmetric=False, attention=False)
    assert {(size, zeros) for _, size, zeros in bits_of(tmp_path / "out").values()} == {(32, True)}
    assert (report.manifest.weights.block_size, report.manifest.weights.symmetric) == (32, False)
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")])
    assert "in blocks of 32, head and embedding int8, with zero points" in " ".join(told.output.split())


def tables_of(folder):
    """Of the embedding and of the head: how many bits, and where in the file their numbers lie."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer}
    *_, head = (node for node in graph.node if node.op_type == "MatMulNBits")
    (embedding,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    of_bits = [next(a.i for a in node.attribute if a.name == "bits") for node in (embedding, head)]
    return of_bits, [(places[name]["offset"], places[name]["length"]) for name in (embedding.input[0], head.input[1])]


WIDE_TABLE = {"vocab_size": 2000, "num_layers": 1}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_get_the_bits_asked_for_and_are_stored_once_where_tied(tmp_path, tied, symmetric):
    module = decoder(tie_embeddings=tied, **WIDE_TABLE)
    given = {"dtype": "int4", "symmetric": symmetric, "attention": False}
    sizes = {}
    for bits in (8, 4):
        made = export_model(module, tmp_path / str(bits), head_bits=bits, **given).manifest
        found, (of_embedding, of_head) = tables_of(tmp_path / str(bits))
        assert found == [bits, bits]
        assert (of_embedding == of_head) is tied
        assert of_embedding[1] == str(2000 * 64 * bits // 8)
        assert {width for width, *_ in bits_of(tmp_path / str(bits)).values()} == {4, bits}
        assert (made.weights.bits, made.weights.head_bits) == (4, bits)
        assert load_manifest(tmp_path / str(bits)).weights == made.weights
        assert made.weights.agreement > 0.5
        sizes[bits] = made.files["weights.bin"].bytes
    assert sizes[8] - sizes[4] == pytest.approx((1 if tied else 2) * 2000 * 64 // 2, abs=256)
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "4")])
    assert "int4 in blocks of 128, head and embedding int4" in " ".join(told.output.split())
    with tfinfer.load(tmp_path / "4") as model:
        assert len(model.generate([1, 2, 3], max_tokens=8, stop_ids=[]).token_ids) == 8


def test_head_and_embedding_have_8_bits_unless_asked(tmp_path):
    for name, given in {"plain": {}, "asked": {"head_bits": 8}}.items():
        export_model(decoder(), tmp_path / name, dtype="int4", quantiser="rtn", attention=False, **given)
    assert numbers_of(tmp_path / "plain") == numbers_of(tmp_path / "asked")
    made = export_model(decoder(), tmp_path / "int8", dtype="int8", head_bits=8, attention=False)
    assert made.manifest.weights.head_bits == 8


def test_a_head_of_4_bits_is_rounded_to_the_nearest_whatever_the_quantiser(tmp_path):
    module = decoder(tie_embeddings=False, **WIDE_TABLE)
    expected = quantised(module.head.weight.detach().numpy().T, 4, 64).data.tobytes()
    given = {"block_size": 64, "attention": False}  # as the head has anyway: one key for both ways to round it
    for quantiser in ("rtn", "gptq"):
        folder = tmp_path / quantiser
        export_model(module, folder, dtype="int4", head_bits=4, quantiser=quantiser, **given)
        _, (_, (offset, length)) = tables_of(folder)
        assert numbers_of(folder)[int(offset) :][: int(length)] == expected
    assert numbers_of(tmp_path / "rtn") != numbers_of(tmp_path / "gptq")


def test_an_embedding_whose_rows_are_odd_works_in_4_bits(tmp_path):
    module = decoder(hidden_size=45, num_heads=3, position="learned", norm="layer_norm", **WIDE_TABLE)
    made = export_model(module, tmp_path / "out", dtype="int4", head_bits=4, attention=False)
    assert tables_of(tmp_path / "out")[0] == [4, 4]
    assert made.verdicts[-1].passed


def test_weights_that_are_to_stay_do_by_the_modules_own_names(tmp_path):
    wide = export_model(decoder(), tmp_path / "wide", attention=False)
    names = [name for name in bits_of(wide.folder) if "packed" not in name]
    kept = next(name for name in names if "0" in name)
    report = export_model(decoder(), tmp_path / "out", dtype="int4", keep=[kept], attention=False)
    found = bits_of(tmp_path / "out")
    assert [name for name, (bits, *_) in found.items() if bits == 32] == [kept]
    assert report.manifest.weights.kept == 1


def test_a_part_of_a_joined_weight_keeps_it_whole(tmp_path):
    part = next(name for name, _ in decoder().named_parameters() if "key" in name or "k_proj" in name)
    export_model(decoder(), tmp_path / "out", dtype="int4", keep=[f"*{part}"], attention=False)
    kept = [name for name, (bits, *_) in bits_of(tmp_path / "out").items() if bits == 32]
    assert len(kept) == 1
    assert "packed" in kept[0]


def test_an_agreement_that_is_asked_for_is_held_by_as_little_as_it_takes(tmp_path):
    plain = export_model(decoder(), tmp_path / "plain", dtype="int4", attention=False).manifest
    assert plain.weights.agreement < 0.95
    held = export_model(decoder(), tmp_path / "held", dtype="int4", keep_agreement=0.95, attention=False).manifest
    assert held.weights.agreement >= 0.95
    assert held.weights.wider + held.weights.kept > 0
    assert load_manifest(tmp_path / "held").weights == held.weights
    sizes = [sum(f.bytes for f in manifest.files.values()) for manifest in (plain, held)]
    wide = export_model(decoder(), tmp_path / "wide", attention=False).manifest
    assert sizes[0] < sizes[1] < sum(f.bytes for f in wide.files.values())
    with tfinfer.load(tmp_path / "held") as model:
        assert len(model.generate([1, 2, 3], max_tokens=8, stop_ids=[]).token_ids) == 8


def test_an_agreement_that_is_held_at_once_is_proved_once(tmp_path, monkeypatch):
    saved, save = [], graph_files.save
    monkeypatch.setattr(graph_files, "save", lambda *given: (saved.append(1), save(*given)))
    made = export_model(decoder(), tmp_path / "out", dtype="int4", keep_agreement=0.5, attention=False)
    assert len(saved) == 2  # in float32, and in 4 bits
    assert (made.manifest.weights.wider, made.manifest.weights.kept) == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        ("fp32", {"keep_agreement": 0.9}, "give the dtype int8 or int4, not fp32"),
        ("fp16", {"block_size": 32}, "give the dtype int8 or int4, not fp16"),
        ("int4", {"block_size": 48}, "expected block_size to be one of 32, 64, 128, got 48"),
        ("bf16", {"head_bits": 8}, "give the dtype int8 or int4, not bf16"),
        ("int4", {"head_bits": 6}, "expected head_bits to be one of 4, 8, got 6"),
        ("int8", {"head_bits": 4}, "expected head_bits to be 8 with the dtype int8, got 4: give the dtype int4"),
        ("int4", {"keep_agreement": 0.0}, "above 0 and at most 1, got 0.0"),
        ("int4", {"keep": ["no.such.*"]}, "no weight is named 'no.such.*'; there are "),
        ("int4", {"quantiser": "awq"}, "unknown quantiser 'awq': expected one of rtn, gptq"),
        ("fp32", {"quantiser": "gptq"}, "give the dtype int8 or int4, not fp32"),
        (
            "fp16",
            {"calibration": "text.txt"},
            "give the dtype int4 or the cache int8, or leave the text out of an export in fp16",
        ),
        ("int8", {"calibration": "text.txt"}, "but rtn is what int8 takes by itself: give quantiser gptq or"),
        ("int4", {"calibration": "text.txt", "quantiser": "rtn"}, "but rtn was asked for: give quantiser gptq or"),
        ("int4", {"calibration": "text.txt"}, "text.txt: a text to calibrate on needs a tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, dtype, options, words):
    stages = []
    with pytest.raises(InputError, match=words):
        export_model(decoder(), tmp_path / "out", dtype=dtype, attention=False, progress=stages.append, **options)
    assert "proof" not in stages  # minutes of it, of a large module
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_all_of_it(asked_by_command):
    given = [
        "--dtype",
        "int4",
        "--block-size",
        "32",
        "--head-bits",
        "4",
        "--asymmetric",
        "--keep",
        "a*",
        "--keep",
        "b",
        "--keep-agreement",
        "0.99",
        "--quantiser",
        "gptq",
        "--calibration",
        "text.txt",
    ]
    asked = asked_by_command(*given)
    names = ("dtype", "block_size", "head_bits", "symmetric", "keep", "keep_agreement", "quantiser", "calibration")
    assert [asked[name] for name in names] == ["int4", 32, 4, False, ("a*", "b"), 0.99, "gptq", Path("text.txt")]


@pytest.mark.parametrize("given", [["--dtype", "int8", "--head-bits", "4"], ["--dtype", "int4", "--head-bits", "2"]])
def test_a_command_for_bits_that_no_head_has_there_fails_and_writes_nothing(tmp_path, given):
    done = CliRunner().invoke(cli, ["export", "tests/zoo/python_writer.py:build", "-o", str(tmp_path / "out"), *given])
    assert done.exit_code == 2, done.output
    assert "head" in done.output
    assert not (tmp_path / "out").exists()


# -- text to calibrate on -------------------------------------------------------------------------------------------
def numbers_of(folder):
    return (folder / "weights.bin").read_bytes()


def test_weights_of_4_bits_are_rounded_for_the_models_own_text_and_the_same_each_time(tmp_path):
    for name, options in {"one": {}, "two": {}, "rtn": {"quantiser": "rtn"}}.items():
        export_model(decoder(), tmp_path / name, dtype="int4", attention=False, **options)
    told, plain = (load_manifest(tmp_path / name).weights for name in ("one", "rtn"))
    assert (told.quantiser, told.calibration, told.calibration_tokens) == ("gptq", "its own text", 32 * 48)
    assert (plain.quantiser, plain.calibration, plain.calibration_tokens) == ("rtn", None, 0)
    assert numbers_of(tmp_path / "one") == numbers_of(tmp_path / "two") != numbers_of(tmp_path / "rtn")
    assert not [path for path in (tmp_path / "one").iterdir() if "watched" in path.name]


def test_weights_of_8_bits_are_rounded_to_the_nearest_unless_asked(tmp_path):
    assert export_model(decoder(), tmp_path / "a", dtype="int8", attention=False).manifest.weights.quantiser == "rtn"
    asked = export_model(decoder(), tmp_path / "b", dtype="int8", quantiser="gptq", attention=False)
    assert asked.manifest.weights.quantiser == "gptq"
    assert numbers_of(tmp_path / "a") != numbers_of(tmp_path / "b")


def text_and_tokenizer(tmp_path):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{7 * i % 120}" for i in range(300)), encoding="utf-8")
    return tmp_path / "text.txt", tmp_path / "tokenizer.json"


def test_a_text_that_is_named_is_what_they_are_rounded_for(tmp_path):
    text, tokenizer = text_and_tokenizer(tmp_path)
    given = {"dtype": "int4", "attention": False, "tokenizer": tokenizer}
    made = export_model(decoder(), tmp_path / "text", calibration=text, **given).manifest.weights
    assert (made.quantiser, made.calibration, made.calibration_tokens) == ("gptq", "text.txt", 300)
    export_model(decoder(), tmp_path / "own", **given)
    assert numbers_of(tmp_path / "text") != numbers_of(tmp_path / "own")


def test_a_text_that_is_not_there_is_refused_before_the_proof_and_the_next_export_works(tmp_path):
    text, tokenizer = text_and_tokenizer(tmp_path)
    given, stages = {"dtype": "int4", "attention": False, "tokenizer": tokenizer}, []
    with pytest.raises(InputError, match=r"missing\.txt: expected a text file to calibrate on: No such file"):
        export_model(decoder(), tmp_path / "out", calibration=tmp_path / "missing.txt", progress=stages.append, **given)
    assert "proof" not in stages
    assert not (tmp_path / "out").exists()
    assert export_model(decoder(), tmp_path / "out", calibration=text, **given).verdicts[-1].passed


class LastOnly(torch.nn.Module):
    """Logits of the last position alone: of the last layer's end one row for each text is known."""

    def __init__(self):
        super().__init__()
        self.inner = decoder()

    def forward(self, input_ids):
        return self.inner(input_ids)[:, -1:]


def test_a_module_that_gives_its_last_logits_alone_is_calibrated_too(tmp_path):
    made = export_model(LastOnly().eval(), tmp_path / "out", dtype="int4", attention=False)
    assert made.verdicts[-1].passed
    assert made.manifest.weights.calibration_tokens == 32 * 48
