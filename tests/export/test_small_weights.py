"""What may be asked of weights of a few bits: blocks, zero points, weights that stay, and an agreement that is held."""

from dataclasses import dataclass

import onnx
import pytest
import torch
from click.testing import CliRunner

import tfinfer
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError
from tfinfer.export import export_model, graph_files
from tfinfer.export.modules import Decoder, TransformerConfig
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
    found = narrowest(Recipe(8, 8, 128), list(COSTS), 0.85, Judge(COSTS))
    assert (found.wider, found.keep) == ((), ("b",))


def test_neighbours_are_judged_together_and_all_cases_are_run_seldom():
    costs = {f"w{i}": 0.001 * (i % 7) for i in range(200)}
    judge = Judge(costs)
    narrowest(Recipe(4, 8, 64), list(costs), 0.95, judge)
    assert sum(brief for _, brief in judge.tried) == 24
    assert sum(not brief for _, brief in judge.tried) <= 7


# -- real folders ---------------------------------------------------------------------------------------------------
def decoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 48}
    return Decoder(TransformerConfig(**sizes, **kinds)).eval()


def bits_of(folder):
    """By weight of a product, how many bits it has."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            found[node.input[1].partition(".int")[0]] = (attributes["bits"], attributes["block_size"], len(node.input))
        elif node.op_type in ("MatMul", "FusedMatMul"):
            found[node.input[1]] = (32, 0, 2)
    return found


def test_blocks_and_zero_points_are_those_asked_for(tmp_path):
    report = export_model(decoder(), tmp_path / "out", dtype="int4", block_size=32, symmetric=False, attention=False)
    assert {(size, count) for _, size, count in bits_of(tmp_path / "out").values()} == {(32, 4)}
    assert (report.manifest.weights.block_size, report.manifest.weights.symmetric) == (32, False)
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")])
    assert "in blocks of 32, head and embedding int8, with zero points" in " ".join(told.output.split())


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
        ("int4", {"keep_agreement": 0.0}, "above 0 and at most 1, got 0.0"),
        ("int4", {"keep": ["no.such.*"]}, "no weight is named 'no.such.*'; there are "),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, dtype, options, words):
    stages = []
    with pytest.raises(InputError, match=words):
        export_model(decoder(), tmp_path / "out", dtype=dtype, attention=False, progress=stages.append, **options)
    assert "proof" not in stages  # minutes of it, of a large module
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_all_of_it(tmp_path, monkeypatch):
    asked = {}

    def export(module, out, **options):
        asked.update(options)
        raise InputError("enough")

    monkeypatch.setattr("tfinfer.export.export_model", export)
    given = [
        "--dtype",
        "int4",
        "--block-size",
        "32",
        "--asymmetric",
        "--keep",
        "a*",
        "--keep",
        "b",
        "--keep-agreement",
        "0.99",
    ]
    done = CliRunner().invoke(cli, ["export", "tests/zoo/python_writer.py:build", "-o", str(tmp_path / "out"), *given])
    assert done.exit_code == 2, done.output
    names = ("dtype", "block_size", "symmetric", "keep", "keep_agreement")
    assert [asked[name] for name in names] == ["int4", 32, False, ("a*", "b"), 0.99]
