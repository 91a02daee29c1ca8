"""Reports in a real browser: nothing runs, nothing is fetched, and it can be read on a phone, in the dark, on paper."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, find_browser, page_of
from report_runs import evaluated_run, evaluation, write_run

from localdpo.report.compare import compare_page
from localdpo.report.page import run_page
from localdpo.report.record import read_record

COMMAND = find_browser()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="no Chromium on this machine")

NOW = 1_790_000_200.0
HOST = "example.invalid"
ATTACK = (
    "<script>window.pwned=1;console.error('pwned')</script>"
    '"\'><img src=x onerror="window.pwned=1">'
    f"<img src=https://{HOST}/a.png><iframe src=https://{HOST}/></iframe>"
    f"<link rel=stylesheet href=https://{HOST}/a.css><style>@import url(https://{HOST}/b.css)</style>"
    "<a href='javascript:window.pwned=1'>press</a><svg onload=window.pwned=1></svg>"
    "</style></title><body onload=window.pwned=1>[press](javascript:alert(1))"
)
LONG = "word" * 120 + " https://" + "long." * 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser(str(COMMAND))
    yield started
    started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with page_of(browser) as opened:
        opened.size(1280)
        opened.media()
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run with attacks in every field, one of long words, one unfinished, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    records = {
        "hostile": read_record(evaluated_run(folder / "hostile", ATTACK)),
        "long": read_record(evaluated_run(folder / LONG[:120], LONG)),
        "unfinished": read_record(write_run(folder / "unfinished", state="interrupted")),
        "answers": read_record(_with_answers(folder / "answers")),
    }
    written = {}
    for name, record in records.items():
        written[name] = folder / f"{name}.html"
        written[name].write_text(run_page(record, now=NOW), encoding="utf-8")
    written["compared"] = folder / "compared.html"
    written["compared"].write_text(compare_page(records["hostile"], records["long"], now=NOW), encoding="utf-8")
    return written


def _with_answers(path: Path) -> Path:
    evaluated_run(path)
    data = evaluation()
    data["drift"]["answers"] = [
        {"prompt": f"prompt {n}", "group": "g", "base": "the base says so", "tuned": f"the tuned model {n}"}
        for n in range(20)
    ]
    (path / "eval.json").write_text(json.dumps(data))
    return path


def colour(page: Page, property: str = "backgroundColor") -> tuple[int, ...]:
    found = page.evaluate(f"getComputedStyle(document.documentElement).{property}")
    return tuple(map(int, re.findall(r"\d+", found)[:3]))


def key(page: Page, name: str, code: int, **more: Any) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)


@pytest.mark.parametrize("name", ["hostile", "long", "unfinished", "answers", "compared"])
def test_nothing_runs_nothing_is_fetched_and_nothing_is_wrong(page: Page, files: dict[str, Path], name: str):
    page.open(files[name])
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert page.console == []
    assert page.requests == [files[name].absolute().as_uri()]
    assert page.refused == []
    counts = "['script', 'img', 'iframe', 'link', 'form', 'object', 'embed']"
    assert page.evaluate(f"{counts}.map(name => document.querySelectorAll(name).length).join()") == "0,0,0,0,0,0,0"
    assert page.evaluate("[...document.links].every(link => link.getAttribute('href').startsWith('#'))")
    assert page.evaluate("document.querySelectorAll('style').length") == 1
    names = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not page.evaluate(f"{names}.filter(name => name.startsWith('on') || name === 'style').length")


def test_the_text_of_an_attack_is_shown_as_it_was_written(page: Page, files: dict[str, Path]):
    page.open(files["hostile"])
    assert ATTACK in page.evaluate("document.querySelector('.prompt').textContent")


def test_the_policy_stops_even_what_would_slip_through(browser: Browser, files: dict[str, Path], tmp_path: Path):
    """Markup put in past `escape`: without the policy it runs, with it nothing happens but complaints."""
    text = files["unfinished"].read_text("utf-8")
    planted = text.replace("<h1>", f"<script>window.pwned=1</script><img src=https://{HOST}/a.png onerror='1'><h1>", 1)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', planted)
    assert policy is not None
    (tmp_path / "with.html").write_text(planted, encoding="utf-8")
    (tmp_path / "without.html").write_text(planted.replace(policy.group(), ""), encoding="utf-8")
    with page_of(browser) as page:
        page.open(tmp_path / "without.html")
        assert page.evaluate("window.pwned") == 1
        assert any(HOST in request for request in page.requests)
    with page_of(browser) as page:
        page.open(tmp_path / "with.html")
        assert page.evaluate("typeof window.pwned") == "undefined"
        assert page.requests == [(tmp_path / "with.html").as_uri()]
        assert any("Content Security Policy" in line for line in page.console)
        assert page.evaluate("getComputedStyle(document.body).maxWidth") == "1200px"  # its own style is not refused


@pytest.mark.parametrize("name", ["hostile", "long", "unfinished", "answers", "compared"])
def test_a_phone_scrolls_in_one_direction(page: Page, files: dict[str, Path], name: str):
    page.size(390, 844)
    page.open(files[name])
    for opened in ("false", "true"):
        page.evaluate(f"for (const d of document.querySelectorAll('details')) d.open = {opened}")
        width = "document.documentElement.{0}".format
        assert page.evaluate(width("scrollWidth")) <= page.evaluate(width("clientWidth")) == 390
    wide = "[...document.querySelectorAll('h1, .prompt, .said, svg.chart, .word, .tiles li')]"
    assert page.evaluate(f"{wide}.every(e => e.getBoundingClientRect().right <= 390)")


def test_light_and_dark_follow_the_system_and_the_choice(page: Page, files: dict[str, Path]):
    page.open(files["answers"])
    light = colour(page), colour(page, "color")
    page.media(scheme="dark")
    dark = colour(page), colour(page, "color")
    assert min(light[0]) > 200 > 100 > max(light[1])
    assert max(dark[0]) < 60 < 200 < min(dark[1])
    page.evaluate("document.querySelector('label[for=theme-light]').click()")
    assert (colour(page), colour(page, "color")) == light
    page.media(scheme="light")
    page.evaluate("document.querySelector('label[for=theme-dark]').click()")
    assert (colour(page), colour(page, "color")) == dark


def test_it_works_from_the_keyboard(page: Page, files: dict[str, Path]):
    page.open(files["answers"])
    focused = "document.activeElement.{0}".format
    key(page, "Tab", 9)
    assert page.evaluate(focused("className")) == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    key(page, "Tab", 9)
    assert page.evaluate(focused("id")) == "theme-system"
    key(page, "ArrowRight", 39)
    key(page, "ArrowRight", 39)
    assert page.evaluate("document.getElementById('theme-dark').checked")
    assert max(colour(page)) < 60
    page.evaluate("document.querySelector('details summary').focus()")
    key(page, "Enter", 13, text="\r")
    assert page.evaluate("document.querySelector('details').open")


def test_every_chart_has_words_and_a_table(page: Page, files: dict[str, Path]):
    page.open(files["answers"])
    table = "f.querySelectorAll('details tbody tr').length"
    described = "svg => [svg.getAttribute('aria-label'), svg.getAttribute('role')]"
    figures = page.evaluate(
        f"[...document.querySelectorAll('figure')].map(f => [...({described})(f.querySelector('svg')), {table}])"
    )
    assert len(figures) >= 8
    assert all("over training steps" in label and role == "img" and rows >= 2 for label, role, rows in figures)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    unnamed = [
        node["role"]["value"]
        for node in tree
        if not node.get("ignored")
        and node.get("role", {}).get("value") in ("image", "link", "button", "radio", "region", "table", "heading")
        and not node.get("name", {}).get("value")
    ]
    assert unnamed == []


def test_it_prints_light_whole_and_without_what_is_only_for_screens(page: Page, files: dict[str, Path]):
    page.size(794)
    page.open(files["answers"])
    page.media(kind="print", scheme="dark")
    assert min(colour(page)) > 200
    hidden = (
        "['nav', '.theme', '.points'].every(name => getComputedStyle(document.querySelector(name)).display === 'none')"
    )
    assert page.evaluate(hidden)
    last = "document.querySelectorAll('article')[19]"
    assert page.evaluate(
        f"{last}.closest('details') !== null && {last}.checkVisibility({{contentVisibilityAuto: true}})"
    )
    page.media(kind="screen")
    assert not page.evaluate(f"{last}.checkVisibility({{contentVisibilityAuto: true}})")
    printed = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 2


def test_it_needs_no_javascript(browser: Browser, files: dict[str, Path]):
    with page_of(browser, javascript=False) as page:
        page.size(1280)
        page.open(files["answers"])
        assert page.evaluate("document.querySelectorAll('svg.chart').length") >= 8
        assert page.evaluate("getComputedStyle(document.querySelector('.word')).fontWeight") == "650"
