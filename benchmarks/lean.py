"""The service of the faster benchmarks, in a process of its own: HTTP/1.1 over bare protocols, so that clients are
measured.

Speaks the create and status calls of this service and of the clients that are compared with it, calls back over
connections of its own, and counts what it is sent. `python benchmarks/lean.py [--core N]` prints its port and ends
with its standard input. `POST /control/...` steers it: `set` (`takes`: seconds of a job; `callbacks`: "sent", "never",
or "held"), `counts` (since the last time), `release` (the held ones), `fire` (so many at one URL); either at once or
so many `per_second`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import urlsplit

from sides import pin

CALLBACK_CONNECTIONS: Final = 64
LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
CHUNK: Final = re.compile(rb"([0-9A-Fa-f]+)[^\r\n]*\r\n")
IDS: Final = itertools.count()
Body = dict[str, Any]


def done_url(task_id: str, done_at: float) -> str:
    """The result, which says when it was there (`time.perf_counter` of this machine)."""
    return f"https://storage.example.com/{task_id}/sample_0.mp4?signature=0123456789abcdef&done={done_at:.6f}"


def callback_request(url: str, task_id: str, done_at: float) -> bytes:
    data = {
        "task_id": task_id,
        "status": "SUCCEEDED",
        "video_url": done_url(task_id, done_at),
        "thumbnail_url": f"https://storage.example.com/{task_id}.webp?signature=0123456789abcdef",
        "error_message": "",
    }
    body = json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": data}).encode()
    there = urlsplit(url)
    head = (
        f"POST {there.path} HTTP/1.1\r\nHost: {there.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nAccept: */*\r\n\r\n"
    )
    return head.encode() + body


# --- calling back ----------------------------------------------------------------------------------------------------


class Caller(asyncio.Protocol):
    """One kept-alive connection: sends a request, hears its status, asks for the next; nothing is pipelined."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._heard = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._calls.rest(self)

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        end = self._heard.find(b"\r\n\r\n")
        if end < 0:
            return
        length = LENGTH.search(self._heard, 0, end)
        if len(self._heard) < end + 4 + (int(length[1]) if length else 0):
            return
        status, self._heard = self._heard[9:12].decode(), b""
        self._calls.answered(status)
        self._calls.rest(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._calls.lost(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Calls:
    """Callbacks to one origin, over at most so many connections."""

    def __init__(self, host: str, port: int, counts: Counter[str], most: int = CALLBACK_CONNECTIONS) -> None:
        self._origin = host, port
        self._counts = counts
        self._most = most
        self._queue: deque[bytes] = deque()
        self._idle: list[Caller] = []
        self._open = 0
        self._opening: set[asyncio.Task[object]] = set()
        self.left = 0
        self.on_empty: Callable[[], None] = lambda: None

    def send(self, request: bytes) -> None:
        self.left += 1
        if self._idle:
            self._idle.pop().send(request)
            return
        self._queue.append(request)
        if self._open < self._most:
            self._open += 1
            loop = asyncio.get_running_loop()
            task: asyncio.Task[object] = loop.create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Caller(self), *self._origin)
        except OSError:
            self._open -= 1

    def rest(self, caller: Caller) -> None:
        if self._queue:
            caller.send(self._queue.popleft())
        else:
            self._idle.append(caller)

    def answered(self, status: str) -> None:
        self._counts[f"callback {status}"] += 1
        self.left -= 1
        if not self.left:
            self.on_empty()

    def lost(self, caller: Caller) -> None:
        self._open -= 1
        if caller in self._idle:
            self._idle.remove(caller)

    async def volley(self, requests: list[bytes], per_second: float | None = None) -> float:
        """Send all of them, at once or evenly; seconds from the first byte to the last answer. The connections are made
        before."""
        empty = asyncio.Event()
        self.on_empty = empty.set
        loop = asyncio.get_running_loop()
        self._open += self._most
        await asyncio.gather(*(loop.create_connection(lambda: Caller(self), *self._origin) for _ in range(self._most)))
        begun = time.perf_counter()
        for place, request in enumerate(requests):
            if per_second is not None and (early := begun + place / per_second - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            self.send(request)
        if self.left:
            await empty.wait()
        took = time.perf_counter() - begun
        for caller in tuple(self._idle):
            caller.close()
        return took


# --- what the service knows ------------------------------------------------------------------------------------------


class Service:
    """Jobs, and the words in which each client hears of them."""

    def __init__(self) -> None:
        self.takes_s = 0.0
        self.callbacks = "sent"
        self.counts: Counter[str] = Counter()
        self._done_at: dict[str, float] = {}  # of jobs that are asked for
        self._held: list[tuple[str, str]] = []
        self._calls: dict[str, Calls] = {}

    def answer(self, method: str, path: str, body: bytes, host: str) -> Body | None:
        """The answer's JSON; None for an unknown path."""
        self.counts[method] += 1
        first = path.split("/", 2)[1]
        if first == "image_to_video":
            return self._created(json.loads(body)) if method == "POST" else self._status(path)
        if first == "queue":
            return self._fal(method, path, host)
        if first == "v1":
            return self._replicate(method, path)
        return self._other(first)

    def _new(self) -> str:
        return f"i2v-{next(IDS):032x}"

    def _created(self, asked: Body) -> Body:
        task_id = self._new()
        url = asked.get("callback_url")
        if url is None:
            self._done_at[task_id] = time.perf_counter() + self.takes_s
        elif self.callbacks == "held":
            self._held.append((url, task_id))
        elif self.callbacks == "sent":
            asyncio.get_running_loop().call_later(self.takes_s, self._call_back, url, task_id)
        return {"code": 0, "msg": "ok", "data": {"task_ids": [task_id]}}

    def _call_back(self, url: str, task_id: str) -> None:
        self._to(url).send(callback_request(url, task_id, time.perf_counter()))

    def _to(self, url: str) -> Calls:
        there = urlsplit(url)
        if there.netloc not in self._calls:
            self._calls[there.netloc] = Calls(there.hostname or "", there.port or 80, self.counts)
        return self._calls[there.netloc]

    def _is_done(self, task_id: str) -> float | None:
        done_at = self._done_at.get(task_id, 0.0)
        return done_at if time.perf_counter() >= done_at else None

    def _status(self, path: str) -> Body:
        task_id = path.rpartition("/")[2]
        done_at = self._is_done(task_id)
        data: Body = {"task_id": task_id, "status": "PROCESSING" if done_at is None else "SUCCEEDED"}
        if done_at is not None:
            data["video_url"] = done_url(task_id, done_at)
        return {"code": 0, "msg": "ok", "data": data}

    def _fal(self, method: str, path: str, host: str) -> Body:
        if method == "POST":
            task_id = self._new()
            self._done_at[task_id] = time.perf_counter() + self.takes_s
            url = f"http://{host}/queue/bench/video/requests/{task_id}"
            return {
                "request_id": task_id,
                "response_url": url,
                "status_url": f"{url}/status",
                "cancel_url": f"{url}/cancel",
            }
        task_id, _, asked = path.partition("?")[0].partition("/requests/")[2].partition("/")
        done_at = self._is_done(task_id)
        if asked == "status":
            return {"status": "IN_PROGRESS" if done_at is None else "COMPLETED", "logs": None, "metrics": {}}
        self._done_at.pop(task_id, None)
        return {"video": {"url": done_url(task_id, done_at or 0.0)}}

    def _replicate(self, method: str, path: str) -> Body:
        if method == "POST":
            task_id, done_at = self._new(), None
            self._done_at[task_id] = time.perf_counter() + self.takes_s
        else:
            task_id = path.rpartition("/")[2]
            done_at = self._is_done(task_id)
        return {
            "id": task_id,
            "model": "bench/video",
            "version": "0" * 64,
            "status": "processing" if done_at is None else "succeeded",
            "input": {},
            "output": None if done_at is None else done_url(task_id, done_at),
            "logs": "",
            "error": None,
            "metrics": None,
            "created_at": "2026-01-01T00:00:00Z",
            "urls": {"get": "", "cancel": ""},
        }

    def _other(self, name: str) -> Body | None:
        """Only the creates are compared with these."""
        task_id = self._new()
        answers: dict[str, Body] = {
            "runway": {"id": task_id},
            "luma": {"id": task_id, "state": "queued", "model": "ray-2"},
            "openai": {
                "id": task_id, "object": "video", "model": "sora-2", "status": "queued", "created_at": 1_800_000_000,
                "progress": 0, "seconds": "8", "size": "1280x720",
            },
        }  # fmt: skip
        return answers.get(name)

    # --- control -----------------------------------------------------------------------------------------------------

    async def control(self, what: str, given: Body) -> Body:
        if what == "set":
            self.takes_s = given.get("takes", self.takes_s)
            self.callbacks = given.get("callbacks", self.callbacks)
            self._held.clear()
            self._done_at.clear()
            self._calls.clear()
        if what in ("set", "counts"):
            counts = dict(self.counts)
            self.counts.clear()
            return counts
        if what == "release":
            most = given.get("count", len(self._held))
            told, self._held = self._held[:most], self._held[most:]
        else:
            told = [(given["url"], self._new()) for _ in range(given["count"])]
        requests = [callback_request(url, task_id, time.perf_counter()) for url, task_id in told]
        there = urlsplit(told[0][0])
        calls = Calls(there.hostname or "", there.port or 80, self.counts, given.get("connections", 32))
        seconds = await calls.volley(requests, given.get("per_second"))
        return {"seconds": seconds, "count": len(requests)}


class Connection(asyncio.Protocol):
    """Reads requests, one after another."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._heard = b""
        self._controls: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        while (request := self._next()) is not None:
            self._serve(*request)

    def _next(self) -> tuple[bytes, bytes] | None:
        end = self._heard.find(b"\r\n\r\n")
        if end < 0:
            return None
        head, rest = self._heard[:end], self._heard[end + 4 :]
        if b"chunked" in head.lower():
            body = b""
            while chunk := CHUNK.match(rest):
                size, start = int(chunk[1], 16), chunk.end()
                if len(rest) < start + size + 2:
                    return None
                body, rest = body + rest[start : start + size], rest[start + size + 2 :]
                if not size:
                    self._heard = rest
                    return head, body
            return None
        length = LENGTH.search(head)
        size = int(length[1]) if length else 0
        if len(rest) < size:
            return None
        self._heard = rest[size:]
        return head, rest[:size]

    def _serve(self, head: bytes, body: bytes) -> None:
        line, _, fields = head.decode("latin-1").partition("\r\n")
        method, path, _ = line.split(" ")
        if path.startswith("/control/"):
            work = self._control(path.removeprefix("/control/"), json.loads(body or b"{}"))
            task = asyncio.get_running_loop().create_task(work)
            self._controls.add(task)
            task.add_done_callback(self._controls.discard)
            return
        host = next((field[6:] for field in fields.split("\r\n") if field[:6].lower() == "host: "), "")
        self._answer(self._service.answer(method, path, body, host))

    async def _control(self, what: str, given: Body) -> None:
        self._answer(await self._service.control(what, given))

    def _answer(self, answer: Body | None) -> None:
        body = json.dumps(answer).encode()
        status = b"404 Not Found" if answer is None else b"200 OK"
        self._transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
        )


async def main(core: int | None) -> None:
    pin(core)
    service = Service()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(service), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the benchmark closes the pipe
    server.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--core", type=int)
    asyncio.run(main(options.parse_args().core))
