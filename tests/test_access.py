"""Who may read what, at the real relay: tokens by each way, origins, rules at start, what stays unsaid."""

from __future__ import annotations

import functools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import click
import httpx
import psycopg2.extensions
import pytest
from click.testing import CliRunner
from test_tokens import OTHER_GRANTS, SECRET, forge, forged_tokens, private_pem, public_pem

import harness
from harness import Browser, Database, Page, RawStream, Relay, SseReader
from sse_relay import Settings, cli, foreign_origin, is_local, make_access, resolve_dsn

StartRelay = Callable[..., Relay]
EVENT_STREAM = {"Accept": "text/event-stream"}


# Making one takes longer than a request.
HTTP = httpx.Client(timeout=10)


@pytest.fixture(scope="module", autouse=True)
def _close_client() -> Iterator[None]:
    yield
    HTTP.close()


def token_for(*channels: str, seconds: float = 60, secret: bytes = SECRET) -> str:
    return forge({"channels": list(channels), "exp": time.time() + seconds}, secret=secret)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}".rstrip()}


def cookie(token: str) -> dict[str, str]:
    return {"Cookie": f"theme=dark; sse={token}; last=1"}


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    return file


@pytest.fixture(scope="module")
def shared_database(server: harness.Server) -> Iterator[Database]:
    with server.fresh_database() as database:
        yield database


@pytest.fixture(scope="module")
def guarded(shared_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that wants a token by one of two keys, but for channels named public-…"""
    folder = tmp_path_factory.mktemp("keys")
    secret, public = folder / "secret", folder / "public.pem"
    secret.write_bytes(SECRET + b"\n")
    public.write_bytes(public_pem("RSA"))
    with Relay(
        "--jwt-key-file", str(public), "--jwt-key-file", str(secret), "--jwt-cookie", "sse",
        "--allow-channel", "public-*", "--log-level", "debug", dsn=shared_database.dsn,
    ) as relay:  # fmt: skip
        yield relay


def ask(relay: Relay, channel: str, headers: dict[str, str] | None = None, **query: str) -> httpx.Response:
    """Ask as a program does, for headers alone: the status is the true one."""
    return HTTP.head(relay.url(channel, **query), headers=headers)


# ==== Tokens ==================================================================


def test_each_forged_token_is_refused_by_header_cookie_and_query(guarded: Relay) -> None:
    now = time.time()
    cases = [(401, name, token) for name, token in forged_tokens(now).items()]
    cases += [(403, n, forge({"exp": now + 600, "channels": g})) for n, g in OTHER_GRANTS.items()]
    cases += [(200, "a good one", token_for("orders", seconds=600))]
    url = guarded.url("orders")
    for status, name, token in cases:
        ways = {
            "header": HTTP.head(url, headers=bearer(token)),
            "cookie": HTTP.head(url, headers=cookie(token)),
            "query": HTTP.head(f"{url}?access_token={quote(token)}"),
        }
        answers = {way: answer.status_code for way, answer in ways.items()}
        assert answers == dict.fromkeys(ways, status), name
        if status != 200:
            told = HTTP.get(url, headers={**bearer(token), **EVENT_STREAM})
            assert told.status_code == 200
            assert json.loads(told.text.partition("data:")[2].splitlines()[0])["status"] == status, name
            assert token not in told.text
    for _, name, token in cases:
        longest = max(token.split("."), key=len)
        assert not longest or longest not in guarded.log, name


def test_a_good_token_opens_a_stream_by_each_way(guarded: Relay, shared_database: Database) -> None:
    token = token_for("orders", "tenant-7-*")
    for url, headers in (
        (guarded.url("orders"), bearer(token)),
        (guarded.url("orders"), {"Authorization": f"bearer  {token}"}),
        (guarded.url("tenant-7-x"), cookie(token)),
        (guarded.url("orders", "tenant-7-y", access_token=token), {}),
    ):
        with SseReader(url, headers) as reader:
            reader.wait_for_id()
            shared_database.notify("orders" if "orders" in url else "tenant-7-x", "for you")
            reader.wait_for_data("for you")


def test_header_then_cookie_then_query_and_a_bad_one_is_not_passed_over(guarded: Relay) -> None:
    good, bad = token_for("orders"), token_for("orders", seconds=-1)
    cases: list[tuple[int, str | None, str | None, str | None]] = [
        (401, None, None, None),
        (200, good, bad, bad),
        (401, bad, good, good),
        (200, None, good, bad),
        (401, None, bad, good),
        (200, None, None, good),
        (401, "", good, good),
        (200, None, "", good),
    ]
    for status, header, in_cookie, query in cases:
        headers = {**(bearer(header) if header is not None else {})}
        headers |= cookie(in_cookie) if in_cookie is not None else {}
        answer = ask(guarded, "orders", headers, **({"access_token": query} if query else {}))
        assert answer.status_code == status, (header, in_cookie, query)
    # What a proxy's own password protection adds is no token.
    basic = {"Authorization": "Basic YTpi", **cookie(good)}
    assert ask(guarded, "orders", basic).status_code == 200


def test_cookies_are_not_looked_at_without_the_option(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    relay = start_relay("--jwt-key-file", str(secret_file), dsn=database.dsn)
    assert ask(relay, "orders", cookie(token_for("orders"))).status_code == 401
    assert ask(relay, "orders", bearer(token_for("orders"))).status_code == 200


def test_refusals_have_their_true_status_or_come_in_the_stream(guarded: Relay) -> None:
    for headers, status, reason in (
        ({}, 401, "this channel needs a token"),
        (bearer(token_for("stock")), 403, "the token does not open this channel"),
    ):
        plain = HTTP.get(guarded.url("orders"), headers=headers)
        assert plain.status_code == status
        assert plain.headers["content-type"].startswith("application/problem+json")
        assert "www-authenticate" not in plain.headers
        assert plain.json()["detail"] == reason
        with SseReader(guarded.url("orders"), headers) as reader:
            refused = reader.wait_for(lambda event: event.event == "relay.refused")
            assert json.loads(refused.data) == {"status": status, "reason": reason}
            assert refused.retry == 86_400_000
            assert reader.status == 200
            reader.wait_for_end()


def test_public_channels_need_no_token_and_a_bad_one_does_no_harm(guarded: Relay) -> None:
    assert ask(guarded, "public-news").status_code == 200
    assert ask(guarded, "public-news", bearer("nonsense")).status_code == 200
    for name in ("public", "Public-news", "a-public-news"):
        assert ask(guarded, name).status_code == 401
    # One closed channel closes the stream.
    answer = HTTP.head(guarded.url("public-news", "orders"))
    assert answer.status_code == 401
    mixed = HTTP.head(guarded.url("public-news", "orders"), headers=bearer(token_for("orders")))
    assert mixed.status_code == 200


def test_no_token_opens_the_relays_own_channels(guarded: Relay) -> None:
    for name in ("sse_relay", "sse_relay_canary"):
        assert ask(guarded, name, bearer(token_for("*"))).status_code == 403


def test_other_programs_of_the_database_stay_unread(start_relay: StartRelay, database: Database) -> None:
    relay = start_relay("--allow-channel", "app-*", dsn=database.dsn)
    with SseReader(relay.url("app-orders")) as reader:
        reader.wait_for_id()
        assert ask(relay, "procrastinate_queue").status_code == 403
        assert ask(relay, "app-orders", bearer(token_for("*"))).status_code == 200
        listened = [query for _, _, query in database.backends() if "LISTEN" in query]
        assert not any("procrastinate" in query for query in listened)
        database.notify("procrastinate_queue", "secret")
        database.notify("app-orders", "open")
        reader.wait_for_data("open")
        assert reader.data == ["open"]


def test_the_stream_ends_with_its_token_and_comes_back_with_a_fresh_one(
    guarded: Relay, shared_database: Database
) -> None:
    end = int(time.time()) + 3
    token = forge({"channels": ["orders"], "exp": end})
    with SseReader(guarded.url("orders"), cookie(token)) as reader:
        reader.wait_for_id()
        shared_database.notify("orders", "before")
        reader.wait_for_data("before")
        reader.wait_for_end()
        assert abs(time.time() - end) < 1.2
        # Without the final chunk, and with a wait: every client comes back.
        assert reader.error is not None
        assert not any(event.event.startswith("relay.") for event in reader.events)
        assert reader.blocks[-1].retry is None or reader.blocks[-1].retry < 10_000
    shared_database.notify("orders", "meanwhile")
    position = reader.last_event_id
    with SseReader(guarded.url("orders"), cookie(token), last_event_id=position) as expired:
        refused = expired.wait_for(lambda event: event.event == "relay.refused")
        assert "expired" in refused.data
    with SseReader(guarded.url("orders"), cookie(token_for("orders")), last_event_id=position) as fresh:
        fresh.wait_for_data("meanwhile")
        assert fresh.data == ["meanwhile"]


def test_one_that_does_not_read_is_cut_when_its_token_has_ended(
    guarded: Relay, shared_database: Database
) -> None:
    token = token_for("orders", seconds=2)
    with (
        SseReader(guarded.url("orders"), bearer(token_for("orders"))) as other,
        RawStream(
            guarded.bind, guarded.url("orders"), headers=bearer(token), receive_buffer=4096, reading=False
        ),
    ):
        other.wait_for_id()
        for number in range(30):
            shared_database.notify("orders", f"{number} " + "x" * 7_900)
        connections = f"/proc/{guarded.pid}/fd"
        before = len(list(Path(connections).iterdir()))
        harness.wait_until(
            lambda: len(list(Path(connections).iterdir())) < before, 8, "its descriptor to be free"
        )
        other.wait_for(lambda event: event.data.startswith("29 "))


def test_sighup_reads_the_keys_again_and_leaves_open_streams_alone(
    start_relay: StartRelay, database: Database, secret_file: Path, tmp_path: Path
) -> None:
    another = tmp_path / "another"
    another.write_bytes(b"y" * 32)
    relay = start_relay("--jwt-key-file", str(secret_file), "--jwt-key-file", str(another), dsn=database.dsn)
    new = b"the secret that comes after it, 32 bytes or more"
    old_token, new_token = token_for("orders"), token_for("orders", secret=new)

    def reload(said: str) -> None:
        lines = len(relay.lines)
        relay.process.send_signal(signal.SIGHUP)
        relay.wait_for_log(said, after=lines)

    with SseReader(relay.url("orders"), bearer(old_token)) as reader:
        reader.wait_for_id()
        for bad in (b"too short", private_pem("Ed25519"), b""):
            secret_file.write_bytes(bad)
            reload("the keys stay as they were")
            assert ask(relay, "orders", bearer(old_token)).status_code == 200
        secret_file.unlink()
        reload("the keys stay as they were")
        assert ask(relay, "orders", bearer(old_token)).status_code == 200

        secret_file.write_bytes(new)
        reload("read 2 key files again")
        assert ask(relay, "orders", bearer(old_token)).status_code == 401
        assert ask(relay, "orders", bearer(new_token)).status_code == 200
        # Two keys at once: one can replace the other without a moment in which neither counts.
        assert ask(relay, "orders", bearer(token_for("orders", secret=b"y" * 32))).status_code == 200
        database.notify("orders", "still open")
        reader.wait_for_data("still open")
    assert SECRET.decode() not in relay.log
    assert new.decode() not in relay.log


# ==== The command token =======================================================


@pytest.mark.parametrize("kind", ["secret", "Ed25519"])
def test_the_command_prints_a_token_ready_for_a_shell(
    kind: str, start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    signing, verifying = tmp_path / "signing", tmp_path / "verifying"
    signing.write_bytes(SECRET if kind == "secret" else private_pem(kind))
    verifying.write_bytes(SECRET if kind == "secret" else public_pem(kind))
    relay = start_relay("--jwt-key-file", str(verifying), dsn=database.dsn)
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(harness.PROGRAM))}"
    script = f"""
        set -eu
        TOKEN=$({program} token --key-file {signing} --lifetime 30 orders 'tenant-7-*')
        {harness.require("curl")} -s -I -H "Authorization: Bearer $TOKEN" {relay.url("tenant-7-x")}
    """
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("HTTP/1.1 200")
    assert done.stderr == ""


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(harness.PROGRAM), *arguments], capture_output=True, text=True, timeout=30,
        check=False, env={**harness.clean_environment(), **(env or {})},
    )  # fmt: skip


def test_the_command_refuses_what_cannot_sign(tmp_path: Path) -> None:
    file = tmp_path / "key"
    encrypted = private_pem("RSA", password=b"password")
    for content, said in (
        (public_pem("RSA"), "no private key"), (b"short", "openssl rand -hex 32"), (encrypted, "encrypted"),
    ):  # fmt: skip
        file.write_bytes(content)
        done = CliRunner().invoke(cli, ["token", "--key-file", str(file), "orders"])
        assert (done.exit_code, done.stdout) == (1, "")
        assert said in done.stderr
    assert CliRunner().invoke(cli, ["token", "--key-file", str(tmp_path / "none"), "orders"]).exit_code == 1


def test_without_pyjwt_the_extra_is_named(tmp_path: Path, secret_file: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "jwt.py").write_text("raise ImportError('not installed')\n")
    env = {"PYTHONPATH": str(without)}
    for command in (
        ["token", "--key-file", str(secret_file), "orders"],
        ["run", "--dsn", "host=127.0.0.1", "--bind", "127.0.0.1:1", "--jwt-key-file", str(secret_file)],
    ):
        done = run(*command, env=env)
        assert done.returncode == 1
        assert "pip install 'PyJWT[crypto]'" in done.stderr
        assert "Traceback" not in done.stderr


# ==== Start ===================================================================


def test_strangers_may_not_reach_a_relay_that_nobody_guards() -> None:
    done = run("--dsn", "host=127.0.0.1", "--bind", "127.0.0.1:8008", "--bind", "0.0.0.0:8008")
    assert done.returncode == 2
    assert "0.0.0.0:8008" in done.stderr
    ways = set(re.findall(r"--[a-z-]+", done.stderr.partition("Error:")[2]))
    assert ways == {"--jwt-key-file", "--allow-channel"}
    assert "'*' opens all" in " ".join(done.stderr.split())
    for bind in ("[::]:8008", "192.0.2.1:8008", "127.0.0.1.example:8008"):
        with pytest.raises(click.UsageError, match=re.escape(bind)):
            make_access(Settings(""), ["unix:/run/sse-relay/http.sock", bind])


@pytest.mark.parametrize("option", ["channel", "key"])
def test_either_way_out_lets_the_relay_start(option: str, secret_file: Path) -> None:
    settings = {
        "channel": Settings("", allow_channel=("*",)),
        "key": Settings("", jwt_key_file=(secret_file,)),
    }[option]
    access = make_access(settings, ["0.0.0.0:8008"])
    assert not access.origins.fullmatch("http://localhost:3000")


def test_what_is_local_is_told_by_the_address_alone() -> None:
    for bind in ("127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "localhost:1", "unix:/run/x"):
        assert is_local(bind), bind
    for bind in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "127.example:1", "localhost.example:1", "[fe80::1]:1"):
        assert not is_local(bind), bind


def test_a_cookie_without_a_key_is_refused() -> None:
    """Who names a cookie means that a token is needed."""
    for settings in (Settings("", jwt_cookie="sse"), Settings("", jwt_cookie="sse", allow_channel=("*",))):
        with pytest.raises(click.UsageError, match="--jwt-key-file"):
            make_access(settings, [])


def test_loopback_without_options_warns_and_others_do_not(
    relay: Relay, start_relay: StartRelay, database: Database
) -> None:
    assert "WARNING every channel can be read by everybody" in relay.log
    assert "WARNING" not in start_relay("--allow-channel", "*", dsn=database.dsn).log


# ==== Origins =================================================================

CORS = ("access-control-allow-origin", "access-control-allow-credentials")


def cors_of(url: str, method: str = "GET", **headers: str) -> tuple[int, str | None, str | None]:
    """Return the status and what the answer says about origin and credentials."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with HTTP.stream(method, url, headers=fields) as answer:
        origin, credentials = (answer.headers.get(name) for name in CORS)
        return answer.status_code, origin, credentials


def test_an_allowed_origin_gets_credentials_and_a_foreign_one_nothing(
    start_relay: StartRelay, database: Database
) -> None:
    mine = "https://app.example"
    relay = start_relay("--allow-origin", mine, "--allow-channel", "open", dsn=database.dsn)
    for url, status in ((relay.url("open"), 200), (relay.url("closed"), 403)):
        assert cors_of(url, Origin=mine) == (status, mine, "true")
    assert cors_of(relay.url("open"), "OPTIONS", Origin=mine) == (204, mine, "true")
    foreign = (
        "null", "https://app.example.evil.example", "https://evil.example", "http://app.example",
        "https://app.example:8443", "https://APP.example", "https://app.exampl", "https://xapp.example",
        "http://localhost:3000", "*", "",
    )  # fmt: skip
    for origin in foreign:
        for method in ("GET", "HEAD", "OPTIONS"):
            assert cors_of(relay.url("open"), method, Origin=origin) == (403, None, None), origin
        told = HTTP.get(relay.url("open"), headers={"Origin": origin, **EVENT_STREAM})
        assert not any(name in told.headers for name in CORS)
        assert "relay.refused" in told.text


def test_ones_own_origin_is_scheme_and_host(start_relay: StartRelay, database: Database) -> None:
    relay = start_relay("--allow-channel", "*", dsn=database.dsn)
    url = relay.url("orders")
    own = f"http://{relay.bind}"
    assert cors_of(url, Origin=own) == (200, None, None)
    assert cors_of(url, Origin=own, X_Forwarded_Proto="https")[0] == 403
    assert cors_of(url, Origin="https://app.example", Host="app.example")[0] == 403
    https = {"Origin": "https://app.example", "Host": "app.example", "X_Forwarded_Proto": "https"}
    assert cors_of(url, **https) == (200, None, None)
    assert foreign_origin({"Host": "app.example"}) is None


def test_development_origins_are_allowed_until_one_is_named(
    relay: Relay, start_relay: StartRelay, database: Database
) -> None:
    for origin in ("http://localhost:5173", "http://127.0.0.1:8000"):
        assert cors_of(relay.url("orders"), Origin=origin) == (200, origin, "true")
    for origin in ("https://localhost:5173", "http://localhost.example:80", "http://192.0.2.1:8000", "null"):
        assert cors_of(relay.url("orders"), Origin=origin)[0] == 403
    named = start_relay("--allow-origin", "http://localhost:3000", dsn=database.dsn)
    assert cors_of(named.url("orders"), Origin="http://localhost:5173")[0] == 403


# ==== Chromium ================================================================

OPEN_WITH_COOKIE = """url => {
    window.seen = [];
    window.states = [];
    window.source?.close();
    window.source = new EventSource(url, {withCredentials: true});
    for (const name of ["message", "relay.refused"])
        source.addEventListener(name, e => seen.push({name, data: e.data, id: e.lastEventId}));
    source.addEventListener("open", () => states.push("open"));
    source.addEventListener("error", () => states.push("error " + source.readyState));
}"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.open() as opened:
        yield opened


def set_cookie(page: Page, value: str) -> None:
    """Set it as an application does that answers for the page: HttpOnly."""
    fields = {
        "name": "sse",
        "value": value,
        "domain": "127.0.0.1",
        "path": "/",
        "httpOnly": True,
        "sameSite": "Lax",
    }
    page.browser.run(page.playwright.context.add_cookies([fields]))  # type: ignore[list-item]  # a TypedDict


def test_an_expired_cookie_is_told_to_the_page_and_starts_no_storm(
    page: Page, start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    """Takes 10 s, as long as it watches."""
    options = ("--jwt-key-file", str(secret_file), "--jwt-cookie", "sse", "--retry", "100")
    relay = start_relay(*options, "--allow-origin", page.evaluate("location.origin"), dsn=database.dsn)
    set_cookie(page, token_for("orders", seconds=1.5))
    page.evaluate(OPEN_WITH_COOKIE, relay.url("orders"))
    harness.wait_until(lambda: "open" in page.states, what="the stream to open")
    refused = page.wait_for(lambda event: event.name == "relay.refused")
    assert json.loads(refused.data) == {"status": 401, "reason": "the token has expired"}
    # Now as a page that finds its cookie expired.
    asked = len(page.requests)
    page.evaluate(OPEN_WITH_COOKIE, relay.url("orders"))
    page.wait_for(lambda event: event.name == "relay.refused")
    time.sleep(10)
    assert 1 <= len(page.requests) - asked <= 2
    assert len(page.events) == 1

    set_cookie(page, token_for("orders"))
    page.evaluate(OPEN_WITH_COOKIE, relay.url("orders"))
    harness.wait_until(lambda: "open" in page.states, what="the stream to open again")
    database.notify("orders", "welcome back")
    page.wait_for(lambda event: event.data == "welcome back")
    assert page.states == ["open"]


def test_a_foreign_page_gets_nothing_with_the_cookie_of_its_visitor(
    page: Page, start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    options = ("--jwt-key-file", str(secret_file), "--jwt-cookie", "sse")
    foreign = start_relay(*options, "--allow-origin", "https://app.example", dsn=database.dsn)
    allowed = start_relay(*options, "--allow-origin", page.evaluate("location.origin"), dsn=database.dsn)
    set_cookie(page, token_for("orders"))
    fetched = """async url => {
        const answer = fetch(url, {credentials: "include", headers: {Accept: "text/event-stream"}});
        return await answer.then(async r => (await r.body.getReader().read()).value.length, e => e.name);
    }"""
    assert page.evaluate(fetched, foreign.url("orders")) == "TypeError"
    page.evaluate(OPEN_WITH_COOKIE, foreign.url("orders"))
    harness.wait_until(lambda: page.states, what="the stream to fail")
    assert page.states == ["error 2"]
    assert page.events == []

    assert page.evaluate(fetched, allowed.url("orders")) > 0
    page.evaluate(OPEN_WITH_COOKIE, allowed.url("orders"))
    harness.wait_until(lambda: "open" in page.states, what="the stream to open")
    database.notify("orders", "for the page")
    page.wait_for(lambda event: event.data == "for the page")


# ==== What stays unsaid =======================================================

PASSWORD = "pa55w0rd-of-the-tests"


ODD_DSNS = [
    f"postgresql://app:{PASSWORD}@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}/x@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}@x@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}#x@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}?x@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}%zz@127.0.0.1:1/app",
    f"postgresql://app:{PASSWORD}@127.0.0.1:port/app",
    f"postgresql://app:1/{PASSWORD}@127.0.0.1/app",
    f"postgresql://127.0.0.1:1/app?password={PASSWORD}",
    f"postgresql://127.0.0.1:1/app?pasword={PASSWORD}",
    f"postgresql:/app:{PASSWORD}@127.0.0.1:1/app",
    f"postgres//app:{PASSWORD}@127.0.0.1:1/app",
    f"app:{PASSWORD}@127.0.0.1:1/app",
    f"host=127.0.0.1 port=1 password={PASSWORD}",
    f"host=127.0.0.1 port=1 password='{PASSWORD}",
    f"host=127.0.0.1 port=1 password=x {PASSWORD}",
    f"host=127.0.0.1 port=1 pasword={PASSWORD}",
    f"host=127.0.0.1 port={PASSWORD}",
    f"host=127.0.0.1 port=1 user=app:{PASSWORD}",
    f"host=app:{PASSWORD}@127.0.0.1 port=1",
    f"host=127.0.0.1 port=1 dbname=postgresql://app:{PASSWORD}@127.0.0.1/app",
    f"host=127.0.0.1 port=1 password={PASSWORD} sslmode=nonsense",
    f"host=127.0.0.1 port=1 password={PASSWORD} connect_timeout=x",
]


def has_said_why(relay: Relay) -> bool:
    return relay.process.poll() is not None or "trying again" in relay.log


def test_a_password_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    accepted = []
    for dsn in ODD_DSNS:
        try:
            accepted.append(resolve_dsn(dsn, None))
        except click.UsageError as error:
            assert PASSWORD not in error.message, dsn  # noqa: PT017  # to be refused is one of two right ends
    assert 3 <= len(accepted) < len(ODD_DSNS) // 2
    file = tmp_path / "dsn"
    for dsn in [*accepted, ODD_DSNS[1]]:
        file.write_text(dsn)
        with Relay("--dsn-file", str(file), "--log-level", "debug", wait=False) as relay:
            harness.wait_until(functools.partial(has_said_why, relay), 20, "an error")
        assert relay.lines, dsn
        assert PASSWORD not in relay.log, dsn


def test_nothing_secret_is_written_whatever_happens(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    parts = psycopg2.extensions.parse_dsn(database.dsn)
    database.execute(f"CREATE ROLE secretive LOGIN PASSWORD '{PASSWORD}'")
    dsn = psycopg2.extensions.make_dsn(database.dsn, user="secretive", password=PASSWORD)
    admin = f"127.0.0.1:{harness.free_port()}"
    token, expired = token_for("orders"), token_for("orders", seconds=-1)
    try:
        with harness.FreezableProxy((parts["host"], int(parts["port"]))) as proxy:
            dsn = psycopg2.extensions.make_dsn(dsn, host="127.0.0.1", port=proxy.port)
            relay = start_relay(
                "--admin", admin, "--jwt-key-file", str(secret_file), "--jwt-cookie", "sse",
                "--log-level", "debug", "--linger", "0", env={"SSE_RELAY_DSN": dsn},
            )  # fmt: skip
            answers: list[str] = []

            def look() -> None:
                paths = ("/", "/live", "/ready", "/metrics", "/channels", f"/ready?access_token={token}")
                answers.extend(HTTP.get(f"http://{admin}{path}").text for path in paths)

            for each in (
                token,
                expired,
                token + "\x01",
                f"{token}%00",
                f"{token}\udcff".encode("utf-8", "replace"),
            ):
                text = each if isinstance(each, str) else each.decode()
                for line in (
                    f"GET /events/orders?access_token={text} HTTP/1.1",
                    f"GET /events/orders?access_token={text}&lastEventId={text} HTTP/1.1",
                    f"GET /events/{text}?channel={text} HTTP/1.1",
                    f"GET /nothing/{text} HTTP/1.1",
                    f"GET /events/orders HTTP/1.1\r\nCookie: s se={text}; \x7f{text}; sse={text}",
                    f"GET /events/orders HTTP/1.1\r\nCookie: {text}\x7f=1; sse\x7f={text}",
                    f"GET /events/orders HTTP/1.1\r\nAuthorization: Bearer {text}",
                    f"GET /events/orders HTTP/1.1\r\nAuthorization Bearer {text}",
                    f"{text} / HTTP/1.1",
                    f"POST /events/orders?access_token={text} HTTP/9.9\r\nContent-Length: x",
                ):
                    request = f"{line}\r\nHost: relay\r\n\r\n".encode()
                    with RawStream(relay.bind, request=request) as stream:
                        harness.wait_until(lambda stream=stream: stream.raw or stream.ended, what=line)  # type: ignore[misc]
            look()
            with SseReader(relay.url("orders", access_token=token)) as reader:
                reader.wait_for_id()
                for outage in (proxy.drop, database.terminate_backends):
                    gaps = len(reader.events)
                    outage()
                    harness.wait_until(lambda gaps=gaps: len(reader.events) > gaps, 20, "a gap")  # type: ignore[misc]
                lines = len(relay.lines)
                proxy.refuse()
                proxy.drop()
                relay.wait_for_log("PostgreSQL", after=lines)
                look()
                database.execute("ALTER ROLE secretive PASSWORD 'another'")
                proxy.accept()
                harness.wait_until(
                    lambda: relay.process.poll() is not None or "authentication failed" in relay.log,
                    20,
                    "the refusal",
                )
                if relay.process.poll() is None:
                    look()
            if relay.process.poll() is None:
                relay.stop()
    finally:
        database.execute("DROP ROLE secretive")
    written = relay.log + "\n".join(answers)
    assert "refused with" in written
    assert "sse_relay_clients" in written
    for secret in (PASSWORD, SECRET.decode(), *token.split(".")[1:], *expired.split(".")[1:]):
        assert secret not in written
