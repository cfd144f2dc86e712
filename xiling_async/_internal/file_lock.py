"""One process at a time: a lock in a small file beside the database, which names the process that holds it.

SQLite's own locks are not enough: POSIX drops them as soon as the process closes any other descriptor of the same file
(a copy made as a backup, a second store that was refused: https://www.sqlite.org/howtocorrupt.html, 2.2). A `flock`
stays until its own descriptor is closed, and the kernel does that for a process that dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

_NOTE: Final = re.compile(r"process [0-9]{1,20} on [\w.-]{0,255}")
_NOTE_BYTES: Final = 300
_FLAGS: Final = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_held: dict[object, int] = {}  # descriptors, each by a token of its lock: their numbers are used again


class Locked(Exception):
    """Another process, or another part of this one, holds the lock; the message names it."""


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def lock_file(path: Path) -> Callable[[], None]:
    """Take the lock and write down who holds it; returns what releases it. Raises `Locked` or `OSError`.

    The file is made here, or was left by a process that died. Anything else of that name is refused untouched: a link,
    a file that has a second name, a file with another content or of another user.
    """
    while True:
        descriptor = os.open(path, _FLAGS, 0o600)
        try:
            note = _checked(path, descriptor)
            _lock(descriptor, note)
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, this_process().encode())
                token = object()
                _held[token] = descriptor
                return lambda: _release(path, token)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it meanwhile


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raises `PermissionError` for a file that another user made or may write to."""
    if sys.platform == "win32":
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{path} is writable by every user of this machine; chmod o-w it if its content is yours")


def _checked(path: Path, descriptor: int) -> str:
    """The note in the file. Raises `PermissionError` if it is not one of ours."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise PermissionError(f"{path} is not a file of its own but a link, a device or a second name of another file")
    check_owner(path, status)
    note = os.read(descriptor, _NOTE_BYTES).decode(errors="replace")
    if note and not _NOTE.fullmatch(note):
        raise PermissionError(f"{path} is a file of another program; it is left as it is")
    return note


def _lock(descriptor: int, note: str) -> None:
    if sys.platform == "win32":  # there SQLite's own locks hold
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(note or "another process") from None


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, token: object) -> None:
    descriptor = _held.pop(token, None)
    if descriptor is not None:  # None: released already, or it is the parent's and this is a forked child
        with contextlib.suppress(OSError):
            if _is_still(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _after_fork() -> None:
    """A child must not keep alive what its parent holds."""
    while _held:
        os.close(_held.popitem()[1])


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
