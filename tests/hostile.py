"""Texts that try to steer a terminal, a markup language or a reader, and a model that says them.

`HOSTILE` holds all of `CORPUS`. What reaches a screen of it may be seen, and may do nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer

CORPUS = {
    "colours": "\x1b[31;5;7m",
    "clear the screen": "\x1b[2J\x1b[1;1H\x1b[3J",
    "title": "\x1b]0;owned\x07",
    "title, ended by ST": "\x1b]2;owned\x1b\\",
    "link": "\x1b]8;;http://evil.example/\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "working folder": "\x1b]7;file://evil/\x07",
    "notification": "\x1b]777;notify;owned;owned\x07",
    "device control": '\x1bP$q"p\x1b\\',
    "application command": "\x1b_Gi=1;AAAA\x1b\\",
    "privacy message": "\x1b^owned\x1b\\",
    "start of string": "\x1bXowned\x1b\\",
    "modes": "\x1b[?1049h\x1b[?25l\x1b[?1000h\x1b[?2004l",
    "reset": "\x1bc",
    "character set": "\x1b(0\x0e",
    "questions": "\x1b[c\x1b[6n\x1b[21t\x1b[?2026$p\x05",
    "scroll region": "\x1b[2;3r\x1b[?6h",
    "C1 CSI": "\x9b?1049h\x9b31m",
    "C1 OSC": "\x9d0;owned\x9c",
    "C1 DCS": "\x90owned\x9c\x9fowned\x9c\x8d\x84\x85",
    "C0": "\x00\x01\x07\x08\x0b\x0c\x0f\x11\x13\x1a\x7f",
    "carriage return": "rm -rf\rls    ",
    "bidi": "user\u202etxt.exe\u202c\u2066a\u2069\u200f\u061c",
    "invisible": "a\u200bb\u2060c\ufeffd\U000e0041\U000e0042",
    "separators": "x\u2028y\u2029z",
    "markup": "[bold red]x[/] [/nope] [link=http://evil.example]y[/link] [@click=app.bell]z[/] [$error]",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "markdown": "![x](http://evil.example/a.png) [y](http://evil.example) `\x1b[31m`",
    "halves": "\x1b",
}
HOSTILE = "".join(CORPUS.values()) + "end"


def pieces(text: str = HOSTILE, length: int = 3) -> list[str]:
    """A text in pieces so short that every sequence is split; each lone piece is steering on its own or not."""
    return [text[start : start + length] for start in range(0, len(text), length)]


def parrot_model(folder: Path, text: str = HOSTILE, length: int = 7) -> Path:
    """A model folder whose greedy answer to anything is `text`, a few characters a token.

    Its layers add nothing, and its head maps each token to the next one of the text: a real model, tokenizer and
    streaming, with words that no training gives.
    """
    said = list(dict.fromkeys(pieces(text, length)))
    if len(said) < len(pieces(text, length)):  # a piece that comes twice would have two successors
        return parrot_model(folder, text, length + 1)
    first = 384
    tiny_model(folder, vocab_size=first + len(said), tie_word_embeddings=False, num_hidden_layers=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    filler = [AddedToken(f"<unused{n}>", normalized=False) for n in range(first - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([*filler, *(AddedToken(piece, normalized=False) for piece in said)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(piece) for piece in said]
    end, newline = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("Ċ")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights |= {
        name: mx.zeros_like(weights[name]) for name in weights if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    weights["model.norm.weight"] = mx.ones_like(weights["model.norm.weight"])
    embedding = weights["model.embed_tokens.weight"]
    head = mx.zeros_like(weights["lm_head.weight"])
    for token, following in zip([newline, *ids], [*ids, end], strict=True):
        head[following] += embedding[token] / mx.linalg.norm(embedding[token])
    weights["lm_head.weight"] = head
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def set_config(folder: Path, name: str, **changes: object) -> None:
    """Change keys of a JSON file of a model folder."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
