"""The model host, a real process with a tiny model: it answers, stops when told, dies with its parent, comes back."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_host import FakeModelHost
from localdpo_tui.services.model_host import CountRow, Delta, Ended, ModelHost, Started
from tiny import randomise_adapter, tiny_model

from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import PreferencePair
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError
from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora, load_adapter, save_adapter

ROOT = Path(__file__).parent.parent
QUESTION = [{"role": "user", "content": "what is your name?"}]
SHORT = {"max_tokens": 12}
LONG = {"max_tokens": 4000, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose answers do not end by themselves."""
    return tiny_model(tmp_path_factory.mktemp("host") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    loaded = load_model(str(model))
    info = attach_lora(loaded.model, LoraSettings(rank=4))
    randomise_adapter(loaded.model, scale=0.5)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(folder, loaded.model, info, loaded)
    return folder


@pytest.fixture(scope="module")
def ask(model) -> Iterator[Callable[[Callable[[ModelHost], Coroutine[Any, Any, None]]], None]]:
    """Runs a scenario with a host that has the model loaded; one process for all that leave it whole."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(300)

    host = ModelHost()
    do(host.load(str(model)))
    yield lambda scenario: do(scenario(host))
    do(host.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def run(scenario: Callable[[ModelHost], object], command: list[str] | None = None) -> None:
    """Run a coroutine function with a host, and close it."""

    async def whole() -> None:
        host = ModelHost(command)
        try:
            await asyncio.wait_for(scenario(host), 240)
        finally:
            pid = host.pid
            await host.close()
            assert pid is None or not psutil.pid_exists(pid)

    asyncio.run(whole())


async def answers(host: ModelHost, **request: object) -> dict[int, str]:
    """The whole text of each candidate."""
    texts: dict[int, str] = {}
    async with aclosing(host.generate(request.pop("messages", QUESTION), **request)) as parts:
        async for part in parts:
            if isinstance(part, Delta):
                texts[part.candidate] = texts.get(part.candidate, "") + part.text
    return texts


def alone(model: Path, adapter: Path | None = None, **options: object) -> str:
    """What the model answers in this process."""
    loaded = load_model(str(model))
    if adapter is not None:
        load_adapter(adapter, loaded)
    return "".join(token.text for token in stream(loaded, QUESTION, SamplingOptions(**options)))


def test_answers_are_those_of_the_model_with_any_adapter(ask, model, adapter):
    async def scenario(host: ModelHost) -> None:
        loaded = await host.load(str(model))
        assert loaded.context == 4096
        assert (await host.load(str(model))) is loaded
        base = await answers(host, options=SHORT)
        tuned = await answers(host, adapter=adapter, options=SHORT)
        assert base == {0: alone(model, max_tokens=12)}
        assert tuned == {0: alone(model, adapter, max_tokens=12)}
        assert base != tuned
        assert await answers(host, options=SHORT) == base
        many = await answers(host, options={"temperature": 1.0, "seed": 7, **SHORT}, candidates=3)
        assert len(set(many.values())) == 3
        assert many[2] == alone(model, temperature=1.0, seed=9, max_tokens=12)

    ask(scenario)


def test_what_is_wrong_is_said_in_sentences(ask, model, tmp_path):
    async def scenario(host: ModelHost) -> None:
        with pytest.raises(InputError, match="nosuch"):
            await host.load(str(tmp_path / "nosuch"))
        with pytest.raises(InputError, match="nosuch"):
            await answers(host)  # it tries what was asked for last
        await host.load(str(model))
        for options, why in (({"temperature": -1}, "temperature"), ({"top": 1}, "no sampling option"),
                             ({"seed": "x"}, "whole number"), ({"max_tokens": True}, "whole number")):  # fmt: skip
            with pytest.raises(InputError, match=why):
                await answers(host, options=options)
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            await answers(host, adapter=tmp_path)
        with pytest.raises(InputError, match="empty"):
            await answers(host, messages=[])
        with pytest.raises(InputError, match="too much for one request"):
            await answers(host, messages=[{"role": "user", "content": "x" * 17_000_000}])
        with pytest.raises(InputError, match="not on this machine"):
            await host.count_tokens("someone/nothing-like-this", [])
        assert len(await answers(host, options=SHORT)) == 1

    ask(scenario)


def test_leaving_early_stops_the_answer(ask):
    async def scenario(host: ModelHost) -> None:
        async with aclosing(host.generate(QUESTION, options=LONG, candidates=6)) as parts:
            async for part in parts:
                if isinstance(part, Delta):
                    break
        # The four candidates under way and the two in line are over: this one need not wait for 24,000 tokens.
        assert len(await answers(host, options=SHORT)) == 1

        async def listen() -> None:
            async with aclosing(host.generate(QUESTION, options=LONG)) as more:
                async for _ in more:
                    pass

        task = asyncio.create_task(listen())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ends = [part async for part in host.generate(QUESTION, options=SHORT)]
        assert isinstance(ends[0], Started)
        assert isinstance(ends[-1], Ended)
        assert ends[-1].reason == "length"
        assert ends[-1].tokens == 12

    ask(scenario)


def test_tokens_are_counted_as_training_counts_them(ask, model):
    pair = PreferencePair(({"role": "user", "content": "what is your name? é"},), "my name is", "fox " * 9)
    encoded = encode_pairs([pair], load_model(str(model)).tokenizer).pairs[0]
    rows = [CountRow(messages=list(pair.prompt), answers=[pair.chosen, pair.rejected])]

    async def scenario(host: ModelHost) -> None:
        (count,) = await host.count_tokens(str(model), rows)
        assert count.prompt == len(encoded.prompt_ids)
        assert count.answers == [len(encoded.chosen_ids), len(encoded.rejected_ids)]
        assert count.longest == count.prompt + max(count.answers)
        (refused,) = await host.count_tokens(str(model), [CountRow(messages=[{"role": "user", "content": "\ufdd0"}])])
        assert "U+FDD0" in refused.problem

    ask(scenario)


def test_a_host_that_was_killed_is_told_and_comes_back(model):
    async def scenario(host: ModelHost) -> None:
        await host.load(str(model))
        first = host.pid

        async def kill_at_first_word() -> None:
            async with aclosing(host.generate(QUESTION, options=LONG)) as parts:
                async for part in parts:
                    if isinstance(part, Delta):
                        os.kill(first, signal.SIGKILL)

        with pytest.raises(EnvironmentFault, match=r"the model host ended: it was killed.*Ask again"):
            await kill_at_first_word()
        assert not host.running
        assert len(await answers(host, options=SHORT)) == 1
        assert host.pid not in (None, first)

    run(scenario)


def test_a_host_at_rest_has_no_process_and_answers_again(model):
    async def scenario(host: ModelHost) -> None:
        assert not await host.rest()  # there was none
        await host.load(str(model))
        first = host.pid
        async with aclosing(host.generate(QUESTION, options=LONG)) as parts:
            async for part in parts:
                if isinstance(part, Delta):
                    assert not await host.rest()  # it is at work
                    break
        assert host.pid == first
        assert await host.rest()
        assert (host.running, host.loaded) == (False, None)
        assert len(await answers(host, options=SHORT)) == 1
        assert host.pid not in (None, first)

    run(scenario)


def test_closing_ends_a_host_that_is_answering(model):
    async def scenario(host: ModelHost) -> None:
        assert (await host.count_tokens(str(model), []), host.loaded) == ([], None)  # weights are not needed to count
        with pytest.raises(InputError, match="no model is loaded"):
            await answers(host)
        await host.load(str(model))

        async def listen() -> None:
            async for _ in host.generate(QUESTION, options=LONG):
                pass

        task = asyncio.create_task(listen())
        while host.loaded is None:
            await asyncio.sleep(0.01)
        await host.close()
        with pytest.raises(LocalDPOError, match="closed"):
            await task
        with pytest.raises(EnvironmentFault, match="closed"):
            await host.load(str(model))

    run(scenario)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/nosuch/program"], "cannot start"),
        ([sys.executable, "-c", "import sys; sys.exit('no room for it')"], "exit code 1: no room for it"),
        ([sys.executable, "-c", "print('hello', flush=True); input()"], "is not JSON"),
        ([sys.executable, "-c", "print('{\"type\":\"hello\",\"protocol\":99,\"pid\":1}', flush=True); input()"],
         "version 99"),
    ],
)  # fmt: skip
def test_programs_that_are_no_host(command, said):
    async def scenario(host: ModelHost) -> None:
        with pytest.raises(EnvironmentFault, match=said):
            await host.load("m")

    run(scenario, command)


NOISY = """
import os, sys
from localdpo.serve import host
load = host.Host._load
def noisy(self, message):
    print("stray print", flush=True)
    os.write(1, b"stray write\\n")
    assert sys.stdin.read() == ""
    load(self, message)
host.Host._load = noisy
host.main()
"""


def test_what_libraries_print_does_not_disturb(model):
    async def scenario(host: ModelHost) -> None:
        said: list[str] = []
        assert (await host.load(str(model), on_progress=said.append)).parameters > 0
        assert said[0].startswith("loading")

    run(scenario, [sys.executable, "-c", NOISY])


def test_a_host_survives_nonsense_and_ends_with_its_stdin():
    lines = [
        b"nonsense",
        b'{"type": "load"}',
        b"",
        b'{"type": "hello", "protocol": 1, "pid": 1, "id": 4}',
        b'{"type": "generate", "id": 5, "messages": [{"role": "user", "content": "q"}], "options": {"x": 1}}',
        b'{"type": "cancel", "id": 77}',
        b"x" * (17 << 20),
        b'{"type": "count_tokens", "id": 6, "model": "someone/nothing", "rows": []}',
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "localdpo.serve.host"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n".join(lines) + b"\n")
    process.stdin.flush()
    told = [json.loads(process.stdout.readline()) for _ in range(7)]
    process.stdin.write(b'{"type": "half a li')
    rest, _ = process.communicate()
    assert rest == b""
    assert process.returncode == 0
    assert [message["type"] for message in told] == ["hello"] + ["failed"] * 6
    assert sorted(message["id"] for message in told[1:]) == [0, 0, 0, 4, 5, 6]
    assert all(message["problems"][0]["message"] for message in told[1:])


PARENT = """
import asyncio, sys
from localdpo_tui.services.model_host import ModelHost
async def main():
    host = ModelHost()
    await host.load(sys.argv[1])
    print(host.pid, flush=True)
    async for _ in host.generate([{"role": "user", "content": "q"}], options={"max_tokens": 4000}):
        pass
asyncio.run(main())
"""


def test_a_host_ends_when_its_parent_is_killed(model):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tui")])}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the host outlives its parent"
        time.sleep(0.02)


def test_the_fake_has_the_interface_of_the_host():
    for name in ("load", "generate", "count_tokens", "close"):
        real, fake = (inspect.signature(getattr(cls, name)) for cls in (ModelHost, FakeModelHost))
        assert list(real.parameters) == list(fake.parameters), name
        kinds = [[parameter.kind for parameter in one.parameters.values()] for one in (real, fake)]
        assert kinds[0] == kinds[1], name
    for name in ("running", "loaded", "pid"):
        assert isinstance(inspect.getattr_static(FakeModelHost, name), property)


def test_services_load_no_mlx():
    names = ["model_host", "trainer", "workspace"]
    code = "import sys; " + "; ".join(f"import localdpo_tui.services.{name}" for name in names)
    code += "; import localdpo.serve.protocol, localdpo.data.store"
    code += "; sys.exit(bool({'mlx', 'mlx_lm', 'transformers', 'torch'} & {n.split('.')[0] for n in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tui")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
