"""Preference losses as pure functions of summed log-probs. Nothing here knows models, tokens or batches.

Notation, per pair: policy log-probs of chosen and rejected are lc and lr, the reference's rc and rr, all summed
over completion tokens; n is a completion's token count. The log-ratios are a = lc - rc and b = lr - rr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localdpo.recipe import REFERENCE_FREE_LOSSES, DPORecipe, LossType
from localdpo.sequences import EncodedRow, completion_lengths, sequences_of


class PairLogps(NamedTuple):
    """Summed completion log-probs (float32 [B]) and completion token counts (int [B]) of B pairs."""

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def rows(self, index: np.ndarray | list[int]) -> PairLogps:
        """The pairs at ``index``."""
        return PairLogps(*(column[index] for column in self))


def pair_logps(rows: Sequence[EncodedRow], sums: np.ndarray) -> PairLogps:
    """The log-probs of B pairs, from those of their sequences, float32 [2B]."""
    table = sums.reshape(-1, 2)
    tokens = completion_lengths(sequences_of(rows)).reshape(-1, 2)
    return PairLogps(table[:, 0], table[:, 1], tokens[:, 0], tokens[:, 1])


class LossInputs(NamedTuple):
    """What a loss reads, as MLX arrays [B]: the policy's sums, the reference's, and the token counts as floats."""

    chosen: mx.array
    rejected: mx.array
    reference_chosen: mx.array
    reference_rejected: mx.array
    chosen_tokens: mx.array
    rejected_tokens: mx.array

    @classmethod
    def of(cls, policy: PairLogps, reference: PairLogps) -> LossInputs:
        """From log-probs that are known already."""
        columns = (policy.chosen, policy.rejected, reference.chosen, reference.rejected, *policy[2:])
        return cls(*(mx.array(np.asarray(column, np.float32)) for column in columns))


class LossOutput(NamedTuple):
    """Per pair, float32 [B]: the loss, and the implicit rewards of both answers (no gradient flows through rewards)."""

    losses: mx.array
    rewards_chosen: mx.array
    rewards_rejected: mx.array


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Which loss, and its parameters; ``rpo_alpha`` weighs the chosen answer's NLL beside it."""

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    simpo_gamma: float = 0.5

    @classmethod
    def from_recipe(cls, dpo: DPORecipe) -> LossSettings:
        """The recipe's ``dpo`` section, which has checked every value."""
        return cls(dpo.loss_type, dpo.beta, dpo.label_smoothing, dpo.rpo_alpha, dpo.simpo_gamma)

    @property
    def reference_free(self) -> bool:
        """True when the loss never looks at the reference."""
        return self.loss_type in REFERENCE_FREE_LOSSES


def preference_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """The loss and the implicit rewards of B pairs, without the NLL term.

    Rewards are beta * (lc - rc) and beta * (lr - rr) (Rafailov et al. 2023, arXiv:2305.18290, sec. 4), for the
    reference-free losses beta times the mean log-prob (Meng et al. 2024, arXiv:2405.14734, eq. 4).
    """
    losses = LOSSES[settings.loss_type](inputs, settings)
    if settings.reference_free:
        chosen, rejected = _means(inputs)
    else:
        chosen, rejected = _log_ratios(inputs)
    rewards = (mx.stop_gradient(settings.beta * x) for x in (chosen, rejected))
    return LossOutput(losses, *rewards)


def _log_ratios(p: LossInputs) -> tuple[mx.array, mx.array]:
    return p.chosen - p.reference_chosen, p.rejected - p.reference_rejected


def _means(p: LossInputs) -> tuple[mx.array, mx.array]:
    return p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens


def _log_sigmoid(x: mx.array) -> mx.array:
    """-log(1 + e**-x), without overflow."""
    return -mx.logaddexp(mx.array(0.0), -x)


def _smoothed(logits: mx.array, smoothing: float) -> mx.array:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z): the label is the other way round with probability eps."""
    return -(1 - smoothing) * _log_sigmoid(logits) - smoothing * _log_sigmoid(-logits)


def sigmoid(p: LossInputs, s: LossSettings) -> mx.array:
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothed, conservative DPO: Mitchell 2023, eq. 3."""
    a, b = _log_ratios(p)
    return _smoothed(s.beta * (a - b), s.label_smoothing)


def robust(p: LossInputs, s: LossSettings) -> mx.array:
    """Robust DPO, unbiased under flipped labels: Chowdhury et al. 2024, arXiv:2403.00409, eq. 9."""
    a, b = _log_ratios(p)
    logits, eps = s.beta * (a - b), s.label_smoothing
    return (-(1 - eps) * _log_sigmoid(logits) + eps * _log_sigmoid(-logits)) / (1 - 2 * eps)


def ipo(p: LossInputs, s: LossSettings) -> mx.array:
    """IPO: Azar et al. 2023, arXiv:2310.12036, eq. 17, on log-ratios a token, as its authors advise."""
    a, b = _log_ratios(p)
    return mx.square(a / p.chosen_tokens - b / p.rejected_tokens - 1 / (2 * s.beta))


def hinge(p: LossInputs, s: LossSettings) -> mx.array:
    """Hinge on the same margin (SLiC): Zhao et al. 2023, arXiv:2305.10425, eq. 3; Liu et al. 2023, arXiv:2309.06657."""
    a, b = _log_ratios(p)
    return mx.maximum(1 - s.beta * (a - b), 0.0)


def sppo_hard(p: LossInputs, s: LossSettings) -> mx.array:
    """SPPO with hard labels, P(chosen wins) = 1: Wu et al. 2024, arXiv:2405.00675, eq. 4.7, over beta squared."""
    a, b = _log_ratios(p)
    return mx.square(a - 0.5 / s.beta) + mx.square(b + 0.5 / s.beta)


def apo_zero(p: LossInputs, s: LossSettings) -> mx.array:
    """APO-zero, chosen up and rejected down: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    a, b = _log_ratios(p)
    return 1 - mx.sigmoid(s.beta * a) + mx.sigmoid(s.beta * b)


def apo_down(p: LossInputs, s: LossSettings) -> mx.array:
    """APO-down, both down, rejected more: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8."""
    a, b = _log_ratios(p)
    return mx.sigmoid(s.beta * a) + 1 - mx.sigmoid(s.beta * (a - b))


def simpo(p: LossInputs, s: LossSettings) -> mx.array:
    """SimPO: Meng et al. 2024, arXiv:2405.14734, eq. 6. No reference; mean log-probs against a margin gamma."""
    chosen, rejected = _means(p)
    return _smoothed(s.beta * (chosen - rejected) - s.simpo_gamma, s.label_smoothing)


def orpo(p: LossInputs, s: LossSettings) -> mx.array:
    """ORPO's odds-ratio term: Hong et al. 2024, arXiv:2403.07691, eq. 7; its NLL on the answer is ``rpo_alpha``'s."""
    chosen, rejected = _means(p)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -s.beta * _log_sigmoid(log_odds)


def _log1mexp(x: mx.array) -> mx.array:
    """log(1 - e**x) for x < 0, accurate at both ends (Maechler 2012): -ln 2 divides the two forms."""
    x = mx.minimum(x, -1e-6)
    near, far = mx.maximum(x, -math.log(2)), mx.minimum(x, -math.log(2))
    return mx.where(x > -math.log(2), mx.log(-mx.expm1(near)), mx.log1p(-mx.exp(far)))


LOSSES: dict[LossType, Callable[[LossInputs, LossSettings], mx.array]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
}
