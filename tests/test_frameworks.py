"""docs/clients.md: Rails and Turbo, Laravel, htmx, Datastar, with the real packages, in Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg2.extensions
import pytest

import harness
from harness import Browser, Database, Nginx, Page, Relay, wait_until
from pages import block, pages
from sites import AROUND, FILES, PAGE_LOADS, beside, is_live, line_to, open_recipe, stale_loads

pytestmark = pytest.mark.slow

StartRelay = Callable[..., Relay]

HERE = Path(__file__).parent
OPTIONS = ("--source", "log", "--retry", "100")


@pytest.fixture
def database(log_database: Database) -> Database:
    log_database.execute("CREATE TABLE orders (id bigint PRIMARY KEY, state text)")
    log_database.execute("INSERT INTO orders VALUES (7, 'new')")
    return log_database


# The command of the web server, and the files of the docs in its folder.
APPLICATIONS = {
    "rails": (
        ["ruby", str(HERE / "frameworks.rb"), "PORT"],
        {
            "order.rb": ("ruby", "# app/models/order.rb, for Turbo"),
            "orders_controller.rb": ("ruby", "# app/controllers/orders_controller.rb"),
            "index.html.erb": ("html", "<%# app/views/orders/index.html.erb %>"),
        },
    ),
    "laravel": (
        ["php", "-S", "127.0.0.1:PORT", str(HERE / "frameworks.php")],
        {
            "web.php": ("php", "<?php\n// routes/web.php"),
            "orders.blade.php": ("html", "{{-- resources/views/orders.blade.php --}}"),
        },
    ),
}


ORDER = "document.getElementById('order-7')?.textContent"


def wait_order(page: Page, state: str) -> None:
    page.browser.run(page.playwright.wait_for_function(f"() => {ORDER} === '{state}'", timeout=20_000))


@pytest.mark.timeout(120 + PAGE_LOADS)
@pytest.mark.parametrize("framework", APPLICATIONS)
def test_a_frameworks_page_misses_nothing(
    framework: str, database: Database, start_relay: StartRelay, node_modules: Path, browser: Browser,
    tmp_path: Path,
) -> None:  # fmt: skip
    """PAGE_LOADS=1000 for as many."""
    command, files = APPLICATIONS[framework]
    site = tmp_path / "site"
    site.mkdir()
    for name, (language, first) in files.items():
        (site / name).write_text(block(language, first, "docs/clients.md"))
    turbo = node_modules / "node_modules/@hotwired/turbo/dist/turbo.es2017-umd.js"
    (site / "turbo.js").write_bytes(turbo.read_bytes())
    port, socket = harness.free_port(), f"unix:{tmp_path}/http.sock"
    own_url = f"http://127.0.0.1:{port}"
    command = [harness.require(command[0]), *(word.replace("PORT", str(port)) for word in command[1:])]
    env = {"CONNECTION": json.dumps(psycopg2.extensions.parse_dsn(database.dsn))}
    server = harness.nginx_recipe("server { }")
    server += f"location = /turbo.js {{ {FILES} root {site}; }} location / {{ proxy_pass {own_url}; }}"
    relay = start_relay(*OPTIONS, bind=socket, dsn=database.dsn)

    def change(state: str) -> None:
        """Change the order by the framework's own code, which publishes it."""
        assert httpx.get(f"{own_url}/state/{state}").status_code == 200

    with (
        Nginx(tmp_path, socket, server=server) as nginx,
        harness.Daemon(command, port, site, env),
        browser.open(url=f"{nginx.url}/orders") as page,
    ):
        assert page.evaluate(ORDER) == "new"
        assert stale_loads(page, f"{nginx.url}/orders", change, ORDER) == 0
        # Live, then across a restart, then a gap, after which the page is loaded again.
        page.evaluate("() => { window.same = document.querySelector('ul'); }")
        change("live")
        wait_order(page, "live")
        assert relay.stop() == 0
        change("missed")
        start_relay(*OPTIONS, bind=socket, dsn=database.dsn)
        wait_order(page, "missed")
        assert page.evaluate("window.same.isConnected")
        database.execute("SELECT sse_relay.renew_epoch()")
        browser.run(page.playwright.wait_for_function("() => !window.same?.isConnected", timeout=20_000))
        wait_order(page, "missed")
        change("after-the-gap")
        wait_order(page, "after-the-gap")


# ==== What fetches by itself ==================================================

ROWS = {
    "htmx": ("text/html", "<li>a row</li>"),
    "datastar": (
        "text/event-stream",
        r'event: datastar-merge-fragments\ndata: fragments <ul id="orders"><li>a row</li></ul>\n\n',
    ),
}
SCRIPTS = {
    "htmx": {"htmx.js": "htmx.org/dist/htmx.min.js", "sse.js": "htmx-ext-sse/dist/sse.min.js"},
    "datastar": {"datastar.js": "@starfederation/datastar/dist/datastar.js"},
}


@pytest.mark.parametrize("framework", ROWS)
def test_a_list_is_fetched_when_it_must_be(
    framework: str, database: Database, start_relay: StartRelay, browser: Browser, node_modules: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Behind an nginx that answers 502 while the relay is away."""
    relay = start_relay(*OPTIONS, dsn=database.dsn)
    folder = tmp_path / "pages"
    folder.mkdir()
    for name, file in SCRIPTS[framework].items():
        (folder / name).write_bytes((node_modules / "node_modules" / file).read_bytes())
    recipe = block("html", "<!-- With htmx 2 -->" if framework == "htmx" else "<!-- With Datastar -->")
    kind = " type=module" if framework == "datastar" else ""
    head = AROUND + "".join(f"<script{kind} src=/{name}></script>" for name in SCRIPTS[framework])
    (folder / "page.html").write_text(head + recipe)
    (folder / "refused.html").write_text(head + recipe.replace("/events/orders", "/events/sse_relay_x"))
    content_type, rows = ROWS[framework]
    more = f"location = /orders/rows {{ default_type {content_type}; return 200 '{rows}'; }}"

    def publish(data: str, name: str | None = None) -> None:
        database.execute("SELECT sse_relay.publish('orders', %s::text, %s)", (data, name))

    with (
        line_to(relay) as line,
        beside(tmp_path, f"127.0.0.1:{line.port}", harness.BARE_PROXY, more) as nginx,
    ):

        def fetched() -> int:
            return nginx.log().count("GET /orders/rows")

        def wait_fetched(what: str, before: int) -> None:
            wait_until(lambda: fetched() > before, 20, f"a list after {what}")

        with browser.open(url=f"{nginx.url}/page.html") as page:
            shown = "document.querySelector('ul').textContent"
            wait_until(lambda: page.evaluate(shown) == "a row", 20, "the list")
            wait_until(lambda: is_live(page), what="the stream")
            # Once for the page, at most once more for the stream's start.
            assert fetched() <= 2
            settled = fetched()
            publish("x")
            wait_fetched("an event", settled)
            if framework == "htmx":
                publish("<b>a notice</b>", "notice")
                notice = "document.querySelector('p b')?.textContent"
                wait_until(lambda: page.evaluate(notice) == "a notice", what="the notice")
            settled = fetched()
            database.execute("SELECT sse_relay.renew_epoch()")
            wait_fetched("a gap", settled)
            settled = fetched()
            line.refuse()
            line.drop()
            wait_until(lambda: re.search(r'/events/orders\S* HTTP/1.1" 502', nginx.log()), 20, "a 502")
            publish("while away")
            line.accept()
            wait_fetched("a 502", settled)
        with browser.open(url=f"{nginx.url}/refused.html") as page:
            wait_until(lambda: page.evaluate("window.source?.readyState") == 2, what="the refusal")
            if framework == "htmx":
                assert page.evaluate("window.told")


def test_datastar_reads_the_stream_itself(
    database: Database, start_relay: StartRelay, browser: Browser, node_modules: Path, tmp_path: Path
) -> None:
    relay = start_relay(*OPTIONS, dsn=database.dsn)
    script = node_modules / "node_modules" / SCRIPTS["datastar"]["datastar.js"]
    (get, sql) = re.findall(
        r"`(@get\('/events/orders'.*?\)|SELECT sse_relay\.publish\('orders', 'fragments.*?\))`",
        pages()["docs/clients.md"],
    )
    page_html = f'<script type=module src=/datastar.js></script><ul data-on-load="{get}"><li id="order-7">new'
    with open_recipe(browser, tmp_path, relay, page_html, datastar=script) as page:

        def shown() -> bool:
            # What was published before the stream began does not count.
            database.execute(sql)
            return bool(page.evaluate(ORDER) == "paid")

        wait_until(shown, 20, "the event")
