"""docs/django.md and its site, in Chromium: plain WSGI, login, admin, cookie, nginx, two relays."""

from __future__ import annotations

import functools
import json
import re
import shutil
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
from harness import (
    Browser,
    Database,
    FreezableProxy,
    Page,
    RawStream,
    Relay,
    SseReader,
    WebServer,
    wait_until,
)
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


# ==== Rows, tests, migrations =================================================


def test_rows_are_published_as_the_docs_say(log_database: Database) -> None:
    log_database.execute("CREATE TABLE shop_order (id int PRIMARY KEY, tenant_id int, state text)")
    log_database.execute(pages.block("sql", "CREATE TRIGGER publish"))
    log_database.execute("INSERT INTO shop_order VALUES (7, NULL, 'new'), (8, 21, 'new')")
    log_database.execute("UPDATE shop_order SET tenant_id = 21, state = 'paid' WHERE id = 7")
    found = log_database.execute("SELECT channel, data FROM sse_relay.pending")
    assert {channel for channel, _ in found} == {"tenant-21"}
    assert [json.loads(data)["op"] for _, data in found] == ["insert", "update"]
    assert json.loads(found[1][1]) == json.loads(pages.block("json", '{"op"'))


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
        for other in ("tenant-11", "tenant-2"):
            assert relay.get(other, headers=headers).json()["status"] == 403
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
        tab = Page(browser, browser.run(page.playwright.context.new_page()))
        browser.run(tab.playwright.goto(site.url))
        known = len(other.requests)
        wait_live(tab)

        async def sign_out() -> set[str]:
            async with page.playwright.expect_navigation():
                await page.playwright.click("text=Sign out")
            cookies = await page.playwright.context.cookies(f"{site.url}/events")
            return {str(cookie.get("name")) for cookie in cookies}

        assert "sse" not in browser.run(sign_out())
        wait_until(lambda: state_of(tab).startswith("refused: "), 10, "the end of the tab's stream")
        # The other browser has a session of its own: it fetches a new cookie, and goes on.
        wait_until(
            lambda: any("/stream-cookie" in url for _, url in other.requests[known:]), 20, "the new cookie"
        )
        change(site, order, "packed")
        wait_shown(other, order, "tea: packed")
        assert state_of(ann) == "live"


# ==== Many tabs ===============================================================


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


# What nginx, the view and the relay might read differently; each leads to a closed channel if one errs.
DISGUISES = (
    "/events/secret", "/events/secret/../../events.js", "/events/secret/../../events.d.ts",
    "/events/secret/..%2f..%2fevents.js", "/events/secret/%2e%2e/%2e%2e/events.js",
    "/events/secret/../../may-read", "/events/secret/../../live", "/events/x/../secret",
    "/events//secret", "//events/secret", "/./events/secret", "/events/./secret", "/x/../events/secret",
    "/%65vents/secret", "/events/news/../secret", "/events/news%2f..%2fsecret",
    "/events/news?channel=secret", "/events/news%3Fchannel=secret", "/events?channel=news&channel=secret",
    "/events?channel=secret", "/events/?channel=secret", "/events?channel=news;channel=secret",
    "/events.js?channel=secret", "/events.js/../events/secret", "/events/secret#/events/news",
    "/events/news#?channel=secret", "http://elsewhere.example/events/secret",
    "/events/secret\\..\\..\\events.js", "/events/secr\u00e9t", "/events?chann%65l=secret",
    "/events/news/..%5c..%5c", "/events/news%00secret", "/events?channel=news&channel=%73ecret",
    "/events;/secret", "/events/secret?channel=news", "/events?channel=news&x=%26channel=secret",
    "/events/x/..%2f..%2fevents.js", "/events/%2e%2e/events.js", "/events.js%2f..%2fevents%2fsecret",
    "/events/secret/", "/events/news/%2e%2e/secret", "/events.js#/../events/secret",
    "/events/secret#/../../events.js", "/events.js/secret", "/events.js%3fchannel=secret",
    "/events.js%00/../events/secret", "/events.js\\..\\events\\secret", "/events/s\u00e9cret",
    "/eventssecret", "http://relay/events/secret", "http://relay/events.js/../events/secret",
    "http://relay/events.js#/events/secret",
)  # fmt: skip


@pytest.mark.slow
def test_nginx_asks_the_application_and_nobody_gets_by_it(
    application: str, database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    """The view opens ``news`` to a stranger, who may listen to nothing else, whatever is asked for."""
    bind, admin = (f"unix:{tmp_path}/{name}.sock" for name in ("http", "admin"))
    start_relay("--allow-channel", "*", "--admin", admin, bind=bind, dsn=database.dsn)
    asking = harness.nginx_recipe("location /events { }")
    server = re.sub(r" *error_page .*@sse_retry;\n", lambda _: asking, harness.nginx_recipe("server { }"))
    server += harness.nginx_recipe("server { }, to ask the application")
    server = server.replace("http://127.0.0.1:8000", application)
    with (
        harness.Nginx(tmp_path, bind, server=server) as nginx,
        httpx.Client(transport=httpx.HTTPTransport(uds=f"{tmp_path}/admin.sock")) as looking,
    ):

        def channels_after(target: str) -> set[str]:
            request = f"GET {target} HTTP/1.1\r\nHost: app.example\r\nAccept: text/event-stream\r\n\r\n"
            with RawStream(nginx.address, request=request.encode()) as client:
                wait_until(lambda: b"\r\n\r\n" in client.raw or client.ended, what=f"answer to {target}")
                return set(looking.get("http://localhost/channels").json()["channels"])

        assert channels_after("/events/news") == {"news"}
        opened = {target: channels_after(target) - {"news"} for target in DISGUISES}
        assert {target for target, channels in opened.items() if channels} == set(), opened

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
    with harness.Nginx(away, bind, server=server) as nginx:
        assert httpx.get(f"{nginx.url}/events/user-7").text == "retry: 2000\n\n"
        assert "openStream" in httpx.get(f"{nginx.url}/events.js").text
