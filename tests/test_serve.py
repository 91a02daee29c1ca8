"""The OpenAI-compatible server, asked by the official client and by raw sockets that mean no good."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import SECONDS, Server, make_runs, serving

from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter
from localdpo.serve.app import AccessLine, App, Settings
from localdpo.serve.engine import Engine
from localdpo.serve.guard import make_guard
from localdpo.serve.http import Limits
from localdpo.serve.offer import Offer

HELLO: Any = [{"role": "user", "content": "what is your name"}]
TOKEN = "planted-token-5f1d7c3a9b"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def engine(runs: Path) -> Iterator[Engine]:
    engine = Engine()
    engine.load(str(runs.parent / "base")).result(SECONDS)
    yield engine
    assert engine.close(SECONDS)


@pytest.fixture(scope="module")
def offer(engine: Engine, runs: Path) -> Offer:
    print_of = engine.call(lambda loaded: loaded.fingerprint).result(SECONDS)
    return Offer("base", print_of, {"athene": runs / "athene" / "adapter"}, runs)


@pytest.fixture(scope="module")
def server(engine: Engine, offer: Offer) -> Iterator[Server]:
    limits = Limits(body_bytes=200_000, header_seconds=60.0, body_seconds=60.0)
    with serving(engine, offer, limits=limits) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: Server, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=SECONDS, **options)


def local_answer(runs: Path, name: str, options: SamplingOptions) -> str:
    """What `localdpo chat` says."""
    loaded = load_model(str(runs.parent / "base"))
    if name != "base":
        load_adapter(runs / name / "adapter", loaded)
    return "".join(token.text for token in stream(loaded, HELLO, options))


def say(client: openai.OpenAI, model: str = "athene", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=HELLO, **{"max_tokens": 12, **options})


def raw(server: Server, data: bytes) -> bytes:
    """Send bytes as they are; what came back until the server closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)
        received = b""
        while piece := link.recv(65536):
            received += piece
        return received


def request(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    try:
        base = {"Content-Type": "application/json"} if method == "POST" else {}
        link.request(method, path, body, {**base, **(headers or {})})
        answer = link.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


def post(server: Server, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = request(server, "POST", path, payload, headers)
    return status, json.loads(answer)


def test_the_base_and_the_runs_of_it_are_models(client: openai.OpenAI, server: Server, runs: Path):
    assert [model.id for model in client.models.list()] == ["base", "athene", "hermes"]
    assert client.models.retrieve("hermes").owned_by == "localdpo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("stranger")


@pytest.mark.parametrize("name", ["base", "athene", "hermes"])
def test_an_answer_is_that_of_the_chat(client: openai.OpenAI, runs: Path, name: str):
    answer = say(client, name, max_tokens=24)
    assert answer.choices[0].message.content == local_answer(runs, name, SamplingOptions(max_tokens=24))
    assert answer.model == name
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 24


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, usage: bool):
    whole = say(client)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(say(client, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in told][-1] == whole.choices[0].finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([whole.usage] if usage else [])


def test_sampling_is_repeatable_by_seed(client: openai.OpenAI, runs: Path):
    def sample(seed: int) -> str:
        return say(client, temperature=1.5, top_p=0.95, seed=seed, max_tokens=24).choices[0].message.content

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)
    options = SamplingOptions(max_tokens=24, temperature=1.5, top_p=0.95, seed=1)
    assert first == local_answer(runs, "athene", options)


def test_text_completions_and_token_ids(client: openai.OpenAI, engine: Engine):
    text = "my name is"
    ids = engine.call(lambda loaded: loaded.tokenizer.encode(text)).result(SECONDS)
    answers = [client.completions.create(model="base", prompt=prompt, max_tokens=8) for prompt in (text, ids, [text])]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert answers[0].usage.prompt_tokens == len(ids)
    pieces = client.completions.create(model="base", prompt=text, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answers[0].choices[0].text


def test_content_parts_and_roles(client: openai.OpenAI):
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "text", "text": "your name"}]},
    ]
    plain: Any = [{"role": "system", "content": "Be brief."}, *HELLO]
    answers = [
        client.chat.completions.create(model="base", messages=messages, max_tokens=8) for messages in (parts, plain)
    ]
    assert answers[0].choices[0].message == answers[1].choices[0].message
    assert answers[0].usage == answers[1].usage


@pytest.mark.parametrize("streaming", [True, False])
def test_stop_strings_end_the_answer_before_them(client: openai.OpenAI, streaming: bool):
    full = say(client, max_tokens=30).choices[0].message.content
    stop = full[9:12]
    answer = say(client, max_tokens=30, stop=["never there", stop], stream=streaming)
    if streaming:
        chunks = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == full[: full.index(stop)]
    assert reason == "stop"


def test_several_at_once_get_their_own_answers(server: Server):
    wanted = [
        {"model": ("base", "athene", "hermes")[n % 3], "temperature": 1.0 if n % 2 else 0.0, "seed": n}
        for n in range(9)
    ]
    with client_of(server) as client:
        apart = [say(client, **options).choices[0].message.content for options in wanted]
        with ThreadPoolExecutor(9) as pool:
            together = list(pool.map(lambda options: say(client, **options).choices[0].message.content, wanted))
    assert together == apart
    assert len(set(apart)) > 4


def test_a_cancelled_stream_stops_the_model(client: openai.OpenAI, server: Server):
    answer = say(client, stream=True, max_tokens=3900)
    for _ in zip(range(3), answer, strict=False):
        pass
    assert server.app.under_way == 1
    answer.close()
    server.wait_until(lambda: server.app.under_way == 0)
    line = next(line for line in reversed(server.lines) if isinstance(line, AccessLine))
    assert "client left" in line.note
    assert int(line.note.split("+")[1].split()[0]) < 3900


def test_a_client_that_leaves_before_its_answer_stops_the_model(server: Server):
    body = json.dumps({"model": "base", "messages": HELLO, "max_tokens": 3900}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        server.wait_until(lambda: server.app.under_way == 1)
    server.wait_until(lambda: server.app.under_way == 0)


def test_the_end_of_a_stream_on_the_wire(server: Server):
    body = {"model": "base", "messages": HELLO, "max_tokens": 2, "stream": True}
    status, headers, answer = request(server, "POST", "/v1/chat/completions", json.dumps(body).encode())
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = answer.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else value,
)
def test_what_is_not_served_is_refused_by_name(server: Server, change: dict[str, Any], param: str):
    status, answer = post(server, {"model": "base", "messages": HELLO, "max_tokens": 2, **change})
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"].startswith(param)
    assert param.split(".")[0] in answer["error"]["message"]


def test_what_changes_nothing_is_accepted(server: Server):
    neutral = {
        "n": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "logprobs": False, "presence_penalty": 0,
        "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto", "stop": None,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "stream_options": None,
    }  # fmt: skip
    assert post(server, {"model": "base", "messages": HELLO, "max_tokens": 1, **neutral})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"model": "base", "model": "base"}',
        b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800", "messages": []}',
    ],
    ids=range(11),
)  # fmt: skip
def test_bodies_that_are_no_json_object(server: Server, body: bytes):
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"]["message"].startswith("the body")


def test_errors_as_the_client_knows_them(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="athene, hermes") as caught:
        say(client, "gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        say(client, n=2)
    assert bad.value.param == "n"
    long: Any = [{"role": "user", "content": "fox " * 6000}]
    with pytest.raises(openai.BadRequestError, match="context") as too_long:
        client.chat.completions.create(model="base", messages=long)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt=["a", "b"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1/nosuch", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405),
        ("DELETE", "/v1/models/base", 405), ("GET", "/v1/models/..%2f..%2fetc", 404), ("GET", "/health?x=1", 200),
        ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/%1b%5d52", 404),
    ],
)  # fmt: skip
def test_paths_and_methods(server: Server, method: str, path: str, status: int):
    got, headers, body = request(server, method, path)
    assert got == status
    assert headers["content-type"] == "application/json"
    assert "error" in json.loads(body) or status == 200


def test_a_form_is_no_json(server: Server):
    body = json.dumps({"model": "base", "messages": HELLO}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, _ = request(server, "POST", "/v1/chat/completions", body, {"Content-Type": kind})
        assert status == 415


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example", "", "0.0.0.0",
     "192.168.1.7", "localhost:99999", "localhost, evil.example", "[::1", "2130706433"],
)  # fmt: skip
def test_other_hosts_are_refused(server: Server, host: str):
    status, _, body = request(server, "GET", "/v1/models", headers={"Host": host})
    assert status in (400, 403)
    if status == 403:
        assert json.loads(body)["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "localhost."])
def test_names_of_this_machine_are_known_at_any_port(server: Server, host: str):
    assert request(server, "GET", "/v1/models", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "file://"])
def test_pages_of_other_origins_are_refused(server: Server, origin: str):
    status, headers, body = request(server, "GET", "/v1/models", headers={"Origin": origin})
    assert status == 403
    assert json.loads(body)["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in headers
    assert request(server, "OPTIONS", "/v1/chat/completions", headers={"Origin": origin})[0] == 403


def test_two_hosts_or_none(server: Server):
    assert b" 400 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
    assert b" 400 " in raw(server, b"GET /health HTTP/1.1\r\n\r\n")
    assert b" 403 " in raw(server, b"GET /health HTTP/1.0\r\n\r\n")


def test_an_allowed_origin_gets_what_a_browser_needs(engine: Engine, offer: Offer):
    page = "http://localhost:3000"
    guard = make_guard("127.0.0.1", hosts=["box.lan"], origins=[page])
    with serving(engine, offer, guard=guard) as server:
        asked = {"Origin": page, "Access-Control-Request-Headers": "authorization,x-stainless-os,x-evil"}
        status, headers, _ = request(server, "OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 204
        assert headers["access-control-allow-origin"] == page
        assert "x-stainless-os" in headers["access-control-allow-headers"]
        assert "x-evil" not in headers["access-control-allow-headers"]
        _, headers, _ = request(server, "GET", "/v1/models", headers={"Origin": page, "Host": "box.lan:8080"})
        assert headers["access-control-allow-origin"] == page
        assert headers["vary"] == "origin"
        own = {"Origin": f"http://127.0.0.1:{server.port}", "Host": f"127.0.0.1:{server.port}"}
        assert request(server, "GET", "/v1/models", headers=own)[0] == 200


def test_a_token_is_asked_for_and_never_told(engine: Engine, offer: Offer, capfd: pytest.CaptureFixture[str]):
    logging.getLogger("asyncio").setLevel(logging.DEBUG)
    guard = make_guard("0.0.0.0", token=TOKEN)
    with serving(engine, offer, guard=guard) as server:
        with client_of(server, TOKEN) as client:
            assert say(client).choices
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            say(client)
        assert caught.value.code == "invalid_api_key"
        for value in (TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN}x", "Bearer \xe9"):
            status, headers, _ = request(server, "GET", "/v1/models", headers={"Authorization": value})
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
        assert request(server, "GET", "/health")[0] == 200
        assert request(server, "GET", "/v1/models?key=" + TOKEN, headers={"Host": "10.0.0.5"})[0] == 401
        good = {"Authorization": f"bearer {TOKEN}", "Host": "10.0.0.5:8080"}
        assert request(server, "GET", "/v1/models", headers=good)[0] == 200
        assert request(server, "GET", "/v1/models", headers={**good, "Host": "evil.example"})[0] == 403
        logged = "\n".join(map(str, server.lines))
    shown = capfd.readouterr()
    assert TOKEN not in logged + shown.out + shown.err + repr(guard)
    assert "/v1/models" in logged


def test_bodies_too_large_are_refused_before_they_are_read(server: Server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(server, head + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 413 " in raw(server, head + b"Content-Length: 300000\r\nExpect: 100-continue\r\n\r\n")
    chunks = b"".join(b"8000\r\n" + b"x" * 0x8000 + b"\r\n" for _ in range(10))
    assert b" 413 " in raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert b" 400 " in raw(server, head + b"Content-Length: -5\r\n\r\n")
    assert b" 400 " in raw(server, head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello")
    assert b" 431 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000)


def test_a_chunked_body_and_continue(server: Server):
    body = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json; charset=utf-8\r\n"
    link = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    with link, link.makefile("rb") as answer:
        link.sendall(head + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert answer.readline() == b"HTTP/1.1 100 \r\n"
        link.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert answer.readline() == b"\r\n"
        assert b" 200 " in answer.readline()


def test_two_requests_sent_at_once_are_both_answered(server: Server):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    link = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    with link, link.makefile("rb") as answer:
        link.sendall(one + one)
        statuses = 0
        while statuses < 2:
            line = answer.readline()
            assert line
            statuses += b"HTTP/1.1 200" in line  # a body ends without a newline


@pytest.mark.parametrize("head", [b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_header_that_drips_in_is_cut_off(engine: Engine, offer: Offer, head: bytes):
    with (
        serving(engine, offer, limits=Limits(header_seconds=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link,
    ):
        link.sendall(head)
        assert _drip(link, b"X-A: b\r\n") in (b"HTTP/1.1 408", b"")
        with client_of(server) as client:
            assert say(client, max_tokens=1).choices


def test_a_body_that_drips_in_is_cut_off(engine: Engine, offer: Offer):
    with (
        serving(engine, offer, limits=Limits(body_seconds=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link,
    ):
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000\r\n\r\n"
        )
        assert _drip(link, b" ") in (b"HTTP/1.1 408", b"")


def _drip(link: socket.socket, piece: bytes) -> bytes:
    """Send ``piece`` now and then until the server answers; the first bytes of what it says, none for a reset."""
    deadline = time.monotonic() + SECONDS
    link.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            return link.recv(12)
        except TimeoutError:
            pass
        except OSError:
            return b""
        try:
            link.send(piece)
        except OSError:
            return b""
    raise AssertionError("the server waited for ever")


def test_a_silent_connection_is_closed(engine: Engine, offer: Offer):
    with (
        serving(engine, offer, limits=Limits(header_seconds=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link,
    ):
        assert link.recv(10) == b""


def test_more_connections_than_are_served(engine: Engine, offer: Offer):
    with serving(engine, offer, limits=Limits(connections=2)) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(2)]
        for link in held:
            link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in link.recv(65536)
        assert b" 503 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for link in held:
            link.close()


def test_more_requests_than_are_served_are_to_be_tried_again(engine: Engine, offer: Offer):
    with serving(engine, offer, settings=Settings(requests=1)) as server, client_of(server) as client:
        held = say(client, stream=True, max_tokens=3900)
        next(iter(held))
        with pytest.raises(openai.InternalServerError) as caught:
            say(client)
        assert caught.value.status_code == 503
        assert caught.value.code == "server_busy"
        assert caught.value.response.headers["retry-after"] == "1"
        held.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_that_takes_too_long(engine: Engine, offer: Offer, streaming: bool):
    with serving(engine, offer, settings=Settings(seconds=0.4)) as server, client_of(server) as client:
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(say(client, stream=streaming, max_tokens=3900))
        server.wait_until(lambda: server.app.under_way == 0)


def test_stopping_lets_answers_end_and_cuts_them_short_later(engine: Engine, offer: Offer):
    with serving(engine, offer) as server, client_of(server) as client:
        held = say(client, stream=True, max_tokens=3900)
        next(iter(held))
        server.app.refuse_new()
        with pytest.raises(openai.InternalServerError, match="stopping"):
            say(client)
        server.app.cancel()
        with pytest.raises(openai.APIError, match="stopping"):
            list(held)


def test_an_adapter_that_breaks_is_not_the_clients_fault(engine: Engine, offer: Offer, runs: Path):
    weights = runs / "hermes" / "adapter" / "adapters.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    try:
        with serving(engine, offer) as server, client_of(server) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                say(client, "hermes")
            assert caught.value.code == "model_unavailable"
            assert str(runs) not in caught.value.message
            assert any(str(weights) in line for line in server.lines if isinstance(line, str))
            assert say(client).choices
    finally:
        weights.write_bytes(whole)


def test_a_mistake_of_ours_is_500_without_a_traceback(
    engine: Engine, offer: Offer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail \x1b]52")

    with serving(engine, offer) as server, client_of(server) as client:
        monkeypatch.setattr(App, "_find", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            say(client)
        assert caught.value.status_code == 500
        assert "secret" not in str(caught.value)
        assert any("ZeroDivisionError: secret detail ␛]52" in str(line) for line in server.lines)
    assert "Traceback" not in capfd.readouterr().err


def test_the_access_log_is_inert_and_says_nothing_of_texts(server: Server, client: openai.OpenAI):
    say(client, "athene", max_tokens=3, user="someone@example.org")
    assert b" 400 " in raw(server, b"GET /v1/\x9b31m?secret=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert request(server, "GET", "/v1/%1b]52;c;AAAA?secret=1")[0] == 404
    server.wait_until(lambda: any("/v1/%1b]52;c;AAAA 404" in str(line) for line in server.lines))
    text = "\n".join(map(str, server.lines))
    assert "secret=1" not in text
    assert "someone@" not in text
    assert "your name" not in text
    assert "\x9b" not in text
    assert any(line.note.startswith("athene ") for line in server.lines if isinstance(line, AccessLine))


def test_noise_is_refused_and_the_server_lives(server: Server):
    import random

    rng = random.Random(5)
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for number in range(60):
        noise = rng.randbytes(rng.randrange(1, 300))
        data = (noise, start + noise, start + b"Content-Length: %d\r\n\r\n%s" % (len(noise), noise))[number % 3]
        answer = raw(server, data)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:60]
    assert request(server, "GET", "/health")[0] == 200
    assert threading.active_count() < 50
