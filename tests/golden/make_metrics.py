"""Golden figures of text metrics from sacrebleu, rouge-score, NLTK and scikit-learn.

Run it in an environment of its own; it rewrites ``metrics.json`` beside it:

    python -m venv metrics
    metrics/bin/pip install sacrebleu==2.6.0 rouge-score==0.1.2 nltk==3.10.4 scikit-learn==1.9.1
    metrics/bin/python tests/golden/make_metrics.py

It knows nothing about localdpo. Texts are drawn from a few words with a fixed seed, so that n-grams, stems and repeats
meet often. METEOR gets words in lower case and an empty WordNet: its data would be a download.
"""

from __future__ import annotations

import json
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, f1_score

HERE = Path(__file__).resolve().parent
SENTENCE = (
    "the a cat cats sat sitting sits mat mats run running runs runner national nation quick, don't 42 3.5 snake_case "
    "The relational relate happy happily was on under in again! house houses housing (red) well-known"
)
WORDS = SENTENCE.split()
ENGLISH = [
    ("The cat sat on the mat.", ["The cat sat on the mat."]),
    ("The cat sat on the mat.", ["A cat was sitting on a mat.", "On the mat sat the cat."]),
    ("", ["Something was expected."]),
    ("...", ["Something was expected."]),
    ("It is 3.5 degrees, isn't it?", ["It's 3.5 degrees!"]),
]
CHINESE = [
    ("图书馆从下个月起开到八点。", ["从下个月开始，图书馆开到八点。"]),
    ("桥关了。", ["因为下了三天雨，旧桥关闭了。", "雨下了三天，桥关了。"]),
    ("我不知道。", ["男孩把钥匙送回来了。"]),
    ("每个学生种一棵 apple 树", ["每个学生种一棵苹果树。"]),
]
STEMS = "ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti "
STEMS += (
    "iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent "
)
STEMS += "ion sion tion ou ism ate iti ous ive ize e ll s es ies ied ed eed ing y ly"


class NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word: str) -> list[Any]:
        return []


def drawn(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def texts(rng: random.Random) -> list[dict[str, Any]]:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    cases = ENGLISH + [(drawn(rng, 14), [drawn(rng, 14) for _ in range(rng.randint(1, 3))]) for _ in range(60)]
    rows = []
    for answer, references in cases:
        found = {name: score.fmeasure for name, score in scorer.score_multi(references, answer).items()}
        found["meteor"] = meteor_score([words(text) for text in references], words(answer), wordnet=NoSynonyms())
        rows.append({"answer": answer, "references": references, **found})
    return rows


def corpora(rng: random.Random) -> list[dict[str, Any]]:
    cases = [("en", "13a", ENGLISH), ("zh", "zh", CHINESE), ("ja", "char", CHINESE)]
    cases += [("en", "13a", [(drawn(rng, 20), [drawn(rng, 20) for _ in range(n)]) for _ in range(12)]) for n in (1, 2)]
    rows = []
    for language, tokenize, pairs in cases:
        answers, references = [list(part) for part in zip(*pairs, strict=True)]
        most = max(map(len, references))
        streams = [[r[n] if n < len(r) else None for r in references] for n in range(most)]
        row: dict[str, Any] = {"language": language, "answers": answers, "references": references}
        for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
            row[name] = metric.corpus_score(answers, streams).score
        rows.append(row)
    return rows


def labels(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for names, said in (("ab", "ab"), ("abc", "abc"), ("abcd", "abc"), ("abc", "abcx"), ("ab", "x")):
        expected = [rng.choice(names) for _ in range(40)]
        answered = [rng.choice(said) for _ in range(40)]
        own = list(names)
        f1 = {kind: f1_score(expected, answered, labels=own, average=kind, zero_division=0)
              for kind in ("macro", "micro")}  # fmt: skip
        each = f1_score(expected, answered, labels=own, average=None, zero_division=0)
        rows.append(
            {"expected": expected, "answered": answered, "labels": own, **f1,
             "accuracy": accuracy_score(expected, answered), "per_class": dict(zip(own, map(float, each), strict=True))}
        )  # fmt: skip
    return rows


def stems(rng: random.Random) -> dict[str, str]:
    suffixes = STEMS.split()
    made = {"".join(rng.choice("abcdeilmnorstuyz") for _ in range(rng.randint(0, 6))) + rng.choice(suffixes)
            for _ in range(1500)}  # fmt: skip
    whole = (
        "skies sky dying news proceed innings happily enjoyment spies flies hopping falling fizzed agreed feed sized"
    )
    stemmer = PorterStemmer()
    return {word: stemmer.stem(word) for word in sorted(made | set(whole.split()))}


def main() -> None:
    rng = random.Random(11)
    packages = ("sacrebleu", "rouge-score", "nltk", "scikit-learn")
    golden = {
        "versions": {name: version(name) for name in packages},
        "texts": texts(rng),
        "corpora": corpora(rng),
        "labels": labels(rng),
        "stems": stems(rng),
    }
    (HERE / "metrics.json").write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
