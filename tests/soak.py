"""Hold idle clients for an hour and report whether the relay grows: in memory, descriptors, threads or tasks.

Usage: python tests/soak.py [--minutes 60] [--clients 1000] [--source log]

Heartbeats, canaries and sweeps go on meanwhile, as they do in use. Exit status 1 if it grew.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
from sse_relay import apply_schema, raise_file_limit

# The first ten warm it up: allocators keep some of what was once used.
SAMPLES = 40
WARM_UP = 10
MEMORY_MARGIN = 512  # KiB

# Runs the relay, and counts the tasks of its loop when it is asked to.
COUNTING = """
import asyncio, gc, runpy, signal, sys

def count(number, frame):
    # The relay collects rarely; what only waits for that is no leak.
    gc.collect()
    print("tasks:", len(asyncio.all_tasks(asyncio.get_running_loop())), file=sys.stderr, flush=True)

sys.argv = sys.argv[2:]
signal.signal(signal.SIGUSR1, count)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Sample(NamedTuple):
    """What the relay holds at one moment. Memory is resident, in KiB."""

    memory: float
    descriptors: float
    threads: float
    tasks: float


def take(relay: harness.Relay) -> Sample:
    status = Path(f"/proc/{relay.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    seen = len(relay.lines)
    relay.process.send_signal(signal.SIGUSR1)
    tasks = relay.wait_for_log("tasks:", after=seen).rpartition(" ")[2]
    descriptors = len(os.listdir(f"/proc/{relay.pid}/fd"))  # noqa: PTH208  # their number alone
    return Sample(int(fields["VmRSS"].split()[0]), descriptors, int(fields["Threads"]), int(tasks))


def medians(samples: list[Sample]) -> Sample:
    return Sample(*(statistics.median(values) for values in zip(*samples, strict=True)))


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="How long to hold them.")
@click.option("--clients", default=1000, show_default=True, help="How many.")
@click.option("--source", type=click.Choice(["notify", "log"]), default="log", show_default=True)
def soak(minutes: float, clients: int, source: str) -> None:
    """Report whether an idle relay grows."""
    raise_file_limit()
    with harness.Server() as server:
        apply_schema(server.dsn)
        python = (sys.executable, "-c", COUNTING)
        with harness.Relay("--source", source, dsn=server.dsn, prefix=python) as relay:
            urls = [relay.url(f"channel-{number % 20}") for number in range(clients)]
            with harness.Crowd(relay.bind, urls) as crowd:
                crowd.wait_for(b"id: ", 60)
                samples: list[Sample] = []
                for _ in range(SAMPLES):
                    time.sleep(minutes * 60 / SAMPLES)
                    samples.append(take(relay))
                    click.echo(" ".join(f"{name} {value}" for name, value in samples[-1]._asdict().items()))
                assert not crowd.ended, f"{len(crowd.ended)} clients were cut"
    third = (SAMPLES - WARM_UP) // 3
    early, late = medians(samples[WARM_UP : WARM_UP + third]), medians(samples[-third:])
    click.echo(f"early: {early}\nlate:  {late}")
    grew = late.memory > early.memory + MEMORY_MARGIN or any(
        later > earlier for earlier, later in zip(early[1:], late[1:], strict=True)
    )
    click.echo("it grew" if grew else "it did not grow")
    sys.exit(int(grew))


if __name__ == "__main__":
    soak()
