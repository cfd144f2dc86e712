"""A logging filter for the access logs of servers that a receiver is mounted in."""

from __future__ import annotations

import copy
import logging
from collections.abc import MutableMapping
from typing import Any

from xiling_async._internal.redact import without_tokens


class RedactCallbackTokens(logging.Filter):
    """Takes callback tokens out of log records. It drops no record.

    A callback's URL is as good as a password until its job ends, and access logs show it. Add this to the logger that
    writes them: `logging.getLogger("uvicorn.access").addFilter(RedactCallbackTokens())`; others are "aiohttp.access",
    "hypercorn.access" and "gunicorn.access". A filter of a logger sees only what is logged with that very logger.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in tuple(vars(record).items()):  # also those of `extra=`
            redacted = _redacted(value)
            if redacted is not value:
                setattr(record, name, redacted)
        return True


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return without_tokens(value) if len(value) >= 80 else value
    if isinstance(value, tuple):
        parts = tuple(_redacted(part) for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if isinstance(value, MutableMapping):
        changed = {name: new for name, old in value.items() if (new := _redacted(old)) is not old}
        if changed:
            value = copy.copy(value)
            value.update(changed)
    return value
