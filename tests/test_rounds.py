"""On-policy rounds and what they stand on: starting from an adapter, and a reference that stays or moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import randomise_adapter
from training import adapter_arrays, collect, losses, of, recipe_for, workspace

from localdpo.data.pairs import PromptRow, read_pairs
from localdpo.data.provenance import origin_of
from localdpo.data.rewards import parse_rewards
from localdpo.errors import InputError
from localdpo.evaluate.generate.speakers import Source
from localdpo.evaluate.generate.work import ByRewards, GenerateSettings
from localdpo.evaluate.rounds import RoundDone, Rounds, RoundStart, prompts_of_pairs, run_rounds
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora, save_adapter
from localdpo.model.sampling import SamplingOptions
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.events import EvalEvent, ProgressEvent, StepEvent
from localdpo.train.run import Control


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return workspace(tmp_path)


def adapter(root: Path, rank: int = 8) -> Path:
    loaded = load_model(str(root / "model"))
    info = attach_lora(loaded.model, LoraSettings(rank=rank, scale=16 / rank))
    randomise_adapter(loaded.model)
    save_adapter(root / f"start-{rank}", loaded.model, info, loaded)
    return root / f"start-{rank}"


def first_step(recipe: Recipe) -> StepEvent:
    step: StepEvent = of(collect(recipe), StepEvent)[0]
    return step


def from_start(root: Path, start: Path, **settings: Any) -> Recipe:
    few = {"train__max_steps": 2, "train__lr_scheduler_type": "constant", "train__warmup_ratio": 0.0}
    return recipe_for(root, lora__init_from=start, data__eval=0.2, dpo__rpo_alpha=0.0, **few, **settings)


def test_a_run_goes_on_from_an_adapter_and_its_reference_stays_or_moves(root: Path) -> None:
    start = adapter(root)
    moved = collect(from_start(root, start, dpo__reference="init", output_dir=root / "runs" / "moved"))
    stayed = collect(from_start(root, start, output_dir=root / "runs" / "stayed"))
    # The reference is the model as it starts: no margin yet, the loss is ln 2 at evaluation and at the first step.
    assert losses(moved)[0] == pytest.approx(np.log(2), abs=1e-5)
    assert of(moved, EvalEvent)[0].metrics["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    # The reference is the base: what the adapter has learned shows before the first step.
    assert abs(losses(stayed)[0] - np.log(2)) > 1e-3
    assert abs(of(stayed, EvalEvent)[0].metrics["eval_loss"] - np.log(2)) > 1e-3
    # Both policies are the same model at step 0, so their own log-probs agree.
    one, other = of(moved, StepEvent)[0].metrics, of(stayed, StepEvent)[0].metrics
    assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], abs=1e-4)
    # It went on from that adapter: after two small steps it is still near it.
    before, after = adapter_arrays(start), adapter_arrays(root / "runs" / "moved" / "adapter")
    assert set(before) == set(after)
    assert 0 < max(float(abs(after[name] - before[name]).max()) for name in before) < 0.01


def test_a_resumed_run_keeps_the_reference_it_began_with(root: Path) -> None:
    start = adapter(root)
    whole = from_start(root, start, dpo__reference="init", train__save_steps=1, output_dir=root / "runs" / "whole")
    collect(whole)
    control, cut = Control(), whole.model_copy(update={"output_dir": root / "runs" / "cut"})
    from localdpo.train.loop import train

    for event in train(cut, control=control):
        if isinstance(event, StepEvent):
            control.stop()
    collect(cut, resume=True)
    one, other = (adapter_arrays(root / "runs" / name / "adapter") for name in ("whole", "cut"))
    for name, value in one.items():
        assert np.array_equal(np.array(value), np.array(other[name]))
    (start / "adapters.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="has changed since this run was started"):
        collect(cut.model_copy(update={"train": cut.train.model_copy(update={"max_steps": 3})}), resume=True)


def test_an_adapter_of_another_shape_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"lora\.init_from.*has rank 4, and the recipe asks for 8"):
        collect(from_start(root, adapter(root, rank=4)))


def test_recipes_name_adapters_relative_to_themselves(root: Path) -> None:
    start = adapter(root)
    text = "model: ./model\ndata: {train: pairs.jsonl}\nlora: {init_from: %s}\ndpo: {reference: init}\n"
    (root / "r.yaml").write_text(text % start.name)
    recipe = load_recipe(root / "r.yaml")
    assert (recipe.lora.init_from, recipe.dpo.reference) == (start, "init")
    (root / "r.yaml").write_text(text % "nowhere")
    with pytest.raises(InputError, match=r"lora\.init_from.*there is no adapter"):
        load_recipe(root / "r.yaml")
    with pytest.raises(InputError, match=r"dpo\.reference.*has no reference"):
        load_recipe(root / "r.yaml", ["lora.init_from=null", "dpo.loss_type=simpo", "dpo.simpo_gamma=0.5"])


def prompts() -> list[PromptRow]:
    return [PromptRow(({"role": "user", "content": f"question {n}?"},), line=n + 1, source="p") for n in range(6)]


def plan(root: Path, rounds: int = 2, **changes: Any) -> Rounds:
    rewards = parse_rewards(["length:max=1;unit=characters"])
    values = {"samples": 3, "sampling": SamplingOptions(max_tokens=8, temperature=1.5), "seed": 1, **changes}
    settings = GenerateSettings((Source(str(root / "model")),), ByRewards(rewards, "keep"), **values)
    return Rounds(root / "rounds", rounds, settings)


def quick(root: Path, **settings: Any) -> Recipe:
    few = {"train__max_steps": 2, "train__per_device_train_batch_size": 3, "data__eval": None}
    return recipe_for(root, **few, **settings)


def done(recipe: Recipe, rounds: Rounds, control: Control | None = None) -> list[RoundDone]:
    return [event for event in run_rounds(recipe, prompts(), rounds, control) if isinstance(event, RoundDone)]


def test_rounds_keep_their_pairs_and_adapters_and_build_on_each_other(root: Path) -> None:
    first, second = done(quick(root, dpo__reference="init"), plan(root))
    assert first.pairs >= 4
    assert first.adapter != second.adapter
    for number, event in ((1, first), (2, second)):
        folder = root / "rounds" / f"round-{number:02d}"
        assert Path(event.folder) == folder
        assert {"answers.jsonl", "pairs.jsonl", "recipe.yaml", "round.json", "run"} <= {
            p.name for p in folder.iterdir()
        }
        assert (folder / "run" / "adapter" / "adapters.safetensors").is_file()
        assert len(read_pairs(folder / "pairs.jsonl").pairs) == event.pairs
    recipe = load_recipe(root / "rounds" / "round-02" / "recipe.yaml")
    assert recipe.lora.init_from == Path(str(first.adapter))
    assert recipe.dpo.reference == "init"
    # On policy: the second round's answers are the first round's model's.
    origins = [origin_of(p.extra, "chosen") for p in read_pairs(root / "rounds" / "round-02" / "pairs.jsonl").pairs]
    assert {origin.adapter for origin in origins if origin} == {first.adapter}
    assert {origin.seed for origin in origins if origin} == {2}


def test_finished_rounds_are_passed_over_and_more_can_be_added(root: Path) -> None:
    recipe = quick(root)
    (first,) = done(recipe, plan(root, 1))
    before = (root / "rounds" / "round-01" / "round.json").read_bytes()
    again, second = done(recipe, plan(root, 2))
    assert again.skipped
    assert not second.skipped
    assert (root / "rounds" / "round-01" / "round.json").read_bytes() == before
    assert again.adapter == first.adapter


def test_a_stopped_series_goes_on_to_the_same_adapters(root: Path, tmp_path: Path) -> None:
    recipe = quick(root, train__save_steps=1)
    whole = done(recipe, plan(root))
    arrays = [adapter_arrays(Path(str(event.adapter))) for event in whole]
    (root / "rounds").rename(root / "kept")
    control = Control()
    for event in run_rounds(recipe, prompts(), plan(root), control):
        if isinstance(event, StepEvent):
            control.stop()
    assert not (root / "rounds" / "round-01" / "round.json").exists()
    control = Control()
    for event in run_rounds(recipe, prompts(), plan(root), control):
        in_second = (root / "rounds" / "round-02").exists()
        if in_second and isinstance(event, ProgressEvent) and event.stage == "answers":
            control.stop()
    finished = done(recipe, plan(root))
    assert len(finished) == 2
    for event, expected in zip(finished, arrays, strict=True):
        found = adapter_arrays(Path(str(event.adapter)))
        assert all(np.array_equal(np.array(value), np.array(found[name])) for name, value in expected.items())


def test_another_series_or_a_strange_folder_is_refused(root: Path) -> None:
    recipe = quick(root)
    events = run_rounds(recipe, prompts(), plan(root, 1))
    assert isinstance(next(events), RoundStart)
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="other settings"):
        next(run_rounds(recipe, prompts(), plan(root, 1, seed=9)))
    (root / "strange").mkdir()
    (root / "strange" / "file").touch()
    strange = Rounds(root / "strange", 1, plan(root).generate)
    with pytest.raises(InputError, match="is not empty"):
        next(run_rounds(recipe, prompts(), strange))


def test_a_round_without_pairs_says_why(root: Path) -> None:
    never = GenerateSettings(
        (Source(str(root / "model")),), ByRewards(parse_rewards(["regex:pattern=zzz"]), "keep"), 2,
        SamplingOptions(max_tokens=4, temperature=1.0),
    )  # fmt: skip
    with pytest.raises(InputError, match="round 1: 0 pairs of 12 answers"):
        done(quick(root), Rounds(root / "rounds", 1, never))


def test_prompts_come_from_pairs(root: Path) -> None:
    pairs = read_pairs(root / "pairs.jsonl").pairs
    rows = prompts_of_pairs(pairs)
    assert [row.prompt for row in rows] == [pair.prompt for pair in pairs]
    assert rows[0].extra == {"target": pairs[0].chosen}


@pytest.mark.slow
def test_rounds_with_a_length_reward_shorten_unseen_answers(starter: Path, tmp_path: Path) -> None:
    import importlib.util

    path = Path(__file__).parents[1] / "benchmarks" / "on_policy_round.py"
    spec = importlib.util.spec_from_file_location("on_policy_round", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    figures = benchmark.measure(tmp_path / "rounds")
    before, *_, after = figures["mean_words_unseen"]
    assert after < 0.7 * before, json.dumps(figures)


def test_a_series_that_was_moved_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = workspace(tmp_path / "project")
    monkeypatch.chdir(root)
    (first,) = done(quick(root, lora__init_from=adapter(root)), replace(plan(root, 1), folder=Path("rounds")))
    assert json.loads((root / "rounds" / "round-01" / "round.json").read_text())["adapter"] == first.adapter
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "another" / "place"
    place.parent.mkdir()
    root.rename(place)
    recipe = quick(place, lora__init_from=place / "start-8")
    again, second = done(recipe, plan(place, 2))
    assert again.skipped
    assert again.adapter == str(place / "rounds" / "round-01" / "run" / "adapter")
    assert second.adapter == str(place / "rounds" / "round-02" / "run" / "adapter")
