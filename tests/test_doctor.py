"""`doctor` names what is wrong with a deployment, and the line that fixes it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from click.testing import CliRunner

import harness
import sse_relay
from harness import Database, Nginx, Relay
from sse_relay import STREAM_TABLE, Finding, Seen, apply_schema, cli, examine_machine, judge

StartRelay = Callable[..., Relay]

SLOW_PROXY = """\
defaults
    mode http
    timeout connect 2s
    timeout client 1m
    timeout server 1m
    {options}
frontend streams
    bind 127.0.0.1:{port}
    default_backend relay
backend relay
    server relay {relay}
"""


def run_doctor(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def diagnose(dsn: str, *options: str) -> dict[str, Finding]:
    """Return what the command printed as JSON, by check; each but an "ok" says what to do."""
    status, output = run_doctor("--json", "--dsn", dsn, *options)
    assert status in (0, 1), output
    answer = json.loads(output)
    findings = {finding["check"]: Finding(**finding) for finding in answer["findings"]}
    assert len(findings) == len(answer["findings"])
    assert answer["healthy"] is (status == 0) is (not named(findings, "problem"))
    for finding in findings.values():
        assert finding.fix or finding.level == "ok", finding
        assert "\n" not in finding.what + finding.fix
    return findings


def named(findings: dict[str, Finding], *levels: str) -> set[str]:
    return {check for check, finding in findings.items() if finding.level in levels}


@pytest.fixture
def make_role(database: Database) -> Iterator[Callable[..., str]]:
    """Make a role that may log in and what the statements, with its name as {}, allow; return its DSN."""
    made: list[str] = []

    def make(*statements: str) -> str:
        name = f"role_{len(made)}_{psycopg2.extensions.parse_dsn(database.dsn)['dbname']}"
        database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        made.append(name)
        for statement in statements:
            database.execute(statement.format(name))
        return psycopg2.extensions.make_dsn(database.dsn, user=name, password="secret")

    yield make
    database.terminate_backends()
    for name in made:
        database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


APPLICATION = (
    "GRANT USAGE ON SCHEMA sse_relay TO {}",
    "GRANT EXECUTE ON FUNCTION sse_relay.publish(text, text, text) TO {}",
)
OPERATOR = (
    "GRANT USAGE ON SCHEMA sse_relay TO {}",
    "GRANT SELECT, UPDATE (retention) ON sse_relay.settings TO {}",
)


def as_relay(database: Database, make_role: Callable[..., str]) -> str:
    """Return the DSN of a role with what `doctor` says that a relay needs."""
    dsn = make_role()
    database.execute(diagnose(dsn)["grants"].fix)
    return dsn


# ==== PostgreSQL ==============================================================


def test_nothing_is_wrong_with_a_good_database(database: Database) -> None:
    found = diagnose(database.dsn)
    assert list(found) == ["open files", "connection", "notifications", "rights", "queue"]
    assert named(found, "ok") == found.keys()
    apply_schema(database.dsn)
    found = diagnose(database.dsn)
    assert list(found)[5:] == ["grants", "schema", "owner", "limits", "privileges"]
    assert named(found, "warning", "problem", "unknown") == {"owner"}, "it belongs to the tests' superuser"
    assert "grants" not in diagnose(database.dsn, "--source", "notify")


def test_people_read_a_line_for_each_finding_and_one_for_what_fixes_it(database: Database) -> None:
    status, output = run_doctor("--dsn", database.dsn, "--source", "log")
    assert status == 1
    lines = output.splitlines()
    assert lines[1].startswith("ok       connection: PostgreSQL answers at 127.0.0.1 port ")
    assert lines[-2:] == [
        "problem  schema: the durable log is not installed in this database",
        "         -> run sse_relay.py schema --apply",
    ]


def expect_problem(dsn: str, check: str, what: str, fix: str) -> None:
    found = diagnose(dsn)
    assert named(found, "problem") == {check}
    assert what in found[check].what
    assert fix in found[check].fix
    assert "not-the-right-one" not in str(found)


# Parameters of the connection, and what is said of them.
CLOSED: list[tuple[dict[str, str], str, str]] = [
    ({"password": "not-the-right-one"}, "password authentication failed", "correct user and password"),
    ({"dbname": "nowhere"}, 'database "nowhere" does not exist', "psql -l"),
    ({"port": "1"}, "refused", "start PostgreSQL"),
    ({"host": "nowhere.invalid"}, "could not translate host name", "name server"),
    ({"sslmode": "require"}, "does not support SSL", "sslmode"),
    ({"dbname": "latin"}, "encoding is LATIN1", "use a database with encoding UTF8"),
]


def test_it_tells_why_nobody_gets_in(database: Database) -> None:
    database.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        for change, what, fix in CLOSED:
            dsn = psycopg2.extensions.make_dsn(database.dsn, **change)
            expect_problem(dsn, "connection", what, fix)
    finally:
        database.execute("DROP DATABASE latin WITH (FORCE)")


def test_it_names_another_version_of_the_log(log_database: Database) -> None:
    for version, fix in ((0, "run sse_relay.py schema --apply"), (99, "install a newer sse-relay")):
        log_database.execute("UPDATE sse_relay.settings SET version = %s", (version,))
        expect_problem(log_database.dsn, "schema", f"version {version}", fix)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "problems"), [("transaction", {"notifications"}), ("session", set())])
def test_it_names_a_pooler_in_transaction_mode(
    database: Database, open_folder: Path, mode: str, problems: set[str]
) -> None:
    with harness.pgbouncer(database, mode, open_folder) as dsn:
        assert named(diagnose(dsn), "problem") == problems
    database.terminate_backends()


@pytest.mark.slow
def test_it_names_a_standby(own_server: harness.Server) -> None:
    own_server.demote()
    expect_problem(own_server.dsn, "connection", "hot standby", "name the primary")


@pytest.mark.parametrize(("limit", "level"), [(512, "problem"), (4096, "warning"), (16384, "ok")])
def test_it_names_a_low_limit_of_open_files(limit: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse_relay, "raise_file_limit", lambda: limit)
    (found,) = examine_machine()
    assert (found.level, "LimitNOFILE=65536" in found.fix) == (level, level != "ok")
    assert str(limit) in found.what


# ==== Rights ==================================================================


def test_the_grants_that_it_names_are_just_what_a_relay_needs(
    log_database: Database, make_role: Callable[..., str], start_relay: StartRelay
) -> None:
    dsn = make_role()
    role = psycopg2.extensions.parse_dsn(dsn)["user"]
    prune, security = "EXECUTE ON FUNCTION sse_relay.prune()", "TABLE sse_relay.events {} ROW LEVEL SECURITY"
    found = diagnose(dsn)
    assert named(found, "problem") == {"grants"}
    assert found["grants"].fix.count("GRANT") == 3
    log_database.execute(found["grants"].fix)
    assert named(diagnose(dsn), "problem", "unknown") == set()
    # What alone is missing is named alone.
    for change, fix in (
        (f"REVOKE {prune} FROM {role}", f"GRANT {prune} TO {role}"),
        (f"ALTER {security.format('ENABLE')}", f"ALTER {security.format('DISABLE')}"),
    ):
        log_database.execute(change)
        assert diagnose(dsn)["grants"] == Finding(
            "problem", "grants", "this role may not use the durable log", fix
        )
        log_database.execute(fix)
    relay = start_relay("--source", "log", dsn=dsn)
    with harness.SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        log_database.execute("SELECT sse_relay.publish('orders', 'hello'::text)")
        reader.wait_for_data("hello")


def test_to_another_role_it_says_what_was_not_checked(
    log_database: Database, make_role: Callable[..., str]
) -> None:
    for statements in (APPLICATION, OPERATOR):
        found = diagnose(make_role(*statements))
        assert named(found, "problem") == set()
        assert named(found, "unknown") == {"grants"}
        assert "the relay's DSN" in found["grants"].fix


def test_what_a_hardened_server_withholds_is_named_with_its_grant(
    log_database: Database, make_role: Callable[..., str]
) -> None:
    dsn = as_relay(log_database, make_role)
    role = psycopg2.extensions.parse_dsn(dsn)["user"]
    log_database.execute(
        "REVOKE EXECUTE ON FUNCTION pg_notification_queue_usage() FROM PUBLIC;"
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC;"
        "REVOKE SELECT ON pg_settings FROM PUBLIC;"
        f"ALTER SCHEMA sse_relay OWNER TO {role}"
    )
    found = diagnose(dsn)
    assert named(found, "problem") == set()
    assert (found["rights"].level, found["queue"].level) == ("warning", "unknown")
    assert f"GRANT SELECT ON pg_catalog.pg_settings TO {role}" in found["rights"].fix
    assert "GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system()" in found["limits"].fix
    log_database.execute(f"{found['rights'].fix}; {found['limits'].fix}")
    found = diagnose(dsn)
    assert {found[check].level for check in ("rights", "queue", "limits")} == {"ok"}


def test_it_names_rights_that_nobody_needs(log_database: Database, make_role: Callable[..., str]) -> None:
    dsn = make_role("GRANT INSERT ON sse_relay.events TO {}")
    role = psycopg2.extensions.parse_dsn(dsn)["user"]
    found = diagnose(log_database.dsn)
    assert found["privileges"].level == "warning"
    assert found["privileges"].fix == f"REVOKE INSERT ON sse_relay.events FROM {role}"
    log_database.execute(found["privileges"].fix)
    assert diagnose(log_database.dsn)["privileges"].level == "ok"


# ==== Through a proxy =========================================================


@pytest.mark.parametrize(
    "option",
    [
        "--url=nonsense", "--url=ftp://127.0.0.1/events/orders", "--url=http://127.0.0.1/",
        "--url=http://127.0.0.1/events/%00", f"--ca-file={os.devnull}", "--ca-file=/nowhere",
    ],
)  # fmt: skip
def test_what_is_no_stream_or_certificate_is_a_usage_error(option: str) -> None:
    assert run_doctor("--dsn", "", option)[0] == 2


def seen(body: bytes = b":\nretry: 1\n\nid: a-1\n\n", **how: Any) -> dict[str, Finding]:
    """Return what is found where all is well but for what is given."""
    headers = http.client.HTTPMessage()
    sent = {"Content-Type": "text/event-stream", "Cache-Control": "no-store, no-transform"}
    for name, value in (sent | how.pop("headers", {})).items():
        headers[name] = value
    good = Seen(
        "https://app.example", alpn="h2", head=200, status=200, version=11, headers=headers, body=body,
        opened=0.01, readable="none", commit=0.001, delay=0.005, silence=15,
    )  # fmt: skip
    return {finding.check: finding for finding in judge(STREAM_TABLE, dataclasses.replace(good, **how))}


REFUSED = b'retry: 86400000\nevent: relay.refused\ndata: {"status":403,"reason":"the channel is closed"}\n\n'
SENT_BACK = b"retry: 2000\n\n"
# What was seen, and each check that is not "ok", with its level.
OBSERVED: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {"restart": "unknown"}),
    ({"readable": "all"}, {"restart": "unknown", "access": "warning"}),
    ({"readable": "this"}, {"restart": "unknown"}),
    ({"readable": ""}, {"restart": "unknown", "access": "unknown"}),
    # A refusal is not the answer of a proxy whose relay is away, and neither is that of a full relay.
    ({"body": REFUSED, "ended": 0.1}, {"answer": "problem", "restart": "unknown"}),
    ({"body": SENT_BACK, "ended": 0.1}, {"answer": "problem", "restart": "unknown"}),
    ({"body": SENT_BACK, "ended": 0.1, "headers": {"Cache-Control": "no-store"}}, {"answer": "problem"}),
    ({"body": b"", "status": 502, "ended": 0.1}, {"answer": "problem", "restart": "problem"}),
    ({"body": b"", "status": 404, "ended": 0.1}, {"answer": "problem", "restart": "unknown"}),
    ({"body": b"", "status": 0, "opened": None}, {"restart": "unknown", "first byte": "problem"}),
    ({"opened": 3.0}, {"restart": "unknown", "first byte": "warning"}),
    ({"alpn": None}, {"restart": "unknown", "HTTP": "warning"}),
    ({"version": 10}, {"restart": "unknown", "HTTP": "problem"}),
    ({"head": 403}, {"restart": "unknown", "headers": "problem"}),
    ({"headers": {"Content-Encoding": "gzip"}}, {"restart": "unknown", "compression": "warning"}),
    ({"headers": {"Cache-Control": "public"}}, {"restart": "unknown", "headers": "warning"}),
    ({"delay": 0.212}, {"restart": "unknown", "delay": "warning"}),
    ({"delay": 0.212, "commit": 0.05}, {"restart": "unknown"}),
    ({"delay": None}, {"restart": "unknown", "delay": "problem"}),
    ({"delay": None, "unpublished": "denied"}, {"restart": "unknown", "delay": "unknown"}),
    ({"delay": None, "silence": None}, {"restart": "unknown", "delay": "problem", "heartbeat": "unknown"}),
    ({"silence": None}, {"restart": "unknown", "heartbeat": "warning"}),
    ({"silence": None, "ended": 60.0}, {"restart": "unknown", "heartbeat": "problem"}),
    ({"error": TimeoutError("timed out")}, {"answer": "problem"}),
]


@pytest.mark.parametrize(("how", "levels"), OBSERVED, ids=[str(how) for how, _ in OBSERVED])
def test_what_was_seen_is_judged_by_the_table(how: dict[str, Any], levels: dict[str, str]) -> None:
    found = seen(**how)
    if how.get("error"):
        found = {"answer": found["answer"]}
    assert {check: finding.level for check, finding in found.items() if finding.level != "ok"} == levels
    assert all(finding.fix for finding in found.values() if finding.level != "ok")


BEATING = ("--heartbeat", "0.5")


def drip(client: socket.socket, opening: bytes) -> None:
    """Send a byte now and then, so that no limit on the next byte is ever reached."""
    while True:
        client.sendall(opening[:1])
        opening = opening[1:] or b"a"
        time.sleep(0.02)


def flood(client: socket.socket, opening: bytes) -> None:
    while True:
        client.sendall(opening)
        opening = b"40\r\n" + b":" * 63 + b"\n\r\n"


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("send", "opening"),
    [
        (drip, ANSWER + b"X: "),
        (drip, b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000),
        (flood, ANSWER + b"Transfer-Encoding: chunked\r\n\r\n"),
    ],
    ids=["header", "continue", "flood"],
)
def test_an_answer_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, send: Callable[[socket.socket, bytes], None], opening: bytes
) -> None:
    for limit in ("DOCTOR_LONGEST", "DOCTOR_ANSWER_WAIT", "DOCTOR_EVENT_WAIT", "DOCTOR_HEARTBEAT_WAIT"):
        monkeypatch.setattr(sse_relay, limit, 0.5)
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(2)
                    client.recv(9_999)
                    send(client, opening)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/events/orders"
        sse_relay.observe(url, ssl.create_default_context(), None)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("url", ["http://a..b/events/orders", f"http://{'a' * 64}.example/events/orders"])
def test_a_name_that_no_host_can_have_is_no_answer(url: str) -> None:
    assert sse_relay.observe(url, ssl.create_default_context(), None).error is not None


@pytest.mark.slow
@pytest.mark.parametrize("source", ["notify", "log"])
def test_behind_the_documented_nginx_all_is_well(
    database: Database, start_relay: StartRelay, tmp_path: Path, source: str
) -> None:
    if source == "log":
        apply_schema(database.dsn)
    address = f"unix:{tmp_path}/http.sock"
    options = (*BEATING, "--source", source, "--allow-channel", "orders")
    start_relay(*options, bind=address, dsn=database.dsn)
    with Nginx(tmp_path, address, tls=True) as nginx:
        url = f"{nginx.url}/events/orders"
        trusted = diagnose(database.dsn, "--url", url, "--ca-file", str(nginx.certificate))
        untrusted = diagnose(database.dsn, "--url", url)
    assert named(trusted, "problem", "warning", "unknown") - {"owner"} == {"restart"}
    assert trusted.keys() >= {"first byte", "heartbeat", "delay", "compression", "HTTP", "upstream", "access"}
    assert "HTTP/2" in trusted["HTTP"].what
    assert "everybody can read this channel" in trusted["access"].what
    assert named(untrusted, "problem") == {"answer"}
    assert "certificate" in untrusted["answer"].what


@pytest.mark.slow
def test_each_role_measures_what_it_can(
    log_database: Database, make_role: Callable[..., str], start_relay: StartRelay
) -> None:
    relay = start_relay(*BEATING, "--source", "log", dsn=log_database.dsn)
    for dsn, unknown in (
        (make_role(*APPLICATION), "grants"),
        (as_relay(log_database, make_role), "delay"),
    ):
        found = diagnose(dsn, "--url", relay.url("orders"))
        assert named(found, "problem") == set()
        assert named(found, "unknown") == {"restart", unknown}
        assert found["access"].level == "warning"
        assert found["heartbeat"].level == "ok"


@pytest.mark.slow
def test_with_a_token_it_looks_what_opens_without(
    database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 32)
    token = CliRunner().invoke(cli, ["token", "--key-file", str(key), "orders"]).output.strip()
    relay = start_relay(*BEATING, "--jwt-key-file", str(key), dsn=database.dsn)
    found, refused = (
        diagnose(database.dsn, "--url", relay.url(channel, access_token=token))
        for channel in ("orders", "other")
    )
    assert named(found, "problem") == set()
    assert "nobody" in found["access"].what
    assert "the relay refuses this stream with 403" in refused["answer"].what
    assert token not in f"{refused} {found}"


@pytest.mark.slow
def test_it_sees_what_nginx_does_to_a_stream(
    database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    beating = start_relay("--heartbeat", "0.5", "--allow-channel", "*", dsn=database.dsn).bind
    quiet = start_relay("--allow-channel", "*", dsn=database.dsn).bind
    host = "proxy_set_header Host $http_host;"
    cases: list[tuple[str, str, str, dict[str, tuple[str, str, str]]]] = [
        (beating, f"{host} proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;", "/events/orders", {
            "first byte": ("problem", "the proxy buffers", "proxy_buffering off;"),
        }),
        # Its Host is that of the upstream, so the page looks like a stranger's.
        (beating, "gzip on; gzip_types *; gzip_min_length 1;", "/events?channel=a&channel=b", {
            "upstream": ("warning", "HTTP/1.0", "proxy_http_version 1.1"),
            "compression": ("warning", "gzip", "gzip off;"),
            "HTTP": ("warning", "HTTP/1.1", "https"),
            "headers": ("problem", "another origin", "proxy_set_header Host"),
            "delay": ("ok", "", ""),
        }),
        (quiet, f"{host} proxy_read_timeout 2s;", "/events/orders", {
            "heartbeat": ("problem", "cut the stream", "proxy_read_timeout"),
        }),
    ]  # fmt: skip
    for number, (relay, lines, path, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Nginx(folder, "", "", f"location / {{ proxy_pass http://{relay}; {lines} }}") as nginx:
            found = diagnose(database.dsn, "--url", nginx.url + path)
        assert named(found, "problem") == {check for check in expected if expected[check][0] == "problem"}
        for check, (level, what, fix) in expected.items():
            assert found[check].level == level, found[check]
            assert what in found[check].what
            assert fix in found[check].fix


@pytest.mark.slow
@pytest.mark.parametrize(("options", "level"), [("", "warning"), ("option http-no-delay", "ok")])
def test_it_sees_that_haproxy_holds_small_writes_back(
    database: Database, start_relay: StartRelay, tmp_path: Path, options: str, level: str
) -> None:
    relay = start_relay("--heartbeat", "0.5", "--allow-channel", "*", dsn=database.dsn)
    port = harness.free_port()
    text = SLOW_PROXY.format(port=port, relay=relay.bind, options=options)
    (tmp_path / "haproxy.cfg").write_text(text)
    command = [harness.require("haproxy"), "-q", "-db", "-f", str(tmp_path / "haproxy.cfg")]

    def look(url: str) -> Finding:
        return diagnose(database.dsn, "--url", url)["delay"]

    with harness.Daemon(command, port, tmp_path):
        # The commit of a busy machine may take so long itself that the delay behind it does not show.
        url = f"http://127.0.0.1:{port}/events/orders"
        found = harness.wait_until(lambda: [each for each in [look(url)] if each.level == level], 60)
    assert ("option http-no-delay" in found[0].fix) is (level == "warning")


@pytest.mark.slow
def test_it_tells_what_a_restart_looks_like_while_the_relay_is_away(
    database: Database, tmp_path: Path
) -> None:
    recipe = harness.nginx_recipe("server { }")
    for name, server, problems in (
        ("with", recipe, {"answer"}),
        ("without", recipe.replace("error_page", "# error_page"), {"answer", "restart"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with Nginx(folder, f"unix:{tmp_path}/http.sock", server=server) as nginx:
            found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
        assert named(found, "problem") == problems
    assert "502" in found["restart"].what
    assert "error_page 502 503 504 = @sse_retry" in found["restart"].fix


@pytest.mark.slow
def test_another_database_or_none_leaves_the_rest_to_measure(
    database: Database, start_relay: StartRelay, server: harness.Server
) -> None:
    url = start_relay(*BEATING, dsn=database.dsn).url("orders")
    with server.fresh_database() as other:
        found, alone = diagnose(other.dsn, "--url", url), diagnose("host=127.0.0.1 port=1", "--url", url)
    assert named(found, "problem") == {"delay"}
    assert "give the DSN" in found["delay"].fix
    assert named(alone, "problem") == {"connection"}
    assert alone["delay"].level == "unknown"
    assert alone["heartbeat"].level == "ok"
