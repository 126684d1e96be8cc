"""Attention maps: picking, the page that holds them safely and exactly, the picture, and the command."""

import base64
import hashlib
import json
import re
import sys
import zlib

import numpy as np
import pytest
from click.testing import CliRunner

import tfinfer.model
from tfinfer.attention.maps import AttentionMap
from tfinfer.attention.page import render
from tfinfer.attention.plot import save_png, visible
from tfinfer.cli.main import COMMANDS
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import InputError, MissingDependencyError

HOSTILE = ("</script><img src=x onerror=alert(1)>", "<!--<script>", "]]>&amp;{{DATA}}", "\ud800\u2028\x00", "")


def softmax(*shape, seed=0):
    scores = np.exp(np.random.default_rng(seed).normal(size=shape) * 3)
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


def a_map(name="self", layers=3, heads=2, queries=4, keys=5):
    tokens = [tuple(f" {axis}{number}" for number in range(count)) for axis, count in (("q", queries), ("k", keys))]
    return AttentionMap(name, *tokens, tuple(softmax(heads, queries, keys, seed=number) for number in range(layers)))


def payload(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def unpacked(text, shape):
    """What the page's script does."""
    high, low = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, -1).astype(np.int64)
    return ((high << 8 | low) / 65535).reshape(shape) ** 2


def test_stacked_has_every_layer_and_refuses_ragged_ones():
    item = a_map()
    assert item.stacked().shape == (3, 2, 4, 5)
    ragged = AttentionMap("self", ("a",), ("b",), (softmax(2, 1, 1), softmax(3, 1, 1)))
    assert ragged.head_numbers == (0, 1, 2)
    with pytest.raises(InputError, match=r"equally many heads; got \[2, 3\]"):
        ragged.stacked()
    with pytest.raises(InputError, match="head 2 is not there: expected one of 2, 0 to 1"):
        ragged.pick(head=2)
    assert ragged.pick(1, 2).stacked().shape == (1, 1, 1, 1)


def test_what_is_picked_keeps_its_numbers():
    item = a_map()
    one = item.pick(2, 1)
    assert (one.layer_numbers, one.head_numbers) == ((2,), (1,))
    np.testing.assert_array_equal(one.weights[0], item.weights[2][1:2])
    assert item.pick(layer=1).head_numbers == (0, 1)
    assert item.pick(head=1).layer_numbers == (0, 1, 2)
    assert item.pick().stacked().shape == item.stacked().shape
    assert one.pick(2, 1).layer_numbers == (2,)
    with pytest.raises(InputError, match="layer 0 is not there: expected 2, the only one"):
        one.pick(layer=0)


@pytest.mark.parametrize("layer, head, what", [(3, None, "layer 3"), (-1, None, "layer -1"), (0, 2, "head 2")])
def test_a_pick_out_of_range_says_how_many_there_are(layer, head, what):
    count = "3, 0 to 2" if head is None else "2, 0 to 1"
    with pytest.raises(InputError, match=f"attention 'self': {what} is not there: expected one of {count}"):
        a_map().pick(layer, head)


@pytest.mark.parametrize(
    "weights, what",
    [
        ((), "at least one layer"),
        ((softmax(2, 3, 3),), r"expected \(heads, 2, 3\).*got \(2, 3, 3\)"),
        ((softmax(2, 3),), "expected"),
        ((np.full((1, 2, 3), np.nan, np.float32),), "from 0 to 1"),
        ((np.full((1, 2, 3), 1.5, np.float32),), "from 0 to 1"),
    ],
)
def test_what_is_no_attention_is_refused(weights, what):
    with pytest.raises(InputError, match=what):
        AttentionMap("self", ("a", "b"), ("c", "d", "e"), weights)


def test_a_page_gives_back_tokens_numbers_and_weights():
    maps = [a_map("encoder"), a_map("cross", queries=2).pick(layer=1, head=0)]
    data = payload(render(maps, "title"))["maps"]
    assert [item["name"] for item in data] == ["encoder", "cross"]
    assert (data[1]["layers"], data[1]["heads"]) == ([1], [[0]])
    for item, stored in zip(maps, data):
        assert (tuple(stored["queries"]), tuple(stored["keys"])) == (item.query_tokens, item.key_tokens)
        for weights, text in zip(item.weights, stored["data"]):
            back = unpacked(text, weights.shape)
            np.testing.assert_allclose(back, weights, rtol=0, atol=2e-5)
            np.testing.assert_allclose(back[weights > 1e-3], weights[weights > 1e-3], rtol=1e-3)


def test_nothing_in_a_page_leaves_its_place():
    count = len(HOSTILE)
    item = AttentionMap(HOSTILE[0], HOSTILE, HOSTILE, (softmax(1, count, count),))
    page = render([item], f"<b>{HOSTILE[0]}&{{{{SCRIPT_HASH}}}}")
    assert page.count("</script>") == render([a_map()], "").count("</script>")
    assert "<img" not in page
    assert "<b>" not in page
    assert "{{SCRIPT_HASH}}" in page
    data = payload(page)["maps"][0]
    assert data["queries"] == [*HOSTILE[:3], "\ufffd\u2028\x00", ""]
    page.encode()  # every text can be written


def test_a_page_needs_nothing_else_and_runs_its_own_script_alone():
    page = re.sub(r'"data":\[[^]]*\]', "", render([a_map()], "title"))  # base64 may spell anything
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|@import|url\(|<link|fetch\(|innerHTML|\beval\b", page)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(None, 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    for element in ("style", "script"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{element}-src"] == f"'sha256-{digest}'"


def test_a_page_of_200_tokens_is_compact():
    item = a_map(layers=1, heads=12, queries=200, keys=200)
    assert len(render([item], "title")) < 100_000 + 2.7 * item.stacked().size
    with pytest.raises(InputError, match="at least one"):
        render([], "title")


def test_a_picture_names_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tfinfer\[plot\]'"):
        save_png([a_map()], tmp_path / "map.png")


def test_a_picture_is_drawn_whatever_the_tokens(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'tfinfer[plot]'")
    tokens = (*HOSTILE, r"$\frac{$", "日本語")
    one = AttentionMap("$_^", tokens, tokens, (softmax(1, 7, 7),))
    for name, maps in (("one", [one]), ("all", [a_map("encoder"), a_map("cross", queries=9), one])):
        path = tmp_path / f"{name}.part"
        save_png(maps, path, "$title")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_label_shows_blanks_and_is_short():
    assert visible(" a\n\t\u202e") == "␣a↵⇥\ufffd"
    assert visible("x" * 50) == "x" * 19 + "…"
    assert visible("") == "⟨empty⟩"


class Fake:
    reason = "asked for"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def attention_maps(self, text, target=None):
        self.asked = text, target
        return [a_map("self")] if target is None else [a_map("encoder"), a_map("cross")]


@pytest.fixture
def fake(monkeypatch):
    model = Fake()
    monkeypatch.setitem(COMMANDS, "attention", "")
    monkeypatch.setattr(tfinfer.model, "load", lambda *_, **__: model)
    return model


def run(*arguments):
    return CliRunner().invoke(cli, ["attention", *map(str, arguments)], prog_name="tfinfer")


def test_the_command_writes_a_page_and_nothing_beside_it(fake, tmp_path):
    out = tmp_path / "map.html"
    out.write_text("old")
    result = run("dir", "a text", "-o", out)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert re.search(r"map\.html: \d+\.\d KiB; self 3 layers x 2 heads, 4 x 5 tokens\n$", result.stderr)
    assert len(payload(out.read_text("utf-8"))["maps"]) == 1
    assert list(tmp_path.iterdir()) == [out]
    assert fake.asked == ("a text", None)


def test_the_command_prints_arrays_and_tokens(fake):
    result = run("dir", "--ids", "1,2", "--target", "b", "--layer", 2, "--head", 1, "--json")
    assert result.exit_code == 0, result.output
    assert fake.asked == ([1, 2], "b")
    encoder, cross = json.loads(result.stdout)["maps"]
    assert (encoder["name"], cross["layers"], cross["heads"]) == ("encoder", [2], [1])
    assert cross["query_tokens"] == list(a_map().query_tokens)
    np.testing.assert_allclose(cross["weights"], a_map().pick(2, 1).stacked(), atol=1e-7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dir", "-o", "map.html"], "either a TEXT or --ids"),
        (["dir", "a", "--ids", "1", "-o", "map.html"], "either a TEXT or --ids"),
        (["dir", "a"], "expected -o map.html, -o map.png or --json"),
        (["dir", "a", "-o", "map.svg"], "ends in .html or .png; got 'map.svg'"),
        (["dir", "a", "-o", "not/there/map.html"], "in a folder that exists"),
        (["dir", "a", "-o", "map.html", "--layer", "9"], "layer 9 is not there: expected one of 3, 0 to 2"),
    ],
)
def test_the_command_explains_what_it_cannot_do(fake, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_write_leaves_the_old_page(fake, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "map.html"
    out.write_text("old")
    monkeypatch.setattr("tfinfer.cli.attention.os.replace", full)
    result = run("dir", "a", "-o", out)
    assert result.exit_code == 2
    assert "can be written: No space left on device" in result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_picture_without_matplotlib_fails_before_anything_is_loaded(fake, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("dir", "a", "-o", tmp_path / "map.png")
    assert result.exit_code == 2
    assert "pip install 'tfinfer[plot]'" in result.stderr
    assert not hasattr(fake, "asked")
