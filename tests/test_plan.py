"""The preflight: exact counts, honest warnings, and a verdict on memory before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from training import recipe_for, workspace, write_rows

from localdpo.errors import EnvironmentFault, InputError
from localdpo.model.device import describe_device
from localdpo.recipe import TrainRecipe
from localdpo.train.inputs import MIN_PAIRS_TO_SPLIT, originals, read_inputs
from localdpo.train.loop import plan
from localdpo.train.plan import length_histogram, require_memory, rows_per_step, total_steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        yield root


def test_counts_are_those_of_the_data(root):
    recipe = recipe_for(root, data__retain=root / "keep.jsonl", data__probes=root / "probes.jsonl")
    made = plan(recipe)
    assert (made.train_pairs, made.held_out_pairs, made.retain_prompts, made.probes) == (22, 2, 6, 4)
    assert (made.rows_per_step, made.steps_per_epoch, made.total_steps, made.epochs) == (4, 7, 14, 2.0)
    assert made.warmup_steps == 2
    # rank 8 on the seven linear layers of two blocks: 8 x (in + out)
    block = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)
    assert made.trainable_parameters == 2 * 8 * block
    assert made.device == "cpu"
    assert made.memory_verdict == "safe"
    assert made.seconds is not None
    assert 0 < made.seconds < 60
    assert json.loads(json.dumps(made.to_json()))["total_steps"] == 14


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], ()),
        ([3, 3, 1], ((1, 1), (2, 0), (3, 2))),
        ([40, 41, 121], ((40, 1), (60, 1), (80, 0), (100, 0), (120, 0), (140, 1))),
        ([1000, 9], ((100, 1), *(((n * 100), 0) for n in range(2, 10)), (1000, 1))),
    ],
)
def test_lengths_are_counted_in_round_bins(lengths, bins):
    assert length_histogram(lengths) == bins


def test_the_plan_counts_every_row_of_an_epoch_once(root):
    made = plan(recipe_for(root, data__retain=root / "keep.jsonl"))
    assert sum(count for _, count in made.lengths) == 22 + 6
    assert made.lengths[-1][0] >= made.longest_tokens > made.lengths[-1][0] - made.lengths[0][0]


def test_skipped_rows_are_named_with_their_reasons(root, tmp_path):
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(21)]
    rows[3]["rejected"] = "yes"
    rows[7]["prompt"] = "word " * 300
    made = plan(recipe_for(root, data__train=write_rows(tmp_path / "p.jsonl", rows)))
    assert [(row.line, row.source) for row in made.skipped] == [
        (4, str(tmp_path / "p.jsonl")),
        (8, str(tmp_path / "p.jsonl")),
    ]
    assert "same" in made.skipped[0].reason
    assert "data.max_length" in made.skipped[1].reason
    assert made.train_pairs + made.held_out_pairs == 19


def test_all_rows_skipped_is_an_input_error(root, tmp_path):
    rows = [{"prompt": "word " * 300, "chosen": "yes", "rejected": "no"}] * 2
    with pytest.raises(InputError, match="0 pairs are left"):
        plan(recipe_for(root, data__train=write_rows(tmp_path / "p.jsonl", rows)))


def test_duplicates_overlap_and_taught_probes_are_warned_about(root, tmp_path):
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
    train = write_rows(tmp_path / "p.jsonl", [*rows, rows[0]])
    held_out = write_rows(tmp_path / "e.jsonl", [rows[1], {**rows[2], "prompt": "new"}])
    probes = write_rows(tmp_path / "x.jsonl", [{"prompt": "q 4 "}, {"prompt": "other"}])
    made = plan(recipe_for(root, data__train=train, data__eval=held_out, data__probes=probes))
    text = "\n".join(str(problem) for problem in made.warnings)
    assert "an earlier pair is repeated 1 time (line 6)" in text
    assert "1 of 2 held-out pairs (line 1) have prompts that are trained on" in text
    assert "1 of 2 probes are taught (line 1)" in text


def test_a_taught_prompt_is_not_retained(root, tmp_path):
    train = write_rows(tmp_path / "p.jsonl", [{"prompt": "say hello 1", "chosen": "no", "rejected": "hi"}])
    inputs = read_inputs(recipe_for(root, data__train=train, data__retain=root / "keep.jsonl"))
    assert len(inputs.retain) == 5


@pytest.mark.parametrize(("pairs", "held_out"), [(MIN_PAIRS_TO_SPLIT - 1, 0), (MIN_PAIRS_TO_SPLIT, 2), (40, 4)])
def test_few_pairs_are_all_trained_on(root, tmp_path, pairs, held_out):
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(pairs)]
    inputs = read_inputs(recipe_for(root, data__train=write_rows(tmp_path / "p.jsonl", rows)))
    assert len(inputs.held_out) == held_out
    assert len(inputs.train) == pairs - held_out


def test_copies_are_read_in_place_of_originals_and_named_like_them(root, tmp_path):
    copy = write_rows(
        tmp_path / "copy.jsonl",
        [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in "ab"],
    )
    recipe = recipe_for(root, data__train=tmp_path / "gone.jsonl")
    inputs = read_inputs(recipe, {"data.train": copy})
    assert inputs.train[0].source == str(tmp_path / "gone.jsonl")
    assert inputs.skipped[0].source == str(tmp_path / "gone.jsonl")
    assert "data.train" not in originals(recipe.data)


def test_steps_of_an_epoch_and_of_a_run():
    assert rows_per_step(TrainRecipe(per_device_train_batch_size=3, gradient_accumulation_steps=4)) == 12
    assert total_steps(TrainRecipe(num_train_epochs=3.0), 7) == 21
    assert total_steps(TrainRecipe(num_train_epochs=0.5), 7) == 4
    assert total_steps(TrainRecipe(num_train_epochs=0.1), 3) == 1
    assert total_steps(TrainRecipe(num_train_epochs=1.1), 10) == 11
    assert total_steps(TrainRecipe(max_steps=5), 7) == 5


def test_a_run_that_cannot_fit_is_refused_with_advice(root):
    made = plan(recipe_for(root, train__max_steps=1))
    require_memory(made)
    huge = replace(made, memory=replace(made.memory, activations=10**15))
    with pytest.raises(EnvironmentFault, match=r"would need about .* GB.*Lower train\.per_device_train_batch_size"):
        require_memory(huge)


def test_weights_larger_than_the_memory_are_refused_before_they_are_loaded(root, monkeypatch):
    small = replace(describe_device(), memory_total=1000)
    monkeypatch.setattr("localdpo.train.plan.describe_device", lambda: small)
    monkeypatch.setattr("localdpo.train.session.load_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(EnvironmentFault, match=r"the weights of .* Choose a smaller"):
        plan(recipe_for(root))


def test_checkpointing_is_decided_by_memory(root, monkeypatch):
    recipe = recipe_for(root, train__max_steps=1)
    assert plan(recipe).gradient_checkpointing is False
    assert plan(recipe_for(root, train__gradient_checkpointing=True)).gradient_checkpointing is True
    small = replace(describe_device(), memory_available=260 << 20)
    monkeypatch.setattr("localdpo.train.plan.describe_device", lambda: small)
    assert plan(recipe).gradient_checkpointing is True
    assert plan(recipe_for(root, train__gradient_checkpointing=False)).gradient_checkpointing is False
