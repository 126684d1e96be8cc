"""The shipped date reader: its made dates read back by the documented rules, and its weights read dates never seen."""

import json
import re
from datetime import date
from pathlib import Path
from random import Random

import date_reader
import dates
import pytest
import torch
import train_date_reader
from safetensors.torch import load_file

from tfinfer.export.sources.text import parse_tokenizer, read_text_side

SHIPPED = Path(date_reader.__file__).parent / "date_reader"
BY_HAND = {
    "3rd of May, 79": "1979-05-03",
    "Tuesday, 5 November 1985": "1985-11-05",
    "5.11.1985": "1985-11-05",
    "11/05/85": "1985-11-05",
    "1985/11/05": "1985-11-05",
    "05-11-1985": "1985-11-05",
    "19851105": "1985-11-05",
    "the 1st of Jan 2004": "2004-01-01",
    "May 3 '79": "1979-05-03",
    "1979-5-3": "1979-05-03",
    "3 MAY 1979": "1979-05-03",
    "sept. 9th, 2012": "2012-09-09",
    "31/Dec/49": "2049-12-31",
    "1 January 50": "1950-01-01",
    "the twenty-ninth of February, 2012": "2012-02-29",
}


def by_rules(text):
    """The ISO date of a text by the rules in dates.py: numbers in order, a month by name, a day spelled out."""
    words, numbers = re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()), re.findall(r"\d+", text)
    names = [{name.lower(), name[:3].lower()} | ({"sept"} if name == "September" else set()) for name in dates.MONTHS]
    named = [month for month, forms in enumerate(names, 1) if forms & set(words)]
    spelled = [dates.SPELLED.index(word) + 1 for word in words if word in dates.SPELLED]
    if len(numbers[0]) == 8:
        numbers = [numbers[0][:4], numbers[0][4:6], numbers[0][6:]]
    if len(numbers[0]) == 4:  # the year is first: put it last, and the day before the month
        numbers = [*reversed(numbers[1:]), numbers[0]]
    elif "/" in text and not named:
        numbers = [numbers[1], numbers[0], numbers[2]]
    *rest, year = numbers
    day, month = [*spelled, *map(int, rest), *named]
    century = 0 if len(year) == 4 else 2000 if int(year) < 50 else 1900
    return date(century + int(year), month, day).isoformat()


def normalised(pairs, tokenizer):
    return [(tokenizer.normalizer.normalize_str(text), iso) for text, iso in pairs]


@pytest.fixture(scope="module")
def tokenizer():
    return parse_tokenizer((SHIPPED / "tokenizer.json").read_bytes(), "tokenizer.json")


@pytest.fixture(scope="module")
def model():
    module = date_reader.build()
    module.load_state_dict(load_file(SHIPPED / "model.safetensors"), strict=True)
    return module.eval()


@pytest.fixture(scope="module")
def held_out():
    lines = (SHIPPED / "held_out.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]


@pytest.mark.parametrize("text", BY_HAND)
def test_the_rules_are_the_documented_ones(text):
    assert by_rules(text) == BY_HAND[text]


@pytest.mark.parametrize("form", dates.FORMATS, ids=lambda form: form.__name__)
def test_a_format_reads_back(form):
    random = Random(0)
    for day in random.choices(dates.days(False), k=500):
        text = form(day, random)
        assert by_rules(text) == day.isoformat(), text


def test_what_is_written_reads_back_and_fits():
    for text, iso in dates.training_pairs(1, 5000):
        assert by_rules(text) == iso, text
        assert len(text) <= dates.LONGEST


def test_no_text_means_two_days(tokenizer):
    meant = {}
    for text, iso in normalised(dates.training_pairs(2, 20_000), tokenizer):
        assert meant.setdefault(text, iso) == iso, text


def test_draws_depend_on_the_seed_alone():
    assert dates.training_pairs(3, 50) == dates.training_pairs(3, 50) != dates.training_pairs(4, 50)
    assert dates.unseen_pairs(3, 50) == dates.unseen_pairs(3, 50) != dates.unseen_pairs(4, 50)


def test_held_out_days_are_apart():
    seen, unseen = set(dates.days(False)), set(dates.days(True))
    assert not seen & unseen
    assert len(seen | unseen) == (dates.LAST - dates.FIRST).days + 1
    assert len(unseen) / len(seen | unseen) == pytest.approx(1 / dates.HELD_OUT_SHARE, abs=0.005)
    drawn = {iso for _, iso in dates.training_pairs("0/0", 20_000)}
    assert not drawn & {day.isoformat() for day in unseen}


def test_the_shipped_dates_are_unseen_ones(held_out):
    assert held_out == dates.unseen_pairs(0, 1000)
    assert len({iso for _, iso in held_out}) == 1000
    assert all(dates.is_held_out(date.fromisoformat(iso)) for _, iso in held_out)
    assert all(by_rules(text) == iso for text, iso in held_out)


def test_special_tokens_are_found():
    side = read_text_side(SHIPPED)
    assert side.special_ids == {"pad_token": 0, "bos_token": 1, "eos_token": 2, "unk_token": 3}
    assert side.special_tokens == train_date_reader.SPECIAL


def test_a_token_is_a_character(tokenizer, held_out):
    assert tokenizer.to_str() == train_date_reader.make_tokenizer().to_str()
    assert tokenizer.get_vocab_size() == date_reader.build().tokens.num_embeddings
    for text, iso in held_out:
        assert tokenizer.decode(tokenizer.encode(iso).ids) == iso
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()
        assert train_date_reader.UNKNOWN not in tokenizer.encode(text).ids
    assert tokenizer.decode([1, *tokenizer.encode("1979-05-03").ids, 2]) == "1979-05-03"
    assert tokenizer.encode(" MAY\n3  \N{RIGHT SINGLE QUOTATION MARK}79 ").ids == tokenizer.encode("may 3 '79").ids


def test_the_weights_are_whole_and_few(model):
    report = json.loads((SHIPPED / "training.json").read_text(encoding="utf-8"))
    assert sum(p.numel() for p in model.parameters()) == report["parameters"] <= 1_000_000
    assert report["exact"] >= 990
    assert report["unseen"] == 1000


def test_unseen_dates_are_read(model, tokenizer, held_out):
    assert len(train_date_reader.misread(model, tokenizer, held_out[:50])) <= 1


def test_dates_by_hand_are_read(model, tokenizer):
    assert train_date_reader.misread(model, tokenizer, list(BY_HAND.items())) == []


@torch.no_grad()
def test_padding_makes_no_difference(model, tokenizer, held_out):
    src = train_date_reader.source_ids(tokenizer, [text for text, _ in held_out[:8]])
    tgt = train_date_reader.target_ids(tokenizer, [iso for _, iso in held_out[:8]])
    together = model(src, tgt)
    for row in range(8):
        alone = src[row : row + 1, src[row] != date_reader.PAD]
        logits = model.decode(tgt[row : row + 1], model.encode(alone))
        torch.testing.assert_close(logits[0], together[row], rtol=1e-4, atol=1e-4)
