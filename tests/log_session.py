"""A session that runs the relay's statements on the durable log, without a relay."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any, Final

import psycopg2
import psycopg2.extensions
import pytest

import pages
from harness import Database
from sse_relay import (
    LOG_ADVANCE_SQL,
    LOG_ATTACH_SQL,
    LOG_PRUNE_SQL,
    LOG_PUBLISH_SQL,
    LOG_READ_SQL,
    LOG_SESSION_SQL,
    LOG_WAITING_SQL,
    SCHEMA_SQL,
)

Row = tuple[Any, ...]

ROLE_NUMBERS = itertools.count(1)


def _grants_of_the_docs() -> dict[str, list[str]]:
    """What the docs' section on roles gives to each, one privilege on one object at a time."""
    section = pages.pages()["docs/log.md"].partition("\n## Roles\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    kinds = ("application", "signing out", "migrations", "relay", "operator")
    for kind, block in zip(kinds, re.findall(r"```sql\n(.*?)```", section, re.DOTALL), strict=True):
        for what, objects in re.findall(r"GRANT (.+?) ON (.+?) TO \w+;", " ".join(block.split())):
            of, names = re.fullmatch(r"(SCHEMA |FUNCTION )?(.*)", objects).groups()  # type: ignore[union-attr]
            found.setdefault(kind, []).extend(
                f"GRANT {privilege} ON {of or ''}{name}"
                for name in re.split(r", (?=sse_relay)", names)
                for privilege in re.split(r", (?=[A-Z])", what)
            )
    return found


# By role; followed by TO and its name.
GRANTS: Final = _grants_of_the_docs()


class Session:
    def __init__(self, database: Database, role: str | None = None) -> None:
        self.connection = database.connect()
        if role is not None:
            self.run(f'SET SESSION AUTHORIZATION "{role}"')
        self.run(LOG_SESSION_SQL)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.connection.close()

    def run(self, sql: str, parameters: object = None) -> list[Row]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, parameters)  # type: ignore[arg-type]  # any sequence or mapping
            return cursor.fetchall() if cursor.description else []

    def value(self, sql: str, parameters: object = None) -> Any:
        return self.run(sql, parameters)[0][0]

    def attach(self, epoch: str | None = None, newest: int | None = None) -> Row:
        return self.run(LOG_ATTACH_SQL, (epoch, newest))[0]

    def waiting(self, since: str | None = None) -> tuple[str, list[str], list[int]]:
        snapshot, xids, pids, upto, _ = self.run(LOG_WAITING_SQL, (since, None))[0]
        assert upto is None
        return snapshot, xids, pids

    def advance(self, xids: list[str], pids: list[int], sweep: bool = False) -> int:
        """Number what is listed, to the end; return how many events that were."""
        moved, more = 0, True
        while more:
            count, more = self.run(LOG_ADVANCE_SQL, (xids, pids, sweep))[0]
            moved += count
        return moved

    def sweep(self, since: str | None = None) -> str:
        snapshot, upto = since, None
        while True:
            snapshot, xids, pids, upto, _ = self.run(LOG_WAITING_SQL, (snapshot, upto))[0]
            for start in range(0, len(xids), 1000):
                self.advance(xids[start : start + 1000], pids[start : start + 1000], sweep=True)
            if upto is None:
                return str(snapshot)

    def publish(self, data: str = "x", channel: str = "orders", event: str | None = None) -> None:
        self.run(LOG_PUBLISH_SQL, (channel, data, event))

    def grow(self, count: int = 5) -> None:
        """Publish and number so many events of the data 0, 1 …."""
        for number in range(count):
            self.publish(str(number))
        self.sweep()

    def pending(self) -> list[Row]:
        return self.run("SELECT channel, event, data FROM sse_relay.pending ORDER BY seq")

    def position(self) -> str:
        return str(self.value("SELECT sse_relay.position()"))

    def prune(self) -> int:
        return int(self.value(LOG_PRUNE_SQL))

    def page(self, after: int = 0) -> list[Row]:
        return self.run(LOG_READ_SQL, {"id": after, "limit": 1000})

    def read(self, after: int = 0) -> list[Row]:
        events: list[Row] = []
        while True:
            page = self.page(after)
            if page[0][2] is None:
                return events
            assert len(page) <= 1000
            events += page
            after = page[-1][2]

    def datas(self) -> list[str]:
        return [row[6] for row in self.read()]

    def refused(self, code: str, sql: str, parameters: object = None) -> str:
        """Assert that a statement fails with an SQLSTATE, and return the message."""
        with pytest.raises(psycopg2.Error) as caught:
            self.run(sql, parameters)
        assert caught.value.pgcode == code, caught.value
        return str(caught.value)

    def notifications(self) -> list[Any]:
        self.connection.poll()
        taken = list(self.connection.notifies)
        self.connection.notifies.clear()
        return taken


def apply(database: Database, role: str | None = None, script: str = SCHEMA_SQL) -> None:
    """Apply the schema as `--apply` does: in one transaction."""
    connection = psycopg2.connect(database.dsn)
    try:
        with connection, connection.cursor() as cursor:
            if role is not None:
                cursor.execute(f'SET SESSION AUTHORIZATION "{role}"')
            cursor.execute(script)
    finally:
        connection.close()


def new_role(database: Database, kind: str, grants: Iterable[str] = ()) -> str:
    """Make a role, which belongs to the server and so has a name of its own, with these rights."""
    role = f"{kind} {next(ROLE_NUMBERS)}"
    database.execute(f'CREATE ROLE "{role}"')
    for grant in grants:
        database.execute(f'{grant} TO "{role}"')
    return role


def new_login(database: Database, kind: str, attributes: str = "", grants: Iterable[str] = ()) -> Database:
    """Make a role that logs in itself, so that no RESET leads back to a superuser."""
    role = new_role(database, kind, grants)
    database.execute(f"""ALTER ROLE "{role}" LOGIN PASSWORD 'secret' {attributes}""")
    return Database(psycopg2.extensions.make_dsn(database.dsn, user=role, password="secret"))


def damage(database: Database, table: str) -> None:
    """Make the newest value of a table that PostgreSQL keeps apart from its row impossible to read."""
    ((toast,),) = database.execute("SELECT reltoastrelid FROM pg_class WHERE oid = %s::regclass", (table,))
    ((name,),) = database.execute("SELECT %s::regclass::text", (toast,))
    # Nobody may write to it, unless it says that it is an ordinary table.
    database.execute("SET allow_system_table_mods = on")
    database.execute("UPDATE pg_class SET relkind = 'r' WHERE oid = %s", (toast,))
    database.execute(f"DELETE FROM {name} WHERE chunk_id = (SELECT max(chunk_id) FROM {name})")
    database.execute("UPDATE pg_class SET relkind = 't' WHERE oid = %s", (toast,))
