"""The command line of the simulation."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from simulation import run
from simulation.planted import FAULTS

# Sets of strings iterate by their hashes, which differ from process to process without this.
HASH_SEED = "0"


def _play(job: tuple[int, str | None]) -> tuple[str, int, list[str], str, float]:
    began = time.process_time()
    outcome = run.play_seed(*job)
    return (
        outcome.plan["source"],
        outcome.deliveries,
        [*map(str, outcome.violations)],
        outcome.command,
        time.process_time() - began,
    )


def _count_up(first: int, count: int | None, end: float) -> Iterator[int]:
    seed = first
    while time.monotonic() < end and (count is None or seed < first + count):
        yield seed
        seed += 1


@click.command()
@click.option("--seeds", type=int, help="How many new seeds to play.")
@click.option("--seconds", type=float, help="How long to play new seeds.")
@click.option("--first", type=int, help="The first of them. Default: a random one, which is printed.")
@click.option("--seed", type=int, help="Play this seed alone.")
@click.option("--source", type=click.Choice(["notify", "log"]), help="Default: the seed decides.")
@click.option("--trace", is_flag=True, help="With --seed: print the history.")
@click.option("--shrink", is_flag=True, help="With --seed: take steps away while it fails in the same way.")
@click.option("--corpus", is_flag=True, help="Play the plans that once failed.")
@click.option("--planted", is_flag=True, help="Find each planted fault: by its seed, or from --first on.")
@click.option(
    "--soak", type=int, metavar="EVENTS", help="Publish so many events on a real PostgreSQL instead."
)
@click.option("--clients", default=8, show_default=True, help="Of --soak.")
@click.option("--compare", type=int, metavar="CALLS", help="Hold the model against a real PostgreSQL.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--keep-going", is_flag=True, help="Do not stop at the first failure.")
def command(
    seeds: int | None,
    seconds: float | None,
    first: int | None,
    seed: int | None,
    source: str | None,
    trace: bool,
    shrink: bool,
    corpus: bool,
    planted: bool,
    soak: int | None,
    clients: int,
    compare: int | None,
    jobs: int,
    keep_going: bool,
) -> None:
    """Run the whole relay in simulated time, against every fault that the world has.

    A failure prints the line that repeats it.
    """
    if seed is not None:
        sys.exit(play_one(seed, source, trace=trace, smaller=shrink))
    if compare is not None:
        hold_against_server(compare, random.randrange(1_000_000) if first is None else first)
        return
    if soak is not None:
        sys.exit(run_soak(soak, clients, random.randrange(1_000_000) if first is None else first))
    if planted:
        sys.exit(find_planted(seeds or 2_000, first, jobs))
    if corpus:
        sys.exit(play_corpus())
    first = random.randrange(1_000_000_000) if first is None else first
    click.echo(f"seeds from {first} on")
    end = time.monotonic() + (seconds or 1e9)
    todo = ((number, source) for number in _count_up(first, seeds if seeds or seconds else 100, end))
    sys.exit(play_many(todo, jobs, keep_going))


def play_one(seed: int, source: str | None, *, trace: bool, smaller: bool) -> int:
    """Play one seed; print what it showed. Return the exit status."""
    outcome = run.play_seed(seed, source)
    if smaller and outcome.violations:
        kind = outcome.violations[0].kind

        def fails(plan: dict[str, Any]) -> bool:
            return any(violation.kind == kind for violation in run.play(plan).violations)

        plan = run.shrink(outcome.plan, fails, lambda left: click.echo(f"{left} steps", err=True))
        outcome = run.play(plan)
        click.echo(json.dumps(plan, ensure_ascii=False, indent=1))
    if trace:
        for line in outcome.lines():
            click.echo(line)
    for violation in outcome.violations:
        click.echo(str(violation))
    click.echo(f"{outcome.deliveries} deliveries, {len(outcome.violations)} violations, {outcome.digest()}")
    return 1 if outcome.violations else 0


def hold_against_server(calls: int, seed: int) -> None:
    """Make random calls on the model and on a real server; print how many were compared."""
    import harness
    from simulation.compare import Comparison

    with harness.Server() as server:
        run.the_program().apply_schema(server.dsn)
        with Comparison(server.dsn, seed) as comparison:
            comparison.run(calls)
            click.echo(f"seed {seed}: model and server agree on {comparison.calls.total():,} calls")
            click.echo(dict(comparison.calls))


def run_soak(events: int, clients: int, seed: int) -> int:
    """Publish under stress on a real server; print the figures. Return the exit status."""
    from simulation.soak import Soak

    soak = Soak(events, clients, seed, lazy=0.3)
    checker = soak.run()
    for name, figure in soak.figures.items():
        click.echo(f"{name}: {figure:,}")
    click.echo(f"gaps: {dict(checker.gaps)}")
    for kind, count in Counter(violation.kind for violation in checker.violations).items():
        click.echo(f"{kind}: {count}")
    for violation in checker.violations[:10]:
        click.echo(str(violation))
    click.echo(f"seed {seed}: {len(checker.violations)} violations")
    return 1 if checker.violations else 0


def _find(job: tuple[int, int, int]) -> tuple[int, int | None, str]:
    number, first, count = job
    outcome = run.find(FAULTS[number], range(first, first + count))
    if outcome is None:
        return number, None, ""
    return number, 0 if "why" in outcome.plan else outcome.plan["seed"], str(outcome.violations[0])


def find_planted(count: int, first: int | None, jobs: int) -> int:
    """Look for each planted fault, from a seed on or from where it stands; print which seed shows it.

    Returns:
        The exit status.
    """
    found = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        todo = [
            (number, fault.seed if first is None else first, count if first or fault.seed else 0)
            for number, fault in enumerate(FAULTS)
        ]
        for number, seeds, text in pool.imap_unordered(_find, todo, 1):
            found += seeds is not None
            click.echo(f"{FAULTS[number].name}: {'NOT FOUND' if seeds is None else f'seed {seeds}: {text}'}")
    click.echo(f"{found} of {len(FAULTS)} planted faults found")
    return 0 if found == len(FAULTS) else 1


def play_corpus() -> int:
    """Play the plans that once failed. Return the exit status."""
    plans = run.read_corpus()
    failed = [(plan, outcome) for plan in plans if (outcome := run.play(plan)).violations]
    for plan, outcome in failed:
        click.echo(f"FAILED again: {plan['why']}\n    {outcome.violations[0]}")
    click.echo(f"{len(plans)} plans, {len(failed)} failed")
    return 1 if failed else 0


def play_many(todo: Iterator[tuple[int, str | None]], jobs: int, keep_going: bool) -> int:
    """Play seeds in several processes; print failures and the sum. Return the exit status."""
    began, used = time.monotonic(), 0.0
    runs = deliveries = failures = 0
    kinds: Counter[str] = Counter()
    pool = multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 else None
    # A pool takes all the work that there is at once, however long it is for.
    room, ended = threading.Semaphore(4 * jobs), threading.Event()

    def hand_out() -> Iterator[tuple[int, str | None]]:
        for job in todo:
            room.acquire()
            if ended.is_set():
                return
            yield job

    try:
        for source, count, violations, line, seconds in (
            pool.imap_unordered(_play, hand_out()) if pool is not None else map(_play, todo)
        ):
            room.release()
            runs += 1
            used += seconds
            kinds[source] += 1
            deliveries += count
            if violations:
                failures += 1
                click.echo(f"FAILED {line}")
                for text in violations[:5]:
                    click.echo(f"    {text}")
                if not keep_going:
                    break
    finally:
        ended.set()
        room.release(jobs)
        if pool is not None:
            pool.terminate()
    click.echo(
        f"{runs} seeds ({', '.join(f'{kinds[k]} {k}' for k in sorted(kinds))}), {deliveries:,} deliveries,"
        f" {failures} failed, {time.monotonic() - began:.0f} s,"
        f" {deliveries / max(used, 0.001):,.0f} a second of the processor"
    )
    return 1 if failures else 0


def main() -> None:
    """Run the command with hashes that are the same in every process."""
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606  # the same program again
    command()
