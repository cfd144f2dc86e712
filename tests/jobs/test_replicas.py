"""Three replicas on one PostgreSQL behind a proxy: killed, cut off, with the database restarted. The service's own
ledger says what came of it: nothing paid twice, every outcome delivered, no 200 for a callback that is in no table.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs
from aiohttp import web
from crash import reserved_port
from pg import Wire, fresh_schema, pg_store, server

import xiling_async
from xiling_async import State
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults

PROGRAM: Final = Path(__file__).parents[1] / "replica.py"
ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(Path(xiling_async.__file__).parent.parent)}
REPLICAS: Final = 3
DEADLINE_S: Final = 240.0  # it hangs, if it has not ended by then
TRIES: Final = 600  # of the proxy, until a callback was taken
PAUSE_S: Final = 0.05


@attrs.define(eq=False)
class Replica:
    """A process, started again whenever it was killed; what all of its lives have said."""

    given: dict[str, Any]
    said: list[dict[str, Any]] = attrs.field(factory=list)
    finished: bool = False
    kills: int = 0
    is_killed: bool = False  # in the life that ends now
    errors: bytes = b""
    process: asyncio.subprocess.Process | None = None

    async def live(self, changed: Callable[[], None]) -> None:
        while not self.finished:
            self.process = process = await asyncio.create_subprocess_exec(
                sys.executable, str(PROGRAM), json.dumps(self.given),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
            )  # fmt: skip
            self.is_killed = False
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                async for line in process.stdout:
                    if line.endswith(b"\n"):  # else it was killed in the middle of it
                        self._hear(json.loads(line))
                        changed()
                self.errors += await process.stderr.read()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            assert self.finished or self.is_killed, self.errors.decode()[-2000:]

    def _hear(self, told: dict[str, Any]) -> None:
        self.finished |= told == {"finished": True}
        self.said.append(told)

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.kills += 1
            self.is_killed = True
            self.process.kill()

    @property
    def ends(self) -> dict[int, str]:
        """The last word on each order."""
        return {told["order"]: told["end"] for told in self.said if "end" in told}


@attrs.define(eq=False)
class Balancer:
    """A load balancer: the next replica in turn takes the callback; whoever is dead or says 503 is passed over."""

    ports: list[int]
    turns: itertools.count[int] = attrs.field(factory=itertools.count)
    session: aiohttp.ClientSession = attrs.field(init=False)

    async def pass_on(self, request: web.Request) -> web.Response:
        body = await request.read()
        for _ in range(TRIES):
            port = self.ports[next(self.turns) % len(self.ports)]
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.post(f"http://127.0.0.1:{port}{request.path}", data=body) as answer:
                    if answer.status != 503:
                        return web.Response(status=answer.status)
            await asyncio.sleep(PAUSE_S)  # the service's own time between two attempts, not ours to wait
        return web.Response(status=502)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/callbacks/{token}", self.pass_on)
        async with aiohttp.ClientSession() as self.session:
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            try:
                yield f"http://127.0.0.1:{runner.addresses[0][1]}/callbacks"
            finally:
                await runner.cleanup()


def scripted(sim: Simulator, count: int, seed: int) -> None:
    """What goes wrong with the next POSTs: everything that the service, or the way to it, can do."""
    menu: list[tuple[faults.Fault, ...]] = [
        (),
        (),
        (),
        (faults.drop_after_accept(),),
        (faults.drop_mid_answer(),),
        (faults.status(500, accept=True),),
        (faults.status(502, accept=True),),
        (faults.garbage(),),
        (faults.lost_callback(),),
        (faults.duplicate_callback(3),),
        (faults.early_callback(),),
        (faults.out_of_order(),),
        (faults.progress_callback(),),
        (faults.failed("no faces"),),
        (faults.rate_limited(retry_after=0),),
        (faults.drop_before_read(),),
    ]
    chosen = random.Random(seed)
    for _ in range(count):
        sim.script(*chosen.choice(menu))


@attrs.frozen
class Story:
    sim: Simulator
    replicas: list[Replica]
    records: list[JobRecord]

    @property
    def paid_by_prompt(self) -> Counter[str]:
        return Counter(str(post.body["prompt"]) for post in self.sim.ledger.posts if post.paid and post.body)

    @property
    def kills(self) -> int:
        return sum(replica.kills for replica in self.replicas)


async def told(orders: int, kills: int, restarts: int, cuts: int, *, keyed: bool = True, seed: int = 1) -> Story:
    """Run it all: kills, restarts of the database and cuts of its connections are spread over what is bought."""
    schema, rng = fresh_schema(), random.Random(seed)
    sim = Simulator()
    sim.callback_timeout = 120
    async with sim, Wire() as wire:
        scripted(sim, 3 * orders, seed)
        with contextlib.ExitStack() as ports:
            balancer = Balancer([ports.enter_context(reserved_port()) for _ in range(REPLICAS)])
            async with balancer.serving() as public_url, asyncio.timeout(DEADLINE_S):
                common = {
                    "orders": orders, "schema": schema, "dsn": wire.dsn, "base_url": sim.base_url,
                    "public_url": public_url, "keyed": keyed,
                }  # fmt: skip
                replicas = [
                    Replica({**common, "port": port, "seed": seed + place}) for place, port in enumerate(balancer.ports)
                ]
                changed = asyncio.Event()
                trouble = [*["kill"] * kills, *["restart"] * restarts, *["cut"] * cuts]
                rng.shuffle(trouble)
                async with asyncio.TaskGroup() as group:
                    for replica in replicas:
                        group.create_task(replica.live(changed.set))
                    step = orders / (len(trouble) + 1)
                    for number, what in enumerate(trouble, 1):
                        while len(sim.ledger.posts) < number * step and not all(one.finished for one in replicas):
                            changed.clear()
                            await changed.wait()
                        await _make(what, replicas, wire, rng)
                await sim.settled()
        store = pg_store(schema=schema)
        await store.open()
        records = [record async for record in store.jobs()]
        await store.close()
        return Story(sim, replicas, records)


async def _make(what: str, replicas: list[Replica], wire: Wire, rng: random.Random) -> None:
    if what == "kill":
        rng.choice(replicas).kill()
    elif what == "cut":
        wire.cut()
    else:
        await asyncio.to_thread(server().stop)
        await asyncio.to_thread(server().start)


def violations(story: Story) -> list[str]:
    """What must never be, by the service's ledger and the table."""
    found = [f"{prompt} was paid {count} times" for prompt, count in story.paid_by_prompt.items() if count > 1]
    by_task = {task_id: record for record in story.records for task_id in record.task_ids}
    for callback in story.sim.ledger.callbacks:
        record = by_task.get(callback.task_id)
        outcomes = {} if record is None else dict(zip(record.task_ids, record.outcomes, strict=True))
        is_end = callback.state in ("SUCCEEDED", "FAILED")
        if callback.status == 200 and (record is None or (is_end and outcomes[callback.task_id] is None)):
            found.append(f"a callback of {callback.task_id} got a 200 and is not in the table")
    for post in story.sim.ledger.posts:
        # Paid, its answer lost with the process that waited for it, and no callback ever: only the vendor knows.
        is_beyond_us = "lost_callback" in post.faults and not any(task_id in by_task for task_id in post.task_ids)
        if not post.paid or is_beyond_us:
            continue
        for task_id in post.task_ids:
            record = by_task.get(task_id)
            if record is None or record.state not in (State.DONE, State.FAILED):
                told = [callback.status for callback in story.sim.ledger.callbacks if callback.task_id == task_id]
                state = record and record.state.value
                found.append(f"{task_id} was paid for (faults {post.faults}, callbacks {told}), its job is {state}")
    for replica in story.replicas:
        found += [str(one) for one in replica.said if "trouble" in one]
    return found


async def test_three_replicas_that_are_killed_buy_everything_once(deep: bool) -> None:
    """60 orders (2,000 with `--deep`), each of them given to all three replicas; kills, restarts of the database and
    cuts of all its connections in between. In the end every replica knows the end of every order."""
    orders, kills, restarts, cuts = (2_000, 20, 5, 10) if deep else (60, 4, 1, 2)
    story = await told(orders, kills, restarts, cuts)
    assert violations(story) == []
    assert story.kills >= kills / 2, "some were between two lives when it was their turn"
    paid = story.paid_by_prompt
    assert len(paid) > 0.8 * orders
    beyond = {
        str(post.body["prompt"]) for post in story.sim.ledger.posts if "lost_callback" in post.faults and post.body
    }
    for replica in story.replicas:
        assert set(replica.ends) == set(range(orders))
        in_doubt = {f"order {number}" for number, end in replica.ends.items() if end == "SubmitUncertain"}
        assert in_doubt & set(paid) <= beyond, "what a callback told of is known"
    ends = [replica.ends for replica in story.replicas]
    assert all({end[number] for end in ends} != {"NoneType", "TaskFailed"} for number in range(orders))


async def test_without_keys_the_same_story_pays_twice() -> None:
    """The negative control: what the kills and the shared orders would cost."""
    story = await told(30, 2, 0, 0, keyed=False)
    assert any("was paid" in violation for violation in violations(story))
