"""The editable view of a file of pairs: what is not touched keeps its bytes, edits are undone, others' are merged."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from localdpo.data import ground, store
from localdpo.data.drafts import DraftFolder
from localdpo.data.ground import pair_file_lock
from localdpo.data.store import PairDraft, PairStore
from localdpo.errors import EnvironmentFault, InputError

calmly = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def line(prompt: str, chosen: str = "a", rejected: str = "b", **rest: object) -> str:
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest})


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(text + end for text in lines).encode())
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "pairs" / "a.jsonl", *(line(f"p{n}") for n in range(5)))


def prompts(store: PairStore) -> list[str]:
    return [store.row(int(key)).prompt[0]["content"] for key in store.keys]


def saved_prompts(path: Path) -> list[str]:
    return [json.loads(text)["prompt"] for text in path.read_bytes().decode("utf-8-sig").split("\n") if text.strip()]


def drafts_of(path: Path) -> list[Path]:
    return [entry for entry in (path.parent.parent / ".localdpo" / "drafts").glob("*") if entry.is_dir()]


# -- untouched bytes

ODD_LINES = st.sampled_from(
    [
        b'{"prompt": "p", "chosen": "a", "rejected": "b"}',
        b'{"rejected":"b","x":1e5,"prompt" :"caf\\u00e9","chosen":"a"}',
        '{"prompt": "é\u2028\u0085", "chosen": "a\\u001b[31m", "rejected": "\u202eb"}'.encode(),
        b"",
        b"  \t",
        b"not json",
        b"\xff\xfe\x00",
        b'{"prompt": "p"}',
        b' {"prompt": "p", "chosen": "c", "rejected": "d"} ',
        b"\r",
        b"[1, 2]",
    ]
)
ENDS = st.sampled_from([b"\n", b"\r\n"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["update", "insert", "delete", "undo", "redo", "duplicate", "save"]), st.integers(0, 9)),
    max_size=8,
)


def expected_file(bom: bytes, segments: list[tuple[bytes, bytes]], keeps_end: bool, end: bytes) -> bytes:
    """A file keeps ending as it ended; lines in between have an end."""
    pieces = []
    for number, (text, own) in enumerate(segments):
        last = number == len(segments) - 1
        pieces.append(text if last and not keeps_end and text else text + (own or end))
    return bom + b"".join(pieces)


class Lines:
    """The model: every line with its end, and the whole state before each step."""

    def __init__(self, data: bytes) -> None:
        self.bom = data[:3] if data.startswith(b"\xef\xbb\xbf") else b""
        parts = data[len(self.bom) :].split(b"\n")
        self.segments = [(part.removesuffix(b"\r"), b"\r\n" if part.endswith(b"\r") else b"\n") for part in parts[:-1]]
        self.keeps_end = not parts[-1]
        if parts[-1]:
            self.segments.append((parts[-1], b""))
        self.end = self.segments[0][1] if self.segments and self.segments[0][1] else b"\n"
        self.before: list[list[tuple[bytes, bytes]]] = []
        self.after: list[list[tuple[bytes, bytes]]] = []

    def rows(self) -> list[int]:
        return [number for number, (text, _) in enumerate(self.segments) if text.strip(b" \t\r")]

    def remember(self) -> None:
        self.before.append(list(self.segments))
        self.after.clear()

    def saved(self) -> None:
        """New lines now end as the first line of what was written, and an empty file has no line without an end."""
        now = Lines(self.file())
        self.end, self.keeps_end = now.end, now.keeps_end

    def file(self) -> bytes:
        return expected_file(self.bom, self.segments, self.keeps_end, self.end)


@calmly
@given(st.booleans(), st.lists(st.tuples(ODD_LINES, ENDS), max_size=8), st.booleans(), STEPS)
def test_untouched_lines_keep_their_bytes_whatever_is_done_to_others(tmp_path_factory, bom, parts, final_end, steps):
    # As the first line of what is left, such a one would make the file look like UTF-16.
    assume(not any(text.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in text[:4] for text, _ in parts))
    path = tmp_path_factory.mktemp("w") / "a.jsonl"
    data = (b"\xef\xbb\xbf" if bom else b"") + b"".join(text + end for text, end in parts)
    data = data if final_end else data.removesuffix(b"\n").removesuffix(b"\r")
    path.write_bytes(data)
    model = Lines(data)
    with pytest.MonkeyPatch.context() as patch, PairStore.open(path) as opened:
        patch.setattr(store, "_SAME_EDIT_SECONDS", 0.0)
        for number, (what, where) in enumerate(steps):
            step(opened, model, what, where, number)
            assert [opened.raw(int(key)) for key in opened.keys] == [model.segments[row][0] for row in model.rows()]
        opened.save()
        assert path.read_bytes() == model.file()
        if not opened.dirty and not any(what != "save" for what, _ in steps):
            assert path.read_bytes() == data


def step(opened: PairStore, model: Lines, what: str, where: int, number: int) -> None:
    rows = model.rows()
    at = rows[where % len(rows)] if rows else None
    key = int(opened.keys[where % len(rows)]) if rows else None
    if what == "undo" and model.before:
        model.after.append(model.segments)
        model.segments = model.before.pop()
        assert opened.undo() is not None
    elif what == "redo" and model.after:
        model.before.append(model.segments)
        model.segments = model.after.pop()
        assert opened.redo() is not None
    elif what == "insert":
        model.remember()
        added = opened.insert(PairDraft.of(f"new {number}"), after=key)
        place = len(model.segments) if at is None else at + 1
        model.segments.insert(place, (opened.raw(added), model.end))
    elif what == "save":
        opened.save()
        assert path_bytes(opened) == model.file()
        model.saved()
    elif key is not None and at is not None:
        edit_row(opened, model, what, at, key, number)


def edit_row(opened: PairStore, model: Lines, what: str, at: int, key: int, number: int) -> None:
    if what == "update":
        model.remember()
        opened.update(key, PairDraft.of(f"edited {number}", "x", "y"))
        model.segments[at] = (opened.raw(key), model.segments[at][1])
    elif what == "delete":
        model.remember()
        opened.delete([key])
        del model.segments[at]
    elif what == "duplicate":
        model.remember()
        copy = opened.duplicate(key)
        assert opened.raw(copy) == opened.raw(key)
        model.segments.insert(at + 1, (model.segments[at][0], model.end))


def path_bytes(opened: PairStore) -> bytes:
    return opened.path.read_bytes()


def test_a_file_without_final_newline_gets_rows_not_glued(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("first").encode())
    with PairStore.open(path) as opened:
        opened.insert(PairDraft.of("second", "a", "b"))
        opened.save()
    assert saved_prompts(path) == ["first", "second"]
    assert not path.read_bytes().endswith(b"\n")


def test_deleting_the_last_row_leaves_the_blank_line_before_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line("first") + "\n\n" + line("last"))
    with PairStore.open(path) as opened:
        opened.delete([int(opened.keys[-1])])
        opened.save()
        assert path.read_text() == line("first") + "\n\n"
        opened.undo()
        opened.save()
    assert path.read_text() == line("first") + "\n\n" + line("last") + "\n"


def test_crlf_and_byte_order_mark_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (line("p0") + "\r\n" + line("p1") + "\r\n").encode())
    with PairStore.open(path) as opened:
        opened.insert(PairDraft.of("new", "a", "b"), after=int(opened.keys[0]))
        opened.update(int(opened.keys[0]), PairDraft.of("edited", "a", "b"))
        opened.save()
    data = path.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf{")
    assert data.count(b"\r\n") == data.count(b"\n") == 3
    assert saved_prompts(path) == ["edited", "new", "p1"]


@pytest.mark.parametrize("data", ["{}\n".encode("utf-16"), "{}\n".encode("utf-32-le")])
def test_other_encodings_are_refused(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match="byte offset 0"):
        PairStore.open(path)


def test_a_cut_off_last_line_is_shown_and_can_be_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line("whole") + '\n{"prompt": "cut", "chosen": "a", "rejected": "b')
    with PairStore.open(path) as opened:
        key = int(opened.keys[-1])
        assert "ends in the middle" in opened.row(key).problem
        assert opened.summary(key).state == "broken"
        offered = opened.repair(key)
        assert offered is not None
        opened.update_raw(key, offered)
        assert opened.row(key).problem is None
        assert opened.repair(key) is None
        opened.save()
    assert saved_prompts(path) == ["whole", "cut"]


def test_a_line_of_many_megabytes_is_a_broken_row_and_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line("p0") + "\n" + line("x" * 10_000_001) + "\n")
    before = path.read_bytes()
    with PairStore.open(path) as opened:
        assert "longer than" in opened.row(int(opened.keys[1])).problem
        opened.update(int(opened.keys[0]), PairDraft.of("p0", "new", "b"))
        opened.save()
    assert path.read_bytes() == before.replace(b'"a"', b'"new"', 1)


# -- editing


def test_edits_show_at_once_and_are_undone_one_by_one(path):
    with PairStore.open(path) as opened:
        keys = [int(key) for key in opened.keys]
        opened.update(keys[1], PairDraft.of("edited", "x", "y"))
        added = opened.insert(PairDraft.of("new"), after=keys[1])
        opened.swap(keys[2])
        opened.delete([keys[0], keys[4]])
        assert prompts(opened) == ["edited", "new", "p2", "p3"]
        assert (opened.row(keys[2]).chosen, opened.row(keys[2]).rejected) == ("b", "a")
        assert [bool(opened.row(key).dirty) for key in (keys[1], added, keys[3])] == [True, True, False]
        steps = [opened.undo() for _ in range(5)]
        assert [(s.text, s.key) for s in steps[:4]] == [
            ("delete 2 pairs", keys[0]),
            ("swap the answers", keys[2]),
            ("add a pair", keys[2]),
            ("edit a pair", keys[1]),
        ]
        assert steps[4] is None
        assert prompts(opened) == [f"p{n}" for n in range(5)]
        assert not opened.dirty
        assert [opened.redo() is not None for _ in range(5)] == [True] * 4 + [False]
        assert prompts(opened) == ["edited", "new", "p2", "p3"]


def test_typing_in_one_row_is_one_step(path):
    with PairStore.open(path) as opened:
        first, second = (int(key) for key in opened.keys[:2])
        for text in ("a", "ab", "abc"):
            opened.update(first, PairDraft.of(text, "x", "y"))
        opened.update(second, PairDraft.of("other", "x", "y"))
        opened.undo()
        assert opened.row(first).prompt[0]["content"] == "abc"
        assert opened.undo() == ("edit a pair", first)
        assert opened.row(first).prompt[0]["content"] == "p0"
        assert opened.undo() is None


def test_undo_reaches_back_over_a_save(path):
    before = path.read_bytes()
    with PairStore.open(path) as opened:
        keys = [int(key) for key in opened.keys]
        opened.delete(keys[1:3])
        opened.update(keys[0], PairDraft.of("edited", "a", "b"))
        opened.save()
        opened.save()
        opened.undo()
        opened.undo()
        assert opened.dirty
        assert opened.row(keys[1]).dirty
        opened.save()
        assert path.read_bytes() == before
        assert not opened.row(keys[1]).dirty


@pytest.mark.parametrize("more", [0, 1])
def test_what_undo_brought_back_after_a_save_survives_a_crash(path, more):
    opened = PairStore.open(path)
    opened.delete([int(opened.keys[2])])
    opened.save()
    for _ in range(more):  # a journal is begun before the undo
        opened.swap(int(opened.keys[0]))
        opened.undo()
    opened.undo()
    opened.close()
    with PairStore.open(path) as again:
        assert prompts(again) == [f"p{n}" for n in range(5)]


def test_an_edit_taken_back_leaves_nothing_to_save(path):
    with PairStore.open(path) as opened:
        opened.update(int(opened.keys[0]), PairDraft.of("x"))
        opened.undo()
        assert opened.save().status == "unchanged"
        opened.update(int(opened.keys[0]), PairDraft.of("y"))
        assert opened.save().status == "saved"
    assert drafts_of(path) == []


def test_rows_that_are_not_there(path):
    with PairStore.open(path) as opened:
        key = int(opened.keys[0])
        opened.delete(key)
        for call in (opened.row, opened.raw, opened.swap, opened.duplicate, opened.summary, opened.delete):
            with pytest.raises(KeyError):
                call(key)
        with pytest.raises(KeyError):
            opened.insert(PairDraft.of("x"), after=key)
        with pytest.raises(InputError, match="line breaks"):
            opened.update_raw(int(opened.keys[0]), "a\nb")


def test_opening(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        PairStore.open(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="not a file"):
        PairStore.open(tmp_path)
    with PairStore.open(tmp_path / "pairs" / "new.jsonl", create=True) as opened:
        assert len(opened) == 0
        opened.insert(PairDraft.of("first", "a", "b"))
        opened.save()
    assert (tmp_path / "pairs" / "new.jsonl").read_bytes().endswith(b"}\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "pairs" / "new.jsonl")
    with PairStore.open(tmp_path / "link.jsonl") as opened:
        opened.insert(PairDraft.of("second", "a", "b"))
        opened.save()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert saved_prompts(tmp_path / "pairs" / "new.jsonl") == ["first", "second"]


# -- others' edits


def test_changes_of_others_are_noticed_and_taken_in(path):
    with PairStore.open(path) as opened:
        keys = [int(key) for key in opened.keys]
        assert not opened.changed_on_disk()
        opened.update(keys[0], PairDraft.of("mine", "a", "b"))
        opened.insert(PairDraft.of("my new", "a", "b"), after=keys[3])
        opened.delete([keys[1]])
        write(path, line("p0"), line("p1"), line("theirs"), line("p3"), line("their new"), line("p4"))
        assert opened.changed_on_disk()
        result = opened.save()
        assert (result.status, result.rows, result.merged) == ("saved", 6, 2)
        assert saved_prompts(path) == ["mine", "theirs", "p3", "my new", "their new", "p4"]
        assert prompts(opened) == saved_prompts(path)
        assert opened.row(keys[2]).prompt[0]["content"] == "theirs"
        assert not opened.dirty
        assert not opened.changed_on_disk()


def test_reload_shows_theirs_under_our_unsaved_edits(path):
    with PairStore.open(path) as opened:
        opened.update(int(opened.keys[0]), PairDraft.of("mine", "a", "b"))
        write(path, *(line(f"p{n}") for n in range(7)))
        assert opened.reload().status == "reloaded"
        assert prompts(opened) == ["mine", *(f"p{n}" for n in range(1, 7))]
        assert saved_prompts(path)[0] == "p0"
        assert opened.dirty
        assert opened.reload().status == "unchanged"
        opened.discard()
        assert prompts(opened) == [f"p{n}" for n in range(7)]
        assert not opened.dirty
    assert drafts_of(path) == []


def test_a_file_sorted_elsewhere_keeps_our_edit_of_a_moved_row(path):
    with PairStore.open(path) as opened:
        key = int(opened.keys[1])
        opened.update(key, PairDraft.of("mine", "a", "b"))
        write(path, *(line(f"p{n}") for n in (4, 3, 2, 1, 0)))
        assert opened.save().status == "saved"
    assert saved_prompts(path) == ["p4", "p3", "p2", "mine", "p0"]


def conflicting(path: Path, ours: str | None, theirs: str | None) -> PairStore:
    opened = PairStore.open(path)
    key = int(opened.keys[2])
    if ours is None:
        opened.delete([key])
    else:
        opened.update(key, PairDraft.of("p2", ours, "b"))
    lines = [line(f"p{n}") for n in range(5)]
    lines[2:3] = [] if theirs is None else [line("p2", theirs)]
    write(path, *lines)
    return opened


@pytest.mark.parametrize(
    ("ours", "theirs", "choice", "answers"),
    [
        ("mine", "yours", "ours", ["mine"]),
        ("mine", "yours", "theirs", ["yours"]),
        ("mine", "yours", "both", ["yours", "mine"]),
        (None, "yours", "ours", []),
        (None, "yours", "theirs", ["yours"]),
        (None, "yours", "both", ["yours"]),
        ("mine", None, "ours", ["mine"]),
        ("mine", None, "theirs", []),
        ("mine", None, "both", ["mine"]),
    ],
)
def test_a_row_changed_on_both_sides_is_asked_about(path, ours, theirs, choice, answers):
    with conflicting(path, ours, theirs) as opened:
        before, rows = path.read_bytes(), prompts(opened)
        result = opened.save()
        assert result.status == "conflict"
        (conflict,) = result.conflicts
        assert (conflict.our_row and conflict.our_row.chosen) == ours
        assert (conflict.their_row and conflict.their_row.chosen) == theirs
        assert path.read_bytes() == before
        assert prompts(opened) == rows
        assert opened.dirty
        assert opened.save({conflict: choice}).status == "saved"
        assert opened.save().status == "unchanged"
    found = [json.loads(text) for text in path.read_text().split("\n")[:-1]]
    assert [row["prompt"] for row in found if row["prompt"] != "p2"] == ["p0", "p1", "p3", "p4"]
    assert [row["chosen"] for row in found if row["prompt"] == "p2"] == answers


def test_the_same_edit_on_both_sides_is_no_conflict(path):
    with conflicting(path, "same", "same") as opened:
        assert opened.save().status == "saved"
        assert not opened.dirty
    assert path.read_text().count('"same"') == 1


def test_a_choice_holds_for_the_version_that_was_shown(path):
    with conflicting(path, "mine", "yours") as opened:
        (conflict,) = opened.save().conflicts
        write(path, line("p0"), line("p1"), line("p2", "later"), line("p3"), line("p4"))
        again = opened.save({conflict: "ours"})
        assert again.status == "conflict"
        assert again.conflicts[0].their_row.chosen == "later"


def test_a_deleted_file_is_written_anew(path):
    before = path.read_bytes()
    with PairStore.open(path) as opened:
        path.unlink()
        assert opened.changed_on_disk()
        with pytest.raises(InputError, match="is not there"):
            opened.reload()
        assert opened.save().status == "saved"
    assert path.read_bytes() == before


def test_a_file_that_became_something_else_is_left_alone(path, tmp_path):
    with PairStore.open(path) as opened:
        opened.update(int(opened.keys[0]), PairDraft.of("mine", "a", "b"))
        path.write_bytes("{}\n".encode("utf-16"))
        with pytest.raises(InputError, match="UTF-16"):
            opened.save()
        kept = opened.save_as(tmp_path / "mine.jsonl")
        assert saved_prompts(kept)[0] == "mine"
        with pytest.raises(InputError, match="there already"):
            opened.save_as(tmp_path / "mine.jsonl")
        opened.save_as(tmp_path / "mine.jsonl", overwrite=True)
        assert opened.dirty
    assert path.read_bytes() == "{}\n".encode("utf-16")


def test_a_writer_that_comes_between_look_and_replacement_is_merged(path, monkeypatch):
    real, calls = ground.chunks_of, []

    def chunks(source):
        yield from real(source)
        if Path(source).name.startswith("base-") and not calls:
            calls.append(1)
            write(path, *(line(f"p{n}") for n in range(6)))

    with PairStore.open(path) as opened:
        opened.update(int(opened.keys[0]), PairDraft.of("mine", "a", "b"))
        monkeypatch.setattr(ground, "chunks_of", chunks)
        assert opened.save().status == "saved"
    assert calls
    assert saved_prompts(path) == ["mine", "p1", "p2", "p3", "p4", "p5"]


def test_a_file_that_another_program_keeps_locked(path, monkeypatch):
    monkeypatch.setattr(ground, "LOCK_SECONDS", 0.1)
    with PairStore.open(path) as opened, pair_file_lock(path):
        opened.update(int(opened.keys[0]), PairDraft.of("mine"))
        with (
            pytest.raises(EnvironmentFault, match="another program is writing"),
            pair_file_lock(path, timeout=0.05),
        ):
            pass


@calmly
@given(st.data())
def test_a_merge_loses_no_row_of_either_side(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "a.jsonl"
    base = [line(f"p{n}") for n in range(6)]
    write(path, *base)
    with PairStore.open(path) as opened:
        keys = [int(key) for key in opened.keys]
        mine, yours = data.draw(st.sets(st.integers(0, 5))), data.draw(st.sets(st.integers(0, 5)))
        for n in mine:
            opened.update(keys[n], PairDraft.of(f"p{n}", f"mine {n}", "b"))
        added = data.draw(st.integers(0, 2))
        for n in range(added):
            opened.insert(PairDraft.of(f"my new {n}", "a", "b"), after=data.draw(st.sampled_from(keys)))
        lines = [line(f"p{n}", f"yours {n}") if n in yours else base[n] for n in range(6)]
        for n in range(data.draw(st.integers(0, 2))):
            lines.insert(data.draw(st.integers(0, len(lines))), line(f"your new {n}"))
        write(path, *lines)
        result = opened.save()
        if mine & yours:
            assert sorted(conflict.key for conflict in result.conflicts) == sorted(keys[n] for n in mine & yours)
            result = opened.save(dict.fromkeys(result.conflicts, "both"))
        assert result.status in ("saved", "unchanged")
    found = [json.loads(text) for text in path.read_text().split("\n")[:-1]]
    told = {(row["prompt"], row["chosen"]) for row in found}
    assert told >= {(f"p{n}", f"mine {n}") for n in mine} | {(f"p{n}", f"yours {n}") for n in yours}
    assert told >= {(f"p{n}", "a") for n in range(6) if n not in mine | yours}
    assert len(found) == len(lines) + added + len(mine & yours)


# -- drafts


def test_unsaved_edits_come_back_and_go_when_saved(path):
    opened = PairStore.open(path)
    opened.update(int(opened.keys[0]), PairDraft.of("draft", "a", "b"))
    opened.delete([int(opened.keys[4])])
    opened.flush()
    opened.close()
    assert saved_prompts(path) == [f"p{n}" for n in range(5)]
    with PairStore.open(path) as again:
        assert again.recovered is not None
        assert again.recovered.rows == 2
        assert again.recovered.time > 0
        assert prompts(again) == ["draft", "p1", "p2", "p3"]
        assert not again.changed_on_disk()
        again.save()
    assert saved_prompts(path) == ["draft", "p1", "p2", "p3"]
    assert drafts_of(path) == []
    with PairStore.open(path) as clean:
        assert clean.recovered is None


def test_recovered_edits_merge_with_a_file_that_changed_since(path):
    opened = PairStore.open(path)
    opened.update(int(opened.keys[0]), PairDraft.of("draft", "a", "b"))
    opened.close()
    write(path, *(line(f"p{n}") for n in range(6)))
    with PairStore.open(path) as again:
        assert prompts(again) == ["draft", "p1", "p2", "p3", "p4"]
        assert again.changed_on_disk()
        assert again.save().status == "saved"
    assert saved_prompts(path) == ["draft", "p1", "p2", "p3", "p4", "p5"]


def test_a_crash_right_after_the_file_was_replaced_repeats_nothing(path, monkeypatch):
    opened = PairStore.open(path)
    opened.insert(PairDraft.of("new", "a", "b"))
    first = int(opened.keys[0])

    def crash(self, *_):
        opened.update(first, PairDraft.of("after", "a", "b"))
        raise RuntimeError

    monkeypatch.setattr(ground.Ground, "_adopt", crash)
    with pytest.raises(RuntimeError):
        opened.save()
    monkeypatch.undo()
    opened.close()
    assert saved_prompts(path) == ["p0", "p1", "p2", "p3", "p4", "new"]
    with PairStore.open(path) as again:
        assert prompts(again) == ["after", "p1", "p2", "p3", "p4", "new"]
        assert again.recovered.rows == 1
        again.save()
    assert saved_prompts(path) == ["after", "p1", "p2", "p3", "p4", "new"]


def test_edits_made_while_a_save_writes_stay_edits(path, monkeypatch):
    opened = PairStore.open(path)
    opened.update(int(opened.keys[0]), PairDraft.of("before", "a", "b"))
    real = ground.copy_lines

    def slow(chunks, into, name):
        layout = real(chunks, into, name)
        opened.update(int(opened.keys[1]), PairDraft.of("meanwhile", "a", "b"))
        opened.delete([int(opened.keys[-1])])
        return layout

    monkeypatch.setattr(ground, "copy_lines", slow)
    opened.save()
    monkeypatch.undo()
    assert saved_prompts(path) == ["before", "p1", "p2", "p3", "p4"]
    assert prompts(opened) == ["before", "meanwhile", "p2", "p3"]
    opened.close()
    with PairStore.open(path) as again:
        assert prompts(again) == ["before", "meanwhile", "p2", "p3"]
        again.save()
    assert saved_prompts(path) == ["before", "meanwhile", "p2", "p3"]


def journal_of(path: Path) -> Path:
    (folder,) = drafts_of(path)
    (journal,) = folder.glob("journal-*")
    return journal


def test_half_a_line_at_the_end_of_the_journal_was_never_acknowledged(path):
    opened = PairStore.open(path)
    opened.update(int(opened.keys[0]), PairDraft.of("whole", "a", "b"))
    opened.update(int(opened.keys[1]), PairDraft.of("cut", "a", "b"))
    opened.close()
    journal = journal_of(path)
    journal.write_bytes(journal.read_bytes()[:-5])
    with PairStore.open(path) as again:
        assert prompts(again)[:2] == ["whole", "p1"]
        again.update(int(again.keys[1]), PairDraft.of("later", "a", "b"))
    with PairStore.open(path) as third:
        assert prompts(third)[:2] == ["whole", "later"]


@pytest.mark.parametrize("damage", ["base", "header"])
def test_drafts_that_cannot_be_read_are_set_aside(path, damage):
    opened = PairStore.open(path)
    opened.update(int(opened.keys[0]), PairDraft.of("lost", "a", "b"))
    opened.close()
    if damage == "base":
        (base,) = journal_of(path).parent.glob("base-*")
        base.write_bytes(base.read_bytes()[:-10])
    else:
        journal_of(path).write_bytes(b"")
    with PairStore.open(path) as again:
        assert prompts(again) == [f"p{n}" for n in range(5)]
        assert again.recovered.unreadable.is_dir()
        assert again.recovered.rows == 0
    with PairStore.open(path) as third:
        assert third.recovered is None


def test_two_sessions_that_died_are_recovered_one_after_the_other(path):
    first, second = PairStore.open(path), PairStore.open(path)
    first.update(int(first.keys[0]), PairDraft.of("of the first", "a", "b"))
    second.update(int(second.keys[1]), PairDraft.of("of the second", "a", "b"))
    first.close()
    second.close()
    for others in (1, 0):
        with PairStore.open(path) as again:
            assert again.recovered.others == others
            again.save()
    assert saved_prompts(path)[:2] == ["of the first", "of the second"]


def test_a_disk_that_is_full_for_drafts_is_told_by_flush_and_made_good_later(path, monkeypatch):
    with PairStore.open(path) as opened:
        opened.update(int(opened.keys[0]), PairDraft.of("one", "a", "b"))
        real = DraftFolder._write_waiting

        def full(self):
            raise OSError(28, "No space left on device", str(self.folder))

        monkeypatch.setattr(DraftFolder, "_write_waiting", full)
        opened.update(int(opened.keys[1]), PairDraft.of("two", "a", "b"))
        with pytest.raises(EnvironmentFault, match="No space left"):
            opened.flush()
        assert prompts(opened)[:2] == ["one", "two"]
        monkeypatch.setattr(DraftFolder, "_write_waiting", real)
        opened.flush()
    with PairStore.open(path) as again:
        assert prompts(again)[:2] == ["one", "two"]


def test_a_folder_that_takes_no_drafts_can_be_edited_all_the_same(path, monkeypatch):
    monkeypatch.setattr(store, "hidden_folder", lambda _: Path("/dev/null/none"))
    with PairStore.open(path) as opened:
        assert "/dev/null" in opened.drafts_problem
        opened.update(int(opened.keys[0]), PairDraft.of("mine", "a", "b"))
        opened.flush()
        assert opened.save().status == "saved"
    assert saved_prompts(path)[0] == "mine"


def test_a_long_journal_is_written_anew_in_fewer_words(path, monkeypatch):
    monkeypatch.setattr(ground, "_ROTATE_BYTES", 20_000)
    with PairStore.open(path) as opened:
        for number in range(60):
            opened.update(int(opened.keys[0]), PairDraft.of(f"{number} " + "x" * 1000, "a", "b"))
            opened.flush()
        assert journal_of(path).stat().st_size < 25_000
    with PairStore.open(path) as again:
        assert prompts(again)[0].startswith("59 ")


def test_a_hidden_folder_is_the_workspaces_and_left_alone_by_version_control(path):
    with PairStore.open(path):
        assert (path.parent.parent / ".localdpo" / ".gitignore").read_text() == "*\n"
        assert len(drafts_of(path)) == 1
        assert os.stat(drafts_of(path)[0]).st_mode & 0o077 == 0


# -- the list


@pytest.fixture
def varied(tmp_path):
    return write(
        tmp_path / "varied.jsonl",
        line("What is Café?", "A place", "Nothing", tags=["food", "short"]),
        line("Same", "one", "one"),
        line("Twice", "yes", "no"),
        line("Twice", "yes", "no", tags=["short"]),
        line("Twice", "no", "yes"),
        line("Token", "<|im_start|>hi", "b"),
        line("Escape", "\x1b[31mred", "b"),
        "broken, but findable",
        line("Blank", " ", "b"),
        line("Free", "a", "b", weight=0),
        line("First line\nsecond line", "Ａ wide answer", "b"),
    )


def found(opened: PairStore, *args: object, **options: object) -> list[int]:
    return opened.search(*args, **options).tolist()


def test_search_finds_text_tags_states_and_problems(varied):
    with PairStore.open(varied) as opened:
        assert found(opened, "CAFÉ") == [0]
        assert found(opened, "yes twice") == [2, 3, 4]
        assert found(opened, '"first line"') == [10]
        assert found(opened, "line second") == [10]
        assert found(opened, "a wide") == [10]
        assert found(opened, "findable") == [7]
        assert found(opened, "prompt") == []
        assert found(opened, tag="short") == [0, 3]
        assert found(opened, "twice", tag="short") == [3]
        assert found(opened, problem="duplicate") == [2, 3]
        assert found(opened, problem="contradictory") == [2, 3, 4]
        assert found(opened, problem="special_tokens") == [5]
        assert found(opened, problem="escapes") == [6]
        assert found(opened, state="broken") == [7]
        assert found(opened, state="skipped") == [1, 8, 9]
        assert found(opened, state="ok") == [0, 10]
        assert found(opened, state="warned") == [2, 3, 4, 5, 6]
        assert found(opened, problem="any") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert found(opened) == list(range(11))
        assert found(opened, "yes", cancelled=lambda: True) == []
        assert opened.tags() == {"food": 1, "short": 2}
        assert opened.problems()["duplicate"] == 2


def test_search_follows_edits(varied):
    with PairStore.open(varied) as opened:
        assert found(opened, "twice") == [2, 3, 4]
        opened.update(0, PairDraft.of("Now twice as well", "yes", "no"))
        opened.delete([3])
        added = opened.insert(PairDraft.of("Not twice", "x", "y"), after=5)
        assert found(opened, "twice") == [0, 2, 4, added]
        assert found(opened, "café") == []
        assert found(opened, problem="duplicate") == []
        assert found(opened, state="dirty") == [0, added]
        opened.save()
        assert found(opened, state="dirty") == []
        opened.undo()
        opened.undo()
        assert found(opened, problem="duplicate") == [2, 3]
        assert found(opened, state="clean", tag="short") == []


def test_a_summary_says_what_the_list_shows(varied):
    with PairStore.open(varied) as opened:
        assert opened.build_index()
        row = opened.summary(3)
        assert (row.first_line, row.state, row.tags, row.codes) == (
            "Twice", "warned", ("short",), ("duplicate", "contradictory"),
        )  # fmt: skip
        assert (row.prompt_chars, row.chosen_chars, row.rejected_chars) == (5, 3, 2)
        assert opened.summary(7).codes == ("schema",)
        assert opened.summary(10).first_line == "First line"
        opened.max_tokens = 10
        opened.note_tokens({0: 11, 1: 5})
        assert "too_long" in opened.summary(0).codes
        assert found(opened, problem="too_long") == [0]
        opened.update(0, PairDraft.of("short", "a", "b"))
        assert opened.summary(0).tokens is None


def test_the_index_can_be_cut_short_and_goes_on(tmp_path):
    path = write(tmp_path / "many.jsonl", *(line(f"p{n}") for n in range(1000)))
    seen: list[tuple[int, int]] = []
    with PairStore.open(path) as opened:
        assert not opened.build_index(lambda: len(seen) > 1, lambda done, total: seen.append((done, total)))
        assert 0 < seen[-1][0] < 1000
        assert opened.build_index(checks=False)
        assert len(found(opened, "p9")) == 111


def test_edits_from_other_threads_while_rows_are_indexed(tmp_path):
    path = write(tmp_path / "many.jsonl", *(line(f"p{n}") for n in range(600)))
    with PairStore.open(path) as opened:
        failures: list[BaseException] = []

        def edit() -> None:
            try:
                for n in range(100):
                    opened.update(n, PairDraft.of(f"changed {n}", "a", "b"))
                    opened.insert(PairDraft.of("changed too"), after=n)
            except BaseException as error:
                failures.append(error)

        editor = threading.Thread(target=edit)
        editor.start()
        while editor.is_alive():
            opened.search("changed")
        editor.join()
        assert not failures
        assert len(found(opened, "changed")) == 200


def test_many_rows_cost_little_memory_each(tmp_path):
    path = write(tmp_path / "many.jsonl", *([line("x" * 200)] * 20_000))
    with PairStore.open(path) as opened:
        assert len(opened) == 20_000
        columns = [getattr(opened._sheet, name) for name in ("_starts", "_stops", "_ends", "_blank", "_source")]
        assert sum(column.nbytes for column in columns) < 40 * 20_000
        assert not opened._sheet.texts
        assert np.array_equal(opened.keys, np.arange(20_000))
