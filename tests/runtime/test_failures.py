"""What onnxruntime raises while it computes is told as an error of the tree, and the call after it works."""

import pytest

import tfinfer
from tfinfer.errors import CudaGraphError, InputError, ProviderError, TfinferError
from tfinfer.session.failures import translated


class Failing:
    """A session that fails whenever it runs."""

    def __init__(self, session, error):
        self.session, self.error = session, error

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run_with_iobinding(self, binding):
        raise self.error


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (RuntimeError("Got invalid dimensions for output: present"), InputError, "cannot compute the tokens given"),
        (RuntimeError("std::bad_alloc"), ProviderError, "no memory for the tokens given"),
        (MemoryError(), ProviderError, "no memory"),
    ],
)
def test_a_graph_that_fails_is_told_and_the_next_call_works(tiny, error, kind, words):
    with tfinfer.load(tiny, threads=1) as model:
        wanted = model.generate([1, 2, 3], max_tokens=4).token_ids
        session = model.decoder._session
        model.decoder._session = Failing(session, error)
        with pytest.raises(TfinferError, match=words) as caught:
            model.generate([1, 2, 3], max_tokens=4)
        assert type(caught.value) is kind
        model.decoder._session = session
        assert model.generate([1, 2, 3], max_tokens=4).token_ids == wanted


def test_what_is_no_failure_of_the_graph_stays_what_it_is(tiny):
    with tfinfer.load(tiny, threads=1) as model:
        model.decoder._session = Failing(model.decoder._session, KeyError("a bug of ours"))
        with pytest.raises(KeyError, match="a bug of ours"):
            model.generate([1, 2, 3], max_tokens=4)


@pytest.mark.parametrize(
    "said, kind",
    [
        ("CUDA failure 900: operation not permitted when stream is capturing", CudaGraphError),
        ("Graph capture did not complete after 3 internal runs", CudaGraphError),
        ("CUDA failure 700: an illegal memory access was encountered", ProviderError),
        ("CUDA failure 2: out of memory", ProviderError),
    ],
)
def test_what_a_device_says_while_it_records_says_what_to_do(said, kind):
    error = translated(RuntimeError(said), "the tokens given", "cuda")
    assert type(error) is kind
    assert ("cuda_graph=False" in str(error)) is (kind is CudaGraphError)
