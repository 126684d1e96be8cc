"""What an export makes, what it leaves alone, and that its proof can fail."""

import hashlib
import json

import handwritten
import numpy as np
import onnx
import pytest
import torch

import tfinfer
from tfinfer.errors import InputError, ProofError, TargetError
from tfinfer.export import export_model
from tfinfer.export.capture.follow import Follower
from tfinfer.manifest import load_manifest
from tfinfer.proof.prove import verify_folder


def test_a_folder_holds_what_its_manifest_says_and_nothing_else(tmp_path):
    report = export_model(handwritten.Learned(), tmp_path / "out")
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"decoder.onnx", "attention.onnx", "weights.bin", "golden.npz", "tfinfer.json"}
    manifest = load_manifest(tmp_path / "out")
    assert manifest == report.manifest
    assert set(manifest.files) == files - {"tfinfer.json"}
    for name, spec in manifest.files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == spec.sha256
    assert {case.name for case in manifest.proof.cases} >= {"one token", "uneven pieces", "the longest length"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_manifest_tells_no_path_of_the_machine(tmp_path):
    export_model(handwritten.Learned(), tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "tfinfer.json").read_text()


def test_the_graph_passes_the_checker_and_has_the_opset_it_says(tmp_path):
    report = export_model(handwritten.OddHeads(), tmp_path / "out", max_length=96)
    onnx.checker.check_model(str(tmp_path / "out" / "decoder.onnx"))
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    assert {o.domain: o.version for o in graph.opset_import} == report.manifest.graphs["decoder"].opset
    assert graph.ir_version <= 10


@pytest.mark.parametrize(
    ("name", "least"), [("Learned", "1.24"), ("WeightsTwice", "1.25"), ("SoftCap", "1.24"), ("OddHeads", "1.28")]
)
def test_the_least_runtime_is_that_of_the_newest_operator(tmp_path, name, least):
    """Measured by running folders on every release from 1.20: older ones refuse, or compute wrong numbers."""
    report = export_model(handwritten.MODULES[name](), tmp_path / "out", max_length=96)
    assert report.manifest.requires == {"onnxruntime": least}


def test_weights_are_stored_once_even_where_they_are_tied(tmp_path):
    module = handwritten.Rotary()
    module.head.weight = module.tokens.weight
    export_model(module, tmp_path / "out", max_length=96)
    size = (tmp_path / "out" / "weights.bin").stat().st_size
    needed = (
        4 * sum(p.numel() for p in module.parameters()) + 4 * module.tokens.weight.numel()
    )  # the head lies transposed
    assert size < needed + 64 * 1024


def test_a_live_module_is_left_as_it_was(tmp_path):
    module = handwritten.Learned().train()
    module.ffn[0].eval()
    modes = [part.training for part in module.modules()]
    before = {name: p.clone() for name, p in module.state_dict().items()}
    export_model(module, tmp_path / "out")
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[name], p) for name, p in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    export_model(handwritten.Learned(), tmp_path / "out")
    before = (tmp_path / "out" / "tfinfer.json").read_bytes()
    with pytest.raises(TargetError, match="--overwrite"):
        export_model(handwritten.Tril(), tmp_path / "out")
    assert (tmp_path / "out" / "tfinfer.json").read_bytes() == before
    export_model(handwritten.Tril(), tmp_path / "out", overwrite=True)
    assert load_manifest(tmp_path / "out").source.reference == "Tril"
    with tfinfer.load(tmp_path / "out") as model:
        model.generate([1], max_tokens=2)


def test_a_folder_that_is_no_export_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match="left alone"):
        export_model(handwritten.Learned(), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "fp8"),
        ({"flavor": "vanilla"}, "vanilla"),
        ({"kind": "oracle"}, "oracle"),
        ({"max_length": 1}, "at least 2"),
        ({"max_length": 7.5}, "max_length"),
    ],
)
def test_unknown_options_are_refused_before_anything_runs(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        export_model(handwritten.Learned(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def _scaled(monkeypatch, factor):
    """Damage one weight of the graph, not of the module."""
    whole = Follower.parameter

    def damaged(self, node, transposed=False):
        value = whole(self, node, transposed)
        if value.name == "head.weight":
            tensor = self.constant(node)
            tensor = tensor.t() if transposed else tensor
            return self.emit.weight((tensor * factor).contiguous(), "damaged")
        return value

    monkeypatch.setattr(Follower, "parameter", damaged)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch, dtype):
    """The proof fails, says which case and by how much, and leaves nothing behind."""
    _scaled(monkeypatch, 1.01)
    with pytest.raises(ProofError) as caught:
        export_model(handwritten.Learned(), tmp_path / "out", dtype=dtype)
    assert "one token: max |difference|" in str(caught.value)
    assert "FAILED at position" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export_model(handwritten.Learned(), tmp_path / "out")


def test_a_graph_that_onnxruntime_cannot_run_is_a_failed_proof(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise InputError("the graph cannot compute the tokens given: Got invalid dimensions for output")

    monkeypatch.setattr("tfinfer.proof.prove.compare_case", fails)
    with pytest.raises(ProofError, match=r"does not run; nothing was written: .* Got invalid dimensions"):
        export_model(handwritten.Learned(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_proof_leaves_an_old_folder_whole(tmp_path, monkeypatch):
    export_model(handwritten.Learned(), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    _scaled(monkeypatch, 2.0)
    with pytest.raises(ProofError):
        export_model(handwritten.Learned(), tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["Rotary", "Tril", "OddHeads", "SoftCap"])
def test_float16_is_measured_where_it_runs(tmp_path, name):
    report = export_model(handwritten.MODULES[name](), tmp_path / "out", dtype="fp16", max_length=96)
    strict, narrow = report.verdicts
    assert (strict.dtype, narrow.dtype) == ("float32", "float16")
    assert narrow.passed
    assert {entry.dtype for entry in report.manifest.cache} == {"float16"}
    assert report.manifest.proof.cases[0].measure == "1 - cosine"
    half_size = report.manifest.files["weights.bin"].bytes
    whole = export_model(handwritten.MODULES[name](), tmp_path / "fp32", max_length=96).manifest
    assert half_size < 0.6 * whole.files["weights.bin"].bytes
    with tfinfer.load(tmp_path / "out") as model:
        assert verify_folder(model.decoder, tmp_path / "out").passed
        together = model.generate([[1, 2, 3], [4]], max_tokens=8)
        assert together[0].token_ids == model.generate([1, 2, 3], max_tokens=8).token_ids


def test_bfloat16_says_that_no_device_here_ran_it(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device runs bfloat16")
    report = export_model(handwritten.Rotary(), tmp_path / "out", dtype="bf16", max_length=96)
    assert len(report.verdicts) == 1
    assert "not run as bfloat16" in report.manifest.proof.not_run
    assert str(tmp_path) not in report.manifest.proof.not_run
    assert {entry.dtype for entry in report.manifest.cache} == {"bfloat16"}


def test_the_golden_file_holds_pytorchs_logits_not_ours(tmp_path):
    """`tfinfer verify` would prove nothing if the expected values came from the graph."""
    module = handwritten.Learned()
    export_model(module, tmp_path / "out")
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        cases = json.loads(golden["cases"].tobytes())
        number = next(i for i, case in enumerate(cases) if case["name"] == "a prompt at once")
        ids = torch.from_numpy(golden[f"sequence_{number}_0"])
        with torch.no_grad():
            expected = module.eval()(ids[None])[0].numpy()
        positions = [row[3] for row in cases[number]["rows"]]
        assert np.array_equal(golden[f"logits_{number}"], expected[positions])


def test_a_damaged_weight_is_caught_by_the_folders_own_proof(tmp_path):
    """Somebody replaces the weights and their hash: only the numbers can tell."""
    export_model(handwritten.Learned(), tmp_path / "out")
    weights = np.fromfile(tmp_path / "out" / "weights.bin", np.float32)
    weights[:2000] *= 1.1
    weights.tofile(tmp_path / "out" / "weights.bin")
    with tfinfer.load(tmp_path / "out", check_hashes=False) as model:
        assert not verify_folder(model.decoder, tmp_path / "out").passed


def test_a_shorter_length_than_the_models_own_is_told(tmp_path):
    report = export_model(handwritten.Tril(), tmp_path / "out", max_length=50)
    assert report.manifest.max_length == 50
    assert "up to 50 of the model's own 96 tokens" in report.notes[0]
    assert not export_model(handwritten.Tril(), tmp_path / "whole").notes


def test_an_export_leaves_the_random_numbers_of_its_caller_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    module = handwritten.Learned()
    torch.manual_seed(3)
    export_model(module, tmp_path / "out")
    assert torch.equal(torch.rand(2), expected)


def test_progress_names_the_stages(tmp_path):
    stages = []
    report = export_model(handwritten.Learned(), tmp_path / "out", progress=stages.append)
    assert [s for s in stages if ":" not in s] == ["capture", "passes", "write", "proof", "seal"]
    assert set(report.seconds) == {"capture", "passes", "write", "proof", "seal"}
