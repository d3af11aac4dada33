"""Plays and judges seeds, and makes the plans of failures smaller."""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from simulation.checker import Checker, Violation
from simulation.plan import Plan, draw
from simulation.planted import Fault
from simulation.world import World

PROGRAM = Path(os.environ.get("SSE_RELAY_PROGRAM", Path(__file__).resolve().parents[2] / "sse_relay.py"))
# Plans that once failed, made small, each with what was wrong then. Plans, not seeds: what a seed stands for
# changes with `plan.draw`.
CORPUS = Path(__file__).with_name("corpus.jsonl")
# Of the processor. Most runs take a quarter of a second.
MAX_SECONDS = 60.0


def load(text: str | None = None) -> ModuleType:
    """Return the program under test as a module, from its own text or another."""
    module = ModuleType("sse_relay")
    module.__file__ = str(PROGRAM)
    sys.modules["sse_relay"] = module
    source = PROGRAM.read_text() if text is None else text
    exec(compile(source, str(PROGRAM), "exec"), module.__dict__)  # noqa: S102  # the program itself
    return module


@functools.cache
def the_program() -> ModuleType:
    """Return the program as it is, loaded once."""
    return load()


class RunawayError(BaseException):
    """A run that does not come to its end: time stands still. Nothing may catch it."""


def _run_away(*_: object) -> None:
    raise RunawayError(f"it takes more than {MAX_SECONDS} s, which is without end")


@dataclass
class Outcome:
    """What a run showed."""

    plan: Plan
    history: list[dict[str, Any]]
    violations: list[Violation]
    deliveries: int

    def digest(self) -> str:
        """Return a name of the whole history: equal runs have equal ones."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]

    def lines(self) -> Iterator[str]:
        """Return the history as lines of JSON."""
        return (json.dumps(record, ensure_ascii=False) for record in self.history)

    @property
    def command(self) -> str:
        """The line that repeats it."""
        return f"python tests/simulation --seed {self.plan['seed']} --source {self.plan['source']}"


def play(plan: Plan, module: ModuleType | None = None) -> Outcome:
    """Play a plan and judge its history."""
    # What the run before has left is all that is young, and quickly found while it is in the caches.
    gc.disable()
    gc.collect(0)
    world = World(module or the_program(), plan)
    signal.signal(signal.SIGVTALRM, _run_away)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        world.play()
    except RunawayError as error:
        world.timeline.note("error", on="the run", text=str(error))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    outcome = Outcome(plan, world.timeline.history, [], 0)
    checker = Checker(outcome.history)
    try:
        outcome.violations = checker.check()
    except Exception as error:
        error.add_note(outcome.command)
        raise
    outcome.deliveries = checker.deliveries
    return outcome


def play_seed(seed: int, source: str | None = None, module: ModuleType | None = None) -> Outcome:
    """Play the plan of a seed."""
    return play(draw(seed, source), module)


def play_all(seeds: Iterable[int], source: str | None, module: ModuleType | None = None) -> Iterator[Outcome]:
    """Play one seed after the other."""
    for seed in seeds:
        yield play_seed(seed, source, module)


def find(fault: Fault, seeds: Iterable[int]) -> Outcome | None:
    """Plant a fault, and play seeds and what once failed until one shows it; None if none does."""
    module = load(fault.plant(PROGRAM.read_text()))
    found = itertools.chain(
        play_all(seeds, fault.source, module), (play(plan, module) for plan in read_corpus())
    )
    return next((outcome for outcome in found if outcome.violations), None)


def read_corpus() -> list[Plan]:
    """Return the plans that once failed."""
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]


def shrink(plan: Plan, fails: Callable[[Plan], bool], tell: Callable[[int], object]) -> Plan:
    """Take steps away from a plan as long as it fails in the same way."""
    steps = plan["steps"]
    size = len(steps) // 2
    while size:
        start = 0
        while start < len(steps):
            fewer = {**plan, "steps": steps[:start] + steps[start + size :]}
            if fails(fewer):
                plan, steps = fewer, fewer["steps"]
                tell(len(steps))
            else:
                start += size
        size //= 2
    return plan
