"""The proof itself: every fault that a cache can have must fail, by the case that is made for it."""

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfinfer.errors import CorruptModelError
from tfinfer.proof import golden
from tfinfer.proof.cases import Case, Row, grid
from tfinfer.proof.compare import ABSOLUTE, RELATIVE, Difference, failed, tie
from tfinfer.proof.golden import Golden
from tfinfer.proof.prove import compare_greedy, prove

VOCAB = 19
NAMES = [
    "one token",
    "a prompt at once",
    "uneven pieces",
    "token by token",
    "two rows of different lengths",
    "three rows of different lengths",
    "rows that outgrow their cache",
    "rewound and refilled",
    "the longest length",
]
SINGLE = {*NAMES[:4], NAMES[7], NAMES[8]}  # cases of one slot
RAGGED = set(NAMES[4:7])
RNG = np.random.default_rng(7)
KEYS, PLACES = RNG.normal(size=(VOCAB, VOCAB)), RNG.normal(size=(256, VOCAB))


def logits_of(ids, positions=None) -> np.ndarray:
    """A causal model without weights worth the name: each token, at its place, leaves something behind."""
    ids = np.asarray(ids, np.int64)
    positions = np.arange(len(ids)) if positions is None else np.asarray(positions)
    return np.cumsum(np.sin(KEYS[ids] * 3 + PLACES[positions]), axis=0).astype(np.float32)


class FakeCache:
    def __init__(self, decoder, slots, capacity):
        self.decoder, self.capacity, self.free = decoder, decoder.rounded(capacity), list(range(slots))
        self.held = {slot: [] for slot in range(slots)}  # (id, position) of all that a slot holds
        self.closed = False

    def acquire(self):
        return self.free.pop(0)

    def rewind(self, slot, length):
        self.decoder.rewound(self, slot, length)

    def close(self):
        self.closed = True


class FakeDecoder:
    """Computes every logit from its own full history; a subclass does one thing wrong."""

    device = "cpu"
    block = 1  # capacities are multiples of this
    prompts = None

    def __init__(self, all_rows=True):
        self.manifest = SimpleNamespace(all_rows=all_rows, source=SimpleNamespace(kind="module"))
        self.caches = []

    def rounded(self, capacity):
        return -(-capacity // self.block) * self.block

    def open_cache(self, slots, capacity):
        self.caches.append(FakeCache(self, slots, capacity))
        return self.caches[-1]

    def rewound(self, cache, slot, length):
        del cache.held[slot][length:]

    def position(self, cache, slot):
        return len(cache.held[slot])

    def append(self, cache, slot, ids):
        for token in ids:
            cache.held[slot].append((int(token), self.position(cache, slot)))
        if len(cache.held[slot]) > cache.capacity:
            cache.capacity = self.rounded(2 * len(cache.held[slot]))
            self.grown(cache, slot)

    def grown(self, cache, slot):
        pass

    def whole(self, cache, slot):
        ids, positions = zip(*cache.held[slot])
        return logits_of(ids, positions)

    def prefill(self, cache, slot, ids, *, keep=1):
        assert 1 <= keep <= len(ids)
        self.append(cache, slot, ids)
        return self.whole(cache, slot)[-keep:]

    def step(self, cache, slots, ids):
        for slot, token in zip(slots, ids):
            self.append(cache, slot, [token])
        return np.stack([self.whole(cache, slot)[-1] for slot in slots])


def proved(decoder, max_length=100):
    """The names of the cases that failed, and whether the greedy tokens are right."""
    cases = grid(VOCAB, max_length)
    expected = [{row: logits_of(case.sequences[row.sequence])[row.position] for row in case.rows} for case in cases]
    prompt = np.arange(5)
    ids = prompt
    for _ in range(20):
        ids = np.append(ids, logits_of(ids)[-1].argmax())
    verdict = prove(decoder, "float32", Golden(cases, expected, prompt, ids[5:]))
    assert [c.name for c in verdict.cases] == [c.name for c in cases]
    assert all(cache.closed for cache in decoder.caches)
    assert verdict.passed == (not failed(verdict.cases) and verdict.greedy.passed)
    return {c.name for c in failed(verdict.cases)}, verdict


# -- the cases ------------------------------------------------------------------------------------------------------
@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(2, 100), st.integers(1, 50_000), st.integers(0, 3))
def test_every_case_fits_into_the_longest_length_and_its_vocabulary(max_length, vocab_size, seed):
    for case in grid(vocab_size, max_length, seed):
        check_case(case, max_length, vocab_size)


@pytest.mark.parametrize("max_length", range(2, 101))
def test_no_call_of_any_case_passes_the_longest_length(max_length):
    for case in grid(VOCAB, max_length):
        check_case(case, max_length, VOCAB)


def check_case(case: Case, max_length: int, vocab_size: int) -> None:
    held = [[] for _ in range(case.slots)]
    made = {}
    for number, call in enumerate(case.calls):
        if call.op == "rewind":
            assert 0 <= call.length < len(held[call.slot])
            del held[call.slot][call.length :]
        elif call.op == "step":
            assert len(call.ids) == case.slots
            for slot, token in enumerate(call.ids):
                held[slot].append(token)
                made[number, slot] = list(held[slot])
        else:
            assert call.op == "prefill"
            assert call.ids
            for row, token in enumerate(call.ids):
                held[call.slot].append(token)
                made[number, row] = list(held[call.slot])
        assert max(map(len, held)) <= max_length
        assert all(0 <= token < vocab_size for slot in held for token in slot)
    assert case.rows
    for row in case.rows:  # what a row is expected to follow is what its slot then holds
        assert made[row.call, row.row] == case.sequences[row.sequence][: row.position + 1].tolist()
    assert all(len(s) <= max_length for s in case.sequences)


def test_the_cases_are_known_by_name_and_do_not_change_from_run_to_run():
    cases = grid(VOCAB, 100)
    assert [case.name for case in cases] == NAMES
    again = grid(VOCAB, 100)
    assert [c.calls for c in cases] == [c.calls for c in again]


def test_only_a_long_enough_model_has_a_case_for_its_longest_length():
    assert NAMES[-1] not in [c.name for c in grid(VOCAB, 43)]
    longest = grid(VOCAB, 100)[-1]
    assert len(longest.sequences[0]) == 100
    assert longest.rows[-1].position == 99


# -- faults ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_length", [2, 3, 7, 44, 100])
@pytest.mark.parametrize("all_rows", [True, False])
def test_a_decoder_that_computes_from_its_whole_history_passes(max_length, all_rows):
    fails, verdict = proved(FakeDecoder(all_rows), max_length)
    assert fails == set()
    assert verdict.passed
    assert all(case.rows > 0 and case.worst == 0 for case in verdict.cases)


class OffByOne(FakeDecoder):
    """What comes onto a cache stands one position too far."""

    def append(self, cache, slot, ids):
        self.shift = int(bool(cache.held[slot]))
        super().append(cache, slot, ids)

    def position(self, cache, slot):
        return len(cache.held[slot]) + self.shift


class StaleAfterRewind(FakeDecoder):
    """What was rewound still stands in the cache and is seen again."""

    def rewound(self, cache, slot, length):
        cache.stale = {**getattr(cache, "stale", {}), slot: cache.held[slot][length:]}
        super().rewound(cache, slot, length)

    def whole(self, cache, slot):
        ghost = getattr(cache, "stale", {}).get(slot, [])[:1]
        ids, positions = zip(*ghost, *cache.held[slot])
        return logits_of(ids, positions)[len(ghost) :]


class RewindForgotten(FakeDecoder):
    """A rewind that does nothing."""

    def rewound(self, cache, slot, length):
        pass


class RewoundTooFar(FakeDecoder):
    def rewound(self, cache, slot, length):
        super().rewound(cache, slot, max(0, length - 1))


class SwappedRows(FakeDecoder):
    """In a step of several rows two of them read each other's cache."""

    def step(self, cache, slots, ids):
        logits = super().step(cache, slots, ids)
        return logits[[1, 0, *range(2, len(slots))]] if len(slots) > 1 else logits


class OneLengthForAll(FakeDecoder):
    """In a step every row stands where the longest one stands."""

    def position(self, cache, slot):
        return max(map(len, cache.held.values())) if self.stepping else len(cache.held[slot])

    stepping = False

    def step(self, cache, slots, ids):
        self.stepping = len(slots) > 1
        logits = super().step(cache, slots, ids)
        self.stepping = False
        return logits


class LostByGrowth(FakeDecoder):
    """Growing leaves out the first position of the slot that grows."""

    def grown(self, cache, slot):
        token, position = cache.held[slot][0]
        cache.held[slot][0] = (token, position + 1)


class LostByGrowthInBlocks(LostByGrowth):
    """As real caches have it: only what does not fit into 64 positions grows."""

    block = 64


class LostByGrowthOfSeveral(LostByGrowthInBlocks):
    """Only a cache of several slots grows wrongly: each row's bytes move to another place."""

    def grown(self, cache, slot):
        if len(cache.held) > 1:
            super().grown(cache, slot)


class WrongLastRow(FakeDecoder):
    """The last row of a prefill is another one's; the others are right."""

    def prefill(self, cache, slot, ids, *, keep=1):
        logits = super().prefill(cache, slot, ids, keep=keep).copy()
        if len(ids) > 1:
            logits[-1] = self.whole(cache, slot)[-2]
        return logits


class WrongFirstRows(FakeDecoder):
    """Only the last row of a prefill is right."""

    def prefill(self, cache, slot, ids, *, keep=1):
        logits = super().prefill(cache, slot, ids, keep=keep).copy()
        logits[:-1] += 1
        return logits


class WrongLastSlot(FakeDecoder):
    """In a step the last of several slots is a little wrong."""

    def step(self, cache, slots, ids):
        logits = super().step(cache, slots, ids)
        if len(slots) > 1:
            logits[-1, 3] += 0.01
        return logits


class WrongAfterFirstStep(FakeDecoder):
    """A step works once for a cache."""

    def step(self, cache, slots, ids):
        logits = super().step(cache, slots, ids)
        cache.steps = getattr(cache, "steps", 0) + 1
        return logits if cache.steps == 1 else logits + 0.01


class WrongOnLongPasts(FakeDecoder):
    """Beyond 64 positions the oldest is forgotten."""

    def whole(self, cache, slot):
        logits = super().whole(cache, slot)
        return logits if len(logits) <= 64 else logits - logits[:1]


CONTINUED = {"uneven pieces", "token by token", *RAGGED, "rewound and refilled", "the longest length"}
GROWING = {*NAMES} - {"one token"}


@pytest.mark.parametrize(
    "faulty, caught_by",
    [
        (OffByOne, CONTINUED),
        (StaleAfterRewind, {"rewound and refilled"}),
        (RewindForgotten, {"rewound and refilled"}),
        (RewoundTooFar, {"rewound and refilled"}),
        (SwappedRows, RAGGED),
        (OneLengthForAll, RAGGED),
        (LostByGrowth, GROWING),
        (LostByGrowthInBlocks, {"rows that outgrow their cache", "the longest length"}),
        (WrongLastRow, {*NAMES} - {"one token", "token by token"}),
        (WrongFirstRows, {*NAMES} - {"one token", "token by token"}),
        (WrongLastSlot, RAGGED),
        (WrongAfterFirstStep, {*RAGGED, "rewound and refilled", "the longest length"}),
        (WrongOnLongPasts, {"rows that outgrow their cache", "the longest length"}),
    ],
)
def test_each_fault_is_caught_by_the_cases_made_for_it_and_by_no_other(faulty, caught_by):
    fails, verdict = proved(faulty())
    assert fails == caught_by
    assert not verdict.passed
    assert any("FAILED at position" in line for line in verdict.lines())


def test_a_cache_of_several_slots_that_grows_wrongly_is_caught():
    assert proved(LostByGrowthOfSeveral())[0]


@pytest.mark.parametrize("faulty", [OffByOne, SwappedRows, RewindForgotten, WrongLastRow])
@pytest.mark.parametrize("max_length", [7, 16, 43])
def test_short_models_are_proved_as_strictly(faulty, max_length):
    assert proved(faulty(), max_length)[0]


@pytest.mark.parametrize("faulty", [OffByOne, SwappedRows, RewindForgotten, WrongLastRow])
def test_a_model_that_gives_its_last_row_alone_is_proved_as_strictly(faulty):
    assert proved(faulty(all_rows=False))[0]


def test_greedy_tokens_are_compared_one_by_one_on_pytorchs_own_past():
    prompt = np.arange(4)
    right = []
    for _ in range(6):
        right.append(int(logits_of([*prompt, *right])[-1].argmax()))
    assert compare_greedy(FakeDecoder(), prompt, np.array(right)).identical == 6
    wrong = [*right[:3], (right[3] + 1) % VOCAB, *right[4:]]
    result = compare_greedy(FakeDecoder(), prompt, np.array(wrong))
    assert result.identical < 6
    assert not result.passed
    assert not compare_greedy(FakeDecoder(), prompt, np.array([], np.int64)).passed


# -- differences ----------------------------------------------------------------------------------------------------
def compared(expected, got, dtype="float32"):
    difference = Difference(dtype, "a case")
    difference.add(np.array(expected, np.float32), np.array(got, np.float32), "here")
    return difference


def test_nothing_compared_is_a_failure_not_a_success():
    assert not Difference("float32", "a case").passed
    assert "nothing was compared" in str(Difference("float32", "a case"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_in_every_width(dtype, bad):
    assert not compared([1, 2, 3], [1, 2, bad], dtype).passed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reference_that_is_not_finite_proves_nothing(dtype, bad):
    assert not compared([1, 2, bad], [1, 2, 3], dtype).passed


def test_the_worst_row_is_kept_with_its_place():
    difference = Difference("float32", "a case")
    for place, away in (("first", 0.0), ("second", 3e-4), ("third", 1e-6)):
        difference.add(np.zeros(4, np.float32), np.full(4, away, np.float32), place)
    assert difference.place == "second"
    assert difference.rows == 3
    assert not difference.passed


def test_float32_is_bounded_by_an_absolute_and_a_relative_part():
    assert compared([0.0], [0.99 * ABSOLUTE]).passed
    assert not compared([0.0], [1.01 * ABSOLUTE]).passed
    assert compared([1000.0], [1000.0 + 0.9 * RELATIVE * 1000]).passed
    assert not compared([1000.0], [1000.0 + 1.2 * RELATIVE * 1000]).passed


def test_half_widths_may_move_a_logit_but_not_the_choice():
    spread = np.linspace(0, 10, 40)
    assert compared(spread, spread * 1.01, "float16").passed
    swapped = spread.copy()
    swapped[[10, 39]] = swapped[[39, 10]]
    assert not compared(spread, swapped, "float16").passed


def test_a_tie_is_what_the_bound_could_swap():
    logits = np.array([1.0, 1.0 + 2e-4, 1.1, -1000.0, -1000.15], np.float32)
    assert tie(logits, 0, 1)
    assert tie(logits, 1, 0)
    assert not tie(logits, 0, 2)
    assert tie(logits, 3, 4)
    assert tie(logits, 2, 2)


# -- the golden file ------------------------------------------------------------------------------------------------
def expected_of(cases, width=VOCAB):
    return [
        {row: np.resize(logits_of(case.sequences[row.sequence])[row.position], width) for row in case.rows}
        for case in cases
    ]


def save(path, cases, expected):
    golden.save(path, Golden(cases, expected, np.arange(3), np.arange(8)))


@pytest.mark.parametrize("max_length", [2, 30, 100])
def test_a_golden_file_gives_back_what_was_saved(tmp_path, max_length):
    cases = grid(VOCAB, max_length)
    expected = expected_of(cases)
    save(tmp_path / "golden.npz", cases, expected)
    read = golden.load(tmp_path / "golden.npz")
    for case, again, vectors, kept in zip(cases, read.cases, expected, read.expected):
        assert (again.name, again.slots, again.calls, again.rows) == (case.name, case.slots, case.calls, case.rows)
        assert all(np.array_equal(a, b) for a, b in zip(case.sequences, again.sequences))
        assert kept.keys() == vectors.keys()
        assert all(np.array_equal(kept[row], vectors[row]) for row in kept)
    assert np.array_equal(read.prompt, np.arange(3))
    assert np.array_equal(read.tokens, np.arange(8))
    verdict = prove(FakeDecoder(), "float32", read)
    assert not failed(verdict.cases)


def test_a_large_vocabulary_keeps_the_rows_within_the_budget_and_the_last_of_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "BUDGET", 300_000)
    cases = grid(VOCAB, 100)
    expected = expected_of(cases, width=5000)  # 20 kB a row: 15 rows in all
    save(tmp_path / "golden.npz", cases, expected)
    read = golden.load(tmp_path / "golden.npz")
    total = sum(vector.nbytes for vectors in read.expected for vector in vectors.values())
    assert total <= max(300_000, 2 * len(cases) * 20_000)
    for case, again, kept in zip(cases, read.cases, read.expected):
        assert 1 <= len(kept) <= 2
        assert case.rows[-1] in kept
        assert again.rows == [row for row in case.rows if row in kept]
        assert again.calls == case.calls


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_the_rows_kept_are_no_more_than_there_is_room_for_and_spread_over_the_calls(room, sizes):
    rows = [Row(call, r, 0, 0) for call, size in enumerate(sizes) for r in range(size)]
    kept = golden._last_rows(rows, room)
    assert len(kept) == len(set(kept)) <= min(room, len(rows))
    assert kept == [row for row in rows if row in kept]
    assert len(kept) == min(room, len(rows)) or len(kept) >= min(room, len(sizes)) // 2
    if room >= len(sizes):
        last = {row.call: row for row in rows}
        assert set(last.values()) <= set(kept)


def test_rows_that_a_module_does_not_give_are_not_saved(tmp_path):
    cases = grid(VOCAB, 30)
    expected = [{row: v for row, v in vectors.items() if row.row == 0} for vectors in expected_of(cases)]
    save(tmp_path / "golden.npz", cases, expected)
    assert [set(v) for v in golden.load(tmp_path / "golden.npz").expected] == [set(v) for v in expected]


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("name", ["cases", "logits_0", "sequence_0_0", "greedy_prompt"])
def test_nothing_in_a_golden_file_is_unpickled(tmp_path, capsys, name):
    cases = grid(VOCAB, 20)
    save(tmp_path / "golden.npz", cases, expected_of(cases))
    with np.load(tmp_path / "golden.npz") as arrays:
        found = dict(arrays)
    found[name] = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "golden.npz", **found)
    with pytest.raises(CorruptModelError, match="no golden file"):
        golden.load(tmp_path / "golden.npz")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_one_pickle_is_refused(tmp_path, capsys):
    np.save(tmp_path / "golden.npy", np.array([Bomb()], dtype=object))
    (tmp_path / "golden.npy").rename(tmp_path / "golden.npz")
    with pytest.raises(CorruptModelError):
        golden.load(tmp_path / "golden.npz")
    assert capsys.readouterr().out == ""


def damaged(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "other bytes":
        path.write_bytes(b"PK\x03\x04" + bytes(500))
    elif how == "text":
        path.write_text("{}")
    elif how == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif how == "a flipped bit":
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("logits_1.npy")
        at = info.header_offset + 400
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        with np.load(path) as arrays:
            found = dict(arrays)
        if how == "no cases":
            del found["cases"]
        if how == "no logits":
            del found["logits_1"]
        if how == "no JSON":
            found["cases"] = np.frombuffer(b"[{", np.uint8)
        if how == "no list":
            found["cases"] = np.frombuffer(json.dumps({"name": 1}).encode(), np.uint8)
        if how == "odd rows":
            found["cases"] = np.frombuffer(
                json.dumps([{"rows": [[1]], "calls": [], "sequences": 0}]).encode(), np.uint8
            )
        np.savez(path, **found)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # numpy leaves a broken archive open
@pytest.mark.parametrize(
    "how",
    ["missing", "empty", "cut off", "other bytes", "text", "one array", "a flipped bit", "no cases", "no logits"]
    + ["no JSON", "no list", "odd rows"],
)
def test_a_damaged_golden_file_is_named_and_nothing_else_escapes(tmp_path, how):
    cases = grid(VOCAB, 20)
    path = tmp_path / "golden.npz"
    save(path, cases, expected_of(cases))
    damaged(path, how)
    with pytest.raises(CorruptModelError, match=r"golden\.npz: is no golden file"):
        golden.load(path)
