"""Wakes all tasks that wait for something to change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Broadcast:
    """Each listener has an event of its own, which it clears before it looks whether there is something to do: what
    changes while it looks is not missed."""

    def __init__(self) -> None:
        self._events: dict[asyncio.Event, None] = {}  # in the order in which they came

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._events[event] = None
        try:
            yield event
        finally:
            del self._events[event]

    def wake(self) -> None:
        for event in tuple(self._events):
            event.set()
