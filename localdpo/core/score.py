"""Log-probs of sequences, and the gradient of a loss over them, by the model's plain forward pass.

This is the readable truth: a row at a time, right-padded, whole logits. The packed engine equals it, and is proved to.
It knows nothing about what a loss is for: a method hands in what it makes of the log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from localdpo.model.lora import adapters_off
from localdpo.sequences import EncodedRow, TokenSequence

Gradients = dict[str, mx.array]
Members = tuple[np.ndarray, ...]
"""For each of S sequences the predictions, int32 indices into N, that its completion consists of, in order."""


class SequenceLogps(NamedTuple):
    """Log-probs of S sequences by their N distinct predictions, float32 [N], and how many tokens were run for them."""

    predictions: mx.array
    members: Members
    tokens_run: int

    @property
    def sums(self) -> mx.array:
        """The log-prob of each completion, float32 [S]."""
        matrix = np.zeros((len(self.members), len(self.predictions)), np.float32)
        for completion, members in enumerate(self.members):
            # A completion never holds one prediction twice: its tokens stand at distinct positions.
            matrix[completion, members] = 1.0
        return mx.array(matrix) @ self.predictions

    @property
    def lengths(self) -> mx.array:
        """Tokens of each completion, float32 [S]."""
        return mx.array(np.array([len(members) for members in self.members], np.float32))

    @property
    def tokens(self) -> mx.array:
        """The log-prob of each token of each completion, one completion after the other, float32 [sum of lengths]."""
        return self.predictions[mx.array(np.concatenate(self.members))]


class CompletionLogps(Protocol):
    """What most losses read of S completions, MLX arrays float32 [S]."""

    @property
    def sums(self) -> mx.array:
        """Log-probs."""
        ...

    @property
    def lengths(self) -> mx.array:
        """Tokens."""
        ...


class SummedLogps(NamedTuple):
    """Completions whose log-probs are known already, as those of held-out rows."""

    sums: mx.array
    lengths: mx.array


class LossShare(NamedTuple):
    """What some rows add to the loss of their window, a scalar, and figures of each row without gradient, [b, C]."""

    total: mx.array
    columns: mx.array


class WindowLoss(Protocol):
    """The loss of all rows of one optimizer step, taken some rows at a time.

    It is normalised by the whole window, so that how the window is split never shows in the sum of the shares.
    ``columns`` names the figures that it tells of each row.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """C names."""
        ...

    def share(self, rows: Sequence[int], logps: CompletionLogps) -> LossShare:
        """The share of ``rows``, indices into the window, whose sequences, one row after the other, have ``logps``."""
        ...


class StepResult(NamedTuple):
    """One window of B rows: its loss, each row's figures float32 [B] by name, tokens really run, the gradient."""

    loss: float
    columns: dict[str, np.ndarray]
    tokens: int
    grad: Gradients


class Scorer(Protocol):
    """Scores sequences under a model. Use it on the thread that made it: MLX's streams are thread-local."""

    model: nn.Module

    @property
    def path(self) -> str:
        """How sequences are run; ``path_reason`` says why."""
        ...

    @property
    def path_reason(self) -> str:
        """A clause for the user."""
        ...

    def use_trunk(self, folder: Path, fingerprint: str) -> bool:
        """Start passes above the layers that have nothing to train, over states kept in ``folder``, if that helps."""
        ...

    def logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Summed log-probs of S completions under the model as it stands, dropout off: float32 [S]. No gradient."""
        ...

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Like :meth:`logps`, of the base: the adapters are swapped out, exactly."""
        ...

    def base_kl(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """KL(base || model) in nats, summed over each completion's tokens: float32 [S].

        Both read the same text and say what comes next; the base is the model with its adapters swapped out.
        """
        ...

    def loss_and_grad(self, window: Sequence[EncodedRow], loss: WindowLoss) -> StepResult:
        """Loss and adapter gradient of all rows of one optimizer step."""
        ...


class CoreScorer:
    """The plain forward pass, a row at a time."""

    path = "core"
    path_reason = "asked for with LOCALDPO_ENGINE=core"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def use_trunk(self, folder: Path, fingerprint: str) -> bool:
        """Never: every layer is run."""
        return False

    def logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        with evaluating(self.model):
            return np.array([float(sequence_logps(self.model, [one]).sums[0]) for one in sequences], np.float32)

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        with adapters_off(self.model):
            return self.logps(sequences)

    def base_kl(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        with evaluating(self.model):
            return np.array([self._base_kl(one) for one in sequences], np.float32)

    def _base_kl(self, sequence: TokenSequence) -> float:
        ids = mx.array(sequence.inputs)[None]
        tuned = _log_softmax(self.model(ids))
        with adapters_off(self.model):
            base = _log_softmax(self.model(ids))
        kl = mx.sum(mx.exp(base) * (base - tuned), axis=-1)
        return float(mx.sum(kl[0, len(sequence.prompt_ids) - 1 :]))

    def loss_and_grad(self, window: Sequence[EncodedRow], loss: WindowLoss) -> StepResult:
        """See :class:`Scorer`."""
        columns = np.zeros((len(window), len(loss.columns)), np.float32)
        total, tokens, grad = 0.0, 0, Gradients()
        for number, row in enumerate(window):

            def share(number: int = number, row: EncodedRow = row) -> tuple[mx.array, mx.array, int]:
                logps = sequence_logps(self.model, row.sequences)
                return (*loss.share([number], logps), logps.tokens_run)

            (part, figures, run), gradient = nn.value_and_grad(self.model, share)()
            flat = dict(tree_flatten(gradient))
            grad = {name: grad[name] + value if grad else value for name, value in flat.items()}
            mx.eval(part, figures, grad)
            columns[number] = np.array(figures[0])
            total, tokens = total + float(part), tokens + run
        return StepResult(total, dict(zip(loss.columns, columns.T, strict=True)), tokens, grad)


def sequence_logps(model: nn.Module, sequences: Sequence[TokenSequence]) -> SequenceLogps:
    """Log-probs of S sequences, right-padded: padding follows all real tokens, so no causal model sees it."""
    inputs = [sequence.inputs for sequence in sequences]
    width = max(map(len, inputs))
    ids = mx.array(np.stack([np.pad(row, (0, width - len(row))) for row in inputs]))
    logps = _log_softmax(model(ids))
    parts, members, count = [], [], 0
    for number, sequence in enumerate(sequences):
        # The token before each completion token predicts it.
        first, size = len(sequence.prompt_ids) - 1, len(sequence.completion_ids)
        predicted = logps[number, first : first + size]
        parts.append(mx.take_along_axis(predicted, mx.array(sequence.completion_ids)[:, None], axis=-1)[:, 0])
        members.append(np.arange(count, count + size, dtype=np.int32))
        count += size
    return SequenceLogps(mx.concatenate(parts), tuple(members), sum(map(len, inputs)))


def _log_softmax(logits: mx.array) -> mx.array:
    """float32. The maximum is taken away first: on a CPU ``mx.logsumexp`` adds one term at a time, and loses digits."""
    logits = logits.astype(mx.float32)
    shifted = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    return shifted - mx.log(mx.sum(mx.exp(shifted), axis=-1, keepdims=True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module._training = True
