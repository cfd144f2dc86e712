"""A receiver on an open port with one waiting job, and its clients: what the tests of attacks share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from support import NotingStore, callback_body, client_of, http, model_v, port_of, token_of

from xiling_async import Client, Job, ReceiverOptions, Video, WebhookReceiver
from xiling_async.simulator import Simulator

MIB = 2**20


@attrs.frozen
class Scene:
    """A client whose receiver is under attack, and one job that waits for its callbacks."""

    sim: Simulator
    client: Client
    store: NotingStore
    job: Job[Video]
    url: str

    @property
    def port(self) -> int:
        return port_of(self.url)

    @property
    def path(self) -> str:
        return f"/{token_of(self.url)}"

    def callback(self, place: int = 0, **data: object) -> bytes:
        return callback_body(self.job.task_ids[place], **data)

    def honest(self, place: int = 0, *headers: str) -> bytes:
        return http(self.path, self.callback(place), *headers)


@asynccontextmanager
async def scene(*, count: int = 1, options: ReceiverOptions | None = None, **others: Any) -> AsyncIterator[Scene]:
    receiver = others.pop("receiver", None) or WebhookReceiver(port=0, options=options or ReceiverOptions())
    store = others.pop("store", None) or NotingStore()
    async with (
        Simulator(manual=True) as sim,
        client_of(sim, receiver=receiver, store=store, **others) as client,
    ):
        job = await client.submit(model_v(count=count))
        SIGNED_TOKENS.append(token_of(sim.ledger.posts[-1].callback_url))
        yield Scene(sim, client, store, job, str(sim.ledger.posts[-1].callback_url))


SIGNED_TOKENS: list[str] = []  # in this test


@contextlib.contextmanager
def clean_records(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No traceback, no error and no token gets into a log, at whatever level."""
    caplog.set_level(logging.DEBUG, logger="xiling_async.webhooks.receiver")
    yield
    for record in caplog.get_records("call"):
        if record.name.startswith("xiling_async"):
            assert record.exc_info is None
            assert record.levelno < logging.ERROR, record.getMessage()
            assert not any(token in record.getMessage() for token in SIGNED_TOKENS)
    SIGNED_TOKENS.clear()


@contextlib.asynccontextmanager
async def connected(
    port: int, *, local: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """`local`: the address that the connection comes from."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(local, 0))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What still came before the server hung up, politely or not."""
    with contextlib.suppress(OSError):
        return await reader.read()
    return b""


def resident() -> int:
    """This process's memory as Linux counts it; elsewhere nothing is measured."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


async def swallowed(port: int, head: bytes, piece: bytes) -> tuple[int, bytes]:
    """How many bytes a server lets us send after this head, and what it answers."""
    taken = 0
    async with connected(port) as (reader, writer):
        writer.transport.set_write_buffer_limits(0)
        writer.write(head)
        reading = asyncio.create_task(until_closed(reader))
        with contextlib.suppress(OSError):
            while taken < 64 * MIB:
                writer.write(piece)
                await writer.drain()
                taken += len(piece)
        writer.transport.abort()
        return taken, await reading
