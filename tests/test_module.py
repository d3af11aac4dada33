"""The client module, /events.js, and its types: as files, with a fake EventSource, in Chromium."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import harness
import pages
import sse_relay
from harness import Database, Page, Relay, wait_until
from sites import line_to

StartRelay = Callable[..., Relay]
HERE = Path(__file__).parent
NODE = harness.require("node")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("module")
    (made / "events.mjs").write_text(sse_relay.CLIENT_MODULE)
    return made


# ==== As files ================================================================


@pytest.mark.parametrize(
    ("ending", "content_type", "text"),
    [(".js", "text/javascript", "openStream"), (".d.ts", "text/plain", "StreamOptions")],
)
def test_it_is_a_public_file_beside_the_streams(
    ending: str, content_type: str, text: str, start_relay: StartRelay, database: Database
) -> None:
    relay = start_relay("--path", "/a/b", dsn=database.dsn)
    url = f"http://{relay.bind}/a/b{ending}"
    answer = httpx.get(url, headers={"Accept-Encoding": "identity", "Origin": "https://any.example"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == f"{content_type}; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "public, max-age=600"
    assert text in answer.text
    assert sse_relay.__version__ in answer.text.partition("\n")[0]
    head = httpx.head(f"{url}?v=1")
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(answer.content)))
    tag = answer.headers["ETag"]
    for known, status in ((tag, 304), (f"W/{tag}", 304), ('"another"', 200)):
        again = httpx.get(url, headers={"If-None-Match": known})
        assert again.status_code == status
        assert again.headers["ETag"] == tag
    assert httpx.post(url).status_code == 404
    assert httpx.get(f"http://{relay.bind}/events{ending}").status_code == 404


def test_it_is_small() -> None:
    assert len(sse_relay.CLIENT_MODULE.replace("VERSION", sse_relay.__version__)) <= 3000


def test_at_the_root_there_are_only_channels(start_relay: StartRelay, database: Database) -> None:
    relay = start_relay("--path", "/", dsn=database.dsn)
    with harness.SseReader(f"http://{relay.bind}/events.js") as reader:
        reader.wait_for_id()
        database.notify("events.js", "x")
        reader.wait_for_data("x")


@pytest.mark.slow
def test_typescript_accepts_the_types_and_their_example(node_modules: Path, tmp_path: Path) -> None:
    (tmp_path / "events.d.ts").write_text(sse_relay.CLIENT_TYPES)
    (tmp_path / "orders.ts").write_text(pages.block("ts", "// src/orders.ts"))
    # Each option by the type that the declarations give it, and what must not pass.
    (tmp_path / "all.ts").write_text(
        """
        import { openStream, spread, type Stream, type StreamOptions } from "./events.js";
        const options: Required<StreamOptions> = {
          on: { message: (event) => event.lastEventId.length },
          onGap: ({ channels, reason, since }) => [channels.length, reason === "start", since?.length],
          onRefused: ({ status, reason }) => [status + 1, reason.length],
          renew: async () => true,
          position: "e-1",
          withCredentials: true,
        };
        const stream: Stream = openStream(new URL("https://app.example/events/a"), options);
        stream.close(), stream.open(), spread(() => {}, 3);
        // @ts-expect-error
        openStream("/events/a", { onGap: ({ channel }) => channel });
        // @ts-expect-error
        openStream("/events/a", { onRefusal: () => {} });
        // @ts-expect-error
        openStream("/events/a", { onGap: ({ reason }) => reason === "begin" });
        """
    )
    tsc = [NODE, str(node_modules / "node_modules/typescript/bin/tsc"), "--noEmit", "--strict", "--types", ""]
    options = "--target es2022 --module esnext --moduleResolution bundler --lib es2022,dom all.ts orders.ts"
    done = subprocess.run(
        [*tsc, *options.split()], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_options_are_those_of_the_types() -> None:
    read = re.findall(r"const \{ (.*?) \} = options;", sse_relay.CLIENT_MODULE)
    options = {option.partition(" =")[0] for line in read for option in line.split(", ")}
    typed = sse_relay.CLIENT_TYPES.partition("interface StreamOptions {")[2].partition("}")[0]
    assert options == set(re.findall(r"^  (\w+)\?:", typed, re.MULTILINE))


# ==== With a fake EventSource and a clock that only the stories move ==========


def stories() -> list[str]:
    module = HERE / "module.mjs"
    return re.findall(r"^  async (\w+)\(\) \{$", module.read_text(), re.MULTILINE)


@pytest.mark.parametrize("story", stories())
def test_it_does_what_it_must(story: str, folder: Path) -> None:
    command = [NODE, str(HERE / "module.mjs"), str(folder / "events.mjs"), story]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


# ==== In Chromium =============================================================

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
    Object.assign(window, { seen: [], states: [], gaps: [], refusals: [] });
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


def open_stream(page: Page, relay: Relay, url: str, *names: str, **options: object) -> None:
    page.evaluate(OPEN_STREAM, [f"http://{relay.bind}/events.js", url, names or ["message"], options])


def wait_for_data(page: Page, text: str) -> None:
    page.wait_for(lambda event: event.data == text, 20)


@pytest.mark.slow
def test_it_starts_from_a_position_and_tells_channels_and_names_apart(
    page: Page, start_relay: StartRelay, log_database: Database
) -> None:
    def publish(channel: str, event: str, name: str | None = None) -> None:
        log_database.execute("SELECT sse_relay.publish(%s, %s::text, %s)", (channel, event, name))

    relay = start_relay("--source", "log", dsn=log_database.dsn)
    publish("one", "before")
    ((position,),) = log_database.execute("SELECT sse_relay.position()")
    publish("one", "a")
    publish("two: ü/%", "b")
    publish("one", "c", name="paid")
    names = ("one", "two%3A ü/%25", "one:paid")
    open_stream(page, relay, relay.url("one", "two: ü/%"), *names, position=position)
    wait_for_data(page, "c")
    publish("one", "d")
    wait_for_data(page, "d")
    page.evaluate("stream.close()")
    publish("one", "while closed")
    page.evaluate("stream.open()")
    wait_for_data(page, "while closed")
    told = [(event.name, event.data) for event in page.events]
    assert told[:4] == [("one", "a"), ("two%3A ü/%25", "b"), ("one:paid", "c"), ("one", "d")]
    assert told[4:] == [("one", "while closed")]
    assert page.evaluate("gaps") == []
    # The snapshot of the page goes along, for the relay to leave out what the page shows.
    asked = page.evaluate("made.map(source => new URL(source.url).searchParams.getAll('lastEventId'))")
    assert asked == [[position], [position, page.events[3].id]]
    assert page.evaluate("most") == 1, "two streams at once"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["notify", "log"])
def test_a_dead_connection_that_stays_open_is_replaced_and_nothing_is_lost(
    how: str, page: Page, start_relay: StartRelay, log_database: Database
) -> None:
    relay = start_relay("--source", how, "--heartbeat", "1", dsn=log_database.dsn)
    function = {"notify": "pg_notify", "log": "sse_relay.publish"}[how]
    publish = f"SELECT {function}('orders', %s)"
    with line_to(relay) as proxy:
        url = relay.url("orders").replace(relay.bind, f"127.0.0.1:{proxy.port}")
        open_stream(page, relay, url, "message", "relay.heartbeat")
        wait_until(lambda: page.evaluate("gaps[0]?.reason") == "start", what="the stream")
        page.wait_for(lambda event: event.name == "relay.heartbeat")
        sent = []
        for number in range(3):
            sent += [f"{number} before", f"{number} while frozen"]
            log_database.execute(publish, (sent[-2],))
            wait_for_data(page, sent[-2])
            # As behind a NAT that forgot: what is open stays open and silent, new connections work.
            proxy.forget()
            log_database.execute(publish, (sent[-1],))
            wait_for_data(page, sent[-1])
        assert [event.data for event in page.events if event.name == "message"] == sent
        assert page.evaluate("gaps.length") == 1
        assert page.evaluate("made.length") == 4
        # The browser itself has noticed nothing.
        assert page.states == ["open"] * 4
        assert page.evaluate("most") == 1, "two streams at once"
