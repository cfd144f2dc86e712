"""How a command runs: its event loop (uvloop's where the extra `speedups` is installed), and how it is told to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:
    LOOP_FACTORY: Callable[[], asyncio.AbstractEventLoop] | None = None
else:
    LOOP_FACTORY = uvloop.new_event_loop

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in that loop: Ctrl-C cancels the work, and is raised when it has ended."""
    with asyncio.Runner(loop_factory=LOOP_FACTORY) as runner:
        return runner.run(work)


def terminated() -> asyncio.Event:
    """Set by SIGTERM. Ctrl-C is another matter: there `run` cancels what runs."""
    stop = asyncio.Event()
    with suppress(NotImplementedError):  # Windows has no SIGTERM to speak of
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop
