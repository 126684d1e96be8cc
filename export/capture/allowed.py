"""The allow-list: what is known of each operation. `rules/` fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RULES: dict[Any, Callable[..., Any]] = {}
COMPLEX_RULES: dict[Any, Callable[..., Any]] = {}
