"""`tfinfer export`: a module into a folder. The one command that needs torch, which it imports when it runs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, duration, many, say, say_json, size
from tfinfer.errors import MissingDependencyError

if TYPE_CHECKING:
    from tfinfer.export import ExportReport

DTYPES, FLAVORS = ("fp32", "fp16", "bf16"), ("ort", "standard")
KINDS = ("auto", "encoder", "decoder", "encoder-decoder")
STAGES = ("import torch", "read the source", "capture", "passes", "write", "proof", "seal")
NEEDED = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")


@click.command("export")
@click.argument("source")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="The folder to make.")
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="FILE", help="safetensors, or a state dict of torch.save."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A PEFT adapter (LoRA) to merge into the weights; repeatable.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE", help="A tokenizer.json to take along.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Of weights and cache; int8, int4: of weights alone.",
)
@click.option("--block-size", type=click.Choice(["32", "64", "128"]), help="int8, int4: numbers that share a scale.")
@click.option("--per-channel", is_flag=True, help="8 bits: a scale for each channel, not each block; faster on CPUs.")
@click.option(
    "--head-bits",
    type=click.Choice(["4", "8"]),
    help="int4: of head and embedding; default: 8, the only one of int8.",
)
@click.option("--asymmetric", is_flag=True, help="int8, int4: with zero points.")
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="int8, int4: weights that stay float32, as '*.lm_head.*'; repeatable.",
)
@click.option(
    "--keep-agreement",
    type=float,
    metavar="SHARE",
    help="int8, int4: widen weights until so many first choices are PyTorch's, as 0.99.",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="int8, int4: of activations and cache; CUDA takes no fp32 here.",
)
@click.option(
    "--quantiser",
    type=click.Choice(["rtn", "gptq"]),
    help="int8, int4: round to the nearest, or for the inputs on a text; default: gptq for int4, rtn for int8.",
)
@click.option(
    "--cache",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Of a decoder's keys and values; int8: a quarter of the memory.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plain text for gptq and for the ranges of an int8 cache; default: what the model itself writes.",
)
@click.option(
    "--flavor", type=click.Choice(FLAVORS), default="ort", show_default=True, help="standard: no contrib operators."
)
@click.option("--max-length", type=int, metavar="N", help="Longest sequence; default: the model's own, at most 4096.")
@click.option(
    "--max-source-length", type=int, metavar="N", help="Longest source of an encoder-decoder; default: as above."
)
@click.option("--kind", type=click.Choice(KINDS), default="auto", show_default=True, help="What the module is.")
@click.option(
    "--inputs",
    multiple=True,
    metavar="SPEC",
    help="An input of a module that takes no ids, as pixels:float32[batch,3,height,width]; repeatable.",
)
@click.option("--start-ids", type=options.IdList(), metavar="1,2", help="What an encoder-decoder's target begins with.")
@click.option("--attention/--no-attention", default=True, help="Add the graph that `tfinfer attention` asks.")
@click.option(
    "--also",
    multiple=True,
    type=click.Choice(["genai", "optimum"]),
    help="Write what onnxruntime-genai or optimum needs to run the folder as well; repeatable.",
)
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier export made.")
@click.option("-v", "--verbose", is_flag=True, help="A line on stderr for each stage.")
@options.common
def command(source: str, out: Path, kind: str, overwrite: bool, verbose: bool, as_json: bool, **given: Any) -> None:
    """Turn a PyTorch transformer into a folder that runs without torch.

    SOURCE is file.py:factory or package.module:factory, where the factory takes no arguments and returns the module; or
    a folder with a Hugging Face checkpoint of a causal language model. Its code is run. The result is proved against
    the module before anything is written.
    """
    with (
        Status(verbose, STAGES) as status,
        contextlib.redirect_stdout(sys.stderr),
    ):  # what the user's code prints is no result
        status("import torch")
        with _needing_torch():
            from tfinfer.export import export_model
            from tfinfer.export.exporter import check_length
            from tfinfer.export.folder import check_target
            from tfinfer.export.sources import load_source
        for name in ("max_length", "max_source_length"):
            check_length(name, given[name])
        check_target(out, overwrite)
        status("read the source")
        files = {name: given.pop(name) for name in ("weights", "tokenizer", "adapters")}
        module = load_source(source, **files)
        given["symmetric"] = not given.pop("asymmetric")
        for name in ("block_size", "head_bits"):
            given[name] = int(given[name]) if given[name] else None
        report = export_model(module, out, kind=kind, overwrite=overwrite, progress=status, **given)
    if as_json:
        say_json(report.to_dict())
    else:
        for line in _lines(report):
            say(line)


@contextlib.contextmanager
def _needing_torch() -> Iterator[None]:
    """Name the extra where a package of the exporter is missing or does not load."""
    try:
        yield
    except MissingDependencyError:
        raise
    except (ImportError, OSError) as error:  # OSError: a native library does not load
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in NEEDED:
            raise MissingDependencyError(f"exporting needs {name}: pip install 'tfinfer[export]'") from error
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingDependencyError(
            f"what exporting needs does not load: {said}; mend: pip install 'tfinfer[export]'"
        ) from error


def _lines(report: ExportReport) -> Iterator[str]:
    """What a user wants to know when it is done."""
    manifest = report.manifest
    whole = size(sum(file.bytes for file in manifest.files.values()))
    width = f"{manifest.kind}, {manifest.dtype}, up to {manifest.max_length} tokens"
    yield f"{report.folder}: {whole}, {width}, made in {duration(sum(report.seconds.values()))}"
    for verdict in report.verdicts:
        worst = max(verdict.cases, key=lambda case: case.excess)
        found = f"{many(len(verdict.cases), 'case')}, {worst.measure} {worst.worst:.1e} at most"
        if verdict.greedy:
            found += f"; {verdict.greedy.identical} of {verdict.greedy.compared} greedy tokens are PyTorch's"
        yield f"proved on {verdict.device} in {verdict.dtype}: {found}"
    for note in report.notes:
        yield f"note: {note}"
    prompt = '"..."' if manifest.text.tokenizer else "--ids 1,2,3"
    folder = shlex.quote(str(report.folder))
    if manifest.encoder is not None and manifest.kind == "encoder" and manifest.encoder.input_ids is None:
        yield f"next: tfinfer.load({str(report.folder)!r}).run({{...}}) in Python"
    else:
        yield f"next: tfinfer {'encode' if manifest.kind == 'encoder' else 'generate'} {folder} {prompt}"
