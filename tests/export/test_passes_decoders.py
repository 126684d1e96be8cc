"""The passes for decoders on modules of every origin: exported, proved, and how often each fired."""

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from tfinfer.cli.main import tfinfer as cli
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig
from tfinfer.export.passes import pipeline
from tfinfer.manifest import load_manifest

TESTS = Path(__file__).resolve().parents[1]
LONGEST = 80


def ours(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    config = TransformerConfig(**(sizes | {"position": "rotary", "max_length": LONGEST} | changes))
    return Decoder(config).eval()


def of_zoo(name):
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", TESTS / "zoo" / "decoders" / f"{name}.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    torch.manual_seed(0)
    return source.build().eval()


def exported(module, out, monkeypatch, **options):
    """The decoder's operators, and how often each pass fired on it."""
    fired, run = [], pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *given, **how: fired.append(run(*given, **how)) or fired[-1])
    export_model(module, out, max_length=LONGEST, attention=False, **options)
    return list(ir.load(out / "decoder.onnx").graph), fired[0]


def folded(nodes):
    return sum("do_rotary" in node.attributes for node in nodes if node.op_type == "GroupQueryAttention")


OURS = [({}, 2), ({"num_kv_heads": 1}, 2), ({"attention_pattern": "sliding_window", "window": 8}, 2)]


@pytest.mark.parametrize(("changes", "count"), OURS)
def test_our_own_decoders(changes, count, tmp_path, monkeypatch):
    nodes, fired = exported(ours(**changes), tmp_path / "out", monkeypatch)
    assert (fired["rotary"], fired["packed_qkv"], folded(nodes)) == (count, count, count)


def test_the_standard_flavor_has_none_of_it(tmp_path, monkeypatch):
    nodes, _ = exported(ours(), tmp_path / "out", monkeypatch, flavor="standard")
    assert {node.domain for node in nodes} == {""}


# The last number: what becomes a node for itself, of sizes that attention does not turn.
ZOO = [
    ("rotary_halves", 2, 2, 0), ("rotary_interleaved", 2, 2, 0), ("rotary_complex", 2, 2, 0),
    ("partial_rotary", 0, 0, 4), ("positions_argument", 2, 2, 0), ("shared_cache", 0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "into", "packed", "apart"), ZOO)
def test_decoders_as_people_write_them(name, into, packed, apart, tmp_path, monkeypatch):
    nodes, fired = exported(of_zoo(name), tmp_path / "out", monkeypatch)
    assert (folded(nodes), fired["packed_qkv"]) == (into, packed)
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == apart


FAMILIES = [
    ("llama", 2, 2, 0), ("gptj", 2, 2, 0), ("codegen", 2, 2, 0), ("qwen3", 2, 0, 0), ("phi3", 2, 2, 0),
    ("gpt_neox", 0, 0, 4), ("gpt2", 0, 2, 0),
]  # fmt: skip


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "into", "packed", "apart"), FAMILIES)
def test_families_of_transformers(family, into, packed, apart, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(TESTS / "families")
    build = importlib.import_module("one").build
    nodes, fired = exported(build(family), tmp_path / "out", monkeypatch)
    assert (folded(nodes), fired["packed_qkv"]) == (into, packed)
    assert fired["qk_norm"] == (2 if family == "qwen3" else 0)
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == apart


def test_the_manifest_tells_the_operators_of_each_layer_and_inspect_lists_them(tmp_path):
    out = tmp_path / "out"
    export_model(ours(num_layers=4), out, max_length=LONGEST, attention=False)
    layers = load_manifest(out).graphs["decoder"].layers
    assert [layer.count for layer in layers] == [1, 3, 1]
    nodes = list(ir.load(out / "decoder.onnx").graph)
    assert sum(layer.count * sum(layer.operators.values()) for layer in layers) == len(nodes)
    assert layers[1].operators["GroupQueryAttention"] == 1
    assert "GroupQueryAttention" not in layers[2].operators
    told = CliRunner().invoke(cli, ["inspect", str(out), "--nodes"])
    assert told.exit_code == 0
    assert f"decoder: {len(nodes)} nodes" in told.output
    assert f"  3 x {sum(layers[1].operators.values())}: " in told.output
    assert "  3 x " not in CliRunner().invoke(cli, ["inspect", str(out)]).output
