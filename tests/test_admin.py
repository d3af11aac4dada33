"""The admin listener: health that tells the truth, and metrics that count what really happened."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import harness
from harness import Database, FreezableProxy, RawStream, Relay, SseReader, free_port, wait_until
from sse_relay import SCHEMA_SQL

StartRelay = Callable[..., Relay]

# Design and README name these; a scrape holds them and no others of ours.
KINDS = {
    "sse_relay_clients": "gauge",
    "sse_relay_channels": "gauge",
    "sse_relay_ready": "gauge",
    "sse_relay_round_trip_seconds": "gauge",
    "sse_relay_notification_queue_usage_ratio": "gauge",
    "sse_relay_events": "counter",
    "sse_relay_deliveries": "counter",
    "sse_relay_replayed_events": "counter",
    "sse_relay_sent_bytes": "counter",
    "sse_relay_gaps": "counter",
    "sse_relay_refusals": "counter",
    "sse_relay_cut_clients": "counter",
    "sse_relay_reconnects": "counter",
    "sse_relay_delivery_delay_seconds": "histogram",
}


class Admin:
    """A relay with an admin listener, and what that says."""

    def __init__(self, start_relay: StartRelay, *options: str, **how: Any) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.relay = start_relay("--admin", self.address, *options, **how)

    def get(self, path: str, method: str = "GET") -> httpx.Response:
        return httpx.request(method, f"http://{self.address}{path}", timeout=10)

    def metrics(self) -> dict[str, float]:
        """Return all samples; the labels stand in the name as in the text."""
        response = self.get("/metrics")
        assert response.status_code == 200
        samples = {}
        for family in text_string_to_metric_families(response.text):
            assert family.documentation, family.name
            assert family.type == KINDS[family.name]
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


def test_health_is_told_as_json(admin: Admin) -> None:
    live, ready = admin.get("/live"), admin.get("/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert ready.status_code == 200
    assert ready.json()["ready"] is True
    assert 0 < ready.json()["round_trip_seconds"] < 1
    for answer in (live, ready):
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["Cache-Control"] == "no-store"


def test_channels_are_listed_with_their_clients(admin: Admin) -> None:
    assert admin.get("/channels").json() == {"clients": 0, "channels": {}}
    with SseReader(admin.relay.url("orders")), SseReader(admin.relay.url("orders", 'so "odd" é')):
        wait_until(lambda: admin.get("/channels").json()["clients"] == 2, what="two clients")
        assert admin.get("/channels").json()["channels"] == {"orders": 2, 'so "odd" é': 1}
    wait_until(lambda: admin.get("/channels").json() == {"clients": 0, "channels": {}}, what="nobody")


@pytest.mark.parametrize("path", ["/live", "/ready", "/channels", "/metrics"])
def test_head_gives_the_headers_and_other_methods_are_refused(admin: Admin, path: str) -> None:
    head = admin.get(path, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == admin.get(path).headers["Content-Type"]
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        refused = admin.get(path, method)
        assert (refused.status_code, refused.headers["Allow"]) == (405, "GET, HEAD")


def test_what_is_not_there_says_what_is(admin: Admin) -> None:
    for path in ("/events/orders", "/lives", "/metrics/"):
        answer = admin.get(path)
        assert answer.status_code == 404
        assert "/ready" in answer.text
    assert admin.get("/live?x=1").status_code == 200


def test_streams_are_not_admin_and_admin_is_not_streams(admin: Admin) -> None:
    for path in ("/live", "/ready", "/metrics", "/channels"):
        assert httpx.get(f"http://{admin.relay.bind}{path}").status_code == 404


def test_the_admin_listener_may_be_a_unix_socket(
    start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path / 'admin.sock'}"
    relay = start_relay("--admin", address, dsn=database.dsn)
    with RawStream(address, "/ready") as answer:
        answer.wait_for(b'"ready": true')
    assert relay.stop() == 0
    assert not (tmp_path / "admin.sock").exists()


# ==== Metrics =================================================================


def test_each_metric_counts_what_really_happened(admin: Admin, database: Database) -> None:
    start = admin.metrics()
    assert {name for name in KINDS if not any(sample.startswith(name) for sample in start)} == {
        # These have no sample before the first of their kind.
        "sse_relay_gaps",
        "sse_relay_refusals",
    }
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
        for number in range(20):
            database.notify("orders", f"{number:03} " + "é" * 500)
        client.wait_for(b"data: 019 ")
        wait_until(
            lambda: admin.metrics()["sse_relay_sent_bytes_total"] == len(client.raw), what="equal counts"
        )


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
    counted = {name: value for name, value in samples.items() if "refusals" in name}
    assert counted == {
        'sse_relay_refusals_total{status="400"}': 1,
        'sse_relay_refusals_total{status="403"}': 3,
        'sse_relay_refusals_total{status="404"}': 1,
        'sse_relay_refusals_total{status="405"}': 1,
        'sse_relay_refusals_total{status="503"}': 1,
    }
    for status in (400, 403, 404, 405, 503):
        assert f"refused with {status}: " in admin.relay.log


def test_a_slow_client_that_is_cut_is_counted(start_relay: StartRelay, database: Database) -> None:
    admin = Admin(start_relay, "--max-backlog", "64KiB", dsn=database.dsn)
    with (
        RawStream(admin.relay.bind, "/events/orders", reading=False, receive_buffer=4096),
        SseReader(admin.relay.url("orders")) as other,
    ):
        admin.wait_for(clients=2)
        other.wait_for_id()

        def cut() -> bool:
            database.execute(
                "SELECT pg_notify('orders', n || repeat('x', 7000)) FROM generate_series(1, 20) AS n"
            )
            return admin.metrics()["sse_relay_cut_clients_total"] == 1

        wait_until(cut, 20, "the cut of a client that does not read")
        admin.wait_for(clients=1)
    assert "cut a slow client" in admin.relay.log


def test_source_log_counts_delays_from_the_numbering(start_relay: StartRelay, database: Database) -> None:
    with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(SCHEMA_SQL)
    admin = Admin(start_relay, "--source", "log", dsn=database.dsn)
    with SseReader(admin.relay.url("orders")) as reader:
        reader.wait_for_id()
        with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
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
    assert "pip install 'sse-relay[metrics]'" in answer.text
    assert admin.get("/ready").status_code == 200


# ==== Readiness ===============================================================


def test_a_frozen_connection_is_not_ready_and_recovers(start_relay: StartRelay, database: Database) -> None:
    with FreezableProxy.before(database) as proxy:
        admin = Admin(start_relay, dsn=proxy.dsn(database))
        assert admin.get("/ready").status_code == 200
        frozen = time.monotonic()
        proxy.freeze()
        wait_until(lambda: admin.get("/ready").status_code == 503, 10, "word that it is not ready")
        assert time.monotonic() - frozen < 10
        answer = admin.get("/ready").json()
        assert answer["ready"] is False
        assert answer["reason"]
        assert admin.get("/live").status_code == 200
        assert admin.metrics()["sse_relay_ready"] == 0
        thawed = time.monotonic()
        proxy.thaw()
        wait_until(lambda: admin.get("/ready").status_code == 200, 5, "readiness")
        assert time.monotonic() - thawed < 5
        after = admin.metrics()
        assert after["sse_relay_ready"] == 1
        assert after["sse_relay_reconnects_total"] == 1


def test_it_is_not_ready_before_postgresql_is_there(
    start_relay: StartRelay, own_server: harness.Server
) -> None:
    own_server.stop()
    admin = Admin(start_relay, dsn=own_server.dsn, wait=False)
    admin.relay.wait_for_log("cannot reach PostgreSQL")
    answer = admin.get("/ready")
    assert answer.status_code == 503
    assert "connection to server" in answer.json()["reason"]
    assert json.dumps(answer.json()).find("password=") == -1
    assert admin.get("/live").status_code == 200
    own_server.start()
    wait_until(lambda: admin.get("/ready").status_code == 200, 10, "readiness")
