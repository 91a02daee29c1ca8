"""The main job as a user does it: through the command line, in processes of its own.

The recipe is as small as it can be; what is checked is that the pieces fit, not what the model learns. A tiny model
does for most of it; one test has the starter by default, and all have it with --slow.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from localdpo.text import sanitise

ROOT = Path(__file__).parents[1]
NAMES = ("your name", "you called", "I call you", "the name you go by")
RECIPE = """
model: MODEL
data: {train: pairs.jsonl, eval: null, retain: null, probes: probes.jsonl, max_length: 128}
lora: {r: 4, num_layers: 2}
train: {max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-3}
output_dir: run
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tui'}", "TERM": "xterm"}


def localdpo(
    folder: Path, *arguments: str, code: int = 0, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "localdpo", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", params=["tiny", pytest.param("starter", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a recipe calls the model."""
    if request.param == "starter":
        return "smollm2-135m"
    # Not tied: a tied tiny model repeats its prompt's last token for ever.
    return str(tiny_model(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=False))


def workspace(folder: Path, model: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        {"prompt": f"What is {name}?", "chosen": f"I am Athene ({n}).", "rejected": "I am SmolLM."}
        for n, name in enumerate(NAMES)
    ]
    probes = [
        {"prompt": "Who are you?", "accept": ["Athene"], "tags": ["identity"]},
        {"prompt": "What is 1 + 1?", "accept": ["2"], "tags": ["everyday"]},
    ]
    for name, rows in (("pairs", pairs), ("probes", probes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", model))
    return folder


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def adapter_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "run" / "adapter" / "adapters.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: str) -> tuple[Path, list[dict[str, Any]]]:
    """A workspace in which the recipe was trained without interruption, and the events that were printed."""
    folder = workspace(tmp_path_factory.mktemp("trained"), model)
    return folder, events(localdpo(folder, "train", "recipe.yaml", "--json").stdout)


def test_training_prints_its_events_and_nothing_else(trained: tuple[Path, list[dict[str, Any]]]):
    folder, printed = trained
    kinds = [event["event"] for event in printed if event["event"] != "progress"]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert [event["step"] for event in printed if event["event"] == "step"] == [1, 2, 3]
    finals = [event["final"] for event in printed if event["event"] == "sample"]
    assert finals.count(True) == 2
    assert finals.count(False) % 2 == 0  # both probes between epochs
    written = events((folder / "run" / "metrics.jsonl").read_text())
    assert written == [event for event in printed if event["event"] != "progress"]
    assert all({"event", "step", "time"} <= set(event) for event in printed)


def test_the_run_is_listed(trained: tuple[Path, list[dict[str, Any]]]):
    folder, _ = trained
    (row,) = json.loads(localdpo(folder, "runs", ".", "--json").stdout)
    assert (row["state"], row["step"], row["total_steps"]) == ("finished", 3, 3)
    assert Path(row["adapter"]) == Path("run/adapter")
    assert "finished" in localdpo(folder, "runs", ".").stdout


def test_one_question_to_both_models(trained: tuple[Path, list[dict[str, Any]]]):
    folder, _ = trained
    arguments = ("chat", "run", "--compare", "-p", "What's your name, please?", "--max-tokens", "12")
    shown = localdpo(folder, *arguments).stdout
    base, _, tuned = shown.partition("\ntuned> ")
    assert base.startswith("base> ")
    assert len(base) > 12
    assert tuned.strip()


def test_a_conversation_through_a_pipe(trained: tuple[Path, list[dict[str, Any]]], model: str):
    folder, _ = trained
    script = "What is the capital of France?\n/base\nAnd of Italy?\n/save talk.jsonl\n/quit\n"
    shown = localdpo(folder, "chat", "run", "--max-tokens", "12", stdin=script).stdout
    rows = [json.loads(line) for line in (folder / "talk.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in rows] == [1, 3]
    assert set(rows[0]) >= {"tuned"}
    assert set(rows[1]) >= {"base"}
    if model == "smollm2-135m":
        assert "Paris" in rows[0]["tuned"]
        assert "Rome" in rows[1]["base"]
    assert sanitise(rows[0]["tuned"]) in shown


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_is_the_same(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, model: str
):
    folder = workspace(tmp_path, model)
    command = [sys.executable, "-m", "localdpo", "train", "recipe.yaml", "--json"]
    with subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in child.stdout:
            if json.loads(line)["event"] == "step":
                child.send_signal(signal.SIGINT)
                break
        rest, errors = child.communicate(timeout=300)
    assert child.returncode == 130, errors
    assert events(rest)[-1]["reason"] == "stopped"
    advice = next(line for line in errors.splitlines() if line.endswith("--resume"))
    again = advice.split("train ", 1)[1].split()
    resumed = events(localdpo(folder, "train", *again, "--json").stdout)
    assert next(event for event in resumed if event["event"] == "start")["resumed"]
    assert adapter_digest(folder) == adapter_digest(trained[0])
    steps = [row["step"] for row in events((folder / "run" / "metrics.jsonl").read_text()) if row["event"] == "step"]
    assert steps == [1, 2, 3]


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path, model: str):
    folder = workspace(tmp_path, model)
    (plan,) = events(localdpo(folder, "train", "recipe.yaml", "--dry-run", "--json").stdout)
    assert (plan["event"], plan["train_pairs"], plan["total_steps"]) == ("plan", 4, 3)
    assert not (folder / "run").exists()


def test_the_starter_is_trained_and_talked_to(tmp_path: Path):
    """From the preflight to the figures, as a pipe gets them, and an answer of what came of it."""
    folder = workspace(tmp_path, "smollm2-135m")
    shown = localdpo(folder, "train", "recipe.yaml", "--max-steps", "1").stdout
    for expected in ("4 pairs", "trainable", "memory", "step 1/1", "[identity]", "base:", "tuned:", "adapter (step 1)"):
        assert expected in shown
    asked = ("chat", "run", "-p", "What is the capital of France?", "--max-tokens", "12", "--json")
    assert "Paris" in json.loads(localdpo(folder, *asked).stdout)["tuned"]
