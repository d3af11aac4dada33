"""Events and frames: one table drives decoder and encoder, and a decoder not of ours reads the blocks."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

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


def envelope(**members: object) -> str:
    return json.dumps({"event": "n", "data": "d", **members})


DIGITS = "1234567890" * 500

# What arrives as it was sent.
UNCHANGED = [
    "", "x", " ", "   three", "three   ", "\ta\tb\t", "\n", "a\n\n\n", "\n\n\na", "a\rb", "a\r\nb", "a\r",
    "a\n\rb", "a\n\nevent: forged\ndata: b\n\n", "a\rid: forged\rretry: 1\r\rdata: b", "data: data: x",
    ": no comment", "a\u2028b\u2029c", "a\x85b\x0bc\x0cd\x1ce", "\ufeffa", "\ufeff" + envelope(), "a\0b",
    "\uffff\ufffe\U0010ffff",
    "".join(map(chr, range(32))) + "\x7f", "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
    "e\u0301 \u202eabc \u05d0", "x" * 7_999,
    # JSON, but no envelope.
    '{"id":42,"data":{"total": 1.10}}', '{"event":"n"}', '{"event":"n","id":"7"}',
    '{"event":"n","data":"d","user":1}',
    r'{"event":"n","data":"d","\u0075ser":1}', '{"Event":"n","Data":"d"}', '{"event":null,"data":"d"}',
    '{"event":1,"data":"d"}', '{"event":{"event":"n"},"data":"d"}', '{"row":{"event":"n","data":"d"}}',
    '[{"event":"n","data":"d"}]', json.dumps('{"event":"n","data":"d"}'), "{}", '"event"',
    '{"event":"n","data":"d","event":1}',
    # Almost JSON.
    "{'event':'n','data':'d'}", '{event:"n","data":"d"}', '{"event":"n","data":"d"} x',
    '{"event":"n","data":"d"}{"event":"m","data":"d"}', '{"event":"n","data":"d",}',
    '{"event":"n" "data":"d"}', '{"event":"n",,"data":"d"}', '{"event" "n","data":"d"}',
    '{"event":"n","data":"d"', '{"event":"n","data":"d',
    '{"event":"n","data":"\\', '{"event":"n","da\tta":"d"}', '{"event":"n",/* c */"data":"d"}',
    '{"event":"n",\u00a0"data":"d"}', '\x0c{"event":"n","data":"d"}', '{\ufeff"event":"n","data":"d"}',
    ',"event":"n","data":"d"}', '{{"event":"n","data":"d"}', '{"event":"n"}{"data":"d"}',
    *(f'{{"event":"n","data":{value}}}' for value in (
        "NaN", "[Infinity]", "-Infinity", "", r'"\x41"', r'"\u12"', '"a\nb"', '"a\0b"', "01", "+1",
        "1.", ".5", "0x1f", "True", "\u0661",
    )),
    # Too deep.
    "[" * 7_999, '{"event":' * 800, "[" * 3_900 + "]" * 3_900,
]  # fmt: skip

# The JSON of an envelope's data, and what arrives.
DATA = [
    ('""', ""),
    *((text, text) for text in (
        "null", "true", '{ "b" : 1,\n "a":[ ] }', r'{"a":"\u00e9\/\ud800"}', '{"a":1,"a":2}',
        '{"total":1.10}', "1e400", "[1E-400]", "-0", DIGITS, f"[[{DIGITS}]]", "[" * 500 + "]" * 500,
    )),
    (r'"a\n\t\"\\\/\u00e9b"', 'a\n\t"\\/\u00e9b'),
    (r'"a\r\nb\rc\n"', "a\r\nb\rc\n"),
    (r'"a\u0000b"', "a\0b"),
    (r'"\ud83d\ude00"', "\U0001f600"),
    (r'"a\ud83db"', "a\ufffdb"),
    (r'"\ude00\ud83d"', "\ufffd\ufffd"),
    ('"1.10"', "1.10"),
    (json.dumps(envelope()), '{"event": "n", "data": "d"}'),
]  # fmt: skip

# The JSON of an envelope's event, and the name that arrives; None: it is dropped.
NAMES = [
    *((json.dumps(name), name) for name in (
        "message", " a b ", "a: b", "\u00e9\u2028\U0001f600", "relay", "Error", "opened",
    )),
    (r'"a\ud800"', "a\ufffd"),
    *((json.dumps(name), None) for name in (
        "error", "open", "relay.gap", "relay.", "a\ndata: x", "a\rid: x", "a\0",
    )),
    (r'"err\u006fr"', None),
]  # fmt: skip

# The JSON of an envelope's id, and the id that arrives; None: it is dropped.
IDS = [
    ('"a-7"', "a-7"), ('"a /: @b"', "a /: @b"), (f'"{"i" * 256}"', "i" * 256),
    *((digits, digits) for digits in ("42", "-7", "18446744073709551617", DIGITS[:200])),
    *((text, None) for text in (
        DIGITS, f'"{"i" * 257}"', '""', "1.0", "1e3", "true", "null", '{"a":1}', '["1"]', '"\u00e9"',
        r'"a\ndata: x"', r'"a\r"', r'"a\u0000b"', r'"a\tb"', r'"a\u007f"',
    )),
]  # fmt: skip

CASES = [
    *((text, Event(text)) for text in UNCHANGED),
    ("a\ud800b", Event("a\ufffdb")),
    ("\udc00", Event("\ufffd")),
    ("\udc00\ud800", Event("\ufffd\ufffd")),
    ("\ud83d\ude00", Event("\U0001f600")),
    ('{"data":"d","event":"n"}', Event("d", "n")),
    (' \t\r\n{ "event"\n:\r"n"\t, "data" : "d" } \n', Event("d", "n")),
    (r'{"\u0065vent":"n","d\u0061ta":"d"}', Event("d", "n")),
    (r'{"\u0065\u0076\u0065\u006e\u0074":"n","\u0064ata":1}', Event("1", "n")),
    ('{"data":1,"event":"n","data":"d"}', Event("d", "n")),
    ('{"event":1,"data":"d","event":"n"}', Event("d", "n")),
    (r'{"event":"m","data":"d","\u0065vent":"n"}', Event("d", "n")),
    ('{"event":"n","data":"d","retry":1,"comment":"c\\n\\ndata: x"}', Event("d", "n")),
    ('{"event":"n","data":"d","retry":{"a":[]},"comment":null}', Event("d", "n")),
    ('{"event":"","data":"d"}', Event("d")),
    *((f'{{"event":"n","data":{text}}}', Event(data, "n")) for text, data in DATA),
    *((f'{{"event":{text},"data":"d"}}', Event("d", name, None, () if name else ("event",)))
      for text, name in NAMES),
    *((f'{{"event":"n","data":"d","id":{text}}}', Event("d", "n", own_id, () if own_id else ("id",)))
      for text, own_id in IDS),
    ('{"id":1,"event":"n","data":"d","id":"x"}', Event("d", "n", "x")),
    (envelope(id="", event="open"), Event("d", dropped=("event", "id"))),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "event"), CASES, ids=lambda value: ascii(value)[:60])
def test_a_payload_becomes_its_event_and_any_decoder_reads_it_back(payload: str, event: Event) -> None:
    assert decode_notification(payload) == event
    block = encode_event(event, POSITION)
    for piece in (None, 1):
        read = read_block(block, piece)
        assert read.event == (event.name or "message")
        assert read.data == as_browser_reads(event.data)
        assert read.id == "e9-41" + (f"/{event.own_id}" if event.own_id else "")
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


# What a channel and an event can be called at all.
channel_names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
event_names = st.none() | any_text.map(lambda name: sse_relay.sendable_name(whole_text(name)))


ODD_NAMES = [
    "open", "error", "relay.gap", "relay.", "relay", "relay.gap:", "a:", "a:b", "a%", "a%3Ab", " a: \u2028",
]  # fmt: skip


@quick
@given(channel_names | st.sampled_from(ODD_NAMES), event_names | st.sampled_from(["message", "b:c", "open "]))
@example("a", "b:c")
@example("a:b", "c")
@example("open", None)
@example("a%3Ab", None)
def test_an_event_of_several_channels_tells_channel_and_name_apart_and_passes_for_none_of_the_relays(
    channel: str, name: str | None
) -> None:
    frame = make_frame(channel, name)
    assert read_block(frame.block).event == (name or "message")
    read = read_block(sse_relay.named_block(frame))
    assert (read.data, read.id) == ("d", "e9-41")
    shown, colon, rest = read.event.partition(":")
    assert shown.replace("%3A", ":").replace("%25", "%") == channel
    assert (rest or None) == name
    assert bool(colon) == (name is not None or sse_relay.is_reserved_name(channel))
    assert not sse_relay.is_reserved_name(read.event) or ":" in read.event


@quick
@given(channels=st.lists(any_text, min_size=1, unique=True), since=st.none() | any_text)
@example(channels=['"\n\u2028'], since="\udcff" * 100)
def test_a_gap_names_its_channels_and_the_clients_position(channels: list[str], since: str | None) -> None:
    block = sse_relay.encode_gaps(dict.fromkeys(channels, "evicted"), since, POSITION)
    assert block.isascii()
    read = read_block(block)
    assert (read.event, read.id) == ("relay.gap", "e9-41")
    # A pair of surrogates is one character to whoever reads JSON.
    expected = {"channels": channels, "reason": "evicted", "since": since}
    assert json.loads(read.data) == json.loads(json.dumps(expected))


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


def test_a_position_alone_and_a_wait_alone_fire_no_event() -> None:
    # httpx-sse shows such blocks; a browser fires events for blocks with data alone.
    for block, seen in (
        (sse_relay.encode_position(POSITION), ("message", "", "e9-41", None)),
        (sse_relay.encode_retry(2_500), ("message", "", "", 2_500)),
    ):
        read = read_block(block)
        assert (read.event, read.data, read.id, read.retry) == seen
        assert b"data" not in block


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


@pytest.mark.parametrize(
    ("base", "clients", "factor", "least", "most"),
    [
        (2_000, 0, 1, 2_000, 4_000),
        (2_000, 5, 1, 2_000, 4_010),
        (2_000, 10_000, 1, 2_000, 14_000),
        (2_000, 0, 8, 16_000, 32_000),
        (80_000_000, 100_000, 16, sse_relay.NEVER_MS, sse_relay.NEVER_MS),
    ],
)
def test_clients_come_back_spread_over_the_time_that_it_takes_to_serve_them(
    base: int, clients: int, factor: float, least: int, most: int
) -> None:
    waits = [sse_relay.retry_after(base, clients, factor) for _ in range(500)]
    assert least <= min(waits)
    assert max(waits) <= most
    # Evenly: of ten parts, none is empty and none holds a fifth.
    parts = Counter((wait - least) * 10 // (most - least + 1) for wait in waits) if least < most else {}
    assert len(parts) in (0, 10)
    assert max(parts.values(), default=0) < 100
