"""Run the example: PostgreSQL, Django, two relays with the durable log, and nginx in front.

python tests/django_example/serve.py
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from sse_relay import apply_schema

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
# Over HTTP/1.1, to see what its six connections mean.
PLAIN_SERVER = """
server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/certificate.pem; ssl_certificate_key {folder}/key.pem;
    {server}
}}
"""
DJANGO_LOCATION = """
location / {{
    proxy_pass http://{django};
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Proto $scheme;
}}
"""


class Site(NamedTuple):
    """The example, running.

    Attributes:
        url: By HTTP/2 and TLS.
        plain_url: By HTTP/1.1 and TLS.
        password: Of admin, ann (tenant 1) and ben (tenant 2).
    """

    url: str
    plain_url: str
    password: str
    key: Path
    database: harness.Database
    relays: list[harness.Relay]
    start_relay: Callable[[str], harness.Relay]


@contextlib.contextmanager
def serve() -> Iterator[Site]:
    """Start everything; end everything."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        database = stack.enter_context(stack.enter_context(harness.Server()).fresh_database())
        apply_schema(database.dsn)
        key, password = folder / "jwt", secrets.token_urlsafe(8)
        key.write_text(secrets.token_hex(32) + "\n")
        django = f"127.0.0.1:{harness.free_port()}"
        environment = {
            **harness.clean_environment(),
            "DJANGO_SETTINGS_MODULE": "settings",
            "EXAMPLE_DSN": database.dsn,
            "EXAMPLE_KEY_FILE": str(key),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        manage = [sys.executable, "-m", "django"]
        for command in (["migrate", "-v", "0"], ["shell", "-c", f"PASSWORD = {password!r}\n{PEOPLE}"]):
            subprocess.run([*manage, *command], cwd=EXAMPLE, env=environment, check=True, timeout=60)
        log = stack.enter_context((folder / "django.log").open("wb"))
        running = subprocess.Popen(
            [*manage, "runserver", "--noreload", "--insecure", django],
            cwd=EXAMPLE, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(running.wait, 10)
        stack.callback(running.terminate)
        harness.wait_until(lambda: answers(running, f"http://{django}/accounts/login/"), 30, "Django")

        def start_relay(bind: str) -> harness.Relay:
            options = ("--source", "log", "--jwt-key-file", str(key), "--jwt-cookie", "sse", "--retry", "500")
            return stack.enter_context(harness.Relay(*options, dsn=database.dsn, bind=bind))

        relays = [start_relay(f"unix:{folder}/{number}.sock") for number in (1, 2)]
        port = harness.free_port()
        server = harness.nginx_recipe("server { }") + DJANGO_LOCATION.format(django=django)
        http = harness.nginx_recipe("http { }, several relays").replace("/run/sse-relay", str(folder))
        http += PLAIN_SERVER.format(port=port, folder=folder, server=server)
        nginx = stack.enter_context(harness.Nginx(folder, "", http=http, server=server, tls=True))
        plain = f"https://127.0.0.1:{port}"
        yield Site(nginx.url, plain, password, key, database, relays, start_relay)


def answers(process: subprocess.Popen[bytes], url: str) -> bool:
    assert process.poll() is None, "Django has ended"
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


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
            page.evaluate(
                "() => { const inner = show; shown = {}; show = (change) => { inner(change);"
                " shown[change.row.state] = Date.now(); }; }"
            )
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
            f"example's own: let the browser pass it. {site.plain_url}/ is the same over HTTP/1.1.\n\n"
            "Ctrl-C ends it."
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
