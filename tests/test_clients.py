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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote_plus

import httpx
import playwright.async_api
import pytest

import harness
from harness import Browser, Database, FreezableProxy, Nginx, Page, Relay, wait_until
from pages import block, pages
from sites import AROUND, django_databases, is_live, line_to, open_recipe

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent

# The docs' block, as a function of what the page would have around it.
_, IMPORT_FETCH, FETCH = block("js", "// With fetch-event-source").split("\n", 2)
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
    const names = ["message", "paid", "relay.gap", "relay.refused"];
    for (const [client, url] of Object.entries(clients)) {
        const tell = name => data => happened.push({client, name, data});
        const onEvent = ({type, data}) => tell(type)(data);
        if (client.startsWith("fetch")) {
            const asText = name => data => tell(name)(JSON.stringify(data));
            followByFetch(url, asText("message"), asText("relay.gap"), {error: tell("rejected")});
        } else if (client.startsWith("module")) {
            openStream(url, {
                on: {message: onEvent, paid: onEvent},
                onGap: gap => tell("relay.gap")(JSON.stringify(gap)),
                onRefused: refusal => tell("relay.refused")(JSON.stringify(refusal)),
            });
        } else {
            const source = new (client.startsWith("native") ? EventSource : ReconnectingEventSource)(url);
            if (client.includes("onmessage")) source.onmessage = onEvent;
            else for (const name of names) source.addEventListener(name, onEvent);
            if (client.startsWith("native"))
                source.addEventListener("error", () => tell("error")(String(source.readyState)));
        }
    }
}"""


@pytest.fixture(scope="module")
def database(server: harness.Server) -> Iterator[Database]:
    with server.fresh_database(log=True) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def relay(database: Database) -> Iterator[Relay]:
    with Relay("--retry", "100", dsn=database.dsn) as running:
        yield running


@dataclass
class Vite:
    """A real Vite, which passes /events on by the docs' configuration."""

    url: str
    proxy: FreezableProxy


@pytest.fixture(scope="module")
def vite(node_modules: Path, relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vite]:
    folder = tmp_path_factory.mktemp("vite")
    port = harness.free_port()
    with line_to(relay) as proxy:
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
        with harness.Daemon([*command, "--port", str(port), "--strictPort"], port, folder):
            yield Vite(f"http://127.0.0.1:{port}", proxy)


# ==== The table of clients ====================================================

SECRET = b"of the table of clients, 32 bytes."
ALL = ['"live"', '"named"', '"missed"', '"during"', '"after"', '"last"']


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


IN_CHROMIUM = ("native", "module", "reconnecting", "reconnecting onmessage", "fetch")
IN_PYTHON = ("httpx-sse", "sseclient-py")
KINDS = ("eventsource", *IN_CHROMIUM, *IN_PYTHON)
# Whoever uses reconnecting-eventsource with onmessage hears of neither names nor gaps.
ALL_THAT_IS_TOLD = [kind for kind in KINDS if kind != "reconnecting onmessage"]
HEARD = ("message", "paid")
# A native EventSource is dead after a 502.
DEAD = ("eventsource, in trouble", "native, in trouble")


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
        told = [what for program in self.programs for what in program.happened]
        told += self.page.evaluate("happened")
        return [(what["name"], what["data"]) for what in told if what["client"] == client]

    def data(self, client: str) -> list[str]:
        return [data for name, data in self.happened(client) if name in HEARD]

    def gaps(self, client: str) -> list[dict[str, Any]]:
        return [json.loads(data) for name, data in self.happened(client) if name == "relay.gap"]

    def control(self, client: str) -> list[tuple[str, str]]:
        """Return the relay's own events, and the exceptions that the docs' code makes of them."""
        return [event for event in self.happened(client) if event[0] not in (*HEARD, "error")]

    def answers(self, client: str) -> list[str]:
        """Return the status of each answer that has ended."""
        return re.findall(rf'client={client}[ &].*?HTTP/1.1" (\d+)', unquote_plus(self.access_log()))

    def wait_for(self, text: str, *but: str) -> None:
        """Wait until all that may read have an event."""

        def lacking() -> set[str]:
            readers = {name for name in self.urls(*KINDS) if "refused" not in name}
            return {name for name in readers - {*but} if text not in self.data(name)}

        wait_until(lambda: not lacking(), 30, f"{text} at all but {but}")


@pytest.fixture(scope="module")
def story(
    node_modules: Path, vite: Vite, browser: Browser, server: harness.Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:  # fmt: skip
    folder, other_folder = (tmp_path_factory.mktemp("nginx") for _ in range(2))
    (folder / "key").write_bytes(SECRET)
    bind, admin = f"unix:{folder}/http.sock", f"127.0.0.1:{harness.free_port()}"
    options = ["--source", "log", "--retry", "100", "--heartbeat", "1", "--admin", admin]
    options += ["--allow-channel", "orders", "--allow-origin", vite.url, "--jwt-key-file", f"{folder}/key"]

    def connected() -> int:
        return int(httpx.get(f"http://{admin}/channels").json()["clients"])

    def publish(text: str, name: str | None = None) -> None:
        log.execute("SELECT sse_relay.publish('orders', %s::text, %s)", (text, name))

    with (
        server.fresh_database(log=True) as log,
        Nginx(folder, bind) as easy,
        Nginx(other_folder, bind, server=harness.BARE_PROXY) as bare,
        FreezableProxy(("127.0.0.1", easy.port)) as before_easy,
        FreezableProxy(("127.0.0.1", bare.port)) as before_bare,
        browser.open(url=vite.url) as page,
        contextlib.ExitStack() as stack,
    ):
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
        told.wait_for('"during"', *DEAD, onmessage[1])
        wait_until(lambda: connected() == 2 * len(KINDS) - 2, 20, "the return of the forgetful one")
        publish('"after"')
        told.wait_for('"after"', *DEAD)

        log.execute("SELECT sse_relay.renew_epoch()")
        listening = set(told.urls(*ALL_THAT_IS_TOLD)) - {*DEAD}
        readers = [name for name in listening if "refused" not in name]
        wait_until(lambda: all(len(told.gaps(name)) == 2 for name in readers), 30, "a gap for each")
        publish('"last"')
        told.wait_for('"last"', *DEAD)
        yield told


@pytest.mark.parametrize("place", ["at ease", "in trouble"])
@pytest.mark.parametrize("kind", ALL_THAT_IS_TOLD)
def test_a_client_has_every_event_once_and_is_told_of_each_gap(kind: str, place: str, story: Story) -> None:
    client = f"{kind}, {place}"
    gaps = story.gaps(client)
    assert gaps[0] == {"channels": ["orders"], "reason": "start", "since": None}
    assert [name for name, _ in story.control(client)] == ["relay.gap"] * len(gaps)
    if client in DEAD:
        assert story.data(client) == ALL[:3]
        assert story.happened(client)[-1] == ("error", "2")
    else:
        assert story.data(client) == ALL
        assert [(gap["channels"], gap["reason"]) for gap in gaps[1:]] == [(["orders"], "restart")]


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
    assert len(named) == 8
    for name, number in named:
        assert f"{tested[name]}.".startswith(f"{number}."), name


# ==== Recipes =================================================================


def test_the_client_module_works_as_printed_and_so_do_hidden_tabs(
    tmp_path: Path, relay: Relay, database: Database, browser: Browser
) -> None:
    module = block("js", 'import { openStream, spread } from "/events.js"')
    tabs = block("js", "// In each tab")
    html = f"{AROUND}<script type=module>{module}\n{tabs}</script>"

    def show(visible: bool) -> None:
        page.evaluate(
            """visible => {
                Object.defineProperty(document, "hidden", {value: !visible, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            visible,
        )

    with open_recipe(browser, tmp_path, relay, html) as page:
        wait_until(lambda: is_live(page), what="the stream")
        database.notify("orders", "1")
        wait_until(lambda: page.evaluate("shown") == [1], what="the first event")
        show(False)
        assert page.evaluate("source.readyState") == 2
        database.notify("stock", "2")
        show(True)
        wait_until(lambda: page.evaluate("shown") == [1, 2], what="the event that was missed")
        assert page.evaluate("gaps.map(({ reason }) => reason)") == ["start"]


def test_the_native_recipe_and_exact_numbers(
    tmp_path: Path, relay: Relay, database: Database, browser: Browser
) -> None:
    native = block("js", "// With the native EventSource")
    exact = block("js", "// A reviver")
    html = f"{AROUND}<script>{exact}\n{native}</script>"
    with open_recipe(browser, tmp_path, relay, html) as page:
        wait_until(lambda: page.evaluate("gaps.length") == 1, what="the start")
        database.notify("orders", "9007199254740993")
        wait_until(lambda: page.evaluate("shown.length") == 1, what="the event")
        assert page.evaluate("String(shown[0])") == "9007199254740992"
        read = "String(parse('[9007199254740993, 1.5, 7, \"9007199254740993\"]'))"
        assert page.evaluate(read) == "9007199254740993,1.5,7,9007199254740993"
        database.terminate_backends()
        wait_until(lambda: page.evaluate("gaps.length") == 2, 20, "the refetch after the outage")
        assert page.evaluate("source.readyState") == 1


def points(page: Page) -> list[list[float]]:
    text = page.evaluate("document.querySelector('polyline').getAttribute('points') ?? ''")
    return [[float(part) for part in point.split(",")] for point in text.split()]


def test_the_chart_draws_the_last_values_and_then_each_new_one(
    tmp_path: Path, start_relay: Callable[..., Relay], log_database: Database, browser: Browser
) -> None:
    chart = block("html", "<!-- chart.html -->")
    assert len(chart.splitlines()) <= 45
    relay = start_relay("--source", "log", "--retry", "100", dsn=log_database.dsn)

    def publish(*values: float) -> None:
        for value in values:
            log_database.execute("SELECT sse_relay.publish('load', %s::text)", (str(value),))

    publish(*range(100, 130))
    with open_recipe(browser, tmp_path, relay, chart) as page:

        def shows(value: str, count: int = 20) -> bool:
            return page.evaluate("document.querySelector('output').textContent") == value and (
                len(points(page)) == count
            )

        wait_until(lambda: shows("129"), what="the last values")
        drawn = points(page)
        assert [x for x, _ in drawn] == list(range(20))
        assert (drawn[0][1], drawn[-1][1]) == (95, 5)  # the least is low, the newest is the most
        publish(0)
        wait_until(lambda: shows("0"), what="a new value")
        drawn = points(page)
        assert drawn[-1] == [19, 95]
        assert drawn[-2][1] == 5
        # What a gap hides is on the page that is loaded again.
        log_database.execute("SELECT sse_relay.renew_epoch()")
        publish(*range(30))

        def loaded_again() -> bool:
            with contextlib.suppress(playwright.async_api.Error):  # between two pages
                return shows("29") and points(page)[0] == [0, 95]
            return False

        wait_until(loaded_again, 30, "the last values after the gap")


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
        process.exit();  // the module goes on waiting for heartbeats
        """
    )
    node = [harness.require("node"), "test.mjs"]
    done = subprocess.run(node, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    gap = {"channels": ["orders"], "reason": "restart", "since": None}
    assert json.loads(done.stdout) == ["http://localhost/events/orders?heartbeat=event", [gap]]


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
    # The model needs a table.
    model = "from unittest.mock import MagicMock\n\nOrder = MagicMock()\n"
    view = block("python", "# shop/views.py", "README.md").replace("from shop.models import Order\n", model)
    (tmp_path / "settings.py").write_text(
        "SECRET_KEY = 'of the tests alone'\nROOT_URLCONF = 'urls'\n" + django_databases(database)
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
