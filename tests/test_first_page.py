"""The README's first page, typed into a new Django project, in two windows of Chromium."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness
from harness import Browser, Database, Page, Relay, wait_until
from pages import blocks
from sites import django_databases, serving

FILE_NAME = re.compile(r"(?:#|<!--) ([\w./]+\.\w+)(?:, at its end)?(?: -->)?\n")


def printed_files() -> dict[str, str]:
    """Return the files that the README shows, by their paths."""
    found = [block.text for language in ("python", "html") for block in blocks(language, "README.md")]
    named = {match[1]: text for text in found if (match := FILE_NAME.match(text))}
    assert len(named) == len(found) == 5
    return named


def manage(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-W", "error", "manage.py", *arguments]
    subprocess.run(command, cwd=folder, env=harness.clean_environment(), check=True, timeout=60)


def write_project(folder: Path, database: Database, relay: str) -> None:
    """Write what Django's own commands begin with, and into it what the README shows."""
    for command in (["startproject", "project", "."], ["startapp", "shop"]):
        subprocess.run([sys.executable, "-m", "django", *command], cwd=folder, check=True, timeout=60)
    files = printed_files()
    settings = folder / "project/settings.py"
    files["project/settings.py"] = (
        settings.read_text() + files["project/settings.py"] + django_databases(database)
    )
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("localhost:8008", relay))
    manage(folder, "makemigrations", "shop")
    manage(folder, "migrate")


@pytest.fixture
def site(tmp_path: Path, relay: Relay, database: Database) -> Iterator[str]:
    """The address of ``runserver`` with the README's page."""
    write_project(tmp_path, database, relay.bind.replace("127.0.0.1", "localhost"))
    port = harness.free_port()
    command = [sys.executable, "manage.py", "runserver", "--noreload", str(port)]
    with serving(command, f"http://localhost:{port}/states", tmp_path):
        yield f"http://localhost:{port}"


def wait_shown(page: Page, text: str) -> None:
    wait_until(lambda: page.evaluate("document.querySelector('ul').innerText") == text, 20, text)


@pytest.mark.slow
def test_the_first_page_does_what_the_readme_says(
    site: str, relay: Relay, database: Database, browser: Browser, start_relay: Callable[..., Relay]
) -> None:
    for _ in range(2):
        database.execute("INSERT INTO shop_order (item, state) VALUES ('tea', 'new')")
    with browser.open(url=f"{site}/live") as one, browser.open(url=f"{site}/live") as other:
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
