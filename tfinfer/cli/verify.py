"""`tfinfer verify`: a folder proves itself, without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from tfinfer.cli import options
from tfinfer.cli.console import Status, many, remark, say, say_json

FAILED = 4


@click.command("verify")
@options.folder
@options.compute
@options.cuda_graph
@options.common
@click.pass_context
def command(
    ctx: click.Context, folder: Path, device: str, threads: int | None, cuda_graph: bool, as_json: bool
) -> None:
    """Let a folder prove itself against its golden file.

    The cases of its proof run again here; what PyTorch computed for them, or an adopted graph without its cache, is in
    the folder. Exits 4 when one fails.
    """
    from tfinfer.integrity import check_files
    from tfinfer.manifest import load_manifest
    from tfinfer.proof.prove import open_session, verify_folder

    with Status() as status:
        status("check the files")
        manifest = load_manifest(folder)
        check_files(folder, manifest)
        status("open the graph")
        session = open_session(manifest, folder, device=device, threads=threads, cuda_graph=cuda_graph)
        try:
            verdict = verify_folder(session, folder, status)
        finally:
            session.close()
    if as_json:
        about = {"passed": verdict.passed, "reason": session.reason, "threads": dataclasses.asdict(session.threads)}
        say_json({"folder": str(folder), **about, **dataclasses.asdict(verdict)})
    else:
        for line in verdict.lines():
            say(line)
        if device == "auto":
            remark(session.reason)
        where = f"{verdict.device}, {verdict.dtype}, {many(session.threads.count, 'thread')}"
        say(f"{folder}: {'proved' if verdict.passed else 'FAILED'} ({where})")
    if not verdict.passed:
        ctx.exit(FAILED)
