"""Attention maps into one HTML page that needs nothing else: no network, no fonts, no scripts from elsewhere.

A weight is stored as a level of 16 bits, weight = (level / 65535)^2, so that small ones keep their digits too: what
is read back is within 0.00002. The high bytes come before the low ones, deflated, in base64. Tokens are untrusted: they
are only ever JSON with no `<` in it, and text for the page's script, never HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfinfer.attention.maps import AttentionMap
from tfinfer.errors import InputError

_FULL = 2**16 - 1


def render(maps: Sequence[AttentionMap], title: str) -> str:
    """The page, as text.

    Raises:
        InputError: there are no maps.
    """
    if not maps:
        raise InputError("expected at least one attention map to draw; got none")
    data = {"maps": [_packed(item) for item in maps]}
    template = files("tfinfer.attention").joinpath("page.html").read_text(encoding="utf-8")
    values = {
        "TITLE": html.escape(_whole(title)),
        "STYLE_HASH": _hash("style", template),
        "SCRIPT_HASH": _hash("script", template),
        "DATA": _json(data),
    }
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: values[match[1]], template)


def _packed(item: AttentionMap) -> dict[str, Any]:
    return {
        "name": _whole(item.name),
        "queries": [_whole(token) for token in item.query_tokens],
        "keys": [_whole(token) for token in item.key_tokens],
        "layers": list(item.layer_numbers),
        "heads": [list(item.head_numbers[: layer.shape[0]]) for layer in item.weights],
        "data": [_encode(layer) for layer in item.weights],
    }


def _encode(weights: NDArray[np.float32]) -> str:
    """Weights of any shape as base64 of their deflated levels."""
    levels = np.rint(np.sqrt(np.clip(weights, 0, 1, dtype=np.float64)) * _FULL).astype(">u2")
    planes = levels.reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in, whatever strings it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _whole(text: str) -> str:
    """A text that can be written in UTF-8: halves of characters become the sign for unknown ones."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _hash(element: str, template: str) -> str:
    """What the policy of the page calls its own script or style by; anything else is refused by the browser."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii")
