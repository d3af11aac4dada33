"""`demo`: from nothing to an event on a page, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

import harness
from harness import ROOT, Browser, Database, Page, Relay, SseReader
from pages import pages

pytestmark = pytest.mark.slow

LAST_LINE = "Ctrl-C ends it."


def start(*options: str, temporary: Path | None = None) -> Relay:
    env = {"TMPDIR": str(temporary)} if temporary else {}
    demo = Relay(*options, command=("demo",), env=env, wait=False)
    try:
        demo.wait_for_log(LAST_LINE, timeout=30)
    except BaseException:
        end(demo)
        raise
    return demo


def end(demo: Relay) -> None:
    """End a demo that may still run; one that is killed could not remove its folder."""
    try:
        if demo.process.poll() is None:
            demo.stop(20)
    finally:
        demo.close()


def printed(demo: Relay) -> list[str]:
    """What the demo says to use: the DSN, the page's address, then the commands."""
    return [line.strip() for line in demo.lines if line.startswith("    ")]


def processes_below(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder).encode() in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.fixture(scope="module")
def demo() -> Iterator[Relay]:
    running = start()
    yield running
    end(running)


@pytest.fixture
def page(browser: Browser, demo: Relay) -> Iterator[Page]:
    with browser.open(url=f"http://{demo.bind}/") as opened:
        wait_state(opened, "live")
        yield opened


def wait_state(page: Page, state: str) -> None:
    harness.wait_until(
        lambda: page.evaluate("document.getElementById('state').dataset.state") == state, what=state
    )


def rows(page: Page, kind: str = "event") -> list[str]:
    """The data of the events on the page, or what it says of gaps, newest first."""
    script = f"[...document.querySelectorAll('#events .{kind} .data')].map(data => data.textContent)"
    return list(page.evaluate(script))


def wait_row(page: Page, data: str) -> None:
    harness.wait_until(lambda: data in rows(page), what=f"a row {data!r}")


def reasons(page: Page) -> list[str]:
    return [text.rpartition("(")[2] for text in rows(page, "gap")]


def figures(page: Page) -> dict[str, tuple[str, str, str]]:
    """Each figure's present value, its most, and its plot, by its name."""
    script = """[...document.querySelectorAll('#figures > div')].map(figure => [
        figure.querySelector("dt").textContent,
        [...["now", "quiet"].map(kind => figure.querySelector("." + kind).textContent),
         figure.querySelector("path").getAttribute("d")]])"""
    return {name: tuple(values) for name, values in page.evaluate(script)}


def status(demo: Relay) -> dict[str, Any]:
    return dict(httpx.get(f"http://{demo.bind}/status").json())


def publish_anyhow(demo: Relay, data: str) -> bool:
    """Publish past the page; return whether the demo was there."""
    try:
        return httpx.post(f"http://{demo.bind}/publish", json={"channel": "orders", "data": data}).is_success
    except httpx.TransportError:
        return False


def click(page: Page, button: str) -> None:
    page.browser.run(page.playwright.get_by_role("button", name=button, exact=True).click())


def publish(page: Page, data: str, name: str = "", channel: str = "orders") -> None:
    for field, value in (("channel", channel), ("event", name), ("data", data)):
        page.browser.run(page.playwright.fill(f"#publish [name={field}]", value))
    click(page, "Publish")


def result(page: Page) -> str:
    return str(harness.wait_until(lambda: page.evaluate("document.getElementById('published').textContent")))


# ==== The page ================================================================


def test_from_nothing_to_the_first_event_takes_less_than_10_s(browser: Browser) -> None:
    began = time.monotonic()
    fresh = start()
    try:
        with browser.open(url=f"http://{fresh.bind}/") as page:
            wait_state(page, "live")
            publish(page, "the first", name="created")
            wait_row(page, "the first")
            seconds = time.monotonic() - began
            assert result(page) == "Published to orders."
            assert "created" in page.evaluate("document.querySelector('#events li').textContent")
            with contextlib.closing(Database(printed(fresh)[0])) as database:
                for text in ('<b>"quoted"</b> & more', "two\nlines", "Größe 🎉"):
                    database.notify("orders", text)
                    wait_row(page, text)
            # Nothing is fetched from elsewhere: it works without the internet.
            assert all(url.startswith(f"http://{fresh.bind}/") for _, url in page.requests)
    finally:
        end(fresh)
    # Where others use the machine too, as much longer as there are more of them than processors.
    assert seconds < 10 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_a_cut_page_gets_what_it_missed(page: Page) -> None:
    publish(page, "before")
    wait_row(page, "before")
    click(page, "Cut the connection")
    wait_state(page, "cut")
    publish(page, "meanwhile")
    harness.wait_until(lambda: result(page).startswith("Published"), what="the answer")
    click(page, "Resume")
    wait_state(page, "live")
    wait_row(page, "meanwhile")
    assert rows(page)[:2] == ["meanwhile", "before"]
    assert reasons(page) == []


@pytest.mark.parametrize("source", ["notify", "log"])
def test_restarts_are_resumed_without_loss_or_with_a_gap(source: str, browser: Browser) -> None:
    fresh = start("--source", source)
    try:
        with browser.open(url=f"http://{fresh.bind}/") as page:
            wait_state(page, "live")
            publish(page, "before")
            wait_row(page, "before")
            epoch = status(fresh)["position"].partition("-")[0]

            click(page, "Restart the relay")
            wait_state(page, "waiting")
            harness.wait_until(lambda: publish_anyhow(fresh, "meanwhile"), what="the demo's answer")
            harness.wait_until(lambda: status(fresh)["ready"], 20, "the relay's return")
            assert (status(fresh)["position"].partition("-")[0] == epoch) == (source == "log")
            wait_state(page, "live")
            publish(page, "after")
            wait_row(page, "after")
            if source == "log":
                assert (rows(page), reasons(page)) == (["after", "meanwhile", "before"], [])
            else:
                # Most likely nobody listened to the channel when it was published.
                assert [row for row in rows(page) if row != "meanwhile"] == ["after", "before"]
                assert reasons(page) == ["restart)."]

            click(page, "Restart PostgreSQL")
            harness.wait_until(lambda: "lost PostgreSQL" in fresh.log, 20, "the end of the connection")
            harness.wait_until(lambda: status(fresh)["ready"], 20, "the connection's return")
            assert page.evaluate("document.getElementById('state').dataset.state") == "live"
            assert publish_anyhow(fresh, "last")
            wait_row(page, "last")
            assert reasons(page) == ([] if source == "log" else ["outage).", "restart)."])
        assert "Traceback" not in fresh.log
    finally:
        end(fresh)


def test_the_page_is_for_everybody(page: Page, node_modules: Path) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    publish(page, "long" * 500)
    wait_row(page, "long" * 500)
    publish(page, "refused", "error")
    harness.wait_until(lambda: result(page).startswith("Not published"), what="the answer")
    assert "an event cannot be named 'error'" in result(page)
    assert "refused" not in rows(page)
    looks: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in looks:
        for width in (1200, 360):
            page.set_look(scheme, width)
            assert page.violations(node_modules) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


# ==== What the page asks ======================================================


def test_the_page_is_html(demo: Relay) -> None:
    for method in ("GET", "HEAD"):
        response = httpx.request(method, f"http://{demo.bind}/")
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        # Nothing that a publisher sends could bring in a script, and no other page can frame this one.
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
    for path in ("/publish", "/restart-relay", "/restart-postgresql"):
        assert httpx.get(f"http://{demo.bind}{path}").status_code == 404


NOT_SENT = "the request is no JSON object"
# What the page could ask for, and what is wrong with it.
PROBLEMS: list[tuple[bytes, str]] = [
    *((body, NOT_SENT) for body in (b"", b"not json", b"\xff", b"[]", b"null", b"[" * 100_000)),
    (b'{"channel": "orders"}', NOT_SENT),
    (b'{"channel": "orders", "data": 1}', NOT_SENT),
    (b'{"channel": "orders", "data": "x", "event": 1}', NOT_SENT),
    (b'{"channel": "sse_relay_x", "data": "x"}', "the relay's own"),
    (b'{"channel": "orders", "data": "\\ud800"}', "not valid UTF-8"),
]


def test_what_cannot_be_published_is_answered_with_a_problem(demo: Relay) -> None:
    for body, detail in PROBLEMS:
        response = httpx.post(f"http://{demo.bind}/publish", content=body)
        assert response.status_code == 400
        assert response.headers["Content-Type"].startswith("application/problem+json")
        assert response.json()["status"] == 400
        assert detail in response.json()["detail"]

    response = httpx.post(f"http://{demo.bind}/publish", content=b"x" * (2 << 20))
    assert response.status_code == 413, "one without end"


def test_other_pages_may_not_publish(demo: Relay, browser: Browser) -> None:
    body = json.dumps({"channel": "orders", "data": "forged"})
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        response = httpx.post(f"http://{demo.bind}/publish", content=body, headers={"Origin": origin})
        assert response.status_code == 400
        assert "only the demo's own page may do this" in response.json()["detail"]
        for path in ("/restart-relay", "/restart-postgresql"):
            response = httpx.post(f"http://{demo.bind}{path}", headers={"Origin": origin})
            assert response.status_code == 400
    with SseReader(demo.url("orders")) as reader, browser.open() as other:
        reader.wait_for_id()
        # What a page may send anywhere without asking first.
        send = "([url, body]) => fetch(url, {method: 'POST', mode: 'no-cors', body}).then(() => 'sent')"
        assert other.evaluate(send, [f"http://{demo.bind}/publish", body]) == "sent"
        httpx.post(f"http://{demo.bind}/publish", json={"channel": "orders", "data": "own"})
        reader.wait_for_data("own")
        assert reader.data == ["own"]
        assert not reader.ended
    assert "Traceback" not in demo.log


# ==== In the terminal =========================================================


def without_chance(text: str) -> str:
    """Replace what differs from one run to the next."""
    return re.sub(r"(?m)^id: \w+-", "id: EPOCH-", re.sub(r"retry: \d+", "retry: WAIT", text))


@pytest.mark.parametrize("source", ["notify", "log"])
def test_the_printed_commands_show_what_the_readme_shows_until_ctrl_c(
    source: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.require("psql")
    monkeypatch.chdir(ROOT)
    fresh = start("--source", source, temporary=open_folder)
    try:
        _, address, curl, psql, command = printed(fresh)
        assert address == f"http://{fresh.bind}/"
        assert curl.startswith("curl -N ")
        # As a page asks that runserver serves, which reads the demo's streams too.
        curl += " --max-time 60 -H 'Origin: http://localhost:8000'"
        with subprocess.Popen(["bash", "-c", f"exec {curl}"], stdout=subprocess.PIPE, text=True) as stream:
            assert stream.stdout is not None
            received = ""

            def read_until(end: str) -> None:
                nonlocal received
                while not received.endswith(end):
                    line = stream.stdout.readline()  # type: ignore[union-attr]  # asserted above
                    assert line, received
                    received += line

            read_until('"since":null}\n\n')
            assert f"{sys.executable} sse_relay.py publish" in command, "short enough to be typed"
            subprocess.run(["bash", "-c", command], check=True, timeout=20)
            read_until("data: hello\n\n")
            if source == "notify":
                shown = pages()["README.md"].partition("<!-- curl -->\n```text\n")[2].partition("```\n")[0]
                assert without_chance(received) == without_chance(shown)
            received = ""
            subprocess.run(["bash", "-c", psql], check=True, timeout=20)
            read_until("data: hello\n\n")
            assert processes_below(open_folder)
            # PostgreSQL is not in the terminal's group.
            fresh.process.send_signal(signal.SIGINT)
            assert fresh.wait(20) == 0
            assert fresh.lines[-1] == LAST_LINE, "nothing is said at the end"
    finally:
        end(fresh)
    harness.wait_until(lambda: not processes_below(open_folder), what="the end of all processes")
    assert list(open_folder.iterdir()) == []


def launch(folder: Path, bind: str | None = None) -> Relay:
    """Start a demo without waiting, in a session of its own and with a folder for its files."""
    env = {"TMPDIR": str(folder)}
    return Relay(command=("demo",), bind=bind, prefix=("setsid",), env=env, wait=False)


@pytest.mark.parametrize(
    ("sign", "number"),
    [
        ("sse-relay-*", signal.SIGINT),
        ("sse-relay-*/data/base", signal.SIGTERM),
        ("sse-relay-*/data/base", signal.SIGHUP),
        ("sse-relay-*/data/postmaster.pid", signal.SIGINT),
    ],
)
def test_a_signal_while_it_starts_leaves_nothing_behind(
    open_folder: Path, sign: str, number: signal.Signals
) -> None:
    with launch(open_folder) as starting:
        harness.wait_until(lambda: list(open_folder.glob(sign)), what=sign)
        os.killpg(starting.pid, number)
        assert starting.wait(20) in (0, 1)
    assert "Traceback" not in starting.log
    harness.wait_until(lambda: not processes_below(open_folder), what="the end of PostgreSQL's processes")
    assert list(open_folder.iterdir()) == []


def test_a_demo_that_cannot_start_says_why(demo: Relay, open_folder: Path) -> None:
    with launch(open_folder, demo.bind) as second:
        assert second.wait(30) == 1
    assert second.lines[-1].startswith(f"Error: cannot listen on {demo.bind}: Address already in use; ")
    assert "Traceback" not in second.log
    assert list(open_folder.iterdir()) == []
