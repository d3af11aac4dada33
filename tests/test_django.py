"""docs/django.md and its site, in Chromium: plain WSGI, login, admin, cookie, nginx, two relays."""

from __future__ import annotations

import functools
import json
import re
import shutil
import time
import types
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import playwright.async_api
import psycopg2
import psycopg2.extensions
import pytest
from click.testing import CliRunner

import harness
import pages
from django_example.serve import EXAMPLE, Site, serve, sign_in, state_of
from harness import Browser, Database, FreezableProxy, Page, Relay, SseReader, WebServer, wait_until
from sites import stale_loads
from sse_relay import cli

StartRelay = Callable[..., Relay]
FILE_NAME = re.compile(r"(?:#|<!--) (shop/[\w./]+)(?: -->)?\n")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


# ==== The docs ================================================================


def test_the_files_of_the_docs_are_those_of_the_site() -> None:
    found = [*pages.blocks("python", "docs/django.md"), *pages.blocks("html", "docs/django.md")]
    found += pages.blocks("python", "docs/testing.md")
    named = {match[1]: block.text for block in found if (match := FILE_NAME.match(block.text))}
    assert len(named) == 5
    for name, text in named.items():
        assert text == (EXAMPLE / name).read_text()


def test_the_grants_of_the_docs_are_those_of_the_log() -> None:
    migration = (EXAMPLE / "shop/migrations/0002_sse_relay.py").read_text()
    (grants,) = re.findall(r'GRANTS = """\n(.*?)"""', migration, re.DOTALL)
    assert grants in pages.pages()["docs/log.md"]


def test_the_site_is_small() -> None:
    files = [path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".html")]
    assert sum(len(path.read_text().splitlines()) for path in files) < 500


# ==== Rows, tests, migrations =================================================


def test_rows_are_published_as_the_docs_say(log_database: Database, start_relay: StartRelay) -> None:
    execute = log_database.execute
    execute("CREATE TABLE shop_order (id int PRIMARY KEY, tenant_id int, state text)")
    execute(pages.block("sql", "CREATE TRIGGER publish"))
    relay = start_relay("--source", "log", dsn=log_database.dsn)
    with SseReader(relay.url("tenant-21", "tenant-22")) as reader:
        reader.wait_for_id()
        execute("INSERT INTO shop_order VALUES (7, NULL, 'new')")
        for change in ("tenant_id = 21", "state = 'paid'", "tenant_id = 22", "tenant_id = NULL"):
            execute(f"UPDATE shop_order SET {change}")
        execute("UPDATE shop_order SET tenant_id = 22")
        execute("DELETE FROM shop_order")
        reader.wait_for(lambda event: '"delete"' in event.data)
        events = [(event.event, json.loads(event.data)) for event in reader.events if '"op"' in event.data]
    new, paid = ({"id": 7, "state": state} for state in ("new", "paid"))
    assert [(channel, event["op"], event["row"]) for channel, event in events] == [
        ("tenant-21", "update", new),
        ("tenant-21", "update", paid),
        ("tenant-21", "update", None),
        ("tenant-22", "update", paid),
        ("tenant-22", "update", None),
        ("tenant-22", "update", paid),
        ("tenant-22", "delete", paid),
    ]
    assert all(event["key"] == {"id": 7} for _, event in events)
    assert json.loads(pages.block("json", '{"op"')) == events[1][1]


# Beside the site's own tests: what the docs say of tests, and of views.
MORE_TESTS = """
from django.db import InternalError, connection, transaction
from django.test import RequestFactory, TestCase, TransactionTestCase
from django.contrib.auth.models import User
from shop.models import Order
from shop.views import orders


def publish(data):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify('tests', %s), sse_relay.publish('tests', %s)", [data, data])


class Rolled(TestCase):
    def test_it_sends_nothing(self):
        publish("of TestCase")

    def test_a_view_cannot_set_its_isolation_level(self):
        self.client.force_login(User.objects.create_user("ann"))
        with self.assertRaisesMessage(InternalError, "SET TRANSACTION ISOLATION LEVEL"):
            self.client.get("/")


class Committed(TransactionTestCase):
    def test_it_sends(self):
        publish("of TransactionTestCase")

    def test_within_a_transaction_a_view_cannot_set_its_isolation_level(self):
        request = RequestFactory().get("/")
        request.user = User.objects.create_user("ben")
        with self.assertRaisesMessage(InternalError, "SET TRANSACTION ISOLATION LEVEL"), transaction.atomic():
            orders(request)

    def test_a_view_that_is_read_only_cannot_write(self):
        with self.assertRaisesMessage(InternalError, "cannot execute INSERT in a read-only transaction"):
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                Order.objects.create(item="tea")
"""
UPGRADE = """
from pathlib import Path
from django.db import migrations

class Migration(migrations.Migration):
    atomic = False
    dependencies = [("shop", "0002_sse_relay")]
    operations = [
        migrations.RunSQL(
            Path(__file__).with_name("sse_relay_2.sql").read_text(), migrations.RunSQL.noop
        ),
    ]
"""


@pytest.mark.slow
def test_django_s_tests_send_what_the_docs_say_and_may_be_repeated(
    site: Site, start_relay: StartRelay, tmp_path: Path
) -> None:
    """In a database of its own, with the site's migrations and an upgrade."""
    name = "tests_of_django"
    dsn = psycopg2.extensions.make_dsn(site.database.dsn, dbname=name)
    folder = tmp_path / "copy"
    shutil.copytree(site.folder, folder)
    (folder / "shop/test_more.py").write_text(MORE_TESTS)
    schema = folder / "shop/migrations/sse_relay.sql"
    (folder / "shop/migrations/sse_relay_2.sql").write_text(schema.read_text())
    (folder / "shop/migrations/0003_upgrade.py").write_text(UPGRADE)
    settings = f"from settings import *\nDATABASES['default']['TEST'] = {{'NAME': {name!r}}}\n"
    (folder / "test_settings.py").write_text(settings)
    copy = site._replace(folder=folder)
    test = ("test", "--keepdb", "shop")
    readers: list[SseReader] = []
    try:
        assert "Ran 7 tests" in copy.manage(*test, DJANGO_SETTINGS_MODULE="test_settings")
        for source in ("notify", "log"):
            reader = SseReader(start_relay("--source", source, dsn=dsn).url("tests"))
            readers.append(reader)
            wait_until(lambda reader=reader: reader.starts, what="the stream")  # type: ignore[misc]  # a default
        assert "Ran 7 tests" in copy.manage(*test, DJANGO_SETTINGS_MODULE="test_settings")
        for reader in readers:
            reader.wait_for_data("of TransactionTestCase")
            assert reader.data == ["of TransactionTestCase"]
    finally:
        for reader in readers:
            reader.close()
        site.database.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


# ==== A page and its stream ===================================================


def test_what_the_transaction_itself_publishes_comes_again(
    log_database: Database, start_relay: StartRelay
) -> None:
    relay = start_relay("--source", "log", dsn=log_database.dsn)
    connection = psycopg2.connect(log_database.dsn)
    connection.set_session(isolation_level="REPEATABLE READ")
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT sse_relay.publish('own', 'before'), sse_relay.position()")
        ((_, position),) = cursor.fetchall()
        cursor.execute("SELECT sse_relay.publish('own', 'after')")
    connection.close()
    with SseReader(relay.url("own", lastEventId=position)) as reader:
        reader.wait_for_data("after")
        assert reader.data == ["before", "after"]


# ==== In the browser ==========================================================


def open_signed_in(browser: Browser, site: Site, name: str, url: str = "") -> Page:
    """Open a page in a browser context of its own, sign in, and wait until its stream is live."""
    page = browser.open(url=url or site.url)
    sign_in(page, name, site.password)
    wait_live(page)
    return page


def wait_live(page: Page) -> None:
    wait_until(lambda: state_of(page) == "live", 20, "the stream")


def shown(page: Page, order: int) -> str | None:
    text = page.evaluate("(id) => document.getElementById('order-' + id)?.textContent", order)
    return None if text is None else str(text)


def wait_shown(page: Page, order: int, text: str | None, timeout: float = 20) -> None:
    wait_until(lambda: shown(page, order) == text, timeout, f"order {order} as {text}")


def add_order(site: Site, tenant: int, item: str) -> int:
    sql = "INSERT INTO shop_order (tenant_id, item, state) VALUES (%s, %s, '0') RETURNING id"
    return int(site.database.execute(sql, (tenant, item))[0][0])


def change(site: Site, order: int, state: str) -> None:
    site.database.execute("UPDATE shop_order SET state = %s WHERE id = %s", (state, order))


@pytest.mark.slow
def test_pages_show_events_from_between_their_rendering_and_their_stream(
    site: Site, browser: Browser
) -> None:
    """PAGE_LOADS=1000 for as many."""
    order = add_order(site, 1, "tea")
    state = f"document.getElementById('order-{order}').textContent.replace('tea: ', '')"
    with open_signed_in(browser, site, "ann") as page:
        assert stale_loads(page, f"{site.url}/", functools.partial(change, site, order), state) == 0


@pytest.mark.slow
def test_what_is_saved_in_the_admin_appears_in_another_browser_also_when_it_was_away(
    site: Site, browser: Browser
) -> None:
    order = add_order(site, 1, "tea")

    def save(state: str) -> None:
        async def fill_in() -> None:
            await admin.playwright.goto(f"{site.url}/admin/shop/order/{order}/change/")
            await admin.playwright.fill("[name=state]", state)
            async with admin.playwright.expect_navigation():
                await admin.playwright.click("[name=_save]")

        browser.run(fill_in())

    with (
        FreezableProxy(("127.0.0.1", urlsplit(site.url).port or 0)) as line,
        browser.open(url=f"{site.url}/admin/") as admin,
        open_signed_in(browser, site, "ann", f"https://127.0.0.1:{line.port}/") as page,
    ):
        sign_in(admin, "admin", site.password)
        save("packed")
        wait_shown(page, order, "tea: packed")
        line.refuse()
        line.drop()
        wait_until(lambda: state_of(page) == "waiting", what="the loss of the connection")
        save("sent")
        assert shown(page, order) == "tea: packed"
        line.accept()
        wait_shown(page, order, "tea: sent")
        wait_live(page)


@pytest.mark.slow
def test_each_sees_the_orders_of_the_own_tenant(site: Site, browser: Browser) -> None:
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


# ==== The cookie ==============================================================


@pytest.mark.slow
def test_the_cookie_opens_the_users_own_channels_to_nobody_else(site: Site) -> None:
    assert httpx.get(f"{site.django}/stream-cookie").status_code == 401
    with httpx.Client(base_url=site.django, timeout=10) as ann:
        ann.get("/accounts/login/")
        form = {"username": "ann", "password": site.password, "csrfmiddlewaretoken": ann.cookies["csrftoken"]}
        ann.post("/accounts/login/", data=form)
        cookie = ann.get("/stream-cookie").headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/events"))
    socket = site.relays[0].bind.removeprefix("unix:")
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://relay/events/") as relay:
        headers = {"Cookie": cookie.partition(";")[0]}
        assert relay.get("tenant-1").json()["status"] == 401
        assert relay.get("tenant-11", headers=headers).json()["status"] == 403
    with SseReader("http://relay/events/tenant-1", headers, unix=socket) as reader:
        reader.wait_for_id()
        order = add_order(site, 1, "tea")
        reader.wait_for(lambda event: f'"id": {order}' in event.data)


def give_cookie(page: Page, token: str) -> None:
    cookie = {"name": "sse", "value": token, "domain": "127.0.0.1", "path": "/events", "secure": True}
    page.browser.run(page.playwright.context.add_cookies([cookie]))  # type: ignore[list-item]


def refusals(site: Site) -> int:
    return sum(relay.log.count("refused with 401") for relay in site.relays)


@pytest.mark.slow
def test_a_token_that_expires_costs_no_event_though_the_cookie_s_view_fails(
    site: Site, browser: Browser
) -> None:
    """Takes 10 s: the token's lifetime, and the module's waits."""
    order = add_order(site, 1, "tea")
    asked = 0

    async def fail_twice(route: playwright.async_api.Route) -> None:
        nonlocal asked
        asked += 1
        await (
            route.abort() if asked == 1 else route.fulfill(status=502) if asked == 2 else route.continue_()
        )

    with open_signed_in(browser, site, "ann") as page:
        # Opened anew, by a cookie that lasts for 3 s.
        arguments = ["token", "--key-file", str(site.key), "--lifetime", "3", "tenant-1"]
        token = CliRunner().invoke(cli, arguments).output.strip()
        browser.run(page.playwright.route("**/stream-cookie", lambda route: route.fulfill(status=204)))
        give_cookie(page, token)
        browser.run(page.playwright.reload())
        wait_live(page)
        page.evaluate("() => { window.same = true; }")  # a gap would load the page again
        before = refusals(site)
        browser.run(page.playwright.unroute("**/stream-cookie"))
        browser.run(page.playwright.route("**/stream-cookie", fail_twice))
        wait_until(lambda: refusals(site) > before, 20, "the refusal")
        change(site, order, "while refused")
        # The module waits for 2 to 3 s, 4 to 6, 8 to 12.
        wait_shown(page, order, "tea: while refused", 45)
        wait_live(page)
        assert page.evaluate("window.same") is True
        assert asked == 3
        # The view's 502 is not "signed out": the page tried with no cookie, and was refused once more.
        assert refusals(site) == before + 2


@pytest.mark.slow
def test_signing_out_takes_the_cookie_away_and_ends_the_streams_in_other_browsers(
    site: Site, browser: Browser
) -> None:
    order = add_order(site, 2, "tea")
    with (
        open_signed_in(browser, site, "ben") as page,
        open_signed_in(browser, site, "ben") as other,
        open_signed_in(browser, site, "ann") as ann,
    ):
        (tab,) = open_tabs(page, site.url, 1)
        known = len(other.requests)
        wait_until(lambda: texts(page, [tab], STATE) == ["live"], 20, "the tab's stream")

        async def sign_out() -> set[str]:
            async with page.playwright.expect_navigation():
                await page.playwright.click("text=Sign out")
            cookies = await page.playwright.context.cookies(f"{site.url}/events")
            return {str(cookie.get("name")) for cookie in cookies}

        assert "sse" not in browser.run(sign_out())
        began = time.monotonic()
        wait_until(
            lambda: texts(page, [tab], STATE)[0].startswith("refused: "), 20, "the end of the tab's stream"
        )
        assert time.monotonic() - began < 10
        # The other browser has a session of its own: it fetches a new cookie, and goes on.
        wait_until(
            lambda: any("/stream-cookie" in url for _, url in other.requests[known:]), 20, "the new cookie"
        )
        change(site, order, "packed")
        wait_shown(other, order, "tea: packed")
        assert state_of(ann) == "live"


# ==== Many tabs ===============================================================

STATE = "document.getElementById('state').textContent"


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


@pytest.mark.slow
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


@pytest.mark.slow
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


# ==== Restarts ================================================================


@pytest.mark.slow
def test_a_relay_that_dies_costs_no_event_and_no_gap_and_a_gap_loads_the_page_again(
    site: Site, browser: Browser
) -> None:
    orders = [add_order(site, 1, "tea") for _ in range(10)]
    with open_signed_in(browser, site, "ann") as page:
        page.evaluate("() => { window.same = true; }")
        # Whichever of them serves the page: the other takes over.
        for number, relay in enumerate(site.relays):
            relay.kill()
            for order in orders:
                change(site, order, f"sent {number}")
            for order in orders:
                wait_shown(page, order, f"tea: sent {number}")
            site.relays[number] = site.start_relay(relay.bind)
        assert page.evaluate("window.same") is True
        site.database.execute("SELECT sse_relay.renew_epoch()")
        browser.run(page.playwright.wait_for_function("() => !window.same", timeout=20_000))
        wait_live(page)
        change(site, orders[0], "after the gap")
        wait_shown(page, orders[0], "tea: after the gap")


# ==== Where nginx asks the application ========================================


@pytest.fixture(scope="module")
def application() -> Iterator[str]:
    """The view of docs/access.md, behind a web server; who asks is named by a cookie ``user``."""
    from django.conf import settings  # type: ignore[import-untyped]  # Django ships no type hints

    if not settings.configured:
        settings.configure()
    names: dict[str, Any] = {}
    exec(pages.block("python", "# shop/access.py", "docs/access.md"), names)  # noqa: S102  # the docs' own

    def answer(path: str, headers: Message) -> tuple[int, str]:
        name = headers.get("Cookie", "").removeprefix("user=")
        user = types.SimpleNamespace(pk=name, is_authenticated=bool(name))
        return names["may_read"](types.SimpleNamespace(headers=headers, user=user)).status_code, ""

    with WebServer(answer) as running:
        yield running.url


@pytest.mark.parametrize(
    ("user", "address", "status"),
    [
        ("7", "/events/user-7", 204),
        ("7", "/events?channel=news&channel=user-7&lastEventId=a-1", 204),
        ("7", "/events/user%2D7", 204),
        ("7", "/events", 403),
        ("7", "/events?channel=user-7&channel=orders", 403),
        ("7", "/events/user-70", 403),
        ("", "/events/news", 204),
        ("", "/events/user-7", 403),
    ],
)
def test_the_application_says_who_may_read(application: str, user: str, address: str, status: int) -> None:
    headers = {"X-Original-URI": address, "Cookie": f"user={user}"}
    assert httpx.get(application, headers=headers).status_code == status


@pytest.mark.slow
def test_nginx_asks_the_application(
    application: str, database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    socket = f"unix:{tmp_path}/http.sock"
    start_relay("--allow-channel", "*", bind=socket, dsn=database.dsn)
    asking = harness.nginx_recipe("location /events { }")
    server = re.sub(r" *error_page .*@sse_retry;\n", lambda _: asking, harness.nginx_recipe("server { }"))
    server += harness.nginx_recipe("server { }, to ask the application")
    server = server.replace("http://127.0.0.1:8000", application)
    with harness.Nginx(tmp_path, socket, server=server) as nginx:
        address = f"{nginx.url}/events/user-7"
        with SseReader(address) as stranger:
            stranger.wait_for_end()
            (refusal,) = stranger.events
            assert (refusal.event, refusal.json()["status"]) == ("relay.refused", 403)
            assert refusal.retry == 86_400_000
        with SseReader(address, {"Cookie": "user=7"}) as reader:
            reader.wait_for_id()
            database.notify("user-7", "for the user")
            reader.wait_for_data("for the user")
        # The module is for everybody.
        assert "openStream" in httpx.get(f"{nginx.url}/events.js").text
    away = tmp_path / "away"
    away.mkdir()
    server = server.replace(application, f"http://127.0.0.1:{harness.free_port()}")
    with harness.Nginx(away, socket, server=server) as nginx:
        assert httpx.get(f"{nginx.url}/events/user-7").text == "retry: 2000\n\n"
        assert "openStream" in httpx.get(f"{nginx.url}/events.js").text
