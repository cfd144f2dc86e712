"""What is measured side by side runs in processes of its own: here they are started, pinned to a core, and heard."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent


def cores() -> tuple[int | None, int | None]:
    """One for the service, another one for the side that is measured; None where there is no choice."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    free = sorted(os.sched_getaffinity(0))
    return (free[0], free[-1]) if len(free) > 1 else (None, None)


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


class Process:
    """A Python script that speaks JSON, a line each way; it ends with its standard input."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, **question: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class LeanService(Process):
    """`lean.py`, running."""

    def __init__(self) -> None:
        core = cores()[0]
        super().__init__("lean.py", *(() if core is None else ("--core", core)))
        self.url = f"http://127.0.0.1:{self.hear()}"

    def control(self, what: str, **given: object) -> dict[str, Any]:
        return control(self.url, what, **given)


def control(url: str, what: str, **given: object) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/control/{what}", data=json.dumps(given).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=600) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


# --- memory of this process ------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """From now on `peak_bytes` is the most that is held after this moment (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that the process has held; 0 where that cannot be read."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
