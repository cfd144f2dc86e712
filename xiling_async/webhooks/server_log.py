"""What the receiver's own server logs: counts of what strangers do, and nothing that they sent."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from xiling_async._internal.clock import Clock

log = logging.getLogger("xiling_async.webhooks.receiver.http")

SUMMARY_S: Final = 60.0


class Summary:
    """What strangers do, counted: one line a minute at most, whatever they do."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._level = logging.INFO
        self._next_at = float("-inf")

    def add(self, what: str, *, level: int = logging.INFO) -> None:
        self._counts[what] += 1
        self._level = max(self._level, level)
        now = self._clock.time()
        if now >= self._next_at:
            self._next_at = now + SUMMARY_S
            self.flush()

    def flush(self) -> None:
        if self._counts:
            log.log(self._level, "callbacks: %s", "; ".join(f"{count} {what}" for what, count in self._counts.items()))
        self._counts.clear()
        self._level = logging.INFO


class AiohttpLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp logs about a connection. It would quote the request line, which has the token in it."""

    def __init__(self, logger: logging.Logger, summary: Summary) -> None:
        super().__init__(logger, {})
        self._summary = summary

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        error = kwargs.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError, OSError)):
            self._summary.add("requests were not HTTP, or broke off")
        elif isinstance(error, BaseException):
            self.logger.error("a connection ended with an error (%s)", type(error).__name__)
