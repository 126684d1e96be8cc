"""Weights from every kind of file into a module, and every way in which a file can be wrong."""

import json
import os
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from tfinfer.errors import SourceError  # noqa: E402
from tfinfer.export.sources.weights import load_weights  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(8.0), persistent=False)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens.weight": torch.randn(5, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
        "norm.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(3),
    }


def check_loaded(path, state, tolerance=0.0):
    module = Tied()
    load_weights(module, path)
    assert module.head.weight is module.tokens.weight
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.steps.dtype == torch.int64
    assert torch.equal(module.table, torch.arange(8.0))
    for name, value in state.items():
        torch.testing.assert_close(module.state_dict()[name].float(), value.float(), rtol=0, atol=tolerance)


def refused(path, *parts, module=None):
    module = Tied() if module is None else module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SourceError) as caught:
        load_weights(module, path)
    for part in parts:
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return str(caught.value)


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors", state)
    check_loaded(tmp_path, state)


def test_content_decides_not_the_name(state, tmp_path):
    save_file(state, tmp_path / "w.pt")
    check_loaded(tmp_path / "w.pt", state)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(state, tmp_path, key, zipped):
    content = state if key is None else {key: state, "step": 3}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    check_loaded(tmp_path / "w.pt", state)


def test_torch_files_of_a_newer_pickle_protocol_are_refused(state, tmp_path):
    """torch.load with weights_only reads protocol 2 alone; it warns of others and then stumbles."""
    torch.save(state, tmp_path / "w.pt", pickle_protocol=4)
    refused(tmp_path / "w.pt", "of another pickle protocol")


def test_both_names_of_a_tied_tensor_may_be_there(state, tmp_path):
    torch.save(state | {"head.weight": state["tokens.weight"]}, tmp_path / "w.pt")
    check_loaded(tmp_path / "w.pt", state)


def test_either_name_of_a_tied_tensor_is_enough(state, tmp_path):
    renamed = {"head.weight" if name == "tokens.weight" else name: value for name, value in state.items()}
    save_file(renamed, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors", state)


def test_a_tied_tensor_with_two_values_is_refused(state, tmp_path):
    torch.save(state | {"head.weight": state["tokens.weight"] + 1}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "tied in the module", "tokens.weight and head.weight")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_leave_no_prefix(state, tmp_path, prefix):
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors", state)


def test_a_prefix_that_is_the_modules_own_name_stays(tmp_path):
    module = nn.ModuleDict({"module": nn.Linear(2, 2)})
    save_file({"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module["module"].bias, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_the_modules(state, tmp_path, dtype):
    save_file({n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors", state, tolerance=0.02)


def test_integers_become_the_modules_floats(state, tmp_path):
    state["norm.weight"] = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    save_file(state, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors", state)


def write_shards(state, folder):
    names = list(state)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    return index


def test_shards(state, tmp_path):
    index = write_shards(state, tmp_path)
    check_loaded(index, state)
    check_loaded(tmp_path, state)


def test_a_missing_shard_is_named(state, tmp_path):
    index = write_shards(state, tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    refused(index, "1 of 2 shards", "model-2.safetensors")


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", ".."])
def test_a_shard_outside_its_folder_is_refused(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(index, "outside")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "model.safetensors.index.json: expected")


def test_everything_that_does_not_fit_is_listed_at_once(state, tmp_path):
    del state["norm.bias"], state["tokens.weight"]
    state |= {
        "norm.weight": torch.zeros(5),
        "steps": torch.zeros(2),
        "extra.a": torch.zeros(1),
        "extra.b": torch.zeros(1),
    }
    save_file(state, tmp_path / "w.safetensors")
    refused(
        tmp_path / "w.safetensors",
        "does not fit Tied",
        "3 missing: head.weight, norm.bias, tokens.weight",
        "2 not in the module: extra.a, extra.b",
        "2 of another shape: norm.weight is [5], expected [4], steps is [2], expected []",
    )


def test_long_lists_are_counted(state, tmp_path):
    save_file(state | {f"extra.{i:02}": torch.zeros(1) for i in range(50)}, tmp_path / "w.safetensors")
    message = refused(tmp_path / "w.safetensors", "50 not in the module", "extra.19 and 30 more")
    assert "extra.20" not in message


def test_a_pickle_named_safetensors_says_so(state, tmp_path):
    for zipped in (True, False):
        torch.save(state, tmp_path / "w.safetensors", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "w.safetensors", "w.safetensors: expected safetensors", "is a pickle")
    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(3))
    refused(tmp_path / "w.safetensors", "is a pickle")


class Dangerous:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_dangerous_pickle_is_refused_and_never_run(state, tmp_path, zipped):
    path = tmp_path / "w.pt"
    torch.save(state | {"x": Dangerous(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    message = refused(path, "w.pt: holds posix.mkdir besides tensors", "nothing of it was run")
    assert "weights_only" not in message  # torch advises to switch it off
    path.write_bytes(pickle.dumps(Dangerous(tmp_path / "ran")))
    refused(path, "nothing of it was run")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(Tied(), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "Tied besides tensors", "state_dict()")


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {}, {"a": 3, "b": "text"}, {1: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "expected a state dict")


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 40, -1])
def test_truncated_safetensors_are_refused(state, tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "w.safetensors", "truncated")


def test_a_broken_header_is_refused(state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)
    refused(path, "w.safetensors", "broken")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [10, 200, -20])
def test_truncated_torch_files_are_refused(state, tmp_path, keep, zipped):
    path = tmp_path / "w.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "w.pt", "broken")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"GGUF and more")
    refused(tmp_path / "w.bin", "neither")
    (tmp_path / "w.bin").write_bytes(b"")
    refused(tmp_path / "w.bin", "neither")
    (tmp_path / "w.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path / "w.safetensors", "git lfs pull")


def test_missing_files_and_ambiguous_folders_are_refused(state, tmp_path):
    refused(tmp_path / "gone.safetensors", "no such file")
    refused(tmp_path, "expected model.safetensors.index.json")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    refused(tmp_path, "a.safetensors, b.safetensors")


def test_a_good_file_loads_after_a_bad_one(state, tmp_path):
    module = Tied()
    save_file({"other": torch.zeros(1)}, tmp_path / "bad.safetensors")
    save_file(state, tmp_path / "good.safetensors")
    refused(tmp_path / "bad.safetensors", module=module)
    load_weights(module, tmp_path / "good.safetensors")
    assert torch.equal(module.norm.bias, state["norm.bias"])
