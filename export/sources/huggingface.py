"""A local checkpoint folder of a causal language model into a module, through transformers and whatever it knows.

No architecture is named here, no code of the folder is run, nothing is fetched.
"""

import contextlib
import pickle
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfinfer.errors import MissingDependencyError, SourceError

from .files import brief, read_json
from .text import SPECIAL_NAMES, TextSide, assemble, read_text_side
from .weights import describe_differences, explain_refusal, shards_of

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class CausalLM(nn.Module):
    """A causal language model of transformers as a function of the ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, seq, vocab) of `input_ids` (batch, seq)."""
        return self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds."""

    module: CausalLM
    text: TextSide
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    generation_config: dict[str, Any] | None
    max_length: int | None
    transformers_version: str


def load_checkpoint(folder: Path, tokenizer: Path | None = None) -> Checkpoint:
    """Load a folder's model in float32, with its tokenizer unless another is given."""
    transformers = _import_transformers()
    _check_folder(folder)
    with _quiet(transformers):
        config = _load_config(transformers, folder)
        model = _load_model(transformers, folder, config)
        text = read_text_side(tokenizer) if tokenizer is not None else _load_text_side(transformers, folder)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else None
    ids = {name: _special_ids(name, generation or {}, config, text) for name in SPECIAL_NAMES}
    return Checkpoint(
        module=CausalLM(model).eval(),
        text=text,
        bos_id=next(iter(ids["bos_token"]), None),
        eos_ids=ids["eos_token"],
        pad_id=next(iter(ids["pad_token"]), None),
        generation_config=generation,
        max_length=_longest(config),
        transformers_version=str(transformers.__version__),
    )


def from_ids_alone(module: nn.Module) -> nn.Module:
    """Return a live model of transformers as a function of the ids, any other module as it is."""
    transformers = sys.modules.get("transformers")  # where it was never imported, nothing can be of it
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return module
    return CausalLM(module).train(module.training)


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


def _check_folder(folder: Path) -> None:
    """Refuse what transformers would take from elsewhere or what is no plain float checkpoint."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise SourceError(
            f"{folder}: config.json asks for Python code of its own (auto_map), which is not run; "
            "where transformers has the model itself, remove auto_map from config.json"
        )
    if config.get("quantization_config"):
        raise SourceError(f"{folder}: the weights are quantised (quantization_config); export the float checkpoint")
    if (folder / "adapter_config.json").is_file():
        raise SourceError(f"{folder}: holds an adapter (adapter_config.json); merge it into its base model first")
    for name in _INDICES:
        if (folder / name).is_file():
            shards_of(folder / name)


def _load_config(transformers: Any, folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken config surfaces as many kinds
        raise SourceError(
            f"{folder}: transformers {transformers.__version__} cannot read config.json: {brief(error)}"
        ) from error
    # A file may name a kernel to be fetched; which attention computes the same numbers is no property of the model.
    config._attn_implementation = None
    return config


def _load_model(transformers: Any, folder: Path, config: Any) -> nn.Module:
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=not _has_only_pickles(folder),
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed below, with all else that does not fit
        )
    except pickle.UnpicklingError as error:
        raise SourceError(f"{folder}: the file of weights {explain_refusal(error)}") from error
    except Exception as error:  # broken weights and unknown models surface as many kinds
        raise SourceError(
            f"{folder}: transformers {transformers.__version__} cannot load it as a causal language model: "
            f"{brief(error)}"
        ) from error
    problem = describe_differences(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if problem:
        raise SourceError(f"{folder}: the weights do not fit {type(model).__name__}: {problem}")
    return model


def _has_only_pickles(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))


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


def _special_ids(name: str, generation: dict[str, Any], config: Any, text: TextSide) -> tuple[int, ...]:
    """Return the ids of a special token: those of generation_config.json, else of the config, else of the tokenizer.

    That is the order of transformers. Ids out of the vocabulary stand for none.
    """
    text_config = config.get_text_config()
    vocab_size = getattr(text_config, "vocab_size", None)
    key = f"{name}_id"
    for value in (generation.get(key), getattr(text_config, key, None), text.special_ids.get(name)):
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i is not True]
        ids = [i for i in ids if i >= 0 and (vocab_size is None or i < vocab_size)]
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def _longest(config: Any) -> int | None:
    """Return the longest length that the config says, under the name to which transformers maps all others."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
