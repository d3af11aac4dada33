"""A model of PostgreSQL, in the place of `psycopg2.connect`.

aiopg itself runs: it asks for a connection with ``async_`` and polls it. A statement takes effect at one
moment, at the server's end of the connection; its answer travels behind the notifications that were
sent before it. Statements are recognised by their text, those of the log by the constants of the
module under test, and one that is not known is an error.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, Notify, parse_dsn

from simulation.kernel import FIRST_DESCRIPTOR, NEAR, Machine, Timeline
from simulation.log import Log, sql_error

Row = tuple[Any, ...]


@dataclass
class Published:
    """An event in a transaction: what the checker will hold the relay to.

    Attributes:
        seen: How many transactions had been committed when it was published: it comes after all these.
    """

    tag: str
    channel: str
    data: str
    event: str | None
    seen: int


@dataclass(eq=False)
class Transaction:
    """A publisher's transaction. Call `commit` or `rollback` at last."""

    server: Server
    pid: int
    durable: bool = True
    xid: int = 0
    events: list[Published] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    over: bool = False

    def publish(self, tag: str, channel: str, data: str, event: str | None = None, payload: str = "") -> None:
        """Publish by either source's own form; `payload` is what source notify sends."""
        self.events.append(Published(tag, channel, data, event, len(self.server.commits)))
        if self.server.log is None:
            self.notes.append((channel, payload or data))
        else:
            self.server.log.publish(self, channel, data, event)

    def savepoint(self) -> Callable[[], None]:
        """Set a savepoint; return what rolls back to it."""
        events, notes, rows = len(self.events), len(self.notes), len(self.rows)

        def roll_back() -> None:
            del self.events[events:], self.notes[notes:], self.rows[rows:]

        return roll_back

    def commit(self) -> bool:
        """Commit; return whether the server was there to do it."""
        if self.over:
            return False
        self.over = True
        self.server.commit(self)
        return True

    def rollback(self) -> None:
        self.over = True
        self.server.forget(self)


class Server:
    """A PostgreSQL server with one database.

    Attributes:
        commits: The transactions with events that were committed, in order.
        up: Whether it takes connections. `frozen_until`: when it answers again.
        delay: Returns how long a statement's way takes, there or back.
        losing: Whether wake-ups of the log get lost at present.
        visits: Connections that were opened, by machine.
    """

    def __init__(self, timeline: Timeline, module: ModuleType) -> None:
        self.timeline = timeline
        self.module = module
        self.log: Log | None = None
        self.chance = timeline.chance("server")
        self.commits: list[Transaction] = []
        self.running: list[Transaction] = []
        self.next_xid = 700
        self.next_pid = 100
        self.up = True
        self.frozen_until = 0.0
        self.losing = False
        self.standby = False
        self.connections: dict[int, Connection] = {}
        self.visits: dict[str, int] = {}
        self.delay: Callable[[], float] = lambda: self.chance.uniform(NEAR, 4 * NEAR)
        self.wall: Callable[[], float] = lambda: timeline.now
        self._statements: dict[str, Callable[[Connection, Any], list[Row]]] = {}

    # Sessions.

    def connect(self, dsn: str = "", **options: Any) -> Connection:
        """Stand for `psycopg2.connect`."""
        machine = Machine.current
        assert machine is not None, "only a machine connects"
        asynchronous = bool(options.get("async_") or options.get("async"))
        self.visits[machine.name] = self.visits.get(machine.name, 0) + 1
        if not asynchronous and not self.up:
            raise psycopg2.OperationalError("connection to server failed: Connection refused")
        if not asynchronous and self.frozen_until > self.timeline.now:
            raise psycopg2.OperationalError("connection to server failed: timeout expired")
        self.next_pid += 1
        connection = Connection(self, machine, self.next_pid, dsn, asynchronous)
        self.connections[connection.pid] = connection
        return connection

    def sessions_of(self, machine: Machine) -> list[Connection]:
        return [each for each in self.connections.values() if each.machine is machine and not each.closed]

    def stop(self, text: str, code: str = "57P01") -> None:
        """End every session, and take no more."""
        self.up = False
        for connection in list(self.connections.values()):
            connection.lose(sql_error(code, text))
        for transaction in self.running[:]:
            transaction.rollback()

    def start(self) -> None:
        self.up = True

    # Transactions.

    def begin(self, pid: int | None = None, durable: bool = True) -> Transaction:
        if pid is None:
            self.next_pid += 1
            pid = self.next_pid
        transaction = Transaction(self, pid, durable)
        self.running.append(transaction)
        return transaction

    def forget(self, transaction: Transaction) -> None:
        if transaction in self.running:
            self.running.remove(transaction)

    def assign_xid(self, transaction: Transaction) -> int:
        if not transaction.xid:
            transaction.xid = self.next_xid
            self.next_xid += 1
        return transaction.xid

    def commit(self, transaction: Transaction) -> None:
        self.forget(transaction)
        if transaction.events:
            self.commits.append(transaction)
            self.timeline.note(
                "commit",
                n=len(self.commits),
                pid=transaction.pid,
                events=[[each.tag, each.channel, each.seen, each.event] for each in transaction.events],
                size=max(len(each.data.encode()) + 6 * each.data.count("\n") for each in transaction.events),
            )
        if self.log is not None:
            self.log.commit(transaction)
        self.notify(transaction.pid, transaction.notes)

    def notify(self, pid: int, notes: Iterable[tuple[str, str]]) -> None:
        """Send notifications to who listens, at the commit; equal ones once."""
        for channel, payload in dict.fromkeys(notes):
            for connection in self.connections.values():
                if channel in connection.listening and not connection.over:
                    if self.losing and channel == self.module.LOG_CHANNEL:
                        continue
                    connection.answer("note", (pid, channel, payload))

    # Statements.

    def _dispatch(self) -> dict[str, Callable[[Connection, Any], list[Row]]]:
        table: dict[str, Callable[[Connection, Any], list[Row]]] = {
            "SELECT 1": lambda connection, values: [(1,)],
            "SELECT": lambda connection, values: [],
            "SELECT pg_catalog.version()": lambda connection, values: [("PostgreSQL 15.0 on linux",)],
        }
        if self.log is not None:
            for name, method in self.log.statements().items():
                if hasattr(self.module, name):
                    table[getattr(self.module, name).strip()] = method
        return table

    def execute(self, connection: Connection, statement: str, values: Any) -> list[Row]:
        """Let one statement take effect, and return its rows."""
        statement = statement.strip()
        self._statements = self._statements or self._dispatch()
        known = self._statements.get(statement)
        if known is not None:
            return known(connection, values)
        if statement.startswith(("LISTEN", "UNLISTEN")):
            return self._listen(connection, statement)
        if "pg_notification_queue_usage()" in statement and "pg_notify(%s, '')" in statement:
            self.notify(connection.pid, [(values[0], "")])
            return [(0.0, "")]
        if "has_function_privilege(" in statement:
            return [(True,)]
        if "pg_is_in_recovery()" in statement:
            return [(self.standby, "UTF8")]
        if re.match(r"(SET|RESET) |SELECT (pg_catalog\.)?set_config\(", statement):
            return []
        raise AssertionError(f"the model does not know this statement: {statement}")

    def _listen(self, connection: Connection, statement: str) -> list[Row]:
        if self.standby:
            raise sql_error("25006", "cannot execute LISTEN during recovery")
        for part in re.findall(r'(UN)?LISTEN "((?:[^"]|"")*)"', statement):
            name = part[1].replace('""', '"')
            (connection.listening.discard if part[0] else connection.listening.add)(name)
        return []


class Connection:
    """psycopg2's connection, and the session at its other end.

    Attributes:
        armed: What happens to its next statement, see `_serve`.
        over: The session is no more at the server.
        frozen_until: Nothing passes before.
    """

    def __init__(self, server: Server, machine: Machine, pid: int, dsn: str, asynchronous: bool) -> None:
        self.server = server
        self.machine = machine
        self.timeline = server.timeline
        self.pid = pid
        self.dsn = dsn
        self.asynchronous = asynchronous
        self.autocommit = False
        self.closed = 0
        self.server_version = 150_000
        self.notifies: Any = []
        self.listening: set[str] = set()
        self.armed = ""
        self.over = False
        self.frozen_until = 0.0
        parts = parse_dsn(dsn)
        self.info = SimpleNamespace(
            host=parts.get("host", ""),
            port=int(parts.get("port", "5432")),
            dbname=parts.get("dbname", ""),
            user=parts.get("user", ""),
            ssl_in_use=False,
            backend_pid=pid,
            server_version=150000,
            parameter_status={"server_version": "15.0"}.get,
        )
        self._executing = asynchronous
        self._rows: list[Row] | None = None
        self._inbox: deque[tuple[str, Any]] = deque()
        self._way: deque[tuple[str, Any]] = deque()
        self._there = self._back = 0.0
        self._fd = next(self.timeline.descriptors)
        machine.files[self._fd] = self
        if asynchronous:
            self._send(self._welcome)

    # As psycopg2.

    def fileno(self) -> int:
        return self._fd

    def isexecuting(self) -> bool:
        return self._executing

    def cursor(self, **options: Any) -> Cursor:
        self._check_open()
        return Cursor(self)

    def poll(self) -> int:
        self._check_open()
        while self._inbox:
            kind, value = self._inbox.popleft()
            if kind == "note":
                self.notifies.append(Notify(*value))
            elif kind == "lost":
                # libpq has closed its socket by then.
                self.closed = 2
                self._executing = False
                self.machine.files.pop(self._fd, None)
                raise value
            else:
                self._executing = False
                if isinstance(value, Exception):
                    raise value
                self._rows = value
        return POLL_READ if self._executing else POLL_OK

    def close(self) -> None:
        if self.closed != 1:
            self.closed = 1
            self.machine.files.pop(self._fd, None)
            # What has been sent is still executed.
            when = max(self.timeline.now + self.server.delay(), self._there, self.frozen_until)
            self.timeline.at(when, self.end)

    def commit(self) -> None:
        pass

    # What the machine asks of it.

    def ready(self) -> int:
        return selectors.EVENT_READ if self._inbox else 0

    def execute(self, statement: str, values: Any) -> None:
        self._check_open()
        self._rows = None
        if not self.asynchronous:
            if self.over or self.frozen_until > self.timeline.now:
                self.closed = 2
                raise psycopg2.OperationalError("server closed the connection unexpectedly")
            self._rows = self.server.execute(self, statement, values)
            return
        if self._executing:
            raise psycopg2.ProgrammingError("a statement is under way")
        self._executing = True
        self._send(self._serve, statement, values)

    def rows(self) -> list[Row]:
        return self._rows or []

    def _check_open(self) -> None:
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")

    # The session at the other end.

    def _send(self, action: Callable[..., object], *arguments: Any) -> None:
        self._there = max(self._there, self.timeline.now + self.server.delay())
        self.timeline.at(self._there, self._reach, action, arguments)

    def _reach(self, action: Callable[..., object], arguments: Sequence[Any]) -> None:
        until = max(self.frozen_until, self.server.frozen_until)
        if until > self.timeline.now:
            self._there = max(self._there, until)
            self.timeline.at(until, self._reach, action, arguments)
        else:
            action(*arguments)

    def _welcome(self) -> None:
        if self.server.up:
            self.answer("rows", [])
        else:
            self.lose(psycopg2.OperationalError("connection to server failed: Connection refused"))

    def _serve(self, statement: str, values: Any) -> None:
        armed, self.armed = self.armed, ""
        if self.over:
            return
        if armed == "lost before":
            self.lose()
        elif armed == "cancelled":
            self.answer("rows", sql_error("57014", "canceling statement due to user request"))
        elif armed == "refused":
            self.answer("rows", sql_error("53100", "could not extend file: No space left on device"))
        else:
            if armed.startswith("late"):
                self._back = max(self._back, self.timeline.now + float(armed.split()[1]))
            try:
                answer: Any = self.server.execute(self, statement, values)
            except psycopg2.Error as error:
                answer = error
            if armed == "lost after":
                self.lose()
            else:
                self.answer("rows", answer)

    def answer(self, kind: str, value: Any) -> None:
        """Send something to the client, behind what was sent before."""
        self._back = max(self._back, self.timeline.now + self.server.delay())
        self._way.append((kind, value))
        self.timeline.at(self._back, self._arrive)

    def _arrive(self) -> None:
        if self.frozen_until > self.timeline.now:
            self.timeline.at(self.frozen_until, self._arrive)
        elif self.closed != 1:
            self._inbox.append(self._way.popleft())
            self.machine.poke(self._fd)

    def lose(self, error: psycopg2.Error | None = None) -> None:
        """End the session from the server's side."""
        if not self.over:
            self.end()
            self.frozen_until = 0.0
            text = "server closed the connection unexpectedly"
            self.answer("lost", error or psycopg2.OperationalError(text))

    def end(self) -> None:
        self.over = True
        self.listening.clear()
        self.server.connections.pop(self.pid, None)


class Cursor:
    """psycopg2's cursor."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.closed = False
        self.name = None

    @property
    def description(self) -> tuple[int, ...] | None:
        return (0,) if self.connection._rows else None

    def execute(self, statement: str, values: Any = None) -> None:
        self.connection.execute(statement, values)

    def fetchall(self) -> list[Row]:
        return list(self.connection.rows())

    def fetchone(self) -> Row | None:
        rows = self.connection.rows()
        return rows.pop(0) if rows else None

    def __iter__(self) -> Any:
        return iter(self.connection.rows())

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def look_at(reading: Sequence[int], *others: object) -> tuple[list[int], list[int], list[int]]:
    """Stand for `select.select`, by which aiopg looks whether a descriptor is still good."""
    for fd in reading:
        stat_file(fd)
    return [], [], []


def stat_file(fd: int, stat: Callable[[int], object] = os.fstat) -> object:
    """Stand for `os.fstat`."""
    if fd < FIRST_DESCRIPTOR:
        return stat(fd)
    assert Machine.current is not None
    if fd not in Machine.current.files:
        raise OSError(errno.EBADF, "Bad file descriptor")
    return None
