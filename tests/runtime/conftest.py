"""Fixtures of the runtime's tests. Nothing here may need torch."""

import shutil
from pathlib import Path

import pytest

import tfinfer

TINY = Path(__file__).parent / "tiny"


@pytest.fixture
def tiny() -> Path:
    """A folder with a two-layer random decoder (see tests/zoo/make_tiny.py)."""
    return TINY


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture(scope="session")
def model():
    with tfinfer.load(TINY, threads=1) as loaded:
        yield loaded
