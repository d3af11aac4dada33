"""What is done to each server, and what is read off it: one function for each work.

A work is called once for each round and variant, most often a server, and returns its figures by name.
The rounds of a work take the variants in turn.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.synchronize
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import harness
from benchmark import servers
from benchmark.measure import (
    ALL_CORES,
    LOAD_CORE,
    PAYLOAD_BYTES,
    BenchmarkError,
    Delivered,
    Load,
    Meter,
    Report,
    Send,
    children,
    deliver,
    memory_bytes,
    socket_bytes,
)
from benchmark.servers import RELAY, RIVAL, Bench, Running

Figures = dict[str, float]

CPU = "µs CPU per delivery"
P50, P99 = "p50 ms", "p99 ms"
LOST, CUT = "events lost", "clients cut"
DELIVERIES = "deliveries/s"
# Above this share of its core, the load client itself was what was measured.
BUSY = 0.9


class Work(NamedTuple):
    """One work.

    Attributes:
        title: What is done, for the table.
        measure: Does it once.
        variants: To what.
        quick, full: Rounds; without quick ones it is left out of ``--quick``.
    """

    title: str
    measure: Callable[[Bench, str], Figures]
    variants: Sequence[str]
    quick: int
    full: int


def fan_out(bench: Bench, name: str, done: Delivered) -> Figures:
    if done.load_share > BUSY:
        bench.note(f"{name}: the load client used {done.load_share:.0%} of its core: it is measured, too")
    return {
        CPU: done.microseconds,
        P50: done.report.p50_ms,
        P99: done.report.p99_ms,
        LOST: done.lost,
        CUT: done.report.disconnected,
    }


def warm_up(load: Load, server: Running, readers: int | None = None) -> None:
    """Deliver a few events, so that what happens only once is not in the figures."""
    done = deliver(load, server.pids, server.send, 10, 100.0, readers=readers)
    if done.lost:
        raise BenchmarkError(f"while warming up: {done.report}")


# ==== Many clients of one channel =============================================


def steady(bench: Bench, name: str) -> Figures:
    with bench.start(name) as server, bench.load(server, bench.clients(1_000)) as load:
        warm_up(load, server)
        events = int(20 * bench.seconds(2, 5))
        return fan_out(bench, f"steady, {name}", deliver(load, server.pids, server.send, events, 20.0))


def many(bench: Bench, name: str) -> Figures:
    """Connect ten thousand, let them idle, then send to them."""
    clients = bench.clients(10_000)
    with bench.start(name) as server:
        before = memory_bytes(server.pids())
        with bench.load(server, clients, "--inflight", "1000") as load:
            time.sleep(bench.seconds(0.5, 3))
            memory = (memory_bytes(server.pids()) - before) / clients / 1024
            events = max(int(bench.seconds(3, 5)), 2)
            done = deliver(load, server.pids, server.send, events, 1.0)
    return {
        "connects/s": clients / load.connect["connect_s"],
        "KiB per idle connection": memory,
        **fan_out(bench, f"many, {name}", done),
    }


def burst(bench: Bench, name: str) -> Figures:
    with bench.start(name) as server, bench.load(server, bench.clients(1_000)) as load:
        warm_up(load, server)
        done = deliver(load, server.pids, server.send, 500, timeout=60.0)
    figures = fan_out(bench, f"burst, {name}", done)
    return {DELIVERIES: done.report.events / done.report.span_s, **figures}


def torrent(bench: Bench, name: str) -> Figures:
    with bench.start(name) as server, bench.load(server, bench.clients(1_000)) as load:
        warm_up(load, server)
        events = int(5_000 * bench.seconds(3, 5))
        done = deliver(load, server.pids, server.send, events, 5_000.0, batch=5)
    return fan_out(bench, f"torrent, {name}", done)


def arrivals(bench: Bench, name: str) -> Figures:
    """Let clients arrive all at once, and over a second, and measure what those already reading notice."""
    arriving = bench.clients(5_000)
    # It is nice, so that nothing on the load's core waits for it.
    options = ("--inflight", str(arriving), "--address-base", "2")
    with bench.start(name) as server, bench.load(server, bench.clients(1_000)) as load:
        warm_up(load, server)
        with bench.load(server, arriving, *options, nice=5, wait=False) as more:
            during = deliver(load, server.pids, server.send, int(50 * bench.seconds(1, 1)), 50.0)
            more.wait()
    return {
        "p99 ms of those there": during.report.p99_ms,
        LOST: during.lost,
        CUT: during.report.disconnected,
    }


def heartbeat(bench: Bench, name: str) -> Figures:
    """Hold ten thousand idle streams: heartbeats, canaries and whatever else the relay does then."""
    with bench.start(name) as server, bench.load(server, bench.clients(10_000), "--inflight", "1000") as load:
        warm_up(load, server)
        load.reset()
        meter, started = Meter(server.pids), time.monotonic()
        report = load.until(1 << 40, bench.seconds(15, 60))
        share = meter.read() / (time.monotonic() - started)
    return {"% of a core": 100 * share, CUT: report.disconnected}


def stall(bench: Bench, stopped: int) -> tuple[Report, int, float]:
    """Send 1,000 events a second to 200 clients of which some have stopped reading.

    Returns the report, how many events a reader lacks at the end, and the most bytes that were held for
    clients: growth of the relay's memory, and the kernel's for those that had most waiting.
    """
    clients, events = 200, int(1_000 * bench.seconds(3, 5))
    held = [0]
    ended = threading.Event()
    with servers.relay(bench) as server, bench.load(server, clients, "--stalled", str(stopped)) as load:
        warm_up(load, server, readers=clients - stopped)
        before = memory_bytes(server.pids())

        def watch() -> None:
            while not ended.wait(0.1):
                kernel = sum(socket_bytes(server.port)[:stopped])
                held.append(memory_bytes(server.pids()) - before + kernel)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            done = deliver(
                load, server.pids, server.send, events, 1_000.0, readers=clients - stopped, timeout=5.0
            )
        finally:
            ended.set()
            watcher.join()
    return done.report, events - done.report.least, max(held)


def stalled(bench: Bench, name: str) -> Figures:
    none, none_lost, none_held = stall(bench, 0)
    five, five_lost, _ = stall(bench, 5)
    hundred, hundred_lost, hundred_held = stall(bench, 100)
    return {
        "p99, 5 stalled / none": five.p99_ms / none.p99_ms,
        "MB for each that is stalled": (hundred_held - none_held) / 100 / 1e6,
        LOST: none_lost + five_lost + hundred_lost,
        CUT: none.disconnected + five.disconnected + hundred.disconnected,
    }


def transactions(bench: Bench, name: str) -> Figures:
    rounds = bench.events(200, 1_000)
    pad = "x" * (PAYLOAD_BYTES - 35)

    with bench.start(name) as server, bench.load(server, 10) as load:
        warm_up(load, server)
        with servers.connected(bench.postgres.dsn) as connection, connection.cursor() as cursor:
            load.reset()
            meter = Meter(server.pids)
            for _ in range(rounds):
                stamp = time.monotonic_ns()
                cursor.execute(
                    "SELECT count(pg_notify('ch0', 't=' || %s || ' i=' || n || %s))"
                    " FROM generate_series(1, 100) AS n",
                    (stamp, " " + pad),
                )
            report = load.until(100 * rounds * 10, 20)
            cpu = meter.read()
    notifications = 100 * rounds
    return {
        "µs CPU per notification": cpu * 1e6 / notifications,
        "notifications/s": notifications / report.span_s,
        LOST: notifications * 10 - report.events,
        CUT: report.disconnected,
    }


def rival(bench: Bench, name: str) -> Figures:
    """90 clients, each of which costs sse-relay-server a connection to PostgreSQL."""
    clients = min(bench.clients(9_000), 90)

    def as_json(send: Send, texts: Sequence[str]) -> None:
        # Both read this form.
        send([f'{{"event": "message", "data": "{text}"}}' for text in texts])

    with bench.start(name) as server, bench.load(server, clients) as load:
        send = functools.partial(as_json, server.send)
        pids = server.pids
        # The connections of sse-relay-server LISTEN after the head is out.
        harness.wait_until(lambda: not deliver(load, pids, send, 1, timeout=1.0).lost, 20, "an event for all")
        deliver(load, pids, send, 10, 100.0)
        both = Meter(lambda: [*pids(), *children(bench.postgres.pid)])
        done = deliver(load, pids, send, int(20 * bench.seconds(2, 5)), 20.0)
        cpu = both.read()
    return {
        "µs CPU per delivery, with PostgreSQL": cpu * 1e6 / done.report.events,
        **fan_out(bench, f"rival, {name}", done),
    }


# ==== The log =================================================================


def newest_position(dsn: str) -> str:
    with servers.connected(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT sse_relay.position()")
        return str(cursor.fetchone()[0]).partition("@")[0]  # type: ignore[index]  # a row there is


def log_read(bench: Bench, name: str) -> Figures:
    with servers.relay(bench, source="log") as server, bench.load(server, 1) as load:
        warm_up(load, server)
        bursts = bench.events(40, 200)
        done = deliver(load, server.pids, server.send, 100 * bursts, 2_000.0, batch=100)
    return {"µs CPU per event": done.microseconds, LOST: done.lost, CUT: done.report.disconnected}


def come_back(bench: Bench, clients: int, events: int, *, remembered: bool = False) -> tuple[Report, int]:
    """Let clients resume what the relay remembers or has to read; return the report, and what is lacking."""
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as publishing:
            server = (stack if remembered else publishing).enter_context(servers.relay(bench, source="log"))
            load = publishing.enter_context(bench.load(server, 1))
            before = newest_position(bench.postgres.dsn)
            deliver(load, server.pids, server.send, events, batch=1_000)
        if not remembered:
            server = stack.enter_context(servers.relay(bench, "--memory", "0", source="log"))
        options = ("--inflight", "1000", "--last-event-id", before)
        with bench.load(server, clients, *options) as load:
            report = load.until(events * clients, 60)
    return report, events * clients - report.events


def catch_up(bench: Bench, name: str) -> Figures:
    """One client resumes from the table, with as many events as one resume may have."""
    report, lost = come_back(bench, 1, bench.events(10_000, 10_000))
    # From the client's start on.
    return {"events/s": report.events / report.elapsed_s, LOST: lost, CUT: report.disconnected}


def resume(bench: Bench, name: str) -> Figures:
    report, lost = come_back(bench, bench.clients(10_000), 100, remembered=name == "from memory")
    return {"s until all have what they missed": report.elapsed_s, LOST: lost, CUT: report.disconnected}


DATA = '{"op": "update", "table": "public.orders", "key": {"id": 7}, "row": {"id": 7, "status": "paid"}}'
PLAIN = "insert + pg_notify"
WAYS = {
    "pg_notify": "SELECT pg_notify('orders', %(data)s)",
    PLAIN: "INSERT INTO plain (channel, event, data) VALUES ('orders', NULL, %(data)s)"
    " RETURNING pg_notify('plain', id::text)",
    "sse_relay.publish": "SELECT sse_relay.publish('orders', %(data)s)",
}
# The same without the commits, in one statement. The plain insert folds nothing either: each notification
# carries another id.
CALLS = 20_000
INSIDE = {
    "pg_notify": "PERFORM pg_notify('orders', repeat('x', 90) || i)",
    PLAIN: "INSERT INTO plain (channel, event, data) VALUES ('orders', NULL, repeat('x', 90))"
    " RETURNING id INTO new; PERFORM pg_notify('plain', new::text)",
    "sse_relay.publish": "PERFORM sse_relay.publish('orders', repeat('x', 90))",
}


def closed_loop(dsn: str, sql: str, connections: int, seconds: float) -> float:
    """Transactions per second of connections that each repeat a statement in autocommit."""
    done = [0] * connections
    ready = threading.Barrier(connections + 1, timeout=20)
    stop = threading.Event()

    def run(place: int) -> None:
        with servers.connected(dsn) as connection, connection.cursor() as cursor:
            cursor.execute(sql, {"data": DATA})
            ready.wait()
            while not stop.is_set():
                cursor.execute(sql, {"data": DATA})
                done[place] += 1

    threads = [threading.Thread(target=run, args=(place,)) for place in range(connections)]
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


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let this process run on any core: it publishes, and no relay's CPU is read."""
    os.sched_setaffinity(0, ALL_CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, {LOAD_CORE})


def publishing(bench: Bench, name: str) -> Figures:
    """Measure what a way to publish costs its transaction, with PostgreSQL on all cores and empty tables."""
    dsn = bench.durable_postgres.dsn
    with servers.connected(dsn) as connection, connection.cursor() as cursor, all_cores():
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS plain (id bigserial PRIMARY KEY, channel text NOT NULL,"
            " event text, data text NOT NULL, created timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        cursor.execute("TRUNCATE plain, sse_relay.pending")
        rate = closed_loop(dsn, WAYS[name], 1, bench.seconds(0.3, 0.7))
        cursor.execute("TRUNCATE plain, sse_relay.pending")
        block = f"DO $$ DECLARE new bigint; BEGIN FOR i IN 1..{CALLS} LOOP {INSIDE[name]}; END LOOP; END $$"
        cursor.execute("BEGIN")
        started = time.perf_counter()
        cursor.execute(block)
        alone = time.perf_counter() - started
        cursor.execute("ROLLBACK")
    return {
        "µs in a transaction of its own, fsync on": 1e6 / rate,
        "µs in one statement, fsync on": alone * 1e6 / CALLS,
    }


def delay(bench: Bench, name: str) -> Figures:
    """Measure from before the commit to the client, 200 events a second, PostgreSQL on all cores."""
    postgres = bench.durable_postgres
    with servers.relay(bench, source=name, postgres=postgres) as server, bench.load(server, 1) as load:
        warm_up(load, server)
        done = deliver(load, server.pids, server.send, int(200 * bench.seconds(2, 3)), 200.0)
    return {"p50 ms, fsync on": done.report.p50_ms, LOST: done.lost}


# ==== Scale ===================================================================


def hold_listeners(dsn: str, many: int, ready: multiprocessing.synchronize.Event) -> None:
    """Hold sessions that LISTEN and read what comes, as relays do."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(servers.connected(dsn)) for _ in range(many)]
        for connection in connections:
            connection.cursor().execute("LISTEN orders")
        ready.set()
        while True:
            for connection in select.select(connections, [], [])[0]:
                connection.poll()
                connection.notifies.clear()


def listeners(bench: Bench, name: str) -> Figures:
    """Measure one publisher's NOTIFYs, each a transaction, while sessions LISTEN to its channel."""
    dsn = bench.free_postgres.dsn
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=hold_listeners, args=(dsn, int(name), ready), daemon=True)
    with all_cores():
        holder.start()
        try:
            if not ready.wait(30):
                raise BenchmarkError("the listening sessions did not come up")
            rate = closed_loop(dsn, WAYS["pg_notify"], 1, bench.seconds(0.5, 2))
        finally:
            holder.kill()
            holder.join()
    return {"µs per NOTIFY": 1e6 / rate}


def relays(bench: Bench, name: str) -> Figures:
    """Run several relays on one log, and measure what they leave to those who publish at full speed.

    All are on the server's core, which in use they would not share.
    """
    postgres = bench.free_postgres
    with contextlib.ExitStack() as stack:
        for _ in range(int(name)):
            server = stack.enter_context(servers.relay(bench, source="log", postgres=postgres))
        warm_up(stack.enter_context(bench.load(server, 1)), server)
        with all_cores():
            publish = WAYS["sse_relay.publish"].replace("orders", "ch0")
            return {"publish/s, 8 at once": closed_loop(postgres.dsn, publish, 8, bench.seconds(0.5, 2))}


PEERS = (RELAY, "C limit", "nchan", "naive")
WORKS = {
    "steady": Work("1,000 clients, 20 events/s", steady, PEERS, 2, 5),
    "many": Work("10,000 clients, 1 event/s", many, (RELAY, "nchan", "naive"), 1, 3),
    "burst": Work("500 single NOTIFYs at once to 1,000 clients", burst, PEERS, 2, 3),
    "torrent": Work("5,000 events/s steady to 1,000 clients", torrent, (RELAY,), 1, 3),
    "arrivals": Work(
        "5,000 arrive at once while 1,000 receive 50 events/s", arrivals, (RELAY, "nchan"), 1, 5
    ),
    "heartbeat": Work("heartbeat for 10,000", heartbeat, (RELAY,), 1, 1),
    "stalled": Work("5 of 200 clients stalled at 1,000 events/s", stalled, (RELAY,), 1, 3),
    "transactions": Work("100 notifications per transaction", transactions, (RELAY,), 1, 5),
    "rival": Work("90 clients, 20 events/s", rival, (RELAY, RIVAL), 1, 3),
    "log": Work("source log, bursts of 100", log_read, (RELAY,), 1, 5),
    "catch-up": Work("source log, one client resumes 10,000 events", catch_up, (RELAY,), 1, 5),
    "resume": Work(
        "source log, 10,000 clients resume 100 events each", resume, ("from memory", "from the table"), 0, 3
    ),
    "publishing": Work("publishing an event", publishing, tuple(WAYS), 0, 5),
    "delay": Work("from before the commit to the client", delay, ("notify", "log"), 0, 3),
    "listeners": Work("sessions that LISTEN, on one PostgreSQL", listeners, ("1", "8", "64"), 0, 3),
    "relays": Work("relays on one log, all on one core", relays, ("1", "2", "4", "8"), 0, 2),
}
