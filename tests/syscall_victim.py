"""A process that saves something and may be killed at any system call of it. Used by test_reliability_syscalls.py.

For every line `operation folder` it forks a child that prepares, says "ready", waits for a line "go" and saves; its
exit code follows. Nothing is loaded twice, and nothing evaluated before the fork, which the threads of an array
library do not survive.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from tiny import tiny_model

from localdpo.data.order import Position
from localdpo.data.store import PairDraft, PairStore
from localdpo.files import write_json
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, adapter_weights, attach_lora, write_adapter
from localdpo.recipe import TrainRecipe
from localdpo.train.checkpoint import TrainState, prune, save_checkpoint
from localdpo.train.events import StepEvent
from localdpo.train.optimizer import AdapterOptimizer
from localdpo.train.run import ActiveRun, acquire

VALUES = {"old": 1.0, "new": 2.0}
"""What every weight of an adapter is, before and after."""


def acknowledge(folder: Path, text: str) -> None:
    """Note on disk that something was done, beside what is tested."""
    fd = os.open(folder.with_name("acknowledged"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def _model(folder: Path):
    place = folder.with_name("model")
    loaded = load_model(str(place if place.is_dir() else tiny_model(place)))
    return loaded, attach_lora(loaded.model, LoraSettings(rank=1, num_layers=1))


def checkpoint(folder: Path, which: str) -> Callable[[], None]:
    loaded, info = _model(folder)
    optimizer = AdapterOptimizer(loaded.model, TrainRecipe())
    step = {"old": 1, "new": 2}[which]

    def save() -> None:
        save_checkpoint(folder, TrainState(step, Position(), 9, (0, 1)), optimizer.state(), loaded, info)
        acknowledge(folder, which)
        prune(folder, 1)

    return save


def adapter(folder: Path, which: str) -> Callable[[], None]:
    loaded, info = _model(folder)
    weights = {name: mx.full(value.shape, VALUES[which]) for name, value in adapter_weights(loaded.model).items()}
    mx.eval(weights)

    def save() -> None:
        write_adapter(folder, weights, info)
        acknowledge(folder, which)

    return save


def results(folder: Path, which: str) -> Callable[[], None]:
    def save() -> None:
        write_json(folder / "eval.json", {"which": which, "figures": list(range(3000))})
        acknowledge(folder, which)

    return save


def pairs(folder: Path, which: str) -> Callable[[], None]:
    path = folder / "pairs.jsonl"
    if which == "old":
        path.write_bytes(b'{"prompt":"first","chosen":"a","rejected":"b", "mine": [1,  2]}\r\n{"prompt":"p1",')
        path.write_bytes(path.read_bytes() + b'"chosen":"a","rejected":"b"}')
        return lambda: None
    store = PairStore.open(path)

    def save() -> None:
        for number in range(2, 4):
            store.insert(PairDraft.of(f"p{number}", "a", "b"), after=int(store.keys[-1]))
            acknowledge(folder, f"p{number}")
        store.flush()
        assert store.save().status == "saved"
        acknowledge(folder, "saved")
        store.delete([int(store.keys[1])])
        acknowledge(folder, "-p1")
        store.close()

    return save


def run(folder: Path, which: str) -> Callable[[], None]:
    active = ActiveRun(folder, acquire(folder))

    def save() -> None:
        for step in (1, 2) if which == "old" else (3, 4):
            active.log(StepEvent(step=step, metrics={"loss": 0.5}))
            active.sync()
            acknowledge(folder, str(step))
            active.set_status(state=("training", "paused")[step % 2], step=step)
            acknowledge(folder, f"status {step}")

    return save


OPERATIONS = {operation.__name__: operation for operation in (checkpoint, adapter, results, pairs, run)}


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        operation, folder, which = line.rstrip("\n").split("\t")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            save = OPERATIONS[operation](Path(folder), which)
            print(f"ready {os.getpid()}", flush=True)
            os.read(read, 1)
            save()
            os._exit(0)
        sys.stdin.readline()
        os.write(write, b"g")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(read)
        os.close(write)
        print(code, flush=True)


if __name__ == "__main__":
    main()
