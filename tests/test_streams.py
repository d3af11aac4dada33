"""Streams on the wire: how they open, resume, are refused; names, payloads and strangers of every kind."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness

StartRelay = Callable[..., harness.Relay]

OPENING = re.compile(
    rb":[^\n]*\nretry: (\d+)\n\nevent: relay\.gap\nid: ([0-9a-z]+-\d+)\n"
    rb'data: {"channels":\["orders"\],"reason":"start","since":null}\n\n'
)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}
PLAIN = {"Accept": "*/*"}


@pytest.fixture(scope="module")
def standing(standing_database: harness.Database) -> Iterator[harness.Relay]:
    with harness.Relay(dsn=standing_database.dsn) as running:
        yield running


# ==== Opening =================================================================


@pytest.mark.parametrize(
    ("version", "framing"), [("1.1", {"transfer-encoding": "chunked"}), ("1.0", {"connection": "close"})]
)
def test_a_stream_opens_with_headers_comment_retry_and_position(
    version: str, framing: dict[str, str], standing: harness.Relay
) -> None:
    with harness.RawStream(standing.bind, standing.url("orders"), version=version) as stream:
        body = stream.wait_for(b'"start","since":null}\n\n')
        assert stream.raw.startswith(f"HTTP/{version} 200 OK\r\n".encode())
        headers = stream.headers
        assert headers.pop("date").endswith("GMT")
        assert headers == {**STREAM_HEADERS, **framing}
    opening = OPENING.fullmatch(body)
    assert opening, body
    assert 2000 <= int(opening[1]) < 5000


def test_a_unix_socket_serves_streams_and_goes_with_the_relay(
    start_relay: StartRelay, database: harness.Database, tmp_path: Path
) -> None:
    path = tmp_path / "http.sock"
    relay = start_relay(dsn=database.dsn, bind=f"unix:{path}")
    with harness.SseReader(relay.url("orders"), unix=str(path)) as reader:
        reader.wait_for_id()
        database.notify("orders", "local")
        reader.wait_for_data("local")
    assert relay.stop() == 0
    assert not path.exists()


# ==== Refusals ================================================================


@pytest.mark.parametrize(
    ("target", "status"),
    [("/events", 400), ("/events/a%0Ab", 400), ("/events?channel=ok&channel=sse_relay", 403)],
)
def test_a_refusal_has_a_status_or_for_event_sources_an_event(
    target: str, status: int, standing: harness.Relay
) -> None:
    with harness.RawStream(standing.bind, target, headers={**PLAIN, "Connection": "close"}) as plain:
        problem = json.loads(plain.wait_for_end())
        assert plain.status == problem["status"] == status
        assert plain.headers["content-type"].startswith("application/problem+json")
        assert problem["detail"]
        assert "www-authenticate" not in plain.headers
    with harness.RawStream(standing.bind, target, headers={"Connection": "close"}) as in_band:
        body = in_band.wait_for_end()
        assert in_band.status == 200
        assert in_band.headers.items() >= STREAM_HEADERS.items()
    block = re.fullmatch(rb"retry: 86400000\nevent: relay\.refused\ndata: (.*)\n\n", body)
    assert block, body
    assert json.loads(block[1]) == {"status": status, "reason": problem["detail"]}


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/eventsx", 404),
        ("GET", "/favicon.ico", 404),
        ("OPTIONS", "/elsewhere", 404),
        ("POST", "/events/orders", 405),
        ("DELETE", "/events/orders", 405),
        ("HEAD", "/events/sse_relay", 403),
        ("HEAD", "/events", 400),
    ],
)
def test_outside_of_streams_the_status_is_always_true(
    method: str, target: str, status: int, standing: harness.Relay
) -> None:
    headers = {"Connection": "close", "Accept": "text/event-stream"}
    with harness.RawStream(standing.bind, target, method=method, headers=headers) as answer:
        answer.wait_for_end()
        assert answer.status == status
        assert ("allow" in answer.headers) == (status == 405)


def test_the_limit_on_clients_passes_when_one_leaves(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--max-clients", "2", dsn=database.dsn)
    request = {"Connection": "close"}
    with harness.SseReader(relay.url("a")) as first:
        first.wait_for_id()
        with harness.SseReader(relay.url("a")) as second:
            second.wait_for_id()
            with harness.RawStream(relay.bind, relay.url("a"), headers={**PLAIN, **request}) as plain:
                assert json.loads(plain.wait_for_end())["status"] == plain.status == 503
                assert int(plain.headers["retry-after"]) >= 2
            with harness.RawStream(relay.bind, relay.url("a"), headers=request) as in_band:
                assert re.fullmatch(rb"retry: \d{4}\n\n", in_band.wait_for_end())
                assert in_band.status == 200

        def admitted() -> bool:
            with harness.RawStream(relay.bind, relay.url("a")) as again:
                harness.wait_until(lambda: again.ended or b"\nid: " in again.body)
                return b"\nid: " in again.body

        harness.wait_until(admitted)


# ==== Names and payloads ======================================================

# What SQL, an address and a stream would each take for something else; the rest is in test_positions.
NAMES = [
    "orders", 'say "hi"', "x'; DROP TABLE users; --", 'x"; NOTIFY other; --', "$$", "\\'", "%41", "%", "/",
    "a?b", "a#b", "a&channel=b", "a+b", " ", " padded ", ".", "..", "A", "a", "error", "relay.gap", "data: x",
    "\u00e9", "e\u0301", "\U0001f389" * 15, "x" * 63, "\u2028", "\ufeff", "\u202eabc",
]  # fmt: skip


# What PostgreSQL and a real socket could change; the rest is in test_frames.
PAYLOADS = [
    " x ", "a\r\nb\rc\n", "x\nevent: forged\nid: 1\n\ndata: y", "\u2028\u0085\x0b\x1b\x7f", "\ufeff",
    "x" * 7_999, "\u00e9" * 3_999, "\n" * 7_999, "[" * 7_999, '{"event":"e","data":NaN}',
]  # fmt: skip


def test_awkward_names_are_names_and_awkward_payloads_arrive_unchanged(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    awkward = dict(zip(NAMES, itertools.cycle(PAYLOADS), strict=False))
    with (
        contextlib.ExitStack() as stack,
        harness.RawStream(standing.bind, standing.url(*NAMES)) as all_of_them,
    ):
        readers = [stack.enter_context(harness.SseReader(standing.url(name))) for name in NAMES]
        all_of_them.wait_for(b"\nid: ")
        for reader in readers:
            reader.wait_for_id()
        for number, (name, payload) in enumerate(awkward.items()):
            standing_database.notify(name, payload)
            standing_database.notify(name, f"event {number}")
        for number, (reader, payload) in enumerate(zip(readers, awkward.values(), strict=True)):
            reader.wait_for_data(f"event {number}")
            # Of its own channel and of nothing else.
            assert reader.data == [re.sub("\r\n?", "\n", payload), f"event {number}"]
        body = all_of_them.wait_for(f"data: event {len(NAMES) - 1}\n\n".encode()).decode()
    named = re.findall(r"^event: (.*)\nid: .*\ndata: event ", body, re.MULTILINE)
    shown = [name.replace("%", "%25").replace(":", "%3A") for name in NAMES]
    assert named == [f"{name}:" if name in ("error", "relay.gap") else name for name in shown]


# ==== Resuming ================================================================


def publish_three(relay: harness.Relay, database: harness.Database, channel: str) -> str:
    with harness.SseReader(relay.url(channel)) as reader:
        reader.wait_for_id()
        for data in "123":
            database.notify(channel, data)
        return reader.wait_for_data("3").id


def test_each_reason_for_a_gap_that_a_position_can_have(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    last = publish_three(standing, standing_database, "gaps")
    epoch, _, number = last.partition("-")
    long = "?" * 300
    for since, reason in [
        (f"other{epoch}-{number}", "restart"),
        (f"{epoch}-{int(number) + 100_000}", "ahead"),
        ("garbage", "unreadable"),
        ("42", "unreadable"),
        (f"{epoch}-", "unreadable"),
        (f"{epoch}-{'9' * 30}", "unreadable"),
        (long, "unreadable"),
        (f"{epoch}-0", "evicted"),
    ]:
        with harness.SseReader(standing.url("gaps"), last_event_id=since) as reader:
            reader.wait_for_id()
            assert reader.gaps == [{"channels": ["gaps"], "reason": reason, "since": since[:100]}]
            assert len(reader.events) == 1
            assert reader.blocks[-1].id.startswith(epoch)
            assert reader.starts == []
        with harness.SseReader(standing.url("gaps", "c", "d"), last_event_id="lost") as several:
            several.wait_for_id()
            expected = {"channels": ["gaps", "c", "d"], "reason": "unreadable", "since": "lost"}
            assert several.gaps == [expected]


# ==== Strangers ===============================================================


def test_what_no_header_can_carry_back_leaves_no_zombie(
    start_relay: StartRelay, database: harness.Database
) -> None:
    """Every origin of this machine is allowed while no access option is given; this one cannot be encoded."""
    relay = start_relay("--heartbeat", "0.2", admin=True, dsn=database.dsn)
    for origin in ("http://localhost:\u20ac", "http://localhost:\udcff", "http://127.0.0.1:\x80"):
        request = harness.http_request(relay.url("orders"), headers={"Origin": "?", "Connection": "close"})
        request = request.replace(b"?", origin.encode("utf-8", "surrogateescape"), 1)
        with harness.RawStream(relay.bind, request=request) as stream:
            harness.wait_until(lambda stream=stream: stream.ended or b":\n" in stream.raw)  # type: ignore[misc]
            assert stream.raw.startswith(b"HTTP/1.1 ")
    harness.wait_until(
        lambda: harness.metric(relay.admin, "clients") == 0, what="the clients to be forgotten"
    )
    publish_three(relay, database, "orders")
    assert "Traceback" not in relay.log
    assert "should not happen" not in relay.log
