"""A PEFT adapter folder merged into the weights of a module: what its layers add becomes part of them.

Needs no peft and runs nothing of the folder. Weights that two layers share are parted where an adapter changes one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfinfer.errors import SourceError

from .adapters import Adapter
from .files import read_json
from .weights import describe_differences, read_weights

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<module>.*?)\.?(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<kind>weight|bias))?"
)
# Options under which the layers compute something else than W + scale B A, or over other base weights.
REFUSED = (
    "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "megatron_config", "corda_config", "velora_config",
)  # fmt: skip
# Of regular expressions what names layers: any other one of an untrusted file may take forever, or be none.
PLAIN = re.compile(r"\^?(?:[\w.-]|\\\.|\\d\+|\.\*|\((?:\w+\|)*\w+\))+\$?")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass
class _Change:
    """What an adapter holds for one layer."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def pair(self) -> tuple[str, str]:
        embeds = any(part.startswith("lora_embedding") for part in self.tensors)
        return ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")


def merge_adapter(module: nn.Module, folder: Path) -> None:
    """Give the layers of `module` that an adapter names weights that hold what it adds; parameters are replaced.

    folder: adapter_config.json and adapter_model.safetensors, or .bin, as PEFT writes them for LoRA, with or without
    rank and alpha patterns, rsLoRA, DoRA, biases and modules_to_save. Raises SourceError for another kind of adapter,
    and for tensors that are missing, of another shape, or of layers that the module has not; all are listed, and
    nothing is merged.
    """
    config, tensors = _read(folder)
    target = module.model if isinstance(module, Adapter) else module
    assert isinstance(target, nn.Module)
    changes, whole, unknown = _sorted(target, tensors)
    missing = _incomplete(changes, config) | _untouched(target, changes, config)
    merged: dict[str, torch.Tensor] = {}
    misshapen: list[tuple[str, Sequence[int], Sequence[int]]] = []
    for name, change in changes.items():
        if any(missed.startswith(f"{name}.") for missed in missing):
            continue
        new, problem = _merged(target.get_submodule(name), name, change, config)
        merged |= {f"{name}.{parameter}": value for parameter, value in new.items()}
        misshapen += problem
    for name, value in whole.items():
        wanted = _attribute(target, name)
        if wanted is not None and wanted.shape != value.shape:
            misshapen.append((name, tuple(value.shape), tuple(wanted.shape)))
        merged[name] = value.to(torch.float32 if wanted is None else wanted.dtype)
    if problem_text := describe_differences(missing, unknown, misshapen):
        raise SourceError(f"{folder}: the adapter does not fit {type(target).__name__}: {problem_text}")
    for name, value in merged.items():
        _replace(target, name, value)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not (folder / "adapter_config.json").is_file():
        raise SourceError(f"{folder}: expected the folder of a PEFT adapter; it has no adapter_config.json")
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(
            f"{folder}: expected an adapter of type LORA; it is {kind}: merge it with peft (merge_and_unload) and "
            "export the result"
        )
    if asked := [name for name in REFUSED if config.get(name)]:
        raise SourceError(
            f"{folder}: the adapter uses {', '.join(asked)}, which is not merged here: merge it with peft "
            "(merge_and_unload) and export the result"
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise SourceError(
            f"{folder}: init_lora_weights is {start}, for which the base model's own weights were changed: save the "
            "adapter converted to plain LoRA (path_initial_model_for_weight_conversion), or merge it with peft"
        )
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise SourceError(f"{folder}: expected {' or '.join(FILES)}; there is neither")
    _check_numbers(config, folder)
    return config, read_weights(file)


def _check_numbers(config: Mapping[str, Any], folder: Path) -> None:
    """Raises SourceError unless ranks and alphas are numbers, by which to scale."""
    ranks = [config.get("r"), *_pattern(config, "rank_pattern").values()]
    alphas = [config.get("lora_alpha"), *_pattern(config, "alpha_pattern").values()]
    if any(type(r) is not int or r < 1 for r in ranks) or any(type(a) not in (int, float) for a in alphas):
        raise SourceError(f"{folder}: expected r above 0 and lora_alpha as numbers in adapter_config.json")
    patterns = [*_pattern(config, "rank_pattern"), *_pattern(config, "alpha_pattern")]
    if strange := [pattern for pattern in patterns if not PLAIN.fullmatch(pattern)]:
        raise SourceError(
            f"{folder}: expected names of layers in rank_pattern and alpha_pattern, with \\d+ and .* at most; got "
            f"{', '.join(strange)}: merge it with peft (merge_and_unload) and export the result"
        )


def _pattern(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    return value if isinstance(value, dict) else {}


def _sorted(
    target: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Change], dict[str, torch.Tensor], list[str]]:
    """The tensors by the layer that they change, those that replace a parameter, and the names of all others."""
    modules = dict(target.named_modules(remove_duplicate=False))
    changes: dict[str, _Change] = {}
    whole: dict[str, torch.Tensor] = {}
    unknown = []
    for full, value in tensors.items():
        name = full.removeprefix(PREFIX)
        if found := PARTS.fullmatch(name):
            part = found["part"] + (".bias" if found["kind"] == "bias" else "")
            if found["module"] in modules:
                changes.setdefault(found["module"], _Change()).tensors[part] = value
            else:
                unknown.append(full)
            continue
        plain = re.sub(r"\.(modules_to_save\.(default\.)?|base_layer\.)", ".", name)
        if _attribute(target, plain) is not None:
            whole[plain] = value
        else:
            unknown.append(full)
    return changes, whole, unknown


def _attribute(target: nn.Module, name: str) -> torch.Tensor | None:
    path, _, last = name.rpartition(".")
    try:
        value = getattr(target.get_submodule(path), last, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _incomplete(changes: Mapping[str, _Change], config: Mapping[str, Any]) -> set[str]:
    """The tensors without which others of the same layer mean nothing."""
    missing = set()
    for name, change in changes.items():
        needed = {*change.pair(), *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
        missing |= {f"{name}.{part}" for part in needed - change.tensors.keys()}
    return missing


def _untouched(target: nn.Module, changes: Mapping[str, _Change], config: Mapping[str, Any]) -> set[str]:
    """The layers that the config lists by name, for all depths, and of which the file has nothing."""
    listed = config.get("target_modules")
    if not isinstance(listed, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return set()
    return {
        f"{name}.lora_A"
        for name, part in target.named_modules()
        if isinstance(getattr(part, "weight", None), torch.Tensor)
        and any(name == wanted or name.endswith(f".{wanted}") for wanted in listed)
        and name not in changes
    }


def _scale(name: str, config: Mapping[str, Any]) -> float:
    """alpha / r, or for rsLoRA alpha / sqrt(r), by the first pattern that a layer's name ends with."""

    def of(patterns: Mapping[str, Any], default: Any) -> float:
        found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
        return float(default if found is None else patterns[found])

    rank = of(_pattern(config, "rank_pattern"), config["r"])
    alpha = of(_pattern(config, "alpha_pattern"), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _merged(
    layer: nn.Module, name: str, change: _Change, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], list[tuple[str, Sequence[int], Sequence[int]]]]:
    """The new parameters of a layer; or what has another shape: name, shape in the file, shape in the module."""
    weight = getattr(layer, "weight", None)
    a, b = (change.tensors[part].detach().float() for part in change.pair())
    stored = f"{name}.weight (B A)"
    if not isinstance(weight, torch.Tensor) or b.flatten(1).shape[1] != a.shape[0]:
        wanted = () if not isinstance(weight, torch.Tensor) else tuple(weight.shape)
        return {}, [(stored, (*b.shape, *a.shape), wanted)]
    scale = _scale(name, config)
    added = scale * (b.flatten(1) @ a.flatten(1))  # (out, in), of a convolution (out, in times kernel)
    embeds = change.pair()[0] == "lora_embedding_A"
    transposed = embeds or _is_transposed(layer, added, weight, config)
    if (added.t() if transposed else added).numel() != weight.numel() or (
        weight.dim() == 2 and (added.t() if transposed else added).shape != weight.shape
    ):
        return {}, [(stored, tuple(added.shape), tuple(weight.shape))]
    magnitude = change.tensors.get("lora_magnitude_vector")
    old = weight.detach().float()
    old = (old.t() if transposed else old).reshape(added.shape)
    new = old + added
    if magnitude is not None:
        if embeds or weight.dim() != 2 or magnitude.numel() != len(new):
            shape = (new.shape[1],) if embeds else (len(new),)
            return {}, [(f"{name}.lora_magnitude_vector", tuple(magnitude.shape), shape)]
        new = new * (magnitude.float().reshape(-1, 1) / new.norm(dim=1, keepdim=True))
    found = {"weight": (new.t() if transposed else new).reshape(weight.shape).contiguous().to(weight.dtype)}
    if (bias := change.tensors.get("lora_B.bias")) is not None:
        own = getattr(layer, "bias", None)
        if not isinstance(own, torch.Tensor) or own.shape != bias.shape:
            return {}, [(f"{name}.lora_B.bias", tuple(bias.shape), () if own is None else tuple(own.shape))]
        found["bias"] = (own.detach().float() + scale * bias.float()).to(own.dtype)
    return found, []


def _is_transposed(layer: nn.Module, added: torch.Tensor, weight: torch.Tensor, config: Mapping[str, Any]) -> bool:
    """Whether a layer's weight is (in, out): of torch's own layers never, of others by the config or the shape."""
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or weight.dim() != 2:
        return False
    return bool(config.get("fan_in_fan_out")) or added.shape != weight.shape


def _replace(target: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter under a name; whatever shared the old one keeps that."""
    path, _, last = name.rpartition(".")
    layer = target.get_submodule(path)
    if isinstance(getattr(layer, last), nn.Parameter):
        setattr(layer, last, nn.Parameter(value, requires_grad=False))
    else:
        setattr(layer, last, value)
