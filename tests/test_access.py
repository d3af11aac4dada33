"""Who may read what, at the real relay: tokens by each way, origins, rules at start, what stays unsaid."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import httpx
import psycopg2.extensions
import pytest
from aiohttp.test_utils import make_mocked_request
from click.testing import CliRunner
from test_tokens import OTHER_GRANTS, SECRET, forge, forged_tokens, private_pem, public_pem

import harness
import pages
from harness import Browser, Database, Page, RawStream, Relay, SseReader
from sse_relay import (
    IN_LABEL,
    Access,
    Hub,
    Refusals,
    RefusedError,
    Settings,
    cli,
    compile_globs,
    encode_head,
    foreign_origin,
    is_local,
    is_local_host,
    make_access,
    read_cookie,
    read_key,
    read_origin,
    verify_token,
)

StartRelay = Callable[..., Relay]
EVENT_STREAM = {"Accept": "text/event-stream"}


# Making one takes longer than a request. It ends with the process: tests of several files may take turns.
HTTP = httpx.Client(timeout=10)


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


def ask(relay: Relay, channel: str, headers: dict[str, str] | None = None) -> int:
    """Return the status that a program gets that asks for headers alone: the true one."""
    return HTTP.head(relay.url(channel), headers=headers).status_code


# ==== Requests ================================================================

LONG = 6 * 3600.0
GOOD, BAD = token_for("orders", seconds=LONG), token_for("orders", seconds=-1)
APP = "https://app.example"
CORS = ("access-control-allow-origin", "access-control-allow-credentials")


class Asked(NamedTuple):
    """A request for ``/events/…`` and its answer; a status of 200 is a stream."""

    target: str
    headers: dict[str, str]
    status: int
    # In the reason of a refusal.
    words: str = ""
    # The origin that may read the answer, and whether as its visitor.
    cors: tuple[str | None, str | None] = (None, None)


# The options of a relay, and what it answers.
ANSWERS: dict[str, tuple[str, list[Asked]]] = {
    "two keys, a cookie and public channels": (
        "--jwt-key-file {public} --jwt-key-file {secret} --jwt-cookie sse --allow-channel public-*",
        [
            Asked("orders", {}, 401, "this channel needs a token"),
            Asked("orders", {"Authorization": f"bearer  {GOOD}"}, 200),
            Asked("orders", cookie(GOOD), 200),
            Asked(f"orders?access_token={GOOD}", {}, 200),
            # Header, then cookie, then query; a bad one is not passed over.
            Asked(f"orders?access_token={BAD}", bearer(GOOD) | cookie(BAD), 200),
            Asked(f"orders?access_token={GOOD}", bearer(BAD) | cookie(GOOD), 401, "expired"),
            Asked(f"orders?access_token={BAD}", cookie(GOOD), 200),
            Asked(f"orders?access_token={GOOD}", cookie(BAD), 401, "expired"),
            Asked(f"orders?access_token={BAD}", {}, 401, "expired"),
            Asked(f"orders?access_token={GOOD}", bearer("") | cookie(GOOD), 401, "needs a token"),
            Asked(f"orders?access_token={GOOD}", cookie(""), 200),
            # What a proxy's own password protection adds is no token.
            Asked("orders", {"Authorization": "Basic YTpi", **cookie(GOOD)}, 200),
            *(Asked("orders", bearer(token), 401) for token in forged_tokens(time.time()).values()),
            *(
                Asked("orders", bearer(token_for(*globs, seconds=LONG)), 403, "does not open this channel")
                for globs in OTHER_GRANTS.values()
            ),
            # Public channels need none, and a bad one does no harm there; one closed channel closes a stream.
            Asked("public-news", {}, 200),
            Asked("public-news", bearer("nonsense"), 200),
            *(Asked(name, {}, 401) for name in ("public", "Public-news", "a-public-news")),
            Asked("?channel=public-news&channel=orders", {}, 401),
            Asked("?channel=public-news&channel=orders", bearer(GOOD), 200),
            # None opens the relay's own channels.
            *(
                Asked(name, bearer(token_for("*", seconds=LONG)), 403, "relay's own")
                for name in ("sse_relay", "sse_relay_canary")
            ),
        ],
    ),
    "a key and no cookie": (
        "--jwt-key-file {secret}",
        [Asked("orders", cookie(GOOD), 401, "needs a token"), Asked("orders", bearer(GOOD), 200)],
    ),
    "some channels and an origin": (
        f"--allow-channel app-* --allow-origin {APP}",
        [
            Asked("procrastinate_queue", {}, 403, "--allow-channel"),
            Asked("app-orders", bearer(token_for("*", seconds=LONG)), 200),
            # What is open to another origin is open to its visitor.
            Asked("app-orders", {"Origin": APP}, 200, "", (APP, "true")),
            Asked("orders", {"Origin": APP}, 403, "--allow-channel", (APP, "true")),
            Asked("app-orders", {"Origin": "https://evil.example"}, 403, "--allow-origin"),
            Asked("app-orders", {"Origin": "http://own.example", "Host": "own.example"}, 200),
            Asked("app-orders", {"Origin": "https://own.example", "Host": "own.example"}, 403),
        ],
    ),
    # A sandboxed frame does not act for its visitor.
    "the origin null": (
        "--jwt-key-file {secret} --jwt-cookie sse --allow-origin null",
        [
            Asked("orders", {**cookie(GOOD), "Origin": "null"}, 401, "needs a token", ("null", None)),
            Asked("orders", {**bearer(GOOD), "Origin": "null"}, 200, cors=("null", None)),
            Asked(f"orders?access_token={GOOD}", {"Origin": "null"}, 200, cors=("null", None)),
            Asked("orders", cookie(GOOD), 200),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", ANSWERS)
def test_a_request_is_answered_by_its_true_status_or_in_the_stream(
    options: str, start_relay: StartRelay, database: Database, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    (tmp_path / "public").write_bytes(public_pem("RSA"))
    given, requests = ANSWERS[options]
    files = {name: str(tmp_path / name) for name in ("secret", "public")}
    relay = start_relay(*given.format(**files).split(), dsn=database.dsn)
    for asked in requests:
        url = f"http://{relay.bind}/events/{asked.target}".replace("/?", "?")
        head = HTTP.head(url, headers=asked.headers)
        answers = [head]
        assert head.status_code == asked.status, asked
        if asked.status != 200:
            plain = HTTP.get(url, headers=asked.headers)
            told = HTTP.get(url, headers={**asked.headers, **EVENT_STREAM})
            answers += [plain, told]
            assert plain.status_code == asked.status
            assert plain.headers["content-type"].startswith("application/problem+json")
            assert "www-authenticate" not in plain.headers
            reason = plain.json()["detail"]
            assert asked.words in reason
            data = json.dumps({"status": asked.status, "reason": reason}, separators=(",", ":"))
            assert told.text == f"retry: 86400000\nevent: relay.refused\ndata: {data}\n\n"
            assert told.status_code == 200
        if "Origin" in asked.headers:
            may_read = asked.status == 200 or asked.cors != (None, None)
            answers.append(HTTP.options(url, headers=asked.headers))
            assert answers[-1].status_code == (204 if may_read else 403)
        for answer in answers:
            assert tuple(answer.headers.get(name) for name in CORS) == asked.cors, asked
        for token in re.findall(r"(?<=earer )\S+|(?<=sse=)[^;]+|(?<=token=)\S+", str(asked)):
            longest = max(token.split("."), key=len)
            assert len(longest) < 9 or longest not in relay.log, asked
    assert relay.process.poll() is None


# ==== Tokens ==================================================================


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("sse=a.b-c_d", "a.b-c_d"),
        ("theme=dark; sse=a; last=1", "a"),
        ("theme=dark;sse=a;last=1", "a"),
        (' sse = "a" ; x="sse=b"', "a"),
        ("sse=a; sse=b", "b"),
        ("xsse=a; sse2=b; ssE=c; s=se", None),
        ("x=sse=a", None),
        ("sse=", ""),
        ("sse", None),
        ("s.e=a; s se=b", None),
        ("", None),
        ("sse=a==", "a=="),
    ],
)
def test_one_cookie_is_read_from_what_browsers_send(header: str, value: str | None) -> None:
    assert read_cookie(header, "sse") == value


@pytest.mark.parametrize("piece", ["a=b;", "sse=a; ", '"\\', "; ", ";\t", "sse=", "sse ", '="', "\udcff"])
def test_no_cookies_keep_the_loop_busy(piece: str) -> None:
    start = time.process_time()
    read_cookie(piece * (32_768 // len(piece)), "sse")
    assert time.process_time() - start < 0.05


def signed(subject: object, issued: float | None = None) -> dict[str, str]:
    """Return the header of a token for everything; it says whose it is and, unless None, since when."""
    claims = {"channels": ["*"], "exp": time.time() + 60, "sub": subject, "iat": issued}
    return bearer(forge({claim: value for claim, value in claims.items() if value is not None}))


def test_one_subject_has_so_many_streams_and_no_more(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    options = ("--jwt-key-file", str(secret_file), "--max-per-subject", "2", "--allow-channel", "open")
    relay = start_relay(*options, dsn=database.dsn)
    with (
        SseReader(relay.url("orders"), signed("7")) as first,
        SseReader(relay.url("orders"), signed("7")) as second,
    ):
        first.wait_for_id()
        second.wait_for_id()
        full = HTTP.head(relay.url("orders"), headers=signed(7))
        assert full.status_code == 429
        assert "retry-after" in full.headers
        assert ask(relay, "orders", signed("8")) == 200
        assert ask(relay, "open", signed("7")) == 200
        with SseReader(relay.url("orders"), signed("7")) as third:
            third.wait_for_end()
            assert [block.retry for block in third.blocks] != [86_400_000]
            assert third.events == []
        first.close()
        harness.wait_until(lambda: ask(relay, "orders", signed("7")) == 200, what="room")


def test_signing_out_ends_a_subjects_streams_at_every_relay(
    start_relay: StartRelay, log_database: Database, secret_file: Path
) -> None:
    options = ("--source", "log", "--jwt-key-file", str(secret_file), "--allow-channel", "open")
    now = time.time()
    theirs = [signed("7", now), signed(7, now - 100), signed("7"), signed("7", now + 90)]
    # The last is signed by a machine whose clock is ahead.
    others = [signed("8", now - 100), signed(None, now), signed(7, now + 30)]
    with contextlib.ExitStack() as stack:
        relays = [start_relay(*options, dsn=log_database.dsn) for _ in range(2)]

        def open_all(channel: str, tokens: list[dict[str, str]]) -> list[SseReader]:
            return [
                stack.enter_context(SseReader(relay.url(channel), headers))
                for relay in relays
                for headers in tokens
            ]

        ending = open_all("orders", theirs)
        staying = open_all("orders", others) + open_all("open", theirs[:1])
        for reader in ending + staying:
            reader.wait_for_id()
        log_database.execute("SELECT sse_relay.revoke('7')")
        for reader in ending:
            refused = reader.wait_for(lambda event: event.event == "relay.refused")
            assert json.loads(refused.data)["status"] == 401
            reader.wait_for_end()
            # Of an answer without its last chunk browsers may drop the last event.
            assert reader.error is None
        for channel in ("orders", "open"):
            log_database.execute("SELECT sse_relay.publish(%s, 'after')", [channel])
        for reader in staying:
            reader.wait_for_data("after")
        for old in relays:
            old.kill()
            relay = start_relay(*options, dsn=log_database.dsn, bind=old.bind)
            assert [ask(relay, "orders", headers) for headers in theirs] == [401] * len(theirs)
            assert [ask(relay, "orders", headers) for headers in others] == [200] * len(others)
            assert ask(relay, "orders", signed("7", time.time())) == 200


def test_the_stream_ends_with_its_token_and_comes_back_with_a_fresh_one(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    relay = start_relay("--jwt-key-file", str(secret_file), "--jwt-cookie", "sse", dsn=database.dsn)
    url, end = relay.url("orders"), int(time.time()) + 3
    token = forge({"channels": ["orders"], "exp": end})
    descriptors = Path(f"/proc/{relay.pid}/fd")
    with (
        SseReader(url, cookie(token)) as reader,
        SseReader(url, bearer(token_for("orders"))) as other,
        RawStream(relay.bind, url, headers=bearer(token), receive_buffer=4096, reading=False),
    ):
        reader.wait_for_id()
        other.wait_for_id()
        for number in range(30):
            database.notify("orders", f"{number} " + "x" * 7_900)
        other.wait_for(lambda event: event.data.startswith("29 "))
        opened = len(list(descriptors.iterdir()))
        reader.wait_for_end()
        assert abs(time.time() - end) < 1.2
        # Without the final chunk, and with a wait: every client comes back.
        assert reader.error is not None
        assert not any(event.event.startswith("relay.") for event in reader.events)
        assert reader.blocks[-1].retry is None or reader.blocks[-1].retry < 10_000
        # One that does not read is cut.
        harness.wait_until(lambda: len(list(descriptors.iterdir())) <= opened - 2, 8, "free descriptors")
        database.notify("orders", "meanwhile")
        other.wait_for_data("meanwhile")
    with SseReader(url, cookie(token), last_event_id=reader.last_event_id) as expired:
        assert "expired" in expired.wait_for(lambda event: event.event == "relay.refused").data
    with SseReader(url, cookie(token_for("orders")), last_event_id=reader.last_event_id) as fresh:
        fresh.wait_for_data("meanwhile")
        assert fresh.data == ["meanwhile"]


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
            assert ask(relay, "orders", bearer(old_token)) == 200
        secret_file.unlink()
        reload("the keys stay as they were")
        assert ask(relay, "orders", bearer(old_token)) == 200

        secret_file.write_bytes(new)
        reload("1 of 2 keys are new")
        assert ask(relay, "orders", bearer(old_token)) == 401
        assert ask(relay, "orders", bearer(new_token)) == 200
        # Two keys at once: one can replace the other without a moment in which neither counts.
        assert ask(relay, "orders", bearer(token_for("orders", secret=b"y" * 32))) == 200
        database.notify("orders", "still open")
        reader.wait_for_data("still open")
    assert SECRET.decode() not in relay.log
    assert new.decode() not in relay.log


# ==== The command token =======================================================


def test_the_command_signs_what_it_is_told_with_what_can_sign_alone(tmp_path: Path) -> None:
    file = tmp_path / "key"
    command = ["token", "--key-file", str(file), "--subject", "user-7", "--lifetime", "60", "orders", "a-*"]
    file.write_bytes(private_pem("Ed25519"))
    token = CliRunner().invoke(cli, command).stdout.strip()
    grant = verify_token(token, [read_key(public_pem("Ed25519"))], time.time())
    assert [name for name in ("orders", "a-7", "x") if grant.channels.fullmatch(name)] == ["orders", "a-7"]
    assert grant.subject == "user-7"
    assert abs(grant.issued - time.time()) < 30
    for content, said in (
        (public_pem("RSA"), "no private key"),
        (b"short", "openssl rand -hex 32"),
        (private_pem("RSA", password=b"password"), "encrypted"),
        (None, "cannot read"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        done = CliRunner().invoke(cli, command)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr


def test_without_pyjwt_the_extra_is_named(secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    done = CliRunner().invoke(cli, ["token", "--key-file", str(secret_file), "orders"])
    # No restart heals a relay that lacks it.
    assert done.exit_code == click.UsageError.exit_code == 2
    assert "pip install 'PyJWT[crypto]'" in done.stderr
    with pytest.raises(click.UsageError, match="pip install 'PyJWT"):
        make_access(Settings("", jwt_key_file=(secret_file,)), [])


# ==== Start ===================================================================

LOCAL = ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "localhost:1", "unix:/run/x"]
WIDE = [
    "0.0.0.0:1", "[::]:1", "10.0.0.1:1", "127.example:1", "localhost.example:1", "127.0.0.1.example:1",
    "[fe80::1]:1",
]  # fmt: skip


def test_strangers_may_not_reach_a_relay_that_nobody_guards(
    secret_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [bind for bind in LOCAL + WIDE if is_local(bind)] == LOCAL
    for settings in (Settings("", allow_channel=("*",)), Settings("", jwt_key_file=(secret_file,))):
        access = make_access(settings, LOCAL + WIDE)
        assert not access.origins.fullmatch("http://localhost:3000")
    assert caplog.text == ""
    make_access(Settings(""), LOCAL)
    assert "every channel can be read by everybody" in caplog.text
    for bind in WIDE:
        with pytest.raises(
            click.UsageError, match=rf"{re.escape(bind)} can be reached .*'\*' opens all"
        ) as refused:
            make_access(Settings(""), [*LOCAL, bind])
        ways = set(re.findall(r"--[a-z-]+", refused.value.message))
        assert ways == {"--jwt-key-file", "--allow-channel"}


def test_a_cookie_without_a_key_is_refused() -> None:
    """Who names a cookie means that a token is needed."""
    for settings in (Settings("", jwt_cookie="sse"), Settings("", jwt_cookie="sse", allow_channel=("*",))):
        with pytest.raises(click.UsageError, match="--jwt-key-file"):
            make_access(settings, [])


# ==== Origins =================================================================


# What is allowed, the origins whose pages may then read, and some that may not.
ORIGINS: dict[str, tuple[list[str], list[str]]] = {
    # Nothing said, only pages under development.
    "": (
        ["http://localhost:5173", "http://127.0.0.1:8000"],
        [
            "https://localhost:5173", "http://localhost.example:80", "http://192.0.2.1:8000",
            "http://[::1]:80", "null", "x",
        ],
    ),
    "https://app.example": (
        ["https://app.example"],
        [
            "null", "https://app.example.evil.example", "https://evil.example", "http://app.example",
            "https://app.example:8443", "https://APP.example", "https://app.exampl", "https://xapp.example",
            "http://localhost:3000", "*", "",
        ],
    ),
    **{origin: ([origin], ["http://localhost"]) for origin in ("capacitor://localhost", "tauri://localhost")},
    "chrome-extension://abcdefghijklmnop": (
        ["chrome-extension://abcdefghijklmnop"], ["chrome-extension://abcdefghijklmnoq"],
    ),
    "null": (["null"], ["NULL"]),
    "https://*.example.com": (
        ["https://a.example.com", "https://a-b_9.example.com"],
        [
            "https://a.b.example.com", "https://example.com", "https://a.example.com:8443",
            "http://a.example.com", "https://evil.example/.example.com", "https://evil.example?.example.com",
            "https://evil@a.example.com", "https://a.example.com.evil.example",
        ],
    ),
    "https://app-*.example.com": (["https://app-7.example.com"], ["https://app.example.com"]),
    "https://*.a-*.example": (["https://a-.a-a-.example"], ["https://a-.a-a-.a.example"]),
    "http://localhost:*": (
        ["http://localhost:3000"],
        [
            "http://localhost:3000.evil.example", "http://localhost:\N{EURO SIGN}", "http://localhost:1\n",
            "http://localhost:1@evil.example",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("allowed", ORIGINS)
@pytest.mark.parametrize("preflight", [False, True])
def test_which_origins_may_read(allowed: str, preflight: bool) -> None:
    access = make_access(Settings("", allow_origin=(read_origin(allowed),) if allowed else ()), LOCAL)
    opened, closed = ORIGINS[allowed]
    for origin in opened:
        answer = access.cors({"Origin": origin, "Host": "relay"}, None, preflight)
        assert answer["Access-Control-Allow-Origin"] == origin
        assert answer.get("Access-Control-Allow-Credentials") == (None if origin == "null" else "true")
        assert "Origin" in answer["Vary"]
        encode_head(1, answer)
    for origin in closed:
        with pytest.raises(RefusedError) as refused:
            access.cors({"Origin": origin, "Host": "relay"}, None, preflight)
        assert refused.value.status == 403


@pytest.mark.parametrize(
    "origin",
    ["*", "app.example", "https://", "https://App.example", "https://app.example/", "https://app.example:443",
     "http://app.example:80", "https://u@app.example", "https://app.example?x", "https://b\u00fccher.example",
     "https://app.example https://other.example", "Null", "http*://app.example", ""],
)  # fmt: skip
def test_what_no_browser_sends_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        read_origin(origin)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ("traceparent, baggage,x-requested-with", {"traceparent", "baggage", "x-requested-with"}),
        ("a b, c\r\nX: y, \u00e9, , good,<script>", {"good"}),
        ("x-" + "y" * 2_000, {"x-" + "y" * 1_022}),
    ],
)
def test_a_preflight_allows_what_is_asked_for(asked: str, allowed: set[str]) -> None:
    access = Access(compile_globs([]), compile_globs(["https://app.example"], IN_LABEL))
    headers = {"Origin": "https://app.example", "Access-Control-Request-Headers": asked}
    answer = access.cors(headers, None, preflight=True)
    always = {"Authorization", "Cache-Control", "Last-Event-ID"}
    assert set(answer["Access-Control-Allow-Headers"].split(", ")) == always | allowed
    assert answer["Vary"] == "Origin, Access-Control-Request-Headers"
    encode_head(1, answer)


@pytest.mark.parametrize(
    ("origin", "host", "proto", "own"),
    [
        ("http://app.example", "app.example", None, True),
        ("http://app.example", "APP.example", None, True),
        ("http://app.example", "app.example:80", None, True),
        ("http://app.example:8080", "app.example:8080", None, True),
        ("https://app.example", "app.example:443", "https", True),
        ("https://app.example", "app.example", "HTTPS", True),
        ("https://app.example", "app.example", "https,http", True),
        ("https://app.example", "app.example", " https , http", True),
        ("https://app.example", "app.example", "http,https", False),
        ("https://app.example", "app.example:80", "https", False),
        ("http://app.example", "app.example:443", None, False),
        ("https://[::1]", "[::1]:443", "https", True),
        ("null", "null", None, False),
        ("", "", None, False),
        ("http://", "", None, True),
    ],
)
def test_ones_own_origin_survives_proxies(origin: str, host: str, proto: str | None, own: bool) -> None:
    headers = {"Origin": origin, "Host": host, **({"X-Forwarded-Proto": proto} if proto else {})}
    assert (foreign_origin(headers) is None) is own
    assert (foreign_origin({**headers, "Host": "other.example"}, host) is None) is own


# ==== Hosts ===================================================================

LOCAL_HOSTS = [
    "localhost", "LOCALHOST", "localhost.", "localhost:8008", "app.localhost", "127.0.0.1",
    "127.0.0.1:8008", "127.8.9.10", "[::1]", "[::1]:8008", "[::ffff:127.0.0.1]:1", "[::FFFF:127.0.0.1]",
    "mine.test", "mine.test:1",
]  # fmt: skip
FOREIGN_HOSTS = [
    "evil.example", "evil.example:8008", "localhost.evil.example", "127.0.0.1.evil.example",
    "127.0.0.1@evil.example", "evil.example@127.0.0.1", "evil.example/localhost", "localhost/evil.example",
    "192.0.2.1", "0.0.0.0", "[::]", "[", "[::1", "::1", "[2001:db8::1]", "[::ffff:192.0.2.1]",
    "notlocalhost", ".localhost", "localhost..", "localhost,evil.example", "\u2113ocalhost",
    "127.0.0.1\u3002evil.example", "notmine.test", "", "localhost evil.example", "localhost\n", "[::1]\n",
    "evil.example\nlocalhost",
]  # fmt: skip


def test_which_hosts_are_this_machine() -> None:
    assert [host for host in LOCAL_HOSTS if not is_local_host(host, frozenset({"mine.test"}))] == []
    assert [host for host in FOREIGN_HOSTS if is_local_host(host, frozenset({"mine.test"}))] == []


def true_status(address: str, target: str, *hosts: str, method: str = "GET", more: str = "") -> int:
    lines = [f"{method} {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), more, "Connection: close"]
    request = "".join(f"{line}\r\n" for line in lines if line) + "\r\n"
    with RawStream(address, request=request.encode()) as client:
        return harness.wait_until(lambda: client.status, what="a status")


# Target, Host and further headers; whether the address of an open relay answers.
REBINDING = [
    ("/events/orders", "localhost", "", True),
    ("/events/orders", "evil.example:8008", "", False),
    ("/events/orders", "evil.example", "X-Forwarded-Host: localhost\r\nX-Forwarded-For: 127.0.0.1", False),
    ("/events/orders", "evil.example", "X-Forwarded-Proto: https\r\nForwarded: host=localhost", False),
    ("http://evil.example/events/orders", "localhost", "", False),
    ("http://localhost/events/orders", "evil.example", "", True),
    ("http://LOCALHOST:80/events/orders", "evil.example", "", True),
    ("/events.js", "evil.example", "", False),
    ("/live", "evil.example", "", False),
    ("/nothing", "evil.example", "", False),
]


def test_a_page_whose_name_was_made_to_point_here_reads_nothing(
    start_relay: StartRelay, database: Database, secret_file: Path, tmp_path: Path
) -> None:
    unix = f"unix:{tmp_path / 'http.sock'}"
    relay = start_relay("--bind", unix, dsn=database.dsn, admin=True)
    guarded = start_relay("--jwt-key-file", str(secret_file), dsn=database.dsn, admin=True)
    for target, host, more, answered in REBINDING:
        case = target, host, more
        assert (true_status(relay.bind, target, host, more=more) != 421) is answered, case
        assert true_status(unix, target, host, more=more) != 421, case
        assert true_status(guarded.bind, target, host, more=more) != 421, case
        for address in (relay.admin, guarded.admin):
            assert (true_status(address, target, host, more=more) != 421) is answered, case
    for path in ("/", "/ready", "/metrics", "/channels", "/status", "/events/orders", "/else"):
        assert true_status(relay.admin, path, "evil.example") == 421
        assert true_status(relay.admin, path, "evil.example", method="POST") == 421
    # A browser always sends one; a load balancer's check over HTTP/1.0 does not.
    with RawStream(relay.bind, request=b"GET /live HTTP/1.0\r\n\r\n") as check:
        harness.wait_until(lambda: check.status == 200, what="an answer")
    told = HTTP.get(relay.url("orders"), headers={"Host": "evil.example", **EVENT_STREAM})
    assert json.loads(told.text.partition("data:")[2].splitlines()[0])["status"] == 421
    assert "--allow-channel '*'" in told.text


# ==== Refusals ================================================================


def make_refusals() -> tuple[Refusals, Hub]:
    hub = Hub(max_backlog=1, heartbeat=15)
    return Refusals(hub, "/events", retry=2_000), hub


async def test_a_flood_of_refusals_is_counted_to_the_last_and_logged_in_few_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Callable[[], None]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda seconds, callback: later.append(callback))
    caplog.set_level("INFO", "sse_relay")
    refusals, hub = make_refusals()
    for second in range(2):
        for _ in range(500):
            refusals.count(RefusedError(403, "closed"))
        for _ in range(30):
            refusals.count(RefusedError(400, "long"))
        assert len(later) == second + 1
        later[-1]()
    assert hub.counts.refusals == {403: 1_000, 400: 60}
    assert caplog.messages == 2 * [
        *["refused with 403: closed"] * 10,
        "refused 520 more requests within one second",
    ]


@pytest.mark.parametrize(
    ("target", "origin", "told"),
    [
        ("/events/b%C3%BCcher", None, r"; channel 'b\xfccher'"),
        (
            "/events?channel=closed&channel=open&channel=other",
            "http://localhost:3000",
            "; channel 'closed' and 2 more; origin http://localhost:3000",
        ),
        (
            "/events/open?access_token=secret",
            "http://localhost:3000 \x1b[1m",
            "; channel 'open'; origin unreadable",
        ),
        ("http://relay/events/%1Bsecret", None, ""),
        ("/nothing/secret", None, ""),
        ("/eventssecret", "null", "; origin null"),
    ],
)
async def test_a_line_about_a_refusal_says_who_was_refused_what(
    target: str, origin: str | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sse_relay")
    headers = {"Authorization": "Bearer secret", **({} if origin is None else {"Origin": origin})}
    refusals, _ = make_refusals()
    refusals.answer(make_mocked_request("GET", target, headers), RefusedError(403, "closed"))
    assert caplog.messages == [f"refused with 403: closed{told}"]


def test_the_cookies_of_a_real_site_fit(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    options = ("--jwt-key-file", str(secret_file), "--jwt-cookie", "sse")
    relay = start_relay(*options, dsn=database.dsn, admin=True)
    for size, status, end, refused in (
        (8_200, 200, b"id: ", 0),
        (32_000, 200, b"id: ", 0),
        (33_500, 200, b"retry: 86400000", 1),
        (65_000, 200, b"retry: 86400000", 2),
        (66_000, 431, b"", 3),
        (300_000, 431, b"", 4),
    ):
        headers = {"Cookie": f"big={'x' * (size - 400)}; sse={token_for('orders')}", **EVENT_STREAM}
        with RawStream(relay.bind, relay.url("orders"), headers=headers) as client:
            _ = client.wait_for(end) if end else client.wait_for_end()
            assert client.status == status
        text = HTTP.get(f"http://{relay.admin}/metrics").text
        found = re.search(r'^sse_relay_refusals_total\{status="431"\} (\d+)', text, re.MULTILINE)
        assert int(found[1] if found else 0) == refused
    relay.wait_for_log("refused with 431")


# ==== Chromium ================================================================


CONSOLE = re.compile(r"^[|] `([^`]+)` [|]", re.MULTILINE)


@pytest.mark.slow
def test_the_console_says_what_the_docs_say(
    browser: Browser, page: Page, start_relay: StartRelay, database: Database
) -> None:
    foreign = start_relay("--allow-channel", "*", dsn=database.dsn)
    null = start_relay("--allow-channel", "*", "--allow-origin", "null", dsn=database.dsn)
    said: list[str] = []

    async def listen() -> None:
        page.playwright.on("console", lambda message: said.append(message.text))

    browser.run(listen())
    told = CONSOLE.findall(pages.pages()["docs/access.md"].partition("the console says")[2])
    frame = """url => {
        const frame = document.createElement("iframe");
        frame.sandbox = "allow-scripts";
        frame.srcdoc = `<script>new EventSource("${url}", {withCredentials: true})<` + "/script>";
        document.body.append(frame);
    }"""
    secured = """url => {
        const meta = document.createElement("meta");
        [meta.httpEquiv, meta.content] = ["Content-Security-Policy", "connect-src 'self'"];
        document.head.append(meta);
        new EventSource(url);
    }"""
    for script, argument in (
        ("url => void new EventSource(url)", foreign.url("orders")),
        (frame, null.url("orders")),
        ("url => void new EventSource(url)", page.evaluate("location.href")),
        (secured, foreign.url("orders")),
    ):
        page.evaluate(script, argument)
    # A page that speaks TLS is needed for the remaining one.
    for words in [line for line in told if line != "Mixed Content"]:
        parts = words.split(" … ")
        found = functools.partial(
            lambda parts: any(all(part in text for part in parts) for text in said), parts
        )
        harness.wait_until(found, what=f"{words} in {said}")
    assert len(told) == 5


# ==== What stays unsaid =======================================================

PASSWORD = "pa55w0rd-of-the-tests"


def requests_with(token: str) -> list[str]:
    """Return requests that hold a token where it belongs, and where it does not."""
    return [
        f"GET /events/orders?access_token={token} HTTP/1.1",
        f"GET /events/orders?access_token={token}&lastEventId={token} HTTP/1.1",
        f"GET /events/{token}?channel={token} HTTP/1.1",
        f"GET /nothing/{token} HTTP/1.1",
        f"GET /events/orders HTTP/1.1\r\nCookie: s se={token}; \x7f{token}; sse={token}",
        f"GET /events/orders HTTP/1.1\r\nCookie: {token}\x7f=1; sse\x7f={token}",
        f"GET /events/orders HTTP/1.1\r\nAuthorization: Bearer {token}",
        f"GET /events/orders HTTP/1.1\r\nAuthorization Bearer {token}",
        f"{token} / HTTP/1.1",
        f"POST /events/orders?access_token={token} HTTP/9.9\r\nContent-Length: x",
    ]


def test_nothing_secret_is_written_whatever_happens(
    start_relay: StartRelay, database: Database, secret_file: Path
) -> None:
    token, expired = token_for("orders"), token_for("orders", seconds=-1)
    answers: list[str] = []

    def look() -> None:
        paths = ("/", "/live", "/ready", "/metrics", "/channels", f"/ready?access_token={token}")
        answers.extend(HTTP.get(f"http://{relay.admin}{path}").text for path in paths)

    database.execute(f"CREATE ROLE secretive LOGIN PASSWORD '{PASSWORD}'")
    with harness.FreezableProxy.before(database) as proxy, contextlib.ExitStack() as stack:
        stack.callback(database.execute, "DROP ROLE secretive")
        dsn = psycopg2.extensions.make_dsn(proxy.dsn(database), user="secretive", password=PASSWORD)
        relay = start_relay(
            "--jwt-key-file", str(secret_file), "--jwt-cookie", "sse", "--log-level", "debug",
            "--linger", "0", env={"SSE_RELAY_DSN": dsn}, admin=True,
        )  # fmt: skip
        for text in (token, expired, f"{token}\x01", f"{token}%00", f"{token}\xff"):
            for request in requests_with(text):
                with RawStream(relay.bind, request=f"{request}\r\nHost: relay\r\n\r\n".encode()) as stream:
                    harness.wait_until(lambda stream=stream: stream.raw or stream.ended, what=request)  # type: ignore[misc]
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
            relay.wait_for_log("authentication failed", 20)
            look()
        relay.stop()
    written = relay.log + "\n".join(answers)
    assert "refused with" in written
    assert "sse_relay_clients" in written
    for secret in (PASSWORD, SECRET.decode(), *token.split(".")[1:], *expired.split(".")[1:]):
        assert secret not in written
