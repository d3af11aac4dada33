"""The hub, on asyncio's own transports over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

import harness
import sse_relay
from harness import count_operations, run_without_waiting
from sse_relay import (
    CUT_MEMORY,
    POSITION_INTERVAL,
    WRITES_PER_TURN,
    Event,
    Frame,
    Hub,
    Resume,
    Subscriber,
    as_chunk,
    encode_event,
    encode_gaps,
    join_blocks,
)

FOREVER = 3_600.0
POSITION = b"e-99"


class Recording(asyncio.Transport):
    """A socket's transport that remembers what was written to it, write by write."""

    def __init__(self, inner: asyncio.Transport) -> None:
        super().__init__()
        self.inner = inner
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert isinstance(data, bytes)
        self.writes.append(data)
        self.inner.write(data)

    def is_closing(self) -> bool:
        return self.inner.is_closing()

    def close(self) -> None:
        self.inner.close()

    def abort(self) -> None:
        self.inner.abort()

    def get_write_buffer_size(self) -> int:
        return self.inner.get_write_buffer_size()


@dataclass
class Stream:
    """A subscriber in the hub, and its client's end of the socket."""

    subscriber: Subscriber
    transport: Recording
    far: socket.socket
    received: bytearray = field(default_factory=bytearray)

    @property
    def writes(self) -> list[bytes]:
        return self.transport.writes

    async def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes that come out at the client; less at the end of the stream."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while len(self.received) < size and (data := await loop.sock_recv(self.far, 1 << 20)):
                self.received += data
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    async def read_all(self) -> bytes:
        """Return what comes until the relay closes or resets the connection."""
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := await self.read(1):
                found += data + bytes(self.received)
                self.received.clear()
        return found


OpenStream = Callable[..., Awaitable[Stream]]
Beating = Callable[..., "asyncio.Task[None]"]


@pytest.fixture
async def open_stream() -> AsyncIterator[OpenStream]:
    """Open streams: ``open_stream(hub, *channels)``, live, HTTP/1.0, unless told otherwise."""
    loop = asyncio.get_running_loop()
    streams: list[Stream] = []

    async def open_it(
        hub: Hub,
        *channels: str,
        live: bool = True,
        enter: bool = True,
        chunked: bool = False,
        key: int = 0,
        idle: float = 0.0,
    ) -> Stream:
        subscriber = Subscriber(hub, channels, Resume(None, None), key, loop.time() - idle)
        near, far = socket.socketpair()
        far.setblocking(False)
        transport, _ = await loop.create_connection(lambda: subscriber, sock=near)
        recording = Recording(transport)
        subscriber.transport = recording
        subscriber.chunked = chunked
        if live:
            subscriber.resume = None
        if enter:
            hub.enter(subscriber)
        streams.append(Stream(subscriber, recording, far))
        return streams[-1]

    yield open_it
    for stream in streams:
        stream.transport.abort()
        stream.far.close()
    await asyncio.sleep(0)


@pytest.fixture
def beating() -> Iterator[Beating]:
    """Start a hub's heartbeat, which ends with the test; it must not have ended before."""
    tasks: list[asyncio.Task[None]] = []

    def start(hub: Hub, position: Callable[[], bytes | None] = lambda: None) -> asyncio.Task[None]:
        tasks.append(asyncio.get_running_loop().create_task(hub.beat(position)))
        return tasks[-1]

    yield start
    for task in tasks:
        assert not task.done()
        task.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # no event tells what happens in sockets
            await asyncio.sleep(0.005)


def make_frames(*channels: str, first: int = 1, data: str = "", name: str | None = None) -> list[Frame]:
    """Make a burst: one event for each channel named, numbered in their order."""
    return [
        Frame(
            number,
            channel,
            encode_event(Event(data or str(number), name), b"e-%d" % number),
            name is not None,
        )
        for number, channel in enumerate(channels, first)
    ]


def make_hub(max_backlog: int = 1_000_000, heartbeat: float = FOREVER) -> Hub:
    return Hub(max_backlog, heartbeat)


# Bursts.


async def test_a_burst_over_three_channels_is_one_write_in_position_order(open_stream: OpenStream) -> None:
    hub = make_hub()
    wanted = {
        ("a", "b", "c"): await open_stream(hub, "a", "b", "c"),
        ("c", "a"): await open_stream(hub, "c", "a"),
        ("b",): await open_stream(hub, "b"),
        ("b", "quiet"): await open_stream(hub, "b", "quiet"),
        ("quiet",): await open_stream(hub, "quiet"),
    }
    burst = make_frames("c", "a", "b", "nobody", "b", "a", "c", "c", "b", "a")
    await hub.broadcast(burst)
    for channels, stream in wanted.items():
        expected = join_blocks([f for f in burst if f.channel in channels], several=len(channels) > 1)
        assert stream.writes == ([expected] if expected else [])
        assert await stream.read(len(expected)) == expected


async def test_bursts_arrive_one_after_the_other(open_stream: OpenStream) -> None:
    hub = make_hub()
    stream = await open_stream(hub, "a", "b")
    first, second = make_frames("a", "b"), make_frames("b", "b", "a", first=3)
    await asyncio.gather(hub.broadcast(first), hub.broadcast(second))
    expected = join_blocks(first + second, several=True)
    assert await stream.read(len(expected)) == expected
    assert len(stream.writes) == 2


async def test_a_burst_is_encoded_once_for_all_that_get_the_same(open_stream: OpenStream) -> None:
    hub = make_hub()
    streams = [await open_stream(hub, "a", chunked=chunked) for chunked in (True, True, False, False)]
    several = [await open_stream(hub, *names) for names in (("a", "b"), ("b", "a"), ("a", "x"))]
    await hub.broadcast(make_frames("a", "a", "a"))
    one, two, plain, other = (stream.writes[0] for stream in streams)
    assert one is two
    assert plain is other
    assert len({id(stream.writes[0]) for stream in several}) == 1


async def test_http_1_1_gets_one_chunk_for_each_burst_and_http_1_0_bare_bytes(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    streams = [await open_stream(hub, "a", chunked=True), await open_stream(hub, "a")]
    burst = make_frames("a", "a")
    await hub.broadcast(burst)
    block = join_blocks(burst, several=False)
    assert [stream.writes for stream in streams] == [[as_chunk(block)], [block]]


async def test_who_is_resuming_gets_nothing_from_the_hub(open_stream: OpenStream) -> None:
    hub = make_hub()
    resuming, live = await open_stream(hub, "a", live=False), await open_stream(hub, "a")
    await hub.broadcast(make_frames("a"))
    await hub.send_gaps("outage", POSITION)
    assert resuming.writes == []
    assert len(live.writes) == 2


async def test_a_burst_for_nobody_is_no_harm(open_stream: OpenStream) -> None:
    hub = make_hub()
    await hub.broadcast([])
    await hub.broadcast(make_frames("a"))
    stream = await open_stream(hub, "b")
    await hub.broadcast(make_frames("a"))
    await hub.broadcast([])
    assert stream.writes == []


async def test_gaps_name_each_channel_of_a_stream_in_one_write(open_stream: OpenStream) -> None:
    hub = make_hub()
    streams = {names: await open_stream(hub, *names) for names in (("a",), ("b", "a"), ("a", "b"))}
    await hub.send_gaps("outage", POSITION)
    for names, stream in streams.items():
        expected = encode_gaps(dict.fromkeys(names, "outage"), None, POSITION)
        assert stream.writes == [expected]
        assert expected.count(b"event: relay.gap") == len(names)


async def test_what_is_written_is_counted(open_stream: OpenStream) -> None:
    hub = make_hub()
    streams = [await open_stream(hub, *names, chunked=True) for names in (("a",), ("a",), ("a", "b"), ("x",))]
    await hub.broadcast(make_frames("a", "b", "a", "nobody"))
    assert hub.counts.deliveries == 2 + 2 + 3
    assert hub.counts.sent_bytes == sum(len(data) for stream in streams for data in stream.writes)
    await hub.send_gaps("outage", POSITION)
    assert hub.counts.gaps == {"outage": 5}
    assert hub.counts.deliveries == 7


# Slow clients.


async def fill(stream: Stream, hub: Hub) -> list[Frame]:
    """Send a burst that is far more than socket and backlog hold together."""
    burst = make_frames("a", data="x" * 4_000_000)
    await hub.broadcast(burst)
    return burst


async def test_a_slow_subscriber_is_cut_before_a_write_and_not_after_one_large_burst(
    open_stream: OpenStream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sse_relay")
    hub = make_hub(max_backlog=10_000)
    slow, quick = await open_stream(hub, "a"), await open_stream(hub, "a")
    large = join_blocks(await fill(slow, hub), several=False)
    assert slow.transport.get_write_buffer_size() > 10_000
    assert not slow.transport.is_closing()
    assert await quick.read(len(large)) == large

    small = make_frames("a", first=2)
    await hub.broadcast(small)
    assert slow.transport.is_closing()
    assert slow.writes == [large]
    assert hub.counts.cut_clients == 1
    assert "--max-backlog is 10000" in caplog.text
    # No event that was begun before is followed by a later one: the client resumes from there.
    prefix = await slow.read_all()
    assert large.startswith(prefix)
    assert len(prefix) < len(large)
    await until(lambda: slow.subscriber not in hub.subscribers)
    assert hub.channels == {"a": {quick.subscriber}}
    assert await quick.read(len(small[0].block)) == small[0].block


async def test_who_has_caught_up_in_time_is_not_cut(open_stream: OpenStream) -> None:
    hub = make_hub(max_backlog=10_000)
    stream = await open_stream(hub, "a")
    for _ in range(3):
        large = join_blocks(await fill(stream, hub), several=False)
        assert await stream.read(len(large)) == large
        await until(lambda: not stream.transport.get_write_buffer_size())
    assert hub.counts.cut_clients == 0


async def test_cuts_are_counted_for_each_client_and_forgotten_after_ten_minutes(
    open_stream: OpenStream,
) -> None:
    hub = make_hub(max_backlog=0)
    loop = asyncio.get_running_loop()
    before = loop.time()
    for _ in range(3):
        stream = await open_stream(hub, "a", key=7)
        await fill(stream, hub)
        await hub.broadcast(make_frames("a"))
        assert stream.transport.is_closing()
    other = await open_stream(hub, "a", key=8)
    await fill(other, hub)
    now = loop.time()
    assert hub.counts.cut_clients == 3
    assert hub.cut_count(7, now) == 3
    assert hub.cut_count(8, now) == 0
    assert hub.cut_count(7, before + CUT_MEMORY - 1) == 3
    assert hub.cut_count(7, now + CUT_MEMORY) == 0
    await hub.broadcast(make_frames("a"))
    assert hub.cut_count(8, loop.time()) == 1


async def test_a_closed_or_broken_connection_does_not_stop_the_others(
    open_stream: OpenStream, caplog: pytest.LogCaptureFixture
) -> None:
    hub = make_hub()
    names = ["left", "closed", "aborted", "without a connection", "well", "well too"]
    streams = {name: await open_stream(hub, "a", "b") for name in names}
    streams["left"].far.close()
    streams["closed"].transport.close()
    streams["aborted"].transport.abort()
    streams["without a connection"].subscriber.transport = None
    bursts = [make_frames("a", "b", first=number) for number in range(1, 20, 2)]
    for burst in bursts:
        # In one turn of the loop, before anybody is told that a connection is lost.
        await hub.broadcast(burst)
    expected = join_blocks([frame for burst in bursts for frame in burst], several=True)
    for name in ("well", "well too"):
        assert await streams[name].read(len(expected)) == expected
    gone = {streams[name].subscriber for name in ("left", "closed", "aborted")}
    await until(lambda: not hub.subscribers & gone)
    assert len(hub.channels["a"]) == len(hub.channels["b"]) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Joins and leaves in the midst of a burst.


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * (WRITES_PER_TURN + 400) + 200
    assert hard == resource.RLIM_INFINITY or hard >= needed, "this test needs more file descriptors"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
async def test_who_joins_or_leaves_in_the_midst_of_a_large_burst_does_so_after_it(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    streams = [await open_stream(hub, "a") for _ in range(WRITES_PER_TURN + 300)]
    newcomer = await open_stream(hub, "a", enter=False)
    first, second = make_frames("a", "a"), make_frames("a", first=3)
    one, two = (join_blocks(burst, several=False) for burst in (first, second))

    running = asyncio.create_task(hub.broadcast(first))
    await asyncio.sleep(0)
    assert not running.done()
    written = [stream for stream in streams if stream.writes]
    unwritten = [stream for stream in streams if not stream.writes]
    assert len(written) == WRITES_PER_TURN
    gone = {id(stream) for stream in written[:50] + unwritten[:50]}
    for stream in written[:50] + unwritten[:50]:
        stream.transport.abort()
        hub.leave(stream.subscriber)
    hub.enter(newcomer.subscriber)
    await running
    await hub.broadcast(second)

    for stream in written:
        assert stream.writes == ([one] if id(stream) in gone else [one, two])
    for stream in unwritten:
        assert stream.writes == ([] if id(stream) in gone else [one, two])
    assert newcomer.writes == [two]
    assert len(hub.channels["a"]) == len(hub.subscribers) == WRITES_PER_TURN + 201


async def test_who_joins_while_a_burst_waits_for_another_is_in_neither(
    open_stream: OpenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 2)
    hub = make_hub()
    streams = [await open_stream(hub, "a") for _ in range(7)]
    before, after = [await open_stream(hub, "a", enter=False) for _ in range(2)]
    bursts = [make_frames("a", first=number) for number in (1, 2, 3)]
    one, two, three = (join_blocks(burst, several=False) for burst in bursts)

    running = asyncio.create_task(hub.broadcast(bursts[0]))
    await asyncio.sleep(0)
    hub.enter(before.subscriber)
    queued = asyncio.create_task(hub.broadcast(bursts[1]))
    await asyncio.sleep(0)
    hub.enter(after.subscriber)
    assert not running.done()
    assert before.writes == []
    await asyncio.gather(running, queued)
    await hub.broadcast(bursts[2])

    assert [stream.writes for stream in streams] == [[one, two, three]] * 7
    assert before.writes == [two, three]
    assert after.writes == [three]


# Who watches what.


async def test_a_channel_has_an_entry_while_somebody_watches_it(open_stream: OpenStream) -> None:
    hub = make_hub()
    abandoned: list[str] = []
    hub.on_abandoned = abandoned.append
    one = await open_stream(hub, "a", "b", enter=False)
    two = await open_stream(hub, "b", "c", enter=False, live=False)
    assert hub.enter(one.subscriber) == ["a", "b"]
    assert hub.enter(two.subscriber) == ["c"]
    hub.waiting.add(two.subscriber)
    assert {channel: len(watchers) for channel, watchers in hub.channels.items()} == {"a": 1, "b": 2, "c": 1}

    hub.leave(one.subscriber)
    hub.leave(one.subscriber)
    assert abandoned == ["a"]
    assert hub.channels == {"b": {two.subscriber}, "c": {two.subscriber}}
    assert hub.enter(one.subscriber) == ["a"]
    hub.leave(two.subscriber)
    hub.leave(one.subscriber)
    assert abandoned == ["a", "c", "a", "b"]
    assert (hub.channels, hub.subscribers, hub.waiting) == ({}, set(), set())


async def test_a_client_that_goes_leaves_the_hub_and_ends_its_task(open_stream: OpenStream) -> None:
    hub = make_hub()
    abandoned: list[str] = []
    hub.on_abandoned = abandoned.append
    stream = await open_stream(hub, "a", "b", live=False)
    task = stream.subscriber.task = asyncio.create_task(asyncio.sleep(FOREVER))
    hub.end_at(stream.subscriber, 99)
    stream.far.close()
    await until(lambda: not hub.subscribers)
    assert hub.channels == {}
    assert abandoned == ["a", "b"]
    assert hub.expiring == {}
    await until(task.cancelled)


async def test_a_channel_with_an_odd_name_is_told_apart_from_its_likes(open_stream: OpenStream) -> None:
    hub = make_hub()
    names = ["a", "A", " a", "a ", "\u00e9", "e\u0301"]
    streams = [await open_stream(hub, name) for name in names]
    for number, name in enumerate(names):
        await hub.broadcast(make_frames(name, first=number))
    assert [len(stream.writes) for stream in streams] == [1] * 6
    assert [b"id: e-%d\n" % number in stream.writes[0] for number, stream in enumerate(streams)] == [True] * 6


# One stream.


async def test_a_last_block_is_followed_by_the_end_without_https_final_chunk(open_stream: OpenStream) -> None:
    hub = make_hub()
    for chunked in (True, False):
        stream = await open_stream(hub, "a", chunked=chunked)
        stream.subscriber.write(b":\n", b"HTTP/1.1 200 OK\r\n\r\n")
        stream.subscriber.end(b"retry: 1\n\n")
        stream.subscriber.write(b"late")
        blocks = (as_chunk(b":\n"), as_chunk(b"retry: 1\n\n")) if chunked else (b":\n", b"retry: 1\n\n")
        assert await stream.read_all() == b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(blocks)
    await until(lambda: not hub.subscribers)


async def test_a_stream_without_a_connection_can_be_written_to_and_ended(open_stream: OpenStream) -> None:
    stream = await open_stream(make_hub(), "a")
    stream.subscriber.transport = None
    stream.subscriber.write(b"x")
    stream.subscriber.end(b"x")
    assert stream.writes == []


async def test_a_resume_is_paced_by_the_socket(open_stream: OpenStream) -> None:
    stream = await open_stream(make_hub(), "a", live=False)
    called: list[Subscriber] = []
    stream.subscriber.on_drain = called.append
    async with asyncio.timeout(20):
        await stream.subscriber.drained()
    stream.subscriber.write(b"x" * 4_000_000)
    assert stream.subscriber.paused
    stream.subscriber.on_drain = called.append
    assert called == []
    await stream.read(4_000_000)
    await until(lambda: called == [stream.subscriber])
    assert not stream.subscriber.paused


async def test_waiting_for_room_ends_when_there_is_room_and_when_the_client_goes(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    for stays in (True, False):
        stream = await open_stream(hub, "a", live=False)
        stream.subscriber.write(b"x" * 4_000_000)
        waiting = stream.subscriber.task = asyncio.create_task(stream.subscriber.drained())
        await asyncio.sleep(0)
        assert not waiting.done()
        if stays:
            await stream.read(4_000_000)
        else:
            stream.far.close()
        await until(waiting.done)
        assert waiting.cancelled() is not stays
        assert stream.subscriber.on_drain is None


async def test_a_stream_ends_in_the_second_in_which_its_token_does(open_stream: OpenStream) -> None:
    hub = make_hub()
    streams = {second: await open_stream(hub, "a") for second in (1_001, 1_002, 1_004, 1_100)}
    for second, stream in streams.items():
        hub.end_at(stream.subscriber, second)
    time = 1_000.99
    ending = asyncio.create_task(hub.end_expired(lambda: time, lambda: b"retry: 5\n\n"))
    try:
        await asyncio.sleep(0)
        time = 1_001.99
        assert await streams[1_001].read_all() == b"retry: 5\n\n"
        assert streams[1_002].writes == []
        # The clock jumps: nobody is left behind.
        time = 1_010.99
        assert await streams[1_002].read_all() == await streams[1_004].read_all() == b"retry: 5\n\n"
        assert streams[1_100].writes == []
        await until(lambda: hub.expiring == {1_100: {streams[1_100].subscriber}})
    finally:
        ending.cancel()


# Heartbeats.


async def test_an_idle_stream_gets_a_comment_and_a_busy_one_none(
    open_stream: OpenStream, beating: Beating
) -> None:
    hub = make_hub(heartbeat=0.2)
    loop = asyncio.get_running_loop()
    chunked, plain = await open_stream(hub, "a", chunked=True), await open_stream(hub, "a", "b")
    busy, opening = await open_stream(hub, "a", idle=-FOREVER), await open_stream(hub, "a")
    opening.subscriber.transport = None
    start = loop.time()
    beating(hub)
    assert await plain.read(2) == b":\n"
    assert loop.time() - start > 0.1
    assert await plain.read(2) == b":\n"
    assert loop.time() - start > 0.25
    assert await chunked.read(len(as_chunk(b":\n"))) == as_chunk(b":\n")
    assert busy.writes == []
    assert opening.writes == []


async def test_events_take_the_place_of_heartbeats(open_stream: OpenStream, beating: Beating) -> None:
    # So long that a stall of this machine makes nobody idle.
    hub = make_hub(heartbeat=1.2)
    idle, busy = await open_stream(hub, "idle"), await open_stream(hub, "busy")
    beating(hub)
    number = 0
    async with asyncio.timeout(20):
        while not idle.writes:
            number += 1
            await hub.broadcast(make_frames("busy", first=number))
            await asyncio.sleep(0.01)
    assert b":\n" not in busy.writes
    assert len(busy.writes) == number


async def test_once_a_minute_the_heartbeat_is_the_position_alone(
    open_stream: OpenStream, beating: Beating
) -> None:
    hub = make_hub(heartbeat=0.2)
    old = await open_stream(hub, "a", idle=POSITION_INTERVAL)
    recent = await open_stream(hub, "a", idle=POSITION_INTERVAL / 2)
    resuming = await open_stream(hub, "a", idle=POSITION_INTERVAL, live=False)
    beating(hub, lambda: POSITION)
    await until(lambda: min(len(stream.writes) for stream in (old, recent, resuming)) >= 2)
    assert old.writes[:2] == [b"id: e-99\n\n", b":\n"]
    assert recent.writes[:2] == [b":\n"] * 2
    # Its past is not out yet: a client cut now would lose it.
    assert resuming.writes[:2] == [b":\n"] * 2


async def test_without_a_position_that_all_have_reached_the_heartbeat_is_a_comment(
    open_stream: OpenStream, beating: Beating
) -> None:
    hub = make_hub(heartbeat=0.1)
    stream = await open_stream(hub, "a", idle=POSITION_INTERVAL)
    position: list[bytes | None] = [None]
    beating(hub, lambda: position[0])
    await until(lambda: len(stream.writes) >= 2)
    assert set(stream.writes) == {b":\n"}
    position[0] = POSITION
    await until(lambda: b"id: e-99\n\n" in stream.writes)


async def test_the_position_goes_out_each_minute_however_rare_heartbeats_are(
    open_stream: OpenStream, beating: Beating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse_relay, "POSITION_INTERVAL", 0.2)
    hub = make_hub(heartbeat=FOREVER)
    stream = await open_stream(hub, "a")
    beating(hub, lambda: POSITION)
    await until(lambda: len(stream.writes) >= 2)
    assert set(stream.writes) == {b"id: e-99\n\n"}


async def test_nothing_is_added_where_bytes_wait_already(open_stream: OpenStream, beating: Beating) -> None:
    hub = make_hub(heartbeat=0.1)
    stuck, idle = await open_stream(hub, "stuck", idle=POSITION_INTERVAL), await open_stream(hub, "idle")
    stuck.transport.write(b"x" * 4_000_000)
    beating(hub, lambda: POSITION)
    await until(lambda: len(idle.writes) >= 3)
    assert len(stuck.writes) == 1
    assert len(await stuck.read(4_000_000)) == 4_000_000
    # What fell due meanwhile comes as soon as there is room.
    await until(lambda: len(stuck.writes) >= 2)
    assert stuck.writes[1] == b"id: e-99\n\n"


async def test_a_broken_connection_does_not_stop_the_heartbeat(
    open_stream: OpenStream, beating: Beating
) -> None:
    hub = make_hub(heartbeat=0.1)
    streams = [await open_stream(hub, "a") for _ in range(4)]
    streams[0].far.close()
    streams[1].transport.close()
    streams[2].transport.abort()
    beating(hub)
    await until(lambda: len(streams[3].writes) >= 3)
    assert hub.subscribers == {streams[3].subscriber}


async def test_no_position_is_taken_while_some_have_events_that_others_have_not(
    open_stream: OpenStream, beating: Beating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 1)
    hub = make_hub(heartbeat=0.02)
    streams = [await open_stream(hub, "a", idle=-FOREVER) for _ in range(20)]
    counts: list[set[int]] = []

    def position() -> bytes:
        counts.append({len(stream.writes) for stream in streams})
        return POSITION

    beating(hub, position)
    number = 0
    async with asyncio.timeout(20):
        while len(counts) < 10:
            number += 1
            await hub.broadcast(make_frames("a", first=number))
    assert [len(each) for each in counts] == [1] * len(counts)
    assert max(map(max, counts)) > 1


async def test_a_burst_of_the_log_reaches_all_though_its_connection_is_lost(
    open_stream: OpenStream, log_database: harness.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next connection reads on behind it: who had not got it yet would miss it in silence."""
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 1)
    hub = Hub(1 << 20, FOREVER)
    source = sse_relay.LogSource(hub, sse_relay.Memory(1 << 20))
    listener = source.listener = sse_relay.Listener(log_database.dsn, source)
    running = asyncio.create_task(listener.run())
    try:
        async with asyncio.timeout(20):
            await listener.ready.wait()
            streams = [await open_stream(hub, "a") for _ in range(100)]
            reading = [asyncio.create_task(stream.read(1)) for stream in streams]
            log_database.execute("SELECT sse_relay.publish('a', 'x')")
            await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            assert not all(stream.writes for stream in streams)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    async with asyncio.timeout(5):
        await asyncio.gather(*reading)
    assert {block for stream in streams for block in stream.writes} == {streams[0].writes[0]}


# What it costs, counted in operations: no clock of a shared machine could tell.


def crowded(clients: int, channels: int) -> Hub:
    """A hub with so many clients, on so many channels in turn, without sockets."""
    hub = make_hub()
    for number in range(clients):
        subscriber = Subscriber(hub, (f"c{number % channels}",), Resume(None, None), 0, 0.0)
        subscriber.resume = None
        hub.enter(subscriber)
        hub.end_at(subscriber, 10_000 + number)
    return hub


async def test_an_event_costs_the_same_whoever_else_is_there(open_stream: OpenStream) -> None:
    costs = set()
    for clients, channels in ((1, 1), (1_000, 1), (1_000, 1_000), (4_000, 2_000)):
        hub = crowded(clients, channels)
        await open_stream(hub, "wanted")
        frames = make_frames("wanted", "nobody")
        costs.add(count_operations(lambda hub=hub, f=frames: run_without_waiting(hub.broadcast(f))))  # type: ignore[misc]
    assert len(costs) == 1


async def test_each_further_client_of_an_event_costs_one_write_and_little_more(
    open_stream: OpenStream,
) -> None:
    def cost(hub: Hub) -> int:
        return count_operations(lambda: run_without_waiting(hub.broadcast(make_frames("a", "a", "a"))))

    few, many = make_hub(), make_hub()
    for hub, clients in ((few, 10), (many, 60)):
        for _ in range(clients):
            await open_stream(hub, "a")
    # Half of them are asyncio's, in its write.
    assert (cost(many) - cost(few)) / 50 < 250


async def test_coming_and_leaving_cost_the_same_whoever_else_is_there() -> None:
    costs = set()
    for clients, channels in ((1, 1), (1_000, 1), (4_000, 2_000)):
        hub = crowded(clients, channels)

        def visit(hub: Hub = hub) -> None:
            subscriber = Subscriber(hub, ("visited", "c0"), Resume(None, None), 0, 0.0)
            hub.enter(subscriber)
            hub.end_at(subscriber, 5_000)
            hub.leave(subscriber)

        costs.add(count_operations(visit))
    assert len(costs) == 1


async def test_a_look_at_the_tokens_costs_the_same_however_many_end_later() -> None:
    costs = set()
    for clients in (1, 1_000, 4_000):
        ending = crowded(clients, 1).end_expired(lambda: 99.999, lambda: b"")
        asleep = ending.send(None)
        await until(asleep.done)
        costs.add(count_operations(lambda ending=ending: ending.send(None)))  # type: ignore[misc]
        ending.close()
    # asyncio's own, in debug mode, varies.
    assert max(costs) - min(costs) < 2_000


async def test_a_heartbeat_tick_does_little_for_a_client_that_needs_none() -> None:
    async def cost(clients: int) -> int:
        hub = crowded(clients, 1)
        for subscriber in hub.subscribers:
            subscriber.written = subscriber.marked = FOREVER * 1e6
        hub._heartbeat = 0.004
        beating = hub.beat(lambda: POSITION)
        asleep = beating.send(None)
        await until(asleep.done)
        operations = count_operations(lambda: beating.send(None))
        beating.close()
        return operations

    assert (await cost(1_100) - await cost(100)) / 1_000 < 60
