"""Results are kept as soon as they are known, once, and the store remembers where."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Brisk, brisk_timeouts
from support import client_of, model_v, settle, turns_until

from xiling_async import (
    Client,
    ClientClosed,
    ConfigurationError,
    DownloadError,
    Limits,
    MemoryStore,
    ResultExpired,
    SQLiteStore,
    Succeeded,
    TaskFailed,
    Timeouts,
    WaitTimeout,
)
from xiling_async.models.query import ALL_JOBS, JobQuery
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock


async def kept(client: Client, task_id: str) -> Path:
    """Where the result of this task is, once the store says so."""
    while True:
        job = await client.find(task_id)
        assert job is not None
        for outcome in await job.outcomes():
            if isinstance(outcome, Succeeded) and outcome.task_id == task_id and outcome.file is not None:
                return Path(outcome.file)
        await asyncio.sleep(0)


def downloads_of(sim: Simulator, task_id: str) -> int:
    return len([one for one in sim.ledger.media if one.path.startswith(f"/media/{task_id}") and one.status == 200])


async def test_a_result_is_kept_as_soon_as_its_callback_lands(sim: Simulator, tmp_path: Path) -> None:
    """Each task of a job has its file in the folder, and its outcome says where."""
    folder = tmp_path / "made" / "for it"
    async with client_of(sim, save_to=folder, allow_private=True) as client:
        videos = await (await client.submit(model_v(count=2)))
        files = [await kept(client, video.task_id) for video in videos]
    assert files == [folder / f"{video.task_id}.mp4" for video in videos]
    assert all(file.read_bytes()[4:8] == b"ftyp" for file in files)
    assert sorted(folder.iterdir()) == sorted(files)


async def test_what_a_former_process_left_is_kept_after_a_restart(sim: Simulator, tmp_path: Path) -> None:
    """A job that finished before the folder was given is downloaded at the next start, and never again."""
    store, folder = tmp_path / "jobs.db", tmp_path / "clips"
    async with client_of(sim, store=SQLiteStore(store)) as client:
        (video,) = await (await client.submit(model_v(), key="a"))
    for _ in range(2):
        async with client_of(sim, store=SQLiteStore(store), save_to=folder, allow_private=True) as client:
            assert await kept(client, video.task_id) == folder / f"{video.task_id}.mp4"
    assert downloads_of(sim, video.task_id) == 1


async def test_a_file_that_was_not_written_down_is_not_fetched_again(sim: Simulator, tmp_path: Path) -> None:
    """The process died between the rename and the row: the file is whole, so it only has to be remembered."""
    store, folder = tmp_path / "jobs.db", tmp_path / "clips"
    folder.mkdir()
    async with client_of(sim, store=SQLiteStore(store)) as client:
        (video,) = await (await client.submit(model_v(), key="a"))
        await client.download(video, folder, allow_private=True)
    async with client_of(sim, store=SQLiteStore(store), save_to=folder, allow_private=True) as client:
        assert await kept(client, video.task_id) == folder / f"{video.task_id}.mp4"
    assert downloads_of(sim, video.task_id) == 1


async def test_one_that_cannot_be_kept_harms_no_other(sim: Simulator, tmp_path: Path) -> None:
    """A dead link is logged, the job is still awaited, the next result is kept."""
    async with client_of(sim, save_to=tmp_path, allow_private=True) as client:
        sim.script(faults.media_gone())
        (lost,) = await (await client.submit(model_v()))
        (video,) = await (await client.submit(model_v()))
        assert (await kept(client, video.task_id)).exists()
        job = await client.find(lost.task_id)
        assert job is not None
        (outcome,) = await job.outcomes()
        assert isinstance(outcome, Succeeded)
        assert outcome.file is None


async def test_a_folder_that_cannot_be_is_said_before_anything_is_sent(sim: Simulator, tmp_path: Path) -> None:
    """A file stands where the folder should: `ConfigurationError` on entering, and nothing is left open."""
    (tmp_path / "clips").write_text("a file")
    with pytest.raises(ConfigurationError, match="cannot be saved"):
        async with client_of(sim, save_to=tmp_path / "clips"):
            raise AssertionError("never entered")
    assert sim.ledger.posts == []


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saving(sim: Simulator, folder: Path, **options: Any) -> Client:
    """A client that saves results; its clock runs a thousand times too fast."""
    given = {"clock": Brisk(), "timeouts": brisk_timeouts(), "save_to": folder, "allow_private": True, **options}
    return client_of(sim, **given)


# --- waiting for files ---------------------------------------------------------------------------------------------


async def test_files_can_be_awaited(sim: Simulator, tmp_path: Path) -> None:
    """`await job.saved()` gives a path for each task, in task order, and each outcome has its file; so does a handle
    that was found again."""
    async with client_of(sim, save_to=tmp_path, allow_private=True) as client:
        job = await client.submit(model_v(count=3), key="a")
        files = await job.saved()
        assert files == tuple(tmp_path / f"{task_id}.mp4" for task_id in job.task_ids)
        assert all(file.read_bytes()[4:8] == b"ftyp" for file in files)
        assert tuple(Path(each.file or "") for each in await job.outcomes() if isinstance(each, Succeeded)) == files
        found = await client.find("a")
        assert found is not None
        assert set(await asyncio.gather(found.saved(), job.saved())) == {files}
        assert client.stats().unsaved == 0
    assert len(sim.ledger.media) == 3


async def test_only_tasks_that_succeeded_have_files(sim: Simulator, tmp_path: Path) -> None:
    """A task that failed harms no file of the others."""
    async with client_of(sim, save_to=tmp_path, allow_private=True) as client:
        sim.script(faults.failed("no face", which=[0]))
        job = await client.submit(model_v(count=2))
        with pytest.raises(TaskFailed):
            await job
        assert await job.saved() == (tmp_path / f"{job.task_ids[1]}.mp4",)


async def test_without_a_folder_nothing_can_be_awaited(sim: Simulator) -> None:
    """`ConfigurationError`, at once."""
    async with client_of(sim) as client:
        job = await client.submit(model_v())
        with pytest.raises(ConfigurationError, match="save_to"):
            await job.saved()


async def test_a_wait_for_files_ends_with_why(sim: Simulator, tmp_path: Path) -> None:
    """`WaitTimeout`, with the last failure as its cause; saving goes on, and can be awaited again."""
    async with saving(sim, tmp_path) as client:
        sim.script(faults.media_status(*[503] * 36))
        job = await client.submit(model_v())
        await job
        with pytest.raises(WaitTimeout, match="files of job") as waited:
            await job.saved(timeout=700.0)
        assert isinstance(waited.value.__cause__, DownloadError)
        assert await job.saved() == (tmp_path / f"{job.task_ids[0]}.mp4",)


async def test_a_result_that_is_gone_is_said_to_who_waits(sim: Simulator, tmp_path: Path) -> None:
    """A link that is dead, with no other one: nothing is outstanding, the log says that the result is lost."""
    async with client_of(sim, save_to=tmp_path, allow_private=True) as client:
        sim.script(faults.media_gone())
        job = await client.submit(model_v())
        with pytest.raises(ResultExpired):
            await job.saved()
        assert client.stats().unsaved == 0


async def test_who_waits_for_files_when_the_client_closes_is_told(sim: Simulator, tmp_path: Path) -> None:
    """`ClientClosed`; a new client with the same store saves them."""
    async with saving(sim, tmp_path, store=SQLiteStore(tmp_path / "jobs.db"), timeouts=brisk_timeouts(50)) as client:
        sim.script(faults.media_status(*[503] * 14))
        job = await client.submit(model_v())
        await job
        waiting = asyncio.create_task(job.saved())
        await turns_until(lambda: len(sim.ledger.media) > 1)
    with pytest.raises(ClientClosed):
        await waiting


# --- what does not come at once ------------------------------------------------------------------------------------


async def test_a_host_that_is_away_for_long_is_asked_until_it_is_back(sim: Simulator, tmp_path: Path) -> None:
    """Forty results of a host that answers 503 again and again: none is given up, and all are saved by this client."""
    async with saving(sim, tmp_path) as client:
        jobs = []
        for _ in range(40):
            sim.script(faults.media_status(*[503] * 9))
            jobs.append(await client.submit(model_v()))
        files = await asyncio.gather(*(job.saved() for job in jobs))
        assert client.stats().unsaved == 0
    assert {file.name for (file,) in files} == {f"{job.task_ids[0]}.mp4" for job in jobs} == names(tmp_path)


async def test_what_is_outstanding_is_said(sim: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By `stats()` and by the log: at the first failure, each hour, and at the end."""
    caplog.set_level(logging.WARNING, "xiling_async.jobs.auto_save")
    async with saving(sim, tmp_path, timeouts=brisk_timeouts(50)) as client:
        sim.script(faults.media_status(*[503] * 1_000))
        job = await client.submit(model_v())
        await job
        await turns_until(lambda: client.stats().unsaved == 1)
        while not any("1 results are not saved in" in line and "yet" in line for line in caplog.messages):
            await asyncio.sleep(0)
    lines = [line for line in caplog.messages if "not saved" in line]
    assert "the result of task" in lines[0] and "HTTP 503" in lines[0]
    assert "the client was closed before" in lines[-1] and job.task_ids[0] in lines[-1]


async def test_a_result_is_given_up_when_its_link_has_expired(sim: Simulator, tmp_path: Path) -> None:
    """Asked for about once an hour, and not given up before seven days: then nothing is outstanding."""
    clock = ManualClock()
    async with saving(sim, tmp_path, clock=clock, timeouts=Timeouts()) as client:
        sim.script(faults.media_status(*[418] * 1_000))  # refused at once: nothing is waited for
        job = await client.submit(model_v())
        await job
        began_at = clock.time()
        while client.stats().unsaved:
            clock.advance(600.0)
            await settle(300)
        assert (clock.time() - began_at) / 3600 >= 7 * 24 - 1
        assert 24 < len(sim.ledger.media) < 8 * 24


async def test_bytes_of_another_type_are_not_fetched_again(sim: Simulator, tmp_path: Path) -> None:
    """Whatever the bytes of a video are, and of a thumbnail: a later client finds the file, and asks for nothing."""
    samples = [b"something else", b"GIF89a\1\0", b"RIFF\x10\0\0\0WEBPVP8 ", b"\x1a\x45\xdf\xa3\x93\x42\x82\x88webm"]
    for number, sample in enumerate(samples):
        store, folder = tmp_path / f"{number}.db", tmp_path / f"{number}"
        async with client_of(sim, store=SQLiteStore(store)) as client:
            sim.script(faults.media_bytes(sample))
            video = await client.run(model_v())
        folder.mkdir()
        async with client_of(sim) as client:
            videos = [await client.download(video, folder, what="both", allow_private=True)]
            with pytest.raises(DownloadError, match="exists already"):
                await client.download(video, folder, allow_private=True)
            with pytest.raises(DownloadError, match="exists already"):
                await client.download(video, folder, what="thumbnail", allow_private=True)
        before = len(sim.ledger.media)
        async with client_of(sim, store=SQLiteStore(store), save_to=folder, allow_private=True) as client:
            assert await kept(client, video.task_id) == videos[0][0]
        assert len(sim.ledger.media) == before


# --- how much ------------------------------------------------------------------------------------------------------


async def test_a_folder_has_a_limit(sim: Simulator, tmp_path: Path) -> None:
    """`Limits.saved_bytes`: what does not fit stays outstanding, and follows when there is room."""
    one = tmp_path / "one"
    async with saving(sim, one) as client:
        (file,) = await (await client.submit(model_v())).saved()
    size = file.stat().st_size
    folder = tmp_path / "clips"
    async with saving(sim, folder, limits=Limits(saved_bytes=2 * size + 100)) as client:
        jobs = [await client.submit(model_v(f"scene {number}")) for number in range(4)]
        await asyncio.gather(*jobs)
        await turns_until(lambda: client.stats().unsaved == 2)
        while len(sim.ledger.media) < 5:  # one more was tried, and was too large
            await asyncio.sleep(0)
        await settle(300)
        files = list(folder.glob("*.mp4"))
        assert (client.stats().unsaved, len(files)) == (2, 2)
        assert sum(path.stat().st_size for path in files) <= 2 * size + 100
        for path in files:
            path.unlink()
        await asyncio.gather(*(job.saved() for job in jobs))
    assert len(names(folder)) == 2


async def test_some_of_the_disk_stays_free(sim: Simulator, tmp_path: Path) -> None:
    """`Limits.free_bytes`: nothing is saved, nothing is left of it, the log says why."""
    limits = Limits(free_bytes=1 << 60)
    async with saving(sim, tmp_path, limits=limits, timeouts=brisk_timeouts(50)) as client:
        job = await client.submit(model_v())
        await job
        with pytest.raises(WaitTimeout) as waited:
            await job.saved(timeout=700.0)
        assert "would be left" in str(waited.value.__cause__)
        assert client.stats().unsaved == 1
    assert names(tmp_path) == set()


async def test_stale_partial_files_go_when_a_client_starts(sim: Simulator, tmp_path: Path) -> None:
    """One that a kill has left beside a finished file is removed."""
    async with saving(sim, tmp_path) as client:
        (file,) = await (await client.submit(model_v())).saved()
    part = tmp_path / f"{file.stem}.video.part"
    part.write_bytes(b"old")
    part.with_name(f"{part.name}.json").write_text('{"form": 1}')
    async with saving(sim, tmp_path):
        assert names(tmp_path) == {file.name}


async def test_a_start_looks_only_at_results_without_a_file(tmp_path: Path) -> None:
    """However many jobs the store has: their listing is not read."""

    class NoListing(MemoryStore):
        def jobs(self, query: JobQuery = ALL_JOBS) -> AsyncIterator[JobRecord]:
            raise AssertionError("all jobs are walked")

    store = NoListing()
    async with Simulator() as sim:
        async with client_of(sim, store=store) as client:
            video = await client.run(model_v())
        async with client_of(sim, store=store, save_to=tmp_path, allow_private=True):
            await turns_until((tmp_path / f"{video.task_id}.mp4").exists)
