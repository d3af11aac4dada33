"""Measure the relay beside its peers, in one run on one machine, and print the tables.

    python tests/benchmark --full

It needs Linux, a C compiler, and for the peers nginx with nchan and the package index: the packages of the
naive relay and of sse-relay-server go into a virtual environment in the cache. A quiet machine of two cores
or more gives figures that mean something.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import report
from benchmark.measure import LOAD_CORE, BenchmarkError
from benchmark.servers import RELAY, Bench
from benchmark.works import WORKS, Work
from sse_relay import raise_file_limit


def say(text: str) -> None:
    """Report progress on standard error; only the tables go to standard output."""
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def run(bench: Bench, name: str, work: Work, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run the rounds of a work. Each takes the variants in turn and begins with another one."""
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in work.variants}
    for turn in range(rounds):
        for place in range(len(work.variants)):
            variant = work.variants[(turn + place) % len(work.variants)]
            try:
                figures = work.measure(bench, variant)
            except BenchmarkError as error:
                if variant == RELAY:
                    raise
                # A peer that is missing or fails is noted, and the others go on.
                bench.note(f"{name}, {variant}: {error}")
                continue
            samples[variant].append(figures)
            shown = ", ".join(f"{figure} {report.number(value)}" for figure, value in figures.items())
            say(f"{name} {turn + 1}/{rounds}, {variant}: {shown}")
    return samples


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--full", is_flag=True, help="All works, several rounds: some ten minutes; else the bars alone."
)
@click.option("--tiny", is_flag=True, help="A few clients and moments: shows that it runs, no more.")
@click.option("--only", "names", multiple=True, type=click.Choice(list(WORKS)), help="This work. Repeatable.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
    help="Write every round's figures here.",
)  # fmt: skip
def main(full: bool, tiny: bool, names: tuple[str, ...], json_file: Path | None) -> None:
    raise_file_limit()
    # Whatever we started ends with us, and temporary files go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.sched_setaffinity(0, {LOAD_CORE})
    started = time.monotonic()
    load = os.getloadavg()[0]
    samples: report.Samples = {}
    with Bench(full=full, tiny=tiny) as bench:
        for name in names or WORKS:
            rounds = WORKS[name].full if full or names else WORKS[name].quick
            if rounds:
                samples[name] = run(bench, name, WORKS[name], 1 if tiny else rounds)
        about = report.machine(bench, samples)
        if load > 0.5:
            bench.note(f"the machine was not quiet: its load was {load:.1f} at the start")
        minutes = (time.monotonic() - started) / 60
        click.echo(
            f"`python tests/benchmark{' --full' * full}` on {time.strftime('%d %B %Y')},"
            f" {minutes:.1f} minutes, medians. {about}\n"
        )
        click.echo(report.table_of_bars(samples))
        for name, found in samples.items():
            if RELAY not in found:
                click.echo(f"\n{report.table_of_variants(name, found)}")
        for note in bench.notes:
            click.echo(f"\n- {note}")
        if json_file:
            json_file.write_text(
                json.dumps({"about": about, "notes": bench.notes, "samples": samples}, indent=1)
            )


if __name__ == "__main__":
    main()
