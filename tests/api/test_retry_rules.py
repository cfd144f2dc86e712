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

from xiling_async.api.retry_rules import (
    EXCEPTIONS,
    RETRY_ACTIONS,
    ExchangeResult,
    RetryAction,
    RetryActions,
    of_exception,
    of_status,
)

ADDRESS = ConnectionKey("api.example", 443, True, True, None, None, None)
REFUSED = OSError(errno.ECONNREFUSED, "refused")
ASKED = RequestInfo(URL("https://api.example/"), "POST", CIMultiDictProxy(CIMultiDict()), URL("https://api.example/"))


def of(kind: type[BaseException], *known: Any) -> BaseException:
    return kind(*known)


ROWS: list[tuple[BaseException, ExchangeResult]] = [
    (aiohttp.ClientConnectorError(ADDRESS, REFUSED), ExchangeResult.UNREACHABLE),
    (aiohttp.ClientConnectorDNSError(ADDRESS, OSError(-2, "unknown")), ExchangeResult.UNREACHABLE),
    (aiohttp.ClientConnectorSSLError(ADDRESS, ssl.SSLError(1, "handshake")), ExchangeResult.UNREACHABLE),
    (
        aiohttp.ClientConnectorCertificateError(ADDRESS, ssl.SSLCertVerificationError(1, "expired")),
        ExchangeResult.UNREACHABLE,
    ),
    (aiohttp.ClientProxyConnectionError(ADDRESS, REFUSED), ExchangeResult.UNREACHABLE),
    (aiohttp.client_exceptions.UnixClientConnectorError("/run/api", ADDRESS, REFUSED), ExchangeResult.UNREACHABLE),
    (aiohttp.ServerFingerprintMismatch(b"a", b"b", "api.example", 443), ExchangeResult.UNREACHABLE),
    (aiohttp.ConnectionTimeoutError("no connection in time"), ExchangeResult.UNREACHABLE),
    (aiohttp.SocketTimeoutError("no answer in time"), ExchangeResult.CUT),
    (aiohttp.ServerTimeoutError(), ExchangeResult.CUT),
    (aiohttp.ServerDisconnectedError(), ExchangeResult.CUT),
    (aiohttp.ClientOSError(errno.EPIPE, "broken pipe"), ExchangeResult.CUT),
    (aiohttp.ClientConnectionResetError("closing transport"), ExchangeResult.CUT),
    (aiohttp.ClientConnectionError("closed"), ExchangeResult.CUT),
    (aiohttp.ClientError(), ExchangeResult.CUT),
    (TimeoutError(), ExchangeResult.CUT),
    (asyncio.TimeoutError(), ExchangeResult.CUT),  # noqa: UP041 - the name that aiohttp's readers know
    (ConnectionResetError(errno.ECONNRESET, "reset"), ExchangeResult.CUT),
    (BrokenPipeError(errno.EPIPE, "broken pipe"), ExchangeResult.CUT),
    (ssl.SSLError(1, "bad record"), ExchangeResult.CUT),
    (aiohttp.ClientPayloadError("not all of it"), ExchangeResult.BAD_BODY),
    (aiohttp.ClientResponseError(ASKED, (), status=400, message="Bad status line"), ExchangeResult.GARBLED),
    (aiohttp.ContentTypeError(ASKED, ()), ExchangeResult.GARBLED),
    (aiohttp.TooManyRedirects(ASKED, ()), ExchangeResult.GARBLED),
    (aiohttp.ClientHttpProxyError(ASKED, (), status=407), ExchangeResult.GARBLED),
]


@pytest.mark.parametrize(("error", "happened"), ROWS, ids=lambda value: getattr(value, "name", type(value).__name__))
def test_what_an_exception_says(error: BaseException, happened: ExchangeResult) -> None:
    """Only what is raised before a byte could have left is `UNREACHABLE`."""
    assert of_exception(error) is happened


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
        assert (happened is ExchangeResult.UNREACHABLE) == issubclass(cls, unsent)


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError(), KeyboardInterrupt(), ValueError(), RuntimeError("Session is closed"), EOFError()],
)
def test_what_says_nothing_of_the_exchange(error: BaseException) -> None:
    """Bugs and cancellations are not the network's."""
    assert of_exception(error) is None


@given(st.integers(-1, 1_000), st.booleans())
def test_what_a_status_says(status: int, has_api_body: bool) -> None:
    """By hundreds; 429 for itself; a 4xx counts as the API's word only with the API's body."""
    happened = of_status(status, has_api_body=has_api_body)
    if status == 429:
        assert happened is ExchangeResult.LIMITED
    elif status in range(200, 300):
        assert happened is ExchangeResult.ANSWERED
    elif status in range(300, 400):
        assert happened is ExchangeResult.REDIRECTED
    elif status in range(400, 500):
        assert happened is (ExchangeResult.REFUSED if has_api_body else ExchangeResult.NOT_API)
    else:
        assert happened is ExchangeResult.BROKEN


@pytest.mark.parametrize(
    ("status", "has_api_body", "create", "free"),
    [
        (301, True, RetryAction.UNCERTAIN, RetryAction.FAIL),
        (307, False, RetryAction.UNCERTAIN, RetryAction.FAIL),
        (400, True, RetryAction.FAIL, RetryAction.FAIL),
        (401, True, RetryAction.FAIL, RetryAction.FAIL),
        (413, True, RetryAction.FAIL, RetryAction.FAIL),
        (413, False, RetryAction.UNCERTAIN, RetryAction.FAIL),
        (404, False, RetryAction.UNCERTAIN, RetryAction.FAIL),
        (429, True, RetryAction.WAIT, RetryAction.WAIT),
        (429, False, RetryAction.WAIT, RetryAction.WAIT),
        (500, True, RetryAction.UNCERTAIN, RetryAction.AGAIN),
        (502, False, RetryAction.UNCERTAIN, RetryAction.AGAIN),
        (503, True, RetryAction.UNCERTAIN, RetryAction.AGAIN),
        (504, False, RetryAction.UNCERTAIN, RetryAction.AGAIN),
        (101, False, RetryAction.UNCERTAIN, RetryAction.AGAIN),
    ],
)
def test_the_step_after_an_answer(status: int, has_api_body: bool, create: RetryAction, free: RetryAction) -> None:
    """What the table of reliability.md allows; a status GET and an upload cost nothing."""
    happened = of_status(status, has_api_body=has_api_body)
    assert RETRY_ACTIONS[happened] == RetryActions(create=create, free=free)


def test_a_paid_create_is_repeated_in_two_cases_only() -> None:
    """It never arrived, or the service said 429. Everything that may have been taken is uncertain."""
    repeated = {
        happened for happened, row in RETRY_ACTIONS.items() if row.create in (RetryAction.AGAIN, RetryAction.WAIT)
    }
    assert repeated == {ExchangeResult.UNREACHABLE, ExchangeResult.LIMITED}
    assert {happened for happened, row in RETRY_ACTIONS.items() if row.create is RetryAction.FAIL} == {
        ExchangeResult.REFUSED,
        ExchangeResult.NOT_BEGUN,
    }


def test_every_happening_has_its_steps() -> None:
    """Only a whole answer needs none: its body decides."""
    assert set(RETRY_ACTIONS) == set(ExchangeResult) - {ExchangeResult.ANSWERED}
    assert all(row.free is not RetryAction.UNCERTAIN for row in RETRY_ACTIONS.values())


def test_what_was_never_asked_for_never_left() -> None:
    """The body outweighs the exception's type: not asked for, nothing left; asked for, it may have arrived."""
    refused = aiohttp.ClientConnectionError("Connector is closed.")
    assert of_exception(refused) is ExchangeResult.CUT
    assert of_exception(refused, has_left=False) is ExchangeResult.UNREACHABLE
    assert of_exception(LookupError(), has_left=False) is ExchangeResult.NOT_BEGUN
    assert of_exception(aiohttp.InvalidURL("x"), has_left=False) is ExchangeResult.NOT_BEGUN
    assert of_exception(LookupError(), has_left=True) is ExchangeResult.CUT
    assert of_exception(aiohttp.ConnectionTimeoutError(), has_left=True) is ExchangeResult.CUT
    assert of_exception(aiohttp.ClientPayloadError(), has_left=True) is ExchangeResult.BAD_BODY
