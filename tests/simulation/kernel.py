"""Virtual time, and machines whose event loops run in it: no thread, no socket, no waiting.

All that happens is an action on a `Timeline`. A `Machine` is one process: it has an event loop, a clock
and descriptors, and can be stopped, continued and killed. Its loop is asyncio's own, on a selector
that looks at `Socket` objects; callbacks keep the order that asyncio promises, and the seed decides
what no program may rely on: which of several descriptors is served first, and what happens meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import itertools
import random
import selectors
import socket
import threading
from asyncio import events, selector_events
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# The network's own, in seconds.
NEAR = 0.0001
FAR = 0.003
# Between two looks whether all is done.
LOOK = 0.02
# What a turn of a loop takes, and up to ten times that.
TURN = 0.00001
# Of the descriptors in this world: no true one is so high.
FIRST_DESCRIPTOR = 1_000_000


class Timeline:
    """What happens when: a queue of actions, and the history that they leave.

    Attributes:
        now: Seconds since the run began.
        history: What happened, as records that JSON can hold.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.now = 0.0
        self.history: list[dict[str, Any]] = []
        self._queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self._until = 0.0
        self.descriptors = itertools.count(FIRST_DESCRIPTOR)

    def chance(self, name: str) -> random.Random:
        """Return a generator of its own for each name, so that one part's draws change no other's."""
        return random.Random(f"{self.seed} {name}")

    def at(self, when: float, action: Callable[..., object], *arguments: Any) -> None:
        """Do something at a time, or now if that is past."""
        if when < self.now:
            when = self.now
        heapq.heappush(self._queue, (when, next(self._count), action, arguments))

    def after(self, delay: float, action: Callable[..., object], *arguments: Any) -> None:
        """Do something after so many seconds."""
        heapq.heappush(self._queue, (self.now + delay, next(self._count), action, arguments))

    def note(self, do: str, **facts: Any) -> dict[str, Any]:
        """Add a record to the history."""
        record = {"t": round(self.now, 6), "do": do, **facts}
        self.history.append(record)
        return record

    def run(self, until: float) -> None:
        """Let things happen up to a time."""
        queue, self._until = self._queue, until
        while queue and queue[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(queue)
            action(*arguments)
        self.now = until

    def skip(self, when: float) -> bool:
        """Let it be a later time if nothing happens before; return whether it is."""
        free = when <= self._until and (not self._queue or self._queue[0][0] > when)
        if free:
            self.now = when
        return free

    def run_until(self, done: Callable[[], bool], limit: float) -> None:
        """Let things happen until they are done, for at most so many seconds."""
        until = self.now + limit
        while self.now < until and not done():
            self.run(self.now + LOOK)


class Counted:
    """Hashes in order of creation, so that sets of these iterate alike in every run."""

    counter: Iterator[int] = itertools.count()


class _Future(asyncio.Future[Any]):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.order = next(Counted.counter)

    def __hash__(self) -> int:
        return self.order


class _Task(asyncio.Task[Any]):
    def __init__(self, coroutine: Any, **options: Any) -> None:
        self.order = next(Counted.counter)
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self.order


class Link:
    """A TCP connection between a client and a socket of a machine.

    Attributes:
        pieces: What is on its way to the client, or waits there: bytes, and when they were sent.
        size: Bytes of these; at most `room`, the buffers of both kernels.
        ended: The machine sends no more: "closed", or "reset" if the client finds an error.
        held: The most bytes that waited in the machine's own memory.
    """

    def __init__(self, timeline: Timeline, room: int, notify: Callable[[], object]) -> None:
        self.timeline = timeline
        self.room = room
        self.pieces: deque[tuple[bytes, float]] = deque()
        self.size = 0
        self.ended = ""
        self.held = 0
        self.notify = notify
        self.arrived = b""
        self.end = ""
        self.gone = False
        self.sock: Socket | None = None

    # The client's end.

    def send(self, data: bytes) -> None:
        self.timeline.after(NEAR, self._arrive, data, "")

    def leave(self, how: str) -> None:
        """Go: "closed" politely, or "reset", as happens when something was not read."""
        self.notify = lambda: None
        self.gone = True
        self.timeline.after(NEAR, self._arrive, b"", "reset" if self.pieces else how)

    def take(self, most: int) -> tuple[bytes, float] | None:
        """Read a piece of what has come."""
        if not self.pieces:
            return None
        data, when = self.pieces[0]
        if len(data) > most:
            self.pieces[0] = data[most:], when
            data = data[:most]
        else:
            self.pieces.popleft()
        full = self.size >= self.room
        self.size -= len(data)
        if full:
            self.poke()
        return data, when

    def _tell_end(self) -> None:
        self.notify()

    # The machine's end.

    def _arrive(self, data: bytes, end: str) -> None:
        self.arrived += data
        self.end = end if end == "reset" else self.end or end
        self.poke()

    def poke(self) -> None:
        if self.sock is not None:
            self.sock.poke()

    def finish(self, how: str) -> None:
        """End what the client receives."""
        if not self.ended:
            self.ended = how
            self.timeline.after(NEAR, self._tell_end)


class Socket:
    """Stands for `socket.socket` in the programs under test."""

    def __init__(
        self,
        family: int = socket.AF_INET,
        type: int = socket.SOCK_STREAM,  # noqa: A002  # as there
        proto: int = 0,
        fileno: Any = None,
    ) -> None:
        assert Machine.current is not None, "only a machine opens sockets"
        self.machine = Machine.current
        self.family = socket.AddressFamily(family)
        self.type = socket.SocketKind(type)
        self.proto = proto
        self.link: Link | None = None
        self.waiting: deque[Link] = deque()
        self.listening = False
        self._peer = self.machine.files.get(fileno) if fileno is not None else None
        self._name: tuple[str, int] = ("127.0.0.1", 0)
        self._fd = next(self.machine.timeline.descriptors)
        if self._peer is None:
            self.machine.files[self._fd] = self

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        pass

    def set_inheritable(self, flag: bool) -> None:
        pass

    def setsockopt(self, *option: object) -> None:
        pass

    def getsockopt(self, *option: object) -> int:
        return 0

    def gettimeout(self) -> float:
        return 0.0

    def getsockname(self) -> tuple[str, int]:
        return self._name

    def getpeername(self) -> tuple[str, int]:
        return ("10.0.0.1", 5432) if self._peer is not None else ("10.0.0.9", self._fd)

    def shutdown(self, how: int) -> None:
        pass

    def bind(self, address: tuple[str, int]) -> None:
        if address[1] in self.machine.ports:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        self._name = address

    def listen(self, backlog: int = 128) -> None:
        self.listening = True
        self.machine.ports[self._name[1]] = self

    def connect(self, address: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    def accept(self) -> tuple[Socket, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, "nobody waits")
        link = self.waiting.popleft()
        with self.machine.running():
            sock = Socket()
        sock.link = link
        sock._name = self._name
        link.sock = sock
        return sock, sock.getpeername()

    def recv(self, most: int) -> bytes:
        link = self._linked()
        if link.end == "reset":
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if not link.arrived and not link.end:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        data, link.arrived = link.arrived[:most], link.arrived[most:]
        return data

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def send(self, data: bytes | bytearray | memoryview) -> int:
        link = self._linked()
        if link.end == "reset" or (link.end and link.ended):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        if link.gone:
            self.machine.timeline.after(NEAR, link._arrive, b"", "reset")
            return len(data)
        room = link.room - link.size
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, "no room")
        piece = bytes(data[:room])
        link.pieces.append((piece, self.machine.timeline.now))
        link.size += len(piece)
        if len(link.pieces) == 1:
            link.notify()
        return len(piece)

    def sendmsg(self, buffers: Any) -> int:
        sent = 0
        for data in buffers:
            try:
                count = self.send(data)
            except BlockingIOError:
                if sent:
                    break
                raise
            sent += count
            if count < len(data):
                break
        return sent

    def close(self) -> None:
        if self.machine.files.get(self._fd) is not self:
            return
        del self.machine.files[self._fd]
        if self.listening:
            self.machine.ports.pop(self._name[1], None)
            for link in self.waiting:
                link.finish("reset")
        if self.link is not None:
            self.link.finish("reset" if self.link.arrived else "closed")
            self.link.sock = None

    def _linked(self) -> Link:
        if self.link is None:
            raise OSError(errno.ENOTCONN, "not connected")
        return self.link

    def poke(self) -> None:
        self.machine.poke(self._fd)

    def ready(self) -> int:
        if self.listening:
            return selectors.EVENT_READ if self.waiting else 0
        if self.link is None:
            return 0
        mask = selectors.EVENT_READ if self.link.arrived or self.link.end else 0
        if self.link.size < self.link.room or self.link.end == "reset":
            mask |= selectors.EVENT_WRITE
        return mask


class _Selector(selectors._BaseSelectorImpl):
    """Looks at descriptors of a machine, those alone that have changed or were ready when last seen."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._files = machine.files
        self._rng = machine.rng
        self.hot: set[int] = set()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self.hot.add(fileobj if isinstance(fileobj, int) else fileobj.fileno())
        return super().register(fileobj, events, data)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self.hot.add(fileobj if isinstance(fileobj, int) else fileobj.fileno())
        return super().modify(fileobj, events, data)

    def look(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return who is ready for what, in order."""
        if not self.hot:
            return []
        ready = []
        keys: Mapping[int, selectors.SelectorKey] = self._fd_to_key  # type: ignore[attr-defined]
        for fd in sorted(self.hot):
            key, found = keys.get(fd), self._files.get(fd)
            mask = found.ready() & key.events if key is not None and found is not None else 0
            if key is not None and mask:
                ready.append((key, mask))
            else:
                self.hot.discard(fd)
        return ready

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self.look()
        if len(ready) > 1:
            self._rng.shuffle(ready)
        return ready


class _Transport(selector_events._SelectorSocketTransport):  # type: ignore[name-defined,misc]
    """asyncio's own; notes how much waits for a client."""

    def write(self, data: Any) -> None:
        super().write(data)
        link = self._sock.link if self._sock is not None else None
        if link is not None and (held := self.get_write_buffer_size()) > link.held:
            link.held = held


_BaseLoop: Any = selector_events.BaseSelectorEventLoop


class Loop(_BaseLoop):  # type: ignore[misc]  # most of it is private
    """The event loop of a machine. The timeline runs it, turn by turn."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.handlers: dict[int, Callable[[], object]] = {}
        super().__init__(_Selector(machine))
        self._clock_resolution = 1e-9
        self._thread_id: int | None = threading.get_ident()
        self.set_debug(False)
        self.set_task_factory(lambda loop, coroutine, **options: _Task(coroutine, loop=loop, **options))

    def _make_self_pipe(self) -> None:
        self._ssock = self._csock = None

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        self.machine.wake()

    def _make_socket_transport(
        self, sock: Any, protocol: Any, waiter: Any = None, *, extra: Any = None, server: Any = None
    ) -> Any:
        return _Transport(self, sock, protocol, waiter, extra, server)

    def time(self) -> float:
        return self.machine.timeline.now

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        self.handlers[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        return self.handlers.pop(sig, None) is not None

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()

        def work() -> None:
            try:
                future.set_result(func(*args))
            except BaseException as error:
                future.set_exception(error)

        self.machine.in_thread(work)
        return future


class Machine:
    """One process.

    Attributes:
        ahead: How far its clock is ahead of the world's, in seconds.
        blocking: Returns how long a thread's blocking work takes.
    """

    current: Machine | None = None

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline = timeline
        self.name = name
        self.rng = timeline.chance(f"machine {name}")
        self.files: dict[int, Any] = {}
        self.ports: dict[int, Socket] = {}
        self.ahead = 0.0
        self.alive = True
        self.stopped = False
        self.blocking: Callable[[], float] = lambda: FAR
        # When the next turn is, and others that are on the timeline.
        self._woken = float("inf")
        self._turns: set[float] = set()
        self.loop = Loop(self)

    def running(self) -> _Running:
        return _Running(self)

    def poke(self, fd: int) -> None:
        """Have the loop look at a descriptor."""
        self.loop._selector.hot.add(fd)
        if self._woken > self.timeline.now and self.loop._selector.look():
            self.wake()

    def wake(self, when: float | None = None) -> None:
        """Have the loop make a turn at a time, or now."""
        now = self.timeline.now
        if when is None or when < now:
            when = now
        if when < self._woken:
            self._woken = when
            if when not in self._turns:
                self._turns.add(when)
                self.timeline.at(when, self._turn, when)

    def _turn(self, when: float) -> None:
        self._turns.remove(when)
        if when != self._woken or self.stopped or not self.alive:
            return  # an earlier turn has taken its place
        self._woken = float("inf")
        loop = self.loop
        Machine.current = self
        events._set_running_loop(loop)
        again = 0.0
        try:
            loop._run_once()
            while loop._ready or loop._selector.look():
                again = self.timeline.now + TURN + TURN * 9 * self.rng.random()
                if self.stopped or not self.alive or not self.timeline.skip(again):
                    break
                again = 0.0
                loop._run_once()
        finally:
            events._set_running_loop(None)
            Machine.current = None
        if again:
            self.wake(again)
        elif loop._scheduled:
            self.wake(loop._scheduled[0]._when)

    def in_thread(self, work: Callable[[], object]) -> None:
        """Do blocking work, which takes its time all at once."""

        def begin() -> None:
            if self.alive:
                with self.running():
                    work()
                self.wake()

        self.timeline.after(self.blocking(), begin)

    def signal(self, number: int) -> None:
        if self.alive and number in self.loop.handlers:
            self.loop.call_soon(self.loop.handlers[number])
            self.wake()

    def stop(self) -> None:
        """As SIGSTOP does."""
        self.stopped = True

    def go_on(self) -> None:
        """As SIGCONT does."""
        self.stopped = False
        self._woken = float("inf")
        self.wake()

    def kill(self) -> None:
        """As SIGKILL does: no more turns, and the kernel closes what was open."""
        self.alive = False
        for file in list(self.files.values()):
            file.close()

    def bury(self) -> None:
        """Take the loop apart, so that nothing of it is heard of again."""
        self.alive = False
        loop = self.loop
        loop.set_exception_handler(lambda loop, context: None)
        with self.running():
            events._set_running_loop(loop)
            try:
                for _ in range(50):
                    tasks = asyncio.all_tasks(loop)
                    if not tasks and not loop._ready:
                        break
                    for task in sorted(tasks, key=hash):
                        task.cancel()
                    loop._run_once()
                for transport in list(loop._transports.values()):
                    if transport._loop is not None:
                        transport.abort()
                loop._run_once()
                for task in asyncio.all_tasks(loop):
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
            finally:
                events._set_running_loop(None)
        loop._thread_id = None
        loop.close()


class _Running:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __enter__(self) -> None:
        self._before = Machine.current
        Machine.current = self._machine

    def __exit__(self, *error: object) -> None:
        Machine.current = self._before


class Thread:
    """Stands for `threading.Thread` in the programs under test."""

    def __init__(self, target: Callable[[], object], daemon: bool = False, **options: Any) -> None:
        self._target = target

    def start(self) -> None:
        assert Machine.current is not None
        Machine.current.in_thread(self._target)


class Timer:
    """Stands for `threading.Timer`: blocking work ends before any of them."""

    def __init__(self, *arguments: Any) -> None:
        self.daemon = False

    def start(self) -> None:
        pass

    def cancel(self) -> None:
        pass
