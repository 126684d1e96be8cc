"""What plays which part among the inputs and outputs of a graph that another exporter made.

Parts are known by the names that exporters have agreed on, or by those that genai_config.json gives; all else is
refused with a list. Shapes come from the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tfinfer.errors import IncompatibleModelError
from tfinfer.manifest import TensorSpec

# What onnxruntime calls the types that a manifest may name.
DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool",
}  # fmt: skip
KEEPS = ("logits_to_keep", "num_logits_to_keep")
CACHE_FLOATS = ("float32", "float16")


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a graph by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @classmethod
    def of(cls, session: Any) -> Signature:
        """What an open session says; raises IncompatibleModelError for types that no manifest has."""
        given = [*session.get_inputs(), *session.get_overridable_initializers()]
        return cls(_specs(given), _specs(session.get_outputs()))

    @property
    def caches(self) -> bool:
        """Whether the graph takes a past."""
        return any(name.startswith("past") for name in self.inputs)


def _specs(values: Iterable[Any]) -> dict[str, TensorSpec]:
    found = {}
    for value in values:
        if value.type not in DTYPES:
            raise IncompatibleModelError(f"{value.name} is a {value.type}: expected one of {', '.join(DTYPES)}")
        axes = tuple(d if isinstance(d, int) else str(d or f"axis_{i}") for i, d in enumerate(value.shape))
        found[value.name] = TensorSpec(value.name, DTYPES[value.type], axes)
    return found


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder's graph; pairs: past and present of every cache entry."""

    input_ids: str
    attention_mask: str
    logits: str
    position_ids: str | None
    logits_to_keep: str | None
    use_cache_branch: str | None
    pairs: tuple[tuple[TensorSpec, TensorSpec], ...]


def decoder_parts(signature: Signature, names: Mapping[str, str]) -> DecoderParts:
    """The parts of a decoder. Raises IncompatibleModelError that lists what is missing, unknown or of another type.

    names: what genai_config.json calls them.
    """
    ins, outs = dict(signature.inputs), dict(signature.outputs)

    def take(role: str, *known: str, dtypes: tuple[str, ...] = ("int64",)) -> str | None:
        for name in (names.get(role, role), *known):
            if name in ins and ins[name].dtype in dtypes:
                return ins.pop(name).name
        return None

    ids, mask, positions = take("input_ids"), take("attention_mask"), take("position_ids")
    keep, branch = take(*KEEPS), take("use_cache_branch", dtypes=("bool",))
    logits = names.get("logits", "logits")
    last = outs.pop(logits, None)
    pairs = []
    for name in list(ins):
        present = _present(name, names)
        fits = present in outs and ins[name].dtype == outs[present].dtype
        if fits and len(ins[name].shape) == len(outs[present].shape) == 4 and ins[name].dtype in CACHE_FLOATS:
            pairs.append((ins.pop(name), outs.pop(present)))
    missing = [role for role, name in (("input_ids", ids), ("attention_mask", mask)) if name is None]
    if last is None or last.dtype not in CACHE_FLOATS:
        missing.append(f"an output {logits} in float32 or float16")
    if not pairs:
        missing.append("pairs of past and present, (batch, heads, length, head size) each")
    if missing or ins or outs:
        raise IncompatibleModelError(_refusal(missing, ins.values(), outs.values()))
    assert ids
    assert mask
    return DecoderParts(ids, mask, logits, positions, keep, branch, tuple(pairs))


def _present(past: str, names: Mapping[str, str]) -> str:
    """The output that goes on from an input."""
    for side in ("key", "value"):
        pattern, other = names.get(f"past_{side}_names", ""), names.get(f"present_{side}_names", "")
        head, found, tail = pattern.partition("%d")
        number = past[len(head) : len(past) - len(tail)]
        if found and past.startswith(head) and past.endswith(tail) and number.isdigit():
            return other.replace("%d", number)
    for known in ("past_key_values", "past"):
        if past.startswith(known):
            return "present" + past[len(known) :]
    return ""


def _refusal(missing: list[str], ins: Iterable[TensorSpec], outs: Iterable[TensorSpec]) -> str:
    lines = [f"lacks {', '.join(missing)}"] if missing else []
    for side, specs in (("inputs", list(ins)), ("outputs", list(outs))):
        if specs:
            lines.append(f"has {side} that no part is known for: {', '.join(map(listed, specs))}")
    return (
        f"the graph {'; and '.join(lines)}. Expected int64 ids, mask and positions, a cache that grows by position, "
        "and logits: graphs with states, embeddings or pictures as inputs cannot be adopted; export the checkpoint "
        "itself with `tfinfer export`"
    )


def listed(tensor: TensorSpec) -> str:
    """A tensor for people: its name, type and shape."""
    return f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"
