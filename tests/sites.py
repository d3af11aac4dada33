"""Web sites for the tests of the docs' recipes: servers, pages beside a relay, and how they are watched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import playwright.async_api
import psycopg2.extensions

from harness import (
    Browser,
    Database,
    FreezableProxy,
    Nginx,
    Page,
    Relay,
    nginx_recipe,
)

# How often a page is loaded with an event between its rendering and its stream's opening.
PAGE_LOADS = int(os.environ.get("PAGE_LOADS", "15"))
# Before a recipe: a look at its EventSource, and at what it shows and fetches.
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
document.addEventListener("htmx:sseClose", () => window.told = true);
</script>
"""
FILES = "types { text/javascript js; text/html html; }"


def beside(folder: Path, address: str, streams: str, more: str = "") -> Nginx:
    """Serve the folder ``pages`` in another one, and at the same origin a relay by the block ``streams``."""
    root = folder / "pages"
    return Nginx(folder, address, server=f"{streams}location / {{ {FILES} root {root}; }}\n{more}")


@contextlib.contextmanager
def open_recipe(browser: Browser, folder: Path, relay: Relay, html: str, **scripts: Path) -> Iterator[Page]:
    """Open a page of the docs at one origin with a relay, behind the docs' nginx; scripts end in ``.js``."""
    (folder / "pages").mkdir()
    (folder / "pages" / "page.html").write_text(html)
    for name, path in scripts.items():
        (folder / "pages" / f"{name}.js").write_bytes(path.read_bytes())
    with (
        beside(folder, relay.bind, nginx_recipe("server { }")) as nginx,
        browser.open(url=f"{nginx.url}/page.html") as page,
    ):
        yield page


def line_to(relay: Relay) -> FreezableProxy:
    """Return a proxy before a relay, as the network between it and its clients."""
    host, _, port = relay.bind.rpartition(":")
    return FreezableProxy((host, int(port)))


def django_databases(database: Database) -> str:
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    keys = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    connection = {name: parts[key] for name, key in keys.items()}
    return f"DATABASES = {{'default': {{'ENGINE': 'django.db.backends.postgresql', **{connection}}}}}\n"


def stale_loads(page: Page, url: str, change: Callable[[str], object], shown: str) -> int:
    """Load a page `PAGE_LOADS` times, each with a change between its rendering and its stream's opening.

    Args:
        change: Takes what the page must come to show, as the JavaScript ``shown`` reads it.

    Returns:
        How often it did not.
    """
    number = 0

    async def change_first(route: playwright.async_api.Route) -> None:
        nonlocal number
        number += 1
        response = await route.fetch()
        change(str(number))
        await route.fulfill(response=response)

    async def load() -> bool:
        await page.playwright.goto(url)
        try:
            await page.playwright.wait_for_function(f"() => {shown} === '{number}'", timeout=20_000)
        except playwright.async_api.TimeoutError:
            return False
        return True

    page.browser.run(page.playwright.route(url, change_first))
    fresh = sum(page.browser.run(load()) for _ in range(PAGE_LOADS))
    page.browser.run(page.playwright.unroute(url))
    assert number == PAGE_LOADS
    return PAGE_LOADS - fresh


def is_live(page: Page) -> bool:
    return bool(page.evaluate("window.source?.readyState === 1"))
