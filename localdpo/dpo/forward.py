"""Log-probs of every prediction of a batch of pairs, by the fastest path that gives the model's own numbers.

``SharedForward`` runs a packed batch: each shared prefix once, no padding, logits in tiles. ``PlainForward`` runs
every completion with its own prompt, right-padded, and is what any causal model can do. :func:`choose_forward`
proves the first against the second on a small batch with the model at hand, and says which one it took and why.

Neither knows anything about losses or references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.anatomy import Anatomy, NotUnderstood, examine
from localdpo.dpo.attention import PackedCache, install
from localdpo.dpo.packing import PackedBatch, pack, sequence_of
from localdpo.dpo.recompute import StandIn, is_gated_mlp, keeping
from localdpo.dpo.trunk import TrunkCache, gather, scatter
from localdpo.model.device import on_cpu

Path = Literal["shared", "plain"]
_MISFITS = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)
"""What a model raises whose insides are not what a path expects."""


class Forward(Protocol):
    """Runs B pairs; returns their predictions' log-probs [N] and how the 2B completions are made of them."""

    path: Path

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """Log-probs float32 [N]; membership float32 [2B, N], 1 where a prediction belongs; tokens run."""
        ...

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[mx.array, np.ndarray]:
        """What :meth:`logits` takes, a row for each prediction [N, ...], and the membership of :meth:`run`."""
        ...

    def logits(self, predictions: mx.array) -> mx.array:
        """Logits float32 [n, V] of n rows of :meth:`predictions`; take few at a time."""
        ...


class Skipped(StandIn):
    """Stands in for a layer below the cut: hands on what it gets, or ``states`` in its place."""

    def __init__(self, layer: nn.Module, states: mx.array | None = None) -> None:
        super().__init__(layer)
        self._states = states

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """The states, whatever came in."""
        return hidden if self._states is None else self._states.astype(hidden.dtype)


class SharedForward:
    """The packed path, for models taken apart by ``anatomy`` whose attention goes through the cache."""

    path: Path = "shared"

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.trunk: TrunkCache | None = None
        self.cut = 0
        self._frugal = False
        self._gated: set[int] = set()
        self._at_hand: dict[str, np.ndarray] = {}
        self._fused = not on_cpu()
        install(model, fast_activations=on_cpu())

    def keep_little(self) -> None:
        """From now on keep less for the backward pass (``recompute.Frugal``), for some 8 % more time.

        The numbers stay the same.
        """
        self._frugal = True
        self._gated = {id(layer) for layer in self.anatomy.layers if is_gated_mlp(layer)}

    def start_at(self, trunk: TrunkCache, cut: int) -> bool:
        """From now on run only the layers from ``cut`` on, over states kept in ``trunk``.

        Proved first on a small batch; where it changes the numbers, every layer goes on running and False comes back.
        """
        pairs = _probe_pairs(self.anatomy.head.vocabulary)
        want = self.run(pairs, grad=False)
        self.trunk, self.cut = trunk, cut
        try:
            worst = _worst_difference(self.run(pairs, grad=False), want)
        except _MISFITS:  # layers that hand on more than hidden states
            worst = math.inf
        if worst <= _tolerance(self.anatomy):
            return True
        self.trunk, self.cut = None, 0
        return False

    def prepare(self, groups: Sequence[Sequence[EncodedPair]], streams: Sequence[mx.Stream]) -> None:
        """Have what enters layer ``cut`` at hand for :meth:`run`, until the next call.

        What the trunk cache does not know is computed, a group on each stream, side by side, and kept there.
        """
        if self.trunk is None:
            return
        self._at_hand = {
            pair.key: state for pairs in groups for pair in pairs if (state := self.trunk.get(pair)) is not None
        }
        work = []
        for stream, pairs in zip(streams, groups, strict=False):
            missing = list({pair.key: pair for pair in pairs if pair.key not in self._at_hand}.values())
            if missing:
                with mx.stream(stream):
                    work.append((missing, *self._below(missing)))
        mx.eval([hidden for _, _, hidden in work])
        for missing, batch, hidden in work:
            found = scatter(batch, missing, np.array(hidden))
            self.trunk.put(missing, found)
            self._at_hand |= {pair.key: state for pair, state in zip(missing, found, strict=True)}

    def _below(self, pairs: Sequence[EncodedPair]) -> tuple[PackedBatch, mx.array]:
        """Pairs as a batch, and what enters layer ``cut`` for it, float32 [T, D]."""
        batch = pack(pairs)
        layers = self.anatomy.layers
        above = [Skipped(layer) for layer in layers[self.cut :]]
        hidden = self._body(batch, [*layers[: self.cut], *above], final_norm=False)
        return batch, hidden.astype(mx.float32)

    def states(self, pairs: Sequence[EncodedPair]) -> list[np.ndarray]:
        """What enters layer ``cut``, float32 [rows, D] for each pair."""
        if any(pair.key not in self._at_hand for pair in pairs):
            self.prepare([pairs], [mx.default_stream(mx.default_device())])
        return [self._at_hand[pair.key] for pair in pairs]

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """See :class:`Forward`."""
        batch = pack(pairs)
        layers = self.anatomy.layers
        stand_ins = keeping(layers, checkpoint=checkpoint, gated=self._gated) if grad else layers
        hidden = self._body(batch, self._layers(batch, pairs, stand_ins))
        logps = self.anatomy.head.logps(hidden[mx.array(batch.rows)], mx.array(batch.targets), grad=grad)
        return logps, batch.membership(), len(batch.tokens)

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[mx.array, np.ndarray]:
        """See :class:`Forward`: hidden states."""
        batch = pack(pairs)
        hidden = self._body(batch, self._layers(batch, pairs, self.anatomy.layers))
        return hidden[mx.array(batch.rows)].astype(mx.float32), batch.membership()

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return self.anatomy.head.logits(predictions)

    def _body(self, batch: PackedBatch, layers: Sequence[Any], *, final_norm: bool = True) -> mx.array:
        """The body's output [T, D], before its last norm where asked."""
        cache = PackedCache(batch, fused=self._fused, frugal=self._frugal)
        with self.anatomy.replaced_layers(layers, final_norm=final_norm):
            out = self.anatomy.body(mx.array(batch.tokens)[:, None], cache=[cache] * len(layers))
        hidden: mx.array = out[:, 0]
        return hidden

    def _layers(self, batch: PackedBatch, pairs: Sequence[EncodedPair], layers: Sequence[Any]) -> list[Any]:
        above = list(layers[self.cut :])
        if not self.cut:
            return above
        states = mx.array(gather(batch, pairs, self.states(pairs)))[:, None]
        below = self.anatomy.layers[: self.cut]
        return [*(Skipped(layer) for layer in below[:-1]), Skipped(below[-1], states), *above]


class PlainForward:
    """Every completion with its own prompt, right-padded: padding follows all real tokens, so no mask is needed."""

    path: Path = "plain"

    def __init__(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        self.model = model
        self.anatomy = anatomy

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """See :class:`Forward`."""
        ids, rows, targets, membership = _padded(pairs)
        logps = self._predict(mx.array(ids), mx.array(rows), mx.array(targets), grad, checkpoint)
        return logps, membership, sum(pair.num_tokens + len(pair.prompt_ids) - 2 for pair in pairs)

    def _predict(self, ids: mx.array, rows: mx.array, targets: mx.array, grad: bool, checkpoint: bool) -> mx.array:
        if self.anatomy is None:
            logits = self.model(ids).astype(mx.float32)
            return exact_logps(logits.reshape(-1, logits.shape[-1])[rows], targets)
        layers = self.anatomy.layers
        stand_ins = keeping(layers, checkpoint=checkpoint) if grad else list(layers)
        with self.anatomy.replaced_layers(stand_ins):
            hidden = self.anatomy.body(ids, cache=None)
        return self.anatomy.head.logps(hidden.reshape(-1, hidden.shape[-1])[rows], targets, grad=grad)

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[mx.array, np.ndarray]:
        """See :class:`Forward`: hidden states, or the logits themselves of a model whose insides are not known."""
        ids, rows, _, membership = _padded(pairs)
        out = self.model(mx.array(ids)) if self.anatomy is None else self.anatomy.body(mx.array(ids), cache=None)
        return out.reshape(-1, out.shape[-1])[mx.array(rows)].astype(mx.float32), membership

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return predictions if self.anatomy is None else self.anatomy.head.logits(predictions)


def _padded(pairs: Sequence[EncodedPair]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids [2B, width] right-padded; the flat rows that predict and their targets, int32 [N]; membership [2B, N]."""
    sequences = [sequence_of(pair, chosen) for pair in pairs for chosen in (True, False)]
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    width = max(len(sequence) for sequence in sequences)
    ids = np.stack([np.pad(sequence, (0, width - len(sequence))) for sequence in sequences])
    rows, membership = [], np.zeros((len(sequences), sum(map(len, completions))), np.float32)
    done = 0
    for index, (sequence, completion) in enumerate(zip(sequences, completions, strict=True)):
        last = index * width + len(sequence)
        rows.append(np.arange(last - len(completion), last))
        membership[index, done : done + len(completion)] = 1.0
        done += len(completion)
    targets = np.concatenate(completions).astype(np.int32)
    return ids.astype(np.int32), np.concatenate(rows).astype(np.int32), targets, membership


def exact_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """log softmax(logits)[target]: logits float32 [N, V], targets int [N] -> float32 [N].

    The maximum is taken away first and the sum is MLX's pairwise one: on a CPU ``mx.logsumexp`` adds one term at a
    time, which at 49,152 terms is off by 3e-4.
    """
    shifted = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    picked = mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return picked - mx.log(mx.sum(mx.exp(shifted), axis=-1))


def choose_forward(model: nn.Module, path: Literal["auto", "shared", "plain"] = "auto") -> tuple[Forward, str]:
    """The forward to use and the reason in words. ``path`` forces one; forcing "shared" may raise NotUnderstood."""
    try:
        anatomy = examine(model)
    except NotUnderstood as error:
        if path == "shared":
            raise
        return PlainForward(model, None), f"this model's insides are not known ({error})"
    plain = PlainForward(model, anatomy)
    if path == "plain":
        return plain, "asked for"
    shared = SharedForward(model, anatomy)
    problem = _disagreement(shared, plain)
    if not problem:
        return shared, "each shared prompt is run once; checked against the plain path"
    if path == "shared":
        raise NotUnderstood(problem)
    return plain, problem


def _disagreement(shared: SharedForward, plain: PlainForward) -> str:
    """Why the shared path cannot be used, or an empty string."""
    anatomy = shared.anatomy
    pairs = _probe_pairs(anatomy.head.vocabulary)
    want = plain.run(pairs, grad=False)
    try:
        worst = _worst_difference(shared.run(pairs, grad=False), want)
    except _MISFITS as error:
        return f"this model's attention cannot share a prompt ({type(error).__name__})"
    if worst <= _tolerance(anatomy):
        return ""
    return f"this model's attention cannot share a prompt (differs by {worst:.1g} a token)"


def _worst_difference(got: tuple[mx.array, np.ndarray, int], want: tuple[mx.array, np.ndarray, int]) -> float:
    """Of the completions' summed log-probs, per token."""
    sums = [mx.array(membership) @ logps for logps, membership, _ in (got, want)]
    worst = float(mx.max(mx.abs(sums[0] - sums[1]) / mx.array(want[1].sum(axis=1))))
    return worst if math.isfinite(worst) else math.inf


def _tolerance(anatomy: Anatomy) -> float:
    # Half precision: two orders of the same sums differ by about an ulp a layer.
    return 1e-4 if anatomy.dtype == mx.float32 else 5e-2


def _probe_pairs(vocabulary: int) -> list[EncodedPair]:
    """Two pairs of which the second's prompt opens like the first's, so that every kind of sharing is tried."""

    def ids(length: int, seed: int) -> np.ndarray:
        return ((np.arange(length) * 7919 + seed * 104729 + 13) % vocabulary).astype(np.int32)

    opening = ids(10, 0)
    first = EncodedPair(np.concatenate([opening, ids(11, 1)]), ids(5, 2), ids(9, 3))
    second = EncodedPair(np.concatenate([opening, ids(3, 4)]), ids(8, 5), ids(2, 6))
    return [first, second]
