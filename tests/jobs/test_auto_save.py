"""Results are kept as soon as they are known, once, and the store remembers where."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support import client_of, model_v

from xiling_async import Client, ConfigurationError, SQLiteStore, Succeeded
from xiling_async.simulator import Simulator, faults


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
