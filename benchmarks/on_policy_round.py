"""Do on-policy rounds with a length reward move the length of answers to prompts that were never trained on?

Run: python benchmarks/on_policy_round.py [--rounds N] [--reference base|init] [--out FOLDER]

The starter model answers 20 prompts four times each; of its own answers a short one is preferred to a long one;
it is trained on these pairs, and again. Before and after, 12 other prompts are answered greedily. The figures in
docs/generate.md are what this prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from localdpo.data.candidates import Candidate, CandidateJournal, Request
from localdpo.data.pairs import PromptRow
from localdpo.data.rewards import parse_rewards
from localdpo.evaluate.generate.speakers import Models, Source, answer_all
from localdpo.evaluate.generate.work import ByRewards, GenerateSettings
from localdpo.evaluate.rounds import RoundDone, Rounds, run_rounds
from localdpo.model.sampling import SamplingOptions
from localdpo.recipe import Recipe
from localdpo.steps import result_of

MODEL = "smollm2-135m"
TOKENS = 80
BRIEFLY = " Answer in a sentence or two."  # without it the starter ends few answers within the limit
TRAINED = [
    "What is a good breakfast?", "Why is the sky blue?", "How do I keep bread fresh?", "What does a librarian do?",
    "How can I sleep better?", "What is a volcano?", "Why do leaves fall in autumn?", "What is a good gift?",
    "How do bees make honey?", "What should I pack for a hike?", "What is inflation?", "How do I remove a stain?",
    "Why do cats purr?", "What is a haiku?", "How do I start running?", "What does the heart do?",
    "Why is exercise healthy?", "What is a solar eclipse?", "How do I make tea?", "What is a verb?",
]  # fmt: skip
UNSEEN = [
    "What is a good dinner?", "Why is the sea salty?", "How do I keep flowers fresh?", "What does a nurse do?",
    "How can I wake up earlier?", "What is an earthquake?", "Why do birds sing?", "What is a good book for a child?",
    "How do spiders make webs?", "What should I take to the beach?", "What is a budget?", "How do I clean a window?",
]  # fmt: skip


def rows(texts: list[str]) -> list[PromptRow]:
    return [
        PromptRow(({"role": "user", "content": text + BRIEFLY},), line=number, source="benchmark")
        for number, text in enumerate(texts, 1)
    ]


def lengths(adapter: Path | None) -> list[int]:
    """Words of the greedy answers to the unseen prompts, at most TOKENS tokens each."""
    models = Models()
    speaker = models.speaker(Source(MODEL, adapter))
    requests = [Request(row.prompt) for row in rows(UNSEEN)]
    answers = result_of(
        answer_all(speaker, requests, SamplingOptions(max_tokens=TOKENS), 0, CandidateJournal.open(None))
    )
    models.close()
    return [len(answer.text.split()) for answer in answers if isinstance(answer, Candidate)]


def recipe(folder: Path, reference: str, steps: int, rate: float) -> Recipe:
    return Recipe.model_validate(
        {
            "model": MODEL,
            "output_dir": folder,
            "data": {"train": folder / "none.jsonl", "eval": None, "retain": None, "max_length": 128},
            "lora": {"r": 8, "alpha": 16.0, "num_layers": 8},
            "dpo": {"beta": 0.1, "rpo_alpha": 1.0, "reference": reference},
            "train": {
                "learning_rate": rate,
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
            },
        }
    )


def measure(folder: Path, rounds: int = 2, reference: str = "base", steps: int = 20, rate: float = 4e-4) -> dict:
    """Mean words on unseen prompts before and after each round, and the mean reward's words in the pairs."""
    began = time.monotonic()
    rewards = parse_rewards(["length:max=8"])
    sampling = SamplingOptions(max_tokens=TOKENS, temperature=0.9, top_p=0.95)
    settings = GenerateSettings((Source(MODEL),), ByRewards(rewards), samples=4, sampling=sampling, seed=0)
    figures = [lengths(None)]
    done = []
    for event in run_rounds(recipe(folder, reference, steps, rate), rows(TRAINED), Rounds(folder, rounds, settings)):
        if isinstance(event, RoundDone):
            done.append(event)
            figures.append(lengths(Path(event.adapter)))
            print(event.to_json(), round(statistics.mean(figures[-1]), 1), flush=True)
    return {
        "reference": reference,
        "steps_a_round": steps,
        "mean_words_unseen": [round(statistics.mean(words), 1) for words in figures],
        "median_words_unseen": [statistics.median(words) for words in figures],
        "shorter_than_before": sum(after < before for before, after in zip(figures[0], figures[-1], strict=True)),
        "unseen_prompts": len(UNSEEN),
        "pairs": [event.pairs for event in done],
        "words_chosen": [event.words_chosen for event in done],
        "words_rejected": [event.words_rejected for event in done],
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--reference", choices=("base", "init"), default="base")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = given.out or Path(temporary) / "rounds"
        print(json.dumps(measure(place, given.rounds, given.reference, given.steps, given.rate), indent=2))
