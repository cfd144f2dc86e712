"""What a failed exchange proves, as a table: what happened to a request, and what may be done next.

The left column is what aiohttp (3.14) tells, or the status and body of an answer; the other columns are what the
request was for. A create is paid: it is sent again only where it cannot have been taken.

| happened    | seen as                                                                                  |
| ----------- | ---------------------------------------------------------------------------------------- |
| UNREACHABLE | DNS, refused, TLS, no connection in time: not a byte of the request left                 |
| CUT         | disconnected, reset, no answer in time: the request may have been taken                  |
| BAD_BODY    | an answer below 300 whose body broke off, is no JSON of the API, or has no ids           |
| GARBLED     | what came back is no HTTP (aiohttp raises it out of the request, looking like a 400)     |
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


class Happened(Enum):
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


class Step(Enum):
    AGAIN = auto()  # send it again after a pause
    WAIT = auto()  # close the gate for everybody, then send it again
    UNCERTAIN = auto()  # never again: only the callback can tell
    FAIL = auto()  # tell the caller


#                                           create (paid)    status (a read)
STEPS: Final = {
    Happened.UNREACHABLE:                   (Step.AGAIN,     Step.AGAIN),
    Happened.CUT:                           (Step.UNCERTAIN, Step.AGAIN),
    Happened.BAD_BODY:                      (Step.UNCERTAIN, Step.AGAIN),
    Happened.GARBLED:                       (Step.UNCERTAIN, Step.AGAIN),
    Happened.REDIRECTED:                    (Step.UNCERTAIN, Step.FAIL),
    Happened.REFUSED:                       (Step.FAIL,      Step.FAIL),
    Happened.NOT_API:                       (Step.UNCERTAIN, Step.FAIL),
    Happened.LIMITED:                       (Step.WAIT,      Step.WAIT),
    Happened.BROKEN:                        (Step.UNCERTAIN, Step.AGAIN),
}  # fmt: skip

# Read from the top: ClientConnectorError is a ClientOSError, both timeouts are ServerTimeoutError and TimeoutError.
EXCEPTIONS: Final[tuple[tuple[type[BaseException], Happened], ...]] = (
    (aiohttp.ConnectionTimeoutError, Happened.UNREACHABLE),
    (aiohttp.ClientConnectorError, Happened.UNREACHABLE),
    (aiohttp.ServerFingerprintMismatch, Happened.UNREACHABLE),
    (aiohttp.ClientPayloadError, Happened.BAD_BODY),
    (aiohttp.ClientResponseError, Happened.GARBLED),
    (aiohttp.ClientError, Happened.CUT),  # ServerDisconnectedError, ClientOSError, SocketTimeoutError, ...
    (TimeoutError, Happened.CUT),
    (OSError, Happened.CUT),
)


def of_exception(error: BaseException) -> Happened | None:
    """What an exception out of an exchange says; None: nothing about the exchange (a bug, a cancellation)."""
    for kind, happened in EXCEPTIONS:
        if isinstance(error, kind):
            return happened
    return None


def of_status(status: int, *, has_api_body: bool) -> Happened:
    """What a whole answer says by its status. `has_api_body`: its body is the API's own JSON frame."""
    if status == 429:
        return Happened.LIMITED
    if 200 <= status < 300:
        return Happened.ANSWERED
    if 300 <= status < 400:
        return Happened.REDIRECTED
    if 400 <= status < 500:
        return Happened.REFUSED if has_api_body else Happened.NOT_API
    return Happened.BROKEN


def after_create(happened: Happened) -> Step:
    return STEPS[happened][0]


def after_status(happened: Happened) -> Step:
    return STEPS[happened][1]


FAILURES: Final = (aiohttp.ClientError, OSError)  # what an exchange can raise; a TimeoutError is an OSError
