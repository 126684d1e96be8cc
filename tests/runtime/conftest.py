"""Fixtures of the runtime's tests. Nothing here may need torch."""

import shutil
import sys
from pathlib import Path

import pytest

import tfinfer

TINY = Path(__file__).parent / "tiny"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "zoo"))


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


@pytest.fixture
def remembering():
    """A model of one of the kinds of tests/zoo/remembering.py, which computes from what stands in its cache."""
    from remembering import Remembering

    from tfinfer.session.pool import CachePool

    with tfinfer.load(TINY, threads=1) as loaded:

        def opened(kind):
            decoder = loaded.decoder = Remembering(kind, loaded.manifest.num_logits)
            loaded.manifest = decoder.described(loaded.manifest)
            loaded._pool = CachePool(loaded.decoder.open_cache)
            return loaded

        real = loaded.decoder
        yield opened
        loaded.decoder = real
