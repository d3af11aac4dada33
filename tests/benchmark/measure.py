"""The load, the publishers' pace, and the instruments: CPU, memory, medians."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness

HERE = Path(__file__).resolve().parent
PAYLOAD_BYTES = 100
# The server has a core of its own. Everything else runs on the other: PostgreSQL, publisher, clients.
SERVER_CORE = min(os.sched_getaffinity(0))
LOAD_CORE = max(os.sched_getaffinity(0))
ALL_CORES = os.sched_getaffinity(0)
ON_SERVER_CORE = ("taskset", "-c", str(SERVER_CORE))


class BenchmarkError(Exception):
    """A figure is worthless; the message says why."""


def compile_c(name: str, folder: Path) -> Path:
    program = folder / name
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchmarkError("needs a C compiler, for the load client")
    subprocess.run([compiler, "-O2", "-std=gnu11", "-o", program, HERE / f"{name}.c"], check=True)
    return program


# ==== Instruments =============================================================


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, including the kernel's on its behalf."""
    total = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it, or a thread, has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_bytes(pids: Iterable[int]) -> int:
    """Return the sum of the proportional set sizes of some processes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def socket_bytes(port: int) -> list[int]:
    """Return how much the kernel still has to send on each connection of a local port, largest first."""
    output = subprocess.run(
        ["ss", "--tcp", "--memory", "--numeric", "--no-header", "state", "established", f"sport = :{port}"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    # skmem:(r0,rb131072,t0,tb87040,f0,w0,o0,bl0,d0): w is queued, f is kept in reserve for it.
    found = []
    for part in output.split("skmem:(")[1:]:
        fields = part.split(")")[0].split(",")
        found += [sum(int(field[1:]) for field in fields if field[0] in "fw")]
    return sorted(found, reverse=True)


def children(pid: int) -> list[int]:
    # /proc/PID/task/PID/children is said to miss some.
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # After the name, which may hold anything: state, parent.
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                found.append(int(stat.parent.name))
    return found


class Meter:
    """CPU seconds of some processes since this was made, without those that have ended."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._before = {pid: cpu_seconds(pid) for pid in pids()}

    def read(self) -> float:
        return sum(cpu_seconds(pid) - self._before.get(pid, 0.0) for pid in self._pids())


# ==== Load ====================================================================


class Report(NamedTuple):
    """What sseload has counted since its last reset; `sseload.c` explains the fields."""

    events: int
    least: int
    most: int
    disconnected: int
    stalled_disconnected: int
    failed: int
    refused: int
    controls: int
    comments: int
    bytes: int
    reads: int
    unstamped: int
    span_s: float
    elapsed_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float


class Load(harness.Closing):
    """A process of many clients (`sseload.c`), open when this returns.

    Args:
        program: As from `compile_c`.
        port: The server's, on 127.0.0.1.
        clients: How many streams.
        options: Further options of sseload.
        nice: Gives way to other load on its core.
        wait: Return only when the streams are open.

    Raises:
        BenchmarkError: If some could not be opened.
    """

    def __init__(
        self, program: Path, port: int, clients: int, *options: str, nice: int = 0, wait: bool = True
    ) -> None:
        self.clients = clients
        arguments = ["--port", str(port), "--clients", str(clients), *options]
        self._process = subprocess.Popen(
            ["nice", "-n", str(nice), program, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.connect: dict[str, Any] = {}
        if wait:
            try:
                self.wait()
            except BaseException:
                self.close()
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> None:
        self.connect = self._read(70)
        if self.connect["ready"] < self.clients or self.connect["refused"]:
            raise BenchmarkError(f"of {self.clients} clients: {self.connect}")

    def reset(self) -> None:
        self._say("reset")
        self._read(30)

    def until(self, events: int, seconds: float) -> Report:
        """Wait until that many events have come since the reset, or for the timeout; return what has come."""
        self._say(f"until {events} {seconds}")
        return Report(**self._read(seconds + 30))

    def _say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise BenchmarkError(f"the load client {'ended' if ready else 'is silent'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


# ==== Publishing ==============================================================

Send = Callable[[Sequence[str]], None]
"""Publishes payloads, in one transaction where there are transactions."""


def payloads(many: int) -> Iterator[str]:
    """Make payloads that differ and carry the time at which they were made."""
    for number in range(many):
        yield f"t={time.monotonic_ns()} i={number} ".ljust(PAYLOAD_BYTES, "x")


def publish(send: Send, events: int, rate: float = 0.0, batch: int = 1) -> None:
    """Publish events, ``batch`` at a time, at a rate per second; 0 means as fast as possible."""
    started = time.monotonic()
    for done in range(0, events, batch):
        if rate and (early := started + done / rate - time.monotonic()) > 0:
            time.sleep(early)
        send(list(payloads(min(batch, events - done))))


class Delivered(NamedTuple):
    report: Report
    cpu: float
    load_share: float
    lost: int

    @property
    def microseconds(self) -> float:
        return self.cpu * 1e6 / self.report.events if self.report.events else float("nan")


def deliver(
    load: Load,
    pids: Callable[[], Iterable[int]],
    send: Send,
    events: int,
    rate: float = 0.0,
    batch: int = 1,
    timeout: float = 20.0,
    readers: int | None = None,
) -> Delivered:
    """Publish to the clients of a load and measure it from the first to the last delivery.

    ``readers`` are the clients that get the events, all by default. ``load_share`` is the part of a core
    that the load client used: near 1 it is measured, not the server.
    """
    readers = load.clients if readers is None else readers
    load.reset()
    meter, own = Meter(pids), Meter(lambda: [load.pid])
    started = time.monotonic()
    publish(send, events, rate, batch)
    report = load.until(events * readers, timeout)
    elapsed = time.monotonic() - started
    return Delivered(report, meter.read(), own.read() / elapsed, events * readers - report.events)
