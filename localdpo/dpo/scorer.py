"""The fast scorer: sequences packed into token trees, micro-batches over several streams.

A window of rows (one optimizer step, whatever its batch size and accumulation) is split into micro-batches by
length; the method's loss is normalised by the whole window, so the split never shows in the result. On a CPU each
micro-batch runs on several streams. It knows nothing about files, schedules, optimizers or what a loss is for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.core.score import (
    CoreScorer,
    Gradients,
    Scorer,
    SequenceLogps,
    StepResult,
    WindowLoss,
    evaluating,
)
from localdpo.dpo.budget import CPU_STREAMS, MICRO_BATCH_TOKENS, mode_of
from localdpo.dpo.divergence import token_kl
from localdpo.dpo.forward import Path, SharedForward, choose_forward
from localdpo.dpo.standin import Trainable
from localdpo.dpo.trunk import TrunkCache
from localdpo.errors import InputError, Problem
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import core_streams, on_cpu
from localdpo.model.frozen import is_lean, linear_dims
from localdpo.model.lora import adapters_off
from localdpo.sequences import EncodedRow, TokenSequence, common_length, num_tokens, same_prompt, sequences_of

ENGINE = "LOCALDPO_ENGINE"
"""Environment variable: "core" scores and trains by the plain forward pass alone."""


def make_scorer(model: nn.Module, *, gradient_checkpointing: bool = False) -> Scorer:
    """The scorer for ``model``: the fast one, unless the environment asks for the plain one. Raises InputError."""
    engine = os.environ.get(ENGINE, "")
    if engine not in ("", "fast", "core"):
        raise InputError(Problem(ENGINE, f"is {engine!r}, which names no engine", "Set it to fast or core"))
    if engine == "core":
        return CoreScorer(model)
    return FastScorer(model, gradient_checkpointing=gradient_checkpointing)


class _Part(NamedTuple):
    """A micro-batch's share of a window: loss, columns [b, C], gradient. Evaluating ``last`` evaluates all."""

    loss: mx.array
    columns: mx.array
    grad: Gradients
    last: mx.array
    tokens: int


class FastScorer:
    """Log-probs and gradients of sequences under ``model``; see :class:`localdpo.core.score.Scorer`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_checkpointing: bool = False,
        path: Literal["auto", "shared", "plain"] = "auto",
        max_tokens: int | None = None,
    ) -> None:
        """``max_tokens`` bounds a micro-batch (a longer single row still runs, alone)."""
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        mode = mode_of("cpu" if on_cpu() else "gpu", "lean" if is_lean(model) else "")
        self.max_tokens = max_tokens or MICRO_BATCH_TOKENS[mode]
        self._streams = core_streams(CPU_STREAMS[mode])
        with blas_threads_within(1), evaluating(model):
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
        with blas_threads_within(1), evaluating(self.model):
            return forward.start_at(TrunkCache(folder, name, linear_dims(forward.anatomy.head.module)[0]), cut)

    @property
    def trunk_bytes(self) -> int:
        """Bytes on disk of the hidden states in use, 0 without them."""
        trunk = self._forward.trunk if isinstance(self._forward, SharedForward) else None
        return trunk.nbytes if trunk is not None else 0

    def logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        return self._summed(sequences, lambda some: self._forward.run(some, grad=False))

    def reference_logps(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        with adapters_off(self.model):
            return self.logps(sequences)

    def base_kl(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """See :class:`Scorer`."""
        return self._summed(sequences, self._base_kl)

    def _base_kl(self, sequences: Sequence[TokenSequence]) -> SequenceLogps:
        """KL in place of log-probs."""
        tuned, members = self._forward.predictions(sequences)
        with adapters_off(self.model):
            base, _ = self._forward.predictions(sequences)
        parts = []
        for (stream, p), (_, q) in zip(base, tuned, strict=True):
            with mx.stream(stream):
                parts.append(token_kl(self._forward.logits, p, q))
        return SequenceLogps(mx.concatenate(parts), members, 0)

    def _summed(
        self, sequences: Sequence[TokenSequence], measure: Callable[[Sequence[TokenSequence]], SequenceLogps]
    ) -> np.ndarray:
        """What ``measure`` says of each prediction, summed for each sequence: float32 [S]."""
        sums = np.zeros(len(sequences), np.float32)
        bundles = list(_bundles(sequences, self.max_tokens))
        with blas_threads_within(1), evaluating(self.model), mx.stream(self._streams[0]):
            self._reach(sequences)
            for group in split_by_tokens([[sequences[i] for i in bundle] for bundle in bundles], self.max_tokens):
                index = [i for number in group for i in bundles[number]]
                some = [sequences[i] for i in index]
                self._prepare(some)
                sums[index] = np.array(measure(some).sums)
        return sums

    def loss_and_grad(self, window: Sequence[EncodedRow], loss: WindowLoss) -> StepResult:
        """See :class:`Scorer`."""
        columns = np.zeros((len(window), len(loss.columns)), np.float32)
        total, tokens = 0.0, 0
        grad: Gradients = {}
        with blas_threads_within(1), mx.stream(self._streams[0]):
            self._reach(sequences_of(window))
            for group in split_by_tokens([row.sequences for row in window], self.max_tokens):
                sequences = sequences_of(window[i] for i in group)
                self._prepare(sequences)
                part = self._group_grad(group, sequences, loss)
                mx.eval(part.last)
                total += float(part.loss)
                columns[group] = np.array(part.columns)
                tokens += part.tokens
                grad = _add(grad, part.grad)
                mx.eval(grad)
        return StepResult(total, dict(zip(loss.columns, columns.T, strict=True)), tokens, grad)

    def _group_grad(self, rows: list[int], sequences: list[TokenSequence], loss: WindowLoss) -> _Part:
        """The group's share of the window."""
        trainable = Trainable(self.model)
        tokens = 0

        def share(parameters: list[mx.array]) -> tuple[mx.array, mx.array]:
            nonlocal tokens
            trainable.put(parameters)
            logps = self._forward.run(sequences, grad=True, checkpoint=self.gradient_checkpointing)
            tokens = logps.tokens_run
            return loss.share(rows, logps)

        parameters = trainable.get()
        try:
            with self._forward.patch:
                (total, columns), grads = mx.value_and_grad(share)(parameters)
        finally:
            trainable.put(parameters)  # the trace left its own arrays behind
        grad, last = _in_order(dict(zip(trainable.names, grads, strict=True)), columns)
        return _Part(total, columns, grad, last, tokens)

    def _reach(self, sequences: Sequence[TokenSequence]) -> None:
        """Go over to the plain path where sequences of this length turn out to need it."""
        if isinstance(self._forward, SharedForward) and sequences:
            longest = max(len(sequence.prompt_ids) + len(sequence.completion_ids) - 1 for sequence in sequences)
            with evaluating(self.model):
                problem = self._forward.problem_at(longest)
            if problem:
                self._forward, self.path_reason = self._forward.plain, problem

    def _prepare(self, sequences: Sequence[TokenSequence]) -> None:
        if isinstance(self._forward, SharedForward):
            self._forward.prepare(sequences)


def _in_order(grad: Gradients, first: mx.array) -> tuple[Gradients, mx.array]:
    """``grad`` as a chain, top layer first, the order in which the backward pass finds it; and the chain's last link.

    With hundreds of gradients as outputs MLX would finish one stream's work before it began another's; with one
    output their operations alternate and all streams stay busy (see also ``model/device.py``).
    """
    chained, last = {}, first
    for name in reversed(grad):
        chained[name] = last = mx.depends(grad[name], last)
    return {name: chained[name] for name in grad}, last


def _bundles(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[int]]:
    """Neighbours with equal prompts, which are best run together, in bundles of at most ``max_tokens``."""
    bundle: list[int] = []
    size = 0
    for index, sequence in enumerate(sequences):
        tokens = len(sequence.completion_ids)
        if not bundle or not same_prompt(sequences[bundle[0]], sequence) or size + tokens > max_tokens:
            if bundle:
                yield bundle
            bundle, size = [], len(sequence.prompt_ids)
        bundle.append(index)
        size += tokens
    if bundle:
        yield bundle


def split_by_tokens(rows: Sequence[Sequence[TokenSequence]], max_tokens: int) -> list[list[int]]:
    """Split rows of sequences into groups of about equal work, at most ``max_tokens`` each but for a longer row.

    Rows with equal prompts stay side by side, so that the prompt is shared. Groups come longest first.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i][0].prompt_ids.tolist())
    sizes = [num_tokens(row) for row in rows]
    costs = _costs(rows, order)
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
            size, cost = 0, sizes[index]  # its prompt is run again in a new group
        groups[-1].append(index)
        size += cost
    return sorted(groups, key=lambda group: -sum(sizes[i] for i in group))


def _costs(rows: Sequence[Sequence[TokenSequence]], order: list[int]) -> list[int]:
    """Tokens each row adds, in ``order``: what it shares with those of the same prompt before it is free."""
    costs = []
    before: list[TokenSequence] = []
    for index in order:
        cost = 0
        for sequence in rows[index]:
            if before and same_prompt(before[-1], sequence):
                shared = max(common_length(sequence.completion_ids, other.completion_ids) for other in before)
            else:
                before, shared = [], -len(sequence.prompt_ids)
            cost += len(sequence.completion_ids) - shared
            before.append(sequence)
        costs.append(cost)
    return costs


def _add(total: Gradients, part: Gradients) -> Gradients:
    return {name: total[name] + value for name, value in part.items()} if total else part
