"""SQLiteStore beyond the contract: whose file it is, what one transaction holds, and what is left when it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from disk import Disk
from support import gone, model_v, settle, started

from xiling_async import SQLiteStore, StoreError
from xiling_async.models.lifecycle import Accepted, OutcomeReported, Verdict
from xiling_async.models.record import Failed, JobRecord, State
from xiling_async.stores.sqlite_schema import APPLICATION, MIGRATIONS, migrate

NOW = 1_800_000_000.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def store(file: Path, disk: Disk) -> AsyncIterator[SQLiteStore]:
    made = SQLiteStore(file, connect=disk.connect)
    await made.open()
    yield made
    disk.gate.set()
    await made.close()


@pytest.fixture
def open_mask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def job(number: int = 1, **known: Any) -> JobRecord:
    fresh = JobRecord(
        id=f"{number:032x}", kind="image_to_video", key=f"k{number}", request=model_v(), asked=1,
        created_at=NOW + number, changed_at=NOW + number,
    )  # fmt: skip
    return attrs.evolve(fresh, **known)


def answer(number: int = 1) -> Accepted:
    return Accepted(attempt=1, at=NOW, task_ids=(f"t{number}",), due_at=NOW + 300)


def in_process(script: str, *args: object) -> str:
    """What this script prints, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *map(str, args)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRELUDE = """
import asyncio, os, signal, subprocess, sys, tempfile
from pathlib import Path
from xiling_async import SQLiteStore, StoreError

async def tried(path):
    store = SQLiteStore(path)
    try:
        await store.open()
    except StoreError as error:
        return f"refused: {error}"
    await store.close()
    return "opened"
"""
TRY = "print(asyncio.run(tried(sys.argv[1])))"


async def other_process(file: Path) -> str:
    return await asyncio.to_thread(in_process, TRY, file)


# --- the file ------------------------------------------------------------------------------------------------------


async def test_every_commit_is_asked_to_reach_the_disk(file: Path) -> None:
    """One connection for itself, a write-ahead log, and an fsync a commit; read back, not believed."""
    disk = Disk()
    store = SQLiteStore(file, connect=disk.connect)
    await store.open()
    await store.close()
    assert disk.seen == {
        "locking_mode": "exclusive", "journal_mode": "wal", "synchronous": 2, "fullfsync": 1,
        "application_id": APPLICATION,
    }  # fmt: skip


async def test_what_sqlite_does_not_do_is_refused(file: Path) -> None:
    """A database without a write-ahead log (one in memory) is no store."""
    store = SQLiteStore(file, connect=lambda path, **options: sqlite3.connect(":memory:", **options))
    with pytest.raises(StoreError, match="does not do journal_mode=wal"):
        await store.open()


async def test_nobody_else_can_read_the_files(file: Path, open_mask: None) -> None:
    """The file, its log and the note of its owner, also under an open umask."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job())
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in file.parent.iterdir()}
    await store.close()
    assert modes == {"jobs.db": "0o600", "jobs.db-wal": "0o600", "jobs.db-owner": "0o600"}


async def test_a_closed_store_is_one_file_and_no_thread(file: Path) -> None:
    """No log, no note, no thread of ours or of the loop's; also after an opening that was refused."""
    threads = set(threading.enumerate())
    for _ in range(2):
        store = SQLiteStore(file)
        await store.open()
        await store.add(job())
        with pytest.raises(StoreError):
            await SQLiteStore(file).open()
        assert len(threading.enumerate()) == len(threads) + 1
        await store.close()
        assert set(threading.enumerate()) == threads
        assert [path.name for path in file.parent.iterdir()] == ["jobs.db"]


async def test_a_repr_names_the_file_only() -> None:
    """Not the folder, not what is in it."""
    assert repr(SQLiteStore("/secret/folder/jobs.db")) == "<SQLiteStore jobs.db>"


# --- one process at a time -----------------------------------------------------------------------------------------


async def test_a_second_process_is_refused_and_told_by_whom(store: SQLiteStore, file: Path) -> None:
    """The error names the process that holds the file, and what to take for several."""
    said = await other_process(file)
    assert f"is held by process {os.getpid()} on " in said
    assert "PostgresStore" in said
    await store.close()
    assert await other_process(file) == "opened"


async def test_a_second_store_of_this_process_is_refused(store: SQLiteStore, file: Path) -> None:
    """By name, through a link, and the same object twice; the first one works on, and after it the file is free."""
    link = file.with_name("link.db")
    link.symlink_to(file)
    for second in (SQLiteStore(file), SQLiteStore(link), store):
        with pytest.raises(StoreError, match="another client of this process"):
            await second.open()
    assert await store.add(job()) == job()
    await store.close()
    reopened = SQLiteStore(link)
    await reopened.open()
    assert await reopened.get(job().id) == job()
    await reopened.close()


async def test_nothing_done_to_the_file_lets_another_process_in(store: SQLiteStore, file: Path) -> None:
    """POSIX drops SQLite's locks when any other descriptor of the file is closed; the store's own lock stays."""
    with pytest.raises(StoreError):
        await SQLiteStore(file).open()
    file.read_bytes()
    assert (await other_process(file)).startswith("refused")
    assert await store.add(job()) == job()


async def test_a_killed_process_leaves_a_file_that_opens(file: Path) -> None:
    """With everything that it was told is written; its note is overwritten."""
    script = """
async def main(path):
    store = SQLiteStore(path)
    await store.open()
    print(await store.secret(b"written before the end"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1]))
"""
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", PRELUDE + script, str(file)], capture_output=True, timeout=30
    )
    assert (killed.returncode, killed.stdout) == (-9, b"b'written before the end'\n")
    assert file.with_name("jobs.db-owner").exists()
    store = SQLiteStore(file)
    await store.open()
    assert await store.secret(b"another one") == b"written before the end"
    assert file.with_name("jobs.db-owner").read_text().startswith(f"process {os.getpid()} on ")
    await store.close()


def test_a_forked_child_does_not_touch_the_parents_store(file: Path) -> None:
    """Its calls are refused, a store of its own too; it ends, and the parent still has and holds the file."""
    script = """
path = sys.argv[1]
store = SQLiteStore(path)
with asyncio.Runner() as runner:
    runner.run(store.open())
    child = os.fork()
    if not child:
        said = []
        for method in (store.next_due, store.open):
            try:
                asyncio.run(method())
            except StoreError as error:
                said.append("before a fork" in str(error))
        asyncio.run(store.close())
        said.append("is held by process" in asyncio.run(tried(path)))
        os._exit(0 if said == [True] * 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    print(runner.run(store.secret(b"still here")).decode(), asyncio.run_coroutine_threadsafe is not None)
    held = Path(path + "-owner").read_text()
    assert held.startswith(f"process {os.getpid()} "), held
    runner.run(store.close())
assert os.listdir(os.path.dirname(path)) == ["jobs.db"]
"""
    assert in_process(script, file) == "still here True"


def test_a_child_that_outlives_its_parent_does_not_hold_the_file(file: Path) -> None:
    """The lock is the parent's alone: it ends with it."""
    script = """
path, parent = sys.argv[1], os.getpid()
store = SQLiteStore(path)
asyncio.run(store.open())
if os.fork():
    os.kill(parent, signal.SIGKILL)
while os.getppid() == parent:
    os.sched_yield()
subprocess.run([sys.executable, "-c", sys.argv[2], path])
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(file), PRELUDE + TRY], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (-9, "opened\n")


# --- files that are no stores --------------------------------------------------------------------------------------


async def refusal_of(path: Path) -> str:
    """Why the store cannot be opened; the files are left as they were."""
    before = {entry: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()}
    with pytest.raises(StoreError) as caught:
        await SQLiteStore(path).open()
    assert caught.value.charged == "no"
    assert {entry: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()} == before
    return str(caught.value)


@pytest.mark.parametrize("journal", ["wal", "delete"])
async def test_a_newer_store_is_refused_untouched(file: Path, journal: str) -> None:
    """It says which version wrote it; not even its journal mode changes."""
    store = SQLiteStore(file)
    await store.open()
    await store.close()
    with sqlite3.connect(file) as newer:
        newer.execute(f"PRAGMA journal_mode = {journal}")
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    said = await refusal_of(file)
    assert f"newer xiling_async (its schema is 99, this one knows {len(MIGRATIONS)})" in said


@pytest.mark.parametrize(
    "made", ["CREATE TABLE jobs (id)", "PRAGMA user_version = 1", "PRAGMA application_id = 7"], ids=lambda made: made
)
async def test_somebody_elses_database_is_refused_untouched(file: Path, made: str) -> None:
    """Also one that looks like an empty or an older store of ours."""
    with sqlite3.connect(file) as foreign:
        foreign.execute(made)
    foreign.close()
    assert "the database of another application" in await refusal_of(file)


async def test_what_is_no_database_is_refused_untouched(file: Path) -> None:
    """Whatever else is in the file stays in it."""
    file.write_bytes(b"dear diary, " * 500)
    assert "not a database" in await refusal_of(file)


async def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    """A folder, a folder that is not there, a loop of links; the path is in the message, and nothing was sent."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "missing" / "jobs.db", tmp_path / "loop"):
        said = await refusal_of(path)
        assert str(path) in said
        assert "cannot be used as a store" in said
        assert "Nothing was sent" in said


async def test_a_locked_file_is_told_from_a_path_with_that_word(tmp_path: Path) -> None:
    """Another program's lock is named as such; a missing folder called "locked" is a missing folder."""
    file = tmp_path / "jobs.db"
    other = sqlite3.connect(file)
    other.execute("PRAGMA locking_mode = exclusive")
    other.execute("BEGIN EXCLUSIVE")
    assert "is held by another program" in await refusal_of(file)
    other.close()
    assert "cannot be used as a store" in await refusal_of(tmp_path / "locked" / "jobs.db")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written_is_refused(what: str) -> None:
    """A read-only folder, a read-only file: known at the start, not when the first job was paid for."""
    script = """
if not os.geteuid():
    os.setgid(65534)
    os.setuid(65534)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "jobs.db"
    assert asyncio.run(tried(path)) == "opened"
    (path.parent if sys.argv[1] == "folder" else path).chmod(0o500 if sys.argv[1] == "folder" else 0o400)
    print(asyncio.run(tried(path)))
    path.parent.chmod(0o700)
"""
    said = in_process(script, what)
    assert "cannot be used as a store" in said
    assert ("Permission denied" if what == "folder" else "is read-only") in said


# --- older files ---------------------------------------------------------------------------------------------------


async def test_an_empty_file_is_a_new_store(file: Path) -> None:
    """As a tool that makes temporary files leaves it."""
    file.touch(0o600)
    store = SQLiteStore(file)
    await store.open()
    assert await store.add(job()) == job()
    await store.close()


async def brought_up(file: Path, *scripts: str) -> list[Any]:
    """What the jobs are after these migrations."""

    def work() -> list[Any]:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            migrate(connection, scripts)
            assert connection.execute("PRAGMA user_version").fetchone() == (len(scripts),)
            return connection.execute("SELECT * FROM jobs").fetchall()

    return await asyncio.to_thread(work)


async def test_older_files_are_brought_up_step_by_step(file: Path) -> None:
    """Each script runs once, in order, with its number; what was in the file is still there."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job())
    await store.close()
    before = await brought_up(file, *MIGRATIONS)
    later = (*MIGRATIONS, "ALTER TABLE jobs ADD COLUMN note TEXT", "UPDATE jobs SET note = 'seen ' || key")
    for _ in range(2):
        assert await brought_up(file, *later) == [(*before[0], "seen k1")]


async def test_a_migration_that_fails_leaves_the_step_before(file: Path) -> None:
    """A script counts as a whole: its number and its changes, or neither."""
    assert await brought_up(file, *MIGRATIONS) == []
    with pytest.raises(sqlite3.Error):
        await brought_up(file, *MIGRATIONS, "CREATE TABLE half (x); INSERT INTO nowhere VALUES (1)")
    assert await brought_up(file, *MIGRATIONS, "CREATE TABLE half (x)") == []


# --- one transaction -----------------------------------------------------------------------------------------------


async def test_what_arrives_together_shares_a_commit(store: SQLiteStore, disk: Disk) -> None:
    """Two hundred jobs while the disk is busy: one transaction for the first, one for all the others."""
    disk.gate.clear()
    before = disk.commits
    adding = [await started(store.add(job(number))) for number in range(3)]
    await asyncio.to_thread(disk.reached.wait)
    adding += [asyncio.create_task(store.add(job(number))) for number in range(3, 200)]
    await settle()
    assert not any(task.done() for task in adding)
    disk.gate.set()
    assert await asyncio.gather(*adding) == [job(number) for number in range(200)]
    assert disk.commits - before == 2
    assert len(disk.threads) == 1


async def test_one_that_fails_takes_nobody_with_it(store: SQLiteStore, disk: Disk) -> None:
    """A piece of work that cannot be done is told so; its neighbours in the transaction are committed."""
    await store.add(job(0))
    disk.gate.clear()
    reads = await started(store.get(job(0).id))
    await asyncio.to_thread(disk.reached.wait)
    adding = [asyncio.create_task(store.add(job(number))) for number in range(1, 10)]
    bad = asyncio.create_task(store.add(job(10, key="half an emoji \ud83d")))
    adding += [asyncio.create_task(store.add(job(number))) for number in range(11, 20)]
    await settle()
    disk.gate.set()
    with pytest.raises(StoreError, match=r"could not be written or read: 'utf-8' codec"):
        await bad
    assert (await reads) == job(0)
    assert {record.id for record in await asyncio.gather(*adding)} == {job(n).id for n in range(1, 20) if n != 10}
    assert await store.get(job(10).id) is None
    assert await store.get(job(19).id) == job(19)


async def test_a_cancelled_caller_takes_nobody_with_it(store: SQLiteStore, disk: Disk) -> None:
    """Its own work is done all the same, as the others' is."""
    disk.gate.clear()
    first, second = await started(store.add(job(1))), await started(store.add(job(2)))
    await gone(first)
    disk.gate.set()
    assert await second == job(2)
    assert await store.get(job(1).id) == job(1)


async def test_a_key_has_one_winner_within_a_transaction(store: SQLiteStore, disk: Disk) -> None:
    """What a piece of work wrote, the next one in the same transaction reads."""
    disk.gate.clear()
    adding = [await started(store.add(job(number, key="k"))) for number in range(1, 20)]
    disk.gate.set()
    assert {record.id for record in await asyncio.gather(*adding)} == {job(1).id}


async def test_closing_commits_what_was_handed_in(store: SQLiteStore, disk: Disk) -> None:
    """Whoever still waits gets an answer; whoever comes later is refused."""
    disk.gate.clear()
    adding = [await started(store.add(job(number))) for number in range(1, 11)]
    closing = await started(store.close())
    with pytest.raises(StoreError, match="is not open"):
        await store.add(job(11))
    disk.gate.set()
    assert await asyncio.gather(*adding) == [job(number) for number in range(1, 11)]
    await closing
    await store.open()
    assert len([record async for record in store.unfinished()]) == 10


async def test_a_cancelled_close_closes(store: SQLiteStore, disk: Disk, file: Path) -> None:
    """It waits for the file to be free all the same, and is cancelled then."""
    disk.gate.clear()
    adding = await started(store.add(job()))
    closing = await started(store.close())
    closing.cancel()
    await settle()
    assert not closing.done()
    disk.gate.set()
    await asyncio.wait({closing})
    assert closing.cancelled()
    assert await adding == job()
    assert await other_process(file) == "opened"


async def test_a_cancelled_open_leaves_nothing_open(file: Path, disk: Disk) -> None:
    """The file is free, the thread is gone, and the store can be opened."""
    threads = set(threading.enumerate())
    disk.gate.clear()
    store = SQLiteStore(file, connect=disk.connect)
    opening = await started(store.open())
    opening.cancel()
    await settle()
    disk.gate.set()
    await asyncio.wait({opening})
    assert opening.cancelled()
    assert set(threading.enumerate()) == threads
    await store.open()
    assert await store.next_due() is None
    await store.close()


def test_a_loop_that_ends_without_closing_loses_nothing(file: Path) -> None:
    """The process goes on to its end; what was committed is in the file."""
    script = """
async def main(path):
    store = SQLiteStore(path)
    await store.open()
    print((await store.secret(b"kept")).decode())
    asyncio.ensure_future(store.next_due())

asyncio.run(main(sys.argv[1]))
"""
    assert in_process(script, file) == "kept"
    assert in_process(script, file) == "kept"


# --- rows that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "value"), [("state", "dreaming"), ("tasks", "[["), ("request", "{")])
async def test_a_row_that_cannot_be_read_hides_no_other(
    file: Path, caplog: pytest.LogCaptureFixture, column: str, value: str
) -> None:
    """Who asks for that job gets a StoreError; sweeping and recovering go on with the others."""
    store = SQLiteStore(file)
    await store.open()
    for number in (1, 2, 3):
        await store.add(job(number))
        await store.change(job(number).id, answer(number))
    await store.close()
    with sqlite3.connect(file) as broken:
        broken.execute(f"UPDATE jobs SET {column} = ? WHERE id = ?", (value, job(2).id))
    broken.close()
    await store.open()
    for look in (store.get(job(2).id), store.by_key("k2"), store.by_task("t2"), store.change(job(2).id, answer(2))):
        with pytest.raises(StoreError):
            await look
    good = {job(1).id, job(3).id}
    if column != "state":
        assert {record.id async for record in store.unfinished()} == good
        assert f"job {job(2).id} of the store cannot be read" in caplog.text
        assert {record.id for record in await store.claim(NOW * 2, limit=9, lease_s=60)} == good
    ended = OutcomeReported(attempt=1, at=NOW, task_id="t3", outcome=Failed("t3", "no"), due_at=None)
    assert (await store.change(job(3).id, ended)).verdict is Verdict.APPLIED
    await store.close()


async def test_a_purge_goes_on_page_by_page(file: Path) -> None:
    """More jobs than one piece of work looks at: all that ended are forgotten, their keys and task ids with them."""
    store = SQLiteStore(file)
    await store.open()
    await store.add(job(1, changed_at=0.0))
    ended = OutcomeReported(attempt=1, at=0.0, task_id="t1", outcome=Failed("t1", ""), due_at=None)
    await store.change(job(1).id, ended)
    await store.close()
    with sqlite3.connect(file) as connection:
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 12000) INSERT INTO jobs SELECT "
            "printf('%032x', i), NULL, kind, request, asked, created_at, changed_at, state, attempt, "
            'printf(\'[["t%d",{"failed":""}]]\', i), refusal, due_at, failed_asks, version, 0, NULL, NULL, 0, 0 '
            "FROM jobs, n"
        )
        connection.execute("INSERT INTO tasks SELECT json_extract(tasks, '$[0][0]'), id FROM jobs WHERE key IS NULL")
        connection.execute("UPDATE jobs SET state = 'accepted' WHERE id = printf('%032x', 7777)")
    connection.close()
    await store.open()
    assert await store.purge(60) == 11_999
    assert await store.by_key("k1") is None
    assert await store.by_task("t1") is None
    held = await store.by_task("t7777")
    assert held is not None
    assert held.state is State.ACCEPTED
    fresh = await store.change((await store.add(job(1))).id, answer(1))
    assert fresh.verdict is Verdict.APPLIED
    await store.close()
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT COUNT(*) FROM tasks").fetchone() == (2,)
    connection.close()
