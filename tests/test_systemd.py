"""The unit files, by the real systemd-analyze; what the relay takes from systemd, and what it says to it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
from harness import RawStream, Relay, SseReader, free_port, wait_until

UNITS = harness.ROOT / "systemd"
INSTALLED_PYTHON = "/opt/sse-relay/venv/bin/python"


def systemd_analyze(*arguments: str) -> str:
    command = [harness.require("systemd-analyze"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of the units, as if the relay were installed: systemd wants the interpreter to be there."""
    folder = tmp_path / "system"
    shutil.copytree(UNITS, folder)
    for unit in folder.glob("*.service"):
        text = unit.read_text()
        assert INSTALLED_PYTHON in text
        unit.write_text(text.replace(f"ExecStart={INSTALLED_PYTHON}", f"ExecStart={sys.executable}"))
    return folder


def unix_only(folder: Path) -> None:
    (folder / "sse-relay.service.d").mkdir()
    shutil.copy(UNITS / "unix-only.conf", folder / "sse-relay.service.d")


@pytest.mark.slow
def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    names = {path.name for path in installed.glob("sse-relay*")}
    assert names == {"sse-relay.service", "sse-relay.socket", "sse-relay@.service", "sse-relay@.socket"}
    units = [str(installed / name) for name in sorted(names)]
    assert systemd_analyze("verify", "--recursive-errors=yes", *units) == ""
    unix_only(installed)
    assert systemd_analyze("verify", "--recursive-errors=yes", str(installed / "sse-relay.service")) == ""


def exposure(unit: Path) -> float:
    report = systemd_analyze("security", "--offline=true", "--threshold=10", "--no-pager", str(unit))
    overall = re.search(r"Overall exposure level for sse-relay\S*\.service: ([\d.]+)", report)
    assert overall, report
    return float(overall[1])


@pytest.mark.slow
def test_the_units_expose_little(installed: Path) -> None:
    assert exposure(installed / "sse-relay.service") <= 1.0
    assert exposure(installed / "sse-relay@.service") <= 1.0
    unix_only(installed)
    assert exposure(installed / "sse-relay.service") <= 0.2


# ==== Sockets =================================================================


def activated(*listen: str, names: str) -> tuple[str, ...]:
    """Return the words that start a program as systemd does, when the first client comes."""
    addresses = [word for address in listen for word in ("--listen", address)]
    return (harness.require("systemd-socket-activate"), *addresses, f"--fdname={names}")


def test_sockets_come_from_systemd_and_the_first_client_waits_in_their_queue(
    start_relay: Callable[..., Relay], database: harness.Database
) -> None:
    streams, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    relay = start_relay(dsn=database.dsn, prefix=activated(streams, admin, names="http:admin"), wait=False)
    relay.wait_for_log("Listening on")
    wait_until(lambda: relay.log.count("Listening on") == 2, what="both sockets")
    with RawStream(streams, "/events/orders") as first:
        first.wait_for(b"id: ")
        relay.wait_for_log(harness.READY)
        database.notify("orders", "hello")
        first.wait_for(b"data: hello")
        with RawStream(admin, "/ready") as ready:
            ready.wait_for(b'"ready": true')
        with RawStream(admin, "/else") as not_there:
            not_there.wait_for(b"/live")
            assert not_there.status == 404
        # --bind is served beside what systemd gives.
        with SseReader(relay.url("orders")) as other:
            assert other.status == 200
    assert relay.stop() == 0


def test_sockets_of_another_process_are_left_alone_and_a_systemd_that_is_gone_is_no_error(
    start_relay: Callable[..., Relay], database: harness.Database, tmp_path: Path
) -> None:
    env = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
    relay = start_relay(dsn=database.dsn, env={**env, "NOTIFY_SOCKET": str(tmp_path / "missing")})
    assert relay.log.count("listening on") == 1
    assert relay.stop() == 0


# ==== What the relay says =====================================================


class NotifySocket:
    """The receiving end of sd_notify, as systemd has it.

    Args:
        address: A path, or ``@`` and a name for a socket without one.
    """

    def __init__(self, address: str) -> None:
        self.env = {"NOTIFY_SOCKET": address}
        self._said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def assignments(self) -> list[str]:
        """Return all that has been said so far, such as ``READY=1``, in order."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._said += self._socket.recv(65536).decode().splitlines()
        return self._said

    def wait_for(self, assignment: str) -> None:
        wait_until(
            lambda: any(said.startswith(assignment) for said in self.assignments()),
            what=f"{assignment} in {self._said}",
        )

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_it_says_when_it_is_ready_and_stops_and_feeds_no_watchdog_of_another_process(
    start_relay: Callable[..., Relay], database: harness.Database, tmp_path: Path, abstract: bool
) -> None:
    address = f"@sse-relay-{secrets.token_hex(8)}" if abstract else str(tmp_path / "notify")
    with contextlib.closing(NotifySocket(address)) as systemd:
        env = {**systemd.env, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}
        relay = start_relay(dsn=database.dsn, env=env, wait=False)
        systemd.wait_for("READY=1")
        systemd.wait_for("STATUS=")
        assert {"STOPPING=1", "WATCHDOG=1"}.isdisjoint(systemd.assignments())
        assert relay.stop() == 0
        assert systemd.assignments()[-1] == "STOPPING=1"


# ==== Log =====================================================================


def test_a_terminal_gets_times_even_below_a_service(
    start_relay: Callable[..., Relay], database: harness.Database
) -> None:
    status = os.stat(os.devnull)  # noqa: PTH116  # the pair that systemd would name
    env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    line = start_relay(dsn=database.dsn, env=env).wait_for_log("ready")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ready", line)
