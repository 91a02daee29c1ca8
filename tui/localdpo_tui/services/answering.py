"""Who answers: a base model, with the adapter of a run or without, asked through the model host.

It translates between the host's messages and what chats and candidates are made of. It knows no screens.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localdpo.catalogue import find_entry
from localdpo.data.fields import Message
from localdpo.data.provenance import AnswerOrigin
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.serve.protocol import Delta, Ended, Loaded
from localdpo.train.run import RunFolder, find_runs
from localdpo_tui.services.candidates import Finished, Piece
from localdpo_tui.services.kept import read_kept

if TYPE_CHECKING:
    from localdpo_tui.services.model_host import ModelHost

__all__ = ["DEFAULT_MODEL", "Answering", "Target", "TunedRun", "find_target", "tuned_runs"]

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Target:
    """A model as a recipe names it, how it is loaded, and the folder of an adapter (None: the base alone)."""

    model: str
    adapter: Path | None = None
    quantize: int | None = None
    memory: Literal["auto", "fast", "lean"] = "auto"

    @property
    def base(self) -> tuple[str, int | None, str]:
        """What is loaded once, whatever the adapter."""
        return self.model, self.quantize, self.memory

    def is_cached(self) -> bool:
        """Whether the model is on this machine. Looks at the disk; a name that means nothing counts as there.

        Loading it then says what is wrong.
        """
        from localdpo.model.resolve import cached_path

        try:
            return cached_path(self.model) is not None
        except InputError:
            return True

    def fetch_note(self) -> str:
        """What fetching it would mean, as far as it is known."""
        entry = find_entry(self.model)
        size = f"It is {entry.disk_bytes / 1e6:,.0f} MB" if entry is not None else "Its size is not known"
        return f"{size}; it is fetched once and kept on this machine."

    def origin(self, sampling: Mapping[str, Any]) -> AnswerOrigin:
        """Where an answer comes from that is made now with these options."""
        seed = sampling.get("seed")
        return AnswerOrigin(
            "model",
            self.model,
            # As the workspace names it: a pair may travel, this machine's folders mean nothing elsewhere.
            adapter=Path(*self.adapter.parts[-3:]).as_posix() if self.adapter is not None else "",
            sampling={key: value for key, value in sampling.items() if key != "seed" and value is not None},
            seed=seed if isinstance(seed, int) else None,
        )


@dataclass(frozen=True, slots=True)
class TunedRun:
    """A run with an adapter: its folder's name, and its model."""

    name: str
    model: str


def tuned_runs(folder: str | Path) -> list[TunedRun]:
    """The runs of a workspace that have an adapter, the newest last, after it the one kept. Looks at the disk."""
    found = []
    current = read_kept(Path(folder) / "runs").current
    for run in find_runs(Path(folder) / "runs"):
        try:
            made = (run.adapter / "adapters.safetensors").stat().st_mtime
        except OSError:
            continue
        rank = run.path.name == current, made
        found.append((rank, TunedRun(run.path.name, str(_recipe(run).get("model", "")))))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _recipe(run: RunFolder) -> dict[str, Any]:
    recipe = run.info().get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def find_target(run: str | Path | None, model: str = "") -> Target:
    """What answers for the run in a folder, or (no run) for the base `model`. Looks at the disk.

    Raises InputError when the run has no adapter yet.
    """
    if run is None:
        return Target(model or DEFAULT_MODEL)
    folder = RunFolder(run)
    if not (folder.adapter / "adapter_config.json").is_file():
        status = folder.status()
        state = f"it is {status.state} at step {status.step}" if status is not None else "it has not begun"
        fix = "Let it end, or go on with it in Train (F3)"
        raise InputError(Problem(str(run), f"this run has no adapter yet: {state}", fix))
    recipe = _recipe(folder)
    quantize, training = recipe.get("quantize"), recipe.get("train")
    memory = training.get("memory") if isinstance(training, dict) else None
    return Target(
        str(recipe.get("model") or model or DEFAULT_MODEL),
        folder.adapter,
        quantize if isinstance(quantize, int) else None,
        memory if memory in ("auto", "fast", "lean") else "auto",
    )


class Answering:
    """An `Answerer` (see `candidates`): `target`'s answers, made by the host."""

    def __init__(self, host: ModelHost, target: Target) -> None:
        self._host = host
        self._target = target

    async def load(self, on_progress: Callable[[str], None] | None = None) -> Loaded:
        """Have the base loaded; fetches it when it is not on this machine. At once when it is loaded already.

        Raises LocalDPOError.
        """
        model, quantize, memory = self._target.model, self._target.quantize, self._target.memory
        return await self._host.load(model, quantize=quantize, memory=memory, on_progress=on_progress)

    async def answer(
        self, prompt: Sequence[Message], sampling: Mapping[str, Any]
    ) -> AsyncGenerator[Piece | Finished, None]:
        """Yield pieces of the answer, then where it comes from. Leaving early stops it. Raises LocalDPOError."""
        loaded = await self.load()  # another place may have loaded another base since
        options = {key: value for key, value in sampling.items() if value is not None}
        parts = self._host.generate(prompt, adapter=self._target.adapter, options=options)
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, Delta):
                    yield Piece(part.text, part.tokens_per_second)
                elif isinstance(part, Ended):
                    if part.reason == "cancelled":
                        problem = Problem("", "the answer was ended because another model was loaded", "Ask again")
                        raise EnvironmentFault(problem)
                    origin = self._target.origin(sampling)
                    yield Finished(replace(origin, fingerprint=loaded.fingerprint, finish=part.reason))
