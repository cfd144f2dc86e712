"""One hour of a mixed worker in virtual time: nothing that it holds grows."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

import xiling_async
from xiling_async.simulator import Simulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it counts descriptors in /proc")

PROGRAM: Final = Path(__file__).parents[1] / "hour_worker.py"
ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(Path(xiling_async.__file__).parent.parent)}
MEMORY: Final = "/dev/shm"  # no power is cut here: a disk would only make it slow
SLACK: Final = {
    "memory": 65_536,  # free lists of the interpreter; a record is 1 KB, so 480 jobs would be 480 KB
    "descriptors": 4,  # connections that are kept for the next request
    "tasks": 4,
    "threads": 0,
    "rows": 10,
    "file": 131_072,
}


async def hour(per_minute: int) -> tuple[list[dict[str, int]], Simulator]:
    """What the worker held after 20, 40 and 60 minutes; the service is in this process, and grows here."""
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
        async with Simulator() as sim:
            given = {"folder": folder, "base_url": sim.base_url, "per_minute": per_minute}
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(PROGRAM), json.dumps(given),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
            )  # fmt: skip
            said, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()[-2000:]
            return [json.loads(line) for line in said.splitlines()], sim


async def test_nothing_grows_in_an_hour_of_work(deep: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Submits, a map with retries, failures, lost callbacks, consumers that drop a tenth, a purge every ten minutes:
    memory, descriptors, tasks, threads, rows and the file are after an hour what they were after 20 minutes."""
    told, sim = await hour(per_minute=40 if deep else 5)
    with capsys.disabled():
        print()
        for at in told:
            print(", ".join(f"{name} {value:,}" for name, value in at.items()))
        print(f"{len(sim.ledger.posts):,} POSTs, {len(sim.ledger.gets):,} GETs")
    first, _, last = told
    assert [at["minute"] for at in told] == [20, 40, 60]
    assert sim.ledger.paid_submits == len(sim.ledger.posts)
    assert min(last["handed_over"], last["again"], last["acknowledged"], len(sim.ledger.gets)) > 0
    assert last["acknowledged"] > 2 * first["acknowledged"]
    for name, slack in SLACK.items():
        assert last[name] <= first[name] + slack, name
