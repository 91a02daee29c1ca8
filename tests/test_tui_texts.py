"""The UI's pure parts: texts made inert, stand-ins for what is edited, word differences, the search line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from localdpo_tui.actions import Action, register
from localdpo_tui.services.pair_preview import preview
from localdpo_tui.services.pair_query import PairQuery, parse_query
from localdpo_tui.services.pair_recipe import limits_for
from localdpo_tui.services.pair_rows import estimate_tokens, new_file_name, row_line
from localdpo_tui.shown import fit, inert, one_line
from localdpo_tui.standin import StandIns, picture
from localdpo_tui.widgets.pair_list import short_count
from rich.cells import cell_len

from localdpo.data.store import PairStore
from localdpo.data.worddiff import MAX_WORDS, different_words, merged
from localdpo.errors import InputError
from tui import PAIRS, write_pairs

HOSTILE = "\x1b]52;c;aGk=\x07 \x9b31m \u202eevil\u202c \x00 \r \x85 \u2028 \x7f"
TEXTS = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=60)
DANGEROUS = set(map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x2028)))


@pytest.mark.parametrize("show", [one_line, lambda text: inert(text).plain, lambda text: fit(one_line(text), 30)])
def test_nothing_that_steers_a_terminal_is_shown(show):
    assert not DANGEROUS & set(show(HOSTILE))


@given(TEXTS)
def test_stand_ins_keep_every_character_and_its_place(text: str):
    stand_ins = StandIns()
    inside = stand_ins.start(text)
    assert stand_ins.raw(inside) == text
    assert len(inside) == len(text) == len(picture(inside))
    assert not (DANGEROUS - {"\r"}) & set(picture(inside))


@given(st.text(alphabet=[chr(0x10FE00 + i) for i in range(0x200)] + ["\x1b", "a"], max_size=20))
def test_a_text_with_private_use_characters_of_its_own_survives(text: str):
    stand_ins = StandIns()
    assert stand_ins.raw(stand_ins.start(text)) == text


def test_what_is_pasted_is_made_inert_and_comes_out_as_it_went_in():
    stand_ins = StandIns()
    stand_ins.start("plain")
    inside = stand_ins.put("\x1b[2J\r\nnext")
    assert "\x1b" not in inside
    assert stand_ins.raw(inside) == "\x1b[2J\nnext"


@pytest.mark.parametrize("text", ["abc", "日本語", "👨‍👩‍👧 family", "e\u0301clair", "", "wide 漢字 mixed"])
@pytest.mark.parametrize("width", [0, 1, 2, 5, 40])
def test_fit_fills_exactly_the_width(text: str, width: int):
    assert cell_len(fit(text, width)) == width


def test_differences_are_words_and_characters_where_there_are_no_spaces():
    chosen, rejected = different_words("My name is Athene.", "My name is Elena, yes.")
    assert [("My name is Athene."[a:b]) for a, b in chosen] == ["Athene"]
    assert [("My name is Elena, yes."[a:b]) for a, b in rejected] == ["Elena, yes"]
    assert different_words("東京です", "京都です") == ([(0, 1)], [(1, 2)])
    assert different_words("same  text", "same text\n") == ([], [])


@given(st.text(alphabet="ab .é東", max_size=30), st.text(alphabet="ab .é東", max_size=30))
def test_merged_holds_the_second_text_and_marks_the_words_of_the_first(first: str, second: str):
    pieces = merged(first, second)
    assert "".join(piece.text for piece in pieces if piece.side != "first") == second
    shared = "".join(piece.text for piece in pieces if piece.side != "second")
    assert "".join(shared.split()) == "".join(first.split())


def test_long_texts_that_differ_everywhere_are_compared_at_once():
    first, second = (" ".join(f"{mark}{i}" for i in range(MAX_WORDS * 3)) for mark in "xy")
    chosen, rejected = different_words(f"start {first} end", f"start {second} end")
    assert len(chosen) == len(rejected) == 1


def test_a_search_line_is_taken_apart():
    assert parse_query('two "quoted words" tag:"a b" state:unsaved problem:dup') == PairQuery(
        'two "quoted words"', "a b", "dirty", "duplicate"
    )
    assert parse_query("problem:same") == PairQuery(problem="identical")
    assert parse_query("note: this") == PairQuery("note: this")
    assert parse_query("tag: state:") == PairQuery()


@pytest.mark.parametrize("line", ["state:nosuch", "problem:nosuch"])
def test_a_filter_that_there_is_not_says_which_there_are(line: str):
    with pytest.raises(InputError, match="One of"):
        parse_query(line)


def test_the_preview_shows_the_rows_that_the_store_will(tmp_path: Path):
    path = write_pairs(tmp_path / "pairs" / "p.jsonl", [*PAIRS, {"prompt": HOSTILE, "chosen": "a", "rejected": "b"}])
    first = preview(path, 10)
    with PairStore.open(path) as store:
        lines = {int(key): row_line(store, int(key)) for key in store.keys}
    assert list(first) == list(lines)
    for key, line in first.items():
        assert (line.prompt, line.lengths, line.tags) == (lines[key].prompt, lines[key].lengths, lines[key].tags)


def test_a_file_with_drafts_has_no_preview(tmp_path: Path):
    path = write_pairs(tmp_path / "pairs" / "p.jsonl")
    with PairStore.open(path) as store:
        store.delete([0])
        assert preview(path, 10) == {}


def test_the_limits_are_those_of_the_recipe_that_trains_on_the_file(tmp_path: Path):
    path = write_pairs(tmp_path / "pairs" / "p.jsonl")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "a.yaml").write_text("model: other\ndata: {train: ../pairs/p.jsonl, max_length: 96}\n")
    (recipes / "b.yaml").write_text("model: x\ndata: {train: ../pairs/q.jsonl, max_length: 7}\n")
    (recipes / "broken.yaml").write_text("model: [\n")
    limits = limits_for(tmp_path, path)
    assert (limits.model, limits.max_length) == ("other", 96)
    assert limits_for(tmp_path, tmp_path / "none.jsonl").max_length == 1024


def test_tokens_are_guessed_from_bytes_so_that_other_scripts_count():
    assert estimate_tokens("x" * 40) == 10
    assert estimate_tokens("漢" * 40) == 30


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (999, "999"), (1000, "1.0k"), (9949, "9.9k"), (34_000, "34k"), (1_500_000, "1.5M")]
)
def test_counts_take_four_characters(count: int, shown: str):
    assert short_count(count) == shown
    assert len(shown) <= 4


def test_new_files_lie_with_the_other_pairs(tmp_path: Path):
    assert new_file_name(tmp_path, "mine") == tmp_path / "pairs" / "mine.jsonl"
    assert new_file_name(tmp_path, "/abs/x.jsonl") == Path("/abs/x.jsonl")
    with pytest.raises(InputError):
        new_file_name(tmp_path, "a\x1bb")


def test_an_action_is_registered_once():
    action = Action("test.once", "x", "X", "Do it.")
    assert register("test", action) == register("test", action)
    with pytest.raises(ValueError, match="twice"):
        register("test", Action("test.once", "y", "Y", "Do something else."))
