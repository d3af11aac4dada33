"""The admin listener: health that tells the truth, and metrics that count what really happened."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_access import token_for
from test_demo import figures, rows, wait_row, wait_state
from test_tokens import SECRET

from harness import (
    Browser,
    Database,
    FreezableProxy,
    Page,
    RawStream,
    Relay,
    SseReader,
    free_port,
    metric,
    wait_until,
)
from sse_relay import GAP_REASONS, __version__

StartRelay = Callable[..., Relay]


class Admin:
    """A relay with an admin listener, and what that says."""

    def __init__(self, start_relay: StartRelay, *options: str, **how: Any) -> None:
        self.relay = start_relay(*options, admin=True, **how)
        self.address = self.relay.admin

    def get(self, path: str, method: str = "GET") -> httpx.Response:
        return httpx.request(method, f"http://{self.address}{path}", timeout=10)

    def metrics(self) -> dict[str, float]:
        """Return all samples; the labels stand in the name as in the text."""
        response = self.get("/metrics")
        assert response.status_code == 200
        samples = {}
        for family in text_string_to_metric_families(response.text):
            assert family.documentation, family.name
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return samples

    def wait_for(self, **wanted: float) -> dict[str, float]:
        """Wait until these samples, named without the prefix, have these values."""

        def look() -> dict[str, float] | None:
            samples = self.metrics()
            right = all(samples[f"sse_relay_{name}"] == value for name, value in wanted.items())
            return samples if right else None

        found = wait_until(look, 10, f"{wanted}")
        assert found is not None
        return found


@pytest.fixture
def admin(start_relay: StartRelay, database: Database) -> Admin:
    return Admin(start_relay, dsn=database.dsn)


@pytest.fixture(scope="module")
def standing(standing_database: Database) -> Iterator[Admin]:
    """One for all tests that count nothing, each of which leaves it without a client."""
    with contextlib.ExitStack() as stack:
        yield Admin(
            lambda *options, **how: stack.enter_context(Relay(*options, **how)), dsn=standing_database.dsn
        )


def test_health_is_told_as_json(standing: Admin) -> None:
    live, ready = standing.get("/live"), standing.get("/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert ready.status_code == 200
    assert ready.json()["ready"] is True
    assert 0 < ready.json()["round_trip_seconds"] < 1
    for answer in (live, ready):
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["Cache-Control"] == "no-store"


def test_channels_are_listed_with_their_clients(standing: Admin) -> None:
    def listed(clients: int, channels: dict[str, int]) -> bool:
        return bool(standing.get("/channels").json() == {"clients": clients, "channels": channels})

    wait_until(lambda: listed(0, {}), what="nobody")
    url = standing.relay.url
    with SseReader(url("orders")), SseReader(url("orders", 'so "odd" é')):
        wait_until(lambda: listed(2, {"orders": 2, 'so "odd" é': 1}), what="two clients")
    wait_until(lambda: listed(0, {}), what="nobody")


ADMIN_PATHS = ("/", "/live", "/ready", "/channels", "/metrics", "/status")


def test_each_path_is_read_alone_and_others_are_told_of_them(standing: Admin) -> None:
    for path in ADMIN_PATHS:
        head = standing.get(path, "HEAD")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Type"] == standing.get(path).headers["Content-Type"]
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            refused = standing.get(path, method)
            assert (refused.status_code, refused.headers["Allow"]) == (405, "GET, HEAD")
    for path in ("/publish", "/restart-relay", "/restart-postgresql", "/events/orders"):
        assert standing.get(path, "POST").status_code == 405
    for path in ("/else", "/lives", "/metrics/"):
        answer = standing.get(path)
        assert answer.status_code == 404
        assert "/ready" in answer.text
    assert standing.get("/live?x=1").status_code == 200


def test_streams_are_not_admin(standing: Admin) -> None:
    streams = f"http://{standing.relay.bind}"
    for path in set(ADMIN_PATHS) - {"/live"}:
        assert httpx.get(f"{streams}{path}").status_code == 404
    # All that a load balancer of the streams has to ask.
    assert httpx.get(f"{streams}/live").json() == {"live": True}


def test_the_admin_listener_may_be_a_unix_socket(
    start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path / 'admin.sock'}"
    relay = start_relay("--admin", address, dsn=database.dsn)
    with RawStream(address, "/ready") as answer:
        answer.wait_for(b'"ready": true')
    assert relay.stop() == 0
    assert not (tmp_path / "admin.sock").exists()


# ==== Streams beside the figures ==============================================


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_bytes(SECRET)
    return file


def answers(address: str, target: str) -> int:
    """The true status of a request for a stream, which a client that takes anything is told."""
    with RawStream(address, target, headers={"Host": address, "Accept": "*/*"}) as client:
        return wait_until(lambda: client.status, what="a status")


def test_events_are_read_there_by_the_rules_of_the_streams(
    start_relay: StartRelay, database: Database, key: Path
) -> None:
    options = ("--jwt-key-file", str(key), "--allow-channel", "open-*", "--path", "/")
    admin = Admin(start_relay, *options, dsn=database.dsn)
    token = token_for("orders")
    for channel, query, status in (
        ("open-1", "", 200),
        ("orders", "", 401),
        ("orders", f"?access_token={token}", 200),
        ("stock", f"?access_token={token}", 403),
        ("sse_relay_x", f"?access_token={token}", 403),
    ):
        assert answers(admin.address, f"/events/{channel}{query}") == status
        assert answers(admin.relay.bind, f"/{channel}{query}") == status
    foreign = {"Accept": "*/*", "Host": admin.address, "Origin": "https://elsewhere.example"}
    with RawStream(admin.address, "/events/open-1", headers=foreign) as page:
        wait_until(lambda: page.status == 403, what="a refusal")
    with SseReader(f"http://{admin.address}/events/orders?access_token={token}") as reader:
        reader.wait_for_id()
        database.notify("orders", "seen")
        reader.wait_for_data("seen")
        assert admin.relay.stop() == 0
        reader.wait_for_end()


@pytest.mark.parametrize("streams", ["tcp", "unix"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_what_everybody_may_read_needs_a_token_where_others_come(
    start_relay: StartRelay, database: Database, key: Path, tmp_path: Path, host: str, streams: str
) -> None:
    bind = f"unix:{tmp_path / 'http.sock'}" if streams == "unix" else None
    port = free_port()
    options = ("--allow-channel", "*", "--jwt-key-file", str(key), "--admin", f"{host}:{port}")
    relay = start_relay(*options, dsn=database.dsn, bind=bind)
    # On loopback come users of this machine, and they reach its TCP ports.
    open_to_all = (host, streams) == ("127.0.0.1", "tcp")
    assert answers(f"127.0.0.1:{port}", "/events/orders") == (200 if open_to_all else 401)
    assert answers(f"127.0.0.1:{port}", f"/events/orders?access_token={token_for('orders')}") == 200
    assert answers(relay.bind, "/events/orders") == 200


def test_it_says_that_only_tokens_open_channels_there(
    start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    admin = Admin(start_relay, dsn=database.dsn, bind=f"unix:{tmp_path / 'http.sock'}")
    assert "only a token opens channels at this address" in admin.get("/events/orders").json()["detail"]


# ==== The page ================================================================


FIGURES = ["Clients", "Channels", "Events per second", "Delivery delay", "PostgreSQL round trip"]


def watch(page: Page, *channels: str, token: str = "", names: str = "") -> None:
    """Choose channels as a person does."""
    for field, value in (("channels", "\n".join(channels)), ("token", token), ("names", names)):
        page.browser.run(page.playwright.fill(f"#watch [name={field}]", value))
    page.browser.run(page.playwright.get_by_role("button", name="Watch", exact=True).click())


def text_of(page: Page, element: str) -> str:
    return str(page.evaluate(f"document.getElementById('{element}').textContent"))


def test_the_page_shows_figures_and_the_channels_that_one_may_read(
    start_relay: StartRelay, database: Database, browser: Browser, key: Path
) -> None:
    admin = Admin(start_relay, "--jwt-key-file", str(key), dsn=database.dsn)
    token = token_for("orders", "of two words")
    with (
        SseReader(admin.relay.url("orders", access_token=token)) as reader,
        browser.open(url=f"http://{admin.address}/") as page,
    ):
        reader.wait_for_id()
        assert text_of(page, "state").startswith("not watching")
        wait_until(lambda: figures(page)["Clients"][0] == "1", what="a client, and the page is none")
        watch(page, "orders")
        wait_state(page, "refused")
        assert "401: this channel needs a token" in text_of(page, "state")

        watch(page, "orders", "of two words", token=token, names="created")
        wait_state(page, "live")
        assert token not in page.evaluate("document.documentElement.outerHTML")
        database.notify("orders", "plain")
        database.notify("of two words", '{"event": "created", "data": "named"}')
        wait_row(page, "plain")
        wait_row(page, "named")
        assert admin.get("/status").json()["position"] in page.evaluate(
            "document.querySelector('#events .event .position').textContent"
        )
        wait_until(lambda: figures(page)["Channels"][0] == "2", what="two channels")
        wait_until(lambda: figures(page)["Delivery delay"][2].startswith("M"), what="a plot")
        wait_until(lambda: figures(page)["Events per second"][1] != "at most 0", what="a rate")
        now = figures(page)
        assert [name for name, (_, _, line) in now.items() if line.startswith("M")] == FIGURES
        for figure in FIGURES[-2:]:
            assert re.fullmatch(r"[0-9.]+ m?s", now[figure][0]), now

        page.browser.run(page.playwright.get_by_text("Channels with clients").click())
        page.browser.run(page.playwright.fill("#watch [name=channels]", ""))
        page.browser.run(page.playwright.get_by_role("button", name="orders (2)", exact=True).click())
        field = "document.getElementById('watch').elements.channels"
        assert page.evaluate(f"{field}.value") == "orders"

        page.browser.run(page.playwright.get_by_role("button", name="Stop watching", exact=True).click())
        wait_state(page, "idle")
        assert page.evaluate(f"document.activeElement === {field}")
        wait_until(lambda: admin.get("/channels").json()["clients"] == 1, what="the page's leave")
        assert rows(page) == ["named", "plain"]
        losses = {
            name: value for name, value in admin.metrics().items() if "gaps" in name and "start" not in name
        }
        assert set(losses.values()) == {0}
        assert all(url.startswith(f"http://{admin.address}/") for _, url in page.requests)


def test_the_page_says_why_the_relay_is_not_ready(
    start_relay: StartRelay, database: Database, browser: Browser
) -> None:
    with FreezableProxy.before(database) as proxy:
        admin = Admin(start_relay, dsn=proxy.dsn(database))
        with browser.open(url=f"http://{admin.address}/") as page:
            wait_until(lambda: text_of(page, "relay").strip() == "ready", what="readiness")
            proxy.refuse()
            proxy.drop()
            wait_until(lambda: text_of(page, "relay").startswith("not ready"), what="word of the loss")
            admin.relay.stop()
            wait_until(lambda: "cannot be reached" in text_of(page, "relay"), what="word of the end")


def test_the_page_only_watches(standing: Admin, browser: Browser) -> None:
    with browser.open(url=f"http://{standing.address}/") as page:
        shown = "[...document.querySelectorAll('form, button')].filter(one => one.checkVisibility())"
        assert page.evaluate(f"{shown}.map(one => one.id || one.textContent)") == ["watch", "Watch"]


def test_the_page_looks_only_while_it_is_visible(standing: Admin, browser: Browser) -> None:
    with browser.open(url=f"http://{standing.address}/") as page:
        wait_until(lambda: len(page.requests) >= 2, what="looks")
        page.evaluate("""() => {
            Object.defineProperty(document, "hidden", {get: () => window.away, configurable: true});
            window.away = true;
        }""")
        wait_until(lambda: time.monotonic() - page.requests[-1][0] > 1.5, what="the end of the looks")
        count = len(page.requests)
        page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        wait_until(lambda: len(page.requests) > count + 1, what="further looks")


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_for_everybody(
    scheme: Literal["light", "dark"], width: int, standing: Admin, standing_database: Database,
    browser: Browser, node_modules: Path,
) -> None:  # fmt: skip
    with browser.open(url=f"http://{standing.address}/") as page:
        page.set_look(scheme, width)
        watch(page, "x" * 63, "orders")
        wait_state(page, "live")
        standing_database.notify("orders", "long" * 500)
        wait_row(page, "long" * 500)
        page.browser.run(page.playwright.get_by_text("Channels with clients").click())
        wait_until(lambda: page.evaluate("document.querySelectorAll('#watched button').length") == 2)
        assert page.violations(node_modules) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_status_is_some_of_the_metrics(admin: Admin, database: Database) -> None:
    with SseReader(admin.relay.url("orders")) as reader:
        reader.wait_for_id()
        for number in range(250):
            database.notify("orders", f"event {number}")
        position = reader.wait_for_data("event 249").id
        admin.wait_for(events_total=250)
        status, metrics = admin.get("/status").json(), admin.metrics()
    assert "orders" not in json.dumps(status)
    for name in ("clients", "channels", "events_total", "delivery_delay_seconds_sum"):
        assert status[name] == metrics[f"sse_relay_{name}"]
    assert 0 < status["round_trip_seconds"] < 1
    assert status["ready"] is True
    assert status["position"] == position


# ==== Metrics =================================================================


def test_each_metric_counts_what_really_happened(admin: Admin, database: Database) -> None:
    start = admin.metrics()
    # An alert on an increase sees the first only if there was a series before.
    assert all(start[f'sse_relay_gaps_total{{reason="{reason}"}}'] == 0 for reason in GAP_REASONS)
    assert start["sse_relay_max_clients"] > 0
    assert start[f'sse_relay_build_info{{source="notify",version="{__version__}"}}'] == 1
    assert start["process_resident_memory_bytes"] > 2**20
    assert start["sse_relay_ready"] == 1
    assert 0 < start["sse_relay_round_trip_seconds"] < 1
    assert 0 <= start["sse_relay_notification_queue_usage_ratio"] < 0.01
    for name in ("clients", "channels"):
        assert start[f"sse_relay_{name}"] == 0
    for name in ("events", "deliveries", "replayed_events", "sent_bytes", "cut_clients", "reconnects"):
        assert start[f"sse_relay_{name}_total"] == 0

    url = admin.relay.url("orders")
    with SseReader(url) as one, SseReader(url) as two, SseReader(admin.relay.url("stock")) as other:
        position = one.wait_for_id()
        two.wait_for_id()
        other.wait_for_id()
        admin.wait_for(clients=3, channels=2)
        for number in range(5):
            database.notify("orders", f"event {number}")
        database.notify("stock", "one")
        database.notify("unwatched", "none")
        one.wait_for_data("event 4")
        two.wait_for_data("event 4")
        other.wait_for_data("one")
        admin.wait_for(events_total=6, deliveries_total=11, replayed_events_total=0)
        with SseReader(url, last_event_id=position) as back:
            back.wait_for_data("event 4")
            admin.wait_for(clients=4, channels=2, deliveries_total=16, replayed_events_total=5)
        with SseReader(url, last_event_id="elsewhere-7") as lost:
            lost.wait_for(lambda event: event.event == "relay.gap")
            after = admin.wait_for(**{'gaps_total{reason="restart"}': 1})
        received = sum(len(block.data) for reader in (one, two, other, back) for block in reader.blocks)
        assert received < after["sse_relay_sent_bytes_total"] < received + 10_000

    after = admin.wait_for(clients=0, channels=0)
    assert after["sse_relay_delivery_delay_seconds_count"] == 6
    assert after['sse_relay_delivery_delay_seconds_bucket{le="+Inf"}'] == 6
    assert 0 < after["sse_relay_delivery_delay_seconds_sum"] < 6
    assert after['sse_relay_delivery_delay_seconds_bucket{le="10.0"}'] == 6

    # None is labelled by channel: a client could make up any number of them.
    assert not any("orders" in sample or "channel=" in sample for sample in after)


def test_bytes_are_those_that_a_client_gets(admin: Admin, database: Database) -> None:
    with RawStream(admin.relay.bind, "/events/orders") as client:
        client.wait_for(b"id: ")
        database.notify("orders", "é" * 500)
        client.wait_for("é\n".encode())
        wait_until(lambda: metric(admin.address, "sent_bytes_total") == len(client.raw))


def test_refusals_keep_their_true_status(start_relay: StartRelay, database: Database) -> None:
    """A client that asks for an event stream is answered 200 whatever happens: only the relay knows."""
    admin = Admin(start_relay, "--allow-channel", "open-*", "--max-clients", "2", dsn=database.dsn)
    url = admin.relay.url
    as_browser = {"Accept": "text/event-stream"}
    assert httpx.get(url("closed"), headers=as_browser).status_code == 200
    assert httpx.get(url("closed")).status_code == 403
    assert httpx.get(url(""), headers=as_browser).status_code == 200
    foreign = {**as_browser, "Origin": "https://elsewhere.example"}
    assert httpx.get(url("open-1"), headers=foreign).status_code == 200
    assert httpx.post(url("open-1")).status_code == 405
    assert httpx.get(f"http://{admin.relay.bind}/else").status_code == 404
    with SseReader(url("open-1")), SseReader(url("open-1")):
        admin.wait_for(clients=2)
        full = httpx.get(url("open-1"), headers=as_browser)
        assert (full.status_code, full.text.startswith("retry: ")) == (200, True)
        samples = admin.metrics()
    counted = {name: value for name, value in samples.items() if "refusals" in name and value}
    assert samples['sse_relay_refusals_total{status="421"}'] == 0
    assert counted == {
        'sse_relay_refusals_total{status="400"}': 1,
        'sse_relay_refusals_total{status="403"}': 3,
        'sse_relay_refusals_total{status="404"}': 1,
        'sse_relay_refusals_total{status="405"}': 1,
        'sse_relay_refusals_total{status="503"}': 1,
    }
    for status in (400, 403, 404, 405, 503):
        assert f"refused with {status}: " in admin.relay.log


def test_source_log_counts_delays_from_the_numbering(start_relay: StartRelay, log_database: Database) -> None:
    admin = Admin(start_relay, "--source", "log", dsn=log_database.dsn)
    with SseReader(admin.relay.url("orders")) as reader:
        reader.wait_for_id()
        with contextlib.closing(log_database.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN")
            for number in range(3):
                cursor.execute("SELECT sse_relay.publish('orders', %s)", (f"event {number}",))
            # However long a transaction takes: its events are numbered when it has been committed.
            cursor.execute("SELECT pg_sleep(1.5)")
            cursor.execute("COMMIT")
        reader.wait_for_data("event 2")
        after = admin.wait_for(events_total=3, deliveries_total=3, delivery_delay_seconds_count=3)
    assert 0 <= after["sse_relay_delivery_delay_seconds_sum"] < 3 * 1.5


def test_without_the_extra_metrics_name_it(
    start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    # Found before the package, and like a package that is not there.
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError('prometheus_client')\n")
    admin = Admin(start_relay, dsn=database.dsn, env={"PYTHONPATH": str(tmp_path)})
    answer = admin.get("/metrics")
    assert answer.status_code == 501
    assert "pip install prometheus-client" in answer.text
    assert admin.get("/ready").status_code == 200


# ==== Readiness ===============================================================


def test_readiness_follows_the_connection_to_postgresql(start_relay: StartRelay, database: Database) -> None:
    with FreezableProxy.before(database) as proxy:
        proxy.refuse()
        admin = Admin(start_relay, dsn=proxy.dsn(database), wait=False)
        admin.relay.wait_for_log("cannot reach PostgreSQL")
        answer = admin.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["ready"] is False
        assert "connection to server" in answer.json()["reason"]
        assert "password=" not in answer.text
        for change, status in ((proxy.accept, 200), (proxy.freeze, 503), (proxy.thaw, 200)):
            change()
            wait_until(lambda status=status: admin.get("/ready").status_code == status, 10, f"{status}")  # type: ignore[misc]
            assert admin.get("/live").status_code == 200
            assert admin.metrics()["sse_relay_ready"] == (status == 200)
        assert admin.metrics()["sse_relay_reconnects_total"] == 1
