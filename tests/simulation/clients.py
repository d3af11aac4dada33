"""Clients of event streams, in the place of browsers and sockets.

`Reader` turns bytes into blocks, and can be fed in any pieces. `Client` opens a stream, reads at its own
pace, leaves at any byte, comes back here or at another relay with the last position that it has got.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from simulation.kernel import FAR, NEAR, Link, Timeline

# Seconds that a client waits for the next byte, heartbeats included.
PATIENCE = 50.0


def write_data(tag: str, size: int, lines: bool = False) -> str:
    """Return data that names itself and its length."""
    filling = "x" * size
    if lines:
        filling = "\n".join(filling[start : start + 40] for start in range(0, size, 41))
    return f"{tag} {len(filling)} {filling}"


def read_data(data: str) -> str:
    """Return the tag of data as `write_data` made it; "torn …" if it is not whole."""
    tag, _, rest = data.partition(" ")
    size, _, filling = rest.partition(" ")
    return tag if size.isdigit() and len(filling) == int(size) else f"torn {data[:40]!r}"


class Block(NamedTuple):
    """What a block of a stream says: an event has a tag, a control event a name and what it tells."""

    name: str | None
    mark: str | None
    tag: str
    told: dict[str, Any] | None
    retry: int | None


@functools.lru_cache(4_096)  # all who watch a channel get the same
def read_block(block: bytes) -> Block:
    """Read a block."""
    name = mark = retry = None
    data: list[bytes] = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b": ")
        if field == b"data":
            data.append(value)
        elif field == b"id":
            mark = value.decode()
        elif field == b"event":
            name = value.decode()
        elif field == b"retry":
            retry = int(value)
    text = b"\n".join(data).decode()
    if name is not None and name.startswith("relay."):
        return Block(name, mark, "", json.loads(text or "{}"), retry)
    return Block(name, mark, read_data(text) if data else "", None, retry)


class Reader:
    """Reads an HTTP response with an event stream.

    Attributes:
        status: 0 while the head is not there.
        headers: As they came, in lower case.
        retry: Milliseconds, as the stream said last.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers = ""
        self.retry: int | None = None
        self.blocks = 0
        self._chunked = False
        # A large event comes in thousands of pieces: they are not put together before it may be whole.
        self._raw = bytearray()
        self._text: list[bytes] = []

    def feed(self, data: bytes) -> list[Block]:
        """Take bytes; return the blocks that are complete and say more than when to come back."""
        if not self.status:
            self._raw += data
            head, end, data = bytes(self._raw).partition(b"\r\n\r\n")
            if not end:
                return []
            self.headers = head.decode("latin-1").lower()
            self.status = int(head[9:12])
            self._chunked = "transfer-encoding: chunked" in self.headers
            self._raw.clear()
        if self._chunked:
            data = self._unwrap(data)
        self._text.append(data)
        if b"\n\n" not in data and not data.startswith(b"\n"):
            return []
        *blocks, rest = b"".join(self._text).split(b"\n\n")
        self._text = [rest]
        self.blocks += len(blocks)
        found = [read_block(block) for block in blocks]
        for block in found:
            if block.retry is not None:
                self.retry = block.retry
        return [block for block in found if block.mark or block.tag or block.told is not None]

    def _unwrap(self, data: bytes) -> bytes:
        raw = self._raw
        raw += data
        parts = []
        start = 0
        while (end := raw.find(b"\r\n", start)) >= 0:
            size = int(raw[start:end], 16)
            after = end + 2 + size
            if len(raw) < after + 2:
                break
            parts.append(raw[end + 2 : after])
            assert raw[after : after + 2] == b"\r\n", "a chunk without its end"
            start = after + 2
        del raw[:start]
        return b"".join(parts)


def request_of(channels: Sequence[str], position: str, start: str, **options: Any) -> bytes:
    """Return a request for a stream.

    Args:
        position: Sent as ``Last-Event-ID``, if there is one.
        start: Sent as ``?lastEventId=``, if there is one.
        options: ``host``, ``http`` (0 or 1), ``token``, and further fields of the query.
    """
    http, host = options.pop("http", 1), options.pop("host", "127.0.0.1:8001")
    token = options.pop("token", "")
    fields = [("lastEventId", start)] if start else []
    fields += [(name, str(value)) for name, value in options.items() if value]
    path = "/events"
    if len(channels) == 1:
        path = f"/events/{quote(channels[0], safe='')}"
    else:
        fields = [("channel", channel) for channel in channels] + fields
    query = f"?{urlencode(fields)}" if fields else ""
    lines = [f"GET {path}{query} HTTP/1.{http}", f"Host: {host}", "Accept: text/event-stream"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if position:
        lines.append(f"Last-Event-ID: {position}")
    return "\r\n".join([*lines, "", ""]).encode()


def take_block(block: Block, sent: float, items: list[list[Any]]) -> None:
    """Add what a block says to the items of a record, see `checker`."""
    name, mark, tag, told, _ = block
    if told is None:
        items.append(["event", tag, mark, sent, name] if tag else ["id", mark, sent])
    elif name == "relay.gap":
        items.append(["gap", told["channels"], told["reason"], told["since"], mark, sent])
    else:
        items.append([name, told, mark, sent])


Door = Callable[[str, Link], bool]


class Client:
    """One page that watches channels.

    Args:
        plan: Its own step, see `plan.draw`.
        doors: The names of the relays.
        connect: Brings a link to a relay; returns whether it listens.
    """

    def __init__(
        self,
        timeline: Timeline,
        name: str,
        plan: Mapping[str, Any],
        doors: Sequence[str],
        connect: Door,
        born: Callable[[], tuple[str, int]] | None = None,
        sign: Callable[[str, list[str], float], tuple[str, float]] | None = None,
    ) -> None:
        self.timeline = timeline
        self.name = name
        self.channels: list[str] = plan["channels"]
        self.position = ""
        self.tags: set[str] = set()
        self.gone = False
        self.calm = False
        self.live = False
        self._plan = plan
        self._doors = doors
        self._connect = connect
        self._chance = timeline.chance(f"client {name} {plan['seed']}")
        self._born = born
        self._sign = sign
        self._token, self._issued, self._expires = "", 0.0, 0.0
        self._start: tuple[str, int] | None = None
        self._door = self._chance.choice(doors)
        self._stream = 0
        self._link: Link | None = None
        self._reader = Reader()
        self._reading = False
        self._heard = 0.0

    def open(self) -> None:
        """Connect, to the same relay or another."""
        if self.gone or self._link is not None:
            return
        if self._chance.random() < self._plan["hops"]:
            self._door = self._chance.choice(self._doors)
        if self._born is not None and self._start is None:
            self._start = self._born()
        self._stream += 1
        link = Link(self.timeline, self._plan["room"], lambda: self._notice(link))
        self._reader = Reader()
        self._heard = self.timeline.now
        if not self._connect(self._door, link):
            if self._chance.random() < 0.5:
                self._door = self._chance.choice(self._doors)
            self.timeline.after(self._chance.uniform(0.05, 0.5), self.open)
            return
        self._link = link
        start, seen = self._start or ("", 0)
        facts: dict[str, float] = {"seen": seen} if start else {}
        if self._sign is not None:
            if not self._token or self._expires <= self.timeline.now:
                self._issued = self.timeline.now
                self._token, self._expires = self._sign(self.name, self.channels, self._plan["lasts"])
            facts |= {"issued": self._issued, "expires": self._expires}
        self.timeline.note(
            "open",
            client=self.name,
            stream=self._stream,
            relay=self._door,
            channels=self.channels,
            since=self.position or start,
            last=self._plan["last"],
            # An event of 900 KB takes seconds through 300 bytes.
            prompt=self._plan["kind"] == "steady" and self._plan["room"] > 1_000,
            **facts,
        )
        link.send(self._request(start))
        if not self.calm:
            stay = self._chance.choice(self._plan["stays"])
            if stay:
                self.timeline.after(stay * self._chance.random(), self._leave, link)
        self.timeline.after(PATIENCE, self._lose_patience, link)

    def _request(self, start: str) -> bytes:
        plan = self._plan
        beats = "event" if plan["beats"] else ""
        return request_of(
            self.channels, self.position, start,
            http=plan["http"], token=self._token, heartbeat=beats, last=plan["last"],
        )  # fmt: skip

    def _notice(self, link: Link) -> None:
        if link is self._link and not self._reading:
            self._reading = True
            pause = NEAR if self.calm else self._chance.choice(self._plan["pauses"])
            self.timeline.after(pause * self._chance.uniform(0.5, 1.0) + 2 * NEAR, self._read, link)

    def _read(self, link: Link) -> None:
        self._reading = False
        if link is not self._link:
            self._notice_current()
            return
        left = 1 << 24 if self.calm else self._chance.choice(self._plan["sips"])
        items: list[list[Any]] = []
        while left > 0 and (taken := link.take(left)) is not None:
            data, sent = taken
            left -= len(data)
            sent = round(sent, 6)
            for block in self._reader.feed(data):
                take_block(block, sent, items)
                if block.mark:
                    self.position = block.mark
                    self.live = True
                self.tags.add(block.tag)
        self._heard = self.timeline.now
        if items:
            self.timeline.note("got", client=self.name, stream=self._stream, items=items)
        if self._link is link:
            if items and items[-1][0] == "relay.refused":
                # Where no stream was open, the connection is kept for another request.
                self._token = ""
                link.leave("closed")
                self._close("relay")
            elif link.pieces:
                self._notice(link)
            elif link.ended:
                self._close("relay")

    def _notice_current(self) -> None:
        if self._link is not None:
            self._notice(self._link)

    def _leave(self, link: Link) -> None:
        """Go, whatever is being sent."""
        if link is self._link and not self.calm:
            link.leave(self._chance.choice(("closed", "reset")))
            self._close("client")

    def _lose_patience(self, link: Link) -> None:
        if link is not self._link:
            return
        left = self._heard + PATIENCE - self.timeline.now
        if left <= 0:
            link.leave("reset")
            self._close("client")
        else:
            self.timeline.after(left, self._lose_patience, link)

    def _close(self, by: str) -> None:
        assert self._link is not None
        self.timeline.note(
            "closed", client=self.name, stream=self._stream, by=by, held=self._link.held,
            status=self._reader.status, retry=self._reader.retry if self._reader.blocks else 0,
        )  # fmt: skip
        self._link = None
        # In calm only a token's or a stream's age ends it, which comes back then.
        self.live = self.live and self.calm and by == "relay"
        if not self.gone:
            retry = min(self._reader.retry or 100, 1000) / 1000
            away = 0.0 if self.calm else self._plan["away"]
            self.timeline.after((retry + away) * self._chance.random() + NEAR, self.open)

    def settle(self) -> None:
        """Read at once what comes, and stay."""
        self.calm = True
        self._notice_current()
        if self._link is None:
            self.timeline.after(FAR, self.open)

    def go(self) -> None:
        """Leave for good."""
        self.gone = True
        if self._link is not None:
            self._link.leave("closed")
            self._close("client")
