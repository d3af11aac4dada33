"""Judges a history: who committed, numbered, opened and got what, and when. Knows no program.

A history is a list of records that JSON can hold, each with ``t``, seconds, and ``do``:

    run      source, relays: what was run
    commit   n, pid, events [[tag, channel, seen, name]…], size: a transaction; each event saw the first
             `seen` commits, and the largest has so many bytes; xid; after: tags that they saw
    revoked  client: the log has revoked its tokens
    number   epoch, first, tags: the log has given these events numbers from `first` on; null: no event
    undone   tags: a crash or failover has lost these
    unnumbered  epoch, first, count: it has lost these numbers, and the events come again
    epoch    epoch: the log has begun another history
    pruned   epoch, upto: the log has dropped the events up to this number
    fault    on: a relay's name or "server", kind
    open     client, stream, relay, channels, since, last, prompt: it reads at once; seen: its page shows
             the first so many commits; or shows: a snapshot; issued, expires: its token
    got      client, stream, items: what it read, each with the time at which it was sent last
                 ["event", tag, position, sent, name]
                 ["gap", channels, reason, since, position, sent]
                 ["id", position, sent]
                 [other control event's name, its data, position, sent]
    closed   client, stream, by, status, retry, held: the most bytes that waited for it in the relay
    calm     the faults have ended
    end      clients: who is still there and owed everything
    left     on, what: what remains when all have left
    visits   on, count: how often a relay has connected to PostgreSQL
    error    on, text: an exception that nobody expected
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = Mapping[str, Any]

# Seconds from a commit in calm to who is there.
CALM_DELAY = 8.0
# The same where no fault but of clients happens at all, to who reads at once and was there before.
PROMPT_DELAY = 3.0
# A relay connects once to look, and keeps three connections.
SESSIONS = 4
MIB = 1 << 20
RESERVED = ("error", "open")
# From a token's end, or that of a stream's age, to the last byte: a relay may be suspended meanwhile.
AFTER_END = 8.0
# From a revocation, or a loss of PostgreSQL's, until the relays know: it may be away meanwhile.
AFTER_AWAY = 15.0
# asyncio's own, above which it tells a protocol to pause.
HIGH_WATER = 64 * 1024


class Violation(NamedTuple):
    """A promise that was broken: its kind, when, and what happened."""

    kind: str
    t: float
    text: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.t:.6f}: {self.text}"


class Truth(NamedTuple):
    """An event as it must arrive."""

    tag: str
    channel: str
    committed: float
    n: int
    name: str | None
    xid: int
    after: tuple[str, ...]


@dataclass
class _Watch:
    """What is known of a client while its records are read."""

    channels: tuple[str, ...] = ()
    due: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    settled: int = 0
    began: float | None = None
    seen: int = 0
    born: str = ""
    told: dict[str, float] = field(default_factory=dict)
    position: tuple[str, int] | None = None
    relay: str = ""
    last: int = 0
    opened: float = 0.0
    issued: float = 0.0
    until: float = float("inf")
    revoked: float = -1.0
    prompt: bool = False
    moved: bool = False
    tags: dict[str, float] = field(default_factory=dict)
    snapshot: tuple[int, frozenset[int]] | None = None
    # The newest events that it asked for by ?last=, whatever gap was told; None at a stream's beginning.
    owed: set[int] | None = None

    def shows(self, event: Truth) -> bool:
        """Return whether the client's page shows this event."""
        if self.snapshot is not None:
            return event.xid < self.snapshot[0] and event.xid not in self.snapshot[1]
        return event.n <= self.seen


@functools.lru_cache(4_096)
def split_position(mark: str) -> tuple[str, int]:
    """Read ``<epoch>-<number>``."""
    epoch, _, rest = mark.partition("-")
    return epoch, int(rest.partition("/")[0].partition("@")[0])


def read_snapshot(text: str) -> tuple[int, frozenset[int]]:
    """Read ``xmin:xmax:xid,xid``: the transactions below xmax are seen, without those that were running."""
    _, xmax, running = text.split(":")
    return int(xmax), frozenset(map(int, filter(None, running.split(","))))


def wire_name(event: Truth, several: bool) -> str | None:
    """Return the name with which an event must arrive on a stream of one channel, or of several."""
    if not several:
        return event.name
    channel = event.channel.replace("%", "%25").replace(":", "%3A")
    if event.name is not None:
        return f"{channel}:{event.name}"
    return f"{channel}:" if channel in RESERVED or channel.startswith("relay.") else channel


class Checker:
    """Reads a history once; `violations` are what it found.

    Attributes:
        deliveries: Events that clients got.
    """

    def __init__(self, history: Sequence[Record]) -> None:
        self.history = history
        self.violations: list[Violation] = []
        self.deliveries = 0
        self.gaps: Counter[str] = Counter()
        self._truth: list[Truth] = []
        # When each was numbered.
        self._since: list[float] = []
        self._index: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._undone: set[str] = set()
        self._gone: dict[int, float] = {}
        # By epoch: the event of each number, and the number of each event.
        self._numbers: dict[str, dict[int, int]] = {}
        self._places: dict[str, dict[int, int]] = {}
        self._faults: dict[str, float] = {}
        self._watches: dict[str, _Watch] = {}
        self._due: dict[tuple[str, ...], tuple[list[int], dict[int, int]]] = {}
        self._calm = float("inf")
        self._log = False
        self._plan: Record = {}
        self._renewed = any(record["do"] == "epoch" for record in history)
        self._pruned = 0
        self._lost_wakeups = any(record.get("kind") == "wake-ups lost" for record in history)
        self._disturbed = any(record["do"] == "fault" for record in history)
        self._largest = 0

    def check(self) -> list[Violation]:
        """Judge the whole history."""
        self._read_truth()
        for record in self.history:
            handler = getattr(self, f"_on_{record['do']}", None)
            if handler is not None:
                handler(record)
        self._check_order()
        self._check_numbers()
        return self.violations

    def _blame(self, kind: str, t: float, text: str) -> None:
        self.violations.append(Violation(kind, t, text))

    # What is true.

    def _read_truth(self) -> None:
        events: dict[str, Truth] = {}
        for record in self.history:
            if record["do"] == "run":
                self._log = record["source"] == "log"
                self._plan = record
            elif record["do"] == "commit":
                self._largest = max(self._largest, record.get("size", 0))
                for tag, channel, seen, name in record["events"]:
                    events[tag] = Truth(
                        tag, channel, record["t"], record["n"], name, record.get("xid", 0),
                        tuple(record.get("after", ())),
                    )  # fmt: skip
                    self._seen[tag] = seen
                    if not self._log:
                        self._append(events[tag], record["t"])
            elif record["do"] == "number":
                for tag in filter(None, record["tags"]):
                    if tag in self._index:
                        self._blame("numbered twice", record["t"], tag)
                    self._append(events[tag], record["t"])
                for number, tag in enumerate(record["tags"], record["first"]):
                    if tag is not None:
                        self._learn(record["t"], record["epoch"], number, tag)
            elif record["do"] == "undone":
                self._undone.update(record["tags"])
            elif record["do"] == "unnumbered":
                numbers = self._numbers.get(record["epoch"], {})
                for number in range(record["first"], record["first"] + record["count"]):
                    if number not in numbers:
                        continue
                    self._gone[numbers[number]] = record["t"]
                    self._index.pop(self._truth[numbers[number]].tag, None)
            elif record["do"] == "got":
                for item in record["items"]:
                    if item[0] == "event" and item[2]:
                        self._learn(record["t"], *split_position(item[2]), item[1])
        for tag, event in events.items():
            if tag not in self._index and tag not in self._undone:
                self._blame("never numbered", event.committed, tag)

    def _learn(self, t: float, epoch: str, number: int, tag: str) -> None:
        index = self._index.get(tag)
        known = self._numbers.get(epoch, {}).get(number)
        if index is None or (known is not None and self._truth[known].tag == tag):
            return  # no event at all, which who gets it is blamed for; or one that comes again
        known = self._numbers.setdefault(epoch, {}).setdefault(number, index)
        place = self._places.setdefault(epoch, {}).setdefault(index, number)
        if known != index or place != number:
            other = self._truth[known].tag
            self._blame("two orders", t, f"{tag} is {epoch}-{number}, which was {other}, or {epoch}-{place}")

    def _append(self, event: Truth, t: float) -> None:
        self._index[event.tag] = len(self._truth)
        self._since.append(t)
        self._truth.append(event)

    # What happened, in order.

    def _on_fault(self, record: Record) -> None:
        self._faults.setdefault(record["on"], record["t"])

    def _on_error(self, record: Record) -> None:
        self._blame("error", record["t"], f"{record['on']}: {record['text']}")

    def _on_left(self, record: Record) -> None:
        self._blame("left over", record["t"], f"{record['on']}: {record['what']}")

    def _on_calm(self, record: Record) -> None:
        self._calm = record["t"]

    def _on_open(self, record: Record) -> None:
        watch = self._watches.setdefault(record["client"], _Watch())
        watch.relay = record["relay"]
        watch.last = record["last"]
        watch.opened = record["t"]
        watch.prompt = record["prompt"]
        watch.owed = None
        watch.issued = record.get("issued", 0.0)
        age = self._plan["settings"].get("max_age") or float("inf")
        watch.until = min(record.get("expires", float("inf")), record["t"] + 1.1 * age)
        if not watch.channels:
            watch.channels = tuple(record["channels"])
            if watch.channels not in self._due:
                due = [i for i, event in enumerate(self._truth) if event.channel in watch.channels]
                self._due[watch.channels] = due, {i: place for place, i in enumerate(due)}
            watch.due, watch.place = self._due[watch.channels]
        if ("seen" in record or "shows" in record) and watch.began is None:
            watch.seen = record.get("seen", 0)
            watch.snapshot = read_snapshot(record["shows"]) if "shows" in record else None
            watch.born = split_position(record["since"])[0]
            watch.began = -1.0

    def _on_revoked(self, record: Record) -> None:
        self._watches.setdefault(record["client"], _Watch()).revoked = record["t"]

    def _on_got(self, record: Record) -> None:
        watch = self._watches[record["client"]]
        sent = record["items"][-1][3 if record["items"][-1][0] == "event" else -1]
        revoked = watch.issued < watch.revoked and watch.prompt and not self._renewed
        if sent > watch.until + AFTER_END or (revoked and sent > watch.revoked + AFTER_AWAY):
            self._blame("outlived", record["t"], f"{record['client']} at {watch.relay}: its stream goes on")
        for item in record["items"]:
            kind = item[0]
            if kind != "gap" and watch.owed is None:
                watch.owed = set()
            if kind == "event":
                self._on_event(record, watch, *item[1:])
            elif kind == "gap":
                _, channels, reason, _, mark, sent = item
                self.gaps[reason] += 1
                for channel in channels:
                    watch.told[channel] = sent
                if not set(channels) <= set(watch.channels):
                    self._blame("strange gap", record["t"], f"{record['client']}: {item}")
                self._check_reason(record, watch, item)
                if set(channels) == set(watch.channels):
                    watch.born = ""  # the page is fetched anew
                    if watch.last:
                        # The newest events follow, which may be older than what was got.
                        watch.moved = True
                        watch.position = None
                        self._owe_newest(watch, sent)
                elif watch.owed:
                    watch.owed = {i for i in watch.owed if self._truth[i].channel not in channels}
                if reason == "start" and watch.began is None:
                    watch.began = sent
                if mark:
                    self._on_mark(record, watch, mark, sent)
            elif kind == "id":
                self._on_mark(record, watch, item[1], item[2])
            elif kind == "relay.heartbeat" and item[2]:
                self._on_mark(record, watch, item[2], item[3])
            elif kind == "relay.refused" and watch.issued > watch.revoked and item[3] < watch.until:
                self._blame("refused", record["t"], f"{record['client']}: {item}")

    def _on_event(
        self, record: Record, watch: _Watch, tag: str, mark: str | None, sent: float, name: str | None
    ) -> None:
        self.deliveries += 1
        who = f"{record['client']} at {watch.relay}"
        if mark is None:
            self._blame("no position", record["t"], f"{who} got {tag} without one")
            return
        epoch, number = split_position(mark)
        index = self._numbers.get(epoch, {}).get(number)
        if index is None or self._truth[index].tag != tag:
            index = self._index.get(tag)
        place = None if index is None else watch.place.get(index)
        if index is None or place is None:
            self._blame("strange event", record["t"], f"{who} got {tag}")
            return
        watch.tags.setdefault(tag, record["t"])
        event = self._truth[index]
        if name != wire_name(event, several=len(watch.channels) > 1):
            self._blame("wrong name", record["t"], f"{who} got {tag} of {event.channel} as {name}")
        if epoch == watch.born and watch.shows(event):
            self._blame("shown already", record["t"], f"{who} got {tag}, which its page showed")
        if watch.began is None:
            watch.began = sent
        if watch.moved or (watch.position and epoch != watch.position[0] and not self._log):
            # Another relay's history, in source notify, may lag behind what was got before the gap.
            watch.settled = min(watch.settled, place)
            watch.moved = False
        if place < watch.settled:
            self._blame("twice or late", record["t"], f"{who} got {tag} after {self._last(watch)}")
            return
        late = record["t"] - event.committed
        if late > PROMPT_DELAY and watch.prompt and watch.opened < event.committed and not self._disturbed:
            self._blame("slow", record["t"], f"{who} got {tag} {late:.3f} s after its commit")
        if place > watch.settled:
            self._settle(record, watch, place, f"{tag} ({mark})")
        watch.settled = place + 1
        self._on_mark(record, watch, mark, sent)

    def _settle(self, record: Record, watch: _Watch, place: int, before: str) -> None:
        """Let the client have got all that is due before a place, or blame the relay."""
        for index in watch.due[watch.settled : place]:
            event = self._truth[index]
            told = max(watch.told.get(event.channel, -1.0), watch.began or -1.0)
            if event.committed <= told and (index not in (watch.owed or ()) or self._is_pruned(index)):
                continue
            if watch.shows(event) or event.tag in self._undone or index in self._gone:
                continue
            self._blame(
                "lost",
                record["t"],
                f"{record['client']} at {watch.relay} did not get {event.tag} of {event.channel},"
                f" committed at {event.committed:.6f}, before {before}, and no gap told",
            )
        watch.settled = max(watch.settled, place)

    def _owe_newest(self, watch: _Watch, sent: float) -> None:
        """Owe a client the newest events of each channel that the log held when a gap was told."""
        asked, watch.owed = watch.owed is None and self._log, set()
        # A relay may not know yet that PostgreSQL has lost numbers.
        if not asked or any(t <= sent < t + AFTER_AWAY for t in self._gone.values()):
            return
        there = [i for i in watch.due if self._since[i] <= sent < self._gone.get(i, sent + 1)]
        for channel in watch.channels:
            newest = [i for i in there if self._truth[i].channel == channel and not self._is_pruned(i)]
            watch.owed.update(newest[-watch.last :])
        watch.settled = min([watch.settled, *(watch.place[i] for i in watch.owed)])

    def _is_pruned(self, index: int) -> bool:
        # An event keeps its number in the epochs that follow.
        return any(places.get(index, self._pruned + 1) <= self._pruned for places in self._places.values())

    def _last(self, watch: _Watch) -> str:
        return self._truth[watch.due[watch.settled - 1]].tag if watch.settled else "nothing"

    def _on_mark(self, record: Record, watch: _Watch, mark: str, sent: float) -> None:
        epoch, number = split_position(mark)
        if watch.began is None:
            watch.began = sent
        if watch.position and watch.position[0] == epoch and number < watch.position[1]:
            self._blame("position fell", record["t"], f"{record['client']}: {watch.position} to {mark}")
        if watch.position and watch.position[0] != epoch and not self._log:
            watch.moved = True
        watch.position = epoch, number
        # All that has a number up to this one is settled.
        numbers = self._places.get(epoch, {})
        place = watch.settled
        while place < len(watch.due) and numbers.get(watch.due[place], number + 1) <= number:
            place += 1
        if place > watch.settled:
            self._settle(record, watch, place, f"its position {mark}")

    def _check_reason(self, record: Record, watch: _Watch, gap: Sequence[Any]) -> None:
        """Blame a gap that nothing in this history explains."""
        _, _, reason, since, mark, _ = gap
        plan, log = self._plan, self._log
        if not plan["knobs"]:
            return  # a real run, where all that can be told is told
        disturbed = watch.relay in self._faults or "server" in self._faults
        epoch = split_position(since)[0] if since else ""
        excuse = {
            "start": not since,
            "restart": self._renewed if log else bool(since) and split_position(mark or "-0")[0] != epoch,
            "outage": disturbed,
            # Who was cut among the newest events stands before the LISTEN of a channel, perhaps.
            "evicted": not log
            and (plan["settings"]["memory"] < MIB or plan["settings"]["linger"] < 10 or watch.last > 0),
            "pruned": self._pruned > 0,
            "failed": disturbed,
            "ahead": log and "server" in self._faults,
            "too-many": plan["knobs"]["MAX_RESUME_EVENTS"] < 1_000,
        }
        if not excuse.get(reason, False):
            self._blame("needless gap", record["t"], f"{record['client']} at {watch.relay}: {list(gap)}")

    def _on_pruned(self, record: Record) -> None:
        self._pruned = max(self._pruned, record["upto"])

    def _on_visits(self, record: Record) -> None:
        if not self._faults and record["count"] > SESSIONS:
            self._blame("sessions", record["t"], f"{record['on']} connected {record['count']} times")

    def _on_closed(self, record: Record) -> None:
        if "held" not in record:
            return
        settings, knobs = self._plan["settings"], self._plan["knobs"]
        piece = max(settings["max_backlog"], knobs["RESUME_PIECE_BYTES"])
        most = max(settings["max_backlog"], HIGH_WATER) + piece + self._largest
        if record["held"] > most:
            text = f"{record['held']} bytes waited for {record['client']}, more than {most}"
            self._blame("held", record["t"], text)
        if record["status"] not in (0, 200):
            self._blame("refused", record["t"], f"{record['client']} got {record['status']}")
        if record["status"] and record["retry"] is None and record["by"] == "relay":
            self._blame("no retry", record["t"], f"{record['client']} was not told when to come back")

    def _on_end(self, record: Record) -> None:
        for name in record["clients"]:
            watch = self._watches.get(name)
            if watch is None:
                self._blame("not live", record["t"], f"{name} never opened a stream")
                continue
            self._settle({**record, "client": name}, watch, len(watch.due), "the end")
            for index in reversed(watch.due):
                event = self._truth[index]
                if event.committed < self._calm:
                    break
                got = watch.tags.get(event.tag)
                if got is not None and got - event.committed > CALM_DELAY:
                    self._blame(
                        "slow", got, f"{name} got {event.tag} {got - event.committed:.3f} s after its commit"
                    )

    # At the end.

    def _check_order(self) -> None:
        """No event before one that its transaction had seen."""
        for index, event in enumerate(self._truth):
            for tag in event.after:
                if self._index.get(tag, -1) > index:
                    self._blame("order", event.committed, f"{event.tag} comes before {tag}")
        if self._lost_wakeups:
            return  # PostgreSQL itself loses none: order is not promised then, only that nothing is lost
        # The highest place in the order of the first n commits.
        highest: dict[int, int] = {}
        for index, event in enumerate(self._truth):
            if index not in self._gone:
                highest[event.n] = index
        most, table = -1, [-1]
        for n in range(1, max(highest, default=0) + 1):
            most = max(most, highest.get(n, -1))
            table.append(most)
        for index, event in enumerate(self._truth):
            seen = self._seen[event.tag]
            if seen < len(table) and table[seen] > index and not {index, table[seen]} & self._gone.keys():
                self._blame(
                    "order", event.committed, f"{event.tag} comes before {self._truth[table[seen]].tag}"
                )

    def _check_numbers(self) -> None:
        """In each epoch, numbers rise with the order."""
        for epoch, numbers in self._numbers.items():
            last = -1
            for number in sorted(numbers):
                if numbers[number] < last:
                    self._blame("two orders", 0.0, f"{epoch}-{number} is older than the number before")
                last = numbers[number]
