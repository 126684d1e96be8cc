"""What caches hold of prompts already: which slot begins as a prompt does, and what prompts have in common.

A slot that holds the first ids of a prompt spares their prefill. What it holds is known by its ids, which are recorded
where positions are made, so a match is a fact and no guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfinfer.session.decoder import Decoder

Prompts = Sequence[Sequence[int]]
# A beginning that prompts share is run by itself first. That reads the weights once more, which costs a CPU about as
# much as this many tokens of a prompt.
WORTH = 32


@dataclass(frozen=True)
class Seats:
    """A slot for each prompt, how many of the prompt's first ids it holds, and how many of these it did not compute."""

    slots: list[int]
    held: list[int]
    reused: list[int]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first ids two lists have in common."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def matches(cache: Any, prompts: Prompts) -> dict[int, tuple[int, int]]:
    """By prompt, the released slot that holds most of its beginning, and how much: longest first, each slot once.

    One id at least is left to be run, for its logits.
    """
    found = []
    for (index, prompt), slot in itertools.product(enumerate(prompts), cache.left):
        held = cache.reachable(slot, min(common(cache.ids[slot], prompt), len(prompt) - 1))
        if held:
            found.append((-held, index, slot))
    chosen: dict[int, tuple[int, int]] = {}
    taken = set()
    for negated, index, slot in sorted(found):
        if index not in chosen and slot not in taken:
            chosen[index] = (slot, -negated)
            taken.add(slot)
    return chosen


def seat(decoder: Decoder, cache: Any, prompts: Prompts) -> Seats:
    """A slot for each prompt that holds as much of it as the cache knows, or as other prompts share with it."""
    revived = {index: cache.revive(slot, held) for index, (slot, held) in matches(cache, prompts).items()}
    slots = [revived[index] if index in revived else cache.acquire() for index in range(len(prompts))]
    cache.arrange(slots)  # now, while rows hold little: a step wants them in this order
    computed = _share(decoder, cache, prompts, slots)
    held = [cache.length(slot) for slot in slots]
    return Seats(slots, held, [n - computed.get(slot, 0) for slot, n in zip(slots, held)])


def _share(decoder: Decoder, cache: Any, prompts: Prompts, slots: Sequence[int]) -> dict[int, int]:
    """Let all slots hold what all prompts begin with, run once; returns in which slot how much of it was run."""
    shared = min(common(prompts[0], prompt) for prompt in prompts)
    shared = min(shared, *(len(prompt) - 1 for prompt in prompts))
    lacking = [slot for slot in slots if cache.length(slot) < shared]
    source = next((s for s in slots if cache.length(s) >= shared and cache.can_copy(s, shared)), None)
    computed = {}
    if source is None:
        if (len(lacking) - 1) * shared < WORTH:
            return {}
        source = max(lacking, key=cache.length)
        computed[source] = shared - cache.length(source)
        prompt = prompts[slots.index(source)]
        decoder.prefill(cache, source, prompt[cache.length(source) : shared], keep=0)
        cache.keep(source)
    for slot in lacking:
        if slot != source:
            cache.copy_positions(source, slot, cache.length(slot), shared)
    return computed


def seat_beside(cache: Any, prompt: Sequence[int]) -> int:
    """A slot that holds as much of a prompt's beginning as any of a cache does, of those left or those still going."""
    slot, held = matches(cache, [prompt]).get(0, (-1, 0))
    most, live = max(((common(cache.ids[s], prompt), s) for s in cache.live), default=(0, -1))
    most = min(most, len(prompt) - 1)
    if most >= held + WORTH and cache.can_copy(live, most):
        target: int = cache.acquire()
        cache.copy_positions(live, target, 0, most)
        return target
    found: int = cache.revive(slot, held) if held else cache.acquire()
    return found
