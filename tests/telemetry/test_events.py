"""What is told and counted: each thing once, with its ids and without a secret, and hooks that cannot hurt."""

from __future__ import annotations

import ast
import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest
from support import FailingStore, callback_body, client_of, model_kl, model_v, plain_session, post

import xiling_async
from xiling_async import ConfigurationError, Rejected, SQLiteStore, State, TaskFailed, simulator
from xiling_async.models.lifecycle import OutcomeReported
from xiling_async.simulator import Simulator, faults
from xiling_async.telemetry.events import (
    CallbackRefused,
    CallbackTaken,
    Downloaded,
    Event,
    JobChanged,
    Polled,
    Submitted,
    TaskEnded,
    Uploaded,
)
from xiling_async.testing.clock import ManualClock, SkippingClock

E = TypeVar("E")
PICTURE = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"


class Listener(list[Event]):
    """A hook that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self if isinstance(event, kind)]


# --- what is told --------------------------------------------------------------------------------------------------


async def test_the_life_of_a_job_is_told_in_order(sim: Simulator) -> None:
    """Intent, POST, callback, end: each once, with the ids of the job, and times that fit together."""
    heard = Listener()
    async with client_of(sim, on_event=heard) as client:
        job = await client.submit(model_v(), key="order-42")
        await job
    states = [(event.was, event.state) for event in heard.of(JobChanged)]
    assert states == [(None, State.SENDING), (State.SENDING, State.ACCEPTED), (State.ACCEPTED, State.DONE)]
    assert {event.job_id for event in heard.of(JobChanged)} == {job.id}
    assert {event.key for event in heard.of(JobChanged)} == {"order-42"}
    (submitted,) = heard.of(Submitted)
    assert (submitted.result, submitted.error, submitted.attempt) == ("accepted", None, 1)
    assert submitted.task_ids == job.task_ids
    (taken,) = heard.of(CallbackTaken)
    assert (taken.result, taken.outcome, taken.task_id) == ("applied", "succeeded", job.task_ids[0])
    done = heard.of(JobChanged)[-1]
    assert done.created_at <= submitted.began_at <= submitted.at <= taken.began_at <= done.at <= taken.at
    assert len(heard) == 6


async def test_a_callback_before_the_answer_is_told_in_its_order(sim: Simulator) -> None:
    """The job is done before its POST comes to its end, and nothing is told twice."""
    sim.script(faults.early_callback(), faults.duplicate_callback(3))
    heard = Listener()
    async with client_of(sim, on_event=heard) as client:
        await (await client.submit(model_v()))
        await sim.wait_for_callbacks(3)
    assert [event.state for event in heard.of(JobChanged)] == [State.SENDING, State.DONE]
    assert [event.result for event in heard.of(CallbackTaken)] == ["applied", "repeat", "repeat"]


async def test_what_goes_wrong_with_a_post_is_told(sim: Simulator) -> None:
    """A repeat after a 429, a refusal, a lost answer that its callback brings back: results, errors and attempts."""
    heard = Listener()
    async with client_of(sim, on_event=heard, clock=SkippingClock()) as client:
        sim.script(faults.rate_limited())
        await (await client.submit(model_v()))
        sim.script(faults.status(400))
        with pytest.raises(Rejected):
            await client.submit(model_v("sand"))
        sim.script(faults.drop_after_accept())
        await (await client.submit(model_v("stones")))
        stats = client.stats()
    told = [(event.attempt, event.result, event.error) for event in heard.of(Submitted)]
    assert told == [
        (1, "rejected", "RateLimited"),
        (2, "accepted", None),
        (1, "rejected", "Rejected"),
        (1, "uncertain", "SubmitUncertain"),
    ]
    assert stats.retries == {"submit": 1}
    assert stats.submits == {"accepted": 1, "rejected": 2, "uncertain": 1}
    assert stats.uncertain == sum(event.state is State.UNCERTAIN for event in heard.of(JobChanged)) <= 1


async def test_polls_are_told(sim: Simulator) -> None:
    """Each GET with its job, its task and what came of it."""
    sim.script(faults.lost_callback(), faults.status_fault(500, 404))
    heard = Listener()
    async with client_of(sim, on_event=heard, clock=SkippingClock()) as client:
        job = await client.submit(model_v())
        await job
        assert client.stats().gets == 3
    told = [(event.job_id, event.task_id, event.result, event.error) for event in heard.of(Polled)]
    assert told == [
        (job.id, job.task_ids[0], "error", "ServiceUnavailable"),
        (job.id, job.task_ids[0], "missing", "Rejected"),
        (job.id, job.task_ids[0], "succeeded", None),
    ]


async def test_transfers_are_told(sim: Simulator, tmp_path: Path) -> None:
    """Uploads and downloads, with their tries; one that fails names its error."""
    heard = Listener()
    async with client_of(sim, on_event=heard, clock=SkippingClock()) as client:
        sim.script_upload(faults.status(503))
        await client.upload(PICTURE)
        sim.script(faults.cut_media(100))
        (video,) = await (await client.submit(model_v()))
        await client.download(video, tmp_path / "a.mp4", allow_private=True)
        sim.script(faults.media_gone())
        (video,) = await (await client.submit(model_v("sand")))
        with pytest.raises(Exception, match="no longer available"):
            await client.download(video, tmp_path / "b.mp4", allow_private=True)
        stats = client.stats()
    assert [(event.size_bytes, event.tries, event.error) for event in heard.of(Uploaded)] == [
        (PICTURE.stat().st_size, 2, None)
    ]
    assert [(event.what, event.tries > 1, event.error) for event in heard.of(Downloaded)] == [
        ("video", True, None),
        ("video", False, "ResultExpired"),
    ]
    assert (stats.uploads, stats.downloads) == ({"done": 1}, {"done": 1, "failed": 1})
    assert stats.retries["upload"] == 1
    assert stats.retries["download"] == sum(event.tries - 1 for event in heard.of(Downloaded))


async def test_refused_callbacks_are_told_by_reason(sim: Simulator) -> None:
    """A forged token, a body that is none, one too large, a strange task: reason and status; the job where known."""
    sim.manual = True
    heard = Listener()
    async with client_of(sim, on_event=heard) as client, plain_session() as session:
        job = await client.submit(model_v())
        url = sim.ledger.posts[0].callback_url
        assert url is not None
        forged = url[:-1] + ("A" if url[-1] != "A" else "B")
        assert await post(session, forged, b"{}") == 404
        assert await post(session, url, b"not a callback") == 400
        assert await post(session, url, b" " * 300_000) == 413
        assert await post(session, url, callback_body("i2v-of-somebody-else")) == 409
        assert await post(session, url, b"{}", **{"Content-Encoding": "gzip"}) == 415
        assert client.stats().callbacks_refused == {
            "not_found": 1, "malformed": 1, "too_large": 1, "strange": 1, "encoded": 1,
        }  # fmt: skip
    told = [(event.reason, event.status, event.job_id) for event in heard.of(CallbackRefused)]
    assert told == [
        ("not_found", 404, None),
        ("malformed", 400, job.id),
        ("too_large", 413, job.id),
        ("strange", 409, job.id),
        ("encoded", 415, job.id),
    ]
    assert heard.of(CallbackTaken) == []


async def test_a_store_that_cannot_write_is_told(sim: Simulator) -> None:
    """The callback that was answered 503 is one that was refused."""
    sim.script(faults.callback_retry(1))
    store, heard = FailingStore(OutcomeReported), Listener()
    async with client_of(sim, store=store, on_event=heard) as client:
        await client.submit(model_v())
        await sim.wait_for_callbacks(2)
        assert client.stats().callbacks_refused == {"unavailable": 2}
    assert {event.reason for event in heard.of(CallbackRefused)} == {"unavailable"}


# --- what is counted -----------------------------------------------------------------------------------------------


async def test_stats_are_a_snapshot_of_what_the_ledger_saw(sim: Simulator) -> None:
    """Jobs by state, callbacks, time to done; a snapshot does not change any more."""
    clock = ManualClock()
    async with client_of(sim, clock=clock) as client:
        before = client.stats()
        await (await client.submit(model_v(count=2)))
        sim.script(faults.failed())
        with pytest.raises(TaskFailed):
            await (await client.submit(model_kl()))
        sim.manual = True
        sim.hold_answers()
        third = asyncio.create_task(client.submit(model_v("third")))
        await sim.wait_for_posts(3)
        stats = client.stats()
        sim.release_answers()
        await third
        assert client.stats().in_flight["submits"] == 0
    assert before.jobs == {}
    assert (before.unfinished, before.mean_time_to_done, before.paused_until) == (0, None, None)
    assert stats.jobs == {State.SENDING: 3, State.ACCEPTED: 2, State.DONE: 1, State.FAILED: 1}
    assert (stats.unfinished, stats.in_flight) == (1, {"submits": 1, "uploads": 0, "downloads": 0})
    assert stats.callbacks == {"applied": 3}
    assert (stats.gets, stats.uncertain, stats.mean_time_to_done) == (0, 0, 0.0)
    assert stats.submits["accepted"] == sim.ledger.paid_submits - 1
    with pytest.raises(TypeError):
        stats.jobs[State.DONE] = 7  # type: ignore[index]


async def test_stats_count_what_a_former_process_left(sim: Simulator, tmp_path: Path) -> None:
    """The unfinished jobs of the store are unfinished, until their callbacks come."""
    sim.manual = True
    async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
        job = await client.submit(model_v())
    async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
        assert client.stats().unfinished == 1
        sim.set_result(job.task_ids[0])
        found = await client.find(job.id)
        assert found is not None
        await found.refresh()
        assert found.state is State.DONE
        assert (client.stats().unfinished, client.stats().jobs) == (0, {State.DONE: 1})


async def test_a_closed_gate_is_seen(sim: Simulator) -> None:
    """After a 429 the snapshot says until when nobody is sent."""
    clock = ManualClock()
    sim.script(faults.rate_limited(retry_after=7))
    async with client_of(sim, clock=clock) as client:
        submit = asyncio.create_task(client.submit(model_v()))
        while client.stats().paused_until is None:
            await asyncio.sleep(0)
        assert client.stats().paused_until == clock.time() + 7
        while not submit.done():
            clock.advance(1)
            await asyncio.sleep(0)
        assert client.stats().paused_until is None


# --- hooks ---------------------------------------------------------------------------------------------------------


async def test_a_broken_hook_hurts_nobody(sim: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """Its exceptions are logged once, the next hook is called, the job is done."""
    heard, calls = Listener(), Listener()

    def broken(event: Event) -> None:
        calls(event)
        raise RuntimeError("the hook's own")

    async with client_of(sim, on_event=[broken, heard]) as client:
        await (await client.submit(model_v()))
    assert calls == heard
    assert len(heard) == 6
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (line.name, line.levelname) == ("xiling_async.telemetry.events", "ERROR")
    assert line.exc_info is not None


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, TimeoutError, BaseException, StopIteration])
async def test_whatever_a_hook_raises_hurts_nobody(
    sim: Simulator, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """Not the submit between its intent and its POST, not the callback, not the poller; nobody is cancelled by it."""

    def broken(event: Event) -> None:
        raise error

    sim.script(faults.lost_callback())
    async with client_of(sim, on_event=broken, clock=SkippingClock()) as client:
        first = await client.submit(model_v(), key="a")
        assert await client.submit(model_v(), key="a") is not first
        assert len(await first) == 1
        assert len(await (await client.submit(model_v("sand")))) == 1
        me = asyncio.current_task()
        assert me is not None
        assert me.cancelling() == 0
    assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (2, 2)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_the_outcome_of_each_task_is_told(sim: Simulator) -> None:
    """By callback or by polling, once each, with the ids of job and task, before the end of its job."""
    sim.script(faults.duplicate_callback(2))
    sim.script(faults.failed())
    sim.script(faults.lost_callback())
    heard = Listener()
    async with client_of(sim, on_event=heard, clock=SkippingClock()) as client:
        jobs = [
            await client.submit(model_v(count=2)),
            await client.submit(model_v("b")),
            await client.submit(model_v("c")),
        ]
        for job in jobs:
            await job.outcomes()
        assert client.stats().tasks == {"succeeded": 3, "failed": 1}
    told = {(event.job_id, event.task_id): event.outcome for event in heard.of(TaskEnded)}
    assert len(told) == len(heard.of(TaskEnded)) == 4
    assert told == {
        (job.id, task_id): "failed" if job is jobs[1] else "succeeded" for job in jobs for task_id in job.task_ids
    }
    for job in jobs:
        told_of_it = [event for event in heard if isinstance(event, (TaskEnded, JobChanged)) and event.job_id == job.id]
        assert isinstance(told_of_it[-2], TaskEnded)
        assert isinstance(told_of_it[-1], JobChanged)
        assert told_of_it[-1].state.is_final


async def test_a_coroutine_is_no_hook(sim: Simulator) -> None:
    """What would never be awaited is refused at once, and so is what cannot be called."""

    async def hook(event: Event) -> None: ...

    class Hook:
        async def __call__(self, event: Event) -> None: ...

    for wrong in (hook, Hook(), [print, hook], [7], "print"):
        with pytest.raises(ConfigurationError, match="on_event"):
            client_of(sim, on_event=wrong)


async def test_every_event_is_a_line_at_debug(sim: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """With DEBUG the log tells each event with its ids; without it nothing at all of a good job."""
    async with client_of(sim) as client:
        job = await client.submit(model_v())
        await job
        assert caplog.records == []
        with caplog.at_level(logging.DEBUG, "xiling_async"):
            job = await client.submit(model_v())
            await job
    lines = [record.getMessage() for record in caplog.records if record.name == "xiling_async.telemetry.events"]
    assert len(lines) == 6
    assert all(job.id in line for line in lines)


# --- the log -------------------------------------------------------------------------------------------------------

PACKAGE = Path(xiling_async.__file__).parent
OF_NO_JOB = (
    "%s",
    "the store ",
    "the receiver ",
    "earlier results ",
    "%d jobs in a row ",
    "%d results ",
    "an on_event hook ",
)  # "%s" is an event
OF_CONNECTIONS = ("server_log.py", "server.py", "sockets.py")


def test_every_line_of_the_log_names_its_job() -> None:
    """Each begins with the job's id, but those of the store as a whole, of hooks and of connections."""
    lines = 0
    for path in [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("cli", "simulator")
    ]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("log."):
                continue
            if ast.unparse(node.func) == "log.isEnabledFor" or path.name in OF_CONNECTIONS:
                continue
            lines += 1
            words = ast.literal_eval(node.args[0])
            assert words.startswith(("job %s", *OF_NO_JOB)), f"{path.name}, line {node.lineno}: {words}"
    assert lines > 15


def test_the_log_is_left_to_the_application() -> None:
    """A NullHandler and nothing more: no level, no handler of the root, no `basicConfig`."""
    logger = logging.getLogger("xiling_async")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert (logger.level, logger.propagate) == (logging.NOTSET, True)
    assert not [path for path in PACKAGE.rglob("*.py") if "basicConfig" in path.read_text("utf-8")]
    code = "import logging, xiling_async; print(logging.getLogger().handlers, logging.getLogger().level)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert ended.stdout.split() == ["[]", str(logging.WARNING)]
