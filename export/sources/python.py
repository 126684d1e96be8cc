"""`file.py:factory` or `package.module:factory` into the module that the factory returns. Runs the user's code.

What goes wrong in that code is reported with its place there. Knows nothing of weights and tokenizers.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tfinfer.errors import SourceError

from .files import brief

FORMS = "a folder with a Hugging Face checkpoint (config.json), file.py:factory or package.module:factory"
_MARK = "__tfinfer_source__"  # set on modules that were found through a folder that is on sys.path no longer


def build_module(reference: str) -> nn.Module:
    """Import the factory that `reference` names, call it and return its module.

    Neighbours of the file, or for a dotted name those of the current directory, can be imported meanwhile.
    """
    target, _, name = reference.rpartition(":")
    if not target or not name.isidentifier():
        raise SourceError(f"{reference!r}: expected {FORMS}")
    if target.endswith(".py"):
        file = Path(target).resolve()
        if not file.is_file():
            raise SourceError(f"{reference}: there is no file {target}")
        with _importable(file.parent):
            return _call(_find(_import_file(file, reference), name, reference), reference, file.parent)
    if not all(part.isidentifier() for part in target.split(".")):
        raise SourceError(f"{reference!r}: expected {FORMS}; {target!r} is neither a .py file nor a module's name")
    with _importable(Path.cwd()):
        module = _import_name(target, reference)
        return _call(_find(module, name, reference), reference, Path(module.__file__ or Path.cwd()).parent)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on sys.path; the modules found there stay loaded and are read anew the next time."""
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if _MARK in getattr(module, "__dict__", {}) and ((folder / top).is_dir() or (folder / f"{top}.py").is_file()):
            del sys.modules[name]  # else a neighbour of the same name would be the one of an earlier source
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            if name.partition(".")[0] not in before and _is_users(getattr(module, "__file__", None) or "", folder):
                setattr(module, _MARK, str(folder))


def _import_file(file: Path, reference: str) -> ModuleType:
    """Import a file under a name that nothing else has; it stays in sys.modules, for the classes in it."""
    base = f"tfinfer_source_{file.stem}"
    name = next(n for n in itertools.chain([base], (f"{base}_{i}" for i in itertools.count(2))) if n not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # the file ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _raised(error, reference, "importing the file", file.parent) from error
    return module


def _import_name(target: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{target}.".startswith(f"{missing}."):
            raise SourceError(
                f"{reference}: there is no module {missing}, neither in the current directory nor installed"
            ) from error
        raise _raised(error, reference, "importing the module", Path.cwd()) from error


def _find(module: ModuleType, name: str, reference: str) -> Any:
    try:
        factory = getattr(module, name)
    except AttributeError:
        names = [known for known in vars(module) if not known.startswith("__")]
        close = difflib.get_close_matches(name, names)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise SourceError(f"{reference}: there is no {name} in it{hint}") from None
    if isinstance(factory, nn.Module) or not callable(factory):
        raise SourceError(
            f"{reference}: expected a function or class that returns the module when called; got {_article(factory)}"
        )
    return factory


def _call(factory: Any, reference: str, folder: Path) -> nn.Module:
    required = _required_arguments(factory)
    if required:
        raise SourceError(
            f"{reference}: expected a factory that takes no arguments; it needs {', '.join(required)}: "
            "write a function without any that passes them"
        )
    try:
        module = factory()
    except (Exception, SystemExit) as error:
        raise _raised(error, reference, "the factory", folder) from error
    if not isinstance(module, nn.Module):
        raise SourceError(f"{reference}: expected the factory to return a torch.nn.Module; got {_article(module)}")
    return module


def _required_arguments(factory: Any) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature to read
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in optional]


def _article(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _raised(error: BaseException, reference: str, during: str, folder: Path) -> SourceError:
    return SourceError(f"{reference}: {during} raised {brief(error)}{_place(error, folder)}")


def _place(error: BaseException, folder: Path) -> str:
    """Return where in the user's own code an error came up, the innermost such line."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f", at {_shown(error.filename)}:{error.lineno}"
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    frames = [
        frame for frame in frames if not frame[0].startswith("<") and frame[0] not in (__file__, importlib.__file__)
    ]
    own = [frame for frame in frames if _is_users(frame[0], folder)]
    nearest = own[-1:] or frames[:1]
    return "".join(f", at {_shown(file)}:{line}" for file, line in nearest)


def _is_users(file: str, folder: Path) -> bool:
    """Whether a file lies in the folder and is not a package that was installed somewhere in it."""
    path = Path(file)
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
