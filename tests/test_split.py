from __future__ import annotations

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from localdpo.data.fields import Message
from localdpo.data.pairs import PreferencePair, PromptRow, prompt_key
from localdpo.data.split import held_out_rows, overlap


def pair(prompt: str, number: int = 0) -> PreferencePair:
    return PreferencePair((Message(role="user", content=prompt),), f"c{number}", "r")


def split_by_prompt(
    pairs: list[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out)"""
    held = held_out_rows((prompt_key(one.prompt) for one in pairs), fraction, seed)
    return [one for row, one in enumerate(pairs) if row not in held], [pairs[row] for row in held]


@given(st.lists(st.integers(0, 12), max_size=40), st.floats(0, 0.5), st.integers(0, 5))
def test_a_split_keeps_every_pair_once_and_prompts_together(prompts: list[int], fraction: float, seed: int):
    pairs = [pair(str(prompt), number) for number, prompt in enumerate(prompts)]
    train, held = split_by_prompt(pairs, fraction, seed)
    assert sorted(p.chosen for p in train + held) == sorted(p.chosen for p in pairs)
    assert not {p.prompt[0]["content"] for p in train} & {p.prompt[0]["content"] for p in held}
    assert train or not pairs
    assert [p for p in pairs if p in train] == train
    assert [p for p in pairs if p in held] == held
    if fraction > 0 and len(set(prompts)) > 1:
        assert held


@given(st.lists(st.integers(0, 20), max_size=60), st.floats(0.01, 0.6), st.integers(0, 99))
def test_prompts_are_held_out_in_the_order_of_their_digests(prompts: list[int], fraction: float, seed: int):
    """The rule in plain words: whole prompts, by the sha256 of seed and key, as long as they fit."""
    pairs = [pair(str(prompt), number) for number, prompt in enumerate(prompts)]
    groups: dict[bytes, list[PreferencePair]] = {}
    for one in pairs:
        groups.setdefault(prompt_key(one.prompt), []).append(one)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key.hex()}".encode()).digest())
    wanted, held = max(1, round(fraction * len(pairs))), []
    for key in order if len(groups) > 1 else []:
        held += groups[key] if len(held) + len(groups[key]) <= wanted else []
    if len(groups) > 1 and not held:
        held = min((groups[key] for key in order), key=len)
    assert split_by_prompt(pairs, fraction, seed)[1] == sorted(held, key=pairs.index)


def test_the_fraction_is_met_when_prompts_are_single():
    train, held = split_by_prompt([pair(str(i)) for i in range(40)], 0.1, 0)
    assert (len(train), len(held)) == (36, 4)


def test_the_same_seed_holds_out_the_same_prompts_in_any_order():
    pairs = [pair(str(i)) for i in range(30)]
    shuffled = random.Random(1).sample(pairs, 30)
    first, second = (split_by_prompt(rows, 0.2, 3)[1] for rows in (pairs, shuffled))
    assert {p.prompt[0]["content"] for p in first} == {p.prompt[0]["content"] for p in second}
    assert split_by_prompt(pairs, 0.2, 4)[1] != first


def test_nothing_is_held_out_of_one_prompt_or_at_fraction_0():
    assert split_by_prompt([pair("a"), pair("a")], 0.5, 0) == ([pair("a"), pair("a")], [])
    assert split_by_prompt([pair("a"), pair("b")], 0, 0)[1] == []
    assert split_by_prompt([], 0.1, 0) == ([], [])


def test_the_smallest_prompt_is_held_out_when_all_are_large():
    pairs = [pair("a", i) for i in range(6)] + [pair("b", i) for i in range(4)]
    assert split_by_prompt(pairs, 0.1, 0)[1] == pairs[6:]


def test_overlap_finds_prompts_on_both_sides():
    probe = PromptRow((Message(role="user", content="a\n"),))
    assert overlap([pair("a"), pair("b")], [pair("b", 2), pair("c"), probe]) == [pair("b", 2), probe]
    assert overlap([pair("a")], [pair("b")]) == []
