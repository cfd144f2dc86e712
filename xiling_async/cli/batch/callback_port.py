"""The port of `--port 0`, kept in the folder: a restart listens where callbacks of the earlier run will arrive."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from xiling_async.cli.batch.files import open_own

NAME: Final = ".callback-port"


def saved(folder: Path) -> int | None:
    """The port of the earlier run; None where there was none, or where the file is not ours. Blocks."""
    try:
        with open(open_own(folder / NAME, os.O_RDONLY), "rb") as file:  # noqa: PTH123 - a descriptor
            port = int(file.read(8))
    except (OSError, ValueError):
        return None
    return port if 0 < port < 65536 else None


def keep(folder: Path, port: int) -> None:
    """Remember this port. Where that is not possible, only a restart would miss it. Blocks."""
    with suppress(OSError), open(open_own(folder / NAME, os.O_WRONLY | os.O_CREAT), "wb") as file:  # noqa: PTH123
        file.truncate()
        file.write(str(port).encode())


def is_free(port: int) -> bool:
    """Whether this port is free now."""
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False
