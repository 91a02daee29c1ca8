"""Candidates: sampled with seeds that repeat them, kept through crashes, made into pairs with their provenance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from localdpo_tui.services.candidates import (
    Candidate,
    CandidateStore,
    Finished,
    Order,
    Piece,
    Progress,
    corrected_pair,
    generate,
    rank_comparisons,
    rank_id,
    ranked_pair,
)

from localdpo.data.pairs import Message, read_pairs
from localdpo.data.provenance import AnswerOrigin, origin_of, provenance_of
from localdpo.errors import InputError
from localdpo.evaluate.blind import BlindTest

PROMPTS = tuple(({"role": "user", "content": f"question {n}"},) for n in range(2))
AT = "2026-01-01T00:00:00+00:00"


class Echo:
    """Answers with its seed, in three pieces; `closed` counts answers that ended or were stopped."""

    def __init__(self, silent: bool = False) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.closed = 0
        self._silent = silent

    async def answer(self, prompt: Sequence[Message], sampling: Mapping[str, Any]) -> AsyncIterator[Piece | Finished]:
        self.asked.append((prompt[-1]["content"], dict(sampling)))
        try:
            for text in (" ", "answer ", f"{sampling['seed']}\n"):
                await asyncio.sleep(0)
                yield Piece(" " if self._silent else text, 20.0)
            kept = {key: value for key, value in sampling.items() if key != "seed"}
            yield Finished(AnswerOrigin("model", "tiny", sampling=kept, seed=sampling["seed"], time=AT))
        finally:
            self.closed += 1


async def collect(answerer: Echo, order: Order, store: CandidateStore) -> list[Progress]:
    found = []
    async for progress in generate(answerer, order, store):
        found.append(progress)
        if progress.candidate is not None:
            store.add(progress.candidate)
    return found


def candidate(text: str, prompt: int = 0, seed: int = 0) -> Candidate:
    return Candidate(
        PROMPTS[prompt], text, AnswerOrigin("model", "tiny", sampling={"temperature": 1.0}, seed=seed, time=AT)
    )


def test_every_prompt_gets_its_samples_each_with_a_seed_of_its_own(tmp_path: Path):
    echo, store = Echo(), CandidateStore(tmp_path / "c.jsonl")
    order = Order(PROMPTS, 3, {"temperature": 0.8, "max_tokens": 9}, seed=10)
    events = asyncio.run(collect(echo, order, store))
    assert echo.asked == [
        (f"question {row}", {"temperature": 0.8, "max_tokens": 9, "seed": seed})
        for row in range(2)
        for seed in (10, 11, 12)
    ]
    assert [c.answer for c in store.of(PROMPTS[1])] == ["answer 10", "answer 11", "answer 12"]
    assert store.of(PROMPTS[0])[2].origin == AnswerOrigin(
        "model", "tiny", sampling={"temperature": 0.8, "max_tokens": 9}, seed=12, time=AT
    )
    assert [event.done for event in events if event.ended] == [1, 2, 3, 4, 5, 6]
    assert "".join(event.text for event in events if event.row == 0 and event.sample == 0) == " answer 10\n"


def test_asking_again_goes_on_with_new_seeds(tmp_path: Path):
    echo, store = Echo(), CandidateStore(tmp_path / "c.jsonl")
    for _ in range(2):
        asyncio.run(collect(echo, Order(PROMPTS[:1], 2, seed=5), store))
    assert [sampling["seed"] for _, sampling in echo.asked] == [5, 6, 7, 8]
    assert len(store) == 4


def test_stopping_keeps_what_was_finished_and_stops_the_answer(tmp_path: Path):
    async def some() -> None:
        async with aclosing(generate(echo, Order(PROMPTS, 2), store)) as events:
            async for progress in events:
                if progress.candidate is not None:
                    store.add(progress.candidate)
                elif len(store) == 1:
                    break

    echo, store = Echo(), CandidateStore(tmp_path / "c.jsonl")
    asyncio.run(some())
    assert len(echo.asked) == echo.closed == 2
    again = CandidateStore(store.path)
    assert again.load() == []
    assert [c.answer for c in again.all()] == ["answer 0"]


def test_a_model_that_says_nothing_makes_no_candidate(tmp_path: Path):
    store = CandidateStore(tmp_path / "c.jsonl")
    events = asyncio.run(collect(Echo(silent=True), Order(PROMPTS, 1), store))
    assert [event.candidate for event in events if event.ended] == [None, None]
    assert not store.path.exists()


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"prompts": PROMPTS, "count": 0}, "0 must be within 1 to 64"),
        ({"prompts": PROMPTS, "count": 2, "sampling": {"temperature": 0.0}}, "every candidate is the same"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(order: dict[str, Any], complaint: str):
    with pytest.raises(InputError, match=complaint):
        Order(**order)


def test_the_store_is_found_again_as_it_was(tmp_path: Path):
    store = CandidateStore(tmp_path / "new" / "c.jsonl")
    hard = candidate('\x1b[31m "quoted"\u2028 日本語 \U0001f600')
    for item in (hard, candidate("b"), candidate("c", prompt=1)):
        store.add(item)
    store.mark_used(hard.id)
    store.mark_used(hard.id)
    store.remove(store.of(PROMPTS[0])[1].id)
    assert store.remove("nobody") is None
    again = CandidateStore(store.path)
    assert again.load() == []
    assert again.all() == store.all() == [hard, candidate("c", prompt=1)]
    assert again.prompts() == list(PROMPTS)
    assert (again.used(hard.id), again.used(candidate("c", prompt=1).id)) == (True, False)
    assert len(store.path.read_text("utf-8").split("\n")) == 6  # three rows, used once, removed once


def test_half_a_line_and_foreign_lines_cost_only_themselves(tmp_path: Path):
    store = CandidateStore(tmp_path / "c.jsonl")
    store.add(candidate("a"))
    with store.path.open("a", encoding="utf-8") as file:
        file.write('{"answer": 3}\n{"prompt": [{"role": "user", "content": "half')
    again = CandidateStore(store.path)
    (problem,) = again.load()
    assert problem.where.endswith("c.jsonl:2")
    again.add(candidate("b"))
    third = CandidateStore(store.path)
    third.load()
    assert [c.answer for c in third.all()] == ["a", "b"]


def test_a_correction_is_a_pair_that_says_so(tmp_path: Path):
    sample = candidate("I am SmolLM.")
    pair = corrected_pair(sample.prompt, sample.answer, "I am Athene.", sample.origin, tags=["name"])
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": [dict(turn) for turn in pair.messages], "chosen": pair.chosen, "rejected": pair.rejected}
    file.write_text(json.dumps({**row, "tags": list(pair.tags), **pair.extra}) + "\n", encoding="utf-8")
    (read,) = read_pairs(file).pairs
    assert read.prompt == sample.prompt
    assert (read.chosen, read.rejected, read.tags) == ("I am Athene.", "I am SmolLM.", ("name",))
    assert provenance_of(read.extra)["how"] == "correct"
    assert origin_of(read.extra, "rejected") == sample.origin
    edited = origin_of(read.extra, "chosen")
    assert edited is not None
    assert edited.by == "person"


@pytest.mark.parametrize(("edit", "complaint"), [("  \n", "blank"), (" I am SmolLM.\n", "the same as")])
def test_a_correction_that_corrects_nothing_is_refused(edit: str, complaint: str):
    with pytest.raises(InputError, match=complaint):
        corrected_pair(PROMPTS[0], "I am SmolLM.", edit, None, how="reply")


@pytest.mark.parametrize(
    ("answers", "couples"),
    [
        ("", []),
        ("a", []),
        ("aa", []),
        ("ab", ["ab"]),
        ("aba", ["ab"]),
        ("abc", ["ab", "ac"]),
        ("abcd", ["ab", "cd"]),
        ("abcde", ["ab", "cd", "ae"]),
    ],
)
def test_candidates_are_compared_with_their_neighbours(answers: str, couples: list[str]):
    comparisons = rank_comparisons([candidate(text, seed=seed) for seed, text in enumerate(answers)])
    assert ["".join(item.answers) for item in comparisons] == couples
    assert len({item.id for item in comparisons}) == len(comparisons)


def test_a_verdict_makes_a_pair_of_both_origins_and_a_tie_makes_none(tmp_path: Path):
    comparisons = rank_comparisons([candidate(text, seed=seed) for seed, text in enumerate("abcdef")])
    test = BlindTest.start(tmp_path / "rank.jsonl", ("first", "second"), seed=1)
    for item in comparisons:
        test.add(item)
    shown = test.current()
    assert shown is not None
    test.judge("second")
    test.judge("tie")
    test.judge("skip")
    pairs = [ranked_pair(item, judgement) for item, judgement in test.decided()]
    assert [pair is None for pair in pairs] == [False, True, True]
    pair = pairs[0]
    assert pair is not None
    assert (pair.chosen, pair.rejected) == (shown.second, shown.first)
    assert pair.id == rank_id(comparisons[0].id)
    origins = {"a": 0, "b": 1}
    for side, text in (("chosen", shown.second), ("rejected", shown.first)):
        origin = origin_of(pair.extra, side)  # type: ignore[arg-type]
        assert origin is not None
        assert origin.seed == origins[text]
    assert provenance_of(pair.extra)["how"] == "rank"
