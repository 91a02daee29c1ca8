"""Generate text: one answer as a stream of tokens, or answers to many prompts at once (``sample`` draws them).

Streaming is mlx-lm's generator with its samplers. The batched decoder is our own, over mlx-lm's batch caches:
one forward a step for all prompts, no log-probabilities, finished rows dropped. It knows nothing about adapters
(``lora.adapters_off`` decides whose answer it is) or terminals (``text.StreamSanitiser`` makes output inert).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from localdpo.data.encode import encode_prompt
from localdpo.data.pairs import Message
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import lane_streams
from localdpo.model.load import LoadedModel
from localdpo.model.prefix import Prefix, caches_after, run_prefix
from localdpo.model.sampling import SamplingOptions as SamplingOptions  # known under both names

BATCH_ROWS = 64
REFILTER_SHARE = 0.75  # dropping rows copies the caches: wait until a quarter has finished
PREFILL_TOKENS = 2048  # prompt tokens of a batch processed at a time
CPU_LANES = 2  # batches decoded side by side on a CPU

Ids = Sequence[int] | np.ndarray
Progress = Callable[[int, int], None]
FinishReason = Literal["stop", "length"]
Choose = Callable[[mx.array, "Sequence[BatchRow]"], mx.array]
"""Next tokens [B] from logits [B, vocabulary] and the rows that they are of."""


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

    Stops at an end of turn, at ``options.max_tokens``, or before the next token (or the next piece of a long
    prompt) once ``cancelled()`` is true. Streams of one thread may take turns: none changes another's tokens.
    """
    options = options or SamplingOptions()
    ids = _prompt_ids(loaded, prompt)
    seeds = random.Random(options.seed)  # one a step: mlx has one random state for all streams of a thread
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
        prompt_progress_callback=lambda _done, _total: _leave_if(cancelled()),
    )
    while True:
        if options.seed is not None:
            mx.random.seed(seeds.getrandbits(64))
        try:
            with blas_threads_within(1):  # not around the yield: the caller's own products are none of ours
                response = next(responses, None)
        except _Left:
            break
        if response is None:
            break
        reason = cast(FinishReason | None, response.finish_reason)
        yield Token(response.text, int(response.token), response.generation_tps, reason)
        if cancelled():
            break


class _Left(Exception):
    """The prompt is no longer wanted."""


def _leave_if(cancelled: bool) -> None:
    if cancelled:
        raise _Left


def batch_greedy(
    loaded: LoadedModel, prompts: Sequence[Ids], max_tokens: int, progress: Progress | None = None
) -> list[str]:
    """Greedy answers to ``prompts`` (token ids), in order, each without its end of turn.

    The answers are those of decoding one by one: padding is masked and positions count from each prompt's own
    start. What all prompts begin with runs once. On a CPU two batches run side by side. ``progress`` gets
    (answers finished, answers wanted).
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    rows = [BatchRow(prompt) for prompt in prompts]
    decode_rows(loaded, rows, SamplingOptions(max_tokens=max_tokens), _likeliest, progress)
    return [text_of(loaded, row.answer) for row in rows]


def _likeliest(logits: mx.array, _rows: Sequence[BatchRow]) -> mx.array:
    return mx.argmax(logits, axis=-1)


@dataclass(slots=True)
class BatchRow:
    """A prompt, and its answer as far as it is. ``seed`` is for those that sample."""

    prompt: Ids
    seed: int | None = None
    answer: list[int] = field(default_factory=list)
    finish: FinishReason = "length"


def decode_rows(
    loaded: LoadedModel,
    rows: Sequence[BatchRow],
    options: SamplingOptions,
    choose: Choose,
    progress: Progress | None = None,
) -> None:
    """Fill in the answers of ``rows``, each token as ``choose`` says; see :func:`batch_greedy`."""
    streams = lane_streams(CPU_LANES)
    prompts = [row.prompt for row in rows]
    waiting = _row_groups([len(prompt) for prompt in prompts], len(streams))
    lanes: dict[int, _Lane] = {}
    finished = 0
    prefix = run_prefix(loaded.model, prompts)
    with blas_threads_within(1):
        while finished < len(prompts):
            for number, on in enumerate(streams):
                if number not in lanes and waiting:
                    batch = [rows[index] for index in waiting.pop()]
                    lanes[number] = _new_lane(loaded, batch, options, choose, on, prefix)
            # one call for all lanes: mlx bounds the operations under way, so the second of two calls would wait
            mx.eval([lane.advance() for lane in lanes.values()])
            done = sum(lane.collect() for lane in lanes.values())
            lanes = {number: lane for number, lane in lanes.items() if not lane.finished}
            finished += done
            if done and progress is not None:
                progress(finished, len(prompts))


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


def text_of(loaded: LoadedModel, ids: list[int]) -> str:
    """Text of an answer, through the detokenizer that streaming uses."""
    detokenizer = loaded.tokenizer.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


def _new_lane(
    loaded: LoadedModel,
    batch: list[BatchRow],
    options: SamplingOptions,
    choose: Choose,
    on: mx.Stream,
    prefix: Prefix | None,
) -> _Lane:
    longest = max(len(row.prompt) for row in batch)
    padding = [longest - len(row.prompt) for row in batch]
    if prefix is not None:
        with mx.stream(on):
            return _BatchLane(loaded, batch, options, choose, on, caches_after(prefix, padding), prefix.length)
    caches = _batch_caches(loaded.model, padding)
    if caches is None:
        return _SingleLane(loaded, batch, options)
    return _BatchLane(loaded, batch, options, choose, on, caches)


class _Lane:
    """Rows decoded side by side with those of other lanes."""

    def __init__(self, loaded: LoadedModel, batch: list[BatchRow], options: SamplingOptions) -> None:
        self.loaded = loaded
        self.batch = batch
        self.options = options
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
        row = self.batch[self.open_rows.pop()]
        for token in stream(self.loaded, row.prompt, replace(self.options, seed=row.seed)):
            if token.finish_reason == "stop":
                row.finish = "stop"
            else:
                row.answer.append(token.id)
        return 1


class _BatchLane(_Lane):
    """One forward a step for all rows, prompts left-padded; finished rows are dropped now and then."""

    def __init__(
        self,
        loaded: LoadedModel,
        batch: list[BatchRow],
        options: SamplingOptions,
        choose: Choose,
        on: mx.Stream,
        caches: Sequence[Any],
        columns_done: int = 0,
    ) -> None:
        """``caches`` hold the first ``columns_done`` columns of the left-padded prompts."""
        super().__init__(loaded, batch, options)
        self.choose = choose
        self.on = on
        self.caches = caches
        self.live = list(range(len(batch)))  # the row that each line of the batch belongs to
        longest = max(len(row.prompt) for row in batch)
        padded = np.zeros((len(batch), longest), dtype=np.int32)
        for number, row in enumerate(batch):
            padded[number, longest - len(row.prompt) :] = row.prompt
        self.prompts = padded[:, columns_done:-1]
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
            self.tokens = self.choose(logits[:, -1, :], [self.batch[number] for number in self.live])
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

    def _take(self, number: int, token: int) -> bool:
        """Append a token to its row's answer; whether that ended it."""
        if number not in self.open_rows:
            return False
        row, ended = self.batch[number], token in self.loaded.tokenizer.eos_token_ids
        if ended:
            row.finish = "stop"
        else:
            row.answer.append(token)
        if ended or len(row.answer) == self.options.max_tokens:
            self.open_rows.discard(number)
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


def _batch_caches(model: Any, padding: Sequence[int]) -> list[Any] | None:
    """Left-padded batch caches for a model whose layers all attend; None for any other state."""
    caches: list[Any] = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            caches.append(BatchKVCache(list(padding)))
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            caches.append(BatchRotatingKVCache(cache.max_size, list(padding)))
        else:
            return None
    return caches
