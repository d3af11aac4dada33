"""Fixtures; what they are made of stands in harness.py."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness

# What drives a browser, Node.js, a relay in a process of its own, or a server that starts for the test.
SLOW_FIXTURES = {"browser", "node_modules", "own_server", "start_relay", "standing"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count tests by what they drive among the slow ones."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """No variable of the caller may configure libpq or the relay."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - harness.clean_environment().keys():
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[harness.Server]:
    """A PostgreSQL for the whole run. Tests that stop or restart it use ``own_server``."""
    with harness.Server() as running:
        yield running


@pytest.fixture
def database(server: harness.Server, request: pytest.FixtureRequest) -> Iterator[harness.Database]:
    """A database of the test's own on the shared server."""
    with server.fresh_database(log="log_database" in request.fixturenames) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def standing_database(server: harness.Server) -> Iterator[harness.Database]:
    """A database for tests of one module that leave nothing behind in it."""
    with server.fresh_database() as fresh:
        yield fresh


@pytest.fixture(scope="session", params=harness.postgres_versions())
def each_server(request: pytest.FixtureRequest) -> Iterator[harness.Server]:
    """A PostgreSQL of each version that is here, for what they do differently."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGBIN", str(harness.postgres_versions()[request.param]))
        running = harness.Server()
        running.start()
    with contextlib.closing(running):
        yield running


@pytest.fixture
def each_database(each_server: harness.Server, request: pytest.FixtureRequest) -> Iterator[harness.Database]:
    """A database of the test's own, on each version."""
    with each_server.fresh_database(log="each_log_database" in request.fixturenames) as fresh:
        yield fresh


@pytest.fixture
def log_database(database: harness.Database) -> harness.Database:
    return database


@pytest.fixture
def each_log_database(each_database: harness.Database) -> harness.Database:
    """The same on each version."""
    return each_database


@pytest.fixture
def own_server() -> Iterator[harness.Server]:
    """A PostgreSQL of the test's own, to stop, restart and freeze; takes some 0.7 s."""
    with harness.Server() as running:
        yield running


@pytest.fixture
def start_relay() -> Iterator[Callable[..., harness.Relay]]:
    """Start relays (arguments: `harness.Relay`) that end with the test; their logs show if it fails."""
    relays: list[harness.Relay] = []

    def start(*options: str, **how: object) -> harness.Relay:
        relay = harness.Relay(*options, **how)  # type: ignore[arg-type]  # passed through as given
        relays.append(relay)
        return relay

    with contextlib.ExitStack() as stack:
        yield start
        for relay in relays:
            stack.callback(relay.close)
        for number, relay in enumerate(relays):
            print(f"---- relay {number} ({relay.bind})", relay.log, sep="\n")  # noqa: T201  # shown on failure


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which every user may make files; pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.fixture
def relay(start_relay: Callable[..., harness.Relay], database: harness.Database) -> harness.Relay:
    return start_relay(dsn=database.dsn)


@pytest.fixture(scope="session")
def browser() -> Iterator[harness.Browser]:
    running = harness.Browser()
    yield running
    running.close()


@pytest.fixture(scope="module")
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def page(browser: harness.Browser) -> Iterator[harness.Page]:
    """A page whose origin is another port than the relays'."""
    with browser.open() as opened:
        yield opened


@pytest.fixture(scope="session")
def node_modules(request: pytest.FixtureRequest) -> Path:
    """The folder with the packages from npm, kept in pytest's cache."""
    return harness.install_node_modules(request.config.cache.mkdir("node"))
