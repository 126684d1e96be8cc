"""The contract between the exporter and the runtime: `tfinfer.json` to frozen dataclasses and back.

It says everything the runtime needs, so that nothing is guessed from names. A folder that has one is whole: it is
written last. Knows neither torch nor onnxruntime.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfinfer.errors import IncompatibleModelError, ManifestError
from tfinfer.precision import RangeSpec, SmallCacheSpec, WeightsSpec

FILE_NAME = "tfinfer.json"
FORMAT_VERSION = 2
MAX_BYTES = 1 << 20
# The graphs that each kind cannot do without; "attention", which gives the weights of attention, may come beside them,
# and beside a decoder's one that reads long prompts.
PROMPT = "prompt"
KINDS = {"decoder": ("decoder",), "encoder": ("encoder",), "encoder-decoder": ("encoder", "decoder")}
# What a step does with the cache: writes into the buffers that it reads, or gives longer ones.
CACHE_MODES = ("in place", "concatenated")
ADOPTED = "adopted"  # the kind of source of a folder that another exporter made
POOLINGS = ("mean", "cls", "last", "none")
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; an axis is a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LayerSpec:
    """The operators from behind one attention up to the next, and how many such layers lie in a row."""

    count: int
    operators: dict[str, int]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file, what goes in and out of it, and the operators in it, where its exporter told."""

    file: str
    opset: dict[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerSpec, ...] = ()


@dataclass(frozen=True)
class CacheSpec:
    """One past -> present pair: (batch, num_kv_heads, length, head_dim), bound to one buffer."""

    past: str
    present: str
    num_kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None


@dataclass(frozen=True)
class StateSpec:
    """One past -> present pair of fixed size, (batch, *shape): a running sum rather than a row for each position."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CrossSpec:
    """What the encoder's graph gives once and every decoder step takes: an axis is a size, "batch" (first) or "source".

    A sum over the source has no axis of it.

    Output of the one graph and input of the other under the same name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class DecoderRoles:
    """Which graph input and output plays which part; None where the graph does not take it.

    source_mask: (batch, source) int64, 1 where a row's source has a token. use_cache_branch: (1,) bool, whether there
    is a past, of a graph that has a branch for either.
    """

    input_ids: str
    attention_mask: str
    logits: str
    position_ids: str | None = None
    logits_to_keep: str | None = None
    source_mask: str | None = None
    use_cache_branch: str | None = None


@dataclass(frozen=True)
class EncoderRoles:
    """Which input and output of the encoder's graph plays which part; None where there is none.

    attention_mask: (batch, seq) int64, 1 where there is a token. hidden_states: (batch, seq, hidden). pooled: (batch,
    hidden), of a module that pools itself. An encoder without `input_ids` takes something else: `run` serves it.
    """

    input_ids: str | None = None
    attention_mask: str | None = None
    token_type_ids: str | None = None
    hidden_states: str | None = None
    pooled: str | None = None


@dataclass(frozen=True)
class PoolingSpec:
    """How a model's own description makes one vector of a text."""

    mode: str
    normalize: bool


@dataclass(frozen=True)
class MapSpec:
    """The outputs of the graph "attention" that are the layers of one stack: (batch, heads, query, key) each."""

    name: str  # "self", or "encoder", "decoder" and "cross"
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """How some attentions of the module are written in the graph, and why not otherwise."""

    operator: str
    pattern: str
    count: int
    reason: str = ""


@dataclass(frozen=True)
class TokenIds:
    """The special ids of the vocabulary."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    decoder_start: tuple[int, ...] = ()  # what an encoder-decoder's target begins with, forced first ids included
    forced_eos: int | None = None  # the id that takes the last place of a target that reaches its longest length
    suppressed: tuple[int, ...] = ()  # ids that are never chosen


@dataclass(frozen=True)
class TextSpec:
    """The files and tokens that turn text into ids and back; all None for a folder that works with ids."""

    tokenizer: str | None = None
    chat_template: str | None = None
    generation_config: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceSpec:
    """Where the folder came from and what made it."""

    kind: str
    reference: str
    versions: dict[str, str]
    created: str


@dataclass(frozen=True)
class FileSpec:
    """A file of the folder as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ProofCase:
    """What the proof measured for one case, and what it allows."""

    name: str
    measured: float
    allowed: float
    measure: str


@dataclass(frozen=True)
class ProofSpec:
    """What was proved, on which device, against what; `not_run` says what could not be run and why.

    strict: whether numbers are compared as their dtype has it. Not so where the graph rounds activations to a few bits,
    which turns the last digits into larger differences: there directions are, as for float16.
    """

    device: str
    cases: tuple[ProofCase, ...]
    greedy_tokens: int
    golden: str | None = None
    not_run: str = ""
    strict: bool = True


@dataclass(frozen=True)
class Manifest:
    """All that the runtime knows of a folder."""

    format_version: int
    kind: str
    graphs: dict[str, GraphSpec]
    roles: DecoderRoles | None  # of the graph "decoder"
    cache: tuple[CacheSpec, ...]
    vocab_size: int  # ids that go in; 0 for a graph that takes none
    num_logits: int  # ids that can come out
    max_length: int
    all_rows: bool  # whether every new position has logits, or the last alone
    dtype: str
    flavor: str
    attention: tuple[AttentionSpec, ...]
    token_ids: TokenIds
    text: TextSpec
    requires: dict[str, str]
    source: SourceSpec
    files: dict[str, FileSpec]
    proof: ProofSpec
    encoder: EncoderRoles | None = None  # of the graph "encoder"
    states: tuple[StateSpec, ...] = ()
    cross: tuple[CrossSpec, ...] = ()
    source_vocab_size: int = 0  # of an encoder-decoder: ids that go into the encoder
    max_source_length: int = 0
    keeps_window: int | None = None  # positions further back may be dropped from every cache entry
    pooling: PoolingSpec | None = None
    maps: tuple[MapSpec, ...] = ()  # of the graph "attention"
    cache_mode: str = "in place"
    weights: WeightsSpec | None = None  # None where they are as wide as `dtype` says
    range: RangeSpec | None = None  # of float16
    small_cache: SmallCacheSpec | None = None  # None where its entries are as wide as `dtype` says
    appends_one: bool = False  # whether a cache that holds something takes one more position at a time

    def __post_init__(self) -> None:
        def check(good: bool, what: str) -> None:
            if not good:
                raise ManifestError(f"{FILE_NAME}: {what}")

        check(self.kind in KINDS, f"expected a kind of {', '.join(KINDS)}, got {self.kind!r}")
        for graph in KINDS[self.kind]:
            check(graph in self.graphs, f"kind {self.kind!r} without a graph {graph!r}")
        check(self.max_length > 0, "max_length must be positive")
        check("encoder" not in KINDS[self.kind] or self.encoder is not None, "an encoder's graph without its roles")
        if "decoder" in KINDS[self.kind]:
            check(self.roles is not None, "a decoder's graph without its roles")
            check(min(self.vocab_size, self.num_logits) > 0, "vocab_size and num_logits must be positive")
            check(bool(self.cache or self.states), "expected at least one cache entry")
        if self.kind == "encoder-decoder":
            check(min(self.source_vocab_size, self.max_source_length) > 0, "the source's sizes must be positive")
            check(bool(self.token_ids.decoder_start), "an encoder-decoder needs an id that its target begins with")
        for entry in self.cache:
            check(min(entry.num_kv_heads, entry.head_dim) > 0, f"cache entry {entry.past!r} has no size")
            check(entry.dtype in DTYPES, f"cache entry {entry.past!r} has the unknown dtype {entry.dtype!r}")
        small = any(entry.dtype == "int8" for entry in self.cache)
        check(small or self.small_cache is None, "small_cache without a cache entry of int8")
        for state in self.states:
            check(min(state.shape, default=1) > 0, f"state {state.past!r} has no size")
            check(state.dtype in DTYPES, f"state {state.past!r} has the unknown dtype {state.dtype!r}")
        for given in self.cross:
            whole = given.shape[:1] == ("batch",) and given.shape.count("source") <= 1 and given.dtype in DTYPES
            sizes = [size for size in given.shape if size not in ("batch", "source")]
            check(whole and all(isinstance(n, int) and n > 0 for n in sizes), f"{given.name!r} has an odd shape")
        check(self.cache_mode in CACHE_MODES, f"unknown cache_mode {self.cache_mode!r}")
        grows = self.cache_mode == "concatenated"
        alone = not (self.states or self.cross or self.keeps_window) and self.kind == "decoder"
        check(alone or not grows, "a concatenated cache goes with no states, no sources and no window")
        check(self.pooling is None or self.pooling.mode in POOLINGS, "unknown pooling")
        check(not self.maps or "attention" in self.graphs, "maps without a graph that gives them")
        text = (self.text.tokenizer, self.text.chat_template, self.text.generation_config, self.proof.golden)
        for name in [*(graph.file for graph in self.graphs.values()), *text]:
            check(name is None or name in self.files, f"{name!r} is not among its files")
        for name in self.files:
            check(is_inner_path(name), f"{name!r} is no plain file name, nor one in a folder inside")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def is_plain_name(name: str) -> bool:
    """Whether a name can only mean a file directly inside the folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0:")


def is_inner_path(name: str) -> bool:
    """Whether a name, with / between folders, can only mean a file inside the folder."""
    return all(map(is_plain_name, name.split("/")))


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/tfinfer.json`. Raises ManifestError, or IncompatibleModelError for a newer format."""
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ManifestError(f"{folder}: expected a folder that `tfinfer export` made; there is no such folder")
    if not path.is_file():
        foreign = next(folder.glob("*.onnx"), None) or next(folder.glob("onnx/*.onnx"), None)
        advice = f": to run the graphs of another exporter, `tfinfer adopt {folder}` first" if foreign else ""
        raise ManifestError(
            f"{folder}: no {FILE_NAME} in it, so it is no exported folder, or its export did not finish{advice}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ManifestError(f"{path}: larger than {MAX_BYTES} bytes, which no manifest is")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path}: expected an object, got {type(data).__name__}")
    version = data.get("format_version")
    if not isinstance(version, int):
        raise ManifestError(f"{path}: has no format_version")
    if version > FORMAT_VERSION:
        raise IncompatibleModelError(
            f"{path}: format {version} is newer than this tfinfer reads ({FORMAT_VERSION}): upgrade tfinfer"
        )
    return typing.cast(Manifest, read_as(Manifest, data, FILE_NAME))


def read_as(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`; unknown keys, missing keys and wrong types are errors that say where."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(read_as(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(key): read_as(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if value is not None and dataclasses.is_dataclass(option):
                return read_as(option, value, where)
            if (value is None) == (option is type(None)) and (value is None or isinstance(value, option)):
                return value
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = getattr(kind, "__name__", str(kind))
    raise ManifestError(f"{where}: expected {expected}, got {type(value).__name__}")


@functools.cache  # annotations are compiled to be read: of hundreds of objects, most of a small manifest's time
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields, and the names of those without a default."""
    required = (
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return typing.get_type_hints(kind), frozenset(required)


def _read_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected an object, got {type(value).__name__}")
    hints, required = _fields(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ManifestError(f"{where}: unknown keys {', '.join(unknown)}")
    if missing := sorted(required - set(value)):
        raise ManifestError(f"{where}: missing keys {', '.join(missing)}")
    return kind(**{name: read_as(hints[name], item, f"{where}.{name}") for name, item in value.items()})
