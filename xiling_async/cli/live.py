"""What is seen while a command runs: a picture that is painted over on a terminal, and lines that stay."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console, RenderableType
from rich.live import Live

from xiling_async._internal.clock import SystemClock
from xiling_async.cli.output import REPAINT_S, is_live


class LiveDisplay:
    """Shown inside `async with`. Where lines cannot be painted over there is no picture: only what is said."""

    stays: ClassVar[bool] = False  # whether the last picture stays on the screen

    def __init__(self, out: Console) -> None:
        self._out = out
        self._clock = SystemClock()
        self._began_at = self._clock.time()
        self._live: Live | None = None
        self._painter: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if is_live(self._out):
            self._live = Live(console=self._out, auto_refresh=False, transient=not self.stays, vertical_overflow="crop")
            self._live.start()
        self._painter = asyncio.create_task(self._paint(), name="xiling display")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._painter is not None:
            self._painter.cancel()
            await asyncio.gather(self._painter, return_exceptions=True)
        self.tell()
        if self._live is not None:
            if self.stays:
                self._live.update(self.render(), refresh=True)
            self._live.stop()

    def render(self) -> RenderableType:
        """How it looks now."""
        raise NotImplementedError

    def tell(self) -> None:
        """Say what is new, in lines that stay."""

    async def refresh(self) -> None:
        """Find out what is new."""

    async def pause(self) -> None:
        """Wait until it is time for the next picture."""
        await self._clock.sleep(REPAINT_S)

    async def _paint(self) -> None:
        while True:
            await self.refresh()
            self.tell()
            if self._live is not None:
                self._live.update(self.render(), refresh=True)
            await self.pause()
