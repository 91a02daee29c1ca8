"""A process that edits a file of pairs until it is killed, and the model of what it does. Used by test_store_crash.py.

As a program it forks an editor for every line `path ack seed first` it reads: the editor does operation `first`, `first
+ 1` … and appends a byte to `ack` whenever one is acknowledged. What operations do follows from the seed and the rows.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass

from localdpo.data import store as store_module
from localdpo.data.store import PairDraft, PairStore

Pair = tuple[str, str, str]


@dataclass(frozen=True)
class Operation:
    """What to do: `kind` with row number `at`, and `text` to write."""

    kind: str
    at: int
    text: str


def operation(seed: int, number: int, rows: int) -> Operation:
    """The operation with this number on a file with so many rows."""
    rng = random.Random(f"{seed} {number}")
    kinds = ["insert", "update", "update", "update", "delete", "swap", "undo", "redo", "save", "flush"]
    kind = rng.choice(kinds if rows else ["insert"])
    return Operation(kind, rng.randrange(rows) if rows else 0, f"é {number} " + "x" * rng.choice((0, 10, 5000)))


class Model:
    """What the rows should be."""

    def __init__(self, rows: list[Pair]) -> None:
        self.rows = list(rows)
        self.undone: list[list[Pair]] = []
        self.done: list[list[Pair]] = []

    def do(self, op: Operation) -> None:
        before = list(self.rows)
        if op.kind == "undo" and self.done:
            self.undone.append(before)
            self.rows = self.done.pop()
        elif op.kind == "redo" and self.undone:
            self.done.append(before)
            self.rows = self.undone.pop()
        elif op.kind in ("insert", "update", "delete", "swap"):
            self._edit(op)
            if self.rows != before or op.kind in ("insert", "delete"):
                self.done.append(before)
                self.undone.clear()

    def _edit(self, op: Operation) -> None:
        rows = self.rows
        if op.kind == "insert":
            rows.insert(op.at + 1 if rows else 0, ("q " + op.text, "a", "b"))
        elif op.kind == "delete":
            del rows[op.at]
        elif op.kind == "update":
            rows[op.at] = (rows[op.at][0], op.text, rows[op.at][2])
        else:
            prompt, chosen, rejected = rows[op.at]
            rows[op.at] = (prompt, rejected, chosen)


def apply(store: PairStore, op: Operation) -> None:
    """Do the operation on a real store."""
    keys = store.keys
    key = int(keys[op.at]) if len(keys) else None
    if op.kind == "insert":
        store.insert(PairDraft.of("q " + op.text, "a", "b"), after=key)
    elif op.kind == "delete":
        store.delete([key])
    elif op.kind == "swap":
        store.swap(key)
    elif op.kind == "update":
        row = store.row(key)
        store.update(key, PairDraft(row.messages, op.text, row.rejected, row.tags, row.weight, row.extra, row.id))
    elif op.kind == "save":
        assert store.save().status in ("saved", "unchanged")
    else:
        getattr(store, op.kind)()


def pairs(store: PairStore) -> list[Pair]:
    """The rows as the model has them."""
    rows = [store.row(int(key)) for key in store.keys]
    return [(row.prompt[0]["content"], row.chosen, row.rejected) for row in rows]


def edit_for_ever(path: str, ack: str, seed: int, first: int) -> None:
    store_module._SAME_EDIT_SECONDS = 0.0  # every edit is a step of its own, so that the model need not know the time
    store = PairStore.open(path)
    acknowledged = os.open(ack, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(acknowledged, b"o")
    for number in range(first, first + 100_000):
        apply(store, operation(seed, number, len(store)))
        os.write(acknowledged, b".")


def main() -> None:
    for line in sys.stdin:
        path, ack, seed, first = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            edit_for_ever(path, ack, int(seed), int(first))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
