"""The relay in the hands of a browser's own EventSource, and in the least environment."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from harness import Database, Page, Relay, SseReader, wait_until

pytestmark = pytest.mark.slow

StartRelay = Callable[..., Relay]


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
    page: Page, start_relay: StartRelay, database: Database
) -> None:
    relay = start_relay("--heartbeat", "0.1", dsn=database.dsn)
    page.event_source(relay.url("orders"), "created", "relay.heartbeat", "relay.refused")
    assert not relay.url().startswith(page.evaluate("location.origin"))
    wait_until(lambda: page.states, what="the EventSource to open")
    for text in TEXTS:
        database.notify("orders", text)
    database.notify("orders", '{"event": "created", "data": {"total": 1.10}, "id": 7}')
    with harness.RawStream(relay.bind, relay.url("orders")) as witness:
        wait_until(lambda: witness.chunks.count(b":\n") >= 5, what="heartbeats")
    database.notify("orders", "carriage\rreturn\r\nboth")
    page.wait_for(lambda event: event.data == "carriage\nreturn\nboth")
    *events, named, _ = page.events
    assert [(event.name, event.data) for event in events] == [("message", text) for text in TEXTS]
    assert all(event.id for event in events)
    assert (named.name, named.data) == ("created", '{"total": 1.10}')
    assert named.id.endswith("/7")
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


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """The interpreter of a virtual environment that holds what pyproject.toml requires, and no more."""
    python = tmp_path / "bin" / "python"
    required = tomllib.loads((harness.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(required) == 3
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True, timeout=60)
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
