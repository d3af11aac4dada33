"""The durable log, from ``publish`` to the client: real relays on a real PostgreSQL.

Under stress it is tested by the soak of tests/simulation; the order of events, pages, positions and resumes
under every fault by the simulation itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg2
import psycopg2.extensions
import pytest

import harness
import sse_relay
from harness import Crowd, Database, Relay, Server, SseReader, wait_until
from log_session import GRANTS, Session, damage, new_login
from sse_relay import SWEEP_INTERVAL, apply_schema, find_postgres, raise_file_limit

LOG = ("--source", "log")
# Nothing that was missed is found in memory.
TABLE = (*LOG, "--memory", "0")
RelayStarter = Callable[..., Relay]


@pytest.fixture
def log(log_database: Database) -> Database:
    return log_database


@pytest.fixture
def own_log(own_server: Server) -> Database:
    apply_schema(own_server.database.dsn)
    return own_server.database


def publish(database: Database, channel: str, *data: str) -> None:
    """Publish events in one transaction."""
    database.execute("SELECT sse_relay.publish(%s, d) FROM unnest(%s::text[]) AS d", (channel, list(data)))


def numbered(database: Database, count: int) -> None:
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


def newest(database: Database, *, snapshot: bool = False) -> str:
    ((position,),) = database.execute("SELECT sse_relay.position()")
    return str(position) if snapshot else str(position).partition("@")[0]


def before(position: str, count: int) -> str:
    epoch, _, number = position.partition("-")
    return f"{epoch}-{int(number) - count}"


def gaps(reader: SseReader) -> list[str]:
    return [gap["reason"] for gap in reader.gaps]


def words(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


# ==== PostgreSQL goes and comes back, or is another ============================


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_streams_outlive_postgresql_and_miss_nothing(
    own_server: Server, own_log: Database, start_relay: RelayStarter, how: signal.Signals
) -> None:
    relay = start_relay(*LOG, dsn=own_log.dsn)
    with contextlib.ExitStack() as stack:
        open_before = stack.enter_context(SseReader(relay.url("a")))
        start = open_before.wait_for_id()
        publish(own_log, "a", "one", "two")
        open_before.wait_for_data("two")
        own_server.stop(how)
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


def test_a_promoted_standby_is_another_history(
    own_server: Server, own_log: Database, start_relay: RelayStarter
) -> None:
    relay = start_relay(*LOG, dsn=own_log.dsn)
    with SseReader(relay.url("a")) as reader:
        early = reader.wait_for_id()
        publish(own_log, "a", "kept")
        late = reader.wait_for_data("kept").id
        relay.suspend()
        own_server.demote()
        # A standby's snapshot does not list what runs. Then the history has no name until a relay connects.
        assert newest(own_server.database, snapshot=True) == late
        own_server.database.execute("SELECT pg_promote()")
        assert newest(own_server.database, snapshot=True).startswith(f"unknown-{late.partition('-')[2]}@")
        relay.resume()
        publish(own_server.database, "a", *words("new", 5))
        reader.wait_for(lambda event: event.event == "relay.gap")
        own_server.database.execute("CHECKPOINT")
        other = start_relay(*LOG, dsn=own_server.dsn)
        for each in (relay, other):
            for position in (early, late):
                with SseReader(each.url("a"), last_event_id=position) as resuming:
                    resuming.wait_for(lambda event: event.event == "relay.gap")
                    publish(own_server.database, "a", "live")
                    resuming.wait_for_data("live")
                    assert gaps(resuming) == ["restart"]
        reader.wait_for(lambda event: reader.data.count("live") == 4)
        assert gaps(reader) == ["restart"]


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


SILENTLY = (
    "SET session_replication_role = replica; DELETE FROM sse_relay.events; RESET session_replication_role; "
)
RESTART = "ALTER TABLE sse_relay.events ALTER COLUMN id RESTART"
# What happens to the log while the relay is stopped, and how many events are then numbered by another.
ENDS = {
    "ids went back": (
        "DELETE FROM sse_relay.events WHERE id > 2; SELECT setval('sse_relay.events_id_seq', 2)",
        0,
    ),
    "truncated": ("TRUNCATE sse_relay.pending, sse_relay.events RESTART IDENTITY", 0),
    "other events, not as many": (SILENTLY + RESTART, 2),
    "other events, more": (SILENTLY + RESTART, 8),
    "another epoch": ("SELECT sse_relay.renew_epoch()", 0),
}


@pytest.mark.parametrize("cut", [False, True], ids=["connected", "reconnecting"])
@pytest.mark.parametrize("how", ENDS)
def test_a_history_that_ends_is_told(
    log: Database, start_relay: RelayStarter, how: str, *, cut: bool
) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", *words("event", 5))
        position = reader.wait_for_data("event 4").id
        relay.suspend()
        statement, count = ENDS[how]
        log.execute(statement)
        if count:
            publish(log, "a", *words("other", count))
            with Session(log) as other:
                other.sweep()
        if cut:
            log.terminate_backends()
        relay.resume()
        reader.wait_for(lambda event: event.event == "relay.gap")
        publish(log, "a", *words("new", 3))
        reader.wait_for_data("new 2")
        assert (reader.data[:5], reader.data[-3:]) == (words("event", 5), words("new", 3))
        assert gaps(reader) == ["restart"]
    with SseReader(start_relay(*LOG, dsn=log.dsn).url("a"), last_event_id=position) as reader:
        reader.wait_for(lambda event: event.event == "relay.gap")
        assert gaps(reader) == ["restart"]


# ==== What cannot be read, or is gone ==========================================


def test_events_that_are_pruned_before_a_relay_has_read_them_are_told(
    log: Database, start_relay: RelayStarter
) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        publish(log, "a", "event")
        reader.wait_for_data("event")
        relay.suspend()
        publish(log, "a", *words("missed", 3))
        with Session(log) as other:
            other.sweep()
            other.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
            other.run("SELECT sse_relay.prune()")
        relay.resume()
        reader.wait_for_data("missed 2")  # the newest stays
        assert (reader.data, gaps(reader)) == (["event", "missed 2"], ["pruned"])


def test_rows_hidden_by_row_level_security_are_no_silence(log: Database, start_relay: RelayStarter) -> None:
    role = new_login(log, "relay", grants=GRANTS["relay"])
    relay = start_relay(*LOG, admin=True, dsn=role.dsn)

    def ready() -> int:
        return httpx.get(f"http://{relay.admin}/ready").status_code

    wait_until(lambda: ready() == 200)
    with SseReader(relay.url("a")) as reader:
        position = reader.wait_for_id()
        for table in ("events", "settings", "epoch"):
            log.execute(f"ALTER TABLE sse_relay.{table} ENABLE ROW LEVEL SECURITY")
            publish(log, "a", f"hidden by {table}")
            wait_until(lambda: ready() == 503, what="the relay to see that it sees nothing")
            wait_until(lambda: "DISABLE ROW LEVEL SECURITY" in httpx.get(f"http://{relay.admin}/ready").text)
            log.execute(f"ALTER TABLE sse_relay.{table} DISABLE ROW LEVEL SECURITY")
            reader.wait_for_data(f"hidden by {table}", 20)
            wait_until(lambda: ready() == 200)
        assert gaps(reader) == []
    with SseReader(relay.url("a"), last_event_id=position) as resuming:
        resuming.wait_for_data("hidden by epoch")
        assert resuming.data == [f"hidden by {table}" for table in ("events", "settings", "epoch")]


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
            publish(log, "a", f"then {told}")
            reader.wait_for_data(f"then {told}")
            assert gaps(reader) == told
    # What is repaired is numbered by the next relay that connects.
    log.execute("INSERT INTO sse_relay.pending (pid, channel, data) VALUES (0, 'a', 'repaired')")
    log.execute("UPDATE sse_relay.pending SET pid = 1 WHERE data = 'repaired'")
    start_relay(*LOG, dsn=log.dsn)
    expected = ["before", "behind", "one", "then ['restart']", "then []", "repaired"]
    events = "SELECT data FROM sse_relay.events ORDER BY id"
    wait_until(lambda: [data for (data,) in log.execute(events)] == expected)
    assert "lost PostgreSQL" not in relay.log


def test_what_cannot_be_read_from_the_table_is_told_once_hides_no_other_channel_and_costs_no_session(
    own_server: Server, own_log: Database, start_relay: RelayStarter
) -> None:
    relay = start_relay(*TABLE, dsn=own_log.dsn)
    with SseReader(relay.url("live")) as live:
        start = live.wait_for_id()
    unindexed = "a" * 10
    for channel in (unindexed, "b" * 10):
        publish(own_log, channel, *words("event", 1_000))
    # Too long and too random to be kept in the row itself.
    publish(own_log, "odd", random.randbytes(100_000).hex())
    publish(own_log, "good", *words("good", 3))
    numbered(own_log, 2_004)
    ((toast, path),) = own_log.execute(
        "REINDEX TABLE sse_relay.events; CHECKPOINT; SELECT pg_relation_filepath(reltoastrelid),"
        " pg_relation_filepath('sse_relay.events_channel_id')"
        " FROM pg_class WHERE oid = 'sse_relay.events'::regclass"
    )
    relay.kill()
    own_server.stop()
    os.truncate(own_server._data / toast, 0)
    index = own_server._data / path
    pages = bytearray(index.read_bytes())
    for page in range(8_192, len(pages), 8_192):
        # The flags at the end of a page of a B-tree: 1 is a leaf.
        if pages[page + 8_188] & 1 and unindexed.encode() in pages[page : page + 8_192]:
            pages[page : page + 8_192] = bytes(8_192)
    index.write_bytes(pages)
    own_server.start()
    relay = start_relay(*TABLE, admin=True, dsn=own_log.dsn)
    url = relay.url(unindexed, "odd", "good")
    with SseReader(relay.url("live")) as live, SseReader(url, last_event_id=start) as reader:
        live.wait_for_id()
        reader.wait_for_data("good 2")
        assert sorted(channel for gap in reader.gaps for channel in gap["channels"]) == [unindexed, "odd"]
        assert {(gap["reason"], gap["since"]) for gap in reader.gaps} == {("failed", start)}
        publish(own_log, "odd", "well again")
        reader.wait_for_data("well again")
        assert reader.data == [*words("good", 3), "well again"]
        publish(own_log, "live", "after")
        live.wait_for_data("after")
        assert live.gaps == []
    assert harness.metric(relay.admin, "reconnects_total") == 0


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


def test_a_lock_on_the_log_leaves_no_sessions_behind(log: Database, start_relay: RelayStarter) -> None:
    """Takes 25 s: twice the limit of a statement."""
    relay = start_relay(*LOG, dsn=log.dsn)
    most = 0
    with contextlib.closing(log.connect()) as locking, locking.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE sse_relay.events")
        publish(log, "a", "one")
        end = time.monotonic() + 25
        while time.monotonic() < end:
            most = max(most, sum(name == "sse-relay" for _, name, _ in log.backends()))
            time.sleep(0.2)
        cursor.execute("ROLLBACK")
    assert relay.log.count("lost PostgreSQL") >= 1
    assert most <= 4
    numbered(log, 1)


# ==== Notifications that lie or stay away ======================================


def test_a_stranger_cannot_reorder_or_disturb(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    stranger = new_login(log, "stranger")
    with contextlib.closing(stranger), SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        for turn in range(20):
            # While the relay waits, the next transactions are named to it, in the wrong order.
            relay.suspend()
            ((next_xid,),) = log.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            stranger.execute(
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
            stranger.notify("sse_relay", payload)
        stranger.execute("SELECT pg_notify('sse_relay', n::text) FROM generate_series(1, 60000) AS n")
        publish(log, "a", "last")
        reader.wait_for_data("last", 20)
        pairs = [f"{turn} {what}" for turn in range(20) for what in ("cause", "effect")]
        assert reader.data == [*pairs, "last"]
        assert gaps(reader) == []
    assert "lost PostgreSQL" not in relay.log


def test_an_event_without_a_notification_is_out_within_the_sweep_interval(
    log: Database, start_relay: RelayStarter
) -> None:
    """Takes up to the interval of some seconds."""
    relay = start_relay(*LOG, dsn=log.dsn)
    with SseReader(relay.url("a")) as reader:
        reader.wait_for_id()
        log.execute("INSERT INTO sse_relay.pending (channel, data) VALUES ('a', 'silent')")
        reader.wait_for_data("silent", SWEEP_INTERVAL + 2)


def test_a_stopped_relay_holds_up_nobody(log: Database, start_relay: RelayStarter) -> None:
    stopped, running = (start_relay(*LOG, dsn=log.dsn) for _ in range(2))
    with SseReader(running.url("a")) as reader, SseReader(stopped.url("a")) as held_up:
        reader.wait_for_id(), held_up.wait_for_id()
        sent, slowest = 0, 0.0
        for _ in range(15):
            stop = threading.Timer(random.uniform(0, 0.1), stopped.suspend)
            stop.start()
            last = False
            while not last:
                last = not stop.is_alive()
                began = time.monotonic()
                publish(log, "a", str(sent))
                if last:
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


async def test_a_statement_that_has_not_begun_is_not_run_for_a_stream_that_has_left() -> None:
    source = sse_relay.LogSource(sse_relay.Hub(1 << 20, 15.0), sse_relay.Memory(1 << 20))
    turn, run = asyncio.Event(), []

    class Busy:
        async def client_query(self, statement: str, values: Any, wanted: Callable[[], bool]) -> list[Any]:
            await turn.wait()
            if not wanted():
                raise sse_relay.LostConnectionError("no longer wanted")
            run.append(values["until"])
            return [("a", values["until"] - 1)]

    source.listener = Busy()  # type: ignore[assignment]  # all that it asks is `client_query`

    def ask(until: int) -> asyncio.Task[sse_relay.Page]:
        return asyncio.create_task(source.fetch(sse_relay.Cursor("", until, last=1), ["a"], 1_000))

    asking = [ask(until) for until in (1, 1, 2, 3, 3)]
    await asyncio.sleep(0)
    for task in (asking[0], asking[2]):
        task.cancel()
    await asyncio.sleep(0)
    turn.set()
    pages = await asyncio.gather(asking[1], *asking[3:])
    assert [page.cursor.after("a") for page in pages] == [0, 2, 2]
    assert run == [1, 3]


class Table:
    """A listener whose table holds one event of each channel, below what memory covers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken = False
        self.source = sse_relay.LogSource(sse_relay.Hub(1 << 20, 15.0), memory := sse_relay.Memory(1 << 20))
        self.source.listener = self  # type: ignore[assignment]  # all that it asks is `client_query`
        self.source.epoch, self.source.number = "e", 100
        memory.begin_all(50)

    async def client_query(self, statement: str, values: Any, wanted: Callable[[], bool]) -> list[Any]:
        await asyncio.sleep(0)
        if self.broken:
            raise psycopg2.errors.lookup("58030")("could not read block 1: Input/output error")
        (channel,) = values["channels"]
        self.asked.append(channel)
        return [("e", 0, 10, 1, channel, None, "x" * 10_000)]

    async def open(self, channel: str) -> sse_relay.Page:
        """Return the first page of a stream that has seen event 5."""
        cursor = sse_relay.Cursor("e", 5, counted=True)
        page = self.source.page(cursor, (channel,), 1 << 18)
        return page or await self.source.fetch(cursor, (channel,), 1 << 18)


async def test_each_of_many_places_is_read_once_whatever_the_order_of_the_streams() -> None:
    table = Table()
    names = [f"c{number}" for number in range(3 * sse_relay.MAX_SHARED)]
    pages = await asyncio.gather(*(table.open(name) for _ in range(3) for name in names))
    assert {page.events for page in pages} == {1}
    assert sorted(table.asked) == sorted(names)


async def test_what_was_read_for_others_is_not_kept_beyond_its_bound() -> None:
    table = Table()
    for number in range(3 * sse_relay.MAX_SHARED):
        assert (await table.open(f"c{number}")).events == 1
    await asyncio.sleep(0)
    gc.collect()
    kept = [each for each in gc.get_objects() if isinstance(each, sse_relay.Found)]
    assert len(kept) <= sse_relay.MAX_SHARED


async def test_an_error_of_the_disk_that_has_passed_is_told_to_no_newcomer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse_relay, "SHARE_TIME", 0.01)
    table = Table()
    table.broken = True
    assert (await table.open("a")).gaps == {"a": "failed"}
    # The next one asks while that is at hand, the one after it when it is not.
    assert (await table.open("a")).gaps == {"a": "failed"}
    await asyncio.sleep(0.05)
    table.broken = False
    page = await table.open("a")
    assert (page.gaps, page.events) == ({}, 1)


# ==== Positions, and much at once ==============================================


@pytest.mark.parametrize(
    ("most", "published"),
    [
        (10_000, [("a", words("event", 6_000)), ("b", words("event", 4_001)), ("c", ["not asked for"])]),
        (64, [("a", ["event" + "x" * (2**20 - 5)])] * 65),
    ],
    ids=["10,000 events", "64 MiB"],
)
def test_so_much_is_resumed_and_one_event_more_is_not(
    log: Database, start_relay: RelayStarter, most: int, published: list[tuple[str, list[str]]]
) -> None:
    start_relay(*LOG, dsn=log.dsn)
    for channel, data in published:
        publish(log, channel, *data)
    count = sum(len(data) for _, data in published)
    numbered(log, count)
    relay = start_relay(*TABLE, dsn=log.dsn)
    start = before(newest(log), count)
    for position, reason in ((start, "too-many"), (before(newest(log), -1_000), "ahead")):
        with SseReader(relay.url("a", "b"), last_event_id=position) as reader:
            reader.wait_for(lambda event: event.event == "relay.gap")
            assert gaps(reader) == [reason]
            assert reader.wait_for_id() == newest(log)
            assert reader.data == []
    with Crowd(relay.bind, [relay.url("a", "b", lastEventId=before(start, -1))]) as crowd:
        # The stream's own position follows the last event.
        crowd.wait_for(b"id: %b\n\n" % newest(log).encode())
        assert crowd.received[0].count(b"data: event") == most
        assert b"relay.gap" not in crowd.received[0]


def test_a_transaction_of_50_000_events_holds_up_nobody(log: Database, start_relay: RelayStarter) -> None:
    relay = start_relay(*LOG, dsn=log.dsn)
    slowest, others = 0.0, 0
    statement = "SELECT sse_relay.publish('a', 'event ' || n) FROM generate_series(1, 50000) AS n"
    with Crowd(relay.bind, [relay.url("a"), relay.url("b")]) as crowd, ThreadPoolExecutor(1) as pool:
        crowd.wait_for(b"id: ")
        many = pool.submit(Database(log.dsn).execute, statement)
        while not many.done() or b"data: event 50000\n" not in crowd.received[0]:
            began = time.monotonic()
            publish(log, "b", f"other {others}")
            slowest = max(slowest, time.monotonic() - began)
            others += 1
            assert others < 20_000, "the transaction does not arrive"
            time.sleep(0.005)
        crowd.wait_for(f"other {others - 1}\n".encode(), clients=slice(1, 2))
        events = re.findall(rb"data: event ([0-9]+)\n", crowd.received[0])
        assert events == [b"%d" % number for number in range(1, 50_001)]
        assert crowd.received[0].count(b"relay.gap") == 1
    # Nobody's commit waits for it; a busy machine takes its share.
    assert slowest < 2.0


def test_an_event_holds_1_mib_and_no_byte_more(log: Database) -> None:
    text = "é" * (2**19)
    run = run_program("publish", *LOG, "--dsn", log.dsn, "a", input_=text + "x")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "1048577" in run.stderr
    assert run_program("publish", *LOG, "--dsn", log.dsn, "a", input_=text).returncode == 0
    assert log.execute("SELECT data FROM sse_relay.pending") == [(text,)]


@pytest.mark.parametrize(
    ("clients", "size", "options", "restarted", "most"),
    [
        # What the relay asks for anyway, canary and sweep, is in it.
        (2_000, 10, [], False, 20),
        (2_000, 10, [], True, 20),
        # Half of it is in memory, the other in three pages, counted and read; again when what was shared
        # has gone.
        (400, 3_000, ["--memory", "400KiB"], True, 60),
    ],
    ids=["from a page", "after a restart", "from the table"],
)
def test_many_that_resume_at_once_hardly_ask_postgresql(
    start_relay: RelayStarter, clients: int, size: int, options: list[str], *, restarted: bool, most: int
) -> None:
    raise_file_limit()
    with Server(log_statement="all", log_line_prefix="%a ") as server:
        log = server.database
        apply_schema(log.dsn)
        relay = start_relay(*LOG, *options, dsn=log.dsn)
        ((position,),) = log.execute("SELECT sse_relay.position()")
        publish(log, "a", *(f"{number} {'x' * size}" for number in range(200)))
        numbered(log, 200)
        if restarted:
            position = position.partition("@")[0]
            relay.kill()
            relay = start_relay(*LOG, *options, dsn=log.dsn)
        quiet = len(server.log)
        # They come at once: all are there before the relay takes the first.
        relay.suspend()
        with Crowd(relay.bind, [relay.url("a", lastEventId=position)] * clients) as crowd:
            relay.resume()
            crowd.wait_for(b"data: 199 x", 60)
            asked = re.findall(r"^sse-relay .*", server.log[quiet:], re.MULTILINE)
            for data in crowd.received:
                assert [int(n) for n in re.findall(rb"data: (\d+) x", data)] == list(range(200))
        assert len(asked) <= most, asked


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


# ==== The command line and the roles ===========================================


def run_program(*arguments: str, input_: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(harness.PROGRAM), *arguments], input=input_, text=True, encoding="utf-8",
        capture_output=True, check=False, timeout=30, env=harness.clean_environment(),
    )  # fmt: skip


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
