"""How the system asks a command that serves to end."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress


def terminated() -> asyncio.Event:
    """Set by SIGTERM. Ctrl-C is another matter: there `loops.run` cancels what runs."""
    stop = asyncio.Event()
    with suppress(NotImplementedError):  # Windows has no SIGTERM to speak of
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop
