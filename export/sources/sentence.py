"""modules.json of sentence-transformers: where the checkpoint lies, and how one vector is made of a text.

Nothing but these files is read: sentence-transformers itself is not needed.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfinfer.errors import SourceError
from tfinfer.manifest import PoolingSpec

from .files import read_json, read_json_if_there, read_list

MODES = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
    "mean": "mean", "cls": "cls", "lasttoken": "last",
}  # fmt: skip


@dataclass(frozen=True)
class SentenceFolder:
    """What modules.json says."""

    checkpoint: Path  # the folder with config.json and the weights
    is_base: bool  # whether hidden states are wanted of the checkpoint, whatever head it was saved with
    pooling: PoolingSpec | None


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Read a folder's modules.json; one without it is its own checkpoint, and says nothing of pooling.

    Steps that no pooling here can do are warned of, and the folder then says nothing of pooling.
    """
    if not (folder / "modules.json").is_file():
        return SentenceFolder(folder, False, None)
    (kind, checkpoint), *steps = _modules(folder)
    _warn_of_text(folder, checkpoint)
    return SentenceFolder(checkpoint, kind == "Transformer", _pooling(folder, steps))


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the steps in order: the last part of a type, and the folder with what was saved of it."""
    file, found = folder / "modules.json", []
    for entry in read_list(file):
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise SourceError(f'{file}: expected entries {{"type": ..., "path": ...}}; got {str(entry)[:80]!r}')
        place = (folder / path).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise SourceError(f"{file}: expected paths within its own folder; {path!r} lies outside")
        found.append((kind.rpartition(".")[2], folder / path))
    if not found:
        raise SourceError(f"{file}: expected at least one module; got an empty list")
    return found


def _pooling(folder: Path, steps: list[tuple[str, Path]]) -> PoolingSpec | None:
    if others := [kind for kind, _ in steps if kind not in ("Pooling", "Normalize")]:
        _warn_of_pooling(folder, f"{', '.join(others)} of modules.json")
        return None
    configs = [read_json(place / "config.json") for kind, place in steps if kind == "Pooling"]
    if not configs:
        return None
    modes = [mode for config in configs for mode in _modes(config)]
    if len(modes) != 1 or modes[0] not in MODES:
        _warn_of_pooling(folder, f"pooling by {' and '.join(modes) or 'no mode at all'}")
        return None
    return PoolingSpec(MODES[modes[0]], any(kind == "Normalize" for kind, _ in steps))


def _modes(config: dict[str, Any]) -> list[str]:
    """Return the modes of a pooling: one flag for each, or in newer files their names."""
    named = config.get("pooling_mode")
    if named is not None:
        return [str(name) for name in (named if isinstance(named, list) else [named])]
    return [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]


def _warn_of_pooling(folder: Path, what: str) -> None:
    warnings.warn(
        f"{folder}: {what} is left out, so that no pooling comes along: the vectors of this export are not those of "
        "sentence-transformers",
        stacklevel=2,
    )


def _warn_of_text(folder: Path, checkpoint: Path) -> None:
    """Tell of what sentence-transformers does to a text before its tokenizer sees it, which nothing here does."""
    changes = []
    if read_json_if_there(checkpoint / "sentence_bert_config.json").get("do_lower_case") is True:
        changes.append("lower case (do_lower_case)")
    prompt = read_json_if_there(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if isinstance(prompt, str):
        changes.append(f"the prompt {prompt!r} in front (default_prompt_name)")
    if changes:
        warnings.warn(f"{folder}: its texts are meant to get {' and '.join(changes)}: do so yourself", stacklevel=2)
