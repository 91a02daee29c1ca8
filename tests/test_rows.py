"""One line of a file of pairs: taken apart whatever it holds, changed without touching what did not change."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdpo.data.jsonl import parse_object
from localdpo.data.rows import PairDraft, read_row, repaired, write_row
from localdpo.data.rowtext import ABSENT, complete, set_values
from localdpo.errors import InputError

calmly = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MESSAGES = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"})
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=6)


@calmly
@given(objects, st.dictionaries(texts, values | st.just(ABSENT), max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_setting_values_gives_the_object_with_those_values(before, changes, ascii_only, indent):
    text = json.dumps(before, ensure_ascii=ascii_only, indent=indent)
    after = json.loads(set_values(text, changes))
    expected = {**before, **changes}
    assert after == {key: value for key, value in expected.items() if value is not ABSENT}
    kept = [key for key in before if key in after]
    assert [key for key in after if key in before] == kept


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ('{ "a" : 1e5,  "b":2 }', {"b": 3}, '{ "a" : 1e5,  "b":3 }'),
        ('{"n": 1.50, "big": 123456789012345678901, "c": "x"}', {"c": "y"},
         '{"n": 1.50, "big": 123456789012345678901, "c": "y"}'),
        ('{"a":1,"b":2}', {"c": [1, {"d": 2}]}, '{"a":1,"b":2,"c":[1,{"d":2}]}'),
        ('{"a": 1, "b": 2, "c": 3}', {"b": ABSENT}, '{"a": 1, "c": 3}'),
        ('{"a": 1, "b": 2}', {"b": ABSENT}, '{"a": 1}'),
        ('{"a": 1}', {"a": ABSENT}, "{}"),
        ("{}", {"a": "é"}, '{"a": "é"}'),
        ('{"a": "caf\\u00e9"}', {"b": "é"}, '{"a": "caf\\u00e9", "b": "\\u00e9"}'),
        ('{"a": "café \\u001b"}', {"b": "é"}, '{"a": "café \\u001b", "b": "é"}'),
        ('{"a": "} , { \\" "}', {"b": 1}, '{"a": "} , { \\" ", "b": 1}'),
    ],
)  # fmt: skip
def test_what_does_not_change_keeps_its_bytes(before, changes, after):
    assert set_values(before, changes) == after


def test_rows_in_every_form_read_the_same():
    plain = b'{"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}'
    listed = json.dumps({
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}],
    }).encode()  # fmt: skip
    whole = json.dumps({
        name: [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
               {"role": "assistant", "content": answer}]
        for name, answer in (("chosen", "a"), ("rejected", "b"))
    }).encode()  # fmt: skip
    for raw in (plain, listed, whole):
        row = read_row(raw)
        assert (row.system, row.chosen, row.rejected, row.problem) == ("s", "a", "b", None)
        assert row.prompt == ({"role": "user", "content": "q"},)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b'{"prompt": "q", "chosen": "a"', "ends in the middle of a row"),
        (b'{"prompt": "q", "chosen": "a"}', '"rejected" is missing'),
        (b'{"prompt": "q", "chosen": 5, "rejected": "b"}', '"chosen" must be text'),
        (b"\xff\xfe", "is not UTF-8: byte 0xff at byte 0 of the line"),
        (b"[1]", "is a JSON list"),
        (b'{"a": NaN}', "NaN"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"prompt": "q", "prompt": "q"}', "twice"),
        (b"x" * 10_000_001, "longer than"),
    ],
)
def test_what_is_no_pair_is_a_row_with_its_problem(raw, problem):
    row = read_row(raw, 7)
    assert row.key == 7
    assert problem in row.problem
    assert row.code in ("schema", "encoding")


def test_a_broken_row_shows_what_could_be_read():
    row = read_row(b'{"prompt": "q", "chosen": "a", "note": 1, "tags": ["t", 3]}')
    assert (row.prompt[0]["content"], row.chosen, row.tags, row.extra) == ("q", "a", ("t",), {"note": 1})


@pytest.mark.parametrize(
    "raw",
    [b'{"prompt": " ", "chosen": "a", "rejected": "b"}', b'{"prompt": "q", "chosen": "a", "rejected": "a "}'],
)
def test_a_pair_that_teaches_nothing_is_no_broken_row(raw):
    row = read_row(raw)
    assert row.problem is None
    assert row.skipped


drafts = st.builds(
    PairDraft,
    messages=st.one_of(
        texts.map(lambda text: ({"role": "user", "content": text},)),
        st.tuples(texts, texts).map(
            lambda pair: ({"role": "system", "content": pair[0] + "s"}, {"role": "user", "content": pair[1]})
        ),
        texts.map(lambda text: (*MESSAGES[:2], {"role": "user", "content": text})),
    ),
    chosen=texts,
    rejected=texts,
    tags=st.lists(texts.filter(str.strip), max_size=2).map(tuple),
    weight=st.sampled_from([1.0, 0.5, 0.0, 3.0]),
    extra=st.dictionaries(st.sampled_from(["note", "score", "kind"]), values.filter(lambda value: value is not None)),
    id=st.none() | texts,
).filter(lambda draft: draft.extra.get("kind") not in ("preference", "retain"))

ROWS = (
    None,
    b'{"prompt": "q", "chosen": "a", "rejected": "b"}',
    b'{"id": 5, "note": 1e3, "prompt":"q","chosen":"a","rejected":"b","weight":1,"tags":[]}',
    b'{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a", "name": "n"}],'
    b' "rejected": [{"role": "assistant", "content": "b"}], "system": "old"}',
    b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
    b' "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "x": {"y": [1.0]}}',
    b'{"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
    b' "rejected": "b"}',
    b'{"prompt": 5, "tags": "t", "weight": "heavy"}',
    b'{"prompt": "cut o',
)


@calmly
@given(drafts, st.sampled_from(ROWS))
def test_a_draft_that_was_written_reads_as_it_was(draft, before):
    raw = write_row(before, draft)
    row = read_row(raw)
    assert row.problem is None, raw
    assert row.draft() == draft
    assert write_row(raw, draft) == raw
    parse_object(raw.decode())


@calmly
@given(st.sampled_from(ROWS[1:6]))
def test_a_row_that_did_not_change_keeps_its_bytes(raw):
    assert write_row(raw, read_row(raw).draft()) == raw


def test_an_edit_changes_its_value_alone():
    raw = b'{"id":7, "z": [1.0, 1e5], "prompt": "caf\\u00e9", "rejected":"b", "chosen" : "a"}'
    row = read_row(raw)
    draft = PairDraft(row.messages, "new é", row.rejected, row.tags, row.weight, row.extra, row.id)
    assert write_row(raw, draft) == raw.replace(b'"a"', b'"new \\u00e9"')


@pytest.mark.parametrize(
    ("draft", "where"),
    [
        (PairDraft.of("q", "a", "b", tags=(" ",)), "tags"),
        (PairDraft.of("q", "a", "b", weight=float("nan")), "weight"),
        (PairDraft.of("q", "a", "b", weight=-1), "weight"),
        (PairDraft.of("q", "a", "b", extra={"prompt": 1}), "prompt"),
        (PairDraft.of("q", "\ud800", "b"), "half of a surrogate pair"),
        (PairDraft.of("q", "a", "b", extra={"x": float("inf")}), "cannot be written"),
        (PairDraft.of("q", "a", "b", extra={"x": object()}), "cannot be written"),
    ],
)
def test_what_no_file_can_hold_is_refused(draft, where):
    with pytest.raises(InputError, match=where):
        write_row(None, draft)


@pytest.mark.parametrize(
    "whole",
    ['{"prompt": "q", "chosen": "a \\" \\u00e9", "rejected": "b", "tags": ["x", "y"], "n": {"a": [1, 2.5, true]}}'],
)
def test_a_line_cut_off_anywhere_is_closed(whole):
    for end in range(12, len(whole)):
        closed = complete(whole[:end])
        assert closed is not None, whole[:end]
        value = json.loads(closed)
        assert "q".startswith(value["prompt"])
    assert complete(whole) is None
    assert complete("nothing like it") is None


def test_a_repair_is_offered_for_cut_off_rows_only():
    assert repaired('{"prompt": "é'.encode()[:-1]) == b'{"prompt": ""}'
    assert repaired(b'{"prompt": "q", "chosen": "a", "rej') == b'{"prompt": "q", "chosen": "a"}'
    assert repaired(b'{"prompt": "q"}') is None
    assert repaired(b"\x00\x01") is None
