"""Metrics of texts, against worked cases, figures of the field's libraries, and those libraries themselves."""

from __future__ import annotations

import json
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.errors import EnvironmentFault
from localdpo.evaluate import text_metrics
from localdpo.evaluate.stemming import stem
from localdpo.evaluate.text_metrics import (
    accuracy,
    bleu,
    chrf,
    classification_scores,
    exact_match,
    has_sacrebleu,
    meteor,
    normalise_answer,
    rouge,
    token_f1,
    words,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text("utf-8"))
ASCII = st.text(st.sampled_from(string.ascii_letters + string.digits + string.punctuation + "    "), max_size=60)
TEXT = st.lists(st.sampled_from(["the", "cat", "cats", "sat", "猫", "mat", "A", "-"]), max_size=8).map(" ".join)
needs_sacrebleu = pytest.mark.skipif(not has_sacrebleu(), reason="needs sacrebleu, of the extra eval")


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: case["answer"][:20])
def test_rouge_and_meteor_are_those_of_rouge_score_and_nltk(case):
    found = rouge(case["answer"], case["references"]) | {"meteor": meteor(case["answer"], case["references"])}
    assert found == pytest.approx({name: case[name] for name in found}, abs=1e-12)


def test_stems_are_those_of_nltk():
    wrong = {word: (stem(word), wanted) for word, wanted in GOLDEN["stems"].items() if stem(word) != wanted}
    assert len(GOLDEN["stems"]) > 1000
    assert not wrong


@pytest.mark.parametrize("case", GOLDEN["labels"], ids=lambda case: "".join(case["labels"]))
def test_classification_scores_are_those_of_scikit_learn(case):
    scores = classification_scores(case["expected"], case["answered"], case["labels"])
    assert scores.per_class == pytest.approx(case["per_class"])
    assert (scores.macro_f1, scores.micro_f1) == pytest.approx((case["macro"], case["micro"]))
    assert accuracy(case["expected"], case["answered"]) == pytest.approx(case["accuracy"])


@needs_sacrebleu
@pytest.mark.parametrize("case", GOLDEN["corpora"], ids=lambda case: f"{case['language']}-{len(case['answers'])}")
def test_bleu_and_chrf_are_those_of_sacrebleu(case):
    scores = {
        "bleu": bleu(case["answers"], case["references"], case["language"]),
        "chrf": chrf(case["answers"], case["references"]),
    }
    for name, score in scores.items():
        assert score.value == pytest.approx(case[name], abs=1e-9)
        assert score.low is None or 0 <= score.low <= score.high <= 100
        assert "version:" in score.signature


@settings(max_examples=60, deadline=None)
@given(ASCII, st.lists(ASCII, min_size=1, max_size=3))
def test_rouge_agrees_with_rouge_score_live(answer, references):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    wanted = {name: score.fmeasure for name, score in scorer.score_multi(references, answer).items()}
    assert rouge(answer, references) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(ASCII, ASCII)
def test_meteor_agrees_with_nltk_live(answer, reference):
    from nltk.translate.meteor_score import meteor_score

    class NoSynonyms:
        def synsets(self, word):
            return []

    wanted = meteor_score([words(reference)], words(answer), wordnet=NoSynonyms())
    assert meteor(answer, [reference]) == pytest.approx(wanted, abs=1e-12)


def test_rouge_worked_by_hand():
    # 5 words each, 4 in common; pairs: "the cat" and "the mat" of 4 each; in order: the cat … the mat, 4 words.
    found = rouge("the cat saw the mat", ["the cat hid the mat"])
    assert found == pytest.approx({"rouge1": 4 / 5, "rouge2": 2 / 4, "rougeL": 4 / 5})
    assert rouge("mat the hid cat the", ["the cat hid the mat"])["rouge1"] == 1
    assert rouge("x", ["y", "x"])["rouge1"] == 1  # the better of two references


def test_meteor_worked_by_hand():
    # 4 matches of 4 and 5 words in 2 chunks: P 1, R 0.8, F = 0.8 / (0.9 + 0.08), penalty 0.5 (2/4)^3.
    assert meteor("the cat mat now", ["the cat on mat now"]) == pytest.approx(0.8 / 0.98 * (1 - 0.0625))
    assert meteor("cats", ["cat"]) == pytest.approx(0.5)  # one chunk of one match
    assert meteor("dog", ["cat"]) == meteor("", ["cat"]) == meteor("cat", []) == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a   CAT, an owl & the end.", "cat owl end"),
        ("theatre", "theatre"),
        ("it's", "its"),
        ("“Paris”…", "paris"),
        ("１００", "100"),
        ("北京。", "北京"),
    ],
)
def test_answers_are_normalised_as_by_squad(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "accepted", "match", "f1"),
    [
        ("Paris.", ["paris"], 1, 1),
        ("The capital is Paris", ["Paris"], 0, 2 / 4),  # capital, is, paris: 1 common of 3 and 1
        ("to be or not to be", ["to be"], 0, 2 * 2 / 8),  # as bags: two of six and two
        ("London", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
        ("北京市", ["北京"], 0, 2 * 2 / 5),
        ("eight", ["8", "eight"], 1, 1),
    ],
)
def test_exact_match_and_f1_worked_by_hand(answer, accepted, match, f1):
    assert exact_match(answer, accepted) == match
    assert token_f1(answer, accepted) == pytest.approx(f1)


def _squad_f1(answer: str, accepted: str) -> float:
    """The SQuAD measure, written another way: counts of tokens that spaces divide."""
    one, other = (Counter(normalise_answer(text).split()) for text in (answer, accepted))
    common = sum(min(count, other[token]) for token, count in one.items())
    if not one or not other:
        return float(one == other)
    precision, recall = common / one.total(), common / other.total()
    return 2 * precision * recall / (precision + recall) if common else 0.0


@settings(max_examples=100, deadline=None)
@given(ASCII, ASCII)
def test_f1_of_ascii_is_squad_s(answer, accepted):
    assert token_f1(answer, [accepted]) == pytest.approx(_squad_f1(answer, accepted))


def test_f1_of_classes_worked_by_hand():
    scores = classification_scores(["a", "a", "b", "c"], ["a", "b", "b", None])
    # a: 1 hit, 2 wanted, 1 given; b: 1 hit, 1 wanted, 2 given; c: never said.
    assert scores.per_class == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 0})
    assert scores.macro_f1 == pytest.approx(4 / 9)
    assert scores.micro_f1 == pytest.approx(4 / 7)
    assert classification_scores([], []).macro_f1 == accuracy([], []) == 0
    with pytest.raises(ValueError, match="longer"):
        accuracy(["a"], ["a", "b"])


@settings(deadline=None)
@given(TEXT)
def test_a_text_is_like_itself(text):
    if not words(text):
        return
    assert set(rouge(text, [text]).values()) <= {0.0, 1.0}
    assert rouge(text, [text])["rouge1"] == rouge(text, [text])["rougeL"] == 1
    assert token_f1(text, [text]) == exact_match(text, [text]) == 1
    assert meteor(text, [text]) >= 0.5


@settings(deadline=None)
@given(TEXT, TEXT)
def test_scores_are_shares_and_more_references_never_lower_them(answer, reference):
    for score in (token_f1, meteor, lambda a, r: rouge(a, r)["rougeL"], lambda a, r: rouge(a, r)["rouge2"]):
        one = score(answer, [reference])
        assert 0 <= one <= 1
        assert score(answer, [reference, "cat sat"]) >= one
    assert rouge(answer, [reference]) == pytest.approx(rouge(reference, [answer]))


def test_chinese_and_accents_count():
    assert words("北京 Café_x 12") == ["北", "京", "café", "x", "12"]
    assert rouge("我在北京", ["他在北京"])["rouge1"] == pytest.approx(3 / 4)


@needs_sacrebleu
def test_an_interval_holds_its_value_and_no_answers_are_no_error():
    score = chrf(["the cat sat on the mat", "a dog ran"], [["the cat sat on a mat"], ["the dog ran far"]])
    assert score.low is not None
    assert score.low < score.value < score.high
    assert bleu([], []).value == 0
    with pytest.raises(ValueError, match="references"):
        bleu(["a"], [[]])


def test_without_sacrebleu_the_command_is_named_and_the_rest_works(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert not has_sacrebleu()
    with pytest.raises(EnvironmentFault, match=r"pip install 'localdpo\[eval\]'"):
        bleu(["a"], [["a"]])
    assert text_metrics.rouge("a", ["a"])["rouge1"] == 1
