"""Libraries that read event streams, each as the README's table of clients says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from harness import NODE_CLIENTS, Database, FreezableProxy, NodeClient, ProcessClient, Relay

StartRelay = Callable[..., Relay]

# Neither comes back by itself: this is the loop that an application writes.
PYTHON_LOOP = """
import json, sys, time
import httpx

def say(**what):
    print(json.dumps(what), flush=True)

last, wait = "", 0.2
while True:
    say(kind="request")
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
    try:
        with httpx.Client(timeout=None, headers=headers) as client:
            for event in events(client, sys.argv[1]):
                last = event.id or last
                wait = int(event.retry) / 1000 if event.retry else wait
                if event.data:
                    say(kind="event", name=event.event or "message", data=event.data, id=event.id)
                if event.event == "relay.refused":
                    sys.exit()
    except httpx.HTTPError:
        pass
    time.sleep(wait)
"""
PYTHON_CLIENTS = {
    "httpx-sse": """
from httpx_sse import connect_sse

def events(client, url):
    with connect_sse(client, "GET", url) as stream:
        yield from stream.iter_sse()
""",
    "sseclient-py": """
from sseclient import SSEClient

def events(client, url):
    with client.stream("GET", url) as response:
        yield from SSEClient(response.iter_bytes()).events()
""",
}
CLIENTS = [*NODE_CLIENTS, *PYTHON_CLIENTS]
READY = "ready"


def start(client: str, modules: Path, url: str) -> ProcessClient:
    if client in NODE_CLIENTS:
        return NodeClient(modules, url, "paid", "relay.gap", "relay.refused", package=client)
    return ProcessClient([sys.executable, "-c", PYTHON_CLIENTS[client] + PYTHON_LOOP, url])


def told(client: ProcessClient) -> list[tuple[str, str]]:
    """Names and data of its events but `READY`, a gap's reason in place of the data."""
    return [
        (event.name, json.loads(event.data)["reason"] if event.name == "relay.gap" else event.data)
        for event in client.events
        if event.data != READY
    ]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_what_is_live_what_it_missed_and_the_gap_of_a_restart(
    client: str, node_modules: Path, database: Database, start_relay: StartRelay
) -> None:
    options = ("--retry", "100", "--heartbeat", "1")
    relay = start_relay(*options, dsn=database.dsn)
    host, _, port = relay.bind.rpartition(":")
    with FreezableProxy((host, int(port))) as proxy:
        running = start(client, node_modules, f"http://127.0.0.1:{proxy.port}/events/orders")
        try:
            # The stream has a comment, retry: and a block of id: alone before its first event.
            def heard() -> bool:
                database.notify("orders", READY)
                return bool(running.events)

            harness.wait_until(heard, 20, "the stream")
            time.sleep(1.2)  # a heartbeat lies between
            database.notify("orders", "one")
            running.wait_for(lambda event: event.data == "one")
            proxy.refuse()
            proxy.drop()
            database.notify("orders", '{"event": "paid", "data": "missed\\ntwo lines"}')
            proxy.accept()
            running.wait_for(lambda event: event.name == "paid", 20)
            assert relay.stop() == 0
            start_relay(*options, dsn=database.dsn, bind=relay.bind)
            running.wait_for(lambda event: event.name == "relay.gap", 20)
            database.notify("orders", "after")
            running.wait_for(lambda event: event.data == "after")
            assert told(running) == [
                ("message", "one"),
                ("paid", "missed\ntwo lines"),
                ("relay.gap", "restart"),
                ("message", "after"),
            ]
        finally:
            running.close()


def test_a_refused_client_is_told_why_and_asks_no_more(
    node_modules: Path, database: Database, start_relay: StartRelay
) -> None:
    """Takes 4 s, as long as it watches: the most impatient of them waits up to 3."""
    relay = start_relay("--allow-channel", "public", "--retry", "1", dsn=database.dsn)
    clients = [start(client, node_modules, relay.url("secret")) for client in CLIENTS]
    try:
        for client in clients:
            refused = client.wait_for(lambda event: event.name == "relay.refused")
            assert json.loads(refused.data)["status"] == 403
        time.sleep(4)
        assert [len(client.requests) for client in clients] == [1] * len(clients)
        assert relay.log.count("refused with 403") == len(clients)
    finally:
        for client in clients:
            client.close()
