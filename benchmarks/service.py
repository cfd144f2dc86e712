"""The other side of the benchmarks, in a process of its own: a create is answered at once and called back at once.

As lean as aiohttp allows, so that what is measured is the client. Prints its port.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys

import aiohttp
from aiohttp import web

IDS = itertools.count()


async def main() -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        running: set[asyncio.Task[None]] = set()

        async def call_back(url: str, task_id: str) -> None:
            data = {
                "task_id": task_id,
                "status": "SUCCEEDED",
                "video_url": f"https://storage.example.com/{task_id}/sample_0.mp4?signature=0123456789abcdef",
                "thumbnail_url": f"https://storage.example.com/{task_id}.webp?signature=0123456789abcdef",
                "error_message": "",
            }
            body = json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": data}).encode()
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                await answer.read()

        async def create(request: web.BaseRequest) -> web.StreamResponse:
            asked = json.loads(await request.read())
            task_id = f"i2v-{next(IDS):032x}"
            if "callback_url" in asked:
                task = asyncio.get_running_loop().create_task(call_back(asked["callback_url"], task_id))
                running.add(task)
                task.add_done_callback(running.discard)
            body = json.dumps({"code": 0, "msg": "ok", "data": {"task_ids": [task_id]}}).encode()
            return web.Response(body=body, content_type="application/json")

        runner = web.ServerRunner(web.Server(create, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the benchmark closes the pipe
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
