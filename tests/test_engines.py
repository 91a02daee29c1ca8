"""Both engines train the same: the plain one alone, by the environment's word, and the packed one."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from training import adapter_arrays, collect, losses, recipe_for, workspace


@pytest.mark.parametrize("settings", [{}, {"lora__num_layers": 1, "data__retain": "keep.jsonl"}], ids=["all", "top"])
def test_the_plain_engine_trains_to_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    root = workspace(tmp_path)
    if "data__retain" in settings:
        settings = settings | {"data__retain": root / "keep.jsonl"}
    options = {"train__max_steps": 6, "data__eval": 0.25, "train__learning_rate": 2e-4}
    options |= {"train__adam_epsilon": 1e-5, **settings}  # smaller gradients are noise that AdamW would make steps of
    found = {}
    for engine in ("fast", "core"):
        monkeypatch.setenv("LOCALDPO_ENGINE", engine)
        monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / f"cache-{engine}"))
        recipe = recipe_for(root, output_dir=root / engine, **options)
        found[engine] = losses(collect(recipe)), adapter_arrays(root / engine / "adapter")
    (ours, fast), (theirs, core) = found["fast"], found["core"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert fast.keys() == core.keys()
    assert max(float(mx.max(mx.abs(value))) for name, value in core.items() if "lora_b" in name) > 1e-4
    for name, value in core.items():
        np.testing.assert_allclose(np.array(fast[name]), np.array(value), rtol=0, atol=1e-5, err_msg=name)
