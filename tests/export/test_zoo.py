"""What is read in a decoder and written of it: operators, entries, axes, lengths. The zoo: test_zoo_decoders.py."""

import handwritten
import numpy as np
import onnx
import pytest
import torch

import tfinfer
from tfinfer.export import export_model

GQA, STANDARD, PLAIN = "GroupQueryAttention", "Attention", "the module's own operators"
# module -> operator, pattern, key/value heads, head size, longest length, all rows have logits
EXPECTED = {
    "Learned": (GQA, "causal", 3, 16, 96, True),
    "LastOnly": (GQA, "causal", 3, 16, 96, False),
    "Tril": (GQA, "causal", 3, 16, 96, True),
    "Alibi": (GQA, "causal, a bias by distance", 3, 16, 200, True),
    "Window": (GQA, "causal, window 5", 3, 16, 96, True),
    "Chunked": (GQA, "causal, a table", 3, 16, 96, True),
    "Rotary": (GQA, "causal", 2, 16, 200, True),
    "OneKeyHead": (GQA, "causal", 1, 16, 200, True),
    "OddHeads": (STANDARD, "causal", 2, 10, 200, True),
    "ComplexRotary": (GQA, "causal", 2, 16, 200, True),
    "SoftCap": (GQA, "causal, soft cap 5", 3, 16, 96, True),
    "WeightsTwice": (PLAIN, "as written", 3, 16, 96, True),
}
UNBOUNDED = {name for name, row in EXPECTED.items() if row[4] == 200}


def logits(module, ids):
    """The module's own last row of logits."""
    with torch.no_grad():
        out = module.eval()(torch.tensor([ids]))
    return out.reshape(-1, handwritten.VOCAB)[-1]


def greedy(module, ids, count):
    """Greedy tokens by full passes; the reference knows nothing of the exporter."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(module, ids).argmax()))
    return tuple(ids[-count:])


def test_every_module_of_the_zoo_is_expected_to_be_something():
    assert set(EXPECTED) == set(handwritten.MODULES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_module_gets_its_cache_and_computes_the_same(name, tmp_path):
    operator, pattern, heads, dim, longest, all_rows = EXPECTED[name]
    module = handwritten.MODULES[name]()
    report = export_model(module, tmp_path / "out", max_length=200 if name in UNBOUNDED else None)
    manifest = report.manifest
    assert [(a.operator, a.pattern, a.count) for a in manifest.attention] == [(operator, pattern, 2)]
    assert {(e.num_kv_heads, e.head_dim) for e in manifest.cache} == {(heads, dim)}
    assert len(manifest.cache) == 4
    assert (manifest.max_length, manifest.all_rows) == (longest, all_rows)
    assert bool(report.notes) == (operator != GQA)
    assert report.verdicts[0].greedy.identical == 64
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, handwritten.VOCAB, n).tolist() for n in (1, 17, 6)]
    with tfinfer.load(tmp_path / "out") as model:
        together = model.generate(prompts, max_tokens=20)
    assert [c.token_ids for c in together] == [greedy(module, p, 20) for p in prompts]


@pytest.mark.parametrize("name", ["Tril", "Alibi", "Window", "Chunked", "Rotary", "OneKeyHead", "SoftCap", "LastOnly"])
def test_the_standard_flavor_uses_no_operator_of_one_runtime(name, tmp_path):
    module = handwritten.MODULES[name]()
    report = export_model(module, tmp_path / "out", max_length=96, flavor="standard")
    assert {a.operator for a in report.manifest.attention} == {STANDARD}
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 24)]
    with tfinfer.load(tmp_path / "out") as model:
        together = model.generate([[5], [1, 2, 3, 4]], max_tokens=12)
    assert [c.token_ids for c in together] == [greedy(module, p, 12) for p in ([5], [1, 2, 3, 4])]


@pytest.mark.parametrize("name", ["Learned", "Rotary", "SoftCap", "OddHeads"])
def test_the_axes_of_the_file_are_really_symbolic(name, tmp_path):
    export_model(handwritten.MODULES[name](), tmp_path / "out", max_length=96)
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes["input_ids"] == ["batch", "seq"]
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["past_key_values.0.key"][0::2] == ["batch", "length"]
    outputs = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output}
    assert outputs["logits"] == ["batch", "kept", handwritten.VOCAB]
    assert outputs["present.1.value"] == axes["past_key_values.1.value"]


def test_key_heads_are_cached_before_they_are_repeated_and_nothing_is_transposed(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", max_length=96)
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    counts = {
        op: sum(node.op_type == op for node in graph.node) for op in ("Transpose", "Expand", "GroupQueryAttention")
    }
    assert counts == {"Transpose": 0, "Expand": 0, "GroupQueryAttention": 2}


def test_only_the_wanted_rows_reach_the_head(tmp_path):
    """The cut may stand further up, before the last feed-forward block: behind it no attention is left."""
    export_model(handwritten.Learned(), tmp_path / "out", max_length=96)
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    source = {output: node for node in graph.node for output in node.output}
    todo, cuts = ["logits"], 0
    while todo:
        node = source.get(todo.pop())
        if node is None:
            continue
        assert "Attention" not in node.op_type
        if node.op_type == "Slice":
            cuts += 1
        else:
            todo += node.input
    assert cuts
