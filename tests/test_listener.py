"""The real relay and its two connections to PostgreSQL: LISTEN, and every way to lose them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2.extensions
import pytest

import harness
import sse_relay
from log_session import new_login

StartRelay = Callable[..., harness.Relay]

LISTEN = re.compile(r'(UN)?LISTEN "((?:[^"]|"")*)"')
CANARY = re.compile(r"sse_relay_canary_[0-9a-f]+")


@pytest.fixture(scope="module")
def logging_server() -> Iterator[harness.Server]:
    with harness.Server(log_statement="all", log_line_prefix="%p|%d|") as running:
        yield running


class Logged:
    """A database, and what a relay on it has said by the log of the server."""

    def __init__(self, server: harness.Server, database: harness.Database) -> None:
        self.database = database
        name = re.escape(psycopg2.extensions.parse_dsn(database.dsn)["dbname"])
        self._server = server
        self._statement = re.compile(rf"^(\d+)\|{name}\|LOG:  statement: ((?:UN)?LISTEN .*)$", re.MULTILINE)
        self._error = re.compile(rf"^\d+\|{name}\|ERROR:.*$", re.MULTILINE)

    @property
    def statements(self) -> list[tuple[int, str]]:
        """The backend's pid and the text of each statement with LISTEN or UNLISTEN, in order."""
        log = self._server.log
        assert not self._error.findall(log)
        found = self._statement.findall(log)
        assert not [text for _, text in found if LISTEN.sub("", text).strip("; ")]
        return [(int(pid), text) for pid, text in found]

    @property
    def channels(self) -> set[str]:
        """What the one backend that ever listened listens to now, its canary apart.

        pg_listening_channels() would show its own session's channels alone.
        """
        channels: set[str] = set()
        for stop, name in LISTEN.findall("".join(text for _, text in self.statements)):
            (channels.discard if stop else channels.add)(name.replace('""', '"'))
        assert len({pid for pid, _ in self.statements}) == 1
        (canary,) = filter(CANARY.fullmatch, channels)
        return channels - {canary}


@pytest.fixture
def logged(logging_server: harness.Server) -> Iterator[Logged]:
    with logging_server.fresh_database() as fresh:
        yield Logged(logging_server, fresh)


def relay_backends(database: harness.Database) -> list[int]:
    return [pid for pid, name, _ in database.backends() if name == "sse-relay"]


# ==== LISTEN ==================================================================


def test_500_clients_on_20_channels_take_two_backends_and_leave_nothing_behind(
    logged: Logged, start_relay: StartRelay
) -> None:
    database = logged.database
    relay = start_relay("--linger", "1", dsn=logged.database.dsn)
    channels = [f"channel {n}" for n in range(20)]
    with harness.Crowd(relay.bind, [relay.url(channels[n % 20]) for n in range(500)]) as crowd:
        crowd.wait_for(b"\nid: ")
        assert len(database.backends()) == 2
        assert logged.channels == set(channels)
        for channel in channels:
            database.notify(channel, f"for {channel}.")
        for number, channel in enumerate(channels):
            crowd.wait_for(f"data: for {channel}.\n\n".encode(), clients=slice(number, None, 20))
        assert all(data.count(b"data: for") == 1 for data in crowd.received)
        assert len(database.backends()) == 2
    harness.wait_until(lambda: not logged.channels, what="UNLISTEN of what nobody watches")
    assert len(database.backends()) == 2
    with harness.SseReader(relay.url(channels[0])) as reader:
        reader.wait_for_id()
        assert logged.channels == {channels[0]}


def test_channels_that_come_at_once_share_round_trips(logged: Logged, start_relay: StartRelay) -> None:
    relay = start_relay(dsn=logged.database.dsn)
    before = len(logged.statements)
    channels = {f"channel {n}" for n in range(64)}
    relay.suspend()
    with harness.Crowd(relay.bind, [relay.url(channel) for channel in channels]) as crowd:
        relay.resume()
        crowd.wait_for(b"\nid: ")
    assert logged.channels == channels
    assert len(logged.statements) - before <= 16


def test_a_client_that_comes_back_within_the_linger_finds_its_channel_listened_to(
    logged: Logged, start_relay: StartRelay
) -> None:
    relay = start_relay("--linger", "60", dsn=logged.database.dsn)
    with harness.SseReader(relay.url("orders")) as reader:
        position = reader.wait_for_id()
    before = len(logged.statements)
    logged.database.notify("orders", "meanwhile")
    with harness.SseReader(relay.url("orders"), last_event_id=position) as reader:
        reader.wait_for_data("meanwhile")
        assert [event.event for event in reader.events] == ["message"]
    assert len(logged.statements) == before


class Play:
    def __init__(self, max_channels: int) -> None:
        self.watched: set[str] = set()
        self.interest = sse_relay.Interest(self.watched, linger=60.0, max_channels=max_channels)

    def come(self, channels: str) -> None:
        self.interest.watch([channel for channel in channels if channel not in self.watched])
        self.watched.update(channels)
        self.interest.confirmed.update(channels)

    def go(self, channels: str, now: float) -> None:
        for channel in channels:
            self.watched.discard(channel)
            self.interest.abandon(channel, now)

    def refuse(self, *several: str) -> None:
        for channels in several:
            before = self.interest.wanted()
            with pytest.raises(sse_relay.RefusedError, match="too many channels") as refused:
                self.come(channels)
            assert refused.value.status == 503
            assert self.interest.wanted() == before


def test_which_channels_are_wanted_is_plain_reckoning() -> None:
    play = Play(max_channels=3)
    interest = play.interest
    for channel in "abc":
        play.come(channel)
    play.refuse("d")
    play.go("a", 10.0)
    play.go("b", 20.0)
    assert interest.wanted() == set("abc")
    play.come("a")
    interest.changed.clear()
    interest.expire(79.9)
    assert not interest.changed.is_set()
    # What lingers gives way to what is asked for.
    play.come("d")
    assert interest.wanted() == set("acd")
    play.go("d", 30.0)
    interest.expire(90.0)
    assert interest.wanted() == set("ac")
    assert interest.changed.is_set()
    interest.confirmed.discard("c")
    play.go("c", 95.0)
    assert interest.wanted() == set("a")


def test_from_half_of_the_channels_on_a_stream_brings_one_new_channel() -> None:
    play = Play(max_channels=10)
    play.come("abc")
    play.come("cdef")
    play.refuse("gh", "bgh")
    # Channels that only linger take nobody's place.
    play.go("abcdef", 0.0)
    for channels in ("xy", "abcd", "bg", "bh", "bi", "bj"):
        play.come(channels)
    play.refuse("k")
    assert play.interest.wanted() == set("abcdxyghij")


# ==== Loss ====================================================================


def expect_gap_and_later_events(
    reader: harness.SseReader, database: harness.Database, before: int = 0, timeout: float = 20.0
) -> None:
    """Publish until events arrive again; the first of them must be the gap."""

    def publish() -> list[str]:
        with contextlib.suppress(psycopg2.OperationalError):
            database.notify("orders", "later")
        assert not reader.ended, reader.error
        return reader.data[before:]

    harness.wait_until(publish, timeout, "events after the loss")
    gap = reader.events[before]
    assert gap.event == "relay.gap"
    assert json.loads(gap.data) == {"channels": ["orders"], "reason": "outage", "since": None}
    assert gap.id
    assert all(event.data == "later" for event in reader.events[before + 1 :])


@pytest.mark.slow
def test_streams_outlive_a_connection_that_is_frozen_for_15_seconds(
    database: harness.Database, start_relay: StartRelay
) -> None:
    # Fifteen seconds are what NAT tables and failing switches take; nothing shorter shows that
    # attempts to connect, which also freeze, do not hold up the streams.
    with harness.FreezableProxy.before(database) as proxy:
        relay = start_relay("--heartbeat", "1", dsn=proxy.dsn(database))
        with (
            harness.SseReader(relay.url("orders")) as reader,
            harness.RawStream(relay.bind, relay.url("orders")) as beats,
        ):
            reader.wait_for_id()
            beats.wait_for(b"\nid: ")
            database.notify("orders", "before")
            reader.wait_for_data("before")
            proxy.freeze()
            frozen = time.monotonic()
            relay.wait_for_log("lost PostgreSQL", 5)
            with harness.SseReader(relay.url("orders")) as newcomer:
                database.notify("orders", "lost")
                harness.wait_until(lambda: time.monotonic() > frozen + 15, 16)
                thawed = time.monotonic()
                proxy.thaw()

                def heard() -> list[str]:
                    database.notify("orders", "later")
                    return newcomer.data

                harness.wait_until(heard, 20, "events")
                # No gap but that of its start comes before.
                assert len(newcomer.starts) == 1
                assert {event.data for event in newcomer.events} == {"later"}
            expect_gap_and_later_events(reader, database, before=1)
            assert "lost" not in reader.data
        while_frozen = [when for when, _ in beats.received if frozen <= when <= thawed]
        pauses = [later - earlier for earlier, later in itertools.pairwise(while_frozen)]
        assert len(while_frozen) >= 10
        assert max(pauses) < 3
        harness.wait_until(lambda: len(relay_backends(database)) == 2, what="the end of old backends")


class StallingProxy(harness.FreezableProxy):
    """While `stalling` is set, a server is not heard any more once it has let a client in."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.stalling = threading.Event()
        self._released = threading.Event()
        super().__init__(target)

    def _pump(self, source: socket.socket, sink: socket.socket, *how: object) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                # ReadyForQuery, idle
                if self.stalling.is_set() and data.endswith(b"Z\0\0\0\5I"):
                    self._released.wait()
        harness.shut_down(sink, socket.SHUT_RDWR)

    def close(self) -> None:
        self._released.set()
        super().close()


@pytest.mark.slow
def test_a_server_that_freezes_right_after_the_login_is_given_up(
    database: harness.Database, start_relay: StartRelay
) -> None:
    # The first, blocking connection has ten seconds for its questions.
    with StallingProxy.before(database) as proxy:
        assert isinstance(proxy, StallingProxy)
        proxy.stalling.set()
        relay = start_relay(dsn=proxy.dsn(database), wait=False)
        harness.wait_until(lambda: proxy.connections)
        relay.wait_for_log("cannot reach PostgreSQL", 20)
        proxy.stalling.clear()
        relay.wait_for_log(harness.READY, 20)
    assert "Traceback" not in relay.log


@pytest.mark.slow
def test_a_relay_starts_without_postgresql_and_is_ready_when_it_comes(
    own_server: harness.Server, start_relay: StartRelay
) -> None:
    own_server.stop()
    relay = start_relay("--heartbeat", "1", dsn=own_server.dsn, wait=False)
    relay.wait_for_log("cannot reach PostgreSQL")
    assert harness.READY not in relay.log.split()
    with harness.RawStream(relay.bind, relay.url("orders")) as stream:
        stream.wait_for(b"retry: ")
        stream.wait_for(b"\n\n:\n:\n")
        assert b"id:" not in stream.body
        own_server.start()
        relay.wait_for_log(harness.READY, 10)
        stream.wait_for(b"event: relay.gap\nid: ")
        own_server.database.notify("orders", "first")
        body = stream.wait_for(b"data: first\n\n")
        assert body.index(b"relay.gap") < body.index(b"data: first")
        assert b'"reason":"start"' in body
    assert relay.stop() == 0


async def test_attempts_to_reconnect_come_within_five_seconds_and_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []

    async def fail() -> None:
        raise sse_relay.LostConnectionError("refused")

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 20:
            raise asyncio.CancelledError

    source = sse_relay.LogSource(sse_relay.Hub(1, 1.0), sse_relay.Memory(1))
    listener = sse_relay.Listener("dbname=x", source)
    monkeypatch.setattr(listener, "_session", fail)
    monkeypatch.setattr(asyncio, "sleep", wait)
    with pytest.raises(asyncio.CancelledError):
        await listener.run()
    assert waits[0] <= 0.1
    assert all(2.5 <= seconds <= 5.0 for seconds in waits[7:])
    assert [record.message for record in caplog.records] == [
        "cannot reach PostgreSQL, trying again until it is back: refused"
    ]


async def test_no_default_of_a_role_reaches_a_session(database: harness.Database) -> None:
    (name,) = database.execute("SELECT current_database()")[0]
    settings = re.findall(r"^ +\('(\w+)', '", sse_relay.SESSION_SQL, re.MULTILINE)
    hostile = {"synchronous_commit": "off", "search_path": "public"}
    for setting in ("search_path", *settings):
        with contextlib.suppress(psycopg2.errors.UndefinedObject):  # by older servers
            value = hostile.get(setting, "321")
            database.execute(f"ALTER ROLE postgres IN DATABASE {name} SET {setting} = '{value}'")
    database.close()
    connection = await sse_relay.open_connection(database.dsn, "SELECT")
    shown = "SELECT name, source, setting FROM pg_settings WHERE name IN ('search_path', %s)"
    rows = await sse_relay.execute(connection, shown.replace("%s", ", ".join(f"'{s}'" for s in settings)))
    sse_relay.close_connection(connection)
    assert {source for _, source, _ in rows} == {"session"}
    values = {name: value for name, _, value in rows}
    assert len(values) >= 11
    assert values["search_path"] == "pg_catalog, pg_temp"
    assert values["idle_session_timeout"] == "0"
    assert values["statement_timeout"] == "9500"


async def test_a_role_that_may_not_read_settings_gets_a_session(database: harness.Database) -> None:
    database.execute("REVOKE SELECT ON pg_settings FROM PUBLIC")
    connection = await sse_relay.open_connection(new_login(database, "reader").dsn, "SELECT")
    ((value,),) = await sse_relay.execute(connection, "SHOW statement_timeout")
    sse_relay.close_connection(connection)
    assert value == "9500ms"


async def test_a_statement_that_is_cancelled_on_the_server_ends_its_session(
    database: harness.Database,
) -> None:
    connection = await sse_relay.open_connection(database.dsn, "SELECT")
    task = asyncio.create_task(sse_relay.execute(connection, "SELECT pg_sleep(30)"))
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(30)'"
    await asyncio.to_thread(harness.wait_until, lambda: database.execute(cancel))
    with pytest.raises(sse_relay.LostConnectionError, match="cancelled on the server"):
        await task
    sse_relay.close_connection(connection)


async def test_a_cancellation_that_comes_with_the_answer_is_not_forgotten(
    database: harness.Database,
) -> None:
    # Python 3.11's asyncio.wait_for, which aiopg uses, loses it: SIGTERM then ended nothing.
    connection = await sse_relay.open_connection(database.dsn, "SELECT")
    task = asyncio.create_task(sse_relay.execute(connection, "SELECT pg_sleep(0.05)"))
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=os.dup(connection.raw.fileno())) as answered:

        def cancel() -> None:
            loop.remove_reader(answered)
            task.cancel()

        loop.add_reader(answered, cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
    sse_relay.close_connection(connection)


# ==== Databases that cannot work ==============================================


def expect_end(relay: harness.Relay, words: str) -> None:
    assert relay.wait(15) == 1
    assert words in relay.lines[-1]
    assert [line for line in relay.lines if " ERROR " in line] == [relay.lines[-1]]
    assert "Traceback" not in relay.log


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "WIN1252"])
def test_a_database_in_another_encoding_than_utf8_ends_it_at_the_first_connection(
    server: harness.Server, start_relay: StartRelay, encoding: str
) -> None:
    template = f"template0 ENCODING '{encoding}' LOCALE 'C'"
    with server.fresh_database(template=template) as database:
        expect_end(start_relay(dsn=database.dsn, wait=False), f"encoding is {encoding}")


@pytest.mark.slow
def test_a_hot_standby_at_the_first_connection_ends_it_and_later_does_not(
    own_server: harness.Server, start_relay: StartRelay
) -> None:
    relay = start_relay(dsn=own_server.dsn)
    with harness.SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        own_server.demote()
        relay.wait_for_log("lost PostgreSQL")
        expect_end(start_relay(dsn=own_server.dsn, wait=False), "hot standby")
        assert not reader.ended
        assert own_server.database.execute("SELECT pg_promote()") == [(True,)]
        expect_gap_and_later_events(reader, own_server.database)


# ==== Poolers =================================================================


def test_a_pooler_in_transaction_mode_is_named(
    database: harness.Database, start_relay: StartRelay, open_folder: Path
) -> None:
    with harness.pgbouncer(database, "transaction", open_folder) as dsn:
        expect_end(start_relay(dsn=dsn, wait=False), "pooler in transaction mode")


def test_a_pooler_in_session_mode_works(
    database: harness.Database, start_relay: StartRelay, open_folder: Path
) -> None:
    with harness.pgbouncer(database, "session", open_folder) as dsn:
        relay = start_relay(dsn=dsn)
        with harness.SseReader(relay.url("orders")) as reader:
            reader.wait_for_id()
            database.notify("orders", "through")
            reader.wait_for_data("through")
        relay.close()
