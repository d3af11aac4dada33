"""The client module /events.js in Chromium: what the native EventSource lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import harness
from harness import Browser, Database, Page, Relay

StartRelay = Callable[..., Relay]

# Collects what happens, as [what, detail]; `relay.url()` of the module and of the stream are its arguments.
USE = """async ([module, url, names, options]) => {
    const {openStream} = await import(module);
    window.seen = [];
    const note = (what) => (detail) => seen.push([what, detail]);
    const on = {};
    for (const name of names)
        on[name] = (event) => seen.push([name, event.data]);
    window.stream = openStream(url, {
        on, onOpen: () => seen.push(["open", null]), onGap: note("gap"), onRefused: note("refused"),
        ...options,
    });
}"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.open() as opened:
        yield opened


def module_of(relay: Relay) -> str:
    return f"http://{relay.bind}/events.js"


def use(page: Page, relay: Relay, url: str, *names: str, **options: object) -> None:
    page.evaluate(USE, [module_of(relay), url, names or ["message"], options])


def seen(page: Page) -> list[list[object]]:
    return list(page.evaluate("seen"))


def wait_for(page: Page, what: str, detail: object = None, times: int = 1) -> None:
    def there() -> bool:
        found = [entry for entry in seen(page) if entry[0] == what and detail in (None, entry[1])]
        return len(found) >= times

    harness.wait_until(there, what=f"{what} {detail} in the page")


def failures(nginx: harness.Nginx) -> int:
    """How many requests were answered with 502."""
    return nginx.log().count(" /events/orders 502 ")


def requests(page: Page, path: str) -> list[str]:
    return [url for _, url in page.requests if path in url]


def test_it_is_small_and_served_with_what_browsers_ask_of_a_module(relay: Relay) -> None:
    answer = httpx.get(module_of(relay), headers={"Origin": "https://elsewhere.example"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert len(answer.content) < 2_000
    tag = answer.headers["ETag"]
    assert httpx.get(module_of(relay), headers={"If-None-Match": tag}).status_code == 304
    head = httpx.head(module_of(relay))
    assert (head.status_code, head.content, head.headers["ETag"]) == (200, b"", tag)
    assert httpx.post(module_of(relay)).status_code == 404


@pytest.mark.parametrize(("path", "where", "status"), [("/", "/events.js", 200), ("/live", "/live.js", 200)])
def test_it_stands_beside_the_streams(
    database: Database, start_relay: StartRelay, path: str, where: str, status: int
) -> None:
    relay = start_relay("--path", path, dsn=database.dsn)
    with httpx.stream("GET", f"http://{relay.bind}{where}") as answer:
        assert answer.status_code == status
        # With --path / every path is a channel's.
        is_stream = answer.headers["Content-Type"].startswith("text/event-stream")
        assert is_stream == (path == "/")


def test_events_gaps_and_positions(page: Page, relay: Relay, database: Database) -> None:
    use(page, relay, relay.url("orders"), "message", "paid", position="another-7")
    wait_for(page, "gap", {"channel": "orders", "reason": "restart", "since": "another-7"})
    database.notify("orders", "one")
    database.notify("orders", '{"event": "paid", "data": "two", "id": "own"}')
    wait_for(page, "paid", "two")
    database.notify("orders", "three")
    wait_for(page, "message", "three")
    assert [entry[1] for entry in seen(page) if entry[0] in ("message", "paid")] == ["one", "two", "three"]
    position = page.evaluate("stream.position")
    # Another one, from where a page kept it.
    database.notify("orders", "four")
    wait_for(page, "message", "four")
    page.evaluate("stream.close()")
    use(page, relay, relay.url("orders"), position=position)
    wait_for(page, "message", "four")
    assert [entry[0] for entry in seen(page) if entry[0] != "open"] == ["message"]


def test_a_refused_stream_does_not_come_back(page: Page, database: Database, start_relay: StartRelay) -> None:
    relay = start_relay(
        "--allow-channel", "public", "--allow-origin", page.evaluate("origin"), dsn=database.dsn
    )
    use(page, relay, relay.url("secret"))
    wait_for(page, "refused")
    (refused,) = [entry[1] for entry in seen(page) if entry[0] == "refused"]
    assert refused == {
        "status": 403, "reason": "this channel is not open to everybody (--allow-channel)"
    }  # fmt: skip
    assert page.evaluate("stream.close()") is None
    assert len(requests(page, "/events/secret")) == 1


@pytest.mark.parametrize("known", [True, False], ids=["with a position", "before the first event"])
def test_it_comes_back_after_an_answer_that_ends_a_native_event_source(
    page: Page, database: Database, start_relay: StartRelay, open_folder: Path, *, known: bool
) -> None:
    """Waits as long as the module does, 1 to 3 s at first."""
    relay = start_relay("--retry", "100", dsn=database.dsn)
    host, _, port = relay.bind.rpartition(":")
    # Without the README's answer for the time in which the relay is away.
    server = harness.nginx_recipe("server { }").replace("error_page 502 503 504 = @sse_retry;", "")
    assert server != harness.nginx_recipe("server { }")
    with (
        harness.FreezableProxy((host, int(port))) as proxy,
        harness.Nginx(open_folder, f"127.0.0.1:{proxy.port}", server=server) as nginx,
    ):
        page.evaluate(USE, [module_of(relay), f"{nginx.url}/events/orders", ["message"], {}])
        wait_for(page, "open")
        if known:
            database.notify("orders", "before")
            wait_for(page, "message", "before")
        proxy.refuse()
        proxy.drop()
        harness.wait_until(lambda: failures(nginx), what="a 502")
        database.notify("orders", "meanwhile")
        proxy.accept()
        wait_for(page, "open", times=2)
        if known:
            wait_for(page, "message", "meanwhile")
        else:
            wait_for(page, "gap")
        database.notify("orders", "after")
        wait_for(page, "message", "after")
        assert failures(nginx) <= 2
    events = [entry[1] for entry in seen(page) if entry[0] == "message"]
    gaps = [entry[1] for entry in seen(page) if entry[0] == "gap"]
    if known:
        assert (events, gaps) == (["before", "meanwhile", "after"], [])
    else:
        # What came meanwhile is missing, and the page has been told.
        assert (events, gaps) == (["after"], [{"channel": None, "reason": "unknown", "since": None}])


def test_what_a_page_showed_stays_out_also_after_a_new_start(page: Page, relay: Relay) -> None:
    """The snapshot of `position()` goes with each later position of the same epoch, and of no other."""
    module = httpx.get(module_of(relay)).text
    addresses = page.evaluate(
        """async ([text]) => {
            const addresses = [];
            class Fake {
                static CLOSED = 2;
                listeners = {};
                constructor(url) { addresses.push(url.searchParams.get("lastEventId")); Fake.last = this; }
                addEventListener(name, handle) { this.listeners[name] = handle; }
                close() {}
            }
            window.EventSource = Fake;
            window.setTimeout = (start) => start();
            const {openStream} = await import("data:text/javascript," + encodeURIComponent(text));
            openStream("/events/a", {on: {message() {}}, position: "e1-5@10:12:11"});
            for (const id of ["e1-7/own", "e2-1", ""]) {
                Fake.last.listeners.message({lastEventId: id});
                Fake.last.readyState = 2;
                Fake.last.onerror();
            }
            return addresses;
        }""",
        [module],
    )
    assert addresses == ["e1-5@10:12:11", "e1-7@10:12:11", "e2-1", "e2-1"]
