"""`tfinfer generate`: continue a prompt, printing text as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tfinfer.cli import options
from tfinfer.cli.console import duration, many, remark, say, say_json
from tfinfer.errors import InputError

if TYPE_CHECKING:
    from tfinfer.completion import Chunk, Completion
    from tfinfer.model import Model
    from tfinfer.tokens.sampling import TokenLogprobs


@click.command("generate")
@options.folder
@click.argument("prompt", required=False)
@click.option("--ids", type=options.IdList(), metavar="1,2,3", help="Ids instead of a text.")
@options.sampling
@options.speculation
@click.option("--chat", is_flag=True, help="The prompt is a message for the folder's chat template.")
@click.option("--system", metavar="TEXT", help="The system message of --chat.")
@click.option(
    "--conversation",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on with the conversation in FILE, or begin one, and save it there.",
)
@click.option("--stats", is_flag=True, help="Timings, tokens/s and reused tokens, to stderr.")
@options.compute
@options.cuda_graph
@options.common
def command(folder: Path, prompt: str | None, device: str, threads: int | None, cuda_graph: bool, **given: Any) -> None:
    """Continue a prompt.

    PROMPT is a text, or - to read it from stdin as it is. A folder without a tokenizer takes --ids and prints ids.
    """
    from tfinfer.model import load

    asked, file = _prompt(prompt, given["ids"], given["chat"], given["system"]), given["conversation"]
    if file and given["chat"]:
        raise click.UsageError("--conversation goes on with a text or --ids; --chat is a whole conversation by itself")
    started = time.perf_counter()
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(load(folder, device=device, threads=threads, cuda_graph=cuda_graph))
        seconds = time.perf_counter() - started
        if given["draft"] is not None:
            given["draft"] = opened.enter_context(load(given["draft"], device=device, threads=threads))
        if device == "auto" and not given["as_json"]:
            remark(model.reason)
        speaker: Any = model if file is None else model.conversation(file if file.exists() else None)
        settings = _settings(model, asked, given, getattr(speaker, "length", 0))
        about = _about(model, folder, seconds) if given["as_json"] else None
        if about is None and given["num_beams"] == 1:
            chunks = _print_stream(speaker, asked, settings)
            for entry in filter(None, (chunk.logprobs for chunk in chunks)):
                remark(_logprobs_line(model, entry))
            last: Chunk | Completion = chunks[-1]
        else:
            last = _print_whole(speaker, asked, settings, about)
        if file is not None:
            speaker.save(file)
        if given["stats"]:
            remark(_stats_line(model, seconds, last))


def _prompt(prompt: str | None, ids: list[int] | None, chat: bool, system: str | None) -> Any:
    """The text, ids or messages that were asked for."""
    if (prompt is None) == (ids is None):
        raise click.UsageError("expected either a PROMPT (- reads it from stdin) or --ids 1,2,3")
    if system is not None and not chat:
        raise click.UsageError("--system is for --chat")
    if ids is not None:
        if chat:
            raise click.UsageError("--chat takes a text, not --ids")
        return ids
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: expected a text in UTF-8: {error}") from error
    if not chat:
        return prompt
    head = [{"role": "system", "content": system}] if system is not None else []
    return [*head, {"role": "user", "content": prompt}]


def _settings(model: Model, asked: Any, given: dict[str, Any], past: int) -> dict[str, Any]:
    """The keyword arguments of `Model.generate`; past: how many tokens a conversation has already."""
    most = given["max_tokens"]
    if most is None:
        before = len(model.manifest.token_ids.decoder_start) or past + _count(model, asked)
        most = max(1, min(options.MAX_TOKENS, model.manifest.max_length - before))
    same = {name: given[name] for name in options.SAMPLING if name not in ("max_tokens", "logit_bias", "stop")}
    bias, stop = dict(given["logit_bias"]), [options.unescape(text) for text in given["stop"]]
    same |= {"lookup": given["lookup"], "draft": given["draft"]}
    return {**same, "max_tokens": most, "logit_bias": bias or None, "stop": stop or None}


def _count(model: Model, asked: Any) -> int:
    """How many tokens a prompt has."""
    if isinstance(asked, str):
        return len(model.tokenize(asked))
    if asked and isinstance(asked[0], dict):
        text = model.render_chat(asked)
        return len(model.tokenizer.encode(text, add_special_tokens=False)) if model.tokenizer else 0
    return len(asked)


def _print_stream(speaker: Any, asked: Any, settings: Any) -> list[Chunk]:
    """Print the tokens as they come; `speaker`: a model or a conversation."""
    chunks = []
    for chunk in speaker.stream(asked, **settings):
        ids = "".join(f"{i} " for i in chunk.token_ids)
        if piece := ids if chunk.text is None else chunk.text:
            say(piece, newline=False)
        chunks.append(chunk)
    say()
    return chunks


def _print_whole(speaker: Any, asked: Any, settings: Any, about: dict[str, Any] | None) -> Completion:
    """Print one or several sequences when they are done, as JSON where there is `about`; returns the best one."""
    found = speaker.generate(asked, **settings)
    completions: list[Completion] = found if isinstance(found, list) else [found]
    if about is None:
        for one in completions:
            say(" ".join(map(str, one.token_ids)) if one.text is None else one.text)
    elif isinstance(found, list):
        say_json({"sequences": [one.to_dict() for one in completions], "model": about})
    else:
        say_json({**found.to_dict(), "model": about})
    return completions[0]


def _about(model: Model, folder: Path, seconds: float) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "folder": str(folder),
        "reference": manifest.source.reference,
        "kind": manifest.kind,
        "dtype": manifest.dtype,
        "max_length": manifest.max_length,
        "device": model.device,
        "reason": model.reason,
        "threads": dataclasses.asdict(model.threads),
        "load_seconds": seconds,
    }


def _logprobs_line(model: Model, entry: TokenLogprobs) -> str:
    def name(token: int) -> str:
        return f"{token} {model.tokenizer.decode([token])!r}" if model.tokenizer else str(token)

    top = ", ".join(f"{name(token)} {logprob:.3f}" for token, logprob in entry.top)
    return f"{name(entry.token_id)}: {entry.logprob:.3f} (likeliest: {top})"


def _stats_line(model: Model, load: float, last: Any) -> str:
    """`last`: what has usage, timings and finish reason, a completion or the last chunk of a stream."""
    usage, timings, threads = last.usage, last.timings, many(model.threads.count, "thread")
    later = usage.completion_tokens - 1
    speed = f", {later / timings.decode_seconds:.1f} tokens/s after it" if later > 0 and timings.decode_seconds else ""
    reused = f" ({usage.reused_tokens} reused)" if usage.reused_tokens else ""
    tokens = f"{many(usage.prompt_tokens, 'token')} in{reused}, {many(usage.completion_tokens, 'token')} out"
    if usage.proposed_tokens:
        tokens += f", {usage.accepted_tokens} of {usage.proposed_tokens} drafted ones right"
    first = "first token" if getattr(last, "score", None) is None else "beam search"  # which has no first token
    return (
        f"{tokens} ({last.finish_reason}); load {duration(load)}, "
        f"{first} {duration(timings.first_token_seconds)}{speed}; {model.device}, {threads}"
    )
