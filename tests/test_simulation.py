"""The simulation: new seeds, those that once failed, and that a seed always plays the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SIMULATION = Path(__file__).with_name("simulation")


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
