"""Every method of every store, cancelled once and twice at the n-th turn of the loop, for every n until it completes:
afterwards no task, connection, lock or thread is left, and what was asked is done or not done, nothing between."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pg
import pytest
from pg import Wire, fresh_schema, pg_store
from support import model_v
from test_store_contract import FACTORIES, NOW, answer, good, heard, job

from xiling_async import Client, PostgresStore, StoreError
from xiling_async.models.lifecycle import PollScheduled
from xiling_async.models.record import State
from xiling_async.simulator import Simulator
from xiling_async.stores import Store

# Every turn of the first ones; then, where the loop only turns while a disk or a database works, some of the many.
TURNS = [*range(16), *(int(16 * 2**step) for step in range(15))]
LIVELY_S = 20.0


async def called(method: Callable[[Store], Awaitable[Any]], store: Store) -> Any:
    return await method(store)


async def listed(jobs: AsyncIterator[Any]) -> list[Any]:
    return [record async for record in jobs]


METHODS: dict[str, Callable[[Store], Awaitable[Any]]] = {
    "secret": lambda store: store.secret(b"s" * 32),
    "add": lambda store: store.add(job(7, key="k7")),
    "add with tasks": lambda store: store.add(
        job(8, state=State.ACCEPTED, task_ids=("t8",), outcomes=(None,), due_at=NOW)
    ),
    "change": lambda store: store.change(job(1).id, answer("t1")),
    "change again": lambda store: store.change(job(1).id, PollScheduled(at=NOW, due_at=NOW + 60)),
    "change to an end": lambda store: store.change(job(1).id, heard("t1", good("t1"))),
    "get": lambda store: store.get(job(2).id),
    "by_key": lambda store: store.by_key("k2"),
    "by_task": lambda store: store.by_task("t2"),
    "unfinished": lambda store: listed(store.unfinished()),
    "jobs": lambda store: listed(store.jobs()),
    "claim": lambda store: store.claim(NOW + 1e6, limit=5, lease_s=60),
    "next_due": lambda store: store.next_due(),
    "recover_orphans": lambda store: store.recover_orphans(NOW, doubt_s=60, per_second=20),
    "purge": lambda store: store.purge(1e12),
}


async def cancelled_at(work: Callable[[], Awaitable[Any]], turn: int, *, twice: bool) -> bool:
    """Cancel this when the loop has turned so often, and (`twice`) again a turn later; whether that came in time."""

    async def run() -> Any:
        return await work()

    task = asyncio.create_task(run())
    for _ in range(turn):
        await asyncio.sleep(0)
        if task.done():
            break
    was_running = task.cancel()
    if twice:
        await asyncio.sleep(0)
        task.cancel()
    async with asyncio.timeout(LIVELY_S):
        await asyncio.wait({task})
    assert task.cancelled() == was_running, "a cancellation that came in time is not swallowed"
    return was_running


@contextlib.contextmanager
def silence() -> Any:
    """Nothing is told to the loop's exception handler: no future whose exception nobody retrieved, no lost task."""
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        yield
        gc.collect()
        assert told == []
    finally:
        loop.set_exception_handler(None)


def tasks() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def connections() -> int:
    """How many connections the database has, beside the one that asks."""
    connection = await asyncpg.connect(pg.server().dsn)
    try:
        others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        return int(await connection.fetchval(f"SELECT COUNT(*) FROM pg_stat_activity WHERE {others}"))
    finally:
        await connection.close()


async def no_connections() -> None:
    async with asyncio.timeout(LIVELY_S):
        while await connections():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FACTORIES)
async def test_a_method_cancelled_at_any_turn_leaves_nothing_behind(
    tmp_path: Path, kind: str, method: str, twice: bool
) -> None:
    """For every turn until it completes: no task of it goes on, the store works on with all that it had, and after
    closing no thread and no connection is left."""
    threads = set(threading.enumerate())
    store = FACTORIES[kind](tmp_path)
    await store.open()
    with silence():
        await store.add(job(1, key="k1"))
        await store.add(job(2, key="k2", state=State.ACCEPTED, task_ids=("t2",), outcomes=(None,), due_at=NOW))
        before = tasks()
        for turn in TURNS:
            came_in_time = await cancelled_at(partial(METHODS[method], store), turn, twice=twice)
            assert tasks() == before
            if not came_in_time:
                break
        else:
            raise AssertionError("it never completed")
        held = await store.by_key("k2")
        assert held is not None
        assert held.task_ids == ("t2",)
        assert await store.by_task("t2") == held
        assert (await store.add(job(99, key="k1"))).id == job(1).id
        await store.close()
    assert tasks() == set()
    assert set(threading.enumerate()) == threads
    if kind == "postgres":
        await no_connections()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", FACTORIES)
async def test_an_open_or_close_cancelled_at_any_turn_leaves_nothing_behind(
    tmp_path: Path, kind: str, twice: bool
) -> None:
    """No heartbeat, no connection, no thread, no lock: the next store opens it at once, and finds what was written."""
    threads = set(threading.enumerate())
    schema = fresh_schema()
    store = pg_store(schema=schema) if kind == "postgres" else FACTORIES[kind](tmp_path)
    with silence():
        for what in ("open", "close"):
            for turn in TURNS[1:]:  # at none it has not begun
                if what == "close":
                    await store.open()
                    await store.add(job(1))
                came_in_time = await cancelled_at(getattr(store, what), turn, twice=twice)
                assert tasks() == set() or (what, came_in_time) == ("open", False)
                await store.close()
                assert tasks() == set()
                assert set(threading.enumerate()) == threads
                if not came_in_time:
                    break
            else:
                raise AssertionError("it never completed")
    if kind == "postgres":
        await no_connections()
        connection = await asyncpg.connect(pg.server().dsn)
        locks = await connection.fetchval("SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory'")
        await connection.close()
        assert locks == 0
    else:
        assert [path.name for path in tmp_path.iterdir()] in ([], ["jobs.db"])
    await store.open()
    held = await store.get(job(1).id)
    await store.close()
    assert (held is None) == (kind == "never")


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2])
async def test_a_close_cancelled_while_the_database_hangs_leaves_nothing_behind(seconds: float) -> None:
    """A network that swallows everything: the cancelled close ends soon, and no task, connection or future is left."""
    async with Wire() as wire:
        store = pg_store(wire.dsn, connect={"timeout": 2, "command_timeout": 2})
        await store.open()
        with silence():
            wire.passes.clear()
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(seconds)
            closing.cancel()
            async with asyncio.timeout(1):
                await asyncio.wait({closing})
            assert closing.cancelled()
            ours = {task for task in tasks() if "Wire" not in repr(task.get_coro()) and "_server" not in repr(task)}
            assert not [task for task in ours if "xiling" in task.get_name()]
            with pytest.raises(StoreError, match="is not open"):
                await store.get(job(1).id)
        wire.passes.set()


async def test_a_hung_call_that_is_cancelled_leaves_no_future_behind() -> None:
    """Cancelled while the server is silent: nothing of the driver complains later, and the store works on."""
    async with Wire() as wire:
        store = pg_store(wire.dsn, pool_size=2)
        await store.open()
        await store.add(job(1))
        with silence():
            for method in ("get", "change", "next_due", "claim"):
                wire.passes.clear()
                call = asyncio.create_task(called(METHODS[method], store))
                await asyncio.sleep(0.02)
                call.cancel()
                async with asyncio.timeout(LIVELY_S):
                    await asyncio.wait({call})
                assert call.cancelled()
                wire.passes.set()
                assert await store.get(job(1).id) is not None
            await store.close()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", FACTORIES)
async def test_a_client_whose_exit_is_cancelled_at_any_turn_leaves_nothing_that_beats(
    sim: Simulator, tmp_path: Path, kind: str, twice: bool
) -> None:
    """Also a second Ctrl-C leaves no task and no connection, so that other replicas soon know that it is gone."""
    schema = fresh_schema()
    for turn in TURNS[1:]:  # at none it has not begun
        store = pg_store(schema=schema) if kind == "postgres" else FACTORIES[kind](tmp_path)
        client = Client(sim.api_key, base_url=sim.base_url, store=store)
        await client.__aenter__()
        await client.submit(model_v())
        came_in_time = await cancelled_at(partial(client.__aexit__, None, None, None), turn, twice=twice)
        await asyncio.sleep(0)
        assert [task.get_name() for task in tasks() if "xiling" in task.get_name()] == []
        if not came_in_time:
            break
    else:
        raise AssertionError("it never completed")
    if kind == "postgres":
        await no_connections()


class CancelledByItsBeat(PostgresStore):
    """Cancels who opens it when the listening connection stands, before that is told."""

    opening: asyncio.Task[None]

    async def beat(self, connection: Any) -> None:
        await super().beat(connection)
        self.opening.cancel()


async def test_an_open_cancelled_when_its_listener_has_connected_leaves_no_connection() -> None:
    """The listening connection is closed, although nobody waits for it any more."""
    store = CancelledByItsBeat(pg.server().dsn, schema=fresh_schema())
    with silence():
        store.opening = asyncio.create_task(store.open())
        await asyncio.wait({store.opening})
        assert store.opening.cancelled()
        assert tasks() == set()
        await no_connections()
