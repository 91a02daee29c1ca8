"""Exporting: round trips of every form through the importer, formula cells, and what a form cannot hold."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data.exporters import ExportOptions, export_pairs, target_of
from localdpo.data.flat import COLUMNS, harmless_cell, original_cell
from localdpo.data.importing import ImportOptions, import_pairs
from localdpo.data.pairs import PreferencePair, pair_to_json, read_pairs
from localdpo.data.rowform import with_line_ends
from localdpo.errors import EnvironmentFault, InputError

PYARROW = importlib.util.find_spec("pyarrow") is not None
parquet_only = pytest.mark.skipif(not PYARROW, reason="pyarrow is not installed")

texts = st.text(
    st.characters(exclude_categories=("Cs",)) | st.sampled_from("=+-@\t\r\n'\",;\x00\x1b\u2028\u202e＝"), max_size=12
)
said = texts.filter(str.strip)
answers = st.tuples(said, said).filter(lambda pair: pair[0].strip() != pair[1].strip())
names = st.text("abcdefgh ,[]=\"'", min_size=1, max_size=6).filter(str.strip)
turns = st.lists(
    st.builds(
        lambda role, content, name: {"role": role, "content": content} | ({"name": name} if name else {}),
        st.sampled_from(["system", "user", "assistant", "tool"]),
        said,
        st.none() | names,
    ),
    max_size=2,
)
values = st.none() | st.booleans() | st.integers() | said | st.lists(st.integers(), max_size=2)
extras = st.dictionaries(st.sampled_from(["score", "note", "provenance", "source"]), values, max_size=2)


@st.composite
def pairs(draw: st.DrawFn) -> PreferencePair:
    chosen, rejected = draw(answers)
    prompt = [*draw(turns), {"role": "user", "content": draw(said)}]
    return PreferencePair(
        tuple(prompt),  # type: ignore[arg-type]
        chosen,
        rejected,
        id=draw(st.none() | said),
        tags=tuple(draw(st.lists(names, max_size=3))),
        weight=draw(st.floats(0.001, 1e6) | st.just(1.0)),
        kind=draw(st.sampled_from(["preference", "retain"])),
        tools=tuple(draw(st.lists(st.just({"type": "function"}), max_size=1))),
        extra={key: value for key, value in draw(extras).items() if value is not None},
    )


def simple(text: str = "p", **changes: Any) -> PreferencePair:
    turn: Any = {"role": "user", "content": text}
    return PreferencePair(**{"prompt": (turn,), "chosen": "a", "rejected": "b", **changes})


def write(path: Path, rows: list[PreferencePair]) -> Path:
    path.write_text("".join(json.dumps(pair_to_json(pair)) + "\n" for pair in rows), encoding="utf-8")
    return path


def round_trip(rows: list[PreferencePair], options: ExportOptions) -> list[PreferencePair]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        out = root / f"out.{options.target}"
        export_pairs(write(root / "in.jsonl", rows), out, options)
        report = import_pairs(out, root / "back.jsonl", ImportOptions(provenance=False))
        assert report.left_out.total == 0
        return read_pairs(root / "back.jsonl").pairs


# What JSON holds as an integer may come back from a cell of JSON only: None in extra is absent in a row.
def with_line_ends_of(pair: PreferencePair) -> PreferencePair:
    fields = with_line_ends({name: getattr(pair, name) for name in ("prompt", "chosen", "rejected", "tools", "extra")})
    identity, tags = with_line_ends([pair.id, list(pair.tags)])
    prompt, tools = tuple(fields.pop("prompt")), tuple(fields.pop("tools"))
    return replace(pair, **fields, prompt=prompt, tools=tools, id=identity, tags=tuple(tags))


@pytest.mark.parametrize(
    ("target", "form"),
    [
        ("jsonl", "auto"),
        ("jsonl", "conversational"),
        ("csv", "auto"),
        pytest.param("parquet", "auto", marks=parquet_only),
        pytest.param("parquet", "conversational", marks=parquet_only),
    ],
)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pairs(), min_size=1, max_size=12))
def test_a_round_trip_gives_the_same_pairs(target: Any, form: Any, rows: list[PreferencePair]) -> None:
    # What comes in by an import has \n for every line end.
    assert round_trip(rows, ExportOptions(target, form)) == [with_line_ends_of(row) for row in rows]


@settings(deadline=None)
@given(text=texts)
def test_harmless_cells_run_nothing_and_give_back_their_text(text: str) -> None:
    cell = harmless_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))
    assert original_cell(cell) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "＝1", "\n=1"])
def test_formula_cells_are_quoted_and_ordinary_ones_are_not(text: str) -> None:
    assert harmless_cell(text) == f"'{text}"
    assert original_cell(f"'{text}") == text


@pytest.mark.parametrize("text", ["", "a=1", "'tis", "'", "1-1", "\\=1"])
def test_ordinary_cells_stay(text: str) -> None:
    assert harmless_cell(text) == original_cell(text) == text


def test_no_cell_of_a_csv_file_begins_like_a_formula(tmp_path: Path) -> None:
    rows = [simple("=cmd|' /C calc'!A0", chosen="@x", rejected="-y", id="+z", tags=("=t",), extra={"k": "=v"})]
    export_pairs(write(tmp_path / "in.jsonl", rows), tmp_path / "out.csv", ExportOptions("csv"))
    table = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8"))))
    assert table[0] == list(COLUMNS)
    assert table[1][0] == "'=cmd|' /C calc'!A0"
    assert not [cell for row in table for cell in row if cell[:1] in "=+-@\t\r" and cell]
    (pair,) = round_trip(rows, ExportOptions("csv"))
    assert pair == rows[0]


def test_apostrophes_are_counted_on_import_and_kept_when_asked(tmp_path: Path) -> None:
    export_pairs(write(tmp_path / "in.jsonl", [simple("=1")]), tmp_path / "out.csv", ExportOptions("csv"))
    report = import_pairs(tmp_path / "out.csv", tmp_path / "back.jsonl")
    assert report.apostrophes == 1
    assert "--keep-apostrophes" in "\n".join(report.sentences())
    kept = ImportOptions(keep_apostrophes=True)
    import_pairs(tmp_path / "out.csv", tmp_path / "back.jsonl", kept, force=True)
    assert read_pairs(tmp_path / "back.jsonl").pairs[0].prompt[0]["content"] == "'=1"


SYSTEM: Any = {"role": "system", "content": "s"}
TURN: Any = {"role": "user", "content": "p"}


def test_the_two_trl_forms(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [simple(), simple(prompt=(SYSTEM, TURN), id="7")])

    def rows(**options: Any) -> list[dict[str, Any]]:
        out = tmp_path / "out.jsonl"
        export_pairs(source, out, ExportOptions(**options), force=True)
        return [json.loads(line) for line in out.read_text().splitlines()]

    standard = rows(form="standard")
    assert standard == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    both = rows(form="conversational")
    assert both[0]["prompt"] == [TURN]
    assert both[1] == {
        "prompt": [SYSTEM, TURN],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "id": "7",
    }
    assert rows() == both  # auto: one pair needs messages, so all have them
    assert set(rows(bare=True)[1]) == {"prompt", "chosen", "rejected"}
    write(source, [simple()])
    assert rows() == standard


def test_what_the_standard_form_cannot_hold_is_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [simple(), simple(prompt=(SYSTEM, TURN))])
    with source.open("a") as file:
        file.write('{"prompt": "p", "chosen": "", "rejected": "b"}\nnot JSON\n{"prompt": "p"}\n')
    report = export_pairs(source, tmp_path / "out.jsonl", ExportOptions(form="standard"))
    assert (report.rows, report.written, report.left_out.total) == (5, 1, 4)
    text = "\n".join(report.sentences())
    assert "the standard form cannot hold (line 2)" in text
    for line, reason in ((3, "blank"), (4, "is not JSON"), (5, "are missing")):
        assert reason in text
        assert f"(line {line})" in text
    write(source, [simple(prompt=(SYSTEM, TURN))])
    with pytest.raises(InputError, match="0 pairs to export"):
        export_pairs(source, tmp_path / "none.jsonl", ExportOptions(form="standard"))
    assert not (tmp_path / "none.jsonl").exists()


def test_provenance_stays_unless_told_otherwise(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [simple(extra={"provenance": {"how": "imported"}, "k": 1})])
    for keep in (True, False):
        export_pairs(source, tmp_path / "out.jsonl", ExportOptions(provenance=keep), force=True)
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert ("provenance" in row, row["k"]) == (keep, 1)


def test_the_target_is_in_the_name_or_asked_for() -> None:
    assert [target_of(f"x.{suffix}") for suffix in ("jsonl", "CSV", "parquet")] == ["jsonl", "csv", "parquet"]
    assert target_of("-") == "jsonl"
    assert target_of("x.txt", "csv") == "csv"
    for out, asked in (("x.txt", None), ("x", "xls")):
        with pytest.raises(InputError):
            target_of(out, asked)
    with pytest.raises(InputError, match="--form"):
        ExportOptions(form="nosuch")  # type: ignore[arg-type]


def test_csv_for_excel_begins_with_a_mark(tmp_path: Path) -> None:
    export_pairs(write(tmp_path / "in.jsonl", [simple("é")]), tmp_path / "out.csv", ExportOptions("csv", bom=True))
    assert (tmp_path / "out.csv").read_bytes().startswith(b"\xef\xbb\xbfprompt")
    import_pairs(tmp_path / "out.csv", tmp_path / "back.jsonl")
    assert read_pairs(tmp_path / "back.jsonl").pairs[0].prompt[0]["content"] == "é"


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [simple()])
    with pytest.raises(InputError, match="--force"):
        export_pairs(source, source)


@pytest.mark.skipif(PYARROW, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"localdpo\[parquet\]"):
        export_pairs(write(tmp_path / "in.jsonl", [simple()]), tmp_path / "out.parquet", ExportOptions("parquet"))


@parquet_only
def test_parquet_has_columns_that_others_read(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    rows = [simple(f"p{n}", weight=0.5, tags=("t",)) for n in range(2500)]
    source = write(tmp_path / "in.jsonl", rows)
    export_pairs(source, tmp_path / "out.parquet", ExportOptions("parquet", bare=True))
    table = parquet.read_table(tmp_path / "out.parquet")
    assert (table.num_rows, table.column_names) == (2500, ["prompt", "chosen", "rejected", "tools"])
    export_pairs(source, tmp_path / "out.parquet", ExportOptions("parquet", "conversational"), force=True)
    first = parquet.read_table(tmp_path / "out.parquet").slice(0, 1).to_pylist()[0]
    assert first["prompt"] == [{"role": "user", "content": "p0"}]
    assert (first["tags"], first["weight"]) == (["t"], 0.5)


@parquet_only
def test_parquet_by_others(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet as parquet

    values = {
        "prompt": ["p", "q", "r"],
        "chosen": [[{"role": "assistant", "content": "a"}]] * 3,
        "rejected": [[{"role": "assistant", "content": "b"}]] * 2 + [None],
        "when": [datetime.datetime(2024, 1, 2)] * 3,
        "score": [1.5, math.nan, 2.0],
        "messages": [[{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]] * 3,
    }
    parquet.write_table(pyarrow.table(values), tmp_path / "in.parquet")
    report = import_pairs(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    first, second = read_pairs(tmp_path / "out.jsonl").pairs
    assert (first.chosen, first.extra["when"], first.extra["score"]) == ("a", "2024-01-02T00:00:00", 1.5)
    assert second.extra.get("score") is None
    assert (report.left_out.total, report.inspection.container) == (1, "parquet")
