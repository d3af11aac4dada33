"""The README's first page and the tutorial that goes on with it, typed into a new Django project."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2.errors
import pytest

import harness
from django_example.serve import sign_in, state_of
from harness import Browser, Database, Page, Relay, wait_until
from pages import FENCE, blocks, pages
from sites import django_databases

pytestmark = pytest.mark.slow

FILE_NAME = re.compile(r"(?:#|<!--) ([\w./]+\.\w+)(, at its end)?(?: -->)?\n")
# Servers, packages and folders are the tests' own.
LEFT_OUT = re.compile(r"su - |mkdir |python3 -m venv|\.venv/bin/pip |.* runserver$|.*sse_relay\.py --")
OURS = {
    "../sse-relay": str(harness.ROOT),
    "$RELAY/.venv/bin/python": sys.executable,
    "$RELAY": str(harness.ROOT),
    ".venv/bin/python": sys.executable,
    ".venv/bin/django-admin": f"{sys.executable} -m django",
}
# In one pass: what takes a place may look like what is printed elsewhere.
PRINTED = re.compile("|".join(map(re.escape, OURS)))


def type_in(text: str, folder: Path, database: Database, relay: str) -> None:
    """Do in a folder what a page says: write its files and run its commands, in their order."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            lines = "\n".join(line for line in block.splitlines() if not LEFT_OUT.match(line))
            command = ["bash", "-ec", PRINTED.sub(lambda printed: OURS[printed[0]], lines)]
            env = {**harness.clean_environment(), "PYTHONWARNINGS": "error"}
            subprocess.run(command, cwd=folder, env=env, check=True, timeout=90)
        elif name := FILE_NAME.match(block):
            target = folder / name[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            before = target.read_text() if name[2] else ""
            after = django_databases(database) if name[2] else ""
            target.write_text(before + block.replace("localhost:8008", relay) + after)


@pytest.fixture
def project(tmp_path: Path, relay: Relay, database: Database) -> Path:
    text = pages()["README.md"].partition("\n## Your first page\n")[2].partition("\nOther languages")[0]
    type_in(text, tmp_path, database, relay.bind.replace("127.0.0.1", "localhost"))
    return tmp_path


@contextlib.contextmanager
def runserver(project: Path, port: int) -> Iterator[str]:
    with harness.Daemon([sys.executable, "manage.py", "runserver", "--noreload", str(port)], port, project):
        yield f"http://localhost:{port}"


def wait_shown(page: Page, text: str) -> None:
    wait_until(lambda: page.evaluate("document.querySelector('ul').innerText.trim()") == text, 20, text)


def test_the_first_page_does_what_the_readme_says(
    project: Path, relay: Relay, database: Database, browser: Browser, start_relay: Callable[..., Relay]
) -> None:
    with (
        runserver(project, harness.free_port()) as site,
        browser.open(url=f"{site}/live") as one,
        browser.open(url=f"{site}/live") as other,
    ):
        for page in (one, other):
            wait_shown(page, "order 1: new\norder 2: new")
        one.evaluate("document.querySelector('li').click()")
        for page in (one, other):
            wait_shown(page, "order 1: paid\norder 2: new")

        relay.close()
        database.execute("UPDATE shop_order SET state = 'paid' WHERE id = 2")
        start_relay(dsn=database.dsn, bind=relay.bind)
        for page in (one, other):
            wait_shown(page, "order 1: paid\norder 2: paid")


def test_the_tutorial_goes_on_from_there(
    project: Path, relay: Relay, database: Database, browser: Browser, start_relay: Callable[..., Relay]
) -> None:
    relay.close()
    with contextlib.suppress(psycopg2.errors.DuplicateObject):
        database.execute("CREATE ROLE relay")
    type_in(pages()["docs/django.md"], project, database, relay.bind.replace("127.0.0.1", "localhost"))
    port = harness.free_port()
    (line,) = (
        line
        for found in blocks("sh", "docs/django.md")
        for line in found.text.splitlines()
        if "sse_relay.py --source" in line
    )
    options = shlex.split(line.replace("../shop-site", str(project)).replace(":8000", f":{port}"))[2:]
    at = options.index("--dsn")
    start_relay(*options[:at], *options[at + 2 :], dsn=database.dsn, bind=relay.bind)
    with runserver(project, port) as site, browser.open(url=f"{site}/") as page:
        sign_in(page, "ann", "ann")
        wait_until(lambda: state_of(page) == "live", 20, "the stream")
        wait_shown(page, "tea: new")
        database.execute("UPDATE shop_order SET state = 'paid' WHERE tenant_id = 7")
        wait_shown(page, "tea: paid")
