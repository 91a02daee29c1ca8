"""Log-probs of every prediction of a batch of pairs, by the fastest path that gives the model's own numbers.

``SharedForward`` runs a packed batch: each shared prefix once, no padding, logits in tiles. ``PlainForward`` runs
every completion with its own prompt, right-padded, and is what any causal model can do. Both spread their rows over
the streams they are given, in lanes of about equal work. :func:`choose_forward` proves the first against the second
on a small batch with the model at hand, and says which one it took and why.

Neither knows anything about losses or references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.anatomy import Anatomy, NotUnderstood, examine
from localdpo.dpo.attention import LaneAttention, PackedCache, install
from localdpo.dpo.packing import PackedBatch, pack, sequence_of
from localdpo.dpo.recompute import is_gated_mlp, keeping
from localdpo.dpo.standin import StandIn
from localdpo.dpo.trunk import TrunkCache, gather, scatter
from localdpo.model.device import on_cpu
from localdpo.model.frozen import linear_dims

Path = Literal["shared", "plain"]
SCORE_COST = 800
"""What a score of attention costs, in weights of a product: exp and the rest against two operations a weight. Measured
on a CPU, where it parts the work into lanes."""

_MISFITS = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)
"""What a model raises whose insides are not what a path expects."""


class Forward(Protocol):
    """Runs B pairs; returns their predictions' log-probs [N] and how the 2B completions are made of them."""

    path: Path
    streams: list[mx.Stream]

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """Log-probs float32 [N]; membership float32 [2B, N], 1 where a prediction belongs; tokens run."""
        ...

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[list[tuple[mx.Stream, mx.array]], np.ndarray]:
        """What :meth:`logits` takes, a row for each prediction, on its stream; and the membership of :meth:`run`."""
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

    def __init__(self, model: nn.Module, anatomy: Anatomy, streams: list[mx.Stream]) -> None:
        self.anatomy = anatomy
        self.streams = streams
        self.trunk: TrunkCache | None = None
        self.cut = 0
        self._gated = {id(layer) for layer in anatomy.layers if is_gated_mlp(layer)}
        self._at_hand: dict[str, np.ndarray] = {}
        self._fused = not on_cpu()
        self._heads = 0
        sizes = [math.prod(linear_dims(m)) for m in anatomy.layers[0].modules() if "weight" in m and m.weight.ndim > 1]
        self._layer_weights = max(1, sum(sizes))
        install(model, fast_activations=on_cpu())

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

    def prepare(self, pairs: Sequence[EncodedPair]) -> None:
        """Have what enters layer ``cut`` at hand for :meth:`run`, until the next call.

        What the trunk cache does not know is computed, and kept there.
        """
        if self.trunk is None:
            return
        self._at_hand = {pair.key: state for pair in pairs if (state := self.trunk.get(pair)) is not None}
        missing = list({pair.key: pair for pair in pairs if pair.key not in self._at_hand}.values())
        if missing:
            batch = self._pack(missing)
            found = scatter(batch, missing, self._below(batch))
            self.trunk.put(missing, found)
            self._at_hand |= {pair.key: state for pair, state in zip(missing, found, strict=True)}

    def _below(self, batch: PackedBatch) -> np.ndarray:
        """What enters layer ``cut``, float32 [T, D]."""
        layers = self.anatomy.layers
        skipped = [Skipped(layer) for layer in layers[self.cut :]]
        lanes = self._bodies(batch, lambda *_: [*layers[: self.cut], *skipped], final_norm=False)
        hidden = [states.astype(mx.float32) for states in lanes]
        mx.eval(hidden)
        return np.concatenate([np.array(states) for states in hidden])

    def states(self, pairs: Sequence[EncodedPair]) -> list[np.ndarray]:
        """What enters layer ``cut``, float32 [rows, D] for each pair."""
        if any(pair.key not in self._at_hand for pair in pairs):
            self.prepare(pairs)
        return [self._at_hand[pair.key] for pair in pairs]

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """See :class:`Forward`."""
        batch = self._pack(pairs)
        hidden, targets = self._read(batch, pairs, grad=grad, checkpoint=checkpoint), mx.array(batch.targets)
        logps = []
        for stream, rows in self._shares(len(batch.rows)):
            with mx.stream(stream):
                logps.append(self.anatomy.head.logps(hidden[rows], targets[rows], grad=grad))
        return mx.concatenate(logps), batch.membership(), len(batch.tokens)

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[list[tuple[mx.Stream, mx.array]], np.ndarray]:
        """See :class:`Forward`: hidden states."""
        batch = self._pack(pairs)
        hidden = self._read(batch, pairs, grad=False).astype(mx.float32)
        return [(stream, hidden[rows]) for stream, rows in self._shares(len(batch.rows))], batch.membership()

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return self.anatomy.head.logits(predictions)

    def _pack(self, pairs: Sequence[EncodedPair]) -> PackedBatch:
        score_cost = SCORE_COST * self._heads / self._layer_weights
        return pack(pairs).in_lanes(len(self.streams), score_cost)

    def _shares(self, count: int) -> Iterator[tuple[mx.Stream, slice]]:
        """``count`` rows spread evenly over the streams."""
        lanes = min(count, len(self.streams))
        for lane in range(lanes):
            yield self.streams[lane], slice(count * lane // lanes, count * (lane + 1) // lanes)

    def _read(
        self, batch: PackedBatch, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> mx.array:
        """The hidden states that the predictions read, [N, D]."""
        layers, cut = self.anatomy.layers, self.cut
        states = gather(batch, pairs, self.states(pairs)) if cut else None

        def layers_of(lane: slice, caches: list[PackedCache]) -> list[Any]:
            run, its_caches = layers[cut:], caches[cut:]
            stand_ins = keeping(run, checkpoint=checkpoint, gated=self._gated, caches=its_caches) if grad else list(run)
            if states is None:
                return stand_ins
            entering = Skipped(layers[cut - 1], mx.array(states[lane])[:, None])
            return [*(Skipped(layer) for layer in layers[: cut - 1]), entering, *stand_ins]

        return mx.concatenate(self._bodies(batch, layers_of))[mx.array(batch.rows)]

    def _bodies(
        self,
        batch: PackedBatch,
        layers_of: Callable[[slice, list[PackedCache]], Sequence[Any]],
        *,
        final_norm: bool = True,
    ) -> list[mx.array]:
        """The body's output [n, D] for the n tokens of each lane, on its stream; before its last norm where asked.

        ``layers_of`` says which layers to run for a lane's tokens and with its caches.
        """
        hidden: list[mx.array] = []
        traced: list[list[PackedCache]] = []
        for number, (lane, stream) in enumerate(zip(batch.lanes, self.streams, strict=False)):
            with mx.stream(stream):
                common = LaneAttention(batch, fused=self._fused, lane=number)
                caches = [
                    PackedCache(common, [earlier[index] for earlier in traced])
                    for index in range(len(self.anatomy.layers))
                ]
                tokens = slice(*lane)
                with self.anatomy.replaced_layers(layers_of(tokens, caches), final_norm=final_norm):
                    out = self.anatomy.body(mx.array(batch.tokens[tokens])[:, None], cache=caches)
                hidden.append(out[:, 0])
                traced.append(caches)
                self._heads = max(self._heads, common.heads)
        return hidden


class PlainForward:
    """Every completion with its own prompt, right-padded: padding follows all real tokens, so no mask is needed."""

    path: Path = "plain"

    def __init__(self, model: nn.Module, anatomy: Anatomy | None, streams: list[mx.Stream]) -> None:
        self.model = model
        self.anatomy = anatomy
        self.streams = streams

    def run(
        self, pairs: Sequence[EncodedPair], *, grad: bool, checkpoint: bool = False
    ) -> tuple[mx.array, np.ndarray, int]:
        """See :class:`Forward`."""
        lanes, membership = _padded(pairs, len(self.streams))
        logps = []
        for stream, (ids, rows, targets) in zip(self.streams, lanes, strict=False):
            with mx.stream(stream):
                logps.append(self._predict(mx.array(ids), mx.array(rows), mx.array(targets), grad, checkpoint))
        tokens = sum(pair.num_tokens + len(pair.prompt_ids) - 2 for pair in pairs)
        return mx.concatenate(logps), membership, tokens

    def _predict(self, ids: mx.array, rows: mx.array, targets: mx.array, grad: bool, checkpoint: bool) -> mx.array:
        if self.anatomy is None:
            logits = self.model(ids).astype(mx.float32)
            return exact_logps(logits.reshape(-1, logits.shape[-1])[rows], targets)
        layers = self.anatomy.layers
        stand_ins = keeping(layers, checkpoint=checkpoint) if grad else list(layers)
        with self.anatomy.replaced_layers(stand_ins):
            hidden = self.anatomy.body(ids, cache=None)
        return self.anatomy.head.logps(hidden.reshape(-1, hidden.shape[-1])[rows], targets, grad=grad)

    def predictions(self, pairs: Sequence[EncodedPair]) -> tuple[list[tuple[mx.Stream, mx.array]], np.ndarray]:
        """See :class:`Forward`: hidden states, or the logits themselves of a model whose insides are not known."""
        lanes, membership = _padded(pairs, len(self.streams))
        found = []
        for stream, (ids, rows, _) in zip(self.streams, lanes, strict=False):
            with mx.stream(stream):
                tokens = mx.array(ids)
                out = self.model(tokens) if self.anatomy is None else self.anatomy.body(tokens, cache=None)
                found.append((stream, out.reshape(-1, out.shape[-1])[mx.array(rows)].astype(mx.float32)))
        return found, membership

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return predictions if self.anatomy is None else self.anatomy.head.logits(predictions)


_Padded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids [n, width] right-padded; the flat rows that predict and their targets, int32 [N]."""


def _padded(pairs: Sequence[EncodedPair], lanes: int) -> tuple[list[_Padded], np.ndarray]:
    """The completions in at most ``lanes`` batches of about equal work, longest first; membership [2B, all N]."""
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    sequences = [sequence_of(pair, chosen) for pair in pairs for chosen in (True, False)]
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    sizes = np.array([len(sequences[index]) for index in order])
    done = np.cumsum(sizes)
    # A completion goes to the lane in which its middle token lands.
    middle = done - sizes / 2
    membership = np.zeros((len(sequences), sum(map(len, completions))), np.float32)
    batches, column = [], 0
    for lane in range(lanes):
        mine = [index for index, at in zip(order, middle * lanes // done[-1], strict=True) if at == lane]
        if not mine:
            continue
        width = len(sequences[mine[0]])
        ids = np.stack([np.pad(sequences[index], (0, width - len(sequences[index]))) for index in mine])
        rows = []
        for place, index in enumerate(mine):
            last, size = place * width + len(sequences[index]), len(completions[index])
            rows.append(np.arange(last - size, last))
            membership[index, column : column + size] = 1.0
            column += size
        targets = np.concatenate([completions[index] for index in mine])
        batches.append((ids.astype(np.int32), np.concatenate(rows).astype(np.int32), targets.astype(np.int32)))
    return batches, membership


def exact_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """log softmax(logits)[target]: logits float32 [N, V], targets int [N] -> float32 [N].

    The maximum is taken away first and the sum is MLX's pairwise one: on a CPU ``mx.logsumexp`` adds one term at a
    time, which at 49,152 terms is off by 3e-4.
    """
    shifted = logits - mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    picked = mx.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return picked - mx.log(mx.sum(mx.exp(shifted), axis=-1))


def choose_forward(
    model: nn.Module,
    path: Literal["auto", "shared", "plain"] = "auto",
    streams: Sequence[mx.Stream] = (),
) -> tuple[Forward, str]:
    """The forward to use, over ``streams`` or the default one, and the reason in words.

    ``path`` forces one; forcing "shared" may raise NotUnderstood.
    """
    lanes = list(streams) or [mx.default_stream(mx.default_device())]
    try:
        anatomy = examine(model)
    except NotUnderstood as error:
        if path == "shared":
            raise
        return PlainForward(model, None, lanes), f"this model's insides are not known ({error})"
    plain = PlainForward(model, anatomy, lanes)
    if path == "plain":
        return plain, "asked for"
    shared = SharedForward(model, anatomy, lanes)
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
    """Of the completions' summed log-probs, per token; less counts where a token's are far below -10.

    They are differences of logits, and those are rounded by their size.
    """
    sums, exact = (mx.array(membership) @ logps for logps, membership, _ in (got, want))
    tokens = mx.array(want[1].sum(axis=1))
    worst = float(mx.max(mx.abs(sums - exact) / (tokens + mx.abs(exact) / 10)))
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
