"""The relay that one writes first: aiohttp-sse, a queue and a task for each client, aiopg's LISTEN.

Usage: python naive.py PORT DSN
"""

from __future__ import annotations

import asyncio
import sys

import aiopg
from aiohttp import web
from aiohttp_sse import EventSourceResponse, sse_response

queues: dict[str, set[asyncio.Queue[str]]] = {}


async def stream(request: web.Request) -> EventSourceResponse:
    clients = queues.setdefault(request.match_info["channel"], set())
    queue: asyncio.Queue[str] = asyncio.Queue()
    async with sse_response(request) as response:
        clients.add(queue)
        try:
            while response.is_connected():
                await response.send(await queue.get())
        finally:
            clients.discard(queue)
    return response


async def main(port: int, dsn: str) -> None:
    app = web.Application()
    app.router.add_get("/events/{channel}", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    async with aiopg.connect(dsn) as connection, connection.cursor() as cursor:
        await cursor.execute("LISTEN ch0")
        # The backlog is as long as the other servers'.
        await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
        while True:
            notification = await connection.notifies.get()
            for queue in queues.get(notification.channel, ()):
                queue.put_nowait(notification.payload)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
