"""Run the example: PostgreSQL, Django, two relays with the durable log, and nginx in front."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
from psycopg2.extensions import make_dsn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

EXAMPLE = Path(__file__).resolve().parent
PEOPLE = """
from django.contrib.auth.models import Group, User
from shop.models import Order
User.objects.create_superuser("admin", password=PASSWORD)
for number, name in enumerate(("ann", "ben"), 1):
    user = User.objects.create_user(name, password=PASSWORD)
    user.groups.add(Group.objects.create(name=str(number)))
    for item in ("tea", "coffee"):
        Order.objects.create(tenant_id=number, item=item)
"""
DJANGO_LOCATION = """
location / {{
    proxy_pass http://{django};
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Proto $scheme;
}}
"""


# When the page came to show what.
WATCH = """() => {
    window.shown = {};
    new MutationObserver(() => {
        for (const item of document.querySelectorAll("#orders li"))
            shown[item.textContent.split(": ")[1]] ??= Date.now();
    }).observe(document.getElementById("orders"), { childList: true, subtree: true, characterData: true });
}"""


class Site(NamedTuple):
    """The example, running."""

    url: str
    """By HTTP/2 and TLS."""
    django: str
    """Django's own address, without nginx in front."""
    password: str
    """Of admin, ann (tenant 1) and ben (tenant 2)."""
    folder: Path
    """The copy of the example that runs."""
    environment: dict[str, str]
    """Of Django's commands."""
    database: harness.Database
    relays: list[harness.Relay]
    start_relay: Callable[[str], harness.Relay]

    @property
    def key(self) -> Path:
        return Path(self.environment["EXAMPLE_KEY_FILE"])

    def manage(self, *arguments: str, **environment: str) -> str:
        """Run one of Django's commands; return all that it says."""
        done = subprocess.run(
            [sys.executable, "-m", "django", *arguments], cwd=self.folder, capture_output=True, text=True,
            env={**self.environment, **environment}, check=False, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@contextlib.contextmanager
def serve() -> Iterator[Site]:
    """Start everything; end everything."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        database = stack.enter_context(stack.enter_context(harness.Server()).fresh_database())
        key, password = folder / "jwt", secrets.token_urlsafe(8)
        key.write_text(secrets.token_hex(32) + "\n")
        database.execute(f"CREATE ROLE relay LOGIN PASSWORD '{password}'")
        example = folder / "example"
        shutil.copytree(EXAMPLE, example)
        (example / "__init__.py").unlink()  # a project, not a package
        schema = subprocess.run([sys.executable, harness.PROGRAM, "schema"], capture_output=True, check=True)
        (example / "shop/migrations/sse_relay.sql").write_bytes(schema.stdout)

        django_port = harness.free_port()
        django = f"127.0.0.1:{django_port}"
        environment = {
            **harness.clean_environment(),
            "DJANGO_SETTINGS_MODULE": "settings",
            "EXAMPLE_DSN": database.dsn,
            "EXAMPLE_KEY_FILE": str(key),
        }
        relay_dsn = make_dsn(database.dsn, user="relay", password=password)

        def start_relay(bind: str) -> harness.Relay:
            options = ("--source", "log", "--jwt-key-file", str(key), "--jwt-cookie", "sse", "--retry", "500")
            return stack.enter_context(harness.Relay(*options, dsn=relay_dsn, bind=bind))

        server = harness.nginx_recipe("server { }") + DJANGO_LOCATION.format(django=django)
        http = harness.nginx_recipe("http { }, several relays").replace("/run/sse-relay", str(folder))
        nginx = stack.enter_context(harness.Nginx(folder, "", http=http, server=server, tls=True))
        site = Site(nginx.url, f"http://{django}", password, example, environment, database, [], start_relay)
        site.manage("migrate", "-v", "0")
        site.manage("shell", "-c", f"PASSWORD = {password!r}\n{PEOPLE}")
        command = [sys.executable, "-m", "django", "runserver", "--noreload", "--insecure", django]
        stack.enter_context(harness.Daemon(command, django_port, example, environment))
        site.relays.extend(start_relay(f"unix:{folder}/{number}.sock") for number in (1, 2))
        yield site


def sign_in(page: harness.Page, name: str, password: str) -> None:
    """Fill in Django's form for signing in, of the site or of its admin."""

    async def fill_in() -> None:
        await page.playwright.fill("[name=username]", name)
        await page.playwright.fill("[name=password]", password)
        async with page.playwright.expect_navigation():
            await page.playwright.press("[name=password]", "Enter")

    page.browser.run(fill_in())


def measure(site: Site, changes: int) -> float:
    """Change rows by SQL and return the median of seconds until a page in Chromium shows it."""
    browser = harness.Browser()
    try:
        with browser.open(url=site.url) as page:
            sign_in(page, "ann", site.password)
            harness.wait_until(lambda: state_of(page) == "live", what="the stream")
            page.evaluate(WATCH)
            delays: list[float] = []
            for number in range(changes):
                state = f"measured {number}"
                began = time.time()
                site.database.execute("UPDATE shop_order SET state = %s WHERE id = 1", (state,))
                when = harness.wait_until(lambda state=state: page.evaluate("(s) => shown[s]", state))  # type: ignore[misc]
                delays.append(when / 1000 - began)
            return statistics.median(delays)
    finally:
        browser.close()


def state_of(page: harness.Page) -> str:
    """What the page says of its stream; "" while it is another page, or none yet."""
    return str(page.evaluate("document.getElementById('state')?.textContent ?? ''"))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--measure",
    "changes",
    type=click.IntRange(1),
    help="Change an order so often, say how long it takes until a page in Chromium shows it, and end.",
)
def main(changes: int | None) -> None:
    """Run the example until Ctrl-C."""
    with serve() as site:
        if changes:
            click.echo(f"median of {changes} changes: {measure(site, changes) * 1000:.1f} ms")
            return
        click.echo(
            f"Open {site.url}/ as ann or ben, and {site.url}/admin/ as admin, in another browser or a\n"
            f"private window. The password of all three is {site.password}. The certificate is the\n"
            "example's own: let the browser pass it.\n\nCtrl-C ends it."
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
