"""The simulation: seeds, planted faults, its model of PostgreSQL, and its checker on a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.planted import FAULTS, Fault

SIMULATION = Path(__file__).with_name("simulation")
PROGRAM = SIMULATION.parent.parent / "sse_relay.py"


# Plays seeds in one process, one after the other.
PLAY = """
import sys
from simulation import run
for seed in sys.argv[1:]:
    for source in ("notify", "log", None):
        print(seed, source, run.play_seed(int(seed), source).digest())
"""


def simulate(*options: str, hash_seed: str = "0") -> str:
    """Run the simulation in a process of its own, which fixes hashes; return what it prints."""
    command = [sys.executable, str(SIMULATION), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
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
        options = ("--seed", "12", "--source", source, "--trace")
        assert simulate(*options, hash_seed="1") == simulate(*options, hash_seed="2")


def test_a_history_depends_on_nothing_that_the_process_played_before() -> None:
    seeds = ["12", "50043", "50076", "50186", "8343357"]
    env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(SIMULATION.parent)}
    there, back = (
        subprocess.check_output([sys.executable, "-c", PLAY, *order], env=env, text=True, timeout=120)
        for order in (seeds, seeds[::-1])
    )
    histories = sorted(there.splitlines())
    assert histories == sorted(back.splitlines())
    # The source that a seed decides on, and the same when it is given, are one history.
    assert len({line.split()[2] for line in histories}) == 2 * len(seeds)


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
