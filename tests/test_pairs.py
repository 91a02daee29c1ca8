from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data import jsonl
from localdpo.data.jsonl import ProblemLog, read_rows
from localdpo.data.pairs import PairFile, PreferencePair, pair_to_json, read_pairs, read_prompts
from localdpo.errors import InputError

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def row(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def read(file: Path, *rows: str | dict[str, Any]) -> PairFile:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", "utf-8")
    return read_pairs(file)


def problems(file: Path, data: bytes | str) -> list[str]:
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError) as caught:
        read_pairs(file)
    return [str(problem).replace(str(file), "f") for problem in caught.value.problems]


# Forms of a row


def test_standard_pairs(file: Path):
    (pair,) = read(file, {**GOOD, "id": "a1", "tags": ["x", "y"], "weight": 2}).pairs
    assert pair == PreferencePair((user("p"),), "c", "r", "a1", ("x", "y"), 2.0)
    assert (pair.line, pair.source) == (1, str(file))


def test_conversations_with_several_turns(file: Path):
    turns = [system("s"), user("1"), assistant("2"), user("3")]
    (pair,) = read(file, {"prompt": turns, "chosen": [assistant("c")], "rejected": [assistant("r")]}).pairs
    assert pair == PreferencePair(tuple(turns), "c", "r")


def test_the_prompt_may_be_messages_and_the_answers_text(file: Path):
    (pair,) = read(file, {"prompt": [user("p")], "chosen": "c", "rejected": "r"}).pairs
    assert pair == PreferencePair((user("p"),), "c", "r")


def test_an_implicit_prompt_is_the_common_start(file: Path):
    turns = [user("1"), assistant("2"), user("3")]
    (pair,) = read(file, {"chosen": [*turns, assistant("c")], "rejected": [*turns, assistant("r")]}).pairs
    assert pair == PreferencePair(tuple(turns), "c", "r")


def test_whole_conversations_beside_their_prompt(file: Path):
    (pair,) = read(
        file, {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}
    ).pairs
    assert pair == PreferencePair((user("p"),), "c", "r")


def test_answers_may_share_turns_before_they_part(file: Path):
    shared = [assistant("2"), user("3")]
    (pair,) = read(
        file, {"prompt": "1", "chosen": [*shared, assistant("c")], "rejected": [*shared, assistant("r")]}
    ).pairs
    assert pair.prompt == (user("1"), assistant("2"), user("3"))


def test_the_system_key_goes_first(file: Path):
    pairs = read(file, row(system="s"), row(system=None), row(system=" ", prompt=[user("p"), user("q")])).pairs
    assert [pair.prompt for pair in pairs] == [(system("s"), user("p")), (user("p"),), (user("p"), user("q"))]


def test_tools_and_tool_turns(file: Path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [user("p"), call, {"role": "tool", "name": "f", "content": "4"}]
    (pair,) = read(file, row(prompt=turns, tools=[{"type": "function"}])).pairs
    assert pair.tools == ({"type": "function"},)
    assert pair.prompt[1] == {**call, "content": ""}
    assert pair.prompt[2] == turns[2]


def test_unknown_keys_are_kept_and_null_counts_as_absent(file: Path):
    (pair,) = read(
        file, row(source="web", score={"a": [1.5, None]}, kind="mine", id=None, tags=None, weight=None)
    ).pairs
    assert pair.extra == {"source": "web", "score": {"a": [1.5, None]}, "kind": "mine"}
    assert (pair.id, pair.tags, pair.weight, pair.kind) == (None, (), 1.0, "preference")


def test_a_number_as_id_becomes_text(file: Path):
    assert read(file, row(id=7)).pairs[0].id == "7"


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip())
message = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), text
)
pair = st.builds(
    PreferencePair,
    prompt=st.lists(message, max_size=3).map(tuple).flatmap(lambda ms: text.map(lambda t: (*ms, user(t)))),
    chosen=text,
    rejected=text,
    id=st.none() | text,
    tags=st.lists(text, max_size=2).map(tuple),
    weight=st.floats(0.01, 100),
    kind=st.sampled_from(["preference", "retain"]),
    tools=st.lists(st.fixed_dictionaries({"name": text}), max_size=1).map(tuple),
    extra=st.dictionaries(st.sampled_from(["note", "kind2"]), st.integers() | text | st.none()),
)


@settings(max_examples=60, deadline=None)
@given(pair)
def test_pairs_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, pair: PreferencePair):
    if pair.chosen.strip() == pair.rejected.strip():
        return
    file = tmp_path_factory.mktemp("round") / "x.jsonl"
    file.write_text(json.dumps(pair_to_json(pair), ensure_ascii=False) + "\n", "utf-8")
    assert read_pairs(file).pairs == [pair]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([user("p")], {"prompt": "p", "chosen": "c", "rejected": "r"}),
        ([system("s"), user("p")], {"prompt": "p", "chosen": "c", "rejected": "r", "system": "s"}),
        (
            [user("p"), assistant("a"), user("q")],
            {
                "prompt": [user("p"), assistant("a"), user("q")],
                "chosen": [assistant("c")],
                "rejected": [assistant("r")],
            },
        ),
    ],
)
def test_pair_to_json_is_plain_where_it_can_be(prompt: list[Any], expected: dict[str, Any]):
    assert pair_to_json(PreferencePair(tuple(prompt), "c", "r")) == expected


# Lines and bytes


def test_blank_lines_count_as_lines(file: Path):
    assert [pair.line for pair in read(file, "", row(), "  \t", row(prompt="q"), "", "").pairs] == [2, 4]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  "])
def test_the_last_line_may_end_as_it_likes(file: Path, end: str):
    file.write_text(row() + end, "utf-8")
    assert len(read_pairs(file).pairs) == 1


def test_crlf_and_a_byte_order_mark(file: Path):
    file.write_bytes(b"\xef\xbb\xbf" + f"{row()}\r\n\r\n{row(prompt='q')}\r\n".encode())
    assert [pair.line for pair in read_pairs(file).pairs] == [1, 3]


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_newlines_end_a_row(file: Path, char: str):
    file.write_text(json.dumps({**GOOD, "prompt": f"a{char}b"}, ensure_ascii=False).replace("\\u001c", char), "utf-8")
    if char in "\x0b\x1c":
        file.write_text(row(prompt=f"a{char}b"))
    assert read_pairs(file).pairs[0].prompt == (user(f"a{char}b"),)


def test_text_is_kept_byte_for_byte(file: Path):
    hostile = "\x1b]52;c;x\x07\u202e<|im_end|>  "
    assert read(file, row(chosen=hostile)).pairs[0].chosen == hostile


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "f: 0 pairs: the file is empty. Write one JSON object a line."),
        (b"\n \n", "f: 0 pairs: the file is empty"),
        (
            row().encode() + b"\n" + row().encode()[:20],
            "f:2: ends in the middle of a row. Complete it or delete it.",
        ),
        (b'{"prompt": "p", "chosen"\n', "f:1: is not JSON: Expecting ':' delimiter at character 25."),
        (b"{'prompt': 1}\n", "f:1: is not JSON: Expecting property name"),
        (
            b"[\n" + row().encode() + b"\n]\n",
            "f: is a JSON list, and JSON Lines is read here. `localdpo pairs import f ",
        ),
        (row().encode() + b"\n[1]\n", "f:2: is a JSON list, not an object with keys."),
        (b"null\n", "f:1: is a JSON null, not an object"),
        (row().encode() + b" x\n", "f:1: is not JSON: Extra data"),
        (
            b"\xff\xfe" + row().encode("utf-16-le"),
            "f:1: is UTF-16 or UTF-32, not UTF-8 (byte offset 0). Save",
        ),
        (row().encode("utf-16-be"), "f:1: is UTF-16 or UTF-32"),
        (
            b"\xef\xbb\xbf" + row().encode() + b'\n{"prompt": "\xe9"}\n',
            "f:2: is not UTF-8: byte 0xe9 at byte offset 63 of the file. Save the file as UTF-8.",
        ),
        (
            b'{"prompt": "a\\ud800b"}\n',
            "f:1: has half of a surrogate pair, \\ud800, which is not a character.",
        ),
        (b'{"prompt\\uDFFF": "a"}\n', "f:1: has half of a surrogate pair, \\udfff"),
        (b'{"prompt": "a", "prompt": "b"}\n', "f:1: has the key 'prompt' twice. Keep one of the two."),
        (b'{"x": {"a": 1, "a": 1}}\n', "f:1: has the key 'a' twice"),
        (b'{"weight": NaN}\n', "f:1: has NaN, which is not JSON."),
        (b'{"weight": -Infinity}\n', "f:1: has -Infinity, which is not JSON."),
        (b'{"weight": 1e999}\n', "f:1: has the number 1e999, which is too large."),
        (b'{"weight": ' + b"9" * 5000 + b"}\n", "f:1: has a number of 5,000 digits."),
        (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "f:1: is nested deeper than 64."),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}\n", "f:1: is nested deeper than 64."),
        (b'{"x": ' * 300_000, "f:1: is nested deeper than 64."),
    ],
)
def test_broken_files(file: Path, data: bytes, problem: str):
    assert problems(file, data)[0].startswith(problem)


@pytest.mark.parametrize("length", range(1, len(row(weight=True)) - 1))
def test_a_row_cut_off_anywhere_is_called_so(file: Path, length: int):
    (problem,) = problems(file, row() + "\n" + row(weight=True)[:length])
    assert problem == "f:2: ends in the middle of a row. Complete it or delete it."


def test_surrogate_pairs_and_many_brackets_in_text_are_fine(file: Path):
    (pair,) = read(file, '{"prompt": "\\ud83d\\ude00", "chosen": "%s", "rejected": "r"}' % ("[{" * 90)).pairs
    assert pair.prompt == (user("😀"),)


def test_a_line_beyond_the_cap_is_refused_and_the_rest_still_checked(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    data = f"{row()}\n{row(prompt='x' * 5000)}\n{{\n"
    found = problems(file, data)
    assert found[0].startswith("f:2: is longer than 1,000 bytes")
    assert found[1].startswith("f:3: is not JSON")
    # Exactly at the cap, newline included, is still fine.
    assert len(read(file, row(prompt="x" * (999 - len(row(prompt=""))))).pairs) == 1


def test_a_giant_line_is_not_read_into_memory(file: Path):
    with open(file, "wb") as out:
        out.write(b'{"prompt": "')
        out.truncate(200_000_000)
    tracemalloc.start()
    try:
        log = ProblemLog()
        assert list(read_rows(file, log)) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "is longer than 10,000,000 bytes" in log.first[0].message
    assert peak < 40_000_000


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="is not a file"):
        read_pairs(tmp_path)
    with pytest.raises(InputError, match="No such file or directory"):
        read_pairs(tmp_path / "none.jsonl")


def test_progress_reaches_the_end(file: Path):
    seen = []
    file.write_text("".join(row(prompt=str(i)) + "\n" for i in range(2500)))
    read_pairs(file, lambda done, total: seen.append((done, total)))
    size = file.stat().st_size
    assert [total for _, total in seen] == [size] * 3
    assert seen[-1] == (size, size)


# Fields


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"chosen": None}, '"chosen" is null. The row has "prompt", "chosen", "rejected".'),
        ({"prompt": None, "rejected": None}, '"rejected" is null.'),
        ({"prompt": None}, '"prompt" is null.'),
        ({"prompt": 3}, '"prompt" must be text or a list of messages.'),
        ({"prompt": []}, '"prompt" must be text or a list of messages.'),
        ({"chosen": {"a": 1}}, '"chosen" must be text or a list of messages.'),
        ({"chosen": ["c"]}, '"chosen" has a message 1 that is not an object with role and content.'),
        (
            {"prompt": [{"role": "human", "content": "p"}]},
            "\"prompt\" has a message 1 with the role 'human'.",
        ),
        ({"prompt": [{"role": ["user"], "content": "p"}]}, '"prompt" has a message 1 with the role'),
        ({"prompt": [user("a"), {"role": "user"}]}, '"prompt" has a message 2 whose content is not text.'),
        ({"prompt": [user("a"), assistant("b")]}, "the prompt ends with assistant's turn."),
        ({"prompt": [system("a")]}, "the prompt ends with system's turn."),
        ({"prompt": [system("a"), user("p")], "system": "b"}, '"system" is given, and the prompt has'),
        ({"system": 3}, '"system" must be text.'),
        ({"weight": -1}, '"weight" must be a number, 0 or more.'),
        ({"weight": "2"}, '"weight" must be a number'),
        ({"weight": True}, '"weight" must be a number'),
        ({"tags": "x"}, '"tags" must be a list of texts'),
        ({"tags": [1]}, '"tags" must be a list of texts'),
        ({"id": [1]}, '"id" must be text.'),
        ({"id": True}, '"id" must be text.'),
        ({"tools": {}}, '"tools" must be a list of objects'),
        (
            {"chosen": [user("q"), assistant("c")]},
            '"chosen" is a conversation that does not begin with "prompt".',
        ),
        (
            {"chosen": [assistant("c"), user("d")]},
            '"chosen" goes on with 2 turns where it parts from the other.',
        ),
        ({"chosen": [{"role": "tool", "content": "x"}]}, '"chosen" is a conversation that does not begin'),
        (
            {"chosen": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            '"chosen" is a tool call, which cannot be learned from yet.',
        ),
    ],
)
def test_bad_fields(file: Path, changes: dict[str, Any], problem: str):
    (found,) = problems(file, row(**changes) + "\n")
    assert found.startswith(f"f:1: {problem}")


def test_missing_keys_show_what_the_row_has(file: Path):
    assert problems(file, '{"instruction": "a", "chosen": "b"}\n{}\n') == [
        'f:1: "rejected" is missing. The row has "instruction", "chosen".',
        'f:2: "chosen" and "rejected" are missing. The row has no keys.',
    ]


def test_an_implicit_prompt_needs_conversations(file: Path):
    assert problems(file, '{"chosen": "a", "rejected": "b"}\n') == [
        'f:1: "prompt" is missing. The row has "chosen", "rejected".'
    ]
    assert problems(file, json.dumps({"chosen": [assistant("a")], "rejected": [assistant("b")]}) + "\n") == [
        "f:1: the prompt ends with nobody's turn. It must end with the user's turn that is to be answered."
    ]


def test_ten_problems_are_listed_and_the_rest_counted(file: Path):
    found = problems(file, f"{row()}\n" + '{"prompt": 1}\n' * 1000)
    assert len(found) == 11
    assert found[0].startswith('f:2: "chosen" and "rejected" are missing')
    assert found[-1] == "and 990 more problems like these."


# Rows that teach nothing, and rows that look like mistakes


def test_useless_rows_are_skipped_and_named(file: Path):
    result = read(
        file,
        row(),
        row(chosen=" \n"),
        row(rejected=""),
        row(chosen="r"),
        row(chosen=" r"),
        row(weight=0),
        row(prompt=" "),
    )
    assert len(result.pairs) == 1
    assert [(skip.line, skip.reason) for skip in result.skipped] == [
        (2, "the chosen answer is blank"),
        (3, "the rejected answer is blank"),
        (4, "both answers are the same"),
        (5, "the answers differ only in white space at their ends"),
        (6, "its weight is 0"),
        (7, "the prompt is blank"),
    ]
    assert str(result.skipped[0]) == f"{file}:2: the chosen answer is blank."


def test_equal_conversations_are_skipped_not_refused(file: Path):
    same = [user("p"), assistant("a")]
    result = read(file, row(), {"chosen": same, "rejected": same})
    assert [skip.reason for skip in result.skipped] == ["both answers are the same"]


def test_nothing_left_is_an_error(file: Path):
    assert problems(file, f"{row(chosen='r')}\n{row(chosen='')}\n") == [
        "f: 0 pairs are left: all 2 rows were skipped.",
        "f:1: both answers are the same.",
        "f:2: the chosen answer is blank.",
    ]


def test_repeats_and_contradictions_are_kept_and_warned_about(file: Path):
    result = read(
        file,
        row(id="a"),
        row(id="b"),
        row(id="a", chosen="r", rejected="c"),
        row(prompt=" p "),
        row(chosen="other"),
    )
    assert len(result.pairs) == 5
    assert [str(warning).replace(str(file), "f") for warning in result.warnings] == [
        "f: an earlier pair is repeated 2 times (lines 2 and 4). "
        "Repeated pairs count twice: delete them, or use weight.",
        "f: an earlier pair's answers are swapped 2 times (lines 3 and 4). Keep the one you mean.",
        "f: an id is used again 1 time (line 3). Give every pair its own id.",
    ]


def test_clean_files_warn_of_nothing(file: Path):
    result = read(file, row(), row(prompt="q"), row(rejected="other"))
    assert (result.skipped, result.warnings) == ([], [])


# Prompts


def test_prompts(file: Path):
    file.write_text(
        '{"prompt": "2+2?", "accept": ["4", "four"], "tags": ["maths"], "id": "m1", "note": 1}\n\n'
        '{"prompt": [{"role": "user", "content": "Hi"}], "system": "s"}\n'
    )
    first, second = read_prompts(file)
    assert (first.prompt, first.accept, first.tags, first.id) == (
        (user("2+2?"),),
        ("4", "four"),
        ("maths",),
        "m1",
    )
    assert (first.extra, first.line, first.source) == ({"note": 1}, 1, str(file))
    assert (second.prompt, second.accept, second.line) == ((system("s"), user("Hi")), (), 3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f: 0 prompts: the file is empty"),
        ('{"accept": ["x"]}\n', 'f:1: "prompt" is missing. The row has "accept".'),
        ('{"prompt": "a", "accept": "x"}\n', 'f:1: "accept" must be a list of texts'),
        ('{"prompt": "a", "accept": [" "]}\n', 'f:1: "accept" must be a list of texts'),
        ('{"prompt": " "}\n', 'f:1: "prompt" is blank.'),
        ('{"prompt": 1}\n', 'f:1: "prompt" must be text'),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
            "f:1: the prompt ends with assistant's turn.",
        ),
        ("{\n", "f:1: is not JSON"),
    ],
)
def test_bad_prompts(file: Path, text: str, problem: str):
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    (found,) = caught.value.problems
    assert str(found).replace(str(file), "f").startswith(problem)
