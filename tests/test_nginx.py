"""The relay behind a real nginx, which reads the very blocks that stand in the docs."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import harness
from harness import Browser, Database, Nginx, RawStream, Relay, SseReader, nginx_recipe, wait_until

StartRelay = Callable[..., Relay]


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    """A unix socket as the docs have it, in the form of --bind."""
    return f"unix:{tmp_path}/http.sock"


@pytest.fixture
def nginx(tmp_path: Path, socket_path: str) -> Iterator[Nginx]:
    with Nginx(tmp_path, socket_path) as running:
        yield running


@pytest.fixture
def secured(tmp_path: Path, socket_path: str) -> Iterator[Nginx]:
    """With HTTP/2 and TLS."""
    with Nginx(tmp_path, socket_path, tls=True) as running:
        yield running


def publish(database: Database, *events: object) -> None:
    for event in events:
        database.execute("SELECT sse_relay.publish('orders', %s::text)", (str(event),))


def test_events_pass_at_once(
    start_relay: StartRelay, database: Database, nginx: Nginx, socket_path: str
) -> None:
    start_relay("--heartbeat", "0.5", bind=socket_path, dsn=database.dsn)
    with RawStream(nginx.address, "/events/orders") as client:
        client.wait_for(b"id: ")
        assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert client.headers["cache-control"] == "no-store, no-transform"
        began = time.monotonic()
        database.notify("orders", "x" * 10)
        client.wait_for(b"data: xxxxxxxxxx\n\n")
        assert client.received[-1][0] - began < 0.5
        client.wait_for(b"\n:\n")


def test_a_page_of_the_same_host_needs_no_permission(
    start_relay: StartRelay, database: Database, secured: Nginx, socket_path: str
) -> None:
    start_relay("--allow-channel", "*", bind=socket_path, dsn=database.dsn)
    with httpx.Client(verify=ssl.create_default_context(cafile=secured.certificate)) as client:
        own, other = ({"Origin": origin} for origin in (secured.url, "https://elsewhere.example"))
        assert client.head(f"{secured.url}/events/orders", headers=own).status_code == 200
        assert client.head(f"{secured.url}/events/orders", headers=other).status_code == 403


def test_while_no_relay_runs_clients_are_told_to_come_back(nginx: Nginx) -> None:
    answer = httpx.get(f"{nginx.url}/events/orders", headers={"Accept": "text/event-stream"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.text == "retry: 2000\n\n"


def test_no_log_keeps_a_token(
    start_relay: StartRelay, database: Database, nginx: Nginx, socket_path: str
) -> None:
    secret = "eyJ-a-secret-token"
    url = f"{nginx.url}/events/orders?access_token={secret}"
    httpx.get(url)  # nobody listens: the error log's turn
    relay = start_relay("--allow-channel", "open", bind=socket_path, dsn=database.dsn)
    assert httpx.get(url, headers={"Accept": "text/event-stream"}).status_code == 200
    assert httpx.get(url).status_code == 403
    wait_until(lambda: nginx.log().count("GET /events/orders ") == 3, what="the access log")
    for file in (*nginx.folder.glob("*.log"), nginx.folder / "nginx.conf"):
        assert secret not in file.read_text(), file
    assert secret not in relay.log
    # What a browser is told in its stream is a 200 for nginx; the relay knows better.
    assert "GET /events/orders 200 " in nginx.log()
    wait_until(lambda: relay.log.count("refused with 403") == 2, what="both refusals in the relay's log")


def test_http_2_carries_more_streams_than_six(
    start_relay: StartRelay, database: Database, secured: Nginx, socket_path: str, browser: Browser
) -> None:
    start_relay(bind=socket_path, dsn=database.dsn)
    with browser.open() as page:
        page.evaluate(
            """url => {
                window.got = [];
                window.sources = Array.from({length: 20}, (_, n) => {
                    const source = new EventSource(`${url}/events/channel-${n}`);
                    source.onmessage = e => got.push(e.data);
                    return source;
                });
            }""",
            secured.url,
        )
        wait_until(lambda: page.evaluate("sources.every(s => s.readyState === 1)"), what="20 open streams")
        for number in range(20):
            database.notify(f"channel-{number}", str(number))
        wait_until(lambda: len(page.evaluate("got")) == 20, what="an event on each")
        assert sorted(page.evaluate("got"), key=int) == [str(number) for number in range(20)]


@pytest.mark.timeout(300)  # a browser waits 2 s after each of the restarts
def test_a_browser_lives_through_20_restarts_and_an_outage_and_has_every_event(
    start_relay: StartRelay, log_database: Database, secured: Nginx, socket_path: str, browser: Browser
) -> None:
    options = ("--source", "log", "--retry", "100")
    how = {"bind": socket_path, "dsn": log_database.dsn}
    relay = start_relay(*options, **how)
    count = 0

    def publish_some() -> None:
        nonlocal count
        publish(log_database, *range(count, count + 3))
        count += 3

    with browser.open() as page:
        page.event_source(f"{secured.url}/events/orders", "relay.gap", "relay.refused")
        wait_until(lambda: page.ready_state == 1, what="the stream")
        for restart in range(21):
            publish_some()
            last = str(count - 1)
            page.wait_for(lambda event, last=last: event.data == last, 20)  # type: ignore[misc]  # a default
            publish_some()
            assert relay.stop() == 0
            publish_some()
            if restart == 20:
                time.sleep(5)  # the outage itself
                assert page.ready_state == 0
            relay = start_relay(*options, **how)
        publish_some()
        page.wait_for(lambda event: event.data == str(count - 1), 20)
        assert [(event.name, event.data) for event in page.events] == [
            ("message", str(number)) for number in range(count)
        ]
        assert page.states.count("open") >= 22
        assert "error 2" not in page.states


def test_a_client_moves_between_several_relays_and_misses_nothing(
    start_relay: StartRelay, log_database: Database, tmp_path: Path
) -> None:
    sockets = [f"unix:{tmp_path}/{number}.sock" for number in (1, 2)]
    admins = [f"127.0.0.1:{harness.free_port()}" for _ in sockets]

    def start(number: int) -> Relay:
        options = ("--source", "log", "--retry", "100", "--admin", admins[number])
        return start_relay(*options, bind=sockets[number], dsn=log_database.dsn)

    def clients(number: int) -> int:
        return int(httpx.get(f"http://{admins[number]}/channels").json()["clients"])

    relays = [start(0), start(1)]
    http = nginx_recipe("http { }, several relays").replace("unix:/run/sse-relay", f"unix:{tmp_path}")
    with Nginx(tmp_path, "", http) as nginx, contextlib.ExitStack() as stack:
        url = f"{nginx.url}/events/orders"
        readers = [stack.enter_context(SseReader(url)) for _ in range(10)]
        positions = [reader.wait_for_id() for reader in readers]
        wait_until(lambda: clients(0) + clients(1) == 10, what="ten clients")
        assert clients(0) == clients(1) == 5
        publish(log_database, "a", "b")
        for reader in readers:
            reader.wait_for_data("b")
        assert relays[0].stop() == 0
        publish(log_database, "c")
        for position in positions:
            # As an EventSource comes back: at once, to the one that is left.
            with SseReader(url, last_event_id=position) as back:
                back.wait_for_data("c")
                assert back.status == 200
                assert back.data == ["a", "b", "c"]
        relays[0] = start(0)
        with contextlib.ExitStack() as again:
            for _ in range(5):
                again.enter_context(SseReader(url)).wait_for_id()
            wait_until(lambda: clients(0) == 5, what="the relay that is back")
