"""The Django example, as a whole, in a real browser: plain WSGI, login, admin, nginx, two relays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import playwright.async_api
import pytest
from click.testing import CliRunner

import harness
import pages
from django_example.serve import Site, serve, sign_in, state_of
from harness import Browser, FreezableProxy, Page, wait_until
from sse_relay import cli

EXAMPLE = harness.ROOT / "tests" / "django_example"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


def open_signed_in(browser: Browser, site: Site, name: str, url: str = "") -> Page:
    """Open a page in a browser context of its own, sign in, and wait until its stream is live."""
    page = browser.open(url=url or site.url)
    sign_in(page, name, site.password)
    wait_until(lambda: state_of(page) == "live", 20, f"the stream of {name}")
    return page


def shown(page: Page, order: int) -> str | None:
    text = page.evaluate("(id) => document.getElementById('order-' + id)?.textContent", order)
    return None if text is None else str(text)


def wait_shown(page: Page, order: int, text: str | None) -> None:
    wait_until(lambda: shown(page, order) == text, 20, f"order {order} as {text}")


def add_order(site: Site, tenant: int, item: str) -> int:
    sql = "INSERT INTO shop_order (tenant_id, item, state) VALUES (%s, %s, 'new') RETURNING id"
    return int(site.database.execute(sql, (tenant, item))[0][0])


def change(site: Site, order: int, state: str) -> None:
    site.database.execute("UPDATE shop_order SET state = %s WHERE id = %s", (state, order))


def save_in_admin(admin: Page, site: Site, order: int, state: str) -> None:
    async def save() -> None:
        await admin.playwright.goto(f"{site.url}/admin/shop/order/{order}/change/")
        await admin.playwright.fill("[name=state]", state)
        async with admin.playwright.expect_navigation():
            await admin.playwright.click("[name=_save]")

    admin.browser.run(save())


def test_what_is_saved_in_the_admin_appears_in_another_browser_also_when_it_was_away(
    site: Site, browser: Browser
) -> None:
    order = add_order(site, 1, "tea")
    parts = urlsplit(site.url)
    with (
        FreezableProxy(("127.0.0.1", parts.port or 0)) as line,
        browser.open(url=f"{site.url}/admin/") as admin,
        open_signed_in(browser, site, "ann", f"https://127.0.0.1:{line.port}/") as page,
    ):
        sign_in(admin, "admin", site.password)
        save_in_admin(admin, site, order, "packed")
        wait_shown(page, order, "tea: packed")
        line.refuse()
        line.drop()
        wait_until(lambda: state_of(page) == "waiting", what="the loss of the connection")
        save_in_admin(admin, site, order, "sent")
        assert shown(page, order) == "tea: packed"
        line.accept()
        wait_shown(page, order, "tea: sent")
        assert state_of(page) == "live"


def test_each_sees_the_orders_of_his_own_tenant(site: Site, browser: Browser) -> None:
    tea, coffee = add_order(site, 1, "tea"), add_order(site, 2, "coffee")
    with open_signed_in(browser, site, "ann") as ann, open_signed_in(browser, site, "ben") as ben:
        for order in (tea, coffee):
            change(site, order, "packed")
        wait_shown(ann, tea, "tea: packed")
        wait_shown(ben, coffee, "coffee: packed")
        assert shown(ann, coffee) is None
        # An order that goes to another tenant leaves the one page and enters the other.
        site.database.execute("UPDATE shop_order SET tenant_id = 2 WHERE id = %s", (tea,))
        wait_shown(ann, tea, None)
        wait_shown(ben, tea, "tea: packed")
        # A page cannot ask for more than its cookie opens.
        refusal = ann.evaluate(
            """() => new Promise((resolve) => {
                const source = new EventSource("/events/tenant-2");
                source.addEventListener("relay.refused", (event) => {
                    source.close();
                    resolve(JSON.parse(event.data));
                });
            })"""
        )
        assert refusal["status"] == 403


def test_a_login_that_expires_is_renewed_and_the_page_goes_on(site: Site, browser: Browser) -> None:
    """Takes 3 s: the token's lifetime."""
    order = add_order(site, 1, "tea")
    with open_signed_in(browser, site, "ann") as page:
        refusals = sum(relay.log.count("refused with 401") for relay in site.relays)
        token = short_token(site, "tenant-1", 3)
        place = {"domain": "127.0.0.1", "path": "/events", "secure": True}
        cookie = {"name": "sse", "value": token, **place}
        page.browser.run(page.playwright.context.clear_cookies(name="sse"))
        page.browser.run(page.playwright.context.add_cookies([cookie]))  # type: ignore[list-item]
        page.evaluate("() => { stream.close(); tell('anew'); openStream(); }")
        wait_until(lambda: state_of(page) == "live", what="a stream with the short token")

        def refused() -> bool:
            return sum(relay.log.count("refused with 401") for relay in site.relays) > refusals

        wait_until(refused, 20, "the refusal")
        change(site, order, "sent")
        wait_shown(page, order, "tea: sent")
        assert state_of(page) == "live"
        assert sum(relay.log.count("refused with 401") for relay in site.relays) == refusals + 1


def short_token(site: Site, channel: str, seconds: int) -> str:
    arguments = ["token", "--key-file", str(site.key), "--lifetime", str(seconds), channel]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.output.strip()


def test_signing_out_takes_the_cookie_away(site: Site, browser: Browser) -> None:
    with open_signed_in(browser, site, "ann") as page:

        async def names() -> set[str]:
            return {
                str(cookie.get("name"))
                for cookie in await page.playwright.context.cookies(f"{site.url}/events")
            }

        async def sign_out() -> None:
            async with page.playwright.expect_navigation():
                await page.playwright.click("text=Sign out")

        assert "sse" in browser.run(names())
        browser.run(sign_out())
        assert "sse" not in browser.run(names())


def open_tabs(page: Page, url: str, count: int) -> list[playwright.async_api.Page]:
    """Open further tabs beside a page: in the same browser, with the same cookies."""

    async def tab() -> playwright.async_api.Page:
        opened = await page.playwright.context.new_page()
        await opened.goto(url)
        return opened

    return [page.browser.run(tab()) for _ in range(count)]


def texts(page: Page, tabs: list[playwright.async_api.Page], script: str) -> list[Any]:
    async def ask() -> list[Any]:
        return [await tab.evaluate(script) for tab in tabs]

    return page.browser.run(ask())


STATE = "document.getElementById('state').textContent"


def test_twelve_tabs_over_http_2_are_all_live(site: Site, browser: Browser) -> None:
    order = add_order(site, 1, "tea")
    with open_signed_in(browser, site, "ann") as page:
        tabs = [page.playwright, *open_tabs(page, site.url, 11)]
        wait_until(lambda: texts(page, tabs, STATE) == ["live"] * 12, 20, "twelve streams")
        change(site, order, "packed")
        script = f"document.getElementById('order-{order}').textContent"
        wait_until(lambda: texts(page, tabs, script) == ["tea: packed"] * 12, 20, "twelve changes")
        protocols = texts(page, tabs, "performance.getEntriesByType('navigation')[0].nextHopProtocol")
        assert set(protocols) == {"h2"}


def test_over_http_1_1_six_tabs_take_all_connections_and_the_seventh_waits(
    site: Site, browser: Browser
) -> None:
    with open_signed_in(browser, site, "ann", site.plain_url) as page:
        tabs = [page.playwright, *open_tabs(page, site.plain_url, 5)]
        wait_until(lambda: texts(page, tabs, STATE) == ["live"] * 6, 20, "six streams")

        async def seventh() -> playwright.async_api.Page:
            tab = await page.playwright.context.new_page()
            with pytest.raises(playwright.async_api.TimeoutError):
                await tab.goto(site.plain_url, timeout=2_000)
            return tab

        waiting = page.browser.run(seventh())

        async def again() -> None:
            await tabs[1].close()
            await waiting.wait_for_selector("#state", timeout=20_000)

        page.browser.run(again())
        others = [tabs[0], *tabs[2:], waiting]
        wait_until(lambda: texts(page, others, STATE) == ["live"] * 6, 20, "the seventh stream")


def test_a_relay_that_dies_costs_no_event_and_no_gap(site: Site, browser: Browser) -> None:
    orders = [add_order(site, 1, "tea") for _ in range(10)]
    with open_signed_in(browser, site, "ann") as page:
        # A gap would load the page anew.
        page.evaluate("() => { same = true; }")
        # Whichever of them serves the page: the other takes over.
        for number, relay in enumerate(site.relays):
            relay.kill()
            for order in orders:
                change(site, order, f"sent {number}")
            for order in orders:
                wait_shown(page, order, f"tea: sent {number}")
            site.relays[number] = site.start_relay(relay.bind)
        assert page.evaluate("same") is True


def test_the_cookie_of_the_docs_is_the_examples() -> None:
    """The docs' view, but for whose channels they are."""
    block = pages.block("python", "# shop/streams.py", "docs/django.md")
    example = (EXAMPLE / "shop" / "streams.py").read_text()
    for line in block.partition("@never_cache")[2].splitlines():
        if "channels" not in line and "claims" not in line and "def " not in line:
            assert line in example


def test_the_example_is_small() -> None:
    files = [path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".html")]
    assert sum(len(Path(path).read_text().splitlines()) for path in files) < 500
