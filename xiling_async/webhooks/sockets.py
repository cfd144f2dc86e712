"""What the operating system gives a server: a Unix socket with its file, and so many open connections."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import stat
import sys
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import resource

log = logging.getLogger("xiling_async.webhooks.receiver.http")

DESCRIPTORS_FOR_OTHERS: Final = 2  # of the process's file descriptors, callbacks may have one part in so many
ANSWER_S: Final = 1.0  # a listener whose queue is full lets one wait


def affordable(connections: int) -> int:
    """Fewer where the process may open few files: its store and its POSTs need some, too."""
    if sys.platform == "win32":
        return connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(1, soft // DESCRIPTORS_FOR_OTHERS)
    if soft == resource.RLIM_INFINITY or connections <= few:
        return connections
    log.info("at most %d connections, not %d: this process may open %d files", few, connections, soft)
    return few


def bind(path: Path) -> tuple[socket.socket, int]:
    """A socket at this path, and its inode. A socket file that nobody listens at was left by a killed process."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(ANSWER_S)
                if asking.connect_ex(str(path)) != errno.ECONNREFUSED:
                    raise FileExistsError(errno.EADDRINUSE, "another process listens there")
            path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        listening.setblocking(False)  # noqa: FBT003
        return listening, path.stat().st_ino
    except BaseException:
        listening.close()
        raise


def remove(path: Path, inode: int) -> None:
    """Our socket file, not one that somebody else has put in its place."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()
