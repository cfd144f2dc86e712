"""The witness of kills: starts workers, kills them, and judges from the service's own ledger what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
from crash_worker import PROGRAM, Order

import xiling_async
from xiling_async.simulator import Simulator
from xiling_async.simulator.ledger import TERMINAL, PostRecord

LIVELY_S: Final = 20.0  # what must happen happens within this, or the test fails; in truth it takes milliseconds


# --- starting and killing --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for a receiver that comes and goes: bound here without listening, so that nobody else is given it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = int(holder.getsockname()[1])
        if sys.platform != "linux":
            holder.close()  # elsewhere a second socket could not be bound to it
        yield port


@attrs.define(eq=False)
class Lane:
    """A fork server, the port of its workers, and the one service that all of them buy from."""

    sim: Simulator
    folder: Path
    port: int
    orders: int
    output: asyncio.StreamReader
    base_url: str
    said: list[dict[str, Any]] = attrs.field(factory=list)  # by the worker that runs now
    progress: int = 0  # what was ever said
    pid: int = 0
    dies: str = ""

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    async def start(self, jobs: list[tuple[str, str, int]], *, dies: str = "", writes_late: bool = False) -> None:
        """Have a worker forked; it runs until it dies, or is told that it is enough."""
        order = Order(
            base_url=self.base_url,
            api_key=self.sim.api_key,
            db=str(self.folder / "jobs.db"),
            port=self.port,
            results=str(self.results),
            jobs=jobs,
            dies=dies,
            writes_late=writes_late,
        )
        self.said.clear()
        self.dies = dies
        os.write(self.orders, json.dumps(attrs.asdict(order)).encode() + b"\n")
        await self.until_said("forked")
        self.pid = int(self.find("forked")[0]["pid"])

    async def listen(self) -> None:
        async for line in self.output:
            self.said.append(json.loads(line))
            self.progress += 1
            self.sim.ledger.happened()  # so that one condition can speak of both
        self.said.append({"said": "crash", "trace": "the fork server has ended"})
        self.sim.ledger.happened()

    def find(self, what: str, **known: object) -> list[dict[str, Any]]:
        wanted = {"said": what, **known}.items()
        return [line for line in self.said if all(line.get(name) == value for name, value in wanted)]

    async def until_said(self, what: str, **known: object) -> None:
        await self.until(lambda: bool(self.find(what, **known)))

    async def until(self, holds: Any) -> None:
        """Wait until this holds, of what was said or what the service saw; a worker that crashed ends the wait."""

        def holds_or_ended() -> bool:
            return bool(holds()) or bool(self.find("crash"))

        try:
            async with asyncio.timeout(LIVELY_S):
                await self.sim.ledger.until(holds_or_ended)
        except TimeoutError:
            raise AssertionError(f"nothing happened for {LIVELY_S:g} s; {self.sim!r}; said: {self.said}") from None
        for crash in self.find("crash"):
            raise AssertionError(crash["trace"])

    async def kill(self) -> None:
        if not self.find("exit"):
            os.kill(self.pid, signal.SIGKILL)
        await self.dead()

    async def dead(self) -> None:
        """Wait for the end of a worker that was killed, by us or by itself."""
        await self.until_said("exit")
        assert self.find("exit")[0]["code"] == -signal.SIGKILL, self.said

    async def enough(self) -> None:
        """Let the worker say what is left open, and leave."""
        os.kill(self.pid, signal.SIGTERM)
        await self.until_said("exit")
        assert self.find("exit")[0]["code"] == 0, self.said

    @property
    def has_fired(self) -> bool:
        return bool(self.find("fired"))


@attrs.frozen(eq=False)
class Forge:
    """A fork server that serves many lanes, one after the other, in whatever event loop they are."""

    server: subprocess.Popen[bytes]
    port: int

    @contextlib.asynccontextmanager
    async def lane(self, folder: Path, **service: Any) -> AsyncIterator[Lane]:
        """A fresh service and a fresh folder."""
        assert self.server.stdin is not None and self.server.stdout is not None
        folder.mkdir()
        output = asyncio.StreamReader()
        pipe = os.fdopen(os.dup(self.server.stdout.fileno()), "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), pipe
        )
        async with Simulator(**service) as sim:
            lane = Lane(sim, folder, self.port, self.server.stdin.fileno(), output, sim.base_url)
            listening = asyncio.create_task(lane.listen())
            try:
                yield lane
            finally:
                if lane.pid and not lane.find("exit"):
                    await lane.kill()
                listening.cancel()
                await asyncio.wait([listening])
                transport.close()


@contextlib.contextmanager
def forge() -> Iterator[Forge]:
    environment = {**os.environ, "PYTHONPATH": str(Path(xiling_async.__file__).parents[1])}
    command = [sys.executable, str(PROGRAM)]
    with (
        reserved_port() as port,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment) as server,
    ):
        yield Forge(server, port)


# --- judging ---------------------------------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Totals:
    """What a campaign of kills came to."""

    kills: int = 0
    idle_kills: int = 0  # when nothing was going on any more
    posts: int = 0
    paid: int = 0
    tasks: int = 0
    delivered: int = 0  # tasks
    adopted: int = 0  # jobs that were uncertain, and ended
    uncertain: int = 0  # jobs that were paid, and are listed as uncertain
    unpaid: int = 0  # jobs that are listed as uncertain, and were not paid
    violations: list[str] = attrs.field(factory=list)

    def __str__(self) -> str:
        counts = attrs.asdict(self, filter=lambda attribute, _: attribute.name != "violations")
        return ", ".join(f"{name} {value}" for name, value in counts.items()) + f", violations {len(self.violations)}"


def key_of(post: PostRecord) -> str:
    """The job's key: the first word of its prompt."""
    return str((post.body or {}).get("prompt", "?")).split()[0]


def judge(lane: Lane, keys: list[str], totals: Totals, *, repeats: bool) -> None:
    """Compare what the worker told its user with what the service saw. `repeats`: callbacks come until taken."""
    lines = [json.loads(line) for line in lane.results.read_text().splitlines()]
    by_key = defaultdict(list)
    for line in lines:
        by_key[line["key"]].append(line)
    posts = defaultdict(list)
    for post in lane.sim.ledger.posts:
        posts[key_of(post)].append(post)
    tokens = Counter(post.callback_url for post in lane.sim.ledger.posts)
    totals.violations += [f"one callback URL in {count} POSTs" for count in tokens.values() if count > 1]
    totals.violations += [f"{key}: nobody submitted it" for key in posts if key not in keys]
    if repeats:
        totals.violations += [f"{task_id}: no callback was taken" for task_id in lane.sim.ledger.unacknowledged]
    totals.posts += len(lane.sim.ledger.posts)
    totals.tasks += len(lane.sim.ledger.task_ids)
    for key in keys:
        verdict = Verdict(lane, key, by_key[key], posts[key])
        totals.violations += [f"{key}: {violation}" for violation in verdict.violations()]
        verdict.count(totals)


@attrs.define(eq=False)
class Verdict:
    """One job: what its user was told, and what the service saw of it."""

    lane: Lane
    key: str
    lines: list[dict[str, Any]]
    posts: list[PostRecord]

    @property
    def paid(self) -> list[PostRecord]:
        return [post for post in self.posts if post.paid]

    @property
    def ids(self) -> set[str]:
        return {task_id for post in self.paid for task_id in post.task_ids}

    @property
    def acknowledged(self) -> set[str]:
        """The tasks whose end was called back, and answered 200."""
        callbacks = self.lane.sim.ledger.callbacks
        return {
            end.task_id for end in callbacks if end.task_id in self.ids and end.state in TERMINAL and end.status == 200
        }

    def said(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["said"] == what]

    @property
    def knew_ids(self) -> bool:
        return any(line["state"] == "accepted" and len(line["ids"]) == line["wanted"] for line in self.said("bought"))

    def violations(self) -> Iterator[str]:
        if len(self.paid) > 1:
            yield f"PAID {len(self.paid)} TIMES"
        for post in self.posts[:-1]:
            if post.status != 429:
                yield f"sent again after {post.faults or 'a plain answer'} (status {post.status})"
        if self.said("refused"):
            yield f"refused: {self.said('refused')}"
        last = self.lines[-1] if self.lines else None
        if last is None or last["said"] not in ("ended", "left"):
            yield f"nothing is known of it at the end: {last}"
            return
        statuses = self.lane.sim.ledger.tasks
        truth = {(task_id, statuses[task_id]) for task_id in self.ids}
        for line in (line for line in self.lines if "outcomes" in line):
            told = {tuple(outcome) for outcome in line["outcomes"]}
            if not told <= truth or (line["said"] == "ended" and told != truth):
                yield f"told {told}, which is not {truth}"
        if last["said"] == "left":
            yield from self._may_be_left(last)

    def _may_be_left(self, last: dict[str, Any]) -> Iterator[str]:
        if self.said("ended"):
            yield "it had ended before"
        if self.knew_ids:
            yield "its ids were recorded, and it was not delivered"
        if self.ids and self.acknowledged == self.ids:
            yield "its callbacks were taken, and it was not delivered"
        if missing := self.acknowledged - {task_id for task_id, _ in last["outcomes"]}:
            yield f"callbacks were taken and forgotten: {missing}"
        if not last["ids"] and last["state"] != "uncertain":
            yield f"it is {last['state']} instead of uncertain"

    def count(self, totals: Totals) -> None:
        ended, was_uncertain = self.said("ended"), any(line["state"] == "uncertain" for line in self.said("bought"))
        totals.paid += len(self.paid)
        totals.delivered += len(ended[-1]["outcomes"]) if ended else 0
        totals.adopted += bool(ended) and was_uncertain
        totals.uncertain += bool(self.paid) and not ended
        totals.unpaid += not self.paid


# --- coming to an end ------------------------------------------------------------------------------------------------


async def bring_to_an_end(
    lane: Lane, jobs: list[tuple[str, str, int]], *, repeats: bool, writes_late: bool = False
) -> None:
    """A last worker, undisturbed: all that can be known is told; the rest is listed."""
    await lane.start(jobs, writes_late=writes_late)
    for key, _, _ in jobs:
        await lane.until(lambda key=key: lane.find("bought", key=key) or lane.find("refused", key=key))
    await lane.sim.settled()
    if repeats:
        await call_back_again(lane)
    for key, _, _ in jobs:
        await lane.until(lambda key=key: is_told(lane, key))
    await lane.enough()


async def call_back_again(lane: Lane) -> None:
    """What a sender does that repeats its callbacks until they are taken."""
    await lane.sim.settled()
    for task_id in lane.sim.ledger.unacknowledged:
        await lane.sim.callback(task_id)


def is_told(lane: Lane, key: str) -> bool:
    """Its user has all that there is to know: also when its ids are not known, and its callbacks were not all taken."""
    if lane.find("ended", key=key) or lane.find("refused", key=key):
        return True
    bought = lane.find("bought", key=key)[-1]
    verdict = Verdict(lane, key, [], [post for post in lane.sim.ledger.posts if key_of(post) == key])
    has_ids = len(bought["ids"]) == bought["wanted"]
    return not has_ids and not (verdict.ids and verdict.acknowledged == verdict.ids)
