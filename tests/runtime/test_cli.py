"""The command line on a small exported folder: what it prints where, its exit codes, and that errors are one line."""

import dataclasses
import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import tfinfer
from tfinfer import bench, doctor
from tfinfer.cli import console, options
from tfinfer.cli.main import COMMANDS
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError, LengthError
from tfinfer.manifest import load_manifest
from tfinfer.proof import compare

ON_FOLDERS = ("generate", "verify", "inspect", "bench", "tune")


def run(*arguments: object, **extra: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer", **extra)


def run_ok(*arguments: object, **extra: object) -> str:
    result = run(*arguments, **extra)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_bad(code: int, *arguments: object, **extra: object) -> str:
    """Run what must fail with `code` and one line on stderr, nothing on stdout; returns the line."""
    result = run(*arguments, **extra)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def on_folder(command: str, folder: Path) -> list[object]:
    """The shortest call of a command that reads all of a folder."""
    return [command, folder, *{"generate": ["a"], "inspect": ["--check"]}.get(command, [])]


def edit(folder: Path, **changes: object) -> None:
    path = folder / "tfinfer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def ids_only(copied: Path) -> Path:
    """The folder without its tokenizer."""
    files = json.loads((copied / "tfinfer.json").read_text())["files"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        del files[name]
        (copied / name).unlink()
    text = {"tokenizer": None, "chat_template": None, "generation_config": None, "special_tokens": {}}
    edit(copied, files=files, text=text)
    return copied


# -- the group ----------------------------------------------------------------------------------------------------
def test_help_lists_every_command_with_its_own_help() -> None:
    overview = run_ok("--help")
    assert run_ok() == overview
    for name, text in COMMANDS.items():
        assert f"  {name}" in overview
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command.get_short_help_str(200).rstrip(".") == text.rstrip(".")
        assert f"Usage: tfinfer {name}" in run_ok(name, "--help")


def test_help_imports_neither_numpy_nor_what_is_heavier() -> None:
    heavy = "{'numpy', 'onnxruntime', 'tokenizers', 'torch', 'onnx'} & set(sys.modules)"
    code = "from tfinfer.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    code = f"import sys; sys.argv = ['tfinfer', '--help']; {code}\nassert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_python_m_is_the_same_command() -> None:
    out = subprocess.run([sys.executable, "-m", "tfinfer", "--version"], check=True, capture_output=True, text=True)
    assert out.stdout == f"tfinfer {tfinfer.__version__}\n"


@pytest.mark.parametrize("arguments", [["fly"], ["inspect"], ["inspect", "a", "--fly"], ["bench", "a", "--batch", "x"]])
def test_a_wrong_command_line_is_one_line_and_exit_2(arguments: list[str]) -> None:
    assert "--help)" in run_bad(2, *arguments)


@pytest.mark.parametrize("command", ["generate", "verify", "bench"])
def test_cuda_graphs_that_cannot_be_are_told_in_one_line(tiny: Path, command: str) -> None:
    said = run_bad(2, *on_folder(command, tiny), "--cuda-graph")
    assert "cannot be recorded as CUDA graphs: only CUDA records" in said
    assert "without --cuda-graph" in said


def test_an_unexpected_error_is_internal_and_its_traceback_is_for_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: 1 // 0)
    line = run_bad(1, "doctor")
    assert "internal: ZeroDivisionError" in line
    assert "--debug" in line
    assert "Traceback" in run("doctor", "--debug").stderr
    found = json.loads(run("doctor", "--json").stdout)["error"]
    assert (found["type"], found["exit_code"]) == ("Internal", 1)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (EOFError, 1), (InputError, 2)])
def test_what_is_raised_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, error: type, code: int) -> None:
    def raise_it() -> None:
        raise error("said")

    monkeypatch.setattr(doctor, "examine", raise_it)
    assert run("doctor").exit_code == code
    assert json.loads(run("doctor", "--json").stdout)["error"]["exit_code"] == code


def test_warnings_and_logs_stay_off_the_terminal_and_come_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine()

    def noisy() -> doctor.Report:
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("torch").error("noise")
        return report

    monkeypatch.setattr(doctor, "examine", noisy)
    assert "noise" not in run("doctor").output
    assert logging.getLogger("torch").isEnabledFor(logging.ERROR)


def test_a_reader_that_leaves_early_causes_no_traceback(tiny: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tfinfer", "inspect", str(tiny)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


# -- bad folders --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ON_FOLDERS)
def test_a_missing_folder_is_exit_3(command: str, tmp_path: Path) -> None:
    assert "no such folder" in run_bad(3, *on_folder(command, tmp_path / "none"))
    assert "tfinfer.json" in run_bad(3, *on_folder(command, tmp_path))


@pytest.mark.parametrize("command", ON_FOLDERS)
def test_a_damaged_folder_is_exit_3_and_names_the_file(command: str, copied: Path) -> None:
    weights = next(copied.glob("weights*"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    line = run_bad(3, *on_folder(command, copied))
    assert weights.name in line
    assert "SHA-256" in line
    weights.write_bytes(data[:-1])
    assert weights.name in run_bad(3, *on_folder(command, copied))
    weights.unlink()
    assert "missing" in run_bad(3, *on_folder(command, copied))


@pytest.mark.parametrize(
    "change, said",
    [({"format_version": 99}, "newer"), ({"kind": "teapot"}, "teapot"), ({"cache": 5}, "cache"), ({"x": 1}, "x")],
)
def test_a_wrong_manifest_is_exit_3(copied: Path, change: dict[str, object], said: str) -> None:
    edit(copied, **change)
    assert said in run_bad(3, "inspect", copied)
    (copied / "tfinfer.json").write_text("{")
    assert "JSON" in run_bad(3, "inspect", copied)


@pytest.mark.parametrize(
    "arguments, kind, code",
    [
        (["inspect", "none"], "ManifestError", 3),
        (["inspect", "none", "--fly"], "NoSuchOption", 2),
        (["fly"], None, 2),
        (["generate", "none"], "UsageError", 2),
    ],
)
def test_json_errors_are_one_object_on_stdout(arguments: list[str], kind: str | None, code: int) -> None:
    result = run(*arguments, "--json")
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"type", "message", "exit_code"}
    assert result.exit_code == error["exit_code"] == code
    assert kind in (error["type"], None)
    assert result.stderr == ""


# -- inspect ------------------------------------------------------------------------------------------------------
def test_inspect_shows_what_the_manifest_says(tiny: Path) -> None:
    manifest = load_manifest(tiny)
    shown = run_ok("inspect", tiny, "--check")
    for said in (
        "GroupQueryAttention",
        "decoder.onnx",
        "tokenizer.json",
        "logits",
        "bytes per token",
        "max |difference|",
    ):
        assert said in shown
    assert manifest.source.reference in shown
    assert "as they were exported" in shown


def test_inspect_json_has_the_sizes_of_the_cache(tiny: Path) -> None:
    manifest = load_manifest(tiny)
    found = json.loads(run_ok("inspect", tiny, "--json"))
    entry = manifest.cache[0]
    assert found["cache"]["bytes_per_token"] == len(manifest.cache) * entry.num_kv_heads * entry.head_dim * 4
    assert found["cache"]["bytes_at_max_length"] == found["cache"]["bytes_per_token"] * manifest.max_length
    assert found["file_bytes"] == sum((tiny / name).stat().st_size for name in manifest.files)
    assert found["manifest"]["kind"] == "decoder"


def test_inspect_needs_no_onnxruntime(tiny: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from tfinfer.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, "inspect", str(tiny), "--check"], check=True, capture_output=True)


# -- generate -----------------------------------------------------------------------------------------------------
def test_generate_prints_what_the_library_returns(tiny: Path) -> None:
    with tfinfer.load(tiny, threads=1) as model:
        expected = model.generate("ab", max_tokens=8, temperature=0.9, top_k=50, seed=3, stop_ids=[])
    given = ["--max-tokens", 8, "--temperature", 0.9, "--top-k", 50, "--seed", 3, "--stop-ids", "", "--threads", 1]
    assert run_ok("generate", tiny, "ab", *given) == expected.text + "\n"
    assert run_ok("generate", tiny, "-", *given, input="ab") == expected.text + "\n"
    found = json.loads(run_ok("generate", tiny, "ab", *given, "--json"))
    assert found["token_ids"] == list(expected.token_ids)
    assert found["text"] == expected.text
    assert found["usage"] == dataclasses.asdict(expected.usage)
    assert found["usage"]["completion_tokens"] == 8
    assert found["model"]["threads"]["count"] == 1


def test_generate_without_a_length_makes_what_fits(tiny: Path) -> None:
    longest = load_manifest(tiny).max_length
    ids = ",".join(["1"] * (longest - 3))
    found = json.loads(run_ok("generate", tiny, "--ids", ids, "--stop-ids", "", "--json"))
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (longest - 3, 3)
    assert str(longest) in run_bad(2, "generate", tiny, "--ids", f"{ids},1,1,1")


def test_generate_without_a_tokenizer_prints_ids(ids_only: Path) -> None:
    with tfinfer.load(ids_only) as model:
        expected = model.generate([1, 2, 3], max_tokens=4, stop_ids=[])
    shown = run_ok("generate", ids_only, "--ids", "1,2,3", "--max-tokens", 4, "--stop-ids", "")
    assert [int(part) for part in shown.split()] == list(expected.token_ids)
    assert "no tokenizer" in run_bad(2, "generate", ids_only, "ab")


def test_generate_passes_bias_stop_and_logprobs(tiny: Path) -> None:
    forced = ["--logit-bias", "70=inf", "--max-tokens", 5, "--stop-ids", ""]
    result = run("generate", tiny, "ab", *forced, "--logprobs", 2, "--stats")
    text = result.stdout.removesuffix("\n")
    assert result.exit_code == 0
    assert len(set(text)) == 1
    *lines, stats = result.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("70 ") and "likeliest" in line for line in lines)
    assert "5 tokens out (length)" in stats
    assert run_ok("generate", tiny, "ab", *forced, "--stop", text[:2]) == "\n"
    assert run_ok("generate", tiny, "ab", *forced, "--stop", r"\n", "--stop", "z") == text + "\n"
    assert run_ok("generate", tiny, "ab", *forced[:-1], "70") == "\n"


def test_auto_says_what_it_took(tiny: Path) -> None:
    result = run("generate", tiny, "ab", "--device", "auto", "--max-tokens", 1)
    assert result.exit_code == 0
    assert result.stderr.startswith(("cpu: ", "cuda: "))


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "PROMPT"),
        (["a", "--ids", "1"], "either"),
        (["--ids", "1,x"], "1,x"),
        (["--ids", ""], "at least one id"),
        (["--ids", "-1"], "-1"),
        (["--ids", "999999"], "999999"),
        (["a", "--temperature", "nan"], "temperature"),
        (["a", "--top-p", "2"], "top_p"),
        (["a", "--top-k", "-1"], "top_k"),
        (["a", "--max-tokens", "0"], "max_tokens"),
        (["a", "--max-tokens", "99999"], "longest length"),
        (["a", "--logit-bias", "5"], "ID=BIAS"),
        (["a", "--logit-bias", "5=nan"], "logit_bias"),
        (["a", "--stop", ""], "stop"),
        (["a", "--device", "teapot"], "teapot"),
        (["a", "--threads", "0"], "threads"),
        (["a", "--system", "b"], "--chat"),
        (["--ids", "1", "--chat"], "--ids"),
    ],
)
def test_generate_refuses_what_cannot_be_served(tiny: Path, given: list[str], said: str) -> None:
    assert said in run_bad(2, "generate", tiny, *given)
    assert run_ok("generate", tiny, "ab", "--max-tokens", 1)


def test_stdin_that_is_no_text_is_refused(tiny: Path) -> None:
    assert "UTF-8" in run_bad(2, "generate", tiny, "-", input=b"\xff\xfe")


def test_chat_renders_the_folders_template(tiny: Path, ids_only: Path) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with tfinfer.load(tiny, threads=1) as model:
        expected = model.generate(messages, max_tokens=3, stop_ids=[])
    given = ["--max-tokens", 3, "--stop-ids", "", "--threads", 1]
    found = json.loads(run_ok("generate", tiny, "b", "--chat", "--system", "a", *given, "--json"))
    assert found["token_ids"] == list(expected.token_ids)
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert run_ok("generate", tiny, "b", "--chat", "--stop-ids", "")
    assert "chat template" in run_bad(2, "generate", ids_only, "b", "--chat")


# -- verify, bench, doctor ----------------------------------------------------------------------------------------
def test_verify_proves_the_folder(tiny: Path) -> None:
    assert "proved" in run_ok("verify", tiny)
    found = json.loads(run_ok("verify", tiny, "--json", "--threads", 1))
    assert found["passed"] is True
    assert found["greedy"]["compared"] > 0
    assert all(case["rows"] for case in found["cases"])


def test_a_failed_verification_is_exit_4(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ABSOLUTE", 1e-30)
    monkeypatch.setattr(compare, "RELATIVE", 1e-30)
    result = run("verify", tiny)
    assert result.exit_code == 4
    assert "FAILED" in result.stdout
    result = run("verify", tiny, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["passed"] is False


SHORT = ("--prompt-length", 4, "--new-tokens", 3, "--repeats", 2, "--warmup", 0, "--threads", 1, "--starts", 0)


def test_bench_measures_each_phase_apart(tiny: Path) -> None:
    found = json.loads(run_ok("bench", tiny, *SHORT, "--batch", 2, "--json"))
    assert found["workload"] == {"prompt_length": 4, "new_tokens": 3, "batch": 2, "repeats": 2, "warmup": 0}
    assert {name: len(found[name]["samples"]) for name in ("prefill", "decode", "end_to_end")} == {
        "prefill": 2,
        "decode": 4,
        "end_to_end": 2,
    }
    assert found["memory"]["cache_bytes"] > 0
    assert found["decode"]["seconds"]["p99"] is None  # of four samples
    assert found["environment"]["threads"]["count"] == 1
    assert found["environment"]["command_line"].startswith("tfinfer")


def test_bench_prints_definitions_and_environment(tiny: Path) -> None:
    shown = run_ok("bench", tiny, *SHORT)
    for said in (
        "prefill",
        "decode",
        "first token",
        "token gaps",
        "tokens/s",
        "resident",
        "moved",
        "onnxruntime",
        "manifest",
    ):
        assert said in shown


@pytest.mark.parametrize("given", [["--prompt-length", 99999], ["--new-tokens", 1], ["--repeats", 0], ["--starts", -1]])
def test_bench_refuses_what_does_not_fit(tiny: Path, given: list[object]) -> None:
    run_bad(2, "bench", tiny, *given)


def test_a_plan_shrinks_only_what_was_not_asked_for() -> None:
    assert bench.plan(4096) == bench.Workload(128, 64, 1, 5, 1)
    assert bench.plan(96) == bench.Workload(64, 32, 1, 5, 1)
    assert bench.plan(96, prompt_length=90).new_tokens == 6
    assert bench.plan(96, new_tokens=90).prompt_length == 6
    with pytest.raises(LengthError, match="96"):
        bench.plan(96, prompt_length=90, new_tokens=10)
    with pytest.raises(LengthError):
        bench.plan(96, prompt_length=96)


def test_a_busy_machine_is_warned_of(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_average", lambda: (1e6, 0.0, 0.0))
    assert "warning: the load average" in run("bench", tiny, *SHORT).stderr
    monkeypatch.setattr(bench, "load_average", lambda: None)
    assert "warning" not in run("bench", tiny, *SHORT).stderr


def test_doctor_exits_4_when_something_needs_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(doctor.examine(), problems=())
    monkeypatch.setattr(doctor, "examine", lambda: whole)
    assert "no problems" in run_ok("doctor")
    assert json.loads(run_ok("doctor", "--json"))["onnxruntime"]
    broken = dataclasses.replace(whole, onnxruntime=None, problems=("no wheel: pip install it",))
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    result = run("doctor")
    assert result.exit_code == 4
    assert "problem: no wheel: pip install it" in result.stdout
    assert run("doctor", "--json").exit_code == 4


def test_export_without_torch_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from tfinfer.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "export", "a.py:b", "-o", str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'tfinfer[export]'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- small parts --------------------------------------------------------------------------------------------------
def test_escapes_of_stop_texts() -> None:
    assert options.unescape(r"\n\t\r\\n\d") == "\n\t\r\\n\\d"


def test_sizes_and_durations_are_for_people() -> None:
    assert [console.size(count) for count in (0, 1023, 1024, 3 << 30, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "3.0 GiB",
        "5120.0 GiB",
    ]
    assert [console.duration(seconds) for seconds in (2, 0.5)] == ["2.00 s", "500.00 ms"]


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert console.clean("a\x1b[31m\tb\n\x9b") == "a\\x1b[31m\tb\n\\x9b"


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_json({"a": [float("inf"), float("nan"), 1.5], "é": (1,)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "é": [1]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_status_line_is_rewritten_in_place_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Status() as status:
        status("a long stage")
        status("short")
    assert terminal.getvalue() == "\ra long stage ...\rshort ...       \r" + " " * 9 + "\r"


def test_a_status_is_silent_where_nobody_looks_and_a_line_each_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        with console.Status(verbose) as status:
            status("stage")
        assert capsys.readouterr().err == "stage\n" * verbose


def test_errors_are_red_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console.fail("x")
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console.fail("x")
    assert terminal.getvalue() == "error: x\n"


def test_a_bar_says_which_of_the_stages_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.Status(stages=("capture", "write", "proof")) as status:
        status("write")
        status("proof: the longest length")
        status("something else")
    shown = terminal.getvalue().split("\r")
    assert [line.rstrip() for line in shown if line.strip()] == [
        "[###...] 2/3 write ...",
        "[#####.] 3/3 proof: the longest length ...",
        "something else ...",
    ]
