"""Argilla records, nested as `to_json` writes them or flat as a dataset on the Hub has them.

One question decides: a ranking of fields, or a label or rating that names the better field. Several people's
answers are averaged by rank; only submitted ones count, and the suggestion stands in where nobody answered. Of
the fields that are ranked the first makes the chosen answer, the last the rejected one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.data.importers.family import Family, RowRefused, answer_turns, finished

__all__ = ["ARGILLA"]

_SUFFIX = ".responses"
_PROMPTS = ("prompt", "instruction", "question", "input", "query", "chat", "conversation", "messages")


def _matches(row: Mapping[str, Any]) -> bool:
    nested = isinstance(row.get("fields"), Mapping) and ("responses" in row or "suggestions" in row)
    return nested or any(key.endswith((_SUFFIX, ".suggestion")) for key in row)


def _convert(row: dict[str, Any]) -> dict[str, Any]:
    fields, questions, rest = _nested(row) if isinstance(row.get("fields"), Mapping) else _flat(row)
    reasons = []
    for name, answers in questions.items():
        ranks = _mean_ranks(answers, fields)
        if len(ranks) < 2:
            continue
        order = sorted(ranks, key=ranks.__getitem__)
        if ranks[order[0]] == ranks[order[-1]]:
            reasons.append(f'the answers to "{name[:40]}" are a tie')
            continue
        chosen, rejected = fields[order[0]], fields[order[-1]]
        prompt = _prompt(fields, set(ranks))
        rest |= {"question": name, "chosen_field": order[0], "rejected_field": order[-1]}
        rest |= {key: value for key, value in fields.items() if key not in (*ranks, _prompt_key(fields, set(ranks)))}
        return finished(prompt, answer_turns(chosen), answer_turns(rejected), rest)
    raise RowRefused(reasons[0] if reasons else "no submitted answer or suggestion prefers one field to another")


Parts = tuple[dict[str, Any], dict[str, list[Any]], dict[str, Any]]


def _nested(row: dict[str, Any]) -> Parts:
    fields = dict(row.pop("fields"))
    questions: dict[str, list[Any]] = {}
    for name, answers in _by_question(row.pop("responses", None)).items():
        given = [a.get("value") for a in answers if isinstance(a, Mapping) and a.get("status") in (None, "submitted")]
        questions[name] = [value for value in given if value is not None]
    suggestions = row.pop("suggestions", None)
    named = suggestions.items() if isinstance(suggestions, Mapping) else _listed(suggestions)
    for name, suggestion in named:
        value = suggestion.get("value") if isinstance(suggestion, Mapping) else suggestion
        if not questions.get(name) and value is not None:
            questions[name] = [value]
    metadata = row.pop("metadata", None)
    rest = {key: value for key, value in row.items() if key in ("id", "status", "external_id") and value is not None}
    return fields, questions, rest | ({"metadata": metadata} if metadata else {})


def _by_question(responses: Any) -> dict[str, list[Any]]:
    if isinstance(responses, Mapping):
        return {str(name): value for name, value in responses.items() if isinstance(value, list)}
    found: dict[str, list[Any]] = {}
    # Argilla 1: a list of people's responses, each with its status and a value for every question.
    for response in responses if isinstance(responses, list) else []:
        values = response.get("values") if isinstance(response, Mapping) else None
        for name, value in (values or {}).items() if isinstance(values, Mapping) else ():
            inner = value.get("value") if isinstance(value, Mapping) else value
            found.setdefault(str(name), []).append({"value": inner, "status": response.get("status")})
    return found


def _listed(suggestions: Any) -> list[tuple[str, Any]]:
    entries = suggestions if isinstance(suggestions, list) else []
    return [(str(s["question_name"]), s) for s in entries if isinstance(s, Mapping) and "question_name" in s]


def _flat(row: dict[str, Any]) -> Parts:
    names = {key.removesuffix(_SUFFIX) for key in row if key.endswith(_SUFFIX)}
    names |= {key.removesuffix(".suggestion") for key in row if key.endswith(".suggestion")}
    questions = {}
    for name in sorted(names):
        values, status = _list(row.get(f"{name}{_SUFFIX}")), _list(row.get(f"{name}{_SUFFIX}.status"))
        submitted = [v for n, v in enumerate(values) if n >= len(status) or status[n] in (None, "submitted")]
        suggestion = row.get(f"{name}.suggestion")
        questions[name] = submitted or ([suggestion] if suggestion is not None else [])
    taken = tuple(f"{name}.{part}" for name in names for part in ("responses", "suggestion"))
    fields = {key: value for key, value in row.items() if not key.startswith(taken)}
    rest = {key: fields.pop(key) for key in ("id", "_server_id", "status", "metadata") if key in fields}
    return fields, questions, {key: value for key, value in rest.items() if value is not None}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mean_ranks(answers: list[Any], fields: Mapping[str, Any]) -> dict[str, float]:
    """The mean rank of each field over all people's answers; only fields that every answer ranks."""
    ranked = [found for found in (_ranks(answer, fields) for answer in answers) if found]
    if not ranked:
        return {}
    shared = set.intersection(*(set(found) for found in ranked))
    return {name: sum(found[name] for found in ranked) / len(ranked) for name in sorted(shared)}


def _ranks(answer: Any, fields: Mapping[str, Any]) -> dict[str, float]:
    """Field -> rank of one answer: a list best first, a list of values with ranks, or the one better field."""
    if isinstance(answer, list) and all(isinstance(item, str) for item in answer):
        named = [_field(item, fields) for item in answer]
        return {} if None in named else {str(name): float(rank) for rank, name in enumerate(named)}
    if isinstance(answer, list) and all(isinstance(item, Mapping) for item in answer):
        found = {_field(item.get("value"), fields): item.get("rank") for item in answer}
        numbers = {name: float(rank) for name, rank in found.items() if name and isinstance(rank, int)}
        return numbers if len(numbers) == len(answer) else {}
    better = _field(answer, fields)
    if better is None:
        return {}
    stem = better.rstrip("0123456789-_ ")
    others = [name for name in fields if name != better and name.rstrip("0123456789-_ ") == stem]
    return {better: 0.0, others[0]: 1.0} if len(others) == 1 and stem else {}


def _field(name: Any, fields: Mapping[str, Any]) -> str | None:
    """The field that an answer names, whatever the case and the marks between letters and digits."""
    if not isinstance(name, str):
        return None
    if name in fields:
        return name
    plain = {_bare(key): key for key in fields}
    return plain.get(_bare(name))


def _bare(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def _prompt_key(fields: Mapping[str, Any], answers: set[str]) -> str | None:
    known = [key for name in _PROMPTS for key in fields if key.lower() == name]
    others = [key for key in fields if key not in answers and isinstance(fields[key], str | list)]
    return known[0] if known else others[0] if len(others) == 1 else None


def _prompt(fields: Mapping[str, Any], answers: set[str]) -> Any:
    key = _prompt_key(fields, answers)
    if key is None:
        raise RowRefused("no field is the prompt")
    return answer_turns(fields[key])


ARGILLA = Family("argilla", "Argilla records", _matches, _convert)
