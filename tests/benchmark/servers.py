"""What is measured: the relay and its peers, each started alone on the server's core."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg2
import pytest

import harness
from benchmark.measure import (
    ALL_CORES,
    HERE,
    LOAD_CORE,
    ON_SERVER_CORE,
    BenchmarkError,
    Load,
    Send,
    children,
    compile_c,
)
from sse_relay import apply_schema

RIVAL = "sse-relay-server"
RIVAL_VERSION = "1.0.14"
# The packages of the naive relay and sse-relay-server, in our versions where we use them too.
PEER_PACKAGES = (
    "aiohttp-sse",
    f"aiohttp=={importlib.metadata.version('aiohttp')}",
    f"aiopg=={importlib.metadata.version('aiopg')}",
    f"{RIVAL}[postgres,redis]=={RIVAL_VERSION}",
)
START_SECONDS = 20.0

NGINX = """
load_module {module};
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/pid;
error_log {folder}/error.log crit;
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    nchan_shared_memory_size 256M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /version {{ return 200 "nginx $nginx_version with nchan $nchan_version"; }}
        location ~ ^/events/(\\w+)$ {{
            nchan_subscriber eventsource;
            nchan_channel_id $1;
            nchan_subscriber_first_message newest;
        }}
        location ~ ^/publish/(\\w+)$ {{
            nchan_publisher;
            nchan_channel_id $1;
            # It keeps events for clients that come back, as the relay does.
            nchan_message_buffer_length 1000;
            nchan_message_timeout 60s;
        }}
    }}
}}
"""


class Running(NamedTuple):
    """A server that runs.

    Attributes:
        port: Where it serves, on 127.0.0.1.
        path: Its streams; ``%d`` becomes the channel's number.
        pids: Its processes.
        send: Publishes to channel 0.
        comments: Whether it begins streams with a comment.
    """

    port: int
    path: str
    pids: Callable[[], list[int]]
    send: Send
    comments: bool


class Bench:
    """What the works share: programs, databases, sizes, and notes for the reader.

    Args:
        full: Measure long; else short.
        tiny: A few clients and moments, to see that it runs.
    """

    def __init__(self, *, full: bool = False, tiny: bool = False) -> None:
        self.full = full
        self.tiny = tiny
        self.notes: list[str] = []
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sse-benchmark-")))
        # nginx's workers are another user.
        self.folder.chmod(0o755)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    # ---- sizes

    def clients(self, many: int) -> int:
        return max(many // 100, 5) if self.tiny else many

    def seconds(self, quick: float, full: float) -> float:
        return 0.3 if self.tiny else full if self.full else quick

    def events(self, quick: int, full: int) -> int:
        return max(quick // 10, 10) if self.tiny else full if self.full else quick

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # ---- what is built or started once

    @functools.cached_property
    def sseload(self) -> Path:
        return compile_c("sseload", self.folder)

    @functools.cached_property
    def climit(self) -> Path:
        return compile_c("climit", self.folder)

    @functools.cached_property
    def postgres(self) -> harness.Server:
        """PostgreSQL on the load's core, not waiting for the disk; with the durable log."""
        return self._postgres()

    @functools.cached_property
    def free_postgres(self) -> harness.Server:
        """The same on all cores."""
        return self._postgres(cores=ALL_CORES)

    @functools.cached_property
    def durable_postgres(self) -> harness.Server:
        """The same on all cores, waiting for the disk."""
        return self._postgres(cores=ALL_CORES, fsync="on")

    def _postgres(self, cores: set[int] | None = None, **options: str) -> harness.Server:
        # A child inherits the cores.
        os.sched_setaffinity(0, cores or {LOAD_CORE})
        try:
            # Autovacuum would fall into one server's round and not into another's.
            server = self._stack.enter_context(harness.Server(autovacuum="off", **options))
        finally:
            os.sched_setaffinity(0, {LOAD_CORE})
        apply_schema(server.dsn)
        return server

    @functools.cached_property
    def peers(self) -> Path:
        """The folder of programs of a virtual environment with the peers' packages, kept for the next run."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sse-relay-benchmark"
        wanted = [platform.python_version(), *PEER_PACKAGES]
        venv = cache / "-".join(re.sub(r"[^a-z0-9.]+", "_", each) for each in wanted)
        done = venv / "complete"
        if not done.exists():
            venv.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            subprocess.run([venv / "bin/pip", "install", "-qq", *PEER_PACKAGES], check=True)
            done.touch()
        return venv / "bin"

    # ---- servers

    def start(self, name: str) -> contextlib.AbstractContextManager[Running]:
        return SERVERS[name](self)

    def load(self, server: Running, clients: int, *options: str, nice: int = 0, wait: bool = True) -> Load:
        """Open streams of a server. They are ready once they have its first comment, if it sends one."""
        comments = ["--first-comment"] if server.comments else []
        return Load(
            self.sseload, server.port, clients, "--path", server.path, *comments, *options,
            nice=nice, wait=wait,
        )  # fmt: skip


# ==== Publishing ==============================================================


def execute(sql: str, connection: psycopg2.extensions.connection, payloads: Sequence[str]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, (payloads,))


notify = functools.partial(execute, "SELECT count(pg_notify('ch0', p)) FROM unnest(%s) AS p")
publish_to_log = functools.partial(execute, "SELECT sse_relay.publish('ch0', p) FROM unnest(%s) AS p")


@contextlib.contextmanager
def connected(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    with contextlib.closing(connection):
        yield connection


def post(connection: http.client.HTTPConnection, payloads: Sequence[str]) -> None:
    for payload in payloads:
        connection.request("POST", "/publish/ch0", payload, {"Content-Type": "text/plain"})
        answer = connection.getresponse()
        answer.read()
        if answer.status not in (200, 201, 202):
            raise BenchmarkError(f"nchan answers {answer.status}")


# ==== The servers =============================================================


@contextlib.contextmanager
def process(
    bench: Bench, *command: str | Path, port: int, env: dict[str, str] | None = None
) -> Iterator[harness.Daemon]:
    """Run a server on the server's core; it is there when its port is."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        try:
            running = harness.Daemon([*ON_SERVER_CORE, *command], port, Path(name), env)
        except (AssertionError, pytest.fail.Exception) as error:
            raise BenchmarkError(f"did not start: {str(error).strip()[-200:]}") from error
        with running:
            yield running


@contextlib.contextmanager
def relay(
    bench: Bench,
    *options: str,
    source: str = "notify",
    postgres: harness.Server | None = None,
    bind: str | None = None,
) -> Iterator[Running]:
    """The relay as it is usually run: everybody may read, and the admin listener is on."""
    dsn = (postgres or bench.postgres).dsn
    send = notify if source == "notify" else publish_to_log
    admin = f"127.0.0.1:{harness.free_port()}"
    with (
        connected(dsn) as connection,
        harness.Relay(
            "--allow-channel", "*", "--admin", admin, "--source", source, *options,
            dsn=dsn, prefix=ON_SERVER_CORE, bind=bind,
        ) as running,
    ):  # fmt: skip
        port = int(running.bind.rpartition(":")[2])
        yield Running(
            port, "/events/ch%d", lambda: [running.pid], functools.partial(send, connection), comments=True
        )


@contextlib.contextmanager
def nchan(bench: Bench) -> Iterator[Running]:
    nginx, module = find_nchan()
    port = harness.free_port()
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        Path(name).chmod(0o755)
        settings = Path(name) / "nginx.conf"
        # Streams and the connections of the master.
        descriptors = open_files()
        user = "user root;" if os.geteuid() == 0 else ""
        settings.write_text(
            NGINX.format(module=module, folder=name, port=port, descriptors=descriptors, user=user)
        )
        command = (nginx, "-p", name, "-e", Path(name) / "error.log", "-c", settings)
        with (
            process(bench, *command, port=port) as running,
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, START_SECONDS)) as publisher,
        ):
            send = functools.partial(post, publisher)
            yield Running(port, "/events/ch%d", lambda: children(running.pid), send, comments=True)


@contextlib.contextmanager
def naive(bench: Bench) -> Iterator[Running]:
    port, dsn = harness.free_port(), bench.postgres.dsn
    program = (bench.peers / "python", HERE / "naive.py", str(port), dsn)
    with process(bench, *program, port=port) as running, connected(dsn) as connection:
        send = functools.partial(notify, connection)
        yield Running(port, "/events/ch%d", lambda: [running.pid], send, comments=False)


@contextlib.contextmanager
def climit(bench: Bench) -> Iterator[Running]:
    port, feed = harness.free_port(), harness.free_port()
    with (
        process(bench, bench.climit, str(port), str(feed), port=port) as running,
        socket.create_connection(("127.0.0.1", feed)) as publisher,
    ):
        publisher.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send(payloads: Sequence[str]) -> None:
            publisher.sendall("".join(f"{payload}\n" for payload in payloads).encode())

        yield Running(port, "/events/ch%d", lambda: [running.pid], send, comments=True)


@contextlib.contextmanager
def rival(bench: Bench) -> Iterator[Running]:
    """sse-relay-server from its package, as its README starts it."""
    parts = psycopg2.extensions.parse_dsn(bench.postgres.dsn)
    url = "postgresql://{user}:{password}@{host}:{port}/{dbname}".format(**parts)
    port = harness.free_port()
    program = (bench.peers / RIVAL, "--host", "127.0.0.1", "--port", str(port))
    with (
        process(bench, *program, port=port, env={"DATABASE_URL": url, "LOG_LEVEL": "WARNING"}) as running,
        connected(bench.postgres.dsn) as connection,
    ):
        send = functools.partial(notify, connection)
        yield Running(port, "/ch%d", lambda: [running.pid], send, comments=False)


RELAY = "sse-relay"
SERVERS: dict[str, Callable[[Bench], contextlib.AbstractContextManager[Running]]] = {
    RELAY: relay,
    "C limit": climit,
    "nchan": nchan,
    "naive": naive,
    RIVAL: rival,
}


# ==== What is there, and in which version =====================================


def find_nchan() -> tuple[str, Path]:
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    for folder in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/etc/nginx/modules"):
        module = Path(folder, "ngx_nchan_module.so")
        if nginx and module.exists():
            return nginx, module
    raise BenchmarkError("needs nginx with nchan (Debian: libnginx-mod-nchan)")


def open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def nchan_version(bench: Bench) -> str:
    with nchan(bench) as server, urllib.request.urlopen(f"http://127.0.0.1:{server.port}/version") as answer:
        return str(answer.read().decode().strip())
