"""Which passes fire on whole models: our own modules, checkpoints of transformers, modules written by hand."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

import onnxruntime as ort  # noqa: E402

from tfinfer.export import export_model  # noqa: E402
from tfinfer.export.capture import capture  # noqa: E402
from tfinfer.export.modules import Decoder, TransformerConfig, gpt_config  # noqa: E402
from tfinfer.export.operators import layers_of  # noqa: E402
from tfinfer.export.passes import half, pipeline  # noqa: E402
from tfinfer.manifest import load_manifest  # noqa: E402

TESTS = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 61, "hidden_size": 48, "num_layers": 2, "num_heads": 3, "intermediate_size": 96, "max_length": 96,
}  # fmt: skip


def llama():
    kinds = {"activation": "swiglu", "norm": "rms_norm", "norm_position": "pre", "position": "rotary"}
    return Decoder(TransformerConfig(**SIZES, **kinds, attention_bias=False, ffn_bias=False))


def gpt():
    return Decoder(gpt_config(**SIZES))


def checkpoint(family):
    pytest.importorskip("transformers")
    sys.path.insert(0, str(TESTS / "families"))
    try:
        from one import build
    finally:
        sys.path.remove(str(TESTS / "families"))
    model = build(family)
    model.config.use_cache = False
    return model


def by_hand(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / "zoo" / "decoders" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()


# Two layers each: four norms and the last, two activations. How often passes fire in both widths, in float32 alone and
# in half width alone, and how many operators the second layer has in float32.
ROWS, RMS = {"wanted_rows": 1}, {"rms_norm": 5, "activations": 2}
SKIPS, SUMS = {"skip_norm": 4, "long_sum": 0}, {"skip_norm": 0, "long_sum": 4}
GATED, PLAIN = {"packed_gate_up": 2}, {"packed_gate_up": 0}
FIRED = {
    "llama": (llama, ROWS | RMS | GATED, SKIPS, {"skip_norm": 4}, 10),
    "gpt": (gpt, ROWS | {"rms_norm": 0, "activations": 2} | PLAIN, SUMS, {"skip_norm": 5}, 11),
    "rotary_halves": (lambda: by_hand("rotary_halves"), ROWS | RMS | PLAIN, SKIPS, {"skip_norm": 4}, 9),
    "nanogpt": (
        lambda: by_hand("nanogpt"),
        ROWS | {"rms_norm": 0, "activations": 0} | PLAIN, {"skip_norm": 0, "long_sum": 0}, {"skip_norm": 5}, 10,
    ),
    "norms_by_hand": (
        lambda: by_hand("norms_by_hand"),
        ROWS | {"rms_norm": 3, "activations": 0} | PLAIN, {"skip_norm": 1, "long_sum": 4}, {"skip_norm": 3}, 14,
    ),
    "checkpoint of llama": (lambda: checkpoint("llama"), ROWS | RMS | GATED, SKIPS, {"skip_norm": 4}, 10),
    "checkpoint of gpt2": (
        lambda: checkpoint("gpt2"),
        ROWS | {"rms_norm": 0, "activations": 4} | PLAIN, SUMS, {"skip_norm": 5}, 11,
    ),
    "checkpoint of qwen3": (  # with norms of queries and keys
        lambda: checkpoint("qwen3"),
        ROWS | {"rms_norm": 9, "activations": 2} | GATED, SKIPS, {"skip_norm": 4}, 15,
    ),
}  # fmt: skip


def marked(name):
    return pytest.param(name, marks=[pytest.mark.hf] if name.startswith("checkpoint") else [])


def fed(model):
    """Two rows of six tokens into an empty cache, and the last two rows of logits wanted."""
    feeds = {}
    for value in model.graph.inputs:
        shape = [n if isinstance(n, int) else {"batch": 2, "seq": 6, "total": 6}.get(n.value, 8) for n in value.shape]
        feeds[value.name] = np.zeros(shape, value.dtype.numpy())
    feeds["input_ids"] += np.random.default_rng(0).integers(3, 60, (2, 6))
    feeds["attention_mask"] += 1
    feeds |= {"position_ids": np.arange(6)[None].repeat(2, 0)} if "position_ids" in feeds else {}
    return feeds | ({"logits_to_keep": np.array([2])} if "logits_to_keep" in feeds else {})


def logits(model):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(["logits"], fed(model))[0]


@pytest.mark.parametrize("name", [marked(name) for name in FIRED])
def test_every_pass_fires_where_it_should_and_the_logits_stay(name):
    build, always, wide, narrow, operators = FIRED[name]
    module = build().eval()
    model = capture(module, max_length=64).model
    before = logits(model)
    counts = pipeline.run(model)
    assert {key: counts[key] for key in always | wide} == always | wide
    assert sum(layers_of(model.graph)[1].operators.values()) == operators
    np.testing.assert_allclose(logits(model), before, rtol=1e-4, atol=1e-5)

    model = capture(module, max_length=64).model
    counts = pipeline.run(model, narrow=True)
    assert {key: counts[key] for key in always | narrow} == always | narrow
    np.testing.assert_allclose(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt])
def test_a_standard_graph_stays_one(build):
    model = capture(build().eval(), max_length=64, flavor="standard").model
    pipeline.run(model, "standard", narrow=True)
    operators = Counter(node.op_type for node in model.graph)
    assert {node.domain for node in model.graph} == {""}
    assert operators["RMSNormalization"] + operators["LayerNormalization"] == 5
    assert not {"SimplifiedLayerNormalization", "QuickGelu", "FastGelu"} & set(operators)


def test_norms_of_half_width_are_fused_whole_and_need_a_newer_runtime(tmp_path):
    export_model(llama(), tmp_path / "out", dtype="fp16")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.requires == {"onnxruntime": "1.30"}
    model = ir.load(tmp_path / "out" / "decoder.onnx")
    operators = Counter(node.op_type for node in model.graph)
    assert (operators["SkipSimplifiedLayerNormalization"], operators["SimplifiedLayerNormalization"]) == (4, 1)
    assert operators["Cast"] == 3  # of lengths, and of the logits


def test_norms_of_float32_are_fused_whole_and_need_no_newer_runtime(tmp_path):
    export_model(llama(), tmp_path / "out")
    assert load_manifest(tmp_path / "out").requires == {"onnxruntime": "1.24"}
    operators = Counter(node.op_type for node in ir.load(tmp_path / "out" / "decoder.onnx").graph)
    assert (operators["SkipSimplifiedLayerNormalization"], operators["SimplifiedLayerNormalization"]) == (4, 1)


def test_norms_are_narrow_outside_for_bfloat16_as_well():
    model = capture(llama().eval(), max_length=64).model
    pipeline.run(model, narrow=True)
    half.run(model, ir.DataType.BFLOAT16)
    norms = [node for node in model.graph if node.op_type.endswith("LayerNormalization")]
    assert {node.inputs[-1].dtype for node in norms} == {ir.DataType.BFLOAT16}
