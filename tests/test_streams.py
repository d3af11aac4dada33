"""Streams on the wire: how they open, resume, are refused; names, payloads and strangers of every kind."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg2
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
def standing_database(server: harness.Server) -> Iterator[harness.Database]:
    with server.fresh_database() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def standing(standing_database: harness.Database) -> Iterator[harness.Relay]:
    """A relay with the defaults, for tests that leave nothing behind on it."""
    with harness.Relay(dsn=standing_database.dsn) as running:
        yield running


def gap(channels: str, reason: str, since: str | None) -> tuple[str, object]:
    return "relay.gap", {"channels": channels.split(), "reason": reason, "since": since}


def told(reader: harness.SseReader) -> list[tuple[str, object]]:
    """Return name and data of all events; the relay's own data is read as JSON."""
    return [
        (event.event, json.loads(event.data) if event.event.startswith("relay.") else event.data)
        for event in reader.events
    ]


# ==== Opening =================================================================


def test_a_stream_opens_with_headers_comment_retry_and_position(standing: harness.Relay) -> None:
    with harness.RawStream(standing.bind, standing.url("orders")) as stream:
        body = stream.wait_for(b'"start","since":null}\n\n')
        assert stream.raw.startswith(b"HTTP/1.1 200 OK\r\n")
        headers = stream.headers
        assert headers.pop("date").endswith("GMT")
        assert headers == {**STREAM_HEADERS, "transfer-encoding": "chunked"}
    opening = OPENING.fullmatch(body)
    assert opening, body
    assert 2000 <= int(opening[1]) < 5000


def test_no_accept_header_is_needed(standing: harness.Relay, standing_database: harness.Database) -> None:
    with harness.RawStream(standing.bind, standing.url("orders"), headers=PLAIN) as stream:
        stream.wait_for(b"\nid: ")
        standing_database.notify("orders", "for curl")
        stream.wait_for(b"data: for curl\n\n")


def test_http_1_0_gets_a_plain_body(standing: harness.Relay, standing_database: harness.Database) -> None:
    with harness.RawStream(standing.bind, standing.url("orders"), version="1.0") as stream:
        assert OPENING.fullmatch(stream.wait_for(b"null}\n\n"))
        assert stream.raw.startswith(b"HTTP/1.0 200 OK\r\n")
        assert stream.headers["connection"] == "close"
        assert "transfer-encoding" not in stream.headers
        standing_database.notify("orders", "plain")
        assert stream.wait_for(b"plain\n\n").count(b"data: ") == 2


def test_head_gives_the_headers_of_a_stream(standing: harness.Relay) -> None:
    request = {"method": "HEAD", "headers": {"Connection": "close"}}
    with harness.RawStream(standing.bind, standing.url("orders"), **request) as answer:  # type: ignore[arg-type]  # a table of arguments
        assert answer.wait_for_end() == b""
        assert answer.status == 200
        assert answer.headers.items() >= STREAM_HEADERS.items()


def test_a_stream_of_several_channels_names_them(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    with (
        harness.SseReader(standing.url("a", "b", "a", "error")) as several,
        harness.SseReader(standing.url("b", "b")) as twice,
    ):
        several.wait_for_id()
        twice.wait_for_id()
        standing_database.notify("a", "1")
        standing_database.notify("b", json.dumps({"event": "tick", "data": "2"}))
        standing_database.notify("error", "3")
        standing_database.notify("b", "4")
        several.wait_for_data("4")
        twice.wait_for_data("4")
        assert told(several) == [("a", "1"), ("b:tick", "2"), ("error:", "3"), ("b", "4")]
        assert told(twice) == [("tick", "2"), ("message", "4")]


def test_path_slash_serves_channels_at_the_root(start_relay: StartRelay, database: harness.Database) -> None:
    relay = start_relay("--path", "/", dsn=database.dsn)
    with (
        harness.SseReader(relay.url("events", path="/")) as one,
        harness.SseReader(relay.url("a", "events", path="/")) as two,
    ):
        one.wait_for_id()
        two.wait_for_id()
        database.notify("events", "at the root")
        one.wait_for_data("at the root")
        two.wait_for_data("at the root")
    with harness.RawStream(relay.bind, "/", headers={**PLAIN, "Connection": "close"}) as refused:
        refused.wait_for_end()
        assert refused.status == 400


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


def test_an_idle_stream_is_written_to(start_relay: StartRelay, database: harness.Database) -> None:
    relay = start_relay("--heartbeat", "0.2", dsn=database.dsn)
    with harness.RawStream(relay.bind, relay.url("orders")) as stream:
        body = stream.wait_for(b"}\n\n:\n:\n:\n")
        assert OPENING.match(body)


# ==== Refusals ================================================================

REFUSED = [
    ("/events", 400),
    ("/events/", 400),
    ("/events?channel=", 400),
    ("/events/%00", 400),
    ("/events/a%0Ab", 400),
    ("/events/a%0D", 400),
    ("/events/%7F", 400),
    ("/events/%C2%85", 400),
    ("/events/%FF", 400),
    ("/events?channel=%ED%A0%80", 400),
    ("/events/..", 400),
    ("/events/a?channel=b", 400),
    ("/events/" + "x" * 64, 400),
    ("/events/" + quote("é" * 32), 400),
    ("/events?" + "&".join(f"channel={n}" for n in range(51)), 400),
    ("/events?" + "&".join("channel=same" for _ in range(500)), 400),
    ("/events/sse_relay", 403),
    ("/events/sse_relay_canary_00", 403),
    ("/events?channel=ok&channel=sse_relay", 403),
]


@pytest.mark.parametrize(("target", "status"), REFUSED)
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


def test_refusals_are_counted_by_their_true_status(
    start_relay: StartRelay, database: harness.Database
) -> None:
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay("--admin", admin, dsn=database.dsn)
    for target, headers in [("/events", PLAIN), ("/events", {}), ("/events/sse_relay", {}), ("/x", {})]:
        with harness.RawStream(relay.bind, target, headers={**headers, "Connection": "close"}) as answer:
            answer.wait_for_end()
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as response:
        metrics = response.read().decode()
    counted = dict(
        re.findall(r'^sse_relay_refusals_total\{status="(\d+)"\} ([\d.]+)$', metrics, re.MULTILINE)
    )
    found = {status: float(count) for status, count in counted.items() if float(count)}
    assert found == {"400": 2, "403": 1, "404": 1}


def expect_passing_refusal(relay: harness.Relay, *channels: str) -> None:
    """Check that a stream is refused for now: 503, or only ``retry:`` for an EventSource."""
    with harness.RawStream(
        relay.bind, relay.url(*channels), headers={**PLAIN, "Connection": "close"}
    ) as plain:
        assert json.loads(plain.wait_for_end())["status"] == plain.status == 503
        assert int(plain.headers["retry-after"]) >= 2
    with harness.RawStream(relay.bind, relay.url(*channels), headers={"Connection": "close"}) as in_band:
        assert re.fullmatch(rb"retry: \d{4}\n\n", in_band.wait_for_end())
        assert in_band.status == 200


def test_the_limit_on_clients_passes_when_one_leaves(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--max-clients", "2", dsn=database.dsn)
    with harness.SseReader(relay.url("a")) as first:
        first.wait_for_id()
        with harness.SseReader(relay.url("a")) as second:
            second.wait_for_id()
            expect_passing_refusal(relay, "a")

        def admitted() -> bool:
            with harness.RawStream(relay.bind, relay.url("a")) as again:
                harness.wait_until(lambda: again.ended or b"\nid: " in again.body)
                return b"\nid: " in again.body

        harness.wait_until(admitted)


def test_the_limit_on_channels_counts_those_with_clients(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--max-channels", "3", "--linger", "3600", dsn=database.dsn)
    with harness.SseReader(relay.url("a", "b")) as first:
        first.wait_for_id()
        with harness.SseReader(relay.url("c")) as second:
            second.wait_for_id()
            for name in ("d", "e", "f", "g"):
                expect_passing_refusal(relay, name)
                expect_passing_refusal(relay, "a", name)
            with harness.SseReader(relay.url("a", "c")) as known:
                known.wait_for_id()

        # Nobody watches c now, and nobody ever watched those refused: there is room for one.
        def admitted() -> bool:
            with harness.RawStream(relay.bind, relay.url("d")) as again:
                harness.wait_until(lambda: again.ended or b"\nid: " in again.body)
                return b"\nid: " in again.body

        harness.wait_until(admitted)
        database.notify("a", "unharmed")
        first.wait_for_data("unharmed")


# ==== Other origins ===========================================================


def ask(
    relay: harness.Relay, origin: str | None, method: str = "HEAD", target: str = "/events/a"
) -> harness.RawStream:
    """Make a request that ends at once; return its answer, complete."""
    headers = {**PLAIN, "Connection": "close", **({"Origin": origin} if origin else {})}
    with harness.RawStream(relay.bind, target, method=method, headers=headers) as answer:
        answer.wait_for_end()
        return answer


def test_pages_of_this_machine_may_read_while_nothing_else_is_said(standing: harness.Relay) -> None:
    for origin in ("http://localhost:5173", "http://127.0.0.1:8000", "http://localhost:80"):
        answer = ask(standing, origin)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin"
        refused = ask(standing, origin, "GET", "/events")
        assert refused.status == 400
        assert refused.headers["access-control-allow-origin"] == origin
    own = ask(standing, f"http://{standing.bind}")
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers


FOREIGN = [
    "null",
    "https://app.example",
    "http://localhost.evil:80",
    "https://localhost:1",
    "http://[::1]:80",
    "x",
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_pages_of_other_machines_may_not(origin: str, standing: harness.Relay) -> None:
    answer = ask(standing, origin)
    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers
    with harness.RawStream(standing.bind, standing.url("a"), headers={"Origin": origin}) as stream:
        assert b'"status":403' in stream.wait_for(b"event: relay.refused\n")


def test_an_allowed_origin_is_answered_a_preflight_and_takes_the_place_of_the_default(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--allow-origin", "https://app.example", dsn=database.dsn)
    preflight = ask(relay, "https://app.example", "OPTIONS")
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "last-event-id" in preflight.headers["access-control-allow-headers"].lower()
    assert ask(relay, "https://other.example", "OPTIONS").status == 403
    assert ask(relay, "http://localhost:5173").status == 403
    with harness.SseReader(relay.url("a"), {"Origin": "https://app.example"}) as reader:
        assert reader.response is not None
        assert reader.response.headers["access-control-allow-origin"] == "https://app.example"
        assert reader.response.headers["access-control-allow-credentials"] == "true"


# ==== Names and payloads ======================================================

NAMES = [
    "orders",
    'say "hi"',
    "it's",
    "a;b",
    "x'; DROP TABLE users; --",
    'x"; NOTIFY other; --',
    "$$",
    "\\",
    "\\'",
    "%41",
    "%",
    "a/b",
    "/",
    "a?b",
    "a#b",
    "a&channel=b",
    "a+b",
    " ",
    " padded ",
    ".",
    "..",
    "...",
    "A",
    "a",
    "{id}",
    "error",
    "open",
    "message",
    "relay.gap",
    "data: x",
    "ß",
    "e\u0301",
    "日本語",
    "🎉" * 15,
    "x" * 63,
    "é" * 31,
    "\u2028",
    "\u00a0",
    "\ufeff",
    "\u202eabc",
]


def test_awkward_channel_names_are_names(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    with (
        contextlib.ExitStack() as stack,
        harness.RawStream(standing.bind, standing.url(*NAMES)) as all_of_them,
    ):
        readers = [stack.enter_context(harness.SseReader(standing.url(name))) for name in NAMES]
        all_of_them.wait_for(b"\nid: ")
        for reader in readers:
            reader.wait_for_id()
        for number, name in enumerate(NAMES):
            standing_database.notify(name, f"event {number}")
        for number, reader in enumerate(readers):
            reader.wait_for_data(f"event {number}")
        body = all_of_them.wait_for(f"data: event {len(NAMES) - 1}\n\n".encode()).decode()
        # Each reader heard of its own channel and of nothing else.
        assert [reader.data for reader in readers] == [[f"event {n}"] for n in range(len(NAMES))]
    named = re.findall(r"^event: (.*)\nid: .*\ndata: event ", body, re.MULTILINE)
    shown = [name.replace("%", "%25").replace(":", "%3A") for name in NAMES]
    assert named == [f"{name}:" if name in ("error", "open", "relay.gap") else name for name in shown]


# Payload, and what a browser sees: the event's name and data.
PAYLOADS: list[tuple[str, str, str]] = [
    ("", "message", ""),
    (" ", "message", " "),
    (" leading and trailing ", "message", " leading and trailing "),
    ("a\nb", "message", "a\nb"),
    ("a\r\nb\rc\n", "message", "a\nb\nc\n"),
    ("\n\n", "message", "\n\n"),
    ("data: forged", "message", "data: forged"),
    ("x\nevent: forged\nid: 1\n\ndata: y", "message", "x\nevent: forged\nid: 1\n\ndata: y"),
    (":comment", "message", ":comment"),
    ("\u2028\u2029\u0085\x0b\x0c\x1c", "message", "\u2028\u2029\u0085\x0b\x0c\x1c"),
    ("\ufeffbom", "message", "\ufeffbom"),
    ("\x01\x1b[31m\x7f", "message", "\x01\x1b[31m\x7f"),
    ("emoji 🎉 👩‍👩‍👧‍👦", "message", "emoji 🎉 👩‍👩‍👧‍👦"),
    ("x" * 7999, "message", "x" * 7999),
    ("é" * 3999, "message", "é" * 3999),
    ("\n" * 7999, "message", "\n" * 7999),
    ("[" * 7999, "message", "[" * 7999),
    ('{"id":42,"data":{"a":1}}', "message", '{"id":42,"data":{"a":1}}'),
    ('{"event":"e","data":1,"extra":2}', "message", '{"event":"e","data":1,"extra":2}'),
    ('{"event":1,"data":"x"}', "message", '{"event":1,"data":"x"}'),
    ('{"event":"e"}', "message", '{"event":"e"}'),
    ('{"event":"e","data":NaN}', "message", '{"event":"e","data":NaN}'),
    ('{"event":"e","data":1}x', "message", '{"event":"e","data":1}x'),
    ("{'event':'e','data':1}", "message", "{'event':'e','data':1}"),
    ('{"event":"e","data":"text"}', "e", "text"),
    ('{"event":"e","data":""}', "e", ""),
    ('{"event":"","data":"no name"}', "message", "no name"),
    ('{"event":"e","data":1.10}', "e", "1.10"),
    ('{"event":"e","data":1e400}', "e", "1e400"),
    ('{"event":"e","data":-0}', "e", "-0"),
    ('{"event":"e","data":' + "9" * 5000 + "}", "e", "9" * 5000),
    ('{"event":"e","data":' + "[" * 3900 + "]" * 3900 + "}", "", ""),
    ('{"event":"e","data":{"b": 1,  "a":[1 ,2]}}', "e", '{"b": 1,  "a":[1 ,2]}'),
    ('{"event":"e","data":null}', "e", "null"),
    ('{"event":"e","data":"a\\u2028b"}', "e", "a\u2028b"),
    ('{"event":"e","data":"lone \\ud800"}', "e", "lone \ufffd"),
    ('{"event":"e","data":"nul \\u0000"}', "e", "nul \x00"),
    ('{"event":"\\u0065","data":"x"}', "e", "x"),
    ('{"event":"a","data":1,"event":"b","data":2}', "b", "2"),
    ('{"event":"error","data":"kept"}', "message", "kept"),
    ('{"event":"relay.gap","data":"kept"}', "message", "kept"),
    ('{"event":"a\\nb","data":"kept"}', "message", "kept"),
    ('{"event":"e","data":"x","retry":1,"comment":"\\n\\n"}', "e", "x"),
    ('{"event":"e","data":"x","id":"own"}', "e", "x"),
    ('{"event":"e","data":"x","id":"a\\nb"}', "e", "x"),
    ('{"event":"ünï","data":"x"}', "ünï", "x"),
    (' \t\n{"event" : "e" , "data" : "spaced"} \r\n', "e", "spaced"),
]


def browser_blocks(body: bytes) -> list[tuple[str, str]]:
    """Read events as the HTML standard says: the line ends are LF here, as `encode_event` promises.

    Without the relay's own.
    """
    assert b"\r" not in body
    events = []
    for block in body.decode().split("\n\n"):
        name, data = "message", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value
        if data and name != "relay.gap":
            events.append((name, "\n".join(data)))
    return events


def test_awkward_payloads_arrive_unchanged_and_harm_nobody(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    with (
        harness.RawStream(standing.bind, standing.url("odd")) as stream,
        harness.RawStream(standing.bind, standing.url("witness")) as witness,
        harness.RawStream(standing.bind, standing.url("odd", "witness")) as both,
    ):
        for each in (stream, witness, both):
            each.wait_for(b"\nid: ")
        for number, (payload, _, _) in enumerate(PAYLOADS):
            standing_database.notify("odd", payload)
            standing_database.notify("witness", str(number))
        standing_database.notify("odd", "the end")
        standing_database.notify("witness", "the end")
        seen = browser_blocks(stream.wait_for(b"data: the end\n\n"))
        heard = browser_blocks(witness.wait_for(b"data: the end\n\n"))
        mixed = browser_blocks(both.wait_for(b"data: the end\n\nevent: witness"))
    assert [data for name, data in mixed if name == "witness"][:-1] == [data for _, data in heard[:-1]]
    assert len(seen) == len(PAYLOADS) + 1
    for (payload, name, data), event in zip(PAYLOADS, seen, strict=False):
        deep = "[" * 3900
        if deep in payload:
            # Data of that depth may stand as a whole or unpacked, but not be lost.
            assert deep in event[1]
        else:
            assert event == (name, data), payload
    assert heard == [("message", str(n)) for n in range(len(PAYLOADS))] + [("message", "the end")]


def test_what_postgresql_refuses_never_reaches_a_stream(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    with harness.SseReader(standing.url("orders")) as reader:
        reader.wait_for_id()
        with pytest.raises(psycopg2.Error, match="payload string too long"):
            standing_database.notify("orders", "x" * 8000)
        with pytest.raises(ValueError, match="NUL"):
            standing_database.notify("orders", "a\0b")
        with pytest.raises(psycopg2.Error, match="channel name too long"):
            standing_database.notify("x" * 64, "a")
        standing_database.notify("orders", "after")
        reader.wait_for_data("after")
        assert reader.data == ["after"]


# ==== Resuming ================================================================


def publish_three(relay: harness.Relay, database: harness.Database, channel: str) -> list[str]:
    """Publish 1, 2, 3 and return their positions, the one before them first."""
    with harness.SseReader(relay.url(channel)) as reader:
        start = reader.wait_for_id()
        for data in "123":
            database.notify(channel, data)
        reader.wait_for_data("3")
        return [start, *(event.id for event in reader.events)]


def last_is_a_position(reader: harness.SseReader) -> bool:
    return not reader.blocks[-1].data or harness.is_start(reader.blocks[-1])


def test_a_client_resumes_by_the_header_or_by_its_address(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    ids = publish_three(standing, standing_database, "resumed")
    for header, query, expected in [
        (ids[0], None, ["1", "2", "3"]),
        (ids[2], None, ["3"]),
        (ids[3], None, []),
        (None, ids[1], ["2", "3"]),
        (ids[2], ids[0], ["3"]),
        (None, "", []),
        (ids[1] + "/own", None, ["2", "3"]),
        (ids[1] + "@1:1:", None, ["2", "3"]),
    ]:
        url = standing.url("resumed", **({} if query is None else {"lastEventId": query}))
        with harness.SseReader(url, last_event_id=header) as reader:
            position = reader.wait_for_id()
            # The block that sets the position follows the past.
            harness.wait_until(functools.partial(last_is_a_position, reader))
            assert reader.data == expected
            assert position.split("-")[0] == ids[0].split("-")[0]
            assert reader.events == [e for e in reader.events if e.event == "message"]


def test_the_past_comes_before_the_position_of_the_present(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    names = ["past a", "past b", "past c"]
    with harness.SseReader(standing.url(*names)) as reader:
        start = reader.wait_for_id()
        for number in range(300):
            standing_database.notify(names[number % 3], str(number))
        # From here on the relay has them all.
        reader.wait_for_data("299")
    with harness.RawStream(standing.bind, standing.url(*names), headers={"Last-Event-ID": start}) as stream:
        body = stream.wait_for(b"data: 299\n\nid: ")
    blocks = body.decode().split("\n\n")
    assert blocks[0].startswith(":\nretry: ")
    numbers = [int(number) for number in re.findall(r"id: \w+-(\d+)", body.decode())]
    assert len(numbers) == 301
    assert numbers[:300] == sorted(set(numbers[:300]))
    assert numbers[300] == numbers[299]
    assert [re.findall(r"data: (\d+)", block) for block in blocks[1:301]] == [[str(n)] for n in range(300)]


def test_each_reason_for_a_gap_that_a_position_can_have(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    ids = publish_three(standing, standing_database, "gaps")
    epoch, _, number = ids[3].partition("-")
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
            assert told(reader) == [gap("gaps", reason, since[:100])]
            assert reader.blocks[-1].id.startswith(epoch)
            assert reader.starts == []
        with harness.SseReader(standing.url("gaps", "c", "d"), last_event_id="lost") as several:
            several.wait_for_id()
            assert told(several) == [gap("gaps c d", "unreadable", "lost")]


def test_a_restart_of_the_relay_is_a_gap(start_relay: StartRelay, database: harness.Database) -> None:
    relay = start_relay(dsn=database.dsn)
    ids = publish_three(relay, database, "orders")
    assert relay.stop() == 0
    relay = start_relay(dsn=database.dsn, bind=relay.bind)
    with harness.SseReader(relay.url("orders"), last_event_id=ids[1]) as reader:
        reader.wait_for_id()
        assert told(reader) == [gap("orders", "restart", ids[1])]


def test_events_that_memory_has_passed_are_a_gap(start_relay: StartRelay, database: harness.Database) -> None:
    relay = start_relay("--memory", "64KiB", dsn=database.dsn)
    with harness.SseReader(relay.url("loud")) as reader:
        start = reader.wait_for_id()
        for number in range(300):
            database.notify("loud", f"{number} {'x' * 1000}")
        reader.wait_for(lambda event: event.data.startswith("299 "))
        recent = reader.events[-3].id
    with harness.SseReader(relay.url("loud"), last_event_id=start) as reader:
        reader.wait_for_id()
        assert told(reader) == [gap("loud", "evicted", start)]
    with harness.SseReader(relay.url("loud"), last_event_id=recent) as reader:
        reader.wait_for(lambda event: event.data.startswith("299 "))
        assert [data.split()[0] for data in reader.data] == ["298", "299"]


def test_a_channel_that_was_not_listened_to_meanwhile_is_a_gap(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay("--linger", "0", dsn=database.dsn)
    with harness.SseReader(relay.url("orders", "kept")) as both, harness.SseReader(relay.url("kept")) as kept:
        start = both.wait_for_id()
        kept.wait_for_id()
        both.close()
        harness.wait_until(lambda: any('UNLISTEN "orders"' in query for *_, query in database.backends()))
        database.notify("orders", "nobody hears this")
        database.notify("kept", "heard")
        kept.wait_for_data("heard")
        with harness.SseReader(relay.url("orders", "kept"), last_event_id=start) as reader:
            reader.wait_for(lambda event: event.event == "relay.gap")
            harness.wait_until(functools.partial(last_is_a_position, reader))
            # The gap first: the event's position lies behind the hole.
            assert told(reader) == [gap("orders", "evicted", start), ("kept", "heard")]
            assert not reader.events[0].id


def test_ten_thousand_missed_events_are_replayed_and_one_more_is_a_gap(
    start_relay: StartRelay, database: harness.Database
) -> None:
    relay = start_relay(dsn=database.dsn)
    with harness.SseReader(relay.url("many", "few")) as reader:
        start = reader.wait_for_id()
    publish = "SELECT pg_notify('many', n::text) FROM generate_series(%s, %s) AS n"
    database.execute(publish, (1, 10_000))
    with harness.SseReader(relay.url("many"), last_event_id=start) as reader:
        reader.wait_for_data("10000", 20)
        assert reader.data == [str(n) for n in range(1, 10_001)]
    with harness.SseReader(relay.url("few")) as reader:
        reader.wait_for_id()
        database.notify("few", "one more")
        reader.wait_for_data("one more")
    with harness.SseReader(relay.url("many", "few"), last_event_id=start) as reader:
        reader.wait_for_id()
        assert told(reader) == [gap("many few", "too-many", start)]


# ==== Strangers ===============================================================


def exchange(relay: harness.Relay, request: bytes) -> bytes:
    """Send bytes and return all that comes until the relay closes."""
    with harness.RawStream(relay.bind, request=request) as stream:
        stream.wait_for_end(15)
        return stream.raw


def expect_unharmed(relay: harness.Relay, database: harness.Database) -> None:
    with harness.SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        database.notify("orders", "unharmed")
        reader.wait_for_data("unharmed")
    assert "Traceback" not in relay.log
    assert relay.process.poll() is None


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /events/a?access_token=hidden\x01secret HTTP/1.1\r\nHost: x\r\n\r\n",
        b"hidden secret\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03hidden secret\r\n\r\n",
        b"GET /events/a HTTP/9.9\r\nHost: hidden secret\r\n\r\n",
        b"GET /events/a HTTP/1.1\r\nHost: x\r\nhidden secret\r\n\r\n",
        b"GET /events/a HTTP/1.1\r\nHost: x\r\nX: " + b"hidden secret" * 10_000 + b"\r\n\r\n",
        b"GET /events/" + b"hidden" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /events/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nhidden\r\n",
        b"GET /events/a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\nhidden secret",
    ],
    ids=["control", "words", "tls", "version", "header", "huge-header", "huge-path", "chunk", "length"],
)
def test_malformed_requests_are_refused_and_not_logged(
    request_bytes: bytes, standing: harness.Relay, standing_database: harness.Database
) -> None:
    answer = exchange(standing, request_bytes)
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer) or not answer, answer[:200]
    expect_unharmed(standing, standing_database)
    assert "hidden" not in standing.log
    assert "secret" not in standing.log


def test_what_no_header_can_carry_back_leaves_no_zombie(
    start_relay: StartRelay, database: harness.Database
) -> None:
    """Every origin of this machine is allowed while no access option is given; this one cannot be encoded."""
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay("--admin", admin, "--heartbeat", "0.2", dsn=database.dsn)
    for origin in ("http://localhost:\u20ac", "http://localhost:\udcff", "http://127.0.0.1:\x80"):
        request = harness.http_request(relay.url("orders"), headers={"Origin": "?", "Connection": "close"})
        request = request.replace(b"?", origin.encode("utf-8", "surrogateescape"), 1)
        with harness.RawStream(relay.bind, request=request) as stream:
            harness.wait_until(lambda stream=stream: stream.ended or b":\n" in stream.raw)  # type: ignore[misc]
            assert stream.raw.startswith(b"HTTP/1.1 ")
    harness.wait_until(lambda: harness.metric(admin, "clients") == 0, what="the clients to be forgotten")
    expect_unharmed(relay, database)
    assert "should not happen" not in relay.log


def test_requests_behind_a_stream_are_not_answered(
    standing: harness.Relay, standing_database: harness.Database
) -> None:
    request = harness.http_request(standing.url("orders")) + harness.http_request("/elsewhere") * 20
    with harness.RawStream(standing.bind, request=request) as stream:
        stream.wait_for(b"\nid: ")
        stream.socket.sendall(b"x" * 100_000)
        standing_database.notify("orders", "still a stream")
        stream.wait_for(b"data: still a stream\n\n")
        assert stream.raw.count(b"HTTP/1.1") == 1
    expect_unharmed(standing, standing_database)


def test_a_request_in_front_of_a_stream_is_answered_first(standing: harness.Relay) -> None:
    request = harness.http_request("/elsewhere", "localhost") + harness.http_request(standing.url("orders"))
    with harness.RawStream(standing.bind, request=request) as stream:
        harness.wait_until(lambda: b"\nid: " in stream.raw)
        assert re.findall(rb"HTTP/1\.1 (\d+)", stream.raw) == [b"404", b"200"]


def test_clients_that_leave_in_odd_ways_are_forgotten(
    start_relay: StartRelay, database: harness.Database
) -> None:
    admin = f"127.0.0.1:{harness.free_port()}"
    relay = start_relay("--admin", admin, dsn=database.dsn)
    host, _, port = relay.bind.rpartition(":")
    request = harness.http_request(relay.url("orders"))
    for _ in range(50):
        # At once, before anything was answered.
        with socket.create_connection((host, int(port)), 10) as client:
            client.sendall(request)
        # With a reset.
        with socket.create_connection((host, int(port)), 10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(request)
    with harness.RawStream(relay.bind, relay.url("orders")) as half:
        half.wait_for(b"\nid: ")
        half.socket.shutdown(socket.SHUT_WR)
        harness.wait_until(lambda: harness.metric(admin, "clients") == 0, what="the clients to be forgotten")
    expect_unharmed(relay, database)


# ==== nginx ===================================================================


@pytest.mark.slow
def test_nginx_that_speaks_http_1_0_works(
    start_relay: StartRelay, database: harness.Database, open_folder: Path
) -> None:
    relay = start_relay(dsn=database.dsn)
    server = f"location /events {{ proxy_pass http://{relay.bind}; }}"
    with harness.Nginx(open_folder, relay.bind, http="", server=server) as nginx:
        with harness.RawStream(nginx.address, "/events/orders") as opened:
            opened.wait_for(b"\nid: ")
            assert opened.status == 200
            for number in range(5):
                published = time.monotonic()
                database.notify("orders", f"event {number}")
                opened.wait_for(f"data: event {number}\n\n".encode())
                assert time.monotonic() - published < 5
        with harness.RawStream(nginx.address, "/events", headers=PLAIN) as refused:
            refused.wait_for(b'"status": 400')
            assert refused.status == 400
