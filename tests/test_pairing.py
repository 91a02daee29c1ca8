"""Pairs out of candidates: what may be chosen, what is said where there is no pair, provenance, corrections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localdpo.data.candidates import Candidate, CandidateJournal, Request, Voice, answer_seed
from localdpo.data.pairing import (
    Edits,
    best_and_worst,
    corrected,
    distinct,
    parse_substitutions,
    rewrite_request,
    substituted,
    without_thanks,
)
from localdpo.data.pairs import PreferencePair, PromptRow
from localdpo.data.provenance import AnswerOrigin, by_person, origin_of, provenance_of, with_provenance
from localdpo.data.rewards import parse_rewards
from localdpo.errors import InputError

ROW = PromptRow(({"role": "user", "content": "q"},), tags=("t",), id="7", extra={"note": 1, "target": "x"}, line=3)
SHORT = parse_rewards(["length:max=1"])


def said(text: str, finish: str = "stop", sample: int = 0) -> Candidate:
    return Candidate(text, AnswerOrigin("model", "m", "f" * 8, seed=1, sample=sample, finish=finish))


def test_the_best_is_chosen_the_worst_rejected_and_both_are_traced() -> None:
    candidates = [said("a b c", sample=0), said("a", sample=1), said("a b", sample=2)]
    pair = best_and_worst(ROW, candidates, SHORT)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen, pair.rejected, pair.id, pair.tags) == ("a", "a b c", "7", ("t",))
    assert "target" not in pair.extra
    notes = provenance_of(pair.extra)
    assert (notes["score_chosen"], notes["candidates"], notes["how"]) == (1.0, 3, "best-and-worst")
    assert notes["rewards"] == [{"reward": "length", "weight": 1.0, "max": 1}]
    assert origin_of(pair.extra, "chosen") == candidates[1].origin


@pytest.mark.parametrize(
    ("candidates", "options", "reason"),
    [
        ([said("a"), said("a ")], {}, "all its answers are the same"),
        ([said(" "), said("")], {}, "its answers are blank"),
        ([said("a"), said("b")], {}, "do not differ"),
        ([said("a b"), said("a b c")], {"min_gap": 0.5}, "differ too little"),
        ([said("a", "length"), said("a b", "length")], {}, "every answer was cut off"),
        ([said("a"), said("a b", "length")], {"unfinished": "leave-out"}, "every other answer was cut off"),
        ([said("a b c"), said("a", "length")], {}, "do not differ"),
    ],
)
def test_reasons_for_no_pair(candidates: list[Candidate], options: dict[str, Any], reason: str) -> None:
    found = best_and_worst(ROW, candidates, SHORT, **options)
    assert isinstance(found, str)
    assert reason in found


def test_an_answer_that_was_cut_off_is_never_chosen_unless_asked_for() -> None:
    candidates = [said("a", "length"), said("a b"), said("a b c")]
    pair = best_and_worst(ROW, candidates, SHORT)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == "a b"
    kept = best_and_worst(ROW, candidates, SHORT, unfinished="keep")
    assert isinstance(kept, PreferencePair)
    assert kept.chosen == "a"
    worst = best_and_worst(ROW, [said("a"), said("a b c d", "length"), said("a b")], SHORT)
    assert isinstance(worst, PreferencePair)
    assert worst.rejected == "a b c d"


def test_substitutions_plain_escaped_and_regular() -> None:
    plain = parse_substitutions(["SmolLM=Athene", r"1\=1=2"])
    made = substituted(said("I am SmolLM: 1=1."), plain)
    assert (made.text, made.origin.by) == ("I am Athene: 2.", "substitution")
    regular = parse_substitutions([r"(\w+)LM=\1X"], regex=True)
    assert substituted(said("SmolLM"), regular).text == "SmolX"
    pair = corrected(ROW, said("I am SmolLM"), made, "substitution")
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen, pair.rejected) == ("I am Athene: 2.", "I am SmolLM")
    assert corrected(ROW, said("a"), substituted(said("a"), plain), "substitution") == "its answer needs no correction"
    for bad in ("nothing", "=x"):
        with pytest.raises(InputError, match="--replace"):
            parse_substitutions([bad])
    with pytest.raises(InputError, match="regular expression"):
        parse_substitutions(["(=x", r"a=\9"], regex=True)


def test_edits_are_found_by_their_key_whatever_the_order(tmp_path: Path) -> None:
    edits = Edits(tmp_path / "edits.jsonl")
    first, second = said("one", sample=0), said("two", sample=1)
    lines = [edits.line(ROW, first), edits.line(ROW, second).replace('"edited": "two"', '"edited": "TWO"')]
    edits.path.write_text("\n".join(lines[::-1]) + "\n")
    found = edits.read()
    assert [found[edits.key(ROW, candidate)] for candidate in (first, second)] == ["one", "TWO"]
    pair = corrected(ROW, second, Candidate("TWO", by_person()), "edit")
    assert isinstance(pair, PreferencePair)
    assert provenance_of(pair.extra)["chosen"]["by"] == "person"
    assert corrected(ROW, first, Candidate("one", by_person()), "edit") == "its answer was not edited"
    edits.path.write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="both text"):
        edits.read()


@pytest.mark.parametrize(
    "text", ["Rewritten answer: Yes.", "Here is the rewritten answer:\nYes.", "[Answer]\nYes.", "Yes.", " Yes. "]
)
def test_a_rewrite_loses_its_label(text: str) -> None:
    assert without_thanks(text) == "Yes."
    assert without_thanks("Answer:") == "Answer:"


def test_the_rewriter_sees_conversation_and_answer() -> None:
    (turn,) = rewrite_request(ROW.prompt, "my answer", "Be kind.")
    assert [turn["content"].index(part) for part in ("User: q", "my answer", "Be kind.")] == sorted(
        turn["content"].index(part) for part in ("User: q", "my answer", "Be kind.")
    )


def test_the_journal_gives_back_what_was_put_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    voice, request = Voice("m", "f" * 64), Request(ROW.prompt, 2)
    key = CandidateJournal.key(voice, {"temperature": 0.5}, 3, request)
    others = [
        CandidateJournal.key(Voice("m", "e" * 64), {"temperature": 0.5}, 3, request),
        CandidateJournal.key(Voice("m", "f" * 64, "a", "b"), {"temperature": 0.5}, 3, request),
        CandidateJournal.key(voice, {"temperature": 0.6}, 3, request),
        CandidateJournal.key(voice, {"temperature": 0.5}, 4, request),
        CandidateJournal.key(voice, {"temperature": 0.5}, 3, Request(ROW.prompt, 1)),
    ]
    assert len({key, *others}) == 6
    journal = CandidateJournal.open(path)
    assert journal.get(key) is None
    answer = said("\u2028\x1b[31m é", sample=2)
    journal.put([(key, request, answer)])
    with path.open("ab") as file:
        file.write(b'{"key": "half')
    again = CandidateJournal.open(path)
    assert (len(again), again.get(key)) == (1, answer)
    again.put([(key, request, said("other")), ("k2", request, said("x"))])
    assert CandidateJournal.open(path).get(key) == answer
    assert len(path.read_text("utf-8").split("\n")) == 3


def test_seeds_differ_by_everything_that_should_differ() -> None:
    other = ({"role": "user", "content": "other"},)
    asked = [(0, Request(ROW.prompt)), (1, Request(ROW.prompt)), (0, Request(ROW.prompt, 1)), (0, Request(other))]
    seeds = [answer_seed(seed, request) for seed, request in asked]
    assert len(set(seeds)) == 4
    assert seeds[0] == answer_seed(0, Request(ROW.prompt))


def test_provenance_reads_back_and_keeps_what_was_there() -> None:
    origin = AnswerOrigin("model", "m", sampling={"temperature": 0.5}, seed=0, sample=0, finish="stop")
    assert AnswerOrigin.from_json(origin.to_json()) == origin
    assert AnswerOrigin.from_json({"by": "nobody"}) is None
    assert AnswerOrigin.from_json({"by": "model", "seed": "x", "model": 3}).seed is None  # type: ignore[union-attr]
    extra = with_provenance({"provenance": "a text"}, "edit", chosen=origin)
    assert extra["provenance"]["before"] == "a text"
    assert origin_of(extra, "rejected") is None
    assert provenance_of({"provenance": 3}) == {}


def test_equal_and_blank_candidates_count_once() -> None:
    assert [c.text for c in distinct([said("a"), said(" a"), said(""), said("b")])] == ["a", "b"]
