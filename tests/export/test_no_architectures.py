"""Nothing in the exporter or the runtime asks which architecture a model is: the sources are read for what would.

Definitions of our own (export/modules) are data and may bear names.
"""

import ast
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

pytestmark = pytest.mark.hf

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for folder in ("export", "tfinfer")
    for path in (ROOT / folder).rglob("*.py")
    if (ROOT / "export" / "modules") not in path.parents
)
# One of transformers' names of a family is also the field's name of a kind of model.
FAMILIES = set(CONFIG_MAPPING_NAMES) - {"encoder-decoder"}
FIELDS = {"model_type", "architectures", "_name_or_path", "name_or_path"}
NAMES_OF_CLASSES = {"__name__", "__qualname__", "__class__", "__module__"}
SEARCHES = {"startswith", "endswith", "get", "search", "match", "fullmatch", "find", "count"}
# transformers is told to load the class that a checkpoint names, whichever it is; nothing is chosen by the name.
# The others tell apart errors of libraries that cannot be imported, and a function of Python.
ALLOWED = {
    "export/neighbours.py": {"bert", "llama", "model_type"},  # written into files for others, never compared
    "export/sources/pretrained.py": {"architectures"},
    "export/sources/wrappers.py": {"a comparison of __module__"},  # torch's and bitsandbytes' own wrappers
    "export/capture/writes.py": {"a comparison of __module__", "a comparison of __name__"},  # torch's sym_ functions
    "export/sources/text.py": {"a comparison of __name__"},
    "tfinfer/session/failures.py": {"a comparison of __module__"},
    "tfinfer/session/providers.py": {"a comparison of __module__"},
    "tfinfer/tokens/chat.py": {"a comparison of __name__"},
    "tfinfer/tokens/tokenizer.py": {"a comparison of __name__"},
}


def classes():
    """The names of all classes of models and configurations in transformers' own mappings."""
    found = set(CONFIG_MAPPING_NAMES.values())
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES"):
            for value in mapping.values():
                found |= {value} if isinstance(value, str) else set(value)
    return found


CLASSES = classes()


def questions(source):
    """What in a source asks for an architecture: fields and classes by name, families as whole texts, comparisons."""
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.alias | ast.keyword):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
            name = name or getattr(node, "arg", None)
            found |= {name} & (FIELDS | CLASSES)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= {node.value} & (FIELDS | CLASSES | FAMILIES)
        read = [inner.attr for part in _asked(node) for inner in ast.walk(part) if isinstance(inner, ast.Attribute)]
        found |= {f"a comparison of {name}" for name in read if name in NAMES_OF_CLASSES}
    return found


def _asked(node):
    """What is compared, looked up or searched."""
    if isinstance(node, ast.Compare):
        return [node]
    if isinstance(node, ast.Match):
        return [node.subject]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEARCHES:
        return [node.func.value, *node.args]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_asks_which_architecture_a_model_is(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert questions(path.read_text(encoding="utf-8")) - allowed == set()


def test_what_is_allowed_is_still_there():
    for name, allowed in ALLOWED.items():
        assert questions((ROOT / name).read_text(encoding="utf-8")) >= allowed


@pytest.mark.parametrize(
    "source",
    [
        "if config.model_type in KNOWN: pass",
        "kind = config.get('model_type')",
        "if 'llama' == kind: pass",
        "from transformers import LlamaForCausalLM",
        "isinstance(model, transformers.GPT2LMHeadModel)",
        "RULES = {'BertModel': 1}",
        "if type(model).__name__ == 'Mine': pass",
        "if 'Attention' in module.__class__.__name__: pass",
        "rule = RULES[type(module).__name__]",
        "rule = RULES.get(type(module).__name__)",
        "if type(module).__name__.startswith('Mine'): pass",
        "match type(module).__name__:\n  case 'Mine': pass",
        "if model.config.architectures[0].endswith('LM'): pass",
    ],
)
def test_a_question_is_found(source):
    assert questions(source)


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError(f'{type(module).__name__} takes no ids')",
        '"""Follows llama and BertModel alike."""',
        "kind = 'encoder-decoder'",
        "model = transformers.AutoModelForCausalLM.from_config(config)",
        "if isinstance(module, nn.Linear): pass",
    ],
)
def test_what_asks_nothing_is_left_alone(source):
    assert questions(source) == set()
