"""How far pairs are from a model: the outliers' arithmetic, and log-probs that are the scorer's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pair_scorer import PairScorer
from tiny import tiny_model

from localdpo.console.pairs_check import Request, run
from localdpo.data.check.findings import Severity
from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import read_pairs
from localdpo.evaluate.distance import Distances, distance_findings, measure_distances, robust_z
from localdpo.model.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(tiny_model(tmp_path_factory.mktemp("tiny") / "model")))


def distances(chosen: list[float], rejected: list[float]) -> Distances:
    lines = np.arange(1, len(chosen) + 1)
    return Distances(lines, np.array(chosen), np.array(rejected), "m")


def test_robust_z_is_not_moved_by_outliers():
    values = np.array([-1.0, -1.5, -2.0, -2.5, -3.0, -100.0])
    scores = robust_z(values)
    # the median is -2.25, the median distance from it 0.75
    assert scores[0] == pytest.approx(1.25 / (1.4826 * 0.75))
    assert scores[-1] < -80


def test_even_rows_have_no_outliers_by_a_hair():
    assert np.abs(robust_z(np.array([-1.0] * 10 + [-1.2]))).max() < 1


def test_rows_far_off_are_named_the_farthest_first():
    chosen = [-2.0, -2.2, -1.8, -2.1, -1.9] * 4 + [-7.0, -9.0]
    far, distance = distance_findings(distances(chosen, [-2.0] * 22))
    assert (far.kind, far.rows, far.severity) == ("far", (22, 21), Severity.WARNING)
    assert far.details["logp_per_token"] == [-9.0, -7.0]
    assert (distance.severity, distance.fix) == (Severity.INFO, "")


def test_far_off_rejected_answers_are_information():
    far, _ = distance_findings(distances([-2.0] * 20, [-2.0] * 19 + [-8.0]))
    assert (far.rows, far.severity, far.details["answer"]) == ((20,), Severity.INFO, "rejected")


def test_chosen_answers_that_the_model_would_hardly_say():
    (finding,) = distance_findings(distances([-4.0] * 20, [-1.0] * 20))
    assert "would hardly say" in finding.message
    assert finding.fix


def test_a_few_pairs_have_no_outliers():
    assert list(distance_findings(distances([-1.0] * 10 + [-90.0], [-1.0] * 11))) == []


def test_distances_are_the_scorer_s_log_probs_a_token(tiny: LoadedModel, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"what is {n}?", "chosen": "my name " * (n + 1), "rejected": "fox"} for n in range(5)]
    path.write_text("broken\n" + "".join(json.dumps(row) + "\n" for row in rows))
    calls: list[tuple[int, int]] = []
    measured = measure_distances(path, tiny, progress=lambda done, total: calls.append((done, total)))
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = encode_pairs(read_pairs(good).pairs, tiny.tokenizer).pairs
    logps = PairScorer(tiny.model).logps(pairs)
    assert measured.lines.tolist() == [2, 3, 4, 5, 6]
    assert measured.chosen == pytest.approx(logps.chosen / [len(pair.chosen_ids) for pair in pairs], abs=1e-4)
    assert measured.rejected == pytest.approx(logps.rejected / [len(pair.rejected_ids) for pair in pairs], abs=1e-4)
    assert calls[-1] == (10, 10)  # both answers of five pairs


def test_a_model_on_the_command_line(tiny: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"what is {n}?", "chosen": f"my name {n}", "rejected": "fox " * (n + 1)} for n in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(Request(path, model=str(tiny.path), json_lines=True))
    findings = {finding["kind"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["distance"]["details"]["pairs"] == 14
    assert findings["distance"]["file"] == str(path)


def test_a_file_without_pairs_has_no_distances(tiny: LoadedModel, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("broken\n")
    assert len(measure_distances(path, tiny).lines) == 0
