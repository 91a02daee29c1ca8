"""How far a fused model agrees with the base and its adapter, measured before anything is written.

Both answer the same prompts greedily, and along the adapter's answers their next-token distributions are compared
(Kullback-Leibler divergence, nats a token). The same divergence between the adapter and the bare base says what there
was to lose. It works on one loaded model: the layers are swapped after the first half.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from localdpo.data.pairs import Message, read_pairs, read_prompts
from localdpo.errors import InputError
from localdpo.export.fold import Delta, Form, put, stored_layer
from localdpo.export.source import Source
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import on_cpu
from localdpo.model.frozen import compute_in_float32
from localdpo.model.generate import batch_greedy
from localdpo.model.load import LoadedModel
from localdpo.model.lora import adapters_off, detach_lora
from localdpo.paths import recipes_dir
from localdpo.sequences import Ids
from localdpo.train.inputs import EVERYDAY
from localdpo.train.snapshot import copies

PROMPTS = 24
ANSWER_TOKENS = 24
MOST_KL = 0.01
LEAST_EQUAL = 0.9
ROUNDING_KL = 1e-3
"""A fused model agrees when it is at most MOST_KL nats a token from base and adapter, and LEAST_EQUAL of its answers
are the same to the letter. Below ROUNDING_KL an answer differs only where two tokens were as good as tied."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Figures over ``prompts`` prompts and ``tokens`` answer tokens.

    ``kl`` is the mean divergence of the fused model from base and adapter, ``kl_base`` that of the bare base, in nats
    a token; ``equal`` counts equal greedy answers. ``asked`` says where the prompts are from.
    """

    prompts: int
    tokens: int
    kl: float
    kl_base: float
    equal: int
    asked: str

    @property
    def lossy(self) -> bool:
        """Whether the fused model is another one than base and adapter."""
        return self.kl > MOST_KL or (self.kl > ROUNDING_KL and self.equal < LEAST_EQUAL * self.prompts)

    def lines(self) -> list[str]:
        """The figures in words."""
        return [
            f"{self.equal} of {self.prompts} greedy answers are the same to the letter ({self.asked})",
            f"the next token differs by {self.kl:.2g} nats (KL, mean of {self.tokens:,} tokens); "
            f"the base without the adapter by {self.kl_base:.2g}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "lossy": self.lossy}


def find_prompts(source: Source) -> tuple[str, list[list[Message]]]:
    """Conversations to ask, and where they are from: the run's probes, its pairs, or the shipped everyday prompts."""
    if source.run is not None:
        samples = source.run.samples()
        if samples:
            return "the run's probes", [[*sample.prompt] for sample in samples]  # type: ignore[list-item]
        own = copies(source.run)
        for key in ("data.eval", "data.train"):
            try:
                if key in own:
                    return "the run's pairs", [list(pair.prompt) for pair in read_pairs(own[key]).pairs]
            except InputError:
                continue
    return "everyday prompts", [list(row.prompt) for row in read_prompts(recipes_dir() / EVERYDAY)]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly from all of them: files have their groups one after the other."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def measure(
    loaded: LoadedModel, prompts: Sequence[Ids], asked: str, forms: Mapping[str, Form], adapted: Mapping[str, Delta]
) -> Agreement:
    """Compare ``loaded``, which has the adapter on, with what it becomes when every layer is stored as in ``forms``.

    Afterwards ``loaded`` is the fused model.
    """
    answers = batch_greedy(loaded, prompts, ANSWER_TOKENS)
    texts = [(prompt, _ids(loaded, answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    positions = sum(len(answer) for _, answer in texts)
    with tempfile.TemporaryFile() as file:
        # On disk: a vocabulary of 150,000 times a thousand tokens is 600 MB.
        kept: np.memmap[Any, np.dtype[np.float32]] | None = None
        kl_base, at = 0.0, 0
        for prompt, answer in texts:
            logits = _logits(loaded.model, prompt, answer)
            if kept is None:
                kept = np.memmap(file, np.float32, "w+", shape=(positions, logits.shape[1]))
            kept[at : at + len(answer)] = logits
            at += len(answer)
            with adapters_off(loaded.model):
                kl_base += _divergence(logits, _logits(loaded.model, prompt, answer))
        fuse_in_place(loaded, forms, adapted)
        kl, at = 0.0, 0
        for prompt, answer in texts:
            assert kept is not None
            kl += _divergence(kept[at : at + len(answer)], _logits(loaded.model, prompt, answer))
            at += len(answer)
        del kept
    fused = batch_greedy(loaded, prompts, ANSWER_TOKENS)
    equal = sum(before == after for before, after in zip(answers, fused, strict=True))
    return Agreement(len(prompts), positions, kl / positions, kl_base / positions, equal, asked)


def fuse_in_place(loaded: LoadedModel, forms: Mapping[str, Form], adapted: Mapping[str, Delta]) -> None:
    """Swap every layer that ``forms`` names for its fused self, one at a time, as our loader would prepare it."""
    detach_lora(loaded.model)
    modules = dict(loaded.model.named_modules())
    for name, form in forms.items():
        layer = stored_layer(modules.pop(name), form, adapted.get(name))
        mx.eval(layer.parameters())
        put(loaded.model, name, layer)
        if on_cpu():
            _prepare(loaded, name, layer)


def _prepare(loaded: LoadedModel, name: str, layer: nn.Module) -> None:
    alone = nn.Sequential(layer)  # what prepares a model replaces layers by their names
    compute_in_float32(alone, "lean" if loaded.memory == "lean" else "fast")
    put(loaded.model, name, alone.layers[0])


def _ids(loaded: LoadedModel, answer: str) -> list[int]:
    """An answer's ids, and the end of turn that follows it."""
    ids = [int(token) for token in loaded.tokenizer.encode(answer, add_special_tokens=False)]
    return [*ids[: ANSWER_TOKENS - 1], min(loaded.tokenizer.eos_token_ids)]


def _logits(model: nn.Module, prompt: Ids, answer: Sequence[int]) -> Logits:
    """Logits [answer tokens, vocabulary] that predict each token of ``answer``."""
    ids = [*(int(token) for token in prompt), *answer[:-1]]
    with blas_threads_within(1):
        logits = model(mx.array([ids]))[0, len(prompt) - 1 :]
        return np.array(logits.astype(mx.float32))


def _divergence(policy: Logits, other: Logits) -> float:
    """KL(policy || other) summed over rows, in nats; in double precision, for it is a difference of near equals."""
    total = 0.0
    for p, q in zip(policy, other, strict=True):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total


def _log_softmax(row: Logits) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted))))
