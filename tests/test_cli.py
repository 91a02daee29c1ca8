"""The commands as a user types them: what they print, where, and the exit code. Nothing here loads a real model."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.console import doctor, failures
from localdpo.console.signals import StopSignals
from localdpo.console.training import resume_command
from localdpo.errors import EnvironmentFault, InputError, Interrupted, Problem

ROOT = Path(__file__).parents[1]


def localdpo(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def recipe_at(folder: Path, text: str = "", pairs: str = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n') -> Path:
    (folder / "pairs.jsonl").write_text(pairs)
    path = folder / "recipe.yaml"
    path.write_text("model: smollm2-135m\ndata: {train: pairs.jsonl}\n" + text)
    return path


def test_alone_and_without_a_terminal_it_prints_help():
    result = localdpo()
    assert result.exit_code == 0
    assert "train" in result.stdout
    assert "Exit codes" in result.stdout


def test_version():
    result = localdpo("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("localdpo 0.")


@pytest.mark.parametrize("command", ["init", "train", "chat", "models", "runs", "doctor"])
def test_every_command_explains_itself(command: str):
    result = localdpo(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "..." not in result.stdout.replace("[ARGS]...", "").replace("[OPTIONS]...", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "x.yaml", "--max-steps", "0"],
        ["train", "x.yaml", "--max-steps", "many"],
        ["train", "--nosuch"],
        ["nosuch"],
        ["chat", "--temperature", "-1"],
        ["chat", "--json"],
        ["chat", "--base", "--compare"],
        ["models", "info"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_bad_input(arguments: list[str]):
    result = localdpo(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_recipe_names_the_file(tmp_path: Path):
    result = localdpo("train", str(tmp_path / "no.yaml"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path / 'no.yaml'}: ")


def test_every_problem_of_a_recipe_is_told_with_its_line(tmp_path: Path):
    recipe = recipe_at(tmp_path, "lora: {r: 0}\ntrain: {learningrate: 1e-4}\n")
    result = localdpo("train", str(recipe), "--set", "dpo.beta=-1")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert any(f"{recipe}:3 lora.r" in line for line in lines)
    assert any("learning_rate" in line for line in lines)
    assert any("dpo.beta" in line for line in lines)


def test_max_steps_is_an_override(tmp_path: Path):
    recipe = recipe_at(tmp_path, "train: {warmup_steps: 5}\n")
    result = localdpo("train", str(recipe), "--max-steps", "3")
    assert result.exit_code == 2
    assert "warmup" in result.stderr


def test_chat_with_a_folder_that_is_no_run(tmp_path: Path):
    result = localdpo("chat", str(tmp_path), "-p", "hi")
    assert result.exit_code == 2
    assert "no run folder" in result.stderr


def test_chat_with_an_adapter_that_does_not_say_its_model_needs_it(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    result = localdpo("chat", str(tmp_path), "-p", "hi")
    assert result.exit_code == 2
    assert "has no adapters.safetensors" in result.stderr
    (tmp_path / "adapters.safetensors").touch()
    result = localdpo("chat", str(tmp_path), "-p", "hi")
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_the_tuned_model_needs_a_run():
    result = localdpo("chat", "--tuned", "-p", "hi")
    assert result.exit_code == 2
    assert "no tuned model" in result.stderr


def test_errors_are_sentences_made_inert(capsys: pytest.CaptureFixture[str]):
    assert failures.report(InputError(Problem("a.jsonl:3", "bad \x1b[2J", "Mend it"), "second")) == 2
    assert capsys.readouterr() == ("", "error: a.jsonl:3: bad ␛[2J. Mend it.\nerror: second.\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (EnvironmentFault("the disk is full"), 3, "error: the disk is full."),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 3, "error: x/y: No space left"),
        (OSError("odd"), 3, "error: odd"),
        (MemoryError(), 3, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("stopped", signal_number=signal.SIGTERM), 143, "error: stopped."),
        (ValueError("boom"), 1, "internal error: ValueError: boom"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]):
    assert failures.report(error) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]):
    try:
        raise ValueError("boom")
    except ValueError as error:
        failures.report(error, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m localdpo models --json | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_init_refuses_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = localdpo("init", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "file" in result.stderr


def test_resume_command_repeats_what_was_asked():
    command = resume_command(Path("my recipes/a.yaml"), ["dpo.beta=0.2", "train.max_steps=3"])
    assert command.endswith("train 'my recipes/a.yaml' --set dpo.beta=0.2 --set train.max_steps=3 --resume")


def test_doctor_reports_a_check_that_fails(monkeypatch: pytest.MonkeyPatch):
    def _broken():
        raise RuntimeError("no device")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", (_broken,))
    result = localdpo("doctor", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)[0]["level"] == "broken"
    assert "BROKEN  broken    RuntimeError: no device" in localdpo("doctor").stdout


def test_doctor_looks_at_everything():
    result = localdpo("doctor", "--json")
    assert result.exit_code == 0
    findings = {row["name"]: row for row in json.loads(result.stdout)}
    assert {"localdpo", "system", "device", "BLAS", "memory", "cache", "disk"} <= set(findings)
    assert all(row["value"] for row in findings.values())


def test_doctor_names_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = localdpo("doctor")
    assert result.exit_code == 3
    assert "cannot be written" in result.stdout


def test_the_first_signal_asks_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    asked = threading.Event()
    numbers = []
    with StopSignals(lambda number: (numbers.append(number), asked.set())) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(5)
    assert numbers == [signal.SIGTERM]
    assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_takes_the_wake_up_descriptor_loses_no_signal():
    asked = threading.Event()
    with StopSignals(lambda number: asked.set()):
        signal.set_wakeup_fd(-1)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)


def test_one_signal_is_acted_on_once():
    numbers: list[int] = []
    with StopSignals(numbers.append):
        os.kill(os.getpid(), signal.SIGINT)
    assert numbers == [signal.SIGINT]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(lambda number: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_leaves_at_once_even_while_the_main_thread_is_in_c():
    code = """
import ctypes, os, signal
from localdpo.console.signals import StopSignals
with StopSignals(lambda number: print("stopping", flush=True), lambda: print("left", flush=True)):
    print("ready", flush=True)
    ctypes.CDLL(None).pause()
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "stopping\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == "left\n"
        assert child.wait(timeout=10) == 130
