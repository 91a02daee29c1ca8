"""What other tools leave in a row: structure in texts, padding, pictures, line ends; one rule for all readers."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data.check.fix import fix_file, signature_of
from localdpo.data.check.report import check_file
from localdpo.data.importing import ImportOptions, import_pairs
from localdpo.data.pairs import collect_pairs, read_pairs, read_prompts
from localdpo.data.rowform import MEDIA, RowRefused, implicit_prompt, plain_row, with_line_ends
from localdpo.data.rows import read_row
from localdpo.errors import InputError

texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n'\"\\"), min_size=1, max_size=12
).filter(lambda text: text.strip() == text)


def turns(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row with whole conversations as answers, the plainest form there is of it."""
    prompt = turns(*draw(st.lists(texts, min_size=1, max_size=3).filter(lambda parts: len(parts) % 2)))
    chosen, rejected = draw(st.lists(texts, min_size=2, max_size=2, unique_by=str.strip))
    return {
        key: [*prompt, {"role": "assistant", "content": text}]
        for key, text in (("chosen", chosen), ("rejected", rejected))
    }


def imported(path: Path) -> tuple[list[Any], str]:
    report = import_pairs(path, out := path.with_name("out.jsonl"), ImportOptions(provenance=False), force=True)
    return read_pairs(out).pairs, "\n".join(report.sentences())


CONTAINERS = [
    "jsonl",
    "json",
    "pretty",
    "objects",
    "csv",
    "csv-python",
    "jsonl-text",
    "jsonl-python",
    "parquet",
    "arrow",
]


def written(folder: Path, rows: list[dict[str, Any]], container: str) -> Path:
    """``rows`` as tools write them: lists in cells as JSON or as Python, structs padded by Arrow."""
    path = folder / f"in.{container.partition('-')[0]}"
    lines = {"jsonl": lambda v: v, "jsonl-text": json.dumps, "jsonl-python": repr}
    if container in lines:
        changed = [{key: lines[container](value) for key, value in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    elif container.startswith("csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            form = repr if container == "csv-python" else json.dumps
            table.writerows([{key: form(value) for key, value in row.items()} for row in rows])
    elif container in ("parquet", "arrow"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.Table.from_pylist(rows)
        if container == "parquet":
            parquet.write_table(table, path)
        else:  # through Arrow once, and JSON Lines now
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        indent = None if container == "json" else 2
        dumped = [json.dumps(row, indent=indent) for row in rows]
        path.write_text("\n".join(dumped) if container == "objects" else json.dumps(rows, indent=indent))
    return path


@settings(max_examples=12, deadline=None)
@given(rows=st.lists(conversations(), min_size=1, max_size=4), container=st.sampled_from(CONTAINERS))
def test_the_same_rows_out_of_every_container(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], container: str
) -> None:
    folder = tmp_path_factory.mktemp("in")
    pairs, _ = imported(written(folder, rows, container))
    (plain := folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pairs == read_pairs(plain).pairs
    if container in ("jsonl", "jsonl-text", "jsonl-python", "arrow"):
        assert read_pairs(written(folder, rows, container)).pairs == pairs, "training has the same rules"


def test_nulls_that_arrow_pads_with_are_dropped() -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Oslo", "level": None}}, "id": None}
    row = {
        "prompt": [
            {"role": "user", "content": "w", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": None, "b": {"x": 1}}}}}
        ],
    }
    found = plain_row(row)
    assert found["prompt"][0] == {"role": "user", "content": "w"}
    assert found["prompt"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]
    assert found["tools"][0]["function"]["parameters"]["properties"] == {"b": {"x": 1}}
    assert plain_row({"tools": json.dumps(row["tools"])})["tools"] == found["tools"]
    assert plain_row(found) == found


@pytest.mark.parametrize("key", MEDIA)
def test_a_row_whose_meaning_is_no_text_is_left_out_and_counted(tmp_path: Path, key: str) -> None:
    good = {"prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
    rows = [good | {"prompt": "<image>What?", key: ["a.png"]}, good, good | {"prompt": "Else?", key: []}]
    (path := tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_pairs(path)
    assert [pair.line for pair in read.pairs] == [2, 3]
    assert [(skip.line, skip.code) for skip in read.skipped] == [(1, "media")]
    pairs, told = imported(path)
    assert [pair.prompt for pair in pairs] == [pair.prompt for pair in read.pairs]
    assert f'1 row: has "{key}", and only text can be learned (line 1)' in told
    report = check_file(path)
    assert [finding.rows for finding in report.findings if finding.kind == "media"] == [(1,)]


def test_pictures_in_sharegpt_and_in_parts_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "<image>What?"}], "chosen": {"from": "gpt", "value": "A"},
         "rejected": {"from": "gpt", "value": "B"}, "images": ["0.png"]},
        {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "A"},
         "rejected": {"from": "gpt", "value": "B"}},
    ]  # fmt: skip
    (tmp_path / "in.json").write_text(json.dumps(rows))
    pairs, told = imported(tmp_path / "in.json")
    assert [pair.prompt[0]["content"] for pair in pairs] == ["Who?"]
    assert "(row 1)" in told
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}]
    with pytest.raises(RowRefused, match="picture"):
        plain_row({"prompt": [{"role": "user", "content": parts}]})


def test_a_label_of_false_is_no_preference() -> None:
    with pytest.raises(RowRefused, match="label"):
        plain_row({"prompt": "p", "chosen": "a", "rejected": "b", "label": False})
    assert plain_row({"prompt": "p", "chosen": "a", "rejected": "b", "label": 0})["label"] == 0


def test_text_parts_are_taken_in_training_as_in_an_import(tmp_path: Path) -> None:
    def part(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    row = {"prompt": [{"role": "system", "content": part("Be kind.")}, {"role": "user", "content": part("a ", "b")}]}
    row |= {key: [{"role": "assistant", "content": part(text)}] for key, text in (("chosen", "Y"), ("rejected", "N"))}
    (path := tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    (pair,) = read_pairs(path).pairs
    assert [turn["content"] for turn in pair.prompt] == ["Be kind.", "a b"]
    assert (pair.chosen, pair.rejected) == ("Y", "N")
    assert imported(path)[0] == [pair]


@pytest.mark.parametrize(
    "text",
    ["[{'role': 'user', 'content': __import__('os').system('x')}]", '[{"role": "user", ', "[{'role': " + "[" * 300],
)
def test_what_cannot_be_read_is_never_run_nor_trained_on(tmp_path: Path, text: str) -> None:
    row = {"prompt": "What is it?", "chosen": text, "rejected": text + " "}
    (path := tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    skipped: list[Any] = []
    with pytest.raises(InputError, match="conversation written out as text"):
        skipped.extend(collect_pairs(path, skipped.append)[0])
    assert (
        read_row(json.dumps(row).encode()).problem
        == '"chosen" is a conversation written out as text, and cannot be read as one'
    )


def test_an_answer_about_messages_is_an_answer(tmp_path: Path) -> None:
    """Only where both answers are written out is it a container's doing."""
    row = {"prompt": "Show me a message.", "chosen": '[{"role": "user", "content": "Hi"}]', "rejected": "No."}
    (path := tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert read_pairs(path).pairs[0].chosen == row["chosen"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        ("Question: is it?\nAnswer: yes", "Question: is it?\nAnswer: no", ("Question: is it?\nAnswer:", "yes", "no")),
        ("Is it? Yes, it is.", "Is it? Yesterday.", ("Is it?", "Yes, it is.", "Yesterday.")),
        ("I am Athene.", "I am SmolLM.", None),
        ("yes", "no", None),
        ("Is it?", "Is it? No.", None),
        ("same: text", "same: text", None),
    ],
)
def test_the_prompt_that_two_texts_share(chosen: str, rejected: str, parts: tuple[str, str, str] | None) -> None:
    assert implicit_prompt(chosen, rejected) == parts


def test_whole_texts_are_read_with_the_prompt_they_share(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"Question {n}: is it?\nAnswer: yes", "rejected": f"Question {n}: is it?\nAnswer: no"}
        for n in range(3)
    ]
    (path := tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, told = imported(path)
    assert "3 of 3 rows imported" in told
    assert pairs == read_pairs(path).pairs
    assert [(pair.prompt[0]["content"], pair.chosen, pair.rejected) for pair in pairs][2] == (
        "Question 2: is it?\nAnswer:", "yes", "no",
    )  # fmt: skip
    path.write_text('{"chosen": "I am Athene.", "rejected": "I am SmolLM."}\n')
    with pytest.raises(InputError, match='"prompt" is missing'):
        read_pairs(path)


def mended(path: Path) -> list[dict[str, Any]]:
    checked = signature_of(path)
    fix_file(path, check_file(path).findings, checked)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_in_both_answers_is_found_and_taken_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Question 0: is it?", "chosen": "Question 0: is it?\nAnswer: yes",
         "rejected": "Question 0: is it?\nno", "k": 1},
        {"prompt": turns("Question 1: is it?"), "chosen": turns("Question 1: is it?", "Question 1: is it? Yes")[1:],
         "rejected": turns("", "Question 1: is it? No")[1:]},
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"},
    ]  # fmt: skip
    (path := tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = path.read_text().splitlines()[-1]
    found = {finding.kind: finding.rows for finding in check_file(path).findings}
    assert found["prompt_repeated"] == (1, 2)
    after = mended(path)
    assert after[0] == rows[0] | {"chosen": "Answer: yes", "rejected": "no"}
    assert (after[1]["chosen"][0]["content"], after[1]["rejected"][0]["content"]) == ("Yes", "No")
    assert path.read_text().splitlines()[-1] == last
    assert "prompt_repeated" not in {finding.kind for finding in check_file(path).findings}


def test_carriage_returns_are_found_and_made_line_breaks(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What shall I write here?", "chosen": "one\rtwo\r\nthree", "rejected": "no"},
        {"prompt": turns("a\rb and more words"), "chosen": turns("", "yes\r")[1:], "rejected": turns("", "no")[1:]},
        {"prompt": "Fine as it is, or not?", "chosen": "a\nb", "rejected": "c"},
    ]
    (path := tmp_path / "in.jsonl").write_bytes("\r\n".join(json.dumps(row) for row in rows).encode())
    read = read_pairs(path)
    (warning,) = [problem for problem in read.warnings if "carriage" in problem.message]
    assert "2 rows (lines 1 and 2)" in warning.message
    assert warning.fix == f"`localdpo pairs check {shlex.quote(str(path))} --fix` makes them line breaks"
    assert mended(path) == with_line_ends(rows)
    assert path.read_bytes().count(b"\r\n") == 2, "the file keeps its own line ends"
    assert not [problem for problem in read_pairs(path).warnings if "carriage" in problem.message]


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(["a", "b", "\n", "\r", "\r\n"]), min_size=1, max_size=9))
def test_text_that_comes_in_has_one_kind_of_line_end(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    folder, text = tmp_path_factory.mktemp("in"), f"x{''.join(parts)}x"
    row = {"prompt": [{"role": "user", "content": text}], "chosen": text + "1", "rejected": text + "2"}
    (folder / "in.json").write_text(
        json.dumps([row | {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}])
    )
    (pair,), _ = imported(folder / "in.json")
    wanted = text.replace("\r\n", "\n").replace("\r", "\n")
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == (wanted, wanted + "1", wanted + "2")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a b.csv", b"prompt,chosen,rejected\np,c,r\n", "a table (CSV)"),
        ("x.tsv", b"instruction\toutput\nq\ta\n", "a table (CSV)"),
        ("list.json", b'[{"prompt": "p", "chosen": "c", "rejected": "r"}]', "a JSON list"),
        ("pretty.jsonl", b'{\n "prompt": "p",\n "chosen": "c",\n "rejected": "r"\n}\n', "JSON over several lines"),
        ("p.parquet", b"PAR1 and so on", "Parquet"),
        ("p.jsonl.gz", b"\x1f\x8b\x08", "gzip"),
    ],
)
def test_a_file_of_another_kind_gets_the_line_that_mends_it(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (path := tmp_path / name).write_bytes(data)
    for read in (read_pairs, read_prompts):
        with pytest.raises(InputError) as found:
            read(path)
        (problem,) = found.value.problems
        assert problem.message.startswith(f"is {what}, and JSON Lines is read here")
        command = shlex.split(problem.fix.split("`")[1])
        assert command[:3] == ["localdpo", "pairs", "import"]
        assert command[3] == str(path)
    if what in ("a JSON list", "JSON over several lines") or name == "a b.csv":
        assert command[4] == "--out"
        import_pairs(command[3], command[5])
        assert len(read_pairs(command[5]).pairs) == 1


def test_text_of_no_kind_is_told_line_by_line_as_before(tmp_path: Path) -> None:
    (path := tmp_path / "in.jsonl").write_text("hello, world\n")
    with pytest.raises(InputError, match=r"in\.jsonl:1: is not JSON"):
        read_pairs(path)


def test_rows_of_a_list_on_one_line_are_told_by_their_number(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": f"Ask {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(5)]
    rows[3]["chosen"] = None
    rows[4] = 7
    (tmp_path / "in.json").write_text(json.dumps(rows))
    _, told = imported(tmp_path / "in.json")
    assert "has one answer and no preference (row 4)" in told
    assert "(row 5)" in told


def test_a_number_is_not_called_a_conversation(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": 2, "rejected": "b"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, told = imported(tmp_path / "in.jsonl")
    assert "conversation" not in told
    assert "'2' is neither text nor a list of messages (line 2)" in told
