"""Nothing acknowledged is lost: editors killed at any moment, processes that edit one file, disks that are full."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_writer import Model, operation, pairs

from localdpo.data.store import PairDraft, PairStore

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


class Editors:
    """Forks editors that run until they are killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "store_writer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def __enter__(self) -> Editors:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def killed_after(self, path: Path, ack: Path, seed: int, first: int, count: int, more: float) -> int:
        """Run an editor, kill it `more` seconds after `count` acknowledgements; return how many there were."""
        ack.unlink(missing_ok=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(path, ack, seed, first, sep="\t", file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        deadline = time.monotonic() + 60
        while not ack.exists() or ack.stat().st_size < count + 1:
            assert time.monotonic() < deadline, "the editor does nothing"
            time.sleep(0.0005)
        time.sleep(more)
        os.kill(child, signal.SIGKILL)
        assert int(self.process.stdout.readline()) == -signal.SIGKILL
        return ack.stat().st_size - 1


def kill_repeatedly(folder: Path, kills: int, seed: int) -> None:
    """After every kill the rows are those of the last acknowledged operation, or of the one under way."""
    path, ack = folder / "pairs" / "a.jsonl", folder / "ack"
    path.parent.mkdir()
    path.write_bytes(b"".join(b'{"prompt":"p%d","chosen":"a","rejected":"b"}\r\n' % n for n in range(20)))
    rng = random.Random(seed)
    rows = [(f"p{n}", "a", "b") for n in range(20)]
    first = found = 0
    with Editors() as editors:
        for kill in range(kills):
            count = editors.killed_after(path, ack, seed, first, rng.randrange(12), rng.uniform(0, 0.004))
            model = Model(rows)  # a session begins without steps to undo
            for number in range(first, first + count):
                model.do(operation(seed, number, len(model.rows)))
            acknowledged = list(model.rows)
            model.do(operation(seed, first + count, len(model.rows)))
            with PairStore.open(path) as store:
                rows = pairs(store)
                found += store.recovered is not None
                assert rows in (acknowledged, model.rows), f"kill {kill} of seed {seed}"
            first += count + 1
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
    assert found > kills // 4, "the kills hit nothing that was unsaved"


def test_25_kills_lose_no_acknowledged_edit(tmp_path):
    kill_repeatedly(tmp_path, 25, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_500_kills_lose_no_acknowledged_edit(tmp_path, seed):
    kill_repeatedly(tmp_path, 100, seed=seed + 100)


ADD = """
import sys
from localdpo.data.store import PairDraft, PairStore
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = PairStore.open(path)
for number in range(count):
    store.insert(PairDraft.of(f"{name} {number}", "a", "b"), after=int(store.keys[0]))
    key = int(store.keys[-1])
    assert store.save().status == "saved"
store.close()
"""


def test_two_processes_that_edit_one_file_lose_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "first", "chosen": "a", "rejected": "b"}\n{"prompt":"last","chosen":"a","rejected":"b"}'
    )
    count = 12
    writers = [
        subprocess.Popen([sys.executable, "-c", ADD, str(path), name, str(count)], env=ENVIRONMENT) for name in "ABC"
    ]
    for writer in writers:
        assert writer.wait(120) == 0
    prompts = [json.loads(line)["prompt"] for line in path.read_text().split("\n")]
    assert prompts[0] == "first"
    assert prompts[-1] == "last"
    assert sorted(prompts[1:-1]) == sorted(f"{name} {number}" for name in "ABC" for number in range(count))


def test_a_live_editor_keeps_its_drafts_from_others(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with PairStore.open(path) as first:
        first.insert(PairDraft.of("mine"))
        with PairStore.open(path) as second:
            assert second.recovered is None
            assert len(second) == 1
    with PairStore.open(path) as third:
        assert third.recovered is not None
        assert third.recovered.rows == 1
        assert len(third) == 2
