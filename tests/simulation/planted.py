"""Faults planted in the program, to test the checker: each must be found.

Small patches of its text, each with a name: what this program or those before it have done wrong, and what
is easily done wrong. A patch whose text is no longer there fails: it must follow the program.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A patch: its name, the source that shows it, None for both, and what is replaced by what."""

    name: str
    source: str | None
    changes: tuple[tuple[str, str], ...]

    def plant(self, text: str) -> str:
        """Return the program's text with this fault.

        Raises:
            ValueError: The text to be replaced is not there.
        """
        for old, new in self.changes:
            if old not in text:
                raise ValueError(f"{self.name}: the program no longer has {old!r}")
            text = text.replace(old, new)
        return text


def _fault(name: str, source: str | None, *changes: tuple[str, str]) -> Fault:
    return Fault(name, source, changes)


FAULTS = (
    # Positions.
    _fault("positions are compared without their epoch", None, ("if position.epoch != self.epoch:", "if False:")),
    _fault(
        "a page of another history is taken for this one's", "log",
        ("if cursor.epoch != self.epoch:", "if False:"),
    ),
    _fault("a client's position is ignored", None, ("return Wish(last, position, last=target.last)", "return Wish()")),
    _fault(
        "the present position goes out during a burst", None,
        ("if self._bursts or not self._epoch:", "if not self._epoch:"),
        ("live = subscriber.live_from <= self._number", "live = True"),
    ),
    _fault(
        "the position of a gap goes out before what is replayed", None,
        ("encode_gaps(page.gaps, wish.since, None if events else position)",
         "encode_gaps(page.gaps, wish.since, format_position(self._source.epoch, self._source.number))"),
    ),
    # Joining.
    _fault("a stream joins before its past is out", None, ("live = complete and (small or not events)", "live = True")),
    _fault(
        "a stream becomes live one event too late", None,
        ("subscriber.live_from = self._source.number", "subscriber.live_from = self._source.number + 1"),
    ),
    _fault(
        "a stream becomes live one event too early", None,
        ("subscriber.live_from = self._source.number", "subscriber.live_from = self._source.number - 1"),
        ("if subscriber.live_from >= number or transport is None:", "if subscriber.live_from > number or not transport:"),
    ),
    _fault(
        "gaps come after the events", None,
        ("encode_gaps(page.gaps, wish.since, None if events else position) + events",
         "events + encode_gaps(page.gaps, wish.since, None if events else position)"),
    ),
    _fault(
        "a stream that fell behind goes on behind what it has not got", None,
        ("cursor = Cursor(epoch, number, counted=True)", "cursor = Cursor(epoch, number + 1, counted=True)"),
    ),
    _fault(
        "?last= skips what came after the gap", None,
        ("end = bisect.bisect_right(shelf.numbers, until, shelf.start)", "end = len(shelf.numbers)"),
    ),
    # Memory.
    _fault(
        "memory covers what it has dropped", None,
        ("self._floors[channel] = shelf.numbers[shelf.start]", "self._floors[channel] = shelf.numbers[shelf.start] - 1"),
    ),
    _fault(
        "memory repeats the last event", None,
        ("first = bisect.bisect_right(shelf.numbers, number, shelf.start)\n            before",
         "first = bisect.bisect_left(shelf.numbers, number, shelf.start)\n            before"),
    ),
    _fault("memory merges channels one after the other", None, ("found.sort()\n        size = 0", "size = 0")),
    _fault(
        "memory survives a lost connection", "notify",
        ("self._connected.clear()\n        self._memory.clear()", "self._connected.clear()"),
    ),
    _fault(
        "memory survives UNLISTEN", "notify",
        ("for channel in channels:\n            self._memory.end(channel)", "pass"),
    ),
    _fault(
        "memory covers a channel from before its LISTEN", "notify",
        ("self._memory.begin(channel, self.number)\n", "self._memory.begin(channel, 0)\n"),
    ),
    # The hub.
    _fault("who leaves stays in the hub", None, ("def connection_lost(self, exc: BaseException | None) -> None:\n        \"\"\"Leave the hub: the client is gone or was cut.\"\"\"\n        self.hub.leave(self)", "def connection_lost(self, exc: BaseException | None) -> None:\n        pass")),
    _fault("a stream of several channels names no channel", None, ("several=len(channels) > 1)", "several=False)")),
    _fault("names of channels are not escaped", None, (".replace(\"%\", \"%25\").replace(\":\", \"%3A\")", "")),
    _fault("a burst to several channels is not merged", None, ("merged = sorted(itertools.chain", "merged = list(itertools.chain")),
    _fault("a burst loses its last event", None, ("pieces.append(_join_piece(blocks[start:]))", "pieces.append(_join_piece(blocks[start:-1] or blocks[start:]))")),
    _fault("a slow client holds any number of bytes", None, ("if events and transport.get_write_buffer_size() > most:", "if False:")),
    _fault("a resume does not wait for the socket", None, ("while self.room is not None:", "while False:")),
    _fault("no retry is sent at the opening", None, ("+ encode_retry(retry)\n        page = None", "\n        page = None")),
    _fault("the task of a stream outlives it", None, ("subscriber.live_from = NOT_LIVE\n        if subscriber.task is not None:\n            subscriber.task.cancel()\n        if subscriber.expires", "if subscriber.expires")),
    # Listening.
    _fault("no gap is told after an outage", "notify", ("await self._hub.send_gaps(\"outage\", self.epoch, self.number)", "pass")),
    _fault("a lost connection takes no number", "notify", ("self.number += 1\n            self._lost_at = self.number", "self._lost_at = self.number")),
    _fault("nothing finds a frozen connection", None, ("await self._send_canary(first=False)", "pass")),
    _fault("a statement ends with the client that asked for it", "log", ("return await asyncio.shield(task)", "return await task")),
    _fault("only the first LISTENs are sent after a reconnect", "notify", ("while await self._listen():\n            pass\n        await self._send_canary(first=True)", "await self._listen()\n        await self._send_canary(first=True)")),
    _fault("a connection that is lost is not made anew", None, ("async def _watch(self, connection: aiopg.Connection) -> None:", "async def _watch(self, connection: aiopg.Connection) -> None:\n        await asyncio.Event().wait()\n\n    async def _watch_no_more(self, connection: aiopg.Connection) -> None:")),
    # The log.
    _fault("wake-ups are dropped", "log", ("self._woken[notification.payload, notification.pid] = None", "pass")),
    _fault("ids are given in the order of transaction ids", "log", ("await self._number_and_read([xid for xid, _ in woken], [pid for _, pid in woken], sweep=False)", "await self._number_and_read([xid for xid, _ in sorted(woken)], [pid for _, pid in sorted(woken)], sweep=False)")),
    _fault("the sender of a wake-up is not looked at", "log", ("([xid for xid, _ in woken], [pid for _, pid in woken], sweep=False)", "([xid for xid, _ in woken], [0 for _ in woken], sweep=False)")),
    _fault("nothing is swept up after a reconnect", "log", ("await self._attach()\n        await self._sweep()", "await self._attach()")),
    _fault("a new epoch is not noticed", "log", ("if epoch == self.epoch and pruned <= self.number:\n            return", "return")),
    _fault("what was pruned is skipped in silence", "log", ("if cursor.after(name) < read.pruned", "if False")),
    _fault("a page that is full is taken for the last", "log", ("number = read.frames[-1].number if read.full else max(until, cursor.number)", "number = max(until, cursor.number)")),
    _fault("what the page shows is sent again", "log", ("return [frame for frame in frames if not (frame.xid and snapshot.shows(frame.xid))]", "return frames")),
    _fault("a snapshot shows what was running", "log", ("return xid < self.xmin or (xid < self.xmax and xid not in self.running)", "return xid < self.xmax")),
    _fault("a page is not swept for", "log", ("if not wish.settled and (", "if False and (")),
    _fault("an event is read twice", "log", ("rows = await self.listener.query(LOG_READ_SQL, (self.number,))", "rows = await self.listener.query(LOG_READ_SQL, (max(0, self.number - 1),))")),
)  # fmt: skip
