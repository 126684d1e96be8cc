"""What a model of transformers and the files beside it say of special ids and of lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .adapters import Adapter
from .files import read_json_if_there
from .text import SPECIAL_NAMES, TextSide

TARGET_LENGTHS = ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings")
SOURCE_LENGTHS = ("max_source_positions", "max_encoder_position_embeddings", "max_position_embeddings")
LONGEST_TOKENIZED = 1_000_000  # tokenizers that know no limit say a number far beyond


@dataclass(frozen=True)
class Generation:
    """Ids of the vocabulary, and the lengths that the source itself says."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    decoder_start: tuple[int, ...] = ()
    forced_eos: int | None = None
    suppressed: tuple[int, ...] = ()
    max_length: int | None = None
    max_source_length: int | None = None


def read_generation(adapter: Adapter, text: TextSide, file: dict[str, Any] | None = None) -> Generation:
    """Return what a model says; of an encoder's lengths its files say more, see `encoder_length`.

    Args:
        file: generation_config.json; None for a live model, whose own generation config stands for it.
    """
    model: Any = adapter.model
    config, own = model.config, getattr(model, "generation_config", None)
    said = own.to_dict() if own is not None else {}
    first = said if file is None else file
    bos, eos, pad, _ = (_special_ids(name, first, config, text) for name in SPECIAL_NAMES)
    pair = adapter.says == "encoder-decoder"
    start = _known(said.get("decoder_start_token_id"), config) or _known(
        getattr(config, "decoder_start_token_id", None), config
    )
    return Generation(
        bos_id=next(iter(bos), None),
        eos_ids=eos,
        pad_id=next(iter(pad), None),
        decoder_start=(start or bos)[:1] + _known(said.get("forced_bos_token_id"), config)[:1] if pair else (),
        forced_eos=next(iter(_known(said.get("forced_eos_token_id"), config)), None) if pair else None,
        suppressed=() if adapter.says == "encoder" else _suppressed(said, config),
        max_length=_longest(adapter, config),
        max_source_length=_first_length(SOURCE_LENGTHS, config, getattr(config, "encoder", None)) if pair else None,
    )


def encoder_length(folder: Path, config: Any) -> int | None:
    """Return the longest text that the files beside an encoder say.

    Its own positions are left to be found: some count places in front of the first that hold nothing.
    """
    files = {"tokenizer_config.json": "model_max_length", "sentence_bert_config.json": "max_seq_length"}
    said = [read_json_if_there(folder / name).get(key) for name, key in files.items()]
    positions = _first_length(("max_position_embeddings",), config.get_text_config()) or LONGEST_TOKENIZED - 1
    shortest = min((n for n in said if _is_length(n)), default=LONGEST_TOKENIZED)
    return shortest if shortest <= positions else None


def _special_ids(name: str, generation: dict[str, Any], config: Any, text: TextSide) -> tuple[int, ...]:
    """Return the ids of a special token: those of the generation config, else of the config, else of the tokenizer.

    That is the order of transformers.
    """
    key = f"{name}_id"
    for value in (generation.get(key), getattr(config.get_text_config(), key, None), text.special_ids.get(name)):
        if ids := _known(value, config):
            return ids
    return ()


def _known(value: Any, config: Any) -> tuple[int, ...]:
    """Return an id, or a list of ids, as different ids; those out of the vocabulary stand for none."""
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i is not True]
    return tuple(dict.fromkeys(i for i in ids if i >= 0 and (vocab_size is None or i < vocab_size)))


def _suppressed(said: dict[str, Any], config: Any) -> tuple[int, ...]:
    """Return the ids that are never chosen; words of several ids are not among them."""
    words = said.get("bad_words_ids") or []
    alone = [word[0] for word in words if isinstance(word, list) and len(word) == 1]
    return _known([*(said.get("suppress_tokens") or []), *alone], config)


def _longest(adapter: Adapter, config: Any) -> int | None:
    """Return the longest length that a config says, under the names to which transformers maps all others."""
    if adapter.says == "encoder":
        return None
    if adapter.says == "decoder":
        return _first_length(("max_position_embeddings",), config.get_text_config())
    return _first_length(TARGET_LENGTHS, config, config.get_text_config())


def _first_length(names: tuple[str, ...], *configs: Any) -> int | None:
    found = (getattr(config, name, None) for config in configs for name in names)
    return next((value for value in found if _is_length(value)), None)


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
