"""What lets go of something at the end of a `with` block."""

from __future__ import annotations

import abc
from typing import Self


class Closing(abc.ABC):
    """A context manager that closes itself, however its block ends."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
