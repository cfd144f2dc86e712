"""results.jsonl: one line a task, written down for good when the task is over and its file is there; never twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xiling_async.cli.batch.files import open_own, reason
from xiling_async.errors import StoreError

NAME: Final = "results.jsonl"


class Results:
    """The file in this folder. Every call blocks; one at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._known: set[str] = set()

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._known

    def open(self) -> None:
        """Read what is there, and cut off a last line that a dying process left torn. Raises `StoreError`."""
        try:
            with open(open_own(self.path, os.O_RDWR | os.O_CREAT), "r+b") as file:  # noqa: PTH123 - a descriptor
                whole = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    self._known |= _task_of(line)
                if whole < file.seek(0, os.SEEK_END):
                    file.truncate(whole)
                    os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from error

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append these, one a task; of a task that is there already nothing is. On the disk when it returns.

        Raises `StoreError`.
        """
        new = {line["task_id"]: line for line in lines if line["task_id"] not in self._known}
        if not new:
            return
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in new.values())
        try:
            with open(open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:  # noqa: PTH123
                size = file.tell()
                try:
                    file.write(text.encode(errors="replace"))
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)  # a full disk may have taken half a line
                    raise
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._known |= new.keys()


def _task_of(line: bytes) -> set[str]:
    """The task of a line; none where it is not ours."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    task_id = value.get("task_id") if isinstance(value, dict) else None
    return {task_id} if isinstance(task_id, str) else set()


def _unusable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written ({reason(error)}). The jobs are in jobs.db beside it: when "
        "that is mended, the same command goes on, and buys nothing twice.",
        charged="maybe",
    )
