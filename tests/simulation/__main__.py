"""Run the simulation: ``python tests/simulation --seeds 1000``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from simulation.command import main  # noqa: E402  # now it can be found

main()
