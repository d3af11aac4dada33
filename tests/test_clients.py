"""The docs' table of clients and its recipes, with the real packages: npm's, PyPI's, htmx, Vite, bash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
import psycopg2.extensions
import pytest

import harness
import sse_relay
from harness import Browser, Database, FreezableProxy, Nginx, Page, Relay, wait_until
from pages import block, pages

HERE = Path(__file__).parent

# The docs' block, as a function of what the page would have around it.
IMPORT_FETCH, _, FETCH = block("js", "import { fetchEventSource }").partition("\n")
MAIN_MODULE = f"""
{IMPORT_FETCH}
import ReconnectingEventSource from "reconnecting-eventsource";
import {{ openStream }} from "./src/events.js";
Object.assign(window, {{ openStream, fetchEventSource, ReconnectingEventSource }});
window.followByFetch = (url, show, refetch, console) => {{
{FETCH.replace('"/events/orders"', "url")}
}};
"""
FOLLOW = """clients => {
    window.happened = [];
    for (const [client, url] of Object.entries(clients)) {
        const tell = name => data => happened.push({client, name, data});
        if (client.startsWith("fetch")) {
            followByFetch(url, data => tell("message")(JSON.stringify(data)), tell("relay.gap"), {
                error: tell("rejected"),
            });
            continue;
        }
        const start = client.includes("from none") ? { lastEventId: "none" } : {};
        const source = new ReconnectingEventSource(url, start);
        const onEvent = ({type, data}) => tell(type)(data);
        if (client.includes("onmessage")) source.onmessage = onEvent;
        else for (const name of ["message", "paid", "relay.gap", "relay.refused"])
            source.addEventListener(name, onEvent);
    }
}"""


@pytest.fixture(scope="module")
def database(server: harness.Server) -> Iterator[Database]:
    with server.fresh_database() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def relay(database: Database) -> Iterator[Relay]:
    """A relay for all recipes."""
    with Relay("--retry", "100", dsn=database.dsn) as running:
        yield running


@pytest.fixture
def cuttable(relay: Relay) -> Iterator[FreezableProxy]:
    """What lets the relay seem away."""
    host, _, port = relay.bind.rpartition(":")
    with FreezableProxy((host, int(port))) as proxy:
        yield proxy


@dataclass
class Vite:
    """A real Vite, which passes /events on by the docs' configuration."""

    url: str
    proxy: FreezableProxy


@pytest.fixture(scope="module")
def vite(node_modules: Path, relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vite]:
    folder = tmp_path_factory.mktemp("vite")
    port = harness.free_port()
    relay_port = int(relay.bind.rpartition(":")[2])
    with FreezableProxy(("127.0.0.1", relay_port)) as proxy:
        config = block("js", "// vite.config.js")
        assert "127.0.0.1:8008" in config
        (folder / "vite.config.js").write_text(config.replace("127.0.0.1:8008", f"127.0.0.1:{proxy.port}"))
        (folder / "index.html").write_text("<title>Vite</title><script type=module src=/main.js></script>")
        (folder / "main.js").write_text(MAIN_MODULE)
        (folder / "src").mkdir()
        # As the docs' line for curl does.
        (folder / "src" / "events.js").write_bytes(httpx.get(f"http://{relay.bind}/events.js").content)
        (folder / "node_modules").symlink_to(node_modules / "node_modules")
        command = [harness.require("node"), "node_modules/vite/bin/vite.js", "--host", "127.0.0.1"]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port), "--strictPort"],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(answers, 30, "Vite")
            yield Vite(f"http://127.0.0.1:{port}", proxy)
        finally:
            process.terminate()
            process.wait(10)


# ==== The table of clients ====================================================

SECRET = b"of the table of clients, 32 bytes."
ALL = ['"live"', '"named"', '"missed"', '"during"', '"after"']


class Program:
    """A program that prints a line of JSON for each thing that happens to one of its clients."""

    def __init__(self, *command: str, cwd: Path | None = None) -> None:
        self.happened: list[dict[str, str]] = []
        self._process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.happened.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._thread.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


IN_CHROMIUM = ("reconnecting", "reconnecting from none", "reconnecting onmessage", "fetch")
IN_PYTHON = ("httpx-sse", "sseclient-py")
KINDS = ("eventsource", *IN_CHROMIUM, *IN_PYTHON)
# Whoever uses reconnecting-eventsource with onmessage hears of neither names nor gaps.
ALL_THAT_IS_TOLD = [kind for kind in KINDS if kind != "reconnecting onmessage"]
HEARD = ("message", "paid")


@dataclass
class Story:
    """All clients at once, each named ``KIND, PLACE``.

    Those ``at ease`` are behind the docs' nginx, those ``in trouble`` behind one that answers 502 while
    the relay is away, and those ``refused`` ask for a channel that they may not read.

    Attributes:
        targets: The address of the stream, by place.
        access_log: Gives the log of the nginx that does not know about streams.
        programs: What runs the clients outside of the browser.
        page: What runs those inside.
    """

    targets: dict[str, str]
    access_log: Callable[[], str]
    page: Page
    programs: list[Program] = field(default_factory=list)

    def urls(self, *kinds: str) -> dict[str, str]:
        """Return the addresses of the clients of some kinds. Who asks will show in nginx's log."""
        return {
            f"{kind}, {place}": f"{url}?client={quote(f'{kind}, {place}')}"
            for kind in kinds
            for place, url in self.targets.items()
        }

    def happened(self, client: str) -> list[tuple[str, str]]:
        """Return name and data of what the client was given."""
        told = [what for program in self.programs for what in program.happened]
        told += self.page.evaluate("happened")
        return [(what["name"], what["data"]) for what in told if what["client"] == client]

    def data(self, client: str) -> list[str]:
        return [data for name, data in self.happened(client) if name in HEARD]

    def control(self, client: str) -> list[tuple[str, str]]:
        """Return the relay's own events, and the exceptions that the docs' code makes of them."""
        return [event for event in self.happened(client) if event[0] not in (*HEARD, "error")]

    def answers(self, client: str) -> list[str]:
        """Return the status of each answer that has ended."""
        return re.findall(rf'client={re.escape(quote(client))}[ &].*?HTTP/1.1" (\d+)', self.access_log())

    def wait_for(self, text: str, *but: str) -> None:
        """Wait until all that may read have an event."""

        def lacking() -> set[str]:
            readers = {name for name in self.urls(*KINDS) if "refused" not in name}
            return {name for name in readers - {*but} if text not in self.data(name)}

        wait_until(lambda: not lacking(), 30, f"{text} at all but {but}")


@pytest.fixture(scope="module")
def story(
    node_modules: Path,
    vite: Vite,
    browser: Browser,
    server: harness.Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    """Events, a cut and a restart, with all clients."""
    folder, other_folder = (tmp_path_factory.mktemp("nginx") for _ in range(2))
    (folder / "key").write_bytes(SECRET)
    bind, admin = f"unix:{folder}/http.sock", f"127.0.0.1:{harness.free_port()}"
    options = ["--source", "log", "--retry", "100", "--heartbeat", "0.1", "--admin", admin]
    options += ["--allow-channel", "orders", "--allow-origin", vite.url, "--jwt-key-file", f"{folder}/key"]

    def connected() -> int:
        return int(httpx.get(f"http://{admin}/channels").json()["clients"])

    def publish(text: str, name: str | None = None) -> None:
        log.execute("SELECT sse_relay.publish('orders', %s::text, %s)", (text, name))

    with (
        server.fresh_database() as log,
        Nginx(folder, bind) as easy,
        Nginx(other_folder, bind, server=harness.BARE_PROXY) as bare,
        FreezableProxy(("127.0.0.1", easy.port)) as before_easy,
        FreezableProxy(("127.0.0.1", bare.port)) as before_bare,
        browser.open(url=vite.url) as page,
        contextlib.ExitStack() as stack,
    ):
        sse_relay.apply_schema(log.dsn)
        targets = {
            "at ease": f"http://127.0.0.1:{before_easy.port}/events/orders",
            "in trouble": f"http://127.0.0.1:{before_bare.port}/events/orders",
            "refused": f"http://127.0.0.1:{before_bare.port}/events/secret",
        }
        told = Story(targets, bare.log, page)
        relay = stack.enter_context(Relay(*options, bind=bind, dsn=log.dsn))
        wait_until(lambda: page.evaluate("!!window.followByFetch"), 20, "the page of Vite")
        page.evaluate(FOLLOW, told.urls(*IN_CHROMIUM))
        loops = {kind: block("python", f"# With {kind}") for kind in IN_PYTHON}
        in_python = {name: (loops[name.split(",")[0]], url) for name, url in told.urls(*loops).items()}
        for program, script, clients in (
            (harness.require("node"), "clients.mjs", told.urls("eventsource")),
            (sys.executable, "clients.py", in_python),
        ):
            command = (program, str(HERE / script), json.dumps(clients))
            told.programs.append(stack.enter_context(Program(*command, cwd=node_modules)))
        wait_until(lambda: connected() == 2 * len(KINDS), 20, "all clients")

        onmessage = ("reconnecting onmessage, at ease", "reconnecting onmessage, in trouble")
        publish('"live"')
        told.wait_for('"live"')
        publish('"named"', "paid")
        told.wait_for('"named"', *onmessage)

        before_easy.drop()
        before_bare.drop()
        publish('"missed"')
        told.wait_for('"missed"')

        assert relay.stop() == 0
        publish('"during"')
        # Another relay numbers it, so that it is no news to the one that starts.
        with Relay("--source", "log", dsn=log.dsn):
            wait_until(lambda: not log.execute("SELECT FROM sse_relay.pending"), what="the other relay")
        troubled = [name for name in told.urls(*KINDS) if "in trouble" in name]
        wait_until(lambda: all("502" in told.answers(name) for name in troubled), 30, "a 502 for each")
        stack.enter_context(Relay(*options, bind=bind, dsn=log.dsn))
        dead = "eventsource, in trouble"
        told.wait_for('"during"', dead, onmessage[1])
        wait_until(lambda: connected() == 2 * len(KINDS) - 1, 20, "the return of the forgetful one")
        publish('"after"')
        told.wait_for('"after"', dead)
        yield told


@pytest.mark.parametrize("place", ["at ease", "in trouble"])
@pytest.mark.parametrize("kind", ALL_THAT_IS_TOLD)
def test_a_client_has_every_event_once(kind: str, place: str, story: Story) -> None:
    client = f"{kind}, {place}"
    told = [(name, json.loads(data)["since"]) for name, data in story.control(client)]
    begins_with_none = kind in ("sseclient-py", "reconnecting from none")
    assert told == ([("relay.gap", "none")] if begins_with_none else [])
    if client == "eventsource, in trouble":
        assert story.data(client) == ALL[:3]
        assert story.happened(client)[-1] == ("error", "2")
    else:
        assert story.data(client) == ALL


def test_reconnecting_eventsource_forgets_its_position_with_onmessage(story: Story) -> None:
    unnamed = [data for data in ALL if data != '"named"']
    assert story.data("reconnecting onmessage, at ease") == unnamed
    unnamed.remove('"during"')
    assert story.data("reconnecting onmessage, in trouble") == unnamed


@pytest.mark.parametrize("kind", ALL_THAT_IS_TOLD)
def test_a_refused_client_is_told_and_does_not_ask_again(kind: str, story: Story) -> None:
    client = f"{kind}, refused"
    ((name, data),) = story.control(client)
    assert name == {"fetch": "rejected", **dict.fromkeys(IN_PYTHON, "PermissionError")}.get(
        kind, "relay.refused"
    )
    assert json.loads(data)["status"] == 401
    assert story.answers(client) == ["401" if kind == "sseclient-py" else "200"]
    assert story.data(client) == []


def test_fetch_event_source_takes_an_orderly_end_for_the_last(story: Story) -> None:
    fetched = "url => fetchEventSource(url, {}).then(() => 'an orderly end')"
    assert story.page.evaluate(fetched, story.targets["refused"]) == "an orderly end"


def test_the_table_names_the_versions_that_are_tested() -> None:
    named = re.findall(r"^\| (?:npm|PyPI) `([^`]+)` ([\d.]+) \|", pages()["docs/clients.md"], re.MULTILINE)
    tested = {name: number for name, _, number in (each.rpartition("@") for each in harness.NPM_PACKAGES)}
    tested |= {name: version(name) for name in ("httpx-sse", "sseclient-py")}
    assert len(named) == 5
    for name, number in named:
        assert f"{tested[name]}.".startswith(f"{number}."), name


# ==== Recipes =================================================================


# Before a recipe: what its page has around it, and a look at its EventSource.
AROUND = """<!doctype html><meta charset="utf-8"><title>recipe</title><script>
const shown = [], gaps = [];
const show = (what) => shown.push(what);
const refetch = (gap) => gaps.push(gap);
const Native = EventSource;
window.EventSource = class extends Native {
  constructor(...given) {
    super(...given);
    window.source = this;
  }
};
</script>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What nginx serves beside the streams, at the same origin."""
    made = tmp_path / "pages"
    made.mkdir()
    return made


def site(folder: Path, address: str, streams: str, more: str = "") -> Nginx:
    """Serve a folder, and a relay by the nginx block ``streams``."""
    return Nginx(folder.parent, address, server=f"{streams}location / {{ root {folder}; }}\n{more}")


def wait_live(page: Page) -> None:
    wait_until(lambda: page.evaluate("window.source?.readyState") == 1, what="the stream")


def test_the_client_module_works_as_printed_and_so_do_hidden_tabs(
    folder: Path, relay: Relay, database: Database, browser: Browser
) -> None:
    module = block("js", 'import { openStream } from "/events.js"')
    tabs = block("js", 'document.addEventListener("visibilitychange"')
    (folder / "page.html").write_text(f"{AROUND}<script type=module>{module}\n{tabs}</script>")

    def show(visible: bool) -> None:
        page.evaluate(
            """visible => {
                Object.defineProperty(document, "hidden", {value: !visible, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            visible,
        )

    with (
        site(folder, relay.bind, harness.nginx_recipe("server { }")) as nginx,
        browser.open(url=f"{nginx.url}/page.html") as page,
    ):
        wait_live(page)
        database.notify("orders", "1")
        wait_until(lambda: page.evaluate("shown") == [1], what="the first event")
        show(False)
        assert page.evaluate("source.readyState") == 2
        database.notify("stock", "2")
        show(True)
        wait_until(lambda: page.evaluate("shown") == [1, 2], what="the event that was missed")
        assert page.evaluate("gaps") == []


def test_the_application_is_not_asked_for_the_client_module(folder: Path, relay: Relay) -> None:
    plain, more, to_ask = map(
        harness.nginx_recipe, ("server { }", "location /events { }", "server { }, to ask the application")
    )
    asking = re.sub(r" *error_page .*@sse_retry;\n", lambda _: more, plain) + to_ask
    nobody = asking.replace("127.0.0.1:8000", f"127.0.0.1:{harness.free_port()}")
    with site(folder, relay.bind, nobody) as nginx:
        assert httpx.get(f"{nginx.url}/events/orders").text == "retry: 2000\n\n"
        assert "openStream" in httpx.get(f"{nginx.url}/events.js").text


def test_the_seventh_stream_of_http_1_1_waits(folder: Path, relay: Relay, browser: Browser) -> None:
    (folder / "page.html").write_text(AROUND)
    with (
        site(folder, relay.bind, harness.nginx_recipe("server { }")) as nginx,
        browser.open(url=f"{nginx.url}/page.html") as page,
    ):
        page.evaluate(
            """() => {
                window.sources = [...Array(7).keys()].map(tab => new EventSource(`/events/tab-${tab}`));
            }"""
        )

        def states() -> list[int]:
            return list(page.evaluate("sources.map(source => source.readyState)"))

        wait_until(lambda: states() == [1] * 6 + [0], what="six streams")
        page.evaluate("void fetch('/page.html?another').then(() => window.fetched = true)")
        time.sleep(0.5)  # long enough for both, if they could
        assert states() == [1] * 6 + [0]
        assert not page.evaluate("window.fetched")
        page.evaluate("sources[0].close()")
        wait_until(lambda: states()[6] == 1, what="the seventh stream")
        page.evaluate("sources[1].close()")
        wait_until(lambda: page.evaluate("window.fetched"), what="the page")


def test_htmx_fetches_and_shows(
    folder: Path,
    relay: Relay,
    cuttable: FreezableProxy,
    database: Database,
    browser: Browser,
    node_modules: Path,
) -> None:
    packages = node_modules / "node_modules"
    scripts = {"htmx.js": "htmx.org/dist/htmx.min.js", "sse.js": "htmx-ext-sse/dist/sse.min.js"}
    for name, file in scripts.items():
        (folder / name).write_bytes((packages / file).read_bytes())
    recipe = block("html", "<!-- With htmx -->")
    head = AROUND + "".join(f"<script src=/{name}></script>" for name in scripts)
    closed = "<script>document.addEventListener('htmx:sseClose', () => window.told = true)</script>"
    (folder / "page.html").write_text(head + recipe)
    refused = recipe.replace("/events/orders", "/events/sse_relay_canary")
    (folder / "refused.html").write_text(head + closed + refused)
    rows = 'location = /orders/rows { default_type text/html; return 200 "<li>a row</li>"; }'
    address = f"127.0.0.1:{cuttable.port}"
    with site(folder, address, harness.BARE_PROXY, rows) as nginx:

        def fetched(times: int) -> None:
            wait_until(lambda: nginx.log().count("GET /orders/rows") >= times, what=f"list {times}")
            assert nginx.log().count("GET /orders/rows") == times

        with browser.open(url=f"{nginx.url}/page.html") as page:
            fetched(1)
            assert page.evaluate("document.querySelector('ul').textContent") == "a row"
            database.notify("orders", "x")
            fetched(2)
            database.notify("orders", '{"event": "notice", "data": "<b>a notice</b>"}')
            wait_until(lambda: page.evaluate("document.querySelector('p b')?.textContent") == "a notice")
            database.terminate_backends()
            fetched(3)  # after the gap
            cuttable.refuse()
            cuttable.drop()
            wait_until(lambda: '/events/orders HTTP/1.1" 502' in nginx.log(), what="a 502")
            cuttable.accept()
            fetched(4)
            wait_live(page)
            database.notify("orders", "y")
            fetched(5)
        with browser.open(url=f"{nginx.url}/refused.html") as page:
            wait_until(lambda: page.evaluate("window.told"), what="the refusal")
            assert page.evaluate("source.readyState") == 2


def test_vite_passes_streams_on(vite: Vite, relay: Relay, database: Database, browser: Browser) -> None:
    url = f"{vite.url}/events/orders"
    with harness.SseReader(url) as reader:
        position = reader.wait_for_id()
        database.notify("orders", "1")
        reader.wait_for_data("1")  # though nothing comes after it
    with harness.SseReader(url, last_event_id=position) as reader:
        reader.wait_for_data("1")
        assert reader.data == ["1"]
    wait_until(lambda: vite.proxy.connections == 0, what="the end of both streams at the relay")
    with browser.open(url=vite.url) as page:
        wait_until(lambda: page.evaluate("!!window.openStream"), 20, "the page of Vite")
        page.event_source("/events/orders")
        page.evaluate(
            """() => {
                window.shown = [];
                const on = { message: event => shown.push(event.data), open: () => window.live = true };
                window.stream = openStream("/events/orders", { on });
            }"""
        )
        wait_until(lambda: page.evaluate("window.live && source.readyState === 1"), what="both streams")
        database.notify("orders", "2")
        wait_until(lambda: page.evaluate("shown[0]") == "2", what="an event")
        vite.proxy.refuse()
        vite.proxy.drop()
        wait_until(lambda: page.ready_state == 2, what="the end of the native EventSource")
        database.notify("orders", "3")
        vite.proxy.accept()
        wait_until(lambda: page.evaluate("shown") == ["2", "3"], 20, "the return of the module")


def test_a_fake_event_source_is_enough_for_a_pages_tests(relay: Relay, tmp_path: Path) -> None:
    fake = block("js", "// A fake EventSource")
    *_, send = fake.splitlines()
    module = httpx.get(f"http://{relay.bind}/events.js").text
    (tmp_path / "events.mjs").write_text(module)
    (tmp_path / "test.mjs").write_text(
        f"""{fake}
        globalThis.location = "http://localhost/";
        const {{ openStream }} = await import("./events.mjs");
        const told = [];
        openStream("/events/orders", {{ onGap: (gap) => told.push(gap) }});
        {send.removeprefix("//")}
        console.log(JSON.stringify([FakeEventSource.last.url, told]));
        """
    )
    node = [harness.require("node"), "test.mjs"]
    done = subprocess.run(node, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    gap = {"channel": "orders", "reason": "restart", "since": None}
    assert json.loads(done.stdout) == ["http://localhost/events/orders", [gap]]


def test_playwright_answers_a_stream_as_printed(browser: Browser) -> None:
    class Synchronous:
        """The one method of Playwright's other interface that the recipe needs."""

        def route(self, url: str, handle: Callable[[Any], Any]) -> None:
            browser.run(page.playwright.route(url, handle))

    with browser.open() as page:
        exec(block("python", "# With Playwright"), {"page": Synchronous()})  # noqa: S102  # the docs' own
        page.event_source("/events/orders")
        page.wait_for(lambda event: event.data == '{"id": 42}')
        wait_until(lambda: page.states == ["open", "error 0"], what="the end of the answer")
        assert page.ready_state == 0
        assert len(page.requests) == 1


def test_a_transaction_test_case_hears_what_is_published(database: Database, tmp_path: Path) -> None:
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    connection = {name: parts[key] for name, key in names.items()}
    # The model needs a table.
    model = "from unittest.mock import MagicMock\n\nOrder = MagicMock()\n"
    view = block("python", "# shop/views.py", "README.md").replace("from shop.models import Order\n", model)
    (tmp_path / "settings.py").write_text(
        "SECRET_KEY = 'of the tests alone'\nROOT_URLCONF = 'urls'\n"
        f"DATABASES = {{'default': {{'ENGINE': 'django.db.backends.postgresql', **{connection!r}}}}}\n"
    )
    (tmp_path / "urls.py").write_text(
        f"{view}\nfrom django.urls import path\n\nurlpatterns = [path('pay/<int:pk>', pay)]\n"
    )
    (tmp_path / "test_payment.py").write_text(block("python", "# A test that listens"))
    done = subprocess.run(
        [sys.executable, "-m", "django", "test"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env={**harness.clean_environment(), "DJANGO_SETTINGS_MODULE": "settings"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ran 1 test" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sse-relay pub", "publish"),
        ("sse-relay run --sou", "--source"),
        ("sse-relay publish --source ", "notify log"),
    ],
)
def test_bash_completes_after_the_line_of_the_docs(words: str, expected: str, tmp_path: Path) -> None:
    line = block("sh", 'eval "$(_SSE_RELAY_COMPLETE')
    # As pip makes it.
    program = tmp_path / "sse-relay"
    program.write_text(f"#!{sys.executable}\nfrom sse_relay import main\nmain()\n")
    program.chmod(0o755)
    done = subprocess.run(
        [harness.require("bash"), "-c", f"""
            {line}
            IFS=' ' read -ra COMP_WORDS <<< {shlex.quote(words)}
            [[ {shlex.quote(words)} == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            "$(complete -p sse-relay | sed 's/.*-F \\([^ ]*\\).*/\\1/')" sse-relay
            echo "${{COMPREPLY[@]}}"
        """],
        capture_output=True, text=True, check=True, timeout=30,
        env={**harness.clean_environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}",
             "PYTHONPATH": str(harness.ROOT)},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == (expected, "")
