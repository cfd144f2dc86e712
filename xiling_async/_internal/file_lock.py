"""One process at a time: a lock in a small file beside the store, which says who holds it.

SQLite's own locks are not enough: POSIX drops them as soon as the process closes any other descriptor of the same file
(a copy made as a backup, a second store that was refused: https://www.sqlite.org/howtocorrupt.html, 2.2). A `flock`
stays until its own descriptor is closed, and the kernel does that for a process that dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

_WORDS: Final = 200  # bytes of the file that are shown: it may be anybody's
_held: dict[object, int] = {}  # descriptors, each by a token of its hold: numbers are used again


class Held(Exception):
    """Somebody holds it; the message says who."""


def me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def hold(path: Path) -> Callable[[], None]:
    """Take the lock and write down who we are; gives what lets go of it. Raises `Held` or `OSError`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(descriptor)
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, me().encode())
                token = object()
                _held[token] = descriptor
                return lambda: _let_go(path, token)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder took it away while we came in


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":  # there SQLite's own locks hold
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Held(os.read(descriptor, _WORDS).decode(errors="replace") or "another process") from None


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go(path: Path, token: object) -> None:
    descriptor = _held.pop(token, None)
    if descriptor is not None:  # None: let go already, or it is the parent's and we are a forked child
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _forked() -> None:
    """A child must not keep alive what its parent holds."""
    while _held:
        os.close(_held.popitem()[1])


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forked)
