"""The commands `pairs import`, `export`, `generate` and `round`, as typed: output, exit codes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from training import workspace
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.data.pairs import read_pairs

RECIPE = """
model: ./model
data: {train: pairs.jsonl, eval: null, retain: null, max_length: 128}
train: {max_steps: 1, per_device_train_batch_size: 2}
"""
COLD = ("--max-tokens", "8", "--temperature", "1.5")


def pairs(*arguments: object, stdin: str | bytes | None = None, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["pairs", *map(str, arguments)], input=stdin)
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output
    return result


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turn = {"from": "human", "value": "=Hi\x1b[31m"}
    answers = {"chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "No"}}
    rows = [{"conversations": [turn], **answers}, {"conversations": [turn], "chosen": "x"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_import_says_what_it_found_and_what_it_left_out(chats: Path) -> None:
    shown = pairs("import", chats).stdout
    for expected in (
        "JSON Lines, ShareGPT conversations (guessed",
        "1 of 2 rows imported, 1 left out:",
        "1 row: has one answer and no preference (line 2)",
        "chats.pairs.jsonl",
    ):
        assert expected in shown
    assert len(read_pairs(chats.with_name("chats.pairs.jsonl")).pairs) == 1
    assert "--force" in pairs("import", chats, code=2).stderr
    assert "1 of 2 rows were left out" in pairs("import", chats, "--force", "--strict", code=2).stderr


def test_import_for_programs_and_without_importing(chats: Path, tmp_path: Path) -> None:
    data = json.loads(pairs("import", chats, "-o", tmp_path / "o.jsonl", "--json").stdout)
    assert (data["format"], data["written"], data["left_out"][0]["lines"]) == ("sharegpt", 1, [2])
    assert "ShareGPT" in pairs("import", chats, "--dry-run").stdout
    assert not chats.with_name("chats.pairs.jsonl").exists()


def test_through_pipes_only_rows_are_on_standard_output(chats: Path) -> None:
    result = pairs("import", "-", "-o", "-", stdin=chats.read_text())
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert row["provenance"]["file"] == "standard input"
    assert "1 left out" in result.stderr
    assert "--out" in pairs("import", "-", stdin="{}", code=2).stderr


def test_export_quotes_formulas_and_comes_back(chats: Path, tmp_path: Path) -> None:
    pairs("import", chats, "-o", tmp_path / "p.jsonl")
    shown = pairs("export", tmp_path / "p.jsonl", "-o", tmp_path / "p.csv").stdout
    assert "1 of 1 rows exported as CSV" in shown
    assert "\n'=Hi" in (tmp_path / "p.csv").read_text().replace("\r\n", "\n")
    shown = pairs("import", tmp_path / "p.csv", "-o", tmp_path / "back.jsonl").stdout
    assert "1 cells began with '" in shown
    before, after = (read_pairs(tmp_path / name).pairs[0] for name in ("p.jsonl", "back.jsonl"))
    assert (after.prompt, after.chosen) == (before.prompt, before.chosen)
    row = json.loads(pairs("export", tmp_path / "p.jsonl", "-o", "-", "--form", "conversational", "--bare").stdout)
    assert row["prompt"][0]["role"] == "user"
    for wrong in (("-o", tmp_path / "p.txt"), ("-o", tmp_path / "q.csv", "--to", "xls"), ("-o", "-", "--form", "x")):
        pairs("export", tmp_path / "p.jsonl", *wrong, code=2)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workspace(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [{"prompt": f"question {n}?"} for n in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: object, code: int = 0) -> Result:
    return pairs("generate", "prompts.jsonl", "--model", "./model", *COLD, *arguments, code=code)


def test_generate_writes_pairs_and_says_what_came_of_it(root: Path) -> None:
    reward = ("--reward", "length:max=1;unit=characters", "--unfinished", "keep", "-n", "3")
    shown = generate("-o", "out.jsonl", *reward).stdout
    assert "3 prompts, 9 answers, 9 of them cut off at 8 tokens, kept in out.answers.jsonl" in shown
    found = read_pairs(root / "out.jsonl").pairs
    assert f"{len(found)} pairs written to out.jsonl" in shown
    again = generate("-o", "out.jsonl", *reward, "--force", "--json")
    assert json.loads(again.stdout)["pairs"] == len(found)
    assert [(p.chosen, p.rejected) for p in read_pairs(root / "out.jsonl").pairs] == [
        (p.chosen, p.rejected) for p in found
    ]
    assert generate("-o", "out.jsonl", *reward, code=2).stderr.count("--force") == 1
    by_rule = ("-o", "two.jsonl", "--answers", "out.answers.jsonl", "-n", "3", "--reward", "regex:pattern=zzz")
    assert "do not differ" in generate(*by_rule, "--unfinished", "keep", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing says how to make pairs"),
        (("--reward", "json", "--judge", "./model"), "these exclude each other"),
        (("--reward", "nosuch"), "is no reward"),
        (("--reward", "python:path=os:getcwd"), "--allow-code"),
        (("--from", "tuned", "--reward", "json"), "there is no tuned model"),
        (("--reward", "json", "-n", "1"), "has no best and worst"),
        (("--reward", "json", "--unfinished", "x"), "is not known"),
        (("--replace", "nothing"), "OLD=NEW"),
    ],
)
def test_what_generate_refuses(root: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in generate("-o", "out.jsonl", *arguments, code=2).stderr
    assert not (root / "out.jsonl").exists()


def test_edits_go_out_and_come_back(root: Path) -> None:
    shown = generate("-o", "out.jsonl", "--edits", "edits.jsonl", "-n", "1").stdout
    assert 'correct "edited", then run this again' in shown
    rows = [json.loads(line) for line in (root / "edits.jsonl").read_text().splitlines()]
    rows[0]["edited"] = "Better"
    (root / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = generate("-o", "out.jsonl", "--edits", "edits.jsonl", "-n", "1").stdout
    assert "1 pairs written" in shown
    assert "2 answers: its answer was not edited" in shown
    assert read_pairs(root / "out.jsonl").pairs[0].chosen == "Better"


def test_a_round_from_the_command_line(root: Path) -> None:
    command = (
        "round", "recipe.yaml", "--rounds", "1", "--prompts", "prompts.jsonl", "-n", "2", *COLD,
        "--reward", "length:max=1;unit=characters", "--unfinished", "keep",
    )  # fmt: skip
    shown = pairs(*command).stdout
    assert "round 1 of 1: answers by" in shown
    assert "adapter runs/recipe-rounds/round-01/run/adapter" in shown
    again = [json.loads(line) for line in pairs(*command, "--json").stdout.splitlines()]
    assert [event["event"] for event in again] == ["round", "round_end"]
    assert again[1]["skipped"]
    assert "a round cannot wait" not in shown
