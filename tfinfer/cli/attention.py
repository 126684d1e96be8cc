"""`tfinfer attention`: what attends to what, as a page, a picture or JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import many, remark, say_json, size
from tfinfer.errors import InputError

if TYPE_CHECKING:
    from tfinfer.attention.maps import AttentionMap

SUFFIXES = (".html", ".png")
LARGE = 10 << 20  # bytes
_DECIMALS = 7  # more than a float32 has are noise


@click.command("attention")
@options.folder
@click.argument("text", required=False)
@click.option("--ids", type=options.IdList(), metavar="1,2,3", help="Ids instead of a text.")
@click.option("--target", metavar="TEXT", help="What the decoder of an encoder-decoder reads.")
@click.option("--layer", type=int, metavar="N", help="This layer alone, from 0.")
@click.option("--head", type=int, metavar="N", help="This head alone, from 0.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="map.html or map.png.")
@options.compute
@options.common
def command(folder: Path, text: str | None, device: str, threads: int | None, **given: Any) -> None:
    """Show what attends to what.

    Writes one HTML page that needs no network, or a PNG (needs matplotlib); --json prints the weights themselves.
    Rows attend, columns are attended to; layers and heads count from 0.
    """
    from tfinfer.model import load

    asked = _asked(text, given["ids"])
    output: Path | None = given["output"]
    _check_output(output, given["as_json"])
    opened: Any = load(folder, device=device, threads=threads)
    with opened as model:
        found: list[AttentionMap] = model.attention_maps(asked, target=given["target"])
        reason = model.reason
    if device == "auto" and not given["as_json"]:
        remark(reason)
    maps = [item.pick(given["layer"], given["head"]) for item in found]
    if output is not None:
        _draw(maps, f"Attention in {folder.resolve().name}", output)
        remark(_about(maps, output))
    if given["as_json"]:
        say_json({"output": output and str(output), "maps": [_plain(item) for item in maps]})


def _asked(text: str | None, ids: list[int] | None) -> str | list[int]:
    """The text or the ids that were asked for."""
    if text is not None and ids is None:
        return text
    if ids is not None and text is None:
        return ids
    raise click.UsageError("expected either a TEXT or --ids 1,2,3")


def _check_output(output: Path | None, as_json: bool) -> None:
    """What can be known to fail before a model is loaded does so."""
    if output is None:
        if not as_json:
            raise click.UsageError("expected -o map.html, -o map.png or --json")
        return
    if output.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"-o: expected a name that ends in .html or .png; got {str(output)!r}")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"{output}: expected a file to write in a folder that exists")
    if output.suffix.lower() == ".png":
        from tfinfer.attention.plot import require

        require()


def _draw(maps: list[AttentionMap], title: str, output: Path) -> None:
    if output.suffix.lower() == ".png":
        from tfinfer.attention.plot import save_png

        _write(output, lambda path: save_png(maps, path, title))
    else:
        from tfinfer.attention.page import render

        page = render(maps, title).encode()
        _write(output, lambda path: path.write_bytes(page))


def _write(output: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file that takes the place of `output` once it is whole."""
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, output)
    except OSError as error:
        raise InputError(f"{output}: expected a file that can be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _about(maps: list[AttentionMap], output: Path) -> str:
    """One line: the file, its size, and what is in it."""

    def measures(item: AttentionMap) -> str:
        shape = f"{many(len(item.weights), 'layer')} x {many(len(item.head_numbers), 'head')}"
        return f"{item.name} {shape}, {len(item.query_tokens)} x {many(len(item.key_tokens), 'token')}"

    count = output.stat().st_size
    note = " (--layer or --head makes it smaller)" if count > LARGE else ""
    return f"{output}: {size(count)}{note}; {'; '.join(map(measures, maps))}"


def _plain(item: AttentionMap) -> dict[str, Any]:
    """A map as JSON takes it, its weights by layer, head, query and key."""
    return {
        "name": item.name,
        "query_tokens": item.query_tokens,
        "key_tokens": item.key_tokens,
        "layers": item.layer_numbers,
        "heads": item.head_numbers,
        "weights": [layer.astype("float64").round(_DECIMALS).tolist() for layer in item.weights],
    }
