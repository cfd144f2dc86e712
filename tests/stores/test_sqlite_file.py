"""The file of a SQLiteStore: what is refused, what is noticed, and how it is read and copied while it is in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import client_of, model_v
from test_sqlite import answer, in_process, job

from xiling_async import SQLiteStore, StoreError
from xiling_async.models.record import State
from xiling_async.simulator import Simulator

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


async def made(file: Path, *numbers: int) -> None:
    """A closed store with these jobs."""
    store = SQLiteStore(file)
    await store.open()
    for number in numbers or (1,):
        await store.add(job(number))
    await store.close()


async def ids_in(store: SQLiteStore) -> set[str]:
    await store.open()
    try:
        return {record.id async for record in store.jobs()}
    finally:
        await store.close()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jobs.db", "jobs.db-wal", "jobs.db-journal", "jobs.db-shm"])
@pytest.mark.parametrize("how", ["writable by all", pytest.param("another user's", marks=as_root), "a link"])
async def test_a_file_that_another_user_prepared_is_refused(file: Path, name: str, how: str) -> None:
    """The database, and each file that SQLite would believe with it; nothing is changed or made beside it."""
    await made(file)
    path, elsewhere = file.with_name(name), file.with_name("elsewhere")
    if how == "a link":
        if name == "jobs.db":
            pytest.skip("a link to a file of one's own is followed")
        elsewhere.write_bytes(b"")
        path.symlink_to(elsewhere)
    else:
        path.touch()
        path.chmod(0o666 if how == "writable by all" else 0o600)
        if how == "another user's":
            os.chown(path, 12345, -1)
    before = sorted((entry.name, entry.read_bytes()) for entry in file.parent.iterdir())
    for store in (SQLiteStore(file), SQLiteStore(file, read_only=True)):
        with pytest.raises(StoreError, match=rf"{name} (is|belongs).*Nothing was sent") as caught:
            await store.open()
        assert caught.value.charged == "no"
    assert sorted((entry.name, entry.read_bytes()) for entry in file.parent.iterdir()) == before


async def test_a_lock_file_that_is_a_link_is_refused_and_its_target_kept(sim: Simulator, file: Path) -> None:
    """As a client sees it: an error before anything is sent, and the file behind the link is whole."""
    precious = file.with_name("precious")
    precious.write_text("do not lose this")
    file.with_name("jobs.db-owner").symlink_to(precious)
    with pytest.raises(StoreError, match="Nothing was sent"):
        await client_of(sim, store=SQLiteStore(file)).__aenter__()
    assert precious.read_text() == "do not lose this"
    assert not file.exists()


# --- what is noticed -----------------------------------------------------------------------------------------------


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("other"))
    path.with_name("other").rename(path)


def moved_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


@pytest.mark.parametrize("name", ["jobs.db", "jobs.db-wal"])
@pytest.mark.parametrize("happens", [removed, replaced, moved_away])
async def test_a_file_that_is_removed_or_replaced_under_a_client_is_noticed(
    sim: Simulator, file: Path, happens: Callable[[Path], None], name: str
) -> None:
    """The next submit raises StoreError and sends nothing: what it would write is gone at the next start."""
    async with client_of(sim, store=SQLiteStore(file)) as client:
        await client.submit(model_v(), key="before")
        happens(file.with_name(name))
        for key in ("order-42", "order-43", None):
            with pytest.raises(StoreError, match=rf"{name} was (removed|replaced) while it was in use") as caught:
                await client.submit(model_v(), key=key)
            assert caught.value.charged == "no"
        assert len(sim.ledger.posts) == 1


# --- reading a store in use ----------------------------------------------------------------------------------------


async def test_a_store_in_use_can_be_read(file: Path) -> None:
    """Also by another process, with what was committed last; nothing is made beside it, and its user works on."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job(1))
    script = """
async def main(path):
    store = SQLiteStore(path, read_only=True)
    await store.open()
    print(len([record async for record in store.jobs()]), len([record async for record in store.unfinished()]))
    await store.close()
asyncio.run(main(sys.argv[1]))
"""
    names = {path.name for path in file.parent.iterdir()}
    assert await asyncio.to_thread(in_process, script, file) == "1 1"
    assert {path.name for path in file.parent.iterdir()} == names
    await store.add(job(2))
    assert await asyncio.to_thread(in_process, script, file) == "2 2"
    await store.change(job(1).id, answer())
    await store.close()
    reader = SQLiteStore(file, read_only=True)
    assert await ids_in(reader) == {job(1).id, job(2).id}
    assert [path.name for path in file.parent.iterdir()] == ["jobs.db"]


async def test_a_reader_writes_nothing(file: Path) -> None:
    """Each way to write is a StoreError, and the file is byte for byte as it was."""
    await made(file)
    before = file.read_bytes()
    reader = SQLiteStore(file, read_only=True)
    await reader.open()
    assert (await reader.get(job().id)) == job()
    for write in (
        reader.add(job(2)), reader.change(job().id, answer()), reader.purge(-1e12), reader.secret(b"x" * 32),
        reader.recover_orphans(0.0, doubt_s=1, per_second=1),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="readonly database"):
            await write
    await reader.close()
    assert file.read_bytes() == before
    for path in (file.with_name("missing.db"), file.parent):
        with pytest.raises(StoreError):
            await SQLiteStore(path, read_only=True).open()
    assert [path.name for path in file.parent.iterdir()] == ["jobs.db"]


async def test_a_copy_that_is_read_is_of_one_moment(file: Path) -> None:
    """While a client writes pairs of jobs and SQLite moves its log into the database, every copy is sound and holds
    whole pairs."""
    store = SQLiteStore(file)
    await store.open()
    ended = False

    async def write() -> None:
        number = 0
        while not ended:
            number += 2
            await asyncio.gather(store.add(job(number)), store.add(job(number + 1)))

    writing = asyncio.create_task(write())
    sizes = []
    try:
        for _ in range(12):
            reader = SQLiteStore(file, read_only=True)
            await reader.open()
            soundness = await reader._run(lambda connection: connection.execute("PRAGMA integrity_check").fetchall())
            assert soundness == [("ok",)]
            found = {int(record.id, 16) async for record in reader.jobs()}
            await reader.close()
            assert found == set(range(2, len(found) + 2))
            assert len(found) % 2 == 0
            sizes.append(len(found))
    finally:
        ended = True
        await writing
        await store.close()
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


# --- backups -------------------------------------------------------------------------------------------------------


async def test_a_backup_is_a_store_with_all_that_was_committed(sim: Simulator, file: Path) -> None:
    """Taken while a client is open, private, opened by a client afterwards: what was bought is not bought again."""
    target, store = file.with_name("backup.db"), SQLiteStore(file)
    async with client_of(sim, store=store) as client:
        done = await (await client.submit(model_v(), key="order-42"))
        assert await store.backup(str(target)) == target
        await client.submit(model_v(), key="after")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(path.name for path in file.parent.iterdir()) == ["backup.db", "jobs.db"]
    async with client_of(sim, store=SQLiteStore(target)) as client:
        again = await client.submit(model_v(), key="order-42")
        assert await again == done
        assert again.state is State.DONE
        assert await client.find("after") is None
    assert len(sim.ledger.posts) == 2


async def test_a_backup_replaces_nothing_and_leaves_nothing_half_written(file: Path) -> None:
    """A file that is there, a folder that is missing, a disk that is full: StoreError, and the store works on."""
    there = file.with_name("there")
    there.write_bytes(b"precious")
    store = SQLiteStore(file)
    await store.open()
    await store.add(job())
    before = {path.name for path in file.parent.iterdir()}
    for target in (there, file, file.with_name("missing") / "backup.db", file.parent, Path("/dev/full")):
        with pytest.raises(StoreError, match="could not be written or read"):
            await store.backup(target)
    file.with_name("link").symlink_to(file.with_name("nowhere"))
    with pytest.raises(StoreError):
        await store.backup(file.with_name("link"))
    file.with_name("link").unlink()
    assert {path.name for path in file.parent.iterdir()} == before
    assert there.read_bytes() == b"precious"
    assert await store.get(job().id) == job()
    await store.close()


async def test_a_backup_whose_caller_is_cancelled_is_whole_or_absent(file: Path) -> None:
    """At any turn of the loop."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job())
    for turns in range(6):
        target = file.with_name(f"backup{turns}.db")
        task = asyncio.create_task(store.backup(target))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await store.close()
    assert not any("xiling" in thread.name for thread in threading.enumerate())
    for target in file.parent.glob("backup*"):
        assert target.suffix == ".db"
        with contextlib.closing(sqlite3.connect(target)) as copy:
            assert copy.execute("SELECT COUNT(*) FROM jobs").fetchone() == (1,)
