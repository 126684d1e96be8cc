"""A folder that is cut, changed, made for others, or hostile: an error that names what is wrong."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

import tfinfer
from tfinfer.errors import CorruptModelError, IncompatibleModelError, ManifestError, ModelError, UnsafeModelError
from tfinfer.integrity import check_graph
from tfinfer.manifest import MAX_BYTES, FileSpec, load_manifest


def edit(folder, change):
    """Change the manifest by a function of its object."""
    path = folder / "tfinfer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def seal(folder, name):
    """Let the manifest say that a changed file is as it should be."""
    content = (folder / name).read_bytes()
    edit(
        folder,
        lambda d: d["files"].update({name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}),
    )


def test_the_types_of_a_manifest_are_looked_up_once_and_not_for_each_object(copied, monkeypatch):
    expected, looked_up = load_manifest(copied), []
    monkeypatch.setattr("typing.get_type_hints", looked_up.append)
    assert load_manifest(copied) == expected
    assert not looked_up


def test_a_manifest_survives_the_way_to_json_and_back(copied):
    manifest = load_manifest(copied)
    (copied / "tfinfer.json").write_text(manifest.to_json())
    assert load_manifest(copied) == manifest


@pytest.mark.parametrize("name", ["decoder.onnx", "weights.bin", "tokenizer.json", "golden.npz"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(CorruptModelError, match=f"{name}: is missing"):
        tfinfer.load(copied)


@pytest.mark.parametrize("name", ["decoder.onnx", "weights.bin", "tokenizer.json"])
def test_a_truncated_file_is_named_with_both_sizes(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-7])
    with pytest.raises(CorruptModelError, match=f"{name}: expected {len(content)} bytes, found {len(content) - 7}"):
        tfinfer.load(copied)


@pytest.mark.parametrize("name", ["decoder.onnx", "weights.bin", "tokenizer.json"])
def test_a_flipped_bit_is_named_with_both_hashes(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(CorruptModelError, match=f"{name}: expected SHA-256 {'.' * 64}, found"):
        tfinfer.load(copied)


def test_after_a_folder_that_does_not_load_a_good_one_does(copied, tiny):
    (copied / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError):
        tfinfer.load(copied)
    with tfinfer.load(tiny) as model:
        assert model.generate([1], max_tokens=1).token_ids


def test_no_manifest_means_no_finished_export(copied):
    (copied / "tfinfer.json").unlink()
    with pytest.raises(ManifestError, match=r"no tfinfer\.json"):
        tfinfer.load(copied)
    with pytest.raises(ManifestError, match="no such folder"):
        tfinfer.load(copied / "nowhere")


def test_a_newer_format_says_to_upgrade(copied):
    edit(copied, lambda d: d.update(format_version=99, whatever=1))
    with pytest.raises(IncompatibleModelError, match="format 99 is newer"):
        tfinfer.load(copied)


def test_an_older_runtime_than_the_graph_needs_says_both_versions(copied):
    edit(copied, lambda d: d.update(requires={"onnxruntime": "99.1"}))
    with pytest.raises(IncompatibleModelError, match=r"needs onnxruntime 99\.1 or newer"):
        tfinfer.load(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("cache"), "missing keys cache"),
        (lambda d: d.update(extra=1), "unknown keys extra"),
        (lambda d: d.update(vocab_size="many"), "expected int, got str"),
        (lambda d: d.update(vocab_size=True), "expected int, got bool"),
        (lambda d: d.update(max_length=0), "must be positive"),
        (lambda d: d.update(kind="oracle"), "kind"),
        (lambda d: d.update(cache=[]), "at least one cache entry"),
        (lambda d: d["cache"][0].update(num_kv_heads=-1), "has no size"),
        (lambda d: d["cache"][0].update(dtype="float7"), "float7"),
        (lambda d: d["graphs"]["decoder"].update(file="other.onnx"), "not among its files"),
        (lambda d: d["text"].update(tokenizer="../tokenizer.json"), "not among its files"),
        (lambda d: d["text"].update(chat_template="/etc/hostname"), "not among its files"),
        (lambda d: d["text"].update(generation_config="../x.json"), "not among its files"),
        (lambda d: d["proof"].update(golden="../golden.npz"), "not among its files"),
        (lambda d: d["files"].update({"../x": {"sha256": "", "bytes": 1}}), "no plain file name"),
        (lambda d: d.pop("format_version"), "format_version"),
    ],
)
def test_a_manifest_that_contradicts_itself_says_where(copied, change, words):
    edit(copied, change)
    with pytest.raises(ManifestError, match=words):
        tfinfer.load(copied)


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense", "[" * 100000, '{"format_version": "1"}'])
def test_a_manifest_that_is_no_json_object_is_an_error_of_ours(copied, content):
    (copied / "tfinfer.json").write_text(content)
    with pytest.raises(ManifestError):
        tfinfer.load(copied)


def test_a_manifest_of_absurd_size_is_not_read(copied):
    (copied / "tfinfer.json").write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(ManifestError, match="larger"):
        tfinfer.load(copied)


def test_manifest_and_graph_must_name_the_same_inputs(copied):
    edit(copied, lambda d: d["cache"][0].update(past="past_key_values.9.key"))
    with pytest.raises(IncompatibleModelError, match=r"disagree on .*past_key_values\.9\.key"):
        tfinfer.load(copied)


def test_a_link_out_of_the_folder_is_refused(copied, tmp_path):
    outside = tmp_path / "secret.bin"
    (copied / "weights.bin").rename(outside)
    os.symlink(outside, copied / "weights.bin")
    with pytest.raises(UnsafeModelError, match="a link"):
        tfinfer.load(copied)


@pytest.mark.parametrize("place", ["/etc/passwd", "../x.bin", "a/x.bin", "golden.npy"])
def test_external_data_outside_the_folder_is_refused_before_onnxruntime_sees_it(copied, place):
    graph = (copied / "decoder.onnx").read_bytes()
    assert graph.count(b"weights.bin") > 3
    padded = place.encode().rjust(11, b"/" if place.startswith("/") else b".")[-11:]
    (copied / "decoder.onnx").write_bytes(graph.replace(b"weights.bin", padded))
    seal(copied, "decoder.onnx")
    with pytest.raises(UnsafeModelError, match="no file of this folder"):
        tfinfer.load(copied)


def test_external_data_past_the_end_of_the_file_is_refused(copied):
    (copied / "weights.bin").write_bytes((copied / "weights.bin").read_bytes()[:4096])
    seal(copied, "weights.bin")
    with pytest.raises(CorruptModelError, match="which has fewer"):
        tfinfer.load(copied)


def test_an_operator_of_an_unknown_domain_is_refused(copied):
    graph = (copied / "decoder.onnx").read_bytes()
    (copied / "decoder.onnx").write_bytes(graph.replace(b"com.microsoft", b"com.evilcorps"))
    seal(copied, "decoder.onnx")
    with pytest.raises(UnsafeModelError, match=r"com\.evilcorps"):
        tfinfer.load(copied)


def test_a_graph_that_is_damaged_anywhere_never_ends_the_process(copied):
    """Truncated and flipped graphs, sealed so that the hashes agree: parsed by us and opened, in another process."""
    graph = (copied / "decoder.onnx").read_bytes()
    rng = random.Random(0)
    damaged = [graph[: rng.randrange(len(graph))] for _ in range(30)]
    for _ in range(120):
        changed = bytearray(graph)
        changed[rng.randrange(len(graph))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    for number, content in enumerate(damaged):
        (copied / f"{number}.onnx").write_bytes(content)
    script = (
        "import sys, pathlib, hashlib, dataclasses\n"
        "import tfinfer\nfrom tfinfer.manifest import load_manifest, FileSpec\n"
        "from tfinfer.generating import GeneratingModel as Model\n"
        "from tfinfer.integrity import check_files\n"
        "folder = pathlib.Path(sys.argv[1]); manifest = load_manifest(folder); refused = 0\n"
        f"for number in range({len(damaged)}):\n"
        "    name = f'{number}.onnx'; content = (folder / name).read_bytes()\n"
        "    graph = dataclasses.replace(manifest.graphs['decoder'], file=name)\n"
        "    files = {**manifest.files, name: FileSpec(hashlib.sha256(content).hexdigest(), len(content))}\n"
        "    changed = dataclasses.replace(manifest, graphs={'decoder': graph}, files=files)\n"
        "    try:\n"
        "        check_files(folder, changed)\n"
        "        Model(changed, folder, threads=1).close()\n"
        "    except tfinfer.TfinferError:\n"
        "        refused += 1\n"
        "print(refused)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(copied)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


def test_a_graph_nested_without_end_is_refused():
    inner = b""
    for _ in range(3000):  # attribute -> graph -> node -> attribute ...
        for field in (6, 5, 1):
            inner = bytes([field << 3 | 2]) + _varint(len(inner)) + inner
    model = bytes([7 << 3 | 2]) + _varint(len(inner)) + inner
    with pytest.raises(CorruptModelError):
        check_graph(model, "deep.onnx", {})


def _varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def test_files_are_checked_without_hashing_when_asked(copied):
    manifest = load_manifest(copied)
    spec = manifest.files["weights.bin"]
    wrong = dataclasses.replace(manifest, files={**manifest.files, "weights.bin": FileSpec("0" * 64, spec.bytes)})
    (copied / "tfinfer.json").write_text(wrong.to_json())
    tfinfer.load(copied, check_hashes=False).close()
    with pytest.raises(CorruptModelError):
        tfinfer.load(copied)
