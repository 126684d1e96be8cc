"""Reads the small JSON files beside a model. Knows nothing of what they mean."""

import json
from pathlib import Path
from typing import Any

from tfinfer.errors import SourceError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    content = _parse(path)
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected a JSON object; got a {type(content).__name__}")
    return content


def read_list(path: Path) -> list[Any]:
    """Return the list in a JSON file."""
    content = _parse(path)
    if not isinstance(content, list):
        raise SourceError(f"{path}: expected a JSON list; got a {type(content).__name__}")
    return content


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: expected JSON; got something else: {error}") from error


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where there is no such file."""
    return read_json(path) if path.is_file() else {}


def brief(error: BaseException) -> str:
    """Return an error of foreign code as one line: its type and its message."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
