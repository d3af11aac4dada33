"""The bars, and the tables in Markdown."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmark import servers, works
from benchmark.measure import LOAD_CORE, SERVER_CORE
from benchmark.servers import RELAY, RIVAL, Bench
from benchmark.works import CPU, CUT, DELIVERIES, LOST, P50, P99

Samples = dict[str, dict[str, list[works.Figures]]]
"""Of each work and variant: one of each round."""


class Bar(NamedTuple):
    """A figure that the relay has to reach: at most (or at least) a value, or a multiple of a peer's."""

    limit: float
    peer: str = ""
    at_least: bool = False

    def value(self, own: float, others: Mapping[str, float]) -> float:
        return own / others.get(self.peer, math.nan) if self.peer else own

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:,g}" + (f" × {self.peer}" if self.peer else "")


# By work and figure. None of them may lose an event or cut a client that reads.
BARS: dict[tuple[str, str], tuple[Bar, ...]] = {
    ("steady", CPU): (Bar(1.0, "nchan"), Bar(0.27, "naive"), Bar(1.7, "C limit")),
    ("steady", P50): (Bar(1.1, "nchan"),),
    ("steady", P99): (Bar(1.2, "nchan"),),
    ("many", CPU): (Bar(0.95, "nchan"), Bar(0.25, "naive")),
    ("many", P99): (Bar(0.9, "nchan"),),
    ("many", "KiB per idle connection"): (Bar(4), Bar(0.4, "nchan")),
    ("many", "connects/s"): (Bar(12_000, at_least=True),),
    ("burst", DELIVERIES): (Bar(20, "nchan", at_least=True), Bar(100, "naive", at_least=True)),
    ("torrent", P99): (Bar(25),),
    ("arrivals", "p99 ms of those there"): (Bar(2, "nchan"),),
    ("heartbeat", "% of a core"): (Bar(0.5),),
    ("stalled", "p99, 5 stalled / none"): (Bar(1.5),),
    ("stalled", "MB for each that is stalled"): (Bar(0.5),),
    ("transactions", "µs CPU per notification"): (Bar(2),),
    ("transactions", "notifications/s"): (Bar(150_000, at_least=True),),
    ("rival", "µs CPU per delivery, with PostgreSQL"): (Bar(0.25, RIVAL),),
    ("log", "µs CPU per event"): (Bar(15),),
    ("catch-up", "events/s"): (Bar(20_000, at_least=True),),
}
SERVERS = (RELAY, "C limit", "nchan", "naive", RIVAL)
NONE = (Bar(0),)


def median(rounds: Iterable[works.Figures], figure: str) -> float:
    """Return the median of a figure over the rounds; NaN where it was not measured."""
    values = [found[figure] for found in rounds if figure in found]
    return statistics.median(values) if values else math.nan


def medians(samples: Mapping[str, list[works.Figures]], figure: str) -> dict[str, float]:
    return {variant: median(rounds, figure) for variant, rounds in samples.items()}


def figures_of(samples: Mapping[str, list[works.Figures]]) -> list[str]:
    return list(dict.fromkeys(name for rounds in samples.values() for found in rounds for name in found))


def number(value: float) -> str:
    if math.isnan(value):
        return ""
    digits = 0 if value == 0 or abs(value) >= 100 else 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(digits, 4)}f}"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_of_bars(samples: Samples) -> str:
    """Return the relay beside its peers: medians, ratios, and whether each bar is reached."""
    rows = [line(["work", "figure", *SERVERS, "bar", "is", "reached"]), line(["---"] * (len(SERVERS) + 5))]
    for name, found in samples.items():
        if RELAY not in found:
            continue
        title = works.WORKS[name].title
        for figure in figures_of(found):
            values = medians(found, figure)
            bars = BARS.get((name, figure), ())
            if figure in (LOST, CUT):
                # Of the worst round, not of a median one.
                values = {
                    variant: max(each[figure] for each in rounds)
                    for variant, rounds in found.items()
                    if rounds
                }
                if not any(values.values()):
                    continue
                bars = NONE
            own = values.get(RELAY, math.nan)
            ratios = [bar.value(own, values) for bar in bars]
            rows.append(
                line([
                    title, figure, *(number(values.get(server, math.nan)) for server in SERVERS),
                    "; ".join(map(str, bars)), "; ".join(map(number, ratios)),
                    "; ".join(verdict(bar, ratio) for bar, ratio in zip(bars, ratios, strict=True)),
                ])
            )  # fmt: skip
            title = ""
    rows += ["", "Where no row says otherwise, no event was lost and no client was cut that reads."]
    return "\n".join(rows)


def verdict(bar: Bar, value: float) -> str:
    return "not measured" if math.isnan(value) else "yes" if bar.reached(value) else "**no**"


def table_of_variants(name: str, found: Mapping[str, list[works.Figures]]) -> str:
    """Return a work that compares no servers: a column for each variant."""
    rows = [line([works.WORKS[name].title, *found]), line(["---"] * (len(found) + 1))]
    rows += [line([figure, *map(number, medians(found, figure).values())]) for figure in figures_of(found)]
    return "\n".join(rows)


def packages(python: Path, *names: str) -> str:
    program = (
        "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    )
    return subprocess.run(
        [python, "-c", program, *names], check=True, capture_output=True, text=True
    ).stdout.strip()


def machine(bench: Bench, samples: Samples) -> str:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    with servers.connected(bench.postgres.dsn) as connection:
        postgres = connection.get_parameter_status("server_version")
    used = {variant for found in samples.values() for variant, rounds in found.items() if rounds}
    parts = [
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        f"server on core {SERVER_CORE}; PostgreSQL, publisher and clients on core {LOAD_CORE}",
        f"Python {platform.python_version()} with asyncio's own loop",
        packages(Path(sys.executable), "aiohttp", "aiopg", "psycopg2-binary"),
        f"PostgreSQL {postgres}, fsync off where nothing else is said",
    ]
    if "nchan" in used:
        parts.append(f"{servers.nchan_version(bench)}, one worker")
    if used & {"naive", RIVAL}:
        names = ("aiohttp-sse", RIVAL, "starlette", "uvicorn", "uvloop")
        parts.append(f"peers: {packages(bench.peers / 'python', *names)}")
    return "; ".join(parts) + "."
