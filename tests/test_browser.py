"""The relay in the hands of a browser's own EventSource, of curl, and in the least environment."""

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
from harness import Browser, Database, FreezableProxy, Page, PageEvent, Relay, SseReader

pytestmark = pytest.mark.slow

StartRelay = Callable[..., Relay]


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose origin is another port than the relay's."""
    with browser.open() as opened:
        yield opened


@pytest.fixture
def cuttable(database: Database, start_relay: StartRelay) -> Iterator[tuple[Relay, FreezableProxy]]:
    """A relay, and a proxy in front of it."""
    relay = start_relay("--retry", "100", dsn=database.dsn)
    host, _, port = relay.bind.rpartition(":")
    with FreezableProxy((host, int(port))) as proxy:
        yield relay, proxy


def through(proxy: FreezableProxy, relay: Relay, *channels: str) -> str:
    return relay.url(*channels).replace(relay.bind, f"127.0.0.1:{proxy.port}")


def wait_open(page: Page, times: int = 1) -> None:
    harness.wait_until(lambda: page.states.count("open") >= times, what="the EventSource to open")


def wait_live(page: Page, relay: Relay, database: Database, channel: str) -> PageEvent:
    """Wait until an event of the channel reaches the page: it has a position then."""
    wait_open(page)
    database.notify(channel, "first")
    return page.wait_for(lambda event: event.data == "first")


# ==== Chromium ================================================================


def test_a_notification_reaches_a_native_event_source(page: Page, relay: Relay, database: Database) -> None:
    page.event_source(relay.url("orders"))
    wait_open(page)
    database.notify("orders", "x")
    event = page.wait_for(lambda event: event.data == "x")
    assert event.name == "message"
    assert event.id


def test_a_named_event_reaches_its_own_listener(page: Page, relay: Relay, database: Database) -> None:
    page.event_source(relay.url("orders"), "created")
    wait_open(page)
    database.notify("orders", '{"event": "created", "data": {"total": 1.10}, "id": 7}')
    event = page.wait_for(lambda event: event.name == "created")
    assert event.data == '{"total": 1.10}'
    assert event.id.endswith("/7")


def test_a_stream_of_several_channels_tells_them_apart(page: Page, relay: Relay, database: Database) -> None:
    names = ("orders", "Größe 🎉", "open:", "orders:created", "a%3Ab%25", "a%3Ab%25:open")
    page.event_source(relay.url("orders", "Größe 🎉", "open", "a:b%"), *names)
    wait_open(page)
    for channel in ("orders", "Größe 🎉", "open"):
        database.notify(channel, f"of {channel}")
    database.notify("orders", '{"event": "created", "data": "named"}')
    database.notify("a:b%", "of a:b%")
    # Nobody passes for another channel.
    database.notify("a:b%", '{"event": "x", "data": "not listened for"}')
    database.notify("orders", '{"event": "created", "data": "last"}')
    page.wait_for(lambda event: event.data == "last")
    assert [(event.name, event.data) for event in page.events] == [
        ("orders", "of orders"),
        ("Größe 🎉", "of Größe 🎉"),
        ("open:", "of open"),
        ("orders:created", "named"),
        ("a%3Ab%25", "of a:b%"),
        ("orders:created", "last"),
    ]


def test_text_arrives_as_it_was_published(page: Page, relay: Relay, database: Database) -> None:
    texts = [
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
    page.event_source(relay.url("orders"), "relay.refused")
    wait_open(page)
    for text in texts:
        database.notify("orders", text)
    database.notify("orders", "carriage\rreturn\r\nboth")
    page.wait_for(lambda event: event.data == "carriage\nreturn\nboth")
    assert [event.data for event in page.events[:-1]] == texts


def test_another_loopback_port_may_read_without_options(page: Page, relay: Relay) -> None:
    page.event_source(relay.url("orders"))
    wait_open(page)
    origin = page.evaluate("location.origin")
    assert origin.startswith("http://127.0.0.1:")
    assert not relay.url().startswith(origin)


def test_a_page_of_a_foreign_origin_reads_nothing(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    relay = start_relay("--allow-origin", "https://app.example", dsn=database.dsn)
    page.event_source(relay.url("orders"), "relay.refused", "relay.gap")
    harness.wait_until(lambda: page.states, what="the EventSource to fail")
    assert page.states == ["error 2"]
    relay.wait_for_log("refused with 403")
    assert page.events == []


def test_an_allowed_origin_is_told_why_it_is_refused(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    origin = page.evaluate("location.origin")
    relay = start_relay("--allow-origin", origin, "--allow-channel", "public-*", dsn=database.dsn)
    page.event_source(relay.url("secret"), "relay.refused")
    refused = json.loads(page.wait_for(lambda event: event.name == "relay.refused").data)
    assert refused["status"] == 403
    assert "--allow-channel" in refused["reason"]


def test_heartbeats_and_positions_fire_no_event(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    relay = start_relay("--heartbeat", "0.1", dsn=database.dsn)
    page.event_source(relay.url("orders"), "relay.heartbeat")
    wait_open(page)
    with harness.RawStream(relay.bind, relay.url("orders")) as witness:
        harness.wait_until(lambda: witness.chunks.count(b":\n") >= 5, what="heartbeats")
    database.notify("orders", "x")
    page.wait_for(lambda event: event.data == "x")
    assert len(page.events) == 1
    assert page.states == ["open"]


def test_a_client_that_has_seen_no_event_resumes_after_a_cut(
    page: Page, cuttable: tuple[Relay, FreezableProxy], database: Database
) -> None:
    relay, proxy = cuttable
    page.event_source(through(proxy, relay, "orders"), "relay.gap")
    start = page.wait_for(lambda event: event.name == "relay.gap")
    assert json.loads(start.data) == {"channels": ["orders"], "reason": "start", "since": None}
    assert start.id
    proxy.refuse()
    proxy.drop()
    harness.wait_until(lambda: "error 0" in page.states, what="the cut")
    for number in range(20):
        database.notify("orders", f"missed {number}")
    proxy.accept()
    page.wait_for(lambda event: event.data == "missed 19")
    assert [event.data for event in page.events[1:]] == [f"missed {number}" for number in range(20)]


def test_ten_cuts_lose_nothing_and_repeat_nothing(
    page: Page, cuttable: tuple[Relay, FreezableProxy], database: Database
) -> None:
    relay, proxy = cuttable
    page.event_source(through(proxy, relay, "orders", "users"), "orders", "users", "relay.gap")
    page.wait_for(lambda event: event.name == "relay.gap")
    sent = []
    for cut in range(10):
        for number in range(20):
            channel = ("orders", "users")[number % 2]
            sent.append((channel, f"{cut}.{number}"))
            database.notify(*sent[-1])
            if number == 10:
                proxy.drop()
        wait_open(page, times=cut + 2)
    page.wait_for(lambda event: event.data == sent[-1][1])
    assert [(event.name, event.data) for event in page.events[1:]] == sent


def test_a_restart_of_the_relay_is_a_gap_and_then_goes_on(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    first = start_relay("--retry", "100", dsn=database.dsn)
    page.event_source(first.url("orders"), "relay.gap")
    before = wait_live(page, first, database, "orders")
    assert first.stop() == 0
    start_relay("--retry", "100", dsn=database.dsn, bind=first.bind)
    gap = page.wait_for(lambda event: event.name == "relay.gap" and '"start"' not in event.data)
    assert json.loads(gap.data) == {"channels": ["orders"], "reason": "restart", "since": before.id}
    assert gap.id.partition("-")[0] != before.id.partition("-")[0]
    database.notify("orders", "after")
    page.wait_for(lambda event: event.data == "after")
    assert [event.name for event in page.events] == ["relay.gap", "message", "relay.gap", "message"]


def test_a_relay_that_is_away_for_a_while_is_waited_for(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    first = start_relay("--retry", "500", dsn=database.dsn)
    page.event_source(first.url("orders"), "relay.gap")
    wait_live(page, first, database, "orders")
    assert first.stop() == 0
    harness.wait_until(lambda: page.states.count("error 0") >= 4, 20, "attempts that find nobody")
    # The relay's last block says at least 500 ms; a client that ignored it would hammer.
    waits = [later - earlier for (earlier, _), (later, _) in pairwise(page.requests)][1:]
    assert min(waits) > 0.45, waits
    start_relay("--retry", "500", dsn=database.dsn, bind=first.bind)
    page.wait_for(lambda event: '"restart"' in event.data)
    database.notify("orders", "after")
    page.wait_for(lambda event: event.data == "after")


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
    page.wait_for(lambda event: event.data == "after")
    assert page.states == ["open"]


def test_a_full_relay_is_tried_again_until_there_is_room(
    page: Page, database: Database, start_relay: StartRelay
) -> None:
    relay = start_relay("--max-clients", "1", "--retry", "100", dsn=database.dsn)
    with SseReader(relay.url("orders")) as occupant:
        occupant.wait_for_id()
        page.event_source(relay.url("orders"), "relay.refused")
        harness.wait_until(lambda: relay.log.count("refused with 503") >= 2, what="the second attempt")
    harness.wait_until(lambda: relay.log.count("refused with 503") < page.states.count("open"))
    database.notify("orders", "room")
    page.wait_for(lambda event: event.data == "room")
    assert len(page.events) == 1


# ==== curl, and the least environment =========================================


def test_curl_is_told_the_true_status(relay: Relay) -> None:
    done = subprocess.run(
        [harness.require("curl"), "-sN", "-w", "\n%{http_code} %{content_type}", relay.url()],
        capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    assert status == "400 application/problem+json; charset=utf-8"
    assert json.loads(body)["status"] == 400


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds what pyproject.toml requires, and no more."""
    folder = tmp_path_factory.mktemp("bare")
    python = folder / "bin" / "python"
    with (harness.ROOT / "pyproject.toml").open("rb") as file:
        required = tomllib.load(file)["project"]["dependencies"]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "-q", *required], capture_output=True, text=True, check=False, timeout=110
    )
    if done.returncode != 0:
        harness.missing(f"pip could not install {required}: {done.stderr[-500:]}")
    listed = subprocess.run(
        [*pip, "list", "--not-required", "--format=json"], capture_output=True, check=True
    )
    names = {package["name"] for package in json.loads(listed.stdout)} - {"pip", "setuptools"}
    assert names == {"aiohttp", "aiopg", "click"}
    return python


def test_three_packages_are_enough(
    bare_python: Path, page: Page, database: Database, start_relay: StartRelay
) -> None:
    relay = start_relay(dsn=database.dsn, python=str(bare_python))
    page.event_source(relay.url("orders"))
    curl = subprocess.Popen(
        [harness.require("curl"), "-sN", relay.url("orders")], stdout=subprocess.PIPE, text=True
    )
    assert curl.stdout is not None
    try:
        with SseReader(relay.url("orders")) as reader:
            reader.wait_for_id()
            wait_open(page)
            # retry: and id: are out, so the stream is live.
            opening = iter(curl.stdout.readline, "")
            assert any(line.startswith("id: ") for line in opening)
            database.notify("orders", "x")
            assert reader.wait_for_data("x").event == "message"
            assert page.wait_for(lambda event: event.data == "x").name == "message"
            assert any(line == "data: x\n" for line in opening)
    finally:
        curl.kill()
        curl.wait()
        curl.stdout.close()
