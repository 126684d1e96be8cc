"""Whether it pays to look for the best logits where they lie, rather than copying all of them: both ways, in turns.

    python benchmarks/select_logits.py --device cuda

On a CPU nothing has to be copied, so the comparison there is with numpy's own search; it is why only devices select.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from tfinfer.session.memory import Buffer, CudaMemory, HostMemory
from tfinfer.session.select import Selecting
from tfinfer.session.threads import thread_count
from tfinfer.tokens.sampling import History, SamplingParams, choose, choose_among, generators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 50], help="0 is greedy")
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    for vocab in given.vocab:
        selecting = Selecting(vocab, "float32", given.device, thread_count(None))
        memory = HostMemory() if given.device == "cpu" else CudaMemory()
        for rows in given.rows:
            for top_k in given.top_k:
                print(json.dumps(compare(selecting, memory, vocab, rows, top_k, given.rounds)), flush=True)


def compare(
    selecting: Selecting, memory: HostMemory | CudaMemory, vocab: int, rows: int, top_k: int, rounds: int
) -> dict[str, object]:
    """Medians in microseconds, and the ratio of each round's two ways: above 1 where selecting is faster."""
    buffer = memory.allocate((rows, 1, vocab), "float32")
    logits = np.random.default_rng(0).normal(size=buffer.shape).astype(np.float32)
    memory.copy(buffer, 0, Buffer(logits.ctypes.data, logits.shape, "float32", logits.nbytes, logits), 0, logits.nbytes)
    params = SamplingParams(temperature=0.8 if top_k else 0.0, top_k=top_k, seed=0)
    selection = selecting.bind(buffer, top_k or 1)

    def whole() -> object:
        read = logits if selecting.device == "cpu" else memory.read(buffer)
        return choose(read[:, 0], History((), 0, params), params, generators(params, rows)).tolist()

    def few() -> object:
        found = selection.run()
        assert found is not None
        return choose_among(*found, params, generators(params, rows)).tolist()

    assert whole() == few()
    times = [(_seconds(whole), _seconds(few)) for _ in range(rounds)]
    ratios = sorted(one / other for one, other in times)
    return {
        "device": selecting.device, "vocab": vocab, "rows": rows, "top_k": top_k,
        "all_us": round(1e6 * statistics.median(one for one, _ in times), 1),
        "few_us": round(1e6 * statistics.median(other for _, other in times), 1),
        "few_is_faster": [round(ratios[at], 2) for at in (len(ratios) // 2, len(ratios) // 10, 9 * len(ratios) // 10)],
    }  # fmt: skip


def _seconds(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
