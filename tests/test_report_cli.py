"""`localdpo report` and `localdpo runs` as they are typed, and the terminal UI's way to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from localdpo_tui.services import reporting as ui_reporting
from report_runs import evaluated_run, write_run
from test_layers import HEAVY, loaded_by
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.errors import EnvironmentFault
from localdpo.report import write


def localdpo(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an evaluated run, and one that is not."""
    evaluated_run(tmp_path / "runs" / "good", "words")
    write_run(tmp_path / "runs" / "plain", "words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_lies_in_the_run_by_default(folder: Path):
    result = localdpo("report", "runs/good")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Partly learned, the rest drifted.\nruns/good/report.html  ")
    assert (folder / "runs/good/report.html").read_text("utf-8").startswith("<!doctype html>")


def test_output_and_charts_go_where_they_are_told(folder: Path):
    result = localdpo("report", "runs/plain", "--output", "out/page.html", "--charts", "charts")
    assert result.exit_code == 0, result.output
    assert "missing: the verdict: `localdpo eval runs/plain` measures it" in result.output
    assert (folder / "out/page.html").is_file()
    assert not (folder / "runs/plain/report.html").exists()
    charts = sorted((folder / "charts").iterdir())
    assert [chart.stem for chart in charts] == [
        "accuracies", "drift", "grad_norm", "learning_rate", "logps", "loss", "margins", "rewards", "speed",
    ]  # fmt: skip
    for chart in charts:
        assert ET.parse(chart).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_report_as_json(folder: Path):
    said = json.loads(localdpo("report", "runs/good", "--json").output)
    assert said["report"] == "runs/good/report.html"
    assert said["verdict"]["learned"] == "partly"
    assert said["missing"] == []


def test_what_cannot_be_reported_is_said_in_words(folder: Path):
    result = localdpo("report", "nowhere")
    assert result.exit_code == 2
    assert "`localdpo runs` lists the runs" in result.output
    assert localdpo("report", "runs/good", "--output", "runs").exit_code == 2
    result = localdpo("report", "runs/good", "--charts", "c", "--format", "gif")
    assert result.exit_code == 2
    assert "Use svg or png" in result.output


def test_png_without_its_package_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)  # importing it fails
    result = localdpo("report", "runs/good", "--charts", "charts", "--format", "png")
    assert result.exit_code == 3
    assert "pip install 'localdpo[png]'" in result.output
    assert not (folder / "charts").exists()


def test_png_charts_show_what_the_svg_shows(folder: Path):
    pytest.importorskip("resvg_py", reason="the extra png is not installed")
    result = localdpo("report", "runs/good", "--charts", "charts", "--format", "png")
    assert result.exit_code == 0, result.output
    data = (folder / "charts" / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert (width, height) == (760, 484)
    assert len(data) > 5_000  # an empty picture of one colour is far smaller


def test_runs_lists_as_before_and_compares(folder: Path):
    listed = localdpo("runs")
    assert listed.exit_code == 0, listed.output
    assert "runs/good" in listed.output
    assert "8/8" in listed.output
    assert localdpo("runs", "runs").output == listed.output == localdpo("runs", "list", "runs").output
    assert [row["path"] for row in json.loads(localdpo("runs", "--json").output)] == ["runs/good", "runs/plain"]
    assert [row["path"] for row in json.loads(localdpo("runs", "runs", "--json").output)]
    missing = localdpo("runs", "nowhere")
    assert missing.exit_code == 2
    assert "there is no such folder" in missing.output


def test_two_runs_side_by_side_in_a_terminal(folder: Path):
    info = json.loads((folder / "runs/plain/run.json").read_text())
    info["recipe"]["dpo"]["beta"] = 0.3
    (folder / "runs/plain/run.json").write_text(json.dumps(info))
    result = localdpo("runs", "compare", "runs/good", "runs/plain")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["good", "plain"]
    assert any(line.split() == ["Held-out", "accuracy", "80%", "(70%", "to", "90%)", "75%"] for line in lines)
    assert any(line.split() == ["dpo.beta", "0.1", "0.3"] for line in lines)
    assert not list(folder.glob("*.html"))


def test_two_runs_as_a_page_and_as_json(folder: Path):
    result = localdpo("runs", "compare", "runs/good", "runs/plain", "--output", "both.html", "--json", "--charts", "c")
    said = json.loads(result.output)
    assert said["report"] == "both.html"
    assert said["figures"]["held_out_accuracy"] == [0.8, 0.75]
    assert said["recipe"] == {}
    assert len(said["charts"]) == 9
    assert "good and plain" in (folder / "both.html").read_text("utf-8")


def test_open_asks_for_a_browser(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or False)
    result = localdpo("runs", "compare", "runs/good", "runs/plain", "--open")
    assert result.exit_code == 0, result.output
    assert asked == [(folder / "good-plain.html").as_uri()]
    assert "There is no browser to open here" in result.output


def test_a_report_is_made_without_loading_a_model(folder: Path):
    code = "import sys; sys.argv = ['localdpo', 'report', 'runs/good']; from localdpo.cli import main; main()"
    assert not loaded_by(code, folder) & HEAVY
    assert (folder / "runs/good/report.html").is_file()


def test_the_ui_makes_a_report_where_it_is_missing_or_old(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run = folder / "runs" / "good"
    assert ui_reporting.is_stale(run)
    page = ui_reporting.make_report(run)
    assert page == run / write.PAGE == run / ui_reporting.PAGE
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert not ui_reporting.is_stale(run)
    monkeypatch.setattr(subprocess, "run", None)  # a page that is there is not made again
    assert ui_reporting.make_report(run) == page
    monkeypatch.undo()
    stamp = page.stat().st_mtime_ns + 10
    os.utime(run / "eval.json", ns=(stamp, stamp))
    assert ui_reporting.is_stale(run)


def test_the_ui_says_why_there_is_no_report(folder: Path):
    with pytest.raises(EnvironmentFault, match="is not a run folder"):
        ui_reporting.make_report(folder)
