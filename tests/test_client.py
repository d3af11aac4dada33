"""The client module, /events.js, in Chromium: what it adds to the native EventSource."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

import harness
import sse_relay
from harness import Browser, Database, FreezableProxy, Nginx, Page, Relay, wait_until

StartRelay = Callable[..., Relay]

SECRET = b"of the client module's tests, 32 bytes"

# The native EventSource, watched: how many are open or on their way at once.
OPEN_STREAM = """async ([module, url, names, options]) => {
    const Native = window.Native ??= EventSource;
    window.made = [];
    window.most = 0;
    window.EventSource = class extends Native {
        constructor(...given) {
            super(...given);
            made.push(this);
            most = Math.max(most, made.filter(source => source.readyState !== Native.CLOSED).length);
        }
    };
    window.seen = [];
    window.states = [];
    window.gaps = [];
    window.refusals = [];
    const on = {
        open: () => states.push("open"),
        error: event => states.push("error " + event.target.readyState),
    };
    for (const name of names)
        on[name] = event => seen.push({name, data: event.data, id: event.lastEventId});
    const { openStream } = await import(module);
    window.stream = openStream(url, {
        ...options, on, onGap: gap => gaps.push(gap), onRefused: refusal => refusals.push(refusal),
    });
}"""


@pytest.fixture(scope="module")
def log(server: harness.Server) -> Iterator[Database]:
    with server.fresh_database() as fresh:
        sse_relay.apply_schema(fresh.dsn)
        yield fresh


@pytest.fixture(scope="module")
def standing(log: Database, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for tests that leave it as it is; only tokens open what does not begin with ``open``."""
    with browser.open() as any_page:
        origin = any_page.evaluate("location.origin")
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_bytes(SECRET)
    options = ("--allow-channel", "open*", "--allow-origin", origin, "--retry", "100")
    tokens = ("--jwt-key-file", str(key), "--jwt-cookie", "sse")
    with Relay("--source", "log", *options, *tokens, dsn=log.dsn) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose origin is another port than the relay's."""
    with browser.open() as opened:
        yield opened
        if opened.evaluate("window.most ?? 1") != 1:
            pytest.fail("the module had two streams at once")


def publish(log: Database, channel: str, *events: str, name: str | None = None) -> None:
    for event in events:
        log.execute("SELECT sse_relay.publish(%s, %s::text, %s)", (channel, event, name))


def open_stream(page: Page, module: str, url: str, *names: str, **options: object) -> None:
    page.evaluate(OPEN_STREAM, [f"{module}/events.js", url, names or ["message"], options])


def data(page: Page) -> list[str]:
    return [event.data for event in page.events]


def wait_open(page: Page, times: int = 1) -> None:
    wait_until(lambda: page.states.count("open") >= times, what="the stream")


def wait_for_data(page: Page, text: str) -> None:
    page.wait_for(lambda event: event.data == text, 20)


# ==== As a file ===============================================================


def test_it_is_a_small_public_script(standing: Relay) -> None:
    url = f"http://{standing.bind}/events.js"
    answer = httpx.get(url, headers={"Accept-Encoding": "identity", "Origin": "https://any.example"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "public, max-age=600"
    assert len(answer.content) < 2000
    assert f"sse-relay {sse_relay.__version__} " in answer.text
    head = httpx.head(f"{url}?v=1")
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(answer.content)))
    tag = answer.headers["ETag"]
    for known, status in ((tag, 304), (f"W/{tag}", 304), ('"another"', 200)):
        again = httpx.get(url, headers={"If-None-Match": known})
        assert again.status_code == status
        assert again.headers["ETag"] == tag
    assert httpx.post(url).status_code == 404


def test_it_lies_beside_the_streams(start_relay: StartRelay, database: Database) -> None:
    bind = f"127.0.0.1:{harness.free_port()}"
    start_relay("--path", "/a/b", dsn=database.dsn, bind=bind)
    assert "openStream" in httpx.get(f"http://{bind}/a/b.js").text
    assert httpx.get(f"http://{bind}/events.js").status_code == 404


def test_at_the_root_there_are_only_channels(start_relay: StartRelay, database: Database) -> None:
    relay = start_relay("--path", "/", dsn=database.dsn)
    with harness.SseReader(f"http://{relay.bind}/events.js") as reader:
        database.notify("events.js", "x")
        reader.wait_for_data("x")


# ==== What it adds ============================================================


def test_it_starts_from_a_position_and_tells_channels_and_names_apart(
    page: Page, standing: Relay, log: Database
) -> None:
    publish(log, "open1", "before")
    ((position,),) = log.execute("SELECT sse_relay.position()")
    publish(log, "open1", "a")
    publish(log, "open/ü 2", "b")
    publish(log, "open1", "c", name="paid")
    url = standing.url("open1", "open/ü 2")
    open_stream(page, f"http://{standing.bind}", url, "open1", "open/ü 2", "paid", position=position)
    wait_for_data(page, "c")
    publish(log, "open1", "d")
    wait_for_data(page, "d")
    assert [(event.name, event.data) for event in page.events] == [
        ("open1", "a"),
        ("open/ü 2", "b"),
        ("paid", "c"),
        ("open1", "d"),
    ]
    assert page.evaluate("gaps") == []
    page.evaluate("stream.close()")
    publish(log, "open1", "while closed")
    page.evaluate("stream.open()")
    wait_for_data(page, "while closed")
    assert data(page) == ["a", "b", "c", "d", "while closed"]
    # The snapshot of the page goes along, for the relay to leave out what the page shows.
    asked = page.evaluate("made.map(source => new URL(source.url).searchParams.getAll('lastEventId'))")
    assert asked == [[position], [position, page.events[3].id]]


def test_a_gap_is_told(page: Page, standing: Relay, log: Database) -> None:
    open_stream(page, f"http://{standing.bind}", standing.url("open"), position="elsewhere-7")
    wait_until(lambda: page.evaluate("gaps"), what="the gap")
    publish(log, "open", "x")
    wait_for_data(page, "x")
    assert page.evaluate("gaps") == [{"channel": "open", "reason": "restart", "since": "elsewhere-7"}]


def test_a_refusal_is_told_and_final_until_the_page_opens_it_again(
    page: Page, standing: Relay, log: Database
) -> None:
    def token(lifetime: float) -> str:
        return sse_relay.sign_token(sse_relay.read_key(SECRET), ["secret"], int(time.time() + lifetime))

    def let_in(lifetime: float) -> None:
        page.evaluate("token => document.cookie = `sse=${token}; path=/`", token(lifetime))

    def refusals() -> list[int]:
        return [refusal["status"] for refusal in page.evaluate("refusals")]

    url = standing.url("secret")
    let_in(60)
    # Another origin is sent no cookie unless the page wants it.
    open_stream(page, f"http://{standing.bind}", url)
    wait_until(lambda: refusals() == [401], what="the refusal")
    assert page.evaluate("refusals")[0]["reason"] == "this channel needs a token"
    assert page.evaluate("made.map(source => source.readyState)") == [2]

    let_in(4)
    open_stream(page, f"http://{standing.bind}", url, withCredentials=True)
    wait_open(page)
    publish(log, "secret", "first")
    wait_for_data(page, "first")
    wait_until(lambda: refusals() == [401], what="the end of the token")
    publish(log, "secret", "while refused")
    asked = len(page.requests)
    time.sleep(2)  # the time that it is watched
    assert len(page.requests) == asked
    let_in(60)
    page.evaluate("stream.open()")
    wait_for_data(page, "while refused")
    assert data(page) == ["first", "while refused"]
    assert page.evaluate("gaps") == []


def test_a_502_is_not_the_end(
    page: Page, browser: Browser, start_relay: StartRelay, log: Database, tmp_path: Path
) -> None:
    """Two pages, one of which has seen no event; and no more requests meanwhile than it takes.

    A third page gives up meanwhile.
    """
    how = {"bind": f"unix:{tmp_path}/http.sock", "dsn": log.dsn}
    options = ("--source", "log", "--retry", "100")
    relay = start_relay(*options, **how)
    with (
        Nginx(tmp_path, str(how["bind"]), server=harness.BARE_PROXY) as nginx,
        browser.open() as quiet,
        browser.open() as leaving,
    ):
        open_stream(page, nginx.url, f"{nginx.url}/events/orders")
        open_stream(quiet, nginx.url, f"{nginx.url}/events/orders", "paid")  # which does not come yet
        open_stream(leaving, nginx.url, f"{nginx.url}/events/orders")
        for each in (page, quiet, leaving):
            wait_open(each)
        publish(log, "orders", "first")
        wait_for_data(page, "first")
        assert relay.stop() == 0
        wait_until(lambda: "error 2" in leaving.states, what="a 502")
        leaving.evaluate("stream.close()")
        for each in (page, quiet):
            wait_until(lambda each=each: each.states.count("error 2") >= 2, 20, "a second 502")  # type: ignore[misc]  # a default
        publish(log, "orders", "second", "third")
        start_relay(*options, **how)
        wait_for_data(page, "third")
        assert data(page) == ["first", "second", "third"]
        assert page.evaluate("gaps") == []
        # The script, the stream, the browser's own return; then the module after 1-2 s, 2-4 s, and so on.
        waits = [later - earlier for (earlier, _), (later, _) in pairwise(page.requests)][2:]
        assert len(waits) >= 2, page.requests
        assert all(wait > 0.95 * 2**number for number, wait in enumerate(waits)), waits
        wait_until(lambda: quiet.evaluate("gaps"), what="the gap of the page that had no position")
        assert quiet.evaluate("gaps") == [{"channel": "orders", "reason": "unreadable", "since": "none"}]
        publish(log, "orders", "fourth", name="paid")
        wait_for_data(quiet, "fourth")
        assert data(quiet) == ["fourth"]
        assert leaving.evaluate("made.length") == 1


def test_a_server_that_refuses_connections_is_not_hammered(
    page: Page, standing: Relay, log: Database
) -> None:
    host, _, port = standing.bind.rpartition(":")
    with FreezableProxy((host, int(port))) as proxy:
        url = standing.url("open").replace(standing.bind, f"127.0.0.1:{proxy.port}")
        open_stream(page, f"http://{standing.bind}", url)
        wait_open(page)
        publish(log, "open", "first")
        wait_for_data(page, "first")
        proxy.refuse()
        proxy.drop()
        asked = len(page.requests)
        time.sleep(3)  # the time that it is watched
        # The relay said 100 to 200 ms.
        assert 1 <= len(page.requests) - asked <= 30
        publish(log, "open", "missed")
        proxy.accept()
        wait_for_data(page, "missed")
        assert data(page) == ["first", "missed"]
