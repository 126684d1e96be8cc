"""How numbers are to be stored: what is unknown or does not go together is told before anything is computed."""

import pytest
import torch

from tfinfer.errors import InputError
from tfinfer.export import export_model
from tfinfer.export.modules import Decoder, TransformerConfig


def decoder():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return Decoder(TransformerConfig(**sizes, max_length=24)).eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int2"}, "unknown dtype 'int2': expected one of fp32, fp16, bf16, int8, int4"),
        ({"flavor": "onnx"}, "unknown flavor 'onnx': expected one of ort, standard"),
        ({"kind": "encoders"}, "unknown kind 'encoders': expected one of "),
        ({"dtype": "int4", "flavor": "standard"}, "int4 needs operators that are not ONNX's own"),
        ({"dtype": "int8", "flavor": "standard"}, "int8 needs operators that are not ONNX's own"),
        ({"dtype": "fp16", "cache": "int8"}, "beside activations in float32"),
        ({"dtype": "fp32", "activations": "bf16"}, "or the dtype bf16 alone, not fp32"),
        ({"dtype": "fp16", "activations": "fp16"}, "activations are for weights of a few bits"),
        ({"dtype": "int8", "quantiser": "rtn", "calibration": "a.txt"}, "a calibration text is for the quantiser gptq"),
        # Whose text it is where weights and cache could take it: the cache's where weights are rounded to the nearest,
        # so that not they are what is wrong.
        ({"dtype": "int8", "cache": "int8", "calibration": "a.txt"}, "a.txt: a text to calibrate on needs a tokenizer"),
        ({"dtype": "int4", "cache": "int8", "calibration": "a.txt"}, "a.txt: a text to calibrate on needs a tokenizer"),
        ({"dtype": "fp32", "cache": "int8", "calibration": "a.txt"}, "a.txt: a text to calibrate on needs a tokenizer"),
    ],
    ids=str,
)
def test_what_is_unknown_or_does_not_go_together_is_told(options, words, tmp_path):
    stages = []
    with pytest.raises(InputError, match=words):
        export_model(decoder(), tmp_path / "out", attention=False, progress=stages.append, **options)
    assert "proof" not in stages
    assert not (tmp_path / "out").exists()
