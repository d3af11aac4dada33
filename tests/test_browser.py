"""The relay in the hands of a browser's own EventSource, and in the least environment."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import harness
from harness import Browser, Database, Page, Relay, SseReader, wait_until
from sites import line_to

pytestmark = pytest.mark.slow

StartRelay = Callable[..., Relay]


@pytest.fixture(scope="module")
def database(server: harness.Server) -> Iterator[Database]:
    with server.fresh_database() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def relay(database: Database) -> Iterator[Relay]:
    """A relay that beats often: no test of these pages notices it."""
    with Relay("--retry", "100", "--heartbeat", "0.1", dsn=database.dsn) as running:
        yield running


def wait_open(page: Page, times: int = 1) -> None:
    wait_until(lambda: page.states.count("open") >= times, what="the EventSource to open")


def wait_data(page: Page, data: str) -> None:
    page.wait_for(lambda event: event.data == data)


# ==== Chromium ================================================================

TEXTS = [
    "",
    " leading, trailing ",
    "two\nlines",
    "\n",
    "a\n\nb\n",
    "data: x\nid: 9\nevent: relay.gap\nretry: 1",
    ": comment",
    "U+2028 \u2028 U+2029 \u2029 U+0085 \u0085",
    "\ufeffBOM",
    "🎉 é \U0010ffff",
    "\x01\x1f\x7f",
    '{"id": 42, "data": {"a": 1}}',
    "x" * 7_999,
]


def test_events_reach_a_page_of_another_loopback_port_as_they_were_published(
    page: Page, relay: Relay, database: Database
) -> None:
    page.event_source(relay.url("orders"), "created", "relay.heartbeat", "relay.refused")
    assert not relay.url().startswith(page.evaluate("location.origin"))
    wait_open(page)
    for text in TEXTS:
        database.notify("orders", text)
    database.notify("orders", '{"event": "created", "data": {"total": 1.10}, "id": 7}')
    with harness.RawStream(relay.bind, relay.url("orders")) as witness:
        wait_until(lambda: witness.chunks.count(b":\n") >= 5, what="heartbeats")
    database.notify("orders", "carriage\rreturn\r\nboth")
    wait_data(page, "carriage\nreturn\nboth")
    *events, named, _ = page.events
    assert [(event.name, event.data) for event in events] == [("message", text) for text in TEXTS]
    assert all(event.id for event in events)
    assert (named.name, named.data) == ("created", '{"total": 1.10}')
    assert named.id.endswith("/7")
    assert page.states == ["open"]


def test_a_page_of_an_allowed_origin_is_told_why_it_is_refused_and_another_one_nothing(
    page: Page, browser: Browser, database: Database, start_relay: StartRelay
) -> None:
    origin, address = page.evaluate("[location.origin, location.href]")
    relay = start_relay("--allow-origin", origin, "--allow-channel", "public-*", dsn=database.dsn)
    page.event_source(relay.url("secret"), "relay.refused")
    refused = json.loads(page.wait_for(lambda event: event.name == "relay.refused").data)
    assert refused["status"] == 403
    assert "--allow-channel" in refused["reason"]
    with browser.open(url=address.replace("127.0.0.1", "localhost")) as foreign:
        foreign.event_source(relay.url("public-1"), "relay.refused", "relay.gap")
        wait_until(lambda: foreign.states, what="the EventSource to fail")
        assert foreign.states == ["error 2"]
        assert foreign.events == []


def test_cuts_lose_nothing_and_repeat_nothing(page: Page, relay: Relay, database: Database) -> None:
    with line_to(relay) as line:
        url = relay.url("orders", "users").replace(relay.bind, f"127.0.0.1:{line.port}")
        page.event_source(url, "orders", "users", "relay.gap")
        start = page.wait_for(lambda event: event.name == "relay.gap")
        assert json.loads(start.data) == {"channels": ["orders", "users"], "reason": "start", "since": None}
        assert start.id
        sent = []

        def publish(first: int, last: int) -> None:
            for number in range(first, last):
                sent.append((("orders", "users")[number % 2], str(number)))
                database.notify(*sent[-1])

        # One that has seen no event yet has a position, too.
        line.refuse()
        line.drop()
        wait_until(lambda: "error 0" in page.states, what="the cut")
        publish(0, 20)
        line.accept()
        for cut in range(1, 11):
            wait_open(page, times=cut + 1)
            publish(20 * cut, 20 * cut + 10)
            line.drop()
            publish(20 * cut + 10, 20 * cut + 20)
        wait_data(page, sent[-1][1])
    assert [(event.name, event.data) for event in page.events[1:]] == sent


def test_a_relay_that_is_away_for_a_while_is_waited_for_and_its_return_is_a_gap(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    first = start_relay("--retry", "500", dsn=database.dsn)
    page.event_source(first.url("orders"), "relay.gap")
    wait_open(page)
    database.notify("orders", "before")
    wait_data(page, "before")
    assert first.stop() == 0
    wait_until(lambda: page.states.count("error 0") >= 4, 20, "attempts that find nobody")
    # The relay's last block says at least 500 ms; a client that ignored it would hammer.
    waits = [later - earlier for (earlier, _), (later, _) in pairwise(page.requests)][1:]
    assert min(waits) > 0.45, waits
    start_relay(dsn=database.dsn, bind=first.bind)
    page.wait_for(lambda event: '"restart"' in event.data, 20)
    database.notify("orders", "after")
    wait_data(page, "after")
    _, before, gap, _ = page.events
    assert json.loads(gap.data) == {"channels": ["orders"], "reason": "restart", "since": before.id}
    assert gap.id.partition("-")[0] != before.id.partition("-")[0]


def test_a_gap_after_an_outage_of_postgresql_is_an_event_of_the_page(
    page: Page, relay: Relay, database: Database
) -> None:
    page.event_source(relay.url("orders", "users"), "orders", "users", "relay.gap")
    page.wait_for(lambda event: event.name == "relay.gap")
    database.terminate_backends()
    page.wait_for(lambda event: '"outage"' in event.data, 20)
    gaps = [json.loads(event.data) for event in page.events if event.name == "relay.gap"]
    assert gaps == [
        {"channels": ["orders", "users"], "reason": reason, "since": None} for reason in ("start", "outage")
    ]
    database.notify("users", "after")
    wait_data(page, "after")
    assert page.states == ["open"]


def test_over_http_1_1_six_streams_take_all_connections_and_the_seventh_waits(
    page: Page, relay: Relay
) -> None:
    made = "url => { window.sources = Array.from({ length: 7 }, () => new EventSource(url)); }"
    page.evaluate(made, relay.url("orders"))
    states = "sources.map(source => source.readyState).sort()"
    wait_until(lambda: page.evaluate(states) == [0, 1, 1, 1, 1, 1, 1], what="six streams")
    page.evaluate("sources.find(source => source.readyState === 1).close()")
    wait_until(lambda: page.evaluate(states) == [1, 1, 1, 1, 1, 1, 2], what="the seventh stream")


# ==== The least environment ===================================================


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds what pyproject.toml requires, and no more."""
    folder = tmp_path_factory.mktemp("bare")
    python = folder / "bin" / "python"
    required = tomllib.loads((harness.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(required) == 3
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *required]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=110)
    if done.returncode != 0:
        harness.missing(f"pip could not install {required}: {done.stderr[-500:]}")
    return python


def test_three_packages_are_enough(bare_python: Path, database: Database, start_relay: StartRelay) -> None:
    relay = start_relay(dsn=database.dsn, python=str(bare_python))
    with SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        database.notify("orders", "x")
        assert reader.wait_for_data("x").event == "message"
