"""`localdpo pairs check` and `pairs stats` as a user types them, and what --fix leaves behind."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import BUILDERS, PANDALM, clean_pairs
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.console import pairs_check, pairs_stats
from localdpo.data.check.findings import found
from localdpo.data.check.fix import fix_file, signature_of
from localdpo.data.check.report import Report, check_file
from localdpo.data.stats import Histogram, file_stats
from localdpo.errors import EnvironmentFault, InputError

ROOT = Path(__file__).parents[1]
ATHENE = ROOT / "recipes" / "athene.jsonl"


def localdpo(*arguments: str | Path):
    return CliRunner().invoke(app, ["pairs", *map(str, arguments)])


def write(path: Path, *rows: dict[str, Any] | bytes | str) -> Path:
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) + "\n" for row in rows]
    path.write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def row(n: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea of {n}", **changes}


# The exit code and the two forms of output


def test_shipped_pairs_end_with_0():
    result = localdpo("check", ATHENE)
    assert result.exit_code == 0, result.output
    assert f"{len(ATHENE.read_text('utf-8').splitlines())} pairs" in result.stdout
    assert "warning" not in result.stdout
    assert result.stderr == ""


def test_warnings_end_with_1_and_errors_with_2(tmp_path: Path):
    again = write(tmp_path / "a.jsonl", row(1), row(1))
    assert localdpo("check", again).exit_code == 1
    broken = write(tmp_path / "b.jsonl", row(1), row(1), "oops\n")
    result = localdpo("check", broken)
    assert result.exit_code == 2
    assert "line 3\n" in result.stdout
    assert "1 error, 1 warning" in result.stdout


def test_json_is_a_list_of_findings_whatever_is_wrong(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", row(1), row(1, id=3), b"\xff\n", row(2, rejected=None))
    result = localdpo("check", path, "--json")
    findings = json.loads(result.stdout)
    assert [(f["kind"], f["severity"], f["rows"]) for f in findings] == [
        ("encoding", "error", [3]),
        ("schema", "error", [4]),
        ("duplicate", "warning", [2]),
    ]
    assert set(findings[0]) == {"kind", "severity", "file", "rows", "message", "fix", "fixable", "details"}
    assert findings[2]["fixable"] is True
    assert json.loads(localdpo("check", write(tmp_path / "c.jsonl", row(1)), "--json").stdout) == []


def test_an_empty_file_is_an_error_in_the_list(tmp_path: Path):
    result = localdpo("check", write(tmp_path / "a.jsonl", "\n\n"), "--json")
    assert (result.exit_code, json.loads(result.stdout)[0]["message"]) == (2, "0 pairs: the file is empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["check", "no-such.jsonl"],
        ["check", "."],
        ["stats"],
        ["stats", "no-such.jsonl"],
        ["check", "--nosuch"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_checked_is_bad_input(arguments: list[str]):
    result = localdpo(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_eval_file_is_bad_input(tmp_path: Path):
    result = localdpo("check", ATHENE, "--eval", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr


def test_a_held_out_file_is_compared(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", row(1), row(2))
    held_out = write(tmp_path / "held.jsonl", row(3), row(2, chosen="x"), "broken\n")
    (finding,) = json.loads(localdpo("check", train, "--eval", held_out, "--json").stdout)
    assert (finding["kind"], finding["rows"], finding["details"]["train_rows"]) == ("leak", [2], [2])
    assert finding["file"] == str(held_out)
    assert "line 2 of" in localdpo("check", train, "--eval", held_out).stdout


def recipe(folder: Path, **data: Any) -> Path:
    lines = "".join(f"  {key}: {value}\n" for key, value in {"train": "pairs.jsonl", **data}.items())
    path = folder / "recipe.yaml"
    path.write_text(f"model: no-such/model\ndata:\n{lines}")
    return path


def test_a_recipe_names_the_file_its_probes_and_its_length(tmp_path: Path):
    write(tmp_path / "pairs.jsonl", *(row(n, chosen=f"It is {n} " * 30) for n in range(3)))
    write(tmp_path / "probes.jsonl", {"prompt": "What is 2?", "accept": ["2"]})
    result = localdpo("check", "--recipe", recipe(tmp_path, probes="probes.jsonl", max_length=64), "--json")
    findings = {f["kind"]: f for f in json.loads(result.stdout)}
    assert findings["leak"]["rows"] == [1]
    assert findings["too_long"]["rows"] == [1, 2, 3]
    assert findings["too_long"]["details"] == {"max_length": 64, "estimated": True}


def test_estimates_say_that_they_are(tmp_path: Path):
    write(tmp_path / "pairs.jsonl", row(1, chosen="word " * 5000))
    result = localdpo("check", "--recipe", recipe(tmp_path))
    assert "estimated 1,024 tokens" in result.stdout
    assert "no-such/model is not on this machine" in result.stdout


def test_tokens_are_counted_with_a_model_s_tokenizer(tmp_path: Path):
    from tiny import tiny_model

    folder = tiny_model(tmp_path / "model")
    path = write(tmp_path / "pairs.jsonl", *(row(n) for n in range(3)), row(9, chosen="☃" * 100))
    counter, note = pairs_check.exact_counter(str(folder), 0, required=True)
    assert counter is not None
    assert note == ""
    stats = file_stats(path, counter)
    assert not stats.estimated
    # A byte-level tokenizer with next to no merges: a snowman is three tokens, and one ends the turn.
    assert stats.tokens["chosen"].high == 301
    limited, _ = pairs_check.exact_counter(str(folder), 250, required=True)
    report = check_file(path, pairs_check.CheckOptions(max_length=250, counter=limited))
    assert [(f.kind, f.rows, f.details["estimated"]) for f in report.findings] == [("too_long", (4,), False)]


# What is shown


def test_untrusted_text_is_inert(tmp_path: Path):
    bad = "x\x1b]0;owned\x07\u202e"
    path = write(tmp_path / "a.jsonl", row(1, chosen=bad), f'{{"{bad}": 1}}'.replace("\x1b", "\\u001b") + "\n")
    for arguments in (["check", path], ["stats", path]):
        output = localdpo(*arguments).output
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", output)


def test_many_broken_lines_are_counted_not_listed(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *(f'{{"key{n}": 1, "key{n}": 2}}\n' for n in range(30)))
    result = localdpo("check", path)
    assert result.stdout.count("broken row:") == 10
    assert "and 20 more" in result.stdout


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_narrow_terminal_gets_wrapped_lines(columns: int):
    report = Report("f.jsonl", 2, 0, [found("duplicate", "2 pairs repeat an earlier one", [2, 3], file="f.jsonl")])
    shown = [text for text, _ in pairs_check.lines(report, columns)]
    assert max(map(len, shown)) <= columns
    assert " ".join(" ".join(shown).split()) == " ".join(" ".join(t for t, _ in pairs_check.lines(report)).split())


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    main, side = pty.openpty()
    code = "from localdpo.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    environment.pop("CI", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=side, stdout=side, stderr=side, env=environment, close_fds=True
    )
    os.close(side)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # Linux says EIO when the other end is gone
        pass
    finally:
        os.close(main)
        process.wait(60)
    return output.decode()


def test_colour_is_for_terminals_that_want_it(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", row(1), row(1))
    coloured = on_a_terminal(["pairs", "check", str(path)], COLUMNS="60")
    assert "\x1b[33mwarning" in coloured
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_a_terminal(["pairs", "check", str(path)], **environment)
        assert "\x1b[33m" not in plain
        assert "warning" in plain


# --fix


def fix(path: Path):
    return fix_file(path, check_file(path).findings, signature_of(path))


def test_fix_mends_what_is_safe_and_leaves_every_other_byte(tmp_path: Path):
    kept = [
        b'\xef\xbb\xbf{"prompt":"a",  "chosen":"b\\u0021", "rejected":"c", "weight":1.50}\r\n',
        b"\n",
        '{"prompt": "ä", "chosen": "b", "rejected": "c"}\n'.encode(),
        b"broken {\n",
        b'{"prompt": "d", "chosen": "x", "rejected": "y"}',
    ]
    blank = b'{"prompt": "p", "chosen": " ", "rejected": "r"}\n'
    same = b'{"prompt": "p", "chosen": "r", "rejected": "r "}\n'
    repeat = b'{"chosen": "b!", "prompt": "a", "rejected": "c", "weight": 1.5, "id": "other"}\n'
    heavier = b'{"prompt": "a", "chosen": "b!", "rejected": "c", "weight": 2}\n'
    red = b'{"prompt": "q", "chosen": "\\u001b[31mred\\u001b[0m", "extra": 1e5, "rejected": "r"}\n'
    path = tmp_path / "pairs.jsonl"
    before = b"".join([kept[0], kept[1], blank, kept[2], same, repeat, kept[3], heavier, red, kept[4]])
    path.write_bytes(before)
    path.chmod(0o640)
    fixed = fix(path)
    cleaned = red.replace(b"\\u001b[31m", b"").replace(b"\\u001b[0m", b"")
    assert path.read_bytes() == b"".join([kept[0], kept[1], kept[2], kept[3], heavier, cleaned, kept[4]])
    assert (fixed.deleted, fixed.cleaned, fixed.kept) == (
        {"blank": [3], "identical": [5], "duplicate": [6]},
        [9],
        [8],
    )
    assert fixed.backup == tmp_path / "pairs.jsonl.bak"
    assert fixed.backup.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_second_fix_keeps_the_first_copy(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    for n in (1, 2):
        write(path, row(n), row(n))
        fix(path)
    assert (tmp_path / "pairs.jsonl.bak").read_text() == 2 * (json.dumps(row(1)) + "\n")
    assert (tmp_path / "pairs.jsonl.bak2").read_text() == 2 * (json.dumps(row(2)) + "\n")


def test_nothing_to_fix_writes_nothing(tmp_path: Path):
    path = write(tmp_path / "pairs.jsonl", row(1), row(2))
    before = signature_of(path)
    assert fix(path).backup is None
    assert signature_of(path) == before
    assert "nothing to fix" in localdpo("check", path, "--fix").stdout


def test_fix_on_the_command_line_checks_again(tmp_path: Path):
    path = write(
        tmp_path / "pairs.jsonl", row(1), row(1), row(2, chosen="a\x1b[0m"), row(3, chosen="same", rejected="same")
    )
    result = localdpo("check", path, "--fix")
    assert result.exit_code == 0
    assert "1 row deleted, repeated (line 2)" in result.stdout
    assert "1 row (line 3)" in result.stdout
    assert "pairs.jsonl.bak" in result.stdout
    assert localdpo("check", path).exit_code == 0
    again = write(path, row(1), row(1))
    result = localdpo("check", again, "--fix", "--json")
    assert json.loads(result.stdout) == []
    assert "deleted" in result.stderr


def test_fix_refuses_a_file_that_changed_meanwhile(tmp_path: Path):
    path = write(tmp_path / "pairs.jsonl", row(1), row(1))
    findings, checked = check_file(path).findings, signature_of(path)
    write(path, row(1), row(1), row(2))
    with pytest.raises(EnvironmentFault, match="changed"):
        fix_file(path, findings, checked)


def test_fix_never_empties_a_file(tmp_path: Path):
    path = write(tmp_path / "pairs.jsonl", row(1, chosen=" "), row(2, chosen=""))
    before = path.read_bytes()
    with pytest.raises(InputError, match="no row would be left"):
        fix(path)
    assert (path.read_bytes(), list(tmp_path.glob("*.bak*"))) == (before, [])


_TEXT = st.text(st.sampled_from('ab \x1b[31m\x07\n"\\é\u2028'), max_size=8)
_ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT}, optional={"weight": st.integers(0, 2)}
    ).map(lambda value: json.dumps(value, ensure_ascii=False).encode() + b"\n")
    | st.binary(max_size=10).map(lambda data: data.replace(b"\n", b"") + b"\n"),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(rows=_ROWS)
def test_fixing_anything_keeps_untouched_lines_and_leaves_nothing_fixable(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes]
):
    folder = tmp_path_factory.mktemp("fix")
    path = write(folder / "pairs.jsonl", *rows)
    try:
        fixed = fix(path)
    except InputError:
        assert path.read_bytes() == b"".join(rows)
        return
    touched = {line for lines in fixed.deleted.values() for line in lines} | set(fixed.cleaned)
    expected = [line for n, line in enumerate(b"".join(rows).split(b"\n")[:-1], 1) if n not in touched]
    left = iter(path.read_bytes().split(b"\n")[:-1])
    assert all(line in left for line in expected)  # in this order, among the cleaned ones
    kinds = {f.kind for f in check_file(path).findings}
    assert "escapes" not in kinds
    assert "duplicate" not in kinds or fixed.kept or fixed.cleaned


# stats


def test_stats_of_a_worked_file(tmp_path: Path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    path = write(
        tmp_path / "a.jsonl",
        row(1, tags=["x", "y"]),
        row(1, tags=["x"], chosen="a much longer answer than the other", weight=2),
        row(2, system="Be brief."),
        row(3, chosen=" "),
        {"prompt": turns, "chosen": "d", "rejected": "e"},
        "broken\n",
    )
    stats = json.loads(localdpo("stats", path, "--json").stdout)
    expected = {"pairs": 4, "skipped": 1, "broken": 1, "prompts": 3, "multi_turn": 1, "with_system": 1, "weighted": 1}
    assert {key: stats[key] for key in expected} == expected
    assert (stats["tags"], stats["untagged"]) == ({"x": 2, "y": 1}, 2)
    assert (stats["estimated"], stats["chosen_longer"]) == (True, 1)
    assert sum(stats["tokens"]["chosen"]["histogram"]["counts"]) == 4
    text = localdpo("stats", path).stdout
    assert "4 pairs of 3 prompts" in text
    assert "1 broken row\n" in text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_histograms_count_every_value_once(values: list[int]):
    histogram = Histogram.of(values)
    expected = [
        sum(low <= v < high for v in values) for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)
    ]
    assert list(histogram.counts) == expected
    assert sum(expected) == len(values)
    assert expected[0]
    assert expected[-1]


@pytest.mark.parametrize("columns", [12, 24, 40, 80, 200])
@pytest.mark.parametrize("fine", [True, False])
def test_bars_fit_and_any_count_shows(columns: int, fine: bool):
    shown = pairs_stats.bars({"one": 1, "a long name of a thing" * 3: 10_000}, columns, fine=fine)
    assert all(len(line) <= max(columns, 24) for line in shown)
    assert columns < 40 or ("▏" in shown[0] if fine else "#" in shown[0])
    assert all(line.isascii() for line in shown) or fine
    assert shown[0].endswith(" 1")


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_stats_fit_a_narrow_terminal(columns: int):
    shown = pairs_stats.lines(file_stats(PANDALM), columns)
    charts = [line for line in shown if line.startswith("  ")]
    assert charts
    assert max(map(len, charts)) <= columns


def test_an_ascii_stream_gets_ascii_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.jsonl", row(1), row(2))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    pairs_stats.run(path, None, None, json_lines=False)
    stream.flush()
    assert b"#" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_stats_of_nothing(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "")
    assert "0 pairs" in localdpo("stats", path).stdout
    assert json.loads(localdpo("stats", path, "--json").stdout)["tokens"] == {}


@pytest.mark.parametrize("what", list(BUILDERS)[::5])
def test_planted_files_go_through_the_command(what: str, tmp_path: Path):
    case = BUILDERS[what]()
    path, held_out = case.write(tmp_path)
    result = localdpo("check", path, "--json", *(["--eval", held_out] if held_out else []))
    assert case.kind in {finding["kind"] for finding in json.loads(result.stdout)}


def test_clean_pairs_end_with_0(tmp_path: Path):
    result = localdpo("check", write(tmp_path / "a.jsonl", *clean_pairs()))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "nothing found")
