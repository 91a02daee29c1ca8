"""`localdpo eval` and `localdpo blind` on a tiny model: what is written, what is shown, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import collect, recipe_for, workspace, write_rows

from localdpo.console import evaluating, judging, training
from localdpo.data.pairs import prompt_key
from localdpo.errors import InputError
from localdpo.evaluate.blind import BlindTest, Comparison
from localdpo.evaluate.evaluation import EvalOptions, evaluate
from localdpo.evaluate.evidence import read_evaluation, verdict_of_run
from localdpo.evaluate.heldout import evaluate_run
from localdpo.evaluate.probes import closing
from localdpo.train.run import RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        settings = {"data__probes": root / "probes.jsonl", "data__retain": root / "keep.jsonl"}
        for name, rate in (("a", 5e-3), ("b", 1e-3)):
            recipe = recipe_for(
                root, output_dir=root / "runs" / name, train__learning_rate=rate, train__max_steps=6, **settings
            )
            collect(recipe, closing=closing)
        yield root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(root / "runs" / "a", tmp_path / "a")
    return RunFolder(tmp_path / "a")


def evaluated(run: RunFolder, **options: Any) -> dict[str, Any]:
    for _ in (work := evaluate(run, EvalOptions(**options))):
        pass
    assert not list(work)
    data = read_evaluation(run)
    assert data is not None
    return data


def test_an_evaluation_has_every_section_and_agrees_with_training(root: Path, run: RunFolder):
    data = evaluated(run, against=[root / "runs" / "b"])
    assert {"format", "localdpo", "created", "run", "step", "model", "pairs_file", "held_out", "drift"} <= set(data)
    assert (data["run"], data["step"]) == ("a", 6)
    held = data["held_out"]
    own = evaluate_run(run.path).metrics
    assert held["pairs"] == 2
    for name, metric in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert held[name]["value"] == pytest.approx(own[f"eval_{metric}"], abs=1e-4), name
        assert held[name]["low"] <= held[name]["value"] <= held[name]["high"]
    assert held["nats"]["value"] == pytest.approx(held["margin"]["value"] / 0.1, rel=1e-4)
    assert held["margin"]["value"] == pytest.approx(sum(p["margin"] for p in held["per_pair"]) / 2, rel=1e-4)
    (other,) = held["against"]
    theirs = evaluate_run(root / "runs" / "b").metrics
    assert other["margin"]["value"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-4)
    gap = held["margin"]["value"] - other["margin"]["value"]
    assert other["difference"]["margin"]["value"] == pytest.approx(gap, abs=1e-5)
    drift = data["drift"]
    assert (drift["retain"]["prompts"], drift["probes"]["prompts"], drift["taught"]["prompts"]) == (6, 2, 2)
    assert drift["phrases"] == ["Athene"]
    assert len(drift["answers"]) == 10
    found = verdict_of_run(run)
    assert found is not None
    assert found.words == data["verdict"]["words"]
    assert len(found.reasons) == len(data["verdict"]["reasons"]) >= 4


def test_tasks_and_fairness_go_into_the_evaluation(run: RunFolder, tmp_path: Path):
    with pytest.raises(InputError):
        next(evaluate(run, EvalOptions(tasks=["nosuch"])))
    with pytest.raises(InputError):
        next(evaluate(run, EvalOptions(fairness=[str(tmp_path / "none.jsonl")])))
    data = evaluated(run, drift=False, tasks=["sentiment"], fairness=["gender-en"], limit=2)
    (task,) = data["tasks"]
    assert (task["name"], task["kind"], task["examples"]) == ("sentiment", "classification", 2)
    assert {"base", "tuned"} <= set(task["metrics"]["accuracy"])
    (fairness,) = data["fairness"]
    assert (fairness["name"], fairness["language"]) == ("gender-en", "en")
    assert {"base", "tuned"} <= set(fairness["gap_logp"])


def test_own_pairs_with_tags_and_no_drift(run: RunFolder, tmp_path: Path):
    rows = [
        {"prompt": f"name {n}?", "chosen": "my name is Athene", "rejected": "fox", "tags": ["odd"] if n % 2 else []}
        for n in range(5)
    ]
    data = evaluated(run, pairs_file=write_rows(tmp_path / "own.jsonl", rows), drift=False)
    assert data["drift"] is None
    assert data["held_out"]["pairs"] == 5
    assert list(data["held_out"]["tags"]) == ["odd"]
    assert data["held_out"]["tags"]["odd"]["pairs"] == 2
    assert data["held_out"]["per_pair"][1]["source"] == "own.jsonl:2"
    assert data["verdict"]["kept"] is not None  # the chosen answers' own log-prob says something


def test_leaving_half_way_writes_nothing(run: RunFolder):
    work = evaluate(run, EvalOptions())
    for _ in range(4):
        next(work)
    work.close()
    assert not (run.path / "eval.json").exists()
    (run.path / "eval.json").write_text("before")
    work = evaluate(run, EvalOptions(drift=False))
    next(work)
    work.close()
    assert (run.path / "eval.json").read_text() == "before"


def test_what_cannot_be_measured_is_said_before_a_model_is_loaded(root: Path, run: RunFolder, tmp_path: Path):
    with pytest.raises(InputError, match="no run with an adapter"):
        next(evaluate(RunFolder(tmp_path)))
    with pytest.raises(InputError, match="no run with an adapter"):
        next(evaluate(run, EvalOptions(against=[tmp_path])))
    other = recipe_for(root, model="smollm2-135m").model_dump(mode="json")
    shutil.copytree(run.path, tmp_path / "other")
    (tmp_path / "other" / "recipe.yaml").write_text(json.dumps(other))
    with pytest.raises(InputError, match="was trained on smollm2-135m"):
        next(evaluate(run, EvalOptions(against=[tmp_path / "other"])))
    with pytest.raises(InputError):
        next(evaluate(run, EvalOptions(pairs_file=tmp_path / "none.jsonl")))


def test_what_is_shown_names_every_section(root: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]):
    evaluating.run(evaluating.Request(run.path, against=[root / "runs" / "b"]))
    shown = capsys.readouterr()
    for text in (
        "held-out pairs (2)", "against b:", "drift, base → tuned", "KL to the base", "leakage", "verdict: ", "written: "
    ):  # fmt: skip
        assert text in shown.out, text
    assert "\x1b" not in shown.out + shown.err
    assert "scoring the held-out pairs" in shown.err
    evaluating.run(evaluating.Request(run.path, drift=False, json=True))
    shown = capsys.readouterr()
    assert json.loads(shown.out)["run"] == "a"
    assert not shown.err


def test_training_ends_with_its_verdict(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": str(root / "model"),
        "data": {"train": str(root / "pairs.jsonl"), "retain": None, "probes": str(root / "probes.jsonl")},
        "train": {"max_steps": 1},
    }
    Path("r.yaml").write_text(json.dumps(recipe))
    training.run(Path("r.yaml"), [], training.Options())
    lines = capsys.readouterr().out.splitlines()
    verdict = verdict_of_run(RunFolder("runs/r"))
    assert verdict is not None
    assert lines[-1] == f"verdict: {verdict.words}"
    assert "not learned" in lines[-1]


def blind_test(path: Path, count: int = 3) -> tuple[BlindTest, list[Any]]:
    prompts = [({"role": "user", "content": f"q{n}"},) for n in range(count)]
    return BlindTest.start(path / "t.jsonl", ("base", "a"), 5), prompts


def answers(prompts: Any) -> list[Comparison]:
    return [
        Comparison(prompt_key(p).hex(), p, ("same", "same") if p[0]["content"] == "q1" else ("old\x1b[2J", "new"))
        for p in prompts
    ]


def sitting(test: BlindTest, prompts: Any, keys: str, **options: Any) -> str:
    pressed, out = iter(keys), io.StringIO()

    def read() -> str:
        try:
            return next(pressed)
        except StopIteration:
            raise EOFError from None

    judging.judge_all(test, prompts, answers, read, out, **options)
    return out.getvalue()


def test_keys_judge_undo_and_leave_and_the_journal_goes_on(tmp_path: Path):
    test, prompts = blind_test(tmp_path)
    shown = sitting(test, prompts, "x1u2q")
    assert "\x1b" not in shown
    assert shown.count("[1 of 3] q0") == 3  # after a wrong key, and after the undo
    assert len(test.judgements) == 2  # q0 by hand, q1 is a tie that nobody is asked about
    again = BlindTest.resume(test.path)
    rest = sitting(again, prompts, "t")
    assert "[3 of 3] q2" in rest
    rate = again.win_rate()
    assert (rate.ties, rate.judged) == (2, 3)
    assert "win rate" in rest
    assert "there is no verdict to take back" in sitting(blind_test(tmp_path / "new")[0], prompts, "uq")


def test_a_sitting_ends_at_its_limit(tmp_path: Path):
    test, prompts = blind_test(tmp_path, 5)
    sitting(test, prompts, "1111", limit=1)
    assert sum(test.comparisons[key].answers[0] != "same" for key in test.judgements) == 1


def test_blind_answers_come_from_both_models_and_count_in_the_evaluation(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judging, "ANSWER_TOKENS", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\nt\n1\n1\n1\n1\n"))
    judging.run(run.path, None, None, limit=None, as_json=False)
    shown = capsys.readouterr().out
    assert "a against base, blind" in shown
    (row,) = evaluated(run, drift=False)["blind"]
    assert (row["a"], row["b"], row["judge"]) == ("base", "a", "human")
    assert row["wins"] + row["losses"] + row["ties"] > 0
    judging.run(run.path, None, None, limit=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["result"]["wins"] == row["wins"]


def test_a_blind_test_of_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no run folder"):
        judging.run(tmp_path, None, None, limit=None, as_json=False)
