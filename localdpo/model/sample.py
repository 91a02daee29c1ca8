"""Sampled answers to many prompts at once, each with random numbers of its own.

A row's numbers come from its seed and the position in its answer, never from the batch: which rows are decoded
together changes a row only through rounding in the model itself, where two tokens are within it of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localdpo.model.generate import BatchRow, FinishReason, Ids, Progress, decode_rows, text_of
from localdpo.model.load import LoadedModel
from localdpo.model.sampling import SamplingOptions

__all__ = ["Answer", "RowSampler", "batch_sample"]

PENALTY_CONTEXT = 20  # tokens that a repetition penalty looks back, as in mlx-lm


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without its end of turn; ``finish`` is "length" when ``max_tokens`` cut it off."""

    text: str
    tokens: int
    finish: FinishReason


def batch_sample(
    loaded: LoadedModel,
    prompts: Sequence[Ids],
    seeds: Sequence[int],
    options: SamplingOptions,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers to ``prompts`` (token ids), in order; ``seeds`` (one a prompt, 64 bits) are in place of options.seed.

    Two rows with the same prompt and seed get the same answer. Temperature 0 is greedy.
    """
    rows = [BatchRow(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    decode_rows(loaded, rows, options, RowSampler(options), progress)
    return [Answer(text_of(loaded, row.answer), len(row.answer), row.finish) for row in rows]


class RowSampler:
    """Chooses a token for each row of a batch."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options

    def __call__(self, logits: mx.array, rows: Sequence[BatchRow]) -> mx.array:
        """logits: [B, vocabulary] -> tokens [B]."""
        logits = self._penalised(logits.astype(mx.float32), rows)
        if self.options.temperature == 0:
            return mx.argmax(logits, axis=-1)
        logps = self._filtered(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        keys = mx.array(np.array([_key(row.seed or 0, len(row.answer)) for row in rows], np.uint32))
        return _categorical(logps / self.options.temperature, keys)

    def _penalised(self, logits: mx.array, rows: Sequence[BatchRow]) -> mx.array:
        """Repeated tokens made less likely, Keskar et al. 2019, arXiv:1909.05858."""
        penalty = self.options.repetition_penalty
        if penalty == 1:
            return logits
        recent = np.array([_recent(row) for row in rows], np.int32)
        index = mx.array(recent)
        seen = mx.take_along_axis(logits, index, axis=-1)
        return mx.put_along_axis(logits, index, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)

    def _filtered(self, logps: mx.array) -> mx.array:
        """Log-probs [B, vocabulary] with those of tokens that are out of the question at -inf."""
        options, least = self.options, None
        if options.top_p < 1 or 0 < options.top_k < logps.shape[-1]:
            least = self._threshold(mx.sort(logps, axis=-1)[:, ::-1])
        if options.min_p > 0:
            floor = mx.max(logps, axis=-1, keepdims=True) + float(np.log(options.min_p))
            least = floor if least is None else mx.maximum(least, floor)
        return logps if least is None else mx.where(logps < least, -mx.inf, logps)

    def _threshold(self, falling: mx.array) -> mx.array:
        """The log-prob [B, 1] of the last token that top_p and top_k keep, from log-probs in falling order."""
        options, count = self.options, falling.shape[-1]
        kept = mx.full((falling.shape[0], 1), count, dtype=mx.int32)
        if options.top_p < 1:
            above = mx.cumsum(mx.exp(falling), axis=-1, inclusive=False)  # mass of the likelier ones
            kept = mx.sum(above < options.top_p, axis=-1, keepdims=True).astype(mx.int32)
        if options.top_k:
            kept = mx.minimum(kept, options.top_k)
        return mx.take_along_axis(falling, mx.maximum(kept, 1) - 1, axis=-1)


def _categorical(logits: mx.array, keys: mx.array) -> mx.array:
    """logits: [B, V], keys: [B, 2] -> [B]: one draw a row with the row's own key."""
    drawn: mx.array = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)
    return drawn


def _key(seed: int, position: int) -> np.ndarray:
    data = (seed & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little") + position.to_bytes(8, "little")
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), "<u4")


def _recent(row: BatchRow) -> list[int]:
    """The last tokens of prompt and answer, filled up with the last one: a repeated index changes nothing."""
    known = [*map(int, row.prompt[-PENALTY_CONTEXT:]), *row.answer][-PENALTY_CONTEXT:]
    return [known[-1]] * (PENALTY_CONTEXT - len(known)) + known
