"""Scores pairs under a model: completion log-probs, the loss over an optimizer step, and its gradient.

A window of pairs (one optimizer step, whatever its batch size and accumulation) is split into micro-batches by
length and normalised as a whole, so the split never shows in the result. On a CPU each micro-batch runs on several
streams. It knows nothing about files, schedules or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.budget import CPU_STREAMS, MICRO_BATCH_TOKENS, mode_of
from localdpo.dpo.divergence import token_kl
from localdpo.dpo.forward import Path, SharedForward, choose_forward
from localdpo.dpo.losses import LossSettings, PairLogps, Policy, preference_loss
from localdpo.dpo.packing import common_length
from localdpo.dpo.standin import Trainable
from localdpo.dpo.trunk import TrunkCache
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import core_streams, on_cpu
from localdpo.model.frozen import is_lean, linear_dims
from localdpo.model.lora import adapters_off

Gradients = dict[str, mx.array]


class StepResult(NamedTuple):
    """One window of B pairs.

    ``loss`` is the weighted mean of the pairs' losses plus rpo_alpha times ``nll``, the chosen answers' negative
    log-likelihood a token. ``losses`` (without NLL), ``rewards_chosen`` and ``rewards_rejected`` are float32 [B].
    ``tokens`` counts what was really run, shared tokens once. ``grad`` maps parameter names to gradients.
    """

    loss: float
    nll: float
    losses: np.ndarray
    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    policy: PairLogps
    tokens: int
    grad: Gradients


class _Part(NamedTuple):
    """A micro-batch's share of a window: loss and NLL, columns [b, 5], gradient. Evaluating ``last`` evaluates all."""

    loss: mx.array
    nll: mx.array
    columns: mx.array
    grad: Gradients
    last: mx.array
    tokens: int


class _Totals(NamedTuple):
    """What a window's terms are divided by: the pairs' weights, and their weighted chosen tokens."""

    weight: float
    chosen_tokens: float


class PairScorer:
    """Log-probs and gradients of pairs under ``model``.

    Use it on the thread that made it: MLX's streams are thread-local.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_checkpointing: bool = False,
        path: Literal["auto", "shared", "plain"] = "auto",
        max_tokens: int | None = None,
    ) -> None:
        """``max_tokens`` bounds a micro-batch (a longer single pair still runs, alone)."""
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        mode = mode_of("cpu" if on_cpu() else "gpu", "lean" if is_lean(model) else "")
        self.max_tokens = max_tokens or MICRO_BATCH_TOKENS[mode]
        self._streams = core_streams(CPU_STREAMS[mode])
        with blas_threads_within(1), _evaluating(model):
            self._forward, self.path_reason = choose_forward(model, path, self._streams)

    @property
    def path(self) -> Path:
        """ "shared" or "plain"; ``path_reason`` says why."""
        return self._forward.path

    @property
    def cut(self) -> int:
        """Layers below the lowest one with anything to train; 0 where a pass cannot start above them."""
        if not isinstance(self._forward, SharedForward) or not self._forward.anatomy.has_norm:
            return 0
        trainable = [bool(Trainable(layer)) for layer in self._forward.anatomy.layers]
        return trainable.index(True) if any(trainable) else 0

    def use_trunk(self, folder: FilePath, fingerprint: str) -> bool:
        """Start every pass at ``cut``, over hidden states kept under ``folder`` for the base of that fingerprint.

        False, and nothing changes, where there is no cut or starting there would change the numbers.
        """
        forward, cut = self._forward, self.cut
        if not isinstance(forward, SharedForward) or not cut:
            return False
        name = f"{fingerprint[:32]}-{cut}-{'cpu' if on_cpu() else 'gpu'}"
        with blas_threads_within(1), _evaluating(self.model):
            return forward.start_at(TrunkCache(folder, name, linear_dims(forward.anatomy.head.module)[0]), cut)

    @property
    def trunk_bytes(self) -> int:
        """Bytes on disk of the hidden states in use, 0 without them."""
        trunk = self._forward.trunk if isinstance(self._forward, SharedForward) else None
        return trunk.nbytes if trunk is not None else 0

    def logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
        """Summed completion log-probs of B pairs under the model as it stands, dropout off. No gradient."""
        return _pair_logps(pairs, self._sums(pairs, self._logps))

    def _logps(self, rows: Sequence[EncodedPair]) -> tuple[mx.array, np.ndarray]:
        logps, membership, _ = self._forward.run(rows, grad=False)
        return logps, membership

    def reference_logps(self, pairs: Sequence[EncodedPair]) -> PairLogps:
        """Like :meth:`logps`, of the base: the adapters are swapped out, exactly."""
        with adapters_off(self.model):
            return self.logps(pairs)

    def base_kl(self, pairs: Sequence[EncodedPair]) -> np.ndarray:
        """KL(base || model) in nats, summed over the tokens of each completion: float32 [B, 2], chosen and rejected.

        Both models read the same text and say what comes next; the base is the model with its adapters swapped out.
        """
        return self._sums(pairs, self._base_kl)

    def _base_kl(self, rows: Sequence[EncodedPair]) -> tuple[mx.array, np.ndarray]:
        tuned, membership = self._forward.predictions(rows)
        with adapters_off(self.model):
            base, _ = self._forward.predictions(rows)
        parts = []
        for (stream, p), (_, q) in zip(base, tuned, strict=True):
            with mx.stream(stream):
                parts.append(token_kl(self._forward.logits, p, q))
        return mx.concatenate(parts), membership

    def _sums(
        self,
        pairs: Sequence[EncodedPair],
        measure: Callable[[Sequence[EncodedPair]], tuple[mx.array, np.ndarray]],
    ) -> np.ndarray:
        """What ``measure`` says of each prediction of some rows, and their membership, summed: float32 [B, 2]."""
        sums = np.zeros((len(pairs), 2), np.float32)
        with blas_threads_within(1), _evaluating(self.model), mx.stream(self._streams[0]):
            for group in split_by_tokens(pairs, self.max_tokens):
                rows = [pairs[i] for i in group]
                self._prepare(rows)
                values, membership = measure(rows)
                sums[group] = np.array(mx.array(membership) @ values).reshape(-1, 2)
        return sums

    def loss_and_grad(
        self, window: Sequence[EncodedPair], reference: PairLogps | None, settings: LossSettings
    ) -> StepResult:
        """Loss and adapter gradient of all pairs of one optimizer step.

        ``reference`` holds the window's reference log-probs, in its order; None only for a reference-free loss,
        ValueError otherwise.
        """
        if reference is None:
            if not settings.reference_free:
                raise ValueError(f"the loss {settings.loss_type} needs reference log-probs")
            zeros = np.zeros(len(window), np.float32)
            reference = PairLogps(zeros, zeros, zeros, zeros)
        totals = _Totals(
            sum(pair.weight for pair in window), sum(pair.weight * len(pair.chosen_ids) for pair in window)
        )
        columns = np.zeros((len(window), 5), np.float32)
        loss, nll, tokens = 0.0, 0.0, 0
        grad: Gradients = {}
        with blas_threads_within(1), mx.stream(self._streams[0]):
            for group in split_by_tokens(window, self.max_tokens):
                rows = [window[i] for i in group]
                self._prepare(rows)
                part = self._group_grad(rows, reference.rows(group), settings, totals)
                mx.eval(part.last)
                loss += float(part.loss)
                nll += float(part.nll)
                columns[group] = np.array(part.columns)
                tokens += part.tokens
                grad = _add(grad, part.grad)
                mx.eval(grad)
        return StepResult(
            loss,
            nll,
            columns[:, 0],
            columns[:, 1],
            columns[:, 2],
            _pair_logps(window, columns[:, 3:]),
            tokens,
            grad,
        )

    def _group_grad(
        self, pairs: list[EncodedPair], reference: PairLogps, settings: LossSettings, totals: _Totals
    ) -> _Part:
        """The group's share of the window."""
        weights = mx.array(np.array([pair.weight for pair in pairs], np.float32))
        counts = _counts(pairs)
        trainable = Trainable(self.model)
        tokens = 0

        def loss(parameters: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            nonlocal tokens
            trainable.put(parameters)
            logps, membership, tokens = self._forward.run(pairs, grad=True, checkpoint=self.gradient_checkpointing)
            sums = (mx.array(membership) @ logps).reshape(-1, 2)
            policy = Policy(
                sums[:, 0],
                sums[:, 1],
                mx.array(reference.chosen),
                mx.array(reference.rejected),
                mx.array(counts[0].astype(np.float32)),
                mx.array(counts[1].astype(np.float32)),
            )
            out = preference_loss(policy, settings)
            nll = -mx.sum(weights * policy.chosen) / totals.chosen_tokens
            total = mx.sum(weights * out.losses) / totals.weight + settings.rpo_alpha * nll
            columns = mx.stack(
                [out.losses, out.rewards_chosen, out.rewards_rejected, policy.chosen, policy.rejected], axis=1
            )
            return total, nll, columns

        parameters = trainable.get()
        try:
            (total, nll, columns), grads = mx.value_and_grad(loss)(parameters)
        finally:
            trainable.put(parameters)  # the trace left its own arrays behind
        grad, last = _in_order(dict(zip(trainable.names, grads, strict=True)), columns)
        return _Part(total, nll, columns, grad, last, tokens)

    def _prepare(self, pairs: Sequence[EncodedPair]) -> None:
        if isinstance(self._forward, SharedForward):
            self._forward.prepare(pairs)


def _in_order(grad: Gradients, first: mx.array) -> tuple[Gradients, mx.array]:
    """``grad`` as a chain, top layer first, the order in which the backward pass finds it; and the chain's last link.

    With hundreds of gradients as outputs MLX would finish one stream's work before it began another's; with one
    output their operations alternate and all streams stay busy (see also ``model/device.py``).
    """
    chained, last = {}, first
    for name in reversed(grad):
        chained[name] = last = mx.depends(grad[name], last)
    return {name: chained[name] for name in grad}, last


def split_by_tokens(pairs: Sequence[EncodedPair], max_tokens: int) -> list[list[int]]:
    """Split rows into groups of about equal work, at most ``max_tokens`` each but for a single longer row.

    Rows with equal prompts stay side by side, so that the prompt is shared. Groups come longest first.
    """
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].prompt_ids.tolist())
    costs = _costs(pairs, order)
    total = sum(costs)
    wanted = max(1, -(-total // max_tokens))
    groups: list[list[int]] = []
    done, size = 0, 0
    for index, cost in zip(order, costs, strict=True):
        # A row goes to the group in which its middle token lands.
        number = min(wanted - 1, (2 * done + cost) * wanted // max(1, 2 * total))
        done += cost
        if not groups or number > len(groups) - 1 or size + cost > max_tokens:
            groups.append([])
            size, cost = 0, pairs[index].num_tokens  # its prompt is run again in a new group
        groups[-1].append(index)
        size += cost
    return sorted(groups, key=lambda group: -sum(pairs[i].num_tokens for i in group))


def _costs(pairs: Sequence[EncodedPair], order: list[int]) -> list[int]:
    """Tokens each row adds, in ``order``: what it shares with the row before it is free."""
    costs = []
    previous: EncodedPair | None = None
    for index in order:
        pair = pairs[index]
        answers = [pair.chosen_ids, pair.rejected_ids]
        shared = [np.empty(0, np.int32)]
        if previous is not None and np.array_equal(previous.prompt_ids, pair.prompt_ids):
            shared += [previous.chosen_ids, previous.rejected_ids]
            cost = 0
        else:
            cost = len(pair.prompt_ids)
        for answer in answers:
            cost += len(answer) - max(common_length(answer, other) for other in shared)
            shared.append(answer)
        costs.append(cost)
        previous = pair
    return costs


def _add(total: Gradients, part: Gradients) -> Gradients:
    return {name: total[name] + value for name, value in part.items()} if total else part


def _counts(pairs: Sequence[EncodedPair]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([len(pair.chosen_ids) for pair in pairs], np.int64),
        np.array([len(pair.rejected_ids) for pair in pairs], np.int64),
    )


def _pair_logps(pairs: Sequence[EncodedPair], sums: np.ndarray) -> PairLogps:
    return PairLogps(sums[:, 0], sums[:, 1], *_counts(pairs))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module._training = True
