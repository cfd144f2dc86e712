"""The extra `speedups`: everything works with uvloop, and everything works without it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from support import client_of, model_v

from xiling_async import SQLiteStore, WebhookReceiver
from xiling_async.cli import runtime
from xiling_async.simulator import Simulator, faults

uvloop = pytest.importorskip("uvloop", reason="not made for this system")

WITHOUT = """
import sys
sys.modules["uvloop"] = None
from xiling_async.cli import main, runtime
assert runtime.LOOP_FACTORY is None
main()
"""


def test_a_command_runs_in_uvloop() -> None:
    """Where it is installed."""

    async def loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert runtime.run(loop()).partition(".")[0] == "uvloop"


def test_the_promise_holds_in_uvloop(tmp_path: Path) -> None:
    """An early and a doubled callback, a lost answer: each job is awaited, each was paid once, nothing is left."""

    async def story() -> tuple[int, int, set[str]]:
        async with Simulator() as sim:
            sim.script(faults.drop_after_accept())
            sim.script(faults.duplicate_callback())
            sim.script(faults.early_callback())
            async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db"), receiver=WebhookReceiver(port=0)) as on:
                jobs = [await on.submit(model_v(f"take {number}")) for number in range(20)]
                results = await asyncio.gather(*jobs)
            left = {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("xiling")}
            return sim.ledger.paid_submits, len(results), left

    assert runtime.run(story()) == (20, 20, set())


def test_a_command_runs_without_the_extra(tmp_path: Path) -> None:
    """The demo, without uvloop."""
    command = [sys.executable, "-c", WITHOUT, "demo", "--jobs", "3", "--speed", "50", "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "nothing was paid for twice" in ran.stdout
