"""Strangers who mean harm: half-open requests, readers that stall, floods, resets, and all descriptors taken.

After each of them the relay serves as before, and what it has taken it gives back. The largest crowds are
10,000 half requests and 1,000 streams, fewer where the limit of open files (ulimit -Hn) is below 12,000.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import harness
from harness import Database, RawStream, Relay, SseReader
from sse_relay import MIB

FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
HALF_OPEN, STALLED = (number * min(FILES, 12_000) // 12_000 for number in (10_000, 1_000))

# The crowds' own ends need descriptors too.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("many_descriptors")]

StartRelay = Callable[..., Relay]


@pytest.fixture
def start_limited(start_relay: StartRelay, database: Database, tmp_path: Path) -> StartRelay:
    def start(files: int, *options: str) -> Relay:
        """Start a relay that may open so many files."""
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nulimit -n {files} && exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return start_relay(*options, dsn=database.dsn, python=str(python), admin=True)

    return start


@contextlib.contextmanager
def siege(relay: Relay) -> Iterator[list[socket.socket]]:
    """Let a crowd come: the admin listener answers meanwhile, and what it took is free when it is gone."""
    before = descriptors(relay)
    crowd: list[socket.socket] = []
    over = threading.Event()
    answers: list[float] = []

    def ask() -> None:
        while relay.admin and not over.wait(0.1):
            start = time.monotonic()
            httpx.get(f"http://{relay.admin}/live", timeout=10).raise_for_status()
            answers.append(time.monotonic() - start)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield crowd
        finally:
            over.set()
            for client in crowd:
                client.close()
        asking.result(20)
    assert not relay.admin or 0 < max(answers) < 5
    wait_for_descriptors(relay, before)
    assert "Traceback" not in relay.log


def descriptors(relay: Relay) -> int:
    return len(os.listdir(f"/proc/{relay.pid}/fd"))  # noqa: PTH208  # one name each is all that counts


def forget_most_memory(relay: Relay) -> None:
    # https://docs.kernel.org/filesystems/proc.html
    Path(f"/proc/{relay.pid}/clear_refs").write_text("5")


def memory(relay: Relay) -> int:
    """Return the most memory that the relay has had so far, or since `forget_most_memory`, in bytes."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def wait_for_descriptors(relay: Relay, most: int) -> None:
    harness.wait_until(lambda: descriptors(relay) <= most, 20, f"at most {most} descriptors")


def connect(relay: Relay, receive_buffer: int | None = None, *, admin: bool = False) -> socket.socket:
    client = socket.socket()
    try:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        host, _, port = (relay.admin if admin else relay.bind).rpartition(":")
        client.connect((host, int(port)))
    except BaseException:
        client.close()
        raise
    return client


def send(client: socket.socket, data: bytes) -> bool:
    try:
        client.sendall(data)
    except OSError:
        return False
    return True


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def is_closed(client: socket.socket) -> bool:
    """Return whether the relay has closed, without waiting; reads what it sent before."""
    client.setblocking(False)
    try:
        while client.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


HALF_A_REQUEST = b"GET /events/orders HTTP/1.1\r\nHost: relay\r\nAccept: text/event-"


def test_crowds_that_stall_stop_nobody_and_leave_nothing(
    start_limited: StartRelay, database: Database
) -> None:
    relay = start_limited(FILES, "--max-backlog", "64KiB", "--linger", "0")
    start = memory(relay)
    with (
        siege(relay) as crowd,
        SseReader(relay.url("orders")) as patient,
        SseReader(relay.url("flood")) as busy,
    ):
        for reader in (patient, busy):
            reader.wait_for_id()
        stalled = [connect(relay, receive_buffer=4096) for _ in range(STALLED)]
        crowd.extend(stalled)
        for client in stalled:
            client.sendall(harness.http_request(relay.url("flood")))
        head = b"HTTP/1.1 200 OK"
        for client in stalled:
            assert client.recv(len(head)) == head

        sent = 0
        for number in range(HALF_OPEN):
            client = connect(relay)
            crowd.append(client)
            send(client, HALF_A_REQUEST)
            if number % (HALF_OPEN // 100) == 0:
                database.notify("flood", f"{sent} " + "x" * 7_900)
                sent += 1
            if number % 7 == 0:
                reset(client)
            if number % (HALF_OPEN // (STALLED // 4)) == 0:
                reset(stalled.pop())
        database.notify("orders", "still here")
        patient.wait_for_data("still here")
        busy.wait_for(lambda event: event.data.startswith(f"{sent - 1} "))
        assert [int(data.split()[0]) for data in busy.data] == list(range(sent))
        with SseReader(relay.url("orders")) as newcomer:
            newcomer.wait_for_id()
            database.notify("orders", "come in")
            newcomer.wait_for_data("come in")
        # Each stalled reader may hold its backlog and one burst, each half request some 6 KiB.
        assert memory(relay) - start < (64 + 16) * 1024 * STALLED + 8 * 1024 * HALF_OPEN + 16 * MIB


def count_open(crowd: list[socket.socket]) -> int:
    return sum(not is_closed(client) for client in crowd)


@pytest.mark.parametrize(
    ("admin", "files", "sent", "most"),
    [
        (False, 400, [b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"], 128),
        (True, 200, [b"", HALF_A_REQUEST, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"], 40),
    ],
    ids=["streams", "admin"],
)
def test_idle_connections_do_not_keep_others_out(
    admin: bool, files: int, sent: list[bytes], most: int, start_limited: StartRelay, database: Database
) -> None:
    """One answered request does not buy a place for longer than there is room."""
    relay = start_limited(files)
    with siege(relay) as crowd:
        for number in range(2 * files):
            crowd.append(connect(relay, admin=admin))
            if send(crowd[-1], sent[number % len(sent)]) and not admin:
                assert crowd[-1].recv(1 << 16).startswith(b"HTTP/1.1 404 ")
        with SseReader(relay.url("orders")) as reader:
            reader.wait_for_id()
            database.terminate_backends()
            reader.wait_for(lambda event: event.event == "relay.gap" and "outage" in event.data, 20)
            database.notify("orders", "welcome")
            reader.wait_for_data("welcome")
        harness.wait_until(lambda: count_open(crowd) <= most, what="few connections")


def test_half_a_request_is_bounded_in_bytes(start_limited: StartRelay, database: Database) -> None:
    """600 connections with 60 kB each would be 36 MB; and none may send more than 96 KiB."""
    relay = start_limited(FILES)
    with siege(relay) as crowd, SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        forget_most_memory(relay)
        start = memory(relay)
        for _ in range(600):
            crowd.append(connect(relay))
            send(crowd[-1], HALF_A_REQUEST + b"\r\nCookie: " + b"x" * 60_000)
        harness.wait_until(lambda: count_open(crowd) <= 300, what="some to be closed")
        assert count_open(crowd) > 100
        assert memory(relay) - start < 40 * MIB
        with connect(relay) as greedy:
            fields = b"".join(b"\r\nX-%d: %b" % (number, b"x" * 1_000) for number in range(100))
            for _ in range(4):
                send(greedy, HALF_A_REQUEST + fields)
            harness.wait_until(lambda: is_closed(greedy), what="the end of a long request")
        database.notify("orders", "still here")
        reader.wait_for_data("still here")
    assert "431" in relay.log


def test_requests_that_do_not_come_are_closed_in_time(
    start_relay: Callable[..., Relay], database: Database
) -> None:
    limit = 3.0
    relay = start_relay(dsn=database.dsn, constants={"REQUEST_TIMEOUT": limit})
    beginnings = {
        "nothing": b"",
        "a line without its end": b"GET /events/orders HTT",
        "no end of the headers": b"GET /events/orders HTTP/1.1\r\nHost: relay\r\n",
        "one header after the other": HALF_A_REQUEST,
        "a body that does not come": b"POST / HTTP/1.1\r\nHost: relay\r\nContent-Length: 9\r\n\r\nx",
    }
    with siege(relay) as clients:
        start = time.monotonic()
        for beginning in beginnings.values():
            clients.append(connect(relay))
            clients[-1].sendall(beginning)
        idle = connect(relay)
        clients.append(idle)
        idle.sendall(b"HEAD /events/orders HTTP/1.1\r\nHost: relay\r\n\r\n")
        ended: dict[str, float] = {}

        def all_ended() -> bool:
            for name, client in zip(beginnings, clients, strict=False):
                if name not in ended and is_closed(client):
                    ended[name] = time.monotonic() - start
            # A byte now and then is not a request.
            dribbling = clients[3]
            dribbling.setblocking(True)
            send(dribbling, b"x")
            return len(ended) == len(beginnings)

        harness.wait_until(all_ended, limit + 10, "the relay to close them")
        for name, seconds in ended.items():
            assert limit - 0.5 <= seconds <= limit + 4, name
        # It was answered, and may ask again.
        assert not is_closed(idle)


@pytest.fixture(scope="module")
def shared_relay(standing_database: Database) -> Iterator[Relay]:
    with Relay("--log-level", "debug", "--allow-channel", "*", dsn=standing_database.dsn) as relay:
        yield relay


BEGINNING = b"GET /events/orders HTTP/1.1\r\nHost: relay\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: relay\r\nTransfer-Encoding: chunked\r\n\r\n"
# What is sent once, then again and again.
FLOODS = {
    "headers": (BEGINNING, b"X-Flood: " + b"x" * 1_000 + b"\r\n"),
    "short headers": (BEGINNING, b"a:\r\n" * 1_000),
    "one long header": (BEGINNING + b"X-Flood: ", b"x" * 10_000),
    "a long target": (b"GET /events/", b"x" * 10_000),
    "a long method": (b"", b"G" * 10_000),
    "empty lines": (b"", b"\r\n" * 5_000),
    "a long body": (CHUNKED, b"a\r\n0123456789\r\n" * 700),
    "a long chunk extension": (CHUNKED + b"1;", b"x" * 10_000),
    "requests": (b"", b"HEAD /events/orders HTTP/1.1\r\nHost: relay\r\n\r\n" * 200),
    "refused requests": (b"", b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n" * 500),
    "bytes behind a stream's request": (BEGINNING + b"\r\n", b"x" * 10_000),
    "streams behind a stream": (b"", (BEGINNING + b"Accept: text/event-stream\r\n\r\n") * 100),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 10_000),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_floods_are_bounded_and_others_are_served_meanwhile(
    flood: str, shared_relay: Relay, standing_database: Database
) -> None:
    """What is sent is 30 MB, or as much as the relay takes in a second."""
    relay, lines = shared_relay, len(shared_relay.lines)
    beginning, more = FLOODS[flood]
    with siege(relay) as clients, SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        forget_most_memory(relay)
        start = memory(relay)
        clients += [connect(relay) for _ in range(3)]
        for client in clients:
            client.settimeout(0.2)  # which a relay that reads no further lets pass
        end = time.monotonic() + 1
        flowing = [client for client in clients if send(client, beginning)]
        total = 0
        while flowing and total < 30e6 and time.monotonic() < end:
            flowing = [client for client in flowing if send(client, more)]
            total += len(flowing) * len(more)
        standing_database.notify("orders", "meanwhile")
        reader.wait_for_data("meanwhile", timeout=5)
        assert memory(relay) - start < 24 * MIB
    # A line for each refusal, whose number depends on the machine: no more than some times what was sent.
    assert len("\n".join(relay.lines[lines:])) < 2_000_000 + 5 * total


def test_a_body_that_goes_on_behind_its_answer_is_no_error_of_ours(shared_relay: Relay) -> None:
    body = b"a\r\n0123456789\r\n" * 3_000
    for _ in range(50):
        with RawStream(shared_relay.bind, request=CHUNKED) as stream, contextlib.suppress(ConnectionError):
            stream.wait_for(b"404")
            for _ in range(10):
                stream.socket.sendall(body)
    with SseReader(shared_relay.url("orders")) as reader:
        reader.wait_for_id()
    assert "Traceback" not in shared_relay.log


def test_the_listener_comes_back_while_all_descriptors_are_taken(
    start_limited: StartRelay, database: Database
) -> None:
    relay = start_limited(300)
    with siege(relay) as crowd, SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        stop = threading.Event()

        def besiege() -> None:
            """Take every place there is, the streams' and those of half requests, again and again."""
            halves: list[socket.socket] = []
            while not stop.is_set():
                client = connect(relay)
                crowd.append(client)
                if len(crowd) <= 250:
                    send(client, harness.http_request(relay.url("orders")))
                else:
                    send(client, HALF_A_REQUEST)
                    halves.append(client)
                    if len(halves) > 250:
                        reset(halves.pop(0))

        besieging = threading.Thread(target=besiege, daemon=True)
        besieging.start()
        try:
            harness.wait_until(lambda: descriptors(relay) > 220, what="the descriptors to be taken")
            for _ in range(3):
                lines, gaps = len(relay.lines), len(reader.events)
                database.terminate_backends()
                harness.wait_until(lambda gaps=gaps: len(reader.events) > gaps, 10, "a gap")  # type: ignore[misc]
                assert reader.events[-1].event == "relay.gap"
                assert descriptors(relay) > 220
                assert any("PostgreSQL" in line for line in relay.lines[lines:])
            database.notify("orders", "through")
            reader.wait_for_data("through")
        finally:
            stop.set()
            besieging.join(20)
        assert httpx.get(f"http://{relay.admin}/ready").status_code == 200


# ==== Fuzzing =================================================================


PIECES = st.sampled_from(
    [
        b"GET ", b"POST ", b"OPTIONS ", b"/events/orders", b"/events?channel=", b"*", b"http://x:99999/",
        b" HTTP/1.1", b" HTTP/1.0", b" HTTP/9.9", b"\r\n", b"\r\n\r\n", b"\n", b"\0", b"\xff", b"Host: relay",
        b"Host: ", b"Accept: ", b"text/event-stream", b"Authorization: Bearer ", b"Cookie: a=b; c",
        b"Last-Event-ID: ", b"Content-Length: ", b"-1", b"99999999999999999999", b"Upgrade: websocket",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Connection: Upgrade",
        b"Expect: 100-continue", b"Origin: null", b"@1:2:3", b"0-0",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES | st.binary(max_size=20), max_size=14).map(b"".join))
@example(b"GET /events/orders HTTP/1.1\r\nHost: relay\r\nOrigin: null\r\n\r\n")
@example(b"GET /events/orders HTTP/1.1\r\nHost: relay\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
@example(
    b"GET /events/orders HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer \xff\xfe\r\nCookie: =;;\xff\r\n\r\n"
)
@example(b"GET http://x:99999/ HTTP/1.1\r\nHost: relay\r\n\r\n")
@example(
    b"GET /events/orders HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nxxxx"
)
def test_any_bytes_are_answered_or_closed_and_never_an_error_of_ours(
    shared_relay: Relay, request_bytes: bytes
) -> None:
    with RawStream(shared_relay.bind, request=request_bytes) as stream:
        with contextlib.suppress(OSError):
            stream.socket.shutdown(socket.SHUT_WR)
        # A stream stays open; what has no end waits for its time.
        deadline = time.monotonic() + 0.02
        while not stream.ended and time.monotonic() < deadline:
            time.sleep(0.002)
        assert stream.status < 500
    assert shared_relay.process.poll() is None
    for sign in ("Traceback", "should not happen", "Exception"):
        assert sign not in shared_relay.log
