"""The same promises on a real PostgreSQL: real relays that are killed and stopped, clients that hop.

Publishers leave each event's tag in a table, with what its transaction could see, so that the table tells
what was committed, whatever the publisher got to hear. At the end, the history of all that goes to the
checker of the simulation.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg2

import harness
from simulation.checker import Checker, Record, split_position
from simulation.clients import Reader, request_of, take_block, write_data
from sse_relay import apply_schema

CHANNELS = tuple(f"channel-{number}" for number in range(6))
PUBLISHERS = 6
CHAINS = 4
# Events that wait for their numbers.
CROWD = 20_000

# `heads` are the last links of the chains: whatever its transaction can see comes before it.
SCENE_SQL = """
CREATE TABLE ledger (
    tag text PRIMARY KEY, channel text NOT NULL, heads text[],
    xid text NOT NULL DEFAULT pg_current_xact_id()::text);
CREATE TABLE chain (id int PRIMARY KEY, head text);
INSERT INTO chain SELECT generate_series(0, %s - 1);
CREATE TABLE parent (id int PRIMARY KEY);
INSERT INTO parent SELECT generate_series(0, 3);
CREATE TABLE child (parent_id int NOT NULL REFERENCES parent DEFERRABLE INITIALLY DEFERRED);

CREATE FUNCTION say(channel text, tag text, data text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ledger VALUES (tag, channel, (SELECT array_agg(head) FROM chain WHERE head IS NOT NULL));
    PERFORM sse_relay.publish(channel, data);
END $$;

-- In a trigger that is deferred to the commit, behind deferred checks that wait for others' locks.
CREATE TABLE noted (channel text, tag text, data text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM say(NEW.channel, NEW.tag, NEW.data);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER note AFTER INSERT ON noted DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note();
"""


class Stopped(Exception):  # noqa: N818  # a wish, no error
    """Rolls a transaction back."""


class Publisher(threading.Thread):
    """Publishes by transactions of every kind until it is told to stop."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(daemon=True)
        self._soak = soak
        self._chance = random.Random(f"{soak.seed} publisher {number}")
        self._name = f"p{number}"
        self._count = 0
        self.error: Exception | None = None

    def run(self) -> None:
        while not self._soak.quiet.is_set():
            try:
                with contextlib.closing(psycopg2.connect(self._soak.dsn)) as connection:
                    while not self._soak.quiet.is_set():
                        with connection.cursor() as cursor, contextlib.suppress(Stopped):
                            self._transact(cursor)
                            connection.commit()
                        connection.rollback()
                        if self._soak.crowded:
                            self._soak.quiet.wait(0.5)
            except psycopg2.extensions.TransactionRollbackError as error:
                self.error = error  # a deadlock
                return
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                self._soak.figures["publishers cut off"] += 1
                self._soak.quiet.wait(0.05)
            except Exception as error:
                self.error = error
                return

    def _event(self) -> tuple[str, str, str]:
        self._count += 1
        tag = f"{self._name}.{self._count}"
        return self._chance.choice(CHANNELS), tag, write_data(tag, self._chance.choice((5, 50, 500)))

    def _transact(self, cursor: Any) -> None:
        chance = self._chance
        kind = chance.choice(("plain", "burst", "chained", "savepoint", "deferred", "locking", "rolled back"))
        if chance.random() < self._soak.lazy:
            cursor.execute("SET LOCAL synchronous_commit = off")
        if kind == "chained":
            chain = chance.randrange(CHAINS)
            channel, tag, data = self._event()
            cursor.execute("SELECT FROM chain WHERE id = %s FOR UPDATE", (chain,))
            cursor.execute("SELECT say(%s, %s, %s)", (channel, tag, data))
            cursor.execute("UPDATE chain SET head = %s WHERE id = %s", (tag, chain))
            return
        if kind == "savepoint":
            cursor.execute("SAVEPOINT one")
            cursor.execute("SELECT say(%s, %s, %s)", self._event())
            cursor.execute("ROLLBACK TO one")
        if kind in ("deferred", "locking"):
            cursor.execute("INSERT INTO child VALUES (%s)", (chance.randrange(4),))
            cursor.execute("INSERT INTO noted VALUES (%s, %s, %s)", self._event())
        events = [self._event() for _ in range(chance.choice((20, 200)) if kind == "burst" else 2)]
        flat = [value for event in events for value in event]
        forms = ", ".join(["(%s, %s, %s)"] * len(events))
        cursor.execute(f"SELECT say(c, t, d) FROM (VALUES {forms}) AS e (c, t, d)", flat)
        if kind == "rolled back":
            cursor.connection.rollback()
            raise Stopped


class Follower(threading.Thread):
    """A client that goes from relay to relay, cuts its stream at any byte, and resumes by its position."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(daemon=True)
        self._soak = soak
        self._chance = random.Random(f"{soak.seed} follower {number}")
        self.name = f"k{number}"
        self.channels = self._chance.sample(CHANNELS, self._chance.randint(1, 3))
        self.records: list[Record] = []
        self.position = ""
        self.error: Exception | None = None

    def run(self) -> None:
        stream = 0
        start = self._load_page() if self._chance.random() < 0.3 else None
        while not self._soak.over.is_set():
            stream += 1
            try:
                self._follow(stream, start)
            except OSError:
                self._soak.over.wait(0.02)
            except Exception as error:
                self.error = error
                return

    def has_come_to(self, ends: dict[str, int]) -> bool:
        """Return whether it has got, or was told of, the last events of its channels."""
        last = max(ends[channel] for channel in self.channels)
        return bool(self.position) and split_position(self.position)[1] >= last

    def _load_page(self) -> str | None:
        """Return the position of a page that is loaded now."""
        try:
            with contextlib.closing(psycopg2.connect(self._soak.dsn)) as page, page.cursor() as cursor:
                cursor.execute("SELECT sse_relay.position()")
                ((position,),) = cursor.fetchall()
                return str(position)
        except psycopg2.Error:
            return None

    def _note(self, do: str, **facts: Any) -> None:
        self.records.append({"t": time.time(), "do": do, "client": self.name, **facts})

    def _follow(self, stream: int, start: str | None) -> None:
        chance = self._chance
        relay = chance.choice(self._soak.addresses)
        host, _, port = relay.rpartition(":")
        stay = time.monotonic() + chance.choice((0.05, 0.5, 3.0, 30.0)) * chance.random()
        reader = Reader()
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            facts: dict[str, Any] = {"shows": start.partition("@")[2]} if start else {}
            self._note(
                "open", stream=stream, relay=relay, channels=self.channels, last=0, prompt=False,
                since=self.position or start or "", **facts,
            )  # fmt: skip
            self._soak.figures["streams"] += 1
            sock.sendall(request_of(self.channels, self.position, start or "", host=relay))
            while data := sock.recv(chance.choice((100, 4_096, 262_144))):
                now = time.time()
                items: list[list[Any]] = []
                for block in reader.feed(data):
                    take_block(block, now, items)
                    self.position = block.mark or self.position
                if items:
                    self._note("got", stream=stream, items=items)
                if self._soak.over.is_set():
                    return
                if time.monotonic() > stay and not self._soak.quiet.is_set():
                    return


class Soak:
    """One run.

    Attributes:
        quiet: Set when publishers and faults end. `over`: when clients do.
    """

    def __init__(self, events: int, clients: int, seed: int, lazy: float) -> None:
        self.events = events
        self.seed = seed
        self.lazy = lazy
        self.quiet, self.over = threading.Event(), threading.Event()
        self.figures: Counter[str] = Counter()
        # More is published than is numbered.
        self.crowded = False
        self.addresses: list[str] = []
        self.dsn = ""
        self._clients = clients
        self._chance = random.Random(seed)
        self._relays: list[harness.Relay] = []

    def run(self) -> Checker:
        """Publish so many events under stress; return the checker that has judged the history."""
        began = time.time()
        with harness.Server() as server, contextlib.ExitStack() as stack:
            self.dsn = server.database.dsn
            apply_schema(self.dsn)
            server.database.execute(SCENE_SQL, (CHAINS,))
            stack.callback(self._close_relays)
            self._relays += [self._start_relay() for _ in range(3)]
            for relay in self._relays:
                relay.wait_for_log(harness.READY, 60)
            self.addresses = [relay.bind for relay in self._relays]
            stack.callback(self.over.set)
            stack.callback(self.quiet.set)
            followers = [Follower(self, number) for number in range(self._clients)]
            publishers = [Publisher(self, number) for number in range(PUBLISHERS)]
            for thread in (*followers, *publishers):
                thread.start()
            self._disturb(server, (*followers, *publishers))
            self.quiet.set()
            for publisher in publishers:
                publisher.join(60)
            for channel in CHANNELS:
                tag = f"end.{channel}"
                server.database.execute("SELECT say(%s, %s, %s)", (channel, tag, write_data(tag, 0)))
            harness.wait_until(
                lambda: server.database.execute("SELECT count(*) FROM sse_relay.pending") == [(0,)],
                600,
                "the last numbers",
            )
            ends = dict(
                server.database.execute("SELECT channel, max(id) FROM sse_relay.events GROUP BY channel")
            )
            harness.wait_until(
                lambda: all(each.error or each.has_come_to(ends) for each in followers),
                300,
                "the last events",
            )
            self.over.set()
            for follower in followers:
                follower.join(30)
            for error in (*(each.error for each in followers), *(each.error for each in publishers)):
                if error is not None:
                    raise error
            self.figures["seconds"] = int(time.time() - began)
            return self._judge(server.database, followers)

    def _close_relays(self) -> None:
        for relay in self._relays:
            relay.close()

    def _start_relay(self, bind: str | None = None) -> harness.Relay:
        return harness.Relay("--source", "log", "--heartbeat", "1", dsn=self.dsn, bind=bind, wait=False)

    def _disturb(self, server: harness.Server, threads: tuple[Publisher | Follower, ...]) -> None:
        """Kill, stop and restart until enough is published."""
        database, chance, victim = server.database, self._chance, 0
        ((counted,),) = ((0,),)
        crashes = [self.events // 3, 2 * self.events // 3]
        while counted < self.events:
            if error := next((thread.error for thread in threads if thread.error), None):
                raise error
            time.sleep(chance.uniform(0.3, 1.5))
            with contextlib.suppress(psycopg2.Error):
                ((counted,),) = database.execute("SELECT last_value FROM sse_relay.events_id_seq")
                ((waiting,),) = database.execute("SELECT count(*) FROM sse_relay.pending")
                self.crowded = waiting > CROWD
            if crashes and counted > crashes[0]:
                crashes.pop(0)
                server.stop(signal.SIGQUIT)
                server.start()
                self.figures["crashes of PostgreSQL"] += 1
            kind = chance.choice(("kill", "kill", "suspend", "sessions"))
            victim = (victim + 1) % len(self._relays)
            relay = self._relays[victim]
            if kind == "kill":
                relay.kill()
                time.sleep(chance.uniform(0, 0.3))
                relay.close()
                self._relays[victim] = self._start_relay(self.addresses[victim])
                self.figures["relays killed"] += 1
            elif kind == "suspend":
                relay.suspend()
                time.sleep(chance.uniform(0.05, 4.0))
                relay.resume()
                self.figures["relays stopped for a while"] += 1
            else:
                with contextlib.suppress(psycopg2.Error):
                    database.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE application_name = 'sse-relay' AND random() < 0.5"
                    )
                self.figures["sessions ended"] += 1

    def _judge(self, database: harness.Database, followers: list[Follower]) -> Checker:
        assert database.execute("SELECT count(*) FROM sse_relay.pending") == [(0,)]
        history: list[Record] = [{"t": 0.0, "do": "run", "source": "log", "settings": {}, "knobs": {}}]
        history += _truth(database)
        for follower in followers:
            history += follower.records
        history.append({"t": time.time(), "do": "end", "clients": [each.name for each in followers]})
        checker = Checker(history)
        checker.check()
        self.figures["events"] = sum(len(each["events"]) for each in history if each["do"] == "commit")
        self.figures["deliveries"] = checker.deliveries
        return checker


def _truth(database: harness.Database) -> Iterator[Record]:
    """Return what was committed, by the ledger, and in which order, by the log."""
    rows = database.execute(
        "SELECT split_part(e.data, ' ', 1), e.id, extract(epoch FROM e.created)::float8"
        " FROM sse_relay.events AS e ORDER BY e.id"
    )
    created = {tag: (number, moment) for tag, number, moment in rows}
    ((epoch,),) = database.execute("SELECT epoch FROM sse_relay.epoch")
    committed = database.execute("SELECT tag, channel, heads, xid::bigint FROM ledger")
    for n, (tag, channel, heads, xid) in enumerate(committed, 1):
        moment = created.get(tag, (0, 0.0))[1]
        yield {
            "t": moment, "do": "commit", "n": n, "pid": 0, "xid": xid, "size": 0,
            "events": [[tag, channel, 0, None]], "after": heads or [],
        }  # fmt: skip
    for tag, number, moment in rows:
        yield {"t": moment, "do": "number", "epoch": epoch, "first": number, "tags": [tag]}
