"""The benchmark's instruments count correctly, and its command runs. No figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import harness
from benchmark import report, servers
from benchmark.measure import PAYLOAD_BYTES, Load, Meter, compile_c, deliver, payloads
from benchmark.works import CPU, CUT, LOST, WORKS

COMMAND = (sys.executable, "tests/benchmark", "--only", "transactions")


@pytest.fixture(scope="module")
def sseload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    harness.require("cc", "gcc", "clang")
    return compile_c("sseload", tmp_path_factory.mktemp("sseload"))


def port_of(relay: harness.Relay) -> int:
    return int(relay.bind.rpartition(":")[2])


def test_load_client_counts_what_the_relay_sends(
    sseload: Path, relay: harness.Relay, database: harness.Database
) -> None:
    with Load(sseload, port_of(relay), 10, "--channels", "2", "--first-comment") as load:
        assert load.connect["ready"] == 10
        assert load.connect["connect_s"] > 0
        before = time.monotonic()
        load.reset()
        # One longer than what the client reads at once, one of several lines, one without a stamp.
        texts = [*payloads(20), next(payloads(1)) + "y" * 7_000, next(payloads(1)) + "\nmore", "no stamp"]
        for text in texts:
            database.notify("ch0", text)
        database.notify("ch1", next(payloads(1)))
        found = load.until(5 * 23 + 5, 10)
        elapsed = time.monotonic() - before
        assert (found.events, found.least, found.most, found.unstamped) == (5 * 23 + 5, 1, 23, 5)
        assert (found.disconnected, found.failed, found.refused, found.controls) == (0, 0, 0, 0)
        assert found.bytes > 5 * sum(map(len, texts))
        assert 0 < found.p50_ms <= found.p99_ms <= found.max_ms * 1.02 <= elapsed * 1020
        assert 0 < found.span_s <= found.elapsed_s <= elapsed

        # Events published before a reset do not count after it.
        late = next(payloads(1))
        load.reset()
        database.notify("ch0", late)
        database.notify("ch0", next(payloads(1)))
        assert load.until(5, 10).events == 5
        assert load.until(6, 0.1).events == 5

        relay.stop()
        assert harness.wait_until(lambda: load.until(1 << 40, 0).disconnected == 10)


def test_load_client_resumes_tells_gaps_from_events_and_stalls(
    sseload: Path, relay: harness.Relay, database: harness.Database
) -> None:
    with harness.SseReader(relay.url("ch0")) as reader:
        texts = list(payloads(10))
        for text in texts:
            database.notify("ch0", text)
        first = reader.wait_for_data(texts[0]).id
        reader.wait_for_data(texts[-1])
    with Load(sseload, port_of(relay), 3, "--last-event-id", first, "--first-comment") as load:
        found = load.until(27, 10)
        assert (found.events, found.least, found.most, found.controls) == (27, 9, 9, 0)
    with Load(sseload, port_of(relay), 3, "--last-event-id", "elsewhere-1", "--first-comment") as load:
        harness.wait_until(lambda: load.until(1 << 40, 0).controls == 3)
        assert load.until(0, 0).events == 0
    # Those that stall read nothing.
    with Load(sseload, port_of(relay), 5, "--stalled", "2", "--first-comment") as load:
        load.reset()
        for text in payloads(10):
            database.notify("ch0", text)
        found = load.until(30, 10)
        assert (found.events, found.least, found.most) == (30, 10, 10)
        assert load.until(31, 0.1).events == 30


@pytest.mark.slow
def test_limit_in_c_loses_nothing() -> None:
    with servers.Bench(tiny=True) as bench, bench.start("C limit") as server, bench.load(server, 20) as load:
        done = deliver(load, server.pids, server.send, 500, batch=50)
        assert (done.lost, done.report.least, done.report.most) == (0, 500, 500)
        assert done.report.bytes > 500 * 20 * PAYLOAD_BYTES
        assert done.cpu > 0


def test_meter_reads_the_cpu_of_others() -> None:
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = Meter(lambda: [spinning.pid])
        harness.wait_until(lambda: meter.read() > 0.05)
        own = time.process_time()
        while time.process_time() < own + 0.05:
            pass
        before = meter.read()
        spinning.kill()
        spinning.wait()
        assert meter.read() <= 0 < before
    finally:
        spinning.kill()
        spinning.wait()


def test_bars_are_of_figures_that_are_measured() -> None:
    assert {name for name, _ in report.BARS} <= set(WORKS)
    assert {name for name, _ in report.BARS} == {name for name, work in WORKS.items() if work.quick}


def test_a_bar_that_is_missed_is_told() -> None:
    figures = {
        "sse-relay": [{CPU: 4.0, LOST: 0, CUT: 0}, {CPU: 3.0, LOST: 0, CUT: 0}, {CPU: 2.0, LOST: 1, CUT: 0}],
        "nchan": [{CPU: 2.0, LOST: 0, CUT: 0}],
        "naive": [{CPU: 20.0, LOST: 0, CUT: 0}],
    }
    cpu, lost, *_ = report.table_of_bars({"steady": figures}).splitlines()[2:]
    assert cpu.endswith("| 1.50; 0.150;  | **no**; yes; not measured |")
    # One of three rounds lost an event: the median must not hide it.
    assert f"| {LOST} | 1.00 |" in lost
    assert lost.endswith("| **no** |")


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = ("transactions", "catch-up")
    command = [*COMMAND, "--only", "catch-up", "--tiny", "--json", str(file)]
    done = subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True)
    found = json.loads(file.read_text())
    assert set(found["samples"]) == set(names)
    for name in names:
        ((figures,),) = found["samples"][name].values()
        assert figures[LOST] == figures[CUT] == 0
        assert all(figure in figures for work, figure in report.BARS if work == name)
        assert f"| {WORKS[name].title} |" in done.stdout
    assert "PostgreSQL" in found["about"]
    assert found["about"] in done.stdout


@pytest.mark.slow
def test_terminated_it_leaves_nothing_behind(open_folder: Path) -> None:
    open_folder.chmod(0o755)  # PostgreSQL's user goes through it
    running = subprocess.Popen(
        COMMAND, cwd=harness.ROOT, env={**os.environ, "TMPDIR": str(open_folder)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stderr is not None
    try:
        assert "transactions 1/5" in running.stderr.readline()
        assert list(open_folder.iterdir())
        running.terminate()
        # Its children hold this pipe too, so none of them is left when it ends.
        running.stderr.read()
        assert running.wait(20) == 143
        assert not list(open_folder.iterdir())
    finally:
        running.kill()
        running.wait()
        running.stderr.close()
