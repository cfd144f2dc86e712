"""What a user's editor says: pyright (basic and strict) and mypy --strict, of the README, of examples, of mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyright", reason="pyright is in the extra [dev]")
pytest.importorskip("mypy", reason="mypy is in the extra [dev]")

HERE = Path(__file__).parent
ROOT = HERE.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
EXAMPLES = HERE / "typing_examples.py"
REFUSED = HERE / "typing" / "refused.py"

Errors = set[tuple[str, int, str]]  # the file, the line, what is wrong


def _pyright(folder: Path, mode: str) -> Errors:
    """Every error in the Python files of this folder."""
    settings: dict[str, Any] = {
        "include": ["."],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": mode,
        "pythonVersion": "3.11",
    }
    # What an unused expression or a missing stub of somebody else's package is worth is a matter of taste.
    settings |= {"reportUnusedExpression": False, "reportMissingTypeStubs": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    told: list[dict[str, Any]] = json.loads(ended.stdout)["generalDiagnostics"]
    return {
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1, error["message"])
        for error in told
        if error["severity"] == "error"
    }


def _mypy(folder: Path) -> Errors:
    """Every error of `mypy --strict` in the Python files of this folder."""
    words = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", "--no-pretty"]
    words += ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
    files = sorted(map(str, folder.glob("*.py")))
    ended = subprocess.run([*words, *files], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    found = re.findall(r"^(.*?):(\d+): error: (.*)$", ended.stdout, re.MULTILINE)
    return {(Path(file).name, int(line), message) for file, line, message in found}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blocks of the README, each a function of its own file (they await at the top), and the examples."""
    folder = tmp_path_factory.mktemp("good")
    for number, block in enumerate(BLOCKS, start=1):
        text = "async def block() -> None:\n" + textwrap.indent(block, "    ")
        (folder / f"readme_{number}.py").write_text(text)
    (folder / EXAMPLES.name).write_text(EXAMPLES.read_text("utf-8"))
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / REFUSED.name).write_text(REFUSED.read_text("utf-8"))
    return folder


def _marked() -> set[int]:
    lines = REFUSED.read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, start=1) if line.endswith("# refused")}


@pytest.mark.parametrize("mode", ["basic", "strict"])
def test_pyright_accepts_the_readme_and_the_examples(good: Path, mode: str) -> None:
    """No error in any block, as an editor with either setting shows it."""
    assert sorted(_pyright(good, mode)) == []


def test_mypy_accepts_the_readme_and_the_examples(good: Path) -> None:
    """No error in any block with --strict."""
    assert sorted(_mypy(good)) == []


@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_mistakes_are_refused_where_they_are_made(bad: Path, checker: str) -> None:
    """Each marked line of tests/typing/refused.py has an error, and no other line."""
    errors = _pyright(bad, "basic") if checker == "pyright" else _mypy(bad)
    by_line = {line: message for _, line, message in errors}
    assert {line: by_line.get(line) for line in by_line.keys() ^ _marked()} == {}
