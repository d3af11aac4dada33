"""The docs' image, its steps run without a registry: packages, user, command, health check."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg2.extensions

import harness
from harness import Database, RawStream, free_port, wait_until
from pages import block


def steps() -> dict[str, str]:
    """Return the image's instructions by name; each is there once."""
    lines = block("dockerfile", "FROM ").splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


def environment(folder: Path, port: int, admin: int) -> dict[str, str]:
    """Return what the Compose file sets for the relay, with a folder and ports of this machine's."""
    service = block("yaml", "services:").split("  relay:\n")[1].split("    secrets:")[0]
    found = dict(re.findall(r"^      (SSE_RELAY_\w+): (.*)$", service, re.MULTILINE))
    assert found["SSE_RELAY_BIND"] == "0.0.0.0:8008"
    assert found["SSE_RELAY_ADMIN"] == "127.0.0.1:8009"
    return {
        **found,
        "SSE_RELAY_DSN_FILE": str(folder / "dsn"),
        "SSE_RELAY_BIND": f"127.0.0.1:{port}",
        "SSE_RELAY_ADMIN": f"127.0.0.1:{admin}",
    }


def test_the_image_runs_as_nobody_and_is_healthy(database: Database, open_folder: Path) -> None:
    image, port, admin = steps(), free_port(), free_port()
    system = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    open_folder.chmod(0o755)
    subprocess.run(["python3", "-m", "venv", str(open_folder / "venv")], check=True, timeout=60, env=system)
    path = {"PATH": f"{open_folder}/venv/bin:{system['PATH']}"}
    install = image["RUN"]
    assert install.startswith("pip install ")
    inherited = {**harness.clean_environment(), **path}
    subprocess.run(["sh", "-c", install], check=True, capture_output=True, timeout=100, env=inherited)

    assert image["COPY"] == "sse_relay.py /"
    program = open_folder / "sse_relay.py"
    program.write_bytes(harness.PROGRAM.read_bytes())
    dsn = open_folder / "dsn"
    dsn.write_text(psycopg2.extensions.make_dsn(database.dsn))
    for file in (program, dsn):
        file.chmod(0o644)

    user = image["USER"]
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    as_user = as_user if os.geteuid() == 0 else []
    command = [*json.loads(image["ENTRYPOINT"]), *json.loads(image["CMD"])]
    command = [word.replace("/sse_relay.py", str(program)) for word in command]
    env = {**path, **environment(open_folder, port, admin)}
    _, _, health = image["HEALTHCHECK"].partition("CMD ")
    check = [word.replace("127.0.0.1:8009", f"127.0.0.1:{admin}") for word in json.loads(health)]

    def healthy() -> bool:
        return subprocess.run([*as_user, *check], env=path, capture_output=True, check=False).returncode == 0

    assert not healthy()
    process = subprocess.Popen([*as_user, *command], env=env, cwd="/", stderr=subprocess.PIPE, text=True)
    try:
        wait_until(healthy, 20, "the health check")
        with RawStream(f"127.0.0.1:{port}", "/events/public-orders") as client:
            client.wait_for(b"id: ")
            database.notify("public-orders", "hello")
            client.wait_for(b"data: hello")
        with RawStream(f"127.0.0.1:{admin}", "/metrics") as metrics:
            metrics.wait_for(b"sse_relay_events_total 1.0")
        process.terminate()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.communicate()


def test_each_alert_names_a_metric_that_there_is(
    start_relay: Callable[..., harness.Relay], database: Database
) -> None:
    admin = f"127.0.0.1:{free_port()}"
    start_relay("--admin", admin, dsn=database.dsn)
    with RawStream(admin, "/metrics") as metrics:
        body = metrics.wait_for(b"sse_relay_delivery_delay_seconds_sum").decode()
    known = set(re.findall(r"^# TYPE (\w+) ", body, re.MULTILINE))
    named = re.findall(r"^        expr: .*?\b(sse_relay_\w+)", block("yaml", "groups:"), re.MULTILINE)
    assert len(named) == 5
    assert set(named) <= known
