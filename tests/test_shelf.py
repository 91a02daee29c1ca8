"""Sequences whose items lie in a file: equal to a list of the same items, and next to nothing in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from disks import mounted
from hypothesis import given
from hypothesis import strategies as st

from localdpo.data import shelf
from localdpo.data.encode import encoded_shelf
from localdpo.data.fields import Message
from localdpo.data.pairs import PreferencePair, pair_shelf
from localdpo.data.shelf import Shelf
from localdpo.errors import EnvironmentFault
from localdpo.sequences import EncodedRow, TokenSequence


@pytest.fixture(params=["in memory", "in a file"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    if request.param == "in a file":
        monkeypatch.setattr(shelf, "MEMORY_BYTES", 8)
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts() -> Shelf[str]:
    return Shelf(str.encode, bytes.decode)


def test_a_shelf_reads_like_a_list(place: Path):
    words = [f"word {n} " * (n % 5) for n in range(50)]
    kept = texts()
    kept.extend(words)
    assert len(kept) == 50
    assert list(kept) == words
    assert [kept[n] for n in (3, -1, 0)] == [words[n] for n in (3, -1, 0)]
    assert kept[40:5:-7] == words[40:5:-7]
    assert kept[60:] == []
    assert words[7] in kept
    with pytest.raises(IndexError):
        kept[50]
    assert list(place.iterdir()) == [], "the file has no name"


def test_picked_and_copied_shelves_go_their_own_ways(place: Path):
    kept = texts()
    kept.extend("abcde")
    picked, copied = kept.pick([4, 0, 0]), kept.copy()
    kept.append("f")
    picked.append("x")
    copied.append("y")
    assert ["".join(one) for one in (kept, picked, copied)] == ["abcdef", "eaax", "abcdey"]
    del kept
    assert "".join(picked) == "eaax"


def test_an_empty_shelf_is_false(place: Path):
    assert not texts()
    assert list(texts()) == []


TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.builds(Message, role=st.sampled_from(["user", "assistant", "system"]), content=TEXT), min_size=1),
    st.tuples(TEXT, TEXT),
    st.none() | TEXT,
    st.lists(TEXT, max_size=3),
    st.floats(0, 100),
    st.dictionaries(TEXT, JSON, max_size=3),
)
def test_pairs_come_back_equal(prompt, answers, identity, tags, weight, extra):
    pair = PreferencePair(
        tuple(prompt), *answers, identity, tuple(tags), weight, "retain", (extra,), extra, line=7, source="p.jsonl"
    )
    kept = pair_shelf()
    kept.append(pair)
    assert kept[0] == pair
    assert (kept[0].line, kept[0].source, kept[0].kind) == (7, "p.jsonl", "retain")


def test_encoded_pairs_come_back_equal(place: Path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 50_000, size, np.int32) for size in (40, 7, 1)]
    pairs = [
        EncodedRow.of(parts[0], parts[1:], 0.25, "retain", 3, 12, "p.jsonl"),
        EncodedRow(tuple(TokenSequence(part, part[::2]) for part in parts)),
    ]
    kept = encoded_shelf()
    kept.extend(pairs)
    for ours, theirs in zip(kept, pairs, strict=True):
        for own, other in zip(ours.sequences, theirs.sequences, strict=True):
            assert own.key == other.key
            for name in ("prompt_ids", "completion_ids"):
                assert getattr(own, name).dtype == np.int32
                np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
        for name in ("weight", "kind", "row", "line", "source", "num_tokens"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_memory_does_not_grow_with_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path))
    kept = texts()
    tracemalloc.start()
    for _ in range(20_000):
        kept.append("x" * 2000)
    assert sum(map(len, kept)) == 40_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 1000)
    with mounted(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("LOCALDPO_CACHE", str(disk.path))
        kept = texts()
        with pytest.raises(EnvironmentFault, match="No space left on device") as fault:
            kept.extend(["x" * 5000] * 100)
        assert str(disk.path) in str(fault.value)
        del kept, fault


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 8)
    tmp_path.chmod(0o500)
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    kept = texts()
    kept.extend(["abc"] * 10)
    assert list(kept) == ["abc"] * 10


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path):
    code = (
        "import os, signal\nfrom localdpo.data import shelf\nshelf.MEMORY_BYTES = 8\n"
        "kept = shelf.Shelf(str.encode, bytes.decode)\nkept.extend(['x' * 100] * 1000)\n"
        "assert kept[999] == 'x' * 100\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "LOCALDPO_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []
