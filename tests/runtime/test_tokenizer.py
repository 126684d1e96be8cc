"""Tokenizers trained on the spot: text in pieces equals text at once, and hostile files are errors of the tree."""

import base64
import json
import random
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tfinfer.errors import CorruptModelError, InputError
from tfinfer.tokens.tokenizer import StreamDecoder, Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def main(argv):\n    return 0",
    "日本語のテキスト 你好世界",
] * 4
TEXTS = [
    "",
    "hello the world",
    " leading and trailing ",
    "   \n\n\tdef f():\n        return 'x'  ",
    "emoji 👩‍👩‍👧‍👦 and 🇯🇵🎉🎉 flags",
    "你好世界\uff0c日本語のテキスト。𠮷野家",
    "genuine \ufffd replacement \ufffd\ufffd\ufffd\ufffd\ufffd end\ufffd",
    "e\u0301 combining, \u202ertl\u202c שלום",
    "🎉" * 60,
    "é",
]


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, alphabet)
    return tokenizer


def metaspace():
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    train(tokenizer, sorted({char for text in TEXTS for char in text}))
    return tokenizer


def byte_fallback():
    """As SentencePiece models come: a Metaspace vocabulary with a token per byte for what it lacks."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, [])
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    content["model"]["byte_fallback"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def train(tokenizer, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "byte-fallback": byte_fallback}


@pytest.fixture(scope="module")
def tokenizer_of():
    made = {kind: Tokenizer(make()) for kind, make in KINDS.items()}
    return made.__getitem__


def pieces(tokenizer, ids, prompt=()):
    stream = StreamDecoder(tokenizer, prompt_ids=prompt)
    return [stream.push(token) for token in ids] + [stream.flush()]


def decode_steps(tokenizer, ids):
    """The number of ids decoded over a whole stream."""
    counted = []
    inner = tokenizer.decode
    tokenizer.decode = lambda ids, skip=True: counted.append(len(ids)) or inner(ids, skip)
    try:
        pieces(tokenizer, ids)
    finally:
        del tokenizer.decode
    return sum(counted)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_text(tokenizer_of, kind, text):
    """Decoding ids one by one loses spaces and splits characters."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == whole
    assert whole == text or kind != "byte-level"
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_continue_the_prompt(tokenizer_of, kind, text):
    """Without the prompt as context the first word of the answer loses its space."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("the quick brown fox " * 5 + text + "the lazy dog")
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if before.endswith("\ufffd"):
            continue
        assert before + "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.integers(1, 6))
def test_any_text_comes_out_whole(text, times):
    for tokenizer in HYPOTHESIS_TOKENIZERS:
        ids = tokenizer.encode(text * times)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


HYPOTHESIS_TOKENIZERS = [Tokenizer(make()) for make in KINDS.values()]


def test_random_bytes_come_out_as_decoded_at_once(tokenizer_of):
    """A model that is not trained writes bytes that are no text; nothing may be lost or doubled."""
    tokenizer = tokenizer_of("byte-level")
    rng = random.Random(0)
    wild = [tokenizer.encode(char, add_special_tokens=False)[-1] for char in "🎉你é\ufffd"]
    for _ in range(200):
        tokens = rng.choice([range(tokenizer.vocab_size), wild])
        ids = [rng.choice(tokens) for _ in range(rng.randrange(200))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_prompt_cut_within_a_character_is_completed(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("party 🎉!", add_special_tokens=False)
    assert len(ids) > 8
    assert "".join(pieces(tokenizer, ids[-3:], ids[:-3])) == "🎉!"


def test_a_genuine_replacement_character_at_the_prompts_end_is_not_repeated(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    prompt = tokenizer.encode("lost \ufffd")
    assert "".join(pieces(tokenizer, tokenizer.encode("🎉x", add_special_tokens=False), prompt)) == "🎉x"


def test_a_replacement_character_is_shown_with_the_next_text_at_the_latest(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("\ufffdx", add_special_tokens=False)
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids][-1].endswith("\ufffdx")
    assert stream.flush() == ""


def test_bytes_that_never_make_a_character_are_released_while_they_come(tokenizer_of):
    """A stream that waits for the character waits for ever."""
    tokenizer = tokenizer_of("byte-level")
    lone = tokenizer.encode("🎉", add_special_tokens=False)[0]
    shown = pieces(tokenizer, [lone] * 300)
    assert "".join(shown) == "\ufffd" * 300
    assert len("".join(shown[:-1])) >= 297


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_byte_loses_no_text_after_it(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    party = tokenizer.encode("🎉", add_special_tokens=False)
    ids = party + party[-1:] * 2 + tokenizer.encode("the end", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)).endswith("the end")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the quick ", "🎉", "\ufffd", "你好"])
def test_the_cost_of_a_token_does_not_grow(tokenizer_of, kind, text):
    """Decoding all ids on every push makes long answers quadratic."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text * 400, add_special_tokens=False)
    assert decode_steps(tokenizer, ids) < 160 * len(ids)


def test_special_and_unknown_ids_have_no_text(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    party = tokenizer.encode("🎉", add_special_tokens=False)
    ids = [1, party[0], 2, 99_999, *party[1:], 2]
    assert "".join(pieces(tokenizer, ids)) == "🎉" == tokenizer.decode(ids)
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    assert stream.push(2) == "</s>" == tokenizer.decode([2], skip_special_tokens=False)


def test_special_tokens_are_added_on_request(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    assert tokenizer.encode("the") == [1, *tokenizer.encode("the", add_special_tokens=False)]
    assert tokenizer.vocab_size > 259


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    """A prompt that is cut in silence gives a plausible answer to another question."""
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_file(tmp_path / "tokenizer.json").encode("the quick brown fox" * 9, add_special_tokens=False)
    assert 4 < len(ids) != 64


def hostile(**changes):
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
    return json.dumps(content | changes)


def charsmap(content):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "\0" * 99, hostile(model={"type": "Unheard"}), hostile(normalizer=charsmap(b"\xff" * 4))],
    ids=["empty", "cut", "no object", "zeros", "unknown model", "panic"],
)
def test_a_file_that_does_not_load_is_named(tmp_path, capfd, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CorruptModelError, match=r"tokenizer\.json: expected"):
        Tokenizer.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CorruptModelError, match=r"absent\.json"):
        Tokenizer.from_file(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": charsmap(b"\x04\0\0\0\0\xff\xff\xff")},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}},
    ],
    ids=["panic in the normalizer", "panic in the splitter", "no unknown token"],
)
def test_a_text_that_fails_is_an_input_error_and_the_next_call_works(tmp_path, capfd, changes, tokenizer_of):
    path = tmp_path / "tokenizer.json"
    path.write_text(hostile(**changes))
    tokenizer = Tokenizer.from_file(path)
    with pytest.raises(InputError, match="cannot encode"):
        tokenizer.encode("b xyz")
    assert tokenizer.decode([1]) == "b"


@pytest.mark.parametrize("text", ["\ud800", b"bytes", None, ["a"]], ids=repr)
def test_what_is_no_text_is_refused(tokenizer_of, text):
    with pytest.raises(InputError, match="text"):
        tokenizer_of("byte-level").encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [None]], ids=str)
def test_what_is_no_id_is_refused(tokenizer_of, ids):
    with pytest.raises(InputError, match="ids"):
        tokenizer_of("byte-level").decode(ids)
    with pytest.raises(InputError, match="ids"):
        StreamDecoder(tokenizer_of("byte-level")).push(ids[0])


def test_numpy_ids_decode(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    ids = np.array(tokenizer.encode("the fox"))
    assert tokenizer.decode(ids) == "the fox" == "".join(pieces(tokenizer, ids))


def test_random_bytes_of_a_byte_fallback_lose_no_good_character(tokenizer_of):
    tokenizer = tokenizer_of("byte-fallback")
    rng = random.Random(0)
    party, word = (tokenizer.encode(text, add_special_tokens=False) for text in ("🎉", "the"))
    party = party[-4:]
    junk = [party[:1], party[-1:], party[:2], party[1:]]
    for _ in range(200):
        parts = [word] + [rng.choice([party, word, *junk]) for _ in range(rng.randrange(60))]
        shown = "".join(pieces(tokenizer, [token for part in parts for token in part]))
        assert shown.count("the") == sum(part is word for part in parts)
        good = sum(part is party and before is word for before, part in pairwise(parts))
        assert shown.count("🎉") >= good


class Interrupted:
    def __getattr__(self, name):
        return lambda *args, **kwargs: {} if name == "get_added_tokens_decoder" else None

    def encode(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupt_passes():
    """Catching BaseException for the sake of panics must not swallow control-C."""
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Interrupted()).encode("a")
