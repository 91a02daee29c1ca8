"""The child process of `template.check_template`: renders one chat template and says how it went.

Run as a script: it reads a JSON object {"template", "memory_bytes"} from stdin and writes a verdict to
stdout. It sets limits on itself first and imports nothing of localdpo, so that a hostile template meets as
little as can be.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

MAX_OUTPUT = 1_000_000  # characters, for conversations of a few words

_USER = {"role": "user", "content": "What is two and two?"}
_ASSISTANT = {"role": "assistant", "content": "Four."}
_SYSTEM = {"role": "system", "content": "Be brief."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [_USER],
    [_USER, _ASSISTANT],
    [_SYSTEM, _USER],
    [_SYSTEM, _USER, _ASSISTANT, _USER, _ASSISTANT],
    [{"role": "user", "content": "word " * 2000}, _ASSISTANT] * 4,
)


def _limit(memory_bytes: int) -> None:
    """Bound this process's memory. macOS ignores the limit: there the parent watches instead."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _environment() -> Any:
    """Return a Jinja environment with what transformers offers to chat templates."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's text for training masks; here it only shows its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


def _verdict(source: str) -> dict[str, Any]:
    from jinja2.exceptions import SecurityError

    try:
        template = _environment().from_string(source)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and its compiler may fail in any way
        return {"verdict": "syntax", "message": str(error)[:300], "line": getattr(error, "lineno", None)}
    for messages in _CONVERSATIONS:
        for options in ({"add_generation_prompt": True, "tools": [_TOOL]}, {"enable_thinking": True}):
            try:
                text = template.render(messages=messages, bos_token="<s>", eos_token="</s>", **options)
            except MemoryError:
                raise
            except SecurityError as error:
                return {"verdict": "unsafe", "message": str(error)[:300]}
            except Exception:  # a refusal (of roles, of system messages) is for the encoder to report
                continue
            if len(text) > MAX_OUTPUT:
                return {"verdict": "output"}
    return {"verdict": "ok"}


def main() -> None:
    """Read the template, judge it, write the verdict."""
    request = json.load(sys.stdin)
    _limit(int(request["memory_bytes"]))
    try:
        verdict = _verdict(request["template"])
    except MemoryError:
        verdict = {"verdict": "memory"}
    json.dump(verdict, sys.stdout)


if __name__ == "__main__":
    main()
