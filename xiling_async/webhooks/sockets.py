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


async def listen_on_port(host: str, port: int, backlog: int) -> list[socket.socket]:
    """One socket for each address of `host`; port 0: a free one, the same for all. Raises `OSError`."""
    listening: list[socket.socket] = []
    try:
        for family, address in await _addresses(host, port):
            if listening and not port:
                address = (address[0], listening[0].getsockname()[1], *address[2:])
            listening.append(socket.create_server(address, family=family, backlog=backlog))
            listening[-1].setblocking(False)  # noqa: FBT003
    except BaseException:
        for one in listening:
            one.close()
        raise
    return listening


async def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
    infos = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return [(family, address) for family, _, _, _, address in infos]


def listen_at(path: Path, backlog: int) -> tuple[socket.socket, int]:
    """A Unix socket at this path, and the inode of its file. Blocks. Raises `OSError`, also when another process
    listens there; the file that a killed process left is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(ANSWER_S)
                if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
                    raise FileExistsError(errno.EADDRINUSE, "another process listens there")
            path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        listening.setblocking(False)  # noqa: FBT003
        listening.listen(backlog)
        return listening, path.stat().st_ino
    except BaseException:
        listening.close()
        raise


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


def remove(path: Path, inode: int) -> None:
    """Remove our socket file, not one that another process has put in its place."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()
