"""SQL statements, each under its name, out of a `.sql` file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_NAMED: Final = re.compile(r"^-- (\w+) --\n(.*?)(?=^-- \w+ --$|\Z)", re.DOTALL | re.MULTILINE)


def statements(file: Path) -> dict[str, str]:
    """The statements of the file by name, with the `{words}` in them that their user fills in."""
    return {name: statement.strip() for name, statement in _NAMED.findall(file.read_text(encoding="utf-8"))}
