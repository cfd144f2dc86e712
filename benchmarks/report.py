"""What every benchmark prints: a Markdown table with the machine and the day it was made on."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """The machine, the versions and the date, in one line."""
    versions = f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, SQLite {sqlite3.sqlite_version}"
    return f"{_cpu()}, {os.cpu_count()} cores, {platform.system()}; {versions}; {datetime.now(UTC):%Y-%m-%d}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; every column but the first is flush right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if place else "-" * width for place, width in enumerate(widths)]
    print(f"\n**{title}** ({machine()})\n")
    print("\n".join([line(cells[0]), line(rule), *map(line, cells[1:])]))
    sys.stdout.flush()


def resident_bytes() -> int:
    """What the process holds in memory now (Linux); 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
