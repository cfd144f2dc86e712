"""The filter that keeps callback tokens out of the access logs of other servers."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from aiohttp import web
from support import callback_body, client_of, http, model_v, plain_session, port_of, post, raw_exchange, token_of

from xiling_async import RedactCallbackTokens, WebhookReceiver
from xiling_async.simulator import Simulator

TOKEN = "AQEC" + "x_-9" * 19
PATH = f"/xiling/{TOKEN}"


@contextmanager
def filtering(*names: str) -> Iterator[None]:
    redact = RedactCallbackTokens()
    for name in names:
        logging.getLogger(name).addFilter(redact)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(redact)


def everything_in(caplog: pytest.LogCaptureFixture, *names: str) -> list[str]:
    """Of each record of these loggers: its line, and all its attributes, which a JSON formatter would print."""
    return [f"{record.getMessage()} {vars(record)}" for record in caplog.records if record.name in names]


@pytest.mark.parametrize("is_filtered", [True, False])
async def test_the_access_log_of_aiohttp_shows_no_token(is_filtered: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of an application with the receiver in it; without the filter each line has the token."""
    caplog.set_level(logging.INFO)
    app = web.Application()
    with socket.create_server(("127.0.0.1", 0)) as listening, filtering(*["aiohttp.access"] * is_filtered):
        receiver = WebhookReceiver(f"http://127.0.0.1:{listening.getsockname()[1]}/xiling")
        receiver.add_to(app, "/xiling")
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        token = await exercise(receiver)
        await runner.cleanup()
    check(everything_in(caplog, "aiohttp.access"), token, is_filtered=is_filtered)


@pytest.mark.parametrize("is_filtered", [True, False])
async def test_the_access_log_of_uvicorn_shows_no_token(is_filtered: bool, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn's formatter takes the record's arguments apart: they stay five."""
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as listening, filtering(*["uvicorn.access"] * is_filtered):
        receiver = WebhookReceiver(f"http://127.0.0.1:{listening.getsockname()[1]}/xiling")
        config = uvicorn.Config(receiver.asgi(), log_config=None, ws="none", lifespan="on")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listening])
        token = await exercise(receiver)
        await server.shutdown(sockets=[])
    assert {len(record.args or ()) for record in caplog.records if record.name == "uvicorn.access"} == {5}
    check(everything_in(caplog, "uvicorn.access"), token, is_filtered=is_filtered)


async def exercise(receiver: WebhookReceiver) -> str:
    """The token of a callback that is taken, one that is malformed, and one with the token in other headers."""
    async with Simulator(manual=True) as sim, client_of(sim, receiver=receiver) as client, plain_session() as session:
        job = await client.submit(model_v())
        url = str(sim.ledger.posts[-1].callback_url)
        assert await post(session, url, callback_body(job.task_ids[0]), Referer=url) == 200
        assert await post(session, url, b"{}", **{"User-Agent": token_of(url)}) == 400
        await raw_exchange(port_of(url), http(f"/xiling/{token_of(url)}?a={token_of(url)}", b"", method="GET"))
        return token_of(url)


def check(lines: list[str], token: str, *, is_filtered: bool) -> None:
    assert len(lines) == 3
    assert [token in line for line in lines] == [not is_filtered] * 3
    assert all("/xiling/" in line for line in lines)


@pytest.mark.parametrize(
    ("message", "args", "line"),
    [
        (f"POST {PATH} 200", (), "POST /xiling/<hidden> 200"),
        ("%s %s %d", ("POST", PATH, 200), "POST /xiling/<hidden> 200"),
        ("%(m)s %(p)s %(s)d", ({"m": "POST", "p": PATH, "s": 200},), "POST /xiling/<hidden> 200"),
        ("%s", (("POST", PATH),), "('POST', '/xiling/<hidden>')"),
        ("GET /short?q=1 %s", ("https://a.example/?session=kept",), "GET /short?q=1 https://a.example/?session=kept"),
        ("%s", (17,), "17"),
    ],
)
def test_a_line_without_its_tokens(message: str, args: tuple[Any, ...], line: str) -> None:
    """In the message or in the arguments, whatever their form; all else stays as it is, and nothing is dropped."""
    record = logging.LogRecord("access", logging.INFO, "f.py", 1, message, args, None)
    given = {"path": PATH}
    record.request_line, record.scope = PATH, given
    assert RedactCallbackTokens().filter(record) is True
    assert record.getMessage() == line
    assert TOKEN not in str(vars(record))
    assert given == {"path": PATH}  # what the caller holds is not changed
