"""The hub, on asyncio's own transports over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import socket
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest

import sse_relay
from harness import count_operations, run_without_waiting
from sse_relay import (
    CUT_MEMORY,
    POSITION_INTERVAL,
    STALL_TIMEOUT,
    Event,
    Frame,
    Hub,
    RefusedError,
    Subscriber,
    as_chunk,
    encode_event,
    join_blocks,
)

FOREVER = 3_600.0
POSITION = b"e-99"
LIVE = 0


@dataclass
class Stream:
    """A subscriber in the hub, and its client's end of the socket."""

    subscriber: Subscriber
    transport: asyncio.Transport
    far: socket.socket
    writes: list[bytes] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)

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
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := await self.read(1):
                found += data + bytes(self.received)
                self.received.clear()
        return found


OpenStream = Callable[..., Awaitable[Stream]]
Beating = Callable[[Hub], None]


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
        **fields: Any,
    ) -> Stream:
        subscriber = Subscriber(hub, channels, key, chunked=chunked, **fields)
        near, far = socket.socketpair()
        far.setblocking(False)
        transport, _ = await loop.create_connection(lambda: subscriber, sock=near)
        stream = Stream(subscriber, transport, far)
        write = transport.write

        def record(data: bytes) -> None:
            stream.writes.append(data)
            write(data)

        transport.write = record  # type: ignore[method-assign,assignment]
        subscriber.transport = transport
        if live:
            subscriber.live_from = LIVE
        if enter:
            hub.enter(subscriber)
        streams.append(stream)
        return stream

    yield open_it
    for stream in streams:
        stream.transport.abort()
        stream.far.close()
    await asyncio.sleep(0)


@pytest.fixture
def beating() -> Iterator[Beating]:
    """Start a hub's heartbeat, which ends with the test; it must not have ended before."""
    tasks: list[asyncio.Task[None]] = []

    def start(hub: Hub) -> None:
        tasks.append(asyncio.get_running_loop().create_task(hub.beat()))

    yield start
    for task in tasks:
        assert not task.done()
        task.cancel()


Advance = Callable[[float], Awaitable[None]]


@pytest.fixture
async def advance(monkeypatch: pytest.MonkeyPatch) -> Advance:
    """Let the loop's clock jump: ``await advance(seconds)``, in steps of a second."""
    loop = asyncio.get_running_loop()
    real = loop.time
    ahead = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)

    async def jump(seconds: float) -> None:
        nonlocal ahead
        while seconds > 0:
            ahead += min(1.0, seconds)
            seconds -= 1.0
            for _ in range(6):
                await asyncio.sleep(0)

    return jump


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
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


async def broadcast(hub: Hub, frames: Sequence[Frame]) -> None:
    await hub.broadcast(frames, "e")


def make_hub(max_backlog: int = 1_000_000, heartbeat: float = FOREVER) -> Hub:
    return Hub(max_backlog, heartbeat)


# Bursts.


async def test_a_burst_is_one_write_in_the_order_of_positions_made_once_for_all_who_get_the_same(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    watching = ("abc", "ca", "b", "bx", "x", "a", "a", "cba")
    streams = [
        await open_stream(hub, *names, chunked=http11) for names in watching for http11 in (True, False)
    ]
    burst = make_frames(*"cabybaccba")
    await broadcast(hub, burst)
    different: dict[bytes, set[int]] = {}
    deliveries = 0
    for stream in streams:
        channels = stream.subscriber.channels
        mine = [frame for frame in burst if frame.channel in channels]
        block = join_blocks(mine, several=len(channels) > 1)
        # One chunk of HTTP/1.1.
        expected = as_chunk(block) if block and stream.subscriber.chunked else block
        assert stream.writes == ([expected] if block else [])
        assert await stream.read(len(expected)) == expected
        different.setdefault(expected, set()).update(map(id, stream.writes))
        deliveries += len(mine)
    assert {len(objects) for data, objects in different.items() if data} == {1}
    assert hub.counts.deliveries == deliveries
    assert hub.counts.sent_bytes == sum(len(data) for stream in streams for data in stream.writes)
    await hub.send_gaps("outage", "e", 99)
    assert hub.counts.gaps == {"outage": len(streams)}
    assert hub.counts.deliveries == deliveries


# Slow clients.


async def test_a_live_stream_that_is_behind_catches_up_and_is_not_cut(open_stream: OpenStream) -> None:
    hub = make_hub(max_backlog=10_000)
    behind: list[tuple[Subscriber, str, int]] = []
    hub.on_behind = lambda *who: behind.append(who)
    slow, quick = await open_stream(hub, "a"), await open_stream(hub, "a")
    # One large event may exceed the backlog by itself.
    await broadcast(hub, make_frames("a", data="x" * 4_000_000))
    size = len(slow.writes[0])
    assert len(await quick.read(size)) == size
    await broadcast(hub, make_frames("a", "a", first=2))
    await broadcast(hub, make_frames("a", first=4))
    assert behind == [(slow.subscriber, "e", 1)]
    assert slow.subscriber.live_from == sse_relay.NOT_LIVE
    assert (len(slow.writes), len(quick.writes)) == (1, 3)
    assert len(await slow.read(size)) == size
    assert hub.channels == {"a": {quick.subscriber, slow.subscriber}}
    assert hub.counts.cut_clients == 0


@pytest.mark.parametrize("channels", [("a",), ("b", "a", "c")])
async def test_a_burst_leaves_in_pieces_of_the_backlog_or_of_one_event(
    open_stream: OpenStream, channels: tuple[str, ...]
) -> None:
    hub = make_hub(max_backlog=1_000)
    quick = await open_stream(hub, *channels, chunked=True)
    burst = [
        frame
        for number, size in enumerate([10, 900, 100, 5_000, 1, 1, 1, 985, 985, 2_000, 400, 400, 400], 1)
        for frame in make_frames(channels[number % len(channels)], first=number, data="x" * size)
    ]
    await broadcast(hub, burst)
    events = [join_blocks([frame], several=len(channels) > 1) for frame in burst]
    pieces: list[bytes] = []
    while events:
        piece = events.pop(0)
        while events and len(piece) + len(events[0]) <= 1_000:
            piece += events.pop(0)
        pieces.append(piece)
    assert quick.writes == list(map(as_chunk, pieces))
    assert 5 < len(pieces) < len(burst)


@pytest.mark.parametrize("live", [True, False])
async def test_only_who_takes_nothing_for_half_a_minute_is_cut_in_whatever_state(
    open_stream: OpenStream, beating: Beating, advance: Advance, live: bool
) -> None:
    hub = make_hub(max_backlog=10_000_000)
    stalled, slow, idle = [await open_stream(hub, "a", live=live, key=key) for key in range(3)]
    beating(hub)
    for stream in (stalled, slow):
        stream.subscriber.write(b"x" * 4_000_000)
    # From now on nothing is taken of the one, and a little at a time of the other; more comes for both.
    for number in range(1, 6):
        stalled.subscriber.write(b"x")
        await broadcast(hub, make_frames("a", first=number))
        before = slow.transport.get_write_buffer_size()
        while slow.transport.get_write_buffer_size() == before:
            await slow.read(20_000)
        assert not stalled.transport.is_closing()
        await advance(STALL_TIMEOUT / 5)
    await advance(STALL_TIMEOUT / 2)
    assert stalled.transport.is_closing()
    assert not slow.transport.is_closing()
    assert hub.counts.cut_clients == 1
    now = asyncio.get_running_loop().time()
    assert [hub.cut_count(key, now) for key in range(3)] == [1, 0, 0]
    await until(lambda: hub.subscribers == {slow.subscriber, idle.subscriber})


@pytest.mark.parametrize("live", [True, False])
async def test_who_is_behind_by_the_same_at_every_look_but_took_all_in_between_is_not_cut(
    open_stream: OpenStream, beating: Beating, advance: Advance, live: bool
) -> None:
    hub = make_hub(max_backlog=10_000_000)
    stream = await open_stream(hub, "a", live=live)
    beating(hub)
    behind = set()
    for number in range(1, 10):
        if live:
            await broadcast(hub, make_frames("a", first=number, data="x" * 1_000_000))
        else:
            stream.subscriber.write(b"x" * 1_000_000)
        behind.add(stream.transport.get_write_buffer_size())
        await advance(STALL_TIMEOUT / 4)
        await stream.read(len(stream.writes[-1]))
    assert len(behind) == 1
    assert behind != {0}
    assert not stream.transport.is_closing()


async def test_cuts_are_counted_for_each_client_and_forgotten_after_ten_minutes(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    before = asyncio.get_running_loop().time()
    for key in (7, 7, 7, 8):
        stream = await open_stream(hub, "a", key=key)
        hub.cut(stream.subscriber)
        assert stream.transport.is_closing()
    now = asyncio.get_running_loop().time()
    assert hub.counts.cut_clients == 4
    for when, key, count in [(now, 7, 3), (now, 8, 1), (now, 9, 0), (before + CUT_MEMORY - 1, 7, 3)]:
        assert hub.cut_count(key, when) == count
    assert hub.cut_count(7, now + CUT_MEMORY) == 0


async def test_connections_that_are_closed_or_break_concern_their_streams_alone(
    open_stream: OpenStream,
    beating: Beating,
    advance: Advance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise RuntimeError("not from a socket")

    hub = make_hub(heartbeat=1.0)
    broken = ("write", "is_closing", "get_write_buffer_size")
    names = [*broken, "left", "closed", "aborted", "without a connection", "well", "well too"]
    streams = {name: await open_stream(hub, "a", "b") for name in names}
    streams["left"].far.close()
    streams["closed"].transport.close()
    streams["aborted"].transport.abort()
    streams["without a connection"].subscriber.transport = None
    bursts = [make_frames("a", "b", first=number) for number in range(1, 22, 2)]
    for burst in bursts[:-1]:
        # In one turn of the loop, before anybody is told that a connection is lost.
        await broadcast(hub, burst)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for method in broken[:2]:
        monkeypatch.setattr(streams[method].transport, method, fail)
    await broadcast(hub, bursts[-1])
    await hub.send_gaps("outage", "e", 23)
    expected = join_blocks([frame for burst in bursts for frame in burst], several=True)
    for name in ("well", "well too"):
        assert await streams[name].read(len(expected)) == expected
    monkeypatch.setattr(streams[broken[2]].transport, broken[2], fail)
    beating(hub)
    await advance(3)
    assert streams["well"].writes[-1] == b":\n"
    await until(lambda: len(hub.subscribers) == 3)
    assert hub.channels == {"a": hub.subscribers, "b": hub.subscribers}
    assert hub.subscribers == {streams[name].subscriber for name in names[-3:]}


# Who watches what.


async def test_channels_are_watched_by_their_first_client_and_who_is_refused_leaves_nothing_behind(
    open_stream: OpenStream,
) -> None:
    hub = make_hub()
    told: list[str] = []

    def watch(channels: Collection[str]) -> None:
        if "full" in channels:
            raise RefusedError(503, "full")
        told.extend(channels)

    hub.on_watched, hub.on_abandoned = watch, lambda channel: told.append(f"no {channel}")
    one = await open_stream(hub, "a", "b")
    refused = await open_stream(hub, "c", "full", "b", enter=False)
    with pytest.raises(RefusedError):
        hub.enter(refused.subscriber)
    two = await open_stream(hub, "b", "c", live=False)
    for stream in (one, one, two):
        hub.leave(stream.subscriber)
    assert told == ["a", "b", "c", "no a", "no b", "no c"]
    assert (hub.channels, hub.subscribers) == ({}, set())


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


async def test_a_revocation_ends_a_subjects_older_streams_alone(open_stream: OpenStream) -> None:
    hub = make_hub()
    cases = [("me", 10.0), ("me", 20.5), ("me", 20.51), ("you", 10.0), (None, 0.0)]
    streams = [await open_stream(hub, "a", subject=subject, issued=issued) for subject, issued in cases]
    hub.revoke("me", 20.5, b"refused\n\n")
    hub.revoke("unknown", 99.0, b"")
    assert [stream.writes for stream in streams] == [[b"refused\n\n"]] * 2 + [[]] * 3
    await until(lambda: hub.subscribers == {stream.subscriber for stream in streams[2:]})
    assert set(hub.subjects) == {"me", "you"}
    hub.revoke("me", 21.0, b"refused\n\n")
    await until(lambda: set(hub.subjects) == {"you"})


async def test_a_stream_ends_in_the_second_in_which_its_token_does(open_stream: OpenStream) -> None:
    hub = make_hub()
    seconds = (1_001, 1_002, 1_004, 1_100)
    streams = {second: await open_stream(hub, "a", expires=second) for second in seconds}
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


# Heartbeats. By the loop's clock alone; a beat comes each quarter of the shortest interval.


async def test_an_idle_stream_gets_a_comment_and_a_busy_one_none(
    open_stream: OpenStream, beating: Beating, advance: Advance
) -> None:
    hub = make_hub(heartbeat=16.0)
    chunked, plain = await open_stream(hub, "a", chunked=True), await open_stream(hub, "a", "b", live=False)
    busy, opening = await open_stream(hub, "busy"), await open_stream(hub, "a")
    opening.subscriber.transport = None
    beating(hub)
    for minute in range(1, 4):
        for number in range(4):
            await broadcast(hub, make_frames("busy", first=4 * minute + number))
            await advance(4.0)
        assert len(plain.writes) in (minute - 1, minute)
    assert set(chunked.writes) == {as_chunk(b":\n")}
    assert set(plain.writes) == {b":\n"}
    assert b":\n" not in busy.writes
    assert opening.writes == []


@pytest.mark.parametrize(("heartbeat", "comments"), [(20.0, True), (FOREVER, False)])
async def test_once_a_minute_the_position_goes_out_however_rare_heartbeats_are(
    open_stream: OpenStream, beating: Beating, advance: Advance, heartbeat: float, comments: bool
) -> None:
    hub = make_hub(heartbeat=heartbeat)
    hub.stand("e", 99)
    live, catching_up = await open_stream(hub, "a"), await open_stream(hub, "a", live=False)
    beating(hub)
    await advance(2 * POSITION_INTERVAL + 12)
    assert live.writes.count(b"id: e-99\n\n") == 2
    assert live.writes.count(b":\n") == len(live.writes) - 2
    # Its past is not out yet: a client cut now would lose it.
    assert set(catching_up.writes) == ({b":\n"} if comments else set())


async def test_heartbeat_events_come_every_interval_whatever_else_is_sent(
    open_stream: OpenStream, beating: Beating, advance: Advance
) -> None:
    hub = make_hub(heartbeat=12.0)
    hub.stand("e", 99)
    live, catching_up = await open_stream(hub, "a"), await open_stream(hub, "a", live=False)
    for stream in (live, catching_up):
        stream.subscriber.heartbeats = True
    beating(hub)
    for number in range(10):
        await broadcast(hub, make_frames("a", first=100 + number))
        await advance(6.0)
    beats = [data for data in live.writes if b"relay.heartbeat" in data]
    assert len(beats) in (4, 5)
    assert all(data.endswith(b'data: {"interval":12}\n\n') and b"id: e-10" in data for data in beats)
    assert set(catching_up.writes) == {b'event: relay.heartbeat\ndata: {"interval":12}\n\n'}
    assert len(catching_up.writes) in (4, 5)


async def test_nothing_is_added_where_bytes_wait_already(
    open_stream: OpenStream, beating: Beating, advance: Advance
) -> None:
    hub = make_hub(heartbeat=5.0)
    hub.stand("e", 99)
    stuck = await open_stream(hub, "stuck")
    stuck.subscriber.heartbeats = True
    stuck.subscriber.write(b"x" * 4_000_000)
    beating(hub)
    for _ in range(8):
        await advance(6.0)
        assert len(await stuck.read(500_000)) == 500_000
        assert len(stuck.writes) == 1
    await until(lambda: not stuck.transport.get_write_buffer_size())
    await advance(7.0)
    assert b"relay.heartbeat" in stuck.writes[1]


async def test_a_session_of_the_log_begins_when_everybody_has_what_the_last_one_read(
    open_stream: OpenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gap for one channel, which it may tell, moves the position of all."""
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 1)
    hub = make_hub()
    source = sse_relay.LogSource(hub, sse_relay.Memory(1 << 20))
    streams = [await open_stream(hub, "a") for _ in range(20)]
    written: list[int] = []

    async def query(statement: str, values: object = ()) -> list[tuple[object, ...]]:
        if statement == sse_relay.LOG_LIMITS_SQL:
            return []
        written.append(sum(map(len, (stream.writes for stream in streams))))
        raise sse_relay.LostConnectionError("enough")

    source.listener = types.SimpleNamespace(query=query)  # type: ignore[assignment]  # all that is asked of it
    burst = asyncio.create_task(broadcast(hub, make_frames("a")))
    await asyncio.sleep(0)
    with pytest.raises(sse_relay.LostConnectionError):
        await source.connected()
    await burst
    assert written == [20]


# What it costs, counted in operations: no clock of a shared machine could tell.


def crowded(clients: int, channels: int) -> Hub:
    """A hub with so many clients, on so many channels in turn, without sockets."""
    hub = make_hub()
    for number in range(clients):
        subscriber = Subscriber(hub, (f"c{number % channels}",), 0, expires=10_000 + number)
        subscriber.live_from = LIVE
        hub.enter(subscriber)
    return hub


async def test_an_event_and_a_visit_cost_the_same_whoever_else_is_there(open_stream: OpenStream) -> None:
    events, visits = [], []
    for clients, channels in ((1, 1), (1_000, 1), (1_000, 1_000), (4_000, 2_000)):
        hub = crowded(clients, channels)

        def visit(hub: Hub = hub) -> None:
            subscriber = Subscriber(hub, ("visited", "c0"), 0, expires=5_000)
            hub.enter(subscriber)
            hub.leave(subscriber)

        visits.append(count_operations(visit))
        await open_stream(hub, "wanted")
        frames = make_frames("wanted", "nobody")
        events.append(count_operations(lambda hub=hub, f=frames: run_without_waiting(broadcast(hub, f))))  # type: ignore[misc]
    for costs in (events, visits):
        assert max(costs) < 1.1 * costs[0]


async def test_each_further_client_of_an_event_costs_one_write_and_little_more(
    open_stream: OpenStream,
) -> None:
    def cost(hub: Hub) -> int:
        return count_operations(lambda: run_without_waiting(broadcast(hub, make_frames("a", "a", "a"))))

    few, many = make_hub(), make_hub()
    for hub, clients in ((few, 10), (many, 60)):
        for _ in range(clients):
            await open_stream(hub, "a")
    # Half of them are asyncio's, in its write.
    assert (cost(many) - cost(few)) / 50 < 250


async def test_a_heartbeat_tick_does_little_for_a_client_that_needs_none() -> None:
    async def cost(clients: int) -> int:
        hub = crowded(clients, 1)
        for subscriber in hub.subscribers:
            subscriber.transport = Sink()
            subscriber.taken, subscriber.heartbeat_at = 0, FOREVER * 1e6
        hub.heartbeat = 0.004
        beating = hub.beat()
        asleep = beating.send(None)
        await until(asleep.done)
        operations = count_operations(lambda: beating.send(None))
        beating.close()
        return operations

    assert (await cost(1_100) - await cost(100)) / 1_000 < 120


class Sink(asyncio.Transport):
    def write(self, data: object) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.mark.parametrize("alike", [True, False])
async def test_the_longest_turn_of_a_burst_does_not_grow_with_the_streams(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 100)
    pool = [f"c{number}" for number in range(40)]

    async def turns(streams: int) -> list[int]:
        """Count the operations of each turn that a burst to streams of 20 channels takes."""
        hub = make_hub()
        chosen = random.Random(1)
        for _ in range(streams):
            channels = pool[:20] if alike else chosen.sample(pool, 20)
            subscriber = Subscriber(hub, tuple(channels), 0)
            subscriber.transport, subscriber.live_from = Sink(), LIVE
            hub.enter(subscriber)
        burst = asyncio.create_task(broadcast(hub, make_frames(*pool * 4)))
        counts: list[int] = []
        monkeypatch.setattr(hub, "_go_on", lambda: counts.append(count_operations(lambda: Hub._go_on(hub))))
        await burst
        assert hub.counts.deliveries == streams * 80
        return counts

    few, many = await turns(60), await turns(240)
    assert len(many) > len(few)
    assert max(many) < 1.5 * max(few)


async def test_a_turn_writes_less_to_fewer_streams_when_events_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = make_hub()
    for _ in range(500):
        subscriber = Subscriber(hub, ("a",), 0)
        subscriber.transport, subscriber.live_from = Sink(), LIVE
        hub.enter(subscriber)
    sent = [0]

    def go_on() -> None:
        Hub._go_on(hub)
        sent.append(hub.counts.sent_bytes)

    monkeypatch.setattr(hub, "_go_on", go_on)
    await broadcast(hub, make_frames("a", data="x" * 1_000_000))
    assert hub.counts.deliveries == 500
    # Some 4 us for 8 KiB: 10 ms.
    assert max(after - before for before, after in itertools.pairwise(sent)) < 20_000_000
