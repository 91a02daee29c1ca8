"""Generate text: one answer as a stream of tokens, or greedy answers to many prompts at once.

Streaming is mlx-lm's generator with its samplers. The batched decoder is our own, over mlx-lm's batch caches:
one forward a step for all prompts, no log-probabilities, finished rows dropped. It knows nothing about adapters
(``lora.adapters_off`` decides whose answer it is) or terminals (``text.StreamSanitiser`` makes output inert).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from localdpo.data.encode import encode_prompt
from localdpo.data.pairs import Message
from localdpo.errors import InputError, Problem
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import lane_streams
from localdpo.model.load import LoadedModel

BATCH_ROWS = 32
REFILTER_SHARE = 0.75  # dropping rows copies the caches: wait until a quarter has finished
PREFILL_TOKENS = 2048  # prompt tokens of a batch processed at a time
CPU_LANES = 2  # batches decoded side by side on a CPU

Ids = Sequence[int] | np.ndarray
Progress = Callable[[int, int], None]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the default is greedy.

    top_p, top_k and min_p apply when temperature > 0, and are off at 1.0, 0 and 0.0. repetition_penalty 1.0 is
    off. seed: None draws from mlx's global random state; a number sets that state first.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError naming every option out of range."""
        limits: list[tuple[str, bool, str]] = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "within 0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "within 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
        ]
        problems = [
            Problem(name, f"{getattr(self, name)} must be {wanted}") for name, fine, wanted in limits if not fine
        ]
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True, slots=True)
class Token:
    """A step of a stream: new text (it may be empty while a character is incomplete) and the token's id.

    ``tps`` is tokens a second so far, without the prompt. ``finish_reason`` is set on the last one.
    """

    text: str
    id: int
    tps: float
    finish_reason: FinishReason | None = None


def stream(
    loaded: LoadedModel,
    prompt: Sequence[Message] | Ids,
    options: SamplingOptions | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Token]:
    """Yield the answer to ``prompt`` (chat messages, or token ids as they are) token by token.

    Stops at an end of turn, at ``options.max_tokens``, or before the next token once ``cancelled()`` is true.
    """
    options = options or SamplingOptions()
    ids = _prompt_ids(loaded, prompt)
    if options.seed is not None:
        mx.random.seed(options.seed)
    top_p = options.top_p if options.top_p < 1 else 0.0  # mlx-lm: 0 is off
    vocabulary = len(loaded.tokenizer)
    sampler = make_sampler(
        temp=options.temperature, top_p=top_p, min_p=options.min_p, top_k=min(options.top_k, vocabulary - 1)
    )
    penalty = options.repetition_penalty if options.repetition_penalty != 1 else None
    responses = stream_generate(
        loaded.model,
        loaded.tokenizer,
        ids,
        max_tokens=options.max_tokens,
        sampler=sampler,
        logits_processors=make_logits_processors(repetition_penalty=penalty),
    )
    while True:
        with blas_threads_within(1):  # not around the yield: the caller's own products are none of ours
            response = next(responses, None)
        if response is None:
            break
        reason = cast(FinishReason | None, response.finish_reason)
        yield Token(response.text, int(response.token), response.generation_tps, reason)
        if cancelled():
            break


def batch_greedy(
    loaded: LoadedModel, prompts: Sequence[Ids], max_tokens: int, progress: Progress | None = None
) -> list[str]:
    """Greedy answers to ``prompts`` (token ids), in order, each without its end of turn.

    The answers are those of decoding one by one: padding is masked and positions count from each prompt's own
    start. On a CPU two batches run side by side. ``progress`` gets (answers finished, answers wanted).
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    answers: list[list[int]] = [[] for _ in prompts]
    streams = lane_streams(CPU_LANES)
    waiting = _row_groups([len(prompt) for prompt in prompts], len(streams))
    lanes: dict[int, _Lane] = {}
    finished = 0
    with blas_threads_within(1):
        while finished < len(prompts):
            for number, on in enumerate(streams):
                if number not in lanes and waiting:
                    batch = [(prompts[row], answers[row]) for row in waiting.pop()]
                    lanes[number] = _new_lane(loaded, batch, max_tokens, on)
            # one call for all lanes: mlx bounds the operations under way, so the second of two calls would wait
            mx.eval([lane.advance() for lane in lanes.values()])
            done = sum(lane.collect() for lane in lanes.values())
            lanes = {number: lane for number, lane in lanes.items() if not lane.finished}
            finished += done
            if done and progress is not None:
                progress(finished, len(prompts))
    return [_text(loaded, ids) for ids in answers]


def _row_groups(lengths: Sequence[int], lanes: int) -> list[list[int]]:
    """Rows split into batches of like length (little padding), at least one for each lane; the longest last."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    batches = min(len(order), max(lanes, -(-len(order) // BATCH_ROWS)))
    bounds = [len(order) * number // batches for number in range(batches + 1)] if batches else []
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def _prompt_ids(loaded: LoadedModel, prompt: Sequence[Message] | Ids) -> list[int]:
    if len(prompt) and isinstance(prompt[0], dict):
        return [int(token) for token in encode_prompt(prompt, loaded.tokenizer)]  # type: ignore[arg-type]
    ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    """Text of an answer, through the detokenizer that streaming uses."""
    detokenizer = loaded.tokenizer.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


Batch = list[tuple[Ids, list[int]]]
"""Prompts, and the answers to append to."""


def _new_lane(loaded: LoadedModel, batch: Batch, max_tokens: int, on: mx.Stream) -> _Lane:
    caches = _batch_caches(loaded.model, [len(prompt) for prompt, _ in batch])
    if caches is None:
        return _SingleLane(loaded, batch, max_tokens)
    return _BatchLane(loaded, batch, max_tokens, on, caches)


class _Lane:
    """Rows decoded side by side with those of other lanes."""

    def __init__(self, loaded: LoadedModel, batch: Batch, max_tokens: int) -> None:
        self.loaded = loaded
        self.batch = batch
        self.max_tokens = max_tokens
        self.open_rows = set(range(len(batch)))

    @property
    def finished(self) -> bool:
        """Whether every row has its answer."""
        return not self.open_rows

    def advance(self) -> list[mx.array]:
        """Describe the next piece of work; what is returned must be evaluated before ``collect``."""
        raise NotImplementedError

    def collect(self) -> int:
        """Take in the results of that piece; the number of rows that it finished."""
        raise NotImplementedError


class _SingleLane(_Lane):
    """For models with a state other than attention caches: one row after the other."""

    def advance(self) -> list[mx.array]:
        return []

    def collect(self) -> int:
        prompt, answer = self.batch[self.open_rows.pop()]
        options = SamplingOptions(max_tokens=self.max_tokens)
        answer += [token.id for token in stream(self.loaded, prompt, options) if token.finish_reason != "stop"]
        return 1


class _BatchLane(_Lane):
    """One forward a step for all rows, prompts left-padded; finished rows are dropped now and then."""

    def __init__(self, loaded: LoadedModel, batch: Batch, max_tokens: int, on: mx.Stream, caches: list[Any]) -> None:
        super().__init__(loaded, batch, max_tokens)
        self.on = on
        self.caches = caches
        self.live = list(range(len(batch)))  # the row that each line of the batch belongs to
        longest = max(len(prompt) for prompt, _ in batch)
        padded = np.zeros((len(batch), longest), dtype=np.int32)
        for row, (prompt, _) in enumerate(batch):
            padded[row, longest - len(prompt) :] = prompt
        self.prompts = padded[:, :-1]
        self.inputs = mx.array(padded[:, -1:])
        self.tokens: mx.array | None = None

    def advance(self) -> list[mx.array]:
        with mx.stream(self.on):
            if self.prompts.shape[1]:
                # The last cache needs all layers but not the vocabulary head, which never runs on prompts. One
                # root a lane: with many, mlx orders the work of one lane before that of the next.
                width = max(1, PREFILL_TOKENS // len(self.prompts))
                self.loaded.model(mx.array(self.prompts[:, :width]), cache=self.caches)
                self.prompts = self.prompts[:, width:]
                return [self.caches[-1].keys, self.caches[-1].values]
            logits = self.loaded.model(self.inputs, cache=self.caches)
            self.tokens = mx.argmax(logits[:, -1, :], axis=-1)
            return [self.tokens]

    def collect(self) -> int:
        if self.tokens is None:
            return 0
        values = cast(list[int], self.tokens.tolist())
        done = sum(self._take(row, value) for row, value in zip(self.live, values, strict=True))
        with mx.stream(self.on):
            self._drop_finished()
            self.inputs = self.tokens[:, None]
        return done

    def _take(self, row: int, token: int) -> bool:
        """Append a token to its row's answer; whether that ended it."""
        if row not in self.open_rows:
            return False
        answer, ended = self.batch[row][1], token in self.loaded.tokenizer.eos_token_ids
        if not ended:
            answer.append(token)
        if ended or len(answer) == self.max_tokens:
            self.open_rows.discard(row)
            return True
        return False

    def _drop_finished(self) -> None:
        if self.finished or len(self.open_rows) > REFILTER_SHARE * len(self.live):
            return
        keep = [line for line, row in enumerate(self.live) if row in self.open_rows]
        self.live = [self.live[line] for line in keep]
        kept = mx.array(keep)
        self.tokens = cast(mx.array, self.tokens)[kept]
        for cache in self.caches:
            cache.filter(kept)


def _batch_caches(model: Any, lengths: Sequence[int]) -> list[Any] | None:
    """Left-padded batch caches for a model whose layers all attend; None for any other state."""
    padding = [max(lengths) - length for length in lengths]
    caches: list[Any] = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            caches.append(BatchKVCache(padding))
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            caches.append(BatchRotatingKVCache(cache.max_size, padding))
        else:
            return None
    return caches
