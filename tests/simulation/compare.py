"""Holds the model of PostgreSQL against a real server: the same random calls on both, every answer compared.

The model takes the real transactions' and sessions' numbers for its own, so that answers are equal as they
are; what a clock or chance decides (times, names of epochs) is compared by whether it is there or new.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from typing import Any

import psycopg2
from psycopg2.extensions import connection as RealConnection  # noqa: N812  # a class, whatever it is called

from simulation import run
from simulation.kernel import Timeline
from simulation.log import Log, read_snapshot
from simulation.postgres import Server, Transaction

CHANNELS = ("c0", "c1", "c2", "c3")
# How often notifications are compared, in calls: on the real server they take their time.
ROUND = 40
SECONDS = 10.0


class DifferenceError(AssertionError):
    """Model and server have answered differently."""


class Ear:
    """A session of the model that listens, and keeps what it hears."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.listening: set[str] = set()
        self.over = False
        self.heard: list[tuple[int, str, str]] = []

    def answer(self, kind: str, value: tuple[int, str, str]) -> None:
        self.heard.append(value)


class Comparison:
    """A series of calls on both.

    Attributes:
        calls: How many calls of each kind were compared.
    """

    def __init__(self, dsn: str, seed: int) -> None:
        self.calls: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._program = run.the_program()
        self._server = Server(Timeline(f"compare {seed}"), self._program)
        self._log = self._server.log = Log(self._server, 86_400.0, 1_000)
        self._server.wall = lambda: float(sum(self.calls.values()))
        self._stack = contextlib.ExitStack()
        self._admin = self._connect(dsn)
        self._relays = [self._connect(dsn) for _ in range(2)]
        self._ears = [Ear(relay.info.backend_pid) for relay in self._relays]
        for ear, relay in zip(self._ears, self._relays, strict=True):
            self._server.connections[ear.pid] = ear  # type: ignore[assignment]  # as much of one as is needed
            relay.cursor().execute(self._program.LOG_SESSION_SQL)
        self._publishers = [self._connect(dsn, autocommit=False) for _ in range(4)]
        self._transactions: list[Transaction | None] = [None] * 4
        self._undo: list[list[Any]] = [[] for _ in range(4)]
        self._snapshot: str | None = None
        self._real_snapshot: str | None = None
        self._xids: list[int] = []
        self._log.epoch = self._epoch = str(self._one("SELECT epoch FROM sse_relay.epoch"))
        self._count = 0

    def _connect(self, dsn: str, autocommit: bool = True) -> RealConnection:
        connection: RealConnection = psycopg2.connect(dsn)
        self._stack.callback(connection.close)
        connection.autocommit = autocommit
        return connection

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, calls: int) -> None:
        """Make so many calls.

        Raises:
            DifferenceError: With the call and both answers.
        """
        steps = {
            self._publish: 10, self._commit: 6, self._roll_back: 1, self._savepoint: 1,
            self._undo_savepoint: 1, self._notify: 1, self._listen: 1, self._refused: 1,
            self._waiting: 3, self._advance: 5,
            self._read: 4, self._replay: 4, self._replay_size: 2, self._recent: 1, self._next: 1,
            self._attach: 1, self._position: 2, self._prune: 1, self._last: 1,
            self._renew: 0.1, self._revoke: 0.2,
        }  # fmt: skip
        while sum(self.calls.values()) < calls:
            (step,) = self._chance.choices([*steps], [*steps.values()])
            step()
            if sum(self.calls.values()) % ROUND == 0:
                self._compare_notifications()

    def _compare(self, what: str, call: object, model: object, real: object) -> None:
        self.calls[what] += 1
        if model != real:
            raise DifferenceError(f"{what} {call!r}:\nmodel {str(model)[:2000]}\nreal  {str(real)[:2000]}")

    def _one(self, statement: str, values: Any = None) -> Any:
        with self._admin.cursor() as cursor:
            cursor.execute(statement, values)
            ((found,),) = cursor.fetchall()
            return found

    def _ask(self, what: str, name: str, values: Any, *, blind: bool = False) -> tuple[list[Any], list[Any]]:
        """Run a statement of the relay's on both, and compare the rows."""
        number = self._chance.randrange(2)
        statement = getattr(self._program, name)
        model = self._server.execute(self._ears[number], statement, values)  # type: ignore[arg-type]
        with self._relays[number].cursor() as cursor:
            cursor.execute(statement, values)
            real = cursor.fetchall()
        self._name_epoch()
        if not blind:
            self._compare(what, values, [*map(_plain, model)], [*map(_plain, real)])
        return model, real

    def _name_epoch(self) -> None:
        """Name the model's new epoch as the real one is named."""
        real = str(self._one("SELECT epoch FROM sse_relay.epoch"))
        if (self._log.epoch != self._epoch) != (real != self._epoch):
            raise DifferenceError(f"only one has renewed its epoch: {self._log.epoch}, {real}, {self._epoch}")
        self._log.epoch = self._epoch = real

    # Publishers.

    def _begin(self, number: int) -> Transaction:
        transaction = self._transactions[number]
        if transaction is None:
            pid = self._publishers[number].info.backend_pid
            transaction = self._transactions[number] = self._server.begin(pid)
            self._undo[number] = []
        return transaction

    def _publish(self) -> None:
        number = self._chance.randrange(4)
        transaction = self._begin(number)
        with self._publishers[number].cursor() as cursor:
            if not transaction.xid:
                cursor.execute("SELECT pg_current_xact_id()::text::bigint")
                ((transaction.xid,),) = cursor.fetchall()
                self._server.next_xid = max(self._server.next_xid, transaction.xid + 1)
                self._xids.append(transaction.xid)
            size = self._chance.choices((10, 3_000, 700_000), (200, 20, 1))[0]
            for _ in range(self._chance.choices((1, 3, 600), (200, 20, 1))[0] if size < 100_000 else 4):
                self._count += 1
                event = (self._chance.choice(CHANNELS), f"{self._count} {'x' * size}")
                name = self._chance.choice((None, "", "changed", "é"))
                self._log.publish(transaction, *event, name)
                cursor.execute(self._program.LOG_PUBLISH_SQL, (*event, name))
        self.calls["publish"] += 1

    def _commit(self) -> None:
        number = self._chance.randrange(4)
        if (transaction := self._transactions[number]) is not None:
            transaction.commit()
            self._publishers[number].commit()
            self._transactions[number] = None
            self.calls["commit"] += 1

    def _roll_back(self) -> None:
        number = self._chance.randrange(4)
        if (transaction := self._transactions[number]) is not None:
            transaction.rollback()
            self._publishers[number].rollback()
            self._transactions[number] = None
            self.calls["rollback"] += 1

    def _savepoint(self) -> None:
        number = self._chance.randrange(4)
        transaction = self._begin(number)
        if transaction.xid:
            self._publishers[number].cursor().execute(f"SAVEPOINT s{len(self._undo[number])}")
            self._undo[number].append(transaction.savepoint())
            self.calls["savepoint"] += 1

    def _undo_savepoint(self) -> None:
        number = self._chance.randrange(4)
        if self._transactions[number] is not None and self._undo[number]:
            undo = self._undo[number].pop()
            undo()
            name = f"s{len(self._undo[number])}"
            self._publishers[number].cursor().execute(f"ROLLBACK TO {name}; RELEASE {name}")
            self.calls["rollback to"] += 1

    def _notify(self) -> None:
        number = self._chance.randrange(4)
        transaction = self._begin(number)
        channel = self._chance.choice((*CHANNELS, self._program.LOG_CHANNEL))
        payload = self._chance.choice(("a", "b", "", "é" * 20, str(self._server.next_xid)))
        transaction.notes.append((channel, payload))
        self._publishers[number].cursor().execute("SELECT pg_notify(%s, %s)", (channel, payload))
        self.calls["notify"] += 1

    def _refused(self) -> None:
        """Publish what may not be published."""
        values = self._chance.choice((
            ("", "x", None), ("c" * 64, "x", None), ("é" * 32, "x", None), ("sse_relay_x", "x", None),
            ("a\nb", "x", None), ("a\x7fb", "x", None), (None, "x", None), ("c0", None, None),
            ("c0", "x", "error"), ("c0", "x", "relay.gap"), ("c0", "x", "a\rb"), ("c0", "x", "n" * 257),
            ("c0", "x" * 1_048_577, None), ("c0", "\n" * 150_000, None),
        ))  # fmt: skip
        try:
            with self._admin.cursor() as cursor:
                cursor.execute(self._program.LOG_PUBLISH_SQL, values)
            real = None
        except psycopg2.Error as error:
            real = error.pgcode
        transaction = self._server.begin(1)
        try:
            self._log.publish(transaction, *values)
            model = None
        except psycopg2.Error as error:
            model = error.pgcode
        transaction.rollback()
        self._compare("refused", [str(value)[:20] for value in values], model, real)

    # Relays.

    def _listen(self) -> None:
        number = self._chance.randrange(2)
        name = self._chance.choice((*CHANNELS, self._program.LOG_CHANNEL, 'q"uote'))
        quoted = name.replace('"', '""')
        statement = f'{self._chance.choice(("LISTEN", "LISTEN", "UNLISTEN"))} "{quoted}"'
        self._compare_notifications()
        self._server.execute(self._ears[number], statement, None)  # type: ignore[arg-type]
        self._relays[number].cursor().execute(statement)
        self.calls["listen"] += 1

    def _compare_notifications(self) -> None:
        for ear, relay in zip(self._ears, self._relays, strict=True):
            deadline = time.monotonic() + SECONDS
            while True:
                relay.cursor().execute("SELECT 1")
                if len(relay.notifies) >= len(ear.heard) or time.monotonic() > deadline:
                    break
                time.sleep(0.001)
            real = [(note.pid, note.channel, note.payload) for note in relay.notifies]
            self._compare("notifications", ear.pid, ear.heard, real)
            ear.heard.clear()
            relay.notifies.clear()

    def _waiting(self) -> None:
        again = self._chance.random() < 0.5
        mine, theirs = (self._snapshot, self._real_snapshot) if again else (None, None)
        ear: Any = self._ears[0]
        model = self._server.execute(ear, self._program.LOG_WAITING_SQL, (mine, None))
        with self._relays[0].cursor() as cursor:
            cursor.execute(self._program.LOG_WAITING_SQL, (theirs, None))
            real = cursor.fetchall()
        ((shown, xids, pids, *rest),), ((real_shown, *real_rest),) = model, real
        self._compare("waiting", again, [xids, pids, *rest], real_rest)
        self._compare_snapshots(shown, real_shown)
        if not again and self._chance.random() < 0.3:
            # All that it lists is numbered: the next call may begin there.
            for start in range(0, len(xids), 500):
                more = True
                while more:
                    values = (xids[start : start + 500], pids[start : start + 500], True)
                    ((_, more),), _ = self._ask("advance", "LOG_ADVANCE_SQL", values)
            self._snapshot, self._real_snapshot = shown, real_shown

    def _advance(self) -> None:
        senders = list(dict.fromkeys((row.xid, row.pid) for row in self._log.pending))
        chosen = self._chance.sample(senders, min(len(senders), self._chance.randint(0, 4)))
        if self._chance.random() < 0.3:
            chosen += [(xid, 1) for xid in self._xids[-2:]] + [(1, 1), *chosen[:1]]
        values = ([str(xid) for xid, _ in chosen], [pid for _, pid in chosen], self._chance.random() < 0.3)
        self._ask("advance", "LOG_ADVANCE_SQL", values)

    def _id(self) -> int:
        newest = self._log.events[-1].id if self._log.events else 0
        return max(0, newest - self._chance.choice((0, 1, 5, 100, 5_000)) * self._chance.randint(0, 1))

    def _read(self) -> None:
        limit = self._chance.choice((1, 10, 1_000))
        self._ask("read", "LOG_READ_SQL", {"id": self._id(), "limit": limit})

    def _span(self) -> dict[str, Any]:
        channels = self._chance.sample(CHANNELS, self._chance.randint(1, 4))
        return {
            "channels": channels,
            "since": [self._id() for _ in channels],
            "until": self._id() + 1,
            "bytes": self._chance.choice((1, 5_000, 4_194_304)),
            "most": self._chance.choice((1, 10, 1_000)),
        }

    def _last(self) -> None:
        self._ask("last", "LOG_LAST_SQL", self._span())

    def _replay(self) -> None:
        self._ask("replay", "LOG_REPLAY_SQL", self._span())

    def _replay_size(self) -> None:
        self._ask("replay size", "LOG_REPLAY_SIZE_SQL", self._span())

    def _recent(self) -> None:
        self._ask("recent", "LOG_RECENT_SQL", (self._chance.choice((0, 1_000, 10_000_000)),))

    def _next(self) -> None:
        self._ask("next", "LOG_NEXT_SQL", (self._id(),))

    def _attach(self) -> None:
        epoch = self._chance.choice((None, self._epoch, "another"))
        beyond = self._chance.random() < 0.1
        model, real = self._ask("attach", "LOG_ATTACH_SQL", (epoch, self._id() + beyond), blind=True)
        # A new epoch has no common name yet.
        self._compare("attach", epoch, model[0][1:], real[0][1:])

    def _position(self) -> None:
        model, real = self._log.position(), str(self._one("SELECT sse_relay.position()"))
        (place, _, shown), (real_place, _, real_shown) = model.partition("@"), real.partition("@")
        self._compare("position", "", place, real_place)
        self._compare_snapshots(shown, real_shown)

    def _compare_snapshots(self, model: str, real: str) -> None:
        mine, theirs = read_snapshot(model), read_snapshot(real)
        recent = self._xids[-50:]
        seen = [mine.shows(xid) for xid in recent]
        self._compare("snapshot", recent, seen, [theirs.shows(xid) for xid in recent])

    def _prune(self) -> None:
        """Prune as if all were old."""
        self._log.retention, before = 0.0, self._log.retention
        set_retention = "UPDATE sse_relay.settings SET retention = %s RETURNING 0"
        self._one(set_retention, ("1 microsecond",))
        self._ask("prune", "LOG_PRUNE_SQL", None)
        self._one(set_retention, (f"{before} seconds",))
        self._log.retention = before

    def _renew(self) -> None:
        self._log.renew_epoch(self._admin.info.backend_pid)
        self._one("SELECT sse_relay.renew_epoch()")
        self._name_epoch()
        self.calls["renew"] += 1

    def _revoke(self) -> None:
        subject = f"s{self._chance.randrange(5)}"
        with self._admin.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text::bigint, sse_relay.revoke(%s)", (subject,))
            ((xid, _),) = cursor.fetchall()
        transaction = self._server.begin(self._admin.info.backend_pid)
        transaction.xid = xid
        self._server.next_xid = max(self._server.next_xid, xid + 1)
        self._log.revoke(transaction, subject)
        transaction.commit()
        self._ask("revocations", "LOG_REVOCATIONS_SQL", (self._id(),))


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a row without its times."""
    return tuple("time" if isinstance(value, float) and value > 0 else value for value in row)
