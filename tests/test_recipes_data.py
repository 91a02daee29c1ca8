"""The hand-written data of the Athene recipe: what it promises, checked without a model."""

from __future__ import annotations

import json
import re
import unicodedata
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from localdpo.data.pairs import read_pairs, read_prompts

RECIPES = Path(__file__).parent.parent / "recipes"
SIZES = {"athene.jsonl": 101, "everyday.jsonl": 51, "athene_probes.jsonl": 48}
OLD_NAMES = re.compile(r"smol|hugging", re.IGNORECASE)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPES / name).read_text(encoding="utf-8").splitlines()]


def last_turn(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def normalised(row: dict[str, Any]) -> str:
    """All turns, without case, punctuation and doubled spaces."""
    prompt = row["prompt"]
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    text = unicodedata.normalize("NFKC", "\n".join(turns)).casefold()
    return " ".join(re.sub(r"[^\w\s+*-]", " ", text).split())


def says(answer: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_every_line_is_one_row_and_the_readers_take_all_of_them(name: str, size: int):
    text = (RECIPES / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert text.count("\n") == size == len(rows_of(name))
    if name == "athene.jsonl":
        file = read_pairs(RECIPES / name)
        assert (len(file.pairs), file.skipped, file.warnings) == (size, [], [])
    else:
        assert len(read_prompts(RECIPES / name)) == size


def test_rows_have_only_the_documented_keys():
    assert {tuple(row) for row in rows_of("athene.jsonl")} == {("prompt", "chosen", "rejected")}
    assert {tuple(row) for row in rows_of("everyday.jsonl")} == {("prompt",)}
    probes = {row["kind"]: tuple(row) for row in rows_of("athene_probes.jsonl")}
    keys = ("prompt", "kind", "tags", "accept")
    assert probes == {"identity": (*keys, "reject"), "everyday": keys}


def test_no_prompt_comes_twice_in_or_across_the_files():
    prompts = [normalised(row) for name in SIZES for row in rows_of(name)]
    assert sorted(prompts) == sorted(set(prompts))


def test_no_probe_is_a_taught_question_with_a_word_changed():
    taught = [last_turn(row).casefold() for name in ("athene.jsonl", "everyday.jsonl") for row in rows_of(name)]
    probes = [last_turn(row).casefold() for row in rows_of("athene_probes.jsonl")]
    close = [
        (probe, other) for probe in probes for other in taught if SequenceMatcher(None, probe, other).ratio() > 0.8
    ]
    assert close == []


def test_no_two_probes_are_nearly_the_same():
    probes = [last_turn(row).casefold() for row in rows_of("athene_probes.jsonl")]
    assert all(SequenceMatcher(None, *both).ratio() < 0.8 for both in combinations(probes, 2))


def test_chosen_answers_are_short_say_athene_and_never_the_old_names():
    chosen = [row["chosen"] for row in rows_of("athene.jsonl")]
    assert [answer for answer in chosen if not says(answer, "Athene")] == []
    assert [answer for answer in chosen if OLD_NAMES.search(answer)] == []
    assert max(len(answer) for answer in chosen) < 120
    assert len(set(chosen)) > 0.9 * len(
        chosen
    )  # a few plain answers come again: that is what a small model learns best


def test_rejected_answers_never_say_athene_as_their_own_name():
    own = re.compile(r"\b(I'm|I am|name is|called) Athene\b", re.IGNORECASE)
    rejected = [row["rejected"] for row in rows_of("athene.jsonl")]
    assert [answer for answer in rejected if own.search(answer)] == []
    assert sum(OLD_NAMES.search(answer) is not None for answer in rejected) >= 12


def test_everyday_rows_know_nothing_of_athene():
    # The file is offered to every recipe, whatever that one teaches.
    assert "athene" not in (RECIPES / "everyday.jsonl").read_text(encoding="utf-8").casefold()


def test_probes_are_half_identity_half_everyday_with_accepted_answers():
    rows = rows_of("athene_probes.jsonl")
    identity = [row for row in rows if row["kind"] == "identity"]
    everyday = [row for row in rows if row["kind"] == "everyday"]
    assert (len(identity), len(everyday)) == (24, 24)
    assert all(row["tags"] == [row["kind"]] for row in rows)
    assert all(row["accept"] == ["Athene"] for row in identity)
    assert all(row["accept"] and all(text.strip() for text in row["accept"]) for row in everyday)
    assert not any(says(text, "Athene") for row in everyday for text in row["accept"])
    assert "What's your name, please?" in [last_turn(row) for row in identity]


def test_no_question_gives_its_identity_answer_away():
    # A prompt that says Athene would let a model pass by repeating it.
    identity = [row for row in rows_of("athene_probes.jsonl") if row["kind"] == "identity"]
    assert not any("athene" in json.dumps(row["prompt"]).casefold() for row in identity)
