"""Runs every benchmark and writes what it measured into README.md, between the markers there; the words around them
stay.

`python benchmarks/all.py [--quick] [NAME ...]`: all of them, or some. `--quick` only looks whether they work: its
figures mean nothing, so they are printed and not written. A target that is missed is no failure here; what cannot run
is one.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from report import machine

HERE: Final = Path(__file__).parent
README: Final = HERE / "README.md"
BENCHMARKS: Final = (
    "flow",
    "speed",
    "delay",
    "fanout",
    "footprint",
    "instructions",
    "store",
    "ended",
    "media",
    "replicas",
)
SLOW: Final = ("instructions", "replicas")  # without a quick form, or slow in it: only if named in a quick run
TITLE: Final = re.compile(r"^(\*\*.*\*\*) \(.*\)$", re.MULTILINE)


def purpose(name: str) -> str:
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""


def tables(name: str, *, quick: bool) -> str | None:
    """What the benchmark printed; None if it could not run."""
    command = [sys.executable, str(HERE / f"{name}.py"), *(["--quick"] if quick else [])]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "Traceback" in ran.stderr or ran.returncode not in (0, 1):
        print(ran.stderr, file=sys.stderr)
        return None
    return ran.stdout.strip()


def written(page: str, name: str, block: str) -> str:
    """The page with this block between the markers of `name`; they are added when they are missing."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
    if begin not in page:
        page = f"{page.rstrip()}\n\n## {name}.py\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look whether they work; nothing is written")
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS))
    given = parser.parse_args()
    broken = []
    for name in given.names or [name for name in BENCHMARKS if not (given.quick and name in SLOW)]:
        begun = time.perf_counter()
        found = tables(name, quick=given.quick)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        if found is None:
            broken.append(name)
            continue
        if given.quick:
            print(found)
            continue
        plain = TITLE.sub(r"\1", found)  # the machine is said once
        block = f"{purpose(name)}\n\nMeasured on {machine()}.\n\n{plain}"
        page = README.read_text() if README.exists() else "# Benchmarks\n"
        README.write_text(written(page, name, block))
    if broken:
        print(f"could not run: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
