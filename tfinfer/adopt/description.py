"""What the JSON files beside a graph say of sizes and special ids: data under the names that exporters give them.

Sizes that the graph itself has are read there; these only fill in what it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfinfer.adopt.layout import GENAI_CONFIG, _part, inner_file, read_json
from tfinfer.manifest import PoolingSpec, TextSpec, TokenIds

# Under which names files say a number, the better ones first.
LENGTHS = (
    "context_length", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "max_seq_length", "seq_length",
)  # fmt: skip
QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", *QUERY_HEADS)
HEAD_SIZES = ("head_size", "head_dim", "kv_channels")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
POOLING_FLAGS = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
}  # fmt: skip
MOST_TOKENIZED = 1_000_000  # tokenizers that know no limit say a number far beyond


@dataclass(frozen=True)
class Description:
    """What the files say; None for what none of them does. names: of the graph's inputs and outputs, by their role."""

    max_length: int | None
    vocab_size: int | None
    kv_heads: int | None
    head_dim: int | None
    token_ids: TokenIds
    text: TextSpec
    pooling: PoolingSpec | None = None
    names: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)  # files to write: name and content


def describe(folder: Path) -> Description:
    """Read genai_config.json, config.json, generation_config.json and the tokenizer's files, as far as they are there.

    Raises ManifestError for files that are not JSON, UnsafeModelError for links.
    """
    genai = _part(read_json(folder, GENAI_CONFIG), "model")
    decoder, config = _part(genai, "decoder"), read_json(folder, "config.json")
    generation = read_json(folder, "generation_config.json")
    places = (decoder, genai, config, _part(config, "text_config"))
    heads, width = _number(places, QUERY_HEADS), _number(places, WIDTHS)
    head_dim = _number(places, HEAD_SIZES) or (width // heads if width and heads else None)
    text, extra = _text(folder)
    names = {**_part(decoder, "inputs"), **_part(decoder, "outputs")}
    lengths = [_number(places, LENGTHS), _number((read_json(folder, "tokenizer_config.json"),), ("model_max_length",))]
    known = [n for n in lengths if n is not None and n < MOST_TOKENIZED]
    return Description(
        max_length=min(known, default=None),
        vocab_size=_number(places, ("vocab_size",)),
        kv_heads=_number(places, KV_HEADS),
        head_dim=head_dim,
        token_ids=_token_ids((genai, generation, config)),
        text=text,
        pooling=_pooling(folder),
        names={role: name for role, name in names.items() if isinstance(name, str)},
        extra=extra,
    )


def _number(places: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> int | None:
    """The first positive whole number under one of the keys, a better key before a better place."""
    places = list(places)
    found = (place.get(key) for key in keys for place in places)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _token_ids(places: Iterable[Mapping[str, Any]]) -> TokenIds:
    def ids(name: str) -> tuple[int, ...]:
        for place in places:
            value = place.get(f"{name}_token_id")
            listed = value if isinstance(value, list) else [value]
            if known := [i for i in listed if isinstance(i, int) and not isinstance(i, bool) and i >= 0]:
                return tuple(dict.fromkeys(known))
        return ()

    places = list(places)
    return TokenIds(bos=next(iter(ids("bos")), None), eos=ids("eos"), pad=next(iter(ids("pad")), None))


def _text(folder: Path) -> tuple[TextSpec, dict[str, str]]:
    """The tokenizer's files, and those that have to be written: a chat template that lies within another file."""
    config = read_json(folder, "tokenizer_config.json")
    declared = read_json(folder, "special_tokens_map.json") | config
    values = {name: declared.get(name) for name in SPECIAL}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    special = {name: value for name, value in contents.items() if isinstance(value, str)}
    template, extra = _there(folder, "chat_template.jinja"), {}
    own = config.get("chat_template")
    if template is None and isinstance(own, str):
        template, extra = "chat_template.jinja", {"chat_template.jinja": own}
    read_json(folder, "generation_config.json")  # it must be an object, or be left out
    generation = _there(folder, "generation_config.json")
    return TextSpec(_there(folder, "tokenizer.json"), template, generation, special), extra


def _there(folder: Path, name: str) -> str | None:
    if not (folder / name).is_symlink() and not (folder / name).exists():
        return None
    inner_file(folder, name)
    return name


def _pooling(folder: Path) -> PoolingSpec | None:
    """The pooling of sentence-transformers, where its files are there and say one that `encode` knows."""
    config = read_json(folder, "1_Pooling/config.json")
    modes = [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag) is True]
    return PoolingSpec(modes[0], (folder / "2_Normalize").is_dir()) if len(modes) == 1 else None
