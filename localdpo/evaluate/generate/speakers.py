"""Whoever answers: a base, or a base with an adapter, one model in memory at a time.

Answers come in chunks that depend on the requests alone. A chunk is on disk before the next begins, and one that
was cut short is decoded again as a whole, so that an interrupted run ends with the answers of one that was not.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from localdpo.data.candidates import Candidate, CandidateJournal, Request, Voice, answer_seed
from localdpo.data.encode import encode_prompt
from localdpo.data.provenance import AnswerOrigin
from localdpo.errors import InputError
from localdpo.files import sha256_file
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import WEIGHTS_FILE, adapters_off, load_adapter
from localdpo.model.sample import batch_sample
from localdpo.model.sampling import SamplingOptions
from localdpo.paths import from_here
from localdpo.sequences import Ids

__all__ = ["Answered", "Models", "Source", "Speaker", "answer_all"]

CHUNK = 32
"""Answers decoded together, and the most that an interruption can cost."""

Answered = Candidate | str
"""An answer, or the reason why there is none."""


@dataclass(frozen=True, slots=True)
class Source:
    """What to load: a model as a user names it, and an adapter's folder, or None for the base alone."""

    model: str
    adapter: Path | None = None
    quantize: int | None = None
    memory: Literal["auto", "fast", "lean"] = "auto"

    @property
    def name(self) -> str:
        """For people: the model, and whose adapter."""
        return f"{self.model} with {from_here(self.adapter)}" if self.adapter is not None else self.model


@dataclass(frozen=True, slots=True)
class Speaker:
    """A loaded model, and whose voice it answers in."""

    loaded: LoadedModel
    voice: Voice


class Models:
    """Loads what is asked for, and lets go of it before the next."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._key: tuple[object, ...] = ()
        self._adapter: tuple[Path, str] | None = None

    def speaker(self, source: Source) -> Speaker:
        """The source's speaker; one handed out before must not be used any more. Raises like ``load_model``."""
        key = (source.model, source.quantize, source.memory)
        if self._loaded is None or self._key != key:
            self.close()
            self._loaded = load_model(source.model, quantize=source.quantize, memory=source.memory)
            self._key = key
        loaded = self._loaded
        if source.adapter is None:
            return Speaker(loaded, Voice(source.model, loaded.fingerprint))
        digest = sha256_file(source.adapter / WEIGHTS_FILE) if (source.adapter / WEIGHTS_FILE).is_file() else ""
        if self._adapter != (source.adapter, digest):
            load_adapter(source.adapter, loaded)
            self._adapter = (source.adapter, digest)
        return Speaker(loaded, Voice(source.model, loaded.fingerprint, str(source.adapter), digest))

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._loaded, self._adapter, self._key = None, None, ()
        gc.collect()
        mx.clear_cache()


def answer_all(
    speaker: Speaker, requests: Sequence[Request], options: SamplingOptions, seed: int, journal: CandidateJournal
) -> Generator[tuple[int, int], None, list[Answered]]:
    """Answer every request, those that the journal knows excepted; yields (answered, wanted) on the way.

    Raises InputError for a model without a usable chat template only when no request can be answered.
    """
    sampling = {key: value for key, value in asdict(options).items() if key != "seed"}
    keys = [journal.key(speaker.voice, sampling, seed, request) for request in requests]
    prompts, found = _encoded(speaker.loaded, requests, options.max_tokens)
    order = sorted(prompts, key=lambda number: (len(prompts[number]), number))
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    done = sum(isinstance(answer, str) for answer in found)
    yield done, len(requests)
    for chunk in chunks:
        known = {number: journal.get(keys[number]) for number in chunk}
        if None in known.values():
            fresh = _decode(speaker, [requests[n] for n in chunk], [prompts[n] for n in chunk], options, seed, sampling)
            journal.put((keys[n], requests[n], fresh[i]) for i, n in enumerate(chunk))
            known = {number: journal.get(keys[number]) for number in chunk}
        for number, answer in known.items():
            found[number] = answer
        done += len(chunk)
        yield done, len(requests)
    return [answer if answer is not None else "there is no answer" for answer in found]


def _encoded(
    loaded: LoadedModel, requests: Sequence[Request], max_tokens: int
) -> tuple[dict[int, Ids], list[Answered | None]]:
    """Prompt ids by the request's number, and for each request the reason why it has none, or None."""
    limit = loaded.config.get("max_position_embeddings")
    longest = limit - max_tokens if isinstance(limit, int) and limit > max_tokens else None
    ids: dict[int, Ids] = {}
    reasons: list[Answered | None] = [None] * len(requests)
    for number, request in enumerate(requests):
        try:
            prompt = encode_prompt(request.prompt, loaded.tokenizer)
        except InputError as error:
            reasons[number] = error.problems[0].message
            continue
        if longest is not None and len(prompt) > longest:
            reasons[number] = f"its prompt has {len(prompt):,} tokens, and the model has room for {longest:,}"
            continue
        ids[number] = prompt
    return ids, reasons


def _decode(
    speaker: Speaker,
    requests: Sequence[Request],
    prompts: Sequence[Ids],
    options: SamplingOptions,
    seed: int,
    sampling: dict[str, object],
) -> list[Candidate]:
    voice = speaker.voice
    seeds = [answer_seed(seed, request) for request in requests]
    with nullcontext() if voice.adapter else adapters_off(speaker.loaded.model):
        answers = batch_sample(speaker.loaded, prompts, seeds, options)
    return [
        Candidate(
            answer.text,
            AnswerOrigin(
                "model",
                voice.model,
                voice.fingerprint,
                voice.adapter,
                voice.adapter_sha256,
                sampling,
                seed,
                request.sample,
                answer.finish,
            ),
        )
        for request, answer in zip(requests, answers, strict=True)
    ]
