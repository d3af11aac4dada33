"""The docs' image and Compose file, without a registry: packages, user, command, health check, nginx."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg2.extensions
import pytest

import harness
from harness import Database, Nginx, RawStream, free_port, wait_until
from pages import block
from sse_relay import read_key, sign_token

# One installs packages.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def steps() -> dict[str, str]:
    """Return the image's instructions by name; each is there once."""
    lines = block("dockerfile", "FROM ").splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


class Image:
    """What the image holds, in a folder that its user can read."""

    def __init__(self, folder: Path) -> None:
        self.steps = steps()
        self.folder = folder
        folder.chmod(0o755)
        venv = ["python3", "-m", "venv", str(folder / "venv")]
        subprocess.run(venv, check=True, timeout=60, env={"PATH": SYSTEM_PATH})
        self.path = {"PATH": f"{folder}/venv/bin:{SYSTEM_PATH}"}
        install = self.steps["RUN"]
        assert install.startswith("pip install ")
        env = {**harness.clean_environment(), **self.path}
        subprocess.run(["sh", "-c", install], check=True, capture_output=True, timeout=240, env=env)
        assert self.steps["COPY"] == "--chmod=644 sse_relay.py /"
        self.add("sse_relay.py", harness.PROGRAM.read_text())
        user = self.steps["USER"]
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
        self._as_user = as_user if os.geteuid() == 0 else []

    def add(self, name: str, text: str) -> str:
        file = self.folder / name
        file.write_text(text)
        file.chmod(0o644)
        return str(file)

    def healthy(self, port: int) -> bool:
        _, _, health = self.steps["HEALTHCHECK"].partition("CMD ")
        check = [word.replace("127.0.0.1:8008", f"127.0.0.1:{port}") for word in json.loads(health)]
        done = subprocess.run([*self._as_user, *check], env=self.path, capture_output=True, check=False)
        return done.returncode == 0

    @contextlib.contextmanager
    def running(self, port: int, env: dict[str, str]) -> Iterator[None]:
        """Run a container with these variables until it is healthy, and end it."""
        name, _, bind = self.steps["ENV"].partition("=")
        assert (name, bind) == ("SSE_RELAY_BIND", "0.0.0.0:8008")
        command = [*json.loads(self.steps["ENTRYPOINT"]), *json.loads(self.steps["CMD"])]
        command = [word.replace("/sse_relay.py", f"{self.folder}/sse_relay.py") for word in command]
        process = subprocess.Popen(
            [*self._as_user, *command], env={**self.path, name: f"0.0.0.0:{port}", **env}, cwd="/",
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            wait_until(lambda: self.healthy(port), 20, "the health check")
            yield
            process.terminate()
            assert process.wait(5) == 0
        finally:
            process.kill()
            process.communicate()


def test_the_image_runs_as_nobody_and_is_healthy(database: Database, open_folder: Path) -> None:
    image, port, admin = Image(open_folder), free_port(), free_port()
    assert not image.healthy(port)
    (run,) = (line for line in block("sh", "docker build").splitlines() if line.startswith("docker run "))
    assert "-e DATABASE_URL -e SSE_RELAY_ALLOW_CHANNEL='public-*'" in run
    variables = {"DATABASE_URL": database.dsn, "SSE_RELAY_ALLOW_CHANNEL": "public-*"}
    with image.running(port, variables), RawStream(f"127.0.0.1:{port}", "/events/public-orders") as client:
        client.wait_for(b"id: ")
        database.notify("public-orders", "hello")
        client.wait_for(b"data: hello")

    # By the Compose file, and with a token.
    service = block("yaml", "# compose.yaml").split("  relay:\n")[1].split("    secrets:")[0]
    variables = dict(re.findall(r"^      (SSE_RELAY_\w+): (.*)$", service, re.MULTILINE))
    variables["SSE_RELAY_DSN_FILE"] = image.add("dsn", psycopg2.extensions.make_dsn(database.dsn))
    assert variables["SSE_RELAY_ADMIN"] == "0.0.0.0:8009"
    variables["SSE_RELAY_ADMIN"] = f"0.0.0.0:{admin}"
    variables["SSE_RELAY_JWT_KEY_FILE"] = image.add("key", "k" * 40)
    with image.running(port, variables):
        key = read_key(b"k" * 40)
        token = sign_token(key, ["closed"], int(time.time()) + 60)
        headers = {"Host": "relay", "Authorization": f"Bearer {token}"}
        with RawStream(f"127.0.0.1:{port}", "/events/closed", headers=headers) as client:
            client.wait_for(b"id: ")
            database.notify("closed", "hello")
            client.wait_for(b"data: hello")
        assert "sse_relay_events_total 1.0" in httpx.get(f"http://127.0.0.1:{admin}/metrics").text


class Names:
    """A name server that gives one address, for a second, to whoever asks for any name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while (message := self._socket.recvfrom(512))[0]:
            question, asker = message
            kind = question[12:].split(b"\0", 1)[1][:2]
            answers = b"\0\1" if kind == b"\0\1" else b"\0\0"
            reply = question[:2] + b"\x81\x80\0\1" + answers + b"\0\0\0\0" + question[12:]
            if kind == b"\0\1":
                reply += b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(self.address)
            self._socket.sendto(reply, asker)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join(10)
        self._socket.close()


def test_nginx_follows_a_relay_whose_address_changes(
    start_relay: Callable[..., harness.Relay], database: Database, tmp_path: Path
) -> None:
    text = block("nginx", "# nginx.conf")
    port = free_port()
    with contextlib.closing(Names("127.0.0.2")) as names:
        for old, new in {
            "resolver 127.0.0.11 valid=2s;": f"resolver 127.0.0.1:{names.port} valid=1s ipv6=off;",
            "relay:8008": f"relay:{port}",
        }.items():
            assert old in text
            text = text.replace(old, new)
        http, _, server = text.partition("server {\n    listen 80;\n")
        server = server.rpartition("}")[0]

        def answers(data: str) -> bool:
            with harness.SseReader(f"{nginx.url}/events/public-orders") as reader:
                if not wait_until(lambda: reader.ended or reader.last_event_id, what="a position or an end"):
                    return False
                if reader.ended:
                    return False
                database.notify("public-orders", data)
                reader.wait_for_data(data)
                return True

        with Nginx(tmp_path, "", http, server) as nginx:
            retry = httpx.get(f"{nginx.url}/events/public-orders")
            assert (retry.status_code, retry.text) == (200, "retry: 2000\n\n")
            for address in ("127.0.0.2", "127.0.0.3"):
                names.address = address
                relay = start_relay("--allow-channel", "public-*", bind=f"{address}:{port}", dsn=database.dsn)
                wait_until(lambda: answers("hello"), 20, address)
                assert "openStream" in httpx.get(f"{nginx.url}/events.js").text
                assert relay.stop() == 0


def test_each_alert_can_fire(start_relay: Callable[..., harness.Relay], log_database: Database) -> None:
    """Each series that an alert names exists from the start: a rate from nothing to 1 would be none."""
    relay = start_relay("--source", "log", dsn=log_database.dsn, admin=True)
    metrics = httpx.get(f"http://{relay.admin}/metrics").text
    series = re.findall(r"^(sse_relay_\w+(?:\{.*\})?) ", metrics, re.MULTILINE)
    rules = re.findall(
        r"^        expr: (.*)$", block("yaml", "# /etc/prometheus/rules/sse-relay.yml"), re.MULTILINE
    )
    assert len(rules) == 9
    named = [
        match for rule in rules for match in re.findall(r"(sse_relay_\w+)(?:\{(\w+)=~?\"(.*?)\"\})?", rule)
    ]
    assert len(named) == 9
    for name, label, values in named:
        for value in values.split("|"):
            assert (f'{name}{{{label}="{value}"}}' if label else name) in series, (name, value)
