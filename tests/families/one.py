"""One family of causal models at toy size: build, run, export, prove, generate; the result as a line of JSON.

`python one.py FAMILY` prints it last, after everything that torch and transformers say.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from shrink import VOCABULARY, candidates

import tfinfer
from tfinfer.errors import TfinferError
from tfinfer.export import export_model
from tfinfer.export.exporter import ExportReport
from tfinfer.export.sources import Source, load_source

MARK = "RESULT "
PARAMETERS = 30_000_000
SECONDS = 60  # for all tries to build it
FACTORS = (4, 2, 1)  # of weights: with larger ones than usual no mistake hides in noise
STEADY = 1e-5  # a tenth of what a proof allows
PROMPT, TOKENS, LONGEST = 9, 64, 100


class NotBuilt(Exception):
    """PyTorch does not run the family at any size that was tried."""


def build(family: str, **changes: Any) -> Any:
    """Return a random model of a family at toy size that PyTorch runs on ids alone.

    changes: fields of the configuration that are to be so. Raises NotBuilt with the error of the first try.
    """
    default = transformers.AutoConfig.for_model(family)
    errors, started = [], time.perf_counter()
    for kwargs in candidates(default):
        try:
            return _running(transformers.AutoConfig.for_model(family, **kwargs | changes))
        except Exception as error:  # of any kind: the sizes do not fit each other
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        if time.perf_counter() - started > SECONDS:
            break
    raise NotBuilt(errors[0])


def _running(config: Any) -> Any:
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > PARAMETERS:
        raise NotBuilt(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros, as the row of a padding token, would make ties
            parameter[parameter == 0] = 0.02 * torch.randn(int((parameter == 0).sum()))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    ids, last = torch.randint(3, VOCABULARY - 20, (2, 11)), 1
    for factor in FACTORS:  # the first that stays finite
        with torch.no_grad():
            for parameter in matrices:
                parameter.mul_(factor / last)
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
        last = factor
        if logits.shape[:2] != ids.shape:
            raise NotBuilt(f"logits of {tuple(logits.shape)} for ids of {tuple(ids.shape)}")
        if logits.isfinite().all() and (factor == FACTORS[-1] or _is_steady(model, ids, logits)):
            return model
    raise NotBuilt("the logits are not finite")


def _is_steady(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the model itself, in twice the precision, gives the same logits: else it makes noise of rounding."""
    try:
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(input_ids=ids, use_cache=False, return_dict=True).logits
    except RuntimeError:  # it computes in float32 alone
        return True
    return torch.allclose(exact.double(), logits.double(), rtol=STEADY, atol=STEADY)


def run(family: str, folder: Path) -> dict[str, Any]:
    """Return what became of a family: pass; tokens, which greedy generation says otherwise; or an error's class."""
    try:
        model = build(family)
    except Exception as error:
        return {"result": "not built", "why": str(error)[:300]}
    started = time.perf_counter()
    try:
        model.save_pretrained(folder / "checkpoint")
        source = load_source(str(folder / "checkpoint"))
        longest, report = _export(source, folder / "out")
    except TfinferError as error:
        return {"result": type(error).__name__, "why": str(error)[:1500]}
    except Exception:
        return {"result": "crash", "why": traceback.format_exc()[-1500:]}
    result = "pass" if generates(model, folder / "out", longest) else "tokens"
    return {
        "result": result,
        "why": "",
        "ways": [f"{a.pattern} x{a.count} ({a.operator})" for a in report.manifest.attention],
        "states": len(report.manifest.states),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _export(source: Source, out: Path) -> tuple[int, ExportReport]:
    """The longest length, and the report; where the module allows less than was asked for, the error says how much."""
    longest = min(LONGEST, source.max_length or LONGEST)
    try:
        return longest, export_model(source, out, max_length=longest)
    except TfinferError as error:
        allowed = re.search(r"give --max-length (\d+) or less", str(error))
        if allowed is None or int(allowed[1]) <= 2 * PROMPT:
            raise
        longest = int(allowed[1])
    return longest, export_model(source, out, max_length=longest)


def generates(model: Any, out: Path, longest: int) -> bool:
    """Whether the folder's greedy tokens, 64 or as many as fit, are those of full passes in PyTorch."""
    torch.manual_seed(1)
    count = min(TOKENS, longest - PROMPT)
    prompt = torch.randint(3, VOCABULARY - 20, (1, PROMPT))
    wanted = prompt
    with torch.no_grad():
        for _ in range(count):
            wanted = torch.cat([wanted, model(input_ids=wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    with tfinfer.load(out) as loaded:
        got = loaded.generate(prompt[0].tolist(), max_tokens=count, stop_ids=[]).token_ids
    return list(got) == wanted[0, PROMPT:].tolist()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        print(MARK + json.dumps({"family": sys.argv[1], **run(sys.argv[1], Path(temporary))}))
