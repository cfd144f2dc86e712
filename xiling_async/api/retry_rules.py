"""What a failed exchange proves, as a table: what happened to a request, and what may be done next.

A create is paid: it is sent again only where it cannot have been taken. (Exceptions are those of aiohttp 3.14.)

| happened    | seen as                                                                                  |
| ----------- | ---------------------------------------------------------------------------------------- |
| NOT_BEGUN   | an error of the client before a byte of the body was asked for: nothing left             |
| UNREACHABLE | DNS, refused, TLS, no connection in time: not a byte of the request left                 |
| CUT         | disconnected, reset, no answer in time: the request may have been taken                  |
| BAD_BODY    | an answer below 300 whose body broke off, is not JSON of the API, or has no ids           |
| GARBLED     | what came back is not HTTP (aiohttp raises it out of the request, looking like a 400)     |
| REDIRECTED  | any 3xx: never followed                                                                  |
| REFUSED     | a 4xx with the API's own error body, or a 200 with `code != 0` and no ids                |
| NOT_API     | a 4xx with any other body: a gateway's page proves nothing about the service behind it   |
| LIMITED     | 429                                                                                      |
| BROKEN      | 5xx                                                                                      |
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

import aiohttp
from attrs import frozen


class ExchangeResult(Enum):
    NOT_BEGUN = auto()
    UNREACHABLE = auto()
    CUT = auto()
    BAD_BODY = auto()
    GARBLED = auto()
    REDIRECTED = auto()
    REFUSED = auto()
    NOT_API = auto()
    LIMITED = auto()
    BROKEN = auto()
    ANSWERED = auto()


class RetryAction(Enum):
    AGAIN = auto()  # send it again after a pause
    WAIT = auto()  # stop all requests for a while, then send it again
    UNCERTAIN = auto()  # never again: only the callback can tell
    FAIL = auto()  # tell the caller


@frozen(kw_only=True)
class RetryActions:
    """A row of the table: what may be done next, by what the request was for."""

    create: RetryAction  # paid
    free: RetryAction  # a status GET or an upload


AGAIN, WAIT, UNCERTAIN, FAIL = RetryAction.AGAIN, RetryAction.WAIT, RetryAction.UNCERTAIN, RetryAction.FAIL
RETRY_ACTIONS: Final = {
    ExchangeResult.NOT_BEGUN:   RetryActions(create=FAIL,      free=FAIL),
    ExchangeResult.UNREACHABLE: RetryActions(create=AGAIN,     free=AGAIN),
    ExchangeResult.CUT:         RetryActions(create=UNCERTAIN, free=AGAIN),
    ExchangeResult.BAD_BODY:    RetryActions(create=UNCERTAIN, free=AGAIN),
    ExchangeResult.GARBLED:     RetryActions(create=UNCERTAIN, free=AGAIN),
    ExchangeResult.REDIRECTED:  RetryActions(create=UNCERTAIN, free=FAIL),
    ExchangeResult.REFUSED:     RetryActions(create=FAIL,      free=FAIL),
    ExchangeResult.NOT_API:     RetryActions(create=UNCERTAIN, free=FAIL),
    ExchangeResult.LIMITED:     RetryActions(create=WAIT,      free=WAIT),
    ExchangeResult.BROKEN:      RetryActions(create=UNCERTAIN, free=AGAIN),
}  # fmt: skip

# Read from the top: ClientConnectorError is a ClientOSError, both timeouts are ServerTimeoutError and TimeoutError.
EXCEPTIONS: Final[tuple[tuple[type[BaseException], ExchangeResult], ...]] = (
    (aiohttp.ConnectionTimeoutError, ExchangeResult.UNREACHABLE),
    (aiohttp.ClientConnectorError, ExchangeResult.UNREACHABLE),
    (aiohttp.ServerFingerprintMismatch, ExchangeResult.UNREACHABLE),
    (aiohttp.ClientPayloadError, ExchangeResult.BAD_BODY),
    (aiohttp.ClientResponseError, ExchangeResult.GARBLED),
    (aiohttp.ClientError, ExchangeResult.CUT),  # ServerDisconnectedError, ClientOSError, SocketTimeoutError, ...
    (TimeoutError, ExchangeResult.CUT),
    (OSError, ExchangeResult.CUT),
)


def of_exception(error: BaseException, *, has_left: bool | None = None) -> ExchangeResult | None:
    """What an exception out of an exchange says; None: nothing about the exchange (a bug, a cancellation).

    `has_left`: whether the HTTP library asked for the body, where that is known. It cannot have sent what it never
    asked for, whatever went wrong; and what it has asked for may have arrived.
    """
    happened = next((happened for kind, happened in EXCEPTIONS if isinstance(error, kind)), None)
    if has_left is False:
        is_network = isinstance(error, (aiohttp.ClientConnectionError, OSError))  # a TimeoutError is an OSError
        return ExchangeResult.UNREACHABLE if is_network else ExchangeResult.NOT_BEGUN
    if has_left and happened in (None, ExchangeResult.UNREACHABLE):
        return ExchangeResult.CUT
    return happened


def of_status(status: int, *, has_api_body: bool) -> ExchangeResult:
    """What a whole answer says by its status. `has_api_body`: its body is the API's own JSON frame."""
    if status == 429:
        return ExchangeResult.LIMITED
    if 200 <= status < 300:
        return ExchangeResult.ANSWERED
    if 300 <= status < 400:
        return ExchangeResult.REDIRECTED
    if 400 <= status < 500:
        return ExchangeResult.REFUSED if has_api_body else ExchangeResult.NOT_API
    return ExchangeResult.BROKEN
