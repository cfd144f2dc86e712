"""Instructions of one create and of one callback, counted by valgrind: the same on a busy machine as on a quiet one.

`python benchmarks/instructions.py [--check | --record]` (valgrind: `apt-get install valgrind`). One process imports
all, then forks for each run, of few jobs and of many; the difference, divided by the jobs, is what one costs: our code
and all that it calls (asyncio, aiohttp, json), without the garbage collector. One caller, one connection. `--check`
fails when it is more than 10 % above what instructions.json has for this minor version of Python and this version of
aiohttp; another build of the same Python may differ by some percent. `--record` writes it down.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import aiohttp
from report import machine, show
from sides import LeanService

from xiling_async import Client, ImageToVideo, WebhookReceiver

RECORDED: Final = Path(__file__).with_name("instructions.json")
ALLOWED: Final = 1.10
FEW, MANY = 50, 250
RUNS: Final = ((FEW, 0), (MANY, 0), (MANY, FEW), (MANY, MANY))  # creates, callbacks
REFS: Final = re.compile(r"==(\d+)== I +refs: +([\d,]+)")
REQUEST: Final = ImageToVideo(
    model="V",
    prompt="A running golden retriever, sunny meadow, high quality, cinematic feel",
    image_url="https://example.com/start_frame.jpg",
    aspect_ratio="16:9",
    aspect_resolution="1080p",
    duration=6,
)


async def run(url: str, creates: int, callbacks: int) -> None:
    """Buy so many jobs one after another, then hear of so many of them, one after another."""
    async with Client("sim-key", base_url=url, receiver=WebhookReceiver(port=0)) as client:
        jobs = [await client.submit(REQUEST) for _ in range(creates)]
        if callbacks:
            waiters = [asyncio.create_task(job.result()) for job in jobs[:callbacks]]
            given = {"connections": 1, "count": callbacks}
            async with aiohttp.ClientSession() as session, session.post(f"{url}/control/release", json=given):
                await asyncio.gather(*waiters)


def counted(urls: list[str]) -> None:
    """In the process that valgrind watches: fork for each run, and say which process was which."""
    asyncio.run(asyncio.sleep(0))
    gc.disable()
    children = {}
    for url, wanted in zip(urls, RUNS, strict=True):
        child = os.fork()
        if not child:
            asyncio.run(run(url, *wanted))
            os._exit(0)
        children[child] = wanted
    for _ in children:
        os.wait()
    print(json.dumps(list(children.items())))


def count() -> dict[str, int]:
    services = [LeanService() for _ in RUNS]  # one each: they would hear each other's callbacks
    try:
        for service in services:
            service.control("set", callbacks="held")
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = [*valgrind, sys.executable, __file__, "--counted", *(service.url for service in services)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    finally:
        for service in services:
            service.__exit__(None, None, None)
    if done.returncode:
        raise RuntimeError(done.stderr)
    refs = {int(process): int(number.replace(",", "")) for process, number in REFS.findall(done.stderr)}
    found = {tuple(wanted): refs[child] for child, wanted in json.loads(done.stdout)}
    return {
        "create": round((found[MANY, 0] - found[FEW, 0]) / (MANY - FEW)),
        "callback": round((found[MANY, MANY] - found[MANY, FEW]) / (MANY - FEW)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when more than 10 % above the recorded figures")
    parser.add_argument("--record", action="store_true", help="write them into instructions.json")
    parser.add_argument("--quick", action="store_true", help="nothing else than without it")
    parser.add_argument("--counted", nargs="+", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.counted:
        counted(given.counted)
        return 0
    if shutil.which("valgrind") is None:
        print("\nvalgrind is not installed: instructions are not counted.")
        return 0
    versions = f"Python {sys.version_info[0]}.{sys.version_info[1]}, aiohttp {version('aiohttp')}"
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    before = recorded.get(versions)
    if given.check and before is None:
        print(f"\nNothing is recorded for {versions}, only for {'; '.join(recorded) or 'nothing'}: not checked.")
        return 0
    found = count()
    rows = []
    for name, number in found.items():
        past = ("-", "-") if before is None else (f"{before[name]:,}", f"{number / before[name]:.3f}")
        rows.append((f"one {name}", f"{number:,}", *past))
    show("Instructions", ("what", "counted", "recorded", "ratio"), rows)
    if given.record:
        recorded[versions] = found | {"on": machine()}
        RECORDED.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    if given.check and before is not None:
        over = [name for name, number in found.items() if number > ALLOWED * before[name]]
        if over:
            print(f"\nMore than {ALLOWED - 1:.0%} above the recorded figure: {', '.join(over)}.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
