"""The receiver's listening sockets: TCP, or a Unix socket with its file; and how many connections a process affords."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import stat
import sys
from pathlib import Path
from typing import Any, Final

from xiling_async._internal.threads import Threads

if sys.platform != "win32":
    import resource

log = logging.getLogger("xiling_async.webhooks.receiver.http")

DESCRIPTORS_FOR_OTHERS: Final = 2  # of the process's file descriptors, callbacks may have one part in so many


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


async def listen_on_port(host: str, port: int, backlog: int, threads: Threads) -> list[socket.socket]:
    """One socket for each address of `host`; port 0: a free one, the same for all. Raises `OSError`."""
    with contextlib.ExitStack() as on_error:
        listening: list[socket.socket] = []
        for family, address in await _addresses(host, port, threads):
            if listening and not port:
                address = (address[0], listening[0].getsockname()[1], *address[2:])
            listening.append(on_error.enter_context(socket.create_server(address, family=family, backlog=backlog)))
            listening[-1].setblocking(False)  # noqa: FBT003
        on_error.pop_all()
        return listening


async def _addresses(host: str, port: int, threads: Threads) -> list[tuple[int, Any]]:
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
    infos = await threads.run(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in infos]


class UnixSocket:
    """A listening Unix socket and its file. Its methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self.socket: socket.socket | None = None

    def listen(self, backlog: int) -> None:
        """Raises `OSError`, also when another process listens there; the file of a killed process is replaced."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self._path.stat().st_mode):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.setblocking(False)  # noqa: FBT003 - a listener whose queue is full is one, too
                    if probe.connect_ex(str(self._path)) != errno.ECONNREFUSED:
                        raise FileExistsError(errno.EADDRINUSE, "another process listens there")
                self._path.unlink()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(self._path))
        self._inode = self._path.stat().st_ino
        self.socket.setblocking(False)  # noqa: FBT003
        self.socket.listen(backlog)

    def remove(self) -> None:
        """Remove our file, not one that another process has put in its place."""
        with contextlib.suppress(FileNotFoundError):
            if self._inode is not None and self._path.stat().st_ino == self._inode:
                self._path.unlink()


async def accept(listening: socket.socket) -> tuple[socket.socket, Any]:
    """The next connection, and the address of its peer. Raises `OSError`.

    Not `loop.sock_accept`: cancelled at the wrong moment, it loses a connection without closing it. (It is used on
    Windows, where asyncio's loop has no `add_reader`.)
    """
    loop = asyncio.get_running_loop()
    if sys.platform == "win32":
        return await loop.sock_accept(listening)
    while True:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            sock, address = listening.accept()
            sock.setblocking(False)  # noqa: FBT003
            return sock, address
        readable = asyncio.Event()
        loop.add_reader(listening, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(listening)
