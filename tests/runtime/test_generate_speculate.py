"""Speculation on real graphs, where torch was never installed: the same tokens, and what is refused."""

import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

import tfinfer
from tfinfer.adopt import adopt
from tfinfer.cli.main import tfinfer as cli
from tfinfer.errors import ClosedError, InputError
from tfinfer.tokens.pace import Pace

HERE = Path(__file__).parent
TEXT = "the cat sat on the mat and the cat sat on"
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.1, "seed": 3}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Drafts are made whatever they cost: of toys no pass pays, and no test may hang on a clock."""

    class Eager(Pace):
        def __init__(self, **options):
            super().__init__(**options)
            self.lengths = itertools.cycle((4, 1, 0, 8))

        def length(self, kind, most):
            return min(most, next(self.lengths))

    monkeypatch.setattr("tfinfer.tokens.speculate.Pace", Eager)


@pytest.fixture(scope="module")
def states():
    with tfinfer.load(HERE / "tiny_states", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def seq2seq():
    with tfinfer.load(HERE / "tiny_seq2seq", threads=1) as loaded:
        yield loaded


@pytest.fixture
def edited(copied):
    """Opens the folder with another manifest."""

    def edit(**changes):
        path = copied / "tfinfer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tfinfer.load(copied, threads=1)

    return edit


def same(model, prompt, options, **speculation):
    """What is generated either way, which must be the same but for the counts of drafts; returns these."""
    plain = model.generate(prompt, **options, reuse_prefix=False)
    found = model.generate(prompt, **options, **speculation, reuse_prefix=False)
    usage = found.usage
    assert model.generate(prompt, **options, **speculation).token_ids == plain.token_ids  # behind what a cache holds
    assert found.token_ids == plain.token_ids
    assert (found.text, found.finish_reason) == (plain.text, plain.finish_reason)
    assert (plain.usage.proposed_tokens, plain.usage.accepted_tokens) == (0, 0)
    assert dataclasses.replace(usage, proposed_tokens=0, accepted_tokens=0) == plain.usage
    return usage.proposed_tokens, usage.accepted_tokens


@pytest.mark.parametrize("options", [{}, SAMPLED, {"stop": "t"}, {"logprobs": 2}], ids=str)
@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_a_decoder_says_the_same(model, way, options):
    speculation = {"lookup": True} if way == "lookup" else {"draft": model}
    proposed, accepted = same(model, TEXT, {"max_tokens": 40, "stop_ids": [], **options}, **speculation)
    assert proposed >= accepted
    if way == "draft" and "stop" not in options:
        assert accepted > 0.8 * proposed > 0  # the same model drafts; sampled, rounding may tip a token


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}], ids=str)
@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_a_model_with_states_says_the_same(states, way, options):
    speculation = {"lookup": True} if way == "lookup" else {"draft": states}
    proposed, accepted = same(states, [3, 4, 5, 3, 4], {"max_tokens": 60, **options}, **speculation)
    assert proposed >= accepted
    assert proposed > 0


def test_an_encoder_decoder_looks_up_in_its_source(seq2seq, monkeypatch):
    given = []
    lookup = tfinfer.speculation.Lookup
    monkeypatch.setattr("tfinfer.speculation.Lookup", lambda ids: given.append(ids) or lookup(ids))
    proposed, _ = same(seq2seq, "hello hello hello", {"max_tokens": 30, "stop_ids": []}, lookup=True)
    assert proposed > 0
    assert given == 2 * [[*seq2seq.tokenize("hello hello hello"), *seq2seq.manifest.token_ids.decoder_start]]
    with pytest.raises(InputError, match="expected a decoder, got an encoder-decoder"):
        seq2seq.generate("hello", max_tokens=3, draft=seq2seq)


def test_a_graph_that_concatenates_says_the_same(tmp_path):
    folder = Path(shutil.copytree(HERE / "tiny_foreign", tmp_path / "foreign"))
    adopt(folder)
    with tfinfer.load(folder, threads=1) as model:
        assert model.manifest.cache_mode == "concatenated"
        proposed, _ = same(model, [3, 4, 5, 3, 4], {"max_tokens": 20, "stop_ids": []}, lookup=True)
        assert proposed > 0
        _, accepted = same(model, [3, 4, 5, 3, 4], {"max_tokens": 20, "stop_ids": []}, draft=model)
        assert accepted > 0


def test_a_stream_comes_token_by_token_and_a_list_of_prompts_is_each_alone(model):
    options = {"max_tokens": 24, "stop_ids": []}
    chunks = list(model.stream(TEXT, **options, draft=model))
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 24
    assert chunks[-1].usage.proposed_tokens > 0
    prompts = ["a", TEXT, "def main():"]
    alone = [model.generate(prompt, **options).token_ids for prompt in prompts]
    assert [c.token_ids for c in model.generate(prompts, **options, lookup=True)] == alone
    assert [c.token_ids for c in model.generate(prompts, **options, draft=model)] == alone


def test_without_a_seed_a_draft_is_taken_or_refused(model):
    found = model.generate(TEXT, max_tokens=40, stop_ids=[], temperature=1.0, draft=model)
    assert found.usage.accepted_tokens > 0.8 * found.usage.proposed_tokens > 0


def test_cancelling_and_leaving_give_the_cache_back(model):
    cancel = threading.Event()
    stream = model.stream(TEXT, max_tokens=40, stop_ids=[], lookup=True, cancel=cancel)
    next(stream)
    cancel.set()
    assert list(stream)[-1].finish_reason == "cancelled"
    stream = model.stream(TEXT, max_tokens=40, stop_ids=[], draft=model)
    for _ in range(5):
        next(stream)
    stream.close()
    assert model._pool.caches[-1].live == []
    same(model, TEXT, {"max_tokens": 9}, lookup=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookup": True, "num_beams": 2}, "lookup: not for a beam search"),
        ({"draft": "itself", "num_beams": 2}, "draft: not for a beam search"),
        ({"lookup": True, "draft": "itself"}, "give one of them"),
        ({"lookup": "yes"}, "lookup: expected True or False, got 'yes'"),
        ({"draft": "out/small"}, "expected a model that tfinfer.load opened, got str"),
    ],
)
def test_what_does_not_go_together_is_refused_and_the_next_call_works(model, options, words):
    if options.get("draft") == "itself":
        options = options | {"draft": model}
    with pytest.raises(InputError, match=words):
        model.generate(TEXT, max_tokens=3, **options)
    with pytest.raises(InputError, match=words):
        model.stream(TEXT, max_tokens=3, **options)
    same(model, TEXT, {"max_tokens": 3}, lookup=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"all_rows": False}, "logits of the last position alone"),
        ({"appends_one": True}, "by one position at a time"),
    ],
)
def test_a_model_that_cannot_check_drafts_says_so_and_can_draft(model, edited, changes, words):
    with edited(**changes) as other:
        for speculation in ({"lookup": True}, {"draft": model}):
            with pytest.raises(InputError, match=words):
                other.generate(TEXT, max_tokens=3, **speculation)
        assert other.generate(TEXT, max_tokens=3, stop_ids=[]).token_ids
        same(model, TEXT, {"max_tokens": 20, "stop_ids": []}, draft=other)


def test_a_draft_of_another_vocabulary_is_refused(model, states, seq2seq, copied):
    with pytest.raises(InputError, match="297 ids in and 297 out, got 24 ids in and 24 out"):
        model.generate(TEXT, max_tokens=3, draft=states)
    with pytest.raises(InputError, match="draft: expected a decoder, got an encoder-decoder"):
        model.generate(TEXT, max_tokens=3, draft=seq2seq)
    with tfinfer.load(HERE / "tiny_encoder") as encoder, pytest.raises(InputError, match="got an encoder"):
        model.generate(TEXT, max_tokens=3, draft=encoder)


def rewritten(folder, change):
    """The folder with another tokenizer file."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    manifest = json.loads((folder / "tfinfer.json").read_text())
    manifest["files"]["tokenizer.json"]["bytes"] = path.stat().st_size
    (folder / "tfinfer.json").write_text(json.dumps(manifest))
    return tfinfer.load(folder, threads=1, check_hashes=False)


def test_another_tokenizer_is_refused_and_another_spelling_of_the_same_is_not(model, copied):
    def swap(data):
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    with rewritten(copied, lambda data: None) as other:  # as other bytes
        same(model, TEXT, {"max_tokens": 9}, draft=other)
    with rewritten(copied, swap) as other, pytest.raises(InputError, match="tokenizer gives other ids"):
        model.generate(TEXT, max_tokens=3, draft=other)


def test_a_closed_draft_is_said_at_once(model, tiny):
    with tfinfer.load(tiny) as other:
        pass
    with pytest.raises(ClosedError, match="draft: the model was closed"):
        model.stream(TEXT, max_tokens=3, draft=other)


def test_a_draft_that_fails_is_an_error_and_the_next_call_works(model, tiny, monkeypatch):
    with tfinfer.load(tiny, threads=1) as other:
        broken = lambda *given, **named: (_ for _ in ()).throw(InputError("broken"))  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(other.decoder, "prefill", broken)
            with pytest.raises(InputError, match="broken"):
                model.generate(TEXT, max_tokens=9, stop_ids=[], draft=other)
        same(model, TEXT, {"max_tokens": 9, "stop_ids": []}, draft=other)


# -- the command ----------------------------------------------------------------------------------------------------
def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="tfinfer")


def test_the_command_looks_up_and_drafts(tiny):
    base = ("generate", tiny, TEXT, "--max-tokens", 30, "--stop-ids", "", "--threads", 1)
    plain = run(*base)
    for options in (["--lookup"], ["--draft", tiny]):
        found = run(*base, *options, "--stats")
        assert (found.exit_code, found.stdout) == (0, plain.stdout), found.output
        assert "drafted ones right" in found.stderr
        usage = json.loads(run(*base, *options, "--json").stdout)["usage"]
        assert usage["proposed_tokens"] >= usage["accepted_tokens"] > 0 or options == ["--lookup"]
    assert "drafted" not in run(*base, "--stats").stderr


def test_the_command_says_in_one_line_what_is_wrong(tiny):
    for options, code, words in (
        (["--lookup", "--draft", tiny], 2, "give one of them"),
        (["--draft", HERE / "tiny_states"], 2, "the vocabulary of this model"),
        (["--draft", HERE / "nowhere"], 3, "there is no such folder"),
    ):
        found = run("generate", tiny, TEXT, *options)
        assert found.exit_code == code, found.output
        assert found.stdout == ""
        assert words in found.stderr
        assert found.stderr.count("\n") == 1


def test_a_conversation_speculates_and_what_was_drafted_in_vain_is_not_held_against_the_next_turn(model):
    with model.conversation() as chat, model.conversation() as plain:
        for said in (TEXT, " the mat and the dog", " sat"):
            drafted = chat.generate(said, max_tokens=12, stop_ids=[], lookup=True)
            expected = plain.generate(said, max_tokens=12, stop_ids=[])
            assert drafted.token_ids == expected.token_ids
        assert drafted.usage.proposed_tokens > 0
        assert chat.ids == plain.ids


def test_a_prompt_goes_on_from_what_a_speculating_call_left(model):
    ids = model.tokenize(TEXT)
    first = model.generate(ids, max_tokens=12, stop_ids=[], lookup=True)
    longer = [*ids, *first.token_ids, 5, 6]
    again = model.generate(longer, max_tokens=12, stop_ids=[], lookup=True)
    assert again.usage.reused_tokens >= len(ids)
    assert again.token_ids == model.generate(longer, max_tokens=12, stop_ids=[], reuse_prefix=False).token_ids
