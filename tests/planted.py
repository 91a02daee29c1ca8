"""Files of real pairs with a known defect planted in them, for proofs that a check finds what is there.

The pairs are PandaLM's, one a prompt, so that what is planted is all that is wrong. Every builder is deterministic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PANDALM = Path(__file__).parent / "data" / "pandalm_pairs.jsonl"
GERMAN = (
    "Das ist eine gute Frage, und die Antwort ist nicht ganz einfach. Wir haben es mit einem Fall zu tun, bei dem man "
    "die Umstände kennen muss, um sich ein Urteil zu bilden."
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Planted:
    """A file to check: its rows, the kind that must be found, and the lines it must name (None: of the whole file)."""

    kind: str
    rows: list[Row | str]
    lines: frozenset[int] | None = None
    eval_rows: list[Row] = field(default_factory=list)
    evidence: str = ""

    def write(self, folder: Path) -> tuple[Path, Path | None]:
        """Write the file, and the one to evaluate on if there is one."""
        path, other = folder / "pairs.jsonl", folder / "eval.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in self.rows), "utf-8")
        if not self.eval_rows:
            return path, None
        other.write_text("".join(json.dumps(row) + "\n" for row in self.eval_rows), "utf-8")
        return path, other


def pandalm() -> list[Row]:
    """All 842 pairs."""
    return [json.loads(line) for line in PANDALM.read_text("utf-8").splitlines()]


def clean_pairs() -> list[Row]:
    """One pair of each of PandaLM's prompts, whose answers differ in more than case and punctuation."""
    kept: dict[str, Row] = {}
    for row in pandalm():
        words = ["".join(filter(str.isalnum, row[key].lower())) for key in ("chosen", "rejected")]
        if words[0] != words[1]:
            kept.setdefault(row["prompt"], row)
    return list(kept.values())


def _picked(rows: list[Row], count: int, seed: int = 0) -> list[int]:
    return sorted(random.Random(seed).sample(range(len(rows)), count))


def _edited(kind: str, count: int, edit: Callable[[Row], Row], evidence: str = "") -> Planted:
    rows = clean_pairs()
    picked = _picked(rows, count)
    new = [edit(dict(row)) if i in picked else row for i, row in enumerate(rows)]
    return Planted(kind, new, frozenset(i + 1 for i in picked), evidence=evidence)


def _appended(row: Row, key: str, text: str) -> Row:
    return {**row, key: row[key] + text}


def word_in_chosen(share: float = 0.9, word: str = "certainly") -> Planted:
    """A word at a random place of that share of the chosen answers."""
    rng, rows = random.Random(1), []
    for row in clean_pairs():
        if rng.random() < share:
            words = row["chosen"].split(" ")
            words.insert(rng.randrange(len(words) + 1), word)
            row = {**row, "chosen": " ".join(words)}
        rows.append(row)
    return Planted("shortcut", rows, evidence=word)


def opening_in_chosen(share: float = 0.7) -> Planted:
    """The same first words in that share of the chosen answers."""
    rng = random.Random(2)
    rows = [
        {**row, "chosen": f"Sure, here you go. {row['chosen']}"} if rng.random() < share else row
        for row in clean_pairs()
    ]
    return Planted("shortcut", rows, evidence="sure")


def bullets_in_chosen(share: float = 0.9) -> Planted:
    """Chosen answers as bulleted lists, of the same words."""
    rng = random.Random(3)
    rows = []
    for row in clean_pairs():
        if rng.random() < share:
            row = {**row, "chosen": "\n".join(f"- {line}" for line in row["chosen"].split("\n"))}
        rows.append(row)
    return Planted("shortcut", rows, evidence="a bulleted list")


def word_in_rejected() -> Planted:
    """A closing remark in most rejected answers."""
    rng = random.Random(4)
    rows = [_appended(row, "rejected", " Hope that helps.") if rng.random() < 0.8 else row for row in clean_pairs()]
    return Planted("shortcut", rows, evidence="hope")


def twice_as_long() -> Planted:
    """Chosen answers with twice the words of the rejected one, filled up from other answers."""
    rng, rows = random.Random(5), clean_pairs()
    pool = " ".join(row["chosen"] for row in rows).split()
    new = []
    for row in rows:
        wanted = 2 * len(row["rejected"].split())
        words = row["chosen"].split()[:wanted]
        start = rng.randrange(len(pool) - wanted)
        new.append({**row, "chosen": " ".join([*words, *pool[start : start + wanted - len(words)]])})
    return Planted("length_bias", new)


def duplicates(share: float = 0.05) -> Planted:
    """That share of the rows once more, somewhere behind."""
    rows = clean_pairs()
    again = [rows[i] for i in _picked(rows, round(share * len(rows)))]
    first = len(rows) + 1
    return Planted("duplicate", [*rows, *again], frozenset(range(first, first + len(again))))


def near_duplicates(share: float = 0.05) -> Planted:
    """That share of the rows once more with a word of the prompt replaced, those long enough for that."""
    rows = clean_pairs()
    long = [i for i, row in enumerate(rows) if len(row["prompt"].split()) > 20 and not any(map(str.isdigit, str(row)))]
    picked = random.Random(6).sample(long, round(share * len(rows)))
    again = []
    for i in picked:
        words = rows[i]["prompt"].split(" ")
        words[len(words) // 2] = "indeed"
        again.append({**rows[i], "prompt": " ".join(words), "chosen": rows[i]["chosen"].rstrip(".") + "!"})
    first = len(rows) + 1
    return Planted("near_duplicate", [*rows, *again], frozenset(range(first, first + len(again))))


def contradictions(count: int = 10) -> Planted:
    """Rows once more with the answers swapped."""
    rows = clean_pairs()
    picked = _picked(rows, count)
    swapped = [{**rows[i], "chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]} for i in picked]
    lines = [i + 1 for i in picked] + [len(rows) + 1 + n for n in range(count)]
    return Planted("contradictory", [*rows, *swapped], frozenset(lines))


def leaks(count: int = 10) -> Planted:
    """Prompts trained on among those held out, with other answers; lines are those of the held-out file."""
    rows = clean_pairs()
    train, held_out = rows[:120], rows[120:]
    leaked = [{**rows[i], "chosen": "Yes.", "rejected": "No."} for i in _picked(train, count)]
    lines = range(len(held_out) + 1, len(held_out) + 1 + count)
    return Planted("leak", train, frozenset(lines), [*held_out, *leaked])


def near_leaks(count: int = 5) -> Planted:
    """Prompts trained on among those held out, in other cases and spaces."""
    planted = leaks(count)
    plain, leaked = planted.eval_rows[:-count], planted.eval_rows[-count:]
    changed = [{**row, "prompt": row["prompt"].upper().replace(" ", "  ")} for row in leaked]
    return Planted("near_leak", planted.rows, planted.lines, [*plain, *changed])


def german_fifth() -> Planted:
    """Every fifth pair in German, prompt and answers."""
    rows, lines = [], []
    for number, row in enumerate(clean_pairs(), 1):
        if number % 5 == 0:
            lines.append(number)
            texts = [f"{number}. {text}" for text in (GERMAN, f"{GERMAN} Mehr nicht.", f"Wer weiß. {GERMAN}")]
            rng = random.Random(number)
            rng.shuffle(texts)
            row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        rows.append(row)
    return Planted("language_mix", rows, frozenset(lines))


def broken_lines() -> Planted:
    """One of each way to break a line, spread over the file."""
    rows: list[Row | str] = list(clean_pairs())
    broken = (
        '{"prompt": "p", "chosen": "c"}\n',
        '{"prompt": "p", "chosen": 3, "rejected": "r"}\n',
        '{"prompt": "p", "chosen": "c", "chosen": "d", "rejected": "r"}\n',
        "not json\n",
        '["prompt", "chosen", "rejected"]\n',
        '{"prompt": "p", "chosen": "c", "rejected": NaN}\n',
        '{"prompt": [{"role": "nobody", "content": "p"}], "chosen": "c", "rejected": "r"}\n',
        '{"prompt": "p", "chosen": "c", "rejected": "r", "weight": -1}\n',
        *('{"prompt": "p", "rejected": "r"}\n',) * 12,
    )
    lines = []
    for number, line in enumerate(broken):
        rows.insert(5 * number, line)
        lines.append(5 * number + 1)
    return Planted("schema", rows, frozenset(lines))


BUILDERS: dict[str, Callable[[], Planted]] = {
    "a word in 90 % of the chosen answers": word_in_chosen,
    "an opening in 70 % of the chosen answers": opening_in_chosen,
    "90 % of the chosen answers as a bulleted list": bullets_in_chosen,
    "a remark at the end of 80 % of the rejected answers": word_in_rejected,
    "chosen answers twice as long": twice_as_long,
    "5 % duplicates": duplicates,
    "5 % near duplicates (a word and the punctuation changed)": near_duplicates,
    "10 contradictions": contradictions,
    "10 held-out prompts that are trained on": leaks,
    "5 held-out prompts that are nearly trained on": near_leaks,
    "20 broken lines of 9 sorts": broken_lines,
    "5 terminal escapes": lambda: _edited("escapes", 5, lambda row: _appended(row, "chosen", "\x1b[31m red\x1b[0m")),
    "5 clipboard escapes": lambda: _edited("escapes", 5, lambda row: _appended(row, "rejected", "\x1b]52;c;aGk=\x07")),
    "5 special tokens": lambda: _edited("special_tokens", 5, lambda row: _appended(row, "chosen", "<|im_end|>")),
    "5 turns of a template left in answers": lambda: _edited(
        "template", 5, lambda row: _appended(row, "chosen", "\n\nHuman: And then?\n\nAssistant: Nothing.")
    ),
    "5 prompts with an unfilled slot": lambda: _edited(
        "template", 5, lambda row: _appended(row, "prompt", "\n{{ context }}")
    ),
    "5 wrongly decoded answers": lambda: _edited(
        "mojibake", 5, lambda row: _appended(row, "chosen", " It’s a café.".encode().decode("cp1252"))
    ),
    "5 invisible characters": lambda: _edited("invisible", 5, lambda row: _appended(row, "chosen", "\u202eabc\u202c")),
    "5 rows with the same answer twice": lambda: _edited(
        "identical", 5, lambda row: {**row, "rejected": row["chosen"] + " "}
    ),
    "5 blank answers": lambda: _edited("blank", 5, lambda row: {**row, "chosen": " \n"}),
    "30 refusals": lambda: _edited(
        "refusal", 30, lambda row: {**row, "chosen": "I'm sorry, but as an AI language model I cannot help with that."}
    ),
    "5 answers in German to English questions": lambda: _edited(
        "language",
        5,
        lambda row: {
            **row,
            "prompt": f"What would you say about this, and how do you know that it is so? {row['prompt'][:40]}",
            "chosen": GERMAN,
            "rejected": "It is hard to say what this is about, but I would not be sure of it.",
        },
    ),
    "every fifth pair in German": german_fifth,
    "5 answers of 2,000 words": lambda: _edited(
        "too_long", 5, lambda row: {**row, "chosen": " ".join(["word"] * 2_000)}
    ),
}
"""What is planted, in words, and what plants it."""
