"""The language of UI and model host: what is said arrives, and nothing else is taken for a message."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.serve import protocol
from localdpo.serve.protocol import (
    Cancel,
    Counted,
    CountRow,
    CountTokens,
    Delta,
    Ended,
    Failed,
    Generate,
    Hello,
    Load,
    Loaded,
    Progress,
    ProtocolError,
    RowCount,
    Started,
    decode,
    encode,
    ended_error,
    failure,
)

calmly = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
MESSAGES = [
    Load(id=1, model="smollm2-135m", quantize=4, memory="lean"),
    Load(id=1, model="é\u2028"),
    Generate(
        id=2, messages=[{"role": "user", "content": "hi\n\x1b"}], adapter="/a b", options={"seed": 1}, candidates=3
    ),
    Cancel(id=2),
    CountTokens(id=3, model="m", rows=[CountRow(messages=[{"role": "user", "content": "q"}], answers=["a", "b"])]),
    Hello(protocol=1, pid=5),
    Progress(id=1, text="loading"),
    Loaded(id=1, model="m", fingerprint="f", parameters=5, context=8192, device="cpu", memory="fast"),
    Started(id=2, candidate=1, prompt_tokens=7),
    Delta(id=2, candidate=1, text="ä 😀", tokens=3, tokens_per_second=12.5),
    Ended(id=2, candidate=1, reason="length", tokens=9, tokens_per_second=1.0),
    Counted(id=3, rows=[RowCount(prompt=5, answers=[2, 3]), RowCount(problem="no")]),
    Failed(id=3, problems=[{"where": "w", "message": "m", "fix": "f"}], exit_code=2),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_what_is_said_arrives(message):
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == message


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert decode(encode(Progress(text="a\ud800b"))).text == "a?b"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "is blank"),
        (b"hello, this is no JSON", "is not JSON"),
        (b"[]", "JSON list"),
        (b"\xff", "not UTF-8"),
        (b'{"type": "nothing"}', "no message 'nothing'"),
        (b'{"type": 5}', "no message 5"),
        (b'{"id": 1}', "no message None"),
        (b'{"type": "load", "id": 1}', "'model' is missing"),
        (b'{"type": "load", "id": 1, "model": 5}', "load.model: 5 is of the wrong type"),
        (b'{"type": "load", "id": true, "model": "m"}', "load.id: True"),
        (b'{"type": "load", "id": -1, "model": "m"}', "not within 0"),
        (b'{"type": "load", "id": 1, "model": "m", "memory": "much"}', "load.memory: 'much'"),
        (b'{"type": "load", "id": 1, "model": "m", "trust": 1}', "'trust' is not a field"),
        (b'{"type": "load", "id": 1, "model": "m", "model": "n"}', "twice"),
        (b'{"type": "cancel", "id": NaN}', "NaN"),
        (b'{"type": "generate", "id": 1, "messages": "hi"}', "generate.messages"),
        (b'{"type": "generate", "id": 1, "messages": [{"role": "user"}]}', "a role and a content"),
        (b'{"type": "generate", "id": 1, "messages": [], "candidates": 65}', "not within 1 to 64"),
        (b'{"type": "count_tokens", "id": 1, "model": "m", "rows": [{}]}', "'messages' is missing"),
        (b'{"type": "progress", "text": ' + b"[" * 100_000, "nested"),
        (b'{"type": "progress", "text": "' + b"x" * protocol.MAX_LINE_BYTES + b'"}', "longer than"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(line, why):
    with pytest.raises(ProtocolError, match=why.replace("(", r"\(")):
        decode(line)


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(ProtocolError, match="longer than"):
        encode(Progress(text="x" * protocol.MAX_LINE_BYTES))


@calmly
@given(st.binary(max_size=200))
def test_noise_is_refused_without_a_crash(noise):
    with pytest.raises(ProtocolError):
        decode(noise)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@calmly
@given(st.sampled_from(MESSAGES), st.data())
def test_messages_with_a_changed_field_are_refused_or_whole(message, data):
    value = json.loads(encode(message))
    key = data.draw(st.sampled_from(sorted(value)))
    if data.draw(st.booleans()):
        del value[key]
    else:
        value[key] = data.draw(json_values)
    try:
        decoded = decode(json.dumps(value).encode())
    except ProtocolError:
        return
    for entry in dataclasses.fields(decoded):
        assert entry.name in value or entry.default is not dataclasses.MISSING or entry.default_factory is not None
    assert decode(encode(decoded)) == decoded


def test_errors_keep_their_kind_and_sentences():
    for error in (InputError(Problem("w", "m", "f")), EnvironmentFault("full")):
        told = Failed(id=1, **failure(error)).error()
        assert type(told) is type(error)
        assert str(told) == str(error)
    mistake = Failed(id=1, **failure(KeyError("x"))).error()
    assert "internal error in the model host: KeyError" in str(mistake)
    assert Failed(id=1, **failure(MemoryError())).error().exit_code == 3
    assert ended_error(Ended(id=1, reason="stop")) is None
    assert "full" in str(ended_error(Ended(id=1, reason="error", **failure(EnvironmentFault("full")))))
