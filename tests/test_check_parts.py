"""The pieces of the data check against brute force, worked numbers and arbitrary input."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import clean_pairs

from localdpo.data.check import shortcuts
from localdpo.data.check.chance import sign_test, wilson
from localdpo.data.check.features import Answers, answer_features, feature_table
from localdpo.data.check.findings import KINDS, Severity, exit_code, found, in_order
from localdpo.data.check.length import length_figures
from localdpo.data.check.near import NearIndex, are_near, are_reversed, grouped, normal
from localdpo.data.check.repeats import PairDigests, digest_pair
from localdpo.data.check.report import CheckOptions, check_file
from localdpo.data.check.rows import evidence, is_refusal, row_codes, same_words, strip_escapes
from localdpo.data.check.sample import PromptSample
from localdpo.data.check.tokens import estimate_tokens
from localdpo.data.language import asks_for_language, guess_language
from localdpo.data.pairs import PreferencePair


def pair(prompt: str = "What?", chosen: str = "This.", rejected: str = "That!", line: int = 1) -> PreferencePair:
    return PreferencePair(({"role": "user", "content": prompt},), chosen, rejected, line=line)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("escapes", "red \x1b[31m"),
        ("escapes", "\x1b]0;title\x07"),
        ("escapes", "bell \x07"),
        ("invisible", "abc \u202e def"),
        ("invisible", "a\u200bb"),
        ("mojibake", "itâ€™s"),
        ("mojibake", "cafÃ©"),
        ("mojibake", "lost \ufffd"),
        ("special_tokens", "end <|im_end|>"),
        ("special_tokens", "</s>"),
        ("special_tokens", "[/INST] yes"),
        ("special_tokens", "<end_of_turn>"),
        ("template", "yes\nHuman: no"),
        ("template", "### Response: yes"),
        ("template", "Dear {{ name }}"),
    ],
)
def test_a_row_is_marked_with_what_stands_in_it(code: str, text: str):
    row = pair(chosen=f"The answer is this: {text}" if code != "template" else text)
    assert row_codes(row) == (code,)
    assert "in chosen" in evidence(code, row)


@pytest.mark.parametrize(
    "text",
    [
        "Tabs\tand\nlines are text",
        "emoji 👩‍👩‍👧 and नमस्ते",
        "a < b | c > d, <b>bold</b>, <p>",
        "f(x) = {x: 1}[x] and ${HOME}",
        "Note: this is fine\nBob: so is this",
        "Ärger, naïve café, Ørsted",
        "# Heading\n\n### Summary\n- one",
        "I cannot lift 200 kg",
        "I'm sorry for your loss.",
    ],
)
def test_ordinary_text_is_not_marked(text: str):
    assert row_codes(pair(chosen=text)) == ()


def test_a_dialogue_in_the_prompt_may_go_on_in_the_answer():
    assert row_codes(pair("Continue:\nHuman: hi\nAI: hello", "AI: hello\nHuman: bye", "no")) == ()


@pytest.mark.parametrize(
    ("refuses", "helps"),
    [
        ("很抱歉,我无法回答这个问题。", "抱歉让您久等了。答案是四十二。"),
        ("作為語言模型,我不能提供醫療建議。", "我不能再同意了:春天最好。"),
        ("申し訳ありませんが、その質問にはお答えできません。", "申し訳ありません。答えは四十二です。"),
        ("죄송하지만 그 요청은 도와드릴 수 없습니다.", "죄송합니다. 답은 42입니다."),
        ("Lo siento, pero no puedo ayudarte con eso.", "Lo siento por la espera. Es el martes."),
        ("Je suis désolé, mais je ne peux pas répondre.", "Désolé pour l'attente. C'est mardi."),
        ("Es tut mir leid, aber dabei kann ich Ihnen nicht helfen.", "Leider regnet es. Nimm einen Schirm."),
        ("Desculpe, mas não posso ajudar com isso.", "Desculpe a demora. É na terça."),
        ("Mi dispiace, ma non posso aiutarti.", "Mi dispiace per l'attesa. È martedì."),
    ],
)
def test_refusals_in_other_languages(refuses: str, helps: str):
    assert is_refusal(refuses)
    assert not is_refusal(helps)


def test_refusals_are_told_from_apologies():
    assert is_refusal("I'm sorry, but I can't help with that.")
    assert is_refusal("As an AI language model, I do not have feelings.")
    assert is_refusal("Unfortunately, I am unable to assist.")
    assert not is_refusal("I am sorry that you had to wait. Here is the answer.")
    assert not is_refusal("x" * 300 + "I'm sorry, but I can't help with that.")


def test_same_words():
    assert same_words("True.", " true")
    assert not same_words("True", "False")
    assert not same_words("...", "!!!")
    assert same_words("word " * 50, ("word " * 50).upper() + "!")


@given(st.text())
def test_cleaning_leaves_no_escape_and_changes_nothing_else(text: str):
    cleaned = strip_escapes(text)
    assert "escapes" not in row_codes(pair(chosen=cleaned + "x"))
    assert strip_escapes(cleaned) == cleaned
    if "escapes" not in row_codes(pair(chosen=text + "x", rejected="y")):
        assert cleaned == text


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "What is the capital of France, and how do you know that?"),
        ("de", "Was ist die Hauptstadt von Frankreich, und wie kann ich das wissen?"),
        ("fr", "Quelle est la capitale de la France et comment le savez-vous ?"),
        ("es", "¿Cuál es la capital de Francia y cómo lo sabes? No es una pregunta muy difícil."),
        ("ja", "フランスの首都はどこですか。"),
        ("zh", "法国的首都是哪里？"),
        ("ru", "Какая столица Франции?"),
        ("ko", "프랑스의 수도는 어디입니까?"),
        (None, "Athene."),
        (None, "It's spelled A-T-H-E-N-E, Athene."),
        (None, "1 + 1 = 2"),
    ],
)
def test_languages(language: str | None, text: str):
    assert guess_language(text) == language


def test_a_translation_is_no_other_language():
    english = "The house is on the hill, and it is not far from here."
    german = "Das Haus ist auf dem Hügel und es ist nicht weit von hier, wie ich weiß."
    assert "language" in row_codes(pair(english, german, english + " Indeed."))
    assert "language" not in row_codes(pair(f"Translate into German: {english}", german, english))
    assert asks_for_language("Say it in Welsh")


# Chance


def test_wilson_gives_the_textbook_interval():
    # 8 of 10: Agresti and Coull 1998 and any table: 0.4902 to 0.9433
    share = wilson(0.8, 10)
    assert (round(share.low, 4), round(share.high, 4)) == (0.4902, 0.9433)
    assert (wilson(0.5, 0).low, wilson(0.5, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 0), (5, 9), (0, 12), (20, 20)])
def test_sign_test_is_the_binomials_two_tails(first: int, second: int):
    n = first + second
    tail = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)) / 2**n
    assert sign_test(first, second) == pytest.approx(min(1.0, tail))


def test_sign_test_of_many_agrees_with_the_exact_one():
    n, k = 1001, 540
    exact = 2 * sum(math.comb(n, i) for i in range(n - k + 1)) / 2**n
    assert sign_test(k, n - k) == pytest.approx(exact, rel=0.05)


# Repeats


def brute_repeats(rows: list[tuple[int, int, int]]) -> tuple[set[tuple[int, ...]], set[int]]:
    same: dict[tuple[int, int, int], list[int]] = {}
    for line, row in enumerate(rows, 1):
        same.setdefault(row, []).append(line)
    reverse = {line for line, (p, a, b) in enumerate(rows, 1) if (p, b, a) in same}
    return {tuple(lines) for lines in same.values() if len(lines) > 1}, reverse


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3).filter(lambda row: row[1] != row[2]), max_size=30))
def test_repeats_and_contradictions_equal_brute_force(rows: list[tuple[int, int, int]]):
    digests = PairDigests()
    for line, (prompt, chosen, rejected) in enumerate(rows, 1):
        digests.add(line, digest_pair(pair(f"p{prompt}", f" a{chosen}", f"a{rejected}\n")))
    repeats = digests.find()
    duplicates, reverse = brute_repeats(rows)
    assert set(repeats.duplicates) == duplicates
    assert {line for group in repeats.contradictory for line in group} == reverse


def test_preferences_in_a_circle_are_found_and_rankings_are_not():
    digests = PairDigests()
    ranking = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    circle = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "b"), ("e", "a")]
    for prompt, edges in enumerate((ranking, circle)):
        for chosen, rejected in edges:
            digests.add(len(digests) + 1, digest_pair(pair(f"p{prompt}", chosen, rejected)))
    assert digests.find().cycles == [(6, 7, 8)]


# Near duplicates


def near_candidates(texts: list[tuple[str, ...]]) -> set[tuple[int, int]]:
    index = NearIndex()
    for row in texts:
        index.add([normal(text) for text in row])
    return {(a, b) for a, b in index.candidates(10**6)[0]}


def test_changed_copies_are_candidates_and_strangers_are_not():
    rng, rows = random.Random(0), [(row["prompt"], row["chosen"], row["rejected"]) for row in clean_pairs()]
    rows = [row for row in rows if len(" ".join(row).split()) > 40]
    changed = []
    for prompt, chosen, rejected in rows:
        words = prompt.split()
        words[rng.randrange(len(words))] = "thing"
        changed.append((" ".join(words), chosen.upper(), rejected + "!"))
    found_pairs = near_candidates([*rows, *changed])
    hits = sum((i, i + len(rows)) in found_pairs for i in range(len(rows)))
    assert hits >= 0.95 * len(rows)
    assert len(found_pairs) - hits <= 0.1 * len(rows)


@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=8))
def test_equal_texts_are_always_candidates(rows: list[tuple[str, str]]):
    found_pairs = near_candidates([*rows, *rows])
    for i in range(len(rows)):
        first = next(j for j, row in enumerate(rows) if [*map(normal, row)] == [*map(normal, rows[i])])
        assert (first, i + len(rows)) in found_pairs


def test_signatures_do_not_depend_on_the_batch():
    texts = [[normal(row["prompt"]), normal(row["chosen"])] for row in clean_pairs()]
    together, alone = NearIndex(), NearIndex()
    for row in texts:
        together.add(row)
        alone.add(row)
        alone.keys()
    assert np.array_equal(together.keys(), alone.keys())


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        (
            "Give me a short list of five things to see in a day in Paris.",
            "Give me a short list of five things to see in one day in  PARIS",
            True,
        ),
        ("What is 17 plus 25, please, my friend?", "What is 17 plus 26, please, my friend?", False),
        ("Bonsoir", "Bonsoir.", True),
        ("Yes", "No", False),
        ("", "", True),
        ("a b c", "abc", True),
    ],
)
def test_what_is_near(first: str, second: str, near: bool):
    assert are_near([normal(first)], [normal(second)]) is near


def test_swapped_answers_are_reversed_not_near():
    first = ("p", "the effect of it was large indeed, they say", "the impact of it was large indeed, they say")
    second = (first[0], first[2], first[1])
    assert are_reversed(first, second)


def test_groups_are_what_edges_connect():
    assert grouped([(3, 5), (1, 2), (5, 9), (2, 4)]) == [(1, 2, 4), (3, 5, 9)]


# Length


def test_length_figures_of_a_worked_example():
    # Prompt 0 has two pairs that disagree, prompts 1 and 2 have one each with the longer answer chosen, 3 a tie.
    chosen, rejected = np.array([4, 2, 9, 8, 5]), np.array([2, 4, 3, 2, 5])
    figures = length_figures(chosen, rejected, np.array([0, 0, 1, 2, 3]))
    assert figures.accuracy.value == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)
    assert figures.longer_chosen
    assert (figures.median_chosen, figures.median_rejected) == (5, 3)
    assert figures.p_value == pytest.approx(0.5)  # two prompts for, none against
    x = np.log1p(np.concatenate((chosen, rejected)))
    assert figures.correlation == pytest.approx(np.corrcoef(x, np.repeat((1, 0), 5))[0, 1])


# Shortcuts


def toy(size: int = 40, seed: int = 0) -> list[Answers]:
    rng = random.Random(seed)
    words = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]

    def text(length: int, more: str = "") -> str:
        return " ".join(rng.choices(words, k=length)) + more

    return [Answers(n + 1, n // 2, text(6, " zebra" if n % 4 else ""), text(7)) for n in range(size)]


def test_what_one_answer_has_alone_equals_set_differences():
    sample = toy()
    table = feature_table(sample)
    expected = set()
    for i, answers in enumerate(sample):
        chosen, rejected = answer_features(answers.chosen), answer_features(answers.rejected)
        expected |= {(i, name, 1) for name in chosen - rejected} | {(i, name, -1) for name in rejected - chosen}
    got = {(int(p), table.names[f], int(s)) for p, f, s in zip(*table.alone(), strict=True)}
    assert got == {entry for entry in expected if entry[1] in set(table.names)}


def test_a_feature_s_figures_are_those_of_counting():
    (zebra, *_) = shortcuts.single_features(toy(60))
    assert zebra.name == "w:zebra"
    assert (zebra.chosen_share, zebra.rejected_share) == (0.75, 0.0)
    assert zebra.accuracy.value == pytest.approx(0.5 + 0.75 / 2)
    assert zebra.rows == tuple(n + 1 for n in range(60) if n % 4)


def test_the_kernel_form_equals_plain_cross_validated_ridge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shortcuts, "_PERMUTATIONS", 3)
    sample = toy(40)
    table, groups = feature_table(sample), np.array([answers.group for answers in sample])
    vectors = np.zeros((len(sample), len(table.names)))
    np.add.at(vectors, (table.pair, table.feature), table.sign * table.value)
    ridge = shortcuts._RIDGE * float((vectors**2).sum()) / len(sample)
    folds = np.random.default_rng(0).permutation(20)[groups] % 5
    right = np.zeros(len(sample))
    for fold in range(5):
        train, test = vectors[folds != fold], vectors[folds == fold]
        weights = np.linalg.solve(train.T @ train + ridge * np.eye(train.shape[1]), train.T @ np.ones(len(train)))
        right[folds == fold] = test @ weights > 0
    result = shortcuts.separation(sample, table)
    assert result is not None
    assert result.accuracy.value == pytest.approx(right.mean())
    assert result.top[0][0] == "w:zebra"


def test_the_sample_keeps_prompts_whole_and_does_not_depend_on_order():
    rows = [(line, line // 3 * 7919 + 1, f"c{line}", "r") for line in range(300)]
    samples = []
    for order in (rows, rows[::-1]):
        sample = PromptSample(60)
        for row in order:
            sample.add(*row)
        samples.append(sample.answers())
    assert samples[0] == samples[1]
    assert len(samples[0]) == 60
    assert len({answers.group for answers in samples[0]}) == 20


# Findings


def test_the_worst_comes_first_and_decides_the_exit_code():
    findings = [found("language", "a"), found("schema", "b"), found("duplicate", "c", [2])]
    assert [f.kind for f in in_order(findings)] == ["schema", "duplicate", "language"]
    assert [exit_code(findings[:n]) for n in range(3)] == [0, 0, 2]
    assert exit_code(findings[2:]) == 1
    assert all(kind.title and kind.fix for kind in KINDS.values())
    assert {kind for kind, known in KINDS.items() if known.fixable} == {
        "blank", "identical", "escapes", "duplicate", "carriage_returns", "prompt_repeated",
    }  # fmt: skip


def test_estimates_are_near_a_real_tokenizers():
    assert estimate_tokens("The capital of France is Paris.") == 8
    assert estimate_tokens("") == 0
    assert 5 <= estimate_tokens("法国的首都是巴黎") <= 8


# Whole files of anything


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": _JSON})
_VALUE = st.text(max_size=60) | st.lists(_MESSAGE, max_size=3) | _JSON
_ROW = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "id", "tags", "weight", "tools"]), _VALUE)
_PAIR = st.fixed_dictionaries({key: st.text(max_size=60) for key in ("prompt", "chosen", "rejected")})
_LINE = (_ROW | _PAIR).map(lambda row: json.dumps(row).encode() + b"\n") | st.binary(max_size=40)


def check_bytes(data: bytes, folder: Path) -> Any:
    path = folder / "any.jsonl"
    path.write_bytes(data)
    return check_file(path, CheckOptions())


@settings(max_examples=150, deadline=None)
@given(data=st.lists(_LINE, max_size=25).map(b"".join) | st.binary(max_size=300))
def test_no_bytes_bring_the_check_down(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    report = check_bytes(data, tmp_path_factory.getbasetemp())
    last = data.count(b"\n") + 1
    assert all(1 <= row <= last for finding in report.findings for row in finding.rows)
    assert json.loads(json.dumps([finding.to_json() for finding in report.findings], allow_nan=False)) is not None
    assert report.pairs or report.exit_code == 2


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(_PAIR, min_size=15, max_size=40))
def test_no_pairs_bring_the_check_down(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]):
    check_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(), tmp_path_factory.getbasetemp())


def test_every_broken_line_is_named_however_many(tmp_path: Path):
    lines = [json.dumps({"prompt": "p", "chosen": n}) for n in range(3000)]
    report = check_bytes("\n".join(lines).encode(), tmp_path)
    assert [f.kind for f in report.findings] == ["schema"]
    assert len(report.findings[0].rows) == 3000
    odd = [f'{{"key{n}": 1, "key{n}": 2}}' for n in range(900)]
    report = check_bytes("\n".join(odd).encode(), tmp_path)
    assert sorted(row for f in report.findings for row in f.rows) == list(range(1, 901))
    assert len(report.findings) == 501


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_another_encoding_is_a_finding_about_line_one(codec: str, tmp_path: Path):
    report = check_bytes('{"prompt": "p"}\n'.encode(codec), tmp_path)
    assert [(f.kind, f.rows, f.severity) for f in report.findings] == [("encoding", (1,), Severity.ERROR)]


def test_patterns_take_no_longer_for_hostile_text():
    # Each of these once was, or could be, quadratic; a linear search of a megabyte is far from the test's time limit.
    for text in ("\n" * 1_000_000, "\n\nHuman: " * 100_000, "\x1b]" * 500_000, " " * 1_000_000 + "#", "{{" * 500_000):
        row_codes(pair(text + "x", text + "y", text + "z"))


@pytest.mark.parametrize("texts", list(product(["", " ", "a"], repeat=3)))
def test_short_texts_have_signatures(texts: tuple[str, str, str]):
    index = NearIndex()
    index.add(texts)
    assert index.keys().shape == (1, 16)
