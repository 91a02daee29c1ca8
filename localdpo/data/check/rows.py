"""What can be told of one pair by reading it: the codes of `findings.KINDS` that are about a row alone.

A pure function of the pair, a few tens of microseconds for an ordinary one, so that an editor may call it on every
change. Patterns are general; what a given tokenizer holds for a control token, `data.encode` warns about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from localdpo.data.language import asks_for_language, guess_language
from localdpo.data.pairs import PreferencePair, has_carriage_return
from localdpo.data.rowform import looks_serialised

__all__ = ["evidence", "is_refusal", "repeats_prompt", "row_codes", "same_words", "strip_escapes", "without_prompt"]

# Tabs, newlines and \r stay: they are text. A terminal sequence goes as a whole, or "[31m" would be left.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor movement
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS and their like
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]"  # U+0085 is a line end
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Zero-width joiners hold emoji and Indic letters together; right-to-left text needs its marks.
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
_MOJIBAKE = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u0080-\u00bf\u0152-\u0153\u2018-\u2122\u02dc]")
_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|<(?:bos|eos|pad|unk|mask)>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|\[(?:BOS|EOS|PAD|UNK|CLS|SEP|MASK)\]"
)
_ROLES = r"(?:Human|Assistant|User|AI|Bot|System|USER|ASSISTANT|HUMAN|SYSTEM)"
_ANSWER_LEFTOVER = re.compile(
    rf"^[ \t]*#{{2,3}} ?(?:Instruction|Response|Input|Assistant|Human|User)s?:|^{_ROLES}:\s|\n{_ROLES}: ", re.MULTILINE
)
_PROMPT_LEFTOVER = re.compile(
    rf"^[ \t]*#{{2,3}} ?(?:Response|Assistant):|\n\n(?:Human|USER|User): [\s\S]*\n\n?{_ROLES}:|\n\n{_ROLES}:\s*\Z",
    re.MULTILINE,
)
_SLOT = re.compile(
    r"\{\{ ?[A-Za-z_][\w.]* ?\}\}|\{%-? ?(?:if|for|endif|endfor|set)\b"
    r"|\{(?:instruction|prompt|question|answer|response|context|input|output|name|query)\}|\[INSERT[^\]\n]{0,60}\]"
)
_CANNOT = r"(?:can(?:'|’|no)t|can not|will not|won(?:'|’)t|(?:am|(?:'|’)m) (?:not able|unable) to)"
_REFUSAL = re.compile(
    rf"\bsorry,? (?:but )?(?:as an? |i ?(?:{_CANNOT}|am|(?:'|’)m|do)|for any confusion)"
    rf"|\b(?:apologies|unfortunately),? (?:but )?i ?{_CANNOT}"
    rf"|\bi ?{_CANNOT} (?:help|assist|provide|answer|comply|fulfil|discuss|engage|generate|create|write|do that|share"
    r"|support|process|access)"
    r"|\bas an? (?:\w+[ -]){0,3}(?:ai|assistant|language model)\b[^.!?\n]{0,60}"
    r"\b(?:can(?:'|’|no)t|unable|not able|don(?:'|’)t have|do not have)",
    re.IGNORECASE,
)
# What models say when they refuse in other languages: an apology or "as an AI", and close behind it that they cannot.
_REFUSAL_ELSEWHERE = re.compile(
    r"(?:抱歉|对不起|對不起|很遗憾|很遺憾|作为(?:一个|一名)?(?:ai|人工智能|语言模型)|作為(?:一個|一名)?(?:ai|人工智慧|語言模型))"
    r"[^。！？\n]{0,40}(?:无法|無法|不能|没有能力|沒有能力)"
    r"|(?:申し訳|すみません|aiとして|言語モデルとして)[^。\n]{0,40}(?:できません|できかねます|お答えできない)"
    r"|(?:죄송|ai로서|언어 모델로서)[^.\n]{0,40}(?:수 없|불가능)"
    r"|\b(?:lo siento|lo lamento|como (?:una? )?(?:ia|modelo de lenguaje|inteligencia artificial))\b"
    r"[^.!?\n]{0,60}\bno puedo\b"
    r"|\b(?:désolée?|je regrette|en tant qu(?:e|'|’) ?(?:ia|intelligence artificielle|modèle de langage|assistant))\b"
    r"[^.!?\n]{0,60}\bje ne (?:peux|suis|dispose)\b"
    r"|\b(?:es tut mir leid|tut mir leid|leider|entschuldigung|als (?:ki|künstliche intelligenz|sprachmodell))\b"
    r"[^.!?\n]{0,60}\b(?:kann ich (?:\w+ ){0,4}nicht|ich kann (?:\w+ ){0,4}nicht|darf ich (?:\w+ ){0,4}nicht)\b"
    r"|\b(?:desculpe|sinto muito|lamento|como (?:uma? )?(?:ia|modelo de linguagem))\b[^.!?\n]{0,60}\bnão posso\b"
    r"|\b(?:mi dispiace|come (?:ia|modello linguistico))\b[^.!?\n]{0,60}\bnon posso\b",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 200
_REPEATED = 8  # characters: a shorter prompt, such as a greeting, is repeated without harm
_NOT_WORD = re.compile(r"[\W_]+")
_LANGUAGE_SAMPLE = 400


def strip_escapes(text: str) -> str:
    """Return `text` without terminal sequences and control characters; tabs and line ends stay."""
    return _ESCAPES.sub("", text) if _CONTROL.search(text) else text


def repeats_prompt(pair: PreferencePair) -> bool:
    """Return whether both answers begin with the whole prompt, as in data sets that store finished texts."""
    asked = _asked(pair)
    return len(asked) >= _REPEATED and all(
        answer.startswith(asked) and answer[len(asked) :].strip() for answer in (pair.chosen, pair.rejected)
    )


def without_prompt(pair: PreferencePair) -> tuple[str, str]:
    """Return both answers of a pair that repeats its prompt without it."""
    size = len(_asked(pair))
    return pair.chosen[size:].lstrip(), pair.rejected[size:].lstrip()


def _asked(pair: PreferencePair) -> str:
    return next((turn["content"].strip() for turn in reversed(pair.prompt) if turn["role"] == "user"), "")


def is_refusal(answer: str) -> bool:
    """Return whether an answer starts by refusing or by saying what an AI cannot do.

    Known in English, Chinese, Japanese, Korean, Spanish, French, German, Portuguese and Italian.
    """
    start = answer[:_REFUSAL_WITHIN]
    return _REFUSAL.search(start) is not None or _REFUSAL_ELSEWHERE.search(start) is not None


def same_words(first: str, second: str) -> bool:
    """Return whether two texts differ in case, punctuation and white space only."""
    if abs(len(first) - len(second)) > 20 + min(len(first), len(second)) // 2:
        return False
    begins = [_NOT_WORD.sub("", text[:80].casefold())[:16] for text in (first, second)]
    if not begins[0].startswith(begins[1]) and not begins[1].startswith(begins[0]):
        return False
    return _NOT_WORD.sub("", first.casefold()) == _NOT_WORD.sub("", second.casefold()) != ""


def row_codes(pair: PreferencePair) -> tuple[str, ...]:
    """Return the codes of what is wrong or remarkable with a pair by itself, in a fixed order."""
    return tuple(_codes(pair))


def _codes(pair: PreferencePair) -> Iterator[str]:
    prompt = "\n".join(turn["content"] for turn in pair.prompt)
    answers = (pair.chosen, pair.rejected)
    texts = (prompt, *answers)
    if same_words(*answers):
        yield "same_words"
    if any(map(_CONTROL.search, texts)):
        yield "escapes"
    yield from _left_by_tools(pair)
    if not all(map(str.isascii, texts)):
        yield from _beyond_ascii(texts)
    if any(("<" in text or "[" in text) and _SPECIAL.search(text) for text in texts):
        yield "special_tokens"
    if _has_leftovers(prompt, answers):
        yield "template"
    if is_refusal(pair.chosen):
        yield "refusal"
    if _in_another_language(prompt, *answers):
        yield "language"


def _left_by_tools(pair: PreferencePair) -> Iterator[str]:
    if has_carriage_return(pair):
        yield "carriage_returns"
    if any(map(looks_serialised, (pair.chosen, pair.rejected))):
        yield "serialised"
    if repeats_prompt(pair):
        yield "prompt_repeated"


def _beyond_ascii(texts: tuple[str, ...]) -> Iterator[str]:
    if any(map(_INVISIBLE.search, texts)):
        yield "invisible"
    if any(map(_MOJIBAKE.search, texts)):
        yield "mojibake"


def _has_leftovers(prompt: str, answers: tuple[str, ...]) -> bool:
    if any("{" in text or "[INSERT" in text for text in (prompt, *answers)) and any(
        map(_SLOT.search, (prompt, *answers))
    ):
        return True
    if any(":" in answer and _leftover(answer, prompt) for answer in answers):
        return True
    return ":" in prompt and _PROMPT_LEFTOVER.search(prompt) is not None


def _leftover(answer: str, prompt: str) -> re.Match[str] | None:
    """Return a role's name before a colon, unless the prompt has it too: the answer may go on with its dialogue."""
    match = _ANSWER_LEFTOVER.search(answer)
    return match if match is not None and match.group().strip() not in prompt else None


def _in_another_language(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether the chosen answer leaves the prompt's language, unasked, and the rejected one does not."""
    asked, wanted = guess_language(prompt[:_LANGUAGE_SAMPLE]), guess_language(chosen[:_LANGUAGE_SAMPLE])
    if asked is None or wanted is None or asked == wanted:
        return False
    return guess_language(rejected[:_LANGUAGE_SAMPLE]) == asked and not asks_for_language(prompt)


_EVIDENCE = {
    "escapes": (_ESCAPES,),
    "invisible": (_INVISIBLE,),
    "mojibake": (_MOJIBAKE,),
    "special_tokens": (_SPECIAL,),
    "template": (_SLOT, _ANSWER_LEFTOVER, _PROMPT_LEFTOVER),
}
_QUOTED = 40


def evidence(code: str, pair: PreferencePair) -> str:
    """Return what a code saw, quoted with the field it is in; empty for codes that are about a whole text."""
    fields = {
        "prompt": "\n".join(turn["content"] for turn in pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }
    for pattern in _EVIDENCE.get(code, ()):
        for name, text in fields.items():
            if (name == "prompt" and pattern is _ANSWER_LEFTOVER) or (name != "prompt" and pattern is _PROMPT_LEFTOVER):
                continue
            match = _leftover(text, fields["prompt"]) if pattern is _ANSWER_LEFTOVER else pattern.search(text)
            if match:
                return f"{match.group().strip()[:_QUOTED] or match.group()[:_QUOTED]!r} in {name}"
    return ""
