"""The second graph of a decoder, which reads long prompts: where it pays, and what happens when it is not there."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tfinfer.errors import CorruptModelError
from tfinfer.session.prompt import LEAST, PromptGraph, least_here

SESSION = SimpleNamespace(
    get_inputs=lambda: [SimpleNamespace(name="input_ids")], get_outputs=lambda: [SimpleNamespace(name="present.0.key")]
)
OPENED = SimpleNamespace(session=SESSION)
FLAGS = "processor\t: 0\nmodel name\t: a processor\nflags\t\t: fpu sse avx2 {}\n"


def graph(open_it=lambda: OPENED, files=(), least=10, names=("input_ids", "present.0.key")):
    made = PromptGraph(open_it, files, set(names))
    made.least = least
    return made


@pytest.mark.parametrize(
    ("positions", "piece", "share"),
    [
        (9, 64, 0),  # too few
        (10, 64, 10),
        (64, 64, 64),
        (73, 64, 64),  # the rest is too short by itself
        (74, 64, 74),
        (137, 64, 128),
        (100, 8, 0),  # pieces too short: a window's cache takes no more at once
    ],
)
def test_it_reads_whole_pieces_and_a_rest_that_is_long_enough(positions, piece, share):
    assert graph().share(positions, piece) == share


def test_a_machine_that_is_faster_without_never_opens_it():
    def opens():
        raise AssertionError

    assert graph(opens, least=None).share(10_000, 512) == 0


def test_it_is_opened_by_the_first_prompt_that_is_long_enough_and_once():
    opened = []

    def opens():
        opened.append(True)
        return OPENED

    made = graph(opens)
    assert made.share(9, 64) == 0
    assert not opened
    threads = [threading.Thread(target=made.share, args=(64, 64)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.share(64, 64) == 64
    assert len(opened) == 1


def test_a_folder_that_was_written_again_since_it_was_loaded_is_not_read(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"old")
    made = graph(files=[file])
    file.write_bytes(b"newer")
    assert made.share(64, 64) == 0
    assert "changed" in made.why_not


def test_a_folder_that_is_gone_is_not_read(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"old")
    made = graph(files=[file])
    file.unlink()
    assert made.share(64, 64) == 0


def test_a_graph_that_does_not_open_leaves_prompts_to_the_other():
    def opens():
        raise CorruptModelError("broken")

    made = graph(opens)
    assert made.share(64, 64) == 0
    assert made.why_not == "broken"


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "present.0.key", "past_key_values.0.key")])
def test_a_graph_with_other_inputs_or_outputs_is_not_asked(names):
    made = graph(names=names)
    assert made.share(64, 64) == 0
    assert "disagree on p" in made.why_not


def test_a_proof_has_it_read_everything_wherever_it_runs():
    made = graph(least=None)
    with made.always():
        assert made.share(1, 64) == 1
    assert made.share(1000, 64) == 0


def test_a_closed_one_stays_closed():
    made = graph()
    made.close()
    assert made.session is None


@pytest.mark.parametrize(
    ("told", "least"),
    [
        (FLAGS.format("fma"), LEAST),
        (FLAGS.format("avx_vnni"), None),
        (FLAGS.format("avx512_vnni"), None),
        ("Features\t: fp asimd asimddp\n", None),
        ("Features\t: fp asimd\n", LEAST),
        ("no such line\n", None),
    ],
)
def test_float32_is_for_processors_without_sums_of_bytes(tmp_path: Path, told, least):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(told)
    assert least_here(tmp_path) == least


def test_a_machine_that_does_not_tell_its_processor_is_left_as_it_is(tmp_path):
    assert least_here(tmp_path) is None
