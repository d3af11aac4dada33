"""The SQL of the durable log, against a real PostgreSQL: no relay, no HTTP.

``PGBIN`` chooses the PostgreSQL; all of it holds from 13 to 18. What relays ask, and what they get, is also
compared call by call with the model of tests/simulation.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.errors
import psycopg2.extensions
import pytest

from harness import Database, Server, wait_until
from log_session import (
    GRANTS,
    Row,
    Session,
    apply,
    new_role,
)
from sse_relay import (
    LOG_ADVANCE_SQL,
    LOG_ATTACH_SQL,
    LOG_CHANNEL,
    LOG_EXCESS_SQL,
    LOG_GRANTS_SQL,
    LOG_LAST_SQL,
    LOG_LIMITS_SQL,
    LOG_PRUNE_SQL,
    LOG_PUBLISH_SQL,
    LOG_REPLAY_SIZE_SQL,
    LOG_REPLAY_SQL,
    LOG_REVOCATIONS_SQL,
    LOG_VERSION_SQL,
    LOG_WAITING_SQL,
    SCHEMA_SQL,
    SCHEMA_VERSION,
    Snapshot,
    UnusableDatabaseError,
    apply_schema,
    check_log,
    parse_position,
)


@pytest.fixture
def log(log_database: Database) -> Iterator[Session]:
    with Session(log_database) as session:
        yield session


def parse(position: str) -> tuple[int, Snapshot]:
    found = parse_position(position)
    assert found is not None
    assert found.snapshot is not None
    return found.number, found.snapshot


# ---------------------------------------------------------------- the script


def test_applying_again_keeps_events_settings_epoch_and_grants(log: Session, database: Database) -> None:
    app = new_role(database, "app")
    log.run(f'GRANT EXECUTE ON FUNCTION sse_relay.position() TO "{app}"')
    log.run("UPDATE sse_relay.settings SET retention = '7 days', pruned = 3")
    log.publish("numbered")
    log.sweep()
    log.publish("waiting")

    def state() -> list[list[Row]]:
        return [
            log.run(f"SELECT * FROM sse_relay.{table}")
            for table in ("settings", "epoch", "pending", "events")
        ] + [log.run("SELECT proname, proacl::text FROM pg_proc WHERE proname = 'position'")]

    before = state()
    apply(database)
    apply(database)
    assert state() == before
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION


def test_many_that_apply_at_once_do_not_collide(database: Database) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: apply_schema(database.dsn), range(12)))
    assert database.execute("SELECT count(*) FROM sse_relay.epoch WHERE epoch IS NOT NULL") == [(1,)]


def test_a_newer_version_is_left_alone(log: Session, database: Database) -> None:
    log.run("UPDATE sse_relay.settings SET version = version + 1")
    older = rf"has version {SCHEMA_VERSION + 1}, this script is older \(version {SCHEMA_VERSION}\)"
    with pytest.raises(psycopg2.Error, match=older):
        apply(database)
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION + 1
    assert f"durable log of sse-relay, version {SCHEMA_VERSION}." in SCHEMA_SQL
    assert SCHEMA_SQL.isascii()  # whatever a terminal or an editor makes of it


def test_applying_needs_create_on_the_database_and_the_schemas_owner(database: Database) -> None:
    owner, other, member = (new_role(database, kind) for kind in ("owner", "other", "member"))
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        apply(database, owner)
    name = database.connect().info.dbname
    database.execute(
        f'GRANT CREATE ON DATABASE {name} TO "{owner}", "{other}"; GRANT "{owner}" TO "{member}"'
    )
    for role in (owner, owner, member):
        apply(database, role)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match=f"belongs to {owner}"):
        apply(database, other)


def test_a_database_in_another_encoding_is_refused(server: Server) -> None:
    latin = "template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    with (
        server.fresh_database(template=latin) as database,
        pytest.raises(psycopg2.errors.FeatureNotSupported, match="UTF8, this one is in LATIN1"),
    ):
        apply(database)


def test_public_has_nothing_and_every_function_pins_its_search_path(log: Session) -> None:
    assert log.run(LOG_EXCESS_SQL) == []
    functions = log.run(
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'sse_relay'::regnamespace"
    )
    assert len(functions) > 10
    assert [name for name, settings in functions if "search_path=pg_catalog, pg_temp" not in settings] == []


# ---------------------------------------------------------------- roles


# What each role is for, in statements of its own; and the SELECT without which they would be empty.
USES: dict[str, list[str]] = {
    "application": [
        "SELECT sse_relay.publish('orders', 'x')",
        "SELECT sse_relay.publish('orders', '{}'::jsonb)",
        "SELECT sse_relay.publish('orders', '{}'::json)",
        "SELECT sse_relay.position()",
    ],
    "signing out": ["SELECT sse_relay.revoke('user-7')"],
    "migrations": [
        "CREATE TABLE pg_temp.things (id int PRIMARY KEY)",
        "CREATE TRIGGER t AFTER INSERT ON things FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('t')",
    ],
    "relay": [
        LOG_VERSION_SQL,
        "SELECT sse_relay.attach(NULL, NULL)",
        "SELECT sse_relay.waiting(NULL, NULL)",
        "SELECT sse_relay.advance('{}', '{}')",
        "SELECT FROM sse_relay.epoch, sse_relay.events",
        LOG_PRUNE_SQL,
        "SELECT * FROM sse_relay.revocations",
    ],
    "operator": [
        "UPDATE sse_relay.settings SET retention = retention * 1",
        "SELECT retention FROM sse_relay.settings",
        "SELECT sse_relay.renew_epoch()",
    ],
}
# What none of them may.
ATTACKS = [
    "SELECT * FROM sse_relay.pending",
    "INSERT INTO sse_relay.events (xid, channel, data) VALUES ('1', 'a', 'b')",
    "DELETE FROM sse_relay.events",
    "TRUNCATE sse_relay.pending",
    "UPDATE sse_relay.settings SET pruned = 10",
    "DO $$ BEGIN LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE; END $$",
    "SELECT nextval('sse_relay.events_id_seq')",
    "SELECT sse_relay.set_aside('{1}')",
    "CREATE TABLE sse_relay.mine ()",
]


@pytest.mark.parametrize("kind", USES)
def test_the_grants_of_the_docs_are_enough_and_none_is_superfluous(
    log: Session, database: Database, kind: str
) -> None:
    def use(role: str) -> None:
        with Session(database, role) as session:
            for statement in USES[kind]:
                session.run(statement)

    use(new_role(database, kind, GRANTS[kind]))
    assert len(GRANTS[kind]) > 1
    for left_out in GRANTS[kind]:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            use(new_role(database, kind, [grant for grant in GRANTS[kind] if grant != left_out]))


def unusable(session: Session) -> str:
    """Why a relay refuses to work on this log, and what helps."""
    with session.connection.cursor() as cursor, pytest.raises(UnusableDatabaseError) as caught:
        check_log(cursor)
    return str(caught.value)


def test_a_log_that_a_relay_cannot_use_is_named_with_what_helps(database: Database) -> None:
    with Session(database) as session:
        assert unusable(session).endswith("run sse_relay.py schema --apply")
        apply(database)
        for newer, advice in ((1, "install a newer sse-relay"), (-1, "run sse_relay.py schema --apply")):
            session.run("UPDATE sse_relay.settings SET version = %s", (SCHEMA_VERSION + newer,))
            assert unusable(session).endswith(advice)
    apply(database)
    role = new_role(database, "relay")
    with Session(database, role) as session, session.connection.cursor() as cursor:
        for kind in ("SCHEMA", "sse_relay.", "FUNCTION"):
            for grant in GRANTS["relay"]:
                database.execute(f'{grant} TO "{role}"')
                if grant.partition(" ON ")[2].startswith(kind):
                    database.execute(f'{grant.replace("GRANT", "REVOKE", 1)} FROM "{role}"')
            advice = unusable(session).partition(": run ")[2]
            assert advice.startswith("GRANT"), advice
            database.execute(advice)
            check_log(cursor)


def test_a_role_can_do_nothing_beyond_its_grants(log: Session, database: Database) -> None:
    for kind in ("nobody", *USES):
        role = new_role(database, kind, GRANTS.get(kind, ()))
        others = [
            each for other, uses in USES.items() if other != kind for each in uses if "sse_relay." in each
        ]
        with Session(database, role) as session:
            for attack in [*ATTACKS, *others]:
                # The relay and the operator both read the settings.
                if not (
                    kind in ("relay", "operator") and attack.startswith("SELECT") and "settings" in attack
                ):
                    session.run("CREATE TABLE IF NOT EXISTS pg_temp.things (id int)")
                    session.refused(psycopg2.errorcodes.INSUFFICIENT_PRIVILEGE, attack)


def test_nobody_without_rights_can_hold_up_the_numbering_or_an_upgrade(
    log: Session, database: Database
) -> None:
    """Advisory locks are everybody's; neither takes one."""
    with log.connection.cursor() as applying:
        applying.execute(f"BEGIN; {SCHEMA_SQL}")
        assert database.execute("SELECT objid FROM pg_locks WHERE locktype = 'advisory'") == []
        applying.execute("COMMIT")
    log.publish()
    _, xids, pids = log.waiting()
    with log.connection.cursor() as numbering:
        numbering.execute("BEGIN")
        numbering.execute(LOG_ADVANCE_SQL, (xids, pids, True))
        assert database.execute(
            "SELECT locktype, relation::regclass::text, mode FROM pg_locks WHERE locktype = 'advisory'"
            " OR (mode = 'ExclusiveLock' AND locktype = 'relation')"
        ) == [("relation", "sse_relay.epoch", "ExclusiveLock")]
        numbering.execute("COMMIT")


# ---------------------------------------------------------------- publish


# Channel, event, data: kept as they are.
PUBLISHED: list[tuple[str, str | None, str]] = [
    *((channel, None, "x") for channel in (
        "a", ".", "..", "x" * 63, "é" * 31 + "x", "😀" * 15, "a b", "'", '"; DROP TABLE x --', "{a}", "\xa0",
        "SSE_RELAY")),
    *(("c", event, "x") for event in (
        "message", "errors", "Error", "opened", "relay", "relays.x", "a:b", " ", "x" * 256)),
    *(("c", None, data) for data in (
        "", "\n", "\r\n", "\u2028", "\x01", "😀", "a" * 100_000, "null", *(
            piece * (1024 * 1024 // len(piece.encode())) for piece in ("x", "é", "😀")),
        # A line end counts as seven bytes.
        *(end * (1024 * 1024 // 7) for end in ("\n", "\r", "\r\n")),
        "\n" * 100_000 + "x" * (1024 * 1024 - 700_000))),
]  # fmt: skip
# SQLSTATE, arguments, part of the message.
REFUSED: list[tuple[str, tuple[str | None, str | None, str | None], str]] = [
    *(("22023", (channel, "x", None), "sse_relay.publish") for channel in (
        "", "x" * 64, "é" * 32, "sse_relay", "sse_relay_x", "a\nb", "\x01", "\x1f", "\x7f", "\x80", "a\x9f")),
    *(("22023", ("c", "x", event), "event name") for event in (
        "error", "open", "relay.", "relay.gap", "a\nb", "a\rb", "\n", "x" * 257)),
    *(("22001", ("c", piece * (1024 * 1024 // len(piece.encode())) + "y", None), "data has 1048577 bytes")
        for piece in ("x", "é", "😀")),
    *(("22001", ("c", end * (1024 * 1024 // 7 + 1), None), "data has 1048579 bytes")
        for end in ("\n", "\r", "\r\n")),
    ("22001", ("c", "\n" * 100_000 + "x" * (1024 * 1024 - 699_999), None), "data has 1048577 bytes"),
    ("22004", (None, "x", None), "channel is NULL"),
    ("22004", ("c", None, None), "data is NULL"),
]  # fmt: skip


def test_what_a_stream_can_carry_is_kept_as_it_is(log: Session) -> None:
    for channel, event, data in PUBLISHED:
        log.publish(data, channel, event)
    log.publish("no name", "c", "")
    log.sweep()
    assert [row[4:7] for row in log.read()] == [*PUBLISHED, ("c", None, "no name")]
    for channel in {channel for channel, _, _ in PUBLISHED}:
        replay = {"channels": [channel], "since": [0], "until": 999, "bytes": 1}
        assert log.run(LOG_REPLAY_SQL, replay)[0][4] == channel


def test_what_no_stream_may_ask_for_or_carry_is_refused(log: Session) -> None:
    for code, arguments, message in REFUSED:
        assert message in log.refused(code, LOG_PUBLISH_SQL, arguments)
    for untold in ("'c', NULL::jsonb", "NULL::text, '{}'::jsonb", "'c', NULL::json"):
        assert "is NULL" in log.refused("22004", f"SELECT sse_relay.publish({untold})")
    assert log.pending() == []


def test_a_literal_without_a_type_is_text_and_json_goes_as_its_text(log: Session) -> None:
    awkward = '{"b":1.10,  "a":1e3}'
    log.run("PREPARE untyped AS SELECT sse_relay.publish($1, $2)")
    log.run("PREPARE untyped_with_name AS SELECT sse_relay.publish($1, $2, $3)")
    cases: list[tuple[str, str | None, str]] = [
        (f"SELECT sse_relay.publish('c', '{awkward}')", None, awkward),
        (f"EXECUTE untyped ('c', '{awkward}')", None, awkward),
        (f"EXECUTE untyped_with_name ('c', '{awkward}', 'n')", "n", awkward),
        (f"SELECT sse_relay.publish(channel => 'c', data => '{awkward}', event => 'n')", "n", awkward),
        (f"SELECT sse_relay.publish('c', '{awkward}'::json, 'n')", "n", awkward),
        (f"SELECT sse_relay.publish('c', '{awkward}'::jsonb)", None, '{"a": 1000, "b": 1.10}'),
        ("SELECT sse_relay.publish('c', 'null'::jsonb, 'n')", "n", "null"),
        ("SELECT sse_relay.publish(channel => 'c', data => json_build_object('a', 1))", None, '{"a" : 1}'),
    ]
    for statement, *_ in cases:
        log.run(statement)
    assert log.pending() == [("c", event, data) for _, event, data in cases]
    assert log.value("SELECT pg_typeof(sse_relay.publish('orders', 'x'))::text") == "void"


def test_a_collation_of_the_caller_changes_nothing(log: Session) -> None:
    with contextlib.suppress(psycopg2.errors.FeatureNotSupported):
        log.run("CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
        log.run("""SELECT sse_relay.publish('c' COLLATE ci, 'x' COLLATE ci, 'Relay.x' COLLATE ci)""")
        log.run("""SELECT sse_relay.publish('c', 'x' || E'\\n' COLLATE ci)""")
        log.run("""SELECT sse_relay.revoke('x' COLLATE ci)""")
        log.refused("22023", "SELECT sse_relay.publish('sse_relay' COLLATE ci, 'x')")
        assert len(log.pending()) == 3


def test_a_revocation_is_numbered_as_an_event_and_stays_in_its_table(
    log: Session, database: Database
) -> None:
    with Session(database) as other:
        other.run("BEGIN")
        other.run("SELECT sse_relay.revoke('user-7')")
        log.run("SELECT sse_relay.revoke('user-7')")  # nobody waits
        log.publish()
        other.run("COMMIT")
    log.sweep()
    assert [row[4:7] for row in log.read()] == [
        *[("sse_relay_revoked", None, "user-7")] * 2, ("orders", None, "x"),
    ]  # fmt: skip
    rows = log.run(LOG_REVOCATIONS_SQL, (0,))
    assert [row[:2] for row in rows] == [(1, "user-7"), (2, "user-7")]
    assert [row[2] for row in rows] == [row[7] for row in log.read()[:2]]
    assert log.run(LOG_REVOCATIONS_SQL, (1,)) == rows[1:]
    log.run("UPDATE sse_relay.revocations SET stamp = stamp - interval '31 days' WHERE id = 1")
    log.run(LOG_PRUNE_SQL)
    assert log.run(LOG_REVOCATIONS_SQL, (0,)) == rows[1:]
    # Ids that restart do not meet those of sign-outs.
    log.run("TRUNCATE sse_relay.pending, sse_relay.events RESTART IDENTITY")
    log.run("SELECT sse_relay.revoke('user-8')")
    log.sweep()
    assert [row[1] for row in log.run(LOG_REVOCATIONS_SQL, (0,))] == ["user-7", "user-8"]
    log.refused("22004", "SELECT sse_relay.revoke(NULL)")
    for subject in ("", "x" * 1025):
        log.refused("22023", "SELECT sse_relay.revoke(%s)", (subject,))


# ---------------------------------------------------------------- numbering


def test_a_call_moves_and_a_page_shows_about_four_mebibytes(log: Session) -> None:
    most = "x" * 1024 * 1024
    for i in range(9):
        log.publish(most[:-1] + str(i))
    _, xids, pids = log.waiting()
    calls = [log.run(LOG_ADVANCE_SQL, (xids, pids, False))[0] for _ in range(3)]
    assert calls == [(4, True), (4, True), (1, False)]
    assert [len(log.page(after)) for after in (0, 4, 8)] == [4, 4, 1]
    assert [row[6][-1] for row in log.read()] == list("012345678")
    replay = {"channels": ["orders"], "since": [0], "until": 100, "bytes": 1 << 22}
    assert len(log.run(LOG_REPLAY_SQL, replay)) == 4


def test_numbering_refuses_a_snapshot_that_may_be_older_than_its_lock(log: Session) -> None:
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        log.run(f"BEGIN ISOLATION LEVEL {level}")
        log.refused("25000", LOG_ADVANCE_SQL, (["1"], [1], False))
        log.run("ROLLBACK")


def test_the_session_is_safe_from_the_defaults_of_its_role(log: Session, database: Database) -> None:
    for setting, value in (
        ("default_transaction_isolation", "serializable"), ("synchronous_commit", "off"),
        ("default_transaction_read_only", "on"),
    ):  # fmt: skip
        log.run(f"ALTER DATABASE {log.connection.info.dbname} SET {setting} = '{value}'")
    with Session(database) as session:
        session.publish()
        session.sweep()
        assert session.datas() == ["x"]
        assert session.value("SHOW synchronous_commit") == "on"


@pytest.mark.slow
def test_a_million_dead_rows_and_a_long_transaction_slow_nothing_down(
    log: Session, database: Database
) -> None:
    """The dead rows cannot be cleaned up, and the planner is told nothing or a lie about the table."""
    with Session(database) as long, Session(database) as writer:
        long.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
        long.run("SELECT pg_current_xact_id()")
        log.run(
            "INSERT INTO sse_relay.pending (xid, channel, data) SELECT (i % 400 + 1)::text::xid8, 'dead', 'x'"
            " FROM generate_series(1, 1000000) AS i"
        )
        log.run("DELETE FROM sse_relay.pending")
        since = log.sweep()
        for statistics in ("", "ANALYZE sse_relay.pending", "VACUUM sse_relay.pending"):
            log.run(statistics or "SELECT 1")
            times = []
            for _ in range(40):
                after = log.value("SELECT coalesce(max(id), 0) FROM sse_relay.events")
                began = time.perf_counter()
                writer.run("BEGIN")
                writer.publish()
                xid, pid = writer.run("SELECT pg_current_xact_id()::text, pg_backend_pid()")[0]
                writer.run("COMMIT")
                assert log.advance([xid], [pid]) == 1
                assert len(log.page(after)) == 1
                since = log.sweep(since)
                times.append(time.perf_counter() - began)
            # To look at every dead row once takes longer.
            assert sorted(times)[20] < 0.05, statistics


@pytest.mark.slow
def test_a_large_backlog_is_numbered_in_time_that_grows_with_its_size_only(log: Session) -> None:
    """A hundred transactions of a thousand events: no call may look at all of them."""
    log.run(
        "INSERT INTO sse_relay.pending (xid, channel, data) SELECT ((i - 1) / 1000)::text::xid8, 'a', i::text"
        " FROM generate_series(1, 100000) AS i"
    )
    windows = [log.run(LOG_WAITING_SQL, (None, None))[0]]
    while windows[-1][3] is not None:
        windows.append(log.run(LOG_WAITING_SQL, (windows[0][0], windows[-1][3]))[0])
    assert [len(window[1]) for window in windows] == [50, 50, 0]
    xids, pids = (list(itertools.chain(*(window[i] for window in windows))) for i in (1, 2))
    started = time.perf_counter()
    assert log.advance(xids[:10], pids[:10]) == 10_000
    few = time.perf_counter() - started
    started = time.perf_counter()
    assert log.advance(xids, pids) == 90_000
    many = time.perf_counter() - started
    assert many < 9 * few * 3
    assert log.datas() == [str(i) for i in range(1, 100_001)]


@pytest.mark.slow
def test_windows_keep_the_order_of_what_could_be_seen(log: Session, database: Database) -> None:
    """A transaction counts to the window of its last row; what commits during the pass waits for the next."""
    with Session(database) as early, Session(database) as unseen:
        early.run("BEGIN")
        early.publish("early")
        unseen.run("BEGIN")
        unseen.publish("unseen")
        log.run("SELECT sse_relay.publish('a', i::text) FROM generate_series(1, 60000) AS i")
        early.publish("early, after all")
        early.run("COMMIT")
        first = log.run(LOG_WAITING_SQL, (None, None))[0]
        assert (first[1], first[3]) == ([], 50_001)
        unseen.run("COMMIT")
        second = log.run(LOG_WAITING_SQL, (first[0], first[3]))[0]
        assert (len(second[1]), second[3]) == (2, None)
        log.advance(*second[1:3])
        assert log.datas()[60_000:] == ["early", "early, after all"]
        since = log.sweep(first[0])
        assert log.datas()[-1] == "unseen"
        assert log.waiting(since)[1] == []


# ---------------------------------------------------------------- reading


def test_a_rare_channel_and_the_newest_events_are_found_without_reading_the_busy_ones(log: Session) -> None:
    """Also with statistics by which the planner takes every channel for a frequent one."""
    log.run("INSERT INTO sse_relay.events (xid, channel, data)"
            " SELECT '1', CASE WHEN i % 1000 = 0 THEN 'rare' ELSE 'busy' || i % 2 END, 'x'"
            " FROM generate_series(1, 60000) AS i")  # fmt: skip
    rare = {"channels": ["rare", "none"], "since": [0, 0], "until": 10**9, "bytes": 1 << 22}
    newest = {"channels": ["busy1", "rare", "none"], "until": 15_500, "most": 3}
    assert log.run(LOG_LAST_SQL, newest) == [("busy1", 15_494), ("rare", 12_999), ("none", 15_500)]
    for statistics in ("SELECT 1", "ANALYZE sse_relay.events"):
        log.run(statistics)
        for sql, asked in ((LOG_REPLAY_SQL, rare), (LOG_REPLAY_SIZE_SQL, rare), (LOG_LAST_SQL, newest)):
            plan = log.value("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + sql, asked)[0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 100, json.dumps(plan, indent=1)


# ---------------------------------------------------------------- epoch


def test_the_epoch_is_short_printable_and_stays(log: Session, database: Database) -> None:
    log.grow()
    epoch, newest, pruned, retention = log.attach()
    assert re.fullmatch(r"[!-,.0-?A-~]{1,16}", epoch)
    assert (newest, pruned, retention) == (5, 0, 86400.0)
    with Session(database) as other:
        assert other.attach(epoch, 5)[0] == epoch
    log.run("VACUUM (FREEZE) sse_relay.epoch")
    log.run("VACUUM (FULL, FREEZE) sse_relay.epoch")
    assert log.attach(epoch, 5)[0] == log.attach("another", 1000)[0] == epoch
    assert log.position().startswith(epoch + "-5@")
    # Ids that went back.
    renewed, newest, *_ = log.attach(epoch, 6)
    assert (renewed != epoch, newest) == (True, 5)


TABLES_OF_THE_LOG = ("settings", "epoch", "pending", "events", "revocations")


@pytest.mark.parametrize(
    ("statement", "begins"),
    [
        ("DELETE FROM sse_relay.events WHERE id < 3", False),
        ("DELETE FROM sse_relay.events WHERE id > 5", False),
        ("DELETE FROM sse_relay.events WHERE id > 4", True),
        ("DELETE FROM sse_relay.events", True),
        ("DELETE FROM sse_relay.settings; DELETE FROM sse_relay.epoch", True),
        ("ALTER TABLE sse_relay.events ALTER COLUMN id RESTART WITH 2", True),
        ("TRUNCATE sse_relay.pending", True),
        ("TRUNCATE sse_relay.pending, sse_relay.events", True),
        ("TRUNCATE sse_relay.pending, sse_relay.events RESTART IDENTITY", True),
        # As test cleaners do.
        (f"TRUNCATE {', '.join(f'sse_relay.{table}' for table in TABLES_OF_THE_LOG)}", True),
        # Each of the marks that the epoch is tied to.
        *((f"UPDATE sse_relay.epoch SET xid = pg_current_xact_id(), {mark} = NULL", True)
          for mark in ("system", "timeline", "database", "epoch")),
        # A row that came back from a dump: another transaction wrote it.
        ("UPDATE sse_relay.epoch SET xid = '3'", True),
    ],
)  # fmt: skip
def test_what_begins_an_epoch(log: Session, statement: str, *, begins: bool) -> None:
    log.grow()
    log.run("UPDATE sse_relay.settings SET pruned = 4")
    epoch = log.attach()[0]
    log.run(statement)
    # The page that a relay reads tells at once, or no longer has a name for it.
    shown = log.page(5)[0][0]
    renewed, newest, pruned, _ = log.attach(epoch, 5)
    assert (renewed != epoch) == begins
    assert shown in (renewed, None) or "RESTART WITH" in statement or "pg_current" in statement
    assert log.page(5)[0][0] == renewed
    assert pruned <= newest
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION
    start, _ = parse(log.position())
    log.grow(2)
    assert [row[6] for row in log.read(start)] == ["0", "1"]


def test_a_relay_is_woken_when_the_log_is_thrown_away(log: Session, database: Database) -> None:
    with Session(database) as relay:
        relay.run(f"LISTEN {LOG_CHANNEL}")
        log.run("TRUNCATE sse_relay.pending, sse_relay.events")
        assert [note.payload for note in wait_until(relay.notifications)] == [""]


def test_a_copied_database_begins_an_epoch(log: Session, server: Server, database: Database) -> None:
    log.grow()
    epoch = log.attach()[0]
    name = log.connection.info.dbname
    log.connection.close()
    database.close()
    with server.fresh_database(template=name) as copy, Session(copy) as session:
        assert session.position().startswith("unknown-5@")
        renewed = session.attach(epoch, 5)[0]
        assert renewed != epoch
        assert session.position().startswith(renewed + "-5@")
    with Session(database) as original:
        assert original.attach(epoch, 5)[0] == epoch


def test_relays_that_find_a_new_history_at_once_agree_on_its_name(log: Session, database: Database) -> None:
    log.run("UPDATE sse_relay.epoch SET system = 0")

    def attach(_: int) -> str:
        with Session(database) as session:
            return str(session.attach("old", 7)[0])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attach, range(8)))) == 1


def test_a_server_that_does_not_tell_its_history_is_used_without(database: Database) -> None:
    owner = new_role(database, "owner")
    database.execute(f'CREATE SCHEMA sse_relay AUTHORIZATION "{owner}"')
    database.execute(
        "REVOKE EXECUTE ON FUNCTION pg_control_system(), pg_current_wal_lsn(), pg_walfile_name(pg_lsn)"
        " FROM PUBLIC"
    )
    apply(database, owner)
    with Session(database, owner) as session:
        assert len(session.run(LOG_LIMITS_SQL)) == 3
        session.publish()
        session.sweep()
        epoch = session.attach()[0]
        assert epoch
        assert session.position().startswith(epoch + "-1@")
    for _, remedy in database.execute(LOG_LIMITS_SQL):
        database.execute(remedy)
    assert database.execute(LOG_LIMITS_SQL) == []


def test_aurora_has_no_wal_to_ask_about(log: Session, database: Database) -> None:
    epoch = log.attach()[0]
    log.run(
        "SET allow_system_table_mods = on;"
        " ALTER FUNCTION pg_catalog.pg_current_wal_lsn() RENAME TO was_lsn;"
        " CREATE FUNCTION pg_catalog.pg_current_wal_lsn() RETURNS pg_lsn LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE 'logical replication is off' USING ERRCODE = 'object_not_in_prerequisite_state'; END $$"
    )
    with Session(database) as session:
        assert session.attach(epoch, 0)[0] == epoch
        assert session.position().startswith(epoch + "-0@")
        session.run("SELECT sse_relay.renew_epoch()")
        session.grow(1)
        renewed = session.attach()[0]
        assert renewed not in (epoch, None)
        apply(database)
        assert session.attach(renewed, 1)[0] == renewed


# ---------------------------------------------------------------- position


def test_position_is_of_the_callers_snapshot(log: Session, database: Database) -> None:
    volatility = "SELECT provolatile::text FROM pg_proc WHERE oid = 'sse_relay.position()'::regprocedure"
    assert log.value(volatility) == "s"
    assert parse(log.position())[0] == 0
    with Session(database) as page, Session(database) as running:
        running.run("BEGIN")
        xid = int(running.value("SELECT pg_current_xact_id()::text"))
        page.run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        before = page.position()
        log.grow()
        running.run("COMMIT")
        assert page.position() == before
        assert not parse(before)[1].shows(xid)
        page.run("COMMIT")
        number, snapshot = parse(page.position())
        assert (number, snapshot.shows(xid)) == (5, True)
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    while log.prune():
        pass
    assert parse(log.position())[0] == 5


def test_what_the_calling_transaction_publishes_afterwards_is_not_taken_for_seen(
    log: Session, database: Database
) -> None:
    """PostgreSQL's own snapshot counts the calling transaction among the finished ones."""
    with Session(database) as page:
        page.run("BEGIN")
        own = int(page.value("SELECT pg_current_xact_id()::text"))
        for _ in range(3):
            log.run("SELECT pg_current_xact_id()")
        assert page.value("SELECT pg_visible_in_snapshot(pg_current_xact_id(), pg_current_snapshot())")
        position = page.position()
        page.publish()
        page.run("COMMIT")
    assert not parse(position)[1].shows(own)


def test_a_snapshot_that_is_too_long_is_left_out(log: Session, database: Database) -> None:
    """4,000 bytes take hundreds of transactions: the limit is lowered instead."""
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            session = stack.enter_context(Session(database))
            session.run("BEGIN; SELECT pg_current_xact_id()")
        log.run("SELECT pg_current_xact_id()")
        assert log.position().count(",") >= 59
        source = log.value("SELECT pg_get_functiondef('sse_relay.position()'::regprocedure)")
        assert "> 4000" in source
        log.run(source.replace("> 4000", "> 200"))
        assert re.fullmatch(r"\w+-0", log.position())


# ---------------------------------------------------------------- retention


def test_pruning_takes_a_prefix_remembers_it_and_keeps_the_newest(log: Session) -> None:
    log.grow(10)
    assert log.prune() == 0
    log.run("UPDATE sse_relay.events SET created = created - interval '25 hours' WHERE id <= 4 OR id = 7")
    assert log.prune() == 4
    assert log.prune() == 0
    assert [row[2] for row in log.read()] == [5, 6, 7, 8, 9, 10]
    assert log.page(10)[0][1] == 4
    assert log.attach()[2] == 4
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert log.prune() == 5
    assert [row[2] for row in log.read()] == [10]
    assert log.attach()[1:3] == (10, 9)


def test_one_prunes_at_a_time_and_a_reader_sees_the_mark_with_the_rows(
    log: Session, database: Database
) -> None:
    log.grow()
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    with Session(database) as other, Session(database) as reader:
        reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
        before = reader.page(0)
        other.run("BEGIN")
        assert other.prune() == 4
        assert log.prune() == 0
        assert log.page(0) == before
        other.run("COMMIT")
        assert reader.page(0) == before
    assert [(row[1], row[2]) for row in log.page(0)] == [(4, 5)]


def test_retention_counts_from_the_numbering(log: Session, database: Database) -> None:
    """A transaction that began long ago must not publish what is already due."""
    with Session(database) as slow:
        slow.run("BEGIN")
        slow.run("SELECT pg_sleep(0.3)")
        slow.publish()
        slow.run("COMMIT")
    log.sweep()
    age = log.value("SELECT extract(epoch FROM clock_timestamp() - created)::float8 FROM sse_relay.events")
    assert age < 0.25


@pytest.mark.parametrize(
    ("count", "size", "batches"), [(0, 1, [0]), (2500, 1, [1000, 1000, 499, 0]), (20, 1 << 20, [8, 8, 3, 0])]
)
def test_pruning_goes_in_batches(log: Session, count: int, size: int, batches: list[int]) -> None:
    log.run("INSERT INTO sse_relay.events (xid, channel, data)"
            " SELECT '1', 'a', repeat('x', %s) FROM generate_series(1, %s)", (size, count))  # fmt: skip
    for endless in ("10000 years", "178000000 years", "999 years"):
        log.run("UPDATE sse_relay.settings SET retention = %s", (endless,))
        assert log.prune() == 0
    for senseless in ("0", "-1 day"):
        log.refused("23514", "UPDATE sse_relay.settings SET retention = %s", (senseless,))
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert [log.prune() for _ in batches] == batches


def test_a_clock_that_was_ahead_does_not_stop_the_pruning(log: Session) -> None:
    log.grow(10)
    log.run("UPDATE sse_relay.settings SET retention = '1 hour'")
    log.run("UPDATE sse_relay.events SET created = created + interval '10 years' WHERE id <= 5")
    assert log.prune() == 0
    assert log.value("SELECT count(*) FROM sse_relay.events WHERE created > now() + interval '1 minute'") == 0
    log.run("UPDATE sse_relay.events SET created = created + interval '10 years' WHERE id IN (2, 4)")
    log.run("UPDATE sse_relay.events SET created = created - interval '2 hours' WHERE id IN (1, 3, 5)")
    assert log.prune() == 5


def test_deleted_events_are_told_to_clients_that_have_not_come_as_far(log: Session) -> None:
    log.grow(10)
    epoch = log.attach()[0]
    log.run("DELETE FROM sse_relay.events WHERE id IN (3, 5)")
    assert [row[:3] for row in log.page(0)][:2] == [(epoch, 5, 1), (None, None, 2)]
    log.run("DELETE FROM sse_relay.events WHERE id = 4")
    assert log.attach(epoch, 10)[:3] == (epoch, 10, 5)
    assert log.run(LOG_LAST_SQL, {"channels": ["orders"], "until": 10, "most": 9}) == [("orders", 5)]
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert log.prune() == 6
    assert [row[2] for row in log.read()] == [10]


# ---------------------------------------------------------------- publish_row


def rows_of(log: Session) -> list[tuple[str, dict[str, Any]]]:
    """What the trigger has published: channels and messages; takes it away."""
    taken = [(channel, json.loads(data)) for channel, _, data in log.pending()]
    log.run("DELETE FROM sse_relay.pending")
    return taken


def watch(log: Session, table: str, *arguments: str, when: str = "AFTER INSERT OR UPDATE OR DELETE") -> None:
    quoted = ", ".join("'" + argument.replace("'", "''") + "'" for argument in arguments)
    log.run(
        f"CREATE TRIGGER watch {when} ON {table} FOR EACH ROW "
        f"EXECUTE FUNCTION sse_relay.publish_row({quoted})"
    )


ODD = '"Odd ""schema"."Odd table"'
# What makes a table, the arguments of its trigger, statements, and the messages without "op" and "table".
TABLES: dict[str, tuple[str, str, tuple[str, ...], list[str], list[tuple[str, dict[str, Any]]]]] = {
    "named columns": (
        "CREATE TABLE t (id int PRIMARY KEY, status text, secret text, total numeric)", "t",
        ("orders", "id", "total"),
        ["INSERT INTO t VALUES (7, 'new', 's3cret', 1.10)", "UPDATE t SET total = 2.50", "DELETE FROM t"],
        [("orders", {"key": {"id": 7}, "row": {"id": 7, "total": total}}) for total in (1.10, 2.50, 2.50)],
    ),
    "none by default": (
        "CREATE TABLE t (id int PRIMARY KEY, b text)", "t", ("c",), ["INSERT INTO t VALUES (1, 'x')"],
        [("c", {"key": {"id": 1}, "row": {}})],
    ),
    "all for a star": (
        "CREATE TABLE t (id int PRIMARY KEY, b text)", "t", ("c", "*"), ["INSERT INTO t VALUES (1, NULL)"],
        [("c", {"key": {"id": 1}, "row": {"id": 1, "b": None}})],
    ),
    "a channel of columns": (
        "CREATE TABLE t (id int PRIMARY KEY, tenant_id int, kind text)", "t",
        ("tenant-{tenant_id}/{kind}", "id"),
        ["INSERT INTO t VALUES (1, 5, 'a')", "UPDATE t SET kind = '{tenant_id}'",
            "UPDATE t SET tenant_id = NULL", "UPDATE t SET kind = 'b'", "UPDATE t SET tenant_id = 6",
            "DELETE FROM t"],
        [(channel, {"key": {"id": 1}, "row": row and {"id": 1}}) for channel, row in (
            ("tenant-5/a", True), ("tenant-5/a", None), ("tenant-5/{tenant_id}", True),
            ("tenant-5/{tenant_id}", None), ("tenant-6/b", True), ("tenant-6/b", True))],
    ),
    "odd names": (
        f"""CREATE SCHEMA "Odd ""schema"; CREATE TABLE {ODD}
            ("Key ""1" int, "b c" text, note text, PRIMARY KEY ("b c", "Key ""1"))""", ODD,
        ("{b c}", 'Key "1'),
        [f"INSERT INTO {ODD} VALUES (1, 'ü', 'n')"],
        [("ü", {"key": {'Key "1': 1, "b c": "ü"}, "row": {'Key "1': 1}})],
    ),
    "no primary key": (
        "CREATE TABLE t (b int)", "t", ("c",), ["INSERT INTO t VALUES (1)"],
        [("c", {"key": None, "row": {}})],
    ),
    "a key that includes columns": (
        "CREATE TABLE t (id int, secret text, PRIMARY KEY (id) INCLUDE (secret))", "t", ("c",),
        ["INSERT INTO t VALUES (1, 's3cret')"], [("c", {"key": {"id": 1}, "row": {}})],
    ),
    "a key that changes": (
        "CREATE TABLE t (id int PRIMARY KEY, b text)", "t", ("c-{b}",),
        ["INSERT INTO t VALUES (1, 'x')", "UPDATE t SET id = 2", "UPDATE t SET id = 3, b = 'y'",
            "UPDATE t SET b = 'y'"],
        [("c-x", {"key": {"id": 1}, "row": {}}), ("c-x", {"key": {"id": 2}, "row": {}, "old_key": {"id": 1}}),
            ("c-x", {"key": {"id": 2}, "row": None}),
            ("c-y", {"key": {"id": 3}, "row": {}, "old_key": {"id": 2}}),
            ("c-y", {"key": {"id": 3}, "row": {}})],
    ),
    "columns that are not named are not touched": (
        "CREATE TABLE t (id int PRIMARY KEY, data json, big bytea, state text)", "t", ("c-{state}", "id"),
        ["""INSERT INTO t VALUES (1, '{"a": "\\u0000"}', repeat('x', 10000000)::bytea, 'new')""",
            "UPDATE t SET data = '1e200000'", "UPDATE t SET state = 'old'", "DELETE FROM t"],
        [(channel, {"key": {"id": 1}, "row": row and {"id": 1}}) for channel, row in (
            ("c-new", True), ("c-new", True), ("c-new", None), ("c-old", True), ("c-old", True))],
    ),
    "partitions": (
        """CREATE TABLE t (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id);
        CREATE TABLE low_a (note text, day int NOT NULL, id int NOT NULL);
        ALTER TABLE low_a DROP COLUMN note;
        ALTER TABLE low ATTACH PARTITION low_a FOR VALUES FROM (0) TO (10);
        CREATE TABLE high PARTITION OF t FOR VALUES FROM (10) TO (20)""", "t", ("c", "*"),
        ["INSERT INTO t VALUES (1, 1)", "UPDATE low_a SET id = 2", "UPDATE t SET day = 15"],
        [("c", {"key": {"id": 1, "day": 1}, "row": {"id": 1, "day": 1}}),
            ("c", {"key": {"id": 2, "day": 1}, "row": {"id": 2, "day": 1}, "old_key": {"id": 1, "day": 1}}),
            ("c", {"key": {"id": 2, "day": 1}, "row": {"id": 2, "day": 1}}),
            ("c", {"key": {"id": 2, "day": 15}, "row": {"id": 2, "day": 15}})],
    ),
    "a table that inherits": (
        "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE t () INHERITS (p)", "t", ("c",),
        ["INSERT INTO t VALUES (1)", "UPDATE p SET id = 2"], [("c", {"key": None, "row": {}})] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_rows_are_published_as_they_change(log: Session, case: str) -> None:
    setup, table, arguments, statements, messages = TABLES[case]
    log.run(setup)
    watch(log, table, *arguments)
    for statement in statements:
        log.run(statement)
    found = rows_of(log)
    assert {message.pop("table") for _, message in found} == {table if table == ODD else "public.t"}
    operations = [message.pop("op") for _, message in found]
    assert found == messages
    if case == "partitions":
        # One that moves a row to another partition is two to PostgreSQL.
        assert operations == ["insert", "update", "delete", "insert"]
    else:
        verbs = [statement.split()[0].lower() for statement in statements]
        assert list(dict.fromkeys(operations)) == list(dict.fromkeys(verbs))


def test_a_row_keeps_the_text_of_its_numbers(log: Session) -> None:
    log.run("CREATE TABLE t (id int PRIMARY KEY, total numeric)")
    watch(log, "t", "orders", "total")
    log.run("INSERT INTO t VALUES (7, 1.10)")
    text = '{"op": "insert", "key": {"id": 7}, "row": {"total": 1.10}, "table": "public.t"}'
    assert log.pending() == [("orders", None, text)]


# SQLSTATE, the trigger, a statement that fires it, part of the message.
WATCH = "CREATE TRIGGER watch {} EXECUTE FUNCTION sse_relay.publish_row({})"
BAD_TRIGGERS = [
    *(("39P01", WATCH.format(when, arguments), statement, "watch must be AFTER ... FOR EACH ROW")
        for when, arguments, statement in (
            ("BEFORE INSERT ON a FOR EACH ROW", "'c'", "INSERT INTO a VALUES (1, 'x')"),
            ("AFTER INSERT ON a FOR EACH STATEMENT", "'c'", "INSERT INTO a VALUES (1, 'x')"),
            ("AFTER TRUNCATE ON a FOR EACH STATEMENT", "'c'", "TRUNCATE a"),
            ("AFTER INSERT ON a FOR EACH ROW", "", "INSERT INTO a VALUES (1, 'x')"))),
    *((code, WATCH.format("AFTER INSERT ON a FOR EACH ROW", arguments),
        f"INSERT INTO a VALUES (1, {value})", message)
        for code, arguments, value, message in (
            ("42703", "'c', 'id', 'nope'", "'x'", 'names column "nope", which public.a does not'),
            ("42703", "'c', 'gone'", "'x'", '"gone"'),
            ("42703", "'c-{nope}'", "'x'", '"nope"'), ("42703", "'c-{'", "'x'", '""'),
            ("42703", "'{}'", "'x'", '""'), ("42703", "'c-{{id}}'", "'x'", '""'),
            # What publish() refuses makes the change fail.
            ("22023", "'{b}', '*'", "'sse_relay'", "channel"),
            ("22023", "'{b}', '*'", "repeat('x', 64)", "channel"),
            ("22001", "'c', '*'", "repeat('x', 1048576)", "data has"))),
]  # fmt: skip


def test_a_trigger_that_cannot_work_is_refused(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, b text, gone int); ALTER TABLE a DROP COLUMN gone")
    for code, trigger, statement, message in BAD_TRIGGERS:
        log.run(trigger)
        assert message in log.refused(code, statement)
        log.run("DROP TRIGGER watch ON a")
    assert log.run("SELECT * FROM a") == []


def test_a_virtual_column_cannot_be_named(each_database: Database) -> None:
    if each_database.connect().info.server_version < 180000:
        pytest.skip("PostgreSQL 18 is the first to have virtual columns")
    apply(each_database)
    with Session(each_database) as log:
        log.run("CREATE TABLE a (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id + 1) VIRTUAL,"
                " c int GENERATED ALWAYS AS (id + 2) STORED)")  # fmt: skip
        for arguments in (("c", "b"), ("c-{b}",)):
            watch(log, "a", *arguments)
            assert '"b"' in log.refused("42703", "INSERT INTO a VALUES (1)")
            log.run("DROP TRIGGER watch ON a")
        watch(log, "a", "c", "*")
        log.run("INSERT INTO a VALUES (1)")
        assert rows_of(log)[0][1]["row"] == {"id": 1, "c": 3}


# ---------------------------------------------------------------- an older version


VERSION_1 = Path(__file__).with_name("schema_1.sql")
# What a relay of version 1 goes on with as long as its session lasts.
READ_1 = """
SELECT CASE WHEN h.xmin = h.xid::xid THEN h.epoch END, s.pruned, e.id, e.data
FROM sse_relay.settings AS s CROSS JOIN sse_relay.epoch AS h
LEFT JOIN (SELECT * FROM sse_relay.events WHERE id > %s ORDER BY id LIMIT 1000) AS e ON true
"""


def test_version_1_is_upgraded_beside_running_relays_and_keeps_its_grants(database: Database) -> None:
    apply(database, script=VERSION_1.read_text())
    relay, app = new_role(database, "relay"), new_role(database, "app")
    for kind, role in (("relay", relay), ("application", app)):
        for grant in GRANTS[kind]:
            if "revocations" not in grant and "text, json, text" not in grant:
                database.execute(f'{grant.replace("pg_snapshot, bigint", "pg_snapshot")} TO "{role}"')
    database.execute("UPDATE sse_relay.settings SET retention = '7 days', pruned = 2")
    with Session(database, relay) as old_relay, Session(database, app) as application:
        for i in range(5):
            application.publish(str(i))
        snapshot, xids, pids = old_relay.run("SELECT * FROM sse_relay.waiting(NULL::pg_snapshot)")[0]
        old_relay.run("SELECT * FROM sse_relay.advance(%s::text[]::xid8[], %s::int[], false)", (xids, pids))
        epoch = old_relay.attach()[0]
        application.publish("unnumbered")
        apply(database)
        application.publish("after")
        application.run("SELECT sse_relay.publish('orders', '{}'::json)")
        _, xids, pids = old_relay.run(
            "SELECT snapshot::text, xids::text[], pids FROM sse_relay.waiting(%s::pg_snapshot)", (snapshot,)
        )[0]
        assert old_relay.run(LOG_ADVANCE_SQL, (xids, pids, True)) == [(3, False)]
        assert old_relay.attach(epoch, 5)[:3] == (epoch, 8, 2)
        assert [row[3] for row in old_relay.run(READ_1, (5,))] == ["unnumbered", "after", "{}"]
        assert old_relay.prune() == 0
    with Session(database, relay) as new_relay:
        for statement in USES["relay"]:
            new_relay.run(statement)
    assert database.execute("SELECT version, retention = '7 days', cleared FROM sse_relay.settings") == [
        (SCHEMA_VERSION, True, 2)
    ]


def test_an_upgrade_gives_way_to_who_holds_a_lock_and_is_tried_again(database: Database) -> None:
    apply(database, script=VERSION_1.read_text())
    with Session(database) as publisher, ThreadPoolExecutor(1) as pool:
        publisher.run("BEGIN")
        publisher.publish()
        upgrade = pool.submit(apply_schema, database.dsn)
        wait_until(lambda: database.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
        # It does not stand before others in the queue for long.
        for _ in range(3):
            database.execute("SELECT sse_relay.publish('orders', 'beside')")
        assert not upgrade.done()
        publisher.run("COMMIT")
        upgrade.result(30)
    assert database.execute("SELECT version FROM sse_relay.settings") == [(SCHEMA_VERSION,)]


def test_applying_beside_relays_and_publishers_is_nobodys_deadlock(log: Session, database: Database) -> None:
    stop = threading.Event()

    def work() -> int:
        turns = 0
        with Session(database) as session:
            while not stop.is_set():
                session.publish()
                session.sweep()
                session.page(0)
                session.attach()
                session.run(LOG_PRUNE_SQL)
                turns += 1
        return turns

    log.run("UPDATE sse_relay.settings SET retention = '1 ms'")
    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        try:
            for _ in range(15):
                apply(database)
        finally:
            stop.set()
        assert all(worker.result(30) > 10 for worker in workers)


# ---------------------------------------------------------------- rows that cannot be seen


def test_row_level_security_shows_on_a_page_and_to_the_relays_check(log: Session, database: Database) -> None:
    log.grow()
    with Session(database, new_role(database, "relay", GRANTS["relay"])) as session:
        for table in ("settings", "epoch", "events", "revocations"):
            assert not session.page(0)[0][10]
            log.run(f"ALTER TABLE sse_relay.{table} ENABLE ROW LEVEL SECURITY")
            page = session.page(0)
            assert (len(page), page[0][10]) == (5 if table == "revocations" else len(page), True)
            ((remedy,),) = session.run(LOG_GRANTS_SQL)
            assert remedy == f"ALTER TABLE sse_relay.{table} DISABLE ROW LEVEL SECURITY"
            log.run(remedy)


def test_row_level_security_that_holds_for_the_owner_stops_the_numbering(database: Database) -> None:
    owner = new_role(database, "owner")
    database.execute(f'CREATE SCHEMA sse_relay AUTHORIZATION "{owner}"')
    apply(database, owner)
    with Session(database, owner) as session:
        for table in TABLES_OF_THE_LOG:
            alter = f"ALTER TABLE sse_relay.{table}"
            database.execute(f"{alter} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
            for statement in (LOG_WAITING_SQL, LOG_ATTACH_SQL):
                message = session.refused("42501", statement, (None, None))
                assert f"row-level security hides rows of sse_relay.{table}" in message
                assert f"{alter} NO FORCE ROW LEVEL SECURITY" in message
            database.execute(f"{alter} NO FORCE ROW LEVEL SECURITY")
