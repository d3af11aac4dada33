"""What a seed stands for: settings, and steps with their times, as data that JSON can hold.

Each step carries a seed of its own, so that a plan from which steps were taken away plays the others
as before: that is what makes shrinking possible.
"""

from __future__ import annotations

import random
from typing import Any

Plan = dict[str, Any]
Step = dict[str, Any]

# Seconds: publishing and faults, then calm.
BUSY = 12.0

CLIENTS = (6, 75)

# Bounds of the program, made small in some runs, so that they are met. By name: a test holds that
# the program has them.
KNOBS: dict[str, tuple[int, ...]] = {
    "WRITES_PER_TURN": (1, 3, 2_000),
    "BURST_EVENTS": (1, 7, 1_000),
    "RESUME_PIECE_BYTES": (1, 700, 262_144),
    "MAX_RESUME_EVENTS": (40, 10_000, 10_000),
    "LISTENS_PER_STATEMENT": (1, 2, 500),
    # Divided by ten where a row is damaged.
    "LOG_PAGE_ROWS": (10, 100, 1_000),
    "MAX_ADVANCED": (1, 1_000),
    "PRUNE_INTERVAL": (2, 60),
    "MAX_WOKEN": (3, 50_000),
}

# Kinds of faults, by what the world does, with how likely a plan has some, and what each is drawn from.
FAULTS: dict[str, tuple[float, dict[str, tuple[object, ...]]]] = {
    "session": (
        0.5,
        {
            "how": (
                "lost now", "lost before", "lost after", "cancelled", "refused", "frozen", "dead",
                "late 1", "late 12", "late 12",
            ),
            "for": (0.5, 3.0, 8.0),
        },
    ),
    "server": (0.5, {"how": ("stop", "crash", "crash", "fail over", "freeze"), "for": (0.2, 1.0, 4.0)}),
    "relay": (0.5, {"how": ("kill", "terminate", "suspend"), "for": (0.1, 1.0, 5.0)}),
    "clock": (0.5, {"by": (-3600.0, -5.0, 5.0, 3600.0)}),
    "wakeups": (0.5, {"for": (0.5, 5.0)}),
    "forge": (0.5, {}),
    "damage": (0.5, {}),
    "copy": (0.2, {"back": (0.1, 1.0, 3.0), "for": (0.2, 1.0)}),
}  # fmt: skip


def draw(seed: int, source: str | None = None) -> Plan:
    """Return the plan of a seed, for the source that it decides on or the one given."""
    chance = random.Random(f"plan {seed}")
    drawn = chance.choice(("notify", "log"))
    source = source or drawn
    relays = [f"r{number}" for number in range(chance.choice((1, 1, 2, 3)))]
    channels = ["c0", "a:b%c", "open", "c3", "ö", "c5"][: chance.choice((1, 3, 6))]
    faults = [kind for kind, (likely, _) in FAULTS.items() if chance.random() < likely]
    # Tokens and streams end by the clock.
    ageing = "clock" not in faults
    tokens = ageing and chance.random() < 0.5
    steps: list[Step] = []
    steps += [_client(chance, number, channels) for number in range(chance.randint(*CLIENTS))]
    steps += _transactions(chance, source, channels, chance.choice((20, 60, 150)))
    if tokens:
        steps += [_revocation(chance, steps) for _ in range(chance.randint(0, 3))]
    for kind in faults:
        steps += [_fault(chance, kind, relays) for _ in range(chance.randint(1, 4))]
    steps.sort(key=lambda step: float(step["at"]))
    knobs = {name: chance.choice(values) for name, values in KNOBS.items()}
    delay = chance.choice((0.0002, 0.001, 0.02))
    batch = chance.choice((3, 1_000))
    if delay > 0.01:
        # So slow a server cannot do everything in little steps.
        batch = knobs["LOG_PAGE_ROWS"] = knobs["MAX_ADVANCED"] = 1_000
        knobs["RESUME_PIECE_BYTES"] = 262_144
    settings = {
        "memory": chance.choice((20_000, 200_000, 64 << 20)),
        "max_backlog": chance.choice((2_000, 30_000, 262_144)),
        "linger": chance.choice((0.1, 2.0, 60.0)),
        "heartbeat": chance.choice((1.0, 5.0, 15.0)),
        "retry": chance.choice((0, 100, 500)),
        "max_age": chance.choice((None, 4.0)) if ageing else None,
    }
    if tokens or settings["max_age"] is not None or delay > 0.0002:
        # A stream of seconds ends before it has passed hundreds of events that its page shows, if each
        # is a page of its own; and the next begins where it began. Nor can a server that takes a
        # millisecond for each read tens of thousands of them one by one.
        knobs["RESUME_PIECE_BYTES"] = max(700, knobs["RESUME_PIECE_BYTES"])
    return {
        "seed": seed,
        "source": source,
        "relays": relays,
        "channels": channels,
        "settings": settings,
        "tokens": tokens,
        "knobs": knobs,
        "delay": delay,
        "retention": chance.choice((4.0, 86_400.0, 86_400.0)),
        "batch": batch,
        "steps": steps,
    }


def _seed(chance: random.Random) -> int:
    return chance.randrange(1 << 30)


def _client(chance: random.Random, number: int, channels: list[str]) -> Step:
    kind = chance.choice(("steady", "steady", "restless", "slow", "stalled"))
    wanted = chance.sample(channels, chance.randint(1, len(channels)))
    return {
        "at": 0.5 + chance.choice((0.0, BUSY * 0.8)) * chance.random(),
        "do": "client",
        "name": f"k{number}",
        "seed": _seed(chance),
        "channels": wanted,
        "kind": kind,
        "hops": chance.choice((0.0, 0.2, 1.0)),
        "http": 0 if chance.random() < 0.1 else 1,
        "room": chance.choice((300, 5_000, 150_000)),
        "born": chance.random() < 0.3,
        "away": chance.choice((0.0, 0.0, 5.0)),
        "beats": chance.random() < 0.2,
        "last": chance.choice((0, 0, 0, 3)),
        # Seconds that a token lasts, where tokens are asked for.
        "lasts": chance.choice((2.0, 6.0, 3_600.0)),
        # Seconds that a stream is kept; 0: until it ends.
        "stays": {"restless": [0.05, 0.3, 2.0], "slow": [0, 5.0], "stalled": [0, 8.0]}.get(kind, [0]),
        "pauses": {"slow": [0.001, 0.1, 0.5], "stalled": [0.001, 0.001, 4.0]}.get(kind, [0.001]),
        "sips": {"slow": [1, 60, 900], "restless": [7, 500, 1 << 24]}.get(kind, [1 << 24]),
    }


def _transactions(chance: random.Random, source: str, channels: list[str], count: int) -> list[Step]:
    steps = []
    large = chance.randrange(count) if source == "log" and chance.random() < 0.1 else -1
    for number in range(count):
        size = 900_000 if number == large else chance.choice((0, 10, 100, 100, 2_000))
        steps.append({
            "at": 1.0 + BUSY * chance.random(),
            "do": "transact",
            "name": f"t{number}",
            "seed": _seed(chance),
            "channels": channels,
            "events": 2 if size > 10_000 else chance.choice((1, 1, 2, 5, 30)),
            "pace": chance.choice((0.0, 0.0, 0.002, 0.1)),
            "size": size,
            "ends": chance.choices(("commit", "rollback"), (9, 1))[0],
            "savepoints": chance.random() < 0.2,
            "durable": chance.random() < 0.8,
        })  # fmt: skip
    return steps


def _revocation(chance: random.Random, steps: list[Step]) -> Step:
    client = chance.choice([step["name"] for step in steps if step["do"] == "client"])
    return {"at": 1.0 + BUSY * chance.random(), "do": "revoke", "client": client}


def _fault(chance: random.Random, kind: str, relays: list[str]) -> Step:
    step = {"at": 1.0 + BUSY * chance.random(), "do": kind, "seed": _seed(chance)}
    if kind in ("session", "relay", "clock"):
        step["relay"] = chance.choice(relays)
    return step | {name: chance.choice(values) for name, values in FAULTS[kind][1].items()}
