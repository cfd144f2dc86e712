"""A process that downloads and is killed: reads orders as lines of JSON, and forks a child for each of them.

It says `{"pid": ...}` when a child begins, and `{"status": ..., "steps": ...}` when it has ended (-9: killed).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
from hosts import Brisk, brisk_timeouts

from xiling_async import Client, Video, XilingError

# What changes a folder says so before it does it: each is a step at which a process may die.
STEPS = frozenset({"open", "os.truncate", "os.link", "os.rename", "os.remove"})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Counts what is done to files of this folder; dies before the n-th."""

    def __init__(self, folder: str, deadly: int | None) -> None:
        self.made = 0
        self._folder = folder
        self._deadly = deadly

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if event in STEPS and (event == "os.truncate" or str(given[0]).startswith(self._folder)):
            self.made += 1
            if self.made == self._deadly:
                die()


async def download(order: dict[str, Any]) -> None:
    def progress(done: int, total: int | None) -> None:
        if order.get("bytes") is not None and done >= order["bytes"]:
            die()

    video = Video(task_id="i2v-1", video_url=order["url"])
    async with Client("sim-key", base_url="http://127.0.0.1:9/v1", clock=Brisk(), timeouts=brisk_timeouts()) as client:
        await client.download(
            video, order["to"], allow_private=True, overwrite=order.get("overwrite", False), progress=progress
        )


async def naive(order: dict[str, Any]) -> None:
    """What one would write by hand: the control that has to fail."""
    async with aiohttp.ClientSession() as session, session.get(order["url"]) as response:
        with Path(order["to"]).open("wb", buffering=0) as file:
            async for chunk in response.content.iter_any():
                file.write(chunk)
                if file.tell() >= order["bytes"]:
                    die()


def child(order: dict[str, Any], answer: int) -> None:
    steps = Steps(str(Path(order["to"]).parent), order.get("step"))
    sys.addaudithook(steps)
    try:
        asyncio.run((naive if order.get("naive") else download)(order))
        said = "done"
    except XilingError as error:
        said = str(error)
    os.write(answer, json.dumps({"said": said, "steps": steps.made}).encode())
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            child(json.loads(line), theirs)
        os.close(theirs)
        print(json.dumps({"pid": pid}), flush=True)
        with os.fdopen(ours, "rb") as pipe:
            told = pipe.read() or b"{}"
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **json.loads(told)}), flush=True)


if __name__ == "__main__":
    main()
