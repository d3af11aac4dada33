"""One stream from its opening to live: hub, source notify and streams together, in this process.

What happens to many of them, with every fault there may be, is the simulation's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import psycopg2
import psycopg2.extensions
import pytest

import sse_relay
from sse_relay import (
    NOT_LIVE,
    RESUME_PIECE_BYTES,
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


class Wire(asyncio.Transport):
    """A client's connection. The client takes all that waits when told to."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.written = bytearray()
        self.taken = 0
        self.closing = False
        self._protocol = protocol

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        assert not self.closing
        self.written += data

    def take(self) -> None:
        self.taken = len(self.written)

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

    def __init__(self) -> None:
        self.published: list[tuple[int, str]] = []
        self.hub = Hub(256 * 1024, heartbeat=0.002)
        self.interest = Interest(self.hub.channels, 0.0, 100)
        self.source = NotifySource(self.hub, Memory(1 << 26), self.interest)
        self.streams = Streams(
            self.hub, self.source, Access(compile_globs("*"), compile_globs([])), path="/events", retry=1,
            max_clients=100, max_age=None,
        )  # fmt: skip

    def listen(self) -> None:
        if fresh := self.interest.wanted() - self.interest.confirmed:
            self.interest.confirmed |= fresh
            self.source.confirmed(fresh)

    async def publish(self, channel: str, size: int = 0) -> None:
        self.published.append((len(self.published) + 1, channel))
        payload = f"{len(self.published)} {'x' * size}"
        await self.source.deliver([psycopg2.extensions.Notify(1, channel, payload)], 0.0)

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def finish(self, client: Client) -> None:
        """Let a client take all until it is live."""
        if client.wire is None or client.wire.closing:
            client.open()
        self.listen()
        for _ in range(2_000):
            assert client.wire is not None
            # A page at a time, however much there is.
            assert client.wire.get_write_buffer_size() < RESUME_PIECE_BYTES + 25_000
            client.wire.take()
            await asyncio.sleep(0)
            if client.subscriber.live_from < NOT_LIVE and not client.wire.get_write_buffer_size():
                return
        raise AssertionError("it never becomes live")

    async def close(self) -> None:
        for subscriber in tuple(self.hub.subscribers):
            self.hub.leave(subscriber)
        await self.settle()


class Client:
    """A client of some channels that comes back at its last position."""

    def __init__(self, stage: Stage, *channels: str, position: str | None = None, last: int = 0) -> None:
        self.stage = stage
        self.channels = channels
        self.last = last
        self.wire: Wire | None = None
        self.subscriber = Subscriber(stage.hub, channels, 0)
        self._start = position

    def open(self, **fields: Any) -> None:
        self._start = self.position
        self.subscriber = Subscriber(self.stage.hub, self.channels, 0, False, True, **fields)
        self.stage.hub.enter(self.subscriber)
        self.wire = self.subscriber.transport = Wire(self.subscriber)
        position = parse_position(self._start) if self._start else None
        self.stage.streams._begin(self.subscriber, Wish(self._start, position, last=self.last), b"")

    @property
    def blocks(self) -> list[dict[str, str]]:
        texts = self.wire.written.decode().split("\n\n") if self.wire else []
        return [dict(line.split(": ", 1) for line in text.split("\n") if ": " in line) for text in texts]

    @property
    def position(self) -> str | None:
        return ([self._start] + [block["id"] for block in self.blocks if "id" in block])[-1]

    @property
    def seen(self) -> list[int]:
        found = [block for block in self.blocks if not block.get("event", "").startswith("relay.")]
        return [int(block["data"].split()[0]) for block in found if "data" in block]

    @property
    def told(self) -> list[tuple[str, str]]:
        """Channel and reason of each gap, by channel."""
        gaps = [json.loads(block["data"]) for block in self.blocks if block.get("event") == "relay.gap"]
        return [(channel, gap["reason"]) for gap in gaps for channel in gap["channels"]]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    await made.source.connected()
    yield made
    await made.close()


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
    client.subscriber.subject, client.subscriber.expires = "me", 1 << 40
    if state_wanted == "opening":
        stage.hub.enter(client.subscriber)
    else:
        client.open(subject="me", expires=1 << 40)
        if state_wanted != "catching up":
            await stage.finish(client)
        if state_wanted == "ending":
            client.subscriber.end(b"retry: 1\n\n")
    assert state(client.subscriber) == state_wanted
    return client


async def test_no_heartbeat_gives_a_position_beyond_an_outage_that_is_not_told_yet(stage: Stage) -> None:
    stage.source.confirmed(["a"])
    told = stage.hub.position
    stage.source.lost()
    stage.source.confirmed(["a"])
    assert stage.hub.position == told
    await stage.source.connected()
    assert stage.hub.position != told


def test_the_table_of_states_is_the_one_that_is_tested() -> None:
    section = Path(sse_relay.__file__).read_text().partition("# ==== Streams ")[2]
    rows = re.findall(r"^# (\w[\w ]*?) *\| ", section, re.MULTILINE)
    assert rows == ["state", *STATES]


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
    else:
        assert stage.hub.channels == stage.hub.subjects == {}
        assert stage.hub.expiring == {}
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


# ==== Where a stream begins ===================================================


@pytest.mark.parametrize("seed", range(8))
async def test_a_stream_without_a_position_can_begin_with_the_newest_events(stage: Stage, seed: int) -> None:
    chance = random.Random(seed)
    keeper = Client(stage, "a", "b", "c")
    await stage.finish(keeper)
    middle = keeper.position
    for number in range(60):
        await stage.publish(chance.choice("aabbbbbc"), chance.choice([10, 20_000]))
        if number == 40:
            await stage.finish(keeper)
            middle = keeper.position
    await stage.finish(keeper)
    for position, gap in ((None, "start"), ("another-5", "restart"), ("?", "unreadable"), (middle, None)):
        channels, last = chance.sample("abc", chance.randrange(1, 4)), chance.choice([1, 5, 1_000])
        client = Client(stage, *channels, position=position, last=last)
        await stage.finish(client)
        history = [(number, channel) for number, channel in stage.published if channel in channels]
        newest = [n for name in channels for n in [n for n, channel in history if channel == name][-last:]]
        missed = [number for number, _ in history if number > 41]
        assert client.seen == (sorted(newest) if gap else missed)
        assert client.told == [(channel, gap) for channel in channels if gap]
        assert client.position == keeper.position
        if gap:
            assert client.wire is not None
            written = client.wire.written
            assert written.index(b"relay.gap") < written.index(b"data: %d " % client.seen[0])
        await stage.publish(channels[0])
        await stage.finish(client)
        assert client.seen[-1] == len(stage.published)
        assert client.wire is not None
        client.wire.close()
        await stage.finish(keeper)


@pytest.mark.parametrize(("missed", "told"), [(10_000, []), (10_001, [("a", "too-many"), ("b", "too-many")])])
async def test_ten_thousand_missed_events_are_replayed_and_one_more_is_a_gap(
    stage: Stage, missed: int, told: list[tuple[str, str]]
) -> None:
    client = Client(stage, "a", "b")
    await stage.finish(client)
    assert client.wire is not None
    client.wire.close()
    await stage.settle()
    events = [psycopg2.extensions.Notify(1, "ab"[n % 2], str(n)) for n in range(missed)]
    await stage.source.deliver(events, 0.0)
    await stage.finish(client)
    assert client.told == told
    assert client.seen == ([] if told else list(range(missed)))


async def test_a_stop_in_the_turn_in_which_a_wait_for_listen_ends_reaches_everybody() -> None:
    stage = Stage()
    stopped = []

    def stop() -> None:
        stage.streams.drain()
        stopped.append(True)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0) as waiting:
            stage.streams._opening[waiting] = None
            # It runs after what ends the wait, and before the waiter knows.
            asyncio.get_running_loop().call_soon(stop)
            await asyncio.Event().wait()
    assert stopped
    assert stage.streams.draining
