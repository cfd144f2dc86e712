"""Promise 11: a download is either absent or whole, also for a process that is killed (`kill -9`) in its midst."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Brisk, brisk_timeouts
from support import model_v

import xiling_async
from xiling_async import Client, Polling
from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.faults import Fault

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork, no kill -9")

MEDIA = Path(sys.modules[Simulator.__module__].__file__ or "").parent / "media/samples"
MP4 = (MEDIA / "landscape.mp4").read_bytes()
LIVELY_S = 20.0  # what must happen happens within this, or the test fails; in truth it takes milliseconds
KILLED = -signal.SIGKILL


class Worker:
    """The process that downloads; each order is a child of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def begin(self, **order: Any) -> int:
        """The pid of the one who does it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order, default=str).encode())
        self._process.stdin.write(b"\n")
        return int((await self._heard())["pid"])

    async def end(self) -> dict[str, Any]:
        return await self._heard()

    async def do(self, **order: Any) -> dict[str, Any]:
        await self.begin(**order)
        return await self.end()

    async def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(LIVELY_S):
            heard: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return heard


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    program = Path(__file__).parents[1] / "download_worker.py"
    paths = [str(Path(xiling_async.__file__).parent.parent), str(program.parent)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    yield Worker(process)
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(LIVELY_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def link_of(sim: Simulator, *given: Fault) -> str:
    """The link of a result with these faults."""
    sim.script(*given)
    options: dict[str, Any] = {"clock": Brisk(), "timeouts": brisk_timeouts(), "polling": Polling(every=10.0)}
    async with Client(sim.api_key, base_url=sim.base_url, **options) as client:
        return (await client.run(model_v())).video_url


def is_absent_or_whole(path: Path, whole: bytes = MP4) -> bool:
    return not path.exists() or path.read_bytes() == whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("given", [(), (faults.no_hash(),), (faults.no_etag(),)], ids=["", "no hash", "no etag"])
async def test_promise_11_a_download_is_either_absent_or_whole(
    sim: Simulator, tmp_path: Path, worker: Worker, given: tuple[Fault, ...]
) -> None:
    """Killed again and again, each time a little later: no half file has the name of a whole one, no byte that had
    come is fetched twice, and in the end there is the file and nothing beside it."""
    url, path = await link_of(sim, faults.cut_media(2_000, times=None), *given), tmp_path / "dawn.mp4"
    for size in (0, 1, 5_000, 9_000, 20_000, 20_001, 40_000, len(MP4)):
        assert (await worker.do(url=url, to=path, bytes=size))["status"] == KILLED
        assert is_absent_or_whole(path)
        assert names(tmp_path) <= {"dawn.mp4", "dawn.mp4.part", "dawn.mp4.part.json"}
    ended = await worker.do(url=url, to=path)
    assert (ended["status"], ended["said"]) == (0, "done")
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"dawn.mp4"})
    fetched = sum(record.sent for record in sim.ledger.media)
    assert len(MP4) <= fetched <= len(MP4) + 9 * 2_000  # of each life at most one answer is lost


async def test_promise_11_killed_while_nothing_comes(sim: Simulator, tmp_path: Path, worker: Worker) -> None:
    """The host has stopped in the midst of a large file; the next process asks for the rest."""
    url, path = await link_of(sim, faults.big_media(4 << 20), faults.stalled_media(3 << 20)), tmp_path / "dawn.mp4"
    pid = await worker.begin(url=url, to=path)
    part = tmp_path / "dawn.mp4.part"
    async with asyncio.timeout(LIVELY_S):
        await sim.wait_for_stalls(1)
        while not part.exists() or part.stat().st_size < 3 << 20:
            await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    assert (await worker.end())["status"] == KILLED
    assert not path.exists()
    assert (await worker.do(url=url, to=path))["said"] == "done"
    assert (path.stat().st_size, names(tmp_path)) == (4 << 20, {"dawn.mp4"})
    assert [record.range for record in sim.ledger.media] == [None, f"bytes={3 << 20}-"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
async def test_promise_11_killed_before_each_step_on_the_disk(
    sim: Simulator, tmp_path: Path, worker: Worker, overwrite: bool
) -> None:
    """Every opening, cutting, linking, renaming and removing: before, the old file or none; after, the new one."""
    url = await link_of(sim)
    before = b"an older file" if overwrite else None
    steps, ended = 0, dict[str, Any](status=KILLED)
    while ended["status"] == KILLED:
        steps += 1
        folder = tmp_path / str(steps)
        folder.mkdir()
        path = folder / "dawn.mp4"
        if before is not None:
            path.write_bytes(before)
        ended = await worker.do(url=url, to=path, step=steps, overwrite=overwrite)
        if path.exists() and path.read_bytes() == MP4 and not overwrite:
            again = await worker.do(url=url, to=path)
            assert ended["status"] == 0 or "exists already" in again["said"]
            assert path.read_bytes() == MP4
        assert path.read_bytes() in (before, MP4) if path.exists() else before is None
        again = await worker.do(url=url, to=path, overwrite=True)
        assert (again["status"], again["said"]) == (0, "done"), steps
        assert (path.read_bytes(), names(folder)) == (MP4, {"dawn.mp4"}), steps
    assert ended["said"] == "done"
    assert steps > 6
    assert steps == ended["steps"] + 1  # there was none at which it was not killed


async def test_promise_11_the_control_fails(sim: Simulator, tmp_path: Path, worker: Worker) -> None:
    """What one would write by hand leaves a half file under the name of a whole one: this witness sees it."""
    url, path = await link_of(sim, faults.slow_media(5_000, 0.001)), tmp_path / "dawn.mp4"
    assert (await worker.do(url=url, to=path, bytes=9_000, naive=True))["status"] == KILLED
    assert not is_absent_or_whole(path)
