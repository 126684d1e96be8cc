"""What bench adds up, keeps and compares: bytes moved, starts of new processes, two files side by side."""

import copy
import json
import os

import pytest
from click.testing import CliRunner

from tfinfer.bench import summary
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError
from tfinfer.manifest import load_manifest
from tfinfer.measure import compare, starts
from tfinfer.measure.traffic import _weights, traffic
from tfinfer.session.onnx_bytes import field

SHORT = ("--prompt-length", 4, "--new-tokens", 3, "--warmup", 0, "--threads", 1, "--starts", 0)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What bench keeps of a short run."""
    from pathlib import Path

    path = tmp_path_factory.mktemp("bench") / "a.json"
    result = run("bench", Path(__file__).parent / "tiny", *SHORT, "--json", path)
    assert result.exit_code == 0, result.output
    assert "first token" in result.stdout  # the table is printed beside the file
    return json.loads(path.read_text())


@pytest.fixture
def files(tmp_path, measured):
    """Two files, the second changed by a function."""

    def make(change=lambda data: None):
        changed = copy.deepcopy(measured)
        change(changed)
        for name, data in (("a.json", measured), ("b.json", changed)):
            (tmp_path / name).write_text(json.dumps(data))
        return tmp_path / "a.json", tmp_path / "b.json"

    return make


def scale(data, factor, *names):
    for name in names or compare.PHASES.values():
        data[name]["samples"] = [seconds * factor for seconds in data[name]["samples"]]


# -- what is kept -------------------------------------------------------------------------------------------------
def test_the_file_keeps_every_sample(measured):
    counts = {name: len(measured[name]["samples"]) for name in compare.PHASES.values()}
    assert counts == {
        "first_token": 5, "prefill": 5, "decode": 10, "per_token": 5, "between_tokens": 10, "end_to_end": 5,
    }  # fmt: skip
    assert measured["starts"] == {"cold": [], "warm": []}
    assert measured["moved"]["bytes_per_token"] > measured["moved"]["weight_bytes_per_step"] > 0
    assert measured["environment"]["settings"]["allow_spinning"] is True


def test_the_gaps_of_a_run_add_up_to_its_time(measured):
    for turn in range(5):
        gaps = measured["between_tokens"]["samples"][2 * turn : 2 * turn + 2]
        whole = measured["first_token"]["samples"][turn] + sum(gaps)
        assert whole <= measured["end_to_end"]["samples"][turn]
    assert measured["per_token"]["samples"][0] >= sum(measured["between_tokens"]["samples"][:2]) / 2


@pytest.mark.parametrize("spelling", [["--json", "{}", "DIR"], ["DIR", "--json={}"], ["DIR", "--json", "{}"]])
def test_json_takes_a_file_in_every_place(spelling, tiny, tmp_path):
    path = tmp_path / "x.json"
    given = [str(tiny) if part == "DIR" else part.format(path) for part in spelling]
    assert run("bench", *given, *SHORT, "--repeats", 1).exit_code == 0
    assert json.loads(path.read_text())["schema"] == compare.SCHEMA
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_alone_stays_a_flag_before_the_folder(tiny):
    result = run("bench", "--json", tiny, *SHORT, "--repeats", 1)
    assert json.loads(result.stdout)["schema"] == compare.SCHEMA


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tfinfer.bench.run", lambda *_, **__: pytest.fail("it was measured"))
    for path in (tmp_path / "nowhere/a.json", tmp_path):
        result = run("bench", tiny, f"--json={path}")
        assert result.exit_code == 2
        assert "expected a file to write" in result.stderr


def test_percentiles_need_enough_samples():
    assert summary([1.0] * 19)["p95"] is None
    assert summary([1.0] * 20)["p95"] == 1.0
    found = summary([float(value) for value in range(1, 101)])
    assert (found["p50"], found["p90"], found["p95"]) == pytest.approx((50.5, 90.1, 95.05))


# -- starts -------------------------------------------------------------------------------------------------------
def test_a_start_is_a_new_process_whose_parts_fit_into_it(tiny):
    found = starts.measure(tiny, ["weights.bin"], "cpu", 1, 1)
    assert len(found["warm"]) == 1
    for start in (*found["cold"], *found["warm"]):
        assert start["seconds"] > start["load"] + start["first_token"] > 0


def test_a_start_that_fails_says_why_and_bench_goes_on(tiny, monkeypatch):
    with pytest.raises(starts.StartFailedError, match="no such folder"):
        starts.measure(tiny / "nowhere", [], "cpu", None, 1)
    monkeypatch.setattr(starts, "_CHILD", "raise SystemExit('out of luck')")
    result = run("bench", tiny, *SHORT[:-2], "--repeats", 1, "--starts", 1)
    assert result.exit_code == 0
    assert "warning: no start was measured, a new process failed: out of luck" in result.stderr


# -- bytes moved --------------------------------------------------------------------------------------------------
def tensor(name, rows, width):
    shape = field(1, rows) + field(1, width)
    return field(5, shape + field(2, 1) + field(8, name) + field(9, bytes(4 * rows * width)))


def node(operator, *inputs):
    return field(1, b"".join(field(1, name) for name in inputs) + field(2, b"y") + field(4, operator))


def moved(*parts, batch=1):
    return _weights(memoryview(field(7, b"".join(parts))), batch)


def test_a_table_that_is_only_looked_up_counts_a_row_for_each_sequence():
    table, matrix = tensor(b"table", 100, 8), tensor(b"matrix", 8, 8)
    both = (node(b"Gather", b"table", b"ids"), node(b"MatMul", b"x", b"matrix"), table, matrix)
    assert moved(*both) == 8 * 4 + 8 * 8 * 4
    assert moved(*both, batch=3) == 3 * 8 * 4 + 8 * 8 * 4
    assert moved(*both, batch=1000) == 100 * 8 * 4 + 8 * 8 * 4
    assert moved(*both, node(b"MatMul", b"x", b"table")) == 100 * 8 * 4 + 8 * 8 * 4  # tied with the head


def test_the_cache_counts_what_is_held_within_its_window(tiny):
    manifest = load_manifest(tiny)
    short, long = (traffic(manifest, tiny, batch=2, length=length) for length in (10, 20))
    per_token = sum(entry.num_kv_heads * entry.head_dim * 4 for entry in manifest.cache)
    assert long.cache - short.cache == 2 * 10 * per_token
    assert long.weights == short.weights <= sum(file.bytes for file in manifest.files.values())


# -- comparing ----------------------------------------------------------------------------------------------------
def test_a_slower_side_fails_and_a_faster_or_equal_one_does_not(files):
    for change, code in ((lambda d: scale(d, 3), 4), (lambda d: scale(d, 0.3), 0), (lambda d: None, 0)):
        result = run("bench", "compare", *files(change), "--fail-if-slower", "5%")
        assert result.exit_code == code, result.output
    result = run("bench", "compare", *files(lambda d: scale(d, 3)))
    assert result.exit_code == 0  # nobody asked for more than a look
    assert "3.000 x" in result.stdout


def test_only_what_is_slower_by_more_and_surely_fails(files):
    one = {"samples": [1.0, 1.01, 1.02, 1.03, 1.04]}
    slow = {"samples": [1.1, 1.11, 1.12, 1.13, 1.14]}
    noisy = {"samples": [0.9, 0.95, 1.2, 1.3, 1.4]}

    def both(after):
        a, b = files()
        for path, prefill in ((a, one), (b, after)):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"prefill": prefill}))
        return a, b

    for after, share, slower in ((slow, "5%", ["prefill"]), (slow, "15", []), (noisy, "5%", []), (one, "0", [])):
        result = run("bench", "compare", *both(after), "--fail-if-slower", share, "--json")
        assert json.loads(result.stdout)["slower"] == slower
        assert result.exit_code == (4 if slower else 0)


def test_a_round_is_one_sample_however_many_steps_it_has(files):
    rows = {row.name: row for row in compare.compare(*files()).rows}
    assert rows["decode"].samples == rows["token gaps"].samples == (5, 5)


def test_starts_are_compared_where_both_sides_have_them(files):
    def add(data):
        data["starts"]["warm"] = [{"seconds": 0.5}] * 3

    a, b = files(add)
    assert "warm start" not in {row.name for row in compare.compare(a, b).rows}
    assert "warm start" in {row.name for row in compare.compare(b, b).rows}
    assert "too few samples to tell" in run("bench", "compare", b, b).stdout


@pytest.mark.parametrize(
    "name, value",
    [("manifest_sha256", "0" * 64), ("dtype", "float16"), ("cpu", "Z80"), ("cores", 99), ("device", "cuda")],
)
def test_other_models_and_machines_are_refused_without_force(files, name, value):
    a, b = files(lambda data: data["environment"].update({name: value}))
    result = run("bench", "compare", a, b)
    assert result.exit_code == 2
    assert f"{name} " in result.stderr
    assert "--force" in result.stderr
    result = run("bench", "compare", a, b, "--force")
    assert result.exit_code == 0
    assert "note: different" in result.stderr


def test_what_else_differs_is_told(files):
    result = run("bench", "compare", *files(lambda data: data["environment"].update(onnxruntime="0.1")))
    assert result.exit_code == 0
    assert "note: also differs: onnxruntime" in result.stderr


def test_what_a_measurement_was_warned_of_is_told_again(files):
    result = run("bench", "compare", *files(lambda data: data.update(warnings=["the load average was 99"])))
    assert "b.json: the load average was 99" in result.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda d: d.update(schema=1), "another tfinfer"),
        (lambda d: d.pop("schema"), "found something else"),
        (lambda d: d.pop("decode"), "lacks decode"),
        (lambda d: d["environment"].pop("cpu"), "lacks cpu"),
        (lambda d: d["workload"].pop("repeats"), "lacks how often"),
        (lambda d: d["decode"].pop("samples"), "no times"),
        (lambda d: d["decode"].update(samples=[1.0] * 7), "no 5 rounds"),
        (lambda d: d["decode"].update(samples=[]), "no 5 rounds"),
        (lambda d: d["prefill"].update(samples=[1.0] * 4 + ["x"]), "no times"),
        (lambda d: d["prefill"].update(samples=[1.0] * 4 + [float("nan")]), "no times"),
        (lambda d: d["prefill"].update(samples=[1.0] * 4 + [0]), "no times"),
        (lambda d: d["starts"].update(warm=[1]), "no times"),
    ],
)
def test_what_lacks_something_is_refused_by_its_name(files, change, said):
    a, b = files(change)
    if "warm" in str(json.loads(b.read_text())["starts"]) and json.loads(b.read_text())["starts"]["warm"]:
        a = b
    with pytest.raises(InputError, match=said):
        compare.compare(a, b)


def test_other_work_is_refused_whatever_is_forced(files):
    a, b = files(lambda data: data["workload"].update(batch=2))
    with pytest.raises(InputError, match="different work: batch 1 and 2"):
        compare.compare(a, b, force=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{}", b"[" * 100_000])
def test_what_is_no_measurement_is_refused_in_one_line(files, content):
    a, b = files()
    b.write_bytes(content)
    for second in (b, b.parent / "nowhere.json", b.parent):
        result = run("bench", "compare", a, second)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
    for share in ("fast", "-5%", ""):
        assert run("bench", "compare", a, a, "--fail-if-slower", share).exit_code == 2
