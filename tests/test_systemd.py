"""The unit file, read by the real systemd-analyze, and what the relay says to systemd."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness

UNIT = harness.ROOT / "systemd" / "sse-relay.service"
INSTALLED_PYTHON = "/opt/sse-relay/venv/bin/python"


def systemd_analyze(*arguments: str) -> str:
    """Run systemd-analyze and return all that it prints."""
    command = [harness.require("systemd-analyze"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    # systemd wants the interpreter to be there, which it is on a machine where the relay is installed.
    unit = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert INSTALLED_PYTHON in text
    unit.write_text(text.replace(f"ExecStart={INSTALLED_PYTHON}", f"ExecStart={sys.executable}"))
    assert systemd_analyze("verify", "--recursive-errors=yes", str(unit)) == ""


def test_the_unit_exposes_little() -> None:
    report = systemd_analyze("security", "--offline=true", "--threshold=10", "--no-pager", str(UNIT))
    overall = re.search(r"Overall exposure level for sse-relay\.service: ([\d.]+)", report)
    assert overall, report
    assert float(overall[1]) <= 1.0, report


class NotifySocket:
    """The receiving end of sd_notify, as systemd has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def assignments(self) -> list[str]:
        """Return all that has been said so far, such as ``READY=1``, in order."""
        while True:
            try:
                self.messages.append(self._socket.recv(65536).decode())
            except BlockingIOError:
                return "\n".join(self.messages).splitlines()

    def wait_for(self, assignment: str) -> None:
        harness.wait_until(lambda: assignment in self.assignments(), what=f"{assignment} in {self.messages}")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notify_socket(tmp_path: Path) -> Iterator[NotifySocket]:
    notified = NotifySocket(tmp_path / "notify")
    yield notified
    notified.close()


def test_it_says_when_it_is_ready_and_when_it_stops(
    start_relay: Callable[..., harness.Relay], database: harness.Database, notify_socket: NotifySocket
) -> None:
    relay = start_relay(dsn=database.dsn, env={"NOTIFY_SOCKET": str(notify_socket.path)}, wait=False)
    notify_socket.wait_for("READY=1")
    assert "STOPPING=1" not in notify_socket.assignments()
    assert relay.stop() == 0
    assert notify_socket.assignments()[-1] == "STOPPING=1"


def test_it_is_not_ready_while_postgresql_is_away(
    start_relay: Callable[..., harness.Relay], own_server: harness.Server, notify_socket: NotifySocket
) -> None:
    own_server.stop()
    relay = start_relay(dsn=own_server.dsn, env={"NOTIFY_SOCKET": str(notify_socket.path)}, wait=False)
    harness.wait_until(lambda: "PostgreSQL" in relay.log, what="word of the missing PostgreSQL")
    assert "READY=1" not in notify_socket.assignments()
    own_server.start()
    notify_socket.wait_for("READY=1")


def test_it_runs_where_nobody_listens_to_sd_notify(
    start_relay: Callable[..., harness.Relay], database: harness.Database, tmp_path: Path
) -> None:
    relay = start_relay(dsn=database.dsn, env={"NOTIFY_SOCKET": str(tmp_path / "missing")})
    assert relay.stop() == 0
