"""Faults planted in the program, to test the checker: small patches of its text, each with a name.

They stand in planted.txt: what this program or those before it have done wrong, and what is easily done
wrong. A patch whose text is no longer there is an error: it must follow the program.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """A patch: its name, the source that shows it (None: both), and what is replaced by what.

    Attributes:
        seed: The first that shows it, counted from 1; 0: only what once failed does.
    """

    name: str
    seed: int
    source: str | None
    changes: tuple[tuple[str, str], ...]

    def plant(self, text: str) -> str:
        """Return the program's text with this fault.

        Raises:
            ValueError: The text to be replaced is not there.
        """
        for old, new in self.changes:
            if old not in text:
                raise ValueError(f"{self.name}: the program no longer has {old!r}")
            text = text.replace(old, new)
        return text


def _read(text: str) -> tuple[Fault, ...]:
    faults = []
    for part in re.split(r"\n\n(?=fault )", text)[1:]:
        title, _, body = part.partition("\n")
        seed, source, name = re.fullmatch(r"fault (\d+) (?:\[(\w+)\] )?(.*)", title).groups()  # type: ignore[union-attr]
        changes = []
        for change in body.strip("\n").split("\nand\n"):
            lines = change.split("\n")
            old, new = ("\n".join(line[1:] for line in lines if line[:1] == sign) for sign in "-+")
            changes.append((old, new))
        faults.append(Fault(name, int(seed), source, tuple(changes)))
    return tuple(faults)


FAULTS = _read(Path(__file__).with_name("planted.txt").read_text())
