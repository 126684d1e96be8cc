"""Text to calibrate on, and the values inside a graph while it runs on it."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tfinfer.errors import InputError
from tfinfer.export import export_model
from tfinfer.export.calibration import Calibration, hessians, random_ids, read_text, samples, values, watch, write_text
from tfinfer.export.modules import Decoder, Encoder, TransformerConfig
from tfinfer.manifest import load_manifest
from tfinfer.proof.prove import open_session

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}


def decoder(**changes):
    torch.manual_seed(0)
    kinds = {"position": "rotary", "norm": "rms_norm", "activation": "swiglu", "max_length": 48}
    return Decoder(TransformerConfig(**(SIZES | kinds | changes))).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "out"
    export_model(decoder(), out, attention=False)
    return out


def tokenizer(words=50, special=True):
    vocabulary = {"[BOS]": 0, "[EOS]": 1, "?": 2} | {f"w{i}": i + 3 for i in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing("[BOS] $A [EOS]", None, [("[BOS]", 0), ("[EOS]", 1)])
    return made.to_str().encode()


def text_file(tmp_path, words):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words), encoding="utf-8")
    return file


# -- the text -------------------------------------------------------------------------------------------------------
def test_a_text_is_cut_in_pieces_with_special_tokens_around_each(tmp_path):
    file = text_file(tmp_path, [f"w{i % 50}" for i in range(100)])
    found = read_text(file, tokenizer(), 42, 60)
    assert [piece.shape for piece in found.pieces] == [(1, 42), (1, 42), (1, 22)]
    assert found.pieces[1][0].tolist() == [0, *(3 + (i % 50) for i in range(40, 80)), 1]
    assert (found.tokens, found.origin) == (106, "text.txt")
    plain = read_text(file, tokenizer(special=False), 42, 60)
    assert plain.pieces[0][0].tolist() == [3 + i for i in range(42)]


def test_of_a_long_text_pieces_are_taken_evenly_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MOST_PIECES", 3)
    file = text_file(tmp_path, [f"w{i}" for i in range(50)])
    found = read_text(file, tokenizer(special=False), 10, 60)
    assert [piece[0, 0] for piece in found.pieces] == [3, 23, 43]
    monkeypatch.setattr(samples, "MOST_CHARACTERS", 11)  # "w0 w1 w2 w3"
    assert read_text(file, tokenizer(special=False), 10, 60).tokens == 4


@pytest.mark.parametrize(
    ("content", "given", "words"),
    [
        (None, tokenizer(), "expected a text file to calibrate on: No such file"),
        (b"", tokenizer(), "expected a text of several tokens to calibrate on, got 0"),
        (b"w1", tokenizer(special=False), "several tokens to calibrate on, got 1"),
        (b"caf\xe9", tokenizer(), "expected plain text in UTF-8"),
        (b"w1 w2", None, "needs a tokenizer, and the source has none: give --tokenizer"),
        (b"w69", tokenizer(70), "the tokenizer makes id 72 of it, but the model knows 60"),
    ],
)
def test_text_that_nothing_can_be_calibrated_on_is_refused(content, given, words, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_text(file, given, 48, 60)


def test_a_text_stays_within_what_the_model_and_memory_hold(tmp_path):
    file = text_file(tmp_path, [f"w{i % 50}" for i in range(300)])
    assert [piece.shape for piece in read_text(file, tokenizer(), 1000, 53).pieces] == [(1, 256), (1, 48)]
    with pytest.raises(InputError, match="the tokenizer makes id 52 of it, but the model knows 52"):
        read_text(file, tokenizer(), 1000, 52)
    assert read_text(file, tokenizer(), 3, 53).pieces[0].shape == (1, 3)
    with pytest.raises(InputError, match="longest length, 2, has no room for text"):
        read_text(file, tokenizer(), 2, 53)


def test_random_ids_are_the_same_each_time():
    np.testing.assert_array_equal(random_ids(60, 2, 9).pieces, random_ids(60, 2, 9).pieces)


def test_a_model_writes_the_same_text_for_the_same_seed(folder):
    session = open_session(load_manifest(folder), folder)
    try:
        one, same, other = (write_text(session, 3, 20, seed) for seed in (5, 5, 6))
        longer = write_text(session, 2, 100)
    finally:
        session.close()
    assert [piece.shape for piece in one.pieces] == [(1, 20)] * 3
    assert [piece.shape for piece in longer.pieces] == [(1, 48)] * 2  # the model's longest length
    np.testing.assert_array_equal(one.pieces, same.pieces)
    assert (np.array(one.pieces) != np.array(other.pieces)).any()


def test_an_export_has_one_text_for_weights_and_cache(folder, tmp_path):
    made = Calibration(None)
    text = made.ids(load_manifest(folder), folder)
    assert made.ids(load_manifest(folder), tmp_path / "where no graph is") is text
    named = read_text(text_file(tmp_path, ["w1", "w2"]), tokenizer(), 42, 60)
    assert Calibration(named).ids(load_manifest(folder), folder) is named


def test_what_a_model_writes_has_the_chances_of_its_logits():
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)).repeat(4000, 0)
    drawn = samples._drawn(logits, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.2], atol=0.03)


# -- the values -----------------------------------------------------------------------------------------------------
def watched(folder, names, pieces):
    found = {name: [] for name in names}
    watch(load_manifest(folder), folder, names, pieces, lambda name, array: found[name].append(array.copy()))
    return found


def inputs_of_products(folder):
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [(n.input[0], n.input[1]) for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def test_inputs_of_products_are_those_that_the_module_gives_its_layers(folder):
    """The last layer's too, whose end takes only the rows that are asked for."""
    module, given = decoder(), {}
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in linears.items():
        layer.register_forward_hook(lambda _, args, out, name=name: given.update({name: args[0].detach()}))
    pieces = random_ids(60, 1, 24).pieces
    with torch.no_grad():
        module(torch.from_numpy(pieces[0]))
    pairs = inputs_of_products(folder)
    found = watched(folder, [name for name, _ in pairs], pieces)
    model, matched = onnx.load(folder / "decoder.onnx"), []
    matrices = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for value, weight in pairs:
        for name in within(matrices[weight], linears):
            np.testing.assert_allclose(found[value][0], given[name], atol=1e-4)
            matched.append(name)
    assert sorted(matched) == sorted(linears.keys() - {"head"})  # whose matrix is the embedding's
    assert len(pairs) == 12  # gate and up are one product


def within(matrix, linears):
    """The names of the layers whose weights are side by side in a matrix."""
    parts = {name: layer.weight.detach().numpy().T for name, layer in linears.items()}
    return [
        name for name, part in parts.items() for at in range(0, matrix.shape[1], part.shape[1])
        if np.array_equal(matrix[:, at : at + part.shape[1]], part)
    ]  # fmt: skip


def test_presents_come_without_the_room_for_more_and_the_folder_is_as_it_was(folder):
    before = sorted(folder.iterdir())
    manifest = load_manifest(folder)
    names = [name for entry in manifest.cache for name in (entry.past, entry.present)]
    presents = [name for name in names if "present" in name]
    found = watched(folder, presents, random_ids(60, 2, 11).pieces)
    shapes = {array.shape for arrays in found.values() for array in arrays}
    assert shapes == {(1, manifest.cache[0].num_kv_heads, 11, manifest.cache[0].head_dim)}
    assert [len(arrays) for arrays in found.values()] == [2] * len(presents)
    assert found[presents[0]][0][0, :, -1].any()
    assert sorted(folder.iterdir()) == before
    assert not [path for path in before if path.name.endswith(values.WATCHED)]  # of another test


def test_inputs_of_a_graph_are_values_too(folder):
    pieces = random_ids(60, 1, 7).pieces
    np.testing.assert_array_equal(watched(folder, ["input_ids"], pieces)["input_ids"][0], pieces[0])


def test_values_come_a_few_at_a_time_and_are_the_same(folder, monkeypatch):
    names = [name for name, _ in inputs_of_products(folder)]
    pieces = random_ids(60, 2, 9).pieces
    together = watched(folder, names, pieces)
    monkeypatch.setattr(values, "AT_ONCE", 2)
    for name, arrays in watched(folder, names, pieces).items():
        np.testing.assert_array_equal(arrays, together[name])


@pytest.mark.parametrize("most", [0, 1, 2, 3, 100])
def test_sums_of_products_are_made_of_as_many_inputs_at_once_as_memory_allows(folder, most, monkeypatch):
    pieces = [*random_ids(60, 2, 9).pieces, *random_ids(60, 1, 5).pieces]
    seen = watched(folder, list(dict.fromkeys(name for name, _ in inputs_of_products(folder))), pieces)
    names = [name for name in seen if seen[name][0].shape[-1] == 32][:5]
    monkeypatch.setattr(hessians, "MOST_BYTES", most * 4 * 32**2)
    groups = list(hessians.inputs_of(load_manifest(folder), folder, dict.fromkeys(names, 32), pieces))
    assert [len(group) for group in groups] == {0: [1] * 5, 1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 100: [5]}[most]
    found = {name: inputs for group in groups for name, inputs in group.items()}
    assert list(found) == names
    for name, inputs in found.items():
        rows = np.concatenate([array.reshape(-1, array.shape[-1]) for array in seen[name]])
        assert inputs.count == len(rows) == 2 * 9 + 5
        np.testing.assert_allclose(inputs.hessian, rows.T @ rows, rtol=1e-3, atol=1e-4)


def test_an_encoder_is_watched_too(tmp_path):
    torch.manual_seed(0)
    module = Encoder(TransformerConfig(**SIZES, max_length=32)).eval()
    export_model(module, tmp_path / "out")
    pieces = random_ids(60, 1, 7).pieces
    found = watched(tmp_path / "out", ["hidden_states"], pieces)
    with torch.no_grad():
        expected = module(torch.from_numpy(pieces[0]))
    np.testing.assert_allclose(found["hidden_states"][0], expected, atol=1e-4)


def test_names_that_a_graph_does_not_have_are_refused_and_the_next_call_works(folder):
    pieces = random_ids(60, 1, 5).pieces
    with pytest.raises(InputError, match=r"the graph has no value no\.such"):
        watched(folder, ["no.such"], pieces)
    assert watched(folder, ["logits"], pieces)["logits"][0].shape == (1, 5, 60)


def test_two_graphs_are_refused(folder):
    both = SimpleNamespace(kind="encoder-decoder", graphs={"encoder": None, "decoder": None})
    with pytest.raises(InputError, match="for decoders and encoders, not for an encoder-decoder"):
        watch(both, folder, ["logits"], random_ids(60, 1, 5).pieces, lambda name, array: None)
