"""The README's table of clients and its recipes, with the real packages: npm's, PyPI's, htmx, Vite, bash."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self

import httpx
import pytest

import harness
import sse_relay
from harness import Browser, FreezableProxy, Nginx, Relay, wait_until

StartRelay = Callable[..., Relay]

HERE = Path(__file__).parent
README = (harness.ROOT / "README.md").read_text()


def block(language: str, start: str) -> str:
    """Return the README's block of a language that begins with ``start``."""
    (found,) = re.findall(rf"^```{language}\n({re.escape(start)}.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return str(found)


# The README's block, as a function of what the page would have around it.
IMPORT_FETCH, _, FETCH = block("js", "import { fetchEventSource }").partition("\n")
MAIN_MODULE = f"""
{IMPORT_FETCH}
import {{ openStream }} from "./src/events.js";
window.openStream = openStream;
window.fetchEventSource = fetchEventSource;
window.followByFetch = (url, show, refetch, console) => {{
{FETCH.replace('"/events/orders"', "url")}
}};
"""
FOLLOW_BY_FETCH = """clients => {
    window.happened = [];
    for (const [client, url] of Object.entries(clients)) {
        const tell = name => data => happened.push({client, name, data});
        followByFetch(url, data => tell("message")(JSON.stringify(data)), tell("relay.gap"), {
            error: tell("rejected"),
        });
    }
}"""


@dataclass
class Vite:
    """A real Vite, which passes /events on to a relay by the README's configuration."""

    url: str
    relay: Relay


@pytest.fixture(scope="module")
def vite(
    node_modules: Path, server: harness.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Vite]:
    folder = tmp_path_factory.mktemp("vite")
    port = harness.free_port()
    with server.fresh_database() as database, Relay("--retry", "100", dsn=database.dsn) as relay:
        config = block("js", "// vite.config.js")
        assert "127.0.0.1:8008" in config
        (folder / "vite.config.js").write_text(config.replace("127.0.0.1:8008", relay.bind))
        (folder / "index.html").write_text("<title>Vite</title><script type=module src=/main.js></script>")
        (folder / "main.js").write_text(MAIN_MODULE)
        (folder / "src").mkdir()
        # As the README's line for curl does.
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
            yield Vite(f"http://127.0.0.1:{port}", relay)
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


@dataclass
class Story:
    """What each client went through, by its name: ``KIND, PLACE``.

    Attributes:
        happened: What it saw, without the position: name and data.
        requests: How often those that are refused have asked.
        ended: What became of a fetchEventSource without the README's handlers that was refused.
    """

    happened: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    ended: str = ""

    def data(self, client: str) -> list[str]:
        return [data for name, data in self.happened[client] if name in ("message", "paid")]

    def control(self, client: str) -> list[tuple[str, str]]:
        return [
            (name, data) for name, data in self.happened[client] if name not in ("message", "paid", "error")
        ]


KINDS = ("eventsource", "reconnecting", "reconnecting onmessage", "fetch", "httpx-sse", "sseclient-py")


@pytest.fixture(scope="module")
def story(
    node_modules: Path,
    vite: Vite,
    browser: Browser,
    server: harness.Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    """All clients at once, through events, a cut and a restart.

    Those ``at ease`` are behind the README's nginx, those ``in trouble`` behind one that answers 502 while
    the relay is away, and those ``refused`` ask for a channel that they may not read.
    """
    told = Story()
    folders = {place: tmp_path_factory.mktemp("nginx") for place in ("at ease", "in trouble")}
    key = folders["at ease"] / "key"
    key.write_bytes(SECRET)
    bind, admin = f"unix:{folders['at ease']}/http.sock", f"127.0.0.1:{harness.free_port()}"
    options = ["--source", "log", "--retry", "100", "--heartbeat", "0.1", "--admin", admin]
    options += ["--allow-channel", "orders", "--allow-origin", vite.url, "--jwt-key-file", str(key)]

    with (
        server.fresh_database() as log,
        Nginx(folders["at ease"], bind) as easy,
        Nginx(folders["in trouble"], bind, server=harness.BARE_PROXY) as bare,
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
        # Who asked shows in nginx's log.
        urls = {
            f"{kind}, {place}": f"{url}?client={kind}, {place}".replace(" ", "%20")
            for kind in KINDS
            for place, url in targets.items()
        }

        def of(*kinds: str) -> dict[str, tuple[str, str]]:
            return {name: (kind, url) for name, url in urls.items() if (kind := name.split(",")[0]) in kinds}

        def seen() -> dict[str, list[tuple[str, str]]]:
            found: dict[str, list[tuple[str, str]]] = {name: [] for name in urls}
            for what in [*programs[0].happened, *programs[1].happened, *page.evaluate("happened")]:
                found[what["client"]].append((what["name"], what["data"]))
            return found

        def wait_for(text: str, *but: str) -> None:
            def lacking() -> list[str]:
                told.happened = seen()
                return [name for name in urls if "refused" not in name and text not in told.data(name)]

            wait_until(lambda: set(lacking()) <= set(but), 30, f"{text} at all but {but}")

        def publish(text: str, name: str | None = None) -> None:
            log.execute("SELECT sse_relay.publish('orders', %s::text, %s)", (text, name))

        def connected() -> int:
            return int(httpx.get(f"http://{admin}/channels").json()["clients"])

        def asked() -> Counter[str]:
            lines = re.findall(r"client=(\S+) HTTP/1.1\" (\d+)", bare.log())
            return Counter(f"{name} {status}".replace("%20", " ") for name, status in lines)

        wait_until(lambda: page.evaluate("!!window.followByFetch"), 20, "the page of Vite")
        relay = stack.enter_context(Relay(*options, bind=bind, dsn=log.dsn))
        loops = {
            "httpx-sse": block("python", "# With httpx-sse"),
            "sseclient-py": block("python", "# With sseclient-py"),
        }
        sources = {name: (loops[kind], url) for name, (kind, url) in of(*loops).items()}
        programs = [
            stack.enter_context(Program(program, str(HERE / script), json.dumps(clients), cwd=node_modules))
            for program, script, clients in (
                (harness.require("node"), "clients.mjs", of(*KINDS[:3])),
                (sys.executable, "clients.py", sources),
            )
        ]
        page.evaluate(FOLLOW_BY_FETCH, {name: url for name, (_, url) in of("fetch").items()})
        wait_until(lambda: connected() == 2 * len(KINDS), 20, "all clients")
        onmessage = ("reconnecting onmessage, at ease", "reconnecting onmessage, in trouble")
        publish('"live"')
        publish('"named"', "paid")
        wait_for('"live"')
        wait_for('"named"', *onmessage)
        before_easy.drop()
        before_bare.drop()
        publish('"missed"')
        wait_for('"missed"')
        assert relay.stop() == 0
        publish('"during"')
        in_trouble = [name for name in urls if "in trouble" in name]
        wait_until(lambda: all(asked()[f"{name} 502"] for name in in_trouble), 30, "a 502 for each")
        stack.enter_context(Relay(*options, bind=bind, dsn=log.dsn))
        dead = "eventsource, in trouble"
        wait_for('"during"', dead, onmessage[1])
        wait_until(lambda: connected() == 2 * len(KINDS) - 1, 20, "the return of the forgetful one")
        publish('"after"')
        wait_for('"after"', dead)
        for name, count in asked().items():
            told.requests[name.rpartition(" ")[0]] += count
        told.ended = page.evaluate(
            "url => fetchEventSource(url, {}).then(() => 'an orderly end')", targets["refused"]
        )
        yield told


@pytest.mark.parametrize("place", ["at ease", "in trouble"])
@pytest.mark.parametrize("kind", ["eventsource", "reconnecting", "fetch", "httpx-sse", "sseclient-py"])
def test_a_client_has_every_event_once(kind: str, place: str, story: Story) -> None:
    client = f"{kind}, {place}"
    told = [(name, json.loads(data)["since"]) for name, data in story.control(client)]
    assert told == ([("relay.gap", "none")] if kind == "sseclient-py" else [])
    if client == "eventsource, in trouble":
        assert story.data(client) == ALL[:3]
        assert story.happened[client][-1] == ("error", "2")
    else:
        assert story.data(client) == ALL


def test_reconnecting_eventsource_forgets_its_position_with_onmessage(story: Story) -> None:
    unnamed = [data for data in ALL if data != '"named"']
    assert story.data("reconnecting onmessage, at ease") == unnamed
    unnamed.remove('"during"')
    assert story.data("reconnecting onmessage, in trouble") == unnamed


@pytest.mark.parametrize("kind", ["eventsource", "reconnecting", "fetch", "httpx-sse", "sseclient-py"])
def test_a_refused_client_is_told_and_does_not_ask_again(kind: str, story: Story) -> None:
    client = f"{kind}, refused"
    ((name, data),) = story.control(client)
    expected = {"eventsource": "relay.refused", "reconnecting": "relay.refused", "fetch": "rejected"}
    assert name == expected.get(kind, "PermissionError")
    assert json.loads(data)["status"] == 401
    assert story.requests[client] == 1
    assert story.data(client) == []


def test_fetch_event_source_takes_an_orderly_end_for_the_last(story: Story) -> None:
    assert story.ended == "an orderly end"


def test_the_table_names_the_versions_that_are_tested() -> None:
    named = re.findall(r"^\| (?:npm|PyPI) `([^`]+)` ([\d.]+) \|", README, re.MULTILINE)
    tested = {name: number for name, _, number in (each.rpartition("@") for each in harness.NPM_PACKAGES)}
    tested |= {name: version(name) for name in ("httpx-sse", "sseclient-py")}
    assert len(named) == 5
    for name, number in named:
        assert f"{tested[name]}.".startswith(f"{number}."), name
