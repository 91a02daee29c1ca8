"""The terminal UI as a user has it: in a real terminal (tmux), with the starter model, killed in every rude way.

What is checked is that the pieces fit and that nothing is lost, not what the model says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tmux import Terminal, needs_tmux, until

from localdpo.data.pairs import PreferencePair, read_pairs
from localdpo.data.provenance import origin_of, provenance_of
from localdpo.train.run import RunFolder

RECIPE = """
model: smollm2-135m
data: {train: ../pairs/athene.jsonl, eval: 0.1, retain: null, max_length: 64}
lora: {r: 4, num_layers: 1}
train: {max_steps: 10, per_device_train_batch_size: 1, learning_rate: 1.0e-3}
output_dir: runs/small
"""

pytestmark = needs_tmux


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    folder = tmp_path / "work"
    folder.mkdir()
    opened = Terminal(folder, tmp_path / "config")
    yield opened
    opened.close()


def begin(terminal: Terminal, folder: Path) -> Path:
    """Open the example in an empty folder; returns its file of pairs."""
    terminal.open()
    terminal.sees("example", "Quit")
    terminal.focuses("Open the Athene example")
    terminal.press("Enter")
    terminal.sees("athene.jsonl", "What")
    return folder / "pairs" / "athene.jsonl"


def edit_first(terminal: Terminal, text: str) -> None:
    """Type into the chosen answer of the first pair."""
    terminal.press("Home", "Enter")
    terminal.sees("$EDITOR")
    terminal.type(text)
    terminal.sees(text.strip())


def last(path: Path) -> PreferencePair:
    return read_pairs(path).pairs[-1]


def test_an_edit_survives_kill_9_and_a_closed_window(tmp_path: Path, terminal: Terminal):
    folder = tmp_path / "work"
    pairs = begin(terminal, folder)
    before = pairs.read_bytes()
    edit_first(terminal, "Well met! ")
    terminal.sees("not saved yet")  # and so in the drafts
    terminal.murder()
    assert pairs.read_bytes() == before
    terminal.open()
    terminal.sees("Well met!", "not saved yet")
    terminal.close()  # SIGHUP, this time
    terminal.open()
    terminal.sees("Well met!", "not saved yet")
    terminal.press("C-s")
    until(lambda: read_pairs(pairs).pairs[0].chosen.startswith("Well met! "), terminal.screen)
    assert pairs.read_bytes().splitlines()[1:] == before.splitlines()[1:]


def test_what_is_written_in_a_chat_survives_too(tmp_path: Path, terminal: Terminal):
    begin(terminal, tmp_path / "work")
    terminal.press("F4")
    terminal.sees("Talk with your model")
    terminal.type("a question not sent")
    terminal.sees("a question not sent")
    until(
        lambda: (
            "not sent" in (tmp_path / "work" / ".localdpo" / "ui.json").read_text()
            if (tmp_path / "work" / ".localdpo" / "ui.json").exists()
            else False
        ),
        lambda: terminal.screen(),
    )
    terminal.murder()
    terminal.open("--place", "chat")
    terminal.sees("a question not sent")


@pytest.mark.slow
def test_the_whole_loop(tmp_path: Path, terminal: Terminal, starter: Path):
    folder = tmp_path / "work"
    pairs = begin(terminal, folder)
    (folder / "recipes" / "small.yaml").write_text(RECIPE)

    # Edit a pair.
    edit_first(terminal, "Well met! ")
    terminal.sees("not saved yet")
    terminal.press("C-s")
    until(lambda: read_pairs(pairs).pairs[0].chosen.startswith("Well met! "), terminal.screen)
    count = len(read_pairs(pairs).pairs)

    # Generate one short candidate and correct it.
    terminal.press("Escape", "C-g")
    terminal.sees("No answers yet")
    terminal.move("n")
    terminal.type("1")
    terminal.sees("answers 1 ")
    terminal.press("Enter")
    terminal.sees("1 for 1 prompt", "c Correct")
    terminal.press("c")
    terminal.sees("It should say (chosen)")
    terminal.type(" Corrected.")
    terminal.sees("Corrected.")
    terminal.press("C-s")
    until(lambda: len(read_pairs(pairs).pairs) == count + 1, terminal.screen)
    corrected = last(pairs)
    assert corrected.chosen == f"{corrected.rejected} Corrected."
    origin = origin_of(corrected.extra, "rejected")
    assert origin is not None
    assert (origin.model, origin.seed, origin.sampling["temperature"]) == ("smollm2-135m", 0, 0.8)

    # Train ten steps, and lose the terminal while they run.
    terminal.sees("made into a pair")
    terminal.press("Escape", "F3")
    terminal.sees("Recipe: recipes/")
    if "recipes/small.yaml" not in terminal.screen():
        terminal.press("o")
        terminal.sees("Open a recipe")
        recipes = sorted(path.name for path in (folder / "recipes").glob("*.yaml"))
        terminal.press(*["Down"] * recipes.index("small.yaml"), "Enter")
        terminal.sees("Recipe: recipes/small.yaml")
    terminal.press("r")
    run = RunFolder(folder / "runs" / "small")
    until(run.is_running, terminal.screen)
    terminal.close()
    terminal.open("--place", "train")
    terminal.sees("small")
    state = until(
        lambda: (status := run.status()) is not None and status.state in ("finished", "failed", "stopped") and status,
        lambda: f"{run.status()}\n{terminal.screen()}",
    )
    assert (state.state, state.step) == ("finished", 10)
    terminal.sees("finished")

    # Chat with base and tuned, and make a pair of a reply.
    terminal.press("F4")
    terminal.sees("base | small")
    terminal.type("What is your name?")
    terminal.press("Enter")
    chats = folder / ".localdpo" / "chats"

    def answered() -> Any:
        for path in chats.glob("*.json"):
            turns = json.loads(path.read_text())["turns"]
            if turns and set(turns[0]["replies"]) == {"base", "tuned"}:
                return turns[0]
        return None

    turn = until(answered, terminal.screen)
    terminal.press("C-s")
    terminal.sees("It should say (chosen)")
    terminal.type(" And so it is.")
    terminal.sees("And so it is.")
    terminal.press("C-s")
    until(lambda: len(read_pairs(pairs).pairs) == count + 2, terminal.screen)
    assert last(pairs).rejected == turn["replies"]["tuned"]["text"]
    assert provenance_of(last(pairs).extra)["how"] == "reply"

    # Find everything again after kill -9.
    terminal.murder()
    terminal.open("--place", "chat")
    terminal.sees("base | small")
    terminal.press("C-l")
    terminal.sees("What is your name?", "1 turn")
    terminal.press("Enter")
    terminal.sees("What is your name?", "base", "small", "tok/s")
    terminal.press("F5")
    terminal.sees("small", "finished")
    terminal.press("F2")
    terminal.sees(f"{count + 2} pairs")
    terminal.press("C-g")
    terminal.sees("made into a pair")
