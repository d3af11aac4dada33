"""The command line: what it takes, and what it says to what it cannot take."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import psycopg2.extensions
import pytest
from click.testing import CliRunner

import harness
import sse_relay
from harness import PROGRAM, Database, Relay, SseReader, parse_command
from sse_relay import Settings, __version__, cli, open_sockets

StartRelay = Callable[..., Relay]

SECRET = "s3cr3t-W0rd"


class Done(NamedTuple):
    """How the program ended, and all it has written to either stream."""

    status: int
    output: str

    @property
    def error(self) -> str:
        """The error, which is the last line, and the only one of its kind; `run` writes it to the log."""
        errors = re.findall(r"^(?:Error:|[-0-9]+ [:,0-9]+ ERROR) (.*)$", self.output, re.MULTILINE)
        assert self.output.rstrip("\n").endswith(errors[-1]), self.output
        assert len(errors) == 1
        return str(errors[0])


def checked(status: int, output: str) -> Done:
    assert "Traceback" not in output, output
    assert SECRET not in output, output
    return Done(status, output)


def run_program(*arguments: str | bytes) -> Done:
    """Run the program to its end, which it must find by itself."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=20, check=False, env=harness.clean_environment(),
    )  # fmt: skip
    return checked(done.returncode, done.stdout.decode())


def invoke(*arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> Done:
    """Run the program in this process: the same, without its start and what it sets up for long."""

    def start_log(level: str, form: str = "text") -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        sse_relay.log.addHandler(handler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse_relay, "start_log", start_log)
        patch.setattr(sse_relay.log, "handlers", [])
        for name in ("freeze", "set_threshold"):
            patch.setattr(gc, name, lambda *_: None)
        result = CliRunner().invoke(cli, arguments, stdin, env, prog_name="sse_relay.py")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return checked(result.exit_code, result.output)


def url_of(database: Database) -> str:
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    return "postgresql://{user}:{password}@{host}:{port}/{dbname}".format(**parts)


@pytest.fixture
def heard(database: Database) -> Iterator[Callable[[], list[str]]]:
    with contextlib.closing(database.connect()) as connection:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN orders")

        def take() -> list[str]:
            assert select.select([connection], [], [], 5)[0], "nothing came"
            connection.poll()
            payloads = [notification.payload for notification in connection.notifies]
            connection.notifies.clear()
            return payloads

        yield take


# ==== Commands and options ====================================================


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", ["", *cli.commands])
def test_help_shows_the_usage_and_an_example(command: str, option: str) -> None:
    done = invoke(*command.split(), option)
    assert done.status == 0
    assert done.output.startswith(" ".join(["Usage: sse_relay.py", *command.split(), "[OPTIONS]"]))
    assert f"sse_relay.py {command}" in done.output.partition("Example:")[2]


def test_the_version_is_the_packages() -> None:
    assert invoke("--version") == (0, f"sse-relay, version {__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("--retry", "1"), ("run",)])
def test_no_command_means_run(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments, env={"SSE_RELAY_BIND": "nowhere"})
    assert done.status == 2
    assert done.output.startswith("Usage: sse_relay.py run ")
    assert "'nowhere' is neither HOST:PORT nor unix:PATH" in done.error


def test_an_option_has_the_same_variable_in_all_commands() -> None:
    for name, command in cli.commands.items():
        context = parse_command(name, ["x"] * len(command.params), resilient_parsing=True)
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            flag = option.opts[0]
            variable = "SSE_RELAY_" + flag.removeprefix("--").replace("-", "_").upper()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(variable, "given")
                # Nothing in the environment may change a database, or the form of an answer.
                heard = None if flag in ("--apply", "--renew-epoch", "--json") else "given"
                assert option.resolve_envvar_value(context) == heard, (name, flag)


def test_options_have_the_defaults_of_the_settings() -> None:
    context = parse_command("run", ["--dsn", ""])
    given = {name: context.params[name] for name in Settings.__dataclass_fields__}
    assert Settings(**given) == Settings("")


@pytest.mark.parametrize("command", [("publish", "orders", "x"), ("run",)])
def test_an_unknown_variable_is_named_with_the_nearest(command: tuple[str, ...]) -> None:
    variables = {"SSE_RELAY_ALLOW_CHANNELS": "*", "SSE_RELAY_QQQQ": "1", "SSE_RELAY_BIND": "unix:/sys/x"}
    output = invoke(*command, env={**variables, "PGPORT": "1", "PGHOST": "127.0.0.1"}).output
    unknown = [line.partition("variable ")[2] for line in output.splitlines() if "unknown" in line]
    assert unknown == [
        "SSE_RELAY_ALLOW_CHANNELS is unknown and does nothing; did you mean SSE_RELAY_ALLOW_CHANNEL?",
        "SSE_RELAY_QQQQ is unknown and does nothing",
    ], output


def test_a_failed_start_is_told_in_the_form_of_the_log() -> None:
    done = run_program("--bind", "unix:/sys/relay.sock", "--log-format", "json")
    entry = json.loads(done.output.splitlines()[-1])
    assert entry["level"] == "error"
    assert entry["message"].startswith("cannot listen on unix:/sys/relay.sock: ")


def test_variables_configure_and_the_command_line_wins(database: Database, start_relay: StartRelay) -> None:
    relay = start_relay(
        "--retry", "3000",
        env={
            "DATABASE_URL": url_of(database),
            "SSE_RELAY_RETRY": "1",
            "SSE_RELAY_PATH": "/",
            "SSE_RELAY_HEARTBEAT": "0.1",
            "SSE_RELAY_ALLOW_CHANNEL": "orders users-*",
        },
    )  # fmt: skip
    for channel in ("orders", "users-7"):
        with harness.RawStream(relay.bind, relay.url(channel, path="/")) as stream:
            stream.wait_for(b"\n\n:\n:\n")
            retry = int(stream.body.partition(b"retry: ")[2].partition(b"\n")[0])
            assert 3000 <= retry < 6100
    with harness.RawStream(relay.bind, relay.url("users", path="/"), headers={"Accept": "*/*"}) as stream:
        stream.wait_for(b'"status": 403')


# First argument, second ones, and what is said to each.
BAD_ARGUMENTS: list[tuple[str, list[str], str]] = [
    ("--bind", ["127.0.0.1", ":8008", "unix:"], "neither HOST:PORT nor unix:PATH"),
    ("--bind", ["127.0.0.1:65536", "127.0.0.1:http", "127.0.0.1:٣"], "neither HOST:PORT nor unix:PATH"),
    ("--memory", ["64MB", "-1", ""], "is not a size"),
    ("--max-backlog", ["1e6", "1.5MiB"], "is not a size"),
    ("--heartbeat", ["0"], "0.1<=x<=3600"),
    ("--heartbeat", ["15s"], "is not a valid float"),
    ("--heartbeat", ["nan"], "is not a number of seconds"),
    ("--linger", ["-1", "inf"], "0<=x<=86400"),
    ("--retry", ["0", "86400001"], "1<=x<=86400000"),
    ("--retry", ["2.5"], "is not a valid integer"),
    ("--max-clients", ["0"], "x>=1"),
    ("--max-channels", ["many"], "is not a valid integer"),
    ("--path", ["events", "/events/", "/a b", "/events?x", "/{channel}", ""], "give an absolute path"),
    ("--allow-origin", ["*", "app.example", "https://app.example/", "https://App.example"], "is no origin"),
    ("--source", ["table"], "'notify', 'log'"),
    ("--log-level", ["loud"], "'debug', 'info', 'warning', 'error'"),
    ("--log-format", ["xml"], "'text', 'json'"),
    ("--colour", ["red"], "No such option"),
    ("run", ["--dsn"], "requires an argument"),
    ("run", ["orders"], "unexpected extra argument"),
    ("serve", ["--bind"], "No such command"),
    ("publish", ["--event=x"], "Missing argument 'CHANNEL'"),
    ("token", ["--lifetime=1764000000000"], "is not in the range"),
    ("demo", ["--bind=0.0.0.0:1", "--bind=[::]:1", "--bind=192.0.2.1:1"], "it listens on this machine only"),
    ("demo", ["--bind=unix:/tmp/demo.sock", "--bind=127.0.0.1:0"], "give HOST:PORT"),
    ("demo", ["--bind=8008"], "neither HOST:PORT nor unix:PATH"),
]


@pytest.mark.parametrize(("first", "second", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_usage_errors(first: str, second: list[str], message: str) -> None:
    for argument in second:
        done = invoke(first, argument)
        assert done.status == 2
        assert message in done.error


# ==== The DSN =================================================================


def test_the_dsn_is_found_wherever_it_may_stand(
    database: Database, tmp_path: Path, heard: Callable[[], list[str]]
) -> None:
    file = tmp_path / "dsn"
    file.write_bytes(b"\xef\xbb\xbf" + url_of(database).encode() + b"\r\n")  # as Windows writes it
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD", "dbname": "DATABASE"}
    wrong = {"DATABASE_URL": "postgresql://127.0.0.1:1/wrong", "PGPORT": "1"}
    places: dict[str, tuple[list[str], dict[str, str]]] = {
        "--dsn": (["--dsn", database.dsn], wrong),
        "--dsn as a URL": (["--dsn", url_of(database)], wrong),
        "--dsn-file": (["--dsn-file", str(file)], wrong),
        "SSE_RELAY_DSN": ([], {"SSE_RELAY_DSN": database.dsn, **wrong}),
        "SSE_RELAY_DSN_FILE": ([], {"SSE_RELAY_DSN_FILE": str(file), **wrong}),
        "DATABASE_URL": ([], {"DATABASE_URL": url_of(database), "PGPORT": "1"}),
        "PG*": ([], {f"PG{name}": parts[key] for key, name in names.items()}),
    }  # fmt: skip
    for place, (options, env) in places.items():
        assert invoke("publish", *options, "orders", f"by {place}", env=env) == (0, "")
        assert heard() == [f"by {place}"]


HOW_TO_WRITE_IT = "give postgresql://USER@HOST:PORT/DATABASE or libpq's 'host=... dbname=...'"
# What cannot be read, and what is said to it; some are what another library means by a DSN.
MALFORMED = [
    *((dsn, HOW_TO_WRITE_IT) for dsn in (
        f"postgresql://u:{SECRET}@ss@host/db",
        f"postgresql://u:p@{SECRET}@host/db",
        f"postgresql://u:p/{SECRET}@host/db",
        f"postgresql://u:%zz{SECRET}@host/db",
        f"postgresql://u:{SECRET}@[::1/db",
        f"postgresql://u:{SECRET}@host:port/db",
        f"postgres:{SECRET}@host",
        f"host=x password={SECRET} port=abc",
        f"host=x password=a {SECRET}",
        f"host=x password='{SECRET}",
        f"host=x passwort={SECRET}",
        f"host=u:{SECRET}@x",
        f"host=x user=u:{SECRET}",
        f"host=x port={SECRET}",
        f"host=x dbname=postgresql://u:{SECRET}@x/db",
        f"postgresql://u:1/{SECRET}@host/db",
        f"postgresql:/u:{SECRET}@host/db",
        f"postgres//u:{SECRET}@host/db",
        f"{SECRET}",
        f"host=x\udcff password={SECRET}",
        # Here a parameter's name is a part of the password.
        f"postgresql://host/db?password=p&{SECRET}=a",
    )),
    (f"postgresql://host/db?pasword={SECRET}", 'parameter "pasword"'),
    (f"postgresql://u:{SECRET}@host/db?schema=public", 'parameter "schema"'),
    (f"postgresql://u:{SECRET}@host/db?sslmode=require&pgbouncer=true", 'parameter "pgbouncer"'),
    (f"postgresql://u:{SECRET}@host/db?pool={SECRET}", 'parameter "pool"'),
    (f"mysql://u:{SECRET}@host/db", 'scheme "mysql"'),
    (f"postgis://u:{SECRET}@host/db", 'scheme "postgis"'),
    (f"postgresql+psycopg2://u:{SECRET}@host/db", 'scheme "postgresql+psycopg2"'),
    (f"jdbc:postgresql://host/db?user=u&password={SECRET}", 'scheme "jdbc:postgresql"'),
    (f"'postgresql://u:{SECRET}@host/db'", "is enclosed in quotes: remove them"),
    (f'"host=x password={SECRET}"', "is enclosed in quotes: remove them"),
]  # fmt: skip


@pytest.mark.parametrize(("dsn", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_dsn_is_a_usage_error_that_does_not_quote_it(dsn: str, message: str) -> None:
    for command in (["run"], ["publish", "orders", "x"], ["schema", "--apply"]):
        done = invoke(*command, "--dsn", dsn)
        assert done.status == 2
        assert "the DSN" in done.error
        assert message in done.error
        if message != HOW_TO_WRITE_IT:
            assert "percent-encode" not in done.error


def test_a_dsn_file_must_be_readable_text(tmp_path: Path) -> None:
    for name, content, reason in (
        ("missing", None, "missing: No such file or directory"),
        (".", None, "directory"),
        ("empty", b"\n", "empty is empty: write the DSN into it"),
        ("binary", b"\xff\xfe", "binary: it is not text"),
        ("nul", b"host=\0 password=" + SECRET.encode(), "the DSN cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = invoke("publish", "--dsn-file", str(tmp_path / name), "orders", "x")
        assert done.status == 2
        assert reason in done.error


def test_two_dsns_are_refused() -> None:
    for options, env in (
        (["--dsn", "host=x", "--dsn-file", "y"], {}),
        (["--dsn-file", "y"], {"SSE_RELAY_DSN": f"password={SECRET}"}),
    ):
        done = invoke("publish", *options, "orders", "x", env=env)
        assert (done.status, done.error) == (2, "give --dsn or --dsn-file, not both")


# ==== Databases that cannot work, or not yet ==================================


# What is wrong with a DSN, and what PostgreSQL or libpq says.
HOPELESS: list[tuple[dict[str, str], str]] = [
    ({"password": SECRET}, "password authentication failed for user"),
    ({"user": "nobody_here", "password": SECRET}, "authentication failed for user"),
    ({"dbname": "no_such_database"}, 'database "no_such_database" does not exist'),
    ({"sslmode": "always", "password": SECRET}, 'invalid sslmode value: "always"'),
    ({"port": "99999", "password": SECRET}, 'invalid port number: "99999"'),
    ({"port": "1,2", "password": SECRET}, "could not match 2 port numbers to 1 hosts"),
    ({"sslmode": "require"}, "server does not support SSL"),
]


@pytest.mark.parametrize(("wrong", "message"), HOPELESS, ids=[" ".join(wrong) for wrong, _ in HOPELESS])
def test_a_database_that_cannot_work_is_named_in_one_line(
    database: Database, wrong: dict[str, str], message: str
) -> None:
    dsn = psycopg2.extensions.make_dsn(database.dsn, **wrong)
    relay = invoke("--dsn", dsn, "--bind", "127.0.0.1:0")
    assert relay.status == 1
    assert relay.error.startswith("PostgreSQL cannot be used: ")
    publish = invoke("publish", "--dsn", dsn, "orders", "x")
    assert publish.status == 1
    assert publish.error.startswith("PostgreSQL did not take the event: ")
    assert publish.output.count("\n") == 1
    for done in (relay, publish):
        assert message in done.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "dsn",
    [
        f"host=127.0.0.1 port=1 user=u password={SECRET} dbname=d",
        f"postgresql://u:{SECRET}#x@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}?x@127.0.0.1:1/d",
        f"postgresql://host.invalid/d?password={SECRET}",
    ],
)
def test_a_relay_waits_for_an_unreachable_host(dsn: str, start_relay: StartRelay) -> None:
    relay = start_relay("--log-level", "debug", dsn=dsn, wait=False)
    said = relay.wait_for_log("cannot reach PostgreSQL, trying again until it is back")
    assert ("host.invalid" if "invalid" in dsn else "127.0.0.1") in said
    with SseReader(relay.url("orders"), wait=False) as reader:
        harness.wait_until(lambda: reader.response is not None, what="a stream, while it waits")
        assert reader.status == 200
        assert relay.stop() == 0
    checked(0, relay.log)


# ==== Addresses ===============================================================


def test_an_address_in_use_is_named_and_the_others_are_left_free(database: Database, tmp_path: Path) -> None:
    ours = ("--dsn", database.dsn, "--bind", f"unix:{tmp_path}/relay.sock")
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = run_program(*ours, "--bind", address)
    assert done.status == 1
    assert done.error.startswith(f"cannot listen on {address}: Address already in use; another program")
    assert done.error.endswith("; choose another with --bind")
    # What was bound before is not left behind as if somebody listened there.
    assert "cannot listen" not in invoke(*ours, "--dsn", "port=1,2").error


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("unix:/sys/relay.sock", ""),
        ("unix:/nowhere/relay.sock", "No such file or directory"),
        ("unix:/" + "x" * 120, "too long"),
        ("host.invalid:8008", ""),
        ("x" * 70 + ":8008", ""),
        ("a..b:8008", ""),
    ],
    ids=["unwritable", "no folder", "long path", "unknown host", "long label", "empty label"],
)
def test_an_address_that_cannot_be_had_is_named(address: str, reason: str) -> None:
    done = invoke("--bind", address, "--allow-channel", "*")
    # A name may be known later; no restart heals the others.
    assert done.status == (1 if "invalid" in address else 2)
    assert done.error.startswith(f"cannot listen on {address}: ")
    assert reason in done.error
    assert done.error.endswith("; choose another with --bind")


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let localhost have two addresses, one of them twice, whatever /etc/hosts says."""
    look_up = socket.getaddrinfo

    def answer(host: str | None, port: int, *how: Any, **more: Any) -> list[Any]:
        hosts = ["::1", "127.0.0.1", "127.0.0.1"] if host == "localhost" else [host]
        return [found for host in hosts for found in look_up(host, port, *how, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.mark.usefixtures("two_addresses")
@pytest.mark.parametrize("name", ["localhost", "*"])
def test_a_name_stands_for_all_its_addresses(name: str) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in open_sockets(f"{name}:0")]
        assert {sock.family for sock in sockets} == {socket.AF_INET, socket.AF_INET6}
        (port,) = {sock.getsockname()[1] for sock in sockets}
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), timeout=10):
                pass


@pytest.mark.usefixtures("two_addresses")
@pytest.mark.parametrize("name", ["localhost", "*"])
@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
def test_one_address_in_use_is_enough_to_refuse_a_name(taken: str, name: str) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as other:
        with pytest.raises(click.ClickException, match="Address already in use") as refused:
            open_sockets(f"{name}:{other.getsockname()[1]}")
        assert refused.value.exit_code == 1


def test_an_address_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    (sock,) = open_sockets("app.test:0")
    with sock:
        assert sock.getsockname()[0] == "127.0.0.1"
    found.pop()
    with pytest.raises(click.ClickException, match="Cannot assign") as refused:
        open_sockets("app.test:0")
    assert refused.value.exit_code == 1


@pytest.mark.slow
def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(
    database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    path = tmp_path / "relay.sock"
    bind = f"unix:{path}"
    start_relay(dsn=database.dsn, bind=bind).kill()
    assert path.is_socket()
    relay = start_relay(dsn=database.dsn, bind=bind)
    second = invoke("--dsn", database.dsn, "--bind", bind)
    assert second.status == 1
    assert "Address already in use; another program, perhaps another relay, listens there" in second.error
    path.unlink()
    successor = start_relay("--bind", bind, dsn=database.dsn)
    assert relay.stop() == 0
    # It serves all its addresses.
    with (
        SseReader(successor.url("orders")) as tcp,
        SseReader(successor.url("orders"), unix=str(path)) as unix,
    ):
        for reader in (tcp, unix):
            reader.wait_for_id()
        database.notify("orders", "x")
        for reader in (tcp, unix):
            reader.wait_for_data("x")
    assert successor.stop() == 0
    assert not path.exists()


def test_a_file_that_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    done = invoke("--bind", f"unix:{path}")
    assert done.status == 1
    assert str(path) in done.error
    assert path.read_text() == "kept"


def test_ctrl_c_ends_the_relay_with_0(relay: Relay) -> None:
    relay.process.send_signal(signal.SIGINT)
    assert relay.wait() == 0
    assert "Traceback" not in relay.log
    assert "Aborted" not in relay.log


@pytest.mark.slow
def test_uvloop_serves_the_same_streams(database: Database, start_relay: StartRelay) -> None:
    relay = start_relay("--loop", "uvloop", dsn=database.dsn)
    assert "uvloop" in Path(f"/proc/{relay.pid}/maps").read_text()
    with SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        database.notify("orders", "one")
        reader.wait_for_data("one")
        relay.process.terminate()
        reader.wait_for_end()
    assert relay.wait() == 0


def test_without_its_extra_uvloop_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    done = invoke("--loop", "uvloop", "--bind", "127.0.0.1:0")
    assert (done.status, done.error) == (2, "--loop uvloop: pip install uvloop")


# ==== publish =================================================================


def test_publish_sends_what_it_is_given(database: Database, heard: Callable[[], list[str]]) -> None:
    sent: list[tuple[list[str], bytes, str]] = [
        (["orders", "hello"], b"", "hello"),
        (["orders", ""], b"", ""),
        (["orders", "--", "-5"], b"", "-5"),
        (["orders"], b"", ""),
        (["orders"], b"two\nlines\n", "two\nlines"),
        (["orders", "-"], b"no line end", "no line end"),
        (["orders"], b"crlf\r\n", "crlf"),
        (["orders"], b"one of two\n\n", "one of two\n"),
        (["orders"], "Größe 🎉".encode(), "Größe 🎉"),
        (["--event", "created", "orders", "1.10"], b"", '{"event": "created", "data": "1.10"}'),
        (["--event", "größe", "orders"], b'"\\u0041 \n', '{"event": "größe", "data": "\\"\\\\u0041 "}'),
        (["orders", "x" * 7_999], b"", "x" * 7_999),
        (["orders"], b"y" * 7_999 + b"\n", "y" * 7_999),
        (["orders", "é" * 3_999], b"", "é" * 3_999),
    ]  # fmt: skip
    for arguments, stdin, payload in sent:
        assert invoke("publish", "--dsn", database.dsn, *arguments, stdin=stdin) == (0, "")
        assert heard() == [payload]


# Arguments, standard input, and what is said.
UNSENDABLE: list[tuple[list[str], bytes, str]] = [
    (["x" * 64, "x"], b"", "64 bytes, at most 63"),
    (["", "x"], b"", "the channel's name is empty"),
    (["a\nb", "x"], b"", "control characters"),
    (["sse_relay_wake", "x"], b"", "the relay's own"),
    (["\udcff", "x"], b"", "the channel's name is not valid UTF-8"),
    (["orders", "x" * 8_000], b"", "8000 bytes; a notification holds at most 7999"),
    (["orders", "é" * 4_000], b"", "8000 bytes; a notification holds at most 7999"),
    (["orders"], b"x" * 8_000, "8000 bytes; a notification holds at most 7999"),
    (["--event", "e", "orders", "x" * 7_980], b"", "a notification holds at most 7999"),
    (["orders"], b"a\0b", "cannot carry the character NUL"),
    (["orders"], b"\xff", "not valid UTF-8"),
    (["orders", "\udcff"], b"", "not valid UTF-8"),
    (["--event", "\udcff", "orders", "x"], b"", "not valid UTF-8"),
    (["--event", "error", "orders", "x"], b"", "an event cannot be named 'error'"),
    (["--event", "open", "orders", "x"], b"", "an event cannot be named 'open'"),
    (["--event", "relay.gap", "orders", "x"], b"", "an event cannot be named 'relay.gap'"),
    (["--event", "a\nb", "orders", "x"], b"", "an event cannot be named"),
    (["--source", "log", "--event", "\udcff", "orders", "x"], b"", "not valid UTF-8"),
    (["--source", "log", "orders", "x"], b"", "schema --apply"),
]


def test_publish_says_in_one_line_why_nothing_was_sent(database: Database) -> None:
    nowhere = ["--dsn", f"host=127.0.0.1 port={harness.free_port()} user=u password={SECRET}", "orders", "x"]
    for arguments, stdin, message in [*UNSENDABLE, (nowhere, b"", "Connection refused")]:
        done = invoke("publish", "--dsn", database.dsn, *arguments, stdin=stdin)
        assert done.status == 1
        assert done.output.count("\n") == 1
        assert message in done.error


def test_publish_takes_the_bytes_of_a_real_command_line() -> None:
    done = run_program("publish", "--event", b"\xff", b"orders", b"\xff")
    assert (done.status, done.output) == (1, "Error: the event is not valid UTF-8\n")


def test_publish_warns_where_only_the_log_is_heard(log_database: Database) -> None:
    quiet = invoke("publish", "--dsn", log_database.dsn, "--source", "log", "orders", "x")
    assert quiet == (0, "")
    loud = invoke("publish", "--dsn", log_database.dsn, "orders", "x")
    assert loud.status == 0
    assert "does not hear this event: publish with --source log" in loud.output


# ==== schema and token ========================================================


def test_a_read_only_default_is_named_with_what_helps(database: Database) -> None:
    name = psycopg2.extensions.parse_dsn(database.dsn)["dbname"]
    database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    done = invoke("schema", "--apply", "--dsn", database.dsn)
    assert done.status == 0
    assert "WARNING: the log belongs to the superuser postgres" in done.output
    dsn = psycopg2.extensions.make_dsn(database.dsn, options="-c default_transaction_read_only=off")
    for command in (["schema", "--renew-epoch"], ["publish", "--source", "log", "orders", "x"]):
        done = invoke(*command, "--dsn", database.dsn)
        assert done.status == 1
        assert "read-only transaction" in done.error
        assert dsn.partition("options=")[2].strip("'") in done.error
        assert invoke(*command, "--dsn", dsn).status == 0


def test_the_epoch_is_renewed_by_a_command(log_database: Database) -> None:
    (before,) = log_database.execute("SELECT epoch FROM sse_relay.epoch")
    assert invoke("schema", "--renew-epoch", "--dsn", log_database.dsn).status == 0
    assert log_database.execute("SELECT epoch FROM sse_relay.epoch") != [before]
    log_database.execute("DROP SCHEMA sse_relay CASCADE")
    done = invoke("schema", "--renew-epoch", "--dsn", log_database.dsn)
    assert done.status == 1
    assert "run sse_relay.py schema --apply" in done.error


@pytest.mark.slow
def test_nothing_is_left_behind_in_a_poolers_sessions(log_database: Database, open_folder: Path) -> None:
    commands = ["publish --source log orders x", "publish sse_relay x", "doctor"]
    with harness.pgbouncer(log_database, "transaction", open_folder) as dsn:
        pooled = Database(dsn)
        before = pooled.execute("SHOW search_path")
        for command in commands:
            invoke(*command.split(), "--dsn", dsn)
            assert pooled.execute("SHOW search_path") == before
        pooled.close()
    log_database.terminate_backends()
