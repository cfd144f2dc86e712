"""Buying a job: what goes over the wire, what a key means, how many at once, and what each answer becomes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
from support import (
    FailingStore,
    NotingStore,
    client_of,
    closed_port,
    gone,
    model_kl,
    model_s,
    model_v,
    pumped,
    settle,
    started,
    token_of,
)

from xiling_async import (
    ClientClosed,
    ConfigurationError,
    ImageToVideo,
    InvalidRequest,
    Limits,
    MemoryStore,
    NotSent,
    ProtocolError,
    RateLimited,
    Rejected,
    ServiceError,
    SQLiteStore,
    State,
    Store,
    StoreError,
    SubmitUncertain,
    Unauthorized,
    WebhookReceiver,
    XilingError,
)
from xiling_async.models.lifecycle import Accepted, AnswerLost, OutcomeReported, Refused
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock, SkippingClock

# --- the wire ------------------------------------------------------------------------------------------------------

V = {
    "model": "V", "prompt": "waves at dawn", "image_url": "https://example.com/sea.jpg", "aspect_ratio": "16:9",
    "aspect_resolution": "1080p", "duration": 8, "generate_audio": False, "generate_count": 1,
}  # fmt: skip
KL = {
    "model": "KL", "prompt": "waves at dawn",
    "reference_images": ["https://example.com/sea.jpg", "https://example.com/sky.jpg"], "aspect_ratio": "9:16",
    "aspect_resolution": "720p", "duration": 5, "generate_count": 1,
}  # fmt: skip
S = {
    "model": "S", "prompt": "waves at dawn", "image_url": "https://example.com/sea.jpg", "aspect_ratio": "16:9",
    "aspect_resolution": "720p", "duration": 12, "generate_count": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "body"),
    [
        (model_v(), V), (model_kl(), KL), (model_s(), S), (model_v(count=3), V | {"generate_count": 3}),
        (model_v('"\\ \n é 水 🌊 \x7f'), V | {"prompt": '"\\ \n é 水 🌊 \x7f'}),
        (ImageToVideo.unchecked(**V, seed=7, style={"a": [None, 1.5]}), V | {"seed": 7, "style": {"a": [None, 1.5]}}),
    ],
    ids=["V", "KL", "S", "V, three", "Unicode", "unchecked"],
)  # fmt: skip
async def test_the_body_is_the_documented_fields_and_the_callback_url(
    request_: ImageToVideo, body: dict[str, object]
) -> None:
    """Exactly the fields of the vendor's page, nothing null, and one callback URL."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        await client.submit(request_)
        (seen,) = sim.ledger.posts
        assert seen.body == body | {"callback_url": seen.callback_url}
        assert seen.headers["content-type"] == "application/json"


async def test_the_callback_url_is_one_short_opaque_segment() -> None:
    """At most 80 characters of [A-Za-z0-9_-], a new one for every job, with no key in it."""
    receiver = WebhookReceiver(port=0)
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client:
        for _ in range(20):
            await client.submit(model_v())
        urls = [str(post.callback_url) for post in sim.ledger.posts]
        assert all(re.fullmatch(re.escape(f"{receiver.public_url}/") + "[A-Za-z0-9_-]{1,80}", url) for url in urls)
        assert len({token_of(url) for url in urls}) == 20


async def test_each_attempt_has_a_callback_url_of_its_own() -> None:
    """After a 429 the same job is sent under another token: a callback names the POST that was taken."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.rate_limited(1))
        job = await pumped(clock, client.submit(model_v()))
        first, second = (post.callback_url for post in sim.ledger.posts)
        assert first != second
        assert await sim.finish(job.task_ids[0]) == 200


async def test_the_key_is_in_one_header_only() -> None:
    """The bearer token is in Authorization, and nowhere else in the request; extra headers go along."""
    key = "canary-key-123"
    async with (
        Simulator(key) as sim,
        client_of(sim, api_key=key, headers={"source": "skill", "X-Trace": "7"}) as client,
    ):
        await client.submit(model_v())
        (post,) = sim.ledger.posts
        assert post.headers["authorization"] == f"Bearer {key}"
        assert [name for name, value in post.headers.items() if key in value] == ["authorization"]
        assert key not in str(post.body)
        assert (post.headers["source"], post.headers["x-trace"]) == ("skill", "7")


@pytest.mark.parametrize("name", ["Authorization", "authorization", "Content-Type", "Content-Length", "Host"])
async def test_headers_that_are_the_clients_own_are_refused(name: str) -> None:
    """Nobody sends another key, or another length, by accident."""
    async with Simulator() as sim:
        with pytest.raises(ConfigurationError, match=name):
            client_of(sim, headers={name: "x"})


@pytest.mark.parametrize("headers", [{"X-A": "b\r\nX-C: d"}, {"X-A\n": "b"}, {"X-A": 7}, {"X-A": "\0"}])
async def test_headers_that_are_no_text_lines_are_refused(headers: dict[str, str]) -> None:
    """A header cannot smuggle in another one."""
    async with Simulator() as sim:
        with pytest.raises(ConfigurationError):
            client_of(sim, headers=headers)


async def test_a_borrowed_session_is_used_and_left_open() -> None:
    """The user's session carries the POST with our key, keeps its own headers to itself, and is open afterwards."""
    async with Simulator() as sim, aiohttp.ClientSession(headers={"X-Mine": "1"}) as session:
        async with client_of(sim, session=session) as client:
            await (await client.submit(model_v()))
            sim.script(faults.business_error(100001, "no", http=400))
            with pytest.raises(Rejected):
                await client.submit(model_v())
        assert not session.closed
        assert "Authorization" not in session.headers
        assert [post.headers["authorization"] for post in sim.ledger.posts] == [f"Bearer {sim.api_key}"] * 2


async def test_a_redirect_does_not_carry_the_key_elsewhere() -> None:
    """The paid body and its key go to the API's origin alone, wherever an answer points."""
    async with Simulator(manual=True) as sim, Simulator(manual=True) as elsewhere, client_of(sim) as client:
        for code in (301, 302, 303, 307, 308):
            sim.script(faults.redirect(f"{elsewhere.base_url}/image_to_video", code))
            assert (await client.submit(model_v())).state is State.UNCERTAIN
        assert (len(sim.ledger.posts), elsewhere.ledger.posts, elsewhere.ledger.gets) == (5, [], [])


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_the_same_key_at_once_is_one_post_and_one_job() -> None:
    """Fifty callers of one key: one POST, and all of them hold the same job."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        jobs = await asyncio.gather(*(client.submit(model_v(), key="order-42") for _ in range(50)))
        assert ({job.id for job in jobs}, {job.key for job in jobs}) == ({jobs[0].id}, {"order-42"})
        assert {job.task_ids for job in jobs} == {sim.ledger.task_ids}
        assert len(sim.ledger.posts) == 1
        again = await client.submit(model_v(), key="order-42")
        assert (again.id, len(sim.ledger.posts)) == (jobs[0].id, 1)


async def test_the_same_key_after_a_restart_is_the_same_job() -> None:
    """Another client with the same store finds the job by its key and sends nothing, in every state of the job."""
    store = MemoryStore()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store) as client:
            accepted = await client.submit(model_v(), key="accepted")
            done = await client.submit(model_v(), key="done")
            assert await sim.finish(done.task_ids[0]) == 200
            failed = await client.submit(model_v(), key="failed")
            assert await sim.finish(failed.task_ids[0], "FAILED") == 200
            sim.script(faults.drop_after_accept())
            uncertain = await client.submit(model_v(), key="uncertain")
        async with client_of(sim, store=store) as client:
            for job in (accepted, done, failed, uncertain):
                again = await client.submit(model_v(), key=str(job.key))
                assert (again.id, again.task_ids, again.state) == (job.id, job.task_ids, job.state)
        assert len(sim.ledger.posts) == 4


async def test_a_key_with_another_request_is_refused_before_anything_is_sent() -> None:
    """While the first is on its way, and afterwards: the key stays the first one's, one POST is seen."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.hold_answers()
        first = asyncio.create_task(client.submit(model_v("one"), key="order-42"))
        await sim.wait_for_posts(1)
        for other in (model_v("two"), model_v("one", count=2), model_s("one")):
            with pytest.raises(InvalidRequest) as caught:
                await client.submit(other, key="order-42")
            assert (caught.value.charged, caught.value.problems[0].field) == ("no", "key")
        sim.release_answers()
        job = await first
        with pytest.raises(InvalidRequest) as caught:
            await client.submit(model_v("two"), key="order-42")
        assert caught.value.job_id == job.id
        assert len(sim.ledger.posts) == 1


@pytest.mark.parametrize(
    "refused",
    [faults.business_error(100001, "no", http=400), faults.business_error(999, "no"), faults.status(401)],
    ids=repr,
)
async def test_a_key_that_bought_nothing_may_be_submitted_again(refused: faults.Fault) -> None:
    """A refused job is the same job when its key is used again: it is sent anew, once."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(refused)
        with pytest.raises(ServiceError) as caught:
            await client.submit(model_v(), key="order-42")
        job = await client.submit(model_v(), key="order-42")
        assert (job.id, job.state) == (caught.value.job_id, State.ACCEPTED)
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (2, 1)
        with pytest.raises(InvalidRequest):
            await client.submit(model_v("other"), key="order-42")
        assert await sim.finish(job.task_ids[0]) == 200
        assert len(await job) == 1


async def test_a_key_that_was_never_sent_may_be_submitted_again() -> None:
    """After `NotSent` the same key is tried anew, also by another client with the same store."""
    clock, store = ManualClock(), MemoryStore()
    async with Simulator(manual=True) as sim:
        with closed_port() as port:
            async with client_of(sim, clock=clock, store=store, base_url=f"http://127.0.0.1:{port}/v1") as client:
                for _ in range(2):
                    with pytest.raises(NotSent) as caught:
                        await pumped(clock, client.submit(model_v(), key="order-42"))
                    assert caught.value.charged == "no"
        async with client_of(sim, clock=clock, store=store) as client:
            job = await client.submit(model_v(), key="order-42")
            assert job.id == caught.value.job_id
            assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 1)


async def test_a_key_in_doubt_is_never_sent_again() -> None:
    """A submit of unknown fate stays the job of its key: a hundred more submits send nothing."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.drop_before_read())
        job = await client.submit(model_v(), key="order-42")
        jobs = await asyncio.gather(*(client.submit(model_v(), key="order-42") for _ in range(100)))
        assert ({other.id for other in jobs}, job.state) == ({job.id}, State.UNCERTAIN)
        assert len(sim.ledger.posts) == 1


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_refused_request_frees_its_key_for_a_corrected_one(store: str, tmp_path: Path) -> None:
    """The service says no: the key takes the corrected request, which is bought once, also as the store has it."""
    kept: Store = MemoryStore() if store == "memory" else SQLiteStore(tmp_path / "jobs.db")
    async with Simulator(manual=True) as sim, client_of(sim, store=kept) as client:
        sim.script(faults.business_error(100005, "Prompt too long"))
        with pytest.raises(Rejected, match="Change the request"):
            await client.submit(model_v("too long"), key="order-42")
        job = await client.submit(model_v("short", count=2), key="order-42")
        assert len(job.task_ids) == 2
        assert [(post.body or {})["prompt"] for post in sim.ledger.posts] == ["too long", "short"]
        record = await kept.get(job.id)
        assert record is not None
        assert (record.request, record.asked, record.attempt) == (model_v("short", count=2), 2, 2)
        with pytest.raises(InvalidRequest, match="key"):
            await client.submit(model_v("another"), key="order-42")
        assert sim.ledger.paid_submits == 1


@pytest.mark.parametrize("key", ["", 7, b"order-42", ()])
async def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    """A key is text that is not empty; nothing is sent otherwise."""
    async with Simulator() as sim, client_of(sim) as client:
        with pytest.raises(InvalidRequest):
            await client.submit(model_v(), key=key)  # type: ignore[arg-type]
        assert sim.ledger.posts == []


@pytest.mark.parametrize("thing", [None, {}, "waves at dawn", ImageToVideo, V])
async def test_what_is_no_request_is_refused(thing: object) -> None:
    """`submit` and `run` take requests; nothing is sent otherwise."""
    async with Simulator() as sim, client_of(sim) as client:
        for take in (client.submit, client.run):
            with pytest.raises(InvalidRequest):
                await take(thing)  # type: ignore[arg-type]
        assert sim.ledger.posts == []


# --- how many at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_are_in_flight_than_the_limit(most: int) -> None:
    """With the answers held back, exactly `Limits.submits` POSTs arrive; each answer lets one more leave."""
    async with Simulator(manual=True) as sim, client_of(sim, limits=Limits(submits=most)) as client:
        sim.hold_answers()
        submits = [asyncio.create_task(client.submit(model_v(str(number)))) for number in range(7)]
        await sim.wait_for_posts(most)
        await settle(500)
        assert len(sim.ledger.posts) == most
        sim.release_answers()
        jobs = await asyncio.gather(*submits)
        assert (len({job.id for job in jobs}), len(sim.ledger.posts)) == (7, 7)


async def test_a_submit_cancelled_in_the_queue_sends_nothing_and_gives_its_turn_back() -> None:
    """Cancelled before its turn: no POST, nothing in the store; the others are not held up."""
    store = NotingStore()
    async with Simulator(manual=True) as sim, client_of(sim, limits=Limits(submits=1), store=store) as client:
        sim.hold_answers()
        first = asyncio.create_task(client.submit(model_v("first")))
        await sim.wait_for_posts(1)
        queued = [await started(client.submit(model_v("queued"), key=key)) for key in (None, "a key", None)]
        last = await started(client.submit(model_v("last")))
        for task in queued:
            await gone(task)
        sim.release_answers()
        await asyncio.gather(first, last)
        await settle()
        assert [str((post.body or {})["prompt"]) for post in sim.ledger.posts] == ["first", "last"]
        assert len(await store.everything()) == 2
        assert await client.find("a key") is None


async def test_a_submit_cancelled_during_a_pause_is_not_sent_again() -> None:
    """Cancelled between a 429 and the next try: one POST, refused; the key can be used again."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.rate_limited(10))
        submitting = asyncio.create_task(client.submit(model_v(), key="order-42"))
        await sim.wait_for_posts(1)
        await settle()
        await gone(submitting)
        clock.advance(60)
        await settle(200)
        assert len(sim.ledger.posts) == 1
        job = await client.submit(model_v(), key="order-42")
        assert (job.state, len(sim.ledger.posts), sim.ledger.paid_submits) == (State.ACCEPTED, 2, 1)


async def test_a_submit_cancelled_at_any_turn_loses_no_job_and_buys_none_twice() -> None:
    """Cancelled after n turns of the loop, for every n until it is through: the key then gives the one paid job."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        turns, is_through = 0, False
        while not is_through:
            key, paid = f"order-{turns}", sim.ledger.paid_submits
            submitting = asyncio.create_task(client.submit(model_v(), key=key))
            await settle(turns)
            is_through = submitting.done()
            submitting.cancel()
            await asyncio.wait({submitting})
            job = await client.submit(model_v(), key=key)
            assert job.state is State.ACCEPTED
            assert sim.ledger.paid_submits == paid + 1
            assert await sim.finish(job.task_ids[0]) == 200
            turns += 1
        assert turns > 5
        assert len(sim.ledger.posts) == sim.ledger.paid_submits == turns


# --- what an answer becomes ----------------------------------------------------------------------------------------

REJECTING = (100001, 100004, 100005, 100006, 100007)


@pytest.mark.parametrize(
    ("fault", "error", "status", "code"),
    [
        (faults.business_error(100002, "Invalid token", http=401), Unauthorized, 401, 100002),
        (faults.business_error(100002, "Invalid token"), Unauthorized, 200, 100002),
        (faults.status(403), Unauthorized, 403, 403),
        *((faults.business_error(code, "no"), Rejected, 200, code) for code in REJECTING),
        *((faults.status(status), Rejected, status, status) for status in (400, 404, 413, 415, 422)),
        (faults.business_error(424242, "?"), ServiceError, 200, 424242),
        (faults.business_error(-1, "?"), ServiceError, 200, -1),
        (faults.status(409), ServiceError, 409, 409),
        (faults.status(400, body=b'{"code": 0, "msg": "ok", "data": null}'), Rejected, 400, 0),
    ],
    ids=repr,
)  # fmt: skip
async def test_a_refusal_is_an_error_that_says_why(
    fault: faults.Fault, error: type[ServiceError], status: int, code: int
) -> None:
    """The service's status, code and words are in the error; nothing was charged, nothing is sent again."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(fault)
        with pytest.raises(ServiceError) as caught:
            await client.submit(model_v())
        found = caught.value
        assert (type(found), found.status, found.code, found.charged) == (error, status, code, "no")
        assert found.service_message == getattr(fault, "msg", found.service_message)
        assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 0)
        job = await client.find(str(found.job_id))
        assert job is not None
        assert job.state is State.REJECTED


async def test_a_wrong_key_is_unauthorized() -> None:
    """With a key the service does not know: one POST, `Unauthorized`, and the advice to check the key."""
    async with Simulator("right-key") as sim, client_of(sim, api_key="wrong-key") as client:
        with pytest.raises(Unauthorized, match="XILING_API_KEY") as caught:
            await client.submit(model_v())
        assert "wrong-key" not in str(caught.value)
        assert len(sim.ledger.posts) == 1


async def test_429_for_ever_is_rate_limited_with_its_pause() -> None:
    """The last error says how long the service wanted to be left alone."""
    clock = ManualClock()
    async with Simulator() as sim, client_of(sim, clock=clock) as client:
        sim.default(faults.rate_limited(12))
        with pytest.raises(RateLimited) as caught:
            await pumped(clock, client.submit(model_v()))
        assert (caught.value.retry_after, caught.value.charged, caught.value.status) == (12, "no", 429)


@pytest.mark.parametrize("header", [0, "-5", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 400, "1e9", "١٢", ""])
async def test_a_strange_retry_after_neither_hurries_nor_stops_the_client(header: float | str) -> None:
    """Whatever Retry-After says, the next try comes, at the latest after five minutes, and the job is bought once."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.rate_limited(header))
        job = await pumped(clock, client.submit(model_v()), step_s=5.0)
        assert (job.state, sim.ledger.paid_submits, len(sim.ledger.posts)) == (State.ACCEPTED, 1, 2)
        assert clock.time() <= ManualClock().time() + 305


@pytest.mark.parametrize("mode", ["wait", "raise"])
async def test_on_uncertain_decides_what_submit_does(mode: str) -> None:
    """ "wait" returns the job, "raise" raises at once with the job in it; both are adopted by the callback."""
    async with Simulator(manual=True) as sim, client_of(sim, on_uncertain=mode) as client:
        sim.script(faults.drop_after_accept())
        if mode == "raise":
            with pytest.raises(SubmitUncertain) as caught:
                await client.submit(model_v(), key="order-42")
            assert (caught.value.charged, caught.value.task_ids) == ("maybe", ())
            job = caught.value.job
            assert job.id == caught.value.job_id
        else:
            job = await client.submit(model_v(), key="order-42")
        assert (job.state, job.task_ids) == ("uncertain", ())
        waiting = await started(job.result())
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert [video.task_id for video in await waiting] == list(sim.ledger.task_ids)
        assert (job.state, len(sim.ledger.posts)) == ("done", 1)


@pytest.mark.parametrize("mode", ["", "never", None])
async def test_on_uncertain_is_one_of_two_words(mode: object) -> None:
    """Anything else is refused when the client is made."""
    async with Simulator() as sim:
        with pytest.raises(ConfigurationError, match="on_uncertain"):
            client_of(sim, on_uncertain=mode)


async def test_an_uncertain_job_nobody_adopts_ends_as_uncertain() -> None:
    """After `timeouts.uncertain` awaiting it raises `SubmitUncertain`; a callback that comes later still wins."""
    clock = ManualClock()
    async with Simulator(manual=True) as sim, client_of(sim, clock=clock) as client:
        sim.script(faults.drop_after_accept())
        job = await client.submit(model_v())
        waiting = await started(job.result(timeout=7200))
        clock.advance(3600 - 1)
        await settle(200)
        assert not waiting.done()
        clock.advance(2)
        with pytest.raises(SubmitUncertain) as caught:
            await waiting
        assert (caught.value.job, caught.value.charged) == (job, "maybe")
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert len(await job) == 1
        assert len(sim.ledger.posts) == 1


@pytest.mark.parametrize(("asked", "answered"), [(1, 2), (1, 4), (2, 1), (4, 3), (4, 5)])
async def test_another_number_of_ids_is_said_and_every_id_is_kept(asked: int, answered: int) -> None:
    """More or fewer tasks than asked for: `ProtocolError`, charged; the job has all that were bought, and ends."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.ids(answered))
        with pytest.raises(ProtocolError) as caught:
            await client.submit(model_v(count=asked), key="order-42")
        assert (caught.value.charged, caught.value.task_ids) == ("yes", sim.ledger.task_ids)
        job = await client.submit(model_v(count=asked), key="order-42")
        assert (job.id, job.task_ids) == (caught.value.job_id, sim.ledger.task_ids)
        for task_id in sim.ledger.task_ids:
            assert await sim.finish(task_id) == 200
        assert len(await job) == answered
        assert len(sim.ledger.posts) == 1


async def test_a_paid_task_that_the_answer_left_out_is_taken_from_its_callback() -> None:
    """Two were asked for and made, the answer names one: the other one's callback carries our token, and is kept."""
    async with Simulator(manual=True, seed=7) as twin, client_of(twin) as client:
        first, second = (await client.submit(model_v(count=2))).task_ids  # the same seed makes the same ids
    async with Simulator(manual=True, seed=7) as sim, client_of(sim) as client:
        sim.script(faults.answer_data({"task_ids": [first]}))
        with pytest.raises(ProtocolError):
            await client.submit(model_v(count=2), key="order-42")
        assert sim.ledger.task_ids == (first, second)
        assert [await sim.finish(second), await sim.finish(first)] == [200, 200]
        job = await client.submit(model_v(count=2), key="order-42")
        assert {video.task_id for video in await job} == {first, second}


async def test_an_id_that_is_answered_twice_is_one_task() -> None:
    """The same id twice for two outputs: said as a wrong number, kept once."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.answer_data({"task_ids": ["i2v-a", "i2v-a"]}))
        with pytest.raises(ProtocolError) as caught:
            await client.submit(model_v(count=2))
        assert (caught.value.task_ids, caught.value.charged) == (("i2v-a",), "yes")


@pytest.mark.parametrize(
    "ids",
    [["i2v-a", None], ["i2v-a", 7], ["i2v-a", ""], [["i2v-a"]], "i2v-a", {"0": "i2v-a"}, ["a b"], ["."], ["i" * 300]],
    ids=repr,
)
async def test_ids_that_are_none_leave_the_job_in_doubt(ids: object) -> None:
    """An answer whose ids cannot be read proves that something was bought, not what: the callback tells."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        sim.script(faults.answer_data({"task_ids": ids}))
        job = await client.submit(model_v())
        assert (job.state, job.task_ids) == (State.UNCERTAIN, ())
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        assert len(await job) == 1
        assert len(sim.ledger.posts) == 1


async def test_ids_that_belong_to_another_job_are_not_taken() -> None:
    """The service answers with the ids of an earlier job: that one keeps them, this one is in doubt."""
    async with Simulator(manual=True) as sim, client_of(sim) as client:
        first = await client.submit(model_v())
        sim.script(faults.answer_data({"task_ids": list(first.task_ids)}))
        second = await client.submit(model_v())
        assert (second.state, second.task_ids) == (State.UNCERTAIN, ())
        assert await sim.finish(first.task_ids[0]) == 200
        assert (first.state, second.state) == (State.DONE, State.UNCERTAIN)
        assert await sim.finish(sim.ledger.task_ids[1]) == 200
        assert [video.task_id for video in await second] == [sim.ledger.task_ids[1]]
        assert len(sim.ledger.posts) == 2


# --- a store that fails --------------------------------------------------------------------------------------------


async def test_an_intent_that_cannot_be_written_is_not_sent() -> None:
    """No job leaves that would not be remembered."""
    async with Simulator() as sim, client_of(sim, store=FailingStore(JobRecord)) as client:
        with pytest.raises(StoreError) as caught:
            await client.submit(model_v())
        assert (caught.value.charged, sim.ledger.posts) == ("no", [])


@pytest.mark.parametrize(
    ("event", "fault", "charged"),
    [
        (Accepted, None, "yes"), (AnswerLost, faults.drop_after_accept(), "maybe"),
        (Refused, faults.business_error(100001, "no", http=400), "no"),
    ],
    ids=["accepted", "lost", "refused"],
)  # fmt: skip
async def test_an_answer_that_cannot_be_written_says_what_was_bought(
    event: type[object], fault: faults.Fault | None, charged: str
) -> None:
    """The error is the only place that still knows: charged or not, and the ids; the callback adopts the job."""
    store, clock = FailingStore(event), SkippingClock(quiet_s=0.01)
    async with Simulator(manual=True) as sim, client_of(sim, store=store, clock=clock) as client:
        sim.script(*([fault] if fault else []))
        with pytest.raises(StoreError) as caught:
            await client.submit(model_v(), key="order-42")
        assert caught.value.charged == charged
        assert caught.value.task_ids == (sim.ledger.task_ids if charged == "yes" else ())
        assert len(sim.ledger.posts) == 1
        store.fails = ()
        if charged != "no":
            assert await sim.finish(sim.ledger.task_ids[0]) == 200
            job = await client.submit(model_v(), key="order-42")
            assert len(await job) == 1
            assert len(sim.ledger.posts) == 1


# --- the life of a client ------------------------------------------------------------------------------------------


async def test_a_client_that_is_not_open_sends_nothing() -> None:
    """Before `async with` and after it: `ClientClosed`; the service sees nothing, also through a borrowed session."""
    async with Simulator() as sim, aiohttp.ClientSession() as session:
        client = client_of(sim, session=session)
        with pytest.raises(ClientClosed) as caught:
            await client.submit(model_v())
        assert caught.value.charged == "no"
        async with client:
            job = await client.submit(model_v())
            await job
        for use in (
            client.submit(model_v()),
            client.run(model_v()),
            client.find(job.id),
            client.submit(model_v(), key="k"),
        ):
            with pytest.raises(ClientClosed):
                await use
        with pytest.raises(ClientClosed):
            [job async for job in client.recover()]
        assert len(sim.ledger.posts) == 1


async def test_a_client_is_entered_once() -> None:
    """A second `async with` is refused, inside the first and after it, and harms nothing."""
    async with Simulator() as sim:
        client = client_of(sim)
        async with client:
            with pytest.raises(ConfigurationError):
                await client.__aenter__()
            await (await client.submit(model_v()))
        with pytest.raises(ConfigurationError):
            await client.__aenter__()
        assert len(sim.ledger.posts) == 1


async def test_another_event_loop_is_refused() -> None:
    """A client belongs to the loop that it was opened in; from another one nothing is sent."""
    async with Simulator() as sim, client_of(sim) as client:

        def elsewhere() -> str:
            try:
                asyncio.run(client.submit(model_v()))
            except XilingError as error:
                return type(error).__name__
            return "sent"

        assert await asyncio.to_thread(elsewhere) == "ConfigurationError"
        assert sim.ledger.posts == []


@pytest.mark.parametrize("key", [None, "order-42"])
async def test_closing_waits_for_the_ids_of_a_post_that_has_left(key: str | None) -> None:
    """The client is left while a POST is out: its caller gets the job, and the store has its ids."""
    store = NotingStore()

    async def release_later() -> None:
        await settle()
        sim.release_answers()

    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store) as client:
            sim.hold_answers()
            submitting = asyncio.create_task(client.submit(model_v(), key=key))
            await sim.wait_for_posts(1)
            releasing = asyncio.create_task(release_later())
        await releasing
        await asyncio.wait({submitting})
        assert not submitting.cancelled()
        job = submitting.result()
        assert job.task_ids == sim.ledger.task_ids
        (record,) = (await store.everything()).values()
        assert (record.state, record.task_ids) == (State.ACCEPTED, sim.ledger.task_ids)


@pytest.mark.parametrize("key", [None, "order-42"])
@pytest.mark.parametrize("waits_for", ["a permit", "the gate", "the network"])
async def test_closing_sends_home_who_was_not_sent_yet(waits_for: str, key: str | None) -> None:
    """Submits that wait for a permit, the end of a 429 or the network: `ClientClosed`, and nothing more is sent."""
    clock = ManualClock()
    with closed_port() as port:
        async with Simulator(manual=True) as sim:
            url = f"http://127.0.0.1:{port}/v1" if waits_for == "the network" else sim.base_url
            async with client_of(sim, clock=clock, limits=Limits(submits=1), base_url=url) as client:
                if waits_for == "a permit":
                    sim.hold_answers()
                    first = asyncio.create_task(client.submit(model_v("first")))
                    await sim.wait_for_posts(1)
                elif waits_for == "the gate":
                    sim.script(faults.rate_limited(20))
                waiting = asyncio.create_task(client.submit(model_v(), key=key))
                if waits_for != "the network":
                    await sim.wait_for_posts(1)
                await settle(300)
                posts = len(sim.ledger.posts)
                asyncio.get_running_loop().call_soon(sim.release_answers)
            if waits_for == "a permit":
                assert (await first).task_ids == sim.ledger.task_ids
            clock.advance(3600)
            await settle(200)
            assert waiting.done()
            assert not waiting.cancelled()
            assert isinstance(waiting.exception(), ClientClosed)
            assert len(sim.ledger.posts) == posts


async def test_a_callback_is_still_taken_while_the_client_closes() -> None:
    """The POST that is out at the end may be answered by its callback alone: it is heard before the door shuts."""
    store = NotingStore()
    async with Simulator(manual=True) as sim:

        async def call_back_later() -> int | None:
            await settle()
            answer = await sim.finish(sim.ledger.task_ids[0])
            sim.release_answers()
            return answer

        async with client_of(sim, store=store) as client:
            sim.hold_answers()
            sim.script(faults.drop_after_accept())
            submitting = asyncio.create_task(client.submit(model_v()))
            await sim.wait_for_posts(1)
            calling = asyncio.create_task(call_back_later())
        assert await calling == 200
        job = await submitting
        assert (job.state, len(await job)) == (State.DONE, 1)
        assert any(isinstance(event, OutcomeReported) for event in store.asked)
