"""What `tfinfer tune` believes: clear gains with the same result. Times here are made up, none is measured."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tfinfer import tune
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import load_manifest
from tfinfer.measure import trial
from tfinfer.measure.trial import Trial
from tfinfer.session import tuned
from tfinfer.session.machine import Machine
from tfinfer.session.settings import OnCpu, Settings
from tfinfer.session.threads import Threads

TWO = OnCpu(Threads(2, "2: a test"))


@pytest.fixture
def machine(monkeypatch):
    """Two cores, whatever this machine has, and duels of the least number of rounds."""
    monkeypatch.setattr(tune, "this_machine", lambda: Machine("some CPU", 2, 2))
    monkeypatch.setattr(tune, "thread_count", lambda: TWO.threads)
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(tuned, "this_machine", lambda: Machine("some CPU", 2, 2))


@pytest.fixture
def speeds(monkeypatch, machine):
    """Let a session take what a function of its threads and settings says, in seconds of (prefill, step)."""

    def make(cost, result=lambda how: (1, 2, 3)):
        def open_for(manifest, folder, how):
            return dataclasses.make_dataclass("Session", ["how", "closed"], namespace={"close": close})(how, False)

        def close(self):
            self.closed = True

        def request(session, work):
            assert not session.closed
            prefill, step = cost(session.how.threads.count, session.how.settings)
            return Trial({"prefill": prefill, "step": step}, prefill + 10 * step, result(session.how))

        monkeypatch.setattr(tune, "open_for", open_for)
        monkeypatch.setattr(tune, "request", request)

    return make


def test_nothing_clearly_faster_leaves_the_default(speeds, copied):
    speeds(lambda threads, settings: (1.0, 0.1))
    report = tune.tune(copied)
    assert report.chosen == TWO
    assert report.to_dict()["is_default"] is True
    assert {duel.verdict for duel in report.duels} == {"no clear difference"}
    found = tuned.find(copied)
    assert (found.threads, found.settings) == (2, Settings())


def test_the_best_of_threads_and_switches_is_found_and_confirmed(speeds, copied):
    speeds(lambda threads, settings: (1.0, 0.05 * threads * (1 if settings.memory_pattern else 1.5)))
    report = tune.tune(copied)
    assert (report.chosen.threads.count, report.chosen.settings) == (1, Settings(memory_pattern=True))
    assert [duel.verdict for duel in report.duels] == ["faster"] * 3  # one thread; memory pattern; both against default
    assert report.duels[-1].against == TWO
    on_cpu = tuned.on_cpu(copied, "cpu", None)
    assert (on_cpu.threads.count, on_cpu.settings) == (1, report.chosen.settings)


def test_a_gain_that_another_round_does_not_confirm_is_not_believed(speeds, copied, monkeypatch):
    speeds(lambda threads, settings: (1.0, 0.1 if threads == 2 and not settings.memory_pattern else 0.05))
    fought = tune.Arena.duel

    def duel(self, candidate, against):
        found = fought(self, candidate, against)
        last = against == TWO and candidate.settings.memory_pattern and candidate.threads.count == 1
        return dataclasses.replace(found, request=(1.0,) * 9) if last else found

    monkeypatch.setattr(tune.Arena, "duel", duel)
    speeds(lambda threads, settings: (1.0, 0.05 * threads * (1 if settings.memory_pattern else 1.5)))
    assert tune.tune(copied).chosen == TWO


def test_a_faster_request_with_a_slower_phase_is_not_taken(speeds, copied):
    speeds(lambda threads, settings: (1.2, 0.05) if threads == 1 else (1.0, 0.1))
    first = tune.tune(copied).duels[0]
    assert first.verdict == "slower in prefill: not taken"
    assert first.won is False


def test_other_tokens_are_not_taken_however_fast(speeds, copied):
    speeds(
        lambda threads, settings: (0.1, 0.01) if settings.denormal_as_zero else (1.0, 0.1),
        result=lambda how: (1, 2, 9) if how.settings.denormal_as_zero else (1, 2, 3),
    )
    report = tune.tune(copied)
    assert report.chosen == TWO
    assert "another result: not taken" in [duel.verdict for duel in report.duels]


@pytest.mark.parametrize(
    "ratios, faster",
    [
        ((0.9,) * 9, True),
        ((0.9,) * 8 + (1.5,), True),
        ((0.9,) * 7 + (1.1,) * 2, False),  # chance gives that in 9% of cases
        ((0.99,) * 9, False),  # sure, but worth nothing
        ((0.5, 0.5, 1.2, 1.2, 1.2), False),
        ((0.9,) * 4, False),  # four rounds prove nothing
    ],
)
def test_a_gain_is_clear_of_noise_or_none(ratios, faster):
    assert tune.clearly_faster(ratios) is faster
    assert tune.clearly_slower(tuple(1 / ratio for ratio in ratios)) is faster


def test_thread_counts_worth_a_try():
    def counts(default, cores, hardware):
        return [threads.count for threads in tune.counts(default, Machine("", cores, hardware))]

    assert counts(2, 2, 2) == [1]
    assert counts(1, 1, 1) == []
    assert counts(1, 1, 2) == [2]
    assert counts(16, 16, 32) == [1, 4, 8, 15, 32]


# -- real sessions, whose times nobody looks at -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tiny", "tiny_encoder", "tiny_seq2seq", "tiny_states"])
def test_every_kind_of_folder_is_tuned_with_one_result(kind, machine, tmp_path):
    folder = Path(shutil.copytree(Path(__file__).parent / kind, tmp_path / "model"))
    asked = {} if kind == "tiny_encoder" else {"new_tokens": 4}
    report = tune.tune(folder, prompt_length=5, quick=True, **asked)
    assert all(duel.same_result for duel in report.duels)
    assert {duel.candidate.threads.count for duel in report.duels} >= {1}
    assert tuned.find(folder).measured["objective"] == tune.OBJECTIVE
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_request_shrinks_only_where_nothing_was_asked_for(tiny):
    manifest = load_manifest(tiny)
    work = trial.work_for(manifest, None, None, 16)
    assert len(work.ids) + work.tokens <= manifest.max_length
    assert trial.work_for(manifest, 3, 40, 16).tokens == 40
    with pytest.raises(LengthError):
        trial.work_for(manifest, 10**6, None, 16)
    encoder = load_manifest(tiny.parent / "tiny_encoder")
    assert str(trial.work_for(encoder, 5, None, 16)) == "5 tokens of prompt"
    for prompt, tokens, error in ((None, 4, InputError), (0, None, InputError), (10**6, None, LengthError)):
        with pytest.raises(error):
            trial.work_for(encoder, prompt, tokens, 16)


def test_vectors_that_differ_are_another_result(tiny):
    manifest = load_manifest(tiny.parent / "tiny_encoder")
    one = Trial({}, 1.0, np.ones((1, 3, 4), np.float32))
    assert trial.same_result(manifest, one, Trial({}, 1.0, one.result + np.float32(1e-6)))
    assert not trial.same_result(manifest, one, Trial({}, 1.0, one.result + np.float32(1e-2)))


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer")


def test_the_command_says_what_it_tried_and_what_it_chose(speeds, copied):
    speeds(lambda threads, settings: (1.0, 0.1 * threads))
    result = run("tune", copied, "--prompt", 4, "--tokens", 3)
    assert result.exit_code == 0, result.output
    for said in (
        "objective",
        "4 tokens of prompt, 3 new",
        "tried",
        "0.67 x the time",
        "faster",
        "chosen       1 thread",
    ):
        assert said in result.stdout
    found = json.loads(run("tune", copied, "--quick", "--json").stdout)
    assert found["chosen"]["threads"] == 1
    assert found["is_default"] is False


def test_a_failure_while_measuring_leaves_the_folder_as_it_was(speeds, copied, monkeypatch):
    names = sorted(path.name for path in copied.iterdir())
    speeds(lambda threads, settings: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        tune.tune(copied)
    assert sorted(path.name for path in copied.iterdir()) == names


def test_a_busy_machine_is_warned_of_and_kept_in_the_file(speeds, copied, monkeypatch):
    speeds(lambda threads, settings: (1.0, 0.1))
    monkeypatch.setattr(tune, "load_average", lambda: (1e6, 0.0, 0.0))
    assert "warning: the load average was 1000000.00" in run("tune", copied).stderr
    assert "load average" in tuned.find(copied).measured["warnings"][0]
    monkeypatch.setattr(tune, "load_average", lambda: None)
    assert "warning" not in run("tune", copied).stderr


def test_the_command_refuses_what_cannot_be_tuned(copied, monkeypatch):
    assert run("tune", copied / "nowhere").exit_code == 3
    assert run("tune", copied, "--tokens", 1).exit_code == 2
    assert run("tune", copied, "--prompt", 10**6).exit_code == 2

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    result = run("tune", copied)
    assert result.exit_code == 2
    assert "Read-only file system" in result.stderr
    (copied / "weights.bin").write_bytes(b"")
    assert run("tune", copied).exit_code == 3
