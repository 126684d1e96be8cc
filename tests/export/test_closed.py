"""What an export opens while it calibrates, it closes: graphs and caches of a large model are gigabytes each."""

import pytest
import torch

from tfinfer.export import export_model
from tfinfer.export.modules import Decoder as Module
from tfinfer.export.modules import TransformerConfig
from tfinfer.session.cache import Cache
from tfinfer.session.decoder import Decoder


def module():
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "num_layers": 1, "num_heads": 4, "intermediate_size": 96}
    return Module(TransformerConfig(**sizes, position="rotary", norm="rms_norm", max_length=48)).eval()


def watched(monkeypatch, kind):
    """What of a class was made, and what of it was closed."""
    made, closed, init, close = [], [], kind.__init__, kind.close

    def making(self, *given, **options):
        init(self, *given, **options)  # where this fails nothing is open
        made.append(self)

    def closing(self):
        closed.append(self)
        close(self)

    monkeypatch.setattr(kind, "__init__", making)
    monkeypatch.setattr(kind, "close", closing)
    return made, closed


@pytest.mark.parametrize("options", [{"dtype": "int4", "cache": "int8"}, {"dtype": "fp16"}], ids=str)
def test_what_calibration_opens_is_closed(options, tmp_path, monkeypatch):
    decoders, caches = watched(monkeypatch, Decoder), watched(monkeypatch, Cache)
    export_model(module(), tmp_path / "out", attention=False, **options)
    for made, closed in (decoders, caches):
        assert made
        assert not {*map(id, made)} - {*map(id, closed)}
