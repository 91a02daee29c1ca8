"""The engine: one base, adapters swapped between tokens, answers that take turns and stay what they are alone."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import tiny

from localdpo.errors import InputError
from localdpo.model.generate import SamplingOptions, Token, stream
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, attach_lora, detach_lora, load_adapter, save_adapter
from localdpo.serve.engine import Ended, Engine, Event, Job, PromptTooLong, Query, Started

SECONDS = 300.0
HELLO: Any = [{"role": "user", "content": "what is your name"}]


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    loaded = load_model(str(model))
    info = attach_lora(loaded.model, LoraSettings(rank=4, scale=4.0))
    tiny.randomise_adapter(loaded.model, seed, scale=0.3)
    save_adapter(folder, loaded.model, info, loaded)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    model = tiny.tiny_model(root / "model", tie_word_embeddings=False)
    return {
        "model": model,
        "one": make_adapter(root / "one", model, 1),
        "two": make_adapter(root / "two", model, 2),
    }


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine()
    engine.load(str(folders["model"])).result(SECONDS)
    yield engine
    assert engine.close(SECONDS)


class Heard:
    """What a job delivered."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.arrived.put(event)

    def end(self) -> Ended:
        while not isinstance(event := self.arrived.get(timeout=SECONDS), Ended):
            pass
        return event

    def first(self, kind: type) -> Any:
        while not isinstance(event := self.arrived.get(timeout=SECONDS), kind):
            pass
        return event

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]


def ask(engine: Engine, query: Query) -> tuple[Job, Heard]:
    heard = Heard()
    return engine.generate(query, heard), heard


def answer(engine: Engine, query: Query) -> list[int]:
    _, heard = ask(engine, query)
    end = heard.end()
    assert end.error is None, end
    return heard.ids


def alone(folders: dict[str, Path], adapter: str | None, options: SamplingOptions) -> list[int]:
    """The answer as `localdpo chat` makes it."""
    loaded = load_model(str(folders["model"]))
    if adapter:
        load_adapter(folders[adapter], loaded)
    return [token.id for token in stream(loaded, HELLO, options)]


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_an_answer_is_that_of_the_chat(engine: Engine, folders: dict[str, Path], name: str | None):
    options = SamplingOptions(max_tokens=16)
    _, heard = ask(engine, Query(HELLO, options, folders[name] if name else None))
    assert heard.end().reason in ("stop", "length")
    assert heard.ids == alone(folders, name, options)
    started = heard.events[0]
    assert isinstance(started, Started)
    assert started.prompt_tokens == engine.call(lambda loaded: len(loaded.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True
    ))).result(SECONDS)  # fmt: skip


def test_answers_that_take_turns_are_each_what_they_are_alone(engine: Engine, folders: dict[str, Path]):
    wanted = []
    for number in range(9):
        sampled = {"temperature": 1.5, "seed": number} if number % 2 else {}
        options = SamplingOptions(max_tokens=8 + number, **sampled)
        wanted.append(Query(HELLO, options, (None, folders["one"], folders["two"])[number % 3]))
    apart = [answer(engine, query) for query in wanted]
    assert len({tuple(ids) for ids in apart}) > 5
    together = [ask(engine, query)[1] for query in wanted]
    for heard in together:
        heard.end()
    assert [heard.ids for heard in together] == apart


def test_a_short_answer_need_not_wait_for_a_long_one(engine: Engine, folders: dict[str, Path]):
    order: list[str] = []
    done = threading.Event()

    def listener(name: str):
        def hear(event: Event) -> None:
            if isinstance(event, Ended):
                order.append(name)
                if len(order) == 2:
                    done.set()

        return hear

    engine.generate(Query([5, 6, 7], SamplingOptions(max_tokens=300)), listener("long"))
    engine.generate(Query([5, 6, 7], SamplingOptions(max_tokens=3), folders["one"]), listener("short"))
    assert done.wait(SECONDS)
    assert order == ["short", "long"]


def test_the_base_is_loaded_once_and_its_arrays_are_those_of_every_answer(engine: Engine, folders: dict[str, Path]):
    def identity(loaded: LoadedModel) -> tuple[int, ...]:
        return tuple(id(module.weight) for _, module in loaded.model.named_modules() if "weight" in module)

    before = engine.call(identity).result(SECONDS)
    for name in ("one", "two", "one"):
        answer(engine, Query(HELLO, SamplingOptions(max_tokens=2), folders[name]))
    assert engine.call(identity).result(SECONDS) == before
    assert engine.call(lambda loaded: detach_lora(loaded.model)).result(SECONDS) == []


def test_cancelling_ends_before_the_next_token(engine: Engine):
    job, heard = ask(engine, Query([5, 6, 7], SamplingOptions(max_tokens=4000)))
    heard.first(Token)
    job.cancel()
    assert heard.end() == Ended("cancelled")
    assert len(heard.ids) < 4000


def test_cancelling_in_line(engine: Engine):
    jobs = [ask(engine, Query([5, 6, 7], SamplingOptions(max_tokens=4000))) for _ in range(6)]
    for job, _ in reversed(jobs):
        job.cancel()
    assert all(heard.end() == Ended("cancelled") for _, heard in jobs)


def test_a_listener_that_fails_is_gone(engine: Engine):
    heard = Heard()

    def leave(event: Event) -> None:
        heard(event)
        if isinstance(event, Token):
            raise RuntimeError("the client is gone")

    engine.generate(Query([5, 6, 7], SamplingOptions(max_tokens=4000)), leave)
    assert heard.end() == Ended("cancelled")
    assert len(heard.ids) == 1


@pytest.mark.parametrize(
    "query",
    [
        Query([], SamplingOptions()),
        Query("", SamplingOptions()),
        Query([5, 10**6], SamplingOptions()),
        Query([-1], SamplingOptions()),
        Query(HELLO, SamplingOptions(), Path("nosuch")),
    ],
    ids=["no message", "no text", "id too large", "id negative", "no adapter"],
)
def test_what_cannot_be_answered_ends_that_job_alone(engine: Engine, query: Query):
    end = ask(engine, query)[1].end()
    assert end.reason == "error"
    assert isinstance(end.error, InputError)
    assert answer(engine, Query(HELLO, SamplingOptions(max_tokens=3)))


def test_a_prompt_longer_than_the_context(engine: Engine):
    end = ask(engine, Query([5] * 4096, SamplingOptions()))[1].end()
    assert isinstance(end.error, PromptTooLong)
    _, heard = ask(engine, Query([5] * 4093, SamplingOptions(max_tokens=50)))
    assert heard.end().reason in ("length", "stop")
    assert len(heard.ids) <= 3


def test_a_retrained_adapter_is_read_again(folders: dict[str, Path], engine: Engine, tmp_path: Path):
    adapter = shutil.copytree(folders["one"], tmp_path / "run")
    query = Query(HELLO, SamplingOptions(max_tokens=12), adapter)
    before = answer(engine, query)
    shutil.rmtree(adapter)
    shutil.copytree(folders["two"], adapter)
    assert answer(engine, query) != before
    assert answer(engine, query) == alone(folders, "two", query.options)


def test_an_adapter_of_another_base_is_refused(engine: Engine, tmp_path: Path):
    other = make_adapter(tmp_path / "adapter", tiny.tiny_model(tmp_path / "model", seed=9), 1)
    with pytest.raises(InputError, match="another base"):
        engine.attach(other).result(SECONDS)


def test_another_model_takes_the_place_of_the_first(folders: dict[str, Path], tmp_path: Path):
    second = tiny.tiny_model(tmp_path / "model", seed=5, tie_word_embeddings=False)
    engine = Engine()
    try:
        engine.load(str(folders["model"])).result(SECONDS)
        first = answer(engine, Query(HELLO, SamplingOptions(max_tokens=8)))
        _, heard = ask(engine, Query([5, 6, 7], SamplingOptions(max_tokens=4000)))
        engine.load(str(second)).result(SECONDS)
        assert heard.end() == Ended("cancelled")
        assert answer(engine, Query(HELLO, SamplingOptions(max_tokens=8))) != first
        with pytest.raises(InputError):
            engine.load(str(tmp_path / "nosuch")).result(SECONDS)
        end = ask(engine, Query(HELLO, SamplingOptions()))[1].end()
        assert isinstance(end.error, InputError)
    finally:
        engine.close(SECONDS)


def test_closing_cancels_and_a_closed_engine_says_so(folders: dict[str, Path]):
    engine = Engine()
    engine.load(str(folders["model"])).result(SECONDS)
    jobs = [ask(engine, Query([5, 6, 7], SamplingOptions(max_tokens=4000)))[1] for _ in range(6)]
    assert engine.close(SECONDS)
    assert [heard.end() for heard in jobs] == [Ended("cancelled")] * 6
    assert ask(engine, Query(HELLO, SamplingOptions()))[1].end() == Ended("cancelled")
    with pytest.raises(CancelledError):
        engine.attach(folders["one"]).result(SECONDS)
