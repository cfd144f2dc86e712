"""Instructions of one create and of one callback, counted by valgrind: the same on a busy machine as on a quiet one.

`python benchmarks/instructions.py [--check | --record]` (valgrind: `apt-get install valgrind`). One process imports
all, then forks for each run, of few jobs and of many; the difference, divided by the jobs, is what one costs: our code
and all that it calls (asyncio, aiohttp, json), without the garbage collector. One caller, one connection. The same is
counted of raw aiohttp and of a bare handler, as speed.py has them: builds of Python differ, the ratio hardly does.
`--check` fails when a ratio is more than 10 % above what instructions.json has for this minor version of Python.
`--record` writes it down. The second table is the profile: what our parts of both take (parts.py).
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from parts import PARTS
from report import machine, show
from sides import LeanService
from speed import REQUEST, bare, raw, release

from xiling_async import Client, WebhookReceiver

RECORDED: Final = Path(__file__).with_name("instructions.json")
ALLOWED: Final = 1.10
FEW, MANY = 50, 250
OURS, RAW = "ours", "raw"
RUNS: Final = (  # whose, creates, callbacks
    (OURS, FEW, 0), (OURS, MANY, 0), (OURS, MANY, FEW), (OURS, MANY, MANY),
    (RAW, FEW, 0), (RAW, MANY, 0), (RAW, 0, FEW), (RAW, 0, MANY),
)  # fmt: skip
REFS: Final = re.compile(r"==(\d+)== I +refs: +([\d,]+)")


async def ours(url: str, creates: int, callbacks: int) -> None:
    """Buy so many jobs one after another, then hear of so many of them, one after another."""
    async with Client("sim-key", base_url=url, receiver=WebhookReceiver(port=0)) as client:
        jobs = [await client.submit(REQUEST) for _ in range(creates)]
        if callbacks:
            waiters = [asyncio.create_task(job.result()) for job in jobs[:callbacks]]
            await release(url, "release", {"count": callbacks}, connections=1)
            await asyncio.gather(*waiters)


async def theirs(url: str, creates: int, callbacks: int) -> None:
    """The same without this library; the callbacks are of no job."""
    if creates:
        async with raw(url) as create:
            for _ in range(creates):
                await create()
    if callbacks:
        async with bare() as there:
            await release(url, "fire", {"url": there, "count": callbacks}, connections=1)


def counted(urls: list[str]) -> None:
    """In the process that valgrind watches: fork for each run, and say which process was which."""
    asyncio.run(asyncio.sleep(0))
    gc.disable()
    children = {}
    for url, wanted in zip(urls, RUNS, strict=True):
        whose, creates, callbacks = wanted
        side = ours if whose == OURS else theirs
        children[forked(lambda: asyncio.run(side(url, creates, callbacks)))] = wanted  # noqa: B023 - run at once
    for name, part in PARTS.items():
        for times in (FEW, MANY):
            children[forked(lambda: part(times))] = ("part", name, times)  # type: ignore[assignment]  # noqa: B023
    for _ in children:
        os.wait()
    print(json.dumps(list(children.items())))


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return child


def count() -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """By `OURS` and `RAW`, instructions of one `create` and of one `callback`; those of our parts."""
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

    def each(*wanted: object, of: tuple[object, ...]) -> int:
        return int((found[wanted] - found[of]) // (MANY - FEW))

    whole = {
        whose: {
            "create": each(whose, MANY, 0, of=(whose, FEW, 0)),
            "callback": each(whose, held, MANY, of=(whose, held, FEW)),
        }
        for whose, held in ((OURS, MANY), (RAW, 0))
    }
    return whole, {name: each("part", name, MANY, of=("part", name, FEW)) for name in PARTS}


def _over(found: dict[str, dict[str, int]], before: dict[str, dict[str, int]] | None) -> list[str]:
    """What is more than allowed above the ratio on record."""
    return [
        name
        for name, number in found[OURS].items()
        if before and number / found[RAW][name] > ALLOWED * before[OURS][name] / before[RAW][name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when more than 10 % above the recorded ratios")
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
    minor = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    before = recorded.get(minor)
    if given.check and before is None:
        print(f"\nNothing is recorded for {minor}, only for {'; '.join(recorded) or 'nothing'}: not checked.")
        return 0
    found, parts = count()
    if given.check and _over(found, before):  # what comes in one piece, and what in two, is luck, worth some percent
        found, parts = count()
    over = _over(found, before)
    rows = []
    for name, number in found[OURS].items():
        past = "-" if before is None else f"{before[OURS][name] / before[RAW][name]:.3f}"
        rows.append((f"one {name}", f"{number:,}", f"{found[RAW][name]:,}", f"{number / found[RAW][name]:.3f}", past))
    show("Instructions", ("what", "xiling_async", "raw aiohttp", "ratio", "on record"), rows)
    show("Instructions of our parts", ("part", "instructions"), [(name, f"{n:,}") for name, n in parts.items()])
    if given.record:
        recorded[minor] = found | {"on": machine()}
        RECORDED.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    if given.check and over:
        print(f"\nMore than {ALLOWED - 1:.0%} above the ratio on record: {', '.join(over)}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
