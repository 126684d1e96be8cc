"""Graphs made on the spot in the ways of other exporters, adopted; and what is written for other runtimes."""

import json

import handwritten
import numpy as np
import onnx
import pytest
import torch
from foreign import decoder as write_decoder
from foreign import describe
from onnx import TensorProto

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.errors import IncompatibleModelError, InputError, UnsafeModelError
from tfinfer.export import export_model


def made(folder, name="model.onnx", config=None, **how):
    write_decoder(folder / name, **how)
    describe(folder, **(config or {}))
    return folder


def test_a_graph_right_behind_a_past_for_one_position_alone_gets_one_at_a_time(tmp_path):
    adopted = adopt(made(tmp_path, lazy=True))
    assert adopted.manifest.appends_one
    with tfinfer.load(tmp_path) as model, tfinfer.load(adopt(made(tmp_path / "eager")).folder) as eager:
        assert not eager.manifest.appends_one
        cache = model.decoder.open_cache(1, 32)
        slot = cache.acquire()
        model.decoder.prefill(cache, slot, [3, 4, 5])
        logits = model.decoder.prefill(cache, slot, [6, 7, 8, 9], keep=3)
        other = eager.decoder.open_cache(1, 32)
        expected = eager.decoder.prefill(other, other.acquire(), [3, 4, 5, 6, 7, 8, 9], keep=3)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_sizes_that_the_graph_leaves_open_are_the_files(tmp_path):
    manifest = adopt(made(tmp_path, open_sizes=True)).manifest
    assert [(entry.num_kv_heads, entry.head_dim) for entry in manifest.cache] == [(2, 8), (2, 8)]


def test_sizes_that_nobody_says_are_asked_for(tmp_path):
    made(tmp_path, open_sizes=True)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 40, "max_position_embeddings": 64}))
    with pytest.raises(IncompatibleModelError, match=r"past_key_values\.0\.key float32 .*how many heads"):
        adopt(tmp_path)


def test_sizes_that_are_wrong_do_not_run(tmp_path):
    with pytest.raises(IncompatibleModelError, match=r"expected \(1, 4, 3, 4\).* got \(1, 2, 3, 8\)"):
        adopt(made(tmp_path, open_sizes=True, config={"num_attention_heads": 4}))


def test_logits_of_the_last_row_alone_are_enough(tmp_path):
    adopted = adopt(made(tmp_path, last_row=True))
    assert not adopted.manifest.all_rows
    assert adopted.verdict.passed
    with tfinfer.load(tmp_path) as one, tfinfer.load(adopt(made(tmp_path / "all")).folder) as other:
        prompts = [[3, 4, 5], [6]]
        ids = [[c.token_ids for c in m.generate(prompts, max_tokens=9, stop_ids=[])] for m in (one, other)]
        assert ids[0] == ids[1]


def test_a_scalar_that_says_how_many_logits_is_fed_at_every_step(tmp_path):
    adopted = adopt(made(tmp_path, keep=True))
    assert adopted.manifest.roles.logits_to_keep == "num_logits_to_keep"
    with tfinfer.load(tmp_path) as model:
        cache = model.decoder.open_cache(1, 32)
        slot = cache.acquire()
        assert model.decoder.prefill(cache, slot, [3, 4, 5, 6], keep=2).shape == (2, 40)
        assert model.decoder.step(cache, [slot], [7]).shape == (1, 40)


def test_half_width_graphs_give_their_logits_as_float32(tmp_path):
    made(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    graph = model.graph
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        kind.elem_type = TensorProto.FLOAT16 if kind.elem_type == TensorProto.FLOAT else kind.elem_type
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.maximum(array, -1e4).astype(np.float16), tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    adopted = adopt(tmp_path)
    assert adopted.manifest.dtype == "float16"
    assert adopted.manifest.cache[0].dtype == "float16"
    with tfinfer.load(tmp_path) as half, tfinfer.load(adopt(made(tmp_path / "float")).folder) as whole:
        logits = [m.generate([3, 4, 5], max_tokens=1, logprobs=5, stop_ids=[]).logprobs[0] for m in (half, whole)]
    assert abs(logits[0].logprob - logits[1].logprob) < 0.05


def test_a_graph_whose_cache_is_wrong_is_refused_and_nothing_is_written(tmp_path):
    made(tmp_path, wrong=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(IncompatibleModelError, match=r"with its cache as without(.|\n)*FAILED"):
        adopt(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    adopted = adopt(tmp_path, proof=False)
    assert adopted.manifest.proof.golden is None
    assert "not proved" in adopted.manifest.proof.not_run


def test_unknown_inputs_are_listed_with_their_shapes(tmp_path):
    extra = (("past_conv.0", TensorProto.FLOAT, ["batch", 16, 3]), ("pixel_values", TensorProto.FLOAT, ["n", 3, 8, 8]))
    with pytest.raises(IncompatibleModelError) as refused:
        adopt(made(tmp_path, extra=extra))
    assert "past_conv.0 float32 (batch, 16, 3), pixel_values float32 (n, 3, 8, 8)" in str(refused.value)


def test_a_type_that_no_manifest_has_is_named(tmp_path):
    with pytest.raises(IncompatibleModelError, match=r"odd is a tensor\(double\)"):
        adopt(made(tmp_path, extra=(("odd", TensorProto.DOUBLE, ["n"]),)))


def test_an_encoder_with_an_input_that_no_part_is_known_for_lists_it(tmp_path):
    made(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    for value in model.graph.input:
        value.name = value.name.replace("past_key_values", "memory")
    for node in model.graph.node:
        node.input[:] = [name.replace("past_key_values", "memory") for name in node.input]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(IncompatibleModelError, match=r"takes no past.*position_ids int64.*memory\.0\.key"):
        adopt(tmp_path)


def test_weights_outside_the_folder_are_refused_before_they_are_read(tmp_path):
    made(tmp_path / "model", external=True)
    model = onnx.load(tmp_path / "model" / "model.onnx", load_external_data=False)
    (tmp_path / "model" / "model.onnx_data").rename(tmp_path / "outside")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside"
    (tmp_path / "model" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeModelError, match="no file beside it"):
        adopt(tmp_path / "model")


def test_rounded_activations_are_measured_by_direction(tmp_path):
    """Dynamic quantisation rounds by what runs beside: the numbers of a step are not those of the whole pass."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made(tmp_path, "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "model.onnx", weight_type=QuantType.QUInt8)
    try:
        adopted = adopt(tmp_path)
    except IncompatibleModelError as refused:
        assert "1 - cosine" in str(refused)  # noqa: PT017
        adopted = adopt(tmp_path, proof=False)
    assert not adopted.manifest.proof.strict
    with tfinfer.load(tmp_path) as model:
        assert len(model.generate([3, 4, 5], max_tokens=5, stop_ids=[]).token_ids) == 5


# -- what is written for others -----------------------------------------------------------------------------------
def test_genai_config_says_the_graphs_own_sizes_and_is_hashed(tmp_path):
    report = export_model(handwritten.Rotary(), tmp_path / "out", max_length=48, also=["genai", "optimum"])
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    decoder, entry = config["model"]["decoder"], report.manifest.cache[0]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (entry.head_dim, entry.num_kv_heads)
    assert (decoder["filename"], config["model"]["context_length"]) == ("decoder.onnx", 48)
    names = {value.name for value in report.manifest.graphs["decoder"].inputs}
    assert {decoder["inputs"]["past_key_names"].replace("%d", "0"), decoder["inputs"]["input_ids"]} <= names
    assert config["search"]["past_present_share_buffer"] is True
    assert {"genai_config.json", "config.json"} <= set(report.manifest.files)
    tfinfer.load(tmp_path / "out").close()


def test_without_being_asked_nothing_is_written_for_others(tmp_path):
    export_model(handwritten.Rotary(), tmp_path / "out", max_length=48)
    assert not (tmp_path / "out" / "genai_config.json").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_unknown_neighbours_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected one of genai, optimum"):
        export_model(handwritten.Rotary(), tmp_path / "out", also=["vllm"])


def test_a_cache_of_a_fixed_size_is_not_written_for_optimum(tmp_path):
    with pytest.raises(InputError, match="wants a cache that grows"):
        export_model(handwritten.Rotary(), tmp_path / "out", max_length=48, flavor="standard", also=["optimum"])
    assert not (tmp_path / "out").exists()


class Encoder(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.words = name, torch.nn.Embedding(30, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)

    def forward(self, input_ids, attention_mask):
        return {self.name: self.layer(self.words(input_ids), src_key_padding_mask=attention_mask == 0)}


def test_an_encoder_is_no_decoder_for_genai_and_needs_the_output_that_optimum_reads(tmp_path):
    with pytest.raises(InputError, match="expected a decoder, this is an encoder"):
        export_model(Encoder("last_hidden_state"), tmp_path / "out", also=["genai"], kind="encoder")
    with pytest.raises(InputError, match=r'return \{"last_hidden_state"'):
        export_model(Encoder("vectors"), tmp_path / "out", also=["optimum"], kind="encoder")
    export_model(Encoder("last_hidden_state"), tmp_path / "out", also=["optimum"], max_length=32, kind="encoder")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (16, 30)
