"""Tasks: what the base and the tuned model get right, or near, on files of prompts with what is expected.

``classification`` chooses the answer with the highest log-prob (``by: logprob``, exact: every choice is scored whole,
its end of turn included) or the choice that a greedy answer names first (``by: answer``). ``qa`` and ``generation``
read greedy answers. Shares have Wilson's interval, means and F1 a bootstrap over the examples, BLEU and chrF
sacrebleu's own. A figure of a few dozen examples tells a broken model from a whole one, not a good one from a better.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localdpo.data.chat import ChatFormat
from localdpo.dpo.scorer import make_scorer
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.evaluate import text_metrics
from localdpo.evaluate.beside import (
    Question,
    Scored,
    both_answers,
    both_logps,
    encode_question,
    longest_of,
    one_by_one,
)
from localdpo.evaluate.figures import says
from localdpo.evaluate.intervals import Figure, bootstrap, mean, share
from localdpo.evaluate.suitefile import sample_rows
from localdpo.evaluate.taskfile import Example, Task, read_task, shipped_tasks
from localdpo.model.load import LoadedModel
from localdpo.train.events import ProgressEvent

__all__ = ["Measured", "TaskResult", "run_tasks", "shipped_tasks", "spoken_choice"]

MAX_TOKENS = 64
MOST_LABELS = 20
"""Labels that have an F1 of their own in the result."""
STAGE = "tasks"

_Floats = npt.NDArray[np.float64]
_Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of the base and of the tuned model; ``change`` is tuned less base, over the same examples."""

    base: Figure
    tuned: Figure
    change: Figure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {"base": self.base.to_json(), "tuned": self.tuned.to_json()}
        return found | ({"change": self.change.to_json()} if self.change is not None else {})


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What came of a task: metrics by name, both models' answers, and what to know about them.

    ``skipped`` examples could not be asked. All metrics are 0 to 1, but BLEU and chrF, which are 0 to 100.
    """

    name: str
    kind: str
    examples: int
    skipped: int
    metrics: dict[str, Measured]
    answers: list[dict[str, Any]]
    by: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in eval.json."""
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "examples": self.examples,
            "skipped": self.skipped,
            "metrics": {name: measured.to_json() for name, measured in self.metrics.items()},
            "answers": self.answers,
            "notes": self.notes,
        }
        return found | ({"by": self.by} if self.by else {})


def run_tasks(
    loaded: LoadedModel,
    names_or_files: Sequence[str | Path],
    *,
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Generator[ProgressEvent, None, list[TaskResult]]:
    """Ask the model as it stands, and its base, every task; all files are read before the first is asked.

    ``limit`` draws so many examples of each, by ``seed``; ``max_tokens`` holds where a task sets none. Raises
    InputError for a file that is not as it must be, with file, line and key, or that the model can answer nothing of.
    """
    tasks = [read_task(name) for name in names_or_files]
    sample_rows(0, limit, seed)

    def ask(task: Task) -> Generator[ProgressEvent, None, TaskResult]:
        chosen = [task.examples[i] for i in sample_rows(len(task.examples), limit, seed)]
        return _Run(loaded, task, chosen, max_tokens, seed).result()

    return (yield from one_by_one(STAGE, tasks, ask))


@dataclass(slots=True)
class _Run:
    """One task being asked."""

    loaded: LoadedModel
    task: Task
    examples: list[Example]
    max_tokens: int
    seed: int
    skipped: int = 0

    def result(self) -> Generator[ProgressEvent, None, TaskResult]:
        scored = self.task.kind == "classification" and self.task.by == "logprob"
        questions = self._questions(scored)
        if scored:
            return (yield from self._chosen(questions))
        max_tokens = self.task.max_tokens or self.max_tokens
        prompts = [question.prompt_ids for question in questions]
        base, tuned = yield from both_answers(self.loaded, prompts, max_tokens, STAGE, self.task.name)
        if self.task.kind == "classification":
            said = [
                [spoken_choice(answer, example.choices) for answer, example in zip(texts, self.examples, strict=True)]
                for texts in (base, tuned)
            ]
            return self._made(self._classified(*said), base, tuned, by="answer", judged=said)
        if self.task.kind == "qa":
            return self._made(self._answered(base, tuned), base, tuned)
        metrics, notes = self._generated(base, tuned)
        return self._made(metrics, base, tuned, notes=notes)

    def _questions(self, scored: bool) -> list[Question]:
        """The examples that can be asked, encoded; the others are counted. Raises InputError when none is left."""
        chat, longest = ChatFormat(self.loaded.tokenizer), longest_of(self.loaded)
        kept, questions, reason = [], [], Problem(self.task.source, "has no example")
        for example in self.examples:
            found = encode_question(chat, example.prompt, example.choices if scored else (), longest)
            if isinstance(found, str):
                reason = Problem(f"{self.task.source}:{example.line}", found)
                continue
            kept.append(example)
            questions.append(found)
        if not questions:
            raise InputError(Problem(self.task.source, "this model can be asked none of its examples"), reason)
        self.skipped = len(self.examples) - len(kept)
        self.examples = kept
        return questions

    def _chosen(self, questions: Sequence[Question]) -> Generator[ProgressEvent, None, TaskResult]:
        scorer = make_scorer(self.loaded.model)
        base, tuned = yield from both_logps(self.loaded, scorer, questions, STAGE, self.task.name)
        picked = [[self._pick(one, example) for one, example in zip(scores, self.examples, strict=True)]
                  for scores in (base, tuned)]  # fmt: skip
        said = [[label for label, _ in side] for side in picked]
        result = self._made(self._classified(*said), *said, by=f"logprob ({self.task.score})", judged=said)
        for row, (_, base_share), (_, tuned_share) in zip(result.answers, *picked, strict=True):
            row |= {"base_probability": base_share, "tuned_probability": tuned_share}
        return result

    def _pick(self, scored: Scored, example: Example) -> tuple[str, float]:
        """The likeliest choice, the first of equal ones, and its probability among the choices."""
        logps = scored.logps if self.task.score == "sum" else scored.per_token
        shares = np.exp(logps - logps.max())
        best = int(np.argmax(logps))
        return example.choices[best], round(float(shares[best] / shares.sum()), 4)

    def _classified(self, base: Sequence[str | None], tuned: Sequence[str | None]) -> dict[str, Measured]:
        expected = [example.expected[0] for example in self.examples]
        right = [_column(label == answer for label, answer in zip(expected, side, strict=True))
                 for side in (base, tuned)]  # fmt: skip
        metrics = {"accuracy": self._shares(right)}
        labels = self.task.labels
        if not labels:  # each example has its own choices: there are no classes
            return metrics
        counts = [_counts(expected, side, labels) for side in (base, tuned)]
        metrics["macro_f1"] = self._statistic(counts, _macro_f1)
        metrics["micro_f1"] = self._statistic(counts, _micro_f1)
        if len(labels) <= MOST_LABELS:
            for number, label in enumerate(labels):
                own = [side[:, 3 * number : 3 * number + 3] for side in counts]
                metrics[f"f1/{label}"] = self._statistic(own, _macro_f1)
        return metrics

    def _answered(self, *sides: Sequence[str]) -> dict[str, Measured]:
        return {
            "exact_match": self._shares(self._each(text_metrics.exact_match, sides)),
            "f1": self._means(self._each(text_metrics.token_f1, sides)),
            "contains": self._shares(self._each(_contains, sides)),
        }

    def _generated(self, *sides: Sequence[str]) -> tuple[dict[str, Measured], list[str]]:
        references = [example.expected for example in self.examples]
        notes, metrics = [], {}
        try:
            for name, score in (("bleu", self._bleu), ("chrf", text_metrics.chrf)):
                base, tuned = (score(list(side), references) for side in sides)
                metrics[name] = Measured(_corpus_figure(base), _corpus_figure(tuned))
                notes.append(f"{name}: sacrebleu {tuned.signature}")
        except EnvironmentFault as fault:
            notes.append(str(fault))
        for name, metric in _OF_TEXTS.items():
            metrics[name] = self._means(self._each(metric, sides))
        return metrics, notes

    def _bleu(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> text_metrics.CorpusScore:
        return text_metrics.bleu(answers, references, self.task.language)

    def _each(self, metric: _Metric, sides: Sequence[Sequence[str]]) -> list[_Floats]:
        return [
            _column(metric(answer, row.expected) for answer, row in zip(side, self.examples, strict=True))
            for side in sides
        ]

    def _shares(self, sides: Sequence[_Floats]) -> Measured:
        base, tuned = (_told(share(float(side.sum()), len(side))) for side in sides)
        return Measured(base, tuned, _told(mean(sides[1] - sides[0], seed=self.seed)))

    def _means(self, sides: Sequence[_Floats]) -> Measured:
        base, tuned = (_told(mean(side, seed=self.seed)) for side in sides)
        return Measured(base, tuned, _told(mean(sides[1] - sides[0], seed=self.seed)))

    def _statistic(self, sides: Sequence[_Floats], of: Callable[[_Floats], _Floats]) -> Measured:
        """A statistic of column sums, [examples, k] a side."""
        width = sides[0].shape[1]
        base, tuned = (_told(bootstrap(side, of, seed=self.seed)) for side in sides)
        change = bootstrap(np.hstack(sides), lambda sums: of(sums[:, width:]) - of(sums[:, :width]), seed=self.seed)
        return Measured(base, tuned, _told(change))

    def _made(
        self,
        metrics: dict[str, Measured],
        base: Sequence[str | None],
        tuned: Sequence[str | None],
        *,
        by: str = "",
        judged: Sequence[Sequence[str | None]] = (),
        notes: Sequence[str] = (),
    ) -> TaskResult:
        rows: list[dict[str, Any]] = [
            {"prompt": example.prompt[-1]["content"], "expected": " | ".join(example.expected), "base": a, "tuned": b}
            for example, a, b in zip(self.examples, base, tuned, strict=True)
        ]
        for number, (row, example) in enumerate(zip(rows, self.examples, strict=True)):
            if judged:
                row["base_right"], row["tuned_right"] = (side[number] == example.expected[0] for side in judged)
            elif self.task.kind == "qa":
                row["base_right"], row["tuned_right"] = (
                    says(row[side], example.expected) for side in ("base", "tuned")
                )
        notes = list(notes)
        if self.skipped:
            notes.append(f"{self.skipped} of the examples could not be asked of this model")
        return TaskResult(self.task.name, self.task.kind, len(rows), self.skipped, metrics, rows, by, notes)


def spoken_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names first, as whole words whatever their case; the longest of those that start there.

    None when it names none. Choices written without spaces between words, as Chinese ones, are found anywhere.
    """
    text = unicodedata.normalize("NFKC", answer).casefold()
    found = []
    for choice in choices:
        wanted = re.escape(unicodedata.normalize("NFKC", choice).casefold().strip())
        if choice.isascii():
            wanted = rf"(?<!\w){wanted}(?!\w)"
        match = re.search(wanted, text) if choice.strip() else None
        if match is not None:
            found.append((match.start(), -len(choice), choice))
    return min(found)[2] if found else None


def _contains(answer: str, accepted: Sequence[str]) -> float:
    return float(says(answer, accepted))


_OF_TEXTS: dict[str, _Metric] = {
    "rouge1": lambda answer, references: text_metrics.rouge(answer, references)["rouge1"],
    "rouge2": lambda answer, references: text_metrics.rouge(answer, references)["rouge2"],
    "rougeL": lambda answer, references: text_metrics.rouge(answer, references)["rougeL"],
    "meteor": text_metrics.meteor,
}


def _corpus_figure(score: text_metrics.CorpusScore) -> Figure:
    return Figure(score.value, score.low, score.high)


def _told(figure: Figure | None) -> Figure:
    """Without an interval where every draw gave the same value: nothing varied, but little is known."""
    if figure is None:
        raise ValueError("a metric of nothing")
    return Figure(figure.value) if figure.low == figure.high else figure


def _column(values: Any) -> _Floats:
    return np.array([float(value) for value in values], np.float64)


def _counts(expected: Sequence[str], answered: Sequence[str | None], labels: Sequence[str]) -> _Floats:
    """For each example and label: whether it was right, expected, and answered; [examples, 3 x labels]."""
    rows = [
        [float(fact) for label in labels for fact in (right == said == label, right == label, said == label)]
        for right, said in zip(expected, answered, strict=True)
    ]
    return np.array(rows, np.float64)


def _macro_f1(sums: _Floats) -> _Floats:
    parts = sums.reshape(len(sums), -1, 3)
    counted = parts[:, :, 1] + parts[:, :, 2]
    scores = np.divide(2 * parts[:, :, 0], counted, out=np.zeros_like(counted), where=counted > 0)
    return np.asarray(scores.mean(axis=1), np.float64)


def _micro_f1(sums: _Floats) -> _Floats:
    return _macro_f1(sums.reshape(len(sums), -1, 3).sum(axis=1))
