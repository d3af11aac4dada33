"""The durable log, from ``publish`` to the client: real relays on a real PostgreSQL.

Under stress it is tested by the soak of tests/simulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import psycopg2
import psycopg2.extensions
import pytest

import harness
import pages
import sse_relay
from harness import Crowd, Database, FreezableProxy, RawStream, Relay, Server, SseReader, wait_until
from log_session import Session, damage
from sse_relay import SCHEMA_VERSION, SWEEP_INTERVAL, apply_schema, find_postgres, raise_file_limit

LOG = ("--source", "log")
# Nothing that was missed is found in memory.
TABLE = (*LOG, "--memory", "0")
RelayStarter = Callable[..., Relay]


@pytest.fixture
def log(log_database: Database) -> Database:
    """A database of the test's own with the log installed."""
    return log_database


@pytest.fixture
def own_log(own_server: Server) -> Database:
    """The same on a server of the test's own, to stop and restart."""
    apply_schema(own_server.database.dsn)
    return own_server.database


@pytest.fixture
def seed() -> int:
    number = random.randrange(1_000_000)
    print(f"seed {number}")  # noqa: T201  # shown on failure
    return number


@pytest.fixture
def make_role(log: Database) -> Iterator[Callable[[], str]]:
    """Make roles without any right; return the name, which is the password too."""
    roles: list[str] = []

    def make() -> str:
        roles.append(f"role_{random.randrange(10**9)}")
        log.execute(f"CREATE ROLE {roles[-1]} LOGIN PASSWORD '{roles[-1]}'")
        return roles[-1]

    yield make
    for role in roles:
        log.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def as_role(database: Database, role: str) -> str:
    return psycopg2.extensions.make_dsn(database.dsn, user=role, password=role)


def publish(database: Database, channel: str, *data: str) -> None:
    """Publish events in one transaction."""
    database.execute("SELECT sse_relay.publish(%s, d) FROM unnest(%s::text[]) AS d", (channel, list(data)))


def numbered(database: Database, count: int) -> None:
    """Wait until the log has that many events, and none waits to be numbered."""
    wait_until(
        lambda: (
            database.execute(
                "SELECT (SELECT count(*) FROM sse_relay.events), (SELECT count(*) FROM sse_relay.pending)"
            )
            == [(count, 0)]
        ),
        20,
        f"{count} events in the log",
    )


def newest(database: Database) -> str:
    """The position of the newest event."""
    ((position,),) = database.execute("SELECT sse_relay.position()")
    return str(position).partition("@")[0]


def before(position: str, count: int) -> str:
    """The position that many numbers earlier."""
    epoch, _, number = position.partition("-")
    return f"{epoch}-{int(number) - count}"


def gaps(reader: SseReader) -> list[str]:
    """The reasons of all gaps that a client was told of."""
    return [gap["reason"] for gap in reader.gaps]


def stream_name(channel: str, name: str | None, several: bool) -> str:
    """The name of an event as a stream of one channel, or of several, carries it."""
    return (f"{channel}:{name}" if name else channel) if several else name or "message"


def words(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


# ==== Relays and PostgreSQL that go and come back =============================


def test_a_relay_that_was_killed_leaves_no_gap(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    got: list[str] = []
    with SseReader(relay.url("a")) as reader:
        position = reader.wait_for_id()
    for turn in range(3):
        publish(log, "a", f"{turn} running")
        with SseReader(relay.url("a"), last_event_id=position) as reader:
            reader.wait_for_data(f"{turn} running")
            publish(log, "a", f"{turn} dying")
            relay.kill()
            reader.wait_for_end()
        publish(log, "a", f"{turn} dead")
        got += reader.data
        assert gaps(reader) == []
        position = reader.last_event_id
        relay = start_relay(*LOG, dsn=log.dsn, bind=relay.bind)
    with SseReader(relay.url("a"), last_event_id=position) as reader:
        reader.wait_for_data("2 dead")
        assert gaps(reader) == []
        got += reader.data
    assert got == [f"{turn} {what}" for turn in range(3) for what in ("running", "dying", "dead")]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.slow
def test_streams_outlive_postgresql_and_miss_nothing(
    own_server: Server, own_log: Database, start_relay: RelayStarter, mode: Any
) -> None:
    relay = start_relay(*LOG, dsn=own_log.dsn)
    with contextlib.ExitStack() as stack:
        open_before = stack.enter_context(SseReader(relay.url("a")))
        start = open_before.wait_for_id()
        publish(own_log, "a", "one", "two")
        open_before.wait_for_data("two")
        own_server.stop(mode)
        relay.wait_for_log("lost PostgreSQL")
        opened_meanwhile = stack.enter_context(SseReader(relay.url("a")))
        resuming = stack.enter_context(SseReader(relay.url("a"), last_event_id=start))
        assert opened_meanwhile.starts == []
        own_server.start()
        publish(own_log, "a", "three")
        # It begins when it is told so: what was numbered before is behind it.
        wait_until(lambda: opened_meanwhile.starts)
        publish(own_log, "a", "four")
        for reader, expected in (
            (open_before, ["one", "two", "three", "four"]),
            (opened_meanwhile, ["three", "four"][-len(opened_meanwhile.data) or -1 :]),
            (resuming, ["one", "two", "three", "four"]),
        ):
            reader.wait_for_data("four")
            assert reader.data == expected
            assert gaps(reader) == []
            assert not reader.ended


@pytest.mark.slow
def test_a_relay_that_starts_before_postgresql_resumes_its_clients(
    own_server: Server, own_log: Database, start_relay: RelayStarter
) -> None:
    first = start_relay(*LOG, dsn=own_log.dsn)
    with SseReader(first.url("a")) as reader:
        position = reader.wait_for_id()
    publish(own_log, "a", "one")
    numbered(own_log, 1)
    first.kill()
    own_server.stop()
    relay = start_relay(*LOG, dsn=own_log.dsn, wait=False)
    relay.wait_for_log("cannot reach PostgreSQL")
    with (
        SseReader(relay.url("a"), last_event_id=position) as resuming,
        SseReader(relay.url("a")) as fresh,
    ):
        own_server.start()
        publish(own_log, "a", "two")
        resuming.wait_for_data("two")
        assert resuming.data == ["one", "two"]
        assert gaps(resuming) == []
        # It opened before this relay knew where the log stood: it begins now, and is told so.
        wait_until(lambda: fresh.starts)
        assert gaps(fresh) == []


def test_a_terminated_backend_costs_nothing(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        for turn in range(4):
            publish(log, "a", f"{turn} before")
            assert log.terminate_backends() == 2
            publish(log, "a", f"{turn} after")
            reader.wait_for_data(f"{turn} after")
            wait_until(lambda: len(log.backends()) == 2)
        assert reader.data == [f"{turn} {when}" for turn in range(4) for when in ("before", "after")]
        assert gaps(reader) == []


@pytest.mark.slow
def test_a_frozen_connection_costs_nothing(log: Database, start_relay: RelayStarter) -> None:
    """Takes some 5 s: nothing tells of a frozen connection but a canary that stays away."""
    with FreezableProxy.before(log) as proxy:
        relay = start_relay(*LOG, dsn=proxy.dsn(log))
        with SseReader(relay.url("a")) as reader:
            start = reader.wait_for_id()
            publish(log, "a", "one")
            reader.wait_for_data("one")
            proxy.freeze()
            publish(log, "a", "two")
            relay.wait_for_log("lost PostgreSQL")
            with SseReader(relay.url("a"), last_event_id=start) as resuming:
                proxy.drop()
                proxy.thaw()
                publish(log, "a", "three")
                for each in (reader, resuming):
                    each.wait_for_data("three", 15)
                    assert each.data == ["one", "two", "three"]
                    assert gaps(each) == []


# ==== Another history =========================================================


class Standby(Server):
    """A streaming, asynchronous standby of a server, made by pg_basebackup.

    Args:
        primary: Its server.
        conninfo: How to reach it, for instance through a proxy.
    """

    def __init__(self, primary: Server, conninfo: str) -> None:
        super().__init__()
        self._primary, self._conninfo, self._password = primary, conninfo, primary._password

    def _prepare(self) -> None:
        super()._prepare()
        shutil.rmtree(self._data)
        # -R writes standby.signal and primary_conninfo.
        how = ["-d", self._conninfo, "-R", "-X", "stream", "-c", "fast"]
        self._primary._run("pg_basebackup", "-D", str(self._data), *how)


@pytest.fixture
def replicated(own_server: Server, own_log: Database) -> Iterator[tuple[FreezableProxy, Standby]]:
    """A standby of ``own_server``, and the proxy through which it follows."""
    if not (find_postgres() / "pg_basebackup").exists():
        harness.missing("needs pg_basebackup")
    with FreezableProxy.before(own_log) as proxy:
        conninfo = psycopg2.extensions.make_dsn(proxy.dsn(own_log), dbname="replication")
        with Standby(own_server, conninfo) as standby:
            wait_until(
                lambda: own_log.execute("SELECT state FROM pg_stat_replication") == [("streaming",)],
                what="replication",
            )
            yield proxy, standby


def lose_and_promote(
    primary: Server, replication: FreezableProxy, standby: Standby, reader: SseReader
) -> str:
    """Commit what the standby never gets, deliver it to a client, lose the primary, promote the standby.

    Returns:
        The position of a client that has seen what is lost.
    """
    publish(primary.database, "a", "kept")
    kept = reader.wait_for_data("kept").id
    wait_until(lambda: newest(standby.database) == kept, what="replication")
    replication.freeze()
    publish(primary.database, "a", "lost 1", "lost 2")
    position = reader.wait_for_data("lost 2").id
    primary.stop(signal.SIGQUIT)
    replication.drop()
    replication.refuse()
    replication.thaw()
    standby.database.execute("SELECT pg_promote()")
    return position


@pytest.mark.slow
def test_a_promoted_standby_is_another_history(
    own_server: Server,
    own_log: Database,
    replicated: tuple[FreezableProxy, Standby],
    start_relay: RelayStarter,
) -> None:
    with FreezableProxy.before(own_log) as proxy:
        relay = start_relay(*LOG, dsn=proxy.dsn(own_log))
        with SseReader(relay.url("a")) as reader:
            early = reader.wait_for_id()
            replication, standby = replicated
            late = lose_and_promote(own_server, replication, standby, reader)
            # More than was lost: comparing numbers alone would find nothing wrong.
            publish(standby.database, "a", *words("new", 5))
            standby_at = psycopg2.extensions.parse_dsn(standby.dsn)
            proxy.target = (standby_at["host"], int(standby_at["port"]))
            reader.wait_for(lambda event: event.event == "relay.gap")
            assert gaps(reader) == ["restart"]
            numbered(standby.database, 6)
            other = start_relay(*LOG, dsn=standby.dsn)
            for each in (relay, other):
                for position in (early, late):
                    with SseReader(each.url("a"), last_event_id=position) as resuming:
                        resuming.wait_for(lambda event: event.event == "relay.gap")
                        publish(standby.database, "a", "live")
                        resuming.wait_for_data("live")
                        assert gaps(resuming) == ["restart"]
            # What came after the gap, it has to the end.
            reader.wait_for(lambda event: reader.data.count("live") == 4)
            assert reader.data[:3] == ["kept", "lost 1", "lost 2"]
            assert gaps(reader) == ["restart"]


@pytest.mark.slow
def test_a_restored_dump_is_another_history(server: Server, start_relay: RelayStarter) -> None:
    dump, restore = find_postgres() / "pg_dump", find_postgres() / "pg_restore"
    if not (dump.exists() and restore.exists()):
        harness.missing("needs pg_dump and pg_restore")
    with server.fresh_database() as database:
        apply_schema(database.dsn)
        relay = start_relay(*LOG, dsn=database.dsn)
        with SseReader(relay.url("a")) as reader:
            early = reader.wait_for_id()
            publish(database, "a", "kept")
            reader.wait_for_data("kept")
            archive = subprocess.run(
                [dump, "--format=custom", "--dbname", database.dsn], stdout=subprocess.PIPE, check=True
            ).stdout
            publish(database, "a", "lost")
            late = reader.wait_for_data("lost").id
            database.close()
            name = psycopg2.extensions.parse_dsn(database.dsn)["dbname"]
            server.database.execute(f"DROP DATABASE {name} WITH (FORCE)")
            server.database.execute(f"CREATE DATABASE {name}")
            subprocess.run([restore, "--dbname", database.dsn], input=archive, check=True)
            reader.wait_for(lambda event: event.event == "relay.gap")
            publish(database, "a", "new", "newer")
            reader.wait_for_data("newer")
            assert reader.data == ["kept", "lost", "new", "newer"]
            assert gaps(reader) == ["restart"]
        for position in (early, late):
            with SseReader(relay.url("a"), last_event_id=position) as reader:
                reader.wait_for(lambda event: event.event == "relay.gap")
                assert gaps(reader) == ["restart"]
                assert reader.data == []


@pytest.mark.parametrize("cut", [False, True], ids=["connected", "reconnecting"])
def test_ids_that_went_back_are_another_history(
    log: Database, start_relay: RelayStarter, *, cut: bool
) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", *words("event", 10))
        position = reader.wait_for_data("event 9").id
        log.execute("DELETE FROM sse_relay.events WHERE id > 5")
        log.execute("SELECT setval('sse_relay.events_id_seq', 5)")
        if cut:
            log.terminate_backends()
        reader.wait_for(lambda event: event.event == "relay.gap")
        publish(log, "a", *words("new", 10))
        reader.wait_for_data("new 9")
        assert reader.data == words("event", 10) + words("new", 10)
        assert gaps(reader) == ["restart"]
    with SseReader(start_relay(*LOG, dsn=log.dsn).url("a"), last_event_id=position) as reader:
        reader.wait_for(lambda event: event.event == "relay.gap")
        assert gaps(reader) == ["restart"]


def test_a_truncated_log_is_another_history(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        start = reader.wait_for_id()
        publish(log, "a", "one", "two")
        reader.wait_for_data("two")
        log.execute("TRUNCATE sse_relay.pending, sse_relay.events RESTART IDENTITY")
        reader.wait_for(lambda event: event.event == "relay.gap")
        publish(log, "a", *words("new", 3))
        reader.wait_for_data("new 2")
        assert reader.data == ["one", "two", *words("new", 3)]
        assert gaps(reader) == ["restart"]
        with SseReader(relay.url("a"), last_event_id=start) as resuming:
            resuming.wait_for(lambda event: event.event == "relay.gap")
            assert resuming.data == []


# ==== What cannot be read, or is gone =========================================


def test_rows_hidden_by_row_level_security_are_no_silence(
    log: Database, start_relay: RelayStarter, make_role: Callable[[], str]
) -> None:
    role = make_role()
    for statement in grants("relay"):
        log.execute(statement + role)
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay(*LOG, "--admin", admin, dsn=as_role(log, role))

    def ready() -> int:
        return httpx.get(f"http://{admin}/ready").status_code

    wait_until(lambda: ready() == 200)
    with SseReader(relay.url("a")) as reader:
        position = reader.wait_for_id()
        for table in ("events", "settings", "epoch"):
            log.execute(f"ALTER TABLE sse_relay.{table} ENABLE ROW LEVEL SECURITY")
            publish(log, "a", f"hidden by {table}")
            wait_until(lambda: ready() == 503, what="the relay to see that it sees nothing")
            wait_until(lambda: "DISABLE ROW LEVEL SECURITY" in httpx.get(f"http://{admin}/ready").text)
            log.execute(f"ALTER TABLE sse_relay.{table} DISABLE ROW LEVEL SECURITY")
            reader.wait_for_data(f"hidden by {table}", 20)
            wait_until(lambda: ready() == 200)
        assert gaps(reader) == []
    with SseReader(relay.url("a"), last_event_id=position) as resuming:
        resuming.wait_for_data("hidden by epoch")
        assert resuming.data == [f"hidden by {table}" for table in ("events", "settings", "epoch")]


@pytest.mark.parametrize("count", [2, 8], ids=["behind", "beyond"])
def test_ids_that_restart_beside_a_running_relay_are_told(
    log: Database, start_relay: RelayStarter, count: int
) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", *words("event", 5))
        reader.wait_for_data("event 4")
        relay.suspend()
        log.execute("SET session_replication_role = replica; DELETE FROM sse_relay.events")
        log.execute("RESET session_replication_role; ALTER TABLE sse_relay.events ALTER COLUMN id RESTART")
        publish(log, "a", *words("new", count))
        with Session(log) as other:
            other.sweep()
        relay.resume()
        reader.wait_for(lambda event: event.event == "relay.gap")
        publish(log, "a", "last")
        reader.wait_for_data("last")
        assert gaps(reader) == ["restart"]


def test_a_client_behind_deleted_events_gets_a_gap(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*TABLE, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        start = reader.wait_for_id()
        publish(log, "a", *words("event", 100))
        middle = before(reader.wait_for_data("event 99").id, 40)
        log.execute("DELETE FROM sse_relay.events WHERE id <= 50")
        publish(log, "a", "last")
        reader.wait_for_data("last")
        assert gaps(reader) == []
    with SseReader(relay.url("a"), last_event_id=start) as reader:
        reader.wait_for(lambda event: event.event == "relay.gap")
        assert gaps(reader) == ["pruned"]
    with SseReader(relay.url("a"), last_event_id=middle) as reader:
        reader.wait_for_data("last")
        assert reader.data == [*words("event", 100)[60:], "last"]
        assert gaps(reader) == []


def test_a_damaged_event_is_stepped_over_and_told(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        relay.suspend()
        publish(log, "b", *words("before", 300))
        publish(log, "a", random.Random(1).randbytes(50_000).hex())
        with Session(log) as other:
            other.sweep()
        damage(log, "sse_relay.events")
        publish(log, "a", "after")
        relay.resume()
        reader.wait_for_data("after")
        assert [event.event for event in reader.events].index("relay.gap") < len(reader.events) - 1
        assert set(gaps(reader)) == {"failed"}
    assert "lost PostgreSQL" not in relay.log
    # A relay that starts finds it among those to remember.
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", "to the new one")
        reader.wait_for_data("to the new one")


def test_a_damaged_event_that_waits_to_be_numbered_is_told_to_all(
    log: Database, start_relay: RelayStarter
) -> None:
    relay, other = (start_relay(*LOG, dsn=log.dsn) for _ in range(2))
    with SseReader(relay.url("a")) as reader, SseReader(other.url("b")) as beside:
        start = reader.wait_for_id()
        beside.wait_for_id()
        for running in (relay, other):
            running.suspend()
        publish(log, "a", "before", random.Random(1).randbytes(50_000).hex(), "behind")
        damage(log, "sse_relay.pending")
        for running in (relay, other):
            running.resume()
        for each in (reader, beside):
            each.wait_for(lambda event: event.event == "relay.gap")
            assert gaps(each) == ["restart"]
        publish(log, "a", "one")
        present = reader.wait_for_data("one").id
    # Not told again by relays that find it on the way, but to whoever comes back from before.
    for running in (relay, other):
        running.kill()
    relay = start_relay(*LOG, dsn=log.dsn)
    for position, told in ((start, ["restart"]), (present, [])):
        with SseReader(relay.url("a"), last_event_id=position) as reader:
            reader.wait_for_id()
            publish(log, "a", "two")
            reader.wait_for_data("two")
            assert gaps(reader) == told
    assert log.execute("SELECT data FROM sse_relay.events ORDER BY id") == [
        (data,) for data in ("before", "behind", "one", "two", "two")
    ]
    assert "lost PostgreSQL" not in relay.log


def test_pruning_that_fails_ends_no_session(log: Database, start_relay: RelayStarter) -> None:
    log.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"
        " CREATE TRIGGER fail BEFORE UPDATE ON sse_relay.settings EXECUTE FUNCTION fail()"
    )
    publish(log, "a", "one", "two")
    with Session(log) as other:
        other.sweep()
    log.execute("UPDATE sse_relay.events SET created = created - interval '25 hours'")
    relay = start_relay(*LOG, dsn=log.dsn)
    relay.wait_for_log("was not pruned")
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", "three")
        reader.wait_for_data("three")
    assert "lost PostgreSQL" not in relay.log


@pytest.mark.slow
def test_a_lock_on_the_log_leaves_no_sessions_behind(log: Database, start_relay: RelayStarter) -> None:
    """Takes 40 s: three times the limit of a statement."""
    relay = start_relay(*LOG, dsn=log.dsn)
    most = 0
    with contextlib.closing(log.connect()) as locking, locking.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE sse_relay.events")
        publish(log, "a", "one")
        end = time.monotonic() + 40
        while time.monotonic() < end:
            most = max(most, sum(name == "sse-relay" for _, name, _ in log.backends()))
            time.sleep(0.2)
        cursor.execute("ROLLBACK")
    assert relay.log.count("lost PostgreSQL") >= 1
    assert most <= 4
    numbered(log, 1)


# ==== Notifications that lie or stay away =====================================


def test_a_stranger_cannot_reorder_or_disturb(
    log: Database, start_relay: RelayStarter, make_role: Callable[[], str]
) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    stranger = psycopg2.connect(as_role(log, make_role()))
    stranger.autocommit = True
    with contextlib.closing(stranger), SseReader(relay.url("a")) as reader, stranger.cursor() as cursor:
        reader.wait_for_id()
        for turn in range(20):
            # While the relay waits, the next transactions are named to it, in the wrong order.
            relay.suspend()
            ((next_xid,),) = log.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            cursor.execute(
                "SELECT pg_notify('sse_relay', x::text) FROM generate_series(%s, %s, -1) AS x",
                (next_xid + 5, next_xid - 2),
            )
            publish(log, "a", f"{turn} cause")
            publish(log, "a", f"{turn} effect")
            relay.resume()
            reader.wait_for_data(f"{turn} effect")
        for payload in (
            "", "0", "-1", "1e9", "x" * 7_999, "9" * 19, "9" * 20, "9" * 7_999, "\u0661\u0662", "1\n",
            "9223372036854775807", "18446744073709551616", "true", "{}", "'; DROP TABLE x", "\u2028",
        ):  # fmt: skip
            cursor.execute("SELECT pg_notify('sse_relay', %s)", (payload,))
        cursor.execute("SELECT pg_notify('sse_relay', n::text) FROM generate_series(1, 60000) AS n")
        publish(log, "a", "last")
        reader.wait_for_data("last", 20)
        pairs = [f"{turn} {what}" for turn in range(20) for what in ("cause", "effect")]
        assert reader.data == [*pairs, "last"]
        assert gaps(reader) == []
    assert "lost PostgreSQL" not in relay.log


class Answers:
    """In the place of the listener: answers the statements of a source, and notes them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.on_waiting: Callable[[], Coroutine[Any, Any, list[str] | None]] | None = None
        self.numbered_last = asyncio.Event()

    async def query(self, statement: str, values: Any = ()) -> list[tuple[Any, ...]]:
        self.asked.append((statement, values))
        if statement == sse_relay.LOG_WAITING_SQL:
            waiting = (await self.on_waiting() if self.on_waiting else None) or ["1", "2"]
            return [("1:9:", waiting, [7] * len(waiting), None, 0)]
        if statement == sse_relay.LOG_ADVANCE_SQL:
            if "99999" in values[0]:
                self.numbered_last.set()
            return [(0, False)]
        if statement == sse_relay.LOG_READ_SQL:
            return [("e", 0, *[None] * 6, values["id"], None, False)]
        if statement == sse_relay.LOG_ATTACH_SQL:
            return [("e", 0, 0, 0.0)]
        if statement == sse_relay.LOG_RECENT_SQL:
            return [(None,)]
        return []

    @property
    def numbered(self) -> list[str]:
        """Which transactions were to be numbered, in order, and where it was looked for more."""
        short: dict[str, Callable[[Any], list[str]]] = {
            sse_relay.LOG_WAITING_SQL: lambda _: ["sweep"],
            sse_relay.LOG_ADVANCE_SQL: lambda values: values[0],
        }
        return [
            name
            for statement, values in self.asked
            if statement in short
            for name in short[statement](values)
        ]


async def test_wake_ups_dropped_during_a_sweep_are_found_before_later_ones_are_numbered() -> None:
    source = sse_relay.LogSource(sse_relay.Hub(1 << 20, 15.0), sse_relay.Memory(1 << 20))
    answers = Answers()
    source.listener = answers  # type: ignore[assignment]  # all that it asks is `query`
    await source.connected()
    answers.asked.clear()

    notification: Any = psycopg2.extensions.Notify

    async def flood() -> list[str] | None:
        if len(answers.numbered) > 1:
            return ["100", "101"]
        for names in (range(100, 50_200), ["99999"]):
            await source.deliver([notification(7, "sse_relay", str(n)) for n in names], 0.0)
        return None

    answers.on_waiting = flood
    source._sweep_due = True
    serving = asyncio.create_task(source._read_on())
    async with asyncio.timeout(10):
        await answers.numbered_last.wait()
    serving.cancel()
    assert answers.numbered == ["sweep", "1", "2", "sweep", "100", "101", "99999"]


async def test_a_sign_out_during_the_first_reading_is_not_passed_over() -> None:
    """Another relay numbers it while this one fills its memory, which it does from the oldest on."""
    source = sse_relay.LogSource(sse_relay.Hub(1 << 20, 15.0), sse_relay.Memory(1 << 20))
    seen: list[str] = []
    source.on_revoked = lambda subject, stamp: seen.append(subject)

    class Late(Answers):
        async def query(self, statement: str, values: Any = ()) -> list[tuple[Any, ...]]:
            if statement == sse_relay.LOG_RECENT_SQL:
                return [(3,)]
            if statement == sse_relay.LOG_READ_SQL and values["id"] == 3:
                return [("e", 0, 5, 1, sse_relay.REVOCATION_CHANNEL, None, "user-7", 1.0, 5, None, False)]
            return await super().query(statement, values)

    source.listener = Late()  # type: ignore[assignment]  # all that it asks is `query`
    await source.connected()
    assert seen == ["user-7"]


async def test_a_statement_that_has_not_begun_is_not_run_for_a_stream_that_has_left() -> None:
    source = sse_relay.LogSource(sse_relay.Hub(1 << 20, 15.0), sse_relay.Memory(1 << 20))
    turn, run = asyncio.Event(), []

    class Busy(Answers):
        async def client_query(self, statement: str, values: Any, wanted: Callable[[], bool]) -> list[Any]:
            await turn.wait()
            if not wanted():
                raise sse_relay.LostConnectionError("no longer wanted")
            run.append(values["until"])
            return [("a", 0)]

    source.listener = Busy()  # type: ignore[assignment]  # all that it asks is `client_query`
    asking = [
        asyncio.create_task(source._replays._share("SELECT", {"until": until}, dict))
        for until in (1, 1, 2, 3, 3)
    ]
    await asyncio.sleep(0)
    for task in (asking[0], asking[2]):
        task.cancel()
    await asyncio.sleep(0)
    turn.set()
    assert await asyncio.gather(asking[1], *asking[3:]) == [{"a": 0}] * 3
    assert run == [1, 3]


def test_ids_that_restart_do_not_meet_those_of_sign_outs(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    log.execute("SELECT sse_relay.revoke('user-1')")
    wait_until(lambda: log.execute("SELECT id FROM sse_relay.revocations"))
    log.execute("TRUNCATE sse_relay.pending, sse_relay.events RESTART IDENTITY")
    log.execute("SELECT sse_relay.revoke('user-2')")
    with SseReader(relay.url("a")) as reader:
        wait_until(lambda: reader.starts)
        publish(log, "a", "later")
        reader.wait_for_data("later", 4)
    assert len(log.execute("SELECT id FROM sse_relay.revocations")) == 2
    assert log.execute("SELECT channel FROM sse_relay.pending") == []


def test_the_newest_events_are_found_behind_one_that_was_deleted(
    log: Database, start_relay: RelayStarter
) -> None:
    start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 100))
    numbered(log, 100)
    log.execute("DELETE FROM sse_relay.events WHERE id = (SELECT max(id) - 10 FROM sse_relay.events)")
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a", last="20")) as reader, SseReader(relay.url("b")) as other:
        reader.wait_for_data("event 99")
        assert reader.data == words("event", 100)[-10:]
        assert len(reader.starts) == 1
        assert gaps(reader) == []
        publish(log, "b", "still here")
        other.wait_for_data("still here")


@pytest.mark.slow
def test_an_event_without_a_notification_is_out_within_the_sweep_interval(
    log: Database, start_relay: RelayStarter
) -> None:
    """Takes up to the interval of some seconds."""
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        log.execute("INSERT INTO sse_relay.pending (channel, data) VALUES ('a', 'silent')")
        reader.wait_for_data("silent", SWEEP_INTERVAL + 2)


def test_what_was_published_while_no_relay_ran_is_numbered_in_order(
    log: Database, start_relay: RelayStarter
) -> None:
    with SseReader(start_relay(*LOG, dsn=log.dsn).url("a")) as reader:
        position = reader.wait_for_id()
    start_relay(*LOG, dsn=log.dsn).kill()
    log.terminate_backends()
    late, early = log.connect(), log.connect()
    with contextlib.closing(late), contextlib.closing(early), late.cursor() as cursor:
        cursor.execute("BEGIN; SELECT sse_relay.publish('a', 'began first')")
        with early.cursor() as other:
            other.execute("SELECT sse_relay.publish('a', 'committed first')")
        cursor.execute("SELECT sse_relay.publish('a', 'saw it'); COMMIT")
    with SseReader(start_relay(*LOG, dsn=log.dsn).url("a"), last_event_id=position) as reader:
        reader.wait_for_data("saw it")
        assert reader.data == ["committed first", "began first", "saw it"]


@pytest.mark.slow
def test_a_stopped_relay_holds_up_nobody(log: Database, start_relay: RelayStarter, seed: int) -> None:
    chance = random.Random(seed)
    stopped, running = (start_relay(*LOG, dsn=log.dsn) for _ in range(2))
    with SseReader(running.url("a")) as reader, SseReader(stopped.url("a")) as held_up:
        reader.wait_for_id(), held_up.wait_for_id()
        writer = log.connect()
        slowest = 0.0
        with contextlib.closing(writer), writer.cursor() as cursor:
            sent = 0
            for _ in range(15):
                until = time.monotonic() + chance.uniform(0, 0.1)
                suspended = False
                last = sent + 40
                while sent < last:
                    if not suspended and time.monotonic() > until:
                        suspended = True
                        stopped.suspend()
                    began = time.monotonic()
                    cursor.execute("SELECT sse_relay.publish('a', %s)", (str(sent),))
                    slowest = max(slowest, time.monotonic() - began)
                    sent += 1
                stopped.suspend()
                began = time.monotonic()
                cursor.execute("SELECT sse_relay.publish('a', %s)", (str(sent),))
                reader.wait_for_data(str(sent), 5)
                slowest = max(slowest, time.monotonic() - began)
                sent += 1
                stopped.resume()
        held_up.wait_for_data(str(sent - 1))
        for each in (reader, held_up):
            assert each.data == [str(number) for number in range(sent)]
            assert gaps(each) == []
        # Far below the sweep's interval and any timeout, far above what a busy machine takes.
        assert slowest < 3.0


@pytest.mark.slow
def test_an_open_transaction_holds_up_nobody(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    old = log.connect()
    with contextlib.closing(old), old.cursor() as cursor, SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        cursor.execute("BEGIN; SELECT sse_relay.publish('a', 'old')")
        # What can be cleaned up only when it has ended.
        log.execute(
            "BEGIN; INSERT INTO sse_relay.pending (channel, data) SELECT 'a', 'dead'"
            " FROM generate_series(1, 1000000); DELETE FROM sse_relay.pending WHERE data = 'dead'; COMMIT"
        )
        young = words("young", 20)
        for word in young:
            publish(log, "a", word)
            reader.wait_for_data(word, SWEEP_INTERVAL / 2)
        cursor.execute("COMMIT")
        reader.wait_for_data("old", SWEEP_INTERVAL / 2)
        assert reader.data == [*young, "old"]


# ==== Positions ===============================================================


def test_an_id_that_another_relay_has_read_already_is_waited_for(
    log: Database, start_relay: RelayStarter
) -> None:
    ahead = start_relay(*LOG, dsn=log.dsn)
    with FreezableProxy.before(log) as proxy, SseReader(ahead.url("a")) as reader:
        behind = start_relay(*LOG, dsn=proxy.dsn(log))
        reader.wait_for_id()
        proxy.freeze()
        publish(log, "a", "one")
        position = reader.wait_for_data("one").id
        with SseReader(behind.url("a"), last_event_id=position) as moved:
            publish(log, "a", "two")
            reader.wait_for_data("two")
            proxy.thaw()
            moved.wait_for_data("two")
            assert moved.data == ["two"]
            assert gaps(moved) == []
        assert "lost PostgreSQL" not in behind.log


def test_positions_that_lead_nowhere_are_told_so(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 3))
    numbered(log, 3)
    position = newest(log)
    for last_event_id, reason in (
        (before(position, -1000), "ahead"),
        (before(position, -(2**62)), "ahead"),
        ("0123456789ab-1", "restart"),
        ("garbage", "unreadable"),
        ("-1", "unreadable"),
    ):
        with SseReader(relay.url("a", "b"), last_event_id=last_event_id) as reader:
            assert reader.wait_for_id() == position
            assert reader.gaps == [{"channels": ["a", "b"], "reason": reason, "since": last_event_id}]
            publish(log, "b", "live")
            position = reader.wait_for_data("live").id
            assert reader.data == ["live"]


def test_a_position_before_what_was_pruned_gets_a_gap(log: Database, start_relay: RelayStarter) -> None:
    keeper = start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 30))
    numbered(log, 30)
    position = newest(log)
    log.execute(
        "UPDATE sse_relay.events SET created = created - interval '25 hours' WHERE id <= 20 OR id = 25"
    )
    keeper.kill()
    relay = start_relay(*TABLE, dsn=log.dsn)
    # A prefix goes, at the start, by the retention that is set from the beginning.
    wait_until(lambda: log.execute("SELECT min(id) FROM sse_relay.events") == [(21,)])
    numbered(log, 10)
    with SseReader(relay.url("a"), last_event_id=before(position, 11)) as reader:
        reader.wait_for(lambda event: event.event == "relay.gap")
        publish(log, "a", "live")
        reader.wait_for_data("live")
        assert gaps(reader) == ["pruned"]
        assert reader.data == ["live"]
    # Whoever has the last one that is gone misses nothing.
    with SseReader(relay.url("a"), last_event_id=before(position, 10)) as reader:
        reader.wait_for_data("live")
        assert gaps(reader) == []
        assert reader.data == [*words("event", 30)[20:], "live"]


def test_the_newest_event_outlives_every_retention(log: Database, start_relay: RelayStarter) -> None:
    first = start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 2_500))
    numbered(log, 2_500)
    position = newest(log)
    log.execute("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    first.kill()
    relay = start_relay(*LOG, dsn=log.dsn)
    numbered(log, 1)
    with SseReader(relay.url("a"), last_event_id=position) as reader:
        assert reader.wait_for_id() == position
        publish(log, "a", "live")
        reader.wait_for_data("live")
        assert gaps(reader) == []
    assert log.execute("SELECT sse_relay.prune()") == [(1,)]
    with SseReader(relay.url("a"), last_event_id=newest(log)) as reader:
        reader.wait_for_id()
        assert reader.events == []


def test_pruning_between_two_pages_is_told(log: Database, start_relay: RelayStarter) -> None:
    start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *(f"{number} " + "x" * 2_000 for number in range(5_000)))
    numbered(log, 5_000)
    first = before(newest(log), 5_000)
    relay = start_relay(*TABLE, dsn=log.dsn)
    # It takes next to nothing, so that the relay stops after the first page, or the second.
    headers = {"Accept": "text/event-stream", "Last-Event-ID": first}
    stalled = RawStream(relay.bind, relay.url("a"), headers=headers, receive_buffer=4096, reading=False)
    with stalled:
        wait_until(lambda: b"data: 0 x" in stalled.socket.recv(4096, socket.MSG_PEEK), what="the first page")
        log.execute("UPDATE sse_relay.settings SET retention = '1 microsecond'")
        while log.execute("SELECT sse_relay.prune()") != [(0,)]:
            pass
        stalled.read()
        body = stalled.wait_for(b"relay.gap")
        publish(log, "a", "live")
        body = stalled.wait_for(b"data: live")
    numbers = [int(number) for number in re.findall(rb"data: ([0-9]+) x", body)]
    assert numbers == list(range(len(numbers)))
    assert 100 <= len(numbers) < 4_999
    assert re.findall(rb'"reason": ?"([a-z-]+)"', body) == [b"pruned"]


def test_ten_thousand_events_are_resumed_and_one_more_is_not(
    log: Database, start_relay: RelayStarter
) -> None:
    start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 6_000))
    publish(log, "b", *words("event", 4_001))
    publish(log, "c", "not asked for")
    numbered(log, 10_002)
    relay = start_relay(*TABLE, dsn=log.dsn)
    start = before(newest(log), 10_002)
    with SseReader(relay.url("a", "b"), last_event_id=start) as reader:
        wait_until(lambda: gaps(reader))
        assert gaps(reader) == ["too-many"]
        assert reader.wait_for_id() == newest(log)
        assert reader.data == []
    urls = [relay.url("a", "b", lastEventId=before(start, -1))]
    with Crowd(relay.bind, urls) as crowd:
        # The stream's own position follows the last event.
        crowd.wait_for(b"id: %b\n\n" % newest(log).encode())
        assert crowd.received[0].count(b"data: event") == 10_000
        assert b"relay.gap" not in crowd.received[0]


@pytest.mark.slow
def test_64_mib_are_resumed_and_one_event_more_is_not(log: Database, start_relay: RelayStarter) -> None:
    start_relay(*LOG, dsn=log.dsn)
    for _ in range(65):
        log.execute("SELECT sse_relay.publish('a', repeat('x', 1048576))")
    numbered(log, 65)
    relay = start_relay(*TABLE, dsn=log.dsn)
    with SseReader(relay.url("a"), last_event_id=before(newest(log), 65)) as reader:
        reader.wait_for(lambda event: event.event == "relay.gap")
        assert gaps(reader) == ["too-many"]
        assert reader.data == []
    with Crowd(relay.bind, [relay.url("a", lastEventId=before(newest(log), 64))]) as crowd:
        # The stream's own position follows the last event.
        crowd.wait_for(b"id: %b\n\n" % newest(log).encode())
        assert crowd.received[0].count(b"data: xxx") == 64
        assert b"relay.gap" not in crowd.received[0]


def test_a_stream_of_several_channels_resumes_in_the_order_of_the_log(
    log: Database, start_relay: RelayStarter, seed: int
) -> None:
    chance = random.Random(seed)
    start_relay(*LOG, dsn=log.dsn)
    sent = [(chance.choice("abc"), chance.choice((None, "name", "a b", "message"))) for _ in range(2_500)]
    for start in range(0, len(sent), 100):
        log.execute(
            "SELECT sse_relay.publish(c, n::text, e)"
            " FROM unnest(%s::text[], %s::text[], %s::int[]) AS u (c, e, n)",
            (
                [channel for channel, _ in sent[start : start + 100]],
                [name for _, name in sent[start : start + 100]],
                list(range(start, start + 100)),
            ),
        )
    numbered(log, len(sent))
    relay = start_relay(*TABLE, dsn=log.dsn)
    start_position = before(newest(log), len(sent))
    # The newest of this channel is not the newest of all, so a full page may end before the others do.
    for channels in (("a", "b"), ("c", "a", "b"), ("b",)):
        with SseReader(relay.url(*channels), last_event_id=start_position) as reader:
            log.execute("SELECT sse_relay.publish('b', 'last', 'name')")
            reader.wait_for_data("last")
            expected = [
                (stream_name(channel, name, len(channels) > 1), str(number))
                for number, (channel, name) in enumerate(sent)
                if channel in channels
            ]
            got = [(event.event, event.data) for event in reader.events if event.data != "last"]
            assert got == expected
            ids = [int(event.id.partition("-")[2]) for event in reader.events]
            assert ids == sorted(set(ids))
            assert gaps(reader) == []


def test_what_a_page_shows_is_left_out_of_table_and_memory(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, "--memory", "64KiB", dsn=log.dsn)
    late = log.connect()
    page = log.connect()
    with (
        contextlib.closing(late),
        contextlib.closing(page),
        late.cursor() as cursor,
        page.cursor() as reading,
    ):
        cursor.execute("BEGIN; SELECT sse_relay.publish('a', 'began before')")
        relay.suspend()
        publish(log, "a", *words("shown", 200))
        reading.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT sse_relay.position()")
        ((position,),) = reading.fetchall()
        cursor.execute("COMMIT")
        publish(log, "a", "began after")
        relay.resume()
    with SseReader(relay.url("a", lastEventId=position)) as reader:
        reader.wait_for_data("began after")
        assert reader.data == ["began before", "began after"]
        seen = before(reader.events[0].id, 100)
    # As the client module opens anew: the snapshot of the page still counts.
    with SseReader(f"{relay.url('a', lastEventId=position)}&lastEventId={seen}") as reader:
        reader.wait_for_data("began after")
        assert reader.data == ["began before", "began after"]
    filler = words("x" * 500, 400)
    publish(log, "a", *filler)
    numbered(log, 602)
    with SseReader(relay.url("a", lastEventId=position)) as reader:
        reader.wait_for_data(filler[-1])
        assert reader.data == ["began before", "began after", *filler]
        assert gaps(reader) == []


# ==== Much at once ============================================================


@pytest.mark.slow
def test_a_transaction_of_50_000_events_holds_up_nobody(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    slowest = 0.0
    done = threading.Event()

    def publish_many() -> None:
        with contextlib.closing(log.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT sse_relay.publish('a', 'event ' || n) FROM generate_series(1, 50000) AS n")
        done.set()

    with Crowd(relay.bind, [relay.url("a"), relay.url("b")]) as crowd:
        crowd.wait_for(b"id: ")
        thread = threading.Thread(target=publish_many)
        thread.start()
        others = 0
        while not done.is_set() or b"data: event 50000\n" not in crowd.received[0]:
            began = time.monotonic()
            publish(log, "b", f"other {others}")
            slowest = max(slowest, time.monotonic() - began)
            others += 1
            assert others < 20_000, "the transaction does not arrive"
            time.sleep(0.005)
        thread.join(10)
        wait_until(lambda: f"other {others - 1}\n".encode() in crowd.received[1], 10, "the others' events")
        events = re.findall(rb"data: event ([0-9]+)\n", crowd.received[0])
        assert events == [b"%d" % number for number in range(1, 50_001)]
        assert crowd.received[0].count(b"relay.gap") == 1
    # Nobody's commit waits for it; a busy machine takes its share.
    assert slowest < 2.0


def test_an_event_holds_1_mib_and_no_byte_more(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    text = "é" * (2**19)
    with SseReader(relay.url("a")) as reader:
        start = reader.wait_for_id()
        publish(log, "a", text)
        wait_until(lambda: reader.data == [text], 10, "the large event")
    with SseReader(start_relay(*LOG, dsn=log.dsn).url("a"), last_event_id=start) as reader:
        wait_until(lambda: reader.data == [text], 10, "the large event from the table")
    with pytest.raises(psycopg2.errors.StringDataRightTruncation):
        publish(log, "a", text + "x")
    run = run_program("publish", *LOG, "--dsn", log.dsn, "a", input_=text + "x")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "1048577" in run.stderr
    assert run_program("publish", *LOG, "--dsn", log.dsn, "a", input_=text).returncode == 0
    numbered(log, 2)


def statements(server: Server) -> list[str]:
    """What relays had a server with ``log_statement=all`` run so far."""
    return [line for line in server.log.splitlines() if line.startswith("sse-relay ")]


@pytest.mark.parametrize("case", ["Last-Event-ID", "position()", "restarted"])
@pytest.mark.slow
def test_2000_clients_that_resume_from_memory_hardly_ask_postgresql(
    start_relay: RelayStarter, case: str
) -> None:
    raise_file_limit()
    with Server(log_statement="all", log_line_prefix="%a ") as server:
        log = server.database
        apply_schema(log.dsn)
        relay = start_relay(*LOG, dsn=log.dsn)
        ((position,),) = log.execute("SELECT sse_relay.position()")
        publish(log, "a", *words("event", 20))
        numbered(log, 20)
        if case != "position()":
            position = position.partition("@")[0]
        if case == "restarted":
            relay.kill()
            relay = start_relay(*LOG, dsn=log.dsn)
        quiet = len(statements(server))
        # They come at once: all are there before the relay takes the first.
        relay.suspend()
        with Crowd(relay.bind, [relay.url("a", lastEventId=position)] * 2_000) as crowd:
            relay.resume()
            crowd.wait_for(b"data: event 19\n", 40)
            asked = statements(server)[quiet:]
            assert all(data.count(b"data: event") == 20 for data in crowd.received)
        # What the relay asks for anyway, canary and sweep, is in it.
        assert len(asked) <= 20, asked


@pytest.mark.slow
def test_resuming_from_the_table_leaves_room_for_live_events(
    log: Database, start_relay: RelayStarter
) -> None:
    start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *words("event", 3_000))
    numbered(log, 3_000)
    start = before(newest(log), 3_000)
    relay = start_relay(*TABLE, dsn=log.dsn)
    wait_until(lambda: len(log.backends()) == 4)
    with SseReader(relay.url("live")) as live:
        live.wait_for_id()
        # Equal resumes would share their reads.
        epoch, first = start.rsplit("-", 1)
        starts = [f"{epoch}-{int(first) + number}" for number in range(60)]
        with Crowd(relay.bind, [relay.url("a", lastEventId=start) for start in starts]) as crowd:
            sent = during = 0
            while not all(b"data: event 2999\n" in data for data in crowd.received):
                publish(log, "live", str(sent))
                live.wait_for_data(str(sent), 5)
                during += not any(b"data: event 2999\n" in data for data in crowd.received)
                sent += 1
                # One connection serves them all.
                assert len(log.backends()) <= 5
            assert sent > 5
            for missed, data in enumerate(crowd.received):
                numbers = re.findall(rb"data: event ([0-9]+)\n", data)
                assert numbers == [b"%d" % number for number in range(missed, 3_000)]
                assert b"relay.gap" not in data


def test_who_leaves_in_the_middle_of_a_resume_costs_no_session(
    log: Database, start_relay: RelayStarter
) -> None:
    start_relay(*LOG, dsn=log.dsn).kill()
    log.execute("SELECT sse_relay.publish('a', n || repeat('x', 4000)) FROM generate_series(1, 3000) AS n")
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay(*TABLE, "--admin", admin, dsn=log.dsn)
    numbered(log, 3_000)
    ((first,),) = log.execute("SELECT min(id) - 1 FROM sse_relay.events")
    start = f"{newest(log).partition('-')[0]}-{first}"
    host, _, port = relay.bind.rpartition(":")
    with SseReader(relay.url("live")) as live:
        live.wait_for_id()
        for number in range(300):
            # Each asks for something else, so that each has a statement of its own.
            url = relay.url("a", lastEventId=before(start, -number))
            with socket.create_connection((host, int(port)), 10) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(harness.http_request(url))
                if number % 2:
                    assert client.recv(100)
                time.sleep(0.004 * (number % 4))
            if number % 50 == 0:
                publish(log, "live", str(number))
                live.wait_for_data(str(number))
        wait_until(lambda: harness.metric(admin, "clients") == 1, 20)
        assert live.gaps == []
    assert harness.metric(admin, "reconnects_total") == 0
    with Crowd(relay.bind, [relay.url("a", lastEventId=start)]) as crowd:
        crowd.wait_for(b"data: 3000x")


@pytest.mark.parametrize("case", ["memory", "table"])
@pytest.mark.slow
def test_equal_resumes_share_what_is_read(start_relay: RelayStarter, case: str) -> None:
    with Server(log_statement="all", log_line_prefix="%a ") as server:
        raise_file_limit()
        log = server.database
        apply_schema(log.dsn)
        start_relay(*LOG, dsn=log.dsn).kill()
        publish(log, "a", *(f"{number} {'x' * 3_000}" for number in range(200)))
        options = TABLE if case == "table" else (*LOG, "--memory", "200KiB")
        relay = start_relay(*options, dsn=log.dsn)
        numbered(log, 200)
        url = relay.url("a", lastEventId=before(newest(log), 200))
        quiet = len(server.log)
        relay.suspend()
        with Crowd(relay.bind, [url] * 400) as crowd:
            relay.resume()
            crowd.wait_for(b"data: 199 ", 60)
            asked = server.log[quiet:].count("FROM sse_relay.events AS e")
            for data in crowd.received:
                assert [int(n) for n in re.findall(rb"data: (\d+) x", data)] == list(range(200))
        # Three pages, each counted and read; again when what was shared has gone.
        assert 2 <= asked <= 60


@pytest.mark.parametrize(
    "memory",
    ["24KiB", pytest.param("0", marks=pytest.mark.slow), pytest.param("64MiB", marks=pytest.mark.slow)],
)
def test_the_newest_events_are_those_of_a_plain_query(
    log: Database, start_relay: RelayStarter, seed: int, memory: str
) -> None:
    chance = random.Random(seed)
    relays = [start_relay(*LOG, "--memory", memory, dsn=log.dsn) for _ in range(2)]
    channels = ["a", "b", "c", "d", "never"]
    history: list[tuple[str, str]] = []

    def send(channel: str) -> str:
        history.append((channel, f"{len(history)} {'x' * chance.choice([0, 900])}"))
        publish(log, *history[-1])
        return history[-1][1]

    for prune in (False, True):
        for _ in range(150):
            send(chance.choice("aaaabbcd"))
        wait_until(lambda: log.execute("SELECT count(*) FROM sse_relay.pending") == [(0,)])
        if prune:
            log.execute("UPDATE sse_relay.events SET created = created - interval '25 hours' WHERE id < 200")
            while log.execute("SELECT sse_relay.prune()") != [(0,)]:
                pass
        for _ in range(8):
            asked, last = chance.sample(channels, chance.randrange(1, 5)), chance.choice([1, 3, 50, 1_000])
            since = chance.choice([None, "another-5"])
            expected = log.execute(
                "SELECT channel, data FROM (SELECT id, channel, data, row_number() OVER ("
                " PARTITION BY channel ORDER BY id DESC) AS n FROM sse_relay.events WHERE channel = ANY(%s)"
                ") AS numbered WHERE n <= %s ORDER BY id",
                (asked, last),
            )
            # Memory may keep what the table no longer has.
            kept = [[event for event in history if event[0] == name][-last:] for name in asked]
            every = sorted(itertools.chain(*kept), key=history.index)
            relay = chance.choice(relays)
            with SseReader(relay.url(*asked, last=str(last)), last_event_id=since) as reader:
                reader.wait_for_id()
                live = send(asked[0])
                reader.wait_for_data(live)
                events = [event for event in reader.events if event.event != "relay.gap"]
                got = [(event.event, event.data) for event in events]
                assert got[:-1] in [
                    [(channel if len(asked) > 1 else "message", data) for channel, data in each]
                    for each in ((expected, every) if memory != "0" else (expected,))
                ]
                assert gaps(reader) == ([] if since is None else ["restart"])
                ids = [int(event.id.partition("-")[2]) for event in events]
                assert ids == sorted(set(ids))
                # Who comes back from any of them gets what follows, and nothing else.
                cut = chance.randrange(len(got))
                position = events[cut].id
            with SseReader(relay.url(*asked, last="5"), last_event_id=position) as again:
                again.wait_for_id()
                last_data = send(asked[0])
                again.wait_for_data(last_data)
                after = [data for channel, data in history if channel in asked]
                after = after[after.index(got[cut][1]) + 1 :]
                assert again.data == after or (gaps(again) == ["pruned"] and ids[cut] < 199)


@pytest.mark.slow
def test_a_channel_that_cannot_be_read_from_the_table_is_told_and_costs_no_session(
    own_server: Server, own_log: Database, start_relay: RelayStarter
) -> None:
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay(*TABLE, "--admin", admin, dsn=own_log.dsn)
    with SseReader(relay.url("live", "bad")) as reader:
        start = reader.wait_for_id()
        # Too long and too random to be kept in the row itself.
        publish(own_log, "bad", random.randbytes(100_000).hex())
        publish(own_log, "good", *words("good", 3))
        publish(own_log, "live", "before")
        reader.wait_for_data("before")
    ((toast,),) = own_log.execute(
        "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = 'sse_relay.events'::regclass"
    )
    relay.kill()
    own_server.stop()
    os.truncate(own_server._data / toast, 0)
    own_server.start()
    relay = start_relay(*TABLE, "--admin", admin, dsn=own_log.dsn, bind=relay.bind)
    with SseReader(relay.url("live")) as live:
        live.wait_for_id()
        with SseReader(relay.url("bad", "good"), last_event_id=start) as reader:
            reader.wait_for_data("good 2")
            assert reader.gaps == [{"channels": ["bad"], "reason": "failed", "since": start}]
            publish(own_log, "bad", "well again")
            reader.wait_for_data("well again")
            assert reader.data == [*words("good", 3), "well again"]
        publish(own_log, "live", "after")
        live.wait_for_data("after")
        assert live.gaps == []
    assert harness.metric(admin, "reconnects_total") == 0


@pytest.mark.slow
def test_a_slow_client_catches_up_with_a_busy_channel(log: Database, start_relay: RelayStarter) -> None:
    """Takes some 4 s: ten thousand events through a narrow link."""
    start_relay(*LOG, dsn=log.dsn)
    publish(log, "a", *(f"{number} {'x' * 200}" for number in range(9_500)))
    numbered(log, 9_500)
    start = before(newest(log), 9_500)
    relay = start_relay(*TABLE, dsn=log.dsn)
    host, port = relay.bind.split(":")
    stop = threading.Event()
    sent = 9_500

    def go_on() -> None:
        nonlocal sent
        with contextlib.closing(log.connect()) as connection, connection.cursor() as cursor:
            while not stop.wait(0.005):
                cursor.execute("SELECT sse_relay.publish('a', %s)", (f"{sent} {'y' * 1_000}",))
                sent += 1

    with FreezableProxy((host, int(port)), bytes_per_second=1_000_000) as link:
        address = f"127.0.0.1:{link.port}"
        publisher = threading.Thread(target=go_on)
        publisher.start()
        with Crowd(address, [f"http://{address}/events/a?lastEventId={start}"]) as crowd:
            try:
                wait_until(lambda: b"data: 9499 " in crowd.received[0], 30, "what it had missed")
            finally:
                stop.set()
                publisher.join(10)
            crowd.wait_for(b"data: %d " % (sent - 1))
            numbers = [int(number) for number in re.findall(rb"data: ([0-9]+) ", crowd.received[0])]
            assert numbers == list(range(sent))
            assert not crowd.ended
            assert b"relay.gap" not in crowd.received[0]
    assert sent > 9_600


# ==== The command line and the roles ==========================================


def run_program(*arguments: str, input_: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    return subprocess.run(
        [sys.executable, str(harness.PROGRAM), *arguments], input=input_, text=True, encoding="utf-8",
        capture_output=True, check=False, timeout=30, env=harness.clean_environment(),
    )  # fmt: skip


def refused(relay: Relay) -> str:
    """The one line that says why a relay ended at once, with status 1."""
    assert relay.wait() == 1
    *lines, error = relay.lines
    assert " ERROR PostgreSQL cannot be used: " in error, relay.log
    assert not [line for line in lines if "INFO" not in line and "WARNING" not in line], relay.log
    return error


def test_the_printed_schema_is_what_psql_runs(database: Database) -> None:
    psql = find_postgres() / "psql"
    if not psql.exists():
        harness.missing("needs psql")
    printed = run_program("schema")
    for _ in range(2):
        done = subprocess.run(
            [psql, "-X", "-v", "ON_ERROR_STOP=1", "-d", database.dsn], input=printed.stdout, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    publish(database, "a", "one")


def test_the_schema_is_applied_twice_and_keeps_everything(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    log.execute("UPDATE sse_relay.settings SET retention = '7 days'")
    with SseReader(relay.url("a")) as reader:
        start = reader.wait_for_id()
        publish(log, "a", "one")
        reader.wait_for_data("one")
        done = run_program("schema", "--apply", "--dsn", log.dsn)
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1  # that a superuser owns it
        publish(log, "a", "two")
        reader.wait_for_data("two")
        with SseReader(relay.url("a"), last_event_id=start) as resuming:
            resuming.wait_for_data("two")
            assert resuming.data == reader.data == ["one", "two"]
            assert gaps(reader) == gaps(resuming) == []
    assert log.execute("SELECT retention = '7 days' FROM sse_relay.settings") == [(True,)]


def test_a_database_without_the_log_is_named(database: Database, start_relay: RelayStarter) -> None:
    assert "run sse_relay.py schema --apply" in refused(start_relay(*LOG, dsn=database.dsn, wait=False))
    run = run_program("publish", *LOG, "--dsn", database.dsn, "a", "data")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "run sse_relay.py schema --apply" in run.stderr


@pytest.mark.parametrize(
    ("version", "advice"),
    [(SCHEMA_VERSION + 1, "install a newer sse-relay"), (SCHEMA_VERSION - 1, "schema --apply")],
)
def test_another_version_of_the_log_is_named(
    log: Database, start_relay: RelayStarter, version: int, advice: str
) -> None:
    log.execute("UPDATE sse_relay.settings SET version = %s", (version,))
    assert advice in refused(start_relay(*LOG, dsn=log.dsn, wait=False))
    done = run_program("schema", "--apply", "--dsn", log.dsn)
    if version > SCHEMA_VERSION:
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "newest sse_relay.py" in done.stderr
    else:
        assert done.returncode == 0
        start_relay(*LOG, dsn=log.dsn)


def grants(role: str) -> list[str]:
    """The statements of the docs' section on roles that give a role its rights."""
    section = pages.pages()["docs/log.md"].partition("\n## Roles\n")[2].partition("\n## ")[0]
    found = [
        statement.removesuffix(role)
        for statement in re.findall(r"GRANT [^;]*", section)
        if statement.endswith(f" {role}") and "publish_row" not in statement
    ]
    return list(dict.fromkeys(found))


def test_roles_with_exactly_the_grants_of_the_docs_are_enough(
    log: Database, start_relay: RelayStarter, make_role: Callable[[], str]
) -> None:
    app, relays = make_role(), make_role()
    assert len(grants("app")) == 3
    assert len(grants("relay")) == 3
    for name, role in (("app", app), ("relay", relays)):
        for statement in grants(name):
            log.execute(statement + role)
    relay = start_relay(*LOG, dsn=as_role(log, relays))
    with contextlib.closing(psycopg2.connect(as_role(log, app))) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT sse_relay.position()")
            ((position,),) = cursor.fetchall()
            cursor.execute("SELECT sse_relay.publish('a', 'text', 'name')")
            cursor.execute("SELECT sse_relay.publish('a', '{\"a\": 1}'::jsonb)")
            cursor.execute("SELECT sse_relay.revoke('user-7')")
        connection.commit()
        for forbidden in ("events", "pending", "settings", "epoch"):
            with connection.cursor() as cursor, pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(f"SELECT FROM sse_relay.{forbidden}")
            connection.rollback()
    assert run_program("publish", *LOG, "--dsn", as_role(log, app), "a", "last").returncode == 0
    with SseReader(relay.url("a", lastEventId=position)) as reader:
        reader.wait_for_data("last")
        assert reader.data == ["text", '{"a": 1}', "last"]
    # Retention is the relay's work too.
    log.execute("UPDATE sse_relay.events SET created = created - interval '25 hours'")
    start_relay(*LOG, dsn=as_role(log, relays))
    numbered(log, 1)


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_relay_without_its_grants_says_which(
    log: Database, start_relay: RelayStarter, make_role: Callable[[], str], lacking: int
) -> None:
    role = make_role()
    for number, statement in enumerate(grants("relay")):
        if number != lacking:
            log.execute(statement + role)
    advice = refused(start_relay(*LOG, dsn=as_role(log, role), wait=False)).partition(": run ")[2]
    log.execute(advice)
    start_relay(*LOG, dsn=as_role(log, role))


def test_who_may_not_publish_is_told_in_one_line(log: Database, make_role: Callable[[], str]) -> None:
    run = run_program("publish", *LOG, "--dsn", as_role(log, make_role()), "a", "data")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "permission denied for schema sse_relay" in run.stderr
