"""Plays a plan: relays, their PostgreSQL, clients, publishers and faults on one timeline."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import math
import os
import random
import resource
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import psycopg2

from simulation.clients import Client, write_data
from simulation.kernel import NEAR, Counted, Link, Machine, Socket, Thread, Timeline, Timer
from simulation.log import Log
from simulation.plan import BUSY, Plan, Step
from simulation.postgres import Server, look_at, stat_file

KEY = b"a secret of thirty-two bytes, no less"
DSN = "postgresql://app:secret@db.example:5432/app"
# When the world begins, in seconds since 1970.
BEGINNING = 1_800_000_000.0
FIRST_PORT = 8001
# Seconds: faults last at most so long; then everybody must become live, and get the last events.
LONGEST_FAULT = 12.5
SETTLING = 12.0
ARRIVING = 10.0
# A canary may be under way when the tasks are counted; each part of the relay has a timer.
SPARE_TASKS = 3
SPARE_TIMERS = 20
# For everything to be gone after the last client has left.
LEAVING = 8.0


class _Unexpected(logging.Handler):
    """Notes what a program logs: errors that nobody expected, and for the story its warnings."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__(logging.WARNING)
        self._timeline = timeline

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += f": {record.exc_info[1]!r}"
        on = Machine.current.name if Machine.current else "?"
        own = record.exc_info or "should not happen" in text or record.name != "sse_relay"
        self._timeline.note("error" if own and record.levelno >= logging.ERROR else "log", on=on, text=text)


@contextlib.contextmanager
def surroundings(module: ModuleType, world: World) -> Iterator[None]:
    """Put the world in the place of what surrounds the program."""
    timeline = world.timeline
    draws = timeline.chance("secrets")

    def wall() -> float:
        ahead = Machine.current.ahead if Machine.current is not None else 0.0
        return BEGINNING + timeline.now + ahead

    class Numbered(module.Subscriber):  # type: ignore[name-defined,misc]  # an order for sets of them
        __slots__ = ("_order",)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._order = next(Counted.counter)
            super().__init__(*arguments, **options)

        def __hash__(self) -> int:
            return int(self._order)

        def __eq__(self, other: object) -> bool:
            return self is other

    Counted.counter = itertools.count()
    random.seed(timeline.seed)
    handler = _Unexpected(timeline)
    loggers = [logging.getLogger(name) for name in ("sse_relay", "asyncio", "aiohttp")]
    threads = SimpleNamespace(Thread=Thread, Timer=Timer)
    places: list[tuple[Any, str, Any]] = [
        (psycopg2, "connect", world.server.connect),
        (time, "time", wall),
        (select, "select", look_at),
        (os, "dup", lambda fd: fd),
        (os, "fstat", stat_file),
        (socket, "socket", Socket),
        (signal, "signal", lambda *arguments: None),
        (secrets, "token_hex", lambda count=32: draws.randbytes(count).hex()),
        (secrets, "token_urlsafe", lambda count=32: draws.randbytes(count).hex()),
        (secrets, "token_bytes", draws.randbytes),
        (gc, "freeze", lambda: None),
        (gc, "set_threshold", lambda *arguments: None),
        (resource, "getrlimit", lambda kind: (1_000_000, 1_000_000)),
        (resource, "setrlimit", lambda kind, limits: None),
        (module, "threading", threads),
        (module, "load_key", lambda file: module.Key("HS256", KEY)),
        (module, "Subscriber", Numbered),
        *((module, name, value) for name, value in world.plan["knobs"].items() if hasattr(module, name)),
    ]
    levels = [(logger, logger.level, logger.propagate) for logger in loggers]
    with contextlib.ExitStack() as stack:
        for place, name, value in places:
            stack.enter_context(mock.patch.object(place, name, value))
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level, propagate in levels:
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate


class Process:
    """A relay that is started, killed and started again at one address."""

    def __init__(self, world: World, name: str, port: int) -> None:
        self.world = world
        self.name = name
        self.port = port
        self.ready = False
        self.tasks = 0
        self.machine: Machine | None = None
        self._task: asyncio.Task[None] | None = None
        self._generation = itertools.count(1)

    def start(self) -> None:
        world = self.world
        self.ready = False
        machine = self.machine = Machine(world.timeline, f"{self.name}.{next(self._generation)}")
        world.machines.append(machine)
        machine.blocking = lambda: world.visit_time(machine)
        machine.loop.set_exception_handler(lambda loop, context: world.note_exception(machine, context))
        settings = world.module.Settings(
            dsn=DSN,
            source=world.plan["source"],
            bind=(f"127.0.0.1:{self.port}",),
            jwt_key_file=("key",) * world.plan.get("tokens", False),
            **world.plan["settings"],
        )
        world.timeline.note("relay", relay=self.name, state="started")
        with machine.running():
            relay = world.module.Relay(settings)
            self._task = machine.loop.create_task(relay.run(self._on_ready))
            self._task.add_done_callback(lambda task: self._on_end(machine, task))
        machine.wake()

    def _on_ready(self) -> None:
        self.ready = True
        self.world.timeline.note("relay", relay=self.name, state="ready")
        assert self.machine is not None
        self.tasks = len(asyncio.all_tasks(self.machine.loop))

    def _on_end(self, machine: Machine, task: asyncio.Task[None]) -> None:
        if not machine.alive:
            return
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.timeline.note("error", on=self.name, text=f"ended by {error!r}")
        self.world.timeline.note("relay", relay=self.name, state="ended")
        machine.kill()

    def take(self, link: Link) -> bool:
        """Bring a client's connection to the listening socket, if there is one."""
        machine = self.machine
        sock = machine.ports.get(self.port) if machine is not None and machine.alive else None
        if sock is None:
            return False
        sock.waiting.append(link)
        self.world.timeline.after(NEAR, sock.poke)
        return True

    def kill(self) -> None:
        if self.machine is not None and self.machine.alive:
            self.machine.kill()
            self.world.timeline.note("relay", relay=self.name, state="killed")

    def ensure(self) -> None:
        """Start it if it does not run, and let it run if it is stopped."""
        if self.machine is None or not self.machine.alive:
            self.start()
        elif self.machine.stopped:
            self.machine.go_on()


class World:
    """One run.

    Attributes:
        timeline: Where its history is.
    """

    def __init__(self, module: ModuleType, plan: Plan) -> None:
        self.module = module
        self.plan = plan
        self.timeline = Timeline(f"{plan['seed']}")
        self.chance = self.timeline.chance("world")
        self.server = Server(self.timeline, module)
        self.server.wall = lambda: BEGINNING + self.timeline.now
        if plan["source"] == "log":
            self.server.log = Log(self.server, plan["retention"], plan["batch"])
        self.server.delay = lambda: self.server.chance.uniform(NEAR, plan["delay"])
        self.machines: list[Machine] = []
        self.processes = {
            name: Process(self, name, FIRST_PORT + number) for number, name in enumerate(plan["relays"])
        }
        self.clients: list[Client] = []

    def play(self) -> list[dict[str, Any]]:
        """Run the plan, and return the history."""
        timeline = self.timeline
        with surroundings(self.module, self):
            timeline.note("run", **{key: value for key, value in self.plan.items() if key != "steps"})
            for process in self.processes.values():
                process.start()
            for step in self.plan["steps"]:
                timeline.at(step["at"], getattr(self, f"_do_{step['do']}"), step)
            timeline.run(BUSY + 1.0)
            self._calm_down()
            self._take_leave()
            for machine in self.machines:
                machine.bury()
        return timeline.history

    def note_exception(self, machine: Machine, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, psycopg2.extensions.QueryCanceledError):
            return  # aiopg reports each
        if machine.alive:
            self.timeline.note("error", on=machine.name, text=f"{context.get('message')}: {error!r}")

    def visit_time(self, machine: Machine) -> float:
        """Return how long a blocking visit of the server takes."""
        frozen = self.server.frozen_until > self.timeline.now
        return 5.0 if frozen else 4 * self.server.delay() + self.chance.uniform(0.001, 0.01)

    # Steps of the plan.

    def _do_client(self, step: Step) -> None:
        client = Client(
            self.timeline,
            step["name"],
            step,
            self.plan["relays"],
            lambda door, link: self.processes[door].take(link),
            self._load_page if step["born"] and self.server.log is not None else None,
            self._sign if self.plan.get("tokens") else None,
        )
        self.clients.append(client)
        client.open()

    def _load_page(self) -> tuple[str, int]:
        """Return position() as a page has it, and how many commits the page shows."""
        assert self.server.log is not None
        return self.server.log.position(), len(self.server.commits)

    def _sign(self, client: str, channels: list[str], lasts: float) -> tuple[str, float]:
        """Return a client's token, and when it ends."""
        now = BEGINNING + self.timeline.now
        ends = int(now + lasts)
        token = self.module.sign_token(self.module.Key("HS256", KEY), channels, ends, now, client)
        return token, ends - BEGINNING

    def _do_revoke(self, step: Step) -> None:
        if self.server.log is not None and self.server.up:
            transaction = self.server.begin()
            self.server.log.revoke(transaction, step["client"])
            transaction.commit()

    def _do_transact(self, step: Step) -> None:
        if not self.server.up:
            return
        chance = self.timeline.chance(f"transaction {step['seed']}")
        transaction = self.server.begin(durable=step["durable"])
        left = step["events"]
        count = itertools.count()
        undo: Callable[[], None] | None = None

        def publish() -> None:
            nonlocal left, undo
            if transaction.over:
                return
            if step["savepoints"]:
                if undo is not None and chance.random() < 0.4:
                    undo()
                    undo = None
                elif chance.random() < 0.5:
                    undo = transaction.savepoint()
            while left:
                left -= 1
                size = step["size"] and chance.randrange(step["size"])
                tag = f"{step['name']}.{next(count)}"
                data = write_data(tag, size, lines=chance.random() < 0.1)
                name = chance.choice((None, None, "changed", "weird name: é"))
                self._publish(transaction, tag, chance.choice(step["channels"]), data, name)
                if step["pace"]:
                    self.timeline.after(step["pace"] * chance.random(), publish)
                    return
            if step["ends"] == "commit":
                transaction.commit()
            else:
                transaction.rollback()

        publish()

    def _publish(self, transaction: Any, tag: str, channel: str, data: str, name: str | None) -> None:
        if self.server.log is None and name is not None:
            payload = self.module.json.dumps({"event": name, "data": data}, ensure_ascii=False)
            transaction.publish(tag, channel, data, name, payload)
        else:
            transaction.publish(tag, channel, data, name)

    def _do_session(self, step: Step) -> None:
        machine = self.processes[step["relay"]].machine
        sessions = self.server.sessions_of(machine) if machine is not None else []
        if not sessions:
            return
        chance = self.timeline.chance(f"session {step['seed']}")
        session = chance.choice(sessions)
        self.timeline.note("fault", on=step["relay"], kind=step["how"])
        if step["how"] == "lost now":
            session.lose()
        elif step["how"] in ("frozen", "dead"):
            session.frozen_until = self.timeline.now + step["for"] if step["how"] == "frozen" else math.inf
        else:
            session.armed = step["how"]

    def _do_server(self, step: Step) -> None:
        self.timeline.note("fault", on="server", kind=step["how"])
        if step["how"] == "freeze":
            self.server.frozen_until = self.timeline.now + step["for"]
            return
        if step["how"] == "stop":
            self.server.stop("terminating connection due to administrator command")
        else:
            self.server.stop("terminating connection because of crash of another server process", "57P02")
            if self.server.log is not None:
                log = self.server.log
                (log.crash if step["how"] == "crash" else log.fail_over)()
        self.timeline.after(step["for"], self.server.start)

    def _do_copy(self, step: Step) -> None:
        if self.server.log is not None and self.server.log.uncopied is None:
            self.server.log.copy()
            self.timeline.after(step["back"], self._put_back, step)

    def _put_back(self, step: Step) -> None:
        assert self.server.log is not None
        self.timeline.note("fault", on="server", kind="put back")
        self.server.stop("terminating connection due to administrator command")
        self.server.log.put_back()
        self.timeline.after(step["for"], self.server.start)

    def _do_relay(self, step: Step) -> None:
        process = self.processes[step["relay"]]
        machine = process.machine
        if machine is None or not machine.alive or machine.stopped:
            return
        self.timeline.note("fault", on=step["relay"], kind=step["how"])
        if step["how"] == "kill":
            process.kill()
        elif step["how"] == "terminate":
            machine.signal(signal.SIGTERM)
        else:
            machine.stop()
        self.timeline.after(step["for"], process.ensure)

    def _do_clock(self, step: Step) -> None:
        machine = self.processes[step["relay"]].machine
        if machine is not None:
            self.timeline.note("fault", on=step["relay"], kind="clock")
            machine.ahead += step["by"]

    def _do_wakeups(self, step: Step) -> None:
        self.timeline.note("fault", on="server", kind="wake-ups lost")
        self.server.losing = True
        self.timeline.after(step["for"], setattr, self.server, "losing", False)

    def _do_forge(self, step: Step) -> None:
        """Notify what a stranger may: guesses of transactions to come, and what is no number."""
        chance = self.timeline.chance(f"forgery {step['seed']}")
        guesses = [str(self.server.next_xid + chance.randrange(20)) for _ in range(20)]
        notes = [*guesses, "", "0", "007", "9" * 19, "9" * 30, "-1", "x" * 7_999, "\uff11\uff12"]
        self.server.notify(99, [(self.module.LOG_CHANNEL, payload) for payload in notes])

    def _do_damage(self, step: Step) -> None:
        """Make a row of the log unreadable, the newest or an older one."""
        if self.server.log is not None and self.server.log.events:
            self.timeline.note("fault", on="server", kind="damage")
            row = self.timeline.chance(f"damage {step['seed']}").choice(self.server.log.events[-20:])
            self.server.log.damaged.add(row.id)

    # The end.

    def _calm_down(self) -> None:
        """End the faults, let everybody become live, and send each a last event."""
        timeline = self.timeline
        self.server.start()
        self.server.frozen_until = 0.0
        for process in self.processes.values():
            process.ensure()
            timeline.after(3.0, process.ensure)
        for client in self.clients:
            client.settle()
        timeline.run(timeline.now + LONGEST_FAULT)
        timeline.run_until(
            lambda: (
                all(client.live for client in self.clients)
                and all(process.ready for process in self.processes.values())
            ),
            SETTLING,
        )
        timeline.note("calm")
        for client in self.clients:
            if not client.live:
                timeline.note("error", on=client.name, text="it is not live though the faults have ended")
        last = self.server.begin()
        for channel in self.plan["channels"]:
            self._publish(last, f"end.{channel}", channel, write_data(f"end.{channel}", 0), None)
        last.commit()
        timeline.run_until(
            lambda: all(
                client.tags.issuperset(f"end.{channel}" for channel in client.channels)
                for client in self.clients
            ),
            ARRIVING,
        )
        timeline.note("end", clients=[client.name for client in self.clients])

    def _take_leave(self) -> None:
        """Let everybody go, and look what is left; then end the relays."""
        timeline = self.timeline
        for client in self.clients:
            client.go()
        timeline.run(timeline.now + LEAVING + self.plan["settings"]["linger"])
        for process in self.processes.values():
            self._look_around(process)
            if process.machine is not None:
                process.machine.signal(signal.SIGTERM)
        timeline.run(timeline.now + 4.0)
        for process in self.processes.values():
            if process.machine is not None and process.machine.alive:
                timeline.note("left", on=process.name, what="it has not ended 4 s after SIGTERM")

    def _look_around(self, process: Process) -> None:
        machine = process.machine
        if machine is None or not machine.alive:
            self.timeline.note("left", on=process.name, what="it runs no more")
            return
        listening = [
            name
            for session in self.server.sessions_of(machine)
            for name in session.listening
            if not name.startswith("sse_relay")
        ]
        links = [file for file in machine.files.values() if isinstance(file, Socket) and file.link]
        tasks = len(asyncio.all_tasks(machine.loop)) - process.tasks
        timers = sum(not handle._cancelled for handle in machine.loop._scheduled)
        if listening or links or tasks > SPARE_TASKS or timers > SPARE_TIMERS:
            what = (
                f"LISTEN {sorted(listening)}, {len(links)} connections, {tasks} tasks more, {timers} timers"
            )
            self.timeline.note("left", on=process.name, what=what)
        self.timeline.note("visits", on=process.name, count=self.server.visits.get(machine.name, 0))
