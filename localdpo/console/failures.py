"""What a command that failed says, and the exit code it ends with."""

from __future__ import annotations

import os
import signal
import sys
import traceback

from localdpo.console.terminal import say
from localdpo.errors import LocalDPOError
from localdpo.redact import redact
from localdpo.text import sanitise


def report(error: BaseException, debug: bool = False) -> int:
    """Say what went wrong on standard error; return the exit code.

    Faults of the user or the machine are sentences; a mistake of the program says how to see its traceback.
    """
    if isinstance(error, BrokenPipeError):
        # The reader has left. Python would complain at exit when it flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if debug:
        say(redact("".join(traceback.format_exception(error)).rstrip("\n")), file=sys.stderr)
    sys.stdout.flush()
    lines, code = _explain(error)
    say(*map(redact, lines), file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[list[str], int]:
    match error:
        case LocalDPOError():
            return [f"error: {sanitise(str(problem))}" for problem in error.problems], error.exit_code
        case KeyboardInterrupt():
            return ["interrupted"], 128 + signal.SIGINT
        case OSError(filename=str() as name):
            return [f"error: {sanitise(name)}: {error.strerror}"], 3
        case OSError():
            return [f"error: {sanitise(str(error))}"], 3
        case MemoryError():
            return ["error: not enough memory"], 3
    kind = type(error).__name__
    return [f"internal error: {kind}: {sanitise(str(error))}. --debug shows where; please report it."], 1
