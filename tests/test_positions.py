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
    POSITION_FIELDS,
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
    return not any(segment in ("", ".", "..") for segment in name.split("/"))


possible_names = st.text(min_size=1, max_size=20).filter(is_possible)


def refusal(target: str, prefix: str = "/events") -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse_target(target, prefix)
    return caught.value


# Channels.

POSSIBLE_NAMES = [
    "orders", "Orders", "a b", " ", " a ", "a/b", "/", "a?b#c&d=e;f", "a+b", "100%", "%41", "%zz", 'a"b', '"',
    "a'b", '"; DROP TABLE orders; --', "LISTEN", "*", "\\", "$1", "a\u00a0b", "\u2028", "\u200b", "\ufeff",
    "\u202eabc", "\N{GRINNING FACE}" * 15 + "abc", "a" * 63, "\u00e9" * 31 + "a", ".", "..", "...", "../..",
    "sse", "SSE_RELAY", "my_sse_relay", "relay.gap", "error",
]  # fmt: skip


def test_awkward_names_arrive_unchanged_as_a_query_and_as_a_path() -> None:
    for name in POSSIBLE_NAMES:
        assert check_channel(name) == name
        for prefix in ("/events", "/"):
            assert parse_target(f"{prefix}?{urlencode({'channel': name})}", prefix) == Target((name,))
            path = f"{prefix.rstrip('/')}/{quote(name, safe='')}"
            if is_path_name(name):
                assert parse_target(path, prefix) == Target((name,))
            else:
                assert "as ?channel=" in refusal(path, prefix).what


# The reason for which no client may ask for them, and its status.
IMPOSSIBLE_NAMES = {
    (400, "empty"): [""],
    (400, "64 bytes"): ["a" * 64, "\u00e9" * 32, "\N{GRINNING FACE}" * 16],
    (400, "100000 bytes"): ["x" * 100_000],
    (400, "control"): ["a\0", "\n", "a\rb", "\t", "\x1b[31m", "\x7f", "\x85", "a\x9fb"],
    (400, "UTF-8"): ["\ud800"],
    (403, "relay's own"): ["sse_relay", "sse_relay_canary_1", "sse_relayx"],
}


@pytest.mark.parametrize(("fault", "names"), IMPOSSIBLE_NAMES.items())
def test_an_impossible_name_is_refused_with_its_reason(fault: tuple[int, str], names: list[str]) -> None:
    for name in names:
        query = urlencode({"channel": name}, errors="surrogatepass")
        with pytest.raises(RefusedError, match=fault[1]) as caught:
            check_channel(name)
        for refused in (caught.value, refusal(f"/events?{query}")):
            assert refused.status == fault[0]
            assert fault[1] in refused.what
            assert refused.what.isascii()


@quick
@given(any_text)
def test_exactly_the_possible_names_pass(name: str) -> None:
    if is_possible(name):
        assert check_channel(name) == name
    else:
        with pytest.raises(RefusedError):
            check_channel(name)


@quick
@given(any_text)
@example('"; DROP --')
def test_quotes_within_a_quoted_name_come_in_pairs(name: str) -> None:
    inner = re.fullmatch(r'"((?:[^"]|"")*)"', quote_name(name), re.DOTALL)
    assert inner is not None
    assert inner[1].replace('""', '"') == name


# Globs.


# What each matches, and what not.
GLOBS = {
    "": ([], ["a"]),
    "a": (["a"], ["A", "ab", "ba"]),
    "*": (["a\nb", "", "a"], []),
    "user-*": (["user-7", "user-"], ["user", "my-user-7"]),
    "*-log": (["a-log-log", "-log"], ["a-logs"]),
    "a*b*c": (["abc", "aXbXbXc"], ["acb"]),
    "a*a": (["aa", "aba"], ["a"]),
    "*a*a*": (["aa", "xaxax"], ["a"]),
    "**": (["x", ""], []),
    "?": (["?"], ["x"]),
    "[ab]": (["[ab]"], ["a"]),
    "a.c": (["a.c"], ["abc"]),
    "a|b": (["a|b"], ["a", "b"]),
    "\\*": (["\\x"], ["x", "*"]),
    "{a,b}": (["{a,b}"], ["a"]),
    "\u00e9*": (["\u00e9t\u00e9"], ["e"]),
}


@pytest.mark.parametrize(("glob", "matching", "others"), [(glob, *names) for glob, names in GLOBS.items()])
def test_a_glob_knows_the_star_alone(glob: str, matching: list[str], others: list[str]) -> None:
    pattern = compile_globs([glob])
    assert [name for name in matching + others if pattern.fullmatch(name)] == matching


@quick
@given(globs=st.lists(st.text("ab.*"), max_size=4), name=st.text("ab.", max_size=12))
def test_globs_agree_with_another_implementation(globs: list[str], name: str) -> None:
    # fnmatch knows more than the star; none of that is in this alphabet.
    expected = any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    assert bool(compile_globs(globs).fullmatch(name)) is expected


def test_neither_many_stars_nor_absurd_lengths_keep_the_loop_busy() -> None:
    pattern = compile_globs(["*a" * 31 + "b", "*" * 50 + "c"])
    start = time.process_time()
    assert pattern.fullmatch("a" * 63) is None
    position = parse_position("e-1@1:2:" + "9" * 4_000)
    assert position is not None
    assert position.snapshot is not None
    assert parse_position("e-1@1:2:" + "9" * 200_000) is None
    assert time.process_time() - start < 0.1


# Positions.

epochs = st.text("abcXYZ019_", min_size=1, max_size=40)
numbers = st.integers(0, 2**63 - 1)
xids = st.integers(0, 2**64 - 1)


@quick
@given(
    epoch=epochs,
    number=numbers,
    shown=st.none() | st.tuples(xids, xids, st.lists(xids, max_size=5)),
    own_id=st.none() | st.text(st.characters(max_codepoint=126, min_codepoint=32)),
)
@example("e", 0, None, "")
@example("e", 2**63 - 1, None, "a/b@1:2:3")
def test_a_position_is_read_back_with_its_snapshot_whatever_own_id_follows(
    epoch: str, number: int, shown: tuple[int, int, list[int]] | None, own_id: str | None
) -> None:
    text, snapshot = f"{epoch}-{number}", None
    if shown is not None:
        xmin, xmax, running = shown
        snapshot = Snapshot(xmin, xmax, frozenset(running))
        text += f"@{xmin}:{xmax}:{','.join(map(str, running))}"
    text += "" if own_id is None else f"/{own_id}"
    assert parse_position(text) == Position(epoch, number, snapshot)


@st.composite
def a_snapshot(draw: st.DrawFn) -> Snapshot:
    xmin, xmax = sorted(draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    return Snapshot(xmin, xmax, frozenset(draw(st.sets(st.integers(xmin, xmax)))))


def test_a_snapshot_shows_what_was_committed_before_it_was_taken() -> None:
    snapshot = Snapshot(10, 20, frozenset({12, 15}))
    assert [xid for xid in range(8, 23) if snapshot.shows(xid)] == [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]


@quick
@given(a_snapshot(), a_snapshot())
def test_a_snapshot_includes_another_that_shows_nothing_more(one: Snapshot, other: Snapshot) -> None:
    more = [xid for xid in range(12) if other.shows(xid) and not one.shows(xid)]
    # With a boundary at the top that hides nothing, one sweep more is made: that is safe.
    assert one.includes(other) == (not more and other.xmax <= one.xmax)


NO_POSITIONS = [
    "", "-", "e", "e-", "-1", "1", "e-1x", "e--1", "e-+1", "e- 1", " e-1", "e-1 ", "e-1\n", "e-1\0", "e-1.0",
    "e-1e3", "e-0x1", "e-1_0", "e f-1", "e.f-1", "\u00e9-1", "e-\u0661", "e-\u00b2", "e\u2010" + "1",
    "e" * 41 + "-1", "e-" + "1" * 20, "e-" + "1" * 5_000, f"e-{2**63}", "e-1@", "e-1@1", "e-1@1:2",
    "e-1@1:2:x", "e-1@1:2:3 ", "e-1@-1:2:", "e-1@" + "1" * 21 + ":2:", "e-1@\u0661:2:", "null", "undefined",
    "42", "0;DROP TABLE", "\ud800-1", "\udcff", "x" * 1_000_000, "e-1@1:2:" + "," * 100_000 + "x",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_POSITIONS, ids=lambda text: ascii(text[:20]))
def test_what_is_no_position_is_not_read_as_one(text: str) -> None:
    assert parse_position(text) is None


@quick
@given(any_text | st.text("e-01@:,/ ") | st.tuples(st.just("e-1@1:2"), st.text("19:,/")).map("".join))
def test_reading_a_position_never_raises_and_stays_in_bounds(text: str) -> None:
    position = parse_position(text)
    if position is not None:
        assert 0 <= position.number < 2**63
        assert text.startswith(f"{position.epoch}-")


# Targets.


def test_stream_routes_are_the_prefix_and_what_lies_below_it() -> None:
    for prefix, inside, outside in (
        ("/events", ["", "/", "/a", "/a/b", "?channel=a/b", "/a?b"], ["x", ".js", "x?/events/a"]),
        ("/", ["a", "", "?channel=a"], []),
    ):
        assert all(is_stream_path(prefix + rest, prefix) for rest in inside)
        assert not any(is_stream_path(prefix + rest, prefix) for rest in outside)
    for target in ("/Events", "/", "/x/events/a", "?/events/a", "events"):
        assert not is_stream_path(target, "/events")
    for target in ("*", "", "a"):
        assert not is_stream_path(target, "/")


# By what stands before the channels; a path of several names is one channel.
TARGETS = {
    "/events": {
        "/a": "a", "/a?": "a", "/a?x=1": "a", "/a+b": "a+b", "/a%20b": "a b", "/a%2Fb": "a/b",
        "/a%2fb": "a/b", "/a/b": "a/b", "/%2541": "%41", "/%zz": "%zz", "/a%3Fchannel=b": "a?channel=b",
        "/%C3%A9": "\u00e9", "/events": "events", "/...": "...", "/.a/b..": ".a/b..", "?channel=a": "a",
        "/?channel=a": "a", "?channel=a+b": "a b", "?channel=a%2Bb": "a+b",
        "?channel=a;channel=b": "a;channel=b", "?channel=a%26channel=b": "a&channel=b", "?channel=a=b": "a=b",
        "?channel=a?b": "a?b", "?channel=.": ".", "?channel=%2E%2E": "..", "?&&channel=a&&": "a",
        "?Channel=b&channel=a&channels=c": "a", "?%63hannel=a": "a",
    },
    "/": {"a": "a", "events/a": "events/a", "?channel=a": "a"},
    "/deep/path": {"/a": "a"},
}  # fmt: skip


@pytest.mark.parametrize("prefix", TARGETS)
def test_the_channel_of_a_target(prefix: str) -> None:
    found = {rest: parse_target(prefix + rest, prefix).channels for rest in TARGETS[prefix]}
    assert found == {rest: (channel,) for rest, channel in TARGETS[prefix].items()}


# What a proxy reads as another path, perhaps one that it guards otherwise.
UNSAFE_IN_PATHS = [
    ".", "..", "%2e", ".%2E", "secret/../../events.js", "secret/%2e%2e/b", "a%2F..%2Fb", "./a", "a/.", "a/..",
    "a/./b", "/a", "%2Fa", "a/", "a%2F", "a//b", "a%2f/b", "/",
]  # fmt: skip


# What is wrong with targets.
FAULTS = {
    "ask for /events/CHANNEL": ["", "/", "?", "?lastEventId=e-1"],
    "empty": ["?channel", "?channel=", "?channel=a&channel="],
    "not in both": ["/a?channel=b", "/a?channel=a", "/a?channel="],
    "as ?channel=": [f"/{name}" for name in UNSAFE_IN_PATHS],
    "UTF-8": ["/%FF", "/%C3", "/%ED%A0%80", "/%C0%AE", "?channel=%FF", "?channel=a&x=%FF"],
    "ASCII": [
        *(f"/a{odd}" for odd in ("\udcff", "\u00e9", "#b", " ", "\x7f", "\t", "#/../b")),
        "?channel=\u00e9",
        "?channel=\udcff",
    ],
    "1 to 1000": [f"/a?last={last}" for last in ("0", "1001", "-1", "x", "1e2", "%D9%A1", "+1")],
    "?heartbeat= takes the word event": ["/a?heartbeat=comment"],
    "control": ["/a%00", "/%0A", "?channel=%C2%85"],
    "64 bytes": ["/" + "a" * 64, "/" + "%C3%A9" * 32],
    "relay's own": ["/sse_relay", "/%73se_relay_x", "?channel=a&channel=sse_relay"],
    "too many fields": ["?channel=a" + "&x=1" * 200, "?" + "&" * 100_000],
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_target_that_opens_nothing_is_refused_with_its_reason(reason: str) -> None:
    for rest in FAULTS[reason]:
        refused = refusal(f"/events{rest}")
        assert refused.status == (403 if "own" in reason else 400)
        assert reason in refused.what
    for path in ("", "/deep"):
        assert f"ask for {path}/CHANNEL or" in refusal(path or "/", path or "/").what


def test_one_stream_takes_fifty_channels_and_counts_each_once() -> None:
    fifty = [f"c{number}" for number in range(50)]
    query = "&".join(f"channel={name}" for name in fifty)
    assert parse_target(f"/events?{query}", "/events").channels == tuple(fifty)
    assert parse_target(f"/events?{query}&{query}", "/events").channels == tuple(fifty)
    assert "51 channels" in refusal(f"/events?{query}&channel=more").what


# What a target asks for besides channels.
QUERIES = {
    "": Target(("a",)),
    "lastEventId=&access_token=&last=&heartbeat=": Target(("a",)),
    "lasteventid=e-1": Target(("a",)),
    **{f"{name}=e-1": Target(("a",), "e-1", "e-1") for name in sorted(POSITION_FIELDS)},
    "lastEventId=e-1%401:2:3": Target(("a",), "e-1@1:2:3", "e-1@1:2:3"),
    "lastEventId=e-1@1:2:3,4": Target(("a",), "e-1@1:2:3,4", "e-1@1:2:3,4"),
    "lastEventId=&lastEventId=e-2": Target(("a",), "e-2", "e-2"),
    "lastEventId=%0A%00": Target(("a",), "\n\0", "\n\0"),
    # Of several, the first is the page's and the last the client's.
    "lastEventId=e-1@1:2:3&lastEventId=e-2&lastEventId=e-3&lastEventId=": Target(("a",), "e-1@1:2:3", "e-3"),
    "access_token=t.u-v_w": Target(("a",), token="t.u-v_w"),  # none
    "access_token=a&access_token=b&lastEventId=e-1": Target(("a",), "e-1", "e-1", "a"),
    "heartbeat=event&last=1": Target(("a",), heartbeat=True, last=1),
    "last=1000": Target(("a",), last=1_000),
    "last=20&last=30": Target(("a",), last=20),
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_more_than_channels(query: str) -> None:
    assert parse_target(f"/events/a?{query}", "/events") == QUERIES[query]
    assert parse_target(f"/?{query}&channel=a", "/") == QUERIES[query]


SPLIT = {
    "/events/a?x=1": (None, "/events/a?x=1"),
    "http://relay.example/events/a?x=1": ("relay.example", "/events/a?x=1"),
    "HTTPS://Relay.example:443/events": ("Relay.example:443", "/events"),
    "http://relay.example?channel=a": ("relay.example", "/?channel=a"),
    "http://relay.example": ("relay.example", "/"),
    "http://u@[::1]:8008//a": ("u@[::1]:8008", "//a"),
    "http:///events": ("", "/events"),
    "ftp://relay.example/events": (None, "ftp://relay.example/events"),
    "*": (None, "*"),
}


def test_an_absolute_target_is_its_authority_and_the_rest() -> None:
    assert {target: split_target(target) for target in SPLIT} == SPLIT


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
    channels, status = tuple[str, ...](), 0
    try:
        channels = parse_target(prefix + tail, prefix).channels
    except RefusedError as refused:
        status = refused.status
    assert status in (400, 403) if not channels else len(channels) <= 50
    assert len(set(channels)) == len(channels)
    assert all(map(is_possible, channels))
