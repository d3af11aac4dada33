"""Judges a history: who committed, numbered, opened and got what, and when. Knows no program.

A history is a list of records that JSON can hold, each with ``t``, seconds, and ``do``:

    run      source, relays: what was run
    commit   n, pid, events [[tag, channel, seen]…]: a transaction that saw the first `seen` commits
    number   epoch, first, tags: the log has given these events the numbers from `first` on
    undone   tags: a crash or failover took these back
    fault    on: a relay's name or "server", kind
    open     client, stream, relay, channels, since; seen: its page shows the first so many commits
    got      client, stream, items: what it read, each with the time at which it was sent last
                 ["event", tag, position, sent, name]
                 ["gap", channels, reason, since, position, sent]
                 ["id", position, sent]
                 [other control event's name, its data, position, sent]
    closed   client, stream, by, held: the most bytes that waited for it in the relay
    calm     the faults have ended
    end      clients: who is still there and owed everything
    left     on, what: what remains when all have left
    error    on, text: an exception that nobody expected
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = Mapping[str, Any]

# Seconds from a commit in calm to who is there.
CALM_DELAY = 8.0


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


@dataclass
class _Watch:
    """What is known of a client while its records are read."""

    channels: tuple[str, ...] = ()
    due: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    settled: int = 0
    began: float | None = None
    seen: int = 0
    told: dict[str, float] = field(default_factory=dict)
    position: tuple[str, int] | None = None
    relay: str = ""
    since: str = ""
    moved: bool = False
    tags: dict[str, float] = field(default_factory=dict)


def split_position(mark: str) -> tuple[str, int]:
    """Read ``<epoch>-<number>``."""
    epoch, _, rest = mark.partition("-")
    return epoch, int(rest.partition("/")[0].partition("@")[0])


class Checker:
    """Reads a history once; `violations` are what it found.

    Attributes:
        deliveries: Events that clients got.
        excused: Those that they did not get, and were told of or could not expect.
    """

    def __init__(self, history: Sequence[Record]) -> None:
        self.history = history
        self.violations: list[Violation] = []
        self.deliveries = 0
        self.excused = 0
        self.gaps: Counter[str] = Counter()
        self._truth: list[Truth] = []
        self._index: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._undone: set[str] = set()
        # By epoch: the event of each number, and the number of each event.
        self._numbers: dict[str, dict[int, int]] = {}
        self._places: dict[str, dict[int, int]] = {}
        self._faults: dict[str, float] = {}
        self._watches: dict[str, _Watch] = {}
        self._due: dict[tuple[str, ...], tuple[list[int], dict[int, int]]] = {}
        self._calm = float("inf")
        self._log = False

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
            elif record["do"] == "commit":
                for tag, channel, seen in record["events"]:
                    events[tag] = Truth(tag, channel, record["t"], record["n"])
                    self._seen[tag] = seen
                    if not self._log:
                        self._append(events[tag])
            elif record["do"] == "number":
                for tag in record["tags"]:
                    if tag in self._index:
                        self._blame("numbered twice", record["t"], tag)
                    elif tag in events:
                        self._append(events[tag])
                for number, tag in enumerate(record["tags"], record["first"]):
                    self._learn(record["t"], record["epoch"], number, tag)
            elif record["do"] == "undone":
                self._undone.update(record["tags"])
            elif record["do"] == "got":
                for item in record["items"]:
                    if item[0] == "event" and item[2]:
                        self._learn(record["t"], *split_position(item[2]), item[1])
        for tag, event in events.items():
            if tag not in self._index and tag not in self._undone:
                self._blame("never numbered", event.committed, tag)

    def _learn(self, t: float, epoch: str, number: int, tag: str) -> None:
        index = self._index.get(tag)
        if index is None:
            return  # an event that does not exist; whoever gets it is heard
        known = self._numbers.setdefault(epoch, {}).setdefault(number, index)
        place = self._places.setdefault(epoch, {}).setdefault(index, number)
        if known != index or place != number:
            other = self._truth[known].tag
            self._blame("two orders", t, f"{tag} is {epoch}-{number}, which was {other}, or {epoch}-{place}")

    def _append(self, event: Truth) -> None:
        self._index[event.tag] = len(self._truth)
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
        watch.since = record["since"]
        if not watch.channels:
            watch.channels = tuple(record["channels"])
            if watch.channels not in self._due:
                due = [i for i, event in enumerate(self._truth) if event.channel in watch.channels]
                self._due[watch.channels] = due, {i: place for place, i in enumerate(due)}
            watch.due, watch.place = self._due[watch.channels]
        if "seen" in record and watch.began is None:
            watch.seen = record["seen"]
            watch.began = -1.0

    def _on_got(self, record: Record) -> None:
        watch = self._watches[record["client"]]
        for item in record["items"]:
            kind = item[0]
            if kind == "event":
                self._on_event(record, watch, *item[1:])
            elif kind == "gap":
                _, channels, reason, _, mark, sent = item
                self.gaps[reason] += 1
                for channel in channels:
                    watch.told[channel] = sent
                if not set(channels) <= set(watch.channels):
                    self._blame("strange gap", record["t"], f"{record['client']}: {item}")
                self._check_reason(record, watch, reason)
                if reason == "start" and watch.began is None:
                    watch.began = sent
                if mark:
                    self._on_mark(record, watch, mark, sent)
            elif kind == "id":
                self._on_mark(record, watch, item[1], item[2])
            elif kind == "relay.refused":
                self._blame("refused", record["t"], f"{record['client']}: {item}")

    def _on_event(
        self, record: Record, watch: _Watch, tag: str, mark: str | None, sent: float, name: str | None
    ) -> None:
        self.deliveries += 1
        index = self._index.get(tag)
        place = None if index is None else watch.place.get(index)
        who = f"{record['client']} at {watch.relay}"
        if index is None or place is None:
            self._blame("strange event", record["t"], f"{who} got {tag}")
            return
        watch.tags[tag] = record["t"]
        event = self._truth[index]
        if event.n <= watch.seen:
            self._blame("shown already", record["t"], f"{who} got {tag}, which its page showed")
        if mark is None:
            self._blame("no position", record["t"], f"{who} got {tag} without one")
            return
        if watch.began is None:
            watch.began = sent
        if watch.position and split_position(mark)[0] != watch.position[0] and not self._log:
            watch.moved = True
        if watch.moved:
            # Another relay's history, in source notify, may lag behind what was got before the gap.
            watch.settled = min(watch.settled, place)
            watch.moved = False
        if place < watch.settled:
            self._blame("twice or late", record["t"], f"{who} got {tag} after {self._last(watch)}")
            return
        self._settle(record, watch, place, f"{tag} ({mark})")
        watch.settled = place + 1
        self._on_mark(record, watch, mark, sent)

    def _settle(self, record: Record, watch: _Watch, place: int, before: str) -> None:
        """Let the client have got all that is due before a place, or blame the relay."""
        for index in watch.due[watch.settled : place]:
            event = self._truth[index]
            self.excused += 1
            if event.committed <= max(watch.told.get(event.channel, -1.0), watch.began or -1.0):
                continue
            if event.n <= watch.seen or event.tag in self._undone:
                continue
            self._blame(
                "lost",
                record["t"],
                f"{record['client']} at {watch.relay} did not get {event.tag} of {event.channel},"
                f" committed at {event.committed:.6f}, before {before}, and no gap told",
            )
        watch.settled = max(watch.settled, place)

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

    def _check_reason(self, record: Record, watch: _Watch, reason: str) -> None:
        pass

    def _on_closed(self, record: Record) -> None:
        pass

    def _on_end(self, record: Record) -> None:
        for name in record["clients"]:
            watch = self._watches.get(name)
            if watch is None:
                self._blame("not live", record["t"], f"{name} never opened a stream")
                continue
            self._settle(record, watch, len(watch.due), "the end")
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
        # The highest place in the order of the first n commits.
        highest: dict[int, int] = {}
        for index, event in enumerate(self._truth):
            highest[event.n] = index
        most, table = -1, [-1]
        for n in range(1, max(highest, default=0) + 1):
            most = max(most, highest.get(n, -1))
            table.append(most)
        for index, event in enumerate(self._truth):
            seen = self._seen[event.tag]
            if seen < len(table) and table[seen] > index and event.tag not in self._undone:
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


def count_by_kind(violations: Iterable[Violation]) -> dict[str, int]:
    """Return how often each kind occurs."""
    return dict(Counter(violation.kind for violation in violations))
