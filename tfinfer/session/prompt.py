"""The second graph of a decoder whose weights have few bits: it reads long prompts by products in float32.

Both graphs write the same cache and read the same file of weights. Which is faster is a matter of the processor: with
an instruction that sums products of bytes a prompt is fastest as it is, without one float32 wins from some positions
on. On an EPYC without: 53 M weights times 128 positions took 1.44 times as long in 4 bits, 1.42 times in 8; times 512
positions 1.5 and 2 times.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfinfer.errors import TfinferError
from tfinfer.session.providers import Opened

LEAST = 96  # positions: with fewer, widening 8-bit weights for one pass takes longer than it saves
# As Linux names them: bytes times bytes, summed by fours, for 32 bytes or more at once.
SUMS_OF_BYTES = {"avx_vnni", "avx512_vnni", "asimddp", "i8mm"}


class PromptGraph:
    """Opened when the first prompt is long enough; several threads may ask for it.

    least: how many positions make it worth while; None: this machine is faster without. why_not: why it does not open.
    """

    def __init__(self, open_it: Callable[[], Opened], files: Sequence[Path], names: set[str]) -> None:
        """files: those of the folder, which were checked; if they are others when it opens, it stays closed.

        names: of what goes in and out of it.
        """
        self.least, self.why_not = least_here(), ""
        self._open, self._names, self._files, self._stamps = open_it, names, files, _stamps(files)
        self._lock = threading.Lock()
        self._session: Any = None

    def share(self, positions: int, piece: int) -> int:
        """How many of so many positions it reads, in pieces of `piece`; the rest is too short to be worth it."""
        if self.least is None or min(positions, piece) < self.least or self.session is None:
            return 0
        rest = positions % piece
        return positions if rest == 0 or rest >= self.least else positions - rest

    @property
    def session(self) -> Any:
        """The open session; None where it does not open: then the decoder's own graph, which did, reads everything."""
        with self._lock:
            if self._session is None and not self.why_not:
                self._try()
            return self._session

    def _try(self) -> None:
        if _stamps(self._files) != self._stamps:
            self.why_not = "the folder was changed after it was loaded"
            return
        try:
            session = self._open().session
        except TfinferError as error:
            self.why_not = str(error)
            return
        odd = {value.name for value in (*session.get_inputs(), *session.get_outputs())} ^ self._names
        if odd:
            self.why_not = f"the graph and the manifest disagree on {', '.join(sorted(odd)[:8])}"
        else:
            self._session = session

    @contextlib.contextmanager
    def always(self) -> Iterator[None]:
        """Let it read prompts of any length, wherever it runs: for a proof."""
        usual, self.least = self.least, 1
        try:
            yield
        finally:
            self.least = usual

    def close(self) -> None:
        """Let the graph go."""
        with self._lock:
            self._session, self.why_not = None, "it was closed"


def least_here(root: Path = Path("/")) -> int | None:
    """From how many positions on float32 products are faster on this processor; None: never, or nobody knows.

    Args:
        root: where `proc` is.
    """
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    told = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return LEAST if told and not SUMS_OF_BYTES & set(told.split()) else None


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int] | None]:
    """What changes when a file is written again; None where there is none."""
    return [_stamp(path) for path in files]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
