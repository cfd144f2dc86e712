"""Files that a batch writes into its folder: never through a link, and never over a file of another user."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO must not block
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_BINARY: Final = getattr(os, "O_BINARY", 0)


def open_own(path: Path, flags: int) -> int:
    """Open a file of ours; the file descriptor. `flags`: as of `os.open`, without O_TRUNC; the file is made readable
    by others, like any file.

    Raises `OSError` for a symbolic link, a hard link, a file of another user, and what is not a file at all: nothing
    was changed.
    """
    descriptor = os.open(path, flags | _NO_LINK | _NO_WAIT | _BINARY, 0o666)
    status = os.fstat(descriptor)
    why = None
    if not stat.S_ISREG(status.st_mode):
        why = "it is not a file"
    elif status.st_nlink > 1:
        why = "it is a hard link to another file"
    elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        why = "it belongs to another user"
    if why is None:
        return descriptor
    os.close(descriptor)
    raise OSError(0, why, str(path))


def is_own(path: Path) -> bool:
    """Whether this is a plain file, and not a link to one; blocks. Raises `FileNotFoundError`."""
    return stat.S_ISREG(path.lstat().st_mode)


def reason(error: OSError) -> str:
    """Why a file could not be used, in words."""
    return error.strerror or type(error).__name__
