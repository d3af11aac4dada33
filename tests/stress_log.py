"""The log under stress: publishers of every kind, dying relays, hopping clients, a crash of PostgreSQL.

As a command it runs as long as one likes; test_log.py runs it short:

    python tests/stress_log.py --events 50000
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import click
import psycopg2
import psycopg2.extensions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
from sse_relay import apply_schema

PUBLISHERS = 16
CLIENTS = 12
CHANNELS = tuple(f"channel-{number}" for number in range(6))
CHAINS = 4

# Each event says what its transaction could see of the chains when it published, and leaves its tag in
# `ledger`, so that the ledger tells what was committed, whatever the publisher got to hear about it.
SCENE_SQL = """
CREATE TABLE ledger (tag text PRIMARY KEY);
CREATE TABLE chain (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);
INSERT INTO chain SELECT generate_series(0, %s - 1);
CREATE TABLE parent (id int PRIMARY KEY);
INSERT INTO parent SELECT generate_series(0, 3);
CREATE TABLE child (parent_id int NOT NULL REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE noted (channel text, tag text, depth int);

CREATE FUNCTION say(channel text, tag text, own int DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    heads jsonb;
BEGIN
    SELECT jsonb_object_agg(id, n) INTO heads FROM chain;
    INSERT INTO ledger VALUES (tag);
    PERFORM sse_relay.publish(channel, jsonb_build_object('tag', tag, 'own', own, 'heads', heads));
END $$;

CREATE FUNCTION attempt(text, text, text, text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM say($1, $2);
    PERFORM 1 / 0;
EXCEPTION WHEN division_by_zero THEN
    PERFORM say($3, $4);
END $$;

CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM say(NEW.channel, NEW.tag);
    IF NEW.depth > 0 THEN
        INSERT INTO noted VALUES (NEW.channel, NEW.tag || '+', NEW.depth - 1);
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER note AFTER INSERT ON noted DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note();
"""


class Unwanted(Exception):  # noqa: N818  # a transaction's own wish, no error
    """Rolls a transaction back."""


class Transaction:
    """What one transaction of a publisher works with."""

    def __init__(
        self, cursor: psycopg2.extensions.cursor, chance: random.Random, tags: Iterator[str]
    ) -> None:
        self._cursor = cursor
        self.chance = chance
        self._tags = tags

    def run(self, sql: str, *parameters: object) -> None:
        self._cursor.execute(sql, parameters)

    def pause(self) -> None:
        time.sleep(self.chance.uniform(0, 0.01))

    def place(self) -> tuple[str, str]:
        """A random channel and a fresh tag."""
        return self.chance.choice(CHANNELS), next(self._tags)

    def say(self, own: int | None = None) -> None:
        self.run("SELECT say(%s, %s, %s)", *self.place(), own)
        self.pause()

    def refer(self) -> None:
        """Refer to a row that all share; the check is deferred, and waits for who has locked it."""
        self.run("INSERT INTO child VALUES (%s)", self.chance.randrange(4))


# Who locks a parent holds nothing that a referring transaction waits for, or they would deadlock by
# themselves.


def plain(do: Transaction) -> None:
    do.say()


def several(do: Transaction) -> None:
    for _ in range(do.chance.randint(2, 8)):
        do.say()


def repeatable(do: Transaction) -> None:
    do.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    do.say()
    do.say()


def rolled_back(do: Transaction) -> None:
    do.say()
    raise Unwanted


def savepoints(do: Transaction) -> None:
    do.say()
    do.run("SAVEPOINT one")
    do.say()
    do.run("ROLLBACK TO one")
    do.say()
    do.run("SAVEPOINT two")
    do.say()
    do.run("RELEASE two")


def caught(do: Transaction) -> None:
    do.run("SELECT attempt(%s, %s, %s, %s)", *do.place(), *do.place())


def chained(do: Transaction) -> None:
    """Take the next link of a chain: whoever takes it afterwards has seen this one."""
    chain = do.chance.randrange(CHAINS)
    if do.chance.random() < 0.3:
        do.say()
    do.run("UPDATE chain SET n = n + 1 WHERE id = %s", chain)
    do.say(own=chain)
    if do.chance.random() < 0.5:
        do.refer()


def referring(do: Transaction) -> None:
    do.refer()
    do.say()
    do.refer()


def locking(do: Transaction) -> None:
    do.say()
    do.run("SELECT FROM parent WHERE id = %s FOR UPDATE", do.chance.randrange(4))
    do.pause()
    do.say()


def deferred(do: Transaction) -> None:
    do.run("INSERT INTO noted VALUES (%s, %s, %s)", *do.place(), do.chance.randrange(3))
    do.refer()
    do.pause()


def immediate(do: Transaction) -> None:
    do.run("SET CONSTRAINTS ALL IMMEDIATE")
    do.run("INSERT INTO noted VALUES (%s, %s, %s)", *do.place(), do.chance.randrange(3))
    do.say()
    do.refer()


KINDS: tuple[Callable[[Transaction], None], ...] = (
    plain, several, repeatable, rolled_back, savepoints, caught, chained, chained, chained, referring,
    locking, deferred, immediate,
)  # fmt: skip


@dataclass
class Figures:
    """What a run saw."""

    seed: int
    committed: int = 0
    transactions: Counter[str] = field(default_factory=Counter)
    longest_commit: float = 0.0
    """Seconds; only of commits that came back."""
    lost_connections: int = 0
    connections: int = 0
    """Streams that the clients opened."""
    kills: int = 0
    suspensions: int = 0
    crashes: int = 0
    seconds: float = 0.0
    links: int = 0

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.committed} events of {sum(self.transactions.values())} transactions in"
            f" {self.seconds:.1f} s; {self.links} links of chains; {self.kills} relays killed,"
            f" {self.suspensions} stopped for a while; {self.crashes} crashes of PostgreSQL,"
            f" {self.lost_connections} publishers cut off; {self.connections} streams opened by {CLIENTS}"
            f" clients; longest commit {self.longest_commit * 1000:.0f} ms\n{dict(self.transactions)}"
        )


class Publisher:
    """Publishes in a thread until told to stop; connects again when PostgreSQL is back."""

    def __init__(self, number: int, dsn: str, durable: bool, figures: Figures, stop: threading.Event) -> None:
        self.error: Exception | None = None
        self._dsn = dsn
        self._settings = "SELECT 1" if durable else "SET synchronous_commit = off"
        self._figures = figures
        self._stop = stop
        self._chance = random.Random(f"{figures.seed} {number}")
        self._tags = (f"{number}.{count}" for count in itertools.count())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "a publisher hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with contextlib.closing(psycopg2.connect(self._dsn)) as connection:
                    with connection.cursor() as cursor:
                        cursor.execute(self._settings)
                    connection.commit()
                    while not self._stop.is_set():
                        self._transact(connection)
            except psycopg2.extensions.TransactionRollbackError as error:
                self.error = error  # a deadlock
                return
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                self._figures.lost_connections += 1
                self._stop.wait(0.05)
            except Exception as error:
                self.error = error
                return

    def _transact(self, connection: psycopg2.extensions.connection) -> None:
        kind = self._chance.choice(KINDS)
        with connection.cursor() as cursor:
            try:
                kind(Transaction(cursor, self._chance, self._tags))
            except Unwanted:
                connection.rollback()
            else:
                began = time.monotonic()
                connection.commit()
                self._figures.longest_commit = max(self._figures.longest_commit, time.monotonic() - began)
        self._figures.transactions[kind.__name__] += 1


def follow(
    address: str, channels: Iterable[str], last_event_id: str = "", *, asked: str = "", size: int = 65536
) -> Generator[dict[str, str], None, None]:
    """Read a stream: the fields of each block as it is complete; of a heartbeat, none.

    Args:
        asked: Sent as ``?lastEventId=``.
        size: Bytes to read at most at once.

    Raises:
        OSError, http.client.HTTPException: The relay is away, or says nothing for 5 s.
    """
    query = urlencode([*(("channel", channel) for channel in channels), ("lastEventId", asked)])
    headers = {"Accept": "text/event-stream"}
    if last_event_id:
        headers["Last-Event-ID"] = last_event_id
    with contextlib.closing(http.client.HTTPConnection(address, timeout=5)) as connection:
        connection.request("GET", f"/events?{query}", headers=headers)
        with connection.getresponse() as response:
            rest = b""
            while data := response.read1(size):
                *blocks, rest = (rest + data).split(b"\n\n")
                for block in blocks or [b":"]:
                    fields: dict[str, str] = {}
                    for line in block.decode().split("\n"):
                        name, _, value = line.partition(": ")
                        if name.strip(":"):
                            assert name not in fields, f"two fields of a name in {block!r}"
                            fields[name] = value
                    yield fields


class Hopper:
    """A client that goes from relay to relay, cuts its stream at any byte, and resumes by its position."""

    def __init__(
        self,
        number: int,
        addresses: list[str],
        channels: tuple[str, ...],
        figures: Figures,
        stop: threading.Event,
    ) -> None:
        self.channels = channels
        self.position = ""
        self.seen: list[tuple[int, int]] = []
        """Number and hash of the data of each event."""
        self.control: list[dict[str, str]] = []
        """The relays' own events, such as gaps."""
        self.error: Exception | None = None
        self._addresses = addresses
        self._figures = figures
        self._stop = stop
        self._chance = random.Random(f"{figures.seed} client {number}")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), "a client hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except (OSError, http.client.HTTPException):
                self._stop.wait(0.02)
            except Exception as error:
                self.error = error
                return

    def _follow(self) -> None:
        # Mostly the client leaves; sometimes it stays longer than relays live.
        until = time.monotonic() + self._chance.choice((0.02, 0.2, 1.0, 10.0)) * self._chance.random()
        size = self._chance.choice((64, 4096, 65536))
        self._figures.connections += 1
        with contextlib.closing(
            follow(self._chance.choice(self._addresses), self.channels, self.position, size=size)
        ) as blocks:
            for block in blocks:
                self.position = block.get("id", self.position)
                if block.get("event", "").startswith("relay."):
                    if '"reason":"start"' not in block["data"]:
                        self.control.append(block)
                elif "data" in block:
                    self.seen.append((int(self.position.partition("-")[2]), hash(block["data"])))
                if self._stop.is_set() or (self.position and time.monotonic() > until):
                    return


def count(database: harness.Database) -> int:
    ((committed,),) = database.execute("SELECT count(*) FROM ledger")
    assert isinstance(committed, int)
    return committed


def raise_errors(publishers: Iterable[Publisher], hoppers: Iterable[Hopper]) -> None:
    for error in [*(each.error for each in publishers), *(each.error for each in hoppers)]:
        if error is not None:
            raise AssertionError(f"a publisher or client failed: {error!r}") from error


def run(events: int, seed: int, *, durable: bool = True, crash: bool = True) -> Figures:
    """Publish at least ``events`` events under stress, and check that every client got what it must.

    Args:
        durable: False has the publishers set ``synchronous_commit = off``. What counts is what is in
            the database after the crash.
        crash: Restart PostgreSQL in the middle, without a shutdown.

    Raises:
        AssertionError: With what went wrong.
    """
    figures = Figures(seed)
    chance = random.Random(seed)
    publishing_ends, following_ends = threading.Event(), threading.Event()
    with harness.Server() as server, contextlib.ExitStack() as stack:
        database = server.database
        apply_schema(database.dsn)
        database.execute(SCENE_SQL, (CHAINS,))
        relays: dict[int, harness.Relay] = {}

        @stack.callback
        def close_relays() -> None:
            for relay in relays.values():
                relay.close()

        def start_relay(bind: str | None = None, wait: bool = True) -> harness.Relay:
            options = ("--source", "log", "--heartbeat", "1")
            relay = harness.Relay(*options, dsn=database.dsn, bind=bind, wait=False)
            if wait:
                relay.wait_for_log(harness.READY, 60)  # while all the others take what the machine has
            return relay

        for number in range(3):
            relays[number] = start_relay()
        addresses = [relay.bind for relay in relays.values()]
        stack.callback(following_ends.set)
        hoppers = [
            Hopper(
                number,
                addresses,
                # All of them, or a few.
                CHANNELS if number % 2 else tuple(chance.sample(CHANNELS, chance.randint(1, 3))),
                figures,
                following_ends,
            )
            for number in range(CLIENTS)
        ]
        harness.wait_until(
            lambda: all(hopper.position for hopper in hoppers), 30, "all clients to have a position"
        )

        began = time.monotonic()
        stack.callback(publishing_ends.set)
        publishers = [
            Publisher(number, database.dsn, durable, figures, publishing_ends) for number in range(PUBLISHERS)
        ]
        # Here, in the thread that started the server: it ends with its thread.
        mortal = itertools.cycle((1, 2))
        while (committed := count(database)) < events or figures.kills < 4 or figures.crashes < crash:
            raise_errors(publishers, hoppers)
            if crash and not figures.crashes and committed >= events // 2:
                server.restart("immediate")
                figures.crashes += 1
            if chance.random() < 0.3:
                relays[0].suspend()
                figures.suspensions += 1
                time.sleep(chance.uniform(0.05, 0.5))
                relays[0].resume()
            victim = next(mortal)
            relays[victim].kill()
            figures.kills += 1
            time.sleep(chance.uniform(0, 0.3))
            relays[victim].close()
            relays[victim] = start_relay(addresses[victim], wait=chance.random() < 0.5)
        publishing_ends.set()
        for publisher in publishers:
            publisher.join()
        figures.seconds = time.monotonic() - began
        for channel in CHANNELS:
            database.execute('SELECT sse_relay.publish(%s, \'{"tag": "end"}\'::jsonb)', (channel,))
        end = hash('{"tag": "end"}')
        try:
            harness.wait_until(
                lambda: all(
                    each.error or sum(data == end for _, data in each.seen[-50:]) >= len(each.channels)
                    for each in hoppers
                ),
                60,
                "the last events at all clients",
            )
        finally:
            following_ends.set()
        for hopper in hoppers:
            hopper.join()
        raise_errors(publishers, hoppers)
        figures.committed = count(database)
        check(database, hoppers, figures)
    return figures


def check(database: harness.Database, hoppers: list[Hopper], figures: Figures) -> None:
    """Hold the log against the ledger, the chains against the log, and each client against the log."""
    assert database.execute("SELECT * FROM sse_relay.pending") == []
    log = database.execute("SELECT id, channel, data FROM sse_relay.events ORDER BY id")
    told = [json.loads(data) for _, _, data in log]

    tags = Counter(event["tag"] for event in told if event["tag"] != "end")
    ledger = Counter(tag for (tag,) in database.execute("SELECT tag FROM ledger"))
    assert tags == ledger, f"lost {list(ledger - tags)[:5]}, too much {list(tags - ledger)[:5]}"

    head = dict.fromkeys(range(CHAINS), 0)
    for event in told:
        if (own := event.get("own")) is not None:
            head[own] += 1
            figures.links += 1
            assert event["heads"][str(own)] == head[own], f"a link of chain {own} out of order: {event}"
        for chain, n in event.get("heads", {}).items():
            assert n <= head[int(chain)], f"before what it had seen: {event}, chains at {head}"

    for number, hopper in enumerate(hoppers):
        assert not hopper.control, f"client {number} was told {hopper.control[:3]}"
        due = [(id_, hash(data)) for id_, channel, data in log if channel in hopper.channels]
        if hopper.seen != due:
            missing, extra = Counter(due) - Counter(hopper.seen), Counter(hopper.seen) - Counter(due)
            raise AssertionError(
                f"client {number} of {hopper.channels}: {len(hopper.seen)} events of {len(due)};"
                f" missing {sorted(missing)[:5]}, too much {sorted(extra)[:5]}"
            )


# ==== From a page to its stream ===============================================

ITEMS_SQL = "CREATE TABLE item (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)"
WRITERS = 6
LOADERS = 3


@dataclass
class Load:
    """One load of a page, and what its stream brought until the page's own last event."""

    page: set[str]
    streamed: list[tuple[int, str]]
    """Number and data of each event, the last one included."""


def write_items(dsn: str, chance: random.Random, stop: threading.Event) -> None:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        while not stop.is_set():
            for _ in range(chance.randint(1, 3)):
                cursor.execute(
                    "WITH new AS (INSERT INTO item DEFAULT VALUES RETURNING n)"
                    " SELECT sse_relay.publish('items', n::text) FROM new"
                )
                time.sleep(chance.uniform(0, 0.02))
            if chance.random() < 0.1:
                connection.rollback()
            else:
                connection.commit()


def load_page(
    connection: psycopg2.extensions.connection, addresses: list[str], fence: str, chance: random.Random
) -> Load:
    """Read position and page in the connection's isolation, then follow up to an event of this load's own."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT sse_relay.position()")
        ((position,),) = cursor.fetchall()
        time.sleep(chance.uniform(0, 0.01))
        cursor.execute("SELECT n::text FROM item")
        load = Load({n for (n,) in cursor.fetchall()}, [])
        connection.commit()
        time.sleep(chance.uniform(0, 0.01))
        fenced = False
        last = ""
        while not load.streamed or load.streamed[-1][1] != fence:
            stay = chance.choice((1, 3, 1_000_000))
            # As a browser: the address stays when it comes back.
            blocks = follow(chance.choice(addresses), ["items"], last, asked=position)
            with contextlib.closing(blocks):
                for block in blocks:
                    last = block.get("id", last)
                    assert not block.get("event", "").startswith("relay."), block
                    if "data" in block:
                        load.streamed.append((int(last.partition("-")[2]), block["data"]))
                        if block["data"] == fence:
                            break
                    if last and not fenced:
                        fenced = True
                        cursor.execute("SELECT sse_relay.publish('items', %s)", (fence,))
                        connection.commit()
                    stay -= "id" in block
                    if not stay:
                        break
    return load


def hand_over(
    database: harness.Database, addresses: list[str], pages: int, seed: int, *, together: bool
) -> int:
    """Load pages while others write, and check that page and stream together show each change.

    Args:
        together: Position and page are of one REPEATABLE READ transaction: no change comes twice. Else
            the position is read first, by itself: none is missed, some may come twice.

    Returns:
        How many events streams repeated.

    Raises:
        AssertionError: With what went wrong.
    """
    database.execute(ITEMS_SQL)
    stop = threading.Event()
    numbers = iter(range(pages))

    def load_pages(number: int) -> list[Load]:
        chance = random.Random(f"{seed} loader {number}")
        with contextlib.closing(psycopg2.connect(database.dsn)) as connection:
            connection.set_session("REPEATABLE READ" if together else None, autocommit=not together)
            return [load_page(connection, addresses, f"fence {n}", chance) for n in numbers]

    with concurrent.futures.ThreadPoolExecutor(WRITERS + LOADERS) as pool:
        try:
            writing = [
                pool.submit(write_items, database.dsn, random.Random(f"{seed} {n}"), stop)
                for n in range(WRITERS)
            ]
            loading = [pool.submit(load_pages, number) for number in range(LOADERS)]
            loads = [load for each in loading for load in each.result()]
        finally:
            stop.set()
        for each in writing:
            each.result()
    assert len(loads) == pages

    log = database.execute("SELECT id, data FROM sse_relay.events ORDER BY id")
    repeated = 0
    for load in loads:
        end = load.streamed[-1][0]
        changes = [(number, n) for number, n in log if n.isdigit() and number < end]
        streamed = [(number, n) for number, n in load.streamed if n.isdigit()]
        unseen = [change for change in changes if change[1] not in load.page]
        twice = len(streamed) - len(unseen)
        assert set(unseen) <= set(streamed), f"missed {set(unseen) - set(streamed)}"
        assert streamed == sorted(set(streamed) & set(changes))
        assert not (together and twice), f"repeated {sorted(set(streamed) - set(unseen))[:5]}"
        repeated += twice
    return repeated


@click.command()
@click.option("--events", default=50_000, show_default=True, help="Events to publish under stress; 0: none.")
@click.option("--pages", default=0, show_default=True, help="Pages to load under write load.")
@click.option("--seed", default=None, type=int, help="Default: a random one, which is printed.")
@click.option("--lazy", is_flag=True, help="Publishers set synchronous_commit = off.")
@click.option("--no-crash", is_flag=True, help="Leave PostgreSQL running.")
def main(events: int, pages: int, seed: int | None, lazy: bool, no_crash: bool) -> None:
    """Put the log under stress, and check that every client got what it must."""
    if seed is None:
        seed = random.randrange(1_000_000)
    click.echo(f"seed {seed}")
    if events:
        click.echo(run(events, seed, durable=not lazy, crash=not no_crash))
    for together in (True, False) if pages else ():
        with harness.Server() as server, server.fresh_database() as database, contextlib.ExitStack() as stack:
            apply_schema(database.dsn)
            relays = [
                stack.enter_context(harness.Relay("--source", "log", dsn=database.dsn)) for _ in range(2)
            ]
            began = time.monotonic()
            repeated = hand_over(database, [relay.bind for relay in relays], pages, seed, together=together)
            ((committed,),) = database.execute("SELECT count(*) FROM item")
            click.echo(
                f"{pages} pages, {'REPEATABLE READ' if together else 'position first'}: {committed} changes,"
                f" none missed, {repeated} repeated, {time.monotonic() - began:.1f} s"
            )


if __name__ == "__main__":
    main()
