"""Alarms: what goes wrong in training, said in words while it happens, from a run's events alone.

Each alarm goes off once an episode: it must fall well below its threshold before it can go off again. What is known
of a run is a function of its events, so a resumed run, shown those of its earlier attempts, says what an uninterrupted
one would say. Nothing here runs a model or loads mlx, and a figure that no event carries is not watched.

Each alarm, what it goes off at (``THRESHOLDS``, in the unit named here), and why there:

- chosen-falling: the loss falls, while over 4 steps the chosen answers lose this share of their log-prob under the
  reference, and at least 2 nats. Likelihood displacement: Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024,
  arXiv:2402.13228. Sound runs raise it.
- loss-zero: the preference loss of 3 steps within the first epoch. A pair's gradient is sigmoid(-margin) of it
  (Rafailov et al. 2023, arXiv:2305.18290, sec. 4): below 1 % before every pair was seen once.
- rewards-saturated: the mean margin of 8 steps that rank every pair right. That gradient is below 1e-5 then, and the
  sigmoid loss has no finite optimum (Azar et al. 2023, arXiv:2310.12036, sec. 4.2). Sound runs reached 8.0.
- gradient-spike: the gradient norm in medians of the up to 32 steps before it; it must be above train.max_grad_norm
  too. Spikes harm the steps after them through Adam's moments (Huang et al. 2025, arXiv:2501.06842). The last window
  of an epoch, of one row, reached 5.6 in sound runs.
- retained-changing: nats that a token of the base's own answers to the retain prompts has lost, over 8 steps;
  exp(-0.5) leaves 61 % of its probability. Sound runs reached 0.33.
- facts-lost: the share, and at least 3, of the sample questions the base answered right that are answered wrong. Of
  22 such questions sound runs lost 1.
- answers-growing: the length of the sample answers in lengths of the base's; they must be longer than the chosen
  answers too. DPO's bias to length: Park et al. 2024, arXiv:2403.19159. Samples end after 32 tokens, so nothing is
  seen of a base that already is that long.
- held-out-rising: how many times running the held-out loss rose, without coming back to its best.

What is not finite is no alarm: it ends the run (``DivergedError``).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp
from statistics import fmean, median
from typing import ClassVar

from localdpo.recipe import DPORecipe, Recipe
from localdpo.train.events import EvalEvent, Event, SampleEvent, StepEvent, WarningEvent

THRESHOLDS: Mapping[str, float] = {
    "chosen-falling": 0.1,
    "loss-zero": 0.01,
    "rewards-saturated": 12.0,
    "gradient-spike": 10.0,
    "retained-changing": 0.5,
    "facts-lost": 0.25,
    "answers-growing": 1.5,
    "held-out-rising": 3.0,
}
"""What each alarm goes off at, unless the recipe says otherwise; the units are those of the table above."""

_RECENT, _STEADY = 4, 8
_FALLEN_NATS = 2.0
_NORMS, _FEWEST_NORMS = 32, 8
_CALM = 3.0
_FEWEST_FACTS = 3
_LONGER_BY = 40


@dataclass(frozen=True, slots=True)
class Reading:
    """What an alarm makes of an event: whether it goes off, or is calm enough to go off anew."""

    raised: bool
    calm: bool
    message: str = ""
    fix: str = ""


@dataclass
class StepRule:
    """An alarm over steps."""

    threshold: float
    dpo: DPORecipe
    code: ClassVar[str]

    def see(self, event: StepEvent) -> Reading | None:
        """Take in a step; None while there is nothing to say either way."""
        raise NotImplementedError


@dataclass
class ChosenFalling(StepRule):
    """The chosen answers lose probability while the loss falls."""

    code = "chosen-falling"
    first: list[tuple[float, float]] = field(default_factory=list)
    last: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    seen: int = 0

    def see(self, event: StepEvent) -> Reading | None:
        """Compare the last four steps with the first four."""
        metrics = event.metrics
        if self.dpo.reference_free or not {"rewards/chosen", "logps/chosen"} <= metrics.keys():
            return None
        loss, ratio = metrics["loss"], metrics["rewards/chosen"] / self.dpo.beta
        if len(self.first) < _RECENT:
            self.first.append((loss, ratio))
        self.last.append((loss, ratio, metrics["logps/chosen"]))
        self.seen += 1
        if self.seen < 2 * _RECENT:
            return None
        loss_before, ratio_before = (fmean(values) for values in zip(*self.first, strict=True))
        loss_now, ratio_now, logps = (fmean(values) for values in zip(*self.last, strict=True))
        # Under the reference; log-probs of whole answers, so below zero.
        surprise = max(ratio_now - logps, 1e-6)
        share = -ratio_now / surprise
        falling = loss_now < loss_before and ratio_now < ratio_before
        return Reading(
            falling and -ratio_now >= _FALLEN_NATS and share >= self.threshold,
            share < self.threshold / 2 or -ratio_now < _FALLEN_NATS / 2,
            f"The loss falls, but the chosen answers have become less likely than they are to the reference: by "
            f"{-ratio_now:.1f} nats of {surprise:.0f} an answer (rewards/chosen {ratio_now * self.dpo.beta:+.2f}). The "
            "model flees the rejected answers more than it learns the chosen ones.",
            "Raise dpo.rpo_alpha or dpo.beta, or lower train.learning_rate.",
        )


@dataclass
class LossZero(StepRule):
    """The pairs are learned by heart before all of them were seen once."""

    steps_per_epoch: int
    code = "loss-zero"
    last: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def see(self, event: StepEvent) -> Reading | None:
        """Look at the loss without its NLL; other losses than plain sigmoid may well be 0, or never are."""
        if event.step > self.steps_per_epoch or self.dpo.loss_type != "sigmoid" or self.dpo.label_smoothing:
            return None
        if "nll_loss" not in event.metrics:  # not a preference loss
            return None
        self.last.append(event.metrics["loss"] - self.dpo.rpo_alpha * event.metrics["nll_loss"])
        if len(self.last) < 3:
            return None
        mean = fmean(self.last)
        return Reading(
            mean < self.threshold,
            False,  # said once: the first epoch does not come again
            f"The preference loss is {max(mean, 0.0):.4f} in the first epoch: the pairs are learned by heart, and "
            "going on can only harm other answers.",
            "Lower train.learning_rate or train.num_train_epochs, or add pairs.",
        )


@dataclass
class RewardsSaturated(StepRule):
    """Margins so large that the preference has no gradient left."""

    code = "rewards-saturated"
    last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_STEADY))

    def see(self, event: StepEvent) -> Reading | None:
        """Look at the losses that never stop pushing: sigmoid and SimPO without smoothing."""
        metrics = event.metrics
        if self.dpo.loss_type not in ("sigmoid", "simpo") or self.dpo.label_smoothing:
            return None
        if not {"rewards/margins", "rewards/accuracies"} <= metrics.keys():
            return None
        self.last.append((metrics["rewards/margins"], metrics["rewards/accuracies"]))
        if len(self.last) < _STEADY:
            return None
        margin, accuracy = fmean(m for m, _ in self.last), fmean(a for _, a in self.last)
        logit = margin - (self.dpo.simpo_gamma if self.dpo.loss_type == "simpo" else 0.0)
        weight = 1 / (1 + exp(min(logit, 700.0)))
        return Reading(
            accuracy == 1 and logit > self.threshold,
            logit < 0.75 * self.threshold,
            f"Every pair of the last {_STEADY} steps is ranked right by a margin of {margin:+.1f} in the mean: the "
            f"preference has {weight / 0.5:.0e} of its first gradient left and teaches nothing more, while the model "
            "moves further from the base.",
            "Lower train.num_train_epochs or train.learning_rate, set train.stop_loss, or use dpo.loss_type ipo.",
        )


@dataclass
class GradientSpike(StepRule):
    """A gradient far larger than those before it."""

    max_norm: float | None
    code = "gradient-spike"
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_NORMS))
    quiet: int = 0

    def see(self, event: StepEvent) -> Reading | None:
        """Compare the norm with those before it."""
        norm, before = event.metrics["grad_norm"], list(self.last)
        self.last.append(norm)
        if len(before) < _FEWEST_NORMS:
            return None
        usual = median(before)
        self.quiet = self.quiet + 1 if norm < _CALM * usual else 0
        times = (
            f", {norm / usual:.0f} times the median of the {len(before)} steps before ({usual:.3g})" if usual else ""
        )
        scaled = f"it was scaled down to {self.max_norm:g}" if self.max_norm else "nothing scales it down"
        return Reading(
            norm > self.threshold * usual and norm > (self.max_norm or 1.0),
            self.quiet >= _STEADY,
            f"The gradient norm has jumped to {norm:.3g}{times}; {scaled} (train.max_grad_norm).",
            ("" if self.max_norm else "Set train.max_grad_norm to 1.0. ")
            + "Lower train.learning_rate or raise train.warmup_ratio; `localdpo pairs check` finds odd pairs.",
        )


@dataclass
class RetainedChanging(StepRule):
    """The base's own answers to the retain prompts are lost."""

    code = "retained-changing"
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_STEADY))

    def see(self, event: StepEvent) -> Reading | None:
        """Look at the nats a token that the retained answers have lost."""
        if "retain/drift" not in event.metrics:
            return None
        self.last.append(event.metrics["retain/drift"])
        if len(self.last) < _STEADY:
            return None
        drift = fmean(self.last)
        return Reading(
            drift > self.threshold,
            drift < self.threshold / 2,
            f"The base's own answers to the retain prompts are being lost: over {_STEADY} steps a token of them was "
            f"{drift:.2f} nats less likely than before training ({exp(-drift):.0%} of its probability is left).",
            "Raise data.retain_weight or dpo.beta, or lower train.learning_rate.",
        )


@dataclass
class HeldOutRising:
    """The held-out loss goes up and up."""

    threshold: float
    code: ClassVar[str] = "held-out-rising"
    losses: list[float] = field(default_factory=list)

    def see(self, event: EvalEvent) -> Reading | None:
        """Look at the last evaluations."""
        self.losses.append(event.metrics["eval_loss"])
        best, rises = min(self.losses), int(self.threshold)
        recent = self.losses[-rises:]
        if len(self.losses) <= rises:
            return None
        return Reading(
            best < recent[0] and all(one < two for one, two in pairwise(recent)),
            recent[-1] == best,
            f"The held-out loss has risen {rises} times running, from {best:.3f} at its best to {recent[-1]:.3f}: the "
            "model learns its pairs by heart.",
            "The best adapter is kept; set train.early_stopping_patience to stop by itself.",
        )


@dataclass
class FactsLost:
    """Questions that the base answered right are answered wrong."""

    threshold: float
    code: ClassVar[str] = "facts-lost"

    def see(self, answers: Sequence[SampleEvent]) -> Reading | None:
        """Count what has gone wrong among answers of one moment."""
        known = [answer for answer in answers if answer.base_right]
        lost = sum(answer.tuned_right is False for answer in known)
        if len(known) < _FEWEST_FACTS:
            return None
        return Reading(
            lost >= _FEWEST_FACTS and lost / len(known) > self.threshold,
            lost / len(known) < self.threshold / 2,
            f"{lost} of {len(known)} sample questions that the base answered right are answered wrong now.",
            "Add retain prompts or raise data.retain_weight, lower train.learning_rate or train.num_train_epochs.",
        )


@dataclass
class AnswersGrowing:
    """Answers get longer than the base's, and than those that are taught; lengths are in characters."""

    threshold: float
    taught: float
    code: ClassVar[str] = "answers-growing"

    def see(self, answers: Sequence[SampleEvent]) -> Reading | None:
        """Compare lengths of answers of one moment with the base's."""
        lengths = [(len(answer.base.strip()), len(answer.tuned.strip())) for answer in answers]
        if len(lengths) < 2:
            return None
        base, tuned = (fmean(column) for column in zip(*lengths, strict=True))
        grown = sum(after >= self.threshold * before for before, after in lengths)
        times = tuned / max(base, 1.0)
        longer = times >= self.threshold and tuned - base >= _LONGER_BY and tuned > self.taught
        return Reading(
            longer and 2 * grown > len(lengths),
            times < (1 + self.threshold) / 2,
            f"The answers grow: {tuned:.0f} characters in the mean of {len(lengths)} samples, {times:.1f} times the "
            f"base's {base:.0f} and longer than the {self.taught:.0f} of the chosen answers.",
            "Look at lengths with `localdpo pairs stats`: add pairs whose chosen answer is the shorter one, raise "
            "dpo.beta or dpo.rpo_alpha, or use dpo.loss_type simpo, which counts by the token.",
        )


class Alarms:
    """The alarms of a run. Show it every event, ``settle`` before and ``see`` after whoever else gets it."""

    def __init__(
        self,
        steps: Sequence[StepRule] = (),
        evaluations: Sequence[HeldOutRising] = (),
        answers: Sequence[FactsLost | AnswersGrowing] = (),
        *,
        stop_on: Iterable[str] = (),
    ) -> None:
        self._steps, self._evaluations, self._samples = steps, evaluations, answers
        self._stop_on = frozenset(stop_on)
        self._ringing: set[str] = set()
        self._answers: list[SampleEvent] = []
        self.stopping = ""
        """The alarm of train.stop_on that has gone off; empty while there is none."""

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: int, chosen: Iterable[str]) -> Alarms:
        """The alarms that ``recipe`` asks for; ``chosen`` are the answers that the run teaches."""
        dpo, train = recipe.dpo, recipe.train
        at = {name: own or THRESHOLDS[name] for name, own in train.alarm_thresholds.items()}
        lengths = array("l", map(len, chosen))
        taught = fmean(lengths) if lengths else 0.0
        steps: dict[str, StepRule] = {
            rule.code: rule
            for rule in (
                ChosenFalling(at.get("chosen-falling", 0.0), dpo),
                LossZero(at.get("loss-zero", 0.0), dpo, steps_per_epoch),
                RewardsSaturated(at.get("rewards-saturated", 0.0), dpo),
                GradientSpike(at.get("gradient-spike", 0.0), dpo, train.max_grad_norm),
                RetainedChanging(at.get("retained-changing", 0.0), dpo),
            )
        }
        answers = (FactsLost(at.get("facts-lost", 0.0)), AnswersGrowing(at.get("answers-growing", 0.0), taught))
        return cls(
            [rule for code, rule in steps.items() if code in at],
            [HeldOutRising(at["held-out-rising"])] if "held-out-rising" in at else [],
            [rule for rule in answers if rule.code in at],
            stop_on=train.stop_on,
        )

    def replay(self, events: Iterable[Event]) -> None:
        """See the events of earlier attempts again, without a word."""
        for event in events:
            self.settle(event)
            self.see(event)

    def settle(self, event: Event) -> list[WarningEvent]:
        """What sample answers come to when ``event``, which comes after them, is not one of them."""
        answers = self._answers
        if not answers or (isinstance(event, SampleEvent) and _moment(event) == _moment(answers[0])):
            return []
        self._answers = []
        return self._said(answers[0].step, ((rule.code, rule.see(answers)) for rule in self._samples))

    def see(self, event: Event) -> list[WarningEvent]:
        """Take in one event; returns the warnings it gives rise to."""
        if isinstance(event, StepEvent):
            return self._said(event.step, ((rule.code, rule.see(event)) for rule in self._steps))
        if isinstance(event, EvalEvent):
            return self._said(event.step, ((rule.code, rule.see(event)) for rule in self._evaluations))
        if isinstance(event, SampleEvent):
            self._answers.append(event)
        return []

    def _said(self, step: int, readings: Iterable[tuple[str, Reading | None]]) -> list[WarningEvent]:
        warnings = []
        for code, reading in readings:
            if reading is None:
                continue
            if reading.raised and code not in self._ringing:
                self._ringing.add(code)
                warnings.append(WarningEvent(step=step, code=code, message=reading.message, fix=reading.fix))
                if code in self._stop_on:
                    self.stopping = self.stopping or code
            elif reading.calm:
                self._ringing.discard(code)
        return warnings


def _moment(sample: SampleEvent) -> tuple[int, bool]:
    return sample.step, sample.final
