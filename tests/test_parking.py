"""Taking a connection away from aiohttp, which has no public way, with each version supported."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

import pytest
from aiohttp import web

from sse_relay import Door, Hub, Subscriber, as_chunk, encode_head, park

pytestmark = pytest.mark.aiohttp_versions

GET = b"GET /stream HTTP/1.1\r\nHost: relay\r\n\r\n"
PLAIN = b"GET /plain HTTP/1.1\r\nHost: relay\r\n\r\n"


@dataclass
class Lot:
    """The relay's HTTP server and hub in this process; ``/plain`` answers, every other path parks."""

    hub: Hub = field(default_factory=lambda: Hub(max_backlog=1 << 18, heartbeat=15))
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Requests wait for it before they park."""
    arrived: int = 0
    answered: int = 0
    prepare: Callable[[asyncio.Transport], object] = lambda transport: None
    door: web.Server = field(init=False)
    port: int = 0

    def __post_init__(self) -> None:
        self.door = Door(self._handle, lambda: 1_000, lambda refused: None)
        self.gate.set()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/plain":
            self.answered += 1
            return web.Response(text="pong")
        self.arrived += 1
        await self.gate.wait()
        assert request.transport is not None
        self.prepare(request.transport)
        subscriber = Subscriber(self.hub, ("orders",), 0)
        subscriber.chunked = request.version >= (1, 1)
        park(request, subscriber)
        self.hub.enter(subscriber)
        subscriber.write(b":\n", encode_head(int(subscriber.chunked), {}))
        return web.Response()

    @asynccontextmanager
    async def client(self, request: bytes) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            yield Client(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @property
    def subscriber(self) -> Subscriber:
        (subscriber,) = self.hub.subscribers
        return subscriber

    async def wait_empty(self) -> None:
        await eventually(lambda: not self.hub.subscribers)


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def expect(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), 5)

    async def head(self) -> str:
        head = (await self.expect(b"\r\n\r\n")).decode()
        assert head.split(" ", 2)[1] == str(HTTPStatus.OK.value)
        await self.expect(b":\n")
        return head


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nothing in aiohttp tells of it
            await asyncio.sleep(0.005)


@pytest.fixture
async def lot(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Lot]:
    """A server that runs, and that must have logged nothing at the end: every error would show there."""
    caplog.set_level(logging.DEBUG, "sse_relay")
    caplog.set_level(logging.WARNING, "asyncio")
    made = Lot()
    runner = web.ServerRunner(made.door, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    made.port = sock.getsockname()[1]
    yield made
    for subscriber in tuple(made.hub.subscribers):
        assert subscriber.transport is not None
        subscriber.transport.abort()
    await asyncio.wait_for(runner.cleanup(), 2)
    assert [record.getMessage() for record in caplog.records if "Executing" not in record.getMessage()] == []


def held_by_aiohttp() -> list[object]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, web.RequestHandler | web.BaseRequest)]


async def test_aiohttp_keeps_nothing_of_a_parked_stream(lot: Lot) -> None:
    tasks = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        for number in range(20):
            client = await stack.enter_async_context(lot.client(GET))
            await client.head()
            assert len(lot.hub.subscribers) == number + 1
        await eventually(lambda: asyncio.all_tasks() == tasks)
        assert lot.door.connections == []
        assert held_by_aiohttp() == []


FIRST = b"GET /stream HTTP/1.1\r\nHost: relay\r\n"
# How many requests were answered on the connection before, and what is sent then.
REQUESTS = {
    "plain": (0, GET),
    "late": (3, GET),
    "another behind it": (0, GET + PLAIN),
    # As many as these make aiohttp stop reading: the end must be noticed all the same.
    "many behind it": (0, GET + PLAIN * 2_000),
    "a body": (0, FIRST + b"Content-Length: 4\r\n\r\nbody"),
    "half a body": (0, FIRST + b"Content-Length: 1000000\r\n\r\nnot all of it"),
    "a chunk": (0, FIRST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n"),
    "an upgrade": (0, FIRST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00"),
    "the last": (0, FIRST + b"Connection: close\r\n\r\n"),
    "a body to come": (0, FIRST + b"Expect: 100-continue\r\nContent-Length: 4\r\n\r\n"),
    "HTTP/1.0": (0, b"GET /stream HTTP/1.0\r\n\r\n"),
    "HTTP/1.0, kept alive": (0, b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
}


@pytest.mark.parametrize(("answered", "request_"), REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_request_of_any_kind_is_parked_and_what_follows_it_ignored(
    lot: Lot, answered: int, request_: bytes
) -> None:
    async with lot.client(b"") as client:
        for _ in range(answered):
            client.writer.write(PLAIN)
            await client.expect(b"pong")
        client.writer.write(request_)
        head = await client.head()
        chunked = b"HTTP/1.0" not in request_
        assert head.startswith(f"HTTP/1.{int(chunked)} ")
        assert ("Transfer-Encoding: chunked" in head, "Connection: close" in head) == (chunked, not chunked)
        for _ in range(64):
            client.writer.write(b"\0junk\r\n\r\n" * 2_000 + PLAIN)
            await asyncio.wait_for(client.writer.drain(), 5)
        # Until aiohttp's own clean-up has run, and afterwards.
        for number in range(3):
            lot.subscriber.write(b"data: %d\n\n" % number)
            block = b"data: %d\n\n" % number
            assert (await client.expect(block)).endswith(as_chunk(block)[:-2] if chunked else block)
            await eventually(lambda: held_by_aiohttp() == [])
        assert (lot.arrived, lot.answered) == (1, answered)
    await lot.wait_empty()


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_leaving_is_noticed_at_once(lot: Lot, how: str) -> None:
    async with lot.client(GET) as client:
        await client.head()
        lot.subscriber.write(b"data: x\n\n")
        began = asyncio.get_running_loop().time()
        if how == "close":
            client.writer.close()
        elif how == "half-close":
            client.writer.write_eof()
        else:
            client.writer.transport.abort()
        await lot.wait_empty()
        assert asyncio.get_running_loop().time() - began < 0.5


async def test_a_client_that_left_while_it_waited_is_no_error(lot: Lot) -> None:
    lot.gate.clear()
    async with lot.client(GET):
        await eventually(lambda: lot.arrived == 1)
    await eventually(lambda: lot.door.connections == [])
    lot.gate.set()
    await eventually(lambda: held_by_aiohttp() == [])
    assert not lot.hub.subscribers


async def test_a_client_that_leaves_at_the_moment_of_parking_is_no_error(lot: Lot) -> None:
    lot.prepare = lambda transport: transport.abort()
    async with lot.client(GET) as client:
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(client.reader.read(), 5) == b""
    await eventually(lambda: held_by_aiohttp() == [])
    assert not lot.hub.subscribers


async def test_a_full_socket_pauses_its_subscriber_until_the_client_reads(lot: Lot) -> None:
    async with lot.client(GET) as client:
        await client.head()
        subscriber = lot.subscriber
        while subscriber.room is None:
            subscriber.write(b"data: %b\n\n" % (b"x" * 65_536))
            await asyncio.sleep(0)
        drained = asyncio.ensure_future(subscriber.drained())
        subscriber.write(b"data: last\n\n")
        await asyncio.wait_for(drain_to(client.reader, b"data: last\n\n\r\n"), 10)
        await asyncio.wait_for(drained, 5)
        assert subscriber.room is None


async def drain_to(reader: asyncio.StreamReader, end: bytes) -> None:
    tail = b""
    while not tail.endswith(end):
        tail = (tail + await reader.read(1 << 20))[-len(end) :]


async def test_stopping_the_server_leaves_parked_streams_alone(lot: Lot) -> None:
    async with lot.client(GET) as client:
        await client.head()
        await eventually(lambda: lot.door.connections == [])
        await asyncio.wait_for(lot.door.shutdown(1), 0.5)
        lot.subscriber.write(b"data: x\n\n")
        await client.expect(b"data: x\n\n\r\n")
        # One response alone: the empty one that the handler returned went nowhere.
        lot.subscriber.end(b"retry: 1\n\n")
        assert await asyncio.wait_for(client.reader.read(), 5) == as_chunk(b"retry: 1\n\n")
    await lot.wait_empty()
