"""What the receiver's own server logs: each kind of line once a minute at most, and nothing that a client sent."""

from __future__ import annotations

import logging
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

log = logging.getLogger("xiling_async.webhooks.receiver.http")

REPEAT_S: Final = 60.0


class OncePerMinute(logging.Filter):
    """Drops what was logged in the same words less than a minute ago, and counts it. Errors and DEBUG always pass."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[str, tuple[float, int]] = {}  # when, and how many were dropped since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno not in (logging.INFO, logging.WARNING):
            return True
        message = record.getMessage()
        logged_at, dropped = self._logged.get(message, (float("-inf"), 0))
        if record.created < logged_at + REPEAT_S:
            self._logged[message] = logged_at, dropped + 1
            return False
        self._logged[message] = record.created, 0
        if dropped:
            record.msg, record.args = f"{message} ({dropped} more since the last such line)", ()
        return True


class AiohttpLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp logs about a connection. It would quote the request line, which has the token in it."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        error = kwargs.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError, OSError)):
            log.info("a request was not HTTP, or broke off")
        elif isinstance(error, BaseException):
            log.error("a connection ended with an error (%s)", type(error).__name__)


log.addFilter(OncePerMinute())
