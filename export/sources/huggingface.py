"""A local checkpoint folder into a module with everything that belongs to it, through transformers.

Of sentence-transformers' folders too. No code of the folder is run, nothing is fetched.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfinfer.errors import MissingDependencyError, SourceError
from tfinfer.manifest import PoolingSpec

from .adapters import Adapter
from .files import brief, read_json
from .generation import Generation, encoder_length, read_generation
from .pretrained import check_folder, load_config, load_model
from .python import FORMS
from .sentence import read_sentence_folder
from .text import SPECIAL_NAMES, TextSide, assemble, read_text_side


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds."""

    module: Adapter
    text: TextSide
    generation: Generation
    generation_config: dict[str, Any] | None
    pooling: PoolingSpec | None
    transformers_version: str


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder says that it is a checkpoint."""
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def load_checkpoint(folder: Path, tokenizer: Path | None = None) -> Checkpoint:
    """Load a folder's model in float32, with its tokenizer unless another is given."""
    transformers = _import_transformers()
    sentence = read_sentence_folder(folder)
    folder = sentence.checkpoint
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: expected {FORMS}; the folder has no config.json")
    check_folder(folder)
    with _quiet(transformers):
        config = load_config(transformers, folder)
        module = load_model(transformers, folder, config, is_base=sentence.is_base)
        text = read_text_side(tokenizer) if tokenizer is not None else _load_text_side(transformers, folder)
    file = folder / "generation_config.json"
    saved = read_json(file) if file.is_file() else None
    generation = read_generation(module, text, saved or {})
    if module.says == "encoder":
        generation = dataclasses.replace(generation, max_length=encoder_length(folder, config))
    return Checkpoint(module, text, generation, saved, sentence.pooling, str(transformers.__version__))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "a Hugging Face checkpoint needs transformers: pip install 'tfinfer[export,hf]'"
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and load reports; what matters in a report becomes an error here."""
    logging = transformers.utils.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def _load_text_side(transformers: Any, folder: Path) -> TextSide:
    if (folder / "tokenizer.json").is_file():
        return read_text_side(folder)
    tokenizer = _convert_tokenizer(transformers, folder)
    if tokenizer is None:
        return assemble(None, folder, str(folder))
    defaults = {name: str(getattr(tokenizer, name)) for name in SPECIAL_NAMES if getattr(tokenizer, name, None)}
    return assemble(tokenizer.backend_tokenizer.to_str().encode(), folder, str(folder), defaults)


def _convert_tokenizer(transformers: Any, folder: Path) -> Any:
    """Return transformers' fast tokenizer of a folder in an older form, None where there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing packages and missing files surface as many kinds
        why = brief(error)
    else:
        # Some classes make an empty tokenizer where there is no file of theirs.
        if not any((folder / name).is_file() for name in type(tokenizer).vocab_files_names.values()):
            return None
        if tokenizer.is_fast:
            return tokenizer
        why = "it is written in Python"
    if (folder / "tokenizer_config.json").is_file():
        warnings.warn(
            f"{folder}: the tokenizer does not become a tokenizer.json, so that the export takes ids alone: {why}",
            stacklevel=2,
        )
    return None
