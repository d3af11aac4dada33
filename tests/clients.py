"""Clients from PyPI, by the loops that the docs show.

Argument: ``{"NAME OF THE CLIENT": ["SOURCE THAT DEFINES follow()", "URL"], …}``. Each thing that happens is
a line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any


def run(client: str, source: str, url: str) -> None:
    def tell(name: str, data: str, position: str = "") -> None:
        line = json.dumps({"client": client, "name": name, "data": data, "id": position})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102  # the docs' own
    try:
        for event in names["follow"](url):
            tell(event.event, event.data, event.id or "")
    except PermissionError as refused:
        tell("PermissionError", str(refused))


for name, how in json.loads(sys.argv[1]).items():
    threading.Thread(target=run, args=(name, *how)).start()
