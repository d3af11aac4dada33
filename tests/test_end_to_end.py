"""The promise as a whole, under load and cuts: nothing lost or twice, in order, or a gap that says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from sse_relay import (
    MIB,
    SOCKETS_PER_TURN,
    FairSelector,
    Hub,
    Interest,
    Listener,
    Memory,
    NotifySource,
    parse_dsn,
)

StartRelay = Callable[..., harness.Relay]
# ==== Slow clients ============================================================


def resident(relay: harness.Relay) -> int:
    status = Path(f"/proc/{relay.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024


# The most bytes on the wire that one event may have: a line end takes seven.
LINES = "\n" * (MIB // 7 - 10)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stage", "clients"),
    [("live", 20), ("from memory", 20), pytest.param("from the table", 500, marks=pytest.mark.slow)],
)
def test_clients_that_stall_at_any_stage_cost_at_most_2_mib_each_and_go_within_a_minute(
    stage: str, clients: int, start_relay: StartRelay, log_database: harness.Database
) -> None:
    memory = "16MiB" if stage == "from memory" else "0"
    relay = start_relay(
        "--source", "log", "--memory", memory, dsn=log_database.dsn, constants={"STALL_TIMEOUT": 3.0},
        admin=True,
    )  # fmt: skip
    ((position,),) = log_database.execute("SELECT sse_relay.position()")

    def publish() -> None:
        """In one transaction each: a page or a burst that is nearly full, and then the largest event."""
        for _ in range(3):
            log_database.execute(
                "SELECT sse_relay.publish('loud', repeat(E'\\n', 10400)) FROM generate_series(1, 25);"
                " SELECT sse_relay.publish('loud', %s), sse_relay.publish('loud', %s)",
                (LINES, LINES),
            )
            log_database.execute(
                "SELECT sse_relay.publish('loud', repeat('x', 1000)) FROM generate_series(1, 250)"
            )

    resuming = stage.startswith("from")
    url = relay.url("loud", **({"lastEventId": position.partition("@")[0]} if resuming else {}))
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(harness.SseReader(relay.url("end")))
        reader.wait_for_id()
        if resuming:
            publish()
            log_database.execute("SELECT sse_relay.publish('end', 'of it')")
            reader.wait_for_data("of it", 30)
        before = most = resident(relay)
        for _ in range(clients):
            stack.enter_context(harness.RawStream(relay.bind, url, reading=False, receive_buffer=4096))
        if not resuming:
            harness.wait_until(lambda: harness.metric(relay.admin, "clients") == clients + 1, 30)
            publish()

        def gone() -> bool:
            nonlocal most
            most = max(most, resident(relay))
            return (
                harness.metric(relay.admin, "clients") == 1
                and harness.metric(relay.admin, "cut_clients_total") == clients
            )

        harness.wait_until(gone, 60, "the clients to be cut")
        # And what memory keeps, some pages of the table, and what Python takes for the code.
        print(f"{(most - before) / clients / MIB:.2f} MiB each")  # noqa: T201  # shown on failure
        assert most - before < 2 * MIB * clients + (28 if resuming and memory != "0" else 12) * MIB
        log_database.execute("SELECT sse_relay.publish('end', 'and on')")
        reader.wait_for_data("and on", 30)
        assert reader.gaps == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_large_events_in_a_row_cut_nobody_and_lose_nothing(
    start_relay: StartRelay, log_database: harness.Database
) -> None:
    """One reads at 8 Mbit/s, which takes a second for each."""
    relay = start_relay("--source", "log", dsn=log_database.dsn, admin=True)
    host, _, port = relay.bind.rpartition(":")
    count, clients = 8, 100
    with harness.FreezableProxy((host, int(port)), bytes_per_second=1_000_000) as slow:
        address = f"127.0.0.1:{slow.port}"
        with (
            harness.Crowd(relay.bind, [relay.url("large")] * clients) as crowd,
            harness.Crowd(address, [f"http://{address}/events/large"]) as narrow,
        ):
            for each in (crowd, narrow):
                each.wait_for(b'"start"')
            for number in range(count):
                log_database.execute(
                    "SELECT sse_relay.publish('large', %s)", (f"{number} ".ljust(MIB - 100, "x"),)
                )
            for each in (crowd, narrow):
                each.wait_for(b"data: %d x" % (count - 1), 200)
                for data in each.received:
                    found = [int(number) for number in re.findall(rb"\ndata: (\d+) x", data)]
                    assert found == list(range(count))
                    assert data.count(b"relay.gap") == 1
                assert not each.ended
    assert harness.metric(relay.admin, "cut_clients_total") == 0


@pytest.mark.slow
def test_max_age_ends_streams_in_time_and_they_come_back_by_their_position(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--max-age", "2", dsn=database.dsn)
    with harness.RawStream(relay.bind, relay.url("orders")) as stream:
        began = time.monotonic()
        position = re.findall(rb"\nid: (\S+)", stream.wait_for(b"start"))[0].decode()
        body = stream.wait_for_end()
        # It ends at a full second.
        assert 0.7 < time.monotonic() - began < 5
        assert re.search(rb"\n\nretry: \d+\n\n$", body)
        assert not stream.finished
    database.notify("orders", "meanwhile")
    with harness.SseReader(relay.url("orders"), last_event_id=position) as again:
        again.wait_for_data("meanwhile")
        assert again.gaps == []


# ==== Bursts ==================================================================


def test_one_transaction_over_three_channels_is_one_write_in_order(
    relay: harness.Relay, database: harness.Database
) -> None:
    channels = ["one", "two", "three"]
    with harness.RawStream(relay.bind, relay.url(*channels)) as stream:
        stream.wait_for(b"\nid: ")
        opening, reads = len(stream.chunks), len(stream.received)
        published = [(channels[n % 3], str(n)) for n in range(30)]
        connection = database.connect()
        with contextlib.closing(connection), connection, connection.cursor() as cursor:
            for channel, data in published:
                cursor.execute("SELECT pg_notify(%s, %s)", (channel, data))
        stream.wait_for(b"data: 29\n\n")
        (chunk,) = stream.chunks[opening:]
        assert len(stream.received) == reads + 1
        found = re.findall(r"event: (\w+)\nid: \w+-\d+\ndata: (\d+)\n\n", chunk.decode())
        assert found == published


# ==== Stop ====================================================================


LAST_BLOCK = re.compile(rb"\r\n\r\n.*\r\nretry: (\d+)\n\n\r\n", re.DOTALL)


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.slow
def test_2000_streams_end_in_time_each_with_a_retry(relay: harness.Relay, database: harness.Database) -> None:
    with harness.Crowd(relay.bind, [relay.url(f"channel {n % 20}") for n in range(2_000)]) as crowd:
        crowd.wait_for(b"\nid: ", 40)
        began = time.monotonic()
        assert relay.stop() == 0
        lasted = time.monotonic() - began
        crowd.wait_for_end()
        waits = []
        for data in crowd.received:
            last = LAST_BLOCK.fullmatch(bytes(data[data.index(b"\r\n\r\n") :]))
            assert last, data[-100:]
            waits.append(int(last[1]))
    print(f"stopped in {lasted:.2f} s")  # noqa: T201  # shown on failure
    assert lasted < 1.5
    # Spread: as many milliseconds more as there were clients.
    assert min(waits) >= 2000
    assert max(waits) - min(waits) > 2000
    assert "Traceback" not in relay.log


@pytest.mark.parametrize(("signals", "status", "within"), [(1, 0, 3), (2, -signal.SIGTERM, 1)])
def test_a_client_that_does_not_read_does_not_hold_up_the_stop_nor_a_second_signal(
    signals: int, status: int, within: float, start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--max-backlog", "16MiB", dsn=database.dsn)
    with harness.RawStream(relay.bind, relay.url("loud"), reading=False, receive_buffer=4096):
        with harness.SseReader(relay.url("loud")) as reader:
            reader.wait_for_id()
            for _ in range(3):
                database.execute(
                    "SELECT pg_notify('loud', n || repeat('x', 4000)) FROM generate_series(1, 60) AS n"
                )
            database.notify("loud", "all")
            reader.wait_for_data("all")
        for _ in range(signals):
            began = time.monotonic()
            relay.process.terminate()
            relay.wait_for_log("stopping")
        assert relay.wait() == status
        assert time.monotonic() - began < within


def test_a_request_that_waits_for_postgresql_is_told_to_come_back_at_the_stop(
    start_relay: StartRelay, database: harness.Database
) -> None:
    with harness.FreezableProxy.before(database) as proxy:
        proxy.refuse()
        relay = start_relay(dsn=proxy.dsn(database), wait=False)
        relay.wait_for_log("cannot reach PostgreSQL")
        with harness.RawStream(relay.bind, relay.url("orders")) as waiting:
            # Answered, so the relay has also read the request before it on its socket.
            with harness.RawStream(relay.bind, "/elsewhere") as other:
                other.wait_for(b'"status": 404')
            assert waiting.raw == b""
            assert relay.stop() == 0
            assert re.fullmatch(rb"retry: \d+\n\n", waiting.wait_for_end())
            assert waiting.status == 200


def test_a_late_request_on_an_open_connection_is_told_to_come_back(
    relay: harness.Relay, database: harness.Database
) -> None:
    with harness.RawStream(relay.bind, "/elsewhere") as late:
        late.wait_for(b'"status": 404')
        before = len(late.raw)
        relay.process.terminate()
        relay.wait_for_log("stopping")
        with contextlib.suppress(OSError):
            late.socket.sendall(harness.http_request(relay.url("orders")))
        late.wait_for_end()
        answer = late.raw[before:]
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert re.search(rb"\r\n\r\nretry: \d+\n\n$", answer)
        assert relay.wait() == 0


def test_clients_that_come_at_the_moment_of_the_stop_are_answered_and_not_reset(
    relay: harness.Relay, database: harness.Database
) -> None:
    host, _, port = relay.bind.rpartition(":")
    relay.suspend()
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(10):
            client = stack.enter_context(socket.create_connection((host, int(port)), 10))
            client.sendall(harness.http_request(relay.url("orders")))
            clients.append(client)
        relay.process.terminate()
        relay.resume()
        answers = []
        for client in clients:
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while data := client.recv(65536):
                    answer += data
            answers.append(answer)
        assert relay.wait() == 0
    assert all(b"\nretry: " in answer for answer in answers)


# ==== The loop ================================================================


@pytest.mark.parametrize("read", [True, False])
def test_few_sockets_in_one_turn_postgresql_first_and_nobody_is_forgotten(read: bool) -> None:
    pairs = [socket.socketpair() for _ in range(2 * SOCKETS_PER_TURN + 5)]
    with FairSelector() as selector, contextlib.ExitStack() as stack:
        for near, far in pairs:
            stack.enter_context(near)
            stack.enter_context(far)
            selector.register(near, selectors.EVENT_READ)
            far.send(b"x")
        urgent = pairs[-1][0].fileno()
        selector.first = {urgent}
        turns = []
        for _ in range(4):
            turns.append([key.fd for key, _ in selector.select(0)])
            for fd in turns[-1] if read else ():
                os.read(fd, 1)
        assert turns[0][0] == urgent
        assert max(map(len, turns)) <= SOCKETS_PER_TURN + 1
        served = [fd for turn in turns for fd in turn]
        assert set(served) == {near.fileno() for near, _ in pairs}
        # Who is always ready keeps nobody else from a turn, and who is not gets none.
        assert (len(served) == len(set(served))) is read


async def test_the_sockets_to_postgresql_are_those_that_come_first(database: harness.Database) -> None:
    def peers() -> list[int]:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket(fileno=os.dup(fd))) for fd in listener.descriptors]
            return [sock.getpeername()[1] for sock in sockets]

    hub = Hub(1_000, 15.0)
    source = NotifySource(hub, Memory(1_000), Interest(hub.channels, 60.0, 10))
    listener = Listener(database.dsn, source)
    running = asyncio.create_task(listener.run())
    port = int(parse_dsn(database.dsn)["port"])
    try:
        for _ in range(2):
            async with asyncio.timeout(20):
                await listener.ready.wait()
            assert peers() == [port, port]
            database.terminate_backends()
            async with asyncio.timeout(20):
                while listener.ready.is_set():  # noqa: ASYNC110  # no event for the loss
                    await asyncio.sleep(0.005)
            assert listener.descriptors == set()
    finally:
        running.cancel()
        await asyncio.wait([running])
