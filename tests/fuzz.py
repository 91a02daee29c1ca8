"""Hand a reader of readers.py to atheris: ``python tests/fuzz.py NAME FOLDER [libFuzzer options]``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["localdpo"]):
    from readers import READERS


def main() -> None:
    """Read until libFuzzer has enough."""
    name, folder, *options = sys.argv[1:]
    reader = READERS[name]
    atheris.Setup([sys.argv[0], *options], lambda data: reader.read(bytes(data), Path(folder)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
