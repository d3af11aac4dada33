"""A model of the durable log's schema: its tables, and the statements that relays send."""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg2
from psycopg2 import errors

if TYPE_CHECKING:
    from simulation.postgres import Connection, Row, Server, Transaction

PAGE_BYTES = 4 * 1024 * 1024
# A sequence is written ahead by so many values: after a crash it goes on behind them.
SEQUENCE_AHEAD = 32
# Of pruning, in one call.
PRUNE_ROWS = 1_000
PRUNE_BYTES = 8 * 1024 * 1024
MAX_DATA = 1_048_576
REVOKED = "sse_relay_revoked"
CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f]")
LINES = re.compile(r"\r\n|\r|\n")


@functools.cache
def _error_class(code: str) -> type[psycopg2.Error]:
    base = errors.lookup(code)
    return type(base.__name__, (base,), {"pgcode": code})


def sql_error(code: str, text: str) -> psycopg2.Error:
    """Return an error as the server raises it, with its SQLSTATE."""
    return _error_class(code)(text)


class Pending(NamedTuple):
    """A row of sse_relay.pending."""

    xid: int
    seq: int
    pid: int
    channel: str
    event: str | None
    data: str


class Logged(NamedTuple):
    """A row of sse_relay.events."""

    id: int
    xid: int
    channel: str
    event: str | None
    data: str
    created: float


class Snapshot(NamedTuple):
    """What a statement sees."""

    xmin: int
    xmax: int
    running: tuple[int, ...]

    def shows(self, xid: int) -> bool:
        return xid < self.xmax and xid not in self.running

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"


def read_snapshot(text: str) -> Snapshot:
    xmin, xmax, running = text.split(":")
    return Snapshot(int(xmin), int(xmax), tuple(map(int, filter(None, running.split(",")))))


class Log:
    """The tables, and what can be done to them.

    Attributes:
        retention: Seconds.
        batch: Events that `advance` moves in one call.
    """

    def __init__(self, server: Server, retention: float, batch: int) -> None:
        self.server = server
        self.retention = retention
        self.batch = batch
        self.pending: list[Pending] = []
        self.events: list[Logged] = []
        self.pruned = 0
        self.revocations: list[tuple[int, str, float]] = []
        # Rows that cannot be read.
        self.damaged: set[int] = set()
        self.epoch = "e1"
        self.timeline = self._epoch_timeline = 1
        self._epochs = 1
        self._next_id = 1
        self._next_seq = 1
        # How to take back what a crash, or the promotion of a standby that lags behind, would lose.
        self._unflushed: list[Callable[[], None]] = []
        self._unsent: list[Callable[[], None]] = []
        # What has changed since a copy was made, None if there is none; its next id and transaction.
        self.uncopied: list[Callable[[], None]] | None = None
        self._copy = 0, 0

    def statements(self) -> dict[str, Callable[[Connection, Any], list[Row]]]:
        """Return what answers the module's statements, by their names there."""
        return {
            "LOG_SESSION_SQL": lambda connection, values: [],
            "LOG_VERSION_SQL": lambda connection, values: [(self.server.module.SCHEMA_VERSION,)],
            "LOG_GRANTS_SQL": lambda connection, values: [],
            "LOG_LIMITS_SQL": lambda connection, values: [],
            "LOG_REVOCATIONS_SQL": lambda connection, values: self._revocations_after(*values),
            "LOG_ATTACH_SQL": lambda connection, values: self._attach(connection, *values),
            "LOG_WAITING_SQL": lambda connection, values: self._waiting(*values),
            "LOG_ADVANCE_SQL": self._advance,
            "LOG_READ_SQL": self._read,
            "LOG_NEXT_SQL": lambda connection, values: self._next(*values),
            "LOG_RECENT_SQL": lambda connection, values: self._recent(*values),
            "LOG_REPLAY_SIZE_SQL": self._replay_size,
            "LOG_REPLAY_SQL": self._replay,
            "LOG_LAST_SQL": self._last,
            "LOG_PRUNE_SQL": lambda connection, values: [(self.prune(),)],
        }

    # For applications.

    def publish(self, transaction: Transaction, channel: str, data: str, event: str | None) -> None:
        if (refusal := refuse(channel, data, event)) is not None:
            raise sql_error(*refusal)
        self._insert(transaction, channel, data, event or None)

    def revoke(self, transaction: Transaction, subject: str) -> None:
        self._insert(transaction, REVOKED, subject, None)

    def _insert(self, transaction: Transaction, channel: str, data: str, event: str | None) -> None:
        xid = self.server.assign_xid(transaction)
        transaction.rows.append(Pending(xid, self._next_seq, transaction.pid, channel, event, data))
        self._next_seq += 1
        transaction.notes.append((self.server.module.LOG_CHANNEL, str(xid)))

    def commit(self, transaction: Transaction) -> None:
        rows = transaction.rows
        self.pending += rows

        def undo() -> None:
            gone = set(rows)
            self.pending = [row for row in self.pending if row not in gone]
            tags = [tag for row in rows if (tag := tag_of(row)) is not None]
            if tags:
                self.server.timeline.note("undone", tags=tags)

        self._changed(undo, durable=transaction.durable)

    def position(self) -> str:
        """Return what sse_relay.position() does, to a transaction that has not published."""
        return f"{self.epoch}-{self._newest()}@{self.snapshot()}"

    # For relays.

    def snapshot(self) -> Snapshot:
        running = tuple(sorted(each.xid for each in self.server.running if each.xid))
        return Snapshot(min(running, default=self.server.next_xid), self.server.next_xid, running)

    def _attach(self, connection: Connection, known_epoch: str | None, known_id: int | None) -> list[Row]:
        behind = known_epoch == self.epoch and (known_id or 0) > self._newest()
        if self._epoch_timeline != self.timeline or behind:
            self.renew_epoch(connection.pid)
        return [(self.epoch, self._newest(), self.pruned, self.retention)]

    def renew_epoch(self, pid: int = 0) -> None:
        self._epochs += 1
        self.epoch = f"e{self._epochs}"
        self._epoch_timeline = self.timeline
        self.pruned = min(self.pruned, self._newest())
        self.server.timeline.note("epoch", epoch=self.epoch)
        self.server.notify(pid, [(self.server.module.LOG_CHANNEL, "")])

    def _revocations_after(self, since: int) -> list[Row]:
        return [row for row in self.revocations if row[0] > since][:10_000]

    def _waiting(self, since: str | None, after: int | None = None) -> list[Row]:
        found = self.pending
        if since is not None:
            seen = read_snapshot(since)
            found = [row for row in found if row.xid >= seen.xmax or row.xid in seen.running]
        last: dict[tuple[int, int], int] = {}
        for row in found:
            last[row.xid, row.pid] = max(row.seq, last.get((row.xid, row.pid), 0))
        order = sorted(last, key=lambda sender: last[sender])
        answer = (str(self.snapshot()), [str(xid) for xid, _ in order], [pid for _, pid in order])
        return [(*answer, None, len(found) if since is not None else len(order))]

    def _advance(self, connection: Connection, values: Any) -> list[Row]:
        xids, pids, sweep = values
        wanted: dict[tuple[int, int], list[Pending]] = {}
        for xid, pid in zip(map(int, xids), pids, strict=True):
            wanted[xid, pid] = []
        for row in self.pending:
            if (row.xid, row.pid) in wanted:
                wanted[row.xid, row.pid].append(row)
        of_each = (sorted(rows, key=attrgetter("seq")) for rows in wanted.values())
        rows = [*itertools.chain.from_iterable(of_each)][: self.batch]
        size, taken = 0, []
        for row in rows:
            if size >= PAGE_BYTES:
                break
            size += len(row.data.encode())
            taken.append(row)
        if not taken:
            return [(0, False)]
        self.server.next_xid += 1
        gone = set(taken)
        self.pending = [row for row in self.pending if row not in gone]
        created = self.server.wall()
        first = self._next_id
        moved = [
            Logged(number, row.xid, row.channel, row.event, row.data, created)
            for number, row in enumerate(taken, first)
        ]
        self._next_id += len(moved)
        self.events += moved
        self.revocations += [(row.id, row.data, created) for row in moved if row.channel == REVOKED]
        tags = [tag_of(row) for row in taken]
        epoch = self.epoch
        self.server.timeline.note("number", epoch=epoch, first=first, tags=tags)
        for logged in moved:
            if logged.channel == REVOKED:
                self.server.timeline.note("revoked", client=logged.data)

        def undo() -> None:
            self.events = [row for row in self.events if row not in moved]
            self.revocations = [row for row in self.revocations if row[0] < first]
            self.damaged.difference_update(row.id for row in moved)
            self.pending = sorted([*self.pending, *taken], key=attrgetter("seq"))
            self.server.timeline.note("unnumbered", epoch=epoch, first=first, count=len(tags))

        self._changed(undo, durable=True)
        if sweep:
            self.server.notify(connection.pid, [(self.server.module.LOG_CHANNEL, "")])
        return [(len(moved), len(taken) == self.batch or size >= PAGE_BYTES)]

    def _read(self, connection: Connection, values: Any) -> list[Row]:
        since, limit = values["id"], values["limit"]
        start = self._place(since)
        first, *rest = self._rows(self.events[start : start + limit], PAGE_BYTES)
        here = self.events[start - 1].xid if start and self.events[start - 1].id == since else None
        return [(*first, self._newest(), here, False), *((*row, None, None, None) for row in rest)]

    def _next(self, since: int) -> list[Row]:
        start = self._place(since)
        return [(row.id, row.channel, self.pruned) for row in self.events[start : start + 1]]

    def _recent(self, most: int) -> list[Row]:
        size, first = 0, None
        for row in reversed(self.events[-10_000:]):
            size += len(row.data.encode())
            if size > most:
                break
            first = row.id - 1
        return [(first,)]

    def _replay_size(self, connection: Connection, values: Any) -> list[Row]:
        found = [*itertools.islice(self._between(values), 10_001)]
        count = (len(found), sum(len(row.data.encode()) for row in found))
        return [count]

    def _replay(self, connection: Connection, values: Any) -> list[Row]:
        rows = itertools.islice(self._between(values), self.server.module.LOG_PAGE_ROWS)
        return [row[:7] for row in self._rows(rows, values["bytes"])]

    def _last(self, connection: Connection, values: Any) -> list[Row]:
        found: list[Row] = []
        until = values["until"]
        for channel in values["channels"]:
            ids = [row.id for row in self.events if row.channel == channel and row.id <= until]
            ids = ids[-values["most"] :]
            found.append((channel, ids[0] - 1 if ids else until))
        return found

    def prune(self) -> int:
        line = self.server.wall() - self.retention
        old = size = 0
        for place, row in enumerate(self.events[:-1][:PRUNE_ROWS], 1):
            if size >= PRUNE_BYTES:
                break
            size += len(row.data.encode())
            old = place if row.created < line else old
        if not old:
            return 0
        gone, self.events = self.events[:old], self.events[old:]
        before, self.pruned = self.pruned, gone[-1].id
        self.server.timeline.note("pruned", epoch=self.epoch, upto=self.pruned)

        def undo() -> None:
            self.events = gone + self.events
            self.pruned = before

        self._changed(undo, durable=True)
        return old

    # Rows.

    def _newest(self) -> int:
        return self.events[-1].id if self.events else 0

    def _place(self, since: int) -> int:
        return bisect_right(self.events, since, key=attrgetter("id"))

    def _between(self, values: Any) -> Iterator[Logged]:
        after = dict(zip(values["channels"], values["since"], strict=True))
        first = self._place(min(after.values(), default=0))
        rows = self.events[first : self._place(values["until"])]
        return (row for row in rows if row.id > after.get(row.channel, row.id))

    def _rows(self, rows: Iterable[Logged], most: int) -> list[Row]:
        found: list[Row] = []
        size = 0
        for row in rows:
            if size >= most:
                break
            if row.id in self.damaged:
                raise sql_error("XX001", f"invalid page in block {row.id}")
            size += len(row.data.encode())
            found.append((*((None, None) if found else (self.epoch, self.pruned)), *row))
        return found or [(self.epoch, self.pruned, *[None] * 6)]

    # What is lost.

    def _changed(self, undo: Callable[[], None], *, durable: bool) -> None:
        self._unsent.append(undo)
        self._unflushed.append(undo)
        if self.uncopied is not None:
            self.uncopied.append(undo)
        if durable:
            self._unflushed.clear()

    def crash(self) -> None:
        """Lose what was not flushed."""
        self._take_back(self._unflushed)
        self._next_id += self.server.chance.randrange(SEQUENCE_AHEAD)

    def fail_over(self) -> None:
        """Go on with a standby, which has not got everything."""
        self._take_back(self._unsent)
        self.timeline += 1
        self._next_id = self._newest() + 1

    def copy(self) -> None:
        """Make a copy of the volume."""
        self.uncopied, self._copy = [], (self._next_id, self.server.next_xid)

    def put_back(self) -> None:
        """Put the copy in the volume's place, as the docs say: with another epoch."""
        self._take_back(self.uncopied or ())
        self._next_id, self.server.next_xid = self._copy
        self.uncopied = None
        self.renew_epoch()

    def _take_back(self, undos: Sequence[Callable[[], None]]) -> None:
        for undo in reversed(undos):
            undo()
        if self.uncopied is not None:
            done = set(undos)
            self.uncopied = [undo for undo in self.uncopied if undo not in done]
        self._unflushed.clear()
        self._unsent.clear()


def tag_of(row: Pending | Logged) -> str | None:
    """Return what `clients.write_data` put first; None for what is no event."""
    return None if row.channel == REVOKED else row.data.partition(" ")[0]


def refuse(channel: str | None, data: str | None, event: str | None) -> tuple[str, str] | None:
    """Return SQLSTATE and reason if publish() takes these for unfit."""
    if channel is None or data is None:
        return "22004", "NULL"
    size = len(channel.encode())
    if not 1 <= size <= 63 or channel.startswith("sse_relay") or CONTROL.search(channel):
        return "22023", "channel"
    name = event or ""
    if (
        name in ("error", "open")
        or name.startswith("relay.")
        or len(name.encode()) > 256
        or LINES.search(name)
    ):
        return "22023", "event"
    wire = LINES.sub("\n", data).replace("\n", "\ndata: ")
    return ("22001", "data") if max(len(wire.encode()), len(data.encode())) > MAX_DATA else None
