"""The relay behind four real proxies, each with the very files that the docs print for it.

One table of stories, and an adapter for each proxy. What is nginx's alone stands at the end.
"""

from __future__ import annotations

import contextlib
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import harness
import pages
from harness import Browser, Database, Nginx, Relay, SseReader, nginx_recipe, wait_until

pytestmark = pytest.mark.slow

StartRelay = Callable[..., Relay]


# ==== The proxies =============================================================


# What the distributions bring.
APACHE_CONF = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/pid
ErrorLog {folder}/error.log
DefaultRuntimeDir {folder}
User www-data
Group www-data
TypesConfig /etc/mime.types
Listen 127.0.0.1:{port}
{modules}
Include {folder}/site
"""


@dataclass(frozen=True)
class Kind:
    """A proxy, and how its printed files become ones of the test's own.

    Args:
        files: Those of the docs: what they are called here, by language and first line.
        command: What runs in the foreground; ``{folder}`` is where the files are.
        changes: What is replaced in the files, beside the names of folders.
        restarts: How often the relay restarts while a browser watches.
        streams: How many a browser can open at once.
    """

    program: str
    files: dict[str, tuple[str, str]]
    command: tuple[str, ...]
    changes: tuple[tuple[str, str], ...] = ()
    restarts: int = 2
    streams: int = 20


NGINX = Kind(
    "nginx",
    {
        "conf.d": ("nginx", "# /etc/nginx/conf.d/sse-relay.conf"),
        "snippet": ("nginx", "# /etc/nginx/snippets/sse-relay.conf"),
        "site": ("nginx", "# /etc/nginx/sites-enabled/app.example"),
    },
    ("-e", "{folder}/error.log", "-c", "{folder}/nginx.conf"),
    changes=(
        ("listen 443", "listen 127.0.0.1:{port}"),
        ("/etc/nginx/snippets/sse-relay.conf", "{folder}/snippet"),
        ("/var/log/nginx", "{folder}"),
    ),
    restarts=5,
)
CADDY = Kind(
    "caddy",
    {"Caddyfile": ("caddy", "# /etc/caddy/Caddyfile")},
    ("run", "--config", "{folder}/Caddyfile", "--adapter", "caddyfile"),
    changes=(
        # It fetches certificates by itself, and has an admin port that is always the same.
        (
            "app.example {\n",
            "{\n\tadmin off\n\tauto_https off\n}\nhttps://127.0.0.1:{port} {\n\ttls {certificate} {key}\n",
        ),
        ("unix//run/sse-relay/http.sock", "unix/{folder}/http.sock"),
    ),
)
HAPROXY = Kind(
    "haproxy",
    {
        "haproxy.cfg": ("haproxy", "# /etc/haproxy/haproxy.cfg"),
        "sse-retry.http": ("http", "HTTP/1.1 200 OK"),
    },
    ("-db", "-f", "{folder}/haproxy.cfg"),
    changes=(
        ("bind :443 ssl crt /etc/haproxy/app.example.pem", "bind 127.0.0.1:{port} ssl crt {both}"),
        ("/etc/haproxy/", "{folder}/"),
        ("maxconn 50000", "maxconn 1000"),
    ),
)
APACHE = Kind(
    "apache2",
    {
        "site": ("apache", "# /etc/apache2/sites-enabled/app.example.conf"),
        "sse-retry.asis": ("http", "Status: 200 OK"),
    },
    ("-D", "FOREGROUND", "-f", "{folder}/apache.conf"),
    changes=(
        ("*:443", "127.0.0.1:{port}"),
        ("/etc/apache2/sse-retry.asis", "{folder}/sse-retry.asis"),
        ("/var/log/apache2/", "{folder}/"),
    ),
    streams=6,
)
KINDS = {kind.program: kind for kind in (NGINX, CADDY, HAPROXY, APACHE)}
APACHE_MODULES = Path("/usr/lib/apache2/modules")


def load_modules() -> str:
    """Return Apache's lines for the modules that the docs enable, and those that Debian's has always."""
    enabled = pages.block("sh", "a2enmod ", "docs/proxies.md").split()[1:]
    needed = ["mpm_event", "authz_core", "mime", "socache_shmcb", "proxy", *enabled]
    return "".join(
        f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so\n" for name in dict.fromkeys(needed)
    )


class Proxy(harness.Daemon):
    """One of them, with TLS, at a free port of 127.0.0.1; the relay is to serve at `bind`.

    Args:
        folder: For its files; other users can reach it.
        changes: Pairs of texts, for other times than the docs'.
    """

    def __init__(self, kind: Kind, folder: Path, *changes: tuple[str, str]) -> None:
        self.kind = kind
        port = harness.free_port()
        self.url = f"https://127.0.0.1:{port}"
        self.bind = f"unix:{folder}/http.sock"
        self.certificate, key = harness.make_certificate(folder)
        both = folder / "both.pem"
        both.write_text(self.certificate.read_text() + key.read_text())
        names = {
            "{folder}": str(folder), "{port}": str(port), "{both}": str(both),
            "{certificate}": str(self.certificate), "{key}": str(key),
        }  # fmt: skip

        def replace(text: str, pairs: Iterable[tuple[str, str]]) -> str:
            for old, new in pairs:
                text = text.replace(old, new)
            return text

        replaced = [
            *((old, replace(new, names.items())) for old, new in kind.changes),
            ("/run/sse-relay/", f"{folder}/"),
            ("/etc/ssl/app.example.pem", str(self.certificate)),
            ("/etc/ssl/app.example.key", str(key)),
            *changes,
        ]
        for name, (language, first) in kind.files.items():
            (folder / name).write_text(replace(pages.block(language, first), replaced))
        program = harness.require(kind.program)
        if kind is NGINX:
            includes = f"include {folder}/conf.d; include {folder}/site;"
            (folder / "nginx.conf").write_text(harness.nginx_conf(folder, includes))
        if kind is APACHE:
            conf = APACHE_CONF.format(folder=folder, port=port, modules=load_modules())
            (folder / "apache.conf").write_text(conf)
        folder.chmod(0o777)
        super().__init__([program, *(replace(word, names.items()) for word in kind.command)], port, folder)

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.certificate))
        return httpx.Client(verify=context, base_url=self.url, timeout=20)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Other users can reach it, and its name is short enough for a socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def proxy(kind: Kind, folder: Path) -> Iterator[Proxy]:
    with Proxy(kind, folder) as running:
        yield running


@contextlib.contextmanager
def lines(client: httpx.Client, path: str, headers: dict[str, str] | None = None) -> Iterator[Iterator[str]]:
    """Open a stream and yield its lines as they come."""
    accept = {"Accept": "text/event-stream", **(headers or {})}
    with client.stream("GET", path, headers=accept) as response:
        assert response.status_code == 200, response.read()
        yield response.iter_lines()


def until(lines: Iterator[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


# ==== The stories =============================================================


def test_events_pass_at_once_and_as_they_are(
    start_relay: StartRelay, database: Database, proxy: Proxy
) -> None:
    start_relay("--heartbeat", "0.5", bind=proxy.bind, dsn=database.dsn)
    with proxy.client() as client:
        accept = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, deflate, br"}
        with client.stream("GET", "/events/orders", headers=accept) as response:
            headers = response.headers
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert headers["cache-control"] == "no-store, no-transform"
            assert "content-encoding" not in headers
            came = response.iter_lines()
            until(came, "id: ")
            delays = []
            for number in range(15):
                began = time.monotonic()
                database.notify("orders", str(number))
                assert until(came, f"data: {number}") == f"data: {number}"
                delays.append(time.monotonic() - began)
            # Who holds small writes back does so for 200 ms.
            assert statistics.median(delays) < 0.15, delays
            assert until(came, ":") == ":"


def test_a_browser_lives_through_restarts_and_has_every_event(
    start_relay: StartRelay, log_database: Database, proxy: Proxy, browser: Browser
) -> None:
    options = ("--source", "log", "--retry", "100")
    relay = start_relay(*options, bind=proxy.bind, dsn=log_database.dsn)
    count = 0

    def publish() -> None:
        nonlocal count
        for number in range(count, count + 3):
            log_database.execute("SELECT sse_relay.publish('orders', %s::text)", (str(number),))
        count += 3

    with browser.open() as page:
        page.event_source(f"{proxy.url}/events/orders", "relay.refused")
        wait_until(lambda: page.ready_state == 1, what="the stream")
        restarts = proxy.kind.restarts
        for restart in range(restarts + 1):
            publish()
            last = str(count - 1)
            page.wait_for(lambda event, last=last: event.data == last, 20)  # type: ignore[misc]  # a default
            publish()
            assert relay.stop() == 0
            publish()
            if restart == restarts:  # an outage: the page asks again and again, and is told to come back
                asked = len(page.states)
                wait_until(lambda asked=asked: len(page.states) > asked + 3, 20, "two answers more")  # type: ignore[misc]  # a default
            relay = start_relay(*options, bind=proxy.bind, dsn=log_database.dsn)
        publish()
        page.wait_for(lambda event: event.data == str(count - 1), 20)
        assert [(event.name, event.data) for event in page.events] == [
            ("message", str(number)) for number in range(count)
        ]
        assert page.states.count("open") >= restarts + 2
        assert "error 2" not in page.states, "given up"


def test_while_no_relay_runs_clients_are_told_to_come_back(proxy: Proxy) -> None:
    with proxy.client() as client:
        for path in ("/events/orders", "/events?channel=orders"):
            headers = {"Accept": "text/event-stream", "Origin": "https://elsewhere.example"}
            answer = client.get(path, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["access-control-allow-origin"] == "https://elsewhere.example"
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert answer.text == "retry: 2000\n\n"
        script = client.get("/events.js")
        assert script.status_code in (502, 503) or script.headers["content-type"] == "text/event-stream"


def test_a_relay_that_is_frozen_is_noticed(
    start_relay: StartRelay, database: Database, kind: Kind, folder: Path
) -> None:
    changes = [("60s", "2s"), ("timeout=60", "timeout=2")]
    bind = f"unix:{folder}/http.sock"
    if kind is CADDY:  # its read_timeout is for TCP alone
        bind = f"127.0.0.1:{harness.free_port()}"
        changes.append((f"unix/{folder}/http.sock", bind))
    with Proxy(kind, folder, *changes) as proxy, proxy.client() as client:
        relay = start_relay("--heartbeat", "0.5", "--allow-channel", "*", bind=bind, dsn=database.dsn)
        with lines(client, "/events/orders") as came:
            until(came, "id: ")
            # Longer than the proxy waits, but heartbeats come.
            began = time.monotonic()
            while time.monotonic() - began < 3:
                until(came, ":")
            relay.suspend()
            with contextlib.suppress(httpx.TransportError):
                assert list(came) == [], "what comes after the end"
        assert time.monotonic() - began < 15
        # To those who come meanwhile, too.
        answer = client.get("/events/orders", headers={"Accept": "text/event-stream"})
        assert (answer.status_code, answer.text) == (200, "retry: 2000\n\n")
        relay.resume()


def test_names_pass_unchanged_and_no_other_path_does(
    start_relay: StartRelay, database: Database, proxy: Proxy
) -> None:
    relay = start_relay("--allow-channel", "*", bind=proxy.bind, dsn=database.dsn)
    channels = {"/events/orders": "orders", "/events/a%2Fb%25": "a/b%", "/events/%E2%82%AC%20x": "€ x",
                "/events?channel=one&lastEventId=": "one"}  # fmt: skip
    with proxy.client() as client:
        for path, channel in channels.items():
            with lines(client, path) as came:
                until(came, "id: ")
                database.notify(channel, "hello")
                assert until(came, "data: hello")
        assert "openStream" in client.get("/events.js").text
        assert client.get("/events.d.ts").headers["content-type"].startswith(("text/", "application/"))
        # These are the application's, which is away.
        for path in ("/eventsX", "/events.jsx", "/eventsX/orders", "/event"):
            assert client.get(path).status_code in (502, 503), path
    assert "eventsX" not in relay.log


def test_a_page_of_the_same_host_needs_no_permission(
    start_relay: StartRelay, database: Database, proxy: Proxy
) -> None:
    start_relay("--allow-channel", "*", bind=proxy.bind, dsn=database.dsn)
    with proxy.client() as client:
        own, other = ({"Origin": origin} for origin in (proxy.url, "https://elsewhere.example"))
        assert client.head("/events/orders", headers=own).status_code == 200
        refused = client.head("/events/orders", headers=other)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


def test_a_cookie_of_32_kib_passes(start_relay: StartRelay, database: Database, proxy: Proxy) -> None:
    start_relay("--allow-channel", "*", bind=proxy.bind, dsn=database.dsn)
    with (
        proxy.client() as client,
        lines(client, "/events/orders", {"Cookie": f"site={'x' * 32_700}"}) as came,
    ):
        assert until(came, "id: ")


def test_http_2_carries_many_streams(
    start_relay: StartRelay, database: Database, proxy: Proxy, browser: Browser
) -> None:
    start_relay(bind=proxy.bind, dsn=database.dsn)
    streams = proxy.kind.streams
    with browser.open() as page:
        page.evaluate(
            """([url, streams]) => {
                window.got = [];
                window.sources = Array.from({length: streams}, (_, n) => {
                    const source = new EventSource(`${url}/events/channel-${n}`);
                    source.onmessage = e => got.push(e.data);
                    return source;
                });
            }""",
            [proxy.url, streams],
        )
        wait_until(lambda: page.evaluate("sources.every(s => s.readyState === 1)"), what="open streams")
        for number in range(streams):
            database.notify(f"channel-{number}", str(number))
        wait_until(lambda: len(page.evaluate("got")) == streams, what="an event on each")
        assert sorted(page.evaluate("got"), key=int) == [str(number) for number in range(streams)]


# ==== nginx alone =============================================================


@pytest.fixture
def nginx(folder: Path) -> Iterator[Proxy]:
    with Proxy(NGINX, folder) as running:
        yield running


def test_no_log_keeps_a_token(start_relay: StartRelay, database: Database, nginx: Proxy) -> None:
    secret = "eyJ-a-secret-token"
    path = f"/events/orders?access_token={secret}"
    with nginx.client() as client:
        client.get(path)  # nobody listens: the error log's turn
        relay = start_relay("--allow-channel", "open", bind=nginx.bind, dsn=database.dsn)
        assert client.get(path, headers={"Accept": "text/event-stream"}).status_code == 200
        assert client.get(path).status_code == 403
    wait_until(lambda: nginx.log().count("GET /events/orders ") == 3, what="the access log")
    for file in (*nginx.folder.glob("*.log"), nginx.folder / "nginx.conf"):
        assert secret not in file.read_text(), file
    assert secret not in relay.log
    # What a browser is told in its stream is a 200 for nginx; the relay knows better.
    assert "GET /events/orders 200 " in nginx.log()
    wait_until(lambda: relay.log.count("refused with 403") == 2, what="both refusals in the relay's log")


def test_one_address_does_not_get_all_streams(
    start_relay: StartRelay, database: Database, folder: Path
) -> None:
    with Proxy(NGINX, folder, ("limit_conn sse_clients 100", "limit_conn sse_clients 3")) as nginx:
        start_relay("--allow-channel", "*", bind=nginx.bind, dsn=database.dsn)
        with nginx.client() as client, contextlib.ExitStack() as stack:
            streams = [stack.enter_context(lines(client, "/events/orders")) for _ in range(3)]
            for stream in streams:
                until(stream, "id: ")
            answer = client.get("/events/orders", headers={"Accept": "text/event-stream"})
            assert (answer.status_code, answer.text) == (200, "retry: 2000\n\n")
            assert "openStream" in client.get("/events.js").text


def publish(database: Database, *events: object) -> None:
    for event in events:
        database.execute("SELECT sse_relay.publish('orders', %s::text)", (str(event),))


def test_a_client_moves_between_several_relays_and_misses_nothing(
    start_relay: StartRelay, log_database: Database, tmp_path: Path
) -> None:
    sockets = [f"unix:{tmp_path}/{number}.sock" for number in (1, 2)]

    def start(number: int) -> Relay:
        options = ("--source", "log", "--retry", "100")
        return start_relay(*options, bind=sockets[number], dsn=log_database.dsn, admin=True)

    def clients(number: int) -> int:
        return int(harness.metric(relays[number].admin, "clients"))

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
