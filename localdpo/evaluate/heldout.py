"""Held-out pairs under a finished run's adapter: loss, reward accuracy and margin, as in training, with intervals.

Rewards are against the base, whatever the reference of training was. It reads a run folder and changes nothing in it.

How often a model prefers the chosen answer by itself is told twice: by log-prob a token, which does not favour short
answers, and by the answer's whole log-prob, which is what DPO's model of preference compares.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localdpo.core.losses import LossInputs, LossSettings, PairLogps, pair_logps, preference_loss
from localdpo.core.reference import ReferenceCache
from localdpo.core.score import Scorer
from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import PreferencePair, Skipped, prompt_key, read_pairs
from localdpo.dpo.scorer import make_scorer
from localdpo.errors import InputError, Problem
from localdpo.evaluate.intervals import Figure, bootstrap, mean, share
from localdpo.evaluate.wording import prompt_text, words_of
from localdpo.methods.base import held_out_figures
from localdpo.methods.dpo import DPO
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import load_adapter
from localdpo.paths import cache_dir
from localdpo.recipe import Recipe, load_recipe
from localdpo.sequences import EncodedRow
from localdpo.steps import result_of
from localdpo.train.inputs import read_inputs
from localdpo.train.run import RunFolder
from localdpo.train.session import scored_rows
from localdpo.train.snapshot import copies

__all__ = ["HeldOut", "PairScores", "compare", "evaluate_run", "figures", "held_out_pairs", "score_pairs"]

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``metrics`` have the names of an evaluation in training; ``pairs`` were scored, ``skipped`` were not."""

    metrics: dict[str, float]
    pairs: int
    skipped: tuple[Skipped, ...]
    scores: PairScores


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """B pairs under a policy and under the base: summed log-probs, float32 [B] in each of the ``PairLogps``."""

    rows: Sequence[PreferencePair]
    pairs: Sequence[EncodedRow]
    skipped: Sequence[Skipped]
    policy: PairLogps
    base: PairLogps
    settings: LossSettings

    @property
    def groups(self) -> list[bytes]:
        """What belongs together: the prompts."""
        return [prompt_key(row.prompt) for row in self.rows]

    @property
    def metrics(self) -> dict[str, float]:
        """As in training, ``eval_`` before each."""
        reference = None if self.settings.reference_free else _flat(self.base)
        return held_out_figures(DPO(self.settings), self.pairs, _flat(self.policy), reference)[1]

    @property
    def nats(self) -> _Floats:
        """By how many nats the odds of chosen against rejected grew from the base, [B]."""
        return _preference(self.policy) - _preference(self.base)


def evaluate_run(folder: str | Path, pairs_file: str | Path | None = None) -> HeldOut:
    """Score held-out pairs with the published adapter of a run.

    The pairs are those the run held out, or all of ``pairs_file``. Raises InputError when ``folder``
    is no run with an adapter, or there are no pairs.
    """
    run = RunFolder(folder)
    recipe = recipe_of(run)
    pairs = held_out_pairs(run, recipe, pairs_file)
    loaded = load_model(recipe.model, quantize=recipe.quantize, memory=recipe.train.memory)
    load_adapter(run.adapter, loaded)
    scores = result_of(score_pairs(loaded, make_scorer(loaded.model), recipe, pairs))
    return HeldOut(scores.metrics, len(scores.pairs), tuple(scores.skipped), scores)


def recipe_of(run: RunFolder) -> Recipe:
    """The recipe of a run that has published an adapter. Raises InputError for anything else."""
    if not run.info() or not run.adapter.is_dir():
        raise InputError(Problem(str(run.path), "is no run with an adapter", "Train one with `localdpo train`"))
    return load_recipe(run.recipe_file, check_files=False)


def held_out_pairs(run: RunFolder, recipe: Recipe, pairs_file: str | Path | None = None) -> Sequence[PreferencePair]:
    """The pairs that the run held out, or all of ``pairs_file``. Raises InputError when there are none."""
    if pairs_file is not None:
        pairs = read_pairs(pairs_file).pairs
        if not pairs:
            raise InputError(Problem(str(pairs_file), "0 pairs", "Name a file of pairs to evaluate on"))
        return pairs
    if run.info().get("imported"):
        fix = "Name a file of pairs to evaluate on"
        raise InputError(Problem(str(run.path), "this run was imported, without pairs", fix))
    # What must stay, and what is probed, is no part of this: their files need not exist any more.
    data = recipe.data.model_copy(update={"retain": None, "probes": None})
    held_out = read_inputs(recipe.model_copy(update={"data": data}), copies(run)).held_out
    if not held_out:
        raise InputError(Problem(str(run.path), "this run held out no pairs", "Name a file of pairs to evaluate on"))
    return held_out


def score_pairs(
    loaded: LoadedModel, scorer: Scorer, recipe: Recipe, pairs: Sequence[PreferencePair]
) -> Generator[tuple[int, int], None, PairScores]:
    """Score ``pairs`` under the model as it stands and under its base; yields (done, wanted)."""
    encoding = encode_pairs(pairs, loaded.tokenizer, recipe.data.max_length, recipe.data.truncation)
    encoded = encoding.pairs
    if not encoded:
        reason = str(encoding.skipped[0]) if encoding.skipped else "there are none"
        raise InputError(Problem("held-out pairs", f"none can be scored: {reason}"))
    cache = ReferenceCache(cache_dir() / "reference", loaded.fingerprint, loaded.device)
    base = pair_logps(encoded, (yield from cache.fill(scorer, encoded)))
    policy = pair_logps(encoded, (yield from scored_rows(scorer, encoded)))
    rows = [pairs[pair.row] for pair in encoded]
    return PairScores(rows, encoded, encoding.skipped, policy, base, LossSettings.from_recipe(recipe.dpo))


def _flat(logps: PairLogps) -> npt.NDArray[np.float32]:
    return np.stack([logps.chosen, logps.rejected], axis=1).reshape(-1)


def _preference(logps: PairLogps) -> _Floats:
    return np.asarray(np.subtract(logps.chosen, logps.rejected, dtype=np.float64), np.float64)


def _per_token(logps: PairLogps) -> _Floats:
    chosen, rejected = np.asarray(logps.chosen, np.float64), np.asarray(logps.rejected, np.float64)
    return np.asarray(chosen / logps.chosen_tokens - rejected / logps.rejected_tokens, np.float64)


def figures(scores: PairScores, seed: int = 0) -> dict[str, Any]:
    """All held-out figures as JSON values, each with its interval; see docs/eval.md."""
    losses, chosen, rejected = _rewards(scores, scores.policy)
    groups = scores.groups
    right = chosen > rejected

    def averaged(values: _Floats) -> Figure | None:
        return mean(values, groups=groups, seed=seed)

    return {
        "pairs": len(scores.pairs),
        "skipped": len(scores.skipped),
        "loss": _json(_loss(scores, scores.policy, losses, seed)),
        "accuracy": _json(_accuracy(right, groups, seed)),
        "margin": _json(averaged(chosen - rejected)),
        "chosen_reward": _json(averaged(chosen)),
        "rejected_reward": _json(averaged(rejected)),
        "nats": _json(averaged(scores.nats)),
        "chosen_nll": float(np.sum(scores.policy.chosen) / np.sum(scores.base.chosen)),
        "base": _own_preference(scores, scores.base, seed),
        "tuned": _own_preference(scores, scores.policy, seed),
        "tags": _tags(scores, right, chosen - rejected, seed),
        "per_pair": list(_per_pair(scores, chosen, rejected)),
    }


def _rewards(scores: PairScores, policy: PairLogps) -> tuple[_Floats, _Floats, _Floats]:
    """Each pair's loss without NLL, and both rewards."""
    output = preference_loss(LossInputs.of(policy, scores.base), scores.settings)
    losses, chosen, rejected = (np.array(column).astype(np.float64) for column in output)
    return losses, chosen, rejected


def _loss(scores: PairScores, policy: PairLogps, losses: _Floats, seed: int) -> Figure:
    """The loss as in training: weighted mean of the pairs' losses plus rpo_alpha times NLL a chosen token."""
    weights = np.array([pair.weight for pair in scores.pairs], np.float64)
    columns = np.stack([weights * losses, weights, -weights * policy.chosen, weights * policy.chosen_tokens], axis=1)
    alpha = scores.settings.rpo_alpha
    return bootstrap(columns, lambda s: s[:, 0] / s[:, 1] + alpha * s[:, 2] / s[:, 3], groups=scores.groups, seed=seed)


def _accuracy(right: npt.NDArray[np.bool_], groups: Sequence[bytes], seed: int) -> Figure | None:
    """Wilson's interval; the bootstrap's where pairs share prompts and so are not independent, if that is wider."""
    plain = share(int(right.sum()), len(right))
    if plain is None or len(set(groups)) == len(groups):
        return plain
    drawn = mean(right.astype(np.float64), groups=groups, seed=seed)
    if drawn is None or drawn.low is None or drawn.high is None or plain.low is None or plain.high is None:
        return plain
    return Figure(plain.value, min(plain.low, drawn.low), max(plain.high, drawn.high))


def _own_preference(scores: PairScores, logps: PairLogps, seed: int) -> dict[str, Any]:
    """What a model prefers by itself, and its loss."""
    losses, _, _ = _rewards(scores, logps)
    return {
        "preference_accuracy": _json(_accuracy(_per_token(logps) > 0, scores.groups, seed)),
        "preference_accuracy_summed": _json(_accuracy(_preference(logps) > 0, scores.groups, seed)),
        "loss": _json(_loss(scores, logps, losses, seed)),
    }


def _tags(scores: PairScores, right: npt.NDArray[np.bool_], margins: _Floats, seed: int) -> dict[str, Any]:
    found = {}
    for tag in dict.fromkeys(tag for row in scores.rows for tag in row.tags):
        index = [number for number, row in enumerate(scores.rows) if tag in row.tags]
        groups = [scores.groups[number] for number in index]
        found[tag] = {
            "pairs": len(index),
            "accuracy": _json(_accuracy(right[index], groups, seed)),
            "margin": _json(mean(margins[index], groups=groups, seed=seed)),
        }
    return found


def _per_pair(scores: PairScores, chosen: _Floats, rejected: _Floats) -> Generator[dict[str, Any], None, None]:
    for number, row in enumerate(scores.rows):
        yield {
            "source": f"{Path(row.source).name}:{row.line}" if row.source else f"row {number + 1}",
            "prompt": prompt_text(row.prompt),
            "tags": list(row.tags),
            "margin": float(chosen[number] - rejected[number]),
            "nats": float(scores.nats[number]),
            "chosen_logps": float(scores.policy.chosen[number]),
            "rejected_logps": float(scores.policy.rejected[number]),
            "base_chosen_logps": float(scores.base.chosen[number]),
            "base_rejected_logps": float(scores.base.rejected[number]),
            "chosen_words": len(words_of(row.chosen)),
            "rejected_words": len(words_of(row.rejected)),
        }


def compare(ours: PairScores, theirs: PairScores, seed: int = 0) -> dict[str, Any]:
    """Another run's figures on the same pairs, and ours minus theirs, pair by pair, as JSON values.

    Both by this run's loss settings. ``larger`` is the share of pairs whose odds grew more under ours.
    """
    _, our_chosen, our_rejected = _rewards(ours, ours.policy)
    _, their_chosen, their_rejected = _rewards(ours, theirs.policy)
    our_margin, their_margin = our_chosen - our_rejected, their_chosen - their_rejected
    gains = (our_margin > 0).astype(np.float64) - (their_margin > 0)

    def averaged(values: _Floats) -> Mapping[str, Any] | None:
        return _json(mean(values, groups=ours.groups, seed=seed))

    return {
        "accuracy": _json(_accuracy(their_margin > 0, ours.groups, seed)),
        "margin": averaged(their_margin),
        "difference": {"accuracy": averaged(gains), "margin": averaged(our_margin - their_margin)},
        "larger": _json(_accuracy(our_margin > their_margin, ours.groups, seed)),
    }


def _json(figure: Figure | None) -> dict[str, float | None] | None:
    return figure.to_json() if figure is not None else None
