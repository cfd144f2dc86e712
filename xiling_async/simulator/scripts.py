"""What a fault is, and the scripts that say which request gets which faults."""

from collections import deque
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import attrs


@attrs.frozen
class Fault:
    """One thing that goes wrong. `used_by` lists the scripts that accept it: of creates, uploads or media."""

    used_by: ClassVar[tuple[str, ...]] = ("creates",)

    @property
    def name(self) -> str:
        """The word for it in scripts, directives and the ledger."""
        return type(self).__name__


Script = tuple[Fault, ...]
F = TypeVar("F", bound=Fault)


def find(script: Iterable[Fault], kind: type[F]) -> F | None:
    """The first fault of this type, or None."""
    return next((fault for fault in script if isinstance(fault, kind)), None)


def names(script: Script) -> tuple[str, ...]:
    return tuple(fault.name for fault in script)


class Scripts:
    """The queue of scripts, one for each request, and the default for requests without one."""

    def __init__(self, user: str) -> None:
        self.default: Script = ()
        self._user = user
        self._queue: deque[Script] = deque()

    def add(self, script: Script) -> None:
        self._queue.append(self._checked(script))

    def set_default(self, script: Script) -> None:
        self.default = self._checked(script)

    def next(self) -> Script:
        return self._queue.popleft() if self._queue else self.default

    def _checked(self, script: Script) -> Script:
        """The same faults. Raises TypeError: `faults.hang` for `faults.hang()`, or a fault that would be ignored."""
        for fault in script:
            if not isinstance(fault, Fault):
                raise TypeError(f"not a fault: {fault!r}")
            if self._user not in fault.used_by:
                raise TypeError(f"not a fault of {self._user}: {fault!r}")
        return script
