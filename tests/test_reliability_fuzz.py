"""Readers of files and messages that may come from anywhere: no crash, no hang, no traceback, whatever the bytes.

Hypothesis makes inputs that are nearly right, for every reader of readers.py. With --slow it makes many more, and
atheris, where it is installed, looks for inputs that reach new code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS

TESTS = Path(__file__).parent
_TOKENS = (
    b"", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\xe2\x80\xa8", b"{", b"}",
    b"[" * 70, b'"',
    b"\\ud800", b"NaN", b"1e999", b"9" * 400, b"null", b"-1", b": ", b"&a ", b"*a", b"<<: ", 
    b"!!python/object:os ", b"---\n",
    b"%", b"| ", b"\x1b]52;c;eA==\x07", b"../../x",
)  # fmt: skip


@st.composite
def nearly(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed with pieces cut out, doubled, or replaced by what parsers trip over."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 12)))
        middle = draw(st.sampled_from(_TOKENS) | st.binary(max_size=4) | st.just(data[start:end] * 2))
        data = data[:start] + middle + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def other_values(draw: st.DrawFn, seed: bytes) -> bytes:
    """The JSON object of a seed's first line with any value in any place of it."""
    whole = json.loads(seed.partition(b"\n")[0])
    inside = whole
    while True:
        key = draw(st.sampled_from(sorted(inside)))
        if not (isinstance(inside[key], dict) and inside[key]) or draw(st.booleans()):
            break
        inside = inside[key]
    inside[key] = draw(_values)
    return json.dumps(whole).encode()


def _inputs(name: str) -> st.SearchStrategy[bytes]:
    seeds = READERS[name].seeds
    wild = nearly(seeds) | st.binary(max_size=60)
    return wild | other_values(seeds[0]) if seeds[0].startswith(b"{") else wild


def _try(name: str, folder: Path, examples: int) -> None:
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    quiet(given(_inputs(name))(lambda data: READERS[name].read(data, folder)))()


@pytest.mark.parametrize("name", list(READERS))
def test_no_input_is_too_strange(name, tmp_path):
    _try(name, tmp_path, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(READERS))
def test_no_input_of_many_is_too_strange(name, tmp_path):
    _try(name, tmp_path, 1000)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("name", list(READERS))
def test_atheris_finds_no_crash(name, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(READERS[name].seeds):
        (corpus / str(number)).write_bytes(seed)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "tui"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzz.py"), name, str(tmp_path), str(corpus), "-runs=5000", "-timeout=60",
         "-max_total_time=60", f"-artifact_prefix={tmp_path}/"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
