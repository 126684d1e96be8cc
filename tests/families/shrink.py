"""Any transformers configuration at toy size, by what its fields are called and hold. Knows no family.

Fields of one meaning are called alike throughout transformers. Some families tie sizes to each other, so that there are
several ways to shrink, to be tried one after the other. Of lists with an entry per layer, layers of each kind are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOCABULARY = 101
LARGEST = 256  # of a size that no pattern knows
# The first pattern found in a field's name says its size; these have nothing to do with each other.
FREE: tuple[tuple[str, int], ...] = (
    (r"^index\w*heads$", 32),  # a key's score is a sum of positive parts: with few of them many are 0, and tie
    (r"position|n_ctx|max_seq_len|context_length|max_length", 128),
    (r"type_vocab_size|n_langs", 2),
    (r"vocab_size|hash_byte_group_vocab", VOCABULARY),
    (r"n_group$|topk_group|num_expert_group|n_groups|ngroups|o_groups", 1),
    (r"experts_per_tok|top_?k$|moe_k$|topk_blocks|start_n_top|end_n_top", 2),
    (r"num_shared_experts|n_shared_experts", 1),
    (r"experts$|expert_num$", 4),
    (r"layers?_period$|_interval$|every_n_layers$|_pattern$|sparse_step$", 2),
    (r"layer_offset$|num_dense_layers|first_k_dense|max_window_layers|shared_layers", 1),
    (r"sliding_window(_size)?$|window_size$|local_attention|attention_chunk_size|window_len", 7),
    (r"layers?(_per_stack)?$|num_blocks|^depth$", 2),
)
# These are: widths are heads times their dimensions.
HEADS = r"(kv|key_value|key|value)_(n_)?heads$|n_kv_heads|kv_n_heads|num_query_groups|heads(_per_layer)?$|n_head$"
FEWER_HEADS = r"(kv|key_value|key)_(n_)?heads$|n_kv_heads|kv_n_heads|num_query_groups"
HEAD_SIZES = r"rotary_dim|head_?dim$|d_kv$|dim_head|d_head$|head_size$|kv_channels"
TIED: tuple[tuple[str, int], ...] = (
    (FEWER_HEADS, 2),
    (HEADS, 4),
    (r"rotary_dim|rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (rf"{HEAD_SIZES}|lora_rank|d_state|state_size|rank$", 16),
    (r"d_ssm|d_inner|attention_hidden_size", 128),
    (r"(intermediate|ffn|mlp|feed_forward|expert).*(size|dim)$|intermediate_size|ffn_dim|d_ff$|dff$|dim_ff", 96),
    (r"hidden_size|d_model|n_embd|n_embed|emb(ed)?(ding)?_(dim|size)|width$|dim_model_base|hidden_size_global", 64),
    (r"chunk|block_size", 8),
)
STATES = r"d_state|state_size|ssm_state"
IDS = r"(token|bos|eos|pad|sep|cls|mask|unk|boi|eoi|boa|eoa|lang).*_(id|index|idx)$"
KEPT = r"conv|kernel|^chunk_size_feed_forward$|^transformers_version$|^number_of|cycles$|^seed$|ngram"
COUNTS = r"^(num_)?(hidden_|decoder_|encoder_)?layers$|^n_layers?$|num_blocks"


@dataclass(frozen=True)
class Way:
    """One way to shrink.

    sizes: each by its name; all divided alike, so that their ratios stay; or as they are. each: how many layers of each
    kind. filled: sizes that a configuration leaves open are given too. computed: whether to leave those sizes out that
    the configuration computes from others.
    """

    sizes: Literal["named", "divided", "own"]
    each: int = 1
    filled: bool = False
    computed: bool = True


WAYS = (
    *(Way(sizes, each, filled) for each in (1, 2) for filled in (False, True) for sizes in ("named", "divided")),
    *(Way(sizes, 2, filled, computed=False) for filled in (False, True) for sizes in ("named", "divided")),
    Way("own"),
    Way("own", 2),
)


def candidates(config: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments that make small configurations of the class of `config`, each other than those before."""
    seen: list[dict[str, Any]] = []
    for way in WAYS:
        found = as_decoder(_Shrinking(config, way).fields(), config)
        if found not in seen:
            seen.append(found)
            yield found


def as_decoder(kwargs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """With the fields that make a decoder of what can be either, where the configuration has them."""
    known = config.to_dict()
    wanted = {"is_decoder": True, "causal": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**kwargs, **{name: value for name, value in wanted.items() if name in known}}


@dataclass
class _Shrinking:
    """One configuration, without its parts, on one way."""

    config: Any
    way: Way
    least: int = 2  # layers
    known: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.known = self.config.to_dict()
        self.count = int(getattr(self.config, "num_hidden_layers", 0) or 0)
        self.kept = self._layers()
        self.heads, self.head_size = self._factors()
        self.computed = _computed(self.config) if self.way.computed else set()

    def fields(self) -> dict[str, Any]:
        small: dict[str, Any] = {}
        for name, value in self.known.items():
            sub = getattr(self.config, name, None) if isinstance(value, dict) else None
            if hasattr(sub, "to_dict"):
                small[name] = _Shrinking(sub, self.way, self.least).fields()
            elif name == "per_layer_config" and isinstance(value, dict):
                small[name] = self._by_layer(value)
            elif isinstance(value, (list, tuple)) and value:
                if (entries := self._list(name, value)) is not None:
                    small[name] = entries
            elif name in self.computed:
                continue
            elif not value and self.way.filled and (given := self._open(name, value)) is not None:
                small[name] = given
            elif isinstance(value, int) and not isinstance(value, bool):
                small[name] = self.size(name, value)
        return small

    def size(self, name: str, value: int) -> int:
        if re.search(IDS, name):
            return value if value < VOCABULARY - 20 else VOCABULARY - 1 - value % 20
        if re.search(KEPT, name) or value <= 0:
            return value
        if re.search(COUNTS, name) and value > 1:
            return len(self.kept) or self.least
        free = next((size for pattern, size in FREE if re.search(pattern, name)), None)
        if free is not None:
            return min(value, free)
        if self.way.sizes == "own":
            return value
        return self._named(name, value) if self.way.sizes == "named" else self._divided(name, value)

    def _named(self, name: str, value: int) -> int:
        return min(value, next((size for pattern, size in TIED if re.search(pattern, name)), LARGEST))

    def _divided(self, name: str, value: int) -> int:
        if re.search(STATES, name):
            return min(value, 16)
        if re.search(HEADS, name):
            return max(1, value // self.heads)
        if re.search(HEAD_SIZES, name):
            return max(1, value // self.head_size)
        # What is small beside a width is none; some kernels of torch take multiples of 16 bytes alone.
        return value if value < 32 else max(8, value // (self.heads * self.head_size) // 8 * 8)

    def _factors(self) -> tuple[int, int]:
        """What to divide heads by, and their dimensions: powers of two that leave two heads of 8 at least."""
        ints = {n: v for n, v in self.known.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
        heads = [v for n, v in ints.items() if re.search(HEADS, n)]
        sizes = [v for n, v in ints.items() if re.search(HEAD_SIZES, n)]
        width = getattr(self.config, "hidden_size", None)
        count = getattr(self.config, "num_attention_heads", None) if "per_layer_config" not in self.known else None
        if isinstance(width, int) and isinstance(count, int) and width % count == 0:
            sizes.append(width // count)
        common, dims = math.gcd(*heads) if heads else 1, math.gcd(*sizes) if sizes else 1
        by = [1 << e for e in range(10)]
        most = max(heads, default=1)
        fewer = max(n for n in by if common % n == 0 and (n == 1 or most // n >= 4))
        return fewer, max(n for n in by if dims % n == 0 and (n == 1 or min(sizes) // n >= 8))

    def _open(self, name: str, value: Any) -> Any:
        """What to give for a field that the configuration leaves open; None to leave it so."""
        kinds = self.known.get("layer_types") or ["full_attention"] * len(self.kept)
        if name == "layer_types":
            return kinds
        if name == "rope_parameters" and value == {}:
            return {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}
        sizes = rf"{HEADS}|head_dim$|expert|budget$|ratio$"
        if value is not None or re.search(f"{IDS}|{KEPT}", name) or not re.search(sizes, name):
            return None
        if re.search(FEWER_HEADS, name):
            return 1
        return next((size for pattern, size in (*FREE, *TIED) if re.search(pattern, name)), 8)

    # -- what there is for each layer ---------------------------------------------------------------------------
    def _layers(self) -> list[int]:
        """Which layers to keep: the first of each kind, as what there is for each layer tells them apart."""
        lists = [v for v in self.known.values() if isinstance(v, (list, tuple)) and len(v) == self.count]
        own = self.known.get("per_layer_config") or {}
        own = {int(i): values for i, values in own.items()} if isinstance(own, dict) else {}
        seen: dict[str, list[int]] = {}
        for i in range(self.count):
            seen.setdefault(str(([entries[i] for entries in lists], own.get(i))), []).append(i)
        kept = sorted(i for layers in list(seen.values())[:5] for i in layers[: self.way.each])
        rest = [i for i in range(self.count) if i not in kept]
        return sorted(kept + rest[: max(0, min(self.least, self.count) - len(kept))])

    def _list(self, name: str, value: Any) -> list[Any] | None:
        if self.kept and len(value) == self.count:
            return [self._entry(name, value[i]) for i in self.kept]
        if value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            if self.way.sizes == "divided" and re.search(r"dim$|embds", name):
                return [max(1, v // (self.heads * self.head_size)) for v in value]
            if re.search(r"section", name):
                return [max(1, v // self.head_size) for v in value]
        return None

    def _entry(self, name: str, value: Any) -> Any:
        return self.size(name, value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _by_layer(self, value: Mapping[Any, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        by_number = {int(i): values for i, values in value.items()}
        chosen = {new: by_number[old] for new, old in enumerate(self.kept) if old in by_number}
        return {i: {name: self._entry(name, v) for name, v in values.items()} for i, values in chosen.items()}


def _computed(config: Any) -> set[str]:
    """The fields of a configuration that follow from others, found by changing these one by one."""
    known = {n: v for n, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
    known = {n: v for n, v in known.items() if not re.search(IDS, n) and not re.search(KEPT, n)}
    found: set[str] = set()
    for name, value in known.items():
        if name in found:
            continue
        try:
            changed = type(config)(**{name: value * 2}).to_dict()
        except Exception:  # a check of its own refuses the size
            continue
        found |= {n for n, v in known.items() if n != name and changed.get(n) != v}
    return found
