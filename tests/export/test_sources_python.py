"""Factories and live modules as sources: what comes along, and every way in which a factory can be wrong."""

import copy
import dataclasses
import json
import pickle
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

from tokenizers import AddedToken, Tokenizer, models  # noqa: E402
from torch import nn  # noqa: E402

from tfinfer.errors import SourceError  # noqa: E402
from tfinfer.export.sources import Source, load_source  # noqa: E402
from tfinfer.export.sources.source import from_module  # noqa: E402

MODEL = """
    from dataclasses import dataclass

    import torch
    from torch import nn


    @dataclass
    class Config:
        vocab: int = 7


    class Tiny(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.tokens = nn.Embedding(config.vocab, 4)
            self.head = nn.Linear(4, config.vocab)

        def forward(self, ids):
            return self.head(self.tokens(ids))


    def build():
        return Tiny(Config())
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="model.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write_file


def make_tokenizer(*special):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def refused(reference, *parts, **options):
    with pytest.raises(SourceError) as caught:
        load_source(str(reference), **options)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    return message


def test_a_file_and_a_factory_become_a_source(write):
    source = load_source(f"{write(MODEL)}:build")
    assert isinstance(source, Source)
    assert (source.kind, source.reference) == ("python", "model.py:build")
    assert source.versions == {"torch": torch.__version__}
    assert not source.module.training
    assert source.module(torch.tensor([[1, 2, 3]])).shape == (1, 3, 7)
    assert (source.tokenizer, source.eos_ids, source.bos_id, source.max_length) == (None, (), None, None)


def test_a_source_cannot_be_changed(write):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_source(f"{write(MODEL)}:build").kind = "module"


def test_a_class_without_required_arguments_is_a_factory(write):
    file = write(
        MODEL + "\n\n    class Plain(Tiny):\n        def __init__(self):\n            super().__init__(Config())\n"
    )
    assert type(load_source(f"{file}:Plain").module).__name__ == "Plain"


def test_the_module_can_be_pickled_and_two_files_of_one_name_stand_side_by_side(write):
    first = load_source(f"{write(MODEL, 'a/model.py')}:build").module
    second = load_source(f"{write(MODEL, 'b/model.py')}:build").module
    assert type(first) is not type(second)
    assert type(first).__module__ != type(second).__module__
    assert type(pickle.loads(pickle.dumps(first))) is type(first)
    assert copy.deepcopy(second).config == second.config


def test_neighbours_can_be_imported_and_the_path_is_restored(write):
    write("SIZE = 3", "neighbour_sizes.py")
    file = write("from torch import nn\nfrom neighbour_sizes import SIZE\ndef build(): return nn.Embedding(SIZE, 2)\n")
    before = list(sys.path)
    assert load_source(f"{file}:build").module.num_embeddings == 3
    assert sys.path == before


def test_a_neighbour_is_not_the_one_of_another_folder(write):
    """A module `layers` of an earlier source would otherwise be found in sys.modules."""
    text = "from torch import nn\nfrom layers_beside import SIZE\ndef build(): return nn.Embedding(SIZE, 2)\n"
    for folder, size in (("a", 3), ("b", 4)):
        write(f"SIZE = {size}", f"{folder}/layers_beside.py")
        assert load_source(f"{write(text, f'{folder}/model.py')}:build").module.num_embeddings == size


def test_a_factory_may_import_neighbours_when_it_is_called(write):
    write("SIZE = 5", "late_sizes.py")
    file = write(
        "from torch import nn\ndef build():\n    import late_sizes\n    return nn.Embedding(late_sizes.SIZE, 2)\n"
    )
    assert load_source(f"{file}:build").module.num_embeddings == 5


def test_a_dotted_module_is_found_in_the_current_directory(write, tmp_path, monkeypatch):
    write("", "zoo_of_test/__init__.py")
    write(MODEL, "zoo_of_test/tiny.py")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    source = load_source("zoo_of_test.tiny:build")
    assert source.reference == "zoo_of_test.tiny:build"
    assert sys.path == before


def test_an_installed_module_is_found():
    assert isinstance(load_source("torch.nn:Identity").module, nn.Identity)


@pytest.mark.parametrize(
    "reference", ["", "nothing", "nothing:", ":build", "a:b-c", "a b:build", "weights-1.bin:build"]
)
def test_other_references_are_told_all_forms(reference):
    refused(reference, "config.json", "file.py:factory", "package.module:factory", repr(reference))


def test_a_file_without_factory_is_told_how_to_name_one(write):
    refused(write(MODEL), "model.py:build")


def test_a_folder_without_config_is_refused(tmp_path):
    refused(tmp_path, "config.json", "file.py:factory")


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "gone.py:build", "there is no file", "gone.py")


@pytest.mark.parametrize("name", ["no_such_module_here", "no_such_package_here.model", "torch.no_such_part"])
def test_a_missing_module_is_named(name):
    refused(f"{name}:build", "there is no module")


def test_a_missing_factory_names_similar_ones(write):
    refused(f"{write(MODEL)}:biuld", "there is no biuld", "did you mean build")


@pytest.mark.parametrize(
    "line, got",
    [
        ("build = 3", "an object of type int"),
        ("from torch import nn\nbuild = nn.Linear(1, 1)", "an object of type Linear"),
    ],
)
def test_what_is_no_factory_is_refused(write, line, got):
    refused(f"{write(line)}:build", "expected a function or class", got)


def test_a_factory_with_arguments_names_them(write):
    file = write("def build(dim, heads, *, longest, depth=2, **more): ...")
    refused(f"{file}:build", "dim, heads, longest", "without any")


@pytest.mark.parametrize(
    "value, got", [("None", "None"), ("{}", "type dict"), ("__import__('torch').nn.Linear", "the class Linear")]
)
def test_a_factory_must_return_a_module(write, value, got):
    refused(f"{write(f'def build(): return {value}')}:build", "torch.nn.Module", got)


def test_a_raising_factory_is_reported_with_type_message_and_line(write):
    file = write(
        """
        import torch

        def inner():
            torch.zeros(2, 3).reshape(7)

        def build():
            return inner()
        """
    )
    refused(f"{file}:build", "RuntimeError", "shape '[7]' is invalid", f"{file}:5")


def test_a_factory_that_exits_does_not_end_the_process(write):
    refused(f"{write('import sys' + chr(10) + 'def build(): sys.exit(3)')}:build", "SystemExit: 3", "model.py:2")


def test_interrupting_a_factory_still_interrupts(write):
    with pytest.raises(KeyboardInterrupt):
        load_source(f"{write('def build(): raise KeyboardInterrupt')}:build")


def test_an_error_while_importing_a_file_is_reported_and_forgotten(write):
    file = write("x = 1\n1 / 0\n", "breaking.py")
    refused(f"{file}:build", "ZeroDivisionError", "breaking.py:2", "importing")
    assert "tfinfer_source_breaking" not in sys.modules


def test_a_syntax_error_is_reported_with_its_line(write):
    refused(f"{write('x = 1' + chr(10) + 'def build(:')}:build", "SyntaxError", "model.py:2")


def test_an_import_that_fails_within_the_module_is_not_called_a_missing_module(write, tmp_path, monkeypatch):
    write("import no_such_dependency_here", "needs_something.py")
    monkeypatch.chdir(tmp_path)
    message = refused("needs_something:build", "ModuleNotFoundError", "no_such_dependency_here", "needs_something.py:1")
    assert "there is no module" not in message


def test_a_good_source_loads_after_a_bad_one(write):
    refused(f"{write('1 / 0', 'bad.py')}:build")
    assert load_source(f"{write(MODEL)}:build").module.config.vocab == 7


def test_weights_are_loaded_into_the_module(write, tmp_path):
    from safetensors.torch import save_file

    file = write(MODEL)
    state = {name: torch.randn_like(value) for name, value in load_source(f"{file}:build").module.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    module = load_source(f"{file}:build", weights=tmp_path / "w.safetensors").module
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_half_precision_factory_becomes_float32(write):
    text = MODEL.replace("return Tiny(Config())", "return Tiny(Config()).to(torch.bfloat16)")
    assert {p.dtype for p in load_source(f"{write(text)}:build").module.parameters()} == {torch.float32}


def test_parameters_without_values_are_refused(write):
    text = MODEL.replace("return Tiny(Config())", "return Tiny(Config()).to('meta')")
    refused(f"{write(text)}:build", "meta device")


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_tokenizer_comes_along_with_what_lies_beside_it(write, tmp_path, as_folder):
    content = make_tokenizer("<s>", "</s>", "<eos>").to_str()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_text(content)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<eos>", "pad_token": None, "unk_token": "<gone>"}
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "text" if as_folder else tmp_path / "text" / "tokenizer.json"
    source = load_source(f"{write(MODEL)}:build", tokenizer=path)
    assert source.tokenizer == content.encode()
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "<eos>", "unk_token": "<gone>"}
    assert (source.bos_id, source.eos_ids, source.pad_id) == (2, (4,), None)
    assert source.chat_template == "yes"


@pytest.mark.parametrize(
    "special, eos",
    [(("<s>", "</s>"), (3,)), (("<|endoftext|>",), (2,)), (("<pad>",), ()), (("</s>", "<|im_end|>"), ())],
)
def test_the_end_of_a_lone_tokenizer_is_its_only_end_token(write, tmp_path, special, eos):
    make_tokenizer(*special).save(str(tmp_path / "my.json"))
    source = load_source(f"{write(MODEL)}:build", tokenizer=tmp_path / "my.json")
    assert source.eos_ids == eos
    assert source.special_tokens == ({"eos_token": special[eos[0] - 2]} if eos else {})


def test_a_chat_template_file_wins(write, tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load_source(f"{write(MODEL)}:build", tokenizer=tmp_path).chat_template == "new"


def test_bad_tokenizers_are_refused(write, tmp_path):
    reference = f"{write(MODEL)}:build"
    refused(reference, "expected a tokenizer.json or a folder", tokenizer=tmp_path)
    refused(reference, "expected a tokenizer.json or a folder", tokenizer=tmp_path / "gone.json")
    for content in (b"", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": 3}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refused(reference, "tokenizer.json: expected the content of a tokenizer.json", tokenizer=tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        refused(reference, "tokenizer_config.json: expected", tokenizer=tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    refused(reference, "chat_template.jinja: expected", tokenizer=tmp_path)


def test_a_live_module_is_taken_as_it_is():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).eval()
    source = from_module(module)
    assert source.module is module
    assert (source.kind, source.reference) == ("module", "Sequential")


def test_a_live_module_in_training_mode_stays_so_and_shares_its_tensors():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Dropout(0.5), nn.Linear(4, 5))
    module.register_buffer("table", torch.ones(3), persistent=False)
    source = from_module(module)
    assert module.training
    assert module[1].training
    assert not any(part.training for part in source.module.modules())
    assert all(a is b for a, b in zip(module.parameters(), source.module.parameters(), strict=True))
    assert source.module.table is module.table


def test_a_live_module_in_half_precision_is_copied_and_keeps_its_ties():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).half().eval()
    module[1].weight = module[0].weight
    module.register_buffer("small", torch.ones(2, dtype=torch.float16))
    module.register_buffer("exact", torch.ones(2, dtype=torch.float64))
    copied = from_module(module).module
    assert module[0].weight.dtype == torch.float16
    assert copied[0].weight.dtype == torch.float32
    assert copied[1].weight is copied[0].weight
    assert (copied.small.dtype, copied.exact.dtype) == (torch.float32, torch.float64)
    assert list(copied.state_dict()) == list(module.state_dict())


def test_a_live_module_that_cannot_be_copied_is_told_what_to_do():
    module = nn.Linear(2, 2)
    module.frames = (i for i in range(3))
    with pytest.raises(SourceError, match="cannot be copied"):
        from_module(module)


def test_a_compiled_module_is_unwrapped():
    module = nn.Linear(2, 2).eval()
    assert from_module(torch.compile(module)).module is module


def test_only_modules_are_live_modules(tmp_path):
    with pytest.raises(SourceError, match="type dict"):
        from_module({})


def test_a_live_module_takes_a_tokenizer(tmp_path):
    make_tokenizer("</s>").save(str(tmp_path / "tokenizer.json"))
    source = from_module(nn.Linear(2, 2), tmp_path)
    assert source.eos_ids == (2,)
    assert source.tokenizer
