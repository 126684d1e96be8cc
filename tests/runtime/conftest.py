"""What several tests of the runtime share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny() -> Path:
    """An exported decoder of two small layers with random weights and a tokenizer. Not to be written to."""
    return Path(__file__).parent / "tiny"
