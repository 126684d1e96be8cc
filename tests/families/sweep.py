"""Every causal family of the installed transformers at toy size: exported, proved, generated from, and counted.

`python sweep.py [FAMILY ...] [--json FILE]` takes the families from transformers' own mapping, each in a process of its
own. Exit code 1 where too few of those that PyTorch runs pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

LEAST = 0.90  # of the families that PyTorch runs
MARK = "RESULT "
PASSED, NOT_BUILT = "pass", "not built"
Result = dict[str, Any]
RECORD = Path(__file__).with_name("swept.json")


def families() -> list[str]:
    """Return the names of all causal families that transformers can make of a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return list(NAMES)


def run_one(family: str, limit: float) -> Result:
    """Return the result of one family, from a process that is ended after `limit` seconds."""
    command = [sys.executable, str(Path(__file__).with_name("one.py")), family]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"family": family, "result": "time", "why": f"not done within {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"family": family, "result": "crash", "why": f"exit code {done.returncode}: {done.stderr[-600:]}"}
    found: Result = json.loads(lines[-1].removeprefix(MARK))
    return found


def reason(result: Result) -> str:
    """Return why a family did not pass, without what differs from family to family: names, sizes, places."""
    why = str(result["why"]).strip().splitlines()
    text = (why[-1] if result["result"] == "crash" else why[0]) if why else "no reason"
    text = re.sub(r", in [\w.\[\]]+ at .*|, in the module itself.*", "", text)
    return re.sub(r"\d+", "N", re.sub(r"(/[\w.-]+)+", "PATH", text))[:160]


def table(results: list[Result]) -> list[str]:
    """Return the results as lines of a markdown table."""
    lines = ["| family | result | attention | states | seconds |", "|---|---|---|--:|--:|"]
    for result in sorted(results, key=lambda r: (r["result"] != PASSED, r["result"], r["family"])):
        ways = "; ".join(result.get("ways", [])) or reason(result)
        cells = (result["family"], result["result"], ways, result.get("states", ""), result.get("seconds", ""))
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return lines


def grouped(results: list[Result]) -> list[str]:
    """Return why families did not pass, the commonest reason first, with their names."""
    groups: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result["result"] != PASSED:
            groups[f"{result['result']}: {reason(result)}"].append(result["family"])
    return [f"{len(g):3d}  {why}\n     {', '.join(g)}" for why, g in sorted(groups.items(), key=lambda i: -len(i[1]))]


def share(results: list[Result]) -> tuple[int, int]:
    """Return how many families passed, and how many PyTorch runs."""
    ran = [result for result in results if result["result"] != NOT_BUILT]
    return sum(result["result"] == PASSED for result in ran), len(ran)


def summary(results: list[Result]) -> str:
    """Return the counts in one line."""
    passed, ran = share(results)
    counts = f"{len(results)} families; PyTorch runs {ran} of them at toy size; {passed} pass"
    return f"{counts} ({passed / max(ran, 1):.1%}, at least {LEAST:.0%} expected)"


def sweep(names: list[str], processes: int, limit: float, report: Path | None = None) -> list[Result]:
    """Return the results in the order of `names`; progress goes to stderr, what is known so far to `report`."""
    results: list[Result] = []
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for result in pool.map(lambda name: run_one(name, limit), names):
            results.append(result)
            told = result["result"] if result["result"] == PASSED else f"{result['result']}: {reason(result)}"
            print(f"[{len(results)}/{len(names)}] {result['family']}: {told}", file=sys.stderr, flush=True)
            if report is not None:  # whole at any time, so that a sweep that is stopped still tells
                report.write_text(json.dumps(results, indent=1) + "\n")
    return results


def record(results: list[Result]) -> str:
    """What the README tells of a sweep of all families, as JSON: the counts, and why families did not pass."""
    from transformers import __version__ as version

    passed, ran = share(results)
    failed = [r for r in results if r["result"] != PASSED]
    told = [{"family": r["family"], "result": r["result"], "why": reason(r)} for r in failed]
    counts = {"date": f"{datetime.date.today()}", "transformers": version}
    counts |= {"families": len(results), "ran": ran, "passed": passed}
    return json.dumps({**counts, "failed": told}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="only these (default: all)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--record", action="store_true", help=f"write what the README tells of them to {RECORD.name}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180, help="the most that one family may take")
    asked = parser.parse_args()
    started = time.perf_counter()
    results = sweep(asked.families or families(), asked.processes, asked.seconds, asked.json)
    if asked.record:
        RECORD.write_text(record(results), "utf-8")
    print("\n".join(table(results)))
    print("\nNot passed:\n" + "\n".join(grouped(results)))
    print(f"\n{summary(results)}, in {time.perf_counter() - started:.0f} s")
    passed, ran = share(results)
    return 0 if passed >= LEAST * ran else 1


if __name__ == "__main__":
    sys.exit(main())
