"""What a failed exchange proves: the table, row by row, against the exceptions that aiohttp really has."""

from __future__ import annotations

import asyncio
import errno
import inspect
import ssl
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey, RequestInfo
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from xiling_async.api.classify import (
    EXCEPTIONS,
    FAILURES,
    STEPS,
    Happened,
    Step,
    after_create,
    after_status,
    after_upload,
    of_exception,
    of_status,
)

ADDRESS = ConnectionKey("api.example", 443, True, True, None, None, None)
REFUSED = OSError(errno.ECONNREFUSED, "refused")
ASKED = RequestInfo(URL("https://api.example/"), "POST", CIMultiDictProxy(CIMultiDict()), URL("https://api.example/"))


def of(kind: type[BaseException], *known: Any) -> BaseException:
    return kind(*known)


ROWS: list[tuple[BaseException, Happened]] = [
    (aiohttp.ClientConnectorError(ADDRESS, REFUSED), Happened.UNREACHABLE),
    (aiohttp.ClientConnectorDNSError(ADDRESS, OSError(-2, "unknown")), Happened.UNREACHABLE),
    (aiohttp.ClientConnectorSSLError(ADDRESS, ssl.SSLError(1, "handshake")), Happened.UNREACHABLE),
    (
        aiohttp.ClientConnectorCertificateError(ADDRESS, ssl.SSLCertVerificationError(1, "expired")),
        Happened.UNREACHABLE,
    ),
    (aiohttp.ClientProxyConnectionError(ADDRESS, REFUSED), Happened.UNREACHABLE),
    (aiohttp.client_exceptions.UnixClientConnectorError("/run/api", ADDRESS, REFUSED), Happened.UNREACHABLE),
    (aiohttp.ServerFingerprintMismatch(b"a", b"b", "api.example", 443), Happened.UNREACHABLE),
    (aiohttp.ConnectionTimeoutError("no connection in time"), Happened.UNREACHABLE),
    (aiohttp.SocketTimeoutError("no answer in time"), Happened.CUT),
    (aiohttp.ServerTimeoutError(), Happened.CUT),
    (aiohttp.ServerDisconnectedError(), Happened.CUT),
    (aiohttp.ClientOSError(errno.EPIPE, "broken pipe"), Happened.CUT),
    (aiohttp.ClientConnectionResetError("closing transport"), Happened.CUT),
    (aiohttp.ClientConnectionError("closed"), Happened.CUT),
    (aiohttp.ClientError(), Happened.CUT),
    (TimeoutError(), Happened.CUT),
    (asyncio.TimeoutError(), Happened.CUT),  # noqa: UP041 - the name that aiohttp's readers know
    (ConnectionResetError(errno.ECONNRESET, "reset"), Happened.CUT),
    (BrokenPipeError(errno.EPIPE, "broken pipe"), Happened.CUT),
    (ssl.SSLError(1, "bad record"), Happened.CUT),
    (aiohttp.ClientPayloadError("not all of it"), Happened.BAD_BODY),
    (aiohttp.ClientResponseError(ASKED, (), status=400, message="Bad status line"), Happened.GARBLED),
    (aiohttp.ContentTypeError(ASKED, ()), Happened.GARBLED),
    (aiohttp.TooManyRedirects(ASKED, ()), Happened.GARBLED),
    (aiohttp.ClientHttpProxyError(ASKED, (), status=407), Happened.GARBLED),
]


@pytest.mark.parametrize(("error", "happened"), ROWS, ids=lambda value: getattr(value, "name", type(value).__name__))
def test_what_an_exception_says(error: BaseException, happened: Happened) -> None:
    """Only what is raised before a byte could have left is `UNREACHABLE`."""
    assert of_exception(error) is happened
    assert isinstance(error, FAILURES)


def test_no_row_hides_a_later_one() -> None:
    """The list is read from the top: a class stands below everything that derives from it."""
    kinds = [kind for kind, _ in EXCEPTIONS]
    for place, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[place + 1 :])


def test_every_error_of_aiohttp_has_a_row() -> None:
    """No exception of an exchange is unknown, in a newer aiohttp neither; only failed connects are unsent."""
    family = [cls for cls in vars(aiohttp).values() if inspect.isclass(cls) and issubclass(cls, aiohttp.ClientError)]
    assert len(family) > 20
    unsent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ServerFingerprintMismatch)
    for cls in family:
        happened = of_exception(cls.__new__(cls))
        assert happened is not None
        assert (happened is Happened.UNREACHABLE) == issubclass(cls, unsent)


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError(), KeyboardInterrupt(), ValueError(), RuntimeError("Session is closed"), EOFError()],
)
def test_what_says_nothing_of_the_exchange(error: BaseException) -> None:
    """Bugs and cancellations are not the network's."""
    assert of_exception(error) is None
    assert not isinstance(error, FAILURES)


@given(st.integers(-1, 1_000), st.booleans())
def test_what_a_status_says(status: int, has_api_body: bool) -> None:
    """By hundreds; 429 for itself; a 4xx counts as the API's word only with the API's body."""
    happened = of_status(status, has_api_body=has_api_body)
    if status == 429:
        assert happened is Happened.LIMITED
    elif status in range(200, 300):
        assert happened is Happened.ANSWERED
    elif status in range(300, 400):
        assert happened is Happened.REDIRECTED
    elif status in range(400, 500):
        assert happened is (Happened.REFUSED if has_api_body else Happened.NOT_API)
    else:
        assert happened is Happened.BROKEN


@pytest.mark.parametrize(
    ("status", "has_api_body", "create", "free"),
    [
        (301, True, Step.UNCERTAIN, Step.FAIL),
        (307, False, Step.UNCERTAIN, Step.FAIL),
        (400, True, Step.FAIL, Step.FAIL),
        (401, True, Step.FAIL, Step.FAIL),
        (413, True, Step.FAIL, Step.FAIL),
        (413, False, Step.UNCERTAIN, Step.FAIL),
        (404, False, Step.UNCERTAIN, Step.FAIL),
        (429, True, Step.WAIT, Step.WAIT),
        (429, False, Step.WAIT, Step.WAIT),
        (500, True, Step.UNCERTAIN, Step.AGAIN),
        (502, False, Step.UNCERTAIN, Step.AGAIN),
        (503, True, Step.UNCERTAIN, Step.AGAIN),
        (504, False, Step.UNCERTAIN, Step.AGAIN),
        (101, False, Step.UNCERTAIN, Step.AGAIN),
    ],
)
def test_the_step_after_an_answer(status: int, has_api_body: bool, create: Step, free: Step) -> None:
    """What the table of reliability.md allows; a status GET and an upload cost nothing."""
    happened = of_status(status, has_api_body=has_api_body)
    assert (after_create(happened), after_status(happened), after_upload(happened)) == (create, free, free)


def test_a_paid_create_is_repeated_in_two_cases_only() -> None:
    """It never arrived, or the service said 429. Everything that may have been taken is uncertain."""
    repeated = {happened for happened in STEPS if after_create(happened) in (Step.AGAIN, Step.WAIT)}
    assert repeated == {Happened.UNREACHABLE, Happened.LIMITED}
    assert {happened for happened in STEPS if after_create(happened) is Step.FAIL} == {
        Happened.REFUSED,
        Happened.NOT_BEGUN,
    }


def test_every_happening_has_its_steps() -> None:
    """Only a whole answer needs none: its body decides."""
    assert set(STEPS) == set(Happened) - {Happened.ANSWERED}
    for after in (after_status, after_upload):
        assert all(after(happened) is not Step.UNCERTAIN for happened in STEPS)
