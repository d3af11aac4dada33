"""Events and frames: one table drives decoder and encoder, and a decoder not of ours reads the blocks."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sse_relay
from sse_relay import Event, Frame, decode_notification, encode_event, whole_text

POSITION = b"e9-41"
# What follows every block that is read back: it must come out whole, whatever stood before it.
SENTINEL = b"event: after\ndata: sentinel\n\n"

quick = settings(max_examples=100, deadline=None)
any_text = st.text(st.characters())


def read_stream(stream: bytes, piece: int | None = None) -> list[ServerSentEvent]:
    """Decode an event stream with httpx-sse, fed ``piece`` bytes at a time; None: all at once."""

    def pieces() -> Iterator[bytes]:
        step = piece or len(stream)
        for start in range(0, len(stream), step):
            yield stream[start : start + step]

    headers = {"Content-Type": "text/event-stream; charset=utf-8"}
    return list(EventSource(httpx.Response(200, headers=headers, content=pieces())).iter_sse())


def read_block(block: bytes, piece: int | None = None) -> ServerSentEvent:
    """Decode one block; fails unless it is exactly one, and leaves the block after it alone."""
    first, after = read_stream(block + SENTINEL, piece)
    assert (after.event, after.data) == ("after", "sentinel")
    return first


def as_browser_reads(data: str) -> str:
    return data.replace("\r\n", "\n").replace("\r", "\n")


class Case(NamedTuple):
    """A payload, and what it must become; ``data`` None: the payload unchanged, without a name."""

    payload: str
    data: str | None = None
    name: str | None = None
    own_id: str | None = None
    dropped: tuple[str, ...] = ()


def envelope(**members: object) -> str:
    return json.dumps({"event": "n", "data": "d", **members})


DIGITS = "1234567890" * 500

CASES = {
    # Plain data.
    "nothing": Case(""),
    "a word": Case("x"),
    "a blank": Case(" "),
    "leading blanks": Case("   three"),
    "trailing blanks": Case("three   "),
    "tabs": Case("\ta\tb\t"),
    "a line end": Case("\n"),
    "trailing line ends": Case("a\n\n\n"),
    "leading line ends": Case("\n\n\na"),
    "a block's end within": Case("a\n\nevent: forged\ndata: b\n\n"),
    "CR": Case("a\rb"),
    "CRLF": Case("a\r\nb"),
    "CR last": Case("a\r"),
    "LF CR": Case("a\n\rb"),
    "fields at a CR": Case("a\rid: forged\rretry: 1\r\rdata: b"),
    "looks like a field": Case("data: data: x"),
    "begins with a colon": Case(": no comment"),
    "U+2028 and U+2029": Case("a\u2028b\u2029c"),
    "U+0085, VT, FF, FS": Case("a\x85b\x0bc\x0cd\x1ce"),
    "a BOM": Case("\ufeffa"),
    "a BOM before an envelope": Case("\ufeff" + envelope()),
    "NUL": Case("a\0b"),
    "all control characters": Case("".join(map(chr, range(32))) + "\x7f"),
    "emoji": Case("\N{GRINNING FACE}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}"),
    "combining and right to left": Case("e\u0301 \u202eabc \u05d0"),
    "noncharacters": Case("\uffff\ufffe\U0010ffff"),
    "a lone high surrogate": Case("a\ud800b", "a\ufffdb"),
    "a lone low surrogate": Case("\udc00", "\ufffd"),
    "surrogates the wrong way round": Case("\udc00\ud800", "\ufffd\ufffd"),
    "a pair of surrogates": Case("\ud83d\ude00", "\U0001f600"),
    "the largest payload": Case("x" * 7_999),
    # JSON that is no envelope.
    "a plain row": Case('{"id":42,"data":{"total": 1.10}}'),
    "an event without data": Case('{"event":"n"}'),
    "an event without data, with an id": Case('{"event":"n","id":"7"}'),
    "an extra key": Case('{"event":"n","data":"d","user":1}'),
    "an extra key, escaped": Case(r'{"event":"n","data":"d","\u0075ser":1}'),
    "keys in capitals": Case('{"Event":"n","Data":"d"}'),
    "the event is null": Case('{"event":null,"data":"d"}'),
    "the event is a number": Case('{"event":1,"data":"d"}'),
    "the event is an object": Case('{"event":{"event":"n"},"data":"d"}'),
    "an event further in": Case('{"row":{"event":"n","data":"d"}}'),
    "an envelope in an array": Case('[{"event":"n","data":"d"}]'),
    "an envelope in a string": Case(json.dumps('{"event":"n","data":"d"}')),
    "an empty object": Case("{}"),
    "JSON text": Case('"event"'),
    # Almost JSON.
    "NaN": Case('{"event":"n","data":NaN}'),
    "Infinity": Case('{"event":"n","data":[Infinity]}'),
    "-Infinity": Case('{"event":"n","data":"d","id":-Infinity}'),
    "single quotes": Case("{'event':'n','data':'d'}"),
    "bare keys": Case('{event:"n","data":"d"}'),
    "text after the object": Case('{"event":"n","data":"d"} x'),
    "an object after the object": Case('{"event":"n","data":"d"}{"event":"m","data":"d"}'),
    "a comma at the end": Case('{"event":"n","data":"d",}'),
    "no comma": Case('{"event":"n" "data":"d"}'),
    "two commas": Case('{"event":"n",,"data":"d"}'),
    "no colon": Case('{"event" "n","data":"d"}'),
    "no value": Case('{"event":"n","data":}'),
    "cut short": Case('{"event":"n","data":"d"'),
    "cut short in a string": Case('{"event":"n","data":"d'),
    "cut short in an escape": Case('{"event":"n","data":"\\'),
    "an invalid escape": Case(r'{"event":"n","data":"\x41"}'),
    "a short \\u": Case(r'{"event":"n","data":"\u12"}'),
    "a line end in a string": Case('{"event":"n","data":"a\nb"}'),
    "a tab in a key": Case('{"event":"n","da\tta":"d"}'),
    "a NUL in a string": Case('{"event":"n","data":"a\0b"}'),
    "a leading zero": Case('{"event":"n","data":01}'),
    "a plus": Case('{"event":"n","data":+1}'),
    "a point last": Case('{"event":"n","data":1.}'),
    "a point first": Case('{"event":"n","data":.5}'),
    "hexadecimal": Case('{"event":"n","data":0x1f}'),
    "True": Case('{"event":"n","data":True}'),
    "a comment": Case('{"event":"n",/* c */"data":"d"}'),
    "a no-break space outside": Case('{"event":"n",\u00a0"data":"d"}'),
    "a form feed outside": Case('\x0c{"event":"n","data":"d"}'),
    "a BOM within": Case('{\ufeff"event":"n","data":"d"}'),
    "Arabic digits": Case('{"event":"n","data":\u0661}'),
    # Envelopes.
    "an envelope": Case('{"event":"n","data":"d"}', "d", "n"),
    "keys in another order": Case('{"data":"d","event":"n"}', "d", "n"),
    "white space everywhere": Case(' \t\r\n{ "event"\n:\r"n"\t, "data" : "d" } \n', "d", "n"),
    "an escaped key": Case(r'{"\u0065vent":"n","d\u0061ta":"d"}', "d", "n"),
    "all keys escaped": Case(r'{"\u0065\u0076\u0065\u006e\u0074":"n","\u0064ata":1}', "1", "n"),
    "empty data": Case('{"event":"n","data":""}', "", "n"),
    "null data": Case('{"event":"n","data":null}', "null", "n"),
    "boolean data": Case('{"event":"n","data":true}', "true", "n"),
    "an object keeps its white space": Case(
        '{"event":"n","data": { "b" : 1,\n "a":[ ] } }', '{ "b" : 1,\n "a":[ ] }', "n"
    ),
    "an object keeps its escapes": Case(
        r'{"event":"n","data":{"a":"\u00e9\/\ud800"}}', r'{"a":"\u00e9\/\ud800"}', "n"
    ),
    "an object keeps a key given twice": Case('{"event":"n","data":{"a":1,"a":2}}', '{"a":1,"a":2}', "n"),
    "1.10": Case('{"event":"n","data":{"total":1.10}}', '{"total":1.10}', "n"),
    "1e400": Case('{"event":"n","data":1e400}', "1e400", "n"),
    "1E-400": Case('{"event":"n","data":[1E-400]}', "[1E-400]", "n"),
    "-0": Case('{"event":"n","data":-0}', "-0", "n"),
    "5,000 digits": Case(f'{{"event":"n","data":{DIGITS}}}', DIGITS, "n"),
    "5,000 digits further in": Case(f'{{"event":"n","data":[[{DIGITS}]]}}', f"[[{DIGITS}]]", "n"),
    "escapes in data": Case(r'{"event":"n","data":"a\n\t\"\\\/\u00e9b"}', 'a\n\t"\\/\u00e9b', "n"),
    "CR and LF in data": Case(r'{"event":"n","data":"a\r\nb\rc\n"}', "a\r\nb\rc\n", "n"),
    "NUL in data": Case(r'{"event":"n","data":"a\u0000b"}', "a\0b", "n"),
    "an escaped pair of surrogates": Case(r'{"event":"n","data":"\ud83d\ude00"}', "\U0001f600", "n"),
    "an escaped lone surrogate": Case(r'{"event":"n","data":"a\ud83db"}', "a\ufffdb", "n"),
    "escaped surrogates the wrong way round": Case(
        r'{"event":"n","data":"\ude00\ud83d"}', "\ufffd\ufffd", "n"
    ),
    "data that looks like a number": Case('{"event":"n","data":"1.10"}', "1.10", "n"),
    "data that looks like an envelope": Case(envelope(data=envelope()), '{"event": "n", "data": "d"}', "n"),
    "data twice, the last counts": Case('{"data":1,"event":"n","data":"d"}', "d", "n"),
    "event twice, the last counts": Case('{"event":1,"data":"d","event":"n"}', "d", "n"),
    "event twice, the last is no string": Case('{"event":"n","data":"d","event":1}'),
    "event twice, once escaped": Case(r'{"event":"m","data":"d","\u0065vent":"n"}', "d", "n"),
    "retry and comment are not sent": Case(
        '{"event":"n","data":"d","retry":1,"comment":"c\\n\\ndata: x"}', "d", "n"
    ),
    "retry and comment of any kind": Case(
        '{"event":"n","data":"d","retry":{"a":[]},"comment":null}', "d", "n"
    ),
    # Names.
    "an empty name": Case('{"event":"","data":"d"}', "d"),
    "the name message": Case('{"event":"message","data":"d"}', "d", "message"),
    "a name with blanks": Case('{"event":" a b ","data":"d"}', "d", " a b "),
    "a name with a colon": Case('{"event":"a: b","data":"d"}', "d", "a: b"),
    "a name beyond ASCII": Case(
        '{"event":"\u00e9\u2028\U0001f600","data":"d"}', "d", "\u00e9\u2028\U0001f600"
    ),
    "a lone surrogate in a name": Case(r'{"event":"a\ud800","data":"d"}', "d", "a\ufffd"),
    "the name error": Case(envelope(event="error"), "d", dropped=("event",)),
    "the name open": Case(envelope(event="open"), "d", dropped=("event",)),
    "the name relay.gap": Case(envelope(event="relay.gap"), "d", dropped=("event",)),
    "the name relay.": Case(envelope(event="relay."), "d", dropped=("event",)),
    "the name relay": Case(envelope(event="relay"), "d", "relay"),
    "the name Error": Case(envelope(event="Error"), "d", "Error"),
    "the name opened": Case(envelope(event="opened"), "d", "opened"),
    "an escaped reserved name": Case(r'{"event":"err\u006fr","data":"d"}', "d", dropped=("event",)),
    "LF in a name": Case(envelope(event="a\ndata: x"), "d", dropped=("event",)),
    "CR in a name": Case(envelope(event="a\rid: x"), "d", dropped=("event",)),
    "NUL in a name": Case(envelope(event="a\0"), "d", dropped=("event",)),
    # Ids.
    "an id": Case(envelope(id="a-7"), "d", "n", "a-7"),
    "an integer id": Case('{"event":"n","data":"d","id":42}', "d", "n", "42"),
    "a negative id": Case('{"event":"n","data":"d","id":-7}', "d", "n", "-7"),
    "an id of 200 digits": Case(f'{{"event":"n","data":"d","id":{DIGITS[:200]}}}', "d", "n", DIGITS[:200]),
    "an id beyond 2**64": Case(envelope(id=2**64 + 1), "d", "n", "18446744073709551617"),
    "an id of 5,000 digits": Case(f'{{"event":"n","data":"d","id":{DIGITS}}}', "d", "n", None, ("id",)),
    "an id with blanks, a slash and a colon": Case(envelope(id="a /: @b"), "d", "n", "a /: @b"),
    "an id of 256 bytes": Case(envelope(id="i" * 256), "d", "n", "i" * 256),
    "an id of 257 bytes": Case(envelope(id="i" * 257), "d", "n", None, ("id",)),
    "an empty id": Case(envelope(id=""), "d", "n", None, ("id",)),
    "a float id": Case('{"event":"n","data":"d","id":1.0}', "d", "n", None, ("id",)),
    "an id with an exponent": Case('{"event":"n","data":"d","id":1e3}', "d", "n", None, ("id",)),
    "a boolean id": Case(envelope(id=True), "d", "n", None, ("id",)),
    "a null id": Case(envelope(id=None), "d", "n", None, ("id",)),
    "an object id": Case(envelope(id={"a": 1}), "d", "n", None, ("id",)),
    "an array id": Case(envelope(id=["1"]), "d", "n", None, ("id",)),
    "an id beyond ASCII": Case(envelope(id="\u00e9"), "d", "n", None, ("id",)),
    "LF in an id": Case(envelope(id="a\ndata: x"), "d", "n", None, ("id",)),
    "CR in an id": Case(envelope(id="a\r"), "d", "n", None, ("id",)),
    "NUL in an id": Case(envelope(id="a\0b"), "d", "n", None, ("id",)),
    "a tab in an id": Case(envelope(id="a\tb"), "d", "n", None, ("id",)),
    "DEL in an id": Case(envelope(id="a\x7f"), "d", "n", None, ("id",)),
    "an id twice, the last counts": Case('{"id":1,"event":"n","data":"d","id":"x"}', "d", "n", "x"),
    "a bad id and a bad name": Case(envelope(id="", event="open"), "d", dropped=("event", "id")),
    # Depth.
    "thousands of open brackets": Case("[" * 7_999),
    "an object of thousands of levels": Case('{"event":' * 800),
    "an array of thousands of levels": Case("[" * 3_900 + "]" * 3_900),
    "an envelope with 500 levels": Case(
        f'{{"event":"n","data":{"[" * 500 + "]" * 500}}}', "[" * 500 + "]" * 500, "n"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_payload_becomes_its_event_and_any_decoder_reads_it_back(case: Case) -> None:
    data = case.payload if case.data is None else case.data
    event = decode_notification(case.payload)
    assert event == Event(data, case.name, case.own_id, case.dropped)
    block = encode_event(event, POSITION)
    for piece in (None, 1):
        read = read_block(block, piece)
        assert read.event == (case.name or "message")
        assert read.data == as_browser_reads(data)
        assert read.id == "e9-41" + (f"/{case.own_id}" if case.own_id else "")
        assert read.retry is None


def test_what_nests_deeper_than_python_reads_arrives_unchanged_in_one_form_or_the_other() -> None:
    # How deep that is depends on the version of Python.
    deep = "[" * 3_900 + "]" * 3_900
    payload = f'{{"event":"n","data":{deep}}}'
    assert decode_notification(payload) in (Event(payload), Event(deep, "n"))


@quick
@given(any_text)
@example("\r\n\r")
@example("\ud83d\ude00\ud83d")
def test_any_text_survives_the_way_to_a_decoder(text: str) -> None:
    whole = re.sub("[\ud800-\udfff]", "\ufffd", re.sub("[\ud800-\udbff][\udc00-\udfff]", _join_pair, text))
    assert whole_text(text) == whole
    read = read_block(encode_event(Event(whole_text(text)), POSITION))
    assert (read.event, read.data, read.id) == ("message", as_browser_reads(whole), "e9-41")


def _join_pair(match: re.Match[str]) -> str:
    high, low = map(ord, match[0])
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


@quick
@given(data=json_values, name=any_text, own_id=json_values, ascii_only=st.booleans())
@example(data="", name="relay.x", own_id=0, ascii_only=True)
@example(data="a", name="a", own_id=" ", ascii_only=True)
def test_an_envelope_of_any_name_id_and_data_loses_no_more_than_the_field_that_cannot_be_sent(
    data: object, name: str, own_id: object, ascii_only: bool
) -> None:
    payload = json.dumps({"event": name, "data": data, "id": own_id}, ensure_ascii=ascii_only)
    event = decode_notification(payload)
    name = whole_text(name)
    bad_name = (
        name in ("error", "open") or name.startswith("relay.") or not {"\r", "\n", "\0"}.isdisjoint(name)
    )
    text_id = str(own_id) if isinstance(own_id, int | str) and not isinstance(own_id, bool) else ""
    bad_id = re.fullmatch("[ -~]{1,256}", text_id) is None
    assert event.dropped == ("event",) * bad_name + ("id",) * bad_id
    read = read_block(encode_event(event, POSITION))
    assert read.event == ("message" if bad_name or not name else name)
    assert read.id == ("e9-41" if bad_id else f"e9-41/{text_id}")
    if isinstance(data, str):
        assert read.data == as_browser_reads(whole_text(data))
    else:
        assert read.data == whole_text(json.dumps(data, ensure_ascii=ascii_only))


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def read_envelope(payload: str) -> dict[str, Any] | None:
    """Read an envelope by Python's whole-text reader; None if the payload is none."""
    try:
        value = json.loads(payload, parse_int=str, parse_float=str, parse_constant=_refuse)
        # Numbers were made text above; whether the name is text shows without that.
        names = json.loads(payload, parse_int=float, parse_float=float)
    except ValueError:
        return None
    if not isinstance(value, dict) or not {"event", "data"} <= value.keys():
        return None
    if value.keys() - {"event", "data", "id", "retry", "comment"} or not isinstance(names["event"], str):
        return None
    return value


space = st.sampled_from(["", "", "", " ", "\t\r\n", "\u00a0", "\x0b"])
member = st.tuples(
    space,
    st.sampled_from(
        ['"event"', '"event"', '"data"', '"data"', '"id"', '"retry"', r'"\u0065vent"', '"x"', "event"]
    ),
    space,
    st.just(":"),
    space,
    st.sampled_from(
        ['"n"', '"a\\u0022"', '""', "1.10", "-0", "1e400", "01", "NaN", "null", "[ ]", '{"event":[1 ]}', "'"]
    ),
    space,
).map("".join)
almost_envelopes = st.tuples(
    space,
    st.just("{"),
    st.lists(member, max_size=4).map(",".join),
    st.sampled_from(["}", "}", "}", "}", ",}", "", "}x", "}}"]),
    space,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(almost_envelopes | st.text('{}[]":,\\ \n\tu0event', max_size=40))
def test_exactly_those_payloads_are_envelopes_that_another_reader_takes_for_one(payload: str) -> None:
    event = decode_notification(payload)
    members = read_envelope(payload)
    if members is None:
        assert event == Event(payload)
        return
    assert event.name == (members["event"] or None)
    if isinstance(members["data"], str) and event.data == members["data"]:
        return
    # Not text: sent as it stood there.
    assert event.data in payload
    assert json.loads(event.data, parse_int=str, parse_float=str) == members["data"]


# What the relay itself says.


def make_frame(channel: str, name: str | None = None) -> Frame:
    return Frame(41, channel, encode_event(Event("d", name), POSITION), name is not None)


NAMED = [
    ("orders", None, "orders"),
    ("orders", "paid", "orders:paid"),
    ("orders", "message", "orders:message"),
    ("open", None, "open:"),
    ("error", None, "error:"),
    ("relay.gap", None, "relay.gap:"),
    ("relay.", None, "relay.:"),
    ("relay", None, "relay"),
    ("open", "paid", "open:paid"),
    ("open", "open ", "open:open "),
    ("a:b", "c", "a%3Ab:c"),
    ("a", "b:c", "a:b:c"),
    ("a%3Ab", None, "a%253Ab"),
    ("relay.gap:", None, "relay.gap%3A:"),
    (" a: \u2028\N{GRINNING FACE}", None, " a%3A \u2028\N{GRINNING FACE}"),
]


@pytest.mark.parametrize(("channel", "name", "expected"), NAMED)
def test_an_event_names_its_channel_on_a_stream_of_several(
    channel: str, name: str | None, expected: str
) -> None:
    frame = make_frame(channel, name)
    read = read_block(sse_relay.named_block(frame))
    assert (read.event, read.data, read.id) == (expected, "d", "e9-41")
    assert read_block(frame.block).event == (name or "message")


# What a channel and an event can be called at all.
channel_names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
event_names = st.none() | any_text.map(lambda name: sse_relay.sendable_name(whole_text(name)))


@quick
@given(channel_names | st.sampled_from(["error", "open", "relay.gap", "a:", "a%"]), event_names)
@example("a", "b:c")
@example("a:b", "c")
def test_the_name_tells_channel_and_name_apart_and_is_never_one_of_the_relays(
    channel: str, name: str | None
) -> None:
    event = read_block(sse_relay.named_block(make_frame(channel, name))).event
    shown, colon, rest = event.partition(":")
    assert shown.replace("%3A", ":").replace("%25", "%") == channel
    assert (rest or None) == name
    assert bool(colon) == (name is not None or sse_relay.is_reserved_name(channel))
    assert event not in ("error", "open", "relay.gap", "relay.refused", "relay.heartbeat")


def test_joined_blocks_are_those_of_the_frames_in_their_order() -> None:
    frames = [make_frame("a"), make_frame("b", "n"), make_frame("a")]
    assert [e.event for e in read_stream(sse_relay.join_blocks(frames, several=False))] == [
        "message",
        "n",
        "message",
    ]
    assert [e.event for e in read_stream(sse_relay.join_blocks(frames, several=True))] == ["a", "b:n", "a"]
    assert sse_relay.join_blocks([], several=True) == b""


@quick
@given(channels=st.lists(any_text, min_size=1, unique=True), since=st.none() | any_text)
@example(channels=['"\n\u2028'], since="\udcff" * 200)
def test_a_gap_names_its_channels_and_shows_at_most_100_characters_of_the_clients_position(
    channels: list[str], since: str | None
) -> None:
    block = sse_relay.encode_gaps(dict.fromkeys(channels, "evicted"), since, POSITION)
    assert block.isascii()
    read = read_block(block)
    assert (read.event, read.id) == ("relay.gap", "e9-41")
    # A pair of surrogates is one character to whoever reads JSON.
    assert json.loads(read.data) == json.loads(
        json.dumps({"channels": channels, "reason": "evicted", "since": since and since[:100]})
    )


def test_one_gap_for_each_reason_and_only_the_last_moves_the_clients_position() -> None:
    found = {"a": "evicted", "b": "restart", "c": "evicted"}
    for position, ids in ((POSITION, ["", "e9-41"]), (None, ["", ""])):
        gaps = read_stream(sse_relay.encode_gaps(found, "x-1", position))
        assert [json.loads(gap.data) for gap in gaps] == [
            {"channels": channels, "reason": reason, "since": "x-1"}
            for channels, reason in ((["a", "c"], "evicted"), (["b"], "restart"))
        ]
        assert [gap.id for gap in gaps] == ids
    assert sse_relay.encode_gaps({}, None, POSITION) == b""


def test_a_position_alone_fires_no_event() -> None:
    # httpx-sse shows such blocks; a browser fires events for blocks with data alone.
    read = read_block(sse_relay.encode_position(POSITION))
    assert (read.event, read.data, read.id, read.retry) == ("message", "", "e9-41", None)
    assert b"data" not in sse_relay.encode_position(POSITION)


def test_retry_is_a_block_of_its_own() -> None:
    read = read_block(sse_relay.encode_retry(2_500))
    assert (read.event, read.data, read.id, read.retry) == ("message", "", "", 2_500)


@pytest.mark.parametrize("size", [1, 9, 10, 15, 16, 255, 256, 30_000])
def test_chunks_are_read_by_another_http_client(size: int) -> None:
    blocks = [b"\r\n0" * (size // 3) + b"x" * (size % 3), b"\r\n0\r\n\r\n"]
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(5)
        far.settimeout(5)
        far.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        far.sendall(b"".join(map(sse_relay.as_chunk, blocks)) + b"0\r\n\r\n")
        with http.client.HTTPResponse(near) as response:
            response.begin()
            assert response.read() == b"".join(blocks)


def waits(base: int, clients: int, factor: float = 1.0) -> list[int]:
    return [sse_relay.retry_after(base, clients, factor) for _ in range(500)]


def test_few_clients_wait_between_the_least_wait_and_twice_that() -> None:
    found = waits(2_000, 0)
    assert min(found) >= 2_000
    assert max(found) <= 4_000
    assert max(found) - min(found) > 1_500
    assert max(waits(2_000, 5)) <= 4_010


def test_ten_thousand_clients_are_spread_over_more_than_ten_seconds() -> None:
    found = waits(2_000, 10_000)
    assert min(found) >= 2_000
    assert max(found) <= 14_000
    # Of 10,000 clients not much more than the 1,000 that can be served come back in one second.
    in_each_second = [
        sum(start <= wait < start + 1_000 for wait in found) for start in range(2_000, 14_000, 1_000)
    ]
    assert min(in_each_second) > 0
    assert max(in_each_second) < len(found) / 5


def test_who_is_cut_again_and_again_waits_longer_but_never_beyond_a_day() -> None:
    assert min(waits(2_000, 0, 8)) >= 16_000
    assert set(waits(80_000_000, 100_000, 16)) == {sse_relay.NEVER_MS}
