"""The public surface, and what importing it does not do."""

import subprocess
import sys

import pytest

import tfinfer

BANNED = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers")


def test_the_public_names_are_these():
    assert set(tfinfer.__all__) == {
        "Batcher",
        "Chunk",
        "Completion",
        "Conversation",
        "Model",
        "TfinferError",
        "Timings",
        "Usage",
        "__version__",
        "errors",
        "load",
    }
    for name in tfinfer.__all__:
        assert getattr(tfinfer, name) is not None
    with pytest.raises(AttributeError):
        tfinfer.torch  # noqa: B018


def test_every_error_is_in_the_tree_and_has_an_exit_code():
    for value in vars(tfinfer.errors).values():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, tfinfer.TfinferError)
            assert value.exit_code in (1, 2, 3, 4)
            assert value.__name__ in tfinfer.errors.__doc__


def test_the_runtime_works_where_torch_and_onnx_cannot_be_imported(tiny):
    script = (
        f"import sys\nfor name in {BANNED!r}: sys.modules[name] = None\n"
        "import tfinfer\nassert 'onnxruntime' not in sys.modules and 'numpy' not in sys.modules\n"
        "from tfinfer.proof.prove import verify_folder\nimport pathlib\n"
        "with tfinfer.load(sys.argv[1]) as model:\n"
        "    assert model.generate('the cat', max_tokens=4).token_ids\n"
        "    assert verify_folder(model.decoder, pathlib.Path(sys.argv[1])).passed\n"
        "import tfinfer.doctor, tfinfer.bench, tfinfer.cli.main\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_network_is_asked_for_and_telemetry_is_off(tiny):
    script = (
        "import os, socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "import tfinfer\n"
        "tfinfer.load(sys.argv[1]).generate([1, 2], max_tokens=3)\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
