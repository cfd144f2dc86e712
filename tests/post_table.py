"""What can go wrong with one paid POST, as a table: how often it was sent, whether it was paid, what the caller got.

`test_promises.py` runs every row against the simulator and compares with its ledger; the README shows the same table
(`python tests/post_table.py` prints it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Final

from attrs import frozen
from support import IMAGE, Proxy, client_of, closed_port, gone, model_v, pumped, settle, started

from xiling_async import Job, XilingError
from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.faults import Fault
from xiling_async.testing.clock import ManualClock

MARKER: Final = "<!-- post-table -->"

PAGE: Final = b"<html><body><h1>Gateway</h1></body></html>"
VIDEO: Final = "a video, when its callback comes"
NONE: Final = "nothing to wait for"
DOUBT: Final = "only a callback could tell"


class Way(Enum):
    """How the fault gets between the client and the service."""

    ONCE = auto()  # the service's, at the first POST
    ALWAYS = auto()  # the service's, at every POST
    CLOSED_PORT = auto()
    CUT_BODY = auto()
    NO_HTTP = auto()
    CANCEL = auto()
    CLOSE = auto()


@frozen(kw_only=True)
class Row:
    """One fault, and what must be seen: `posts` and `paid` by the service, `caller` by who submitted."""

    fault: str
    given: tuple[Fault, ...] = ()
    way: Way = Way.ONCE
    posts: int
    paid: int
    caller: str
    then: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.fault, str(self.posts), str(self.paid), self.caller, self.then


def _row(fault: str, given: Fault | None, posts: int, paid: int, caller: str, then: str, way: Way = Way.ONCE) -> Row:
    return Row(fault=fault, given=(given,) if given else (), posts=posts, paid=paid, caller=caller, then=then, way=way)


UNSURE: Final = "the job, `uncertain`"
BOUGHT: Final = "the job, `accepted`"

TABLE: Final = (
    #    fault                                             given                            posts paid caller  then
    _row("none",                                        None,                                  1, 1, BOUGHT, VIDEO),
    _row("connection refused, until the client gives up", None,
         0, 0, "`NotSent`, charged: no", NONE, Way.CLOSED_PORT),
    _row("dropped before the body is read",             faults.drop_before_read(),             1, 0, UNSURE, DOUBT),
    _row("dropped in the middle of the body",           None,
         1, 0, UNSURE, DOUBT, Way.CUT_BODY),
    _row("dropped after the body, no answer",           faults.drop_after_accept(),            1, 1, UNSURE, VIDEO),
    _row("dropped in the middle of the answer",         faults.drop_mid_answer(),              1, 1, UNSURE, VIDEO),
    _row("no answer in time, not taken",                faults.hang_before_accept(),           1, 0, UNSURE, DOUBT),
    _row("no answer in time, taken",                    faults.hang(),                         1, 1, UNSURE, VIDEO),
    _row("an answer that is not HTTP",                  None,
         1, 1, UNSURE, VIDEO, Way.NO_HTTP),
    _row("400, with the API's error",                   faults.business_error(100001, "Parameter error", http=400),
         1, 0, "`Rejected`, charged: no", NONE),
    _row("401, with the API's error",                   faults.business_error(100002, "Invalid token", http=401),
         1, 0, "`Unauthorized`, charged: no", NONE),
    _row("413, with the API's error",                   faults.status(413),
         1, 0, "`Rejected`, charged: no", NONE),
    _row("200, with the API's error",                   faults.business_error(100005, "Prompt too long"),
         1, 0, "`Rejected`, charged: no", NONE),
    _row("200, with an undocumented error",             faults.business_error(999999, "Out of credit"),
         1, 0, "`ServiceError`, charged: no", NONE),
    _row("403, with a gateway's page",                  faults.status(403, body=PAGE),         1, 0, UNSURE, DOUBT),
    _row("413, with a gateway's page",                  faults.status(413, body=PAGE),         1, 0, UNSURE, DOUBT),
    _row("429, once",                                   faults.rate_limited(),                 2, 1, BOUGHT, VIDEO),
    _row("429 with Retry-After, once",                  faults.rate_limited(7),                2, 1, BOUGHT, VIDEO),
    _row("429, until the client gives up",              faults.rate_limited(7),
         9, 0, "`RateLimited`, charged: no", NONE, Way.ALWAYS),
    _row("500, not taken",                              faults.status(500),                    1, 0, UNSURE, DOUBT),
    _row("500, taken",                                  faults.status(500, accept=True),       1, 1, UNSURE, VIDEO),
    _row("502, with a gateway's page", faults.status(502, accept=True, body=PAGE), 1, 1, UNSURE, VIDEO),
    _row("503 with Retry-After",                        faults.status(503, retry_after=1),     1, 0, UNSURE, DOUBT),
    _row("504, taken", faults.status(504, accept=True, body=PAGE), 1, 1, UNSURE, VIDEO),
    _row("200 with a page",                             faults.garbage(),                      1, 1, UNSURE, VIDEO),
    _row("200 with a page, not taken",                  faults.garbage(accept=False),          1, 0, UNSURE, DOUBT),
    _row("200 with no body",                            faults.garbage(b""),                   1, 1, UNSURE, VIDEO),
    _row("200 with half a JSON", faults.garbage(b'{"code": 0, "data": {"task_i'), 1, 1, UNSURE, VIDEO),
    _row("200 with data null",                          faults.answer_data(None),              1, 1, UNSURE, VIDEO),
    _row("200 with no ids",                             faults.answer_data({"task_ids": []}),  1, 1, UNSURE, VIDEO),
    _row("200 with ids that are no text",               faults.answer_data({"task_ids": [None]}), 1, 1, UNSURE, VIDEO),
    _row("307 to the same place",                       faults.redirect("/v1/image_to_video"), 1, 0, UNSURE, DOUBT),
    _row("302 to elsewhere",                            faults.redirect("/elsewhere", 302),    1, 0, UNSURE, DOUBT),
    _row("more tasks than were asked for",              faults.ids(3),
         1, 1, "`ProtocolError`, charged: yes", VIDEO),
    _row("the caller is cancelled while it is sent",    None,
         1, 1, "`CancelledError`; the job is kept", VIDEO, Way.CANCEL),
    _row("the client is closed while it is sent",       None,
         1, 1, BOUGHT, "the store keeps the job", Way.CLOSE),
)  # fmt: skip


def rendered(rows: Iterable[tuple[str, ...]]) -> str:
    """The table as Markdown."""
    lines = [("what goes wrong", "POSTs seen", "paid", "`submit` gives", "then"), ("---", "--:", "--:", "---", "---")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *rows])


# --- running a row -------------------------------------------------------------------------------------------------


async def seen(row: Row) -> tuple[str, ...]:
    """Run a row with real sockets; its cells as they turned out."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim:
        sim.default(*row.given) if row.way is Way.ALWAYS else sim.script(*row.given)
        match row.way:
            case Way.CLOSED_PORT:
                with closed_port() as port:
                    caller, then = await _through(sim, clock, base_url=f"http://127.0.0.1:{port}/v1")
            case Way.CUT_BODY:
                async with Proxy(sim, cut=True) as proxy:
                    caller, then = await _through(sim, clock, base_url=proxy.base_url)
            case Way.NO_HTTP:
                async with Proxy(sim, answer=b"SSH-2.0-OpenSSH_9.6\r\n") as proxy:
                    caller, then = await _through(sim, clock, base_url=proxy.base_url)
            case Way.CANCEL:
                caller, then = await _cancelled(sim, clock)
            case Way.CLOSE:
                caller, then = await _closed(sim, clock)
            case _:
                caller, then = await _through(sim, clock)
        await sim.ledger.until(lambda: len(sim.ledger.posts) >= row.posts)
        assert sim.ledger.gets == [], "nothing here is the sweeper's"
        return row.fault, str(len(sim.ledger.posts)), str(sim.ledger.paid_submits), caller, then


async def _through(sim: Simulator, clock: ManualClock, base_url: str | None = None) -> tuple[str, str]:
    """Submit; then the service ends what it took, and whoever has the job waits for it."""
    async with client_of(sim, clock=clock, base_url=base_url or sim.base_url) as client:
        try:
            job: Job[Any] | None = await pumped(clock, client.submit(model_v(image_url=IMAGE), key="a key"))
        except XilingError as error:
            caller = f"`{type(error).__name__}`, charged: {error.charged}"
            job = await client.find("a key") if error.charged != "no" else None
        else:
            assert job is not None
            caller = f"the job, `{job.state.value}`"
        return caller, NONE if job is None else await _ended(sim, job)


async def _ended(sim: Simulator, job: Job[Any]) -> str:
    if not sim.ledger.task_ids:
        waiting = await started(job.result())
        assert not waiting.done()
        await gone(waiting)
        return DOUBT
    answers = [await sim.finish(task_id) for task_id in sim.ledger.task_ids]
    assert set(answers) == {200}
    videos = await job
    assert [video.task_id for video in videos] == list(sim.ledger.task_ids) == list(job.task_ids)
    return VIDEO


async def _cancelled(sim: Simulator, clock: ManualClock) -> tuple[str, str]:
    async with client_of(sim, clock=clock) as client:
        sim.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v(), key="a key"))
        await sim.wait_for_posts(1)
        await gone(submitting)
        sim.release_answers()
        job = await client.submit(model_v(), key="a key")  # the same key is the same job: it waits for those ids
        assert job.task_ids == sim.ledger.task_ids
        return "`CancelledError`; the job is kept", await _ended(sim, job)


async def _closed(sim: Simulator, clock: ManualClock) -> tuple[str, str]:
    async with client_of(sim, clock=clock) as client:
        sim.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v()))
        await sim.wait_for_posts(1)
        releasing = asyncio.create_task(_release_later(sim))
    await releasing
    job = await submitting
    assert job.task_ids == sim.ledger.task_ids
    return f"the job, `{job.state.value}`", "the store keeps the job"


async def _release_later(sim: Simulator) -> None:
    await settle()
    sim.release_answers()


if __name__ == "__main__":
    print(rendered(row.cells for row in TABLE))
