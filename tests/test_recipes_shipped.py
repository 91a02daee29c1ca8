"""The recipes for a tone or a style: their data, what the benchmark counts, and with --slow their effect.

The Athene recipe has tests of its own (test_recipes_data.py).
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from localdpo.console.pairs_check import settings_of
from localdpo.data.check.report import CheckOptions, check_file
from localdpo.data.pairs import PromptRow, read_pairs
from localdpo.evaluate.figures import says
from localdpo.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
NAMES = ("short", "support", "plain", "recommend", "neutral")
EVERYDAY = "everyday"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """benchmarks/recipes.py, which is no part of the package."""
    path = ROOT / "benchmarks" / "recipes.py"
    spec = importlib.util.spec_from_file_location("benchmark_recipes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPES / file).read_text(encoding="utf-8").splitlines()]


def text_of(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"]).casefold()


def probes_of(name: str) -> list[dict[str, Any]]:
    return [row for row in rows_of(f"{name}_probes.jsonl") if row["kind"] != EVERYDAY]


# The files


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_loads_and_its_files_are_there(name: str):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.model == "smollm2-135m"
    assert recipe.output_dir == Path("runs") / name
    assert recipe.data.train == RECIPES / f"{name}.jsonl"
    assert recipe.data.probes == RECIPES / f"{name}_probes.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_there_are_forty_pairs_and_more_and_all_of_them_can_be_trained_on(name: str):
    file = read_pairs(RECIPES / f"{name}.jsonl")
    assert (file.skipped, file.warnings) == ([], [])
    assert len(file.pairs) == len(rows_of(f"{name}.jsonl")) >= 40
    assert len({text_of(row) for row in rows_of(f"{name}.jsonl")}) == len(file.pairs)
    assert all(tuple(row) == ("prompt", "chosen", "rejected") for row in rows_of(f"{name}.jsonl"))


# What is taught is a word, a form or a length, so the check may say that it is told by one.
TAUGHT_FORM = {"shortcut", "separable", "length_bias"}


@pytest.mark.parametrize("name", NAMES)
def test_the_check_finds_nothing_but_what_is_taught(name: str):
    settings = settings_of(None, RECIPES / f"{name}.yaml")
    report = check_file(settings.file, CheckOptions(settings.others, settings.expected))
    assert {finding.kind for finding in report.findings} <= TAUGHT_FORM, [str(found) for found in report.findings]
    # Of shorter answers the check has to say that they are shorter.
    assert report.exit_code == (1 if name == "short" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_probe_is_trained_on_or_nearly(name: str):
    taught = [text_of(row) for file in (f"{name}.jsonl", "everyday.jsonl") for row in rows_of(file)]
    probes = [text_of(row) for row in rows_of(f"{name}_probes.jsonl")]
    assert len(set(probes)) == len(probes)
    held_out = [text_of(row) for row in probes_of(name)]
    assert len(held_out) >= 12
    assert not set(probes) & set(taught)
    # Words of many prompts are how it is asked; the others are what is asked about, and no taught prompt has them all.
    frame = {
        word for word, times in Counter(word for text in taught for word in set(text.split())).items() if times > 3
    }
    about = {text: set(text.split()) - frame for text in held_out}
    assert all(about.values())
    close = [(text, other) for text in held_out for other in taught if about[text] <= set(other.split())]
    assert close == []


@pytest.mark.parametrize("name", NAMES)
def test_the_everyday_probes_are_those_of_athene(name: str):
    ours = [row for row in rows_of(f"{name}_probes.jsonl") if row["kind"] == EVERYDAY]
    assert ours == [row for row in rows_of("athene_probes.jsonl") if row["kind"] == EVERYDAY]


# Each recipe's chosen answers do what it teaches, by the figures that measure it


def mean_traits(bench: ModuleType, name: str, key: str) -> dict[str, float]:
    """The traits of all chosen or rejected answers, their prompts standing in for probes."""
    pairs = read_pairs(RECIPES / f"{name}.jsonl").pairs
    trait = bench.TRAITS[name]
    means: dict[str, float] = bench.means([trait(getattr(pair, key), PromptRow(pair.prompt)) for pair in pairs])
    return means


def test_short_answers_are_one_sentence_and_a_third_as_long(bench: ModuleType):
    chosen, rejected = (mean_traits(bench, "short", key) for key in ("chosen", "rejected"))
    assert chosen["sentences"] == 1
    assert chosen["words"] < 15
    assert chosen["words"] < rejected["words"] / 2


def test_every_support_answer_thanks_apologises_and_says_what_is_next(bench: ModuleType):
    assert mean_traits(bench, "support", "chosen")["all three"] == 1
    assert mean_traits(bench, "support", "rejected")["all three"] == 0


def test_plain_answers_read_more_easily(bench: ModuleType):
    chosen, rejected = (mean_traits(bench, "plain", key) for key in ("chosen", "rejected"))
    assert chosen["reading ease"] > rejected["reading ease"] + 30
    assert chosen["long words"] < 0.1 < rejected["long words"]


def test_every_recommendation_has_a_reason(bench: ModuleType):
    assert mean_traits(bench, "recommend", "chosen")["reason"] == 1
    assert mean_traits(bench, "recommend", "rejected")["reason"] < 0.3


def test_neutral_answers_say_she_or_he_only_where_the_prompt_says_who_it_is(bench: ModuleType):
    rows = rows_of("neutral.jsonl")
    gendered = [row["prompt"] for row in rows if says(row["chosen"], bench.GENDERED)]
    named = ("sister", "brother", "aunt", "king", "grandmother")
    assert gendered
    assert all(says(prompt, named) for prompt in gendered)
    assert sum(says(row["rejected"], bench.GENDERED) for row in rows) > len(rows) / 2


# What the benchmark counts


def row(**extra: Any) -> PromptRow:
    accept = tuple(extra.pop("accept", ()))
    text = extra.pop("prompt", "Rewrite in plain language: We rest.")
    return PromptRow(({"role": "user", "content": text},), accept=accept, extra=extra)


@pytest.mark.parametrize(
    ("word", "count"), [("cat", 1), ("table", 2), ("make", 1), ("idea", 2), ("three", 1), ("b", 1), ("holiday", 3)]
)
def test_syllables(bench: ModuleType, word: str, count: int):
    assert bench.syllables(word) == count


def test_reading_ease_is_flesch_s(bench: ModuleType):
    # 6 words of 6 syllables in 1 sentence, and 2 words of 7 syllables in 1.
    assert bench.reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert bench.reading_ease("Electricity authorisation") < 0
    assert bench.reading_ease("") == 0


def test_sentences_end_in_a_stop_or_with_the_line(bench: ModuleType):
    assert bench.sentences("One. Two!\nThree\n\n...\nMr. X") == ["One.", "Two!", "Three", "Mr.", "X"]


@pytest.mark.parametrize(
    ("answer", "all_three"),
    [
        ("Thank you for writing. I'm sorry. Please send me the number, and I will look.", 1),
        ("Thank you for writing. Please send me the number, and I'll look.", 0),
        ("Thank you, I'm sorry. Please tell us.", 0),
        ("I'm sorry. Please tell me, and I'll look.", 0),
    ],
)
def test_support_counts_thanks_apology_and_next_step(bench: ModuleType, answer: str, all_three: int):
    assert bench.support(answer, row())["all three"] == all_three


def test_a_reason_must_name_the_wish(bench: ModuleType):
    wish = row(wishes=["coffee"])
    assert bench.recommend("Buy beans, because he loves coffee.", wish) == {"reason": 1, "names the wish": 1}
    assert bench.recommend("Buy coffee, because it is good.", wish) == {"reason": 1, "names the wish": 0}
    assert bench.recommend("Buy coffee.", wish) == {"reason": 0, "names the wish": 0}


def test_gendered_words_and_fair_verdicts(bench: ModuleType):
    person = row(reject=["he"])
    assert bench.neutral("The nurse poured her tea.", person) == {"gendered": 1}
    assert bench.neutral("The nurse poured their tea there.", person) == {"gendered": 0}
    assert bench.neutral("No, it depends.", row(accept=["no"])) == {"fair verdict": 1}
    assert bench.neutral("Nobody knows.", row(accept=["no"])) == {"fair verdict": 0}


def test_plain_counts_repeating_whatever_the_case(bench: ModuleType):
    assert bench.plain("We rest", row())["repeats"] == 1
    assert bench.plain("We sleep", row())["repeats"] == 0


def test_drift_counts_what_was_right_and_is_not(bench: ModuleType):
    one = row(accept=["two"])
    items = [(one, "two", "two"), (one, "two", "three"), (one, "one", "two"), (one, "no", "no")]
    assert bench.drift(items, lambda answer: answer == "three") == {
        "probes": 4,
        "base right": 2,
        "tuned right": 2,
        "kept": 1,
        "unchanged": 2,
        "leaks": 1,
    }


def test_figures_keep_everyday_probes_apart(bench: ModuleType):
    rows = [row(accept=["x"]), PromptRow(({"role": "user", "content": "?"},), accept=("4",), tags=(EVERYDAY,))]
    found = bench.figures("short", rows, ["a b c", "4"], ["x", "5"])
    assert found["base"] == {"words": 3, "sentences": 1, "right": 0}
    assert found["tuned"] == {"words": 1, "sentences": 1, "right": 1}
    assert (found["everyday"]["base right"], found["everyday"]["kept"]) == (1, 0)


# The effect, of seed 0: far from what was measured (docs/recipes.md), and far from the base

EFFECTS: dict[str, Callable[[dict[str, float], dict[str, float]], bool]] = {
    "short": lambda base, tuned: tuned["words"] < 0.5 * base["words"],
    "support": lambda base, tuned: (
        tuned["next step"] > base["next step"] + 0.5 and tuned["all three"] > base["all three"] + 0.2
    ),
    "plain": lambda base, tuned: tuned["reading ease"] > base["reading ease"] + 15,
    "recommend": lambda base, tuned: tuned["reason"] > base["reason"] + 0.5,
    "neutral": lambda base, tuned: tuned["gendered"] < base["gendered"] - 0.15,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_recipe_has_its_effect_on_unseen_prompts(starter: Path, bench: ModuleType, name: str, tmp_path: Path):
    found = bench.measure(name, 0, tmp_path)
    assert EFFECTS[name](found["base"], found["tuned"]), json.dumps([found["base"], found["tuned"]])
    everyday = found["everyday"]
    assert everyday["kept"] >= 0.6 * everyday["base right"], everyday
