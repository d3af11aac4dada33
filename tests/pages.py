"""The pages of the documentation, for the tests that hold them true: README, changelog and docs/*.md."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: str
    language: str
    text: str


@functools.cache
def pages() -> dict[str, str]:
    """Return all pages' texts by their paths, such as ``docs/log.md``."""
    paths = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def blocks(language: str, page: str | None = None) -> list[Block]:
    return [
        Block(path, *match.groups())
        for path, text in pages().items()
        if page in (None, path)
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def block(language: str, first: str, page: str | None = None) -> str:
    """Return the text of the only block of a language, on one page or on all, with this first line.

    ``first`` is the whole line; a block is also found by how it begins if no first line is just that.
    """
    candidates = [found.text for found in blocks(language, page)]
    exact = [text for text in candidates if text.partition("\n")[0] == first]
    chosen = exact or [text for text in candidates if text.startswith(first)]
    assert len(chosen) == 1, f"{len(chosen)} blocks in {language} begin with {first!r}"
    return chosen[0]


def prose(page: str) -> str:
    return FENCE.sub("", pages()[page])


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        seen[anchor] = seen.get(anchor, -1) + 1
        if seen[anchor]:
            seen[f"{anchor}-{seen[anchor]}"] = 0
    return set(seen)
