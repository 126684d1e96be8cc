"""config.json and weights of a folder into an adapted model, through transformers and whatever it knows.

No architecture is named here, no code of the folder is run, nothing is fetched.
"""

import pickle
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tfinfer.errors import SourceError

from .adapters import Adapter, Encoder, adapted
from .files import brief, read_json
from .weights import describe_differences, explain_refusal, shards_of

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_folder(folder: Path) -> None:
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
        raise SourceError(
            f"{folder}: holds an adapter (adapter_config.json); export its base model and give this folder as --adapter"
        )
    for name in _INDICES:
        if (folder / name).is_file():
            shards_of(folder / name)


def load_config(transformers: Any, folder: Path) -> Any:
    """Return the config of a folder."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken config surfaces as many kinds
        raise SourceError(
            f"{folder}: transformers {transformers.__version__} cannot read config.json: {brief(error)}"
        ) from error
    # A file may name a kernel to be fetched; which attention computes the same numbers is no property of the model.
    config._attn_implementation = None
    return config


def load_model(transformers: Any, folder: Path, config: Any, *, is_base: bool) -> Adapter:
    """Load the class that the config itself names, in float32, with every weight that its outputs depend on.

    Args:
        is_base: load the model without a head, and the class that is named only where that has weights the folder
            lacks: what a head was is often what sentence-transformers' folders still say.
    """
    problems = []
    for kind in _classes(transformers, config, is_base):
        try:
            return _load(transformers, folder, config, kind)
        except SourceError as error:
            problems.append(error)
    raise problems[0]


def _classes(transformers: Any, config: Any, is_base: bool) -> list[Any]:
    """Return the classes to try; where none is named, those that transformers itself chooses by the config."""
    named = _named_class(transformers, config)
    if is_base:
        return [transformers.AutoModel, *([] if named is None else [named])]
    if named is not None:
        return [named]
    known = type(config)
    if config.is_encoder_decoder and known in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return [transformers.AutoModelForSeq2SeqLM]
    causal = known in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return [transformers.AutoModelForCausalLM if causal else transformers.AutoModel]


def _named_class(transformers: Any, config: Any) -> Any:
    """Return the class of transformers that `architectures` names first, if it is one for such a config."""
    names = config.architectures if isinstance(config.architectures, list) else []
    try:
        kind = getattr(transformers, names[0]) if names and isinstance(names[0], str) else None
    except Exception:  # the name is the file's, and what is behind it may fail to be imported
        return None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    wanted = getattr(kind, "config_class", None)
    return kind if wanted is not None and isinstance(config, wanted) else None


def _load(transformers: Any, folder: Path, config: Any, kind: Any) -> Adapter:
    try:
        model, info = kind.from_pretrained(
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
            f"{folder}: transformers {transformers.__version__} cannot load it as {kind.__name__}: {brief(error)}"
        ) from error
    adapter = adapted(model).eval()
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if isinstance(adapter, Encoder) and not info["mismatched_keys"]:
        unexpected = {name for name in unexpected if not _is_of_another_head(model, name)}
        if missing and not unexpected and _leave_out(folder, adapter, missing):
            return adapter
    problem = describe_differences(missing, unexpected, info["mismatched_keys"])
    if problem:
        raise SourceError(f"{folder}: the weights do not fit {type(model).__name__}: {problem}")
    return adapter


def _has_only_pickles(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))


def _is_of_another_head(model: Any, name: str) -> bool:
    """Whether a tensor belongs to a part that the model below any head does not have, as heads that were not asked for.

    One more layer, or one more tensor of a layer, is of a part that it has.
    """
    part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return part not in dict(model.base_model.named_children())


def _leave_out(folder: Path, adapter: Encoder, missing: Iterable[str]) -> bool:
    """Leave out the outputs that depend on weights that were not there; whether others remain."""
    parameters = dict(adapter.model.named_parameters(remove_duplicate=False))
    absent = [parameters[name] for name in missing if name in parameters]
    try:
        with torch.enable_grad():
            outputs = adapter(torch.zeros(1, 4, dtype=torch.int64))
        random = [name for name, value in outputs.items() if _depends_on(value, absent)]
    except Exception:  # a model that does not run so is refused for its missing weights
        return False
    if len(random) == len(outputs) or len(absent) < len(set(missing)):
        return False
    if random:
        adapter.without = tuple(random)
        warnings.warn(f"{folder}: left out {', '.join(random)}: the weights are not in the folder", stacklevel=2)
    return True


def _depends_on(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether any of the parameters leads to a value; where no gradient tells, it may."""
    if not value.requires_grad:
        return True
    gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in gradients)
