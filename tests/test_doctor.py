"""`doctor` names what is wrong with a deployment, and the line that mends it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest

import harness
from harness import Database, Nginx, Relay, nginx_recipe
from sse_relay import Finding

StartRelay = Callable[..., Relay]


@dataclass
class Diagnosis:
    """What the command printed as JSON, and its exit status."""

    status: int
    findings: dict[str, Finding]

    def level(self, check: str) -> str:
        return self.findings[check].level

    @property
    def problems(self) -> set[str]:
        return {name for name, finding in self.findings.items() if finding.level == "problem"}


def run_doctor(
    *options: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*prefix, sys.executable, str(harness.PROGRAM), "doctor", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=90,
        env={**harness.clean_environment(), **(env or {})},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def diagnose(
    dsn: str, *options: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> Diagnosis:
    done = run_doctor("--json", "--dsn", dsn, *options, prefix=prefix, env=env)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    findings = {finding["check"]: Finding(**finding) for finding in answer["findings"]}
    assert len(findings) == len(answer["findings"])
    diagnosis = Diagnosis(done.returncode, findings)
    assert answer["healthy"] is (done.returncode == 0) is (not diagnosis.problems)
    for finding in findings.values():
        assert finding.mend or finding.level == "ok", finding
        assert "\n" not in finding.what + finding.mend
    return diagnosis


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may log in with the password ``secret`` and nothing else."""
    name = f"role_{psycopg2.extensions.parse_dsn(database.dsn)['dbname']}"
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    yield name
    database.terminate_backends()
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def as_role(database: Database, role: str) -> str:
    return psycopg2.extensions.make_dsn(database.dsn, user=role, password="secret")


# ==== PostgreSQL ==============================================================


def test_nothing_is_wrong_with_a_good_database(log_database: Database) -> None:
    found = diagnose(log_database.dsn)
    assert found.status == 0
    assert list(found.findings) == ["open files", "connection", "notifications", "queue"]
    found = diagnose(log_database.dsn, "--source", "log")
    assert found.status == 0
    assert list(found.findings)[4:] == ["grants", "schema", "epoch", "retention", "backlog"]
    assert {finding.level for finding in found.findings.values()} == {"ok"}


def test_people_read_a_line_for_each_finding_and_one_for_what_mends_it(database: Database) -> None:
    done = run_doctor("--dsn", database.dsn, "--source", "log")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[1].startswith("ok       connection: PostgreSQL answers at 127.0.0.1 port ")
    assert lines[-2:] == [
        "problem  schema: the durable log is not installed in this database",
        "         -> run sse_relay.py schema --apply",
    ]


def test_it_names_a_wrong_password_and_does_not_show_it(database: Database, role: str) -> None:
    dsn = psycopg2.extensions.make_dsn(database.dsn, user=role, password="not-the-right-one")
    done = run_doctor("--dsn", dsn)
    assert done.returncode == 1
    assert "password authentication failed" in done.stdout
    assert "correct user and password" in done.stdout
    assert "not-the-right-one" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "words", "mend"),
    [
        ({"dbname": "nowhere"}, 'database "nowhere" does not exist', "psql -l"),
        ({"port": "1"}, "refused", "start PostgreSQL"),
        ({"host": "nowhere.invalid"}, "could not translate host name", "name server"),
        ({"sslmode": "require"}, "does not support SSL", "sslmode"),
    ],
)
def test_it_tells_why_nobody_gets_in(
    database: Database, change: dict[str, str], words: str, mend: str
) -> None:
    found = diagnose(psycopg2.extensions.make_dsn(database.dsn, **change))
    assert found.problems == {"connection"}
    assert words in found.findings["connection"].what
    assert mend in found.findings["connection"].mend


def test_it_names_a_pooler_in_transaction_mode(database: Database, open_folder: Path) -> None:
    with harness.pgbouncer(database, "transaction", open_folder) as dsn:
        found = diagnose(dsn)
        assert found.problems == {"notifications"}
        assert "pooler in transaction mode" in found.findings["notifications"].what
    database.terminate_backends()


def test_a_pooler_in_session_mode_is_fine(database: Database, open_folder: Path) -> None:
    with harness.pgbouncer(database, "session", open_folder) as dsn:
        assert diagnose(dsn).status == 0
    database.terminate_backends()


def test_it_names_a_standby(own_server: harness.Server) -> None:
    own_server.demote()
    found = diagnose(own_server.dsn)
    assert found.problems == {"connection"}
    assert "hot standby" in found.findings["connection"].what
    assert "name the primary" in found.findings["connection"].mend


@pytest.mark.parametrize(
    ("version", "mend"), [(0, "run sse_relay.py schema --apply"), (99, "install a newer sse-relay")]
)
def test_it_names_a_schema_of_another_version(log_database: Database, version: int, mend: str) -> None:
    log_database.execute("UPDATE sse_relay.settings SET version = %s", (version,))
    found = diagnose(log_database.dsn, "--source", "log")
    assert found.problems == {"schema"}
    assert f"version {version}" in found.findings["schema"].what
    assert found.findings["schema"].mend == mend


def test_the_grants_that_it_names_are_just_what_a_relay_needs(
    log_database: Database, role: str, start_relay: StartRelay
) -> None:
    dsn = as_role(log_database, role)
    found = diagnose(dsn, "--source", "log")
    assert found.problems == {"grants"}
    mend = found.findings["grants"].mend
    assert mend.count("GRANT") == 3
    log_database.execute(mend)
    assert diagnose(dsn, "--source", "log").status == 0
    relay = start_relay("--source", "log", dsn=dsn)
    with harness.SseReader(relay.url("orders")) as reader:
        reader.wait_for_id()
        log_database.execute("SELECT sse_relay.publish('orders', 'hello'::text)")
        reader.wait_for_data("hello")


def test_one_missing_grant_is_named_alone(log_database: Database, role: str) -> None:
    dsn = as_role(log_database, role)
    log_database.execute(diagnose(dsn, "--source", "log").findings["grants"].mend)
    log_database.execute(f"REVOKE EXECUTE ON FUNCTION sse_relay.prune() FROM {role}")
    found = diagnose(dsn, "--source", "log")
    assert found.findings["grants"].mend == f"GRANT EXECUTE ON FUNCTION sse_relay.prune() TO {role}"


def test_it_sees_a_log_that_came_from_elsewhere(log_database: Database) -> None:
    log_database.execute("UPDATE sse_relay.epoch SET system = 1")
    found = diagnose(log_database.dsn, "--source", "log")
    assert found.level("epoch") == "warning"
    assert found.status == 0


def test_it_sees_a_log_that_nobody_prunes_and_one_that_keeps_little(log_database: Database) -> None:
    log_database.execute("UPDATE sse_relay.settings SET retention = '1 minute'")
    assert "relay.gap" in diagnose(log_database.dsn, "--source", "log").findings["retention"].what
    log_database.execute(
        "INSERT INTO sse_relay.events (xid, channel, data, created)"
        " SELECT pg_current_xact_id(), 'orders', '', now() - '1 hour'::interval FROM generate_series(1, 3)"
    )
    found = diagnose(log_database.dsn, "--source", "log")
    assert found.level("retention") == "warning"
    assert "older ones are still there" in found.findings["retention"].what


def test_it_sees_events_that_no_relay_numbers(log_database: Database, start_relay: StartRelay) -> None:
    log_database.execute("SELECT sse_relay.publish('orders', 'hello'::text)")
    found = diagnose(log_database.dsn, "--source", "log")
    assert found.level("backlog") == "warning"
    assert "1 transaction(s)" in found.findings["backlog"].what
    start_relay("--source", "log", dsn=log_database.dsn)
    assert diagnose(log_database.dsn, "--source", "log").level("backlog") == "ok"


@pytest.mark.parametrize(("limit", "level"), [(512, "problem"), (4096, "warning"), (16384, "ok")])
def test_it_names_a_low_limit_of_open_files(database: Database, limit: int, level: str) -> None:
    prefix = (harness.require("prlimit"), f"--nofile={limit}")
    found = diagnose(database.dsn, prefix=prefix)
    assert found.level("open files") == level
    assert str(limit) in found.findings["open files"].what
    if level != "ok":
        assert "LimitNOFILE=65536" in found.findings["open files"].mend


# ==== Through a proxy =========================================================


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://127.0.0.1/events/orders", "http://127.0.0.1/", "http://127.0.0.1/events/%00"]
)
def test_what_is_no_stream_is_a_usage_error(database: Database, url: str) -> None:
    assert run_doctor("--dsn", database.dsn, "--url", url).returncode == 2


@pytest.fixture
def served(start_relay: StartRelay, database: Database, tmp_path: Path) -> str:
    """A relay that beats often, on a unix socket; its address in the form of --bind."""
    address = f"unix:{tmp_path}/http.sock"
    start_relay("--heartbeat", "0.5", bind=address, dsn=database.dsn)
    return address


@pytest.mark.parametrize("source", ["notify", "log"])
def test_behind_the_readmes_nginx_all_is_well(
    log_database: Database, start_relay: StartRelay, tmp_path: Path, source: str
) -> None:
    address = f"unix:{tmp_path}/http.sock"
    start_relay(
        "--heartbeat", "0.5", "--source", source, "--allow-channel", "*", bind=address, dsn=log_database.dsn
    )
    with Nginx(tmp_path, address, tls=True) as nginx:
        found = diagnose(
            log_database.dsn, "--source", source, "--url", f"{nginx.url}/events/orders",
            env={"SSL_CERT_FILE": str(nginx.certificate)},
        )  # fmt: skip
    assert found.status == 0
    levels = {name: finding.level for name, finding in found.findings.items() if finding.level != "ok"}
    assert levels == {"restart": "unknown"}
    assert set(found.findings) >= {"first byte", "heartbeat", "delay", "compression", "HTTP", "upstream"}
    assert "HTTP/2" in found.findings["HTTP"].what


def location(relay: str, *lines: str) -> str:
    return f"location / {{ proxy_pass http://{relay}; {' '.join(lines)} }}"


def test_it_sees_buffering_and_says_what_to_change(database: Database, served: str, tmp_path: Path) -> None:
    server = location(served, "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;")
    with Nginx(tmp_path, served, "", server) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"first byte"}
    assert "the proxy buffers" in found.findings["first byte"].what
    assert "proxy_buffering off;" in found.findings["first byte"].mend


def test_it_sees_what_a_bare_proxy_pass_leaves_out(
    database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay("--heartbeat", "0.5", "--allow-channel", "*", dsn=database.dsn)
    server = location(relay.bind, "gzip on; gzip_types text/event-stream; gzip_min_length 1;")
    with Nginx(tmp_path, "", "", server) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events?channel=orders&channel=stock")
    assert found.level("upstream") == "warning"
    assert "HTTP/1.0" in found.findings["upstream"].what
    assert found.level("compression") == "warning"
    assert "gzip off;" in found.findings["compression"].mend
    assert found.level("HTTP") == "warning"
    # Its Host is that of the upstream, so the page looks like a stranger's.
    assert found.problems == {"headers"}
    assert "proxy_set_header Host" in found.findings["headers"].mend


def test_it_sees_streams_that_are_cut_when_idle(
    database: Database, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(dsn=database.dsn)
    with Nginx(tmp_path, "", "", location(relay.bind, "proxy_read_timeout 2s;")) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
    assert "heartbeat" in found.problems
    assert "proxy_read_timeout" in found.findings["heartbeat"].mend


def test_it_tells_what_a_restart_looks_like_while_the_relay_is_away(
    database: Database, tmp_path: Path
) -> None:
    away = f"unix:{tmp_path}/http.sock"
    with Nginx(tmp_path, away) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"answer"}
    assert found.level("restart") == "ok"
    without = tmp_path / "without"
    without.mkdir()
    server = nginx_recipe("server { }").replace("error_page", "# error_page")
    with Nginx(without, away, server=server) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"answer", "restart"}
    assert "502" in found.findings["restart"].what
    assert "error_page 502 503 504 = @sse_retry" in found.findings["restart"].mend


def test_a_refusal_is_told_with_its_true_status(
    start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/http.sock"
    start_relay("--allow-channel", "open", bind=address, dsn=database.dsn)
    with Nginx(tmp_path, address) as nginx:
        url = f"{nginx.url}/events/closed?access_token=secret-token"
        done = run_doctor("--dsn", database.dsn, "--url", url)
    assert done.returncode == 1
    assert "the relay refuses this stream with 403" in done.stdout
    assert "secret-token" not in done.stdout + done.stderr


def test_an_untrusted_certificate_is_a_problem(database: Database, served: str, tmp_path: Path) -> None:
    with Nginx(tmp_path, served, tls=True) as nginx:
        found = diagnose(database.dsn, "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"answer"}
    assert "certificate" in found.findings["answer"].what


def test_an_event_of_another_database_is_missed(
    database: Database, served: str, server: harness.Server
) -> None:
    relay = served
    with server.fresh_database() as other, Nginx(Path(relay.removeprefix("unix:")).parent, relay) as nginx:
        found = diagnose(other.dsn, "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"delay"}
    assert "give the DSN" in found.findings["delay"].mend


def test_without_a_database_the_rest_is_still_measured(served: str, tmp_path: Path) -> None:
    with Nginx(tmp_path, served) as nginx:
        found = diagnose("host=127.0.0.1 port=1", "--url", f"{nginx.url}/events/orders")
    assert found.problems == {"connection"}
    assert found.level("delay") == "unknown"
    assert found.level("heartbeat") == "ok"
