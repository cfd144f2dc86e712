"""The promises of the design, each a test over real sockets; the witness is the simulator's own ledger."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hosts import Brisk, Host, answer, brisk_timeouts
from post_table import MARKER, TABLE, Row, rendered, seen
from support import (
    FailingStore,
    GatedStore,
    NotingStore,
    callback_body,
    client_of,
    closed_port,
    gone,
    http,
    model_v,
    plain_session,
    port_of,
    post,
    pumped,
    raw_exchange,
    settle,
    started,
    status_of,
    token_of,
    turns_until,
)

from xiling_async import (
    ClientClosed,
    ImageToVideo,
    Limits,
    MemoryStore,
    SQLiteStore,
    State,
    SubmitUncertain,
    TaskFailed,
    Timeouts,
    WaitTimeout,
    WebhookReceiver,
    XilingError,
)
from xiling_async.models.lifecycle import Accepted, AnswerLost, OutcomeReported
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock, SkippingClock

ROOT = Path(__file__).resolve().parent.parent
DAY_S = 24 * 3600.0


# --- 1: every paid create is sent once -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.fault)
async def test_promise_1_every_paid_create_is_sent_once(row: Row) -> None:
    """Whatever goes wrong, the service sees as many POSTs as the table says, and never two that are paid."""
    cells = await seen(row)
    print(rendered([cells]).splitlines()[-1])
    assert cells == row.cells
    assert row.paid <= 1


def test_promise_1_the_table_has_every_fault_of_an_answer() -> None:
    """No fault of the connection or of the answer is missing; more than one POST is seen only after a 429."""
    assert {row.fault.split(" ")[0].rstrip(",") for row in TABLE if row.posts > 1} == {"429"}
    assert {fault.name for row in TABLE for fault in row.given} == {
        "answer_data", "business_error", "drop_after_accept", "drop_before_read", "drop_mid_answer", "garbage", "hang",
        "hang_before_accept", "ids", "rate_limited", "redirect", "status",
    }  # fmt: skip


def test_promise_1_the_readme_shows_this_table() -> None:
    """The table of the README is the one that the tests run, cell by cell."""
    _, marker, after = (ROOT / "README.md").read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"README.md has no {MARKER}"
    assert after.strip().split("\n\n", 1)[0] == rendered(row.cells for row in TABLE)


@pytest.mark.parametrize(
    ("header", "pause_s"), [(None, 30.0), (7, 7.0), ("Fri, 15 Jan 2027 08:00:12 GMT", 12.0), ("soon", 30.0)]
)
async def test_promise_1_a_429_is_waited_out_to_the_second(header: float | str | None, pause_s: float) -> None:
    """After a 429 nothing at all is sent until the service's own time is over."""
    clock = ManualClock()  # at 2027-01-15 08:00:00 GMT
    async with Simulator() as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.rate_limited(header))
        first = asyncio.create_task(client.submit(model_v("one")))
        await sim.wait_for_posts(1)
        await settle()
        second = await started(client.submit(model_v("two")))
        clock.advance(pause_s - 0.01)
        await settle(500)
        assert len(sim.ledger.posts) == 1
        clock.advance(0.01)
        await asyncio.gather(first, second)
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (3, 2)


# --- 2: a callback before the POST's answer is kept ----------------------------------------------------------------


async def test_promise_2_a_callback_before_the_answer_is_kept() -> None:
    """The callback overtakes the answer of its own POST, is answered 200, and is the job's outcome."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.hold_answers()
        submitting = asyncio.create_task(client.submit(model_v()))
        await sim.wait_for_posts(1)
        (task_id,) = sim.ledger.task_ids
        assert await sim.finish(task_id) == 200
        assert not submitting.done()
        sim.release_answers()
        job = await submitting
        assert (job.state, job.task_ids) == (State.DONE, (task_id,))
        (video,) = await job
        assert video.task_id == task_id
        assert (len(sim.ledger.posts), sim.ledger.gets) == (1, [])


async def test_promise_2_all_outputs_of_a_job_may_come_before_the_answer() -> None:
    """Four early callbacks, the last task first: the results are in the order of the answer."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.early_callback(), faults.out_of_order())
        videos = await (await client.submit(model_v(count=4)))
        assert [video.task_id for video in videos] == list(sim.ledger.task_ids)
        assert {callback.status for callback in sim.ledger.callbacks} == {200}


@pytest.mark.parametrize(
    "fault",
    [
        faults.drop_after_accept(), faults.drop_mid_answer(), faults.status(500, accept=True), faults.garbage(),
        faults.garbage(b""), faults.answer_data(None), faults.hang(0.0),
    ],
    ids=repr,
)  # fmt: skip
async def test_promise_2_an_early_callback_outweighs_a_lost_answer(fault: faults.Fault) -> None:
    """The job was adopted before its answer was lost: `submit` returns it, done, whatever the answer was."""
    async with Simulator() as sim, client_of(sim, on_uncertain="raise") as client:
        sim.script(faults.early_callback(), fault)
        job = await client.submit(model_v())
        assert (job.state, job.task_ids) == (State.DONE, sim.ledger.task_ids)
        assert len(await job) == 1
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 1)


# --- 3: a repeat is answered 200 and changes nothing ---------------------------------------------------------------


async def test_promise_3_a_repeat_is_answered_200_and_changes_nothing() -> None:
    """Repeats of a callback, before and after the end, are 200 and leave the record as it was."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client, plain_session() as session:
        job = await client.submit(model_v(count=2))
        first, second = job.task_ids
        assert [await sim.progress(first), await sim.progress(first)] == [200, 200]
        assert await sim.finish(first) == 200
        before = await store.get(job.id)
        url = str(sim.ledger.posts[0].callback_url)
        assert await sim.callback(first) == 200
        other_signature = callback_body(first, video_url="https://media.example/other.mp4?X-Goog-Signature=2")
        assert await post(session, url, other_signature) == 200
        assert await store.get(job.id) == before
        assert await sim.finish(second) == 200
        videos = await job
        before = await store.get(job.id)
        for task_id in (first, second, first):
            assert await sim.callback(task_id) == 200
        assert await sim.progress(first) == 200  # stale: it says that the task still runs
        assert await store.get(job.id) == before
        assert await job == videos
        assert len(sim.ledger.posts) == 1


# --- 4: 200 never precedes the commit ------------------------------------------------------------------------------


async def test_promise_4_200_never_precedes_the_commit() -> None:
    """While the commit is under way the sender has no answer and the waiter no result; after it both have."""
    store = GatedStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job = await client.submit(model_v())
        waiting = await started(job.result())
        store.gate.clear()
        finishing = asyncio.create_task(sim.finish(job.task_ids[0]))
        await store.reached.wait()
        await settle(500)
        assert (finishing.done(), waiting.done(), job.state) == (False, False, State.ACCEPTED)
        assert sim.ledger.callbacks == []
        store.gate.set()
        assert await finishing == 200
        assert len(await waiting) == 1


@pytest.mark.parametrize("error", [None, RuntimeError("a bug in a store")], ids=["store error", "bug"])
async def test_promise_4_a_failed_commit_answers_503(error: Exception | None) -> None:
    """A commit that fails is answered 503 and wakes nobody; the repeat of the callback is taken."""
    store = FailingStore(OutcomeReported, error=error)
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job = await client.submit(model_v())
        waiting = await started(job.result())
        assert await sim.finish(job.task_ids[0]) == 503
        await settle()
        assert (waiting.done(), job.state) == (False, State.ACCEPTED)
        assert sim.ledger.unacknowledged == job.task_ids
        store.fails = ()
        assert await sim.callback(job.task_ids[0]) == 200
        assert len(await waiting) == 1


# --- 5: what is wrong never reaches the registry -------------------------------------------------------------------


def _undated(answer: bytes) -> bytes:
    return b"\r\n".join(line for line in answer.split(b"\r\n") if not line.lower().startswith(b"date:"))


async def test_promise_5_every_wrong_token_is_the_same_404() -> None:
    """Byte for byte, for every reason; nothing is looked up, and no GET is caused."""
    store, clock = NotingStore(), ManualClock()
    secrets = ["an old secret of the receiver", "one that another receiver has"]
    async with Simulator(manual=True) as sim:
        async with client_of(sim, receiver=WebhookReceiver(port=0, secret=secrets[1])) as other:
            await other.submit(model_v())
        receiver = WebhookReceiver(port=0, secret=secrets[0])
        async with client_of(sim, receiver=receiver, store=store, clock=clock) as client:
            job = await client.submit(model_v())
            strange, url = (str(post.callback_url) for post in sim.ledger.posts)
            token, port = token_of(url), port_of(url)
            body = callback_body(job.task_ids[0])
            asked = list(store.asked)

            def flipped(place: int) -> str:
                return token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]

            wrong = [
                *(http(f"/{flipped(place)}", body) for place in range(len(token))),
                *(http(f"/{token[:size]}", body) for size in (0, 1, 40, 79)),
                http(f"/{token}A", body), http(f"/{token}{token}", body), http(f"/{'A' * 1900}", body),
                http(f"/{token}/", body), http(f"/{token}/x", body), http(f"/{token[:-1]}=", body),
                http(f"/{token.swapcase()}", body), http(f"/{token[::-1]}", body), http(f"/{token}%00", body),
                http(f"/{token[:-1]}%C3%A9", body), http("/favicon.ico"), http("/", b""), http("/..", b""),
                http(f"/{token_of(strange)}", body), http(f"/?token={token}", body), http("/" + "-" * 80, body),
                *(http(f"/{token}", body, method=method) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")),
                http("/nobody", length=10 * 2**30), http("/nobody", b"\0" * 300_000),
                http("/nobody", b"{}", "Content-Encoding: gzip"), http("/nobody", b"not json", "Content-Type: x/y"),
            ]  # fmt: skip
            answers = [await raw_exchange(port, request) for request in wrong]
            assert (job.state, sim.ledger.gets) == (State.ACCEPTED, [])
            assert store.asked == asked
            clock.advance(8 * DAY_S)  # which is long enough to be asked about as well
            answers.append(await raw_exchange(port, http(f"/{token}", body)))
            assert {status_of(answer) for answer in answers} == {404}
            assert len({_undated(answer) for answer in answers}) == 1
            assert not [event for event in store.asked if isinstance(event, OutcomeReported) and event.outcome]


MISTYPED: dict[str, bytes] = {
    "empty": b"",
    "no json": b"status=SUCCEEDED",
    "a list": b"[]",
    "null": b"null",
    "not utf-8": b'{"data": "\xff"}',
    "utf-16": '{"data": {}}'.encode("utf-16"),
    "nan": b'{"data": {"task_id": "%s", "status": "SUCCEEDED", "video_url": "https://m/v", "width": NaN}}',
    "infinite": b'{"data": {"task_id": "%s", "status": "SUCCEEDED", "video_url": "https://m/v", "duration": 1e999}}',
    "a name twice": b'{"data": {"task_id": "%s", "status": "FAILED", "status": "SUCCEEDED", "video_url": "https://m"}}',
    "deep": b"[" * 100_000,
    "a long number": b'{"data": ' + b"9" * 10_000 + b"}",
    "no data": b'{"code": 0, "msg": "ok"}',
    "data null": b'{"data": null}',
    "data a list": b'{"data": [{"task_id": "%s", "status": "FAILED"}]}',
    "id null": callback_body(None),
    "id a number": callback_body(7),
    "id a list": callback_body(["%s"]),
    "id empty": callback_body(""),
    "id dots": callback_body(".."),
    "id with a line": callback_body("i2v\n1"),
    "id too long": callback_body("i" * 257),
    "status null": callback_body("%s", None),
    "status a number": callback_body("%s", 1),
    "status true": callback_body("%s", True),
    "status a list": callback_body("%s", ["SUCCEEDED"]),
    "video null": callback_body("%s", video_url=None),
    "video empty": callback_body("%s", video_url=""),
    "video a number": callback_body("%s", video_url=1),
    "video a list": callback_body("%s", video_url=["https://media.example/v.mp4"]),
    "thumbnail a number": callback_body("%s", thumbnail_url=1),
    "width as text": callback_body("%s", width="1920"),
    "width a fraction": callback_body("%s", width=1920.5),
    "height true": callback_body("%s", height=True),
    "duration as text": callback_body("%s", duration="8"),
    "message a number": callback_body("%s", "FAILED", error_message=5),
    "message an object": callback_body("%s", "FAILED", error_message={"text": "no"}),
}


async def test_promise_5_a_mistyped_field_never_reaches_the_registry() -> None:
    """A valid URL with any malformed body: 400, nothing is asked of the store, the job goes on."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client, plain_session() as session:
        job = await client.submit(model_v())
        asked, url = list(store.asked), str(sim.ledger.posts[0].callback_url)
        task_id = job.task_ids[0].encode()
        answers = {name: await post(session, url, body.replace(b"%s", task_id)) for name, body in MISTYPED.items()}
        assert answers == dict.fromkeys(MISTYPED, 400)
        assert store.asked == asked
        assert sim.ledger.gets == []
        assert await sim.finish(job.task_ids[0]) == 200


async def test_promise_5_a_strange_task_id_changes_nothing() -> None:
    """A valid URL with the id of another job or of nobody, in any state of the job, is refused."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client, plain_session() as session:
        job, neighbour = await client.submit(model_v()), await client.submit(model_v())
        url = str(sim.ledger.posts[0].callback_url)
        before = await store.everything()
        for status in ("PROCESSING", "SUCCEEDED", "FAILED", "WHATEVER"):
            for task_id in (neighbour.task_ids[0], "i2v-0", job.task_ids[0].upper(), job.task_ids[0] + "0"):
                assert await post(session, url, callback_body(task_id, status)) == 409
        assert await store.everything() == before
        assert await sim.finish(job.task_ids[0]) == 200
        assert await post(session, url, callback_body(neighbour.task_ids[0])) == 409
        assert (neighbour.state, sim.ledger.gets) == (State.ACCEPTED, [])


async def test_promise_5_an_uncertain_job_is_not_adopted_by_the_task_of_another() -> None:
    """A job without ids takes one that nobody has, and never one that belongs to another job."""
    async with Simulator(manual=True) as sim, client_of(sim) as client, plain_session() as session:
        neighbour = await client.submit(model_v())
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[1].callback_url)
        assert await post(session, url, callback_body(neighbour.task_ids[0])) == 409
        assert (job.state, job.task_ids) == (State.UNCERTAIN, ())
        assert await sim.finish(sim.ledger.task_ids[1]) == 200
        assert job.task_ids == (sim.ledger.task_ids[1],)


async def test_promise_5_an_oversized_body_costs_bounded_memory_and_never_reaches_the_registry() -> None:
    """Declared, chunked, or endless: refused with 413, and the sender is cut off long before its end."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, store=store) as client:
        job = await client.submit(model_v())
        asked, url = list(store.asked), str(sim.ledger.posts[0].callback_url)
        path, port = f"/{token_of(url)}", port_of(url)
        body = callback_body(job.task_ids[0], padding="x" * 300_000)
        declared = await raw_exchange(port, http(path, body))
        only_declared = await raw_exchange(port, http(path, length=10 * 2**30))
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        chunked = await raw_exchange(port, http(path, b"", "Transfer-Encoding: chunked"), *[chunk] * 5, b"0\r\n\r\n")
        assert [status_of(answer) for answer in (declared, only_declared, chunked)] == [413, 413, 413]
        assert await _taken_before_the_cut(port, http(path, b"", "Transfer-Encoding: chunked"), chunk) < 2**30
        assert store.asked == asked
        assert await sim.finish(job.task_ids[0]) == 200


async def _taken_before_the_cut(port: int, head: bytes, chunk: bytes) -> int:
    """How many bytes a server swallows of an endless body before it hangs up."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    taken = 0
    try:
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()
            taken += len(chunk)
    except OSError:
        return taken
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


# --- 6: a waiter's end harms nobody --------------------------------------------------------------------------------


async def test_promise_6_a_waiter_that_times_out_or_is_cancelled_harms_nobody() -> None:
    """One waiter times out, one is cancelled, one waits under a deadline of its own: the fourth has the videos."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        job = await client.submit(model_v(), key="one")
        patient = await started(job.result())
        hurried = await started(job.result(timeout=5))
        cancelled = await started(job.outcomes())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await job
        await gone(cancelled)
        clock.advance(5)
        with pytest.raises(WaitTimeout) as caught:
            await hurried
        assert (caught.value.job, caught.value.charged) == (job, "yes")
        assert (job.state, patient.done()) == (State.ACCEPTED, False)
        assert await sim.finish(job.task_ids[0]) == 200
        assert await patient == await caught.value.job == await job
        assert len(sim.ledger.posts) == 1


async def test_promise_6_a_cancelled_submit_harms_no_other_caller_of_its_key() -> None:
    """Two callers submit the same key; one is cancelled while the POST is out, the other gets the job."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.hold_answers()
        first = asyncio.create_task(client.submit(model_v(), key="one"))
        await sim.wait_for_posts(1)
        second = await started(client.submit(model_v(), key="one"))
        await gone(first)
        sim.release_answers()
        job = await second
        assert job.task_ids == sim.ledger.task_ids
        assert len(sim.ledger.posts) == 1


# --- 9: leaving the client leaves nothing behind -------------------------------------------------------------------


_COUNTING = ThreadPoolExecutor(1)  # the loop's own executor may start a second thread when it is asked twice


async def _open_files() -> int:
    return len(await asyncio.get_running_loop().run_in_executor(_COUNTING, os.listdir, "/proc/self/fd"))


async def test_promise_9_leaving_leaves_no_task_socket_or_thread_and_tells_the_waiters() -> None:
    """With jobs done, pending, uncertain, queued and paused: then nothing is left, and every waiter knows why."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        await _open_files()  # the thread that counts is there before and after
        before = asyncio.all_tasks(), await _open_files(), set(threading.enumerate())
        async with client_of(sim, clock=clock, store=store) as client:
            done, pending = await client.submit(model_v()), await client.submit(model_v(), key="pending")
            assert await sim.finish(done.task_ids[0]) == 200
            sim.script(faults.drop_after_accept())
            uncertain = await client.submit(model_v())
            waiters = [await started(job.result()) for job in (pending, pending, uncertain)]
            sim.script(faults.rate_limited())
            limited = asyncio.create_task(client.submit(model_v()))
            await sim.wait_for_posts(4)
            await settle()
            queued = await started(client.submit(model_v()))
            keyed = await started(client.submit(model_v(), key="keyed"))
        submits = [limited, queued, keyed]
        await turns_until(lambda: all(task.done() or task.cancelling() for task in submits))
        await asyncio.wait([*waiters, *submits], timeout=0)
        ends = [task.exception() if task.done() and not task.cancelled() else task for task in (*waiters, *submits)]
        for task in submits:
            task.cancel()
        await asyncio.gather(*waiters, *submits, return_exceptions=True)
        assert [type(end) for end in ends] == [ClientClosed] * 6, ends
        assert [getattr(end, "charged", "") for end in ends] == ["yes", "yes", "maybe", "no", "no", "no"]
        await turns_until(lambda: asyncio.all_tasks() == before[0])
        for _ in range(1_000):
            if await _open_files() == before[1]:
                break
        assert (await _open_files(), set(threading.enumerate())) == before[1:]
        assert {record.id async for record in store.unfinished()} >= {pending.id, uncertain.id}
        assert len(sim.ledger.posts) == 4
        assert len(await done) == 1  # what was known stays known


async def test_promise_9_leaving_by_an_error_leaves_nothing_either() -> None:
    """An exception in the body, or a cancellation, closes as well and is not replaced."""
    async with Simulator(manual=True) as sim:
        before = asyncio.all_tasks()
        with pytest.raises(LookupError):
            async with client_of(sim) as client:
                await client.submit(model_v())
                raise LookupError
        await turns_until(lambda: asyncio.all_tasks() == before)

        async def whole_life() -> None:
            async with client_of(sim) as client:
                await (await client.submit(model_v()))

        living = asyncio.create_task(whole_life())
        await sim.wait_for_posts(2)
        await settle()
        await gone(living)
        await turns_until(lambda: asyncio.all_tasks() == before)


def test_promise_9_a_whole_process_leaves_no_file_and_no_warning(tmp_path: Path) -> None:
    """In an interpreter of its own, with every warning an error: no temporary file, nothing said at the end."""
    script = """
        import asyncio
        from xiling_async import Client, ImageToVideo, WebhookReceiver
        from xiling_async.simulator import Simulator

        async def main():
            async with Simulator() as sim:
                async with Client(sim.api_key, base_url=sim.base_url, receiver=WebhookReceiver(port=0)) as client:
                    request = ImageToVideo(
                        model="V", prompt="p", image_url="https://example.com/a.jpg", aspect_ratio="16:9",
                        aspect_resolution="720p", duration=8,
                    )
                    print((await client.run(request)).task_id)
                    await client.submit(request)

        asyncio.run(main())
    """
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("i2v-")
    assert list(tmp_path.iterdir()) == []


# --- 10: no secret is shown ----------------------------------------------------------------------------------------

API_KEY = "canary-key-0123456789abcdef"
SECRET = "canary-secret-0123456789"
SIGNATURE = "canarysignature0123456789"
SIGNED = f"https://media.example/v.mp4?X-Goog-Expires=604800&X-Goog-Signature={SIGNATURE}"


def _shown(thing: object) -> list[str]:
    """Everything that a program would print of it."""
    texts = [repr(thing), str(thing)]
    if isinstance(thing, BaseException):
        again = pickle.loads(pickle.dumps(thing))
        assert (type(again), str(again)) == (type(thing), str(thing))
        texts += [*traceback.format_exception(thing), *traceback.format_exception(again), repr(vars(thing))]
    return texts


def _around(text: str, secret: str) -> str:
    place = text.index(secret)
    return f"{text[:100]} ... {text[max(0, place - 100) : place + 20]}"


class _Everything(logging.Handler):
    """Every record of every logger, as a file would have it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {self.format(record)} {record.args!r}")


ECHO = f"Bearer {API_KEY}, key {API_KEY}, {SIGNED}"
TELLTALES = (
    faults.business_error(100002, f"Invalid token {API_KEY}", http=401),
    faults.business_error(100006, f"image {SIGNED} is not reachable ({ECHO})", http=400),
    faults.business_error(999, ECHO),
    faults.status(500, body=ECHO.encode()),
    faults.status(418, body=ECHO.encode()),
    faults.garbage(ECHO.encode()),
    # How Go and PHP write a URL in JSON.
    faults.garbage(b'{"code":0,"data":{"url":"' + SIGNED.replace("&", "\\u0026").encode() + b'"}}'),
    faults.garbage(b'{"code":0,"data":{"url":"' + SIGNED.replace("/", "\\/").encode() + b'"}}'),
    faults.answer_data({"headers": {"authorization": f"Bearer {API_KEY}"}, "urls": [SIGNED]}),
    faults.answer_data({"task_ids": ["i2v-1", "i2v-2"], "echo": ECHO}),
    faults.drop_after_accept(),
    faults.redirect(f"https://elsewhere.example/?key={API_KEY}&X-Goog-Signature={SIGNATURE}"),
)


async def _every_misfortune(sim: Simulator, store: FailingStore, things: list[object]) -> None:
    """Make the client say as much as it can to people who put secrets into everything."""
    clock, receiver = ManualClock(), WebhookReceiver(port=0, secret=SECRET)

    async def note(thing: Awaitable[object]) -> None:
        try:
            things.append(await thing)
        except XilingError as error:
            things.append(error)

    def noted(make: Callable[[], object]) -> None:
        try:
            things.append(make())
        except XilingError as error:
            things.append(error)

    client = client_of(sim, api_key=API_KEY, clock=clock, store=store, receiver=receiver, on_uncertain="raise")
    async with client, plain_session() as session:
        things += [client, receiver, store]
        for given in TELLTALES:
            sim.script(given)
            await note(client.submit(model_v(image_url=SIGNED)))
        job = await client.submit(model_v(image_url=SIGNED))
        url = str(sim.ledger.posts[-1].callback_url)
        sim.script(faults.business_error(100006, f"cannot call {url} back", http=400))
        await note(client.submit(model_v()))
        await note(pumped(clock, job.result(timeout=1)))
        noted(lambda: ImageToVideo.unchecked(model="V", callback_url=url))
        noted(lambda: model_v("p" * 1001, image_url=f"ftp{SIGNED}"))
        noted(lambda: ImageToVideo.unchecked(model="V", image_url=SIGNED))
        for body in (
            b"{", callback_body(job.task_ids[0], video_url=7, note=SIGNED), callback_body("strange", video_url=SIGNED),
            callback_body(job.task_ids[0], "FAILED", error_message=f"could not store {SIGNED} for {url}"),
            callback_body(job.task_ids[0], video_url=SIGNED),
        ):  # fmt: skip
            await post(session, url, body)
        await note(job.result())
        await note(job.outcomes())
        good = await client.submit(model_v(image_url=SIGNED))
        await post(session, str(sim.ledger.posts[-1].callback_url), callback_body(good.task_ids[0], video_url=SIGNED))
        things += [await good, await good.outcomes(), good, good.request]
        store.fails = (Accepted, OutcomeReported, AnswerLost)
        await note(pumped(clock, client.submit(model_v(image_url=SIGNED))))
        await post(session, url, callback_body(job.task_ids[0]))
        store.fails = (JobRecord,)
        await note(client.submit(model_v(image_url=SIGNED)))
        store.fails, store.error = (OutcomeReported,), RuntimeError("a bug")
        await post(session, url, callback_body(job.task_ids[0]))
        store.fails = ()
        token = token_of(url).encode()
        for raw in (
            b"POST /" + token + b" HTTP/9.9\r\n\r\n", b"POST /" + token + b"\r\n\r\n", b"/" + token + b"\r\n\r\n",
            http(f"/{token_of(url)}", b"", "no colon"), http(f"/{token_of(url)}", b"zz", "Transfer-Encoding: chunked"),
            http(f"/{token_of(url)}", b"", "A: " + "a" * 10_000), http(f"/{token_of(url)}?{'a' * 10_000}"),
            http(f"/{token_of(url)}", b"{}", length=-1),
        ):  # fmt: skip
            await raw_exchange(port_of(url), raw)
        waiting = await started((await client.submit(model_v())).result())
    await note(waiting)
    things += [*(await store.everything()).values(), client, receiver]
    with closed_port() as closed:
        async with client_of(sim, api_key=API_KEY, clock=clock, base_url=f"http://127.0.0.1:{closed}/v1") as lost:
            await note(pumped(clock, lost.submit(model_v(image_url=SIGNED))))


async def test_promise_10_no_secret_is_shown_anywhere() -> None:
    """No key, token, secret or signature in a log line (DEBUG, asyncio debug), a repr, an error or its traceback."""
    store, heard, things = FailingStore(), _Everything(), list[object]()
    root, loop = logging.getLogger(), asyncio.get_running_loop()
    level, slow_s = root.level, loop.slow_callback_duration
    root.addHandler(heard)
    root.setLevel(logging.DEBUG)
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0  # every callback is slow: asyncio prints each one
    try:
        async with Simulator(API_KEY, manual=True) as sim:
            await _every_misfortune(sim, store, things)
    finally:
        loop.set_debug(False)
        loop.slow_callback_duration = slow_s
        root.setLevel(level)
        root.removeHandler(heard)
    tokens = {token_of(post.callback_url) for post in sim.ledger.posts if post.callback_url}
    assert len(tokens) > 10
    assert {line.split(":")[0] for line in heard.lines} >= {
        "asyncio", "xiling_async.webhooks.receiver", "xiling_async.jobs.submission",
    }  # fmt: skip
    assert {type(thing).__name__ for thing in things} >= {
        "ClientClosed", "InvalidRequest", "NotSent", "ProtocolError", "Rejected", "ServiceError", "StoreError",
        "SubmitUncertain", "TaskFailed", "Unauthorized", "WaitTimeout",
    }  # fmt: skip
    shown = [*heard.lines, *(text for thing in things for text in _shown(thing))]
    secrets = {API_KEY, SIGNATURE, SECRET, *tokens}
    assert [_around(text, secret) for text in shown for secret in secrets if secret in text] == []


async def test_promise_10_a_pickled_error_carries_no_key_and_no_token() -> None:
    """The bytes of a pickled error are free of them; what was promised to be in it is in it."""
    async with Simulator(API_KEY, manual=True) as sim, client_of(sim, api_key=API_KEY, on_uncertain="raise") as client:
        sim.script(faults.garbage(f"Bearer {API_KEY}".encode()))
        with pytest.raises(SubmitUncertain) as uncertain:
            await client.submit(model_v())
        job = await client.submit(model_v(count=2))
        for task_id, status in zip(job.task_ids, ("SUCCEEDED", "FAILED"), strict=True):
            assert await sim.finish(task_id, status) == 200
        with pytest.raises(TaskFailed) as failed:
            await job
        for error in (uncertain.value, failed.value):
            held = pickle.dumps(error)
            assert API_KEY.encode() not in held
            assert not [post for post in sim.ledger.posts if token_of(post.callback_url).encode() in held]
            again = pickle.loads(held)
            assert (again.charged, again.job_id, again.task_ids) == (error.charged, error.job_id, error.task_ids)
            assert (again.args, again.job) == (error.args, None)
        assert again.outcomes == failed.value.outcomes


# --- 12: a pending job costs no task -------------------------------------------------------------------------------


async def _remembered(store: MemoryStore, count: int, now: float) -> None:
    """Jobs that an earlier client submitted just now."""
    for number in range(count):
        record = JobRecord(
            id=f"{number:032x}", kind="image_to_video", key=None, request=None, asked=1, created_at=now, changed_at=now
        )
        await store.add(record)
        await store.change(record.id, Accepted(attempt=1, at=now, task_ids=(f"i2v-{number}",), due_at=None))


async def test_promise_12_ten_thousand_pending_jobs_are_no_tasks_of_the_library() -> None:
    """10,000 jobs with a waiter each: the library owns as many tasks as with one."""
    store, clock, count = MemoryStore(), ManualClock(), 10_000
    await _remembered(store, count, clock.time())
    async with Simulator(manual=True) as sim, client_of(sim, store=store, clock=clock) as client:
        await client.submit(model_v())
        before = asyncio.all_tasks()
        jobs = [job async for job in client.recover()]
        assert len(jobs) == count + 1
        waiters = {asyncio.create_task(job.result()) for job in jobs}
        await settle()
        assert not [waiter for waiter in waiters if waiter.done()]
        extra = asyncio.all_tasks() - waiters - before
        assert len(extra) <= 2, extra
    ends = await asyncio.gather(*waiters, return_exceptions=True)
    assert {type(end) for end in ends} == {ClientClosed}


# --- 13: what was promised to be kept is kept ----------------------------------------------------------------------


async def test_promise_13_leaving_saves_what_is_known_by_then(tmp_path: Path) -> None:
    """A result that was awaited, and forty of a `map`: whoever leaves at once finds every file, whole."""
    async with Simulator() as sim:
        async with client_of(sim, save_to=tmp_path / "one", allow_private=True) as client:
            video = await client.run(model_v())
        assert {path.name for path in (tmp_path / "one").iterdir()} == {f"{video.task_id}.mp4"}
        async with client_of(sim, save_to=tmp_path / "forty", allow_private=True) as client:
            requests = [model_v(f"scene {number}") for number in range(40)]
            ids = [done.results[0].task_id async for done in client.map(requests)]
        files = {path.name: path.read_bytes() for path in (tmp_path / "forty").iterdir()}
        assert set(files) == {f"{task_id}.mp4" for task_id in ids}
        assert len(files) == 40
        assert len(set(files.values())) == 1


async def test_promise_13_or_a_warning_counts_what_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A media host that says nothing: closing waits for `Timeouts.stall` and no longer, and what is left is counted."""
    clock = SkippingClock()
    async with Simulator() as sim:
        client = client_of(sim, save_to=tmp_path, allow_private=True, clock=clock, timeouts=Timeouts(stall=7))
        async with client:
            for number in range(3):
                sim.script(faults.stalled_media(1_000, times=None))
                await client.run(model_v(f"scene {number}"))
            left_at = clock.time()
        assert clock.time() - left_at <= 7.5
    (line,) = [line for line in caplog.messages if "the client was closed before" in line]
    assert line.startswith("3 results are not saved in")
    assert not list(tmp_path.glob("*.mp4"))


async def test_promise_13_what_was_not_saved_is_saved_by_the_next_client(tmp_path: Path) -> None:
    """With the same store and folder."""
    folder, store = tmp_path / "clips", tmp_path / "jobs.db"
    async with Simulator() as sim:
        options: dict[str, Any] = {
            "save_to": folder,
            "allow_private": True,
            "clock": SkippingClock(),
            "timeouts": Timeouts(stall=7),
        }
        async with client_of(sim, store=SQLiteStore(store), **options) as client:
            sim.script(faults.stalled_media(1_000, times=3))
            video = await client.run(model_v())
        assert not list(folder.glob("*.mp4"))
        async with client_of(sim, store=SQLiteStore(store), **options) as client:
            job = await client.find(video.task_id)
            assert job is not None
            assert await job.saved() == (folder / f"{video.task_id}.mp4",)


# --- 14: nobody harms another job ----------------------------------------------------------------------------------
# Each misbehaviour of one job x each thing that jobs share: jobs/test_shared_resources.py.


async def test_promise_14_one_media_url_or_host_harms_no_other_file(tmp_path: Path) -> None:
    """URLs that are none, and a host that answers 429 to nine downloads: the files of all other jobs are saved, and
    the client closes in time."""
    strange = ["https://./x.mp4", "https://a..b/x.mp4", f"https://{'b' * 64}.com/x.mp4", "https://1.2.3.4.5../x.mp4"]
    options: dict[str, Any] = {"clock": Brisk(), "timeouts": brisk_timeouts(500), "limits": Limits(downloads=2)}
    async with Simulator() as sim, Host(lambda seen, number: answer(429, b"", "Retry-After: 300")) as limited:
        urls = [*strange, *[limited.url] * 9]
        async with client_of(sim, save_to=tmp_path, allow_private=True, **options) as client:
            for number, url in enumerate(urls):
                sim.script(faults.callback_fields(video_url=url))
                await client.run(model_v(f"strange {number}"))
            jobs = [await client.submit(model_v(f"scene {number}")) for number in range(20)]
            async with asyncio.timeout(30):
                files = [file for job in jobs for file in await job.saved()]
            assert client.stats().unsaved == len(urls)
    assert sorted(files) == sorted(tmp_path.glob("*.mp4"))
    assert len(files) == 20


# --- 15: an ended job is handed over until it is acknowledged --------------------------------------------------------
# At random instants, with three consumers and a ledger of the application's own: jobs/test_consumer_kill.py.


async def test_promise_15_a_job_is_handed_over_again_after_a_kill(tmp_path: Path) -> None:
    """A process takes two jobs, acknowledges the first and is killed with the second in its hands: the next process is
    given the second one, when its lease is over, and nothing else."""
    script = """
        import asyncio, os, signal, sys
        from xiling_async import Client, SQLiteStore

        async def main(base_url):
            async with Client("key", base_url=base_url, store=SQLiteStore("jobs.db")) as client:
                async for job in client.completed(lease=1):
                    print(job.key, flush=True)
                    if job.key == "first":
                        await job.ack()
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main(sys.argv[1]))
    """
    async with Simulator() as sim:
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            for key in ("first", "second"):
                await client.run(model_v(key), key=key)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(script), sim.base_url, cwd=tmp_path, stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        printed, _ = await process.communicate()
        assert (printed, process.returncode) == (b"first\nsecond\n", -9)
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            async with asyncio.timeout(20), aclosing(client.completed()) as jobs:
                job = await anext(jobs)
                assert (job.key, job.state) == ("second", State.DONE)
                await job.ack()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(jobs), 0.1)
            assert client.stats().handover == {"handed_over": 1, "again": 1, "acknowledged": 1}


async def test_promise_15_no_two_consumers_have_a_job_at_once() -> None:
    """Ten consumers of fifty jobs, none of which is acknowledged: each job is with one of them while its lease runs."""
    clock = ManualClock()
    given: list[str] = []
    async with Simulator() as sim, client_of(sim, clock=clock) as client:

        async def consume() -> None:
            async for job in client.completed(lease=60):
                given.append(job.id)

        expected = [(await client.submit(model_v(f"waves {number}"))).id for number in range(50)]
        await turns_until(lambda: client.stats().unfinished == 0)
        consumers = [await started(consume()) for _ in range(10)]
        await turns_until(lambda: len(given) == 50)
        assert sorted(given) == sorted(expected)
        clock.advance(59)
        await settle(200)
        assert len(given) == 50
        clock.advance(2)
        await turns_until(lambda: len(given) == 100)
        assert sorted(given) == sorted([*expected, *expected])
        for consumer in consumers:
            await gone(consumer)


# --- 16: a retry buys each generation once ---------------------------------------------------------------------------


async def test_promise_16_a_retry_buys_each_generation_once(tmp_path: Path) -> None:
    """Ten callers at once, twice, and again after a restart: one POST for the job, one for each of its two retries."""
    async with Simulator() as sim:
        for _ in range(2):
            async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
                if not sim.ledger.posts:
                    sim.script(faults.failed("no", which=(0, 2)))
                    sim.script(faults.failed("no"))
                first = await client.submit(model_v(count=3), key="order-42")
                await first.outcomes()
                second, *others = await asyncio.gather(*(client.retry(first) for _ in range(10)))
                await second.outcomes()
                third, *more = await asyncio.gather(*(client.retry(second) for _ in range(10)))
                assert {job.id for job in others} == {second.id}
                assert {job.id for job in more} == {third.id}
                assert [job.key for job in (first, second, third)] == ["order-42", "order-42~1", "order-42~2"]
                assert [job.retry_of for job in (first, second, third)] == [None, first.id, second.id]
                assert len(await third) == 2
    assert [post.body["generate_count"] for post in sim.ledger.posts if post.body] == [3, 2, 2]
