"""Importing: every family and container, what is guessed, what is left out and said, and hostile files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data.importers.columns import mapped_family
from localdpo.data.importers.family import RowRefused
from localdpo.data.importers.guess import FAMILIES
from localdpo.data.importers.prompts import PROMPTS
from localdpo.data.importing import ImportOptions, ImportReport, import_pairs, inspect_file
from localdpo.data.jsonl import ProblemLog, Row
from localdpo.data.pairs import PreferencePair, parse_pair, read_pairs, read_prompts
from localdpo.errors import EnvironmentFault, InputError

Q, GOOD, BAD = "What is your name?", "I am Athene.", "I am a model."
USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", Q), ("assistant", GOOD), ("assistant", BAD)))
HUMAN, GPT_YES, GPT_NO = ({"from": f, "value": v} for f, v in (("human", Q), ("gpt", GOOD), ("gpt", BAD)))

# format -> rows, each of which holds the same pair
ROWS: dict[str, list[dict[str, Any]]] = {
    "trl": [
        {"prompt": Q, "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": Q, "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES], "score_chosen": 9.0},
        {"prompt": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
    ],
    "sharegpt": [
        {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO},
        {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD, "tools": ""},
    ],
    "openai": [
        {"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES],
         "non_preferred_output": [NO]},
        {"messages": [USER], "chosen": YES, "rejected": NO},
        {"messages": [USER, YES], "rejected_response": BAD},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, YES], "rejected_response": [BAD]},
    ],
    "alpaca": [
        {"instruction": "What is", "input": "your name?", "chosen": GOOD, "rejected": BAD},
        {"instruction": Q, "input": "", "output": [GOOD, BAD]},
        {"instruction": Q, "output_1": BAD, "output_2": GOOD, "preference": 2},
    ],
    "hh-rlhf": [
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"},
    ],
    "ultrafeedback": [
        {"instruction": Q, "source": "x", "completions": [
            {"response": BAD, "model": "a", "annotations": {"helpfulness": {"Rating": "1"}}, "overall_score": 10.0},
            {"response": "?", "model": "b", "annotations": {"helpfulness": {"Rating": "3"}}, "overall_score": 1.0},
            {"response": GOOD, "model": "c", "annotations": {"helpfulness": {"Rating": "5"}}, "overall_score": 1.0}]},
        {"instruction": Q, "completions": [{"response": t, "overall_score": s} for t, s in ((GOOD, 8), (BAD, 2))]},
        {"instruction": Q, "generations": [BAD, GOOD], "ratings": [1.0, 4.5], "generation_models": ["a", "b"]},
    ],
    "argilla": [
        {"id": "7", "status": "completed", "fields": {"prompt": Q, "response1": BAD, "response2": GOOD},
         "metadata": {}, "suggestions": {},
         "responses": {"ranking": [{"value": ["response2", "response1"], "user_id": "u", "status": "submitted"},
                                   {"value": ["response1", "response2"], "user_id": "v", "status": "discarded"}]}},
        {"fields": {"prompt": Q, "response-1": GOOD, "response-2": BAD}, "responses": [
            {"user_id": "u", "status": "submitted", "values": {"ranking": {"value": [
                {"rank": 2, "value": "response-2"}, {"rank": 1, "value": "response-1"}]}}}]},
        {"prompt": Q, "response1": GOOD, "response2": BAD, "ranking.responses": [["response1", "response2"]],
         "ranking.responses.users": ["u"], "ranking.responses.status": ["submitted"], "id": "9"},
        {"prompt": Q, "response1": GOOD, "response2": BAD, "better.suggestion": "response1"},
    ],
    "columns": [{"Question": Q, "Preferred Response": GOOD, "dispreferred": BAD, "note": "kept"}],
}  # fmt: skip
CASES = [(name, number) for name, rows in ROWS.items() for number in range(len(rows))]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def imported(source: Path, **options: Any) -> tuple[list[PreferencePair], ImportReport]:
    out = source.with_name("out.jsonl")
    report = import_pairs(source, out, ImportOptions(**options), force=True)
    return read_pairs(out).pairs, report


def reasons(report: ImportReport) -> str:
    return "\n".join(report.left_out.sentences())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_every_family_is_recognised_and_gives_the_same_pair(tmp_path: Path, name: str, number: int) -> None:
    source = write(tmp_path / "in.jsonl", [ROWS[name][number]])
    ((pair,), report) = imported(source)
    joined = "\n".join(pair.prompt[0]["content"].split("\n")).replace("What is\nyour", "What is your")
    assert (len(pair.prompt), joined, pair.chosen, pair.rejected) == (1, Q, GOOD, BAD)
    assert report.inspection.format == name
    assert report.inspection.guessed
    entry = pair.extra["provenance"]
    assert (entry["how"], entry["file"], entry["line"], entry["format"]) == ("imported", "in.jsonl", 1, name)


@pytest.mark.parametrize("name", ROWS)
def test_a_named_format_is_taken_at_its_word(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in.jsonl", ROWS[name][:1])
    options = {"mapping": ("prompt=Question", "chosen=Preferred Response", "rejected=dispreferred")}
    (_, report) = imported(source, format=name, **(options if name == "columns" else {}))
    assert not report.inspection.guessed
    assert (report.rows, report.written) == (1, 1)


@pytest.mark.parametrize("container", ["json", "json-pretty", "gz", "bom"])
def test_containers(tmp_path: Path, container: str) -> None:
    rows = ROWS["trl"] * 30
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = {
        "json": json.dumps(rows).encode(),
        "json-pretty": b" \n" + json.dumps(rows, indent=2).encode() + b"\n",
        "gz": gzip.compress(lines.encode()),
        "bom": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode(),
    }[container]
    (tmp_path / "in").write_bytes(data)
    pairs, report = imported(tmp_path / "in")
    assert len(pairs) == report.written == report.rows == len(rows)
    if container != "bom":  # rows of a list are counted, whatever lines they stand on
        assert [pair.extra["provenance"]["line"] for pair in pairs] == list(range(1, len(rows) + 1))


def test_a_json_list_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "é" * 3000, "rejected": "x" * (n * 40)} for n in range(1, 200)]
    (tmp_path / "in.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    pairs, _ = imported(tmp_path / "in.json")
    assert [(pair.prompt[0]["content"], len(pair.rejected)) for pair in pairs] == [
        (row["prompt"], len(row["rejected"])) for row in rows
    ]


def test_conversations_keep_their_turns_system_and_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"system": "Be brief.", "conversations": [HUMAN, GPT_NO, HUMAN], "chosen": GPT_YES, "rejected": GPT_NO,
         "tools": json.dumps(tools)},
    ]  # fmt: skip
    ((pair,), _) = imported(write(tmp_path / "in.jsonl", rows))
    assert [turn["role"] for turn in pair.prompt] == ["system", "user", "assistant", "user"]
    assert list(pair.tools) == tools
    alpaca = {"instruction": "and now?", "chosen": "a", "rejected": "b", "history": [["hi", "hello"]]}
    ((pair,), _) = imported(write(tmp_path / "in.jsonl", [alpaca]))
    assert [turn["content"] for turn in pair.prompt] == ["hi", "hello", "and now?"]


def test_hh_transcripts_share_their_turns(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello. Human: is not a turn here.\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} Because.", "rejected": f"{start} No idea.\n"},
        {"chosen": f"{start} Because.", "rejected": "\n\nHuman: Other\n\nAssistant: No"},
        {"chosen": "no transcript", "rejected": "neither"},
    ]
    ((pair,), report) = imported(write(tmp_path / "in.jsonl", rows), format="hh-rlhf")
    assert [turn["content"] for turn in pair.prompt] == ["Hi", "Hello. Human: is not a turn here.", "Why?"]
    assert (pair.chosen, pair.rejected) == ("Because.", "No idea.")
    assert "1 row: is not a transcript" in reasons(report)
    assert "(line 3)" in reasons(report)
    assert "parts from the other" in reasons(report)


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    good = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    rows: list[Any] = [
        good,
        {**good, "chosen": " "},
        {**good, "rejected": GOOD},
        {"prompt": Q, "chosen": GOOD},
        5,
        good,
    ]
    source = write(tmp_path / "in.jsonl", rows)
    with source.open("a") as file:
        file.write('{"prompt": "cut off')
    pairs, report = imported(source)
    assert len(pairs) == report.written == 2
    assert report.rows == 7
    assert report.left_out.total == 5 == sum(reason.count for reason in report.left_out.reasons.values())
    text = "\n".join(report.sentences())
    for expected in (
        "2 of 7 rows imported, 5 left out:",
        "the chosen answer is blank (line 2)",
        "both answers are the same (line 3)",
        '"rejected" is missing',
        "is a JSON number, not an object with keys (line 5)",
        "ends in the middle of a row",
    ):
        assert expected in text


def test_rejects_hold_the_rows_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [ROWS["trl"][0], {"prompt": Q, "chosen": "", "rejected": BAD}])
    import_pairs(source, tmp_path / "out.jsonl", rejects=tmp_path / "left.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "left.jsonl").read_text().splitlines()]
    assert (row["line"], row["row"]["rejected"]) == (2, BAD)
    assert "blank" in row["reason"]


def test_unknown_keys_are_kept_and_earlier_provenance_too(tmp_path: Path) -> None:
    row = {**ROWS["sharegpt"][0], "score": 3, "tags": "not a list", "provenance": {"how": "generated"}}
    ((pair,), _) = imported(write(tmp_path / "in.jsonl", [row]))
    assert pair.extra["score"] == 3
    assert pair.extra["imported_tags"] == "not a list"
    assert pair.extra["provenance"]["before"] == {"how": "generated"}
    ((pair,), _) = imported(tmp_path / "in.jsonl", provenance=False)
    assert pair.extra["provenance"] == {"how": "generated"}


def test_columns_are_mapped_by_option_also_inside(tmp_path: Path) -> None:
    row = {"ask": Q, "answers": [{"text": BAD}, {"text": GOOD}], "n": 1}
    source = write(tmp_path / "in.jsonl", [row, {"ask": Q, "answers": [{"text": BAD}]}])
    mapping = ("prompt=ask", "chosen=answers.1.text", "rejected=answers.0.text")
    ((pair,), report) = imported(source, mapping=mapping)
    assert (pair.chosen, pair.rejected, pair.extra["n"]) == (GOOD, BAD, 1)
    assert "there is nothing in the column 'answers.1.text' (line 2)" in reasons(report)
    assert "chosen = 'answers.1.text'" in report.inspection.sentence()


@pytest.mark.parametrize("assignment", ["chosen", "chosen=", "nosuch=a"])
def test_bad_mappings(tmp_path: Path, assignment: str) -> None:
    source = write(tmp_path / "in.jsonl", ROWS["trl"])
    with pytest.raises(InputError, match="--map"):
        imported(source, mapping=(assignment,))


def test_what_cannot_be_guessed_says_what_is_there(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"left": "a", "right": "b"}])
    with pytest.raises(InputError, match=r'its rows have "left", "right".*--map'):
        inspect_file(source)
    with pytest.raises(InputError, match="One of openai"):
        inspect_file(source, ImportOptions(format="nosuch"))


def test_one_answer_is_no_preference_but_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "S"}, USER, YES]},
        {"conversations": [HUMAN, GPT_YES]},
        {"instruction": Q, "output": GOOD},
        {"prompt": Q, "chosen": GOOD, "rejected": BAD},
        {"nothing": 1},
    ]
    source = write(tmp_path / "in.jsonl", rows[:1])
    with pytest.raises(InputError, match=r"has one answer and no preference.*--prompts") as caught:
        imported(source)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out.jsonl").exists()
    report = import_pairs(write(source, rows), tmp_path / "p.jsonl", ImportOptions(prompts=True))
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert (len(prompts), report.left_out.total) == (4, 1)
    assert [turn["role"] for turn in prompts[0].prompt] == ["system", "user"]
    assert {prompt.extra["target"] for prompt in prompts} == {GOOD}


def test_the_output_is_never_overwritten_nor_half_written(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [ROWS["trl"][0]]), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        import_pairs(source, out)
    assert out.read_text() == "mine"
    bad = tmp_path / "bad.json"
    bad.write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": ')
    with pytest.raises(InputError, match=r"bad\.json:1.*Nothing was imported"):
        import_pairs(bad, out, force=True)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "in.jsonl", "out.jsonl"]
    with pytest.raises(EnvironmentFault, match="no such folder"):
        import_pairs(source, tmp_path / "nowhere" / "out.jsonl")


CSV_HEAD = "prompt,chosen,rejected\n"


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_with_any_usual_delimiter_and_line_ends_in_cells(tmp_path: Path, mark: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=mark)
    writer.writerows(
        [["prompt", "chosen", "rejected", "tags", "weight"], ["a\nb", 'say "x", y; z', "n", "t, u", "2,5"]]
    )
    writer.writerow(["second", "c", "d", "", ""])
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    pairs, _ = imported(tmp_path / "in.csv")
    assert (pairs[0].prompt[0]["content"], pairs[0].chosen) == ("a\nb", 'say "x", y; z')
    assert (pairs[0].tags, pairs[0].weight, pairs[1].weight) == (("t", "u"), 2.5, 1.0)
    assert pairs[1].extra["provenance"]["line"] == 4


def test_csv_rows_that_are_broken_are_counted_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(CSV_HEAD + 'a,b,c\n\nonly,two\n"x"y,b,c\nd,e,f\ng,h,"i')
    pairs, report = imported(tmp_path / "in.csv")
    assert [pair.prompt[0]["content"] for pair in pairs] == ["a", "d"]
    text = reasons(report)
    assert "has 2 cells, and the header names 3 columns (line 4)" in text
    assert "(line 5)" in text
    assert "unexpected end of data (line 7)" in text
    assert report.left_out.total == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (CSV_HEAD.encode() + b"caf\xe9,b,c\n", r"in\.csv:2: is not utf-8.*0xe9 at byte offset 26"),
        ((CSV_HEAD + "a,b,c\n").encode("utf-16"), "UTF-16.*--encoding utf-16"),
        (b"chosen,chosen,rejected\na,b,c\n", "names the column 'chosen' twice"),
        (b"", "the file is empty"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x1f\x8bnot gzip", "damaged gzip"),
        (b'{"prompt": "a" "chosen": 1}\n', "0 rows can be read"),
        (b"[" * 100_000, "nested too deep|is not JSON"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}] x', "goes on after the end"),
        (b'[{"prompt": "\xff"}]', "byte offset 13"),
        (b"PAR1 but no more", "cannot be read as Parquet|pyarrow"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "in.csv").write_bytes(data)
    with pytest.raises((InputError, EnvironmentFault), match=message):
        imported(tmp_path / "in.csv")


def test_other_encodings_by_option(tmp_path: Path) -> None:
    for encoding in ("utf-16", "cp1252"):
        (tmp_path / "in.csv").write_bytes((CSV_HEAD + "café,b,c\n").encode(encoding))
        ((pair,), _) = imported(tmp_path / "in.csv", encoding=encoding)
        assert pair.prompt[0]["content"] == "café"
    with pytest.raises(InputError, match="is not an encoding"):
        imported(tmp_path / "in.csv", encoding="nosuch")


@pytest.mark.parametrize("container", ["jsonl", "csv", "json"])
def test_huge_fields_are_refused_or_counted_in_bounded_memory(tmp_path: Path, container: str) -> None:
    huge = "x" * 11_000_000
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": huge, "rejected": "b"}]
    if container == "csv":
        (tmp_path / "in").write_text(CSV_HEAD + f"p,a,b\np,{huge},b\nq,a,b\n")
    else:
        text = json.dumps(rows) if container == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in").write_text(text)
    if container == "json":
        with pytest.raises(InputError, match=r"is longer than|Unterminated"):
            imported(tmp_path / "in")
        return
    pairs, report = imported(tmp_path / "in")
    assert len(pairs) == (2 if container == "csv" else 1)
    assert "is longer than" in reasons(report)


def test_escapes_are_saved_as_they_are_and_shown_inert(tmp_path: Path) -> None:
    nasty = "\x1b]52;c;aGk=\x07 \u202e"
    source = write(tmp_path / "in.jsonl", [{"prompt": Q, "chosen": nasty, "rejected": BAD}, {"prompt": nasty}])
    ((pair,), report) = imported(source, format="trl")
    assert pair.chosen == nasty
    assert "\x1b" not in "".join(report.sentences())
    evil = write(tmp_path / "evil.jsonl", [{"from": nasty, "conversations": [{"from": nasty, "value": "v"}]}])
    with pytest.raises(InputError) as caught:
        imported(evil)
    assert "\x1b" not in str(caught.value)


def test_other_rows_than_the_first_ones_do_not_change_the_format(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*ROWS["openai"] * 20, *ROWS["trl"][:1]])
    pairs, report = imported(source)
    assert report.inspection.format == "openai"
    assert len(pairs) == 80
    assert report.left_out.total == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["role", "from", "content", "value", "Rating", "response", "fields", "responses", "rank"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = [*{key for rows in ROWS.values() for row in rows for key in row}, "history", "x.suggestion", "kind"]
any_rows = st.dictionaries(st.sampled_from(sorted(KEYS)), json_values, max_size=6)


@settings(max_examples=200, deadline=None)
@given(row=any_rows)
def test_any_row_is_converted_or_refused_in_words(row: dict[str, Any]) -> None:
    columns = mapped_family({"chosen": "chosen", "rejected": "fields.response"})
    for family in (*FAMILIES, PROMPTS, columns):
        family.matches(row)
        try:
            converted = family.convert(json.loads(json.dumps(row)))
        except RowRefused as refusal:
            assert str(refusal)  # noqa: PT017
            continue
        parse_pair(Row(1, converted), "x", ProblemLog())


def peak_bytes(path: Path, rows: int) -> int:
    with path.open("w") as file:
        file.write(CSV_HEAD)
        file.writelines(f"question {number},{'a' * 200},{'b' * 200}\n" for number in range(rows))
    tracemalloc.start()
    try:
        report = import_pairs(path, path.with_name("out.jsonl"), force=True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert report.written == rows


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peak_bytes(tmp_path / "in.csv", 100)  # what is imported and cached once
    assert peak_bytes(tmp_path / "in.csv", 3000) < peak_bytes(tmp_path / "in.csv", 500) + 500_000
