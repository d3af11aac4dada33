"""The docs' Django code, as printed, in a real project: plain WSGI, PostgreSQL, the relay.

A block whose first line names a file, such as ``# shop/views.py``, becomes that file.
"""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg2
import psycopg2.extensions
import pytest

import harness
import pages

DOCS_SECRET = "/etc/sse-relay/jwt"
FILE_NAME = re.compile(r"(?:#|<!--) (shop/[\w./]+)(?: -->)?\n")

SETTINGS = """
import os

SECRET_KEY = "of the tests alone"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", "shop"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"django.request": {"handlers": ["console"]}},
}
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "ATOMIC_REQUESTS": True,
        "TEST": {"NAME": os.environ.get("TEST_DATABASE")},
        **DATABASE,
    }
}
"""
URLS = """
from django.contrib.auth import login
from django.contrib.auth.models import User
from django.http import JsonResponse
from django.urls import path

from shop import streams, views


def sign_in(request, name):
    user, _ = User.objects.get_or_create(username=name)
    login(request, user)
    return JsonResponse({"id": user.pk})


def orders_within_a_transaction(request, tenant_id):
    return views.orders(request, tenant_id)


urlpatterns = [
    path("orders/<int:tenant_id>", views.orders),
    path("orders-position-first/<int:tenant_id>", views.orders_position_first),
    path("orders-within-a-transaction/<int:tenant_id>", orders_within_a_transaction),
    path("sign-in/<name>", sign_in),
    path("stream-cookie", streams.stream_cookie),
    path("may-read", streams.may_read),
]
"""
MODELS = """
from django.db import models


class Order(models.Model):
    tenant_id = models.IntegerField(null=True)
    state = models.TextField()
"""
FIRST_MIGRATION = """
from django.db import migrations, models


class Migration(migrations.Migration):
    operations = [
        migrations.CreateModel(
            "Order",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("tenant_id", models.IntegerField(null=True)),
                ("state", models.TextField()),
            ],
        )
    ]
"""
TESTS = """
from django.db import InternalError, connection
from django.test import TestCase, TransactionTestCase


def publish(data):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify('tests', %s), sse_relay.publish('tests', %s)", [data, data])


class Rolled(TestCase):
    def test_it_sends_nothing(self):
        publish("of TestCase")

    def test_a_view_cannot_set_its_isolation_level(self):
        with self.assertRaisesMessage(InternalError, "SET TRANSACTION ISOLATION LEVEL"):
            self.client.get("/orders/7")


class Committed(TransactionTestCase):
    def test_it_sends(self):
        publish("of TransactionTestCase")

    def test_a_view_can_set_its_isolation_level(self):
        self.assertContains(self.client.get("/orders/7"), "lastEventId=")
"""


def printed_files() -> dict[str, str]:
    """Return the files that the docs show, by path; what they show in several blocks is joined."""
    files: dict[str, str] = {}
    for language in ("python", "html"):
        for found in pages.blocks(language):
            match = FILE_NAME.match(found.text)
            # The README's first page has a project of its own, in test_first_page.py.
            if match and found.page != "README.md":
                files[match[1]] = files.get(match[1], "") + found.text
    return files


@dataclass
class Project:
    """A Django project in a folder, with a database of its own."""

    folder: Path
    database: harness.Database

    @property
    def secret(self) -> Path:
        return self.folder / "jwt"

    def write(self) -> None:
        parts = psycopg2.extensions.parse_dsn(self.database.dsn)
        names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
        connection = {name: parts.get(key, "") for name, key in names.items()}
        files = {
            "settings.py": f"DATABASE = {connection!r}\n{SETTINGS}",
            "urls.py": URLS,
            "shop/__init__.py": "",
            "shop/models.py": MODELS,
            "shop/migrations/__init__.py": "",
            "shop/migrations/0001_initial.py": FIRST_MIGRATION,
            "shop/test_sending.py": TESTS,
            **printed_files(),
        }
        assert DOCS_SECRET in files["shop/streams.py"]
        self.secret.write_text("the application's and the relay's secret\n")
        files["shop/streams.py"] = files["shop/streams.py"].replace(DOCS_SECRET, str(self.secret))
        for path, text in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)
        # As the docs' line for the shell does.
        schema = subprocess.run([sys.executable, harness.PROGRAM, "schema"], capture_output=True, check=True)
        (self.folder / "shop/migrations/sse_relay.sql").write_bytes(schema.stdout)

    def manage(self, *arguments: str, **environment: str) -> str:
        """Run one of Django's commands to its end; return all that it says."""
        done = subprocess.run(
            [sys.executable, "-m", "django", *arguments],
            cwd=self.folder, env=self.environment(**environment), capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def environment(self, **more: str) -> dict[str, str]:
        return {**harness.clean_environment(), "DJANGO_SETTINGS_MODULE": "settings", **more}

    def order(self, tenant_id: int | None, state: str = "new") -> int:
        """Insert an order as any other program would; return its id."""
        sql = "INSERT INTO shop_order (tenant_id, state) VALUES (%s, %s) RETURNING id"
        return int(self.database.execute(sql, (tenant_id, state))[0][0])


@pytest.fixture(scope="module")
def project(server: harness.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project, migrated."""
    with server.fresh_database() as database:
        made = Project(tmp_path_factory.mktemp("site"), database)
        made.write()
        made.manage("migrate")
        yield made


@pytest.fixture(scope="module")
def site(project: Project) -> Iterator[httpx.Client]:
    """The project, served by runserver."""
    address = f"127.0.0.1:{harness.free_port()}"
    log = project.folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", "runserver", "--noreload", address],
            cwd=project.folder, env=project.environment(), stdout=output, stderr=output,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return client.get("/").status_code == 404
                except httpx.TransportError:
                    return False

            harness.wait_until(answers, 20, f"Django at {address}")
            yield client
    finally:
        process.terminate()
        process.wait(10)


def page(site: httpx.Client, path: str) -> tuple[dict[int, str], str]:
    """Load a page; return the states of its orders, by id, and the address of its stream."""
    response = site.get(path)
    assert response.status_code == 200, response.text
    orders = re.findall(r'<li id="order-(\d+)">(.*?)</li>', response.text)
    stream = re.search(r'new EventSource\("(.*?)"\)', response.text)
    assert stream, response.text
    return {int(number): state for number, state in orders}, html.unescape(stream[1])


def test_rows_are_published_as_the_readme_says(
    project: Project, start_relay: Callable[..., harness.Relay]
) -> None:
    relay = start_relay("--source", "log", dsn=project.database.dsn)
    execute = project.database.execute
    with harness.SseReader(relay.url("tenant-21", "tenant-22")) as reader:
        reader.wait_for_id()
        order = project.order(None)
        for change in ("tenant_id = 21", "state = 'paid'", "tenant_id = 22", "tenant_id = NULL"):
            execute(f"UPDATE shop_order SET {change} WHERE id = %s", (order,))
        execute("UPDATE shop_order SET tenant_id = 22 WHERE id = %s", (order,))
        execute("DELETE FROM shop_order WHERE id = %s", (order,))
        reader.wait_for(lambda event: '"delete"' in event.data)
        events = [(event.event, json.loads(event.data)) for event in reader.events]
    new, paid = ({"id": order, "state": state} for state in ("new", "paid"))
    assert [(channel, event["op"], event["row"]) for channel, event in events] == [
        ("tenant-21", "update", new),
        ("tenant-21", "update", paid),
        ("tenant-21", "update", None),
        ("tenant-22", "update", paid),
        ("tenant-22", "update", None),
        ("tenant-22", "update", paid),
        ("tenant-22", "delete", paid),
    ]
    assert all(event["key"] == {"id": order} for _, event in events)
    shown = pages.block("json", '{"op"')
    assert json.loads(shown.replace("7", str(order))) == events[1][1]


class Writer:
    """Changes orders of a tenant, each one in numbered versions, in transactions that overlap with others."""

    def __init__(self, project: Project, tenant_id: int, seed: int) -> None:
        self.versions: dict[int, int] = {}
        """The last committed version of each order."""
        self._connection = psycopg2.connect(project.database.dsn)
        self._tenant_id = tenant_id
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        cursor = self._connection.cursor()
        while not self._stopping.is_set():
            changed = {}
            if not self.versions or self._random.random() < 0.2:
                cursor.execute(
                    "INSERT INTO shop_order (tenant_id, state) VALUES (%s, '1') RETURNING id",
                    (self._tenant_id,),
                )
                (row,) = cursor.fetchall()
                changed[row[0]] = 1
            for order in self._random.sample(sorted(self.versions), min(3, len(self.versions))):
                changed[order] = self.versions[order] + 1
                cursor.execute("UPDATE shop_order SET state = %s WHERE id = %s", (str(changed[order]), order))
            self._stopping.wait(self._random.uniform(0, 0.02))
            if self._random.random() < 0.2:
                self._connection.rollback()
            else:
                self._connection.commit()
                self.versions.update(changed)
            # Too many orders would only make pages long.
            if len(self.versions) > 20:
                self._stopping.wait(0.01)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._connection.close()


@pytest.mark.parametrize(("view", "exact"), [("orders", True), ("orders-position-first", False)])
def test_a_page_and_its_stream_fit_together_while_others_write(
    project: Project, site: httpx.Client, start_relay: Callable[..., harness.Relay], view: str, exact: bool
) -> None:
    relay = start_relay("--source", "log", dsn=project.database.dsn)
    tenant_id = 31 if exact else 32
    writers = [Writer(project, tenant_id, seed) for seed in range(4)]
    loaded: list[tuple[dict[int, str], harness.SseReader]] = []
    try:
        harness.wait_until(lambda: all(writer.versions for writer in writers))
        for _ in range(30):
            shown, stream = page(site, f"/{view}/{tenant_id}")
            loaded.append((shown, harness.SseReader(f"http://{relay.bind}{stream}")))
        for writer in writers:
            writer.stop()
        final = {order: version for writer in writers for order, version in writer.versions.items()}
        last = project.order(tenant_id, "last")
        repeated = 0
        for shown, reader in loaded:
            reader.wait_for(lambda event: f'"id": {last}' in event.data)
            assert not [event for event in reader.events if event.event.startswith("relay.")]
            seen = {order: int(state) for order, state in shown.items()}
            for data in reader.data[:-1]:
                row = json.loads(data)["row"]
                order, version = row["id"], int(row["state"])
                if version <= seen.get(order, 0):
                    repeated += 1
                else:
                    assert version == seen.get(order, 0) + 1, "a change was missed"
                    seen[order] = version
            assert seen == final
        assert not (exact and repeated)
    finally:
        for writer in writers:
            writer.stop()
        for _, reader in loaded:
            reader.close()


def test_the_page_misses_nothing_in_a_browser_behind_nginx(
    project: Project,
    site: httpx.Client,
    start_relay: Callable[..., harness.Relay],
    browser: harness.Browser,
    tmp_path: Path,
) -> None:
    socket = f"unix:{tmp_path}/http.sock"
    options = ("--source", "log", "--retry", "100")
    relay = start_relay(*options, bind=socket, dsn=project.database.dsn)
    order = project.order(41)
    server = f"{harness.nginx_recipe('server { }')}\nlocation / {{ proxy_pass {site.base_url}; }}"
    with (
        harness.Nginx(tmp_path, socket, server=server) as nginx,
        browser.open(url=f"{nginx.url}/orders/41") as page,
    ):
        page.evaluate(
            "() => { shown = []; show = (event) => shown.push(event); refetch = () => shown.push(0); }"
        )
        change = "UPDATE shop_order SET state = %s WHERE id = %s"
        harness.wait_until(lambda: page.evaluate("orders.readyState") == 1, what="the stream")
        project.database.execute(change, ("packed", order))
        harness.wait_until(lambda: page.evaluate("shown.length"), what="the first change")
        assert relay.stop() == 0
        project.database.execute(change, ("sent", order))
        start_relay(*options, bind=socket, dsn=project.database.dsn)
        harness.wait_until(lambda: page.evaluate("shown.length") > 1, what="what was missed")
        project.database.execute(change, ("received", order))
        harness.wait_until(lambda: page.evaluate("shown.length") > 2, what="what came then")
        states = page.evaluate("shown.map((event) => event.row.state)")
        assert states == ["packed", "sent", "received"]


def test_what_the_transaction_itself_publishes_comes_again(
    project: Project, start_relay: Callable[..., harness.Relay]
) -> None:
    relay = start_relay("--source", "log", dsn=project.database.dsn)
    connection = psycopg2.connect(project.database.dsn)
    connection.set_session(isolation_level="REPEATABLE READ")
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT sse_relay.publish('own', 'before'), sse_relay.position()")
        ((_, position),) = cursor.fetchall()
        cursor.execute("SELECT sse_relay.publish('own', 'after')")
    connection.close()
    with harness.SseReader(relay.url("own", lastEventId=position)) as reader:
        reader.wait_for_data("after")
        assert reader.data == ["before", "after"]


def test_a_view_in_a_transaction_cannot_set_its_isolation_level(project: Project, site: httpx.Client) -> None:
    assert site.get("/orders-within-a-transaction/1").status_code == 500
    assert "SET TRANSACTION ISOLATION LEVEL" in (project.folder / "log").read_text()


def test_testcase_sends_nothing_and_transactiontestcase_sends(
    project: Project, start_relay: Callable[..., harness.Relay]
) -> None:
    dsn = project.database.dsn
    relays = start_relay(dsn=dsn), start_relay("--source", "log", dsn=dsn)
    readers = [harness.SseReader(relay.url("tests")) for relay in relays]
    try:
        for reader in readers:
            reader.wait_for_id()
        # In the database that the relays are connected to. Django runs TestCase first.
        name = str(psycopg2.extensions.parse_dsn(dsn)["dbname"])
        output = project.manage("test", "--keepdb", "shop.test_sending", TEST_DATABASE=name)
        assert "Ran 4 tests" in output
        for reader in readers:
            reader.wait_for_data("of TransactionTestCase")
            assert reader.data == ["of TransactionTestCase"]
    finally:
        for reader in readers:
            reader.close()


def test_a_testcase_sees_what_is_about_to_be_published(project: Project) -> None:
    # In a database of its own, which the docs' migrations make ready.
    assert "Ran 1 test" in project.manage("test", "shop.tests")


def test_the_cookie_of_the_docs_opens_what_is_the_users_own(
    project: Project, site: httpx.Client, start_relay: Callable[..., harness.Relay]
) -> None:
    options = ("--jwt-key-file", str(project.secret), "--jwt-cookie", "sse")
    relay = start_relay(*options, dsn=project.database.dsn)
    assert site.get("/stream-cookie").status_code == 401
    user = site.get("/sign-in/ann").json()["id"]
    cookie = site.get("/stream-cookie").headers["set-cookie"]
    site.cookies.clear()
    assert all(word in cookie for word in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/events"))
    headers = {"Cookie": cookie.partition(";")[0]}
    assert httpx.get(relay.url(f"user-{user}")).json()["status"] == 401
    assert httpx.get(relay.url(f"user-{user}0"), headers=headers).json()["status"] == 403
    with harness.SseReader(relay.url(f"user-{user}", "news"), headers) as reader:
        reader.wait_for_id()
        project.database.notify(f"user-{user}", "for ann")
        reader.wait_for_data("for ann")


def test_the_application_says_who_may_read(site: httpx.Client) -> None:
    def answer(address: str) -> int:
        return site.get("/may-read", headers={"X-Original-URI": address}).status_code

    user = site.get("/sign-in/ben").json()["id"]
    assert answer(f"/events/user-{user}") == 204
    assert answer(f"/events?channel=news&channel=user-{user}&lastEventId=a-1") == 204
    assert answer(f"/events/user%2D{user}") == 204
    for address in ("/events", f"/events?channel=user-{user}&channel=orders", f"/events/user-{user}0"):
        assert answer(address) == 403
    site.cookies.clear()
    assert answer("/events/news") == 204
    assert answer(f"/events/user-{user}") == 403


def test_nginx_asks_the_application(
    project: Project, site: httpx.Client, start_relay: Callable[..., harness.Relay], tmp_path: Path
) -> None:
    socket = f"unix:{tmp_path}/http.sock"
    start_relay("--allow-channel", "*", bind=socket, dsn=project.database.dsn)
    asking = harness.nginx_recipe("location /events { }")
    server = re.sub(r" *error_page .*@sse_retry;\n", asking, harness.nginx_recipe("server { }"))
    server += harness.nginx_recipe("server { }, to ask the application")
    server = server.replace("http://127.0.0.1:8000", str(site.base_url).rstrip("/"))
    user = site.get("/sign-in/cem").json()["id"]
    headers = {"Cookie": f"sessionid={site.cookies['sessionid']}"}
    site.cookies.clear()
    with harness.Nginx(tmp_path, socket, server=server) as nginx:
        address = f"{nginx.url}/events/user-{user}"
        with harness.SseReader(address) as stranger:
            stranger.wait_for_end()
            (refusal,) = stranger.events
            assert (refusal.event, refusal.json()["status"]) == ("relay.refused", 403)
            assert refusal.retry == 86_400_000
        with harness.SseReader(address, headers) as reader:
            reader.wait_for_id()
            project.database.notify(f"user-{user}", "for cem")
            reader.wait_for_data("for cem")
