"""Log-probs of every prediction of a batch of sequences, by the fastest path that gives the model's own numbers.

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

from localdpo.core.score import Members, SequenceLogps
from localdpo.dpo.anatomy import Anatomy, NotUnderstood, examine
from localdpo.dpo.attention import LaneAttention, PackedAttention, PackedCache
from localdpo.dpo.packing import PackedBatch, pack
from localdpo.dpo.recompute import is_gated_mlp, keeping
from localdpo.dpo.standin import StandIn
from localdpo.dpo.trunk import TrunkCache, gather, parts_of, scatter
from localdpo.model.device import on_cpu
from localdpo.model.frozen import linear_dims
from localdpo.sequences import TokenSequence

Path = Literal["shared", "plain"]
SCORE_COST = 800
"""What a score of attention costs, in weights of a product: exp and the rest against two operations a weight. Measured
on a CPU, where it parts the work into lanes."""

_MISFITS = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)
"""What a model raises whose insides are not what a path expects."""


class Forward(Protocol):
    """Runs S sequences, and says what they predict.

    Whoever takes gradients enters ``patch`` meanwhile: the backward pass may call the model's layers once more.
    """

    path: Path
    streams: list[mx.Stream]
    patch: PackedAttention

    def run(self, sequences: Sequence[TokenSequence], *, grad: bool, checkpoint: bool = False) -> SequenceLogps:
        """Log-probs of all completions' tokens; ``checkpoint`` computes activations again in the backward pass."""
        ...

    def predictions(self, sequences: Sequence[TokenSequence]) -> tuple[list[tuple[mx.Stream, mx.array]], Members]:
        """What :meth:`logits` takes, a row for each prediction, on its stream; and the members of :meth:`run`."""
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

    def __init__(self, plain: PlainForward, anatomy: Anatomy) -> None:
        """``plain`` is the path of the same model that this one has to equal."""
        self.plain = plain
        self.anatomy = anatomy
        self.streams = plain.streams
        self.windows = _named_windows(plain.model)
        self.trunk: TrunkCache | None = None
        self.cut = 0
        self._gated = {id(layer) for layer in anatomy.layers if is_gated_mlp(layer)}
        self._at_hand: dict[str, np.ndarray] = {}
        self._fused = not on_cpu()
        self._heads = 0
        sizes = [math.prod(linear_dims(m)) for m in anatomy.layers[0].modules() if "weight" in m and m.weight.ndim > 1]
        self._layer_weights = max(1, sum(sizes))
        self.patch = plain.patch

    def start_at(self, trunk: TrunkCache, cut: int) -> bool:
        """From now on run only the layers from ``cut`` on, over states kept in ``trunk``.

        Proved first on a small batch; where it changes the numbers, every layer goes on running and False comes back.
        """
        sequences = _probe_sequences(self.anatomy.head.vocabulary)
        want = self.run(sequences, grad=False)
        self.trunk, self.cut = trunk, cut
        try:
            worst = _worst_difference(self.run(sequences, grad=False), want)
        except _MISFITS:  # layers that hand on more than hidden states
            worst = math.inf
        if worst <= _tolerance(self.anatomy):
            return True
        self.trunk, self.cut = None, 0
        return False

    def problem_at(self, longest: int) -> str:
        """Why the shared path cannot be used for sequences of ``longest`` tokens, or an empty string.

        The first proof goes to a few positions. Of a window that the configuration names and the model has not asked
        the cache for, it says nothing: once a sequence reaches beyond that, it is given again with such a length.
        """
        reached = sorted(window for window in self.windows if window < longest)
        self.windows -= set(reached)
        return _disagreement(self, reached[-1] + 8) if reached else ""

    def prepare(self, sequences: Sequence[TokenSequence]) -> None:
        """Have what enters layer ``cut`` at hand for :meth:`run`, until the next call.

        What the trunk cache does not know is computed, and kept there.
        """
        if self.trunk is None:
            return
        keys = dict.fromkeys(key for sequence in sequences for key, _ in parts_of(sequence))
        self._at_hand = {key: states for key in keys if (states := self.trunk.get(key)) is not None}
        missing = list({sequence.key: sequence for sequence in sequences if self._lacks(sequence)}.values())
        if missing:
            batch = self._pack(missing)
            found = scatter(batch, missing, self._below(batch))
            new = {key: states for key, states in found.items() if key not in self._at_hand}
            self.trunk.put(new)
            self._at_hand |= new

    def _lacks(self, sequence: TokenSequence) -> bool:
        return any(key not in self._at_hand for key, _ in parts_of(sequence))

    def _below(self, batch: PackedBatch) -> np.ndarray:
        """What enters layer ``cut``, float32 [T, D]."""
        layers = self.anatomy.layers
        skipped = [Skipped(layer) for layer in layers[self.cut :]]
        lanes = self._bodies(batch, lambda *_: [*layers[: self.cut], *skipped], final_norm=False)
        hidden = [states.astype(mx.float32) for states in lanes]
        mx.eval(hidden)
        return np.concatenate([np.array(states) for states in hidden])

    def run(self, sequences: Sequence[TokenSequence], *, grad: bool, checkpoint: bool = False) -> SequenceLogps:
        """See :class:`Forward`."""
        batch = self._pack(sequences)
        hidden, targets = self._read(batch, sequences, grad=grad, checkpoint=checkpoint), mx.array(batch.targets)
        logps = []
        for stream, rows in self._shares(len(batch.rows)):
            with mx.stream(stream):
                logps.append(self.anatomy.head.logps(hidden[rows], targets[rows], grad=grad))
        return SequenceLogps(mx.concatenate(logps), batch.members, len(batch.tokens))

    def predictions(self, sequences: Sequence[TokenSequence]) -> tuple[list[tuple[mx.Stream, mx.array]], Members]:
        """See :class:`Forward`: hidden states."""
        batch = self._pack(sequences)
        hidden = self._read(batch, sequences, grad=False).astype(mx.float32)
        return [(stream, hidden[rows]) for stream, rows in self._shares(len(batch.rows))], batch.members

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return self.anatomy.head.logits(predictions)

    def _pack(self, sequences: Sequence[TokenSequence]) -> PackedBatch:
        score_cost = SCORE_COST * self._heads / self._layer_weights
        return pack(sequences).in_lanes(len(self.streams), score_cost)

    def _shares(self, count: int) -> Iterator[tuple[mx.Stream, slice]]:
        """``count`` rows spread evenly over the streams."""
        lanes = min(count, len(self.streams))
        for lane in range(lanes):
            yield self.streams[lane], slice(count * lane // lanes, count * (lane + 1) // lanes)

    def _read(
        self, batch: PackedBatch, sequences: Sequence[TokenSequence], *, grad: bool, checkpoint: bool = False
    ) -> mx.array:
        """The hidden states that the predictions read, [N, D]."""
        layers, cut = self.anatomy.layers, self.cut
        if cut and any(map(self._lacks, sequences)):
            self.prepare(sequences)
        states = gather(batch, sequences, self._at_hand) if cut else None

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
                stand_ins = layers_of(tokens, caches)
                with self.patch, self.anatomy.replaced_layers(stand_ins, final_norm=final_norm):
                    out = self.anatomy.body(mx.array(batch.tokens[tokens])[:, None], cache=caches)
                hidden.append(out[:, 0])
                traced.append(caches)
                self._heads = max(self._heads, common.heads)
                self.windows -= common.windows
        return hidden


class PlainForward:
    """Every completion with its own prompt, right-padded: padding follows all real tokens, so no mask is needed."""

    path: Path = "plain"

    def __init__(self, model: nn.Module, anatomy: Anatomy | None, streams: list[mx.Stream]) -> None:
        self.model = model
        self.anatomy = anatomy
        self.streams = streams
        self.patch = PackedAttention(model, fast_activations=on_cpu())

    def run(self, sequences: Sequence[TokenSequence], *, grad: bool, checkpoint: bool = False) -> SequenceLogps:
        """See :class:`Forward`."""
        lanes, members = _padded(sequences, len(self.streams))
        logps = []
        for stream, (ids, rows, targets) in zip(self.streams, lanes, strict=False):
            with mx.stream(stream), self.patch:
                logps.append(self._predict(mx.array(ids), mx.array(rows), mx.array(targets), grad, checkpoint))
        tokens = sum(len(sequence.prompt_ids) + len(sequence.completion_ids) - 1 for sequence in sequences)
        return SequenceLogps(mx.concatenate(logps), members, tokens)

    def _predict(self, ids: mx.array, rows: mx.array, targets: mx.array, grad: bool, checkpoint: bool) -> mx.array:
        if self.anatomy is None:
            logits = self.model(ids).astype(mx.float32)
            return exact_logps(logits.reshape(-1, logits.shape[-1])[rows], targets)
        layers = self.anatomy.layers
        stand_ins = keeping(layers, checkpoint=checkpoint) if grad else list(layers)
        with self.anatomy.replaced_layers(stand_ins):
            hidden = self.anatomy.body(ids, cache=None)
        return self.anatomy.head.logps(hidden.reshape(-1, hidden.shape[-1])[rows], targets, grad=grad)

    def predictions(self, sequences: Sequence[TokenSequence]) -> tuple[list[tuple[mx.Stream, mx.array]], Members]:
        """See :class:`Forward`: hidden states, or the logits themselves of a model whose insides are not known."""
        lanes, members = _padded(sequences, len(self.streams))
        found = []
        for stream, (ids, rows, _) in zip(self.streams, lanes, strict=False):
            with mx.stream(stream), self.patch:
                tokens = mx.array(ids)
                out = self.model(tokens) if self.anatomy is None else self.anatomy.body(tokens, cache=None)
                found.append((stream, out.reshape(-1, out.shape[-1])[mx.array(rows)].astype(mx.float32)))
        return found, members

    def logits(self, predictions: mx.array) -> mx.array:
        """See :class:`Forward`."""
        return predictions if self.anatomy is None else self.anatomy.head.logits(predictions)


_Padded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids [n, width] right-padded; the flat rows that predict and their targets, int32 [N]."""


def _padded(sequences: Sequence[TokenSequence], lanes: int) -> tuple[list[_Padded], Members]:
    """The sequences in at most ``lanes`` batches of about equal work, longest first; predictions in their order."""
    inputs = [sequence.inputs for sequence in sequences]
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    sizes = np.array([len(inputs[index]) for index in order])
    done = np.cumsum(sizes)
    # A sequence goes to the lane in which its middle token lands.
    middle = done - sizes / 2
    members = [np.empty(0, np.int32)] * len(sequences)
    batches, column = [], 0
    for lane in range(lanes):
        mine = [index for index, at in zip(order, middle * lanes // done[-1], strict=True) if at == lane]
        if not mine:
            continue
        width = len(inputs[mine[0]])
        ids = np.stack([np.pad(inputs[index], (0, width - len(inputs[index]))) for index in mine])
        rows = []
        for place, index in enumerate(mine):
            last, size = place * width + len(inputs[index]), len(sequences[index].completion_ids)
            rows.append(np.arange(last - size, last))
            members[index] = np.arange(column, column + size, dtype=np.int32)
            column += size
        targets = np.concatenate([sequences[index].completion_ids for index in mine])
        batches.append((ids.astype(np.int32), np.concatenate(rows).astype(np.int32), targets.astype(np.int32)))
    return batches, tuple(members)


def _named_windows(model: nn.Module) -> set[int]:
    """Sizes of windows and chunks of attention that the model's configuration names."""
    found: set[int] = set()
    for module in (model, *model.children().values()):
        settings = getattr(module, "args", None) or getattr(module, "config", None)
        values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
        found |= {
            value
            for name, value in values.items()
            if isinstance(value, int) and value > 1 and ("window" in name or "chunk_size" in name)
        }
    return found


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
    shared = SharedForward(plain, anatomy)
    problem = _disagreement(shared)
    if not problem:
        return shared, "each shared prompt is run once; checked against the plain path"
    if path == "shared":
        raise NotUnderstood(problem)
    return plain, problem


def _disagreement(shared: SharedForward, length: int = 0) -> str:
    """Why the shared path cannot be used, or an empty string; ``length`` is that of the longest probe, if not short."""
    anatomy = shared.anatomy
    sequences = _probe_sequences(anatomy.head.vocabulary, length)
    want = shared.plain.run(sequences, grad=False)
    try:
        worst = _worst_difference(shared.run(sequences, grad=False), want)
    except _MISFITS as error:
        return f"this model's attention cannot share a prompt ({type(error).__name__})"
    if worst <= _tolerance(anatomy):
        return ""
    return f"this model's attention cannot share a prompt (differs by {worst:.1g} a token)"


def _worst_difference(got: SequenceLogps, want: SequenceLogps) -> float:
    """Of the completions' summed log-probs, per token; less counts where a token's are far below -10.

    They are differences of logits, and those are rounded by their size.
    """
    sums, exact = got.sums, want.sums
    worst = float(mx.max(mx.abs(sums - exact) / (want.lengths + mx.abs(exact) / 10)))
    return worst if math.isfinite(worst) else math.inf


def _tolerance(anatomy: Anatomy) -> float:
    # Half precision: two orders of the same sums differ by about an ulp a layer.
    return 1e-4 if anatomy.dtype == mx.float32 else 5e-2


def _probe_sequences(vocabulary: int, length: int = 0) -> list[TokenSequence]:
    """Two prompts with two answers each; the second prompt opens like the first: every kind of sharing is tried.

    The first prompt has ``length`` tokens, where that is more than a few.
    """

    def ids(length: int, seed: int) -> np.ndarray:
        return ((np.arange(length) * 7919 + seed * 104729 + 13) % vocabulary).astype(np.int32)

    opening = ids(10, 0)
    first, second = np.concatenate([opening, ids(max(11, length - 10), 1)]), np.concatenate([opening, ids(3, 4)])
    answers = [(first, ids(5, 2)), (first, ids(9, 3)), (second, ids(8, 5)), (second, ids(2, 6))]
    return [TokenSequence(prompt, answer) for prompt, answer in answers]
