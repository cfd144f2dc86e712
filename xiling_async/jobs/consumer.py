"""Hands ended jobs over to the application, each until it is acknowledged.

A consumer asks the store for one job whenever its loop asks for one. While there is none it sleeps until a job ends
here, another process says that something has changed, or a lease runs out; it never polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.errors import ClientClosed, InvalidRequest
from xiling_async.jobs.entry import JobEntry
from xiling_async.jobs.registry import Registry
from xiling_async.models.settings import as_number

LONGEST_LEASE_S: Final = 10 * 365 * 24 * 3600.0


def checked_lease(lease: object) -> float:
    """Seconds. Raises `InvalidRequest` for what is not a number above 0."""
    number = as_number(lease)
    if number is None or not 0 < number <= LONGEST_LEASE_S:
        raise InvalidRequest(f"lease must be a number of seconds above 0, not {shown(lease)}. Nothing was changed.")
    return number
