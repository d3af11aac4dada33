"""Channels, globs, positions, and what a request's target asks for."""

from __future__ import annotations

import fnmatch
import re
import time
import unicodedata
from urllib.parse import quote, urlencode

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sse_relay import (
    Position,
    RefusedError,
    Snapshot,
    Target,
    check_channel,
    compile_globs,
    is_stream_path,
    parse_position,
    parse_target,
    quote_name,
    split_target,
)

quick = settings(max_examples=80, deadline=None)
any_text = st.text(st.characters())


def is_possible(name: str) -> bool:
    """Whether a client may ask for a channel of this name, by the words of the contract."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    controls = any(unicodedata.category(character) == "Cc" for character in name)
    return 1 <= size <= 63 and not controls and not name.startswith("sse_relay")


def is_path_name(name: str) -> bool:
    """Return whether a proxy leaves the name as it is in a path."""
    return not any(segment in ("", ".", "..") for segment in name.split("/"))


possible_names = st.text(min_size=1, max_size=20).filter(is_possible)


def refusal(target: str, prefix: str = "/events") -> RefusedError:
    """Fail unless the target is refused; give the refusal."""
    with pytest.raises(RefusedError) as caught:
        parse_target(target, prefix)
    return caught.value


# Channels.

POSSIBLE_NAMES = [
    "orders",
    "Orders",
    "a b",
    " ",
    " a ",
    "a/b",
    "/",
    "a?b#c&d=e;f",
    "a+b",
    "100%",
    "%41",
    "%zz",
    'a"b',
    '"',
    "a'b",
    "a;b",
    '"; DROP TABLE orders; --',
    "LISTEN",
    "*",
    "\\",
    "$1",
    "a\u00a0b",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\u202eabc",
    "\N{GRINNING FACE}",
    "\N{GRINNING FACE}" * 15 + "abc",
    "a" * 63,
    "\u00e9" * 31 + "a",
    ".",
    "..",
    "...",
    "../..",
    "sse",
    "SSE_RELAY",
    "my_sse_relay",
    "relay.gap",
    "error",
]


@pytest.mark.parametrize("name", POSSIBLE_NAMES, ids=ascii)
def test_an_awkward_name_arrives_unchanged_as_a_query_and_as_a_path(name: str) -> None:
    wanted = Target((name,), None, None, None)
    assert check_channel(name) == name
    assert parse_target(f"/events?{urlencode({'channel': name})}", "/events") == wanted
    assert parse_target(f"/?{urlencode({'channel': name})}", "/") == wanted
    for path, prefix in ((f"/events/{quote(name, safe='')}", "/events"), (f"/{quote(name, safe='')}", "/")):
        if is_path_name(name):
            assert parse_target(path, prefix) == wanted
        else:
            assert "as ?channel=" in refusal(path, prefix).what


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("", 400, "empty"),
        ("a" * 64, 400, "64 bytes"),
        ("\u00e9" * 32, 400, "64 bytes"),
        ("\N{GRINNING FACE}" * 16, 400, "64 bytes"),
        ("x" * 100_000, 400, "100000 bytes"),
        ("a\0", 400, "control"),
        ("\n", 400, "control"),
        ("a\rb", 400, "control"),
        ("\t", 400, "control"),
        ("\x1b[31m", 400, "control"),
        ("\x7f", 400, "control"),
        ("\x85", 400, "control"),
        ("a\x9fb", 400, "control"),
        ("\ud800", 400, "UTF-8"),
        ("sse_relay", 403, "relay's own"),
        ("sse_relay_canary_1", 403, "relay's own"),
        ("sse_relayx", 403, "relay's own"),
    ],
    ids=ascii,
)
def test_an_impossible_name_is_refused_with_its_reason(name: str, status: int, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason) as caught:
        check_channel(name)
    assert caught.value.status == status
    assert caught.value.what.isascii()


@quick
@given(any_text)
def test_exactly_the_possible_names_pass(name: str) -> None:
    if is_possible(name):
        assert check_channel(name) == name
    else:
        with pytest.raises(RefusedError):
            check_channel(name)


@pytest.mark.parametrize(
    ("name", "quoted"),
    [("a", '"a"'), ('a"b', '"a""b"'), ('"', '""""'), ("A b", '"A b"'), ('"; DROP --', '"""; DROP --"')],
)
def test_a_quoted_name_ends_at_its_own_last_quote(name: str, quoted: str) -> None:
    assert quote_name(name) == quoted


@quick
@given(any_text)
def test_quotes_within_a_quoted_name_come_in_pairs(name: str) -> None:
    inner = re.fullmatch(r'"((?:[^"]|"")*)"', quote_name(name), re.DOTALL)
    assert inner is not None
    assert inner[1].replace('""', '"') == name


# Globs.


@pytest.mark.parametrize(
    ("globs", "name", "matches"),
    [
        ([], "a", False),
        (["a"], "a", True),
        (["a"], "A", False),
        (["a"], "ab", False),
        (["a"], "ba", False),
        (["*"], "a\nb", True),
        (["*"], "", True),
        (["user-*"], "user-7", True),
        (["user-*"], "user-", True),
        (["user-*"], "user", False),
        (["user-*"], "my-user-7", False),
        (["*-log"], "a-log-log", True),
        (["*-log"], "a-logs", False),
        (["a*b*c"], "abc", True),
        (["a*b*c"], "aXbXbXc", True),
        (["a*b*c"], "acb", False),
        (["a*a"], "a", False),
        (["a*a"], "aa", True),
        (["*a*a*"], "a", False),
        (["**"], "x", True),
        (["?"], "x", False),
        (["?"], "?", True),
        (["[ab]"], "a", False),
        (["[ab]"], "[ab]", True),
        (["a.c"], "abc", False),
        (["a|b"], "a", False),
        (["a|b"], "a|b", True),
        (["a", "b*"], "bc", True),
        (["a", "ab"], "ab", True),
        (["a", "b"], "ab", False),
        (["\\*"], "\\x", True),
        (["{a,b}"], "a", False),
        (["\u00e9*"], "\u00e9t\u00e9", True),
    ],
)
def test_a_glob_knows_the_star_alone(globs: list[str], name: str, matches: bool) -> None:
    assert bool(compile_globs(globs).fullmatch(name)) is matches


@quick
@given(globs=st.lists(st.text("ab.*"), max_size=4), name=st.text("ab.", max_size=12))
def test_globs_agree_with_another_implementation(globs: list[str], name: str) -> None:
    # fnmatch knows more than the star; none of that is in this alphabet.
    expected = any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    assert bool(compile_globs(globs).fullmatch(name)) is expected


def test_a_glob_of_many_stars_does_not_keep_the_loop_busy() -> None:
    pattern = compile_globs(["*a" * 31 + "b", "*" * 50 + "c"])
    start = time.process_time()
    assert pattern.fullmatch("a" * 63) is None
    assert time.process_time() - start < 0.1


# Positions.

epochs = st.text("abcXYZ019_", min_size=1, max_size=40)
numbers = st.integers(0, 2**63 - 1)
xids = st.integers(0, 2**64 - 1)


@quick
@given(
    epoch=epochs,
    number=numbers,
    own_id=st.none() | st.text(st.characters(max_codepoint=126, min_codepoint=32)),
)
@example(epoch="e", number=0, own_id="")
@example(epoch="e", number=2**63 - 1, own_id="a/b@1:2:3")
def test_an_events_position_is_read_back_whatever_own_id_follows(
    epoch: str, number: int, own_id: str | None
) -> None:
    text = f"{epoch}-{number}" + ("" if own_id is None else f"/{own_id}")
    assert parse_position(text) == Position(epoch, number)


@st.composite
def a_snapshot(draw: st.DrawFn) -> Snapshot:
    xmin, xmax = sorted(draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    return Snapshot(xmin, xmax, frozenset(draw(st.sets(st.integers(xmin, xmax)))))


@quick
@given(
    epoch=epochs,
    number=numbers,
    xmin=xids,
    xmax=xids,
    running=st.lists(xids, max_size=5),
    tail=st.sampled_from(["", "/x"]),
)
def test_a_pages_position_is_read_back_with_its_snapshot(
    epoch: str, number: int, xmin: int, xmax: int, running: list[int], tail: str
) -> None:
    text = f"{epoch}-{number}@{xmin}:{xmax}:{','.join(map(str, running))}{tail}"
    assert parse_position(text) == Position(epoch, number, Snapshot(xmin, xmax, frozenset(running)))


def test_a_snapshot_shows_what_was_committed_before_it_was_taken() -> None:
    snapshot = Snapshot(10, 20, frozenset({12, 15}))
    assert [xid for xid in range(8, 23) if snapshot.shows(xid)] == [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]


@quick
@given(a_snapshot(), a_snapshot())
def test_a_snapshot_includes_another_that_shows_nothing_more(one: Snapshot, other: Snapshot) -> None:
    more = [xid for xid in range(12) if other.shows(xid) and not one.shows(xid)]
    # With a boundary at the top that hides nothing, one sweep more is made: that is safe.
    assert one.includes(other) == (not more and other.xmax <= one.xmax)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "e",
        "e-",
        "-1",
        "1",
        "e-1x",
        "e--1",
        "e-+1",
        "e- 1",
        " e-1",
        "e-1 ",
        "e-1\n",
        "e-1\0",
        "e-1.0",
        "e-1e3",
        "e-0x1",
        "e-1_0",
        "e f-1",
        "e.f-1",
        "\u00e9-1",
        "e-\u0661",
        "e-\u00b2",
        "e\u2010" + "1",
        "e" * 41 + "-1",
        "e-" + "1" * 20,
        "e-" + "1" * 5_000,
        f"e-{2**63}",
        "e-1@",
        "e-1@1",
        "e-1@1:2",
        "e-1@1:2:x",
        "e-1@1:2:3 ",
        "e-1@-1:2:",
        "e-1@" + "1" * 21 + ":2:",
        "e-1@\u0661:2:",
        "null",
        "undefined",
        "42",
        "0;DROP TABLE",
        "\ud800-1",
        "\udcff",
        "x" * 1_000_000,
        "e-1@1:2:" + "," * 100_000 + "x",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_no_position_is_not_read_as_one(text: str) -> None:
    assert parse_position(text) is None


@quick
@given(any_text | st.text("e-01@:,/ ") | st.tuples(st.just("e-1@1:2"), st.text("19:,/")).map("".join))
def test_reading_a_position_never_raises_and_stays_in_bounds(text: str) -> None:
    position = parse_position(text)
    if position is not None:
        assert 0 <= position.number < 2**63
        assert text.startswith(f"{position.epoch}-")


def test_a_snapshot_of_absurd_length_is_read_in_no_time() -> None:
    start = time.process_time()
    position = parse_position("e-1@1:2:" + "9" * 4_000)
    assert position is not None
    assert position.snapshot is not None
    assert parse_position("e-1@1:2:" + "9" * 200_000) is None
    assert time.process_time() - start < 0.1


# Targets.


@pytest.mark.parametrize(
    ("path", "prefix", "expected"),
    [
        ("/events", "/events", True),
        ("/events/", "/events", True),
        ("/events/a", "/events", True),
        ("/events/a/b", "/events", True),
        ("/eventsx", "/events", False),
        ("/events.js", "/events", False),
        ("/Events", "/events", False),
        ("/", "/events", False),
        ("/a", "/", True),
        ("/", "/", True),
        ("*", "/", False),
        ("", "/", False),
    ],
)
def test_stream_routes_are_the_prefix_and_what_lies_below_it(path: str, prefix: str, expected: bool) -> None:
    assert is_stream_path(path, prefix) is expected


@pytest.mark.parametrize(
    ("target", "prefix", "channels"),
    [
        ("/events/a", "/events", ("a",)),
        ("/events/a?", "/events", ("a",)),
        ("/events/a?x=1", "/events", ("a",)),
        ("/events/a+b", "/events", ("a+b",)),
        ("/events/a%20b", "/events", ("a b",)),
        ("/events/a%2Fb", "/events", ("a/b",)),
        ("/events/a%2fb", "/events", ("a/b",)),
        ("/events/a/b", "/events", ("a/b",)),
        ("/events/%2541", "/events", ("%41",)),
        ("/events/%zz", "/events", ("%zz",)),
        ("/events/a%3Fchannel=b", "/events", ("a?channel=b",)),
        ("/events/%C3%A9", "/events", ("\u00e9",)),
        ("/events/events", "/events", ("events",)),
        ("/a", "/", ("a",)),
        ("/events/a", "/", ("events/a",)),
        ("/events/...", "/events", ("...",)),
        ("/events/.a/b..", "/events", (".a/b..",)),
        ("/?channel=a", "/", ("a",)),
        ("/deep/path/a", "/deep/path", ("a",)),
        ("/events?channel=a", "/events", ("a",)),
        ("/events/?channel=a", "/events", ("a",)),
        ("/events?channel=b&channel=a", "/events", ("b", "a")),
        ("/events?channel=a&channel=b&channel=a", "/events", ("a", "b")),
        ("/events?channel=a+b", "/events", ("a b",)),
        ("/events?channel=a%2Bb", "/events", ("a+b",)),
        ("/events?channel=a;channel=b", "/events", ("a;channel=b",)),
        ("/events?channel=a%26channel=b", "/events", ("a&channel=b",)),
        ("/events?channel=a=b", "/events", ("a=b",)),
        ("/events?channel=a?b", "/events", ("a?b",)),
        ("/events?channel=.", "/events", (".",)),
        ("/events?channel=%2E%2E", "/events", ("..",)),
        ("/events?&&channel=a&&", "/events", ("a",)),
        ("/events?Channel=b&channel=a&channels=c", "/events", ("a",)),
        ("/events?%63hannel=a", "/events", ("a",)),
    ],
)
def test_the_channels_of_a_target(target: str, prefix: str, channels: tuple[str, ...]) -> None:
    assert parse_target(target, prefix).channels == channels


# What a proxy reads as another path, perhaps one that it guards otherwise.
UNSAFE_IN_PATHS = [
    ".", "..", "%2e", ".%2E", "secret/../../events.js", "secret/%2e%2e/b", "a%2F..%2Fb", "./a", "a/.", "a/..",
    "a/./b", "/a", "%2Fa", "a/", "a%2F", "a//b", "a%2f/b", "/",
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "status", "reason"),
    [
        ("/events", 400, "ask for /events/CHANNEL"),
        ("/events/", 400, "ask for /events/CHANNEL"),
        ("/events?", 400, "no channel"),
        ("/events?lastEventId=e-1", 400, "no channel"),
        ("/events?channel", 400, "empty"),
        ("/events?channel=", 400, "empty"),
        ("/events?channel=a&channel=", 400, "empty"),
        ("/events/a?channel=b", 400, "not in both"),
        ("/events/a?channel=a", 400, "not in both"),
        ("/events/a?channel=", 400, "not in both"),
        *((f"/events/{name}", 400, "as ?channel=") for name in UNSAFE_IN_PATHS),
        ("/events/%FF", 400, "UTF-8"),
        ("/events/%C3", 400, "UTF-8"),
        ("/events/%ED%A0%80", 400, "UTF-8"),
        ("/events/%C0%AE", 400, "UTF-8"),
        *(
            (f"/events/a{odd}", 400, "ASCII")
            for odd in ("\udcff", "\u00e9", "#b", " ", "\x7f", "\t", "#/../b")
        ),
        ("/events?channel=\u00e9", 400, "ASCII"),
        ("/events?channel=%FF", 400, "UTF-8"),
        ("/events?channel=\udcff", 400, "ASCII"),
        *(
            (f"/events/a?last={last}", 400, "1 to 1000")
            for last in ("0", "1001", "-1", "x", "1e2", "%D9%A1", "+1")
        ),
        ("/events/a?heartbeat=comment", 400, "event"),
        ("/events?channel=a&x=%FF", 400, "UTF-8"),
        ("/events/a%00", 400, "control"),
        ("/events/%0A", 400, "control"),
        ("/events?channel=%C2%85", 400, "control"),
        ("/events/" + "a" * 64, 400, "64 bytes"),
        ("/events/" + "%C3%A9" * 32, 400, "64 bytes"),
        ("/events/sse_relay", 403, "relay's own"),
        ("/events/%73se_relay_x", 403, "relay's own"),
        ("/events?channel=a&channel=sse_relay", 403, "relay's own"),
        ("/events?channel=a" + "&x=1" * 200, 400, "too many fields"),
        ("/events?" + "&" * 100_000, 400, "too many fields"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_target_that_opens_nothing_is_refused_with_its_reason(
    target: str, status: int, reason: str
) -> None:
    refused = refusal(target)
    assert refused.status == status
    assert reason in refused.what


def test_a_refusal_names_the_routes_that_there_are() -> None:
    assert "ask for /CHANNEL or" in refusal("/", "/").what
    assert "ask for /deep/CHANNEL or" in refusal("/deep", "/deep").what


def test_one_stream_takes_fifty_channels_and_counts_each_once() -> None:
    fifty = [f"c{number}" for number in range(50)]
    query = "&".join(f"channel={name}" for name in fifty)
    assert parse_target(f"/events?{query}", "/events").channels == tuple(fifty)
    assert parse_target(f"/events?{query}&{query}", "/events").channels == tuple(fifty)
    assert "51 channels" in refusal(f"/events?{query}&channel=more").what


@pytest.mark.parametrize(
    ("query", "last_event_id", "token"),
    [
        ("", None, None),
        ("lastEventId=", None, None),
        ("lastEventId=e-1", "e-1", None),
        ("lastEventId=e-1%401:2:3", "e-1@1:2:3", None),
        ("lastEventId=e-1@1:2:3,4", "e-1@1:2:3,4", None),
        ("lastEventId=&lastEventId=e-2", "e-2", None),
        ("lasteventid=e-1", None, None),
        ("Last-Event-ID=e-1", "e-1", None),
        ("last-event-id=e-1", "e-1", None),
        ("last_event_id=e-1", "e-1", None),
        ("lastEventId=%0A%00", "\n\0", None),
        ("access_token=t.u-v_w", None, "t.u-v_w"),
        ("access_token=", None, None),
        ("access_token=a&access_token=b&lastEventId=e-1", "e-1", "a"),
    ],
)
def test_position_and_token_of_a_target(query: str, last_event_id: str | None, token: str | None) -> None:
    assert parse_target(f"/events/a?{query}", "/events") == Target(
        ("a",), last_event_id, last_event_id, token
    )
    assert parse_target(f"/?{query}&channel=a", "/") == Target(("a",), last_event_id, last_event_id, token)


def test_of_several_positions_the_first_is_the_pages_and_the_last_the_clients() -> None:
    target = parse_target(
        "/events/a?lastEventId=e-1@1:2:3&lastEventId=e-2&lastEventId=e-3&lastEventId=", "/events"
    )
    assert (target.start, target.last_event_id) == ("e-1@1:2:3", "e-3")


@pytest.mark.parametrize(
    ("query", "heartbeat", "last"),
    [
        ("", False, 0),
        ("heartbeat=event", True, 0),
        ("last=1", False, 1),
        ("last=1000&heartbeat=event", True, 1000),
        ("last=&heartbeat=", False, 0),
        ("last=20&last=30", False, 20),
    ],
)
def test_a_stream_may_ask_for_heartbeats_and_last_values(query: str, heartbeat: bool, last: int) -> None:
    target = parse_target(f"/events/a?{query}", "/events")
    assert (target.heartbeat, target.last) == (heartbeat, last)


@pytest.mark.parametrize(
    ("target", "split"),
    [
        ("/events/a?x=1", (None, "/events/a?x=1")),
        ("http://relay.example/events/a?x=1", ("relay.example", "/events/a?x=1")),
        ("HTTPS://Relay.example:443/events", ("Relay.example:443", "/events")),
        ("http://relay.example?channel=a", ("relay.example", "/?channel=a")),
        ("http://relay.example", ("relay.example", "/")),
        ("http://u@[::1]:8008//a", ("u@[::1]:8008", "//a")),
        ("http:///events", ("", "/events")),
        ("ftp://relay.example/events", (None, "ftp://relay.example/events")),
        ("*", (None, "*")),
    ],
)
def test_an_absolute_target_is_its_authority_and_the_rest(target: str, split: tuple[str | None, str]) -> None:
    assert split_target(target) == split


@quick
@given(
    names=st.lists(possible_names, min_size=1, max_size=6),
    others=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=3),
    last_event_id=st.text(),
    prefix=st.sampled_from(["/events", "/", "/a/b"]),
)
def test_any_channels_arrive_by_a_query_each_once_in_order(
    names: list[str], others: list[tuple[str, str]], last_event_id: str, prefix: str
) -> None:
    known = {"channel", "lastEventId", "access_token"}
    fields = [(key, value) for key, value in others if key not in known]
    fields += [("channel", name) for name in names] + [("lastEventId", last_event_id)]
    target = parse_target(f"{prefix}?{urlencode(fields)}", prefix)
    assert target == Target(tuple(dict.fromkeys(names)), last_event_id or None, last_event_id or None, None)


@quick
@given(
    name=possible_names,
    prefix=st.sampled_from(["/events", "/", "/a/b"]),
    safe=st.sampled_from(["", "/", "/:@!$&'()*+,;="]),
)
def test_any_channel_arrives_by_a_path(name: str, prefix: str, safe: str) -> None:
    assume(is_path_name(name))
    target = prefix.rstrip("/") + "/" + quote(name, safe=safe)
    assert is_stream_path(target, prefix)
    assert parse_target(target, prefix).channels == (name,)


@quick
@given(
    tail=any_text
    | st.text("abc%20FfE9?&=+;/.channel")
    | st.from_regex(r"[/?&=%#;a-f0-9.+\\~-]{0,40}", fullmatch=True),
    prefix=st.sampled_from(["/events", "/"]),
)
def test_any_target_is_read_or_refused_for_the_clients_fault(tail: str, prefix: str) -> None:
    found = read_or_refuse(prefix + tail, prefix)
    if isinstance(found, RefusedError):
        assert found.status in (400, 403)
        return
    assert 1 <= len(found.channels) <= 50
    assert len(set(found.channels)) == len(found.channels)
    assert all(map(is_possible, found.channels))


def read_or_refuse(target: str, prefix: str) -> Target | RefusedError:
    try:
        return parse_target(target, prefix)
    except RefusedError as refused:
        return refused
