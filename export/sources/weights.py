"""A file of weights into a module's parameters: safetensors, sharded or not, or what `torch.save` wrote.

A file is what its content says, not its name. Nothing in a file is ever run. Knows nothing of where the module is from.
"""

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parameter import is_lazy

from tfinfer.errors import SourceError

from .files import brief, read_json

INDEX = "model.safetensors.index.json"
_PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before every name
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_LISTED = 20  # names that an error prints before it only counts


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the tensors of a file into the module's own, whose dtype they take.

    Args:
        path: a .safetensors file, an index of shards or a folder with either; or a file of `torch.save` that holds a
            state dict, alone or as its entry "state_dict" or "model".

    Raises:
        SourceError: the file cannot be read; or names or shapes differ, all of which are listed and nothing is loaded.
    """
    expected = {name: value for name, value in module.state_dict(keep_vars=True).items() if torch.is_tensor(value)}
    found = _strip_prefixes(read_weights(Path(path)), expected)
    problem = describe_differences(
        missing=_missing(expected, found),
        unexpected=found.keys() - expected.keys(),
        misshapen={
            (name, tuple(found[name].shape), tuple(value.shape))
            for name, value in expected.items()
            if name in found and not is_lazy(value) and found[name].shape != value.shape
        },
    )
    problem = problem or _contradictions(expected, found)
    if problem:
        raise SourceError(f"{path}: does not fit {type(module).__name__}: {problem}")
    try:
        module.load_state_dict(found, strict=False)  # strict would ask for both names of tied tensors
    except RuntimeError as error:
        raise SourceError(f"{path}: {type(module).__name__} does not take it: {brief(error)}") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, of the shards of an index, or of the folder that has either."""
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file of weights")
    if path.name.endswith(".index.json"):
        shards = [_read_file(shard) for shard in shards_of(path)]
        return {name: value for shard in shards for name, value in shard.items()}
    return _read_file(path)


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index names, all of them there and in its own folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise SourceError(f'{index}: expected an index of shards, with "weight_map": {{name: file}}')
    shards = [index.parent / name for name in dict.fromkeys(names.values())]
    outside = [shard.name for shard in shards if shard.parent != index.parent or shard.name in ("", "..")]
    if outside:
        raise SourceError(f"{index}: expected shards in its own folder; {', '.join(outside)} lies outside")
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise SourceError(f"{index}: {len(absent)} of {len(shards)} shards are not there: {_listed(absent)}")
    return shards


def describe_differences(
    missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> str:
    """Return one text with every tensor that does not fit, empty if all do.

    Args:
        misshapen: name, shape in the file, shape in the module.
    """
    shapes = [f"{name} is {list(stored)}, expected {list(wanted)}" for name, stored, wanted in sorted(misshapen)]
    groups = {"missing": sorted(missing), "not in the module": sorted(unexpected), "of another shape": shapes}
    return "; ".join(f"{len(names)} {title}: {_listed(names)}" for title, names in groups.items() if names)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _file_in(folder: Path) -> Path:
    for name in (INDEX, "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise SourceError(
            f"{folder}: expected {INDEX}, or one .safetensors file; got {_listed([f.name for f in files]) or 'none'}"
        )
    return files[0]


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path}: is a pointer of Git LFS, not the weights; `git lfs pull` fetches them")
    is_pickle = head.startswith(b"PK\x03\x04") or (
        head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )
    if path.suffix == ".safetensors":
        what = "is a pickle, as torch.save writes it" if is_pickle else "is truncated or something else"
        hint = "; name it .pt to have its tensors read, without running what is in it" if is_pickle else ""
        raise SourceError(f"{path}: expected safetensors; the file {what}{hint}")
    if not is_pickle:
        raise SourceError(f"{path}: expected safetensors or a file of torch.save; it is neither, or truncated")
    return _read_pickle(path)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # a broken header surfaces as several kinds
        raise SourceError(f"{path}: broken or truncated safetensors: {brief(error)}") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what it cannot read is an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(f"{path}: {explain_refusal(error)}") from error
    except Exception as error:  # a broken archive surfaces as several kinds
        raise SourceError(f"{path}: broken or truncated: {brief(error)}") from error
    return _state_dict(content, path)


def explain_refusal(error: pickle.UnpicklingError) -> str:
    """Return why a pickle was not read; torch's own text goes on to advise running it."""
    blocked = re.search(r"GLOBAL (\S+)", str(error))
    unknown = "is broken, of another pickle protocol than 2, or holds something else than tensors"
    what = f"holds {blocked[1]} besides tensors" if blocked else unknown
    return f"{what}; nothing of it was run; save module.state_dict() alone, better as safetensors"


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise SourceError(f"{path}: expected a state dict, a mapping of names to tensors; got {_kind(content)}")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others:
        raise SourceError(
            f"{path}: expected a state dict, alone or as the entry state_dict or model; "
            f"{len(others)} entries are no tensors: {_listed(others)}"
        )
    return dict(content)


def _kind(content: Any) -> str:
    return "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _strip_prefixes(found: dict[str, torch.Tensor], expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take away what wrappers put before every name, unless the module's own names begin so."""
    for prefix in _PREFIXES * 2:  # a wrapped module may have been wrapped again, in either order
        own = any(name.startswith(prefix) for name in expected)
        if found and not own and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _missing(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names that are neither in the file nor another name of something that is."""
    loaded = {_memory(value) for name, value in expected.items() if name in found}
    return [name for name, value in expected.items() if name not in found and _memory(value) not in loaded]


def _contradictions(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Return the names that are one tensor in the module and several in the file."""
    first: dict[object, str] = {}
    unequal = []
    for name in expected:
        if name in found:
            other = first.setdefault(_memory(expected[name]), name)
            if other != name and not torch.equal(found[name], found[other]):
                unequal.append(f"{other} and {name}")
    return f"{len(unequal)} tied in the module and different in the file: {_listed(unequal)}" if unequal else ""


def _memory(value: torch.Tensor) -> object:
    """Return what two names of one tensor have in common."""
    if is_lazy(value) or value.is_meta or value.numel() == 0:
        return id(value)
    return (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
