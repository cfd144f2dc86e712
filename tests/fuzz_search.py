"""The search for inputs that break a parser's claims, guided by coverage; it wants the extra `fuzz`.

`python tests/fuzz_search.py body -max_total_time=600`: a target of `fuzz.py`, then libFuzzer's own options. What it
finds belongs into that target's corpus.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path


def main() -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["xiling_async", "fuzz", "json", "email", "ipaddress"]):
        target = importlib.import_module("fuzz").TARGETS[sys.argv.pop(1)]
    first = Path(tempfile.mkdtemp(prefix="xiling-fuzz-"))  # it stays: libFuzzer ends the process, and adds to it
    for number, data in enumerate(target.corpus):
        target.check(data)
        (first / str(number)).write_bytes(data)
    atheris.Setup([*sys.argv, str(first)], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
