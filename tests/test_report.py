"""Reports without a browser: what is escaped, what is drawn, what is missing, and that any run gives a page."""

from __future__ import annotations

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import evaluated_run, evaluation, step_event, write_run

from localdpo.errors import InputError
from localdpo.report import page
from localdpo.report.answers import answers_of
from localdpo.report.charts import CURVE_POINTS, charts_of
from localdpo.report.compare import compare_page, compared_charts, compared_figures
from localdpo.report.differences import recipe_differences
from localdpo.report.markup import Markup, escape, tag
from localdpo.report.page import run_page
from localdpo.report.palette import DARK, LIGHT, LINES
from localdpo.report.record import Record, read_record
from localdpo.report.summary import headline
from localdpo.report.svg import chart_file, chart_svg
from localdpo.report.values import figure, number, tilde
from localdpo.report.write import write_report
from localdpo.series import Series
from localdpo.train.events import StartEvent, event_line

NOW = 1_790_000_200.0
VOID = {"br", "input", "meta", "col", "hr"}
FORBIDDEN = {"script", "img", "iframe", "object", "embed", "link", "base", "form", "audio", "video", "foreignobject"}
ATTACKS = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "'><a href='javascript:window.pwned=1'>x</a>",
    "</style></title></textarea><script>window.pwned=1</script>",
    "<!--<script>", "]]>", "&lt;script&gt;", "<svg/onload=window.pwned=1>", "{{constructor}}", "\x1b]52;c;x\x07\u202e",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="<>\"'&/=! -abscript\n\x00\u202e\ud800\uffff", max_size=30),
    st.sampled_from(ATTACKS),
)


class Structure(HTMLParser):
    """The elements of a page in order, with the names of their attributes; checks nesting on the way."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str | None] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def sound(page: str) -> Structure:
    """The structure of a page that holds nothing it must not."""
    structure = Structure(page)
    names = {name for name, _ in structure.found}
    assert not names & FORBIDDEN
    assert not [name for _, attributes in structure.found for name in attributes if name.startswith(("on", "style"))]
    assert all(link is not None and link.startswith("#") for link in structure.links)
    return structure


# -- markup


@given(TEXTS)
def test_any_text_is_one_text_in_an_element_and_in_an_attribute(text: str):
    page = str(tag("p", text, title=text))
    structure = Structure(page)
    assert structure.found == [("p", ("title",))]
    parsed = ET.fromstring(page)  # XML as well: charts are files of it
    assert parsed.get("title") is not None
    assert (parsed.text or "") == structure.text


def test_what_a_page_must_not_have_is_refused():
    for attributes in ({"onclick": "x"}, {"style": "x"}, {"href": "javascript:x"}, {"href": "https://a"}, {"src": "x"}):
        with pytest.raises(ValueError, match="must not"):
            tag("a", "x", **attributes)
    assert tag("a", "x", href="#x") == '<a href="#x">x</a>'


def test_only_markup_goes_in_as_it_is():
    assert tag("p", ["<b>", Markup("<i></i>"), 3, None]) == "<p>&lt;b&gt;<i></i>3</p>"
    assert escape("\x1b[31m\u202e") == "␛[31m&lt;U+202E&gt;"


def test_no_template_turns_escaping_off_or_writes_a_value_outside_quotes():
    pages = [path.read_text("utf-8") for path in Path(page.__file__).with_name("templates").glob("*.html")]
    assert len(pages) == 5
    for text in pages:
        assert not re.search(r"\|\s*(safe|xmlattr|urlize)|autoescape|Markup", text)
        assert not re.search(
            r"<[^<>]*=\s*\{\{", text
        )  # an attribute without quotes ends at the first space of its value
        assert not re.search(r"\b(on\w+|style|src|srcset|action)\s*=\s*[\"']", text)


# -- whole pages


def test_any_text_in_any_field_leaves_the_page_as_it_is(tmp_path: Path):
    reference = Structure(run_page(_evaluated(tmp_path / "x", "x"), now=NOW)).found

    @settings(deadline=None, max_examples=8)
    @given(TEXTS)
    def check(text: str) -> None:
        word = f"w{text}w"
        folder = tmp_path / "y"
        shutil.rmtree(folder, ignore_errors=True)
        # Lone surrogates cannot be in a file: JSON escapes stand for them there.
        structure = sound(run_page(_evaluated(folder, word), now=NOW))
        assert structure.found == reference

    check()


def _evaluated(folder: Path, word: str) -> Record:
    return read_record(evaluated_run(folder, word), check=False)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_shown_as_text(tmp_path: Path, attack: str):
    evaluated_run(tmp_path / "a", attack)
    write_run(tmp_path / "<b>&'\"", attack)
    first, second = read_record(tmp_path / "a"), read_record(tmp_path / "<b>&'\"")
    sound(run_page(second, now=NOW))
    page = sound(run_page(first, now=NOW))
    if "\x1b" not in attack:
        assert attack in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    sound(compare_page(first, second, now=NOW))
    for chart in compared_charts(first, second):
        ET.fromstring(chart_file(chart))


def test_a_page_loads_nothing_and_has_a_policy_that_allows_only_its_style(tmp_path: Path):
    page = run_page(read_record(evaluated_run(tmp_path / "a")), now=NOW)
    assert page.count("<style>") == 1
    assert "default-src 'none'; style-src 'sha256-" in page
    assert "url(" not in page
    assert "@import" not in page
    assert not [line for line in page.splitlines() if "://" in line.replace("http://www.w3.org/2000/svg", "")]


def test_a_page_tells_the_verdict_first_and_what_stands_behind_it(tmp_path: Path):
    record = read_record(evaluated_run(tmp_path / "a", "plain words"))
    page = Structure(run_page(record, now=NOW)).text
    assert headline(record) == "Partly learned, the rest drifted"
    order = ["Partly learned", "0.8 (0.6 to 0.9), bound 0.5", "Curves", "Answers before and after", "Hardest pairs",
             "Fairness", "Blind comparison", "Recipe", "How this was made"]  # fmt: skip
    page = page[page.index("~ Partly") :]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    for said in ("80% (70% to 90%)", "1 min 30 s", "800 MB", "no longer right"):
        assert said in page


def test_the_home_of_a_user_is_in_no_page(tmp_path: Path):
    write_run(tmp_path / "a", "/home/jane/secret/pairs.jsonl")
    (tmp_path / "a" / "eval.json").write_text(json.dumps(evaluation("/home/jane/secret/pairs.jsonl:3")))
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    recipe = run_page(read_record(tmp_path / "a"), now=NOW)
    section = recipe[recipe.index('id="recipe"') : recipe.index('id="made"')]
    assert "jane" not in section
    assert "~/secret/pairs.jsonl" in section
    assert tilde("/Users/jane") == "~"
    assert tilde("/home/") == "/home/"
    assert info["recipe"]["data"]["train"].startswith("/home/jane")


# -- what is missing


def test_a_run_without_an_evaluation_says_how_to_get_one(tmp_path: Path):
    record = read_record(write_run(tmp_path / "a", "words"))
    page = sound(run_page(record, now=NOW)).text
    assert headline(record).endswith(" (not evaluated)")
    assert "This is from training's own figures." in page
    assert f"localdpo eval {record.argument} --fairness all" in page
    assert f"localdpo eval {record.argument}" in page
    assert "Held-out pairs were not evaluated." in page
    assert "While training, at step 8: loss 0.125, accuracy 75%." in page


@pytest.mark.parametrize("state", ["training", "interrupted", "diverged", "failed", "stopped"])
def test_a_run_that_is_not_whole_has_a_page(tmp_path: Path, state: str):
    write_run(tmp_path / "a", state=state)
    shutil.rmtree(tmp_path / "a" / "adapter")
    page = sound(run_page(read_record(tmp_path / "a"), now=NOW))
    # No trainer holds its lock: "training" is said to be interrupted.
    assert ("interrupted" if state == "training" else state) in page.text


def test_an_evaluation_of_an_earlier_adapter_is_said_to_be_one(tmp_path: Path):
    folder = evaluated_run(tmp_path / "a")
    warning = "The evaluation is of an earlier adapter of this run."
    assert warning not in run_page(read_record(folder), now=NOW)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "adapter_step": 16}))
    assert warning in run_page(read_record(folder), now=NOW)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"created": 1}')
    page = sound(run_page(read_record(tmp_path), now=NOW)).text
    assert "Not evaluated yet" in page
    assert "No step has been recorded." in page
    assert "There are no answers to compare." in page
    assert "The run has no copy of its pairs yet." in page


def test_an_imported_run_says_where_it_is_from(tmp_path: Path):
    write_run(tmp_path / "a", steps=1)
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    info["imported"] = {"from": "/home/jane/adapter", "format": "peft", "base": "org/name", "sha256": "ab"}
    (tmp_path / "a" / "run.json").write_text(json.dumps(info))
    page = sound(run_page(read_record(tmp_path / "a"), now=NOW)).text
    assert "trained by another tool" in page
    assert "~/adapter" in page


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl", "samples.jsonl", "status.json", "pairs.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"a": [', b"\xff\x00\xfe", b"[" * 3000, b'{"verdict": 3, "drift": 1e999}']
)
def test_damaged_files_leave_their_part_empty(tmp_path: Path, name: str, content: bytes):
    evaluated_run(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    sound(run_page(read_record(tmp_path / "a"), now=NOW))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_any_value_anywhere_in_an_evaluation_gives_a_page(tmp_path: Path):
    folder = evaluated_run(tmp_path / "a")
    places = list(_places(evaluation()))

    @settings(deadline=None, max_examples=15)
    @given(st.sampled_from(places), JSON)
    def check(place: tuple[str | int, ...], value: object) -> None:
        data = evaluation()
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (folder / "eval.json").write_text(json.dumps(data))
        sound(run_page(read_record(folder, check=False), now=NOW))

    check()


def _places(value: object, before: tuple[str | int, ...] = ()):
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*before, key)
        yield from _places(item, (*before, key))


def test_no_run_folder_is_an_error_in_words(tmp_path: Path):
    with pytest.raises(InputError, match=r"has no run\.json"):
        read_record(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_record(tmp_path / "nowhere")


def test_a_link_in_a_run_folder_is_not_written_through(tmp_path: Path):
    write_run(tmp_path / "a")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a" / "report.html").symlink_to(victim)
    with pytest.raises(InputError, match="is a link"):
        write_report(read_record(tmp_path / "a"))
    assert victim.read_text() == "precious"


# -- curves


def test_a_peak_stays_however_long_the_run_is(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"created": 1}')
    events = [StartEvent(total_steps=3_000)]
    events += [step_event(step, loss=99.0 if step == 1_234 else 0.5) for step in range(1, 3_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(event_line, events)))
    record = read_record(tmp_path)
    chart = next(chart for chart in charts_of([record]) if chart.key == "loss")
    buckets = chart.lines[0].series.buckets
    assert len(buckets) <= CURVE_POINTS
    assert sum(bucket.count for bucket in buckets) == 3_000
    peak = next(bucket for bucket in buckets if bucket.high == 99.0)
    assert peak.first <= 1_234 <= peak.last
    assert "between 0.5 and 99" in chart.summary()
    top = min(float(point.split()[1]) for point in chart_svg(chart).split('d="M')[1].split("Z")[0].split("L"))
    assert top < 40  # the band reaches up to where the scale ends
    assert len(run_page(record, now=NOW)) < 600_000


def test_thinning_a_series_keeps_its_points_and_leaves_the_series_alone():
    series = Series()
    series.extend((x, float(x % 7)) for x in range(300))
    thin = series.thinned(10)
    assert len(thin.buckets) <= 10
    assert (thin.buckets[0].first, thin.buckets[-1].last) == (0, 299)
    assert sum(bucket.total for bucket in thin.buckets) == sum(x % 7 for x in range(300))
    assert len(series.buckets) == 300


def test_charts_say_in_words_what_they_show(tmp_path: Path):
    charts = {chart.key: chart for chart in charts_of([read_record(write_run(tmp_path / "a"))])}
    assert "training: from 1 at step 1 to 0.125 at step 8" in charts["loss"].summary()
    assert "held out: from 0.25 at step 4 to 0.125 at step 8" in charts["loss"].summary()
    drawing = ET.fromstring(chart_file(charts["loss"]))
    space = "{http://www.w3.org/2000/svg}"
    assert drawing.find(f"{space}title").text == "Loss"
    assert drawing.find(f"{space}desc").text == charts["loss"].summary()
    assert "lengths" not in charts  # answers were sampled once: no course


def test_a_run_that_was_resumed_is_drawn_from_its_last_attempt(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"created": 1}')
    steps = [1, 2, 3, 4, 3, 4, 5]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(event_line(step_event(s, loss=float(i))) for i, s in enumerate(steps))
    )
    loss = read_record(tmp_path).curves["loss"]
    assert [(bucket.first, bucket.mean) for bucket in loss.buckets] == [(1, 0), (2, 1), (3, 4), (4, 5), (5, 6)]


# -- two runs


def test_two_runs_are_compared(tmp_path: Path):
    first = read_record(evaluated_run(tmp_path / "first", "same"))
    write_run(tmp_path / "second", "same")
    info = json.loads((tmp_path / "second" / "run.json").read_text())
    info["recipe"]["dpo"]["beta"] = 0.3
    (tmp_path / "second" / "run.json").write_text(json.dumps(info))
    second = read_record(tmp_path / "second")
    rows = {row.key: row for row in compared_figures(first, second)}
    assert rows["held_out_accuracy"].values == (0.8, 0.75)
    assert rows["held_out_accuracy"].first == "80% (70% to 90%)"
    assert rows["retain_kl"].values == (0.1, None)
    page = sound(compare_page(first, second, now=NOW)).text
    assert "dpo.beta" in page
    assert "Their data files are the same." in page
    lines = {chart.key: [line.label for line in chart.lines] for chart in compared_charts(first, second)}
    assert lines["loss"] == ["first training", "first held out", "second training", "second held out"]
    assert lines["drift"] == ["first", "second"]


def test_answers_of_two_runs_meet_by_their_prompts(tmp_path: Path):
    records = []
    for name in ("a", "b"):
        write_run(tmp_path / name)
        data = evaluation()
        data["drift"]["answers"] = [
            {"prompt": "shared?", "group": "g", "base": "from the base", "tuned": f"only {name} says"},
            {"prompt": name, "group": "g", "base": "z", "tuned": "alone"},
        ]
        (tmp_path / name / "eval.json").write_text(json.dumps(data))
        records.append(read_record(tmp_path / name))
    page = compare_page(*records, now=NOW)
    assert "1 prompts were put to both; 1 answers differ." in Structure(page).text
    assert "only <del>a</del> says" in page
    assert "only <ins>b</ins> says" in page
    assert [answer.prompt for answer in answers_of(records[0])] == ["shared?", "a"]


def test_recipes_differ_by_their_dotted_keys():
    assert recipe_differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": None}) == [("b.c", 2, 3)]


# -- small things


def test_values_have_the_type_that_was_asked_for():
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), 10**400)] == [1.0, 2.5, *[None] * 5]
    assert figure({"value": 0.5, "low": 0.9, "high": 0.1}).low is None
    assert figure(0.5).value == 0.5
    assert figure({"value": "x"}) is None


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart(palette):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for name in ("text", "muted", "accent"):
        for ground in ("ground", "card", "sunk"):
            assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
    for name in ("good", "fair", "bad", "ins", "del"):
        assert contrast(palette[name], palette[f"{name}-ground"]) >= 4.5, name
    for line in range(LINES):
        assert contrast(palette[f"line{line}"], palette["card"]) >= 3, line


def test_a_page_is_private_as_the_run_is(tmp_path: Path):
    page = write_report(read_record(write_run(tmp_path / "a")))
    assert page == tmp_path / "a" / "report.html"
    assert os.stat(page).st_mode & 0o077 == 0
