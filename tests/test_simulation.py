"""The simulation: seeds, planted faults, its model of PostgreSQL, and its checker on a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.planted import FAULTS, Fault

SIMULATION = Path(__file__).with_name("simulation")
PROGRAM = SIMULATION.parent.parent / "sse_relay.py"


def simulate(*options: str) -> str:
    """Run the simulation in a process of its own, where hashes are fixed; return what it prints."""
    command = [sys.executable, str(SIMULATION), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.timeout(300)
def test_no_promise_is_broken_in_thirty_histories() -> None:
    # The same in every run: new ones are for `python tests/simulation --seconds 60`.
    assert "deliveries, 0 failed" in simulate("--first", "1", "--seeds", "30")


@pytest.mark.timeout(300)
def test_a_seed_always_plays_the_same() -> None:
    for source in ("notify", "log"):
        assert len({simulate("--seed", "12", "--source", source, "--trace") for _ in range(2)}) == 1


def test_the_seeds_that_once_failed_hold() -> None:
    assert ", 0 failed" in simulate("--corpus")


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_planted_fault_still_fits_the_program(fault: Fault) -> None:
    # That each is found: python tests/simulation --planted
    program = PROGRAM.read_text()
    assert fault.plant(program) != program


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_model_answers_as_a_real_server_does() -> None:
    assert "model and server agree on" in simulate("--compare", "3000", "--first", "1")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_log_keeps_its_promises_on_a_real_server() -> None:
    assert "0 violations" in simulate("--soak", "3000", "--clients", "6")
