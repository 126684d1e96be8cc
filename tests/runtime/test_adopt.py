"""Folders of other exporters, adopted: what is read, what is refused, and what then runs. No torch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.adopt.decoder import whole
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import (
    CorruptModelError,
    IncompatibleModelError,
    InputError,
    LengthError,
    ManifestError,
    TargetError,
    UnsafeModelError,
)
from tfinfer.manifest import load_manifest

HERE = Path(__file__).parent


@pytest.fixture
def foreign(tmp_path):
    """A concatenating decoder in the layout of transformers.js (see tests/zoo/foreign.py)."""
    return Path(shutil.copytree(HERE / "tiny_foreign", tmp_path / "foreign"))


@pytest.fixture
def in_place(copied):
    """Our own decoder as if another exporter had made it: a graph that writes its cache in place."""
    (copied / "tfinfer.json").unlink()
    (copied / "golden.npz").unlink()
    vocabulary = load_manifest(HERE / "tiny").vocab_size
    (copied / "config.json").write_text(json.dumps({"vocab_size": vocabulary, "max_position_embeddings": 96}))
    return copied


@pytest.fixture(scope="module")
def adopted(tmp_path_factory):
    """The concatenating decoder, adopted and loaded."""
    folder = Path(shutil.copytree(HERE / "tiny_foreign", tmp_path_factory.mktemp("adopted") / "foreign"))
    adopt(folder)
    with tfinfer.load(folder, threads=1) as model:
        yield model


def greedy(decoder, prompt, count):
    """Tokens chosen by whole passes alone."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(whole(decoder, np.array(ids), 1)[-1].argmax()))
    return tuple(ids[len(prompt) :])


# -- what runs ----------------------------------------------------------------------------------------------------
def test_a_concatenated_cache_gives_what_whole_passes_give(adopted):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [4], [9, 9, 9]]
    expected = [greedy(adopted.decoder, prompt, 20) for prompt in prompts]
    together = adopted.generate(prompts, max_tokens=20, stop_ids=[])
    assert [completion.token_ids for completion in together] == expected
    assert adopted.generate(prompts[1], max_tokens=20, stop_ids=[]).token_ids == expected[1]


def test_rows_of_one_length_run_together_and_are_not_copied_from_step_to_step(adopted):
    cache = adopted.decoder.open_cache(3, 32)
    slots = [cache.acquire() for _ in range(3)]
    for slot, length in zip(slots, (4, 4, 9)):
        adopted.decoder.prefill(cache, slot, list(range(3, 3 + length)))
    adopted.decoder.step(cache, slots, [1, 2, 3])
    gathered = cache.moved
    assert gathered > 0
    for _ in range(4):
        adopted.decoder.step(cache, slots, [1, 2, 3])
    assert cache.moved == gathered
    assert [cache.length(slot) for slot in slots] == [9, 9, 14]


def test_beams_of_a_concatenated_cache_are_those_of_a_search_by_hand(adopted):
    best = adopted.generate(
        [5, 6, 7], max_tokens=2, num_beams=8, num_return_sequences=8, stop_ids=[], length_penalty=0.0
    )
    scores = {}
    for first in range(40):
        one = log_softmax(whole(adopted.decoder, np.array([5, 6, 7]), 1)[-1])[first]
        two = log_softmax(whole(adopted.decoder, np.array([5, 6, 7, first]), 1)[-1])
        scores |= {(first, second): one + two[second] for second in range(40)}
    assert best[0].token_ids == max(scores, key=scores.__getitem__)


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_sampling_text_and_streams_work_as_ever(adopted):
    assert adopted.tokenize("ab") == [4, 5]
    one = adopted.generate("abc", max_tokens=8, temperature=0.9, seed=3)
    assert one.token_ids == adopted.generate("abc", max_tokens=8, temperature=0.9, seed=3).token_ids
    assert "".join(chunk.text for chunk in adopted.stream("abc", max_tokens=8, temperature=0.9, seed=3)) == one.text
    assert adopted.render_chat([{"role": "user", "content": "hello"}]) == "hello"


def test_a_graph_that_writes_in_place_is_recognised_and_gives_the_same_tokens(in_place, model):
    made = adopt(in_place, file="decoder.onnx")
    assert made.manifest.cache_mode == "in place"
    with tfinfer.load(in_place, threads=1) as again:
        for prompt in ([3, 4, 5], [7]):
            ours = model.generate(prompt, max_tokens=24, stop_ids=[]).token_ids
            assert again.generate(prompt, max_tokens=24, stop_ids=[]).token_ids == ours


def test_an_encoder_is_adopted_and_encodes_as_it_did(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_encoder", tmp_path / "encoder"))
    (folder / "tfinfer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 94, "max_position_embeddings": 64}))
    made = adopt(folder)
    assert made.manifest.encoder.hidden_states == "hidden_states"
    assert made.manifest.encoder.pooled == "pooled"
    texts = ["the cat sat", "on the red mat and ran"]
    with tfinfer.load(HERE / "tiny_encoder") as one, tfinfer.load(folder) as other:
        np.testing.assert_array_equal(one.encode(texts), other.encode(texts))


def test_an_encoder_whose_files_count_places_that_hold_nothing_gets_the_length_that_runs(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_encoder", tmp_path / "encoder"))
    (folder / "tfinfer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 94, "max_position_embeddings": 66}))
    assert adopt(folder).manifest.max_length == 64


def test_pooling_of_sentence_transformers_comes_along(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_encoder", tmp_path / "encoder"))
    (folder / "tfinfer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 94, "max_position_embeddings": 64}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "2_Normalize").mkdir()
    assert adopt(folder).manifest.pooling == tfinfer.manifest.PoolingSpec("cls", True)


# -- the manifest -------------------------------------------------------------------------------------------------
def test_the_files_say_ids_lengths_and_text_and_every_file_is_hashed(foreign):
    manifest = adopt(foreign).manifest
    assert manifest == load_manifest(foreign)
    assert manifest.graphs["decoder"].file == "onnx/model.onnx"
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "golden.npz"} <= set(manifest.files)
    assert (manifest.token_ids.eos, manifest.token_ids.bos, manifest.max_length) == ((2,), 1, 64)
    assert manifest.text.chat_template == "chat_template.jinja"
    assert manifest.cache_mode == "concatenated"
    assert [(e.num_kv_heads, e.head_dim) for e in manifest.cache] == [(2, 8), (2, 8)]


def test_a_branch_for_a_past_is_fed_its_flag(foreign):
    made = adopt(foreign, file="model_merged.onnx")
    assert made.manifest.roles.use_cache_branch == "use_cache_branch"
    assert made.verdict.passed


def test_genai_config_names_the_graph_its_tensors_and_its_lengths(foreign):
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outs = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {"filename": "onnx/model_merged.onnx", "inputs": names, "outputs": outs}
    model = {"context_length": 48, "eos_token_id": [7, 9], "decoder": decoder}
    (foreign / "genai_config.json").write_text(json.dumps({"model": model}))
    manifest = adopt(foreign).manifest
    assert manifest.graphs["decoder"].file == "onnx/model_merged.onnx"
    assert (manifest.max_length, manifest.token_ids.eos) == (48, (7, 9))


def test_it_verifies_inspects_and_benches(foreign):
    run = CliRunner().invoke
    assert run(cli, ["adopt", str(foreign)]).exit_code == 0
    verified = run(cli, ["verify", str(foreign)])
    assert verified.exit_code == 0
    assert "tokens are the whole pass's: ok" in verified.output
    inspected = run(cli, ["inspect", str(foreign), "--check"]).output
    assert "concatenated" in inspected
    assert "adopted" in inspected
    measured = run(
        cli, ["bench", str(foreign), "--new-tokens", "4", "--repeats", "1", "--starts", "0", "--json"]
    ).output
    assert json.loads(measured)["memory"]["cache_bytes"] > 0


def test_adopt_says_what_it_did_and_as_json(foreign):
    result = CliRunner().invoke(cli, ["adopt", str(foreign), "--json"])
    told = json.loads(result.output)
    assert told["manifest"]["cache_mode"] == "concatenated"
    assert all(case["worst"] < 1e-4 for case in told["verdict"]["cases"])


# -- what is refused ----------------------------------------------------------------------------------------------
def test_loading_a_folder_that_was_not_adopted_names_the_command(foreign):
    with pytest.raises(ManifestError, match="tfinfer adopt"):
        tfinfer.load(foreign)


def test_several_graphs_need_a_choice(foreign):
    (foreign / "onnx" / "model.onnx").rename(foreign / "onnx" / "one.onnx")
    with pytest.raises(InputError, match=r"one\.onnx.*--file"):
        adopt(foreign)
    with pytest.raises(InputError, match="--file to name one of"):
        adopt(foreign, file="two.onnx")


def test_halves_of_an_encoder_decoder_are_refused_by_name(foreign):
    shutil.copy(foreign / "onnx" / "model.onnx", foreign / "onnx" / "encoder_model.onnx")
    shutil.copy(foreign / "onnx" / "model.onnx", foreign / "onnx" / "decoder_model_merged.onnx")
    with pytest.raises(InputError, match="halves of an encoder-decoder"):
        adopt(foreign)


def test_a_folder_is_adopted_again_only_when_asked(foreign):
    adopt(foreign)
    with pytest.raises(InputError, match="--overwrite"):
        adopt(foreign)
    assert adopt(foreign, file="model_merged.onnx", overwrite=True).manifest.roles.use_cache_branch


def test_our_own_export_needs_no_adoption(copied):
    with pytest.raises(InputError, match="needs no adoption"):
        adopt(copied, overwrite=True)


def test_a_length_that_no_file_says_has_to_be_given(foreign):
    (foreign / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--max-length"):
        adopt(foreign)
    assert adopt(foreign, max_length=32).manifest.max_length == 32


def test_a_length_beyond_the_models_own_is_refused(foreign):
    with pytest.raises(InputError, match="longer than the model's own longest length, 64"):
        adopt(foreign, max_length=65)


def test_what_goes_past_the_longest_length_is_refused_and_the_next_call_works(adopted):
    with pytest.raises(LengthError):
        adopted.generate(list(range(3, 33)), max_tokens=60)
    assert adopted.generate([3], max_tokens=2, stop_ids=[]).usage.completion_tokens == 2


@pytest.mark.parametrize("name", ["config.json", "genai_config.json", "tokenizer_config.json"])
def test_files_that_are_no_json_are_named(foreign, name):
    (foreign / name).write_text("{")
    with pytest.raises(ManifestError, match=name):
        adopt(foreign)


@pytest.mark.parametrize("place", ["../model.onnx", "/tmp/model.onnx", "onnx/../../model.onnx"])
def test_a_graph_outside_the_folder_is_refused(foreign, place):
    (foreign / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": place}}}))
    with pytest.raises(UnsafeModelError, match="no file of this folder"):
        adopt(foreign)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"])
def test_links_are_refused(foreign, tmp_path, name):
    shutil.move(foreign / name, tmp_path / "elsewhere")
    (foreign / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeModelError, match="link"):
        adopt(foreign)
    assert not (foreign / "tfinfer.json").exists()


def test_a_linked_folder_inside_is_refused_when_it_is_loaded_too(foreign, tmp_path):
    adopt(foreign)
    shutil.move(foreign / "onnx", tmp_path / "elsewhere")
    (foreign / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeModelError, match="link"):
        tfinfer.load(foreign)


def test_weights_that_changed_after_adoption_are_found(foreign):
    adopt(foreign)
    path = foreign / "onnx" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptModelError, match="SHA-256"):
        tfinfer.load(foreign)


def test_a_graph_that_is_none_is_named(foreign):
    (foreign / "onnx" / "model.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(CorruptModelError, match=r"model\.onnx"):
        adopt(foreign)


def test_a_folder_that_cannot_be_written_is_named_and_left(foreign, monkeypatch):
    def refuse(self, *arguments, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(TargetError, match="cannot be written"):
        adopt(foreign)


def test_nothing_is_left_behind_when_it_fails(foreign):
    before = sorted(path.name for path in foreign.iterdir())
    with pytest.raises(InputError):
        adopt(foreign, max_length=1)
    (foreign / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    with pytest.raises(InputError):
        adopt(foreign)
    assert sorted(path.name for path in foreign.iterdir()) == before


def test_an_encoder_decoders_graph_lists_what_it_does_not_know(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_seq2seq", tmp_path / "pair"))
    (folder / "tfinfer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 9, "max_position_embeddings": 9}))
    with pytest.raises(IncompatibleModelError, match=r"inputs that no part is known for: .*float32 \(batch"):
        adopt(folder, file="decoder.onnx")


def test_states_are_listed_with_their_shapes(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_states", tmp_path / "states"))
    (folder / "tfinfer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 9, "max_position_embeddings": 9}))
    with pytest.raises(IncompatibleModelError, match=r"lacks|no part is known"):
        adopt(folder)
