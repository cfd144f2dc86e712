"""A real Chromium without a window, driven over its DevTools protocol: for the tests of the page."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEADLINE_S = 20  # of any one thing; only a failure takes so long
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-port=0", "--window-size=1200,900", "--lang=en",
)  # fmt: skip


class Tab:
    """One page of the browser. `requests`: every URL that it asked for; `complaints`: what its console says.

    `loads`: of pages; `spent`: budgets of virtual time."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loads = 0
        self.spent = 0
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._news = asyncio.Event()

    async def listen(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            elif told["method"] == "Page.loadEventFired":
                self.loads += 1
            elif told["method"] == "Emulation.virtualTimeBudgetExpired":
                self.spent += 1
            elif told["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                self.complaints.append(str(told["params"]))
            self._news.set()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(DEADLINE_S):
            told = await self._answers[number]
        assert "error" not in told, f"{method}: {told['error']}"
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, page: Path, fragment: str = "") -> None:
        """Show this file, and wait until it is loaded."""
        before = self.loads
        await self.call("Page.navigate", url=page.absolute().as_uri() + fragment)
        await self.has(lambda: self.loads > before)

    async def has(self, happened: Callable[[], bool]) -> None:
        """Wait until the browser has told of this."""
        async with asyncio.timeout(DEADLINE_S):
            while not happened():
                self._news.clear()
                await self._news.wait()

    async def js(self, expression: str) -> Any:
        """The value of this expression, awaited."""
        told = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until this holds on the page."""
        look = f"const look = () => ({expression}) ? done(true) : setTimeout(look, 10)"
        assert await self.js(f"new Promise((done) => {{ {look}; look(); }})"), expression

    async def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40}
        known: dict[str, Any] = {
            "key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0,
        }  # fmt: skip
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    async def write(self, text: str) -> None:
        """What the keyboard would enter where the focus is."""
        await self.call("Input.insertText", text=text)

    async def point(self, selector: str) -> None:
        """Move the mouse onto this; an empty selector: away from everything."""
        x, y = 1, 1
        if selector:
            box = await self.js(
                f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect();"
                " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )
            x, y = map(int, box)
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A browser of its own, gone at the end with all its processes; what is given is where it is driven from."""
    assert PROGRAM is not None
    process = subprocess.Popen(
        [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    assert process.stderr is not None
    with process, process.stderr as told:
        try:
            while not (found := re.search(rb"listening on ws://127\.0\.0\.1:(\d+)/", line := told.readline())):
                assert line, "it did not start"
            drain = threading.Thread(target=told.read)  # a full pipe would stop it
            drain.start()
            yield f"http://127.0.0.1:{int(found[1])}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        drain.join()


@contextlib.asynccontextmanager
async def opened(browser: str) -> AsyncIterator[Tab]:
    """A tab of its own in this browser."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{browser}/json/new?about:blank") as response:
            target = await response.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as connection:
            tab = Tab(connection)
            listener = asyncio.create_task(tab.listen())
            try:
                for domain in ("Page", "Network", "Runtime", "Log", "Accessibility"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.bringToFront")
                yield tab
            finally:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)
        async with session.get(f"{browser}/json/close/{target['id']}") as response:
            await response.read()
