"""One stream from its opening to live: hub, source notify and streams together, in this process.

PostgreSQL, sockets and time are the tests' own, so that a client can be cut after every byte.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import psycopg2
import psycopg2.extensions
import pytest

import sse_relay
from sse_relay import (
    NOT_LIVE,
    Access,
    Hub,
    Interest,
    Memory,
    NotifySource,
    Streams,
    Subscriber,
    Wish,
    compile_globs,
    parse_position,
)

FAR = 3_600.0
ROOM = 64 * 1024


class Wire(asyncio.Transport):
    """A client's connection. The client takes bytes when told to, and the stage's clock stamps each write."""

    def __init__(self, stage: Stage, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.written = bytearray()
        self.stamps: list[tuple[int, int]] = []
        """For each write, where it ends, and the clock then."""
        self.taken = 0
        self.closing = False
        self.largest = 0
        """The most that ever waited."""
        self._stage = stage
        self._protocol = protocol
        self._paused = False

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        assert not self.closing
        self.written += data
        self.stamps.append((len(self.written), self._stage.clock))
        self.largest = max(self.largest, self.get_write_buffer_size())
        if self.get_write_buffer_size() > self._stage.room and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def take(self, count: int) -> None:
        """Let the client take so many bytes more."""
        self.taken = min(len(self.written), self.taken + count)
        if self._paused and self.get_write_buffer_size() <= self._stage.room // 4:
            self._paused = False
            self._protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.written) - self.taken

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close


class Stage:
    """A relay with source notify whose listener and sockets are played by the test."""

    def __init__(self, memory: int = 1 << 26, max_backlog: int = 256 * 1024, room: int = ROOM) -> None:
        self.clock = 0
        """How many events were published."""
        self.published: list[tuple[int, str]] = []
        self.room = room
        self.hub = Hub(max_backlog, heartbeat=0.002)
        self.interest = Interest(self.hub.channels, 0.0, 100)
        self.source = NotifySource(self.hub, Memory(memory), self.interest)
        self.streams = Streams(
            self.hub, self.source, Access(compile_globs("*"), compile_globs([])), path="/events", retry=1,
            max_clients=100, max_age=None,
        )  # fmt: skip
        self._arrived: list[psycopg2.extensions.Notify] = []
        self._session: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Bring LISTEN in line with what is wanted, as the listener does."""
        if self._session is None:
            return
        wanted, confirmed = self.interest.wanted(), self.interest.confirmed
        fresh, stale = wanted - confirmed, confirmed - wanted
        confirmed -= stale
        self.source.retracted(stale)
        if fresh:
            confirmed |= fresh
            self.source.confirmed(fresh)

    def connect(self) -> None:
        if self._session is None:
            self._session = asyncio.create_task(self._work())
            self.listen()

    async def _work(self) -> None:
        await asyncio.sleep(0)
        await self.source.connected()
        while True:
            await asyncio.sleep(0)
            arrived, self._arrived = self._arrived, []
            if arrived:
                await self.source.deliver(arrived, asyncio.get_running_loop().time())

    async def lose(self) -> None:
        """Lose the connection to PostgreSQL, perhaps in the middle of a burst."""
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait([self._session])
            self._session = None
            self._arrived = []
            self.source.lost()
            self.interest.confirmed.clear()

    def unlisten(self) -> None:
        """Let go of channels that nobody watches."""
        self.interest.expire(asyncio.get_running_loop().time() + FAR)
        self.listen()

    def publish(self, channel: str, size: int = 0) -> None:
        self.clock += 1
        self.published.append((self.clock, channel))
        if self._session is not None and channel in self.interest.confirmed:
            self._arrived.append(psycopg2.extensions.Notify(1, channel, f"{self.clock} {'x' * size}"))

    async def settle(self, clients: Iterable[Client] = (), turns: int = 10) -> None:
        """Let everything happen that can; the clients take all that comes."""
        for _ in range(turns):
            for client in clients:
                client.take(1 << 30)
            await asyncio.sleep(0)

    async def finish(self, client: Client) -> None:
        """Let a client come back as often as it is cut, until it is live and has all."""
        for _ in range(2_000):
            if client.wire is None or client.wire.closing:
                client.cut()
                client.open()
            self.listen()
            await self.settle([client], 4)
            if client.live and not self._arrived:
                await self.settle([client])
                if client.live and client.wire is not None and not client.wire.get_write_buffer_size():
                    return
        raise AssertionError("it never becomes live")

    async def close(self) -> None:
        await self.lose()
        for subscriber in tuple(self.hub.subscribers):
            self.hub.leave(subscriber)
        await self.settle()


class Client:
    """A client of some channels that comes back at its last position, and what it has received."""

    def __init__(self, stage: Stage, *channels: str, position: str | None = None, last: int = 0) -> None:
        self.stage = stage
        self.channels = channels
        self.position = position
        self.last = last
        self.born = stage.clock
        self.seen: list[int] = []
        """The clock of each event, over all its connections."""
        self.told: list[tuple[int, str, str]] = []
        """Clock, channel and reason of each gap, by channel."""
        self.wire: Wire | None = None
        self.subscriber = Subscriber(stage.hub, channels, 0)
        self._read = 0

    def open(self, **fields: Any) -> None:
        self.subscriber = Subscriber(self.stage.hub, self.channels, 0, False, True, **fields)
        self.stage.hub.enter(self.subscriber)
        self.wire = self.subscriber.transport = Wire(self.stage, self.subscriber)
        self._read = 0
        position = parse_position(self.position) if self.position else None
        self.stage.streams._begin(self.subscriber, Wish(self.position, position, last=self.last), b"")

    @property
    def live(self) -> bool:
        return self.wire is not None and self.subscriber.live_from < NOT_LIVE

    def take(self, count: int) -> None:
        """Take so many bytes, and read what blocks are whole."""
        if self.wire is None:
            return
        self.wire.take(count)
        wire = self.wire
        end = wire.written.rfind(b"\n\n", self._read, wire.taken) + 2
        if end < 2:
            return
        offset = self._read
        for block in wire.written[self._read : end].split(b"\n\n")[:-1]:
            offset += len(block) + 2
            clock = next(clock for stop, clock in wire.stamps if offset <= stop)
            self._take_block(block.decode(), clock)
        self._read = end

    def _take_block(self, block: str, clock: int) -> None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "id" in fields:
            self.position = fields["id"]
        name = fields.get("event", "")
        if name == "relay.gap":
            gap = json.loads(fields["data"])
            self.told += [(clock, channel, gap["reason"]) for channel in gap["channels"]]
        elif "data" in fields and not name.startswith("relay."):
            self.seen.append(int(fields["data"].split()[0]))

    def cut(self) -> None:
        """Leave; what was not taken is lost."""
        if self.wire is not None:
            self.wire.close()
            self.wire = None

    def check(self) -> None:
        """Check that it has everything in order and once, or was told after it happened."""
        assert self.seen == sorted(set(self.seen)), "out of order, or twice"
        seen = set(self.seen)
        assert seen <= {clock for clock, channel in self.stage.published if channel in self.channels}
        told = {
            channel: max((c for c, n, _ in self.told if n == channel), default=-1)
            for channel in self.channels
        }
        missing = [
            (clock, channel)
            for clock, channel in self.stage.published
            if channel in told and clock > self.born and clock not in seen and clock > told[channel]
        ]
        assert not missing, f"neither sent nor told of: {missing[:3]} of {len(missing)}, {self.told}"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    made.connect()
    await made.settle()
    yield made
    await made.close()


# ==== Never a silent loss =====================================================


async def test_a_client_cut_after_any_block_of_a_long_resume_skips_nothing_untold(stage: Stage) -> None:
    """One of its channels has a gap, the other more than one page, and an event comes meanwhile."""
    client = Client(stage, "news", "own")
    keeper = Client(stage, "news")
    for each in (client, keeper):
        each.open()
    stage.listen()
    await stage.settle([client, keeper])
    client.cut()
    await stage.settle()
    stage.unlisten()
    for _ in range(1_000):
        stage.publish("news", 1_000)
    stage.publish("own")
    await stage.settle([keeper])
    before = client.position, client.seen[:], client.told[:]

    client.open()
    stage.listen()
    await stage.settle()
    # The gap is out, the page has fetched its state; what follows waits for the client.
    assert not client.live
    stage.publish("own")
    stage.publish("news")
    await stage.settle()
    await stage.finish(client)
    client.check()
    assert [reason for _, channel, reason in client.told if channel == "own"] == ["start", "evicted"]
    assert [reason for _, channel, reason in client.told if channel == "news"] == ["start"]

    assert client.wire is not None
    wire = client.wire
    ends = [match.end() for match in re.finditer(rb"\n\n", wire.written)]
    assert len(ends) > 1_000
    client.cut()
    for end in [*ends[:20], *ends[20:-20:25], *ends[-20:]]:
        again = Client(stage, *client.channels)
        again.born = client.born
        again.position, again.seen, again.told = before[0], before[1][:], before[2][:]
        again.wire = Wire(stage, again.subscriber)
        again.wire.written, again.wire.stamps = wire.written[:end], wire.stamps
        again.take(1 << 30)
        again.cut()
        again.open()
        await stage.finish(again)
        again.check()
        again.cut()
        await stage.settle()


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(n, marks=pytest.mark.slow) for n in range(12, 60)), None]
)
async def test_whatever_happens_nothing_is_lost_untold_or_comes_twice(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are cut at any byte, channels come and go, memory is small, PostgreSQL goes away."""
    if seed is None:
        seed = random.randrange(10**9)
        print(f"seed {seed}")  # noqa: T201  # to run it again
    chance = random.Random(seed)
    asyncio.get_running_loop().set_debug(False)  # takes half of the time
    monkeypatch.setattr(sse_relay, "RESUME_PIECE_BYTES", chance.choice([600, 3_000]))
    monkeypatch.setattr(sse_relay, "WRITES_PER_TURN", 1)
    stage = Stage(memory=chance.choice([4_000, 20_000, 1 << 26]), max_backlog=1_000, room=500)
    channels = ["a", "b", "c"]
    clients = [
        Client(stage, *chance.sample(channels, chance.randrange(1, 4))) for _ in range(chance.randrange(1, 5))
    ]
    beating = asyncio.create_task(stage.hub.beat())

    def publish() -> None:
        for _ in range(chance.randrange(1, 5)):
            stage.publish(chance.choice(channels), chance.choice([1, 50, 400]))

    def open_or_take() -> None:
        client = chance.choice(clients)
        if client.wire is None or client.wire.closing:
            client.cut()
            client.open()
        else:
            client.take(chance.choice([1, 30, 300, 3_000]))

    acts: list[Callable[[], object]] = [publish, open_or_take, stage.listen, stage.unlisten, stage.connect]
    weights = [30, chance.choice([20, 60]), 20, 10, 5, chance.choice([2, 10]), chance.choice([0, 2]), 1]
    try:
        for _ in range(400):
            what = chance.choices([*acts, "cut", "lose", "wait"], weights)[0]
            if callable(what):
                what()
            elif what == "cut":
                for client in chance.sample(clients, chance.randrange(1, len(clients) + 1)):
                    client.cut()
                await stage.settle()
                if chance.random() < 0.5:
                    stage.unlisten()
            elif what == "lose":
                await stage.lose()
            else:
                await asyncio.sleep(0.002)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        stage.connect()
        for client in clients:
            await stage.finish(client)
        # What comes now, all get.
        for channel in channels:
            stage.publish(channel)
        for client in clients:
            await stage.finish(client)
            client.check()
            assert not [told for told in client.told if told[0] == stage.clock]
    finally:
        beating.cancel()
        await stage.close()


# ==== States ==================================================================

STATES: dict[str, Callable[[Subscriber], bool]] = {
    "opening": lambda s: s.transport is None,
    "catching up": lambda s: is_open(s) and s.live_from == NOT_LIVE and s.task is not None,
    "live": lambda s: is_open(s) and s.live_from < NOT_LIVE and s.task is None,
    "ending": lambda s: s.transport is not None and s.transport.is_closing(),
}


def is_open(subscriber: Subscriber) -> bool:
    return subscriber.transport is not None and not subscriber.transport.is_closing()


def state(subscriber: Subscriber) -> str:
    (found,) = [name for name, holds in STATES.items() if holds(subscriber)]
    return found


async def bring_to(stage: Stage, state_wanted: str) -> Client:
    """Return a client whose stream is in a state; of the first three, `STATES` has them in their order."""
    client = Client(stage, "a", "b")
    client.subscriber.subject = "me"
    if state_wanted == "opening":
        stage.hub.enter(client.subscriber)
    else:
        client.open(subject="me")
        if state_wanted != "catching up":
            await stage.finish(client)
        if state_wanted == "ending":
            client.subscriber.end(b"retry: 1\n\n")
    assert state(client.subscriber) == state_wanted
    return client


async def test_no_heartbeat_gives_a_position_beyond_an_outage_that_is_not_told_yet() -> None:
    hub = sse_relay.Hub(1 << 20, 15.0)
    source = sse_relay.NotifySource(hub, sse_relay.Memory(1 << 20), sse_relay.Interest(["a"], 60.0, 10))
    source.confirmed(["a"])
    await source.connected()
    told = hub.position
    source.lost()
    source.confirmed(["a"])
    assert hub.position == told
    await source.connected()
    assert hub.position != told


def test_the_table_of_states_is_the_one_that_is_tested() -> None:
    section = Path(sse_relay.__file__).read_text().partition("# ==== Streams ")[2]
    rows = re.findall(r"^# (\w[\w ]*?) *\| ", section, re.MULTILINE)
    assert rows == ["state", *STATES]


async def test_a_stream_goes_through_its_states(stage: Stage) -> None:
    client = Client(stage, "a", "b")
    stage.hub.enter(client.subscriber)
    assert state(client.subscriber) == "opening"
    stage.hub.leave(client.subscriber)
    client.open()
    assert state(client.subscriber) == "catching up"
    await stage.finish(client)
    for size, turns in ((400_000, 2), (1, 1)):
        for _ in range(turns):
            stage.publish("a", size)
            await stage.settle()
        assert state(client.subscriber) == ("catching up" if turns == 2 else "live")
        await stage.finish(client)
        assert state(client.subscriber) == "live"
    client.check()
    client.subscriber.end(b"retry: 1\n\n")
    assert state(client.subscriber) == "ending"
    assert client.wire is not None
    assert client.wire.written.endswith(b"retry: 1\n\n")
    await stage.settle()
    assert not stage.hub.subscribers


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("how", ["leaves", "is ended", "is revoked", "stalls"])
async def test_a_stream_ends_in_every_state(
    stage: Stage, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await bring_to(stage, name)
    subscriber, wire = client.subscriber, client.wire
    beating = None
    if how == "leaves":
        subscriber.connection_lost(None)
    elif how == "is ended":
        subscriber.end(b"retry: 1\n\n")
    elif how == "is revoked":
        stage.streams.revoke("me", 10.0)
    else:
        monkeypatch.setattr(sse_relay, "STALL_TIMEOUT", 0.05)
        beating = asyncio.create_task(stage.hub.beat())
        subscriber.write(b"x" * 100_000)
    deadline = time.monotonic() + 10
    # A request that only waits for LISTEN has nothing that it could take.
    while stage.hub.subscribers and not (name == "opening" and how == "stalls"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    if beating is not None:
        beating.cancel()
    if how == "is revoked" and name in ("catching up", "live"):
        assert wire is not None
        assert b'event: relay.refused\ndata: {"status":401,' in wire.written
    assert stage.hub.counts.cut_clients == (how == "stalls" and name in ("catching up", "live"))
    assert subscriber.task is None or subscriber.task.done() or subscriber.task.cancelling()


async def test_an_error_of_ours_lets_the_client_come_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise RuntimeError(secret)

    secret = "hush"

    client = await bring_to(stage, "catching up")
    stage.listen()
    monkeypatch.setattr(stage.source, "locate", fail)
    await stage.settle()
    assert client.wire is not None
    assert client.wire.closing
    assert re.search(rb"\n\nretry: \d+\n\n$", client.wire.written)
    assert not stage.hub.subscribers
    assert "should not happen" in caplog.text
    assert secret not in caplog.text


async def test_what_waits_for_a_stalled_client_is_bounded_whatever_it_does(stage: Stage) -> None:
    """A piece and one event while it catches up; the backlog, a piece and one event while it is live."""
    size, piece = 900_000, 256 * 1024
    behind, live = Client(stage, "a"), Client(stage, "a")
    for client in (behind, live):
        client.open()
        await stage.finish(client)
    behind.cut()
    for turn in range(20):
        stage.publish("a", size if turn % 3 == 0 else 10_000)
        await stage.settle()
    behind.open()
    await stage.settle()
    for client, most in ((behind, piece + size), (live, 2 * piece + size)):
        assert client.wire is not None
        assert size < client.wire.largest < most + 10_000
        await stage.finish(client)
        client.check()
        assert client.wire.largest < most + 10_000


# ==== Last values =============================================================


@pytest.mark.parametrize("seed", range(8))
async def test_a_stream_without_a_position_can_begin_with_the_newest_events(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    keeper = Client(stage, "a", "b", "c")
    keeper.open()
    await stage.finish(keeper)
    middle = keeper.position
    for number in range(60):
        stage.publish(chance.choice("aabbbbbc"), chance.choice([10, 20_000]))
        if number == 40:
            await stage.finish(keeper)
            middle = keeper.position
    await stage.finish(keeper)
    for position, gap in ((None, "start"), ("another-5", "restart"), ("?", "unreadable"), (middle, None)):
        channels, last = chance.sample("abc", chance.randrange(1, 4)), chance.choice([1, 5, 1_000])
        client = Client(stage, *channels, position=position, last=last)
        client.open()
        first = client.wire
        await stage.finish(client)
        history = [(clock, channel) for clock, channel in stage.published if channel in channels]
        newest = [c for name in channels for c, n in [(c, n) for c, n in history if n == name][-last:]]
        missed = [clock for clock, _ in history if clock > 41]
        assert client.seen == (sorted(newest) if gap else missed)
        assert [(channel, reason) for _, channel, reason in client.told] == [
            (c, gap) for c in channels if gap
        ]
        assert client.position == keeper.position
        assert first is not None
        if gap:
            assert first.written.index(b"relay.gap") < first.written.index(b"data: %d " % client.seen[0])
        stage.publish(channels[0])
        await stage.finish(client)
        assert client.seen[-1] == stage.clock
        client.cut()
        await stage.finish(keeper)
