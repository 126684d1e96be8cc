"""Every decoder of the zoo, exported by the command, proved, generated from and compared with PyTorch: a row each."""

import importlib.util
import inspect
import json

import pytest
import torch
from click.testing import CliRunner
from rows import ROWS, ZOO, ways

import tfinfer
from tfinfer.cli.main import tfinfer as cli

TOKENS, PROMPT, VOCAB = 64, (7, 1, 60, 33, 5), 61


def built(row):
    """The module of a row, with the weights that the command sees."""
    spec = importlib.util.spec_from_file_location(f"zoo_{row.name}", row.path)
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    torch.manual_seed(0)
    module = source.build().eval()
    torch.manual_seed(0)
    return module


def logits(output):
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def greedy(module, ids, count):
    """Greedy tokens by full passes; the reference knows nothing of the exporter."""
    ids = list(ids)
    takes_positions = "positions" in inspect.signature(module.forward).parameters
    for _ in range(count):
        row = torch.tensor([ids])
        with torch.no_grad():
            out = logits(module(row, torch.arange(len(ids))[None]) if takes_positions else module(row))
        ids.append(int(out.reshape(-1, out.shape[-1])[-1].argmax()))
    return tuple(ids[-count:])


def export(row, out):
    arguments = ["export", f"{row.path}:build", "-o", str(out), "--max-length", "96", "--kind", "decoder", "--json"]
    return CliRunner().invoke(cli, arguments)


def marked(row):
    return pytest.param(row, id=row.name, marks=[pytest.mark.xfail(strict=True, reason=row.waits)] * bool(row.waits))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch's, of a user's module
@pytest.mark.parametrize("row", [marked(row) for row in ROWS if not row.refused])
def test_a_decoder_as_people_write_it_gets_its_cache_and_gives_pytorchs_tokens(row, tmp_path):
    module = built(row)
    told = export(row, tmp_path / "out")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["manifest"]["proof"]["greedy_tokens"] == TOKENS
    with tfinfer.load(tmp_path / "out") as model:
        if not row.waits:
            assert ways(model.manifest) == row.attention
        assert model.generate(list(PROMPT), max_tokens=TOKENS).token_ids == greedy(module, PROMPT, TOKENS)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.refused])
def test_a_decoder_that_no_cache_can_follow_is_refused_with_the_reason_in_the_table(row, tmp_path):
    told = export(row, tmp_path / "out")
    assert told.exit_code != 0
    assert row.refused in told.output
    assert not (tmp_path / "out").exists()


def test_every_file_of_the_zoo_has_a_row_and_a_description_and_is_short():
    files = {p.relative_to(ZOO).as_posix() for room in ("decoders", "tutorials") for p in (ZOO / room).glob("*.py")}
    assert {row.file for row in ROWS} == files
    for row in ROWS:
        assert row.description, row.file
        assert len(row.path.read_text("utf-8").splitlines()) < 100, row.file
