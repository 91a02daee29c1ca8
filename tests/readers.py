"""Everything that reads what may come from anywhere, as functions of bytes: what the fuzzers call.

Each function returns for any bytes, or raises what it says it raises, which `read` swallows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from localdpo.console.listing import run_row
from localdpo.data.pairs import read_pairs, read_prompts
from localdpo.data.store import PairStore
from localdpo.errors import LocalDPOError
from localdpo.files import verify_folder
from localdpo.recipe import Recipe, load_recipe
from localdpo.recipe_edit import RecipeEdit
from localdpo.serve.protocol import ProtocolError, decode
from localdpo.train.run import RunFolder, find_runs
from localdpo.train.snapshot import open_again

PAIR = b'{"prompt": "q", "chosen": "a", "rejected": "b", "tags": ["x"], "weight": 2}'
TURNS = (
    b'{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "chosen": "a",'
    b' "rejected": [{"role": "assistant", "content": "b"}], "tools": [], "id": 7, "mine": null}'
)
RECIPE = b"""model: smollm2-135m
data:
  train: pairs.jsonl
  eval: 0.1
lora: {r: 8, alpha: 16, num_layers: all}
dpo: &dpo {beta: 0.1, loss_type: sigmoid}
train: {learning_rate: 1.0e-4, max_steps: 3}  # a comment
"""


def _pairs(data: bytes, folder: Path) -> None:
    (folder / "pairs.jsonl").write_bytes(data)
    for reader in (read_pairs, read_prompts):
        try:
            reader(folder / "pairs.jsonl")
        except LocalDPOError as error:
            str(error).encode()


def _store(data: bytes, folder: Path) -> None:
    path = folder / "pairs.jsonl"
    path.write_bytes(data)
    with PairStore.open(path, drafts=folder / "drafts") as store:
        store.build_index()
        for key in store.keys[:5]:
            store.row(int(key))
            store.summary(int(key))
    assert path.read_bytes() == data


def _recipe(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        load_recipe(path, [])
    except LocalDPOError as error:
        str(error).encode()
    edit = RecipeEdit.open(path)
    edit.problems(check_files=False)
    edit.set("dpo.beta", "0.5")


def _override(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(RECIPE)
    load_recipe(path, [data.decode("utf-8", "replace")])


def _run_file(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        run = RunFolder(folder / "runs" / "a")
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / "run.json").write_bytes(b'{"id": 1, "recipe": {}, "files": {}}')
        (run.path / name).write_bytes(data)
        find_runs(folder / "runs")
        run.samples()
        list(run.every_event())
        run.events(len(data) // 2, 64)
        json.dumps(run_row(run))
        recipe = Recipe.model_validate(
            {"model": "m", "output_dir": run.path, "data": {"train": folder / "none.jsonl", "retain": None}}
        )
        with open_again(recipe, {}).run as active:
            active.bind_model("m", "f")

    return read


def _manifest(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    verify_folder(folder)


def _message(data: bytes, folder: Path) -> None:
    decode(data)


@dataclass(frozen=True)
class Reader:
    """What reads bytes in a folder of its own, and inputs that are nearly right."""

    read_bytes: Callable[[bytes, Path], None]
    seeds: tuple[bytes, ...]

    def read(self, data: bytes, folder: Path) -> None:
        """Read; a refusal is fine, and so is a message for people that can be written."""
        try:
            self.read_bytes(data, folder)
        except LocalDPOError as error:
            str(error).encode()
        except ProtocolError:
            pass


STATUS = (
    b'{"state": "training", "step": 3, "total_steps": 9, "best_loss": null, "updated": 1.5, "pid": 1, "attempt": 1}'
)
STEP = b'{"event": "step", "step": 1, "time": 1.0, "total_steps": 2, "eta_seconds": 1.0, "loss": 0.5}'
SAMPLE = b'{"event": "sample", "step": 1, "prompt": [{"role": "user", "content": "q"}], "tuned": "x", "tags": ["a"]}'
INFO = (
    b'{"id": "x", "recipe": {"seed": 0, "train": {"max_steps": 5}}, "files": {"data.train": {"path": "p", '
    b'"sha256": "0"}}, "model": {"spec": "m", "fingerprint": "f"}, "fork": {"run": "a", "step": 1, "changes": []}}'
)
READERS = {
    "pairs": Reader(_pairs, (PAIR + b"\n" + TURNS, b"\xef\xbb\xbf" + PAIR + b"\r\n\r\n" + PAIR)),
    "store": Reader(_store, (PAIR + b"\n" + TURNS, b"\xef\xbb\xbf" + PAIR + b"\r\n\r\n" + PAIR)),
    "recipe": Reader(_recipe, (RECIPE,)),
    "override": Reader(_override, (b"dpo.beta=0.2", b"data={train: x}", b"lora.target_modules=[a, b]")),
    "run.json": Reader(_run_file("run.json"), (INFO,)),
    "status.json": Reader(_run_file("status.json"), (STATUS,)),
    "metrics.jsonl": Reader(_run_file("metrics.jsonl"), (STEP + b"\n" + SAMPLE + b"\n",)),
    "samples.jsonl": Reader(_run_file("samples.jsonl"), (SAMPLE + b"\n",)),
    "manifest": Reader(_manifest, (b'{"files": {"a/b": {"size": 3, "sha256": "00"}, "manifest.json": {"size": 0}}}',)),
    "message": Reader(_message, (b'{"type": "generate", "id": 1, "messages": [{"role": "user", "content": "q"}]}',)),
}
