"""Files around a tokenizer into what a prompt needs: tokenizer.json, chat template, special tokens and their ids.

Knows nothing of modules or weights. Imports tokenizers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tfinfer.errors import SourceError

from .files import brief, read_json_if_there

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a tokenizer calls the end of a text; read only where no file beside it says which token that is.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "<|eot_id|>")


@dataclass(frozen=True)
class TextSide:
    """What turns text into ids and back; empty for a source that has ids alone."""

    tokenizer: bytes | None = None  # the content of a tokenizer.json
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)  # by the names of SPECIAL_NAMES
    special_ids: dict[str, int] = field(default_factory=dict)  # those of them that the tokenizer knows


def read_text_side(path: Path) -> TextSide:
    """Read a tokenizer.json, or the one in a folder, with what lies beside it.

    The special tokens are those of tokenizer_config.json and special_tokens_map.json. Where neither is there, the end
    is the tokenizer's own special token if exactly one of END_TOKENS is among them, and nothing else is special.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise SourceError(f"{path}: expected a tokenizer.json or a folder that has one; there is none")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error
    return assemble(content, file.parent, str(file))


def assemble(content: bytes | None, folder: Path, name: str, defaults: dict[str, str] | None = None) -> TextSide:
    """Return the content of a tokenizer.json together with what the files of `folder` say.

    Args:
        name: what errors call the tokenizer.
        defaults: special tokens that hold where the folder's files name none.
    """
    tokenizer = None if content is None else parse_tokenizer(content, name)
    config = read_json_if_there(folder / "tokenizer_config.json")
    declared = read_json_if_there(folder / "special_tokens_map.json") | config
    special = (defaults or {}) | _special_tokens(declared)
    if tokenizer is not None and not declared and not defaults:
        special = _own_end(tokenizer)
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()} if tokenizer is not None else {}
    known = {name: token_id for name, token_id in ids.items() if token_id is not None}
    return TextSide(content, _chat_template(folder, config), special, known)


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's content."""
    return _guard(lambda: Tokenizer.from_str(content.decode()), f"{name}: expected the content of a tokenizer.json")


def _guard(parse: Callable[[], Tokenizer], expectation: str) -> Tokenizer:
    try:
        return parse()
    except BaseException as error:
        # Rust's panics are no `Exception`, and their class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SourceError(f"{expectation}; got something else: {brief(error)}") from error


def _special_tokens(declared: dict[str, Any]) -> dict[str, str]:
    """Return the texts of the special tokens, each written as a text or as an object with one."""
    values = {name: declared.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _own_end(tokenizer: Tokenizer) -> dict[str, str]:
    added = tokenizer.get_added_tokens_decoder().values()
    ends = [token.content for token in added if token.special and token.content in END_TOKENS]
    return {"eos_token": ends[0]} if len(ends) == 1 else {}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the template of chat_template.jinja, else the one in tokenizer_config.json, of several the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SourceError(f"{file}: expected a text in UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
