"""The service in a truly booted systemd, installed by the docs' steps.

Needs root, for namespaces and an overlay of the file system. The booted system sees the machine's programs;
what it writes is gone with it. It has no network, and reaches PostgreSQL by a unix socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg2.extensions
import pytest

import harness
import pages
from harness import Database, RawStream, Server, SseReader, wait_until
from sse_relay import SCHEMA_SQL

# A boot, an installation from the package index, and limits of the watchdog that must pass.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Arguments: a folder to work in; pairs FROM:TO of folders that the new system sees, too.
BOOT = """
set -e
work=$1; shift
mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cd "$work/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
for pair; do
    mkdir -p "./${pair#*:}"
    mount --bind "${pair%%:*}" "./${pair#*:}"
done
# The kernel is not this system's own.
for unit in systemd-sysctl systemd-udevd systemd-modules-load; do
    ln -sf /dev/null etc/systemd/system/$unit.service
done
mkdir -p mnt
pivot_root . mnt
umount -l mnt
mount --make-rshared /
exec env -i container=sse-relay PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    /lib/systemd/systemd --unit=basic.target --show-status=0 --log-target=journal
"""
NAMESPACES = ("--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--uts", "--ipc", "--net", "--cgroup")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
DATABASE_FOLDER = "/run/test-postgresql"
OPTIONS = "/etc/sse-relay/options"
KEYS = "/etc/sse-relay/keys"
TEST_OPTIONS = ("SSE_RELAY_SOURCE=log", "SSE_RELAY_RETRY=100", "SSE_RELAY_ALLOW_CHANNEL=public-* news orders")


class Machine(harness.Closing):
    """A booted systemd of the test's own.

    Args:
        folders: Those that it sees beside what is in the root file system, by their name there.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        if os.geteuid() != 0:
            harness.missing("booting a systemd needs root")
        for program in ("unshare", "nsenter", "systemctl"):
            harness.require(program)
        name = f"sse-relay-{os.getpid()}-{time.monotonic_ns()}"
        roots = [Path("/sys/fs/cgroup", part) for part in ("systemd", "unified", ".")]
        self._groups = [root / name for root in roots if (root / "cgroup.procs").exists()]
        self._folder = Path(tempfile.mkdtemp())
        for group in self._groups:
            group.mkdir()
        procs = " ".join(str(group / "cgroup.procs") for group in self._groups)
        enter = f'for file in {procs}; do echo $$ >"$file"; done; exec unshare "$@"'
        pairs = [f"{there}:{here}" for here, there in folders.items()]
        self._process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *NAMESPACES, "sh", "-c", BOOT, "sh", str(self._folder), *pairs],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self.pid = wait_until(self._child, 10, "the new system's first process")
            wait_until(self._is_up, 30, "the boot")
        except BaseException:
            self.close()
            raise

    def _child(self) -> int:
        task = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            harness.missing(f"no systemd can be booted here: {self._process.stdout.read().decode()[-500:]}")
        return int((Path(task).read_text().split() or ["0"])[0])

    def _is_up(self) -> bool:
        assert self._child()
        state = self.run("systemctl", "is-system-running", check=False)
        return state.strip() in ("running", "degraded")

    def run(self, *command: str, network: bool = False, check: bool = True) -> str:
        """Run a command in the new system, in the repository; return what it printed.

        Args:
            network: Let it use the network of the machine.
        """
        spaces = ["--mount", "--pid", "--uts", "--ipc", *([] if network else ["--net"])]
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", *spaces, f"--wd={self.path(harness.ROOT)}", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=240,
            # The system's own Python: one in somebody's home is out of the service's reach.
            env={**harness.clean_environment(), "PATH": SYSTEM_PATH},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr + self.journal()
        return done.stdout

    def path(self, path: str | Path) -> Path:
        """Return the path by which this machine reaches a file of the new system."""
        return Path(f"/proc/{self.pid}/root{path}")

    def show(self, what: str, unit: str = "sse-relay") -> str:
        return self.run("systemctl", "show", "--value", f"--property={what}", unit).strip()

    def journal(self, *options: str) -> str:
        """Return what the service has logged, and systemd about it."""
        return self.run("journalctl", "--no-pager", "-u", "sse-relay", "-o", "cat", *options, check=False)

    def drop_in(self, name: str, text: str) -> None:
        """Change the service by ``systemctl edit``'s way."""
        folder = self.path("/etc/systemd/system/sse-relay.service.d")
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.conf").write_text(text)
        self.run("systemctl", "daemon-reload")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        for group in self._groups:
            wait_until(lambda group=group: remove_groups(group), 10, "the end of its processes")  # type: ignore[misc]  # a default
        self._folder.rmdir()


def remove_groups(group: Path) -> bool:
    try:
        for folder, _, _ in os.walk(group, topdown=False):
            Path(folder).rmdir()
    except OSError:
        return False
    return True


@dataclass
class Site:
    """The new system with the relay, and its PostgreSQL outside."""

    machine: Machine
    server: Server
    database: Database
    address: str
    """Of the streams, in the form of --bind, for this machine."""

    def publish(self, *events: object, channel: str = "orders") -> None:
        for event in events:
            self.database.execute("SELECT sse_relay.publish(%s, %s::text)", (channel, str(event)))

    def set_options(self, *lines: str) -> None:
        """Write the file of options: what the docs print, what the tests need, and these lines."""
        printed = pages.block("ini", "# /etc/sse-relay/options")
        text = "\n".join([*printed.splitlines(), *TEST_OPTIONS, *lines, ""])
        self.machine.path(OPTIONS).write_text(text)

    def token(self, *globs: str, key: str = f"{KEYS}/first") -> str:
        command = "cd /opt/sse-relay && venv/bin/python sse_relay.py token --key-file"
        return self.machine.run("sh", "-c", f"{command} {key} {' '.join(globs)}").strip()

    def opens(self, token: str) -> bool:
        headers = {"Accept": "*/*", "Authorization": f"Bearer {token}"}
        with RawStream(self.address, "/events/closed", headers=headers) as client:
            wait_until(lambda: b"\r\n\r\n" in client.raw, 10, "an answer")
            return client.status == 200

    def wait_active(self) -> None:
        self.wait_shown("ActiveState", "active", 30)

    def wait_shown(self, what: str, start: str, timeout: float = 20.0) -> None:
        """Wait until systemd shows of the service what begins so."""
        wait_until(lambda: self.machine.show(what).startswith(start), timeout, f"{what}={start}")

    def restart(self, *options: str) -> None:
        self.set_options(*options)
        self.machine.run("systemctl", "restart", "sse-relay")

    def serves(self, address: str | None = None) -> None:
        """Follow a stream until an event has come by it."""
        with RawStream(address or self.address, "/events/orders") as client:
            client.wait_for(b"id: ")
            self.publish("hello")
            client.wait_for(b"data: hello")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Install the relay as the docs do, with source log and a watchdog that bites soon."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        sockets = Path(name)
        sockets.chmod(0o777)
        server = stack.enter_context(Server(unix_socket_directories=name))
        with contextlib.closing(server.database.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(SCHEMA_SQL)
        folders = {str(harness.ROOT): harness.ROOT, DATABASE_FOLDER: sockets}
        machine = stack.enter_context(Machine(folders))
        dsn = psycopg2.extensions.make_dsn(server.dsn, host=DATABASE_FOLDER)
        block = pages.block("sh", "python3 -m venv /opt/sse-relay/venv")
        assert '"postgresql://relay:$PASSWORD@localhost/app"' in block
        block = block.replace('"postgresql://relay:$PASSWORD@localhost/app"', f'"{dsn}"')
        network, _, here = block.partition("install -m 644 sse_relay.py")
        machine.run("bash", "-ec", network, network=True)
        machine.run("bash", "-ec", "install -m 644 sse_relay.py" + here)
        machine.drop_in("test", "[Unit]\nAfter=\n[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n")
        address = f"unix:{machine.path('/run/sse-relay/http.sock')}"
        site = Site(machine, server, server.database, address)
        site.set_options()
        machine.run("bash", "-ec", pages.block("sh", "systemctl daemon-reload"))
        yield site


def test_it_is_installed_by_the_docs_and_tells_its_status(site: Site) -> None:
    site.wait_active()
    status = site.machine.run("systemctl", "status", "--no-pager", "sse-relay")
    assert "Active: active (running)" in status
    assert re.search(r'Status: "\d+ clients?, \d+ channels?, \d+ events?"', status)
    assert "TriggeredBy: ● sse-relay.socket" in status
    site.serves()
    with RawStream(site.address, "/events/orders"):
        site.wait_shown("StatusText", "1 client, 1 channel")


def test_it_runs_as_a_user_of_its_own_that_can_read_the_secret_alone(site: Site) -> None:
    assert site.machine.show("DynamicUser") == "yes"
    user = site.machine.run("ps", "-o", "uid=", "-p", site.machine.show("MainPID")).strip()
    assert int(user) >= 61184, "systemd's range of dynamic users"
    assert site.machine.run("stat", "-c", "%a %U", "/etc/sse-relay/dsn").strip() == "600 root"
    assert "password" not in site.machine.run("ps", "-ef")


def test_the_journal_knows_severities(site: Site) -> None:
    site.wait_active()
    site.database.terminate_backends()
    wait_until(lambda: "lost PostgreSQL" in site.machine.journal("--priority=warning"), 10, "a warning")
    assert "connected to PostgreSQL" not in site.machine.journal("--priority=warning")
    assert "connected to PostgreSQL" in site.machine.journal("--priority=info")


NGINX_FILES = (
    "/etc/nginx/conf.d/sse-relay.conf",
    "/etc/nginx/snippets/sse-relay.conf",
    "/etc/nginx/sites-enabled/app.example",
)


def test_the_path_of_the_docs_ends_with_a_public_address(site: Site) -> None:
    site.restart()
    token = pages.block("sh", "TOKEN=$(/opt").replace("curl", "timeout 3 curl").replace("orders", "closed")
    assert "id: " in site.machine.run("bash", "-c", f"{token}true")

    site.machine.run("bash", "-ec", pages.block("sh", "openssl req -x509"))
    for name in NGINX_FILES:
        site.machine.path(name).write_text(pages.block("nginx", f"# {name}"))
    site.machine.run("bash", "-ec", "echo 127.0.0.1 app.example >> /etc/hosts; systemctl start nginx")
    check = pages.block("sh", "nginx -t && systemctl reload nginx").rstrip()
    found = json.loads(
        site.machine.run("bash", "-ec", f"{check} --ca-file /etc/ssl/app.example.pem --json 2>/dev/null")
    )
    site.machine.run("systemctl", "stop", "nginx")
    # A superuser owns the log here, and what a restart looks like shows only while the relay is away.
    others = {finding["check"]: finding["level"] for finding in found["findings"] if finding["level"] != "ok"}
    assert others == {"owner": "warning", "restart": "unknown"}, found


# ==== Restart =================================================================


class Native(harness.Closing):
    """A client that comes back as a browser's EventSource does, until it is refused for good."""

    def __init__(self, site: Site, channel: str = "orders", token: str = "") -> None:
        self.readers: list[SseReader] = []
        self.failed: list[Exception] = []
        self._path = site.address.removeprefix("unix:")
        self._url = f"http://relay/events/{channel}"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._closing.is_set() and "relay.refused" not in self.names:
            try:
                reader = SseReader(self._url, self._headers, last_event_id=self.last_id, unix=self._path)
            except Exception as error:
                self.failed.append(error)
                continue
            self.readers.append(reader)
            while not reader.ended and not self._closing.wait(0.1):
                pass
            reader.close()

    @property
    def names(self) -> list[str]:
        """The events' names; "message" where they have none."""
        return [event.event for reader in self.readers for event in reader.events]

    @property
    def data(self) -> list[str]:
        return [data for reader in self.readers for data in reader.data]

    @property
    def last_id(self) -> str:
        return next((reader.last_event_id for reader in reversed(self.readers) if reader.last_event_id), "")

    def close(self) -> None:
        self._closing.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def natives(site: Site, count: int, *how: str) -> Iterator[list[Native]]:
    """Many of them, once each has a position."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Native(site, *how)) for _ in range(count)]
        wait_until(lambda: all(native.last_id for native in made), 20, f"{count} clients")
        yield made


def test_a_restart_refuses_nobody_and_loses_nothing(site: Site) -> None:
    site.wait_active()
    with natives(site, 50) as clients:
        for restart in range(3):
            site.publish(*range(restart * 10, restart * 10 + 5))
            if restart == 1:  # an upgrade; its packages are there already
                block = pages.block("sh", "/opt/sse-relay/venv/bin/pip install --upgrade")
                site.machine.run("bash", "-ec", block.partition("\n")[2])
            else:
                site.machine.run("systemctl", "restart", "sse-relay")
            site.publish(*range(restart * 10 + 5, restart * 10 + 10))
            wait_until(
                lambda restart=restart: all(len(native.readers) >= restart + 2 for native in clients),  # type: ignore[misc]
                30, "all clients to come back",
            )  # fmt: skip
        site.publish("end")
        wait_until(lambda: all(native.data[-1:] == ["end"] for native in clients), 20, "the last event")
        for native in clients:
            assert native.failed == []
            assert native.data == [*map(str, range(30)), "end"]
            assert set(native.names) == {"message"}


# ==== Watchdog ================================================================


def test_the_watchdog_restarts_a_relay_whose_loop_is_blocked(site: Site) -> None:
    site.wait_active()
    before = site.machine.show("MainPID")
    site.machine.run("kill", f"-{signal.SIGSTOP.value}", before)
    wait_until(lambda: site.machine.show("MainPID") not in ("0", before), 30, "another relay")
    site.wait_active()
    assert "Watchdog timeout" in site.machine.journal()
    site.serves()


def test_a_relay_whose_postgresql_is_away_is_left_alone(site: Site) -> None:
    site.wait_active()
    before, restarts = site.machine.show("MainPID"), site.machine.show("NRestarts")
    with RawStream(site.address, "/events/orders") as client:
        client.wait_for(b"id: ")
        site.server.stop()
        site.wait_shown("StatusText", "waiting for PostgreSQL")
        time.sleep(6)  # twice what the watchdog waits for
        assert (site.machine.show("MainPID"), site.machine.show("NRestarts")) == (before, restarts)
        assert not client.ended
        site.server.start()
        wait_until(lambda: " channel" in site.machine.show("StatusText"), 20, "PostgreSQL")
        site.publish("back")
        client.wait_for(b"data: back")
    assert site.machine.show("MainPID") == before


def test_a_database_that_comes_late_is_no_failed_start(site: Site) -> None:
    site.wait_active()
    site.server.stop()
    site.machine.drop_in("late", "[Service]\nTimeoutStartSec=5\n")
    site.machine.run("systemctl", "--no-block", "restart", "sse-relay")
    site.wait_shown("ActiveState", "activating")
    site.wait_shown("StatusText", "waiting for PostgreSQL")
    restarts = site.machine.show("NRestarts")
    time.sleep(6)  # more than TimeoutStartSec allows by itself
    assert site.machine.show("ActiveState") == "activating"
    site.server.start()
    site.wait_active()
    assert site.machine.show("NRestarts") == restarts


# ==== Keys ====================================================================


def test_a_secret_is_changed_by_restarts_that_cost_no_client_an_error(site: Site) -> None:
    site.restart()
    site.wait_active()
    assert site.machine.run("stat", "-c", "%a %U", f"{KEYS}/first").strip() == "600 root"
    first = site.token("closed")
    assert site.opens(first)
    assert not site.opens("")
    add = pages.block("sh", "# A second secret beside the first")
    remove = pages.block("sh", "# The second secret alone")
    with natives(site, 50, "closed", first) as clients:
        site.publish(1, channel="closed")
        site.machine.run("bash", "-ec", add)
        site.publish(2, channel="closed")
        wait_until(lambda: all(native.data == ["1", "2"] for native in clients), 20, "both events")
        assert all(len(native.readers) >= 2 and not native.failed for native in clients)
        second = site.token("closed", key=f"{KEYS}/second")
        assert site.opens(first)
        assert site.opens(second)
        site.machine.run("bash", "-ec", remove)
        assert site.opens(second)
        assert not site.opens(first)
        # They have had their hour: they are told so, and that is no error of the connection.
        wait_until(lambda: all(native.names[-1:] == ["relay.refused"] for native in clients), 20, "a word")
        assert not any(native.failed for native in clients)
    site.machine.run("bash", "-ec", f"mv {KEYS}/second {KEYS}/first")
    site.restart()


def test_a_reload_claims_no_new_secret(site: Site) -> None:
    site.wait_active()
    old, before = site.token("closed"), site.machine.show("MainPID")
    site.machine.run("bash", "-ec", f"openssl rand -hex 32 > {KEYS}/first; systemctl reload sse-relay")
    wait_until(lambda: "keys are unchanged" in site.machine.journal(), 10, "the reload")
    assert site.opens(old)
    assert not site.opens(site.token("closed"))
    site.machine.run("systemctl", "restart", "sse-relay")
    assert not site.opens(old)
    assert site.opens(site.token("closed"))
    assert site.machine.show("MainPID") != before


def test_public_keys_are_changed_by_a_reload(site: Site) -> None:
    site.wait_active()
    make = "cd /etc/sse-relay; openssl ecparam -name prime256v1 -genkey -noout -out {0}.key;"
    make += "openssl pkey -in {0}.key -pubout -out {0}.pem"
    for name in ("app", "app-2027"):
        site.machine.run("bash", "-ec", make.format(name))
    site.machine.run("bash", "-ec", "chmod 644 /etc/sse-relay/*.pem")
    site.set_options(*pages.block("ini", "# In /etc/sse-relay/options").splitlines()[1:])
    site.machine.run("bash", "-ec", pages.block("sh", "# Two files with the same public key"))
    old, new = (site.token("closed", key=f"/etc/sse-relay/{name}.key") for name in ("app", "app-2027"))
    assert site.opens(old)
    assert not site.opens(new)
    before = site.machine.show("MainPID")
    with RawStream(site.address, "/events/orders") as client:
        client.wait_for(b"id: ")
        change = pages.block("sh", "# A second public key beside the first")
        site.machine.run("bash", "-ec", f"cd /etc/sse-relay; {change}")
        wait_until(lambda: site.opens(new), 10, "the new key")
        assert site.opens(old)
        change = pages.block("sh", "# The second public key alone")
        site.machine.run("bash", "-ec", f"cd /etc/sse-relay; {change}")
        wait_until(lambda: not site.opens(old), 10, "the end of the old key")
        assert site.opens(new)
        assert not client.ended
    assert site.machine.show("MainPID") == before
    assert "1 of 2 keys are new" in site.machine.journal()
    site.restart()


# ==== What cannot work ========================================================

# What makes it so; what fixes it.
MISTAKES = {
    "an option": (f"echo SSE_RELAY_HEARTBEAT=soon >> {OPTIONS}", f"sed -i /HEARTBEAT/d {OPTIONS}"),
    "a key": (f"mv {KEYS}/first {KEYS}/other", f"mv {KEYS}/other {KEYS}/first"),
    "no keys": (f"mv {KEYS} {KEYS}.away", f"mv {KEYS}.away {KEYS}"),
    "no options": (f"mv {OPTIONS} {OPTIONS}.away", f"mv {OPTIONS}.away {OPTIONS}"),
    "no DSN": (
        "mv /etc/sse-relay/dsn /etc/sse-relay/dsn.away",
        "mv /etc/sse-relay/dsn.away /etc/sse-relay/dsn",
    ),
    "no program": ("mv /opt/sse-relay/venv /opt/sse-relay/v", "mv /opt/sse-relay/v /opt/sse-relay/venv"),
}


def forget_activations(site: Site) -> None:
    """Let systemd begin to count anew, as it does after the units' TriggerLimitIntervalSec."""
    site.machine.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_work_closes_the_socket_and_nginx_answers(
    site: Site, mistake: str, tmp_path: Path
) -> None:
    site.wait_active()
    site.set_options()
    spoil, fix = MISTAKES[mistake]

    def asked() -> str:
        return httpx.get(f"{nginx.url}/events/orders", headers={"Accept": "text/event-stream"}).text

    with harness.Nginx(tmp_path, site.address) as nginx:
        site.machine.run("bash", "-ec", f"{spoil}; systemctl restart sse-relay || true")
        wait_until(lambda: asked() == "retry: 2000\n\n", 20, "nginx's answer")
        wait_until(
            lambda: site.machine.show("ActiveState", "sse-relay.socket") in ("inactive", "failed"),
            20, "the end of the socket",
        )  # fmt: skip
        assert site.machine.show("ActiveState") in ("failed", "inactive")
        assert asked() == "retry: 2000\n\n"
        forget_activations(site)
        site.machine.run("bash", "-ec", f"{fix}; systemctl start sse-relay")
        with RawStream(nginx.address, "/events/orders") as client:
            client.wait_for(b"id: ")


def test_a_database_that_refuses_is_tried_every_few_seconds(site: Site) -> None:
    site.wait_active()
    forget_activations(site)
    dsn = site.machine.path("/etc/sse-relay/dsn")
    good = dsn.read_text()
    dsn.write_text(good.replace("user=postgres", "user=nobody"))
    restarts = int(site.machine.show("NRestarts"))
    site.machine.run("systemctl", "--no-block", "restart", "sse-relay")
    wait_until(lambda: int(site.machine.show("NRestarts")) in (0, 1), 20, "the first start")
    began = time.monotonic()
    for _ in range(2):
        with RawStream(site.address, "/events/orders") as client:
            client.wait_for(b"retry: ", 15)
            client.wait_for_end(15)
    wait_until(lambda: int(site.machine.show("NRestarts")) >= 2, 20, "two restarts")
    assert time.monotonic() - began > 2, restarts
    dsn.write_text(good)
    site.wait_active()
    site.serves()


# ==== Several relays, one network less ========================================


def test_relays_by_number_have_the_options_too(site: Site) -> None:
    site.set_options()
    site.machine.run(
        "bash", "-ec", pages.block("sh", "systemctl disable --now sse-relay.socket sse-relay.service")
    )
    token = site.token("closed")
    for number in (1, 2):
        unit = f"sse-relay@{number}"
        wait_until(lambda unit=unit: site.machine.show("ActiveState", unit) == "active", 20, unit)  # type: ignore[misc]  # a default
        socket = site.machine.path(f"/run/sse-relay/{number}.sock")
        instance = Site(site.machine, site.server, site.database, f"unix:{socket}")
        assert instance.opens(token)
        assert not instance.opens("")
        site.serves(instance.address)
        ready = f"curl -sS http://127.0.0.1:801{number}/ready"
        wait_until(lambda ready=ready: '"ready": true' in site.machine.run("sh", "-c", ready), 10, ready)  # type: ignore[misc]  # a default
    site.machine.run("rm", OPTIONS)
    broken = site.machine.run("sh", "-c", "systemctl restart sse-relay@1 2>&1; true")
    assert "Assertion failed" in broken
    site.set_options()
    site.machine.run(
        "bash", "-ec",
        "systemctl disable --now sse-relay@{1,2}.socket sse-relay@{1,2}.service;"
        "systemctl enable --now sse-relay.socket sse-relay.service",
    )  # fmt: skip


def test_it_works_without_any_network_but_unix_sockets(site: Site) -> None:
    site.set_options("SSE_RELAY_ADMIN=unix:/run/sse-relay-admin/http.sock")
    site.machine.run("bash", "-ec", pages.block("sh", "install -D -m 644 systemd/unix-only.conf"))
    admin = f"unix:{site.machine.path('/run/sse-relay-admin/http.sock')}"
    with RawStream(admin, "/ready") as ready:
        wait_until(lambda: ready.raw.startswith(b"HTTP/1.1 200"), 10, "the admin listener")
    assert site.machine.show("PrivateNetwork") == "yes"
    assert site.machine.show("RestrictAddressFamilies") == "AF_UNIX"
    site.serves()
