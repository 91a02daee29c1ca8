"""Hostile text through every way out, in a real terminal: it is seen, and does nothing.

What a terminal would obey is told by `vt.Screen`; `hostile.HOSTILE` holds one of each kind of attack.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import hostile
import pytest
from hostile import CORPUS, HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from vt import ROOT, Ran, Screen, localdpo_in_terminal

from localdpo.console import terminal
from localdpo.console.failures import report
from localdpo.text import UNSAFE_RANGES, StreamSanitiser, inert_json, sanitise

NAME = "e" + CORPUS["clipboard"] + CORPUS["bidi"] + CORPUS["C1 CSI"] + "[bold]" + CORPUS["invisible"]
RECIPE = """
model: model
data: {train: pairs.jsonl, eval: null, retain: null, probes: probes.jsonl, max_length: 600}
lora: {r: 2}
train: {max_steps: 2, per_device_train_batch_size: 2}
output_dir: run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, probes, recipes and a model that all hold hostile text, in their names too."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile.parrot_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / f"{NAME}.jsonl")
    (folder / "raw.jsonl").write_bytes(b'{"prompt": "a\x9b31m\x1b]0;owned\x07"}\n{"x\x1b]0;o\x07": 1}\n')
    (folder / "keys.jsonl").write_text(json.dumps({HOSTILE: 1, "prompt": "a", "chosen": "b"}) + "\n")
    probes = [{"prompt": HOSTILE, "accept": [HOSTILE], "tags": [HOSTILE]}, {"prompt": f"x{HOSTILE}", "accept": ["y"]}]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(
        json.dumps(
            {"model": HOSTILE, "data": {"train": HOSTILE}, HOSTILE: HOSTILE, "train": {"learning_rate": HOSTILE}}
        )
    )
    (folder / "broken.yaml").write_bytes(b"a: [\x1b]0;owned\x07\n")
    run = folder / "runs" / NAME
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"model": {"spec": HOSTILE}, "id": HOSTILE}))
    (run / "status.json").write_text(json.dumps({"state": HOSTILE, "message": HOSTILE + "\ud800", "host": HOSTILE}))
    return folder


def write_pairs(path: Path) -> None:
    rows = [
        {
            "prompt": f"{n}{HOSTILE}",
            "chosen": f"{HOSTILE}{n}",
            "rejected": HOSTILE,
            "tags": [HOSTILE],
            "id": f"{n}{HOSTILE}",
        }
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_corpus_attacks_a_terminal_that_gets_it_as_it_is():
    """Without this the other tests here would prove nothing."""
    found = {name for name, text in CORPUS.items() if Screen.of(text.encode()).attacks}
    assert set(CORPUS) - found == {"carriage return", "markup", "html"}
    screen = Screen.of(HOSTILE.encode())
    assert len(screen.effects) > 40
    assert screen.modes
    assert screen.coloured


@pytest.mark.parametrize("name", CORPUS)
def test_each_attack_is_shown_and_does_nothing(name: str):
    assert not Screen.of(sanitise(CORPUS[name]).encode()).attacks
    assert not Screen.of(inert_json({CORPUS[name]: [CORPUS[name]]}, indent=1).encode()).attacks
    assert json.loads(inert_json(CORPUS[name])) == CORPUS[name]


@given(st.integers(1, 5))
def test_split_at_any_place_it_does_nothing_either(length: int):
    stream = StreamSanitiser()
    shown = [stream.feed(piece) for piece in hostile.pieces(HOSTILE, length)] + [stream.close()]
    assert "".join(shown) == sanitise(HOSTILE)
    assert not any(Screen.of(piece.encode()).attacks for piece in shown)


@settings(max_examples=300)
@given(
    st.text(
        alphabet=st.one_of(st.sampled_from([chr(code) for pair in UNSAFE_RANGES for code in pair]), st.characters())
    )
)
def test_no_text_steers_a_terminal(text: str):
    assert not Screen.of(sanitise(text).encode()).attacks
    shown = inert_json(text)
    assert not Screen.of(shown.encode()).attacks
    assert json.loads(shown) == text


WAYS_OUT: tuple[tuple[Sequence[str], int], ...] = (
    (("pairs", "check", "pairs.jsonl"), 1),
    (("pairs", "check", f"{NAME}.jsonl"), 1),
    (("pairs", "check", "--json", "pairs.jsonl"), 1),
    (("pairs", "check", "raw.jsonl"), 2),
    (("pairs", "check", "keys.jsonl"), 2),
    (("pairs", "stats", f"{NAME}.jsonl"), 0),
    (("pairs", "stats", "--json", f"{NAME}.jsonl"), 0),
    (("pairs", "export", "pairs.jsonl", "--to", "jsonl", "--out", "-"), 0),
    (("pairs", "export", "pairs.jsonl", "--to", "csv", "--out", "-"), 0),
    (("pairs", "import", NAME, "--out", "x.jsonl"), 2),
    (("train", "bad.yaml"), 2),
    (("train", "broken.yaml"), 2),
    (("train", NAME), 2),
    (("train", "recipe.yaml", "--set", f"{NAME}=1"), 2),
    (("train", "recipe.yaml", "--set", f"model={NAME}"), 2),
    (("runs", "runs"), 0),
    (("runs", "runs", "--json"), 0),
    (("runs", NAME), 2),
    (("chat", f"runs/{NAME}"), 2),
    (("models", "info", NAME), 2),
    (("models", "get", f"owner/{NAME}"), 2),
    (("export", NAME, "--to", NAME), 2),
    (("export", NAME, "--to", "peft"), 2),
    (("doctor", f"runs/{NAME}"), 2),
    (("doctor", "."), 2),
    ((NAME,), 2),
    (("chat", f"--{NAME}"), 2),
    (("chat", "--model", NAME, "-p", "x", "--debug"), 2),
    (("chat", "--model", "model", "-p", HOSTILE, "--temperature", "0", "--max-tokens", "300"), 0),
    (("chat", "--model", "model", "-p", HOSTILE, "--temperature", "0", "--max-tokens", "300", "--json"), 0),
)


@pytest.mark.parametrize(("words", "code"), WAYS_OUT, ids=[" ".join(map(ascii, words))[:60] for words, _ in WAYS_OUT])
def test_nothing_a_command_says_steers_the_terminal(
    folder: Path, words: Sequence[str], code: int, monkeypatch: pytest.MonkeyPatch
):
    (ran,) = localdpo_in_terminal(folder, [words], monkeypatch)
    assert_inert(ran)
    assert ran.code == code, ran.output.decode(errors="replace")


def assert_inert(ran: Ran) -> None:
    assert ran.screen.attacks == [], ran.output.decode(errors="replace")
    assert b"Traceback" not in ran.output or "--debug" in ran.words
    assert b"internal error" not in ran.output


def test_the_model_does_say_it_and_all_of_it_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("chat", "--model", "model", "-p", "x", "--temperature", "0", "--max-tokens", "300")
    plain, as_json = localdpo_in_terminal(folder, [words, (*words, "--json")], monkeypatch)
    assert plain.screen.text.replace("\r\n", "\n").rstrip() == sanitise(HOSTILE).strip()
    assert json.loads(as_json.output)["base"] == HOSTILE.strip()


def test_a_conversation_at_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch):
    typed = "hello\n/save\n/nonsense\x1b]0;owned\x07\n/quit\n"
    with monkeypatch.context() as patched:
        # readline would take the terminal of this process; reading lines is no matter of this test.
        patched.setattr("localdpo.console.talk.line_reader", lambda _interactive: iter(typed.splitlines()).__next__)
        (ran,) = localdpo_in_terminal(
            folder, [("chat", "--model", "model", "--temperature", "0", "--max-tokens", "300")], patched
        )
    assert_inert(ran)
    assert "unknown command" in ran.screen.text
    assert "end" in ran.screen.text
    (saved,) = folder.glob("chat-*.jsonl")
    assert json.loads(saved.read_text())["base"] == HOSTILE.strip()
    saved.unlink()


def test_training_shows_hostile_probes_rows_and_answers_inert(folder: Path, monkeypatch: pytest.MonkeyPatch):
    steps = (
        ("train", "recipe.yaml", "--dry-run"),
        ("train", "recipe.yaml"),
        ("runs", "."),
        ("doctor", "run"),
        ("eval", "run", "--pairs", "pairs.jsonl", "--no-drift"),
        ("report", "run"),
    )
    done = localdpo_in_terminal(folder, steps, monkeypatch)
    for ran in done:
        assert_inert(ran)
        assert ran.code == 0, ran.output.decode(errors="replace")
    trained, runs = done[1:3]
    assert "finished" in runs.screen.text
    assert "␛]52;c;" in trained.screen.text  # the answers of the closing table
    metrics = (folder / "run" / "metrics.jsonl").read_bytes()
    assert not Screen.of(metrics).attacks  # a log that is looked at with cat


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError, KeyError])
def test_errors_of_any_kind_are_inert(kind: type[Exception], debug: bool, monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    try:
        raise kind(HOSTILE) from ValueError(HOSTILE)
    except kind as error:
        report(error, debug)
    assert "1;5;7m" in shown.getvalue()
    assert not Screen.of(shown.getvalue().encode()).attacks


def test_what_libraries_log_and_warn_of_is_inert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    handler = logging.StreamHandler(stream := io.StringIO())
    logger = logging.getLogger("test_untrusted_text")
    logger.addHandler(handler)
    try:
        terminal.quieten_libraries()
        logger.error("a tokenizer of class %s, %s", HOSTILE, {"a": 1})
        text = warnings.formatwarning(HOSTILE, UserWarning, HOSTILE, 1, HOSTILE)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert "a tokenizer of class ␛[31;5;7m" in stream.getvalue()
    assert not Screen.of(stream.getvalue().encode()).attacks
    assert not Screen.of(text.encode()).attacks


def _is_safe(node: ast.expr) -> bool:
    """Whether what is printed is a constant, a formatted number, or went through the one sanitiser."""
    match node:
        case ast.Constant():
            return True
        case ast.JoinedStr(values=values):
            return all(map(_is_safe, values))
        case ast.FormattedValue(value=value, format_spec=spec):
            return spec is not None or _is_safe(value)
        case ast.Call(func=ast.Name(id="sanitise" | "inert_json")):
            return True
        case ast.Call(func=ast.Attribute(attr="dumps"), keywords=keywords):
            return not any(keyword.arg == "ensure_ascii" for keyword in keywords)
    return False


def test_nothing_is_printed_past_the_sanitiser():
    """`say` is the way to print; a bare print may hold constants, numbers, ASCII JSON and what was sanitised."""
    found = []
    for path in sorted((ROOT / "localdpo").rglob("*.py")):
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)) if "print(" in source else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found += [f"{path.relative_to(ROOT)}:{node.lineno}" for argument in node.args if not _is_safe(argument)]
    allowed = {"localdpo/console/terminal.py", "localdpo/console/pairs_generate.py"}  # redrawn lines, from constants
    assert [place for place in found if place.split(":")[0] not in allowed] == []


def test_no_title_of_the_ui_is_read_as_markup():
    """Titles and tooltips that are not constants are `Content`, and every field of input is a `SafeInput`."""
    found = []
    for path in sorted((ROOT / "tui" / "localdpo_tui").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                name, value = node.targets[0].attr, node.value
                titled = name in ("border_title", "border_subtitle", "tooltip", "placeholder")
                if titled and not _is_content(value):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Input":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} Input")
    assert found == []


def _is_content(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.IfExp(body=body, orelse=other):
            return _is_content(body) and _is_content(other)
        case ast.Call(func=ast.Name(id="Content" | "inert")):
            return True
        case ast.JoinedStr(values=values):
            return all(isinstance(part, ast.Constant) or part.format_spec is not None for part in values)  # type: ignore[union-attr]
    return False
