"""UltraFeedback as published: an instruction with several rated completions; the best and the worst make the pair.

A completion's rating is the mean over its annotated aspects where all completions have some, else its
`fine-grained_score`, else its `overall_score`. distilabel's `generations` with `ratings` are read likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, finished, numbers

__all__ = ["ULTRAFEEDBACK"]

_SCORES = ("fine-grained_score", "overall_score", "score", "rating")
_PROMPTS = ("instruction", "input", "prompt")


def _matches(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row.get(key), str) for key in _PROMPTS) and (
        isinstance(row.get("completions"), list) or isinstance(row.get("generations"), list)
    )


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    key = next((key for key in _PROMPTS if isinstance(row.get(key), str)), None)
    if key is None:
        raise RowRefused("has no instruction")
    prompt = row.pop(key)
    if "completions" in row:
        texts, scores, models, by = _completions(row.pop("completions"))
    else:
        texts, scores, models, by = _generations(row)
    if len(texts) < 2:
        raise RowRefused(f"has {len(texts)} completions; two are needed for a preference")
    best, worst = max(range(len(texts)), key=scores.__getitem__), min(range(len(texts)), key=scores.__getitem__)
    if scores[best] == scores[worst]:
        raise RowRefused("all completions have the same rating")
    row.pop("chosen", None), row.pop("rejected", None)
    row |= {"score_chosen": scores[best], "score_rejected": scores[worst], "score_by": by}
    if models[best] and models[worst]:
        row |= {"model_chosen": models[best], "model_rejected": models[worst]}
    return finished(prompt, texts[best], texts[worst], row)


Rated = tuple[list[str], list[float], list[str | None], str]


def _completions(completions: Any) -> Rated:
    if not isinstance(completions, list) or not all(isinstance(item, Mapping) for item in completions):
        raise RowRefused('"completions" is not a list of objects')
    texts = [item.get("response", item.get("text")) for item in completions]
    if not all(isinstance(text, str) for text in texts):
        raise RowRefused("a completion has no text")
    models = [item.get("model") if isinstance(item.get("model"), str) else None for item in completions]
    aspects = [_mean_rating(item.get("annotations")) for item in completions]
    found = numbers(aspects)
    if found is not None:
        return texts, found, models, "annotations"
    for key in _SCORES:
        found = numbers(item.get(key) for item in completions)
        if found is not None:
            return texts, found, models, key
    raise RowRefused("not every completion has a rating")


def _mean_rating(annotations: Any) -> float | None:
    if not isinstance(annotations, Mapping) or not annotations:
        return None
    ratings = [_rating(value) for value in annotations.values()]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _rating(annotation: Any) -> float | None:
    value = annotation.get("Rating") if isinstance(annotation, Mapping) else None
    found = numbers([value])
    return found[0] if found else None


def _generations(row: dict[str, Any]) -> Rated:
    texts = row.pop("generations", None)
    ratings: Any = next((row.pop(key) for key in ("ratings", "rating") if key in row), None)
    models: Any = row.pop("generation_models", None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowRefused('"generations" is not a list of texts')
    found = numbers(ratings) if isinstance(ratings, Sequence) and len(ratings) == len(texts) else None
    if found is None:
        raise RowRefused("not every generation has a rating")
    named = isinstance(models, list) and len(models) == len(texts)
    return texts, found, [str(model) for model in models] if named else [None] * len(texts), "ratings"


ULTRAFEEDBACK = Family("ultrafeedback", "UltraFeedback rated completions", _matches, _convert)
