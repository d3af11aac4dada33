"""What ``publish`` costs, against the ordinary way: an insert and a ``pg_notify`` in one statement.

Interleaved rounds on one server, medians. Each connection publishes in a closed loop in autocommit; the
figure of a round is transactions per second over all connections. Nothing listens. ``pending`` and the
plain table are emptied before each round. Run it once on a server with fsync on and once with it off:

    python tests/bench_publish.py "host=127.0.0.1 user=postgres dbname=bench" --rounds 9 --seconds 1

A second pair measures CPU alone: 20,000 calls in one statement, so that no commit, no client and no
network stand in it. Schema sse_relay and table plain of the database are dropped and made anew.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sse_relay import SCHEMA_SQL

DATA = '{"op": "update", "table": "public.orders", "key": {"id": 7}, "row": {"id": 7, "status": "paid"}}'
EVENT = {"channel": "orders", "data": DATA}

PLAIN_SQL = """
INSERT INTO plain (channel, event, data) VALUES (%(channel)s, NULL, %(data)s)
RETURNING pg_notify('plain', id::text)
"""
WAYS = {
    "insert + pg_notify": PLAIN_SQL,
    "sse_relay.publish": "SELECT sse_relay.publish(%(channel)s, %(data)s)",
    "pg_notify alone": "SELECT pg_notify(%(channel)s, %(data)s)",
}
# The plain insert folds nothing either: each notification carries another id.
INSIDE = {
    "insert + pg_notify": """
        DO $$ DECLARE new_id bigint; BEGIN FOR i IN 1..20000 LOOP
            INSERT INTO plain (channel, event, data) VALUES ('orders', NULL, repeat('x', 90))
                RETURNING id INTO new_id;
            PERFORM pg_notify('plain', new_id::text);
        END LOOP; END $$""",
    "sse_relay.publish": """
        DO $$ BEGIN FOR i IN 1..20000 LOOP
            PERFORM sse_relay.publish('orders', repeat('x', 90));
        END LOOP; END $$""",
}


def prepare(dsn: str) -> None:
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA IF EXISTS sse_relay CASCADE; DROP TABLE IF EXISTS plain")
        cursor.execute(SCHEMA_SQL)
        cursor.execute("""CREATE TABLE plain (id bigserial PRIMARY KEY, channel text NOT NULL, event text,
            data text NOT NULL, created timestamptz NOT NULL DEFAULT clock_timestamp())""")


def empty(dsn: str) -> None:
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("TRUNCATE plain, sse_relay.pending")


def closed_loop(dsn: str, sql: str, *, connections: int, seconds: float) -> float:
    """Transactions per second of some connections that each run a statement again and again."""
    done = [0] * connections
    ready = threading.Barrier(connections + 1, timeout=10)
    stop = threading.Event()

    def publish(place: int) -> None:
        connection = psycopg2.connect(dsn)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql, EVENT)
            ready.wait()
            while not stop.is_set():
                cursor.execute(sql, EVENT)
                done[place] += 1
        connection.close()

    threads = [threading.Thread(target=publish, args=(place,)) for place in range(connections)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    elapsed = time.perf_counter() - started
    for thread in threads:
        thread.join()
    return sum(done) / elapsed


def inside(dsn: str, sql: str) -> float:
    """Calls per second within one statement, rolled back."""
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        started = time.perf_counter()
        cursor.execute(sql)
        elapsed = time.perf_counter() - started
        connection.rollback()
    return 20_000 / elapsed


def compare(dsn: str, label: str, ways: dict[str, str], rounds: int, measure: Callable[[str], float]) -> None:
    """Print each way's median rate, and its cost against the first way's, of rounds that take turns."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways if turn % 2 else reversed(ways):
            empty(dsn)
            rates[way].append(measure(ways[way]))
    base = statistics.median(rates["insert + pg_notify"])
    for way, found in rates.items():
        rate = statistics.median(found)
        print(f"{label:14} {way:20} {rate:8.0f}/s  {1e6 / rate:7.1f} us  cost {base / rate:.2f}")  # noqa: T201  # its output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dsn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    prepare(options.dsn)
    for connections in (1, 8):
        measure = functools.partial(
            closed_loop, options.dsn, connections=connections, seconds=options.seconds
        )
        compare(options.dsn, f"{connections} connections", WAYS, options.rounds, measure)
    compare(options.dsn, "one statement", INSIDE, options.rounds, functools.partial(inside, options.dsn))


if __name__ == "__main__":
    main()
